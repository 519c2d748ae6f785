"""Discriminators on noised inputs: heads on a denoiser's features, or a network of their own; and the losses (arXiv 2405.14867, §4.3).

Logits [B, H], H heads; ℓ > 0 says real. The optimum is ℓ = log p_real(x_t) − log p_fake(x_t).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from limbeck.errors import InputError


def _norm(channels: int) -> nn.Module:
    """A group norm of 16 channels or more a group (official: 32 groups of 24 or 40): one of few channels makes a 1×1 map a constant."""
    if channels < 4:
        return nn.Identity()
    return nn.GroupNorm(next(g for g in range(min(32, max(1, channels // 16)), 0, -1) if channels % g == 0), channels)


class MapHead(nn.Module):
    """One logit of a feature map [B, C, H, W], as the official head, for any size.

    4×4 convolutions of stride 2 until 4 or fewer are left a side, one over all that is left, each with GroupNorm and SiLU, and a 1×1 convolution.
    """

    def __init__(self, channels: int, side: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        while side > 4:
            layers += [nn.Conv2d(channels, channels, 4, 2, 1), _norm(channels), nn.SiLU()]
            side //= 2
        layers += [nn.Conv2d(channels, channels, side), _norm(channels), nn.SiLU(), nn.Conv2d(channels, 1, 1)]
        self.layers = nn.Sequential(*layers)

    def forward(self, features: Tensor) -> Tensor:
        """[B, C, H, W] → [B]."""
        return self.layers(features).flatten(1).mean(1)


class VectorHead(nn.Module):
    """One logit of a feature vector [B, D]: two layers."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 1))

    def forward(self, features: Tensor) -> Tensor:
        """[B, D] → [B]."""
        return self.layers(features)[:, 0]


class Heads(nn.Module):
    """One head a tap. shapes: tap → shape of one sample's feature ([D] or [C, H, W]).

    Raises:
        InputError: a feature is neither a vector nor a square-ish map, or there is none.
    """

    def __init__(self, shapes: Mapping[str, Sequence[int]]) -> None:
        super().__init__()
        self.taps = tuple(shapes)
        if not self.taps:
            raise InputError("a discriminator needs at least one feature.", where="method.taps")
        self.heads = nn.ModuleDict()
        for tap, shape in shapes.items():
            if len(shape) == 1:
                self.heads[tap] = VectorHead(shape[0])
            elif len(shape) == 3:
                self.heads[tap] = MapHead(shape[0], min(shape[1:]))
            else:
                raise InputError(f"the feature '{tap}' has the shape {list(shape)}; a head takes [D] or [C, H, W].", where="method.taps")

    def forward(self, features: Mapping[str, Tensor]) -> Tensor:
        """Features at the taps → logits [B, H]."""
        return torch.stack([self.heads[tap](features[tap]) for tap in self.taps], 1)


def discriminator_loss(fake_BH: Tensor, real_BH: Tensor) -> Tensor:
    """mean softplus(ℓ_fake) + mean softplus(−ℓ_real); 2 ln 2 where all logits are 0."""
    return F.softplus(fake_BH).mean() + F.softplus(-real_BH).mean()


def generator_loss(fake_BH: Tensor) -> Tensor:
    """mean softplus(−ℓ_fake), not saturating; ln 2 where all logits are 0.

    Samples with a logit that is no number (a frozen trunk's answer may be none) are left out of the mean, which is 0 where none is left. Their x still
    gets 0 · NaN from the trunk: see `distribution.guarded`.
    """
    kept_B1 = fake_BH.isfinite().all(1, keepdim=True)
    each_BH = F.softplus(-torch.where(kept_B1, fake_BH, torch.zeros_like(fake_BH)))
    return torch.where(kept_B1, each_BH, torch.zeros_like(each_BH)).sum() / (kept_B1.sum() * fake_BH.shape[1]).clamp_min(1)
