"""An adversarial term beside distribution matching: which trunk the heads read, and logits at freshly drawn noise (DMD2, arXiv 2405.14867, §4.3).

The trunk may be the online critic (DMD2's code), the frozen teacher (FastGen), or a network of its own. Shapes: x [B, ...], cond [B] int64 or None,
logits [B, H]. Every sample gets its own time τ and noise, real and generated ones alike.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from limbeck.components import Component
from limbeck.contract import Frozen, OptimiserSpec
from limbeck.diffusion.denoisers import Denoiser, NetworkDenoiser
from limbeck.diffusion.distribution import guarded, normal, untrained
from limbeck.diffusion.levels import LevelSpec
from limbeck.diffusion.noised_discriminator import NoisedDiscriminator, own_trunk
from limbeck.errors import InputError


class GanSpec(Frozen):
    """The adversarial term's knobs."""

    weight: float = Field(3e-3, ge=0, le=1000, description="w_g; 0: no adversarial term, no real data (DMD2: 3e-3 ImageNet, 1e-3 SD1.5, 5e-3 SDXL)")
    discriminator_weight: float = Field(1e-2, ge=0, le=1000, description="w_d where the trunk is the critic (DMD2: 1e-2; much more ruins the critic)")
    trunk: Literal["critic", "teacher", "own"] = Field("critic", description="whose features the heads see: critic (DMD2), frozen teacher (FastGen), own")
    taps: tuple[str, ...] = Field(("bottleneck",), min_length=1, description="places in the trunk that get a head each")
    levels: LevelSpec = Field(LevelSpec(), description="times of what the heads see (DMD2: all 1000 levels)")
    own_model: Component | None = Field(None, description="trunk 'own': the network; null: a perceptron for points, a small U-Net for images")
    optimiser: OptimiserSpec | None = Field(None, description="of a discriminator that is not part of the critic; null: the recipe's")


def make_discriminator(spec: GanSpec, critic: NetworkDenoiser, teacher: Denoiser, seed: int) -> NoisedDiscriminator:
    """The discriminator that the knobs describe; its parameters are what is trained: trunk and heads, or with a frozen trunk the heads alone.

    Raises:
        InputError: a tap is unknown, or the trunk's network shows no features.
    """
    if spec.trunk == "critic":
        return NoisedDiscriminator(critic, spec.taps, owns=True, seed=seed)
    if spec.trunk == "own":
        trunk = own_trunk(spec.own_model, critic.schedule, critic.shape, critic.num_classes, seed)
        return NoisedDiscriminator(trunk, spec.taps, owns=True, seed=seed)
    if not isinstance(teacher, NetworkDenoiser):
        raise InputError(f"{type(teacher).__name__} shows no inner features.", where="method.gan.trunk", fix="Use critic or own.")
    return NoisedDiscriminator(teacher, spec.taps, owns=False, seed=seed)


def noised_features(discriminator: NoisedDiscriminator, levels: LevelSpec, x: Tensor, cond: Tensor | None, generator: torch.Generator) -> dict[str, Tensor]:
    """The trunk's features at x_τ = α x + σ ε; gradient flows to x, nothing deeper than the taps is computed."""
    schedule = discriminator.trunk.schedule
    t = levels.sample(schedule, len(x), generator)
    x_t = schedule.add_noise(x, normal(len(x), x.shape[1:], generator), t)
    return discriminator.features(x_t, t, cond)


def generated_logits(discriminator: NoisedDiscriminator, levels: LevelSpec, x: Tensor, cond: Tensor | None, generator: torch.Generator) -> Tensor:
    """[B, H] for the generator's loss: gradient flows to x (where it is a number), and neither to the trunk's parameters nor to the heads'."""
    with untrained(discriminator, discriminator.trunk):
        return discriminator.judge(noised_features(discriminator, levels, guarded(x), cond, generator))


def pair_logits(
    discriminator: NoisedDiscriminator,
    levels: LevelSpec,
    fake: Tensor,
    fake_cond: Tensor | None,
    real: Tensor,
    real_cond: Tensor | None,
    generator: torch.Generator,
    *,
    frozen: bool,
) -> tuple[Tensor, Tensor]:
    """[B, H] of generated and of real samples for the discriminator's loss, by one pass. frozen: the trunk is not trained, no graph is made of it."""
    cond = None if fake_cond is None or real_cond is None else torch.cat([fake_cond, real_cond])
    with torch.set_grad_enabled(torch.is_grad_enabled() and not frozen):
        features = noised_features(discriminator, levels, torch.cat([fake.detach(), real]), cond, generator)
    fake_BH, real_BH = discriminator.judge(features).tensor_split([len(fake)])
    return fake_BH, real_BH
