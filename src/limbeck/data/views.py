"""Views: a fixed set of looks at every sample, so that what a teacher saw can be shown again, pixel for pixel, without storing pixels.

A view is a number v in [0, V). Of kind "seeded" it is the stateless augmentation of epoch v with the views' own seed; of kind "boxes" it is a relative
box and a flip (FKD, arXiv 2112.01528), drawn from (seed, v, sample) or read from a record. Samples are named by their place in the whole data set
(`splits.origins`), so that a view looks the same in every subset. B batch, C channels, H height, W width, n views a sample. Only operations that
IEEE 754 rounds exactly are used: a sample's bits do not depend on its place in the batch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import lru_cache
from typing import Literal, Protocol, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from limbeck import seeds
from limbeck.contract import Batch, Data, Frozen
from limbeck.data.augment import AugmentSpec, flip, transform
from limbeck.data.splits import origins
from limbeck.errors import InputError

_TRIES = 10  # of a box, before the largest centred one is taken
_LEVELS = 65536


class ViewSpec(Frozen):
    """Which views there are. `scale`, `ratio` and `flip` belong to kind "boxes", `data.augment` to kind "seeded"."""

    kind: Literal["seeded", "boxes"] = Field("seeded", description="'seeded': epochs of data.augment; 'boxes': random resized crops and flips, the box stored")
    count: int = Field(ge=1, le=100_000, description="views of each sample, V")
    seed: int = Field(0, ge=0, lt=2**62, description="of the views; their own, whatever the run's seed")
    scale: tuple[float, float] = Field((0.08, 1.0), description="'boxes': smallest and largest share of the area")
    ratio: tuple[float, float] = Field((3 / 4, 4 / 3), description="'boxes': smallest and largest width : height, uniform in its logarithm")
    flip: bool = Field(True, description="'boxes': mirror left to right with probability 1/2")

    @model_validator(mode="after")
    def _ranges(self) -> Self:
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise ValueError("'scale' needs 0 < smallest <= largest <= 1.")
        if not 0 < self.ratio[0] <= self.ratio[1]:
            raise ValueError("'ratio' needs 0 < smallest <= largest.")
        return self

    def policy(self, augment: AugmentSpec) -> dict[str, object]:
        """What decides a view's pixels, as JSON values: everything but how many views there are."""
        own = {"kind": self.kind, "seed": self.seed}
        if self.kind == "boxes":
            return own | {"scale": list(self.scale), "ratio": list(self.ratio), "flip": self.flip}
        return own | {"augment": augment.model_dump(mode="json")}

    def check(self, augment: AugmentSpec) -> None:
        """Raise InputError where the augmentation cannot go with views."""
        if augment.mixes:
            raise InputError("views are of one sample each: samples cannot be mixed.", where="augment", fix="Leave out mixup and cutmix, or the views.")
        if self.kind == "boxes" and augment != AugmentSpec():
            raise InputError("boxes are all that is done to a view; a teacher's answer would not know of more.", where="augment", fix="Leave it out.")


class Recorded(Protocol):
    """What holds a teacher's answers by sample and view (`teachers.RecordTeacher`)."""

    def lookup(self, ids_B: Tensor, views_B: Tensor) -> Mapping[str, Tensor]:
        """Name → [B, ...] of these samples (positions in the training set) and views; see `contract.Batch.recorded`."""
        ...

    def boxes(self, ids_B: Tensor, views_B: Tensor) -> tuple[Tensor, Tensor] | None:
        """Stored boxes [B, 4] and flips [B] bool; None where the views are seeded."""
        ...


class Views:
    """Shows views of a data set, with what a record holds for them.

    Args:
        spec, augment: of the views. data: the training set. record: where boxes and answers come from; None: boxes are drawn, there are no answers.

    Raises:
        InputError: spec and augmentation do not go together.
    """

    def __init__(self, spec: ViewSpec, augment: AugmentSpec, data: Data, record: Recorded | None = None) -> None:
        spec.check(augment)
        self.spec, self.augment, self.data, self.record = spec, augment, data, record
        self.origins = origins(data)

    def draw(self, ids_B: Tensor, *, count: int, seed: int, epoch: int, usable: Tensor | None = None) -> Tensor:
        """Which views a visit of each sample shows, [B, n] int64.

        Seeded views are taken in turn (epoch 0 shows 0 to n - 1, and so on); boxes, and views of which some are not usable, are drawn from
        (seed, epoch, sample) without replacement. Where a sample has fewer than n usable views they come again.

        Args:
            ids_B: [B] positions. count: n. usable: [N, V] bool by position.
        """
        V = self.spec.count
        if self.spec.kind == "seeded" and usable is None:
            return ((epoch * count + torch.arange(count)) % V).expand(len(ids_B), count)
        keys_BV = seeds.uniform(self.origins[ids_B], V, seed, epoch, "views")
        if usable is None:
            places_Bn = torch.arange(count).expand(len(ids_B), count) % V
        else:
            usable_BV = usable[ids_B]
            keys_BV = torch.where(usable_BV, keys_BV, 2.0)
            places_Bn = torch.arange(count)[None] % usable_BV.sum(1).clamp(min=1)[:, None]
        return keys_BV.argsort(dim=1, stable=True).gather(1, places_Bn)

    def batch(self, ids_B: Tensor, views_Bn: Tensor) -> Batch:
        """Raw inputs of these views, [B·n, ...], the n views of a sample side by side, with targets, ids, views and what is recorded of them."""
        n = views_Bn.shape[1]
        ids, views = ids_B.repeat_interleave(n), views_Bn.reshape(-1)
        if self.spec.kind == "seeded":
            raw, targets = self._seeded(ids, views)
        else:
            raw, targets = self.data.fetch(ids_B, seed=self.spec.seed, epoch=0)  # decoded once, cut n times
            raw = self._cut(raw.repeat_interleave(n, 0) if n > 1 else raw, ids, views)
            targets = targets if targets is None or n == 1 else targets.repeat_interleave(n, 0)
        recorded = {} if self.record is None else self.record.lookup(ids, views)
        return Batch(raw, targets, ids, views, recorded)

    def boxes(self, ids_B: Tensor, views_B: Tensor) -> tuple[Tensor, Tensor]:
        """Relative boxes [B, 4] float32 and flips [B] bool of these samples (positions) and views: the record's, or drawn."""
        stored = None if self.record is None else self.record.boxes(ids_B, views_B)
        return draw_boxes(self.origins[ids_B], views_B, self.spec) if stored is None else stored

    def _seeded(self, ids: Tensor, views: Tensor) -> tuple[Tensor, Tensor | None]:
        shown: list[tuple[Tensor, Tensor, Tensor | None]] = []
        for view in views.unique().tolist():
            where = (views == view).nonzero()[:, 0]
            raw, targets = self.data.fetch(ids[where], seed=self.spec.seed, epoch=view)
            shown.append((where, transform(raw, self.origins[ids[where]], spec=self.augment, seed=self.spec.seed, epoch=view), targets))
        if len(shown) == 1:
            return shown[0][1], shown[0][2]
        back = torch.cat([where for where, _, _ in shown]).argsort()
        targets = None if shown[0][2] is None else torch.cat([t for _, _, t in shown if t is not None])[back]
        return torch.cat([raw for _, raw, _ in shown])[back], targets

    def _cut(self, raw: Tensor, ids: Tensor, views: Tensor) -> Tensor:
        if raw.dim() != 4:
            raise InputError(f"boxes need images, these inputs have the shape {list(raw.shape)[1:]}.", where="data.views.kind", fix="Use kind: seeded.")
        boxes_B4, flips_B = self.boxes(ids, views)
        return flip(resized_crop(raw, boxes_B4, raw.shape[2], raw.shape[3]), flips_B)


def draw_boxes(origins_B: Tensor, views_B: Tensor, spec: ViewSpec) -> tuple[Tensor, Tensor]:
    """Boxes and flips of samples and views, each a pure function of (spec.seed, view, sample).

    An area and a ratio width : height are drawn until the box fits, ten times at most; then it is the largest centred box of an allowed ratio.
    The image counts as a square, as boxes are relative.

    Args:
        origins_B: [B] int64, places in the whole data set. views_B: [B] int64.

    Returns:
        [B, 4] float32, (top, left, height, width) as shares of the image's sides; [B] bool.
    """
    ids_B = seeds.hash64(origins_B * 1_000_003 + views_B)
    draw_BT4 = seeds.uniform(ids_B, 4 * _TRIES + 1, spec.seed, "boxes")
    flips_B = (draw_BT4[:, -1] < 0.5) if spec.flip else torch.zeros(len(ids_B), dtype=torch.bool)
    draw_BT4 = draw_BT4[:, :-1].view(len(ids_B), _TRIES, 4)
    area_BT = spec.scale[0] + (spec.scale[1] - spec.scale[0]) * draw_BT4[:, :, 0]
    ratio_BT = _ratios(*spec.ratio)[(draw_BT4[:, :, 1] * _LEVELS).to(torch.int64)]
    width_BT, height_BT = (area_BT * ratio_BT).sqrt(), (area_BT / ratio_BT).sqrt()
    fits_BT = (width_BT <= 1) & (height_BT <= 1)
    chosen_B = torch.where(fits_BT.any(1), fits_BT.to(torch.int8).argmax(1), 0)[:, None]
    height_B, width_B = height_BT.gather(1, chosen_B)[:, 0], width_BT.gather(1, chosen_B)[:, 0]
    top_B = (1 - height_B) * draw_BT4[:, :, 2].gather(1, chosen_B)[:, 0]
    left_B = (1 - width_B) * draw_BT4[:, :, 3].gather(1, chosen_B)[:, 0]
    boxes_B4 = torch.stack((top_B, left_B, height_B, width_B), 1)
    nearest = min(max(1.0, spec.ratio[0]), spec.ratio[1])
    tall, wide = min(1.0, 1 / nearest), min(1.0, nearest)
    centred_4 = boxes_B4.new_tensor(((1 - tall) / 2, (1 - wide) / 2, tall, wide))
    return torch.where(fits_BT.any(1)[:, None], boxes_B4, centred_4).to(torch.float32), flips_B


def resized_crop(inputs_BCHW: Tensor, boxes_B4: Tensor, height: int, width: int) -> Tensor:
    """Cut relative boxes out of images and resize them bilinearly (pixel centres at half, no smoothing), as if by torchvision's `resized_crop`.

    Args:
        inputs_BCHW: uint8 or floats. boxes_B4: [B, 4], (top, left, height, width) in shares of the sides; the box (0, 0, 1, 1) is the image.

    Returns:
        [B, C, height, width] of the same type, uint8 rounded to the nearest.
    """
    H, W = inputs_BCHW.shape[2:]
    boxes = boxes_B4.to(torch.float64)
    y0, y1, fy = _samples(boxes[:, 0], boxes[:, 2], H, height)
    x0, x1, fx = _samples(boxes[:, 1], boxes[:, 3], W, width)
    C = inputs_BCHW.shape[1]
    pixels = inputs_BCHW.flatten(2)

    def pick(rows: Tensor, columns: Tensor) -> Tensor:
        flat = (rows[:, :, None] * W + columns[:, None, :]).flatten(1)
        found = pixels.gather(2, flat[:, None].expand(-1, C, -1)).view(len(rows), C, height, width)
        return found.to(torch.float32) if found.dtype == torch.uint8 else found

    fx, fy = fx[:, None, None, :].to(torch.float32), fy[:, None, :, None].to(torch.float32)
    upper = pick(y0, x0) * (1 - fx) + pick(y0, x1) * fx
    lower = pick(y1, x0) * (1 - fx) + pick(y1, x1) * fx
    out = upper * (1 - fy) + lower * fy
    return out.round_().clamp_(0, 255).to(torch.uint8) if inputs_BCHW.dtype == torch.uint8 else out.to(inputs_BCHW.dtype)


def _samples(start_B: Tensor, extent_B: Tensor, length: int, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Where `count` pixel centres of a box fall among `length` pixels: both neighbours [B, count] int64 and the weight of the second.

    Neighbours stay inside the box's own pixels, so that nothing outside it shows.
    """
    first_B, last_B = _edge(start_B * length), _edge((start_B + extent_B) * length)
    place = first_B[:, None] + (torch.arange(count, dtype=torch.float64) + 0.5)[None] * ((last_B - first_B) / count)[:, None] - 0.5
    low = first_B.floor().clamp(0, length - 1)[:, None]
    high = (last_B.ceil() - 1).clamp(0, length - 1)[:, None].maximum(low)
    place = place.maximum(low).minimum(high)
    lower = place.floor()
    return lower.to(torch.int64), (lower + 1).minimum(high).to(torch.int64), place - lower


def _edge(place_B: Tensor) -> Tensor:
    """A box's edge in pixels; on the border of a pixel where float32 (as boxes are stored) missed it by less than 1e-4 pixels."""
    whole_B = place_B.round()
    return torch.where((place_B - whole_B).abs() < 1e-4, whole_B, place_B)


@lru_cache(maxsize=8)
def _ratios(smallest: float, largest: float) -> Tensor:
    """65,536 equally likely ratios, uniform in the logarithm (a table: vectorised exponentials may differ in the last bit)."""
    low, high = math.log(smallest), math.log(largest)
    return torch.tensor([math.exp(low + (high - low) * (i + 0.5) / _LEVELS) for i in range(_LEVELS)], dtype=torch.float64)
