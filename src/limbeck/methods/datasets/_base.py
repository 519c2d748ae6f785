"""What methods that make data sets share: the images as a player, the real ones they start from, the synthetic set that comes out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from limbeck import seeds
from limbeck.components import Component
from limbeck.contract import IGNORE, Artefact, Data, Frozen, Method
from limbeck.errors import InputError
from limbeck.synthetic.selection import random_per_class
from limbeck.synthetic.synthetic_set import SyntheticSet


class Learned(nn.Module):
    """One tensor that is learned, as a player's module; the parameter is shared with the set that comes out."""

    def __init__(self, value: nn.Parameter) -> None:
        super().__init__()
        self.value = value


class DatasetConfig(Frozen):
    """Knobs that methods which learn images share."""

    images_per_class: int = Field(1, ge=1, le=100_000, description="synthetic images a class")
    start: Literal["real", "noise"] = Field("real", description="where the images start: random real ones of their class, or standard normal noise")


class DatasetMethod(Method):
    """Base of methods that make a data set. `self.student` is the network that learns from it; its weights are never trained here."""

    produces = "dataset"
    needs_labels = True
    synthetic: SyntheticSet

    # ---- the real data --------------------------------------------------------------------------------------------

    @property
    def data(self) -> Data:
        """The real training data. Raises InputError: there are none."""
        if self.train_data is None:
            raise InputError("a data set is distilled from one.", where="data")
        return self.train_data

    @property
    def labels(self) -> Tensor:
        """[N] int64 real labels. Raises InputError: some samples have none."""
        targets = self.data.targets
        if targets is None or bool((targets == IGNORE).any()):
            raise InputError("the method needs a label for every real sample.", where="data", fix="Leave out data.labelled and data.pool.")
        return targets

    def prepared(self, indices_K: Tensor) -> Tensor:
        """[K, ...] real samples as networks take them."""
        return self.data.prepare(self.data.fetch(indices_K)[0])

    def chosen(self, per_class: int) -> Tensor:
        """[C · per_class] positions of random real samples, class by class; a function of the run's seed. Raises InputError: a class has too few."""
        try:
            return random_per_class(self.labels, per_class, seeds.generator(self.seed, "chosen"))
        except InputError as error:
            raise InputError(error.what, where="method.images_per_class", fix=error.fix) from error

    def first_images(self) -> tuple[Tensor, Tensor]:
        """What the images start as [M, ...], and their labels [M] int64, class by class."""
        per_class, classes = self.config.images_per_class, int(self.num_classes or 0)
        labels = torch.arange(classes).repeat_interleave(per_class)
        if self.config.start == "noise":
            shape = self.prepared(torch.zeros(1, dtype=torch.int64)).shape[1:]
            return torch.randn(len(labels), *shape, generator=seeds.generator(self.seed, "noise")), labels
        return self.prepared(self.chosen(per_class)).clone(), labels

    # ---- what comes out -------------------------------------------------------------------------------------------

    def frozen(self) -> Sequence[nn.Module]:
        """The set itself, whose labels go where its images are (after a restart, too), and a teacher that is a module."""
        return [*super().frozen(), self.synthetic]

    def inference(self) -> nn.Module:
        """The synthetic set."""
        return self.synthetic

    def artefact(self) -> Artefact:
        """The synthetic set, with all that its use needs."""
        found = self.synthetic

        def around(component: Component) -> Component:
            return Component(name="synthetic_set", args=found.arguments)

        return Artefact("dataset", found, around=around, facts={"bytes": found.bytes()})

    def facts(self) -> dict[str, Any]:
        """How many images there are, and the bytes of each part."""
        found: Mapping[str, Any] = self.synthetic.bytes()
        return {"images": len(self.synthetic), "bytes": found}
