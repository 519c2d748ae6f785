"""Recording: tasks (a view of a run of samples) in, shards out; killed at any moment it goes on from the last whole shard."""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from limbeck.errors import InputError
from limbeck.records.blobs import Blobs
from limbeck.records.codecs import Codec, kl_error
from limbeck.records.manifest import FORMAT, GO_ON, Field, Part, check_identity, plain, sealed, shard_name, unsealed
from limbeck.records.shards import pack
from limbeck.records.stores import Store, store_for
from limbeck.records.token_codecs import TokenCodec, TopRows, outcomes_kl, packed_rows, places_of

ROWS_AT_ONCE = 1 << 15
"""Rows of tokens that are encoded, decoded and measured at once: what that takes stays small beside a shard."""

MANIFEST, INDEX, SAMPLES = "manifest.json", "index.json", "samples.arrow"


@dataclass(frozen=True, eq=False)
class Task:
    """One shard to record: part, view, shard number, the samples' positions in the part [R] and their ids [R]."""

    part: str
    view: int
    shard: int
    positions: NDArray[np.int64]
    ids: NDArray[np.int64]

    @property
    def file(self) -> str:
        """The shard's file inside the record."""
        return shard_name(self.part, self.view, self.shard)


def sidecar_of(file: str) -> str:
    """The small file that says that a shard is whole, while recording goes on."""
    return file.removesuffix(".arrow") + ".json"


def manifest_body(identity: Mapping[str, Any], about: Mapping[str, Any], parts: Mapping[str, Part], shard_rows: int) -> dict[str, Any]:
    """The manifest's content."""
    specs = {name: part.spec() for name, part in parts.items()}
    return {"format": FORMAT, "identity": plain(dict(identity)), "about": plain(dict(about)), "parts": specs, "shard_rows": shard_rows}


def load_manifest(store: Store) -> dict[str, Any] | None:
    """The manifest of a record; None where there is none. Raises InputError."""
    content = store.read(MANIFEST)
    return None if content is None else unsealed(content, store.where(MANIFEST), "Restore the file from a copy, or record again into another folder.")


def load_index(store: Store) -> dict[str, Any] | None:
    """The index of a finished record; None where there is none. Raises InputError."""
    content = store.read(INDEX)
    return None if content is None else unsealed(content, store.where(INDEX), "Restore the file from a copy, or delete it and record again.")


class RecordWriter:
    """Opens or resumes a record; every process of a group (rank of world) opens its own.

    Args:
        url: a folder or an fsspec URL.
        identity: what the record is of (teacher, data, views, codec, ...); a resumed recording must have the same.
        about: further facts for readers; compared with nothing, kept from the first recording unless views are added.
        parts: the samples, views and fields of each part.
        shard_rows: rows of a shard; the last shard of a view may be shorter.
        rank: this process's number; it records every world-th shard.
        world: how many processes record.

    Raises InputError for a record of another identity, fewer views than recorded, other samples, fields or shard_rows, and for places out of reach.
    """

    def __init__(
        self,
        url: Any,
        *,
        identity: Mapping[str, Any],
        about: Mapping[str, Any],
        parts: Mapping[str, Part],
        shard_rows: int = 8192,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        if isinstance(shard_rows, bool) or not isinstance(shard_rows, int) or shard_rows < 1:
            raise InputError(f"{shard_rows!r} rows a shard are not possible.", where="shard_rows", fix="Give a whole number of at least 1.")
        if not 0 <= rank < world:
            raise InputError(f"rank {rank} of {world} does not exist.", where="rank")
        if not parts or any(not name.isidentifier() for name in parts):
            raise InputError("a record needs at least one part, with a plain word as its name.", where="parts")
        self.store, self.parts, self.shard_rows, self.rank, self.world = store_for(url), dict(parts), shard_rows, rank, world
        self.body = manifest_body(identity, about, parts, shard_rows)
        found = load_manifest(self.store)
        extends = found is not None and self._check(found)
        self._sweep()
        self._known = self._finished()
        if found is not None and not extends:
            self.body["about"] = found["about"]
        if rank == 0:
            if found is None and load_index(self.store) is not None:
                raise InputError("there is an index without a manifest.", where=self.store.where(INDEX), fix="Record into another folder.")
            if extends:
                self._unfold()
            if found is None or extends:
                self.store.write(MANIFEST, sealed(self.body))
            for name, content in self._samples().items():
                if self.store.sha256(name) != hashlib.sha256(content).hexdigest():
                    self.store.write(name, content)

    def _check(self, found: Mapping[str, Any]) -> bool:
        """Refuse another record; True where this one adds views."""
        check_identity(found["identity"], self.body["identity"], where=self.store.url)
        old, new = plain(found["parts"]), plain(self.body["parts"])
        extends = False
        for name in old.keys() & new.keys():
            before, after = old[name].pop("views"), new[name].pop("views")
            if after < before:
                raise InputError(
                    f"the record has {before} views, this run wants {after}; views are only ever added.",
                    where=f"{self.store.url}.parts.{name}.views",
                    fix=f"Ask for at least {before} views, or record into another folder.",
                )
            extends |= after > before
        check_identity({"parts": old, "shard_rows": found["shard_rows"]}, {"parts": new, "shard_rows": self.shard_rows}, where=self.store.url)
        return extends

    def _samples(self) -> dict[str, bytes]:
        return {f"{name}/{SAMPLES}": pack({"id": part.ids}) for name, part in self.parts.items()}

    def _sweep(self) -> None:
        """Leftovers of killed processes: rank 0 clears the folders' own files, each rank those of its shards (nobody else writes them)."""
        mine = {part: set[str]() for part in self.parts}
        for part, view, shard in self._mine():
            stem = shard_name(part, view, shard).rpartition("/")[2]
            mine[part] |= {stem, sidecar_of(stem)}
        for part, names in mine.items():
            self.store.sweep(f"{part}/shards", names.__contains__)
        if self.rank == 0:
            self.store.sweep("", lambda name: name in (MANIFEST, INDEX))
            for part in self.parts:
                self.store.sweep(part, lambda name: name == SAMPLES)

    def _shards(self) -> Iterator[tuple[str, int, int]]:
        """All shards in order: (part, view, shard number)."""
        for name, part in self.parts.items():
            for view in range(part.views):
                for shard in range(math.ceil(len(part.ids) / self.shard_rows)):
                    yield name, view, shard

    def _mine(self) -> Iterator[tuple[str, int, int]]:
        """Every world-th of them."""
        return itertools.islice(self._shards(), self.rank, None, self.world)

    def _files(self) -> list[str]:
        return [shard_name(*place) for place in self._shards()]

    def _sidecars(self) -> set[str]:
        return {name for part in self.parts for name in self.store.names(f"{part}/shards") if name.endswith(".json")}

    def _finished(self) -> dict[str, dict[str, Any]]:
        """What is known of whole shards: file -> its entry; from the index, and over it the sidecars (in this order: rank 0 may be unfolding)."""
        index = load_index(self.store)
        known: dict[str, dict[str, Any]] = dict(index["shards"]) if index else {}
        for name in sorted(self._sidecars()):
            content = self.store.read(name)
            try:
                if content is not None:
                    known[name.removesuffix(".json") + ".arrow"] = unsealed(content, self.store.where(name), "")
            except InputError:
                known.pop(name.removesuffix(".json") + ".arrow", None)  # a damaged sidecar says nothing: its shard is recorded again
        return known

    def _unfold(self) -> None:
        """Before views are added: sidecars out of the index, then no index, so that nobody takes the record for finished."""
        present = self._sidecars()
        for file, entry in self._known.items():
            if sidecar_of(file) not in present:
                self.store.write(sidecar_of(file), sealed(entry))
        self.store.delete(INDEX)

    @property
    def complete(self) -> bool:
        """Whether the index of exactly this record has been written."""
        index = load_index(self.store)
        return index is not None and set(index["shards"]) == set(self._files())

    @property
    def progress(self) -> tuple[int, int]:
        """Shards known to be whole, and all shards (of all ranks, as of this process's start and its own work since)."""
        files = self._files()
        return sum(file in self._known for file in files), len(files)

    def pending(self) -> Iterator[Task]:
        """The shards that this rank still has to record; whole ones are verified by their checksum and skipped."""
        for name, view, shard in self._mine():
            file = shard_name(name, view, shard)
            entry = self._known.get(file)
            if entry is not None and self.store.sha256(file) == entry["sha256"]:
                continue
            self._known.pop(file, None)
            ids, start = self.parts[name].ids, shard * self.shard_rows
            positions = np.arange(start, min(start + self.shard_rows, len(ids)), dtype=np.int64)
            yield Task(name, view, shard, positions, ids[positions])

    def write(self, task: Task, values: Mapping[str, NDArray[Any] | TopRows]) -> None:
        """Encode, measure and store one shard. `values`: field -> [R, ...], logits [R, T, C], finite numbers; tokens: TopRows. Raises InputError."""
        fields = {field.name: field for field in self.parts[task.part].fields}
        if set(values) != set(fields):
            odd = sorted(set(values) ^ set(fields))[0]
            raise InputError(f"the field '{odd}' is {'not given' if odd in fields else 'no field of this part'}.", where=task.part)
        columns: dict[str, NDArray[Any] | Blobs] = {}
        errors: dict[str, Any] = {}
        for name, field in fields.items():
            given = values[name]
            if isinstance(field.codec, TokenCodec) != isinstance(given, TopRows):
                raise InputError("rows of tokens are given as TopRows, and nothing else is.", where=f"{task.part}.{name}")
            if isinstance(given, TopRows):
                columns[name] = self._encode_tokens(task, field, given, errors)
                continue
            array = np.asarray(given)
            if array.shape != (len(task.ids), *field.shape):
                raise InputError(f"has shape {list(array.shape)}, not {[len(task.ids), *field.shape]}.", where=f"{task.part}.{name}")
            kept = self._cast(task, field, array)
            if field.codec is None:
                columns[name] = kept
            else:
                columns |= self._encode(field, kept, errors)
        content = pack(columns)
        entry = {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content), "rows": len(task.ids), "errors": errors}
        self.store.write(task.file, content)
        self.store.write(sidecar_of(task.file), sealed(entry))
        self._known[task.file] = entry

    def _cast(self, task: Task, field: Field, array: NDArray[Any]) -> NDArray[Any]:
        with np.errstate(over="ignore", invalid="ignore"):
            kept = array.astype(field.dtype)
        bad = ~np.isfinite(kept).reshape(len(kept), -1).all(axis=1) if kept.dtype.kind == "f" else np.zeros(len(kept), bool)
        if bad.any():
            row = int(np.argmax(bad))
            raise InputError(
                f"sample {int(task.ids[row])} (view {task.view}) has a value that is not finite in {field.dtype}.",
                where=f"{task.part}.{field.name}",
                fix="Look at the teacher's outputs for this sample.",
            )
        return kept

    def _encode(self, field: Field, logits_RTC: NDArray[Any], errors: dict[str, Any]) -> dict[str, NDArray[Any]]:
        """Columns of the logits; sums and maxima of their errors go into `errors`."""
        codec, (members, classes) = field.codec, field.shape
        assert isinstance(codec, Codec)
        flat = np.ascontiguousarray(logits_RTC.reshape(-1, classes))
        arrays = codec.encode(flat)
        kl = np.zeros(len(flat)) if codec.name == "full" else kl_error(flat, codec.decode(arrays, classes))
        errors[field.name] = {"rows": len(flat), "kl_sum": _finite(kl.sum()), "kl_max": _finite(kl.max())}
        outcomes = codec.kl_outcomes(flat, arrays)
        if outcomes is not None:
            errors[field.name] |= {"outcomes_sum": _finite(outcomes.sum()), "outcomes_max": _finite(outcomes.max())}
        return {f"logits.{name}": array.reshape(len(logits_RTC), members, *array.shape[1:]) for name, array in arrays.items()}

    def _encode_tokens(self, task: Task, field: Field, rows: TopRows, errors: dict[str, Any]) -> Blobs:
        """A blob a sample; sums and maxima of the errors over the outcomes of its rows go into `errors`."""
        codec = field.codec
        assert isinstance(codec, TokenCodec)
        if np.shape(rows.present) != (len(task.ids), *field.shape):
            shape = [len(task.ids), *field.shape]
            raise InputError(f"'present' has shape {list(np.shape(rows.present))}, not {shape}.", where=f"{task.part}.{field.name}")
        packed: list[Blobs] = []
        kl_sum, kl_max, count = 0.0, 0.0, 0
        some = max(1, ROWS_AT_ONCE // field.shape[0])
        for start in range(0, len(task.ids), some):
            part = slice(start, start + some)
            try:
                blobs, kept = packed_rows(codec, TopRows(rows.ids[part], rows.logp[part], rows.present[part]))
            except InputError as error:
                raise error.at(task.part) from error
            places = places_of(codec, blobs, field.shape[0])
            decoded = codec.decode(blobs.data, places.starts[places.present], places.lengths[places.present])
            kl = outcomes_kl(*kept, *decoded, codec.vocabulary)
            kl_sum, kl_max, count = kl_sum + float(kl.sum()), max(kl_max, float(kl.max(initial=0.0))), count + len(kl)
            packed.append(blobs)
        blobs = Blobs.joined(packed)
        size = len(blobs.data) + 8 * len(blobs)
        errors[field.name] = {"rows": count, "kl_sum": _finite(kl_sum), "kl_max": _finite(kl_max), "bytes": size}
        return blobs

    def finish(self) -> None:
        """Write the index, by which the record is complete (rank 0, after all ranks have written). Raises InputError while shards are missing."""
        if self.rank != 0:
            return
        known = self._finished() | self._known
        files = self._files()
        missing = [file for file in files if file not in known]
        if missing:
            what = f"{len(missing)} of {len(files)} shards are not recorded yet (the first: {missing[0]})."
            raise InputError(what, where=self.store.url, fix=GO_ON)
        shards = {file: known[file] for file in files}
        body = {
            "format": FORMAT,
            "manifest": hashlib.sha256(sealed(self.body)).hexdigest(),
            "samples": {name: hashlib.sha256(content).hexdigest() for name, content in self._samples().items()},
            "errors": {name: _totals([shards[file]["errors"] for file in files if file.startswith(f"{name}/")]) for name in self.parts},
            "shards": shards,
        }
        self.store.write(INDEX, sealed(body))
        for name in sorted(self._sidecars()):
            self.store.delete(name)


def _finite(value: Any) -> float | None:
    """A number for JSON; None where it is infinite (a class that the teacher gave some probability is stored as impossible)."""
    return float(value) if math.isfinite(value) else None


def _totals(entries: list[dict[str, Any]]) -> dict[str, dict[str, float | None]]:
    """Mean and maximum of the errors of all shards of a part; None where infinite."""
    totals: dict[str, dict[str, float | None]] = {}
    for name in sorted({name for entry in entries for name in entry}):
        rows = [entry[name] for entry in entries]
        count = sum(row["rows"] for row in rows)

        def mean(key: str, rows: list[dict[str, Any]] = rows, count: int = count) -> float | None:
            return None if not count or any(row[key] is None for row in rows) else math.fsum(row[key] for row in rows) / count

        def most(key: str, rows: list[dict[str, Any]] = rows) -> float | None:
            return None if any(row[key] is None for row in rows) else max(row[key] for row in rows)

        totals[name] = {"kl_mean": mean("kl_sum"), "kl_max": most("kl_max")}
        if "bytes" in rows[0]:  # tokens: the errors are over the k + 1 outcomes, and a row is a token
            totals[name] |= {"tokens": count, "bytes_per_token": mean("bytes")}
        if "outcomes_sum" in rows[0]:
            totals[name] |= {"kl_outcomes_mean": mean("outcomes_sum"), "kl_outcomes_max": most("outcomes_max")}
    return totals
