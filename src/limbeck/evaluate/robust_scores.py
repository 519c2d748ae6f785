"""Scores of synthetic sets that labels and augmentation do not flatter (DD-Ranking, arXiv 2505.13300; our sheet on evaluation, part A).

Accuracies are fractions in [0, 1]: the released scorer puts percentages into the exponential, repeats entries, and takes cached numbers and best epochs;
here everything is measured, with one recipe, at the last epoch. "No better than random, as good as all data" scores 0.27, not 0.5.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from limbeck.errors import InputError
from limbeck.evaluate.statistics import paired


@dataclass(frozen=True)
class RobustScore:
    """A score of K networks. value: the score of the mean accuracies. mean: the mean of the scores of single networks, which differs a little as the
    exponential is convex. low, high: Student's 95 % interval of `mean` (None for one network). values: the K scores.
    """

    value: float
    mean: float
    low: float | None
    high: float | None
    values: tuple[float, ...]


def hard_label_recovery(full: float, synthetic: float) -> float:
    """HLR = acc(all real data, hard labels) − acc(synthetic, hard labels), in [−1, 1]; smaller is better. Raises InputError: no fractions."""
    return _fraction(full, "full") - _fraction(synthetic, "synthetic")


def improvement_over_random(synthetic: float, random: float) -> float:
    """IOR = acc(synthetic) − acc(as many random real images), all else being the same, in [−1, 1]; larger is better. Raises InputError: no fractions."""
    return _fraction(synthetic, "synthetic") - _fraction(random, "random")


def normalised(difference: float) -> float:
    """(e^a − e^−1)/(e − e^−1) in [0, 1] of a difference a in [−1, 1]: −1 → 0, 0 → 0.2689, 0.5 → 0.5449, 1 → 1. Raises InputError: outside."""
    if not -1 <= difference <= 1:
        raise InputError(f"a difference of accuracies lies between −1 and 1, this is {difference}.", fix="Give fractions, not percentages.")
    return (math.exp(difference) - math.exp(-1)) / (math.e - math.exp(-1))


def label_robust_score(ior: float, hlr: float, weight: float = 0.5) -> float:
    """LRS: `normalised` of a = w · IOR − (1 − w) · HLR; in [0, 1], larger is better. Raises InputError: an argument is out of range."""
    return normalised(_blend(_difference(ior, "ior"), -_difference(hlr, "hlr"), weight))


def augmentation_robust_score(augmented: float, plain: float, weight: float = 0.5) -> float:
    """ARS: `normalised` of b = γ · (IOR with augmentation) + (1 − γ) · (IOR without). Raises InputError: an argument is out of range."""
    return normalised(_blend(_difference(augmented, "augmented"), _difference(plain, "plain"), weight))


def label_robustness(
    full: Sequence[float], synthetic_hard: Sequence[float], synthetic: Sequence[float], random: Sequence[float], weight: float = 0.5
) -> RobustScore:
    """LRS of K networks, the k-th of each arm paired (they start from the same weights).

    Args:
        full, synthetic_hard: accuracies with hard labels of all real data and of the synthetic images. synthetic, random: with the method's own labels.

    Raises:
        InputError: not as many of each, none, or an argument is out of range.
    """

    def score(full_: float, hard: float, own: float, random_: float) -> float:
        return label_robust_score(improvement_over_random(own, random_), hard_label_recovery(full_, hard), weight)

    rows = _rows(full, synthetic_hard, synthetic, random)
    return _scored([score(*row) for row in rows], score(*_means(rows)))


def augmentation_robustness(
    synthetic_augmented: Sequence[float],
    random_augmented: Sequence[float],
    synthetic_plain: Sequence[float],
    random_plain: Sequence[float],
    weight: float = 0.5,
) -> RobustScore:
    """ARS of K networks, the k-th of each arm paired; accuracies with and without augmentation, else the same recipe. Errors as `label_robustness`."""

    def score(own: float, random: float, own_plain: float, random_plain_: float) -> float:
        return augmentation_robust_score(improvement_over_random(own, random), improvement_over_random(own_plain, random_plain_), weight)

    rows = _rows(synthetic_augmented, random_augmented, synthetic_plain, random_plain)
    return _scored([score(*row) for row in rows], score(*_means(rows)))


Row = tuple[float, float, float, float]


def _rows(*arms: Sequence[float]) -> list[Row]:
    counts = [len(arm) for arm in arms]
    if len(set(counts)) != 1 or not counts[0]:
        raise InputError(f"there must be as many networks in every arm, one at least; there are {counts}.")
    a, b, c, d = arms
    return list(zip(a, b, c, d, strict=True))


def _means(rows: Sequence[Row]) -> Row:
    a, b, c, d = (math.fsum(row[k] for row in rows) / len(rows) for k in range(4))
    return a, b, c, d


def _scored(values: Sequence[float], of_means: float) -> RobustScore:
    found = paired(values, [0.0] * len(values))
    return RobustScore(of_means, found.mean, found.low, found.high, tuple(values))


def _blend(first: float, second: float, weight: float) -> float:
    if not 0 <= weight <= 1:
        raise InputError(f"the weight is {weight}.", where="weight", fix="It lies between 0 and 1.")
    return weight * first + (1 - weight) * second


def _fraction(value: float, name: str) -> float:
    if not 0 <= value <= 1:
        raise InputError(f"an accuracy is a fraction in [0, 1], '{name}' is {value}.", where=name, fix="Divide percentages by 100.")
    return value


def _difference(value: float, name: str) -> float:
    if not -1 <= value <= 1:
        raise InputError(f"a difference of accuracies lies between −1 and 1, '{name}' is {value}.", where=name, fix="Give fractions, not percentages.")
    return value
