"""Batches of token rows: what a language model reads, what each position has to predict, and what is known of it (sheet `_language_distillation_engine` §9).

B rows of L positions, N positions that have a target, d width. Targets are shifted once, where rows are made: position i holds what its hidden state
predicts, and nothing downstream shifts again. In a `contract.Batch` the rows travel as one int64 tensor, whose channels say what it is:
[B, 2, L] = (ids, targets): every row is one whole segment; [B, 4, L] = (ids, targets, positions, segments): packed or padded rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from limbeck.contract import IGNORE, Batch
from limbeck.errors import InputError

PADDING = -1
"""The segment of a position that belongs to no text."""

WHOLE, PACKED = 2, 4
"""Channels of rows that are one whole segment each, and of packed or padded ones."""

DATA, TEACHER, STUDENT, REPLAY = range(4)
"""Where a row's tokens come from (`TokenBatch.source`)."""


@dataclass(frozen=True)
class TokenRows:
    """The positions of a batch that have a target, one after the other.

    where_N: [N] int64, rising, places in the flattened batch (row · L + position). targets_N: [N] int64. weight_N: [N] float32, w of (1) in our sheet.
    annotations: [N, ...] each.
    """

    where_N: Tensor
    targets_N: Tensor
    weight_N: Tensor
    annotations: Mapping[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.where_N)

    def cut(self, start: int, stop: int) -> TokenRows:
        """Positions start to stop − 1 of these, as views."""
        return TokenRows(
            self.where_N[start:stop], self.targets_N[start:stop], self.weight_N[start:stop], {name: told[start:stop] for name, told in self.annotations.items()}
        )

    def gather(self, hidden_BLd: Tensor) -> Tensor:
        """[N, ...]: what a tensor [B, L, ...] holds at these positions (a graph to it, where it has one)."""
        return hidden_BLd.flatten(0, 1).index_select(0, self.where_N)


@dataclass(frozen=True)
class TokenBatch:
    """Rows of tokens with their shifted targets (sheet §9).

    input_ids: [B, L] int64. positions: [B, L] int64, from 0 in every segment. segments: [B, L] int64, equal numbers of a row may attend to each other;
    PADDING (−1): no text. targets: [B, L] int64, IGNORE (−100): none. weight: [B, L] float32, None: 1 at every target.
    source: [B] int64 (DATA, TEACHER, STUDENT, REPLAY), None: unknown. annotations: [B, L, ...] a position or [B, ...] a row. extras: anything else (images).
    whole: every row is one segment at positions 0..L−1, known without looking.
    """

    input_ids: Tensor
    positions: Tensor
    segments: Tensor
    targets: Tensor
    weight: Tensor | None = None
    source: Tensor | None = None
    annotations: Mapping[str, Tensor] = field(default_factory=dict)
    extras: Mapping[str, Tensor] = field(default_factory=dict)
    whole: bool = False

    def __len__(self) -> int:
        return len(self.input_ids)

    @classmethod
    def of(cls, batch: Batch) -> TokenBatch:
        """The rows of an engine's batch; what a record holds for them becomes the annotations.

        Raises:
            InputError: the inputs are not int64 of shape [B, 2, L] or [B, 4, L].
        """
        return replace(cls.from_inputs(batch.inputs), annotations=batch.recorded)

    @classmethod
    def from_inputs(cls, inputs: Tensor) -> TokenBatch:
        """The rows of an int64 tensor [B, 2, L] or [B, 4, L] (see the top of this file); views, nothing is copied.

        Raises:
            InputError: another shape or type.
        """
        if inputs.dtype != torch.int64 or inputs.dim() != 3 or inputs.shape[1] not in (WHOLE, PACKED):
            raise InputError(
                f"token rows are int64 of shape [B, 2, L] or [B, 4, L], these inputs are {inputs.dtype} of shape {list(inputs.shape)}.",
                where="inputs",
                fix="Language models take data of a text source (novels, text_file, prompts).",
            )
        if inputs.shape[1] == PACKED:
            ids, targets, positions, segments = inputs.unbind(1)
            return cls(ids, positions, segments, targets)
        ids, targets = inputs.unbind(1)
        positions = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
        return cls(ids, positions, torch.zeros_like(ids), targets, whole=True)

    @classmethod
    def from_text(cls, ids_BL1: Tensor) -> TokenBatch:
        """Rows out of runs of L + 1 tokens [B, L + 1] int64: the first L are read, the last L predicted."""
        return cls.from_inputs(torch.stack((ids_BL1[:, :-1], ids_BL1[:, 1:]), 1))

    def packed(self) -> Tensor:
        """The inverse of `from_inputs`: [B, 2, L] int64 of whole rows, else [B, 4, L]. Weights, source and annotations are not in it."""
        if self.whole:
            return torch.stack((self.input_ids, self.targets), 1)
        return torch.stack((self.input_ids, self.targets, self.positions, self.segments), 1)

    @property
    def valid(self) -> Tensor:
        """[B, L] bool: positions that have a target."""
        return self.targets != IGNORE

    def rows(self) -> TokenRows:
        """The positions that have a target, row by row. A row's annotations [B, ...] are repeated at its positions, and so is `source`.

        An annotation of shape [B, L, ...] counts as one of positions. How many positions there are is read from the device (one wait).
        """
        B, L = self.input_ids.shape
        where_N = self.valid.flatten().nonzero()[:, 0]
        row_N = where_N // L

        def told(annotation: Tensor) -> Tensor:
            if annotation.shape[:2] == (B, L):
                return annotation.flatten(0, 1).index_select(0, where_N)
            return annotation.index_select(0, row_N)

        annotations = {name: told(annotation) for name, annotation in self.annotations.items()}
        if self.source is not None:
            annotations["source"] = self.source.index_select(0, row_N)
        weight_N = torch.ones(len(where_N), device=where_N.device) if self.weight is None else self.weight.flatten().index_select(0, where_N).float()
        return TokenRows(where_N, self.targets.flatten().index_select(0, where_N), weight_N, annotations)

    def attention(self) -> Tensor | None:
        """Who may attend to whom: [B, 1, L, L] bool, True at [b, 0, i, j] where position i sees position j. None: whole rows, plainly causal.

        Packed rows see their own segment up to themselves (block-diagonal, causal); padding sees itself alone, so that its softmax is defined.
        """
        if self.whole:
            return None
        L, device = self.input_ids.shape[1], self.input_ids.device
        causal_LL = torch.ones(L, L, dtype=torch.bool, device=device).tril()
        same_BLL = self.segments[:, :, None] == self.segments[:, None, :]
        text_BL1 = (self.segments != PADDING)[:, :, None]
        return ((same_BLL & causal_LL & text_BL1) | torch.eye(L, dtype=torch.bool, device=device))[:, None]

    def to(self, device: torch.device) -> TokenBatch:
        """The same batch on another device."""

        def moved(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
            return {name: tensor.to(device) for name, tensor in tensors.items()}

        return replace(
            self,
            input_ids=self.input_ids.to(device),
            positions=self.positions.to(device),
            segments=self.segments.to(device),
            targets=self.targets.to(device),
            weight=None if self.weight is None else self.weight.to(device),
            source=None if self.source is None else self.source.to(device),
            annotations=moved(self.annotations),
            extras=moved(self.extras),
        )
