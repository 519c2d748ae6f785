"""Real images as a small data set: drawn at random, or nearest to the centres of k-means. What every distilled set has to beat (arXiv 2207.09639)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from limbeck import seeds
from limbeck.contract import Batch, Clock, Paper, Phase, Update
from limbeck.methods.datasets._base import DatasetConfig, DatasetMethod
from limbeck.synthetic.selection import kmeans_per_class
from limbeck.synthetic.synthetic_set import SyntheticSet


class RealImagesConfig(DatasetConfig):
    """Knobs of `RealImages`."""

    selection: Literal["random", "kmeans"] = Field("random", description="random: drawn; kmeans: nearest to each of the class's centres in pixel space")
    step_size: float = Field(0.01, gt=0, le=100, description="the learning rate that goes with them")


class RealImages(DatasetMethod):
    """A class-balanced choice of real images; nothing is learned."""

    Config = RealImagesConfig
    needs_teacher = False
    paper = Paper(
        title="DC-BENCH: Dataset Condensation Benchmark", arxiv="2207.09639", venue="NeurIPS", year=2022,
        official_code="https://github.com/justincui03/dc_benchmark",
    )  # fmt: skip

    def setup(self) -> None:
        """The chosen images. Raises InputError: a class has too few."""
        config = self.config
        which = self.chosen(config.images_per_class) if config.selection == "random" else self._nearest(config.images_per_class)
        self.synthetic = SyntheticSet.hard(self.prepared(which), self.labels[which], int(self.num_classes or 0), step_size=config.step_size, data=self.data)

    def _nearest(self, per_class: int) -> Tensor:
        ids = torch.arange(len(self.data))
        pixels = torch.cat([self.prepared(part).flatten(1) for part in ids.split(4096)])
        return kmeans_per_class(pixels, self.labels, per_class, seeds.derive(self.seed, "k-means") % 2**31)

    def phases(self) -> list[Phase]:
        """None: there is nothing to train."""
        return []

    def updates(self, batch: Batch, clock: Clock) -> Iterator[Update]:
        """None."""
        yield from ()
