"""Differentiable Siamese augmentation (DSA): one random operation a batch, its numbers drawn per image, differentiable twice.

B images of C channels, H×W pixels; u is uniform on [0, 1). Drawing and applying are apart, so that the same draw can be replayed inside a graph, or
applied to real and synthetic images alike. Fills are 0, which after whitening or standardisation is the mean, not black.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from limbeck.contract import Frozen
from limbeck.errors import InputError

Operation = Literal["color", "crop", "cutout", "flip", "scale", "rotate"]


class DSASpec(Frozen):
    """Which operations there are and how strong; the defaults are the released code's (arXiv 2102.08259 §3 and its repository; sheet `ftd`)."""

    operations: tuple[Operation, ...] = Field(("color", "crop", "cutout", "flip", "scale", "rotate"), min_length=1)
    brightness: float = Field(1.0, ge=0, description="'color': adds (u - 1/2) times this")
    saturation: float = Field(2.0, ge=0, description="'color': multiplies the distance from the channels' mean by u times this")
    contrast: float = Field(0.5, ge=0, description="'color': multiplies the distance from the image's mean by u plus this")
    crop: float = Field(0.125, ge=0, le=1, description="'crop': largest shift, a fraction of the side")
    cutout: float = Field(0.5, ge=0, le=1, description="'cutout': side of the hole, a fraction of the image's")
    flip: float = Field(0.5, ge=0, le=1, description="'flip': probability of a left-right flip")
    scale: float = Field(1.2, ge=1, description="'scale': factors lie between 1/this and this, of height and width apart")
    rotate: float = Field(15.0, ge=0, le=180, description="'rotate': largest angle, in degrees")


@dataclass(frozen=True)
class Drawn:
    """One operation and its numbers, a row an image; a single row serves all images of a batch.

    values: [B, K] float32. "color": added brightness, factor of saturation, factor of contrast. "crop": rows and columns by which the new image's corner lies
    inside the old one's. "cutout": top, bottom, left, right of the hole in pixels, bottom and right excluded. "flip": 1 flipped, 0 not. "scale": factors of
    the sampling grid's x and y (above 1: the picture shrinks). "rotate": the sampling grid's angle in radians.
    """

    operation: Operation
    values: Tensor

    def __len__(self) -> int:
        return len(self.values)

    def to(self, device: torch.device | str) -> Drawn:
        """The same numbers on another device."""
        return replace(self, values=self.values.to(device))


def draw(spec: DSASpec, count: int, height: int, width: int, generator: torch.Generator) -> Drawn:
    """One operation for the batch, uniform over `spec.operations`, and its numbers for each of `count` images of height × width pixels.

    The numbers lie on the generator's device. A generator on an accelerator makes the host wait once, for the operation's name; one on the CPU does not.

    Raises:
        InputError: count, height or width is below 1.
    """
    if min(count, height, width) < 1:
        raise InputError(f"cannot augment {count} images of {height}×{width} pixels.", where="dsa")
    device = generator.device
    operation = spec.operations[int(torch.randint(len(spec.operations), (), generator=generator, device=device))]

    def uniform(columns: int) -> Tensor:
        return torch.rand(count, columns, generator=generator, device=device)

    if operation == "color":
        u = uniform(3)
        return Drawn(operation, torch.stack(((u[:, 0] - 0.5) * spec.brightness, u[:, 1] * spec.saturation, u[:, 2] + spec.contrast), 1))
    if operation == "crop":
        most = [_rounded(side * spec.crop) for side in (height, width)]
        shifts = [torch.randint(-m, m + 1, (count,), generator=generator, device=device) for m in most]
        return Drawn(operation, torch.stack(shifts, 1).to(torch.float32))
    if operation == "cutout":
        edges = []
        for side in (height, width):
            hole = _rounded(side * spec.cutout)
            centre_B = torch.randint(0, side + 1 - hole % 2, (count,), generator=generator, device=device)
            edges += [(centre_B - hole // 2).clamp(0, side), (centre_B - hole // 2 + hole).clamp(0, side)]
        return Drawn(operation, torch.stack(edges, 1).to(torch.float32))
    if operation == "flip":
        return Drawn(operation, (uniform(1) < spec.flip).to(torch.float32))
    if operation == "scale":
        return Drawn(operation, 1 / spec.scale + uniform(2) * (spec.scale - 1 / spec.scale))
    return Drawn(operation, (2 * uniform(1) - 1) * math.radians(spec.rotate))


def apply(x_BCHW: Tensor, drawn: Drawn) -> Tensor:
    """The drawn operation on images [B, C, H, W]; no randomness, differentiable twice in the images.

    color is brightness, then saturation (distance from the mean over channels), then contrast (distance from the mean over the image). crop shifts by whole
    pixels and fills with 0; cutout writes 0; scale and rotate sample bilinearly at `affine_grid`'s points, corners aligned, 0 outside (the released code's
    geometry: of an image that is not square, rotate also shears).

    Raises:
        InputError: the images are not [B, C, H, W] floats, or neither one row of numbers nor one an image was drawn.
    """
    _must_be_images(x_BCHW)
    count = len(x_BCHW)
    if len(drawn) not in (1, count):
        raise InputError(f"numbers were drawn for {len(drawn)} images, there are {count}.", where="dsa", fix="Draw as many, or one row for all.")
    values_BK = drawn.values.to(x_BCHW.device, x_BCHW.dtype).expand(count, -1)
    return _OPERATIONS[drawn.operation](x_BCHW, values_BK)


def dsa(x_BCHW: Tensor, spec: DSASpec, generator: torch.Generator) -> Tensor:
    """`draw` for these images [B, C, H, W], and `apply`. Raises InputError: they are no such float images, or there is none."""
    _must_be_images(x_BCHW)
    return apply(x_BCHW, draw(spec, len(x_BCHW), x_BCHW.shape[2], x_BCHW.shape[3], generator))


def _must_be_images(x_BCHW: Tensor) -> None:
    if x_BCHW.dim() != 4 or not x_BCHW.is_floating_point():
        raise InputError(f"augmentation takes float images [B, C, H, W], these are {x_BCHW.dtype} {list(x_BCHW.shape)}.", where="dsa")


def _rounded(length: float) -> int:
    """The nearest whole number, halves upwards."""
    return int(length + 0.5)


def _color(x_BCHW: Tensor, values_B3: Tensor) -> Tensor:
    brightness, saturation, contrast = (values_B3[:, k, None, None, None] for k in range(3))
    x_BCHW = x_BCHW + brightness
    mean_B1HW = x_BCHW.mean(1, keepdim=True)
    x_BCHW = (x_BCHW - mean_B1HW) * saturation + mean_B1HW
    mean_B111 = x_BCHW.mean((1, 2, 3), keepdim=True)
    return (x_BCHW - mean_B111) * contrast + mean_B111


def _crop(x_BCHW: Tensor, shifts_B2: Tensor) -> Tensor:
    for dim, shift_B in ((2, shifts_B2[:, 0]), (3, shifts_B2[:, 1])):
        side = x_BCHW.shape[dim]
        source_BS = torch.arange(side, device=x_BCHW.device) + shift_B[:, None].round().to(torch.int64)
        shape = (len(x_BCHW), 1, side, 1) if dim == 2 else (len(x_BCHW), 1, 1, side)
        outside = ((source_BS < 0) | (source_BS >= side)).view(shape)
        x_BCHW = x_BCHW.gather(dim, source_BS.clamp(0, side - 1).view(shape).expand_as(x_BCHW)).masked_fill(outside, 0.0)
    return x_BCHW


def _cutout(x_BCHW: Tensor, edges_B4: Tensor) -> Tensor:
    row_H = torch.arange(x_BCHW.shape[2], device=x_BCHW.device)
    column_W = torch.arange(x_BCHW.shape[3], device=x_BCHW.device)
    top, bottom, left, right = (edges_B4[:, k, None] for k in range(4))
    rows_BH, columns_BW = (row_H >= top) & (row_H < bottom), (column_W >= left) & (column_W < right)
    return x_BCHW.masked_fill((rows_BH[:, :, None] & columns_BW[:, None, :])[:, None], 0.0)


def _flip(x_BCHW: Tensor, flipped_B1: Tensor) -> Tensor:
    return torch.where(flipped_B1[:, :, None, None] > 0.5, x_BCHW.flip(3), x_BCHW)


def _scale(x_BCHW: Tensor, factors_B2: Tensor) -> Tensor:
    zero_B = torch.zeros_like(factors_B2[:, 0])
    return _sampled(x_BCHW, (factors_B2[:, 0], zero_B, zero_B, factors_B2[:, 1]))


def _rotate(x_BCHW: Tensor, angle_B1: Tensor) -> Tensor:
    cos_B, sin_B = angle_B1[:, 0].cos(), angle_B1[:, 0].sin()
    return _sampled(x_BCHW, (cos_B, -sin_B, sin_B, cos_B))


def _sampled(x_BCHW: Tensor, matrix: tuple[Tensor, Tensor, Tensor, Tensor]) -> Tensor:
    """Bilinear samples at the grid turned by [[a, b], [c, d]] (each [B]) in coordinates from -1 to 1, corners aligned, 0 outside."""
    a, b, c, d = matrix
    zero_B = torch.zeros_like(a)
    affine_B23 = torch.stack((torch.stack((a, b, zero_B), 1), torch.stack((c, d, zero_B), 1)), 1)
    grid_BHW2 = F.affine_grid(affine_B23, list(x_BCHW.shape), align_corners=True)
    return F.grid_sample(x_BCHW, grid_BHW2, mode="bilinear", padding_mode="zeros", align_corners=True)


_OPERATIONS = {"color": _color, "crop": _crop, "cutout": _cutout, "flip": _flip, "scale": _scale, "rotate": _rotate}
