"""Images made of other images, for tasks with many classes at a size that two CPU cores can train on.

Legend: N composites, D digits, C channels, H height, W width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from limbeck import seeds
from limbeck.data.arrays import ArrayData
from limbeck.data.sources import Scale, digits
from limbeck.data.splits import Splits
from limbeck.errors import InputError

DIGITS = 10


def digit_pairs(count: int = 20_000, test: int = 5_000, test_digits: int = 360, seed: int = 0, scale: Scale = "standard") -> Splits:
    """Two of scikit-learn's digits side by side: grey images [1, 8, 16], floats k/16 in [0, 1]; 100 classes, the ordered pairs (UCI, CC BY 4.0).

    The class of the pair (a, b) is 10 a + b, named "ab". Classes are equally frequent (within one) and come in turns. Training composites are made of training
    digits, test composites of test digits, each half drawn uniformly and independently among its digit's images: no test digit is ever seen in training.
    Ours: the task on which our sheet `infer` (arXiv 2408.06927) is checked at CPU size.

    Args:
        count, test: composites of the training and of the test set. test_digits: of the 1,797 digits, how many are kept for the test set, stratified.
        seed: which digits those are, and which pairs are drawn. scale: as for `digits`; the constants are those of the training composites' pixels.

    Raises:
        InputError: a number is not possible (named), or the scale is unknown.
    """
    for name, size in (("count", count), ("test", test)):
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise InputError(f"'{name}' cannot be {size}.", where=name, fix="Give a whole number of at least 1.")
    try:
        single = digits(test_size=test_digits, seed=seed, scale=scale)
    except InputError as error:
        raise InputError(error.what, where="test_digits" if error.where == "test_size" else error.where, fix=error.fix) from error
    parts = {"train": (single.train, count), "test": (single.test, test)}
    made = {name: pairs(*part.fetch(torch.arange(len(part))), size, seeds.generator(seed, "digit_pairs", name)) for name, (part, size) in parts.items()}  # type: ignore[arg-type]
    pixels = made["train"][0]
    mean, std = ((float(pixels.mean()),), (float(pixels.std()),)) if scale == "standard" else ((0.5,), (0.5,))
    names = tuple(f"{a}{b}" for a in range(DIGITS) for b in range(DIGITS))
    return Splits(*(ArrayData(images, targets, names, mean=mean, std=std) for images, targets in made.values()))


def pairs(images_DCHW: Tensor, labels_D: Tensor, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """`count` composites [N, C, H, 2W] and their classes [N] int64: composite i is of the class i modulo 100.

    Args:
        images_DCHW: [D, C, H, W], any type. labels_D: [D] int64 in 0..9. generator: which image of each digit is taken.

    Raises:
        InputError: a digit that is needed has no image.
    """
    targets_N = torch.arange(count) % DIGITS**2
    sizes = labels_D.bincount(minlength=DIGITS)
    order_D, first = labels_D.argsort(stable=True), sizes.cumsum(0) - sizes
    halves = []
    for digit_N in (targets_N // DIGITS, targets_N % DIGITS):
        if bool((sizes[digit_N] == 0).any()):
            raise InputError("a digit has no image to draw from.", where="test_digits", fix="Keep more digits on that side.")
        place_N = (torch.rand(count, dtype=torch.float64, generator=generator) * sizes[digit_N]).long()  # < size: the draws are below 1
        halves.append(images_DCHW[order_D[first[digit_N] + place_N]])
    return torch.cat(halves, dim=-1), targets_N
