"""Pairs (z, y) for paired regression: noise and what a teacher's deterministic sampler makes of it (DMD, arXiv 2311.18828, §4.2; our sheet, §5)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from limbeck import seeds
from limbeck.contract import Frozen
from limbeck.diffusion import samplers
from limbeck.diffusion.denoisers import Denoiser
from limbeck.diffusion.distribution import normal, random_labels
from limbeck.modes import evaluating

Distance = Literal["squared", "pseudo_huber"]
HUBER = 0.00054
"""c = 0.00054 √d of the pseudo-Huber distance (arXiv 2310.14189, §3.3)."""


class RegressionSpec(Frozen):
    """Paired regression as DMD has it: knobs."""

    weight: float = Field(0.0, ge=0, le=1e6, description="w_reg beside the other losses (DMD: 0.25 with LPIPS; DMD2: 0)")
    distance: Distance = Field("squared", description="ℓ; LPIPS, which DMD takes, is not available here")
    pairs: int = Field(10_000, ge=1, le=10_000_000, description="pairs that the teacher makes once, if any are used (SDXL in one step: 10000)")
    steps: int = Field(18, ge=1, le=1000, description="Heun steps of a pair (2 · steps − 1 calls)")
    warm_up: int = Field(0, ge=0, le=10**9, description="batches of regression alone before all else (SDXL in one step: 2000)")

    @property
    def used(self) -> bool:
        """Whether there must be pairs."""
        return self.weight > 0 or self.warm_up > 0


@dataclass(frozen=True)
class Pairs:
    """noise z [N, *shape], samples y [N, *shape] in network units, cond [N] int64 or None."""

    noise: Tensor
    samples: Tensor
    cond: Tensor | None = None

    def draw(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor | None]:
        """`count` of them with replacement; the pairs must be where the generator is."""
        which = torch.randint(len(self.noise), (count,), generator=generator, device=generator.device)
        return self.noise[which], self.samples[which], None if self.cond is None else self.cond[which]

    def to(self, device: torch.device) -> Pairs:
        """The same pairs on a device (themselves, if they are there)."""
        if self.noise.device == device:
            return self
        return Pairs(self.noise.to(device), self.samples.to(device), None if self.cond is None else self.cond.to(device))

    def state_dict(self) -> dict[str, Tensor]:
        """The tensors by name."""
        return {"noise": self.noise, "samples": self.samples} | ({} if self.cond is None else {"cond": self.cond})

    @staticmethod
    def of(state: Mapping[str, Tensor]) -> Pairs:
        """The pairs of a `state_dict`."""
        return Pairs(state["noise"], state["samples"], state.get("cond"))


@torch.no_grad()
def make_pairs(denoiser: Denoiser, spec: RegressionSpec, seed: int, device: torch.device, batch_size: int = 256) -> Pairs:
    """`spec.pairs` pairs by Heun's sampler in `spec.steps` steps, with labels drawn uniformly: a function of the seed and the denoiser alone."""
    times, count, generator = denoiser.schedule.steps(spec.steps), spec.pairs, seeds.generator(seed, "pairs", device=device)
    noise, cond = normal(count, denoiser.shape, generator), random_labels(count, denoiser.num_classes, generator)
    found = []
    with evaluating(denoiser):
        for first in range(0, count, batch_size):
            z = noise[first : first + batch_size]
            start = denoiser.schedule.start(z, samplers.at(times[0], z))
            found.append(samplers.heun(denoiser, start, times, None if cond is None else cond[first : first + batch_size]))
    return Pairs(noise, torch.cat(found), cond)


def pair_distance(x: Tensor, y: Tensor, kind: Distance) -> Tensor:
    """A scalar: squared: mean over all entries of (x − y)². pseudo_huber: mean over samples of √(‖x − y‖² + c²) − c, c = 0.00054 √d.

    DMD takes LPIPS, which needs a pretrained network that is not part of this library.
    """
    if kind == "squared":
        return (x - y).square().mean()
    squared = (x - y).square().flatten(1)
    c = HUBER * math.sqrt(squared.shape[1])
    return ((squared.sum(1) + c**2).sqrt() - c).mean()
