"""Several texts in one row: who stands where, the rows, and whatever else is known of each text's tokens, moved along (engine sheet §8).

E examples, R rows of L positions. A packed row holds whole examples side by side: each is a segment of its own, positions start again at 0, attention stays
within it (`TokenBatch.attention`), and its last token has no target, so that losses equal those of the examples one by one. A `Packing` is a plan, made of
lengths alone: with it, signals that were stored an example (top-k ids and log-probabilities, annotations) are moved into the rows when these are made.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from limbeck.contract import IGNORE
from limbeck.errors import InputError, suggestion
from limbeck.language.tokens import PADDING, TokenBatch

Longer = Literal["cut", "leave_out"]
"""What happens to an example of more than L tokens: its first L are kept, or none."""

Order = Literal["given", "longest_first"]
"""In which order examples are placed; the longest first needs fewer rows."""


@dataclass(frozen=True)
class Packing:
    """Where examples stand in rows.

    length: L. rows: R. row_E: [E] int64, the row of each example, −1: left out. start_E: [E] int64, its first position. size_E: [E] int64, how many of its
    first tokens are kept (0: left out). cut: examples that lost their end. left_out: examples without a place. lost: tokens that have none.
    """

    length: int
    rows: int
    row_E: Tensor
    start_E: Tensor
    size_E: Tensor
    cut: int
    left_out: int
    lost: int

    @property
    def filled(self) -> float:
        """The share of positions that hold a token, in (0, 1]; 0 where there are no rows."""
        return int(self.size_E.sum()) / (self.rows * self.length) if self.rows else 0.0

    @property
    def where(self) -> tuple[Tensor, Tensor]:
        """(example_M, place_M): for each token that has a place, in the order of the examples, the example and the place row · L + position, [M] int64."""
        example_M = torch.repeat_interleave(torch.arange(len(self.size_E)), self.size_E)
        first_E = self.size_E.cumsum(0) - self.size_E
        within_M = torch.arange(len(example_M)) - first_E[example_M]
        return example_M, self.row_E[example_M] * self.length + self.start_E[example_M] + within_M


@dataclass(frozen=True)
class Example:
    """One text's tokens before they are shifted.

    ids_n: [n] int64. learn_n: [n] bool, tokens to be predicted (of a prompt none; the first token never is). weight_n: [n] float32, w of predicting each
    token; None: 1.
    """

    ids_n: Tensor
    learn_n: Tensor
    weight_n: Tensor | None = None

    @classmethod
    def answering(cls, prompt: Sequence[int], answer: Sequence[int]) -> Example:
        """A prompt, of which nothing is predicted, and an answer, all of which is."""
        return cls(torch.tensor([*prompt, *answer], dtype=torch.int64), torch.arange(len(prompt) + len(answer)) >= len(prompt))

    @classmethod
    def text(cls, ids: Sequence[int]) -> Example:
        """A text, of which all but the first token is predicted."""
        return cls(torch.tensor(list(ids), dtype=torch.int64), torch.ones(len(ids), dtype=torch.bool))


def plan(sizes: Sequence[int], length: int, *, longer: Longer = "cut", order: Order = "longest_first") -> Packing:
    """Put examples into as few rows as a greedy rule finds: each goes into the fullest row that has room for it (the oldest among equals), else into a new one.

    Args:
        sizes: tokens of each example. length: L. longer, order: see `Longer`, `Order`; equally long examples keep their order.

    Raises:
        InputError: L below 2, an example without tokens, an unknown rule.
    """
    row_E, start_E = torch.full((len(sizes),), -1), torch.zeros(len(sizes), dtype=torch.int64)
    kept = _kept(sizes, length, longer)
    placing = range(len(sizes)) if _known("order", order, Order) == "given" else sorted(range(len(sizes)), key=lambda e: -kept[e])
    open_rows: list[list[int]] = [[] for _ in range(length + 1)]  # by free room: rows that have it, the oldest last
    rows = 0
    for example in placing:
        size = kept[example]
        if not size:
            continue
        room = next((room for room in range(size, length) if open_rows[room]), length)
        row = rows
        if room < length:
            row = open_rows[room].pop()
        else:
            rows += 1
        row_E[example], start_E[example] = row, length - room
        left = open_rows[room - size]
        left.insert(next((place for place, other in enumerate(left) if other < row), len(left)), row)
    return _planned(sizes, kept, length, rows, row_E, start_E)


def one_per_row(sizes: Sequence[int], length: int, *, longer: Longer = "cut") -> Packing:
    """Each example alone in a row, from its start, padded behind. Arguments and errors as for `plan`."""
    kept = _kept(sizes, length, longer)
    has_place_E = torch.tensor(kept, dtype=torch.int64) > 0
    row_E = torch.where(has_place_E, has_place_E.cumsum(0) - 1, -1)
    return _planned(sizes, kept, length, int(has_place_E.sum()), row_E, torch.zeros(len(sizes), dtype=torch.int64))


def pack(examples: Sequence[Example], packing: Packing, pad: int = 0) -> TokenBatch:
    """Examples as rows [R, L] with shifted targets: position i of an example holds its token i and predicts token i + 1 where that is to be learnt.

    Args:
        examples: as many as the plan is of, each of its size. pad: the id behind the texts.

    Returns:
        positions from 0 in every segment; segments numbered from 0 in every row, in the order in which they stand; padding has segment −1, position 0, no
        target and weight 0. Weights are None where no example has any.

    Raises:
        InputError: examples and plan do not fit together.
    """
    ids = place([example.ids_n for example in examples], packing, pad)
    learnt = place([_next(example.learn_n, False) for example in examples], packing, False)
    targets = place([_next(example.ids_n, IGNORE) for example in examples], packing, IGNORE)
    example_M, where_M = packing.where
    positions = torch.zeros(packing.rows * packing.length, dtype=torch.int64)
    segments, last = torch.full_like(positions, PADDING), torch.zeros_like(positions, dtype=torch.bool)
    start_M = packing.row_E[example_M] * packing.length + packing.start_E[example_M]
    positions[where_M] = where_M - start_M
    segments[where_M] = _ranks(packing)[example_M]
    last[where_M] = positions[where_M] == packing.size_E[example_M] - 1
    shape = (packing.rows, packing.length)
    targets = targets.masked_fill(~learnt | last.view(shape), IGNORE)
    weight = None
    if any(example.weight_n is not None for example in examples):
        weights = [torch.ones(len(example.ids_n)) if example.weight_n is None else example.weight_n.float() for example in examples]
        weight = place([_next(w, 0.0) for w in weights], packing, 0.0).masked_fill(targets == IGNORE, 0.0)
    return TokenBatch(ids, positions.view(shape), segments.view(shape), targets, weight)


def place(arrays: Sequence[Tensor], packing: Packing, fill: float | bool) -> Tensor:
    """What is known of each example's tokens, moved to where these stand: [n_e, ...] an example → [R, L, ...].

    A cached signal [n_e, k] must hold at i what is predicted AT token i (of token i + 1), as targets do once they are shifted.

    Args:
        arrays: one an example, [n_e, ...], alike but for n_e, with at least as many entries as the plan keeps. fill: where there is no token.

    Raises:
        InputError: another number of arrays than the plan has examples, or one that is too short.
    """
    if len(arrays) != len(packing.size_E):
        raise InputError(f"{len(arrays)} arrays for {len(packing.size_E)} examples.", where="packing", fix="Give one an example.")
    sizes = packing.size_E.tolist()
    short = next((e for e, (array, size) in enumerate(zip(arrays, sizes, strict=True)) if len(array) < size), None)
    if short is not None:
        raise InputError(f"example {short} has {len(arrays[short])} entries, the plan keeps {sizes[short]} of its tokens.", where="packing")
    if not arrays:
        return torch.full((0, packing.length), fill)
    flat = torch.cat([array[:size] for array, size in zip(arrays, sizes, strict=True)])
    out = flat.new_full((packing.rows * packing.length, *flat.shape[1:]), fill)
    out[packing.where[1]] = flat
    return out.view(packing.rows, packing.length, *flat.shape[1:])


def unpack(rows_RL: Tensor, packing: Packing) -> list[Tensor]:
    """The inverse of `place`: [R, L, ...] → [size_e, ...] of each example (empty where it was left out)."""
    return list(rows_RL.flatten(0, 1)[packing.where[1]].split(packing.size_E.tolist()))


def _next(values_n: Tensor, end: float | bool) -> Tensor:
    """Each token's successor's value, `end` for the last."""
    return torch.cat((values_n[1:], values_n.new_full((min(1, len(values_n)),), end)))


def _kept(sizes: Sequence[int], length: int, longer: Longer) -> list[int]:
    """How many tokens of each example stay."""
    _known("longer", longer, Longer)
    if length < 2:
        raise InputError(f"rows of {length} positions hold nothing to predict.", where="length", fix="Give 2 or more.")
    empty = next((e for e, size in enumerate(sizes) if size < 1), None)
    if empty is not None:
        raise InputError(f"example {empty} has no tokens.", where="packing", fix="Leave it out.")
    return [size if size <= length else length if longer == "cut" else 0 for size in sizes]


def _known(name: str, value: str, kind: object) -> str:
    if value not in get_args(kind):
        raise InputError(f"unknown {name} '{value}'.", where=name, fix=suggestion(value, get_args(kind)))
    return value


def _planned(sizes: Sequence[int], kept: Sequence[int], length: int, rows: int, row_E: Tensor, start_E: Tensor) -> Packing:
    cut, left_out = sum(0 < k < s for k, s in zip(kept, sizes, strict=True)), sum(k == 0 for k in kept)
    return Packing(length, rows, row_E, start_E, torch.tensor(list(kept), dtype=torch.int64), cut, left_out, sum(sizes) - sum(kept))


def _ranks(packing: Packing) -> Tensor:
    """[E] int64: how many examples of its row stand before each."""
    order_E = (packing.row_E * packing.length + packing.start_E).argsort(stable=True)  # left-out ones come first
    sorted_E = packing.row_E[order_E]
    first_E = torch.searchsorted(sorted_E, sorted_E)  # where each row begins in the order
    ranks_E = torch.empty_like(order_E)
    ranks_E[order_E] = torch.arange(len(order_E)) - first_E
    return ranks_E
