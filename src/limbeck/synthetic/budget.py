"""What a synthetic set costs in bytes, and how many images a budget buys (E7 of our sheet on evaluation; INFER's budget, arXiv 2408.06927, our eq. 6).

"Images per class" says little where soft labels, shared patterns, or teachers that must be at hand come on top: count bytes. K groups, M teachers, C classes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from limbeck.errors import InputError

Storage = Literal["float32", "uint8"]
Policy = Literal["hard", "static", "dynamic"]
"""hard: a class an image; static: C numbers an image, once; dynamic: C numbers an image in every epoch (a new answer for every augmented view)."""


@dataclass(frozen=True)
class Budget:
    """Bytes of the parts. shared: patterns, decoders, bases. teachers: networks that must be at hand when the set is used."""

    images: int
    labels: int = 0
    shared: int = 0
    teachers: int = 0

    @property
    def total(self) -> int:
        """Their sum."""
        return self.images + self.labels + self.shared + self.teachers

    def compression(self, real_bytes: int) -> float:
        """The total over the bytes of the real training set, a fraction. Raises InputError: that has none."""
        if real_bytes < 1:
            raise InputError(f"the real training set has {real_bytes} bytes.", where="real_bytes")
        return self.total / real_bytes


def image_bytes(count: int, shape: Sequence[int], storage: Storage = "float32") -> int:
    """Bytes of `count` images of `shape` (c, h, w), uncompressed. Raises InputError for a size below 1."""
    _positive(count=count, shape=min(shape))
    return count * math.prod(shape) * (4 if storage == "float32" else 1)


def index_bytes(size: int) -> int:
    """⌈log2(size)/8⌉, the least whole bytes that tell `size` things apart (0 for one thing)."""
    return (max(size - 1, 0).bit_length() + 7) // 8


def label_bytes(count: int, num_classes: int, policy: Policy = "hard", *, epochs: int = 1, number_bytes: int = 4) -> int:
    """Bytes of the labels of `count` images.

    Args:
        policy: see `Policy`. epochs: of training, which only "dynamic" pays for. number_bytes: of a soft label's number (4: float32, 2: float16).

    Raises:
        InputError: a number is below 1.
    """
    _positive(count=count, num_classes=num_classes, epochs=epochs, number_bytes=number_bytes)
    if policy == "hard":
        return count * index_bytes(num_classes)
    return count * num_classes * number_bytes * (epochs if policy == "dynamic" else 1)


def compensated_groups(images_per_class: int, teachers: int, num_classes: int) -> int:
    """K = ⌊ipc / (1 + M/C)⌋: real images a class if M patterns a group, each shared by C classes, are to be paid for; in whole numbers, exact.

    Raises:
        InputError: a number is below 1 (teachers: below 0), or the budget does not reach for one group.
    """
    _positive(images_per_class=images_per_class, num_classes=num_classes)
    if teachers < 0:
        raise InputError(f"'teachers' is {teachers}.", where="teachers")
    groups = images_per_class * num_classes // (num_classes + teachers)
    if groups < 1:
        raise InputError(
            f"{images_per_class} images a class do not pay for an image a class and {teachers} patterns ({num_classes} classes).",
            where="images_per_class",
            fix=f"Use {1 + math.ceil(teachers / num_classes)} or more, or fewer teachers.",
        )
    return groups


def compensated_images_per_class(groups: int, teachers: int, num_classes: int) -> float:
    """K (1 + M/C): what K groups with M patterns each cost, in images a class. They make (M + 1) K samples a class."""
    return groups * (1 + teachers / num_classes)


def _positive(**numbers: int) -> None:
    for name, number in numbers.items():
        if number < 1:
            raise InputError(f"'{name}' is {number}.", where=name, fix="It must be 1 or more.")
