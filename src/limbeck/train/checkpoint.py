"""Checkpoints that are whole or absent: written beside, fsynced, renamed; every file has its checksum in a manifest."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from limbeck.errors import InputError
from limbeck.files import sync_folder

_WEIGHTS, _STATE, _PROGRESS, _MANIFEST = "weights.safetensors", "state.pt", "progress.json", "manifest.json"
FORMAT = 1


@dataclass(frozen=True)
class Checkpoint:
    """What a restart needs. weights: flat name → tensor; state: optimisers, method, logs; progress: JSON."""

    weights: Mapping[str, Tensor]
    state: Mapping[str, Any]
    progress: Mapping[str, Any]


def _own(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """CPU copies that share no memory (tied weights become two)."""
    seen: set[int] = set()
    out = {}
    for name, tensor in tensors.items():
        t = tensor.detach().to("cpu").contiguous()
        pointer = t.untyped_storage().data_ptr()
        if pointer in seen or t.untyped_storage().nbytes() != t.numel() * t.element_size():
            t = t.clone()
        seen.add(t.untyped_storage().data_ptr())
        out[name] = t
    return out


def write(folder: Path, step: int, checkpoint: Checkpoint, *, keep: int) -> Path:
    """Write `folder/step-N` atomically, then drop all but the newest `keep`."""
    from safetensors.torch import save

    folder.mkdir(parents=True, exist_ok=True)
    for leftover in folder.glob(".tmp-*"):
        shutil.rmtree(leftover, ignore_errors=True)
    buffer = io.BytesIO()
    torch.save(dict(checkpoint.state), buffer)
    files = {
        _WEIGHTS: save(_own(checkpoint.weights)),
        _STATE: buffer.getvalue(),
        _PROGRESS: json.dumps({"format": FORMAT, **checkpoint.progress}, indent=1).encode(),
    }
    manifest = {name: {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()} for name, content in files.items()}
    files[_MANIFEST] = json.dumps(manifest, indent=1).encode()
    temporary = folder / f".tmp-{os.getpid()}-{step}"
    temporary.mkdir()
    for name, content in files.items():
        with (temporary / name).open("wb") as handle:
            handle.write(content)
            handle.flush()
            os.fsync(handle.fileno())
    sync_folder(temporary)
    final = folder / f"step-{step}"
    retired = folder / f".tmp-old-{os.getpid()}-{step}"
    if final.exists():  # of the same step: the end of a phase, a rewind, or a damaged one
        final.rename(retired)
    temporary.rename(final)
    sync_folder(folder)
    shutil.rmtree(retired, ignore_errors=True)
    for old in steps(folder)[:-keep]:
        shutil.rmtree(folder / f"step-{old}", ignore_errors=True)
    return final


def steps(folder: Path) -> list[int]:
    """Steps of the checkpoints in a folder, oldest first."""
    names = (path.name.removeprefix("step-") for path in folder.glob("step-*"))
    return sorted(int(name) for name in names if name.isdigit())


def damage(path: Path) -> str:
    """What is wrong with a checkpoint folder, naming the file; "" if nothing is."""
    try:
        manifest = json.loads((path / _MANIFEST).read_text())
        expected = {name: (int(entry["bytes"]), str(entry["sha256"])) for name, entry in manifest.items()}
    except FileNotFoundError:
        return f"{_MANIFEST} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"{_MANIFEST} cannot be read"
    for name in (_WEIGHTS, _STATE, _PROGRESS):
        if name not in expected:
            return f"{_MANIFEST} does not list {name}"
        file = path / name
        if not file.is_file():
            return f"{name} is missing"
        content = file.read_bytes()
        size, digest = expected[name]
        if len(content) != size:
            return f"{name} has {len(content)} bytes instead of {size}"
        if hashlib.sha256(content).hexdigest() != digest:
            return f"{name} does not match its checksum"
    return ""


def read(path: Path) -> Checkpoint:
    """Load one checkpoint folder.

    Raises:
        InputError: it is damaged; names the file, and the newest intact checkpoint before it.
    """
    from safetensors.torch import load

    wrong = damage(path) if path.is_dir() else "there is no such folder"
    if wrong:
        number = path.name.removeprefix("step-")
        earlier = [s for s in steps(path.parent) if number.isdigit() and s < int(number) and not damage(path.parent / f"step-{s}")]
        if earlier:
            fix = f"The one before it, step-{earlier[-1]}, is intact: go on from it with --from step-{earlier[-1]}."
        else:
            fix = "There is no intact one before it: delete the folder to start afresh."
        raise InputError(f"the checkpoint is damaged: {wrong}.", where=str(path), fix=fix)
    progress = json.loads((path / _PROGRESS).read_text())
    if progress.get("format") != FORMAT:
        raise InputError(f"the checkpoint has format {progress.get('format')}, this limbeck reads {FORMAT}.", where=str(path))
    state = torch.load(io.BytesIO((path / _STATE).read_bytes()), map_location="cpu", weights_only=True)
    return Checkpoint(load((path / _WEIGHTS).read_bytes()), state, progress)


def forget_later(path: Path) -> None:
    """Delete the checkpoints after this one: after a rewind they belong to another course of the run."""
    here = int(path.name.removeprefix("step-"))
    for step in steps(path.parent):
        if step > here:
            shutil.rmtree(path.parent / f"step-{step}", ignore_errors=True)


def latest(folder: Path) -> Path | None:
    """The newest checkpoint folder, damaged or not; None if there is none."""
    for retired in folder.glob(".tmp-old-*"):  # killed between the two renames of `write`
        if not (folder / f"step-{retired.name.rpartition('-')[2]}").exists():
            retired.rename(folder / f"step-{retired.name.rpartition('-')[2]}")
    found = steps(folder)
    return folder / f"step-{found[-1]}" if found else None
