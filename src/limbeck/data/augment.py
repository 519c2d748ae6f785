"""Vectorised augmentation whose every choice is a pure function of (seed, epoch, sample id) (DESIGN §4).

B batch, C channels (as a suffix of targets: classes), H height, W width. Only operations that IEEE 754 rounds exactly are used (no exp, log, sin,
fused multiply-add), so a sample's bits depend neither on its place in the batch nor on the number of threads.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from pydantic import Field
from torch import Tensor

from limbeck import seeds
from limbeck.contract import IGNORE, Frozen
from limbeck.errors import InputError


class AugmentSpec(Frozen):
    """What is done to a training batch, in this order: crop, flip, noise, cutout, then mixup or cutmix.

    With both mixup and cutmix, each sample takes one of them with probability 1/2. Images take all of it, flat features only noise and mixup.
    """

    crop: int = Field(0, ge=0, le=256, description="pixels of zero padding around the image, before a random window of its own size is cut; 0: off")
    flip: bool = Field(False, description="mirror left to right with probability 1/2")
    noise: float = Field(0.0, ge=0, le=10, description="sd of Gaussian noise in units of the raw input (of uint8: of its range 255); 0: off")
    cutout: int = Field(0, ge=0, le=1024, description="side in pixels of a square set to 0 around a random pixel (arXiv 1708.04552); 0: off")
    mixup: float = Field(0.0, ge=0, le=100, description="alpha of lambda ~ Beta(alpha, alpha) (arXiv 1710.09412); 0: off")
    cutmix: float = Field(0.0, ge=0, le=100, description="alpha of lambda ~ Beta(alpha, alpha) (arXiv 1905.04899); 0: off")

    @property
    def mixes(self) -> bool:
        """Whether samples are mixed, and targets become soft."""
        return self.mixup > 0 or self.cutmix > 0


def augment(
    inputs: Tensor, targets: Tensor | None, ids_B: Tensor, *, spec: AugmentSpec, seed: int, epoch: int, num_classes: int
) -> tuple[Tensor, Tensor | None]:
    """Augment a batch: `transform` each sample, then `blend` it with its mate in this batch where the spec mixes.

    Args:
        inputs: [B, C, H, W] or [B, D], uint8 or float; the type stays. targets: [B] int64, [B, C], or None. ids_B: [B] int64.
        num_classes: width of the soft targets.

    Returns:
        inputs of the same shape and type; targets unchanged, or [B, C] float32 where the spec mixes (see `soft_targets`).

    Raises:
        InputError: the spec asks for image operations on inputs that are not [B, C, H, W].
    """
    inputs = transform(inputs, ids_B, spec=spec, seed=seed, epoch=epoch)
    if not spec.mixes:
        return inputs, targets
    mates_B = mates(ids_B, seed=seed, epoch=epoch)
    soft = None if targets is None else soft_targets(targets, num_classes)
    other = None if soft is None else soft.index_select(0, mates_B)
    return blend(inputs, inputs.index_select(0, mates_B), soft, other, ids_B, spec=spec, seed=seed, epoch=epoch)


def transform(inputs: Tensor, ids_B: Tensor, *, spec: AugmentSpec, seed: int, epoch: int) -> Tensor:
    """Crop, flip, noise and cutout: row b of the result depends on `inputs[b]`, `ids_B[b]`, seed and epoch alone.

    Shapes, types and errors as in `augment`.
    """
    _check_shape(inputs, spec)
    if spec.crop or spec.flip or spec.cutout:
        draw_B5 = seeds.uniform(ids_B, 5, seed, epoch, "geometry")
    if spec.crop:
        inputs = crop(inputs, _choice(draw_B5[:, 0], 2 * spec.crop + 1), _choice(draw_B5[:, 1], 2 * spec.crop + 1), spec.crop)
    if spec.flip:
        inputs = flip(inputs, draw_B5[:, 2] < 0.5)
    if spec.noise:
        inputs = noise(inputs, ids_B, sd=spec.noise, seed=seed, epoch=epoch)
    if spec.cutout:
        inputs = cutout(inputs, _choice(draw_B5[:, 3], inputs.shape[2]), _choice(draw_B5[:, 4], inputs.shape[3]), spec.cutout)
    return inputs


def mates(ids_B: Tensor, *, seed: int, epoch: int) -> Tensor:
    """The position in the batch of each sample's partner for mixing: the next one in a random ring.

    A function of the *set* of ids: which samples are mixed depends on who is in the batch, not on their order.

    Args:
        ids_B: [B] int64.

    Returns:
        [B] int64, a permutation without fixed points (for B > 1).
    """
    ring_B = seeds.uniform(ids_B, 1, seed, epoch, "mates")[:, 0].argsort(stable=True)
    return torch.empty_like(ring_B).scatter_(0, ring_B, ring_B.roll(-1))


def blend(
    inputs: Tensor, mate_inputs: Tensor, targets_BC: Tensor | None, mate_targets_BC: Tensor | None, ids_B: Tensor, *, spec: AugmentSpec, seed: int, epoch: int
) -> tuple[Tensor, Tensor | None]:
    """Mix each sample with its mate by mixup or cutmix, as the spec says; lambda and box are drawn a sample from (seed, epoch, id).

    Args:
        inputs, mate_inputs: [B, ...]. targets_BC, mate_targets_BC: soft targets, or None.

    Returns:
        inputs of the same shape and type; targets [B, C]: lambda times its own plus (1 - lambda) times its mate's.
    """
    _check_shape(inputs, spec)
    draw_B5 = seeds.uniform(ids_B, 5, seed, epoch, "mix")
    chance = 1.0 if not spec.mixup else 0.5 if spec.cutmix else 0.0
    cuts_B = draw_B5[:, 4] < chance
    lam_B = torch.ones_like(draw_B5[:, 0])
    if spec.mixup:
        lam_B = torch.where(cuts_B, 1.0, beta_quantile(draw_B5[:, 0], spec.mixup))
        inputs = mixup(inputs, mate_inputs, lam_B)
    if spec.cutmix:
        wanted_B = torch.where(cuts_B, beta_quantile(draw_B5[:, 1], spec.cutmix), 1.0)
        row_B, column_B = _choice(draw_B5[:, 2], inputs.shape[2]), _choice(draw_B5[:, 3], inputs.shape[3])
        inputs, kept_B = cutmix(inputs, mate_inputs, wanted_B, row_B, column_B)
        lam_B = lam_B * kept_B
    if targets_BC is None or mate_targets_BC is None:
        return inputs, None
    return inputs, mixup(targets_BC, mate_targets_BC, lam_B)


def soft_targets(targets: Tensor, num_classes: int) -> Tensor:
    """[B] class numbers as [B, C] float32 one-hot rows; an unlabelled row is all zero, so that soft cross-entropy passes over it.

    In a mixture of a labelled and an unlabelled sample the row sums to the labelled one's share. [B, C] soft targets are returned as they are.

    Raises:
        InputError: `num_classes` is not above every target.
    """
    if targets.dim() == 2:
        return targets
    if len(targets) and int(targets.max()) >= num_classes:
        raise InputError(f"a target is {int(targets.max())}, and there are {num_classes} classes.", where="num_classes")
    known_B = targets != IGNORE
    return torch.zeros(len(targets), num_classes).scatter_(1, targets.clamp(min=0)[:, None], known_B.to(torch.float32)[:, None])


def crop(inputs_BCHW: Tensor, top_B: Tensor, left_B: Tensor, padding: int) -> Tensor:
    """A window of the image's own size out of the image with `padding` zero pixels on every side.

    Args:
        inputs_BCHW: any type. top_B, left_B: [B] int64 in [0, 2 * padding], the window's corner in the padded image; `padding` gives the image itself.

    Returns:
        [B, C, H, W].
    """
    B, C, H, W = inputs_BCHW.shape
    HP, WP = H + 2 * padding, W + 2 * padding
    padded = inputs_BCHW.new_zeros(B, C, HP, WP)
    padded[:, :, padding : padding + H, padding : padding + W] = inputs_BCHW
    # Every run of W neighbours in memory, as rows of one overlapping view: the window is a choice of rows, copied row by row.
    rows = padded.view(-1).as_strided((padded.numel() - W + 1, W), (1, 1))
    corner_B = torch.arange(B, device=padded.device) * (C * HP * WP) + top_B * WP + left_B
    within_CH = torch.arange(C, device=padded.device)[:, None] * (HP * WP) + torch.arange(H, device=padded.device) * WP
    return rows.index_select(0, (corner_B[:, None, None] + within_CH).view(-1)).view(B, C, H, W)


def flip(inputs_BCHW: Tensor, flipped_B: Tensor) -> Tensor:
    """Mirror left to right the images where `flipped_B` ([B] bool) holds; returns a new [B, C, H, W]."""
    chosen = flipped_B.nonzero()[:, 0]
    return inputs_BCHW.index_copy(0, chosen, inputs_BCHW.index_select(0, chosen).flip(3))


def cutout(inputs_BCHW: Tensor, row_B: Tensor, column_B: Tensor, size: int) -> Tensor:
    """Set to 0 a square of `size` pixels around (row, column), clipped at the border (arXiv 1708.04552 §3.1; there the data's mean is 0).

    Args:
        inputs_BCHW: any type. row_B, column_B: [B] int64, the centre: rows `row - size // 2` to `row - size // 2 + size - 1`.

    Returns:
        [B, C, H, W].
    """
    side_B = torch.full_like(row_B, size)
    return inputs_BCHW.masked_fill(_box(inputs_BCHW, row_B, column_B, side_B, side_B), 0)


def noise(inputs: Tensor, ids_B: Tensor, *, sd: float, seed: int, epoch: int) -> Tensor:
    """Add Gaussian noise of standard deviation `sd` (of uint8: sd * 255, rounded and clamped to 0..255), drawn from (seed, epoch, id).

    A deviate is one of 65,536 equally likely quantiles, at most 4.3 in size.
    """
    size = inputs[0].numel()
    word_BK = (seeds.uniform(ids_B, -(-size // 3), seed, epoch, "noise") * 2.0**48).to(torch.int64)
    level_BN = torch.stack([(word_BK >> shift) & 0xFFFF for shift in (0, 16, 32)], 2).flatten(1)[:, :size]
    deviate = _normal_quantiles()[level_BN].view(inputs.shape)
    if inputs.dtype != torch.uint8:
        return inputs + deviate * sd
    return (inputs + deviate * (255 * sd)).round_().clamp_(0, 255).to(torch.uint8)


def mixup(inputs: Tensor, mates: Tensor, lam_B: Tensor) -> Tensor:
    """lambda * inputs + (1 - lambda) * mates (arXiv 1710.09412 §2), each [B, ...]; of uint8 the nearest integer.

    Args:
        lam_B: [B] floats in [0, 1]; 1 returns the inputs' values unchanged.
    """
    lam = lam_B.view(-1, *[1] * (inputs.dim() - 1))
    mixed = inputs * lam.to(torch.float32) + mates * (1 - lam).to(torch.float32)
    return mixed.round_().to(torch.uint8) if inputs.dtype == torch.uint8 else mixed


def cutmix(inputs_BCHW: Tensor, mates_BCHW: Tensor, lam_B: Tensor, row_B: Tensor, column_B: Tensor) -> tuple[Tensor, Tensor]:
    """Paste a box of the mate's pixels, the share 1 - lambda of the area, around (row, column), clipped at the border (arXiv 1905.04899 eq. 1-2).

    Args:
        lam_B: [B] floats in [0, 1]; 1 returns the inputs unchanged. row_B, column_B: [B] int64, the box's centre.

    Returns:
        [B, C, H, W]; and [B] the share of the area that the inputs really keep.
    """
    H, W = inputs_BCHW.shape[2:]
    side_B = (1 - lam_B).sqrt()
    box_B1HW = _box(inputs_BCHW, row_B, column_B, (H * side_B).to(torch.int64), (W * side_B).to(torch.int64))
    return torch.where(box_B1HW, mates_BCHW, inputs_BCHW), 1 - box_B1HW.sum((1, 2, 3)).to(lam_B.dtype) / (H * W)


def beta_quantile(u_B: Tensor, alpha: float) -> Tensor:
    """Uniform numbers in [0, 1) ([B] float64) to numbers distributed as Beta(alpha, alpha), by the inverse of its distribution function."""
    from scipy.special import betaincinv

    return torch.from_numpy(betaincinv(alpha, alpha, u_B.numpy()))


def _box(inputs_BCHW: Tensor, row_B: Tensor, column_B: Tensor, height_B: Tensor, width_B: Tensor) -> Tensor:
    """[B, 1, H, W] bool: the box of that height and width around (row, column), inside the image."""

    def inside(centre_B: Tensor, side_B: Tensor, length: int) -> Tensor:
        offset = torch.arange(length, device=centre_B.device)[None, :] - (centre_B - side_B // 2)[:, None]
        return (offset >= 0) & (offset < side_B[:, None])

    H, W = inputs_BCHW.shape[2:]
    return (inside(row_B, height_B, H)[:, :, None] & inside(column_B, width_B, W)[:, None, :])[:, None]


def _choice(u_B: Tensor, count: int) -> Tensor:
    """Uniform numbers in [0, 1) to integers in [0, count)."""
    return (u_B * count).to(torch.int64)


@lru_cache(maxsize=1)
def _normal_quantiles() -> Tensor:
    levels = (torch.arange(65536, dtype=torch.float64) + 0.5) / 65536
    return torch.special.ndtri(levels).to(torch.float32)


def _check_shape(inputs: Tensor, spec: AugmentSpec) -> None:
    if inputs.dtype == torch.int64 and spec != AugmentSpec():
        raise InputError("rows of tokens are not augmented.", where="", fix="Leave out data.augment.")
    if inputs.dim() == 4:
        return
    asked = next((name for name in ("crop", "flip", "cutout", "cutmix") if getattr(spec, name)), None)
    if asked is not None:
        raise InputError(f"'{asked}' needs images, these inputs have the shape {list(inputs.shape)[1:]}.", where=asked, fix="Use noise or mixup.")
