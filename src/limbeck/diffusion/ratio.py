"""The density ratio r = p/q out of a discriminator, and weights h(r) that keep a mean of one (arXiv 2502.15681; our sheet `f_distill`, eqs. 3 to 6).

A discriminator trained with softplus(ℓ_fake) + softplus(−ℓ_real) ends at ℓ = log p − log q, so r̂ = exp ℓ. Since E_q[r] = 1 at every noise level, r̂ is
divided by its mean per bin of noise levels (stage 1), and the weights by their mean over the batch (stage 2).

Legend: B samples, H heads, N bins; t [B] float64. Everything is detached, float32, and stays on the device. Sums run over all processes where the
caller says how (`contract.Clock.total`), else over the batch at hand. Micro-batches count as batches of their own, of which several processes need not have
equally many: see `not_in_parts`. A sample whose logit is no number counts for nothing: r̂ = 1, and no sum has it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from limbeck.diffusion.f_divergences import Divergence
from limbeck.diffusion.schedules import NoiseSchedule
from limbeck.errors import InputError

Stages = Literal["both", "ratio", "weight", "none"]
"""Which normalisations are done: of the ratio per noise bin (1), of the weights over the batch (2)."""
BinAxis = Literal["index", "time", "log_level"]
LEVELS = 1000
"""Length of the list of times that the axis 'index' counts along."""
SMALLEST = 1e-6
"""Added to every mean that is divided by (FastGen's)."""
SMALLEST_LEVEL = 1e-4
"""The least noise level σ/α that the axis 'log_level' tells apart (ours: some schedules begin at 0)."""


Total = Callable[[Tensor], Tensor]
"""A tensor's sum over all processes (`contract.Clock.total`)."""


def alone(sums: Tensor) -> Tensor:
    """The sum over the one process that there is: the tensor itself."""
    return sums


class Ratio(NamedTuple):
    """r̂ [B] float32, [B] bool where a clip moved it, and [B] bool where the logit was a number."""

    value: Tensor
    clipped: Tensor
    known: Tensor


def density_ratio(logits_BH: Tensor, *, logit_clip: float = 10.0, low: float = 0.1, high: float = 20.0) -> Ratio:
    """r̂ = clip(exp(clip(ℓ, ±logit_clip)), low, high) with ℓ the mean of the heads' logits, without gradient (our sheet, eq. 4; FastGen's numbers).

    Where ℓ is NaN or infinite r̂ is 1, not clipped and not known (ours).

    Args:
        logits_BH: [B, H], ℓ > 0 says real. logit_clip: bound on ℓ before the exponential. low, high: bounds on the ratio itself.

    Raises:
        InputError: bounds that are not 0 < low ≤ high.
    """
    if not 0 < low <= high:
        raise InputError(f"the ratio's bounds must satisfy 0 < low ≤ high, these are {low} and {high}.", where="ratio_low")
    logit_B = logits_BH.detach().float().mean(1)
    known_B = logit_B.isfinite()
    raw_B = torch.where(known_B, logit_B, torch.zeros_like(logit_B)).clamp(-logit_clip, logit_clip).exp()
    value_B = torch.where(known_B, raw_B.clamp(low, high), torch.ones_like(raw_B))
    return Ratio(value_B, (value_B != raw_B) & known_B, known_B)


def noise_bins(schedule: NoiseSchedule, t: Tensor, count: int, axis: BinAxis = "index") -> Tensor:
    """[B] int64 in 0..count−1: which of `count` equally wide parts of [t_min, t_max] a time lies in, measured along `axis`.

    index: the place in `schedule.grid(1000)`, the list that times are drawn from uniformly, so that every bin gets as many samples (ours, the default).
    time: t itself (FastGen; with EDM's list 64 % of the draws fall into the lowest of ten bins). log_level: log σ/α (ours).
    """
    if axis == "index":
        grid = schedule.kept_grid(LEVELS, t.device)
        place = (torch.searchsorted(grid, t.contiguous(), right=True) - 1).double() / LEVELS
    elif axis == "time":
        place = (t.double() - schedule.t_min) / (schedule.t_max - schedule.t_min)
    else:
        ends = (torch.full((), end, dtype=torch.float64, device=t.device) for end in (schedule.t_min, schedule.t_max))
        low, high = (schedule.level(end).clamp_min(SMALLEST_LEVEL).log() for end in ends)
        place = (schedule.level(t).clamp_min(SMALLEST_LEVEL).log() - low) / (high - low)
    return (place * count).long().clamp(0, count - 1)


class BinnedMean:
    """Stage 1: the mean of r̂ per bin, b_k ← ρ b_k + (1 − ρ) mean_k for bins that the batch visits (start: 1), and r̃ = r̂/(b_k + 1e-6).

    decay: ρ in [0, 1). With 0 a bin's mean is that of the current batch, so that r̃ has the mean 1 in every bin, and a sample that is alone in its bin gets 1.

    Attributes:
        means_N: [N] float32, the b_k.
    """

    def __init__(self, count: int, decay: float = 0.0) -> None:
        if count < 1 or not 0 <= decay < 1:
            raise InputError(f"bins must be 1 or more and their decay in [0, 1), these are {count} and {decay}.", where="bins")
        self.decay = decay
        self.means_N = torch.ones(count)

    def normalise(self, ratio_B: Tensor, bins_B: Tensor, known_B: Tensor | None = None, total: Total = alone) -> Tensor:
        """r̃ [B]: takes the batch into the means, then divides by them.

        bins_B: [B] int64, see `noise_bins`. known_B: [B] bool, who counts (None: all). total: sums over the processes.
        """
        self.means_N = self.means_N.to(ratio_B.device)
        member_BN = torch.nn.functional.one_hot(bins_B, len(self.means_N)).to(ratio_B.dtype)
        if known_B is not None:
            member_BN = member_BN * known_B.unsqueeze(1)
        sums_N, counts_N = total(torch.stack([ratio_B @ member_BN, member_BN.sum(0)])).unbind()
        moved_N = self.decay * self.means_N + (1 - self.decay) * sums_N / counts_N.clamp_min(1)
        self.means_N = torch.where(counts_N > 0, moved_N, self.means_N)
        return ratio_B / (self.means_N[bins_B] + SMALLEST)

    def state_dict(self) -> dict[str, Any]:
        """The means, which a restart needs where ρ > 0."""
        return {"means": self.means_N}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put them back. Raises InputError: of another number of bins."""
        if len(state["means"]) != len(self.means_N):
            raise InputError(f"the checkpoint has {len(state['means'])} bins, the recipe {len(self.means_N)}.", where="bins")
        self.means_N = state["means"]


def mean_one(weights_B: Tensor, known_B: Tensor | None = None, total: Total = alone) -> Tensor:
    """Stage 2: h̄ = h/(mean of h over the global batch + 1e-6), [B].

    known_B: [B] bool, whose weights count in the mean (None: all); of none it is 1. total: sums over the processes.
    """
    counts_B = torch.ones_like(weights_B) if known_B is None else known_B.to(weights_B.dtype)
    summed, count = total(torch.stack([(weights_B * counts_B).sum(), counts_B.sum()])).unbind()
    return weights_B / (torch.where(count > 0, summed / count.clamp_min(1), 1.0) + SMALLEST)


def not_in_parts(micro: int, world: int) -> None:
    """Raise InputError in a micro-batch but the first where there are several processes: one with more of them than another would wait for ever in a sum."""
    if micro > 0 and world > 1:
        fix = "Set train.accumulate to 1, or use one process."
        raise InputError("weights over all processes cannot be had of batches that are cut into parts.", where="train.accumulate", fix=fix)


class Weights(NamedTuple):
    """h̄ [B] float32, without gradient, and [B] bool which ratios were clipped."""

    value: Tensor
    clipped: Tensor


class RatioWeights:
    """From logits to h̄: eqs. 4, 5 and 6 of our sheet in a row, with the state of stage 1.

    Args:
        divergence: whose h. bins: of stage 1. axis: see `noise_bins`. stages: which normalisations are done. logit_clip, low, high: see `density_ratio`.
    """

    def __init__(
        self,
        divergence: Divergence,
        bins: BinnedMean,
        *,
        axis: BinAxis = "index",
        stages: Stages = "both",
        logit_clip: float = 10.0,
        low: float = 0.1,
        high: float = 20.0,
    ) -> None:
        self.divergence, self.bins, self.axis, self.stages = divergence, bins, axis, stages
        self.logit_clip, self.low, self.high = logit_clip, low, high

    def __call__(self, logits_BH: Tensor, schedule: NoiseSchedule, t: Tensor, total: Total = alone) -> Weights:
        """h̄ of the samples whose logits at x_t these are.

        logits_BH: [B, H], of the very x_t whose scores are weighted. t: [B] their times. total: sums over the processes.
        """
        r_B, clipped_B, known_B = density_ratio(logits_BH, logit_clip=self.logit_clip, low=self.low, high=self.high)
        if self.stages in ("both", "ratio"):
            r_B = self.bins.normalise(r_B, noise_bins(schedule, t, len(self.bins.means_N), self.axis), known_B, total)
        h_B = self.divergence.h(r_B)
        return Weights(mean_one(h_B, known_B, total) if self.stages in ("both", "weight") else h_B, clipped_B)


class WeightStatistics:
    """What became of ratios, weights and directions over a training, without a look at them on the way; of this process alone.

    Attributes:
        sums: [5] float64: generator steps, and sums over them of the share of clipped ratios, the weights' coefficient of variation, ‖g‖ and ‖g‖².
    """

    def __init__(self) -> None:
        self.sums = torch.zeros(5, dtype=torch.float64)

    def add(self, g: Tensor, weights: Weights | None) -> dict[str, Tensor]:
        """Takes a step in; metrics to log. weights: None counts as h̄ = 1 and nothing clipped."""
        norm, none = g.norm(), g.new_zeros(())
        found = {"direction": norm}
        if weights is not None:
            h_B, clipped_B = weights
            found |= {"weight_min": h_B.min(), "weight_mean": h_B.mean(), "weight_max": h_B.max(), "clipped": clipped_B.float().mean()}
            found["weight_cv"] = h_B.std(correction=0) / (found["weight_mean"] + SMALLEST)
        row = torch.stack([none + 1, found.get("clipped", none), found.get("weight_cv", none), norm, norm.square()])
        self.sums = self.sums.to(g.device) + row
        return found

    def summary(self) -> dict[str, float]:
        """clipped and weight_cv, means over the steps; direction_cv, the coefficient of variation of ‖g‖ over the steps. Empty before the first step."""
        steps, clipped, cv, norm, square = self.sums.tolist()
        if not steps:
            return {}
        found = {"clipped": clipped / steps, "weight_cv": cv / steps}
        return found | {"direction_cv": max(square * steps / norm**2 - 1, 0.0) ** 0.5} if norm else found
