"""Metrics stay tensors until a logging step; rows go to an append-only file that a restart cuts back to its checkpoint."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from limbeck.errors import InputError


class MetricBuffer:
    """Scalars of the steps since the last row, still on their device."""

    def __init__(self) -> None:
        self.values: dict[str, list[Tensor]] = {}
        self.steps: dict[str, list[int]] = {}
        self.ids: dict[int, Tensor | None] = {}

    def add_loss(self, name: str, value: Tensor, step: int) -> None:
        """Note a loss and the step it belongs to."""
        self.steps.setdefault(name, []).append(step)
        self.add(name, value)

    def add(self, name: str, value: Tensor) -> None:
        """Note one scalar."""
        found = self.values.get(name)
        if found is None:
            self.values[name] = [value.detach()]
        else:
            found.append(value.detach())

    def stacked(self) -> dict[str, Tensor]:
        """[K] float32 a name, in order."""
        return {name: torch.stack([v.reshape(()).float() for v in values]) for name, values in self.values.items() if values}

    def clear(self) -> None:
        """Start the next row."""
        self.values.clear()
        self.steps.clear()
        self.ids.clear()

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint in the middle of a row keeps."""
        return {
            "values": {name: value.cpu() for name, value in self.stacked().items()},
            "steps": self.steps,
            "ids": {step: None if ids is None else ids.cpu() for step, ids in self.ids.items()},
        }

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        """Put the scalars back."""
        self.values = {name: list(value.to(device).unbind()) for name, value in state["values"].items()}
        self.steps, self.ids = dict(state["steps"]), dict(state["ids"])


class MetricFile:
    """`metrics.jsonl`: one JSON object a line, nothing in it that differs between a run and its restart."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.rows: list[dict[str, Any]] = []
        self._handle = None
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._handle = path.open("ab")

    def write(self, row: dict[str, Any]) -> None:
        """Append a row; a non-finite number becomes null."""
        clean = {k: (None if isinstance(v, float) and not math.isfinite(v) else v) for k, v in row.items()}
        self.rows.append(clean)
        if self._handle is not None:
            self._handle.write(json.dumps(clean).encode() + b"\n")
            self._handle.flush()

    def sync(self) -> int:
        """Make the rows durable; returns the file's length in bytes."""
        if self._handle is None:
            return 0
        self._handle.flush()
        os.fsync(self._handle.fileno())
        return self._handle.tell()

    def cut(self, length: int) -> None:
        """Drop what was written after a checkpoint."""
        if self._handle is None or self.path is None:
            return
        if self.path.stat().st_size < length:
            raise InputError("the file is shorter than its checkpoint says.", where=str(self.path), fix="Start anew with --fresh.")
        self._handle.truncate(length)
        self._handle.seek(length)
        with self.path.open("rb") as handle:
            self.rows = [json.loads(line) for line in handle.read(length).splitlines()]

    def close(self) -> None:
        """Close the file."""
        if self._handle is not None:
            self.sync()
            self._handle.close()
            self._handle = None
