"""Rows of a record of language models: k ids and log-probabilities a position, and the codec's prior, which all processes share (used by `recording`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from limbeck import data as datasets
from limbeck.contract import Batch
from limbeck.data import AugmentSpec, ViewSpec
from limbeck.errors import InputError
from limbeck.evaluate import cost
from limbeck.ingredients import Prepared, tokenizer_of
from limbeck.language.sources import ModelSource
from limbeck.language.tokens import TokenBatch
from limbeck.recipe import RecordSpec
from limbeck.records import CODECS, TOKEN_CODECS, Field, Part, TokenCodec, TopRows, check_identity, token_codec_from
from limbeck.records.stores import store_for
from limbeck.records.writer import load_manifest
from limbeck.train import parallel

CHUNK = 512
"""Positions whose probabilities over the vocabulary are held at once."""


def checked_tokens(spec: RecordSpec, prepared: Prepared, vocabulary: int) -> TokenCodec:
    """The codec of a record section for text, without its prior. Raises InputError where section and data do not fit; no teacher is needed for that.

    vocabulary: where the section names none.
    """
    name = str(spec.codec)
    if name not in TOKEN_CODECS:
        what = f"the codec '{name}' keeps logits of classes, not text." if name in CODECS else f"there is no token codec '{name}'."
        raise InputError(what, where="record.codec.name", fix="Use compact or plain_topk: codec: {name: compact, k: 50}, say.")
    codec = token_codec_from({"vocabulary": vocabulary, "name": name, **spec.codec.args}, where="record.codec")
    for unwanted in ("features", "scores"):
        if getattr(spec, unwanted):
            raise InputError(f"{unwanted} are not recorded of language models.", where=f"record.{unwanted}", fix="Leave them out.")
    if spec.members:
        raise InputError("of several language models the mean of their probabilities is recorded.", where="record.members", fix="Leave it out.")
    tokenizer = tokenizer_of(prepared)
    if spec.tokenizer is not None and spec.tokenizer != tokenizer:
        raise InputError(f"the data's tokenizer is {tokenizer}, the recipe expects {spec.tokenizer}.", where="record.tokenizer")
    return codec


def no_views(views: ViewSpec, augment: AugmentSpec) -> None:
    """Raise InputError for views of text."""
    if views != ViewSpec(count=1) or augment != AugmentSpec():
        raise InputError("text has no views.", where="data.views", fix="Leave out data.views and data.augment.")


class TokenRecorder:
    """Runs language models over rows of text and keeps the k likeliest next tokens of every position that has a target."""

    members = 1

    def __init__(self, source: ModelSource, prepared: Prepared, spec: RecordSpec, device: torch.device) -> None:
        self.source, self.prepared, self.spec, self.device = source, prepared, spec, device
        self.codec = checked_tokens(spec, prepared, source.vocabulary)  # a network may know more tokens than the tokenizer has
        try:
            self.codec.check(source.vocabulary)
        except InputError as error:
            raise error.at("record.codec") from error
        self.tokenizer, self.length, self.k = tokenizer_of(prepared), prepared.input_shape[-1], self.codec.k

    def settle(self, url: str | Path, identity: Mapping[str, Any], rank: int, world: int) -> None:
        """Give the codec its prior, where it needs one: the one of the record that is there, or one that the first process fits for all.

        identity: what the record is of, the codec aside.

        Raises:
            InputError: there lies a record of something else (naming the first field that differs), or no prior can be fitted.
        """
        if not self.codec.needs_prior:
            return
        told: tuple[dict[str, Any] | None, tuple[str, str, str]] = (None, ("", "", ""))
        if rank == 0:
            try:
                told = ((self._recorded(url, identity) or self._fitted()).spec(), told[1])
            except InputError as error:
                told = (None, (error.what, error.where, error.fix))
        spec, (what, where, fix) = parallel.tell(told, world)
        if spec is None:
            raise InputError(what, where=where, fix=fix)
        self.codec = token_codec_from(spec, where="record.codec")

    def _recorded(self, url: str | Path, identity: Mapping[str, Any]) -> TokenCodec | None:
        """The codec, with its prior, of the record that lies there; None where there is none. Raises InputError: it is of something else."""
        store = store_for(url)
        manifest = load_manifest(store)
        if manifest is None:
            return None
        kept = dict(manifest["identity"])
        if isinstance(kept.get("codec"), Mapping):
            kept["codec"] = {name: value for name, value in kept["codec"].items() if name != "prior"}
        own = {name: value for name, value in self.codec.identity().items() if name != "prior"}
        check_identity(kept, {**identity, "codec": own}, where=store.url)
        return token_codec_from(manifest["parts"]["train"]["fields"]["tokens"]["codec"], where=store.url)

    def _fitted(self) -> TokenCodec:
        """The codec with a prior from the teacher's own answers on rows spread evenly over the training text."""
        rows = min(len(self.prepared.train), max(1, -(-self.spec.prior_rows // self.length)))
        positions = torch.linspace(0, len(self.prepared.train) - 1, rows, dtype=torch.float64).round().to(torch.int64).unique()
        kept = [self.rows("train", *self.batch("train", part, 0)) for part in positions.split(self.spec.batch_size)]
        present = np.concatenate([one["present"] for one in kept])
        ids, logp = (np.concatenate([one[name] for one in kept])[present] for name in ("ids", "logp"))
        return self.codec.fit(ids, logp)

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
