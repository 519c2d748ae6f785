"""ZCA whitening, fitted on the training images, and data sets that are prepared by it (sheet `ftd`; the released code of arXiv 2203.11932 uses kornia's).

N images of D = C·H·W pixels in [0, 1], without standardisation before. μ [D] is the mean, Σ [D, D] the covariance with N - 1, Σ = U diag(λ) Uᵀ.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from limbeck.contract import Data
from limbeck.data.splits import inputs_fingerprint, origins, root
from limbeck.errors import InputError

_CHUNK = 2048
_SLACK = 1e-3  # how far a float pixel may lie outside [0, 1]: resizing overshoots a little


@dataclass(frozen=True, eq=False)
class ZCA:
    """x ↦ (x - μ) W with W = U diag((λ + ε)^(-1/2)) Uᵀ, and back; the covariance of its outputs has the eigenvalues λ / (λ + ε).

    mean: [D] float32, μ. matrix, inverse_matrix: [D, D] float32, symmetric, W and its inverse. shape: (C, H, W), or any shape of D numbers.
    epsilon: ε. samples: N of the fit. fitted_on: SHA-256 (hex) of which images, "" where a tensor was given.
    """

    mean: Tensor
    matrix: Tensor = field(repr=False)
    inverse_matrix: Tensor = field(repr=False)
    shape: tuple[int, ...]
    epsilon: float
    samples: int
    fitted_on: str = ""

    @classmethod
    def fit(cls, images: Data | Tensor, epsilon: float = 0.1) -> ZCA:
        """Fit on training images: mean, covariance and eigenvectors in float64, image chunks of bounded memory.

        With fewer images than pixels the unseen directions have λ = 0 and are multiplied by ε^(-1/2), like every direction of no variance.

        Args:
            images: a data set (its raw inputs, not its prepared ones), or [N, ...] uint8, or floats in [0, 1]. epsilon: ε in squared pixels; 0.1 as published.

        Raises:
            InputError: fewer than two images, floats outside [0, 1], numbers that are not finite, or ε not positive.
        """
        if not (math.isfinite(epsilon) and epsilon > 0):
            raise InputError(f"epsilon is {epsilon}.", where="whitening.epsilon", fix="Use a positive number; 0.1 is published.")
        count = len(images)
        if count < 2:
            raise InputError(f"a covariance needs two images, there are {count}.", where="whitening")
        parts = [torch.arange(start, min(start + _CHUNK, count)) for start in range(0, count, _CHUNK)]
        first = _raw(images, parts[0][:1])
        total_D = torch.zeros(first[0].numel(), dtype=torch.float64)
        for ids in parts:
            total_D += _checked(pixels(_raw(images, ids))).flatten(1).sum(0, dtype=torch.float64)
        mean_D = total_D / count
        covariance_DD = torch.zeros(len(mean_D), len(mean_D), dtype=torch.float64)
        for ids in parts:
            centred_BD = pixels(_raw(images, ids)).flatten(1).to(torch.float64) - mean_D
            covariance_DD.addmm_(centred_BD.T, centred_BD)
        variance_D, axes_DD = torch.linalg.eigh(covariance_DD / (count - 1))
        root_D = (variance_D.clamp_min(0) + epsilon).sqrt()
        fitted_on = "" if isinstance(images, Tensor) else _digest(inputs_fingerprint(images), origins(images).tolist())
        return cls(
            mean_D.to(torch.float32),
            ((axes_DD / root_D) @ axes_DD.T).to(torch.float32),
            ((axes_DD * root_D) @ axes_DD.T).to(torch.float32),
            tuple(first.shape[1:]),
            epsilon,
            count,
            fitted_on,
        )

    def forward(self, pixels_B: Tensor) -> Tensor:
        """Float pixels [B, *shape] in [0, 1] -> whitened [B, *shape] float32; differentiable. Raises InputError for another shape."""
        return ((self._flat(pixels_B) - self.mean) @ self.matrix).view(-1, *self.shape)

    def inverse(self, whitened_B: Tensor) -> Tensor:
        """Whitened [B, *shape] -> float32 pixels [B, *shape], not clipped; differentiable. Raises InputError for another shape."""
        return (self._flat(whitened_B) @ self.inverse_matrix + self.mean).view(-1, *self.shape)

    def to(self, device: torch.device | str) -> ZCA:
        """The same whitening on another device."""
        return replace(self, mean=self.mean.to(device), matrix=self.matrix.to(device), inverse_matrix=self.inverse_matrix.to(device))

    def facts(self) -> dict[str, object]:
        """What it is, as JSON values, without the matrices."""
        return {"name": "zca", "epsilon": self.epsilon, "shape": list(self.shape), "samples": self.samples, "fitted_on": self.fitted_on}

    def _flat(self, x_B: Tensor) -> Tensor:
        if tuple(x_B.shape[1:]) != self.shape:
            raise InputError(f"whitening was fitted on inputs of shape {list(self.shape)}, these are {list(x_B.shape[1:])}.", where="whitening")
        return x_B.to(torch.float32).flatten(1)


class Whitened:
    """A data set whose `prepare` is ZCA of pixels in [0, 1] (a `contract.Data`); a normalisation of the data set's own is not applied.

    Args:
        data: the data set; its raw inputs are kept as they are. zca: fitted on the training set, for the test set too.

    Raises:
        InputError: the data are whitened already, or of another shape than `zca`.
    """

    def __init__(self, data: Data, zca: ZCA) -> None:
        if isinstance(root(data), Whitened):
            raise InputError("the data are whitened already.", where="whitening")
        raw, _ = data.fetch(torch.zeros(1, dtype=torch.int64))
        if tuple(raw.shape[1:]) != zca.shape:
            raise InputError(f"whitening was fitted on inputs of shape {list(zca.shape)}, these are {list(raw.shape[1:])}.", where="whitening")
        self.data, self.zca = data, zca
        self.classes: Sequence[str] = data.classes

    @property
    def targets(self) -> Tensor | None:
        """[N] int64, IGNORE where unlabelled, or None."""
        return self.data.targets

    @property
    def origins(self) -> Tensor:
        """[N] int64: each sample's place in `root`."""
        return origins(self.data)

    @property
    def root(self) -> Whitened:
        """The whole data set that this one was cut out of, whitened alike; itself where it is whole."""
        whole = root(self.data)
        return self if whole is self.data else Whitened(whole, self.zca)

    @property
    def inputs_fingerprint(self) -> str:
        """SHA-256 (hex) of raw inputs and of what the whitening was fitted on: not of matrices, whose last bits differ between machines."""
        return _digest(inputs_fingerprint(self.data), sorted(self.zca.facts().items()))

    def __len__(self) -> int:
        return len(self.data)

    def fetch(self, ids_B: Tensor, *, seed: int = 0, epoch: int = 0) -> tuple[Tensor, Tensor | None]:
        """Raw inputs [B, ...] and targets [B], as the data set gives them."""
        return self.data.fetch(ids_B, seed=seed, epoch=epoch)

    def prepare(self, raw: Tensor) -> Tensor:
        """Raw inputs [B, ...], uint8 or floats in [0, 1], to whitened float32. The last bits may depend on the batch's size."""
        return self.zca.forward(pixels(raw))

    def preprocessing(self) -> dict[str, object]:
        """What `prepare` does, as JSON values: raw / divide_by, then the whitening's facts."""
        raw, _ = self.data.fetch(torch.zeros(1, dtype=torch.int64))
        return self.zca.facts() | {"divide_by": 255.0 if raw.dtype == torch.uint8 else 1.0}


def whiten(train: Data, *others: Data, epsilon: float = 0.1) -> tuple[Whitened, ...]:
    """`train` and the others (a test set) whitened, all by the fit on `train`.

    Raises:
        InputError: as `ZCA.fit` and `Whitened` do.
    """
    if isinstance(root(train), Whitened):
        raise InputError("the data are whitened already.", where="whitening")
    zca = ZCA.fit(train, epsilon)
    return tuple(Whitened(data, zca) for data in (train, *others))


def pixels(raw: Tensor) -> Tensor:
    """Raw inputs as float32 pixels: uint8 divided by 255, floats as they are."""
    return raw.to(torch.float32) / 255 if raw.dtype == torch.uint8 else raw.to(torch.float32)


def _digest(*facts: object) -> str:
    return hashlib.sha256(repr(facts).encode()).hexdigest()


def _raw(images: Data | Tensor, ids_B: Tensor) -> Tensor:
    return images.index_select(0, ids_B) if isinstance(images, Tensor) else images.fetch(ids_B)[0]


def _checked(pixels_B: Tensor) -> Tensor:
    """The same pixels, if all lie in [0, 1]."""
    if not bool(((pixels_B >= -_SLACK) & (pixels_B <= 1 + _SLACK)).all()):
        raise InputError("whitening takes pixels in [0, 1], and some are outside or not finite.", where="whitening", fix="Give raw images, not standardised.")
    return pixels_B
