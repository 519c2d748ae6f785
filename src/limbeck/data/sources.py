"""Named data sets and files a person brings: each a function that returns `Splits`."""

from __future__ import annotations

import gzip
import struct
import types
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from limbeck.data.arrays import ArrayData
from limbeck.data.cifar import IMAGENET
from limbeck.data.reading import decoded, fitted, reading, shown
from limbeck.data.splits import Splits, hold_out
from limbeck.errors import InputError, MissingExtra, suggestion

if TYPE_CHECKING:
    from numpy.typing import NDArray

Scale = Literal["standard", "symmetric"]
FASHION_MNIST_FOLDER = Path("/usr/share/datasets/fashion-mnist")
"""Where the Debian package dataset-fashion-mnist puts its files."""
FASHION_MNIST_CLASSES = ("t-shirt/top", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
IMAGE_SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"})


def digits(test_size: int = 450, seed: int = 0, scale: Scale = "standard") -> Splits:
    """scikit-learn's digits: 1,797 grey images [1, 8, 8], floats k/16 in [0, 1], 10 classes (UCI, CC BY 4.0).

    Args:
        test_size: images held out as the test set, stratified, chosen by `seed`.
        scale: 'standard' normalises both parts by the training part's mean and sd, 'symmetric' to [−1, 1], as generators want it.

    Raises:
        InputError: `test_size` is not between 1 and 1796, or the scale is unknown.
    """
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = torch.from_numpy(bunch.images).to(torch.float32).div_(16)[:, None]
    whole = ArrayData(images, torch.from_numpy(bunch.target))
    try:
        train, test = hold_out(whole, test_size, seed)
    except InputError as error:
        raise InputError(error.what, where="test_size") from error
    pixels, _ = train.fetch(torch.arange(len(train)))
    mean, std = _constants(scale, (float(pixels.mean()),), (float(pixels.std()),))
    return Splits(*(ArrayData(part.fetch(torch.arange(len(part)))[0], part.targets, whole.classes, mean=mean, std=std) for part in (train, test)))


def fashion_mnist(folder: str | None = None, side: Literal[14, 28, 32] = 28, scale: Scale = "standard") -> Splits:
    """Fashion-MNIST: [1, 28, 28] uint8, 10 classes, 60,000 training and 10,000 test images (arXiv 1708.07747).

    Args:
        folder: holds the four IDX files, gzipped or plain; None: the Debian package's. side: 14 averages 2×2 pixels, 32 pads with black.
        scale: 'standard' normalises by the training mean and sd (of the 28×28 images), 'symmetric' to [−1, 1], as generators want it.

    Raises:
        InputError: the folder or a file is missing, or a file is damaged (named); side or scale is none of these.
    """
    if side not in (14, 28, 32):
        raise InputError(f"side is {side}.", where="side", fix="Use 14, 28 or 32.")
    mean, std = _constants(scale, (0.28604059,), (0.35302424,))
    home = FASHION_MNIST_FOLDER if folder is None else Path(folder)
    if not home.is_dir():
        raise InputError(
            "there is no such folder.", where=shown(home), fix="Install it (apt-get install dataset-fashion-mnist), or give 'folder' with the four IDX files."
        )
    return Splits(*(_idx_part(home, part, side, mean, std) for part in ("train", "t10k")))


def _constants(scale: str, mean: tuple[float, ...], std: tuple[float, ...]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation to normalise by. Raises InputError for an unknown scale."""
    if scale not in get_args(Scale):
        raise InputError(f"unknown scale '{scale}'.", where="scale", fix=suggestion(scale, get_args(Scale)))
    return (mean, std) if scale == "standard" else ((0.5,), (0.5,))


def _sized(images: Tensor, side: int) -> Tensor:
    """[N, 1, 28, 28] uint8 at 14 (2×2 means, rounded), 28 or 32 (padded with 0)."""
    if side == 32:
        return torch.nn.functional.pad(images, (2, 2, 2, 2))
    return images if side == 28 else ((images.view(len(images), 1, 14, 2, 14, 2).to(torch.int32).sum((3, 5)) + 2) // 4).to(torch.uint8)


def _idx_part(home: Path, prefix: str, side: int, mean: tuple[float, ...], std: tuple[float, ...]) -> ArrayData:
    images_path, labels_path = (_idx_path(home, f"{prefix}-{kind}-ubyte") for kind in ("images-idx3", "labels-idx1"))
    images, labels = read_idx(images_path), read_idx(labels_path)
    if images.ndim != 3 or labels.ndim != 1 or len(images) != len(labels):
        raise InputError(f"images {list(images.shape)} and labels {list(labels.shape)} do not belong together.", where=shown(images_path))
    with reading(labels_path):
        return ArrayData(_sized(torch.from_numpy(images)[:, None], side), torch.from_numpy(labels), FASHION_MNIST_CLASSES, mean=mean, std=std)


def _idx_path(home: Path, name: str) -> Path:
    for path in (home / name, home / f"{name}.gz"):
        if path.is_file():
            return path
    raise InputError(f"'{name}' (or {name}.gz) is not there.", where=shown(home), fix="Give 'folder' with the four IDX files.")


def read_idx(path: Path) -> NDArray[np.uint8]:
    """An IDX file of unsigned bytes, gzipped where its name ends in .gz, as a writable array.

    Raises:
        InputError: it is missing, is no such file, or its length does not match its header.
    """
    with reading(path):
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        if len(content) < 4 or content[:3] != b"\0\0\x08":
            raise InputError("it is no IDX file of unsigned bytes.")
        dimensions = content[3]
        shape = struct.unpack_from(f">{dimensions}I", content, 4)
        values = np.frombuffer(content, np.uint8, offset=4 + 4 * dimensions)
        if values.size != int(np.prod(shape, dtype=object)):
            raise InputError(f"its header says {' x '.join(map(str, shape))} bytes, it holds {values.size}.", fix="Fetch it again.")
        return values.reshape(shape).copy()


def image_folder(folder: str, size: int) -> Splits:
    """Images in one sub-folder a class, under train/ and test/ (or val/), as [3, size, size] uint8 in memory, normalised by ImageNet's constants.

    Args:
        size: side in pixels: the centred square of an image is scaled to it (bilinear). Memory: 3 * size ** 2 bytes an image.

    Raises:
        InputError: a folder is missing or empty, the test set has a class of its own, or an image cannot be read (named).
    """
    if not 1 <= size <= 4096:
        raise InputError(f"size is {size}.", where="size", fix="Give the side in pixels, from 1 to 4096.")
    root = Path(folder)
    test_home = next((home for name in ("test", "val") if (home := root / name).is_dir()), root / "test")
    classes = _class_folders(root / "train")
    foreign = sorted(set(_class_folders(test_home)) - set(classes))
    if foreign:
        raise InputError(f"the class '{shown(foreign[0])}' is not in train/.", where=shown(test_home))
    return Splits(_folder_part(root / "train", classes, size), _folder_part(test_home, classes, size))


def _class_folders(home: Path) -> list[str]:
    if not home.is_dir():
        raise InputError("there is no such folder.", where=shown(home), fix="Put the images into train/CLASS/ and test/CLASS/ (or val/CLASS/).")
    names = sorted(path.name for path in home.iterdir() if path.is_dir() and not path.name.startswith("."))
    if not names:
        raise InputError("it has no class folders.", where=shown(home), fix="Put the images into one sub-folder a class.")
    return names


def _folder_part(home: Path, classes: Sequence[str], size: int) -> ArrayData:
    found = [
        (path, label)
        for label, name in enumerate(classes)
        for path in sorted((home / name).glob("*"))
        if path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".")
    ]
    if not found:
        raise InputError("it has no images.", where=shown(home), fix=f"Known kinds: {', '.join(sorted(IMAGE_SUFFIXES))}.")
    images = np.empty((len(found), 3, size, size), np.uint8)
    for row, (path, _) in enumerate(found):
        with reading(path):
            images[row] = fitted(decoded(path.read_bytes()), size)
    labels = torch.tensor([label for _, label in found])
    return ArrayData(torch.from_numpy(images), labels, [shown(name) for name in classes], mean=IMAGENET[0], std=IMAGENET[1])


def huggingface(
    name: str,
    size: int | None = None,
    config: str | None = None,
    train_split: str = "train",
    test_split: str = "test",
    image_column: str = "image",
    label_column: str = "label",
) -> Splits:
    """An image classification data set of the Hugging Face Hub, or one that `datasets.load_dataset` finds on disk, in memory as uint8.

    Args:
        name, config: as `datasets.load_dataset` takes them; fetched from the network unless cached. size: side in pixels to scale to (as in
            `image_folder`); None: the images' own, which must be one. train_split, test_split: may hold a slice, as "train[:1000]".

    Raises:
        MissingExtra: the package datasets is not installed. InputError: the data set, a split or a column is not there, or an image cannot be read.
    """
    try:
        import datasets
    except ImportError as error:
        raise MissingExtra("datasets", "language", why="the data source 'huggingface'") from error
    sides = [_hub_part(datasets, name, config, split, size, image_column, label_column) for split in (train_split, test_split)]
    return Splits(*sides)


def _hub_part(datasets: types.ModuleType, name: str, config: str | None, split: str, size: int | None, image_column: str, label_column: str) -> ArrayData:
    with reading(f"{name} ({split})", fix="Does the data set exist, has it this split, and is there a network?"):
        rows = datasets.load_dataset(name, config, split=split)
        missing = [column for column in (image_column, label_column) if column not in rows.column_names]
        if missing:
            raise InputError(f"there is no column '{missing[0]}'.", fix=f"Its columns: {', '.join(rows.column_names)}.")
        images: list[NDArray[np.uint8]] = []
        for row in rows:
            image = row[image_column].convert("RGB")
            images.append(np.asarray(image).transpose(2, 0, 1) if size is None else fitted(image, size))
            if images[-1].shape != images[0].shape:
                raise InputError("its images differ in size.", fix="Give 'size', to which they are scaled.")
        if not images:
            raise InputError("it has no rows.")
        labels = torch.tensor(list(rows[label_column]))
        names = getattr(rows.features[label_column], "names", None)
        return ArrayData(torch.from_numpy(np.stack(images)), labels, names, mean=IMAGENET[0], std=IMAGENET[1])


def tensors(train: str, test: str, mean: Sequence[float] = (), std: Sequence[float] = ()) -> Splits:
    """Two files, each with `inputs` ([N, C, H, W] or [N, D], uint8 or floats) and `targets` ([N] integers, -100 where unlabelled).

    Args:
        train, test: paths that end in .npz, .safetensors, or .pt or .pth (a dictionary of tensors, read with weights_only). mean, std: as for `ArrayData`.

    Raises:
        InputError: a file cannot be read, lacks a tensor, or its tensors do not fit together (named).
    """
    (train_inputs, train_targets), (test_inputs, test_targets) = (_read_tensors(Path(path)) for path in (train, test))
    if train_inputs.shape[1:] != test_inputs.shape[1:] or train_inputs.dtype != test_inputs.dtype:
        raise InputError(
            f"its inputs are {list(test_inputs.shape[1:])} {test_inputs.dtype}, those of training {list(train_inputs.shape[1:])} {train_inputs.dtype}.",
            where=shown(test),
        )
    largest = max((int(t.max()) for t in (train_targets, test_targets) if t.numel()), default=-1)
    classes = [str(k) for k in range(largest + 1)]
    sides = []
    for path, inputs, targets in ((train, train_inputs, train_targets), (test, test_inputs, test_targets)):
        with reading(path):
            sides.append(ArrayData(inputs, targets, classes, mean=mean, std=std))
    return Splits(*sides)


def _read_tensors(path: Path) -> tuple[Tensor, Tensor]:
    with reading(path):
        content: dict[str, Any]
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as arrays:
                content = {name: torch.from_numpy(arrays[name]) for name in arrays.files if name in ("inputs", "targets")}
        elif path.suffix == ".safetensors":
            from safetensors.torch import load_file

            content = load_file(path)
        elif path.suffix in (".pt", ".pth"):
            content = torch.load(path, map_location="cpu", weights_only=True)
        else:
            raise InputError(f"'{shown(path.suffix)}' is no known kind of file.", fix="Known: .npz, .safetensors, .pt, .pth.")
        for name in ("inputs", "targets"):
            if not isinstance(content, dict) or not isinstance(content.get(name), Tensor):
                raise InputError(f"it has no tensor '{name}'.", fix="Save a dictionary with 'inputs' and 'targets'.")
        return content["inputs"], content["targets"]
