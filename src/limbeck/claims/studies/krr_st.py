"""What the claim of KRR-ST (2310.06511) compares it with: real images with g's vectors, by the same regression; digits as a foreign task; the bias of views."""

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

KEPT = 0.7
"""Share of the entries that a random view keeps in `view_bias`."""


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
    """scikit-learn's digits as grey images [1, side, side] (bilinear from 8×8), normalised by Fashion-MNIST's constants, as a network of clothes knows."""
    small = digits()

    def enlarged(part: ArrayData) -> ArrayData:
        images = F.interpolate(part.inputs, size=(side, side), mode="bilinear", align_corners=False)
        return ArrayData(images, part.targets, part.classes, mean=(0.28604059,), std=(0.35302424,))

    train, test = small.train, small.test
    assert isinstance(train, ArrayData)
    assert isinstance(test, ArrayData)
    return Splits(enlarged(train), enlarged(test))


def view_bias(seed: int, draws: int = 200, images: int = 12, entries: int = 8) -> dict[str, float]:
    """The outer gradient in X_s of a linear student, through an inner self-supervised loss under random views and through regression (1).

    Views: W v₁ should be v₂, two random masks of the same image, with a ridge. What is wanted is the gradient at the optimum of the *expected* loss, which has
    a closed form; a bilevel loop has the mean over draws of the gradients at the optima of *drawn* losses. Outer: squared error on 200 other points.

    Returns:
        views, regression: norm of that mean minus what is wanted, over the norm of what is wanted, the draws' own scatter taken off.
        views_in_errors: of that difference, in standard errors (1 were none).
    """
    generator = seeds.generator(seed, "view_bias")

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    x, mixing, real = drawn(images, entries), drawn(entries, entries) / entries**0.5, drawn(200, entries)
    x, real = x @ mixing, real @ mixing
    wanted_of_real, y = real @ drawn(entries, entries), x @ drawn(entries, entries)
    eye = torch.eye(entries, dtype=torch.float64)

    def outer(covariance: Tensor, cross: Tensor) -> Tensor:
        weights = torch.linalg.solve(covariance + 0.1 * images * eye, cross)
        return (real @ weights - wanted_of_real).square().mean()

    def gradient(drawn_views: bool) -> Tensor:
        point = x.clone().requires_grad_()
        if drawn_views:
            first, second = (point * (torch.rand(images, entries, generator=generator) < KEPT) for _ in range(2))
            value = outer(first.T @ first, first.T @ second)
        else:
            square = KEPT**2 * point.T @ point
            value = outer(square + KEPT * (1 - KEPT) * torch.diag(point.square().sum(0)), square)
        return torch.autograd.grad(value, point)[0]

    def regressed() -> Tensor:
        point = x.clone().requires_grad_()
        return torch.autograd.grad(outer(point.T @ point, point.T @ y), point)[0]

    views, size = _bias(torch.stack([gradient(True) for _ in range(draws)]), gradient(False))
    regression, _ = _bias(torch.stack([regressed() for _ in range(draws)]), regressed())
    return {"views": views, "views_in_errors": size, "regression": regression}


def _bias(drawn: Tensor, wanted: Tensor) -> tuple[float, float]:
    """(relative bias without the scatter of the mean, distance in standard errors) of draws [K, ...] from what is wanted."""
    distance, scatter = (drawn.mean(0) - wanted).square().sum(), drawn.var(0).sum() / len(drawn)
    return float((distance - scatter).clamp(min=0).sqrt() / wanted.norm()), float((distance / scatter.clamp(min=1e-300)).sqrt())
