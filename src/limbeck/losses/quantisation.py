"""Quantised tensors: buckets, levels, learnable points (1802.05668; equation numbers are those of our sheet).

Legend: T tensors laid end to end make a vector v of N entries, cut into M buckets of k entries (a tensor's last bucket may be shorter; none
reaches over a tensor's end, but they do cross filters). u = (v − low)/(high − low) in [0, 1] is an entry's place between its bucket's extrema,
index its level or point, position û the place of that level, Q(v) the quantised entry. s = 2^bits levels, S points in all.
float32 and float64; everything is computed in the dtype it comes in, on the device it is on, for all buckets at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

PointInit = Literal["quantile", "uniform"]
"""Where points start: at the quantiles of the scaled tensor, or evenly spaced (eq. 8)."""

CONSTANT = 1e-10
"""A bucket whose range is smaller counts as constant: it is scaled by 1, so that u = 0, and stays what it is."""


@dataclass(frozen=True)
class Buckets:
    """How T tensors lie in one vector: their sizes [T], the number of buckets M, and the bucket of each entry, [N] int64."""

    sizes: tuple[int, ...]
    count: int
    of_entry: Tensor


@dataclass(frozen=True)
class Scaled:
    """Entries relative to their buckets: u [N] in [0, 1], low and high [M] the extrema."""

    u: Tensor
    low: Tensor
    high: Tensor
    buckets: Buckets


@lru_cache(maxsize=8)
def buckets(sizes_T: tuple[int, ...], bucket: int | None, device: torch.device) -> Buckets:
    """Cut tensors of these sizes into buckets of `bucket` entries; None: one bucket a tensor."""
    lengths = [min(bucket or size, size - start) for size in sizes_T for start in range(0, size, bucket or size)]
    bucket_N = torch.repeat_interleave(torch.arange(len(lengths), device=device), torch.tensor(lengths, device=device))
    return Buckets(sizes_T, len(lengths), bucket_N)


def scale(flat_N: Tensor, cut: Buckets) -> Scaled:
    """u = (v − low)/(high − low), bucket by bucket. A last bucket padded with its last element (the paper's) has the same extrema."""
    low_M = flat_N.new_full((cut.count,), torch.inf).scatter_reduce(0, cut.of_entry, flat_N, "amin")
    high_M = flat_N.new_full((cut.count,), -torch.inf).scatter_reduce(0, cut.of_entry, flat_N, "amax")
    range_M = high_M - low_M
    range_M = torch.where(range_M < CONSTANT, 1.0, range_M)
    u_N = (flat_N - low_M.index_select(0, cut.of_entry)) / range_M.index_select(0, cut.of_entry)
    return Scaled(u_N, low_M, high_M, cut)


def place(position_N: Tensor, scaled: Scaled) -> Tensor:
    """Q(v) = low + (high − low) û, from the nearer end, so that û = 0 and û = 1 give the bucket's extrema bit by bit.

    Differentiable in û: dQ/dû = high − low, which is eq. 7 once û_i = p_{j(i)}. A constant bucket has slope 0 here and stays what it is
    (the paper's α := 1 would let the points move it). Each operation rounds by itself, so that every machine computes the same bits.
    """
    low_N = scaled.low.index_select(0, scaled.buckets.of_entry)
    high_N = scaled.high.index_select(0, scaled.buckets.of_entry)
    range_N = high_N - low_N
    return torch.where(position_N < 0.5, low_N + range_N * position_N, high_N - range_N * (1 - position_N))


def uniform_points(levels: int, like: Tensor) -> Tensor:
    """The positions 0, 1/(s−1), …, 1 of s levels, [s], with the dtype and device of `like`.

    Divided on the CPU: CUDA multiplies by the reciprocal, which differs in the last bit from what `packed.decode` computes.
    """
    return (torch.arange(levels, dtype=like.dtype) / (levels - 1)).to(like.device)


def uniform_index(u_N: Tensor, levels: int) -> Tensor:
    """round((s−1)u), halves to even, int64 [N]. Source: eq. 1."""
    return torch.round(u_N * (levels - 1)).long()


def stochastic_index(u_N: Tensor, levels: int, generator: torch.Generator) -> Tensor:
    """⌊(s−1)u⌋ + Bernoulli(its fraction), int64 [N]: unbiased, variance f(1−f)/(s−1)² in units of the range². Source: eq. 2."""
    exact_N = u_N * (levels - 1)
    floor_N = exact_N.floor()
    coin_N = torch.rand(u_N.shape, generator=generator, dtype=u_N.dtype, device=u_N.device)
    return (floor_N + (coin_N < exact_N - floor_N)).long()


def nearest_index(u_N: Tensor, points_S: Tensor, sizes_T: Sequence[int], counts_T: Sequence[int]) -> Tensor:
    """Index INTO points_S of the nearest point of each entry's own tensor, ties to the upper one, int64 [N]. Source: eq. 3.

    Args:
        points_S: the tensors' points end to end, sorted within each tensor. sizes_T, counts_T: entries and points of each tensor.
    """
    found, first = [], 0
    for u_n, points_s in zip(u_N.split(list(sizes_T)), points_S.split(list(counts_T)), strict=True):
        found.append(torch.bucketize(u_n, (points_s[1:] + points_s[:-1]) / 2, right=True) + first)
        first += len(points_s)
    return torch.cat(found)


def quantise_uniform(tensor: Tensor, *, bits: int, bucket: int | None = 256, generator: torch.Generator | None = None) -> Tensor:
    """Q(v) with 2^bits evenly spaced levels a bucket; same shape and dtype, no gradient. Source: eq. 1, with a generator eq. 2.

    Args:
        bits: ≥ 1. bucket: entries that share a range, None: the whole tensor. generator: round up or down by chance, unbiased.
    """
    flat_N = tensor.detach().reshape(-1)
    scaled = scale(flat_N, buckets((flat_N.numel(),), bucket, flat_N.device))
    index_N = uniform_index(scaled.u, 2**bits) if generator is None else stochastic_index(scaled.u, 2**bits, generator)
    return place(uniform_points(2**bits, flat_N)[index_N], scaled).view_as(tensor)


def quantise_to_points(tensor: Tensor, points_S: Tensor, *, bucket: int | None = 256) -> Tensor:
    """Q(v; p) with sorted points shared by the tensor's buckets; same shape. Differentiable in the points alone. Source: eq. 3 and 7."""
    flat_N = tensor.detach().reshape(-1)
    scaled = scale(flat_N, buckets((flat_N.numel(),), bucket, flat_N.device))
    index_N = nearest_index(scaled.u, points_S.detach(), (flat_N.numel(),), (len(points_S),))
    return place(points_S.index_select(0, index_N), scaled).view_as(tensor)


def straight_through(flat_N: Tensor, quantised_N: Tensor) -> Tensor:
    """The quantised values, whose gradient goes to the full-precision ones unchanged. Source: eq. 5.

    With `flat_N = w.clamp(-1, 1)` and its quantised values it is the "truncated" option of eq. 6.
    """
    return quantised_N.detach() + (flat_N - flat_N.detach())


def through_scale(flat_N: Tensor, quantised_N: Tensor, position_N: Tensor, scaled: Scaled) -> Tensor:
    """As `straight_through`, but the range is differentiated too. Source: eq. 6.

    ∂L/∂v_j = g_j + [Σ_{i in bucket} g_i (û_i − u_i)] (1[j = argmax] − 1[j = argmin]), the extrema being those of v, first one where tied.
    """
    cut = scaled.buckets
    range_M = flat_N[_first(flat_N.detach(), scaled.high, cut)] - flat_N[_first(flat_N.detach(), scaled.low, cut)]
    change_N = (range_M - range_M.detach()).index_select(0, cut.of_entry)
    return straight_through(flat_N, quantised_N) + (position_N - scaled.u).detach() * change_N


def _first(flat_N: Tensor, extreme_M: Tensor, cut: Buckets) -> Tensor:
    """Position of the first entry of each bucket that equals its extreme, [M]."""
    n = len(flat_N)
    candidates_N = torch.where(flat_N == extreme_M.index_select(0, cut.of_entry), torch.arange(n, device=flat_N.device), n)
    return candidates_N.new_full((cut.count,), n).scatter_reduce(0, cut.of_entry, candidates_N, "amin")


def initial_points(u_N: Tensor, sizes_T: Sequence[int], counts_T: Sequence[int], init: PointInit) -> Tensor:
    """Starting points of all tensors end to end, sorted within each, [S]. Source: eq. 8.

    A lone point starts in the middle. A constant tensor (norm scales before training) has no quantiles to tell apart: its points are spread evenly.
    """
    found = []
    for u_n, count in zip(u_N.split(list(sizes_T)), counts_T, strict=True):
        points_s = torch.linspace(0, 1, count, dtype=u_n.dtype, device=u_n.device) if count > 1 else u_n.new_tensor([0.5])
        if init == "quantile" and u_n.any():  # torch.quantile refuses more than 2^24 entries
            ordered_n, rank_s = u_n.sort().values, points_s * (len(u_n) - 1)
            below_s = rank_s.floor().long()
            points_s = ordered_n[below_s] + (rank_s - below_s) * (ordered_n[(below_s + 1).clamp(max=len(u_n) - 1)] - ordered_n[below_s])
        found.append(points_s)
    return torch.cat(found)


def allocate_points(points: int, gradient_norms_T: Sequence[float]) -> list[int]:
    """Share T·points points among T tensors: ⌊points/2⌋ to each, the rest in proportion to the gradient norms. Source: eq. 9.

    What rounding leaves over or short is taken from the tensor with the most points, or given to the one with the fewest, one at a time
    (all from one tensor, as the official code does, can leave it with less than none). The total is kept; all norms 0: equal shares.
    """
    tensors, total = len(gradient_norms_T), sum(gradient_norms_T)
    if total == 0:
        return [points] * tensors
    rest = tensors * (points - points // 2)
    counts = [points // 2 + round(rest * norm / total) for norm in gradient_norms_T]
    while (surplus := sum(counts) - tensors * points) != 0:
        counts[counts.index(max(counts) if surplus > 0 else min(counts))] -= 1 if surplus > 0 else -1
    return counts
