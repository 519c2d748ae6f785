"""Pairs (z, y) for paired regression: noise and what a teacher's deterministic sampler makes of it (DMD, arXiv 2311.18828, §4.2; our sheet, §5)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from limbeck import seeds
from limbeck.contract import Frozen
from limbeck.diffusion.consistency import huber_constant, pseudo_huber
from limbeck.diffusion.denoisers import Denoiser
from limbeck.diffusion.distribution import normal, random_labels
from limbeck.diffusion.generator import TeacherSampler
from limbeck.modes import evaluating

Distance = Literal["squared", "pseudo_huber"]


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


@torch.no_grad()
def make_pairs(denoiser: Denoiser, count: int, steps: int, seed: int, device: torch.device, *, sampler: str = "heun", batch_size: int = 256) -> Pairs:
    """`count` pairs by a deterministic sampler in `steps` steps, labels drawn uniformly.

    A function of seed and denoiser alone, so that they can be made again after a restart and no checkpoint holds them.
    """
    generator, teacher = seeds.generator(seed, "pairs", device=device), TeacherSampler(denoiser, steps, sampler=sampler)
    noise, cond = normal(count, denoiser.shape, generator), random_labels(count, denoiser.num_classes, generator)
    parts = [slice(first, first + batch_size) for first in range(0, count, batch_size)]
    with evaluating(denoiser):
        return Pairs(noise, torch.cat([teacher(noise[part], None if cond is None else cond[part]) for part in parts]), cond)


def pair_distance(x: Tensor, y: Tensor, kind: Distance) -> Tensor:
    """A scalar: squared: mean over all entries of (x − y)². pseudo_huber: mean over samples of `consistency.pseudo_huber`, c = 0.00054 √d (arXiv 2310.14189).

    DMD takes LPIPS, which needs a pretrained network that is not part of this library.
    """
    return (x - y).square().mean() if kind == "squared" else pseudo_huber(x, y, huber_constant(x.shape[1:])).mean()
