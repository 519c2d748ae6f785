"""Data sets in memory: images as uint8, or float features, normalised when a batch is made."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from limbeck.contract import IGNORE
from limbeck.errors import InputError


class ArrayData:
    """A data set held in memory (a `contract.Data`).

    Args:
        inputs: [N, C, H, W] or [N, D], uint8 (0 to 255) or floats; uint8 stays uint8, floats become float32.
        targets: [N] integers in [0, len(classes)), IGNORE where unlabelled; None where there are none.
        classes: their names; None: "0", "1", … up to the largest target.
        mean, std: normalisation by `prepare`: one number, or one a channel (a feature), in units of the scaled inputs (uint8 is divided by 255 first);
            empty: none.

    Raises:
        InputError: shapes, types, targets or constants that do not fit together.
    """

    def __init__(
        self,
        inputs: Tensor,
        targets: Tensor | None = None,
        classes: Sequence[str] | None = None,
        *,
        mean: Sequence[float] = (),
        std: Sequence[float] = (),
    ) -> None:
        if inputs.dim() < 2 or not (inputs.dtype == torch.uint8 or inputs.is_floating_point()):
            raise InputError(
                f"inputs must be uint8 or floats of shape [N, ...], these are {inputs.dtype} of shape {list(inputs.shape)}.",
                where="inputs",
                fix="Give images as uint8 [N, C, H, W], features as floats [N, D].",
            )
        self.inputs = inputs if inputs.dtype == torch.uint8 else inputs.to(torch.float32)
        self._targets = None if targets is None else _checked_targets(targets, len(inputs))
        largest = -1 if self._targets is None or not len(self._targets) else int(self._targets.max())
        self.classes: Sequence[str] = tuple(str(k) for k in range(largest + 1)) if classes is None else tuple(classes)
        if largest >= len(self.classes):
            raise InputError(f"a target is {largest}, and there are {len(self.classes)} classes.", where="targets", fix="Targets count from 0.")
        self.mean, self.std = tuple(mean), tuple(std)
        self.root: ArrayData = self
        """The data set that this one is a subset of, or itself."""
        self.origins = torch.arange(len(inputs))
        """[N] int64: each sample's place in `root`."""
        self._scale, self._shift = self._affine()

    def _affine(self) -> tuple[Tensor | None, Tensor | None]:
        """Scale and shift such that a prepared input is raw * scale + shift; None where they would change nothing."""
        channels, unit = self.inputs.shape[1], 255.0 if self.inputs.dtype == torch.uint8 else 1.0
        for name, values in (("mean", self.mean), ("std", self.std)):
            if len(values) not in (0, 1, channels):
                raise InputError(f"'{name}' has {len(values)} numbers for {channels} channels.", where=name, fix=f"Give 1 or {channels}.")
        if not all(math.isfinite(m) for m in self.mean) or not all(math.isfinite(s) and s > 0 for s in self.std):
            raise InputError("means must be finite and standard deviations positive.", where="std")
        mean, std = torch.tensor(self.mean or (0.0,), dtype=torch.float64), torch.tensor(self.std or (1.0,), dtype=torch.float64)
        scale, shift = (v.to(torch.float32).view(-1, *[1] * (self.inputs.dim() - 2)) for v in (1 / (unit * std), -mean / std))
        return (scale if unit != 1 or self.std else None), (shift if self.mean else None)

    @property
    def targets(self) -> Tensor | None:
        """[N] int64, IGNORE where unlabelled, or None."""
        return self._targets

    def __len__(self) -> int:
        return len(self.inputs)

    def preprocessing(self) -> dict[str, object]:
        """What `prepare` does, as JSON values: inputs / divide_by, minus mean, over std (a channel each; empty: none)."""
        return {"divide_by": 255.0 if self.inputs.dtype == torch.uint8 else 1.0, "mean": list(self.mean), "std": list(self.std)}

    def fetch(self, ids_B: Tensor, *, seed: int = 0, epoch: int = 0) -> tuple[Tensor, Tensor | None]:
        """Raw inputs [B, ...] and targets [B]; seed and epoch change nothing here."""
        return self.inputs.index_select(0, ids_B), None if self._targets is None else self._targets.index_select(0, ids_B)

    def prepare(self, raw: Tensor) -> Tensor:
        """Raw inputs [B, ...] to float32: uint8 divided by 255, then (x - mean) / std. Never changes `raw`.

        One rounded operation after the other, never fused, so that a sample's bits do not depend on its place in the batch.
        """
        if raw.dtype != torch.float32:
            prepared = raw.to(torch.float32)
            prepared = prepared if self._scale is None else prepared.mul_(self._scale)
        else:
            prepared = raw if self._scale is None else raw * self._scale
        if self._shift is None:
            return prepared
        return prepared + self._shift if prepared is raw else prepared.add_(self._shift)

    def subset(self, indices_M: Tensor) -> ArrayData:
        """The samples at `indices_M` ([M] int64), in that order."""
        targets = None if self._targets is None else self._targets.index_select(0, indices_M)
        found = ArrayData(self.inputs.index_select(0, indices_M), targets, self.classes, mean=self.mean, std=self.std)
        found.root, found.origins = self.root, self.origins.index_select(0, indices_M)
        return found

    def with_targets(self, targets_N: Tensor | None) -> ArrayData:
        """The same inputs (shared, not copied) with other targets."""
        found = ArrayData(self.inputs, targets_N, self.classes, mean=self.mean, std=self.std)
        found.root, found.origins = self.root, self.origins
        return found

    @cached_property
    def inputs_fingerprint(self) -> str:
        """SHA-256 (hex) over inputs and normalisation: what a network sees, whatever the labels."""
        digest = hashlib.sha256(repr((self.inputs.dtype, tuple(self.inputs.shape), self.mean, self.std)).encode())
        digest.update(self.inputs.contiguous().numpy().data)
        return digest.hexdigest()

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 (hex) over inputs, targets, class names and normalisation: equal exactly where the content is."""
        digest = hashlib.sha256()
        for tensor in (self.inputs, self._targets):
            digest.update(repr(None if tensor is None else (tensor.dtype, tuple(tensor.shape))).encode())
            if tensor is not None:
                digest.update(tensor.contiguous().numpy().data)
        digest.update(repr((self.classes, self.mean, self.std)).encode())
        return digest.hexdigest()


def _checked_targets(targets: Tensor, count: int) -> Tensor:
    if targets.shape != (count,):
        raise InputError(f"targets have the shape {list(targets.shape)} for {count} inputs.", where="targets", fix=f"Give [{count}] integers.")
    if targets.is_floating_point() or targets.is_complex():
        raise InputError(f"targets are {targets.dtype}, not integers.", where="targets", fix="Give class numbers, counted from 0.")
    targets = targets.to(torch.int64)
    if bool(((targets < 0) & (targets != IGNORE)).any()):
        raise InputError(f"a target is negative and not {IGNORE} (unlabelled).", where="targets", fix="Targets count from 0.")
    return targets
