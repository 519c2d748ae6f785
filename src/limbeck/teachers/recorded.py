"""A teacher that was run once and recorded: answers come off the disk, and no network is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from limbeck.contract import Batch, Data
from limbeck.data import origins
from limbeck.errors import InputError
from limbeck.language.signals import TopKSignal
from limbeck.language.sources import recorded_signal
from limbeck.language.tokens import TokenBatch
from limbeck.losses import log_mean_probabilities
from limbeck.records import Record


class RecordTeacher:
    """What a record holds, as a teacher (a `contract.Teacher`, and the `data.views.Recorded` that batches are joined with).

    Args:
        record: of the training data's views. data: the training set whose positions ids are; None: ids are the record's own sample ids.

    Raises:
        InputError: a sample of `data` is not in the record.
    """

    is_record = True

    def __init__(self, record: Record, data: Data | None = None) -> None:
        self.record, self.part = record, record.parts["train"]
        self.origins = None if data is None else origins(data)
        if self.origins is not None:
            missing = self.origins[~torch.isin(self.origins, torch.from_numpy(self.part.ids.copy()))]
            if len(missing):
                raise InputError(
                    f"{len(missing)} of the {len(self.origins)} training samples are not in the record, the first is number {int(missing[0])} of the source.",
                    where="data",
                    fix="Record the whole training set, or train on what is recorded.",
                )

    def attach(self, data: Data) -> Self:
        """The same record for a training set: ids are positions in it from then on."""
        return type(self)(self.record, data)

    @property
    def num_views(self) -> int:
        """Views of each sample, V."""
        return self.part.views

    def lookup(self, ids_B: Tensor, views_B: Tensor) -> dict[str, Tensor]:
        """What is recorded of these samples and views: "logits" [B, T, C] float32, "features/TAP" [B, ...], "scores/NAME" [B].

        Raises:
            InputError: a sample or view is not in the record, or a shard is damaged.
        """
        names = [name for name in self.part.fields if name not in ("boxes", "flip")]
        found = self.part.read(names, self._samples(ids_B), views_B.numpy())
        return {name: torch.from_numpy(value) for name, value in found.items()}

    def boxes(self, ids_B: Tensor, views_B: Tensor) -> tuple[Tensor, Tensor] | None:
        """Stored boxes [B, 4] and flips [B] bool; None where the views are seeded."""
        if "boxes" not in self.part.fields:
            return None
        found = self.part.read(["boxes", "flip"], self._samples(ids_B), views_B.numpy())
        return torch.from_numpy(found["boxes"]), torch.from_numpy(found["flip"]).to(torch.bool)

    def logits(self, batch: Batch) -> Tensor:
        """[B, C]; of several recorded members the log of their mean probability.

        Raises:
            InputError: the batch carries neither recorded answers nor ids.
        """
        return combined(self.all_logits(batch))

    def all_logits(self, batch: Batch) -> Tensor:
        """[T, B, C], one slice a recorded member; logits as the codec gives them back (softmax is what counts)."""
        recorded: Mapping[str, Tensor] = batch.recorded
        if "logits" not in recorded:
            if batch.ids is None:
                raise InputError("a recorded teacher answers by sample and view, and the batch has no ids.", where="batch", fix="Give Batch(ids=, views=).")
            views = torch.zeros_like(batch.ids) if batch.views is None else batch.views
            recorded = self.lookup(batch.ids.cpu(), views.cpu())
        return recorded["logits"].transpose(0, 1).to(batch.inputs.device)

    def test_logits(self, data: Data) -> Tensor | None:
        """[N, C] of the test data, where the record has them; None where it has not."""
        part = self.record.parts.get("test")
        if part is None:
            return None
        wanted = origins(data)
        if not bool(torch.isin(wanted, torch.from_numpy(part.ids.copy())).all()):
            return None
        found = part.read(["logits"], wanted.numpy(), torch.zeros_like(wanted).numpy())
        return combined(torch.from_numpy(found["logits"]).transpose(0, 1))

    def _samples(self, ids_B: Tensor) -> NDArray[np.int64]:
        return (ids_B if self.origins is None else self.origins[ids_B]).numpy()


class TokenRecordTeacher(RecordTeacher):
    """A record of language models: k next-token log-probabilities a position, which travel with the batch (a `language.signals.SignalSource`)."""

    def get(self, tokens: TokenBatch) -> TopKSignal:
        """What the record says of `tokens.rows()`. Raises InputError: the batch did not come through this record."""
        return recorded_signal(tokens)

    def all_logits(self, batch: Batch) -> Tensor:
        """There are none. Raises InputError."""
        raise InputError("a record of tokens holds no logits.", where="teacher", fix="Use a method that makes language models (token_kd, say).")

    def of_test(self, data: Data) -> TokenRecordTeacher | None:
        """The record of the test text, by position in `data`; None where the record has none, or not all of it."""
        part = self.record.parts.get("test")
        if part is None or not bool(torch.isin(origins(data), torch.from_numpy(part.ids.copy())).all()):
            return None
        found = TokenRecordTeacher(self.record)
        found.part, found.origins = part, origins(data)
        return found


def combined(logits_TBC: Tensor) -> Tensor:
    """[B, C]: the logits of one member, or the log of the mean probability of several."""
    if len(logits_TBC) == 1:
        return logits_TBC[0]
    return log_mean_probabilities(logits_TBC)
