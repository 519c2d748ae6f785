"""Expert trajectories on disk: one flat file an expert, read by memory map, and a manifest that says what they are (arXiv 2203.11932; our sheet `ftd`).

A folder holds `manifest.json` and `expert-00000.f32`, …: the snapshots θ*_0 … θ*_E of P float32 numbers one after the other, little-endian. While experts
are being trained (`experts.py`) there are also `expert-00007.part` and `group.safetensors`; a reader takes no notice of them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from limbeck.errors import InputError
from limbeck.files import write_atomic
from limbeck.records.manifest import sealed, unsealed

MANIFEST = "manifest.json"
FORMAT = 1
_BROKEN = "Train the experts again, into another folder or after removing this one."


def expert_file(folder: Path, expert: int) -> Path:
    """Where the snapshots of a whole expert lie."""
    return folder / f"expert-{expert:05d}.f32"


def checksum(path: Path) -> str:
    """SHA-256 (hex) of a file, read in pieces."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def write_manifest(folder: Path, identity: Mapping[str, Any], size: int, epochs: int, experts: Mapping[int, Mapping[str, Any]]) -> None:
    """Write the manifest of a folder; experts: number -> checksum, losses and accuracy of those that are whole."""
    listed = {str(number): dict(experts[number]) for number in sorted(experts)}
    body = {"format": FORMAT, "kind": "expert trajectories", "identity": identity, "parameters": size, "epochs": epochs, "experts": listed}
    write_atomic(folder / MANIFEST, sealed(body))


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a folder.

    Raises:
        InputError: there is none, it is damaged, or it is of something else.
    """
    path = folder / MANIFEST
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"holds no expert trajectories ({error.strerror or error}).", where=str(folder), fix="Train experts into it first.") from error
    body = unsealed(content, str(path), _BROKEN)
    if body.get("kind") != "expert trajectories":
        raise InputError("is not the manifest of expert trajectories.", where=str(path), fix="Name the folder that the experts were trained into.")
    return body


def read_snapshot(path: Path, size: int, epoch: int) -> Tensor:
    """θ*_epoch [P] float32 out of a flat file: a copy, of which no other snapshot is read."""
    mapped = np.memmap(path, "<f4", "r", offset=epoch * size * 4, shape=(size,))
    return torch.from_numpy(np.array(mapped, dtype=np.float32))


def check_lengths(folder: Path, experts: Iterable[int], size: int, epochs: int) -> None:
    """Raise InputError for the first expert whose file is missing or not (epochs + 1) · size float32 numbers long."""
    for number in experts:
        path = expert_file(folder, number)
        if not path.is_file() or path.stat().st_size != (epochs + 1) * size * 4:
            raise InputError(f"expert {number} is missing or not as long as it was.", where=str(path), fix=_BROKEN)


def check_sums(folder: Path, experts: Mapping[int, Mapping[str, Any]]) -> None:
    """Read the file of every expert, and raise InputError for the first one whose checksum is not what the manifest says about it."""
    for number, found in experts.items():
        path = expert_file(folder, number)
        if checksum(path) != found["sha256"]:
            raise InputError(f"expert {number} is damaged (its checksum does not fit).", where=str(path), fix=_BROKEN)


class Trajectories:
    """The weights of several experts after every epoch, as they lie in a folder. Nothing is read until it is asked for.

    Args:
        folder: see the top of this file. count: take the first so many experts; None: all that are whole, from expert 0 on.

    Attributes:
        folder: as given. count: experts. epochs: E, so that there are E+1 snapshots; epoch 0 is the initialisation. size: P. identity: what they were trained
        from. accuracy: of each expert's last weights on (a part of) its training images, in [0, 1].

    Raises:
        InputError: there are none, or fewer than `count`; the manifest is damaged; a file is missing or has another length.
    """

    def __init__(self, folder: Path | str, count: int | None = None) -> None:
        self.folder = Path(folder)
        body = read_manifest(self.folder)
        self.epochs, self.size, self.identity = int(body["epochs"]), int(body["parameters"]), dict(body["identity"])
        self._experts: dict[int, dict[str, Any]] = {int(number): found for number, found in body["experts"].items()}
        whole = next(number for number in range(len(self._experts) + 1) if number not in self._experts)
        self.count = whole if count is None else count
        if not 1 <= self.count <= whole:
            fix = "Train them again: it goes on where it stopped."
            raise InputError(f"holds {whole} whole experts, {max(self.count, 1)} are needed.", where=str(self.folder), fix=fix)
        check_lengths(self.folder, range(self.count), self.size, self.epochs)
        self.accuracy = tuple(float(self._experts[number]["accuracy"]) for number in range(self.count))

    @classmethod
    def open(cls, folder: Path | str, count: int | None = None) -> Trajectories:
        """The trajectories in a folder; see the class."""
        return cls(folder, count)

    def weights(self, expert: int, epoch: int) -> Tensor:
        """θ*_epoch of an expert, [P] float32 on the CPU: a copy out of the memory-mapped file.

        Raises:
            InputError: there is no such expert, or no such epoch.
        """
        if not 0 <= expert < self.count:
            raise InputError(f"there is no expert {expert}: there are {self.count}, counted from 0.", where="expert")
        if not 0 <= epoch <= self.epochs:
            fix = "Start earlier, match fewer epochs, or train the experts for longer."
            raise InputError(f"epoch {epoch} is not among the stored ones, which go from 0 to {self.epochs}.", where="epoch", fix=fix)
        return read_snapshot(expert_file(self.folder, expert), self.size, epoch)

    def segment(self, expert: int, start: int, epochs: int) -> tuple[Tensor, Tensor]:
        """θ*_s and θ*_{s+E}, the two ends of what is matched (our sheet `ftd`, eq. 3), each [P].

        Raises:
            InputError: E is not positive, or s + E lies beyond the stored epochs.
        """
        if epochs < 1:
            raise InputError(f"a segment of {epochs} epochs has no length.", where="epochs", fix="Match at least one epoch.")
        return self.weights(expert, start), self.weights(expert, start + epochs)

    def path(self, expert: int) -> Tensor:
        """All snapshots of an expert, [E+1, P]. Raises InputError: there is no such expert."""
        return torch.stack([self.weights(expert, epoch) for epoch in range(self.epochs + 1)])

    @property
    def facts(self) -> dict[str, Any]:
        """What training recorded: experts, epochs, parameters, bytes; mean and each expert's accuracy, and losses [count][E], the objective's mean an epoch."""
        losses = [list(self._experts[number]["losses"]) for number in range(self.count)]
        sizes = {"experts": self.count, "epochs": self.epochs, "parameters": self.size, "bytes": self.count * (self.epochs + 1) * self.size * 4}
        return {**sizes, "accuracy": sum(self.accuracy) / self.count, "accuracies": list(self.accuracy), "losses": losses}

    def verify(self) -> None:
        """Read every file and compare its checksum with the manifest's. Raises InputError: one differs."""
        check_sums(self.folder, {number: self._experts[number] for number in range(self.count)})
