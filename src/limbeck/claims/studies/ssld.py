"""What the claim of SSLD (2103.05959) trains on: disjoint parts of Fashion-MNIST, foreign images for the pool, and the share of those that is kept."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field

from limbeck.contract import Data
from limbeck.data import ArrayData, Splits, subset
from limbeck.data.cifar import cifar10
from limbeck.data.sources import digits, fashion_mnist
from limbeck.errors import InputError
from limbeck.methods.classifiers.ssld import SSLD, SSLDConfig


def fashion_part(first: int, count: int, folder: str | None = None) -> Splits:
    """Fashion-MNIST's training images `first` to `first + count - 1`, in the file's order, with all its test images. Parts that do not overlap are disjoint.

    Raises:
        InputError: there are not so many images, or Fashion-MNIST is not there.
    """
    whole = fashion_mnist(folder)
    if first < 0 or count < 1 or first + count > len(whole.train):
        raise InputError(f"images {first} to {first + count - 1} of {len(whole.train)} cannot be had.", where="count")
    return Splits(subset(whole.train, torch.arange(first, first + count)), whole.test)


def foreign_images(cifar: int = 6653, scaled_digits: int = 1347, folder: str | None = None) -> Splits:
    """Images of no clothes in the form of Fashion-MNIST: [1, 28, 28] uint8, its normalisation and class names, no labels; the test part is the same.

    Args:
        cifar: the first so many training images of CIFAR-10, in grey (ITU-R 601 luma), scaled from 32×32 (bilinear, antialiased).
        scaled_digits: the first so many of scikit-learn's digits (its 1,347 training images), scaled from 8×8 (bilinear).
        folder: of CIFAR-10; None: the environment variable LIMBECK_DATA. Not looked at where `cifar` is 0.

    Raises:
        InputError: there are not so many images, or CIFAR-10 is not there.
    """
    parts = []
    if cifar:
        rgb = _inputs(cifar10(folder, train_limit=cifar).train, cifar, "cifar").float()
        grey = (rgb * torch.tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)).sum(1, keepdim=True)
        parts.append(F.interpolate(grey, size=(28, 28), mode="bilinear", antialias=True))
    if scaled_digits:
        small = 255 * _inputs(digits().train, scaled_digits, "scaled_digits")
        parts.append(F.interpolate(small, size=(28, 28), mode="bilinear"))
    if not parts:
        raise InputError("no images are asked for.", where="cifar")
    clothes = fashion_mnist().train
    assert isinstance(clothes, ArrayData)
    data = ArrayData(torch.cat(parts).round().clamp(0, 255).to(torch.uint8), None, clothes.classes, mean=clothes.mean, std=clothes.std)
    return Splits(data, data)


def _inputs(data: Data, count: int, where: str) -> torch.Tensor:
    if not 0 < count <= len(data):
        raise InputError(f"{count} images are asked for, there are {len(data)}.", where=where)
    return data.fetch(torch.arange(count))[0]


class TracedSSLDConfig(SSLDConfig):
    """Knobs of `TracedSSLD`."""

    domestic: int = Field(ge=0, description="the pool's first so many images are of the target domain, the rest is foreign")


class TracedSSLD(SSLD):
    """SSLD that also reports which share of the kept pool images, and of the pool, is foreign. It trains exactly as `SSLD` does."""

    Config: ClassVar[type[SSLDConfig]] = TracedSSLDConfig

    def facts(self) -> dict[str, Any]:
        """Those of `SSLD`; `metrics` with foreign_kept and foreign_pool, shares in [0, 1]."""
        found = super().facts()
        if self.pool is None or self.kept is None:
            return found
        domestic = self.pool[: self.config.domestic]
        foreign_M, foreign_K = (~torch.isin(ids, domestic) for ids in (self.pool, self.kept))
        shares = {"foreign_kept": float(foreign_K.float().mean()), "foreign_pool": float(foreign_M.float().mean())}
        return {**found, "metrics": {**found["metrics"], **shares}}
