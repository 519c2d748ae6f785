"""Calibrating what a teacher says with its k largest probabilities, and measuring calibration (FIRST, arXiv 2408.12168; numbers are our sheet's).

Legend: N positions, k kept entries, P their probabilities at temperature 1 under the whole vocabulary (rows sum to the coverage κ ≤ 1), M bins.
All transforms give rows that sum to 1 over the k entries; what becomes of the rest of the vocabulary is the loss's matter.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from limbeck.contract import IGNORE
from limbeck.errors import InputError
from limbeck.language.tokens import TokenBatch
from limbeck.losses.divergences import full_precision

TransformName = Literal["softmax_of_prob", "label_smoothing", "power", "none"]

COARSE = tuple(i / 10 for i in range(1, 11))
"""The first grid of c: (0, 1] in steps of 0.1 (eq. 3)."""

FINE = tuple(i / 50 for i in range(-4, 5))
"""The second, around the best of the first: steps of 0.02, up to its neighbours (eq. 3)."""

BINS = 10
"""M of eq. 4."""


# ---- transforms of k kept probabilities -----------------------------------------------------------------------------


def softmax_of_prob(probs_Nk: Tensor, c: float) -> Tensor:
    """P̃ = softmax(P / c) over the kept entries, [N, k] (eq. 1): of PROBABILITIES, not of logits or log-probabilities.

    The order of the entries is kept.

    Args:
        probs_Nk: [N, k]. c > 0: large makes it uniform, small one-hot; with c = 1 and k = 5 the top entry is at most e/(e + 4) = 0.405.

    Raises:
        InputError: c is not above 0.
    """
    return torch.softmax(full_precision(probs_Nk) / _above_zero(c), -1)


def power(probs_Nk: Tensor, c: float) -> Tensor:
    """P̃ ∝ P^{1/c} over the kept entries, [N, k]: classical temperature scaling, which sharpens for c < 1. Arguments as in `softmax_of_prob`."""
    return torch.softmax(full_precision(probs_Nk).log() / _above_zero(c), -1)


def label_smoothing(probs_Nk: Tensor, delta: float) -> Tensor:
    """δ less for the largest entry, δ/(k − 1) more for each other; then clipped at 0 and divided by the sum, [N, k] (eq. 2).

    Args:
        probs_Nk: [N, k]; of equals the first is the largest. delta: δ in [0, 1]. With k = 1 only the division is left.

    A large δ can turn the order around. Raises InputError: δ is outside [0, 1].
    """
    if not 0 <= delta <= 1:
        raise InputError(f"δ = {delta:g} is not a share in [0, 1].", where="smoothing", fix="The released code's is 0.1.")
    probs_Nk = full_precision(probs_Nk)
    k = probs_Nk.shape[1]
    if k > 1:
        first_N1 = probs_Nk.argmax(-1, keepdim=True)
        probs_Nk = (probs_Nk + delta / (k - 1)).scatter_add(1, first_N1, torch.full_like(probs_Nk[:, :1], -delta - delta / (k - 1))).clamp(min=0)
    return renormalised(probs_Nk)


def renormalised(probs_Nk: Tensor) -> Tensor:
    """P / Σ_j P_j over the kept entries, [N, k]: no calibration."""
    probs_Nk = full_precision(probs_Nk)
    return probs_Nk / probs_Nk.sum(-1, keepdim=True)


def transformed(probs_Nk: Tensor, transform: TransformName, strength: float) -> Tensor:
    """One of the above by name, [N, k]. strength: c, or δ for 'label_smoothing'; 'none' has none."""
    match transform:
        case "softmax_of_prob":
            return softmax_of_prob(probs_Nk, strength)
        case "power":
            return power(probs_Nk, strength)
        case "label_smoothing":
            return label_smoothing(probs_Nk, strength)
        case "none":
            return renormalised(probs_Nk)


def _above_zero(c: float) -> float:
    if not (c > 0 and math.isfinite(c)):
        raise InputError(f"c = {c:g} is not a number above 0.", where="c", fix="Take one in (0, 1]; fitted ones are often 0.2 to 0.4.")
    return c


# ---- measuring and fitting ------------------------------------------------------------------------------------------


def expected_calibration_error(confidence_N: Tensor, correct_N: Tensor, bins: int = BINS) -> Tensor:
    """ECE = Σ_m |B_m|/N · |acc(B_m) − conf(B_m)| over equal bins (0, 1/M], (1/M, 2/M], … (eq. 4): a scalar in [0, 1], float64, on the device.

    Args:
        confidence_N: [N] the probability of the answer that would be given. correct_N: [N] whether that is right (bool, or 0 and 1).

    Raises:
        InputError: there is no position, or the shapes differ.
    """
    if confidence_N.ndim != 1 or confidence_N.shape != correct_N.shape or not len(confidence_N):
        raise InputError(f"expected [N] confidences and [N] answers, N > 0, not {list(confidence_N.shape)} and {list(correct_N.shape)}.")
    confidence_N = confidence_N.double()
    edges = torch.linspace(0, 1, bins + 1, dtype=torch.float64, device=confidence_N.device)
    place_N = torch.bucketize(confidence_N, edges[1:-1])
    gap_M = torch.zeros(bins, dtype=torch.float64, device=confidence_N.device).index_add(0, place_N, correct_N.double() - confidence_N)
    return gap_M.abs().sum() / len(confidence_N)


def trust_score(accuracy: float, ece: float) -> float:
    """Accuracy − ECE, both as fractions (eq. 8): one number, higher is better, never above the accuracy."""
    return accuracy - ece


@dataclass(frozen=True)
class Calibration:
    """A fitted constant. c; ece: of the re-calibrated teacher on the data it was fitted on; plain_ece: of its kept entries divided by their sum alone;
    table: (c, ECE) of every grid point, c rising; positions: how many it was fitted on."""

    c: float
    ece: float
    plain_ece: float
    table: tuple[tuple[float, float], ...]
    positions: int


def fit_constant(
    probs_Nk: Tensor,
    correct_N: Tensor,
    transform: TransformName = "softmax_of_prob",
    coarse: tuple[float, ...] = COARSE,
    fine: tuple[float, ...] = FINE,
    bins: int = BINS,
) -> Calibration:
    """The constant whose re-calibrated teacher has the smallest ECE on held-out positions (eq. 3); of equals the smallest.

    Args:
        probs_Nk: [N, k] the teacher's kept probabilities. correct_N: [N] whether its most likely token is the reference.
        transform: what is fitted. coarse: the first grid. fine: steps around its best; those in (0, 1] are tried too.

    The constant never has a larger ECE than any grid point. Reads the results from the device once a grid.

    Raises:
        InputError: a transform without c, there is no position, or the shapes differ.
    """
    if transform not in ("softmax_of_prob", "power"):
        raise InputError(f"the transform '{transform}' has no c to fit.", where="transform", fix="Fit 'softmax_of_prob'.")

    def errors(grid: list[float]) -> dict[float, float]:
        found = [expected_calibration_error(transformed(probs_Nk, transform, c).amax(-1), correct_N, bins) for c in grid]
        return dict(zip(grid, torch.stack(found).tolist(), strict=True))

    table = errors(sorted(coarse))
    best = min(table, key=lambda c: (table[c], c))
    around = {round(best + step, 6) for step in fine} - table.keys()
    table |= errors(sorted(c for c in around if 0 < c <= 1))
    best = min(table, key=lambda c: (table[c], c))
    plain = expected_calibration_error(renormalised(probs_Nk).amax(-1), correct_N, bins)
    return Calibration(best, table[best], plain.item(), tuple(sorted(table.items())), len(correct_N))


def answer_positions(tokens: TokenBatch) -> Tensor:
    """[B, L] bool: the first position of every segment that has a target: the answer, where an example is prompt and answer.

    A segment's positions stand side by side. `tokens.targets` are IGNORE (−100) where nothing is to be predicted.
    """
    valid_BL = tokens.targets != IGNORE
    before_BL = valid_BL.long().cumsum(1) - valid_BL.long()  # targets of the row before this position
    starts_BL = torch.ones_like(valid_BL)
    starts_BL[:, 1:] = tokens.segments[:, 1:] != tokens.segments[:, :-1]
    at_start_BL = torch.where(starts_BL, before_BL, 0).cummax(1).values
    return valid_BL & (before_BL == at_start_BL)
