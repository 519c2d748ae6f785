"""ConvNet-D of data-set distillation, and small networks of other families to test a distilled set on. Each is `head(features(x))`.

B inputs of (channels, height, width); C classes; D blocks. "instance" is group norm with a group a channel: it keeps no running statistics, so that the
parameters alone are the network, in training and in evaluation.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from limbeck.errors import InputError, suggestion
from limbeck.models.arguments import image_shape, whole_number, whole_numbers
from limbeck.models.small import Network

Norm = Literal["instance", "batch", "none"]
_NORMS = ("instance", "batch", "none")
SMALLEST, LARGEST = 8, 64
"""Sides, in pixels, of the images that `alexnet_small`, `vgg11_small` and `resnet18_small` take."""


def convnet(
    num_classes: int,
    input_shape: Sequence[int],
    depth: int | None = None,
    width: int | None = None,
    norm: Norm = "instance",
    widths: Sequence[int] | None = None,
    padding: int | None = None,
) -> Network:
    """ConvNet-D: [B, C, H, W] -> logits [B, num_classes] (arXiv 2006.05929 and 2203.11932; sheet `ftd`).

    D times: 3×3 convolution of stride 1 with bias, norm with affine, ReLU, 2×2 average pooling that drops an odd last row or column; then flatten and a
    linear head. Parameters at width 128: 320,010 (3×32×32, 10 classes), 317,706 (1×28×28, 10), 857,160 (D = 4, 3×64×64, 200).

    Args:
        num_classes: width of the logits. input_shape: (channels, height, width).
        depth: number of blocks D; None: as many as `widths`, else 3. width: channels of every block; None: 128, as published.
        norm: "instance", "batch" (arXiv 2310.06511 uses it, with growing widths), or "none".
        widths: channels of each block, instead of `width`.
        padding: of the first convolution; None: 1, and 3 where images have one channel (the released code's rule, so that 28×28 behaves as 32×32).

    Raises:
        InputError: the inputs are not images or too small to be halved D times; width and widths, or depth and widths, contradict each other.
    """
    channels, height, breadth = image_shape(input_shape)
    wide = _block_widths(depth, width, widths)
    first = (3 if channels == 1 else 1) if padding is None else whole_number(padding, "padding", least=0)
    height, breadth = height + 2 * first - 2, breadth + 2 * first - 2
    if min(height, breadth) >> len(wide) < 1:
        raise InputError(
            f"images of {height}×{breadth} (after the first padding) cannot be halved {len(wide)} times.",
            where="input_shape",
            fix="Use a smaller depth or larger images.",
        )
    layers: list[nn.Module] = []
    for number, out in enumerate(wide):
        layers += [nn.Conv2d(channels, out, 3, padding=first if number == 0 else 1), *_norm(norm, out), nn.ReLU(), nn.AvgPool2d(2)]
        channels = out
    layers.append(nn.Flatten())
    flat = channels * (height >> len(wide)) * (breadth >> len(wide))
    return Network(nn.Sequential(*layers), nn.Linear(flat, whole_number(num_classes, "num_classes")))


def alexnet_small(num_classes: int, input_shape: Sequence[int], width: int = 128, norm: Norm = "instance") -> Network:
    """Five convolutions after AlexNet: [B, C, H, W] -> logits [B, num_classes].

    Kernels 5, 5, 3, 3, 3 of width, 1.5, 2, 1.5 and 1.5 times `width` channels; max pooling behind the first, second and last; flatten; one linear layer.
    Ours: norms and no dropout; a pool is left out where a norm behind it would see a single pixel.

    Args:
        num_classes: width of the logits. input_shape: (channels, height, width), sides from 8 to 64. width: channels of the first layer. norm: after each.

    Raises:
        InputError: the inputs are not images of these sides, or an argument is out of range.
    """
    plan = [(width, 5, True), (3 * width // 2, 5, True), (2 * width, 3, False), (3 * width // 2, 3, False), (3 * width // 2, 3, True)]
    return _plain(plan, num_classes, input_shape, norm)


def vgg11_small(num_classes: int, input_shape: Sequence[int], width: int = 64, norm: Norm = "instance") -> Network:
    """The eight convolutions of VGG-11 and one linear layer: [B, C, H, W] -> logits [B, num_classes] (arXiv 1409.1556, column A).

    Channels are 1, 2, 4, 4, 8, 8, 8 and 8 times `width`, with five max pools; then flatten.
    Ours: norms and no dropout; a pool is left out where a norm behind it would see a single pixel.

    Args:
        num_classes: width of the logits. input_shape: (channels, height, width), sides from 8 to 64. width: channels of the first layer (64 in VGG-11).
        norm: after each convolution.

    Raises:
        InputError: the inputs are not images of these sides, or an argument is out of range.
    """
    plan = [(times * width, 3, pooled) for times, pooled in ((1, True), (2, True), (4, False), (4, True), (8, False), (8, True), (8, False), (8, True))]
    return _plain(plan, num_classes, input_shape, norm)


def resnet18_small(num_classes: int, input_shape: Sequence[int], width: int = 64, norm: Norm = "instance") -> Network:
    """ResNet-18 for small images: [B, C, H, W] -> logits [B, num_classes] (arXiv 1512.03385; 3×3 stem and no max pool, as usual on CIFAR).

    Four stages of two blocks with 1, 2, 4 and 8 times `width` channels, projections where a stage widens, global average pooling.
    Ours: a stage halves the image only where at least 2×2 pixels are left, so that instance norm never sees a single one.

    Args:
        num_classes: width of the logits. input_shape: (channels, height, width), sides from 8 to 64. width: channels of the first stage (64 in ResNet-18).
        norm: after each convolution.

    Raises:
        InputError: the inputs are not images of these sides, or an argument is out of range.
    """
    channels, side = _bounded(input_shape)
    width = whole_number(width, "width")
    layers: list[nn.Module] = [nn.Conv2d(channels, width, 3, padding=1, bias=norm == "none"), *_norm(norm, width), nn.ReLU()]
    channels = width
    for stage in range(4):
        stride = 2 if stage and side >= 4 else 1
        side = -(-side // stride)
        layers += [_Residual(channels, width << stage, stride, norm), _Residual(width << stage, width << stage, 1, norm)]
        channels = width << stage
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return Network(nn.Sequential(*layers), nn.Linear(channels, whole_number(num_classes, "num_classes")))


class _Residual(nn.Module):
    """relu(norm(conv(relu(norm(conv(x))))) + shortcut(x)), the shortcut a projection where shapes differ."""

    def __init__(self, channels_in: int, channels: int, stride: int, norm: Norm) -> None:
        super().__init__()
        bias = norm == "none"
        self.body = nn.Sequential(
            nn.Conv2d(channels_in, channels, 3, stride, padding=1, bias=bias),
            *_norm(norm, channels),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1, bias=bias),
            *_norm(norm, channels),
        )
        same = channels_in == channels and stride == 1
        self.shortcut = nn.Sequential() if same else nn.Sequential(nn.Conv2d(channels_in, channels, 1, stride, bias=bias), *_norm(norm, channels))

    def forward(self, x: Tensor) -> Tensor:
        """[B, C_in, H, W] -> [B, C, ⌈H/stride⌉, ⌈W/stride⌉]."""
        return F.relu(self.body(x) + self.shortcut(x))


def _plain(plan: Sequence[tuple[int, int, bool]], num_classes: int, input_shape: Sequence[int], norm: Norm) -> Network:
    """Convolutions (channels, kernel, pooled behind) in a row, flatten, a linear head."""
    channels, _ = _bounded(input_shape)
    _, height, width = image_shape(input_shape)
    layers: list[nn.Module] = []
    for number, (out, kernel, pooled) in enumerate(plan):
        whole_number(out, "width")
        layers += [nn.Conv2d(channels, out, kernel, padding=kernel // 2), *_norm(norm, out), nn.ReLU()]
        channels, last = out, number == len(plan) - 1
        if pooled and min(height, width) >= (2 if last else 4):
            layers.append(nn.MaxPool2d(2))
            height, width = height // 2, width // 2
    layers.append(nn.Flatten())
    return Network(nn.Sequential(*layers), nn.Linear(channels * height * width, whole_number(num_classes, "num_classes")))


def _bounded(input_shape: Sequence[int]) -> tuple[int, int]:
    """(channels, shorter side) of images whose sides these networks take."""
    channels, height, width = image_shape(input_shape)
    if min(height, width) < SMALLEST or max(height, width) > LARGEST:
        raise InputError(
            f"images of {height}×{width} do not fit: sides from {SMALLEST} to {LARGEST} do.",
            where="input_shape",
            fix="Resize the images, or use 'convnet' with another depth.",
        )
    return channels, min(height, width)


def _block_widths(depth: int | None, width: int | None, widths: Sequence[int] | None) -> list[int]:
    if widths is None:
        return [whole_number(128 if width is None else width, "width")] * whole_number(3 if depth is None else depth, "depth")
    found = whole_numbers(widths, "widths")
    if width is not None:
        raise InputError("both 'width' and 'widths' are given.", where="widths", fix="Give one of them.")
    if not found or depth not in (None, len(found)):
        raise InputError(f"there are {len(found)} widths for a depth of {depth}.", where="widths", fix="Give one width a block.")
    return found


def _norm(norm: str, channels: int) -> list[nn.Module]:
    """The norm's layer for [B, channels, H, W], none for "none"."""
    if norm not in _NORMS:
        raise InputError(f"unknown norm '{norm}'.", where="norm", fix=suggestion(str(norm), _NORMS))
    if norm == "none":
        return []
    return [nn.GroupNorm(channels, channels) if norm == "instance" else nn.BatchNorm2d(channels)]
