"""Any torch Dataset as `contract.Data`: a user's own random transforms become stateless."""

from __future__ import annotations

import operator
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, Subset, TensorDataset

from limbeck import seeds
from limbeck.contract import Data
from limbeck.data.arrays import ArrayData
from limbeck.errors import InputError


class WrappedData:
    """A torch Dataset of (input, class number) pairs.

    PIL images become uint8 [C, H, W] (grey: C = 1), arrays and tensors stay as they are (floats become float32). The global generators of
    torch, random and numpy are seeded from (seed, epoch, id) around every `dataset[id]` and put back afterwards, so that what a user's
    random transform does is a pure function of these three, and nothing else in the program notices.

    Args:
        dataset: map-style, finite. classes: names; None: the data set's `classes` attribute, through Subsets, if it has one.

    Raises:
        InputError: the data set cannot be indexed or counted; later, a sample that is no such pair.
    """

    def __init__(self, dataset: Dataset[Any], classes: Sequence[str] | None = None) -> None:
        if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__"):
            raise InputError(
                f"the data set {type(dataset).__name__} cannot be indexed and counted.",
                where="data",
                fix="Give a map-style Dataset, with __getitem__ and __len__.",
            )
        self.dataset = dataset
        self.classes: Sequence[str] = tuple(str(name) for name in (_named_classes(dataset) if classes is None else classes))
        self._targets: Tensor | None = None

    @property
    def targets(self) -> Tensor:
        """[N] int64: the data set's own list where it has one (`targets`, through Subsets), else read once by going through it."""
        if self._targets is None:
            known = _listed_targets(self.dataset)
            if known is None:
                with _restored_generators():
                    known = torch.tensor([self._pair(i, seed=0, epoch=0)[1] for i in range(len(self))], dtype=torch.int64)
            self._targets = known
        return self._targets

    def __len__(self) -> int:
        return len(self.dataset)

    def fetch(self, ids_B: Tensor, *, seed: int = 0, epoch: int = 0) -> tuple[Tensor, Tensor | None]:
        """Raw inputs [B, ...] (uint8 or float32) and targets [B]; a pure function of ids, seed and epoch.

        Raises:
            InputError: a sample is no (input, class number) pair, or the shapes differ.
        """
        with _restored_generators():
            pairs = [self._pair(i, seed=seed, epoch=epoch) for i in ids_B.tolist()]
        inputs = [x for x, _ in pairs]
        different = next((x for x in inputs if x.shape != inputs[0].shape or x.dtype != inputs[0].dtype), None)
        if different is not None:
            raise InputError(
                f"samples differ in shape or type: {list(inputs[0].shape)} {inputs[0].dtype} and {list(different.shape)} {different.dtype}.",
                where="data",
                fix="Resize or crop them in the data set's transform.",
            )
        return torch.stack(inputs), torch.tensor([y for _, y in pairs], dtype=torch.int64)

    def prepare(self, raw: Tensor) -> Tensor:
        """uint8 divided by 255, anything else as it is, in float32: normalisation is the user's transform's work."""
        return raw.to(torch.float32).div_(255) if raw.dtype == torch.uint8 else raw.to(torch.float32)

    def _pair(self, position: int, *, seed: int, epoch: int) -> tuple[Tensor, int]:
        own_seed = seeds.derive(seed, "sample", epoch, position)
        torch.default_generator.manual_seed(own_seed)
        random.seed(own_seed)
        np.random.seed(own_seed % 2**32)
        sample = self.dataset[position]
        try:
            x, y = sample
            return _tensor(x), operator.index(y)
        except (TypeError, ValueError) as error:
            raise InputError(
                f"sample {position} of {type(self.dataset).__name__} is no (input, class number) pair: {error}.",
                where="data",
                fix="Let the data set return an image, array or tensor, and an integer.",
            ) from error


@contextmanager
def _restored_generators() -> Iterator[None]:
    """Put the global generators of torch, random and numpy back as they were."""
    states = torch.default_generator.get_state(), random.getstate(), np.random.get_state()
    try:
        yield
    finally:
        torch.default_generator.set_state(states[0])
        random.setstate(states[1])
        np.random.set_state(states[2])


def _tensor(x: Any) -> Tensor:
    """A tensor, array, PIL image or list of numbers as a tensor."""
    if not isinstance(x, Tensor):
        from PIL import Image

        if isinstance(x, Image.Image):
            pixels = np.array(x if x.mode in ("L", "RGB") else x.convert("RGB"))
            return torch.from_numpy(pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1).copy())
        x = torch.from_numpy(x) if isinstance(x, np.ndarray) else torch.tensor(x, dtype=torch.float32)
    return x.to(torch.float32) if x.is_floating_point() else x


def _named_classes(dataset: Any) -> Sequence[Any]:
    """The `classes` attribute of a data set, through Subsets; empty where there is none."""
    return _named_classes(dataset.dataset) if isinstance(dataset, Subset) else getattr(dataset, "classes", ())


def _listed_targets(dataset: Any) -> Tensor | None:
    """The integers a data set lists in `targets`, where no `target_transform` changes them."""
    if isinstance(dataset, Subset):
        whole = _listed_targets(dataset.dataset)
        return None if whole is None else whole[torch.as_tensor(dataset.indices, dtype=torch.int64)]
    if getattr(dataset, "target_transform", None) is not None or not hasattr(dataset, "targets"):
        return None
    try:
        listed = torch.as_tensor(dataset.targets)
    except (TypeError, ValueError, RuntimeError):
        return None
    return listed.to(torch.int64) if listed.shape == (len(dataset),) and not listed.is_floating_point() else None


def as_data(source: object) -> Data:
    """Whatever a person has as `contract.Data`.

    Args:
        source: Data (returned as it is), a TensorDataset or an (inputs, targets) pair of tensors (ArrayData), any other map-style Dataset (WrappedData).

    Raises:
        InputError: it is none of these.
    """
    if callable(getattr(source, "fetch", None)) and callable(getattr(source, "prepare", None)):
        return cast(Data, source)
    if isinstance(source, TensorDataset):
        source = source.tensors
    elif isinstance(source, Dataset):
        return WrappedData(source)
    if isinstance(source, (tuple, list)) and len(source) == 2 and all(isinstance(part, Tensor) for part in source):
        return ArrayData(source[0], source[1])
    raise InputError(
        f"cannot use a {type(source).__name__} as data.",
        where="data",
        fix="Give a torch Dataset (of a DataLoader: its .dataset), a pair of tensors (inputs, targets), or limbeck.data.ArrayData.",
    )
