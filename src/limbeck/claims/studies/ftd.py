"""What the claim of FTD (2211.11004) measures beside accuracy: how sharp the experts are, and the error that a student gathers along their paths."""

from __future__ import annotations

from functools import partial
from itertools import pairwise
from statistics import fmean
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from limbeck.contract import Clock
from limbeck.methods.datasets.ftd import FTD, FTDConfig
from limbeck.synthetic.smoothness import accumulated_error, error_parts, sharpness


class MeasuredFTDConfig(FTDConfig):
    """Knobs of `MeasuredFTD`."""

    sharpness_radius: float = Field(
        0.1, gt=0, description="ρ of the one step of ascent by which the experts' sharpness is measured; no matter how they were trained"
    )


class MeasuredFTD(FTD):
    """FTD that, when it is done, measures experts and errors. It trains exactly as `FTD` does."""

    Config: ClassVar[type[FTDConfig]] = MeasuredFTDConfig

    def facts(self) -> dict[str, Any]:
        """Those of `FTD`, and in `metrics`, each a mean over the experts, with e the last epoch that segments of E epochs reach:

        sharpness: Loss(θ*_e + ρ v) − Loss(θ*_e) on all real images; expert_loss: Loss(θ*_e). accumulated_error: ‖ε_e‖/‖θ*_e − θ*_0‖ of a student that goes
        on from its own weights after every segment (5); matching_error: the same after the first segment, which starts on the expert; start_error: ‖I‖ of the
        last segment over the same way, that is, what starting off the expert adds. step_size: η.
        """
        found = super().facts()
        rows = [self.measured(expert) for expert in range(self.experts.count)]
        return found | {"metrics": {name: fmean(row[name] for row in rows) for name in rows[0]} | {"step_size": found["step_size"]}}

    def measured(self, expert: int) -> dict[str, float]:
        """Of one expert; see `facts`."""
        span, device = self.config.expert_epochs, self.synthetic.images.device
        last = (self.config.latest_start - 1 + span) // span * span
        images, labels = self.prepared(torch.arange(len(self.data))).to(device), self.labels.to(device)
        path = [self.experts.weights(expert, epoch).to(device) for epoch in range(0, last + 1, span)]

        def loss(theta_P: Tensor) -> Tensor:
            return F.cross_entropy(self.flat(theta_P, images), labels)

        with torch.no_grad():
            measured = {"expert_loss": float(loss(path[-1]))}
        measured["sharpness"] = float(sharpness(loss, path[-1], self.config.sharpness_radius))
        reached = path[0]
        for number, (here, target) in enumerate(pairwise(path)):
            parts = error_parts(reached, here, target, partial(self.displacement, segment=number))
            reached = target + parts.carried + parts.start + parts.matching
            if number == 0:
                measured["matching_error"] = float(accumulated_error(reached, target, path[0]))
        way = (path[-1] - path[0]).norm()
        return measured | {"accumulated_error": float(accumulated_error(reached, path[-1], path[0])), "start_error": float(parts.start.norm() / way)}

    def displacement(self, theta_P: Tensor, segment: int) -> Tensor:
        """U_S(θ) [P]: how far T steps on the images move the weights. Batches and augmentations depend on the number of the segment."""
        images, eta = [self.synthetic.images.detach()], self.synthetic.step_size.detach()
        loss, here_P = self.step_loss(Clock(seed=self.seed, phase="measure", phase_index=1, step=segment, device=images[0].device)), theta_P
        for t in range(self.config.steps):
            leaf_P = here_P.detach().requires_grad_()
            here_P = here_P - eta * torch.autograd.grad(loss(leaf_P, images, t), leaf_P)[0]
        return here_P - theta_P
