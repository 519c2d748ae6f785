"""The networks F(x, time, cond) of all diffusion methods: a perceptron for points and small flattened images, a small U-Net for images.

They know no noise schedule and no preconditioning: `time` is what a schedule gives as its network input (ln(σ)/4 for EDM, 1000·t for flow and VP).
Features come from named places (`taps`); asking for features alone runs nothing deeper than the deepest place asked for.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from limbeck.errors import InputError, suggestion
from limbeck.models.arguments import image_shape, truth, whole_number, whole_numbers

Embedding = Literal["smooth", "fourier", "positional"]
"""How `time` becomes features; see `TimeFeatures`."""

OUTPUT = "output"
"""The name under which `DenoisingNetwork.stages` gives the prediction; no tap has it."""


class TimeFeatures(nn.Module):
    """sin(ω_k·time), cos(ω_k·time) for K frequencies: time [B] -> [B, 2K], in the dtype of the frequencies.

    - `smooth`: K values evenly from π/4 (once round in 8 units) to 2π (once a unit), for any K: |∂/∂time| ≤ 2π.
      Meant for ln(σ)/4, about −1.55 to 1.1; consistency training needs it (sheet `ict`: "low-frequency features of ¼ ln σ"; the spacing is ours).
    - `fourier`: ω_k = 2π·scale·N(0, 1), drawn once and saved with the weights (arXiv 2006.10739; EDM and NCSN++ take scale 16).
    - `positional`: ω_k = 10000^(−k/K), k = 0..K−1, for times of 0 to 1000 (arXiv 1706.03762, §3.5).

    Raises:
        InputError: the embedding is unknown; the count is no positive whole number; the scale is not positive, or set where it has no meaning.
    """

    frequencies: Tensor
    phases: Tensor

    def __init__(self, count: int, embedding: Embedding, scale: float = 1.0) -> None:
        super().__init__()
        if embedding not in get_args(Embedding):
            raise InputError(f"unknown embedding '{embedding}'.", where="embedding", fix=suggestion(embedding, get_args(Embedding)))
        if isinstance(scale, bool) or not isinstance(scale, (int, float)) or not 0 < scale < math.inf:
            raise InputError(f"{scale!r} is not a positive number.", where="fourier_scale")
        if scale != 1.0 and embedding != "fourier":
            raise InputError(f"the embedding '{embedding}' has no scale.", where="fourier_scale", fix="Leave it out, or take embedding: fourier.")
        self.count, self.embedding, self.scale = whole_number(count, "time_frequencies"), embedding, float(scale)
        self.register_buffer("frequencies", torch.empty(2 * count), persistent=embedding == "fourier")
        self.register_buffer("phases", torch.tensor([0.0, math.pi / 2]).repeat_interleave(count), persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the frequencies; `fourier` draws new ones from torch's global generator."""
        if self.embedding == "fourier":
            half = 2 * math.pi * self.scale * torch.randn(self.count)
        elif self.embedding == "smooth":
            half = torch.linspace(math.pi / 4, 2 * math.pi, self.count)
        else:
            half = torch.exp(-math.log(10_000) / self.count * torch.arange(self.count))
        with torch.no_grad():
            self.frequencies.copy_(half.repeat(2))

    def forward(self, time: Tensor) -> Tensor:
        """Time [B], [1] or [] -> [B or 1, 2K]; sines first."""
        return torch.addcmul(self.phases, time.to(self.frequencies.dtype).reshape(-1, 1), self.frequencies).sin()


class DenoisingNetwork(nn.Module, ABC):
    """F(x, time, cond), the raw network inside a denoiser.

    Attributes:
        shape: of one input, without the batch.
        num_classes: labels are 0..num_classes−1, and num_classes itself is the null class; 0: the network takes no condition.
    """

    def __init__(self, shape: Sequence[int], num_classes: int) -> None:
        super().__init__()
        self.shape = tuple(whole_numbers(shape, "shape"))
        if not self.shape:
            raise InputError("the inputs have no dimension.", where="shape", fix="Give at least one, such as [2].")
        self.num_classes = whole_number(num_classes, "num_classes", least=0)

    @property
    @abstractmethod
    def taps(self) -> Mapping[str, int]:
        """The places whose features can be read, in the order of computation, and their channels (axis 1 of the feature)."""

    @abstractmethod
    def stages(self, x: Tensor, time: Tensor, cond: Tensor | None) -> Iterator[tuple[str, Tensor]]:
        """The taps one after another, each computed when it is asked for, and last (`OUTPUT`, the prediction [B, *shape])."""

    def forward(self, x: Tensor, time: Tensor, cond: Tensor | None = None) -> Tensor:
        """The prediction, of x's shape.

        Args:
            x: [B, *shape]. time: [B] (or [] for one time for all), any float dtype.
            cond: labels [B], int64, num_classes for null; None: null for all.

        Raises:
            InputError: x has another shape, or a condition goes to a network without classes.
        """
        return self.forward_with(x, time, cond, ())[0]

    def features(self, x: Tensor, time: Tensor, cond: Tensor | None, taps: Sequence[str]) -> dict[str, Tensor]:
        """The features at `taps`, [B, channels, …] each; no layer beyond the deepest of them runs.

        Arguments as in `forward`. Time and class enter all layers by one matrix product, which is not cut.

        Raises:
            InputError: as `forward`; or there is no such tap.
        """
        wanted = self._checked(x, cond, taps)
        found: dict[str, Tensor] = {}
        if wanted:
            for name, value in self.stages(x, time, cond):
                if name in wanted:
                    found[name] = value
                    if len(found) == len(wanted):
                        break
        return found

    def forward_with(self, x: Tensor, time: Tensor, cond: Tensor | None, taps: Sequence[str]) -> tuple[Tensor, dict[str, Tensor]]:
        """The prediction and the features at `taps` from one pass; see `forward` and `features`.

        Raises:
            InputError: as `features`.
        """
        wanted = self._checked(x, cond, taps)
        found: dict[str, Tensor] = {}
        value = x
        for name, value in self.stages(x, time, cond):
            if name in wanted:
                found[name] = value
        return value, found

    def forward_to_taps(self, x: Tensor, time: Tensor, cond: Tensor | None, taps: Sequence[str]) -> tuple[Tensor, dict[str, Tensor]]:
        """As `forward_with`, with gradient to the features alone: what lies deeper than the last of the taps makes no graph.

        Raises:
            InputError: as `features`.
        """
        wanted = self._checked(x, cond, taps)
        found: dict[str, Tensor] = {}
        value, stages = x, self.stages(x, time, cond)
        while True:
            with torch.set_grad_enabled(torch.is_grad_enabled() and len(found) < len(wanted)):
                stage = next(stages, None)
            if stage is None:
                return value, found
            name, value = stage
            if name in wanted:
                found[name] = value

    def _checked(self, x: Tensor, cond: Tensor | None, taps: Sequence[str]) -> set[str]:
        if x.shape[1:] != self.shape:
            raise InputError(f"inputs of shape {tuple(x.shape[1:])}, but this network is built for {self.shape}.", where="x", fix="Set the network's 'shape'.")
        if cond is not None and not self.num_classes:
            raise InputError("this network has no classes, but got labels.", where="cond", fix="Set its 'num_classes', or pass cond=None.")
        wanted = {taps} if isinstance(taps, str) else set(taps)
        if unknown := wanted and wanted - self.taps.keys():
            word = min(unknown)
            raise InputError(f"{type(self).__name__} has no tap '{word}'.", where="taps", fix=suggestion(word, self.taps))
        return wanted


def _class_table(num_classes: int, dim: int) -> nn.Embedding | None:
    """One row a class and one, the last, for null; nothing where there are no classes."""
    return nn.Embedding(num_classes + 1, dim) if num_classes else None


def _with_class(embedded: Tensor, table: nn.Embedding | None, cond: Tensor | None) -> Tensor:
    """Add the class rows: [B or 1, D] -> [B or 1, D]."""
    if table is None:
        return embedded
    return embedded + (table.weight[-1] if cond is None else table(cond))


def _probability(value: float, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1:
        raise InputError(f"{value!r} is not a probability below 1.", where=name)
    return float(value)


class MLPNetwork(DenoisingNetwork):
    """A perceptron for points and small flattened images: h_i = SiLU(W_i h_{i−1} + E_i time features + class row), linear head.

    Ours throughout. Time and class enter every hidden layer by addition before the SiLU; one matrix product serves all layers (the E_i are stacked).

    Args:
        shape: of one input, any rank ≥ 1; flattened inside. widths: of the hidden layers, at least one.
        num_classes: see `DenoisingNetwork`. dropout: after every hidden layer.
        time_frequencies, embedding, fourier_scale: see `TimeFeatures`.
        residual: add h_{i−1} to h_i where the widths agree.
        zero_output: start with a head of zeros, so that the fresh network answers 0.

    Taps `hidden1`, `hidden2`, … [B, width], and `bottleneck`, another name for the last of them.

    Raises:
        InputError: an argument is out of range; `where` names it.
    """

    def __init__(
        self,
        shape: Sequence[int] = (2,),
        widths: Sequence[int] = (128, 128, 128),
        *,
        num_classes: int = 0,
        dropout: float = 0.0,
        time_frequencies: int = 8,
        embedding: Embedding = "smooth",
        fourier_scale: float = 1.0,
        residual: bool = False,
        zero_output: bool = True,
    ) -> None:
        super().__init__(shape, num_classes)
        self.widths = whole_numbers(widths, "widths")
        if not self.widths:
            raise InputError("there is no hidden layer.", where="widths", fix="Give at least one, such as [128].")
        self.residual, self.zero_output = truth(residual, "residual"), truth(zero_output, "zero_output")
        dim = math.prod(self.shape)
        self.time = TimeFeatures(time_frequencies, embedding, fourier_scale)
        self.embed = nn.Linear(2 * self.time.count, sum(self.widths))  # its bias is the hidden layers' bias
        self.classes = _class_table(self.num_classes, sum(self.widths))
        self.hidden = nn.ModuleList(nn.Linear(before, after, bias=False) for before, after in zip([dim, *self.widths], self.widths, strict=False))
        self.dropout = nn.Dropout(_probability(dropout, "dropout"))
        self.head = nn.Linear(self.widths[-1], dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Kaiming-normal hidden layers (arXiv 1502.01852), the head zero if asked for; the rest keeps torch's own start."""
        for layer in self.hidden:
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")  # type: ignore[arg-type]
        if self.zero_output:
            _set_to_zero(self.head)

    @property
    def taps(self) -> Mapping[str, int]:
        """`hidden1`, …, and `bottleneck` for the last one."""
        return {f"hidden{i}": width for i, width in enumerate(self.widths, 1)} | {"bottleneck": self.widths[-1]}

    def stages(self, x: Tensor, time: Tensor, cond: Tensor | None) -> Iterator[tuple[str, Tensor]]:
        """See `DenoisingNetwork.stages`."""
        h = x.flatten(1)
        shifts = _with_class(self.embed(self.time(time)), self.classes, cond).split(self.widths, dim=1)
        for i, (layer, shift) in enumerate(zip(self.hidden, shifts, strict=True), 1):
            out = F.silu(layer(h) + shift)
            if self.dropout.p:
                out = self.dropout(out)
            h = h + out if self.residual and h.shape == out.shape else out
            yield f"hidden{i}", h
        yield "bottleneck", h
        yield OUTPUT, self.head(h).view(x.shape)


def _set_to_zero(layer: nn.Module) -> None:
    for weight in layer.parameters():
        nn.init.zeros_(weight)


def _groups(channels: int) -> int:
    """Groups of a norm: at least four channels each, at most 32 groups, dividing the channels (EDM's rule, made to divide)."""
    return next(g for g in range(min(32, max(1, channels // 4)), 0, -1) if channels % g == 0)


class ResidualBlock(nn.Module):
    """(shortcut(x) + conv(drop(SiLU((1 + scale)·norm(conv(SiLU(norm(x)))) + shift))))/√2, the block of EDM's U-Net (arXiv 2206.00364, adaptive scale)."""

    def __init__(self, channels_in: int, channels: int, dropout: float) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(_groups(channels_in), channels_in)
        self.conv1 = nn.Conv2d(channels_in, channels, 3, padding=1)
        self.norm2 = nn.GroupNorm(_groups(channels), channels, affine=False)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.shortcut = nn.Conv2d(channels_in, channels, 1) if channels_in != channels else nn.Identity()

    def forward(self, x: Tensor, scale_shift: Tensor) -> Tensor:
        """x [B, C_in, H, W], scale_shift [B or 1, 2C] (scale first) -> [B, C, H, W]."""
        scale, shift = scale_shift[:, :, None, None].chunk(2, dim=1)
        h = self.conv1(F.silu(self.norm1(x)))
        h = F.silu(torch.addcmul(shift, self.norm2(h), 1 + scale))
        if self.dropout.p:
            h = self.dropout(h)
        return (self.conv2(h) + self.shortcut(x)) * math.sqrt(0.5)


class AttentionBlock(nn.Module):
    """(x + proj(softmax(qᵀk/√C)·v))/√2 over the pixels, one head, after a norm."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(_groups(channels), channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.proj = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> the same."""
        q, k, v = self.qkv(self.norm(x)).flatten(2).chunk(3, dim=1)
        weights = torch.softmax(q.transpose(1, 2) @ k * q.shape[1] ** -0.5, dim=-1)
        return (x + self.proj((v @ weights.transpose(1, 2)).view(x.shape))) * math.sqrt(0.5)


class UNetNetwork(DenoisingNetwork):
    """A small U-Net for images in the style of EDM's (arXiv 2206.00364): residual blocks with adaptive scale and shift, skips, attention low down.

    Ours: the number of blocks; one skip a block, added (times 1/√2) where EDM concatenates (loss on 8×8 digits 0.5% higher, a step a sixth faster on a CPU);
    average pooling and nearest neighbours to resample, a 1×1 convolution before going up; class rows added to the time embedding.
    Sides need not be even: a side of 7 becomes 4 and goes back to 7.

    Args:
        shape: (channels, height, width) of one image. width: channels of the first level. multipliers: channels of each level over `width`.
        blocks: residual blocks a level, on the way down and again on the way up.
        num_classes: see `DenoisingNetwork`. dropout: inside every residual block.
        attention: heights of the levels that attend after every block, such as [7] for 14×14 images and two levels (the lowest also in the middle);
            None: only the middle, which is much cheaper; []: none.
        time_frequencies, embedding, fourier_scale: see `TimeFeatures`.
        zero_output: start with a last convolution of zeros, so that the fresh network answers 0.

    Taps `down1`, … (the finest level first, before it is halved), `bottleneck`, `up1`, … (the coarsest first), [B, channels, height, width] each.

    Raises:
        InputError: an argument is out of range; `where` names it.
    """

    def __init__(
        self,
        shape: Sequence[int] = (1, 14, 14),
        *,
        width: int = 32,
        multipliers: Sequence[int] = (1, 2),
        blocks: int = 1,
        num_classes: int = 0,
        dropout: float = 0.0,
        attention: Sequence[int] | None = None,
        time_frequencies: int = 8,
        embedding: Embedding = "smooth",
        fourier_scale: float = 1.0,
        zero_output: bool = True,
    ) -> None:
        super().__init__(shape, num_classes)
        colours, *sides = _image(self.shape)
        self.channels = [whole_number(width, "width") * times for times in whole_numbers(multipliers, "multipliers")]
        heights = self._heights(sides)
        attends = set() if attention is None else set(whole_numbers(attention, "attention"))
        if strange := attends - set(heights):
            raise InputError(f"no level has height {min(strange)}.", where="attention", fix=f"The levels have {', '.join(map(str, heights))}.")
        self.zero_output = truth(zero_output, "zero_output")
        dropout, blocks, dim = _probability(dropout, "dropout"), whole_number(blocks, "blocks"), 4 * width

        self.time = TimeFeatures(time_frequencies, embedding, fourier_scale)
        self.embed = nn.Sequential(nn.Linear(2 * self.time.count, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.classes = _class_table(self.num_classes, dim)
        self.entry = nn.Conv2d(colours, self.channels[0], 3, padding=1)
        self.down, self.up, self.narrow = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        before = self.channels[0]
        for channels, height in zip(self.channels, heights, strict=True):
            self.down.append(_Level([before] + [channels] * (blocks - 1), channels, dropout, height in attends))
            before = channels
        self.middle = _Level([before], before, dropout, attention is None or heights[-1] in attends)
        for channels, height in zip(reversed(self.channels), reversed(heights), strict=True):
            self.narrow.append(nn.Conv2d(before, channels, 1) if before != channels else nn.Identity())
            self.up.append(_Level([channels] * blocks, channels, dropout, height in attends))
            before = channels
        levels: list[_Level] = [*self.down, self.middle, *self.up]
        self.sizes = [2 * level.channels * len(level.blocks) for level in levels]
        self.adapt = nn.Linear(dim, sum(self.sizes))
        self.norm = nn.GroupNorm(_groups(before), before)
        self.head = nn.Conv2d(before, colours, 3, padding=1)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The last convolution zero if asked for; the rest keeps torch's own start."""
        if self.zero_output:
            _set_to_zero(self.head)

    def _heights(self, sides: Sequence[int]) -> list[int]:
        """The height of every level; each is half of the one above, rounded up."""
        if not self.channels:
            raise InputError("there is no level.", where="multipliers", fix="Give at least one, such as [1, 2].")
        if min(sides) < 2 ** (len(self.channels) - 1):
            raise InputError(f"images of {sides[0]}×{sides[1]} cannot be halved {len(self.channels) - 1} times.", where="multipliers", fix="Use fewer levels.")
        return [-(-sides[0] // 2**level) for level in range(len(self.channels))]

    @property
    def taps(self) -> Mapping[str, int]:
        """`down1`, …, `bottleneck`, `up1`, …"""
        down = {f"down{i}": channels for i, channels in enumerate(self.channels, 1)}
        return down | {"bottleneck": self.channels[-1]} | {f"up{i}": channels for i, channels in enumerate(reversed(self.channels), 1)}

    def stages(self, x: Tensor, time: Tensor, cond: Tensor | None) -> Iterator[tuple[str, Tensor]]:
        """See `DenoisingNetwork.stages`."""
        embedded = _with_class(self.embed(self.time(time)), self.classes, cond)
        adapt = iter(self.adapt(F.silu(embedded)).split(self.sizes, dim=1))
        h, skips = self.entry(x), []
        for i, level in enumerate(self.down):
            h = h if i == 0 else F.avg_pool2d(h, 2, ceil_mode=True)
            outputs = level(h, next(adapt), None)
            skips.append(outputs)
            h = outputs[-1]
            yield f"down{i + 1}", h
        h = self.middle(h, next(adapt), None)[-1]
        yield "bottleneck", h
        for i, (level, narrow) in enumerate(zip(self.up, self.narrow, strict=True)):
            kept = skips.pop()
            h = F.interpolate(narrow(h), size=kept[0].shape[2:], mode="nearest")
            h = level(h, next(adapt), kept)[-1]
            yield f"up{i + 1}", h
        yield OUTPUT, self.head(F.silu(self.norm(h)))


class _Level(nn.Module):
    """The residual blocks of one resolution, each followed by attention where the level attends."""

    def __init__(self, channels_in: Sequence[int], channels: int, dropout: float, attends: bool) -> None:
        super().__init__()
        self.channels = channels
        self.blocks = nn.ModuleList(ResidualBlock(before, channels, dropout) for before in channels_in)
        self.attention = nn.ModuleList(AttentionBlock(channels) for _ in channels_in if attends)

    def forward(self, h: Tensor, scale_shift: Tensor, skips: list[Tensor] | None) -> list[Tensor]:
        """The output of every block; the last of `skips`, on the way up, goes to the first block, and so on."""
        outputs = []
        for i, (block, adapt) in enumerate(zip(self.blocks, scale_shift.chunk(len(self.blocks), dim=1), strict=True)):
            h = block(h if skips is None else (h + skips[-1 - i]) * math.sqrt(0.5), adapt)
            h = self.attention[i](h) if len(self.attention) else h
            outputs.append(h)
        return outputs


def _image(shape: Sequence[int]) -> tuple[int, int, int]:
    """(channels, height, width)."""
    if len(shape) != 3:
        raise InputError(f"a U-Net takes images (channels, height, width), not inputs of shape {tuple(shape)}.", where="shape", fix="Use 'MLPNetwork'.")
    return image_shape(shape)
