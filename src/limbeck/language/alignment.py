"""Two tokenisations of one text, groups of tokens that end at the same byte, and one row of probabilities for each (`_language_distillation_engine` §7).

Legend: S, T tokens of the two sides, N rows of one side (row n predicts the token y_n), G groups, V vocabulary of that side; log-probabilities in nats.

A group is the shortest run of tokens of both sides that starts and ends at common bytes. Its tokens a..b of one side become one row over that side's
vocabulary, one of

    first  p_a(·) · Π_{t=a+1..b} p_t(y_t)        last  (Π_{t=a..b−1} p_t(y_t)) · p_b(·)

in which p_t is the row that PREDICTS y_t. Such rows sum to less than 1 on purpose: the entry of the realised token is the probability of the whole group.
Tokens of no width (ends of text) are in no group unless they are paired on purpose.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from torch import Tensor

from limbeck.errors import InputError

if TYPE_CHECKING:
    from numpy.typing import NDArray

Strategy = Literal["first", "last"]
"""Which token of a group keeps its whole row."""

NONE = -1
"""The group of a row that is in none."""


def byte_groups(
    student_sizes: Sequence[int] | NDArray[np.int64], teacher_sizes: Sequence[int] | NDArray[np.int64], *, start: int = 0
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The group of every token of two tokenisations of the same bytes, numbered from `start` in the order of the text.

    Two pointers: the side that ends earlier goes on, and a group closes where both end at the same byte.

    Args:
        student_sizes: [S], teacher_sizes: [T], bytes of each token, from the same first byte on; 0: a token of no width.

    Returns:
        [S] and [T] int64; NONE for tokens of no width, and for those behind the last byte at which both end (a text that is cut within a token).

    Raises:
        InputError: a size is negative.
    """
    student_S, teacher_T = np.asarray(student_sizes, np.int64).reshape(-1), np.asarray(teacher_sizes, np.int64).reshape(-1)
    if (student_S < 0).any() or (teacher_T < 0).any():
        raise InputError("a token has fewer than 0 bytes.", where="sizes")
    group_S, group_T = np.full(len(student_S), NONE), np.full(len(teacher_T), NONE)
    i = j = i_open = j_open = 0
    i_end = j_end = 0
    group = start
    while i < len(student_S) or j < len(teacher_T):
        if i_end <= j_end and i < len(student_S):
            i_end, i = i_end + student_S[i], i + 1
        elif j < len(teacher_T):
            j_end, j = j_end + teacher_T[j], j + 1
        else:
            break
        if i_end == j_end and student_S[i_open:i].any() and teacher_T[j_open:j].any():
            group_S[i_open:i][student_S[i_open:i] > 0] = group
            group_T[j_open:j][teacher_T[j_open:j] > 0] = group
            i_open, j_open, group = i, j, group + 1
    return group_S, group_T


@dataclass(frozen=True)
class Side:
    """One side's rows and their groups. group_N: [N] int64 on the device, NONE outside; first, last: [G] int64 on the CPU, the group's outer rows.

    Rows of one group stand side by side, groups in rising order.
    """

    group_N: Tensor
    first: Tensor
    last: Tensor

    def __len__(self) -> int:
        return len(self.first)

    @classmethod
    def of(cls, group_N: Sequence[int] | NDArray[np.int64], device: torch.device | str = "cpu") -> Side:
        """From the group of every row; groups 0..G−1 must each have a row.

        Raises:
            InputError: a group has no row, or groups do not rise.
        """
        groups = np.asarray(group_N, np.int64).reshape(-1)
        places = np.flatnonzero(groups != NONE)
        steps = np.diff(groups[places], prepend=-1)
        if not np.isin(steps, (0, 1)).all():
            raise InputError("groups must be numbered from 0 in the order of their rows, none left out.", where="groups")
        opens = np.flatnonzero(steps == 1)
        first = places[opens]
        last = places[np.append(opens[1:], len(places)) - 1] if len(opens) else first
        return cls(torch.from_numpy(groups).to(device), torch.from_numpy(first), torch.from_numpy(last))

    def picked(self, strategy: Strategy) -> Tensor:
        """[G] int64 on the CPU: the row of each group that is kept whole."""
        if strategy not in ("first", "last"):
            raise InputError(f"unknown strategy '{strategy}'.", where="strategy", fix="Use 'first' or 'last'.")
        return self.first if strategy == "first" else self.last

    def totals(self, values_N: Tensor) -> Tensor:
        """Σ of a value over each group's rows, [G]; with a graph where there is one."""
        inside_N = self.group_N != NONE
        into_N = torch.where(inside_N, self.group_N, 0)
        return values_N.new_zeros(max(len(self), 1)).index_add(0, into_N, torch.where(inside_N, values_N, 0))[: len(self)]

    def cut(self, start: int, stop: int) -> tuple[Side, int, int]:
        """Groups start to stop − 1 alone, and the rows [begin, end) that they span; their rows count from begin."""
        begin, end = int(self.first[start]), int(self.last[stop - 1]) + 1
        group_N = self.group_N[begin:end]
        return Side(torch.where(group_N == NONE, NONE, group_N - start), self.first[start:stop] - begin, self.last[start:stop] - begin), begin, end


@dataclass(frozen=True)
class Groups:
    """The groups of a batch, on both sides; both have the same number.

    Raises:
        InputError: they have not.
    """

    student: Side
    teacher: Side

    def __post_init__(self) -> None:
        if len(self.student) != len(self.teacher):
            raise InputError(f"{len(self.student)} groups on one side and {len(self.teacher)} on the other.", where="groups")

    def __len__(self) -> int:
        return len(self.student)


def merged_rows(logp_NV: Tensor, target_logp_N: Tensor, side: Side, strategy: Strategy) -> Tensor:
    """One row of log-probabilities a group, [G, V] (the top of this file; sheet §7).

    Args:
        logp_NV: row n predicts y_n. target_logp_N: its entry at y_n, [N].

    With one token a group these are the rows themselves.
    """
    pick_G = side.picked(strategy).to(logp_NV.device)
    others_G = side.totals(target_logp_N) - target_logp_N.index_select(0, pick_G)
    return logp_NV.index_select(0, pick_G) + others_G[:, None]
