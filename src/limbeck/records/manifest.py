"""What a record says about itself: fields, parts, identity; and the JSON that carries it."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from limbeck.errors import InputError
from limbeck.records.codecs import Codec, codec_from
from limbeck.records.shards import BLOB
from limbeck.records.token_codecs import MAX_LENGTH, TokenCodec, token_codec_from

FORMAT = 1
GO_ON = "`limbeck record` with the same recipe goes on where it stopped."
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]*(/[A-Za-z0-9_][A-Za-z0-9_.\-]*)?")


@dataclass(frozen=True)
class Field:
    """One thing kept for each row: its name, its shape without the rows, its type on disk, and for logits [T, C] and tokens [L] the codec."""

    name: str
    shape: tuple[int, ...] = ()
    dtype: str = "float32"
    codec: Codec | TokenCodec | None = None

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise InputError(f"'{self.name}' cannot name a field.", where="fields", fix="Letters, digits, '_', '.', '-', and one '/'.")
        if self.dtype not in ("float32", "float16", "uint8"):
            raise InputError(f"type {self.dtype!r} is not kept.", where=f"fields.{self.name}", fix="Take float32, float16 or uint8.")
        if (self.name == "logits") != isinstance(self.codec, Codec) or (isinstance(self.codec, Codec) and len(self.shape) != 2):
            raise InputError("a codec goes with the field 'logits' of shape [T, C], and only with it.", where=f"fields.{self.name}")
        if (self.name == "tokens") != isinstance(self.codec, TokenCodec) or (isinstance(self.codec, TokenCodec) and len(self.shape) != 1):
            raise InputError("a token codec goes with the field 'tokens' of shape [L], and only with it.", where=f"fields.{self.name}")
        if any(size < 1 for size in self.shape):
            raise InputError(f"the shape {list(self.shape)} is empty.", where=f"fields.{self.name}")
        if isinstance(self.codec, Codec):
            self.codec.check(self.shape[1])
        if isinstance(self.codec, TokenCodec) and self.shape[0] > MAX_LENGTH:
            raise InputError(f"{self.shape[0]} positions a sample are not kept.", where="fields.tokens", fix=f"At most {MAX_LENGTH:,}.")

    @classmethod
    def logits(cls, codec: Codec, classes: int, members: int = 1) -> Field:
        """The logits of T members, [T, C] a row."""
        return cls("logits", (members, classes), "float32", codec)

    @classmethod
    def tokens(cls, codec: TokenCodec, length: int) -> Field:
        """The k most probable tokens at each of `length` positions of a sample; which positions have any is kept with each sample."""
        return cls("tokens", (length,), "float32", codec)

    @classmethod
    def features(cls, tap: str, shape: tuple[int, ...]) -> Field:
        """What a tap gives, float16 on disk."""
        return cls(f"features/{tap}", tuple(shape), "float16")

    @classmethod
    def score(cls, name: str) -> Field:
        """One float32 number a row."""
        return cls(f"scores/{name}")

    @classmethod
    def boxes(cls) -> Field:
        """Relative top, left, height, width of a view, float32 [4]."""
        return cls("boxes", (4,))

    @classmethod
    def flip(cls) -> Field:
        """Whether a view is mirrored, uint8."""
        return cls("flip", (), "uint8")

    def columns(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """The columns of a shard that hold this field: column -> (dtype, shape without the rows)."""
        if self.codec is None:
            return {self.name: (self.dtype, self.shape)}
        if isinstance(self.codec, TokenCodec):
            return {self.name: (BLOB, ())}
        members, classes = self.shape
        return {f"logits.{name}": (kind.str, (members, entries)) for name, (kind, entries) in self.codec.layout(classes).items()}

    def bytes_per_row(self) -> int:
        """Bytes on disk of one row. Raises InputError for tokens: each sample has its own number."""
        if isinstance(self.codec, TokenCodec):
            raise InputError("tokens take another number of bytes in each row.", where="fields.tokens", fix="The record's summary says how many.")
        return sum(np.dtype(kind).itemsize * int(np.prod(shape)) for kind, shape in self.columns().values())

    def spec(self) -> dict[str, Any]:
        """The JSON form."""
        spec: dict[str, Any] = {"shape": list(self.shape), "dtype": self.dtype}
        return spec | ({"codec": self.codec.spec()} if self.codec else {})

    @classmethod
    def from_spec(cls, name: str, spec: Mapping[str, Any]) -> Field:
        """The field that `spec` describes."""
        codec = None
        if "codec" in spec:
            codec = token_codec_from(spec["codec"]) if name == "tokens" else codec_from(spec["codec"])
        return cls(name, tuple(spec["shape"]), spec["dtype"], codec)


@dataclass(frozen=True, eq=False)
class Part:
    """One part of a record ("train", "test"): the samples' ids [N] int64 in order, the number of views of each, and the fields of a row."""

    ids: NDArray[np.int64]
    views: int
    fields: tuple[Field, ...] = field(default=())

    def __post_init__(self) -> None:
        ids = np.array(self.ids)
        if ids.ndim != 1 or not len(ids) or ids.dtype.kind not in "iu":
            raise InputError("the ids of a part must be a list of at least one whole number.", where="ids")
        ids = ids.astype(np.int64)
        if len(np.unique(ids)) != len(ids):
            raise InputError("an id appears twice.", where="ids", fix="Give each sample once.")
        if isinstance(self.views, bool) or not isinstance(self.views, int) or not 1 <= self.views <= 99_999:
            raise InputError(f"{self.views!r} views are not possible.", where="views", fix="Give a whole number from 1 to 99999.")
        names = [one.name for one in self.fields]
        if not names or len(set(names)) != len(names):
            raise InputError("a part needs at least one field, and each only once.", where="fields")
        ids.setflags(write=False)
        object.__setattr__(self, "ids", ids)
        object.__setattr__(self, "fields", tuple(self.fields))

    def spec(self) -> dict[str, Any]:
        """The JSON form: sizes, a checksum of the ids, and the fields."""
        digest = hashlib.sha256(self.ids.astype("<i8").tobytes()).hexdigest()
        return {"samples": len(self.ids), "ids_sha256": digest, "views": self.views, "fields": {one.name: one.spec() for one in self.fields}}


def shard_name(part: str, view: int, shard: int) -> str:
    """The file of a shard inside the record."""
    return f"{part}/shards/{view:05d}-{shard:05d}.arrow"


def plain(value: Any) -> Any:
    """The value as JSON gives it back (tuples become lists). Raises InputError for what JSON cannot hold."""
    try:
        return json.loads(json.dumps(value, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise InputError(f"this cannot be written as JSON ({error}).", where="identity") from error


def _shown(value: Any) -> str:
    if value is _ABSENT:
        return "nothing"
    if isinstance(value, str) and re.fullmatch(r"(sha256:)?[0-9a-fA-F]{32,}", value):
        return f"{value[:19] if value.startswith('sha') else value[:12]}…"
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else text[:79] + "…"


_ABSENT = object()


def _difference(recorded: Any, wanted: Any, path: str) -> tuple[str, Any, Any] | None:
    """The first place where two JSON values differ: (dotted path, recorded value, wanted value)."""
    if isinstance(recorded, dict) and isinstance(wanted, dict):
        for key in [*wanted, *(key for key in recorded if key not in wanted)]:
            place = f"{path}.{key}" if path else str(key)
            found = _difference(recorded.get(key, _ABSENT), wanted.get(key, _ABSENT), place)
            if found:
                return found
        return None
    same = recorded == wanted and isinstance(recorded, bool) == isinstance(wanted, bool)
    return None if same else (path, recorded, wanted)


def check_identity(
    recorded: Mapping[str, Any], wanted: Mapping[str, Any], *, partial: bool = False, where: str = "", fix: str = "", subject: str = "the record was"
) -> None:
    """Raise InputError for the first field in which two identities differ; its `where` is the field's dotted path, its text has both values.

    Args:
        recorded: the identity in a record.
        wanted: the identity of what is being run.
        partial: compare only the top-level entries that `wanted` has (a reader that knows only the teacher and the data, say).
        where: put in front of the path (a record's address).
        fix: what to do about it, where the default does not fit.
        subject: what was made, and its verb.
    """
    have, want = plain(dict(recorded)), plain(dict(wanted))
    if partial:
        have = {key: value for key, value in have.items() if key in want}
    found = _difference(have, want, "")
    if found:
        path, old, new = found
        error = InputError(
            f"{subject} made with {_shown(old)}, this run has {_shown(new)}.",
            where=path,
            fix=fix or "Use the record that belongs to this recipe, or record again into another folder.",
        )
        raise error.at(where) if where else error


def _digest(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()).hexdigest()


def sealed(body: Mapping[str, Any]) -> bytes:
    """Indented JSON with a checksum of itself under "seal"."""
    return (json.dumps({**body, "seal": _digest(plain(dict(body)))}, indent=1, allow_nan=False) + "\n").encode()


def unsealed(content: bytes, where: str, fix: str) -> dict[str, Any]:
    """The JSON object of `sealed`; InputError where it is damaged or of another format."""
    try:
        body = json.loads(content)
        seal = body.pop("seal")
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise InputError("is damaged (not the JSON that was written).", where=where, fix=fix) from error
    if body.get("format", FORMAT) != FORMAT:
        raise InputError(f"has format {body['format']!r}; this version reads format {FORMAT}.", where=where, fix="Update limbeck, or record again.")
    if seal != _digest(body):
        raise InputError("is damaged (its checksum does not fit).", where=where, fix=fix)
    return body
