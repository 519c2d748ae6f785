"""Samplers: from noise to data over one list of times, which descends and is always followed by the data themselves.

Every function takes a denoiser, a starting point x [B, ...] at times[0] (see `NoiseSchedule.start`) and returns x0 [B, ...]; nothing is clipped on the
way. K times are K calls (Heun: 2K − 1). Gradients flow unless the caller forbids them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from limbeck.diffusion.denoisers import Denoiser
from limbeck.diffusion.schedules import NoiseSchedule, divisor, expand, times_descend
from limbeck.errors import InputError

Sampler = Callable[..., Tensor]


def at(time: float, like: Tensor) -> Tensor:
    """[B] float64: one time for a batch."""
    return torch.full((len(like),), time, dtype=torch.float64, device=like.device)


def ddim_step(schedule: NoiseSchedule, x_t: Tensor, x0: Tensor, t: Tensor, s: Tensor, *, eta: float = 0.0, noise: Tensor | None = None) -> Tensor:
    """From x_t and a denoised x0 to time s < t: x_s = α_s x0 + √(σ_s² − c²) ε̂ + c ξ (Song et al. 2020, arXiv 2010.02502, eq. 12).

    c = η √(1 − α_t²σ_s²/(α_s²σ_t²)) σ_s, in which α²-terms are ratios so that any schedule may be used; η = 0 is deterministic.
    """
    eps = schedule.convert(x_t, x0, t, "x0", "eps")
    alpha_s, sigma_s = schedule.alpha(s), schedule.sigma(s)
    if eta == 0:
        return expand(alpha_s.to(x_t.dtype), x_t) * x0 + expand(sigma_s.to(x_t.dtype), x_t) * eps
    if noise is None:
        raise InputError("a stochastic step needs noise.", where="noise")
    shrink = (schedule.level(s) / divisor(schedule.level(t))) ** 2
    c = eta * sigma_s * (1 - shrink).clamp_min(0).sqrt()
    kept = (sigma_s**2 - c**2).clamp_min(0).sqrt()
    return sum(expand(a.to(x_t.dtype), x_t) * b for a, b in ((alpha_s, x0), (kept, eps), (c, noise)))  # type: ignore[return-value]


def ddim(
    denoiser: Denoiser, x: Tensor, times: Sequence[float], cond: Tensor | None = None, *, eta: float = 0.0, generator: torch.Generator | None = None
) -> Tensor:
    """DDIM (the Euler step of the probability-flow ODE in every one of these variables); the last step returns x̂0.

    Raises:
        InputError: the times do not descend, or η is not in [0, 1].
    """
    times_descend(times)
    if not 0 <= eta <= 1:
        raise InputError(f"η must be in [0, 1], not {eta}.", where="eta")
    for now, after in zip(times, (*times[1:], None), strict=True):
        x0 = denoiser(x, at(now, x), cond)
        if after is None:
            return x0
        noise = torch.randn(x.shape, dtype=x.dtype, device=x.device, generator=generator) if eta else None
        x = ddim_step(denoiser.schedule, x, x0, at(now, x), at(after, x), eta=eta, noise=noise)
    raise AssertionError("unreachable")


def heun(denoiser: Denoiser, x: Tensor, times: Sequence[float], cond: Tensor | None = None) -> Tensor:
    """The deterministic second-order sampler of EDM (arXiv 2206.00364, alg. 1): d = ε̂ is averaged over both ends of a step in σ; 2K − 1 calls.

    For other schedules (ours) the step is in the angle θ = atan(σ/α) of y = x/√(α² + σ²), where dy/dθ = cos θ ε̂ − sin θ x̂0. A list of times that is not
    spaced as EDM's has steps too long for σ/α (999 to 16 at first with flow and 18 steps), and the angle is finite where α is 0.

    Raises:
        InputError: the times do not descend.
    """
    times_descend(times)
    t = torch.tensor(times, dtype=torch.float64)
    alpha, sigma = denoiser.schedule.alpha(t), denoiser.schedule.sigma(t)
    if denoiser.schedule.name == "edm":
        sizes, places, of_eps, of_x0 = (c.tolist() for c in (alpha, sigma, torch.ones_like(t), torch.zeros_like(t)))
    else:
        size = torch.hypot(alpha, sigma)
        sizes, places, of_eps, of_x0 = (c.tolist() for c in (size, torch.atan2(sigma, alpha), alpha / size, -sigma / size))
    alphas, sigmas = alpha.tolist(), sigma.tolist()

    def slope(y: Tensor, x0: Tensor, k: int) -> Tensor:
        return of_eps[k] * ((sizes[k] * y - alphas[k] * x0) / sigmas[k]) + of_x0[k] * x0

    y = x / sizes[0]
    for k, time in enumerate(times):
        x0 = denoiser(sizes[k] * y, at(time, y), cond)
        if k + 1 == len(times):
            return x0
        step, first = places[k + 1] - places[k], slope(y, x0, k)
        ahead = y + step * first
        if sigmas[k + 1] == 0:  # the data themselves: nothing to average with
            y = ahead
            continue
        second = slope(ahead, denoiser(sizes[k + 1] * ahead, at(times[k + 1], y), cond), k + 1)
        y = y + step * (first + second) / 2
    raise AssertionError("unreachable")


def euler(denoiser: Denoiser, x: Tensor, times: Sequence[float], cond: Tensor | None = None) -> Tensor:
    """x + (s − t) u in the schedule's own time, u the velocity; the last step goes to x̂0.

    For the flow schedule this is the rectified flow's Euler step, for EDM it is DDIM.

    Raises:
        InputError: the times do not descend.
    """
    times_descend(times)
    for now, after in zip(times, (*times[1:], None), strict=True):
        if after is None:
            return denoiser(x, at(now, x), cond)
        x = x + (after - now) * denoiser(x, at(now, x), cond, out="velocity")
    raise AssertionError("unreachable")


def renoise(denoiser: Denoiser, x: Tensor, times: Sequence[float], cond: Tensor | None = None, *, generator: torch.Generator | None = None) -> Tensor:
    """Denoise, add fresh noise of the next level, and again (consistency models, DMD2, LCM); K calls.

    Raises:
        InputError: the times do not descend.
    """
    times_descend(times)
    for k, now in enumerate(times):
        x0 = denoiser(x, at(now, x), cond)
        if k + 1 == len(times):
            return x0
        noise = torch.randn(x.shape, dtype=x.dtype, device=x.device, generator=generator)
        x = denoiser.schedule.add_noise(x0, noise, at(times[k + 1], x))
    raise AssertionError("unreachable")


def gamma(
    denoiser: Denoiser, x: Tensor, times: Sequence[float], cond: Tensor | None = None, *, share: float = 0.2, generator: torch.Generator | None = None
) -> Tensor:
    """Jump below the next time and add noise back up to it (trajectory consistency, arXiv 2402.19159, alg. 4: γ-sampling).

    share: γ in [0, 1]. From t the deterministic step goes to (1 − γ) s, then noise lifts the sample to s; 0 is DDIM, 1 is `renoise`.

    Raises:
        InputError: the times do not descend, or γ is not in [0, 1].
    """
    times_descend(times)
    if not 0 <= share <= 1:
        raise InputError(f"γ must be in [0, 1], not {share}.", where="gamma")
    schedule = denoiser.schedule
    for now, after in zip(times, (*times[1:], None), strict=True):
        x0 = denoiser(x, at(now, x), cond)
        if after is None:
            return x0
        below, s = at((1 - share) * after, x), at(after, x)
        lower = x0 if share == 1 else ddim_step(schedule, x, x0, at(now, x), below)
        noise = torch.randn(x.shape, dtype=x.dtype, device=x.device, generator=generator)
        x = lift(schedule, lower, below if share < 1 else None, s, noise)
    raise AssertionError("unreachable")


def lift(schedule: NoiseSchedule, x: Tensor, below: Tensor | None, s: Tensor, noise: Tensor) -> Tensor:
    """From time `below` (None: the data) up to s > below: x_s = (α_s/α_b) x + √(σ_s² − (α_s/α_b)² σ_b²) ξ."""
    if below is None:
        return schedule.add_noise(x, noise, s)
    ratio = schedule.alpha(s) / divisor(schedule.alpha(below))
    spread = (schedule.sigma(s) ** 2 - (ratio * schedule.sigma(below)) ** 2).clamp_min(0).sqrt()
    return expand(ratio.to(x.dtype), x) * x + expand(spread.to(x.dtype), x) * noise


SAMPLERS: dict[str, Sampler] = {"heun": heun, "ddim": ddim, "euler": euler, "renoise": renoise, "gamma": gamma}


def calls(sampler: str, steps: int) -> int:
    """Network calls of a sampler of this many steps."""
    return 2 * steps - 1 if sampler == "heun" else steps
