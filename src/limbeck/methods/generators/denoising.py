"""Training a denoiser on data: how diffusion teachers are made (Karras et al. 2022, arXiv 2206.00364; Ho and Salimans 2022, arXiv 2207.12598).

L = E_{x0, ε, t} w(t) ‖D(α_t x0 + σ_t ε, t, c) − x0‖² with w such that the error of the network's own output has weight 1 (eq. 8: λ = 1/c_out² with EDM's
preconditioning), t from the schedule's usual distribution, and the condition dropped for a share of the samples, so that guidance is possible.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from limbeck.contract import IGNORE, Artefact, Batch, Clock, Frozen, Paper, Update
from limbeck.diffusion.denoisers import NetworkDenoiser, denoising_loss
from limbeck.diffusion.distribution import normal
from limbeck.diffusion.levels import LevelSpec, default_levels
from limbeck.errors import InputError
from limbeck.methods.generators._base import GeneratorMethod


class DenoisingConfig(Frozen):
    """Knobs of `Denoising`."""

    drop_condition: float = Field(0.1, ge=0, le=1, description="share of samples whose class is hidden, which guidance needs")
    levels: LevelSpec | None = Field(None, description="how times are drawn; null: lognormal for edm, logit-normal for flow, uniform else")


class Denoising(GeneratorMethod):
    """A diffusion model trained on data; classes are its conditions where the network takes them. What comes out is the denoiser."""

    Config = DenoisingConfig
    paper: ClassVar[Paper] = Paper("Elucidating the Design Space of Diffusion-Based Generative Models", "2206.00364", "NeurIPS", 2022, "NVlabs/edm")
    needs_teacher = False

    def setup(self) -> None:
        """Check the student. Raises InputError: it is no network that denoises."""
        if not isinstance(self.student, NetworkDenoiser):
            raise InputError(f"'denoising' trains a denoiser, the student is {type(self.student).__name__}.", where="student.model", fix="Use unet_denoiser.")
        self.denoiser = self.student
        self.levels = self.config.levels or default_levels(self.student.schedule)

    def inference(self) -> nn.Module:
        """The denoiser; whoever samples chooses the sampler."""
        return self.denoiser

    def artefact(self) -> Artefact:
        """The denoiser."""
        return Artefact("denoiser", self.denoiser)

    def notice(self, row: Mapping[str, float]) -> Sequence[str]:
        """Nothing: there is neither critic nor generator."""
        return ()

    def state_dict(self) -> dict[str, Any]:
        """None beyond the denoiser."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Nothing to put back."""

    def updates(self, batch: Batch, clock: Clock) -> Iterator[Update]:
        """One update of the denoiser."""
        denoiser, generator = self.denoiser, clock.generator("noise")
        t = self.levels.sample(denoiser.schedule, len(batch), generator)
        noise = normal(len(batch), denoiser.shape, generator)
        cond = conditions(batch, denoiser.num_classes, self.config.drop_condition, generator)
        yield Update("student", denoising_loss(denoiser, batch.inputs, t, noise, cond))


def conditions(batch: Batch, num_classes: int, drop: float, generator: torch.Generator) -> Tensor | None:
    """[B] the batch's labels, a share of them (and the unlabelled) replaced by the null class; None for a network without classes."""
    if not num_classes or batch.targets is None:
        return None
    hidden = batch.targets == IGNORE
    if drop:
        hidden = hidden | (torch.rand(len(batch), generator=generator, device=generator.device) < drop)
    return batch.targets.masked_fill(hidden, num_classes)
