"""Weights from files, and their fingerprint."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from limbeck.errors import InputError


def load_weights(module: nn.Module, path: Path | str) -> None:
    """Load a state dict into a module: a `.safetensors` file, or one written by `torch.save` (read with `weights_only=True`).

    A checkpoint that holds its state dict under `state_dict` or `model` is opened, and a prefix `module.` on all keys is dropped.
    `num_batches_tracked` may be missing. After an error the module is as it was.

    Raises:
        InputError: there is no such file, it cannot be read, or a tensor is missing, left over, or of another shape.
    """
    path = Path(path)
    state = _without_prefix(_read(path), module)
    own = module.state_dict()
    missing = [name for name in own if name not in state and not name.endswith("num_batches_tracked")]
    unexpected = [name for name in state if name not in own]
    mismatched = [name for name in state if name in own and _shape(state[name]) != _shape(own[name])]
    if missing or unexpected or mismatched:
        parts = [
            _some("missing", [f"{name} {_shape(own[name])}" for name in missing]),
            _some("unexpected", [f"{name} {_shape(state[name])}" for name in unexpected]),
            _some("of another shape", [f"{name} {_shape(state[name])} in the file, {_shape(own[name])} in the model" for name in mismatched]),
        ]
        raise InputError(
            f"the weights do not fit {type(module).__name__}: {'; '.join(part for part in parts if part)}.",
            where=str(path),
            fix=_hint(state, own, missing or unexpected, mismatched),
        )
    module.load_state_dict(state, strict=False)


def fingerprint(module: nn.Module) -> str:
    """SHA-256 (hex) of the names, shapes, types and bytes of the tensors in a module's state dict, whatever their order or device."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        if isinstance(tensor, Tensor):
            digest.update(f"{name}\x1f{tensor.dtype}\x1f{tuple(tensor.shape)}\x1e".encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _read(path: Path) -> dict[str, Tensor]:
    """The tensors of a file by name."""
    if not os.path.isfile(path):  # unlike Path.is_file, quiet about a name that is too long
        raise InputError("there is no such file.", where=str(path), fix="Check the path of the weights.")
    try:
        content = _read_safetensors(path) if path.suffix == ".safetensors" else torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file fails in many ways: SafetensorError, UnpicklingError, RuntimeError, EOFError, ...
        reason = str(error).partition("\n")[0]
        raise InputError(
            f"cannot read the weights ({type(error).__name__}: {reason[:200]}).",
            where=str(path),
            fix="Is the file complete, and a state dict of tensors alone (torch.save(model.state_dict(), path), or .safetensors)?",
        ) from error
    if isinstance(content, Mapping):
        content = next((content[key] for key in ("state_dict", "model") if isinstance(content.get(key), Mapping)), content)
    if not isinstance(content, Mapping) or not content or not all(isinstance(v, Tensor) for v in content.values()):
        raise InputError("the file does not hold a state dict (names and tensors).", where=str(path), fix="Save model.state_dict().")
    return {str(name): tensor for name, tensor in content.items()}


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return load_file(path)


def _without_prefix(state: dict[str, Tensor], module: nn.Module) -> dict[str, Tensor]:
    """Drop the `module.` that DataParallel and DistributedDataParallel put before every name."""
    if all(name.startswith("module.") for name in state) and not hasattr(module, "module"):
        return {name.removeprefix("module."): tensor for name, tensor in state.items()}
    return state


def _shape(value: Any) -> tuple[int, ...]:
    return tuple(getattr(value, "shape", ()))


def _some(what: str, items: list[str]) -> str:
    """'3 missing (a, b, …)', or nothing."""
    if not items:
        return ""
    return f"{len(items)} {what} ({', '.join(items[:3])}{', …' if len(items) > 3 else ''})"


def _hint(state: Mapping[str, Tensor], own: Mapping[str, Tensor], other_layers: list[str], mismatched: list[str]) -> str:
    """The likely reason for a misfit."""
    if other_layers:
        return "Was it saved from the same architecture, with the same depth?"
    pairs = [(_shape(state[name]), _shape(own[name])) for name in mismatched]
    rows = {(theirs[:1], ours[:1]) for theirs, ours in pairs}
    if len(rows) == 1 and all(theirs and ours and theirs[1:] == ours[1:] for theirs, ours in pairs):
        ((theirs,), (ours,)) = rows.pop()
        return f"The file's head has {theirs} classes, the model's {ours}: is it for the same data set, and num_classes right?"
    return "Was it saved from the same architecture, with the same width?"
