"""Measures of class-incremental learning, as pure functions of predictions.

Classes are numbered by their order of appearance: the first task holds positions 0 … k₁−1, the second k₁ … k₁+k₂−1, and so on.
Legend: N test samples, predictions_N and targets_N int64 positions [N]. All measures are fractions in [0, 1];
None stands for "no sample to measure on" (JSON's null).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor


def share(hits_N: Tensor, among_N: Tensor) -> float | None:
    """Fraction of the samples `among` [N] bool that are also in `hits` [N] bool; None if there are none."""
    count = int(among_N.sum())
    return int((hits_N & among_N).sum()) / count if count else None


def task_accuracies(predictions_N: Tensor, targets_N: Tensor, sizes: Sequence[int]) -> list[float | None]:
    """One row of the accuracy matrix: accuracy on the samples of each task, the model choosing among all classes seen.

    Args:
        predictions_N, targets_N: [N]. sizes: number of classes of each task seen, in order.
    """
    right_N = predictions_N == targets_N
    ends = torch.tensor(sizes).cumsum(0).tolist()
    return [share(right_N, (targets_N >= end - size) & (targets_N < end)) for size, end in zip(sizes, ends, strict=True)]


def average_incremental_accuracy(accuracies: Sequence[float]) -> float:
    """Mean over the steps, the first included, of the accuracy on all classes seen so far (iCaRL, 1611.07725).

    Args:
        accuracies: one number a step, at least one.
    """
    return sum(accuracies) / len(accuracies)


def forgetting(matrix: Sequence[Sequence[float | None]]) -> float | None:
    """Mean over the tasks before the last of (best accuracy at an earlier step − accuracy now) (1801.10112).

    Args:
        matrix: lower triangular; row b holds the accuracies on tasks 1 … b after step b.

    Returns:
        In [−1, 1], negative where old tasks have become better; None with fewer than two steps.
    """
    drops = []
    for task, now in enumerate(matrix[-1][:-1] if matrix else ()):
        before = [row[task] for row in matrix[task:-1]]
        known = [accuracy for accuracy in before if accuracy is not None]
        if now is not None and known:
            drops.append(max(known) - now)
    return sum(drops) / len(drops) if drops else None


@dataclass(frozen=True)
class ErrorRates:
    """Where the errors of one step go (1911.07053).

    old_to_new: of the old classes' samples, those called a new class. new_to_old: of the new classes' samples, those called an old one.
    within_group: of all samples, those called a wrong class of their own group.
    """

    old_to_new: float | None
    new_to_old: float | None
    within_group: float | None


def error_rates(predictions_N: Tensor, targets_N: Tensor, old: int) -> ErrorRates:
    """The error rates of one step, in which positions below `old` are the old classes and the others the new ones.

    With a fraction f of old samples: error = f·old_to_new + (1 − f)·new_to_old + within_group.

    Args:
        predictions_N, targets_N: [N]. old: number of old classes.
    """
    is_old_N, called_old_N = targets_N < old, predictions_N < old
    wrong_inside_N = (predictions_N != targets_N) & (is_old_N == called_old_N)
    return ErrorRates(share(~called_old_N, is_old_N), share(called_old_N, ~is_old_N), share(wrong_inside_N, torch.ones_like(is_old_N)))


def step_measures(predictions_N: Tensor, targets_N: Tensor, sizes: Sequence[int]) -> dict[str, Any]:
    """All of one step as JSON values: `accuracy` over all classes seen, `tasks` (a row of the accuracy matrix), and `ErrorRates`' fields.

    Args:
        predictions_N, targets_N: [N], at least one sample. sizes: number of classes of each task seen; the last one holds the new classes.
    """
    errors = error_rates(predictions_N, targets_N, sum(sizes[:-1]))
    accuracy = (predictions_N == targets_N).double().mean().item()
    return {"accuracy": accuracy, "tasks": task_accuracies(predictions_N, targets_N, sizes), **asdict(errors)}


def summary(steps: Sequence[dict[str, Any]]) -> dict[str, float]:
    """The numbers of a whole stream from its `step_measures`, those that are defined: final and average accuracy, forgetting, the last step's errors."""
    if not steps:
        return {}
    last = steps[-1]
    found = {
        "final_accuracy": last["accuracy"],
        "average_accuracy": average_incremental_accuracy([step["accuracy"] for step in steps]),
        "forgetting": forgetting([step["tasks"] for step in steps]),
        "old_to_new": last["old_to_new"],
        "new_to_old": last["new_to_old"],
        "within_group": last["within_group"],
    }
    return {name: value for name, value in found.items() if value is not None}
