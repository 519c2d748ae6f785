"""Arrow files of a record: one uncompressed batch of fixed-size columns and columns of byte strings, mapped without a copy."""

from __future__ import annotations

import hashlib
import mmap
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from limbeck.errors import InputError
from limbeck.records.blobs import Blobs

if TYPE_CHECKING:
    import pyarrow as pa


BLOB = "blob"
"""The type, in a layout, of a column of byte strings."""

Column = NDArray[Any] | Blobs


def _arrow(array: Column) -> pa.Array:
    import pyarrow as pa

    if isinstance(array, Blobs):
        buffers = [None, pa.py_buffer(np.ascontiguousarray(array.offsets, "<i8")), pa.py_buffer(np.ascontiguousarray(array.data, np.uint8))]
        return pa.LargeBinaryArray.from_buffers(pa.large_binary(), len(array), buffers)
    flat = pa.array(np.ascontiguousarray(array).reshape(-1))
    return flat if array.ndim == 1 else pa.FixedSizeListArray.from_arrays(flat, int(np.prod(array.shape[1:])))


def pack(columns: Mapping[str, Column]) -> bytes:
    """An Arrow IPC file with one batch; inner dimensions are flattened (the manifest has the shapes). The same arrays give the same bytes."""
    import pyarrow as pa

    batch = pa.RecordBatch.from_arrays([_arrow(array) for array in columns.values()], names=list(columns))
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, batch.schema, options=pa.ipc.IpcWriteOptions(compression=None, use_threads=False)) as writer:
        writer.write_batch(batch)
    return sink.getvalue().to_pybytes()


def unpack(source: Any, layout: Mapping[str, tuple[str, tuple[int, ...]]], where: str) -> dict[str, Any]:
    """Read-only views of the columns of `pack`, shaped as `layout` (column -> dtype, shape without the rows; `BLOB`: Blobs) says. Raises InputError."""
    import pyarrow as pa

    try:
        batch = pa.ipc.open_file(pa.BufferReader(source), options=pa.ipc.IpcReadOptions(use_threads=False)).get_batch(0)
        found = {}
        for name, (kind, shape) in layout.items():
            column = batch.column(name)
            if kind == BLOB:
                found[name] = _blobs(column, name)
                continue
            flat = column.flatten() if shape else column
            array = flat.to_numpy(zero_copy_only=True)
            if array.dtype != np.dtype(kind):
                raise ValueError(f"column {name} is {array.dtype}, not {kind}")
            found[name] = array.reshape(batch.num_rows, *shape)
        return found
    except (pa.ArrowException, KeyError, ValueError) as error:
        message = " ".join(str(error).split())[:120]
        raise InputError(f"does not hold what the manifest says ({message}).", where=where, fix="Record it again.") from error


def _blobs(column: pa.Array, name: str) -> Blobs:
    """Read-only views of a column of byte strings."""
    import pyarrow as pa

    if column.type != pa.large_binary() or column.null_count or column.offset:
        raise ValueError(f"column {name} is {column.type}, not byte strings")
    _, offsets, data = column.buffers()
    bounds = np.frombuffer(offsets, "<i8")[: len(column) + 1]
    content = np.zeros(0, np.uint8) if data is None else np.frombuffer(data, np.uint8)
    if len(bounds) != len(column) + 1 or bounds[0] or (np.diff(bounds) < 0).any() or bounds[-1] > len(content):
        raise ValueError(f"column {name} has wrong offsets")
    return Blobs(content, bounds)


def mapped(path: Path) -> pa.Buffer:
    """A file as a memory-mapped buffer (the map lives as long as the buffer or an array on it)."""
    import pyarrow as pa

    with path.open("rb") as handle:
        return pa.py_buffer(mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ))


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, read in pieces of 1 MiB (not through a map, so that the pages do not count as this process's memory)."""
    digest, piece = hashlib.sha256(), bytearray(1 << 20)
    view = memoryview(piece)
    with path.open("rb", buffering=0) as handle:
        while count := handle.readinto(piece):
            digest.update(view[:count])
    return digest.hexdigest()
