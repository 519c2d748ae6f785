"""What the claim of KRR-ST (2310.06511) compares it with: real images with g's vectors, by the same regression; and digits as a foreign task."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from limbeck import seeds
from limbeck.contract import Batch, Clock, Phase, Player, Update
from limbeck.data.arrays import ArrayData
from limbeck.data.sources import digits
from limbeck.data.splits import Splits
from limbeck.methods.datasets.krr_st import KRRST
from limbeck.synthetic.selection import kmeans_per_class


class RandomPairs(KRRST):
    """Random real images with g's vectors; nothing is learned."""

    def players(self) -> Mapping[str, Player]:
        """Nobody."""
        return {}

    def phases(self) -> list[Phase]:
        """None."""
        return []

    def updates(self, batch: Batch, clock: Clock) -> Iterator[Update]:
        """None."""
        return iter(())


class KMeansPairs(RandomPairs):
    """The real images nearest to as many centres of k-means in pixel space (without labels), with g's vectors."""

    def chosen_images(self) -> Tensor:
        """[M] int64 positions."""
        everyone = torch.arange(len(self.data))
        pixels = torch.cat([self.prepared(part).flatten(1) for part in everyone.split(4096)])
        return kmeans_per_class(pixels, torch.zeros_like(everyone), self.config.images, seeds.derive(self.seed, "k-means") % 2**31)


class AllPairs(RandomPairs):
    """All real images with g's vectors."""

    def chosen_images(self) -> Tensor:
        """[N] int64, every position."""
        return torch.arange(len(self.data))


def large_digits(side: int = 14) -> Splits:
    """scikit-learn's digits as grey images [1, side, side] (bilinear from 8×8), normalised by the constants of Fashion-MNIST, which a network saw before them."""
    small = digits()

    def enlarged(part: ArrayData) -> ArrayData:
        images = F.interpolate(part.inputs, size=(side, side), mode="bilinear", align_corners=False)
        return ArrayData(images, part.targets, part.classes, mean=(0.28604059,), std=(0.35302424,))

    train, test = small.train, small.test
    assert isinstance(train, ArrayData)
    assert isinstance(test, ArrayData)
    return Splits(enlarged(train), enlarged(test))
