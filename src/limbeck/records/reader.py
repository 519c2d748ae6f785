"""Reading a record: random access to rows of memory-mapped shards, each checked by its checksum before anything of it is given out."""

from __future__ import annotations

import itertools
import os
import shutil
import tempfile
import weakref
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from limbeck.errors import InputError, suggestion
from limbeck.records.blobs import Blobs
from limbeck.records.codecs import Codec
from limbeck.records.manifest import GO_ON, Field, check_identity, shard_name
from limbeck.records.shards import BLOB, mapped, unpack
from limbeck.records.stores import LocalStore, Store, store_for
from limbeck.records.token_codecs import TokenCodec, places_of, unpacked_rows
from limbeck.records.writer import INDEX, MANIFEST, SAMPLES, load_index, load_manifest

MAPS = 256  # shards mapped at once (each holds a file handle)


def _remove_own(folder: str, pid: int) -> None:
    """Remove a temporary cache, in the process that made it only (a forked worker inherits the finaliser)."""
    if os.getpid() == pid:
        shutil.rmtree(folder, ignore_errors=True)


class RecordPart:
    """One part of an open record. `ids` [N] int64 in order, `views` of each, `fields` by name, `name`."""

    def __init__(self, record: Record, name: str, spec: Mapping[str, Any], ids: NDArray[np.int64]) -> None:
        self._record, self.name, self.ids, self.views = record, name, ids, int(spec["views"])
        self.fields = {field: Field.from_spec(field, one) for field, one in spec["fields"].items()}
        self._columns = {column: layout for field in self.fields.values() for column, layout in field.columns().items()}
        low, high = int(ids.min()), int(ids.max())
        self._dense: NDArray[np.int64] | None = None
        if low >= 0 and high < 4 * len(ids) + 1024:
            self._dense = np.full(high + 1, -1, np.int64)
            self._dense[ids] = np.arange(len(ids))
        else:
            self._order = np.argsort(ids, kind="stable")
            self._sorted = ids[self._order]

    def __len__(self) -> int:
        return len(self.ids)

    def positions(self, ids_B: Any) -> NDArray[np.int64]:
        """Where the samples stand in this part, [B]. Raises InputError naming the first id that is not in it."""
        ids = np.asarray(ids_B, np.int64)
        if self._dense is not None:
            inside = (ids >= 0) & (ids < len(self._dense))
            found = self._dense[np.where(inside, ids, 0)]
            known = inside & (found >= 0)
        else:
            place = np.minimum(np.searchsorted(self._sorted, ids), len(self._sorted) - 1)
            found, known = self._order[place], self._sorted[place] == ids
        if not known.all():
            odd = int(ids[np.argmin(known)])
            what = f"sample {odd} is not in the part '{self.name}' of the record ({len(self.ids)} samples)."
            raise InputError(what, where=self._record.url, fix="Use the data that the record was made of, or record again with this data.")
        return found

    def read(self, names: Sequence[str], ids_B: Any, views_B: Any) -> dict[str, NDArray[Any]]:
        """Rows by (sample id, view), in the order asked for: field -> [B, ...].

        Logits [B, T, C] float32: normalised log-probabilities (codec `full`: the logits). Features and scores float32, boxes [B, 4] float32, flip [B] uint8.
        "tokens" gives three: "tokens/ids" [B, L, k] int64, "tokens/logp" [B, L, k] float32, descending, and "tokens/present" [B, L] bool; elsewhere stands
        the uniform distribution. Raises InputError for an unknown field, id or view, and for a missing or damaged shard (before anything is returned).
        """
        positions, views = self._asked(names, ids_B, views_B)
        columns = self._gather([column for name in names for column in self.fields[name].columns()], positions, views)
        found: dict[str, NDArray[Any]] = {}
        for name in names:
            if isinstance(self.fields[name].codec, TokenCodec):
                found |= self._token_rows(self.fields[name], columns[name], None)
            else:
                found[name] = self._decoded(self.fields[name], columns)
        return found

    def read_rows(self, ids_B: Any, views_B: Any, positions_B: Any) -> dict[str, NDArray[Any]]:
        """Single rows of tokens by (sample id, view, position in the sample); nothing else of the samples is decoded.

        Returns "tokens/ids" [B, k] int64, "tokens/logp" [B, k] float32, "tokens/present" [B] bool. Raises InputError as `read` does.
        """
        places, views = self._asked(["tokens"], ids_B, views_B)
        field, at = self.fields["tokens"], np.asarray(positions_B, np.int64)
        if at.shape != places.shape:
            raise InputError(f"ids and positions must be two lists of one length, not {list(places.shape)} and {list(at.shape)}.", where="read_rows")
        outside = (at < 0) | (at >= field.shape[0])
        if outside.any():
            raise InputError(f"position {int(at[np.argmax(outside)])} is not in a sample of {field.shape[0]}.", where=self._record.url)
        (blobs,) = self._gather(["tokens"], places, views).values()
        return self._token_rows(field, blobs, at)

    def _asked(self, names: Sequence[str], ids_B: Any, views_B: Any) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Places in the part and views, both [B], of a question that can be answered."""
        for name in names:
            if name not in self.fields:
                raise InputError(f"the part '{self.name}' of the record holds no '{name}'.", where=self._record.url, fix=suggestion(name, self.fields))
        views = np.asarray(views_B, np.int64)
        positions = self.positions(ids_B)
        if views.shape != positions.shape or views.ndim != 1:
            raise InputError(f"ids and views must be two lists of one length, not {list(positions.shape)} and {list(views.shape)}.", where="read")
        outside = (views < 0) | (views >= self.views)
        if outside.any():
            odd = int(views[np.argmax(outside)])
            fix = "Ask for views that were recorded, or record again with more views (what is there is kept)."
            raise InputError(f"view {odd} is not in the part '{self.name}' of the record ({self.views} views).", where=self._record.url, fix=fix)
        return positions, views

    def _gather(self, names: list[str], positions: NDArray[np.int64], views: NDArray[np.int64]) -> dict[str, Any]:
        """The stored columns of rows: grouped by shard, one `take` a shard and column, then back in order."""
        shard_rows = self._record.shard_rows
        per_view = -(-len(self.ids) // shard_rows)
        shards, offsets = views * per_view + positions // shard_rows, positions % shard_rows
        order = np.argsort(shards, kind="stable")
        shards, offsets = shards[order], offsets[order]
        starts = np.flatnonzero(np.diff(shards, prepend=-1)).tolist()
        layouts = [self._columns[name] for name in names]
        sorted_rows: list[Any] = [[] if kind == BLOB else np.empty((len(shards), *shape), kind) for kind, shape in layouts]
        for start, stop in itertools.pairwise([*starts, len(shards)]):
            number = int(shards[start])
            arrays = self._record._shard(self, shard_name(self.name, number // per_view, number % per_view))
            for name, target in zip(names, sorted_rows, strict=True):
                if isinstance(target, list):
                    target += arrays[name].strings(offsets[start:stop])
                else:
                    np.take(arrays[name], offsets[start:stop], axis=0, out=target[start:stop], mode="clip")
        back = np.empty_like(order)
        back[order] = np.arange(len(order))
        pairs = zip(names, sorted_rows, strict=True)
        return {name: Blobs.of([rows[place] for place in back.tolist()]) if isinstance(rows, list) else rows[back] for name, rows in pairs}

    def _token_rows(self, field: Field, blobs: Blobs, at: NDArray[np.int64] | None) -> dict[str, NDArray[Any]]:
        """All rows of samples, or one of each."""
        codec, pick = field.codec, slice(None) if at is None else (np.arange(len(blobs)), at)
        assert isinstance(codec, TokenCodec)
        try:
            places = places_of(codec, blobs, field.shape[0])
            rows = unpacked_rows(codec, blobs.data, places.present[pick], places.starts[pick], places.lengths[pick])
        except InputError as error:
            raise InputError(error.what, where=self._record.url, fix=error.fix) from error
        return {f"{field.name}/{key}": array for key, array in rows.items()}

    def _decoded(self, field: Field, columns: Mapping[str, NDArray[Any]]) -> NDArray[Any]:
        if not isinstance(field.codec, Codec):
            array = columns[field.name]
            return array.astype(np.float32) if field.dtype == "float16" else array
        members, classes = field.shape
        flat = {}
        for column in field.columns():
            array = columns[column]
            flat[column.partition(".")[2]] = array.reshape(len(array) * members, *array.shape[2:])
        return field.codec.decode(flat, classes).reshape(-1, members, classes)


class Record:
    """A finished record. Opened by `Record.open`; may be pickled (a worker re-opens it on first use) and forked."""

    def __init__(self, url: str, cache: str | None) -> None:
        self.url, self._cache_given = url, cache
        self._borrowed: str | None = None  # the temporary cache of the process that pickled this record
        self._seal: str | None = None
        self._loaded: _Loaded | None = None

    @classmethod
    def open(cls, url: str | os.PathLike[str], cache: str | os.PathLike[str] | None = None) -> Record:
        """Open a record; `cache`: folder for shards of remote records (default: a temporary folder).

        Raises InputError: no record there, recording not finished, another format, damaged manifest, index or samples.
        """
        record = cls(os.fspath(url), None if cache is None else os.fspath(cache))
        record._load()
        return record

    def _load(self) -> _Loaded:
        if self._loaded is None:
            loaded = _Loaded(self)
            if self._seal not in (None, loaded.index["manifest"]):
                raise InputError("the record was changed while it was in use.", where=self.url, fix="Start again.")
            self._loaded, self._seal = loaded, loaded.index["manifest"]
        return self._loaded

    def __getstate__(self) -> dict[str, Any]:
        borrowed = self._loaded.temporary if self._loaded and self._loaded.temporary else self._borrowed
        return {"url": self.url, "_cache_given": self._cache_given, "_borrowed": borrowed, "_seal": self._seal, "_loaded": None}

    @property
    def identity(self) -> dict[str, Any]:
        """What the record is of, as given when it was made."""
        return self._load().manifest["identity"]

    @property
    def about(self) -> dict[str, Any]:
        """Further facts, as given when it was made."""
        return self._load().manifest["about"]

    @property
    def shard_rows(self) -> int:
        """Rows of a shard."""
        return self._load().manifest["shard_rows"]

    @property
    def parts(self) -> dict[str, RecordPart]:
        """The parts by name."""
        return self._load().parts

    def check(self, wanted: Mapping[str, Any], *, fix: str = "") -> None:
        """Refuse (InputError naming the field) a record whose identity differs in the top-level entries that `wanted` gives."""
        check_identity(self.identity, wanted, partial=True, where=self.url, fix=fix)

    def _shard(self, part: RecordPart, file: str) -> dict[str, Any]:
        loaded = self._load()
        arrays = loaded.maps.get(file)
        if arrays is None:
            arrays = loaded.open_shard(file, part._columns)
            loaded.maps[file] = arrays
            if len(loaded.maps) > MAPS:
                loaded.maps.popitem(last=False)
        return arrays

    def verify(self) -> None:
        """Check every shard's checksum and content. Raises InputError naming the first that is missing or damaged."""
        loaded = self._load()
        for file in loaded.index["shards"]:
            loaded.open_shard(file, self.parts[file.partition("/")[0]]._columns, again=True)

    def summary(self) -> dict[str, Any]:
        """{"url", "rows", "bytes", "bytes_per_row", "parts": {name: {samples, views, rows, bytes, bytes_per_row, fields, errors}}}."""
        loaded = self._load()
        parts = {}
        for name, part in loaded.parts.items():
            shards = [entry for file, entry in loaded.index["shards"].items() if file.startswith(f"{name}/")]
            rows, size = sum(entry["rows"] for entry in shards), sum(entry["bytes"] for entry in shards)
            parts[name] = {
                "samples": len(part.ids),
                "views": part.views,
                "rows": rows,
                "bytes": size,
                "bytes_per_row": size / rows,
                "fields": {field: one.spec() for field, one in part.fields.items()},
                "errors": loaded.index["errors"][name],
            }
        rows, size = sum(part["rows"] for part in parts.values()), sum(part["bytes"] for part in parts.values())
        return {"url": self.url, "rows": rows, "bytes": size, "bytes_per_row": size / rows, "parts": parts}


class _Loaded:
    """What an open record holds in one process."""

    def __init__(self, record: Record) -> None:
        self.store: Store = store_for(record.url)
        self._given, self._borrowed, self.temporary = record._cache_given, record._borrowed, ""
        self.maps: OrderedDict[str, dict[str, Any]] = OrderedDict()
        self._verified: set[str] = set()
        manifest, index = load_manifest(self.store), load_index(self.store)
        if manifest is None:
            raise InputError("there is no record here (no manifest.json).", where=record.url, fix="Check the address, or make a record with `limbeck record`.")
        if index is None:
            raise InputError("this recording is not finished (no index.json).", where=record.url, fix=GO_ON)
        self.manifest, self.index = manifest, index
        if self.store.sha256(MANIFEST) != index["manifest"]:
            raise InputError(f"{INDEX} belongs to another {MANIFEST}: views are being added, or a file was exchanged.", where=record.url, fix=GO_ON)
        self.parts = {name: RecordPart(record, name, spec, self._ids(name)) for name, spec in manifest["parts"].items()}

    def _ids(self, part: str) -> NDArray[np.int64]:
        name = f"{part}/{SAMPLES}"
        path = self.store.fetch(name, self.index["samples"][name], self.cache)
        ids = np.array(unpack(mapped(path), {"id": ("int64", ())}, self.store.where(name))["id"])
        ids.setflags(write=False)
        return ids

    def cache(self) -> Path:
        """The folder for fetched shards: the given one, that of the process this record came from, or a temporary one of this process."""
        if self._given is not None:
            return Path(self._given).expanduser()
        if not self.temporary and self._borrowed and os.path.isdir(self._borrowed):
            return Path(self._borrowed)
        if not self.temporary or not os.path.isdir(self.temporary):
            self.temporary = tempfile.mkdtemp(prefix="limbeck-record-")
            weakref.finalize(self, _remove_own, self.temporary, os.getpid())
        return Path(self.temporary)

    def open_shard(self, file: str, columns: Mapping[str, tuple[str, tuple[int, ...]]], *, again: bool = False) -> dict[str, Any]:
        """Map a shard; on first touch in this process (or `again`) its checksum is compared with the index."""
        entry = self.index["shards"].get(file)
        if entry is None:
            raise InputError(f"the index does not know the shard {file}.", where=self.store.where(INDEX), fix=GO_ON)
        if isinstance(self.store, LocalStore) and file in self._verified and not again:
            path = self.store.root / file
        else:
            path = self.store.fetch(file, entry["sha256"], self.cache)
            self._verified.add(file)
        try:
            return unpack(mapped(path), columns, self.store.where(file))
        except (OSError, ValueError) as error:
            raise InputError(f"cannot be mapped ({error}).", where=self.store.where(file), fix="Is the file still there?") from error
