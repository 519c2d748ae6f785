"""Rows of a record of language models: k ids and log-probabilities a position, and the codec's prior (used by `recording`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from limbeck import data as datasets
from limbeck.contract import Batch
from limbeck.errors import InputError
from limbeck.evaluate import cost
from limbeck.ingredients import Prepared, tokenizer_of
from limbeck.language.sources import ModelSource
from limbeck.language.tokens import TokenBatch
from limbeck.recipe import RecordSpec
from limbeck.records import Field, Part, TokenCodec, TopRows, token_codec

CHUNK = 512
"""Positions whose probabilities over the vocabulary are held at once."""


class TokenRecorder:
    """Runs language models over rows of text and keeps the k likeliest next tokens of every position that has a target."""

    members = 1

    def __init__(self, source: ModelSource, prepared: Prepared, spec: RecordSpec, device: torch.device) -> None:
        self.source, self.prepared, self.spec, self.device = source, prepared, spec, device
        for name in ("features", "scores"):
            if getattr(spec, name):
                raise InputError(f"{name} are not recorded of language models.", where=f"record.{name}", fix="Leave them out.")
        if spec.members:
            raise InputError("of several language models the mean of their probabilities is recorded.", where="record.members", fix="Leave it out.")
        tokenizer = tokenizer_of(prepared)
        if spec.tokenizer is not None and spec.tokenizer != tokenizer:
            raise InputError(f"the data's tokenizer is {tokenizer}, the recipe expects {spec.tokenizer}.", where="record.tokenizer")
        self.tokenizer, self.length = tokenizer, prepared.input_shape[-1]
        self.k = self._entries()
        self.codec = self._fitted()

    def _entries(self) -> int:
        """k, checked before anything is run."""
        k = self.spec.codec.args.get("k")
        if isinstance(k, bool) or not isinstance(k, int) or not 1 <= k <= self.source.vocabulary:
            raise InputError(f"'k' is {k!r}.", where="record.codec.k", fix=f"Give the entries a position that are kept, 1 to {self.source.vocabulary:,}.")
        return k

    def _fitted(self) -> TokenCodec:
        """The codec; its prior comes from the teacher's own answers on rows spread evenly over the training text."""
        spec = {"name": str(self.spec.codec), **self.spec.codec.args}
        try:
            found = token_codec(spec, vocabulary=self.source.vocabulary, where="record.codec")
        except InputError as error:
            raise error from None
        if not found.needs_prior:
            return found
        rows = min(len(self.prepared.train), max(1, -(-self.spec.prior_rows // self.length)))
        positions = torch.linspace(0, len(self.prepared.train) - 1, rows, dtype=torch.float64).round().to(torch.int64).unique()
        kept = [self.rows("train", *self.batch("train", part, 0)) for part in positions.split(self.spec.batch_size)]
        present = np.concatenate([one["present"] for one in kept])
        ids, logp = (np.concatenate([one[name] for one in kept])[present] for name in ("ids", "logp"))
        return found.fit(ids, logp)

    def batch(self, part: str, positions: Tensor, view: int) -> tuple[Batch, dict[str, Tensor]]:
        """Rows of the training or the test text."""
        data = self.prepared.train if part == "train" else self.prepared.test
        return Batch(data.prepare(data.fetch(positions)[0]), None, positions), {}

    @torch.no_grad()
    def rows(self, part: str, batch: Batch, extra: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
        """ids [B, L, k] int32, logp [B, L, k] float32, present [B, L] bool of a batch."""
        tokens = TokenBatch.of(batch.to(self.device))
        signal, where_N = self.source.get(tokens), tokens.rows().where_N
        B, L = tokens.input_ids.shape
        ids = torch.zeros(B * L, self.k, dtype=torch.int32, device=self.device)
        logp = torch.zeros(B * L, self.k, device=self.device)
        for start in range(0, len(where_N), CHUNK):
            stop = min(start + CHUNK, len(where_N))
            top = signal.log_probs(start, stop).topk(self.k, dim=-1)
            ids[where_N[start:stop]], logp[where_N[start:stop]] = top.indices.to(torch.int32), top.values.float()
        return {"ids": ids.view(B, L, -1).cpu().numpy(), "logp": logp.view(B, L, -1).cpu().numpy(), "present": tokens.valid.cpu().numpy()}

    def assembled(self, rows: Sequence[Mapping[str, np.ndarray]]) -> dict[str, Any]:
        """What the writer takes of one task."""
        joined = {name: np.concatenate([row[name] for row in rows]) for name in rows[0]}
        return {"tokens": TopRows(joined["ids"], joined["logp"], joined["present"])}

    def parts(self) -> dict[str, Part]:
        """Training text, and the test text where the recipe asks for it."""
        field = Field.tokens(self.codec, self.length)
        found = {"train": Part(datasets.origins(self.prepared.train).numpy(), 1, (field,))}
        if self.spec.test:
            found["test"] = Part(datasets.origins(self.prepared.test).numpy(), 1, (field,))
        return found

    def about(self) -> dict[str, Any]:
        """What a report says of the teacher."""
        named = ", ".join(type(member).__name__ for member in self.source.models)
        sizes = {"parameters": cost.parameters(self.source), "bytes": cost.tensor_bytes(self.source), "macs": None}
        return {"teacher": named, "classes": [], "vocabulary": self.source.vocabulary, **sizes}
