"""Which samples are kept: subsets as pure functions of scores, a fraction and a seed; the best of each class; near-duplicates.

Every rule is an order of all N samples, and a fraction keeps its beginning: the kept sets of one rule are nested, and ties fall to the lower position.
"""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from limbeck import seeds
from limbeck.contract import Data
from limbeck.errors import InputError

Rule = Literal["hardest", "easiest", "random"]
"""Which samples come first: "hardest" the highest scores, "easiest" the lowest, "random" none before another."""

SMALLEST_IMAGE = 4
"""Height and width below which an image is compared as a row of numbers."""
HASH_SIDE = 8
"""The difference hash has 2 · 8 · 8 bits."""
_ROWS = 1024


def kept_count(total: int, fraction: float) -> int:
    """round(f·N), halves up, at least 1; f counts as its shortest decimal, so 0.29 of 50 is 15.

    Args:
        total: N ≥ 1. fraction: f in (0, 1], the part that is KEPT.

    Raises:
        InputError: N or f is not so.
    """
    if total < 1:
        raise InputError(f"there are {total} samples to choose from.", where="total", fix="Give one or more.")
    if not 0 < fraction <= 1:  # NaN too
        raise InputError(f"the fraction {fraction} is not in (0, 1].", where="fraction", fix="It is the part that is kept, not the part that is dropped.")
    return max(1, math.floor(Fraction(str(float(fraction))) * total + Fraction(1, 2)))


def hardest_first(scores_N: Tensor) -> Tensor:
    """Positions by falling score, [N] int64; +∞ first. Raises InputError where a score is NaN or the shape not [N]."""
    return _checked_scores(scores_N).argsort(descending=True, stable=True)


def easiest_first(scores_N: Tensor) -> Tensor:
    """Positions by rising score, [N] int64; +∞ last. Raises InputError where a score is NaN or the shape not [N]."""
    return _checked_scores(scores_N).argsort(stable=True)


def random_order(total: int, seed: int) -> Tensor:
    """A random order of N positions, [N] int64: by u_i ~ U(0, 1), a function of seed and position. Source: 2403.07854 item 2a of our sheet."""
    return hardest_first(seeds.uniform(torch.arange(total), 1, seed, "selection")[:, 0])


def classes_in_turn(order_N: Tensor, classes_N: Tensor, rounds: int | None = None) -> Tensor:
    """The same positions, ordered so that every class gives one before any gives another: [N] int64.

    The first m of it are then equal shares of the classes, within one sample; what a small class cannot give is passed on to the others. Within a class,
    and among the classes within a turn, `order_N` decides.

    Args:
        order_N: [N] int64, a permutation. classes_N: [N] integers, equal numbers form a class (unlabelled samples too).
        rounds: turns, after which the rest follows as in `order_N`; None: to the end.

    Raises:
        InputError: lengths that differ.
    """
    if classes_N.shape != order_N.shape:
        raise InputError(f"{len(order_N)} samples and classes of shape {list(classes_N.shape)}.", where="classes", fix="Give one class number a sample.")
    return _in_turn(order_N, classes_N, rounds)


def _in_turn(order_M: Tensor, classes_N: Tensor, rounds: int | None) -> Tensor:
    """`classes_in_turn` of some of the positions."""
    turn_M = _turns(order_M, classes_N)
    return order_M[(turn_M if rounds is None else turn_M.clamp(max=rounds)).argsort(stable=True)]


def _turns(order_M: Tensor, classes_N: Tensor) -> Tensor:
    """How many of its own class stand before each of these positions, in this order: [M] int64."""
    _, class_M, size_K = classes_N.cpu()[order_M].unique(return_inverse=True, return_counts=True)
    grouped_M = class_M.argsort(stable=True)  # places in the order, class by class
    first_K = size_K.cumsum(0) - size_K
    turn_M = torch.empty_like(order_M)
    turn_M[grouped_M] = torch.arange(len(order_M)) - first_K[class_M[grouped_M]]
    return turn_M


def select(
    rule: Rule,
    fraction: float,
    *,
    scores_N: Tensor | None = None,
    classes_N: Tensor | None = None,
    total: int | None = None,
    balanced: bool = False,
    min_per_class: int = 0,
    max_per_class: int | None = None,
    seed: int = 0,
) -> Tensor:
    """The kept samples: `kept_count(N, fraction)` positions in rising order (fewer where classes are capped), [M] int64 on the CPU.

    For the same other arguments a smaller fraction's samples are among a larger one's.

    Args:
        rule: "hardest", "easiest" (both by `scores_N`) or "random" (by `seed`). fraction: f in (0, 1], the part that is kept.
        scores_N: [N], higher = harder; infinite ones may be among them (never learnt: +∞, the hardest). classes_N: [N] integers.
        total: N, where there are neither scores nor classes. balanced: equal shares of the classes, see `classes_in_turn`.
        min_per_class: samples that every class keeps at least, or all of a smaller class, before the rule chooses the rest.
        max_per_class: samples that a class keeps at most; None: any number.
        seed: of "random".

    Raises:
        InputError: an unknown rule; a fraction outside (0, 1]; NaN scores; lengths that differ; scores, classes or N that are needed and missing; a
            negative `min_per_class`, or more than the fraction can give.

    Source: 2403.07854 item 2 of our sheet; `balanced` for scores and `min_per_class` are ours.
    """
    if rule not in get_args(Rule):
        raise InputError(f"'{rule}' is no rule of selection.", where="rule", fix=f"Known: {', '.join(get_args(Rule))}.")
    count = _common_length(scores_N, classes_N, total)
    if rule == "random":
        order_N = random_order(count, seed)
    elif scores_N is None:
        raise InputError(f"the rule '{rule}' needs scores.", where="scores", fix="Give one score a sample, or choose rule: random.")
    else:
        order_N = hardest_first(scores_N) if rule == "hardest" else easiest_first(scores_N)
    keep = kept_count(count, fraction)
    if min_per_class < 0:
        raise InputError(f"min_per_class is {min_per_class}.", where="min_per_class", fix="Give 0 or more.")
    if max_per_class is not None and max_per_class < max(min_per_class, 1):
        raise InputError(f"max_per_class is {max_per_class}.", where="max_per_class", fix=f"Give {max(min_per_class, 1)} or more.")
    if max_per_class is not None and classes_N is not None:
        order_N = order_N[_turns(order_N, classes_N) < max_per_class]
        classes_N = classes_N.cpu()
    if balanced or min_per_class or max_per_class is not None:
        if classes_N is None:
            raise InputError("classes can only be balanced or guarded where they are known.", where="classes", fix="Give one class number a sample.")
        needed = int(classes_N.unique(return_counts=True)[1].clamp(max=min_per_class).sum())
        if needed > keep:
            what = f"{min_per_class} of every class are {needed} samples, and {keep} are kept."
            raise InputError(what, where="min_per_class", fix=f"Lower it, or keep a fraction of at least {needed / count:.3g}.")
        order_N = _in_turn(order_N, classes_N, None if balanced else min_per_class)
    return order_N[:keep].sort().values


def top_per_class(scores_N: Tensor, classes_N: Tensor, k: int | None) -> Tensor:
    """The k highest scores of every class, a class with fewer giving all: positions in rising order, [M] int64 on the CPU. Ties: the lower position.

    Args:
        scores_N: [N]. classes_N: [N] integers, the predicted classes c(u), say. k: ≥ 1; None: keeps all.

    Raises:
        InputError: NaN scores, lengths that differ, k below 1.

    Source: 2103.05959 eq. 6 of our sheet.
    """
    if k is not None and k < 1:
        raise InputError(f"{k} samples of each class are to be kept.", where="k", fix="Give 1 or more, or none for all.")
    scores_N, classes_N = _checked_scores(scores_N), classes_N.cpu()
    _common_length(scores_N, classes_N, None)
    if k is None:
        return torch.arange(len(scores_N))
    order_N = scores_N.argsort(descending=True, stable=True)
    grouped_N = order_N[classes_N[order_N].argsort(stable=True)]  # class by class, each by falling score
    _, size_K = classes_N[grouped_N].unique_consecutive(return_counts=True)
    place_N = torch.arange(len(grouped_N)) - (size_K.cumsum(0) - size_K).repeat_interleave(size_K)
    return grouped_N[place_N < k].sort().values


def difference_hash(images_BCHW: Tensor) -> Tensor:
    """A perceptual hash, [B, 128] booleans: whether brightness rises from each cell of a coarse grey image to its right (64 bits) and lower (64) neighbour.

    The image is averaged over its channels and resized to 8 × 9 and 9 × 8 cells. A rise below 1e-6 of the image's range counts as none. Brightness and
    contrast do not change it, a new size hardly; a flip does. Flat backgrounds are its weakness: noise decides their bits, and without noise different images
    share them. On Fashion-MNIST 0.95 finds 22 % of the images again after noise of sd 0.02, and drops 13 % of 20,000 training images beside 5,000 test ones.

    Args:
        images_BCHW: [B, C, H, W] floats, H and W at least `SMALLEST_IMAGE` for different images to have different hashes.
    """
    grey_B1HW = images_BCHW.double().mean(1, keepdim=True)
    least_B11 = 1e-6 * (grey_B1HW.amax((1, 2, 3)) - grey_B1HW.amin((1, 2, 3)))[:, None, None]

    def rises(height: int, width: int, dim: int) -> Tensor:
        cells_BHW = F.interpolate(grey_B1HW, size=(height, width), mode="bilinear", antialias=True, align_corners=False)[:, 0]
        return (cells_BHW.diff(dim=dim) > least_B11).flatten(1)

    return torch.cat([rises(HASH_SIDE, HASH_SIDE + 1, 2), rises(HASH_SIDE + 1, HASH_SIDE, 1)], dim=1)


def near_duplicate_inputs(inputs_M: Tensor, reference_R: Tensor, threshold: float) -> Tensor:
    """Which inputs are near-duplicates of one of the references: [M] booleans.

    Images: the share of equal bits of the two difference hashes is at least `threshold` (0.95: at most 6 of 128 differ). Anything else, and images below
    `SMALLEST_IMAGE` a side: all numbers are equal, whatever the threshold.

    Args:
        inputs_M: [M, …]. reference_R: [R, …], prepared alike. threshold: in (0, 1].

    Raises:
        InputError: a threshold outside (0, 1]; images beside other inputs, or rows of different lengths.
    """
    return _matches(_Prints([inputs_M]), _Prints([reference_R]), threshold)


def near_duplicates(data: Data, ids_M: Tensor, other: Data, *, threshold: float) -> Tensor:
    """Which samples of a data set are near-duplicates of a sample of another one, the test set, say: [M] booleans.

    Similarity as in `near_duplicate_inputs`: OURS, a perceptual hash. The authors match SIFT descriptors, with a threshold that was not published.

    Args:
        data: where the samples are. ids_M: [M] int64, their positions. other: the data set that is to be kept clear of.
        threshold: in (0, 1], the least similarity that makes a near-duplicate; 1: equal hashes.

    Raises:
        InputError: as `near_duplicate_inputs`.

    Source: 2103.05959 item 7 of our sheet.
    """
    _check_threshold(threshold)  # before anything is read
    return _matches(_Prints.of(data, ids_M), _Prints.of(other, torch.arange(len(other))), threshold)


class _Prints:
    """What samples are compared by: the bits of a hash, or the bytes of a row.

    Args:
        batches: lists of prepared inputs [B, …], all of one shape but for B.
    """

    def __init__(self, batches: list[Tensor]) -> None:
        full = [batch for batch in batches if len(batch)]
        self.shape = tuple(full[0].shape[1:]) if full else None
        self.are_images = self.shape is not None and len(self.shape) == 3 and min(self.shape[1:]) >= SMALLEST_IMAGE
        self.count = sum(len(batch) for batch in batches)
        self.bits = [difference_hash(batch.cpu()).float() * 2 - 1 for batch in full] if self.are_images else []
        self.rows = [] if self.are_images else [row.tobytes() for batch in full for row in (batch.cpu().float().flatten(1) + 0.0).numpy()]

    @classmethod
    def of(cls, data: Data, ids_M: Tensor) -> _Prints:
        """Of samples of a data set, read in batches."""
        joined = cls([])
        for ids_B in ids_M.split(_ROWS):
            part = cls([data.prepare(data.fetch(ids_B)[0])]) if len(ids_B) else cls([])
            joined.shape, joined.are_images = part.shape or joined.shape, part.are_images or joined.are_images
            joined.count, joined.bits, joined.rows = joined.count + part.count, joined.bits + part.bits, joined.rows + part.rows
        return joined


def _matches(these: _Prints, those: _Prints, threshold: float) -> Tensor:
    """Which of these resemble one of those, [M] booleans."""
    _check_threshold(threshold)
    if not these.count or not those.count:
        return torch.zeros(these.count, dtype=torch.bool)
    if these.are_images != those.are_images or (not these.are_images and these.shape != those.shape):
        what = f"inputs of shape {list(these.shape or ())} cannot be compared with inputs of shape {list(those.shape or ())}."
        raise InputError(what, where="threshold", fix="Give data of one kind, or leave the search for duplicates out.")
    if not these.are_images:
        known = set(those.rows)
        return torch.tensor([row in known for row in these.rows], dtype=torch.bool)
    reference_RH = torch.cat(those.bits)
    bits = reference_RH.shape[1]
    most_different = math.floor(bits * (1 - Fraction(str(float(threshold)))))
    least = bits - 2 * most_different  # of the sum over bits of ±1 · ±1, exact in float32
    return torch.cat([(bits_BH @ reference_RH.T).amax(1) >= least for bits_BH in these.bits])


def _check_threshold(threshold: float) -> None:
    if not 0 < threshold <= 1:  # NaN too
        raise InputError(f"the threshold {threshold} is not in (0, 1].", where="threshold", fix="1 is the strictest: equal hashes only.")


def _checked_scores(scores_N: Tensor) -> Tensor:
    """Float64 on the CPU, without NaN."""
    if scores_N.dim() != 1:
        raise InputError(f"scores have the shape {list(scores_N.shape)}.", where="scores", fix="Give [N], one number a sample.")
    scores_N = scores_N.detach().cpu().double()
    missing = int(scores_N.isnan().sum())
    if missing:
        raise InputError(f"{missing} of {len(scores_N)} scores are NaN.", where="scores", fix="Score every sample; a score that needs labels has none without.")
    return scores_N


def _common_length(scores_N: Tensor | None, classes_N: Tensor | None, total: int | None) -> int:
    """N, on which all that is given must agree."""
    for name, tensor in (("scores", scores_N), ("classes", classes_N)):
        if tensor is not None and tensor.dim() != 1:
            raise InputError(f"{name} have the shape {list(tensor.shape)}.", where=name, fix="Give [N], one number a sample.")
    lengths = {"scores": None if scores_N is None else len(scores_N), "classes": None if classes_N is None else len(classes_N), "total": total}
    given = {name: length for name, length in lengths.items() if length is not None}
    if not given:
        raise InputError("the number of samples is not known.", where="total", fix="Give scores, classes or 'total'.")
    if len(set(given.values())) > 1:
        raise InputError(f"different numbers of samples: {', '.join(f'{n} {length}' for n, length in given.items())}.", where="scores", fix="Give one each.")
    return next(iter(given.values()))
