"""Files that are either whole or absent: written under a temporary name, fsynced, renamed."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


def sync_folder(folder: Path) -> None:
    """Make renames and new names in a folder durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_atomic(path: Path | str, content: bytes | str) -> None:
    """Write a file so that a kill at any moment leaves the old content or the new, never a part. Text goes out as UTF-8."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as handle:
            handle.write(content.encode() if isinstance(content, str) else content)
            handle.flush()
            os.fsync(handle.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def write_json(path: Path | str, value: Any) -> None:
    """`write_atomic` of indented JSON; a value that JSON cannot hold (NaN, a tensor) raises ValueError or TypeError."""
    write_atomic(path, json.dumps(value, indent=2, allow_nan=False) + "\n")
