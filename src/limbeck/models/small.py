"""Small networks: a perceptron, plain CNNs, the ConvNet-3 of data-set distillation. Each is `head(features(x))`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

from torch import Tensor, nn

from limbeck.errors import InputError, suggestion
from limbeck.models.arguments import image_shape, truth, whole_number, whole_numbers

_ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "gelu": nn.GELU, "silu": nn.SiLU, "tanh": nn.Tanh}


class Network(nn.Module):
    """Features and a linear head: x [B, ...] -> `features` φ(x) [B, d] -> `head` logits [B, C]."""

    def __init__(self, features: nn.Sequential, head: nn.Linear) -> None:
        super().__init__()
        self.features, self.head = features, head

    def forward(self, x: Tensor) -> Tensor:
        """[B, *input_shape] -> logits [B, C]."""
        return self.head(self.features(x))


def mlp(hidden: Sequence[int], num_classes: int, input_shape: Sequence[int], activation: Literal["relu", "gelu", "silu", "tanh"] = "relu") -> Network:
    """A perceptron that flattens its inputs: [B, *input_shape] -> logits [B, num_classes].

    Args:
        hidden: widths of the hidden layers; [] makes a linear classifier.
        num_classes: width of the logits. input_shape: shape of one input, of any rank ≥ 1.
        activation: after each hidden layer.

    Raises:
        InputError: a width or side is not a positive whole number, or the activation is unknown.
    """
    if activation not in _ACTIVATIONS:
        raise InputError(f"unknown activation '{activation}'.", where="activation", fix=suggestion(activation, _ACTIVATIONS))
    sides = whole_numbers(input_shape, "input_shape")
    if not sides:
        raise InputError("the inputs have no dimension.", where="input_shape", fix="Give at least one, such as [64].")
    widths = [math.prod(sides), *whole_numbers(hidden, "hidden")]
    layers: list[nn.Module] = [nn.Flatten()]
    for before, width in pairwise(widths):
        layers += [nn.Linear(before, width), _ACTIVATIONS[activation]()]
    return Network(nn.Sequential(*layers), nn.Linear(widths[-1], whole_number(num_classes, "num_classes")))


def cnn(widths: Sequence[int], num_classes: int, input_shape: Sequence[int], hidden: int = 0, batch_norm: bool = True) -> Network:
    """A plain CNN for images such as Fashion-MNIST: [B, C, H, W] -> logits [B, num_classes].

    Each block is a 3×3 convolution, batch norm, ReLU and 2×2 max pooling; then everything is flattened.

    Args:
        widths: channels of the blocks. num_classes: width of the logits. input_shape: (channels, height, width).
        hidden: width of a hidden linear layer with ReLU before the head; 0: none.
        batch_norm: False leaves the norms out and gives the convolutions a bias.

    Raises:
        InputError: the inputs are not images, or too small to be halved once a block.
    """
    channels, height, width = image_shape(input_shape)
    wide = whole_numbers(widths, "widths")
    _must_halve(height, width, len(wide), "widths")
    layers: list[nn.Module] = []
    truth(batch_norm, "batch_norm")
    for out in wide:
        layers.append(nn.Conv2d(channels, out, 3, padding=1, bias=not batch_norm))
        layers += [nn.BatchNorm2d(out)] if batch_norm else []
        layers += [nn.ReLU(), nn.MaxPool2d(2)]
        channels = out
    dim = channels * (height >> len(wide)) * (width >> len(wide))
    layers.append(nn.Flatten())
    if whole_number(hidden, "hidden", least=0):
        layers += [nn.Linear(dim, hidden), nn.ReLU()]
        dim = hidden
    return Network(nn.Sequential(*layers), nn.Linear(dim, whole_number(num_classes, "num_classes")))


def convnet3(num_classes: int, input_shape: Sequence[int], width: int = 128) -> Network:
    """ConvNet-3, the network of data-set distillation: [B, C, H, W] -> logits [B, num_classes].

    Three times: 3×3 convolution with bias, instance norm with affine, ReLU, 2×2 average pooling; then flatten and a linear head.
    One-channel images are padded by 3 in the first convolution, so that 28×28 behaves as 32×32 (arXiv 2203.11932's code; sheet `ftd`).

    Args:
        num_classes: width of the logits. input_shape: (channels, height, width). width: channels of every block.

    Raises:
        InputError: the inputs are not images, or too small to be halved three times.
    """
    channels, height, breadth = image_shape(input_shape)
    width = whole_number(width, "width")
    padding = 3 if channels == 1 else 1
    height, breadth = height + 2 * padding - 2, breadth + 2 * padding - 2
    _must_halve(height, breadth, 3, "input_shape")
    layers: list[nn.Module] = []
    for _ in range(3):
        layers += [nn.Conv2d(channels, width, 3, padding=padding), nn.GroupNorm(width, width), nn.ReLU(), nn.AvgPool2d(2)]
        channels, padding = width, 1
    layers.append(nn.Flatten())
    return Network(nn.Sequential(*layers), nn.Linear(width * (height >> 3) * (breadth >> 3), whole_number(num_classes, "num_classes")))


def feature_cnn(num_classes: int, input_shape: Sequence[int], width: int = 32, dim: int = 64) -> Network:
    """Two convolutions, global average pooling, a head without bias: [B, C, H, W] -> logits [B, num_classes].

    `features` gives φ(x) ≥ 0 of width `dim`, as weight alignment needs (arXiv 1911.07053).

    Args:
        num_classes: width of the logits. input_shape: (channels, height, width).
        width: channels of the first convolution (5×5, ReLU, 4×4 max pooling). dim: channels of the second (5×5, ReLU), the d of φ(x) ∈ R^d.

    Raises:
        InputError: the inputs are not images of at least 4×4.
    """
    channels, height, breadth = image_shape(input_shape)
    _must_halve(height, breadth, 2, "input_shape")
    width, dim = whole_number(width, "width"), whole_number(dim, "dim")
    features = nn.Sequential(
        nn.Conv2d(channels, width, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(4),
        nn.Conv2d(width, dim, 5, padding=2),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )
    return Network(features, nn.Linear(dim, whole_number(num_classes, "num_classes"), bias=False))


def _must_halve(height: int, width: int, times: int, where: str) -> None:
    """Refuse images with fewer than 2**times pixels a side."""
    if min(height, width) >> times < 1:
        raise InputError(f"images of {height}×{width} cannot be halved {times} times.", where=where, fix="Use fewer blocks or larger images.")
