"""A discriminator of noised samples, ℓ(x_t, t, cond): heads on the features of a denoiser that has its own work, or of a trunk of its own.

Shapes: x_t [B, ...]; t [B] float64; logits [B, H], one a tap, ℓ > 0 says real.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from limbeck import seeds
from limbeck.components import Component, build
from limbeck.diffusion.denoisers import Guided, NetworkDenoiser
from limbeck.diffusion.discriminator import Heads, discriminator_loss
from limbeck.diffusion.distribution import guarded, untrained
from limbeck.diffusion.samplers import at
from limbeck.diffusion.schedules import NoiseSchedule
from limbeck.errors import InputError
from limbeck.models import CATALOGUE
from limbeck.modes import evaluating


class NoisedDiscriminator(nn.Module):
    """Heads on the features that `trunk` has of (x_t, t, cond).

    Args:
        trunk: whose features are read; its parameters are this module's if `owns` says so, else somebody else's (a frozen teacher's, a critic's).
        taps: names of the features, one head each. seed: of the heads' weights.

    Raises:
        InputError: there is no such tap, one is given twice or none at all, or a feature has a shape that no head takes.
    """

    def __init__(self, trunk: NetworkDenoiser, taps: Sequence[str], *, owns: bool, seed: int) -> None:
        super().__init__()
        if not taps or len(set(taps)) < len(taps):
            raise InputError("a discriminator reads one feature, or several different ones.", where="method.taps")
        self.taps = tuple(taps)
        self._trunk = (trunk,)  # in a tuple: not a part of this module
        if owns:
            self.own = trunk
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seeds.derive(seed, "discriminator", "heads"))
            self.heads = Heads(feature_shapes(trunk, taps))

    @property
    def trunk(self) -> NetworkDenoiser:
        """Whose features are read."""
        return self._trunk[0]

    def features(self, x_t: Tensor, t: Tensor, cond: Tensor | None = None) -> dict[str, Tensor]:
        """What the heads read, by tap."""
        return self.trunk.features(x_t, t, cond, self.taps)

    def judge(self, features: Mapping[str, Tensor]) -> Tensor:
        """Features → logits [B, H]."""
        return self.heads(features)

    def forward(self, x_t: Tensor, t: Tensor, cond: Tensor | None = None) -> Tensor:
        """Logits [B, H]."""
        return self.judge(self.features(x_t, t, cond))


@torch.no_grad()
def feature_shapes(trunk: NetworkDenoiser, taps: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """Tap → shape of one sample's feature, found by asking for it once.

    Raises:
        InputError: there is no such tap, or the network shows no features.
    """
    like = next(iter((*trunk.parameters(), *trunk.buffers())))
    x = torch.zeros(1, *trunk.shape, dtype=like.dtype, device=like.device)
    found = trunk.features(x, at(trunk.schedule.t_max, x), trunk.null(1, x.device), taps)
    return {tap: tuple(found[tap].shape[1:]) for tap in taps}


def own_trunk(component: Component | None, schedule: NoiseSchedule, shape: Sequence[int], num_classes: int, seed: int) -> NetworkDenoiser:
    """A network of (x_t, t, cond) to take features from, at the levels of `schedule`; as a denoiser it is never asked.

    component: an entry of `models.CATALOGUE` that builds a denoiser with features, whose own schedule is replaced; None: a perceptron of two layers of
    128 for vectors, the small U-Net for images. seed: of its weights.

    Raises:
        InputError: it cannot be built, or is no network denoiser.
    """
    if component is None:
        component = Component(name="unet_denoiser") if len(shape) == 3 else Component(name="mlp_denoiser", args={"widths": [128, 128]})
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seeds.derive(seed, "discriminator", "trunk"))
        found = build(component, CATALOGUE, "model", num_classes=num_classes, input_shape=tuple(shape))
    if not isinstance(found, NetworkDenoiser):
        raise InputError(f"'{component}' builds no network with features.", where="method.discriminator_model", fix="Use mlp_denoiser or unet_denoiser.")
    found.schedule = schedule
    return found


def noised_pair(
    schedule: NoiseSchedule, fake: Tensor, real: Tensor, t: Tensor, noise: Tensor, cond: Tensor | None, shift: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Fake and real samples, one under the other, noised: x_t, t and cond of [2B, ...] or, with a shift, [3B, ...]: then the real ones follow again, moved.

    Args:
        fake, real: [B, ...]. t [2B], noise [2B, ...], cond [2B] or None: of both. shift: [B, ...] added to the real samples before they get the same noise.
    """
    x, count = torch.cat([fake, real]), len(fake)
    if shift is not None:
        x, t, noise = torch.cat([x, real + shift]), torch.cat([t, t[count:]]), torch.cat([noise, noise[count:]])
        cond = None if cond is None else torch.cat([cond, cond[count:]])
    return schedule.add_noise(x, noise, t), t, cond


def pair_loss(logits: Tensor, r1_weight: float = 0.0) -> Tensor:
    """The discriminator's loss from the logits [2B, H] of a `noised_pair`, or [3B, H] where `r1_weight` is not 0.

    mean softplus(ℓ_fake) + mean softplus(−ℓ_real) + γ · mean (ℓ(real) − ℓ(real + shift))²; γ's term is the zero-centred gradient penalty R1 without second
    derivatives, to first order s² ‖∇ℓ‖² for a shift of standard deviation s (our sheet `f_distill`, eq. 8).
    """
    if not r1_weight:
        return discriminator_loss(*logits.chunk(2))
    fake_BH, real_BH, moved_BH = logits.chunk(3)
    return discriminator_loss(fake_BH, real_BH) + r1_weight * F.mse_loss(real_BH, moved_BH)


class Look(NamedTuple):
    """What teacher, critic and discriminator say of one x_t: D_T and D_φ [B, ...] without gradient (None: no critic), ℓ [B, H] with gradient in x_t."""

    teacher_x0: Tensor | None
    critic_x0: Tensor | None
    logits: Tensor | None


def look(x_t: Tensor, t: Tensor, cond: Tensor | None, guided: Guided, critic: NetworkDenoiser | None, discriminator: NoisedDiscriminator | None) -> Look:
    """All that a generator's step needs at one x_t. No parameter takes a gradient, and a network that is also the discriminator's trunk runs once.

    Nobody has dropout here, whatever mode critic and discriminator train in: a critic that equals the teacher says the same. The graph of ℓ, if x_t asks for
    one, ends at the trunk's taps; a sample whose gradient is no number gets 0.

    guided: the teacher; its guidance enters D_T alone, the discriminator reads the conditional pass. critic, discriminator: None leaves out what it is for.
    """
    teacher, real, fake, logits = guided.denoiser, None, None, None
    shared = discriminator is not None and critic is not None and any(discriminator.trunk is network for network in (teacher, critic))
    learning = [module for module in (critic, discriminator) if module is not None]
    with ExitStack() as modes, untrained(teacher, *learning):
        for module in learning:
            modes.enter_context(evaluating(module))
        if discriminator is not None and not shared:
            logits = discriminator(guarded(x_t), t, cond)
        elif discriminator is not None:
            x0, features = discriminator.trunk.forward_with(guarded(x_t), t, cond, discriminator.taps, graph="taps")
            logits = discriminator.judge(features)
            real, fake = (x0, None) if discriminator.trunk is teacher else (None, x0)
        if critic is None:
            return Look(None, None, logits)
        with torch.no_grad():
            if real is None:
                real = guided(x_t, t, cond)
            elif guided.scale != 1:
                null = teacher(x_t, t, teacher.null(len(x_t), x_t.device))
                real = null + guided.scale * (real - null)
            return Look(real, critic(x_t, t, cond) if fake is None else fake, logits)
