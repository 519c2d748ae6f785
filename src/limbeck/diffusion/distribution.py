"""Distribution matching: the difference of two denoisers as a direction for samples, and how it becomes a loss (our sheet, §7).

The student's x gets the gradient W·(D_critic − D_teacher); neither denoiser gets any. Shapes: x, directions [B, ...]; t [B] float64; weights [B].
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from limbeck.diffusion.denoisers import Denoiser
from limbeck.diffusion.schedules import NoiseSchedule, divisor, expand
from limbeck.errors import InputError

Weight = Literal["normalised", "unit", "eps"]
SMALLEST_MEAN = 1e-6


@dataclass(frozen=True)
class Direction:
    """g [B, ...] and what it came from: x_t, t, and which samples had entries that are no numbers (their g is 0). No gradient."""

    g: Tensor
    x_t: Tensor
    t: Tensor
    broken: Tensor
    """[B] bool."""


def direction_weight(x: Tensor, teacher_x0: Tensor, t: Tensor, schedule: NoiseSchedule, kind: Weight) -> Tensor:
    """[B]: W of a score-difference method.

    normalised: 1/(mean |x − D_T| + 1e-6) (DMD, arXiv 2311.18828, eq. 8; DMD2's code). unit: 1, i.e. w = σ²/α in the score (Diff-Instruct's code for EDM).
    eps: α/σ, which makes the direction ε_T − ε_critic (SwiftBrush, VSD with w = 1 there).

    Raises:
        InputError: the kind is unknown.
    """
    if kind not in ("normalised", "unit", "eps"):
        raise InputError(f"unknown weight '{kind}'.", where="weight", fix="Use normalised, unit or eps.")
    if kind == "normalised":
        return 1 / ((x - teacher_x0).abs().flatten(1).mean(1) + SMALLEST_MEAN)
    if kind == "unit":
        return torch.ones(len(x), dtype=x.dtype, device=x.device)
    return (schedule.alpha(t) / divisor(schedule.sigma(t))).to(x.dtype)


@torch.no_grad()
def score_direction(
    x: Tensor,
    teacher: Denoiser,
    critic: Denoiser,
    t: Tensor,
    noise: Tensor,
    cond: Tensor | None = None,
    *,
    weight: Weight = "normalised",
    factor: Tensor | None = None,
) -> Direction:
    """g = W·(D_critic(x_t, t) − D_teacher(x_t, t)) at x_t = α x + σ ε; a step against g moves x towards the teacher's distribution.

    factor: [B], what W is multiplied by (f-distill's weights). A sample with an entry that is not finite gets g = 0 and is marked as broken.
    """
    x = at_least_float32(x.detach())
    x_t = teacher.schedule.add_noise(x, noise, t)
    real, fake = teacher(x_t, t, cond), critic(x_t, t, cond)
    scale = direction_weight(x, real, t, teacher.schedule, weight)
    if factor is not None:
        scale = scale * factor.to(scale.dtype)
    g, broken = without_broken(expand(scale, x) * (fake - real))
    return Direction(g, x_t, t, broken)


def at_least_float32(x: Tensor) -> Tensor:
    """A tensor of half precision as float32, any other as it is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def without_broken(g: Tensor) -> tuple[Tensor, Tensor]:
    """The direction with every sample that holds a NaN or an infinity set to 0, and [B] bool which those were."""
    broken = ~g.isfinite().flatten(1).all(1)
    return torch.where(expand(broken, g), torch.zeros_like(g), g), broken


def guarded(x: Tensor) -> Tensor:
    """x [B, ...]; on the way back the gradient of a sample that holds a NaN or an infinity becomes 0, so that it reaches nothing behind x."""
    if not x.requires_grad:
        return x
    seen = x.view_as(x)
    seen.register_hook(lambda gradient: without_broken(gradient)[0])
    return seen


def inject(x: Tensor, g: Tensor, reduction: Literal["mean", "sum"] = "mean") -> Tensor:
    """A scalar whose gradient in x is the detached g; computed in float32 or better, as half precision would round a small g away.

    mean: 0.5·mean((x − sg[x − g])²), gradient g/numel, value 0.5·mean(g²) (DMD2). sum: Σ_entries sg[g]·x averaged over the batch, gradient g/B (Diff-Instruct).

    Raises:
        InputError: the reduction is unknown.
    """
    if reduction not in ("mean", "sum"):
        raise InputError(f"unknown reduction '{reduction}'.", where="reduction", fix="Use mean or sum.")
    x, g = at_least_float32(x), at_least_float32(g.detach())
    if reduction == "mean":
        return 0.5 * (x - (x - g).detach()).square().mean()
    return (g * x).flatten(1).sum(1).mean()


@contextmanager
def untrained(*modules: nn.Module) -> Iterator[None]:
    """The modules' parameters take no gradient within: what a loss passes *through* them costs no arithmetic for their weights."""
    kept = [p for module in modules for p in module.parameters() if p.requires_grad]
    for parameter in kept:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in kept:
            parameter.requires_grad_(True)


def random_labels(count: int, num_classes: int, generator: torch.Generator) -> Tensor | None:
    """[count] int64 classes drawn uniformly; None without classes."""
    return torch.randint(num_classes, (count,), generator=generator, device=generator.device) if num_classes else None


def normal(count: int, shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """[count, *shape] float32 standard normal noise on the generator's device."""
    return torch.randn(count, *shape, generator=generator, device=generator.device)
