"""The CIFAR ResNets of He et al. 2016 (arXiv 1512.03385, §4.2): 6n+2 layers, parameter-free "option A" shortcuts.

State dict keys: `conv1.weight, bn1.*, layer{1,2,3}.{i}.conv{1,2}.weight, layer{1,2,3}.{i}.bn{1,2}.*, linear.*`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from limbeck.errors import InputError
from limbeck.models.arguments import image_shape, whole_number

CIFAR = (3, 32, 32)


class BasicBlock(nn.Module):
    """relu(bn2(conv2(relu(bn1(conv1(x))))) + shortcut(x)); a stride of 2 halves the image and doubles the channels."""

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.stride, self.before = stride, (channels - channels_in) // 2
        self.after = channels - channels_in - self.before

    def forward(self, x: Tensor) -> Tensor:
        """[B, C_in, H, W] -> [B, C, ⌈H/stride⌉, ⌈W/stride⌉]."""
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        # Option A: every second pixel, zero channels half before and half after. One strided copy; the sum is no module's output, so relu may overwrite it.
        shortcut = x if self.stride == 1 else F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.before, self.after))
        return F.relu(out + shortcut, inplace=True)


class CifarResNet(nn.Module):
    """Three stages of n blocks with `width`, 2·`width` and 4·`width` channels, global average pool, `linear`."""

    def __init__(self, blocks: int, width: int, num_classes: int, channels_in: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.layer1 = _stage(width, width, blocks, stride=1)
        self.layer2 = _stage(width, 2 * width, blocks, stride=2)
        self.layer3 = _stage(2 * width, 4 * width, blocks, stride=2)
        self.linear = nn.Linear(4 * width, num_classes)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """He-normal convolutions (arXiv 1502.01852, eq. 10); norms and `linear` keep torch's own start."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")

    def features(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, 4·width], non-negative."""
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return x.mean((2, 3))

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> logits [B, num_classes]."""
        return self.linear(self.features(x))


def _stage(channels_in: int, channels: int, blocks: int, stride: int) -> nn.Sequential:
    rest = (BasicBlock(channels, channels, 1) for _ in range(blocks - 1))
    return nn.Sequential(BasicBlock(channels_in, channels, stride), *rest)


def resnet(depth: int, width: int = 16, num_classes: int = 10, input_shape: Sequence[int] = CIFAR) -> CifarResNet:
    """A CIFAR ResNet: inputs [B, C, H, W], logits [B, num_classes] (arXiv 1512.03385, §4.2).

    Args:
        depth: 6n + 2 layers. width: channels of the first stage (16 in the paper; 8 has about a quarter of the parameters).
        num_classes: width of the logits. input_shape: (channels, height, width).

    Raises:
        InputError: the depth is not 6n + 2, or an argument is not a positive whole number.
    """
    if whole_number(depth, "depth") < 8 or (depth - 2) % 6:
        raise InputError(f"a CIFAR ResNet has 6n + 2 layers, not {depth}.", where="depth", fix="Use 8, 14, 20, 32, 44, 56 or 110.")
    channels_in, _, _ = image_shape(input_shape)
    return CifarResNet((depth - 2) // 6, whole_number(width, "width"), whole_number(num_classes, "num_classes"), channels_in)


def resnet20(width: int = 16, num_classes: int = 10, input_shape: Sequence[int] = CIFAR) -> CifarResNet:
    """ResNet-20: 269,722 parameters at width 16 and 10 classes; see `resnet`."""
    return resnet(20, width, num_classes, input_shape)


def resnet32(width: int = 16, num_classes: int = 10, input_shape: Sequence[int] = CIFAR) -> CifarResNet:
    """ResNet-32: 464,154 parameters at width 16 and 10 classes; see `resnet`."""
    return resnet(32, width, num_classes, input_shape)


def resnet44(width: int = 16, num_classes: int = 10, input_shape: Sequence[int] = CIFAR) -> CifarResNet:
    """ResNet-44: 658,586 parameters at width 16 and 10 classes; see `resnet`."""
    return resnet(44, width, num_classes, input_shape)


def resnet56(width: int = 16, num_classes: int = 10, input_shape: Sequence[int] = CIFAR) -> CifarResNet:
    """ResNet-56: 853,018 parameters at width 16 and 10 classes; see `resnet`."""
    return resnet(56, width, num_classes, input_shape)


def resnet110(width: int = 16, num_classes: int = 10, input_shape: Sequence[int] = CIFAR) -> CifarResNet:
    """ResNet-110: 1,727,962 parameters at width 16 and 10 classes; see `resnet`."""
    return resnet(110, width, num_classes, input_shape)
