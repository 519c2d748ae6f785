"""Parts of class-incremental learning: the stream of classes, and a small memory of exemplars chosen by herding (iCaRL, 1611.07725)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Literal

import torch
from torch import Tensor

from limbeck import seeds
from limbeck.errors import InputError

Order = Literal["seed", "natural"]


@dataclass(frozen=True)
class ClassStream:
    """Which classes come when. A class's position is its place in the order of appearance.

    order: the classes as they appear. sizes: number of classes of each task.
    """

    order: tuple[int, ...]
    sizes: tuple[int, ...]

    @property
    def spans(self) -> list[tuple[int, int]]:
        """Positions [start, end) of each task's classes."""
        return list(pairwise(accumulate(self.sizes, initial=0)))

    @property
    def positions(self) -> Tensor:
        """[C] int64: the position of each class."""
        return torch.tensor(self.order).argsort()

    def samples(self, targets_N: Tensor, start: int, end: int) -> Tensor:
        """[M] int64: the samples whose class stands at a position in [start, end), ascending."""
        return torch.isin(targets_N, torch.tensor(self.order[start:end])).nonzero().flatten()


def class_stream(order: Order | Sequence[int], per_task: int | Sequence[int], classes: int, seed: int) -> ClassStream:
    """A stream over all classes.

    Args:
        order: "seed" (shuffled by the run's seed), "natural" (0, 1, 2, …), or all classes in the order wanted.
        per_task: classes of every task (the last may have fewer), or one number a task. classes: how many there are.

    Raises:
        InputError: the list is not a permutation of all classes, or the tasks do not add up to them.
    """
    if isinstance(order, str):
        shuffled = torch.randperm(classes, generator=seeds.generator(seed, "class_order")).tolist()
        order = shuffled if order == "seed" else range(classes)
    if sorted(order) != list(range(classes)):
        raise InputError(f"the list must hold each class from 0 to {classes - 1} once.", where="method.class_order")
    sizes = [min(per_task, classes - start) for start in range(0, classes, per_task)] if isinstance(per_task, int) else per_task
    if sum(sizes) != classes:
        raise InputError(f"the tasks have {sum(sizes)} classes in all, the data {classes}.", where="method.classes_per_step")
    return ClassStream(tuple(order), tuple(sizes))


def herding(features_Nd: Tensor, count: int) -> Tensor:
    """Greedy choice of samples whose running mean stays closest to the mean of all.

    With φ the features scaled to unit length (L2) and μ their mean, the k-th pick is argmin_x ‖μ − (φ(x) + Σ_{j<k} φ(p_j))/k‖,
    without replacement, the lowest index on a tie. The picks are ordered: the best k samples are the first k of any longer choice.

    Args:
        features_Nd: [N, d] of one class. count: how many to pick; at most N come back.

    Returns:
        [min(count, N)] int64 indices into the rows. Computed in float64 on the CPU. Source: 1611.07725, algorithm 4.
    """
    phi_Nd = torch.nn.functional.normalize(features_Nd.detach().to("cpu", torch.float64), dim=1)
    mean_d = phi_Nd.mean(0)
    sum_d = torch.zeros_like(mean_d)
    free_N = torch.ones(len(phi_Nd), dtype=torch.bool)
    picks: list[int] = []
    for k in range(1, min(count, len(phi_Nd)) + 1):
        distances_N = torch.linalg.vector_norm(mean_d - (phi_Nd + sum_d) / k, dim=1)
        pick = int(distances_N.where(free_N, torch.inf).argmin())
        picks.append(pick)
        free_N[pick] = False
        sum_d += phi_Nd[pick]
    return torch.tensor(picks, dtype=torch.int64)


class ExemplarMemory:
    """Ordered lists of training-set positions, one a class, at most `budget` in all; every class has the same share, floor(budget/classes)."""

    def __init__(self, budget: int, lists: Sequence[Tensor] = ()) -> None:
        self.budget = budget
        self.lists = list(lists)

    def share(self, classes: int) -> int:
        """Exemplars of each class when there are `classes` of them."""
        return self.budget // classes

    def update(self, features_Nd: Tensor, ids_N: Tensor, labels_N: Tensor, new: Sequence[int], classes: int) -> None:
        """Cut the lists kept so far to their share among `classes` (the head of each stays), and choose exemplars of the new classes.

        Args:
            features_Nd, ids_N, labels_N: features [N, d], training-set positions [N] and labels [N] of the new classes' samples.
            new: the new labels, in order; a list is added for each.
        """
        self.lists = [ids[: self.share(classes)].clone() for ids in self.lists]
        for label in new:
            own_N = labels_N == label
            self.lists.append(ids_N[own_N][herding(features_Nd[own_N], self.share(classes))])

    def indices(self, classes: int | None = None) -> Tensor:
        """Positions of the exemplars of the first `classes` classes (None: of all), in order, [M] int64."""
        return torch.cat([torch.empty(0, dtype=torch.int64), *self.lists[:classes]])
