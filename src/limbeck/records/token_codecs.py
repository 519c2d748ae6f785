"""What a language model said at each position, on disk: k token ids with their log-probabilities a position, in one blob of bytes a sample.

Legend: R samples of L positions, N rows (present positions, one after another), k kept entries, V vocabulary, p exact, q decoded. The *outcomes*
of a row are its k ids and the tail, everything else as one: k + 1 of them. A row is a function of itself alone: the same bytes whatever stands beside it.

A blob: which positions have a row (runs of them, or a bit each), where rows differ in length one byte a row with its length (255: the length is in a list of
uint16 that follows), then the rows' bytes. Positions without a row cost nothing but that. Sheet `_language_distillation_engine` §4 (tail, storage).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from typing import Any, ClassVar, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from limbeck.errors import InputError, suggestion
from limbeck.records.blobs import Blobs
from limbeck.records.codecs import ABSENT

Array = NDArray[Any]
Values = Literal["float16", "bfloat16"]
Ids = Literal["packed", "int32"]

MAX_VOCABULARY, MAX_KEPT, MAX_LENGTH = 1 << 24, 1 << 12, (1 << 16) - 1
_EXCESS = 0.02  # how far above 1 a row's probabilities may sum: log-probabilities of 8 bits of precision do so; they are normalised
_BITMAP, _LONG = 255, 255


@dataclass(frozen=True, eq=False)
class TopRows:
    """The top k of R samples: ids [R, L, k] whole numbers, logp [R, L, k] (natural logarithms at temperature 1; −inf is probability 0), present [R, L] bool.

    What stands at positions that are not present is not looked at.
    """

    ids: Array
    logp: Array
    present: Array


def damaged(what: str) -> InputError:
    """The bytes are not what was written."""
    return InputError(f"the stored tokens are damaged ({what}).", where="tokens", fix="Restore the file from a copy, or record again.")


@dataclass(frozen=True)
class TokenCodec(ABC):
    """One way to store rows of k token ids and log-probabilities. Frozen; `spec` and `token_codec_from` turn them into plain values and back."""

    name: ClassVar[str]
    k: int
    vocabulary: int

    def __post_init__(self) -> None:
        for field, most in (("vocabulary", MAX_VOCABULARY), ("k", min(self.vocabulary, MAX_KEPT) if isinstance(self.vocabulary, int) else 1)):
            value = getattr(self, field)
            if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
                raise InputError(f"'{field}' is {value!r}.", where=field, fix=f"Give a whole number from 1 to {most:,}.")

    def spec(self) -> dict[str, Any]:
        """Plain values, JSON's, that `token_codec_from` takes: all that reading needs."""
        return {"name": self.name, **asdict(self)}

    def identity(self) -> dict[str, Any]:
        """`spec` in few words, for comparing: large tables by their hash."""
        return self.spec()

    def check(self, vocabulary: int) -> None:
        """Raises InputError where rows of another vocabulary are to be written or read."""
        if vocabulary != self.vocabulary:
            what = f"these rows are of a vocabulary of {self.vocabulary:,}, not of {vocabulary:,}."
            raise InputError(what, where="vocabulary", fix="Use the record of a teacher with the student's tokenizer, or record again.")

    @property
    def needs_prior(self) -> bool:
        """Whether the codec must be fitted before it can encode or decode."""
        return False

    def fit(self, ids_NK: Array, logp_NK: Array) -> TokenCodec:
        """The codec with its prior, from rows of the corpus; itself where it has none. The same rows give the same codec."""
        return self

    @property
    @abstractmethod
    def row_bytes(self) -> int | None:
        """Bytes of a row where all have as many, else None."""

    @abstractmethod
    def encode(self, ids_NK: Array, logp_NK: Array) -> tuple[Array, Array]:
        """Rows as `canonical` gives them to (data [T] uint8, lengths [N] int64): the rows' bytes one after another."""

    @abstractmethod
    def decode(self, data: Array, starts_N: Array, lengths_N: Array) -> tuple[Array, Array]:
        """Rows to (ids [N, k] int64, logp [N, k] float32), descending; probabilities sum to at most 1. Raises InputError for damaged bytes."""

    def canonical(self, ids_NK: Array, logp_NK: Array) -> tuple[Array, Array]:
        """Rows descending by log-probability (ties: the lower id first), int64 and float32, at least `ABSENT`; sums above 1 are normalised.

        Raises InputError: another k, ids outside the vocabulary or twice in a row, logarithms that are NaN or above 0.
        """
        ids, logp = np.asarray(ids_NK), np.asarray(logp_NK)
        if ids.ndim != 2 or ids.shape != logp.shape or ids.shape[1] != self.k or ids.dtype.kind not in "iu":
            raise InputError(f"ids and log-probabilities must be [N, {self.k}], not {list(ids.shape)} and {list(logp.shape)}.", where="tokens")
        ids, logp = ids.astype(np.int64), logp.astype(np.float32)
        if len(ids) and (int(ids.min()) < 0 or int(ids.max()) >= self.vocabulary):
            raise InputError(f"an id is outside the vocabulary of {self.vocabulary:,}.", where="tokens.ids", fix="Is this the teacher's tokenizer?")
        if np.isnan(logp).any():
            raise InputError("a log-probability is not a number.", where="tokens.logp", fix="Look at the teacher's outputs.")
        logp = np.maximum(logp, np.float32(ABSENT))
        total_N1 = np.exp(logp.astype(np.float64)).sum(axis=1, keepdims=True)
        if len(ids) and float(total_N1.max()) > 1 + _EXCESS:
            what = f"the probabilities of a row sum to {float(total_N1.max()):.4g}."
            raise InputError(what, where="tokens.logp", fix="Give natural logarithms of softmax over the whole vocabulary at temperature 1.")
        by_id = np.argsort(ids, axis=1)
        ids, logp = np.take_along_axis(ids, by_id, axis=1), np.take_along_axis(logp, by_id, axis=1)
        if (np.diff(ids, axis=1) == 0).any():
            raise InputError("an id stands twice in a row.", where="tokens.ids", fix="Give the k most probable tokens, each once.")
        order = np.argsort(-logp, axis=1, kind="stable")
        logp = np.where(total_N1 > 1, logp - np.log(np.maximum(total_N1, 1.0)), logp).astype(np.float32)
        return np.take_along_axis(ids, order, axis=1), np.take_along_axis(logp, order, axis=1)


def outcomes_kl(ids_NK: Array, logp_NK: Array, other_ids_NK: Array, other_logp_NK: Array, vocabulary: int) -> Array:
    """KL(p ‖ q) of each row over its k + 1 outcomes, [N] float64 nats; p the first pair of arrays, q the second, which must have the same ids in any order.

    A tail of less than 1e-7 is below float32's resolution of 1 − Σ p and is taken as 1e-7 where q has it. Raises InputError: the ids differ.
    """
    here, there = np.argsort(ids_NK, axis=1), np.argsort(other_ids_NK, axis=1)
    if not np.array_equal(np.take_along_axis(ids_NK, here, axis=1), np.take_along_axis(other_ids_NK, there, axis=1)):
        raise InputError("the two rows have different ids.", where="tokens.ids")
    log_p = np.take_along_axis(logp_NK, here, axis=1).astype(np.float64)
    log_q = np.take_along_axis(other_logp_NK, there, axis=1).astype(np.float64)
    p = np.exp(log_p)
    kept = np.where(p > 0, p * (log_p - log_q), 0.0).sum(axis=1)
    if ids_NK.shape[1] == vocabulary:
        return np.maximum(kept, 0.0)
    tail_p, tail_q = np.maximum(1 - p.sum(axis=1), 0.0), np.maximum(1 - np.exp(log_q).sum(axis=1), 1e-7)
    return np.maximum(kept + np.where(tail_p > 0, tail_p * (np.log(np.maximum(tail_p, 1e-300)) - np.log(tail_q)), 0.0), 0.0)


@dataclass(frozen=True)
class PlainTopK(TokenCodec):
    """The exact baseline: 16-bit log-probabilities and whole ids.

    Args:
        k: kept entries. vocabulary: V. values: `float16` (11 bits, exact near 0) or `bfloat16` (8 bits).
        ids: `packed`, ⌈log2 V⌉ bits each, or `int32`, 32 bits.
    """

    values: Values = "float16"
    ids: Ids = "packed"
    name: ClassVar[str] = "plain_topk"

    def __post_init__(self) -> None:
        super().__post_init__()
        for field, choices in (("values", get_args(Values)), ("ids", get_args(Ids))):
            if getattr(self, field) not in choices:
                raise InputError(f"'{field}' is {getattr(self, field)!r}.", where=field, fix=f"Give {' or '.join(choices)}.")

    @property
    def id_bits(self) -> int:
        """Bits of an id."""
        return 32 if self.ids == "int32" else max(1, (self.vocabulary - 1).bit_length())

    @property
    def row_bytes(self) -> int:
        """2 k for the values, and the ids."""
        return 2 * self.k + -(-self.k * self.id_bits // 8)

    def encode(self, ids_NK: Array, logp_NK: Array) -> tuple[Array, Array]:
        """See TokenCodec."""
        if self.values == "float16":
            words = logp_NK.astype("<f2").view("<u2")
        else:  # to the nearest, ties to even; finite, so no NaN can arise
            bits = np.ascontiguousarray(logp_NK, np.float32).view(np.uint32)
            words = ((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)).astype("<u2")
        bits_NKB = (ids_NK[:, :, None] >> np.arange(self.id_bits)) & 1
        packed = np.packbits(bits_NKB.astype(np.uint8).reshape(len(ids_NK), self.k * self.id_bits), axis=1, bitorder="little")
        rows = np.concatenate([np.ascontiguousarray(words).view(np.uint8).reshape(len(ids_NK), 2 * self.k), packed], axis=1)
        return rows.reshape(-1), np.full(len(ids_NK), self.row_bytes, np.int64)

    def decode(self, data: Array, starts_N: Array, lengths_N: Array) -> tuple[Array, Array]:
        """See TokenCodec."""
        if (lengths_N != self.row_bytes).any() or (len(starts_N) and (starts_N.min() < 0 or int((starts_N + lengths_N).max()) > len(data))):
            raise damaged("a row has another length")
        rows = data[starts_N[:, None] + np.arange(self.row_bytes)]
        words = np.ascontiguousarray(rows[:, : 2 * self.k]).view("<u2")
        if self.values == "float16":
            logp = words.view("<f2").astype(np.float64)
        else:
            logp = (words.astype(np.uint32) << np.uint32(16)).view(np.float32).astype(np.float64)
        first = np.arange(self.k) * self.id_bits
        padded = np.concatenate([rows[:, 2 * self.k :], np.zeros((len(rows), 4), np.uint8)], axis=1).astype(np.int64)
        ids = sum((padded[:, (first >> 3) + byte] << (8 * byte) for byte in range(4)), np.zeros((len(rows), self.k), np.int64))
        ids = (ids >> (first & 7)) & ((1 << self.id_bits) - 1)
        if not (logp <= 0).all() or (len(ids) and ids.max() >= self.vocabulary):
            raise damaged("an id or a logarithm is out of range")
        logp = np.maximum(logp, ABSENT)
        return ids, (logp - np.log(np.maximum(np.exp(logp).sum(axis=1, keepdims=True), 1.0))).astype(np.float32)


def packed_rows(codec: TokenCodec, rows: TopRows) -> tuple[Blobs, tuple[Array, Array]]:
    """One blob a sample, and the rows (ids [N, k], logp [N, k]) as they were given to the codec. Raises InputError: see `TokenCodec.canonical`."""
    present = np.asarray(rows.present)
    if present.dtype != np.bool_ or present.ndim != 2 or np.shape(rows.ids) != (*present.shape, codec.k) or np.shape(rows.logp) != np.shape(rows.ids):
        shapes = f"{list(np.shape(rows.ids))}, {list(np.shape(rows.logp))}, {list(present.shape)} ({present.dtype})"
        raise InputError(f"ids, logp and present must be [R, L, {codec.k}], [R, L, {codec.k}] and [R, L] bool, not {shapes}.", where="tokens")
    kept = codec.canonical(np.asarray(rows.ids)[present], np.asarray(rows.logp)[present])
    data, lengths = codec.encode(*kept)
    counts = present.sum(axis=1)
    ends = np.concatenate([[0], np.cumsum(counts)])
    bounds = np.concatenate([[0], np.cumsum(lengths)])
    blobs = []
    for number, mask in enumerate(present):
        start, stop = int(ends[number]), int(ends[number + 1])
        sizes = lengths[start:stop]
        parts = [_presence(mask)]
        if codec.row_bytes is None:
            long = sizes[sizes >= _LONG]
            if len(long) and int(long.max()) > 0xFFFF:
                raise InputError(f"a row takes {int(long.max())} bytes.", where="tokens", fix="Give a smaller k or a larger step.")
            parts += [np.minimum(sizes, _LONG).astype(np.uint8), long.astype("<u2").view(np.uint8)]
        blobs.append(np.concatenate([*parts, data[bounds[start] : bounds[stop]]]))
    return Blobs.of(blobs), kept


def _presence(mask: Array) -> Array:
    """Which positions have a row: the number of runs and each run's start and length; or 255 and a bit a position, where that is shorter."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], mask.astype(np.int8), [0]])))
    if len(edges) // 2 >= _BITMAP or 2 * len(edges) >= (len(mask) + 7) // 8 > 4:
        return np.concatenate([np.array([_BITMAP], np.uint8), np.packbits(mask, bitorder="little")])
    runs = np.stack([edges[::2], edges[1::2] - edges[::2]], axis=1).astype("<u2")
    return np.concatenate([np.array([len(runs)], np.uint8), runs.reshape(-1).view(np.uint8)])


@dataclass(frozen=True, eq=False)
class Places:
    """Where the rows of B samples lie in the blobs' data: present [B, L] bool, starts and lengths [B, L] int64 (0 where there is none)."""

    present: Array
    starts: Array
    lengths: Array


def places_of(codec: TokenCodec, blobs: Blobs, length: int) -> Places:
    """Read the heads of blobs. Raises InputError where they do not fit their blob."""
    present = np.zeros((len(blobs), length), bool)
    starts, lengths = np.zeros((len(blobs), length), np.int64), np.zeros((len(blobs), length), np.int64)
    offsets = blobs.offsets.tolist()
    for number in range(len(blobs)):
        begin, end = offsets[number], offsets[number + 1]
        blob = blobs.data[begin:end]
        at = _read_presence(blob, present[number])
        count = int(np.count_nonzero(present[number]))
        if codec.row_bytes is not None:
            sizes = np.full(count, codec.row_bytes, np.int64)
        else:
            sizes = blob[at : at + count].astype(np.int64)
            at += count
            long = np.flatnonzero(sizes == _LONG)
            words = np.ascontiguousarray(blob[at : at + 2 * len(long)])
            if len(sizes) < count or len(words) < 2 * len(long):
                raise damaged("a sample's head is cut off")
            sizes[long] = words.view("<u2")
            at += 2 * len(long)
        ends = np.cumsum(sizes)
        if at + (int(ends[-1]) if count else 0) != end - begin:
            raise damaged("the rows of a sample do not fill it")
        starts[number, present[number]] = begin + at + ends - sizes
        lengths[number, present[number]] = sizes
    return Places(present, starts, lengths)


def _read_presence(blob: Array, mask: Array) -> int:
    """Fill `mask` [L]; how many bytes were read."""
    if not len(blob):
        raise damaged("a sample is empty")
    form, length = int(blob[0]), len(mask)
    at = 1 + ((length + 7) // 8 if form == _BITMAP else 4 * form)
    if len(blob) < at:
        raise damaged("a sample's head is cut off")
    if form == _BITMAP:
        bits = np.unpackbits(blob[1:at], bitorder="little").view(bool)
        if bits[length:].any():
            raise damaged("a position is outside the sample")
        mask[:] = bits[:length]
        return at
    last = 0
    for first, count in np.ascontiguousarray(blob[1:at]).view("<u2").reshape(-1, 2).tolist():
        if first < last or not count or first + count > length:
            raise damaged("a position is outside the sample")
        mask[first : first + count] = True
        last = first + count
    return at


def unpacked_rows(codec: TokenCodec, data: Array, present: Array, starts: Array, lengths: Array) -> dict[str, Array]:
    """Decode the rows that are present, in one call: {"ids" [..., k] int64, "logp" [..., k] float32, "present" [...] bool}.

    Where there is no row, the ids 0 … k − 1 stand with the uniform distribution: finite numbers that nobody should use.
    """
    ids = np.empty((*present.shape, codec.k), np.int64)
    logp = np.empty((*present.shape, codec.k), np.float32)
    if present.all():
        found = codec.decode(data, starts.reshape(-1), lengths.reshape(-1))
        ids[:], logp[:] = (one.reshape(ids.shape) for one in found)
    else:
        ids[:], logp[:] = np.arange(codec.k), -math.log(codec.vocabulary)
        ids[present], logp[present] = codec.decode(data, starts[present], lengths[present])
    return {"ids": ids, "logp": logp, "present": present}


TOKEN_CODECS: dict[str, type[TokenCodec]] = {PlainTopK.name: PlainTopK}


def token_codec_from(spec: Mapping[str, Any], *, where: str = "codec") -> TokenCodec:
    """The codec that plain values describe: {"name": "plain_topk", "k": 50, "vocabulary": 49152}.

    Raises:
        InputError: an unknown name or field, a field missing or out of range; `where` is the field's path below the given one.
    """
    values = dict(spec)
    name = values.pop("name", None)
    found = TOKEN_CODECS.get(name) if isinstance(name, str) else None
    if found is None:
        raise InputError(f"there is no token codec '{name}'.", where=f"{where}.name", fix=suggestion(str(name), TOKEN_CODECS))
    known = {field.name: field for field in fields(found)}
    for key in values:
        if key not in known:
            raise InputError(f"the codec '{name}' has no field '{key}'.", where=f"{where}.{key}", fix=suggestion(key, known))
    for key, field in known.items():
        if key not in values and field.default is MISSING:
            raise InputError(f"the codec '{name}' needs '{key}'.", where=f"{where}.{key}", fix=f"Give it: {{name: {name}, {key}: …}}.")
    try:
        return found(**values)
    except InputError as error:
        raise error.at(where) from None


def token_codec(spec: Mapping[str, Any], *, vocabulary: int, where: str = "codec") -> TokenCodec:
    """`token_codec_from` for a teacher's vocabulary, which `spec` need not name. Raises InputError also where it names another."""
    found = token_codec_from({"vocabulary": vocabulary, **spec}, where=where)
    try:
        found.check(vocabulary)
    except InputError as error:
        raise error.at(where) from None
    return found
