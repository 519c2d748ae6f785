"""CIFAR-10 and CIFAR-100 from a folder, in whichever of three layouts lies there: torchvision's, the Hub's, packed strips."""

from __future__ import annotations

import os
import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from limbeck.data.arrays import ArrayData
from limbeck.data.reading import decoded, parquet_rows, reading, shown
from limbeck.data.splits import Splits
from limbeck.errors import InputError, suggestion

if TYPE_CHECKING:
    from numpy.typing import NDArray

CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
_FINE_CLASSES = """
    apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel can castle caterpillar cattle chair
    chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur dolphin elephant flatfish forest fox girl hamster house kangaroo keyboard lamp
    lawn_mower leopard lion lizard lobster man maple_tree motorcycle mountain mouse mushroom oak_tree orange orchid otter palm_tree pear pickup_truck
    pine_tree plain plate poppy porcupine possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk skyscraper snail snake spider squirrel
    streetcar sunflower sweet_pepper table tank telephone television tiger tractor train trout tulip turtle wardrobe whale willow_tree wolf woman
    worm
"""
CIFAR100_CLASSES = tuple(_FINE_CLASSES.split())
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Mean and standard deviation of ImageNet's channels, as torchvision's networks expect."""


@dataclass(frozen=True)
class _Cifar:
    name: str
    classes: tuple[str, ...]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    folder: str  # torchvision's
    train_files: tuple[str, ...]
    test_file: str
    label: str  # the key of the labels in torchvision's files, and the Hub's column


_CIFAR10 = _Cifar(
    "cifar10",
    CIFAR10_CLASSES,
    (0.49139968, 0.48215841, 0.44653091),
    (0.24703223, 0.24348513, 0.26158784),
    "cifar-10-batches-py",
    tuple(f"data_batch_{k}" for k in range(1, 6)),
    "test_batch",
    "label",
)
_CIFAR100 = _Cifar(
    "cifar100",
    CIFAR100_CLASSES,
    (0.50707516, 0.48654887, 0.44091784),
    (0.26733429, 0.25643846, 0.27615047),
    "cifar-100-python",
    ("train",),
    "test",
    "fine_label",
)
Normalisation = Literal["cifar", "imagenet"]


def cifar10(folder: str | None = None, normalise: Normalisation = "cifar", train_limit: int | None = None) -> Splits:
    """CIFAR-10: [3, 32, 32] uint8, 10 classes, 50,000 training and 10,000 test images (Krizhevsky 2009).

    Args:
        folder: holds torchvision's cifar-10-batches-py, the Hub's train-*.parquet and test-*.parquet, or cifar10_train.parquet and cifar10_test.parquet
            (packed strips); None: the environment variable LIMBECK_DATA.
        normalise: by the data set's own mean and standard deviation ("cifar"), or ImageNet's.
        train_limit: read only the first so many training images.

    Raises:
        InputError: nothing of the kind is there, or a file is damaged (named).
    """
    return _load(_CIFAR10, folder, normalise, train_limit)


def cifar100(folder: str | None = None, normalise: Normalisation = "cifar", train_limit: int | None = None) -> Splits:
    """CIFAR-100: [3, 32, 32] uint8, 100 fine classes, 50,000 training and 10,000 test images; arguments and errors as for `cifar10`."""
    return _load(_CIFAR100, folder, normalise, train_limit)


def _load(spec: _Cifar, folder: str | None, normalise: str, train_limit: int | None) -> Splits:
    constants = {"cifar": (spec.mean, spec.std), "imagenet": IMAGENET}
    if normalise not in constants:
        raise InputError(f"unknown normalisation '{normalise}'.", where="normalise", fix=suggestion(normalise, constants))
    if train_limit is not None and train_limit < 1:
        raise InputError(f"train_limit is {train_limit}.", where="train_limit", fix="Give at least 1, or leave it out.")
    place = folder or os.environ.get("LIMBECK_DATA")
    if not place:
        raise InputError(f"where is {spec.name}?", where="folder", fix="Give 'folder', or set the environment variable LIMBECK_DATA.")
    root = Path(place)
    if not root.is_dir():
        raise InputError("there is no such folder.", where=shown(root), fix=f"Name the folder that holds {spec.name}.")
    mean, std = constants[normalise]
    for layout in (_torchvision, _hub, _packed):
        train = layout(spec, root, "train", train_limit)
        if train is None:
            continue
        test = layout(spec, root, "test", None)
        if test is None:
            raise InputError(f"the training part of {spec.name} is here, its test part is not.", where=shown(root))
        return Splits(*(ArrayData(torch.from_numpy(x), torch.from_numpy(y), spec.classes, mean=mean, std=std) for x, y in (train, test)))
    raise InputError(f"{spec.name} is not here.", where=shown(root), fix=f"Looked for {spec.folder}/, train-*.parquet and {spec.name}_train.parquet.")


Arrays = tuple["NDArray[np.uint8]", "NDArray[np.int64]"]
"""Images [N, 3, 32, 32] and labels [N]."""


def _torchvision(spec: _Cifar, root: Path, split: str, limit: int | None) -> Arrays | None:
    """torchvision's layout: pickled dictionaries of a [n, 3072] array and a list of labels."""
    home = root / spec.folder if (root / spec.folder).is_dir() else root
    names = spec.train_files if split == "train" else (spec.test_file,)
    if not (home / names[0]).is_file():
        return None
    images: list[NDArray[np.uint8]] = []
    labels: list[Sequence[int]] = []
    for name in names:
        with reading(home / name):
            content = _Unpickler.load_file(home / name)
            pixels, own = content[b"data"], content[spec.label.encode() + b"s"]
            if not isinstance(pixels, np.ndarray) or pixels.dtype != np.uint8 or pixels.shape != (len(own), 3072):
                raise InputError("its images are not [n, 3072] uint8, one a label.")
            images.append(pixels.reshape(-1, 3, 32, 32))
            labels.append(_checked_labels(own, spec))
        if limit is not None and sum(map(len, images)) >= limit:
            break
    return np.concatenate(images)[:limit], np.concatenate(labels)[:limit]


def _hub(spec: _Cifar, root: Path, split: str, limit: int | None) -> Arrays | None:
    """The Hub's layout: shards SPLIT-*.parquet with encoded images (bytes, or {bytes, path}) and labels."""
    homes = [root, *(root / name for name in (spec.name, "data", "plain_text"))]
    shards = next((found for home in homes if (found := sorted(home.glob(f"{split}-*.parquet")))), [])
    images: list[NDArray[np.uint8]] = []
    labels: list[int] = []
    for shard in shards:
        with reading(shard):
            image_column, label_column = _hub_columns(spec, shard)
            rows = list(parquet_rows(shard, [image_column, label_column], None if limit is None else limit - len(images)))
            labels += _checked_labels([row[label_column] for row in rows], spec)
            images += [_hub_image(row[image_column]) for row in rows]
        if limit is not None and len(images) >= limit:
            break
    return (np.stack(images), np.array(labels, dtype=np.int64)) if images else None


def _hub_columns(spec: _Cifar, shard: Path) -> tuple[str, str]:
    from pyarrow.parquet import read_schema

    names = read_schema(shard).names
    return ("image" if "image" in names or "img" not in names else "img"), (spec.label if spec.label in names else "label")


def _hub_image(cell: Any) -> NDArray[np.uint8]:
    content = cell["bytes"] if isinstance(cell, dict) else cell
    pixels = np.asarray(decoded(content))
    if pixels.shape != (32, 32, 3):
        raise InputError(f"an image is {pixels.shape[1]} x {pixels.shape[0]} pixels, not 32 x 32.")
    return pixels.transpose(2, 0, 1)


def _packed(spec: _Cifar, root: Path, split: str, limit: int | None) -> Arrays | None:
    """Packed strips: rows of a lossless image of many 32 x 32 images one below the other, a byte a label, and the step of quantisation."""
    path = root / f"{spec.name}_{split}.parquet"
    if not path.is_file():
        return None
    images: list[NDArray[np.uint8]] = []
    labels: list[Sequence[int]] = []
    with reading(path):
        for row in parquet_rows(path, ["strip", "labels", "step"], None):
            own = _checked_labels(list(row["labels"]), spec)
            pixels = np.asarray(decoded(row["strip"]))
            if pixels.shape != (32 * len(own), 32, 3):
                raise InputError(f"a strip of {len(own)} images has the shape {pixels.shape}.")
            scaled = np.minimum(pixels.astype(np.uint16) * row["step"], 255).astype(np.uint8)
            images.append(scaled.reshape(-1, 32, 32, 3).transpose(0, 3, 1, 2))
            labels.append(own)
            if limit is not None and sum(map(len, images)) >= limit:
                break
        if not images:
            raise InputError("it holds no images.")
    return np.ascontiguousarray(np.concatenate(images)[:limit]), np.concatenate(labels)[:limit].astype(np.int64)


def _checked_labels(labels: Any, spec: _Cifar) -> list[int]:
    if not all(isinstance(label, int) and 0 <= label < len(spec.classes) for label in labels):
        raise InputError(f"a label is not a whole number from 0 to {len(spec.classes) - 1}.")
    return list(labels)


class _Unpickler(pickle.Unpickler):
    """Reads dictionaries, lists, numbers, text, bytes and numpy arrays; a pickle that names anything else is refused."""

    _ALLOWED = frozenset({("numpy.core.multiarray", "_reconstruct"), ("numpy._core.multiarray", "_reconstruct"), ("numpy", "ndarray"), ("numpy", "dtype")})

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self._ALLOWED:
            raise InputError(f"its pickle asks for '{module}.{name}', which is not data; it is not loaded.", fix="Take the file from a source you trust.")
        return super().find_class(module.replace("numpy.core", "numpy._core"), name)

    @classmethod
    def load_file(cls, path: Path) -> Any:
        with path.open("rb") as file:
            return cls(file, encoding="bytes").load()
