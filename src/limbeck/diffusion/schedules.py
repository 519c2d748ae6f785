"""Noise schedules: x_t = α_t x0 + σ_t ε. Stateless; times and coefficients are float64 throughout.

Shapes: t [B] (or any shape, elementwise); tensors x [B, ...]; coefficients are spread over the trailing axes by `expand`. A *level* is σ_t/α_t, the noise
in units of the signal: two schedules are one and the same up to a rescaling of x_t by α_t and of time (our sheet, §1).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from itertools import pairwise
from typing import ClassVar, Literal

import torch
from torch import Tensor

from limbeck.errors import InputError, suggestion

Kind = Literal["x0", "eps", "v", "velocity", "score"]
KINDS: tuple[Kind, ...] = ("x0", "eps", "v", "velocity", "score")
SMALLEST_DIVISOR = 1e-6


def expand(t_B: Tensor, like: Tensor) -> Tensor:
    """[B] → [B, 1, …, 1], so that it multiplies `like` [B, ...]; a scalar stays one."""
    return t_B if t_B.dim() == 0 else t_B.reshape(-1, *[1] * (like.dim() - 1))


def divisor(value: Tensor) -> Tensor:
    """The value, moved away from zero to ±1e-6."""
    sign = torch.where(value < 0, -1.0, 1.0).to(value)
    return torch.where(value.abs() < SMALLEST_DIVISOR, sign * SMALLEST_DIVISOR, value)


class NoiseSchedule(ABC):
    """What α_t and σ_t are, and everything that follows from them.

    t_min, t_max: the times between which networks are trained and sampled.
    """

    name: ClassVar[str]
    preserves_variance: ClassVar[bool] = False
    """Whether α² + σ² = 1, where 'v' is defined."""

    def __init__(self, t_min: float, t_max: float) -> None:
        if not (math.isfinite(t_min) and math.isfinite(t_max) and 0 <= t_min < t_max):
            raise InputError(f"times must satisfy 0 ≤ t_min < t_max, these are {t_min} and {t_max}.", where="t_min")
        self.t_min, self.t_max = float(t_min), float(t_max)
        self._grids: dict[tuple[int, torch.device], Tensor] = {}

    def __repr__(self) -> str:
        return f"{type(self).__name__}(t_min={self.t_min:g}, t_max={self.t_max:g})"

    def _options(self) -> dict[str, object]:
        return {name: value for name, value in vars(self).items() if not name.startswith("_")}

    def __eq__(self, other: object) -> bool:
        """Whether it is of the same type and options."""
        return isinstance(other, NoiseSchedule) and type(self) is type(other) and self._options() == other._options()

    def __hash__(self) -> int:
        return hash((type(self), *sorted((name, str(value)) for name, value in self._options().items())))

    # ---- what a schedule is ---------------------------------------------------------------------------------------

    @abstractmethod
    def alpha(self, t: Tensor) -> Tensor:
        """Factor of the signal, float64, of t's shape."""

    @abstractmethod
    def sigma(self, t: Tensor) -> Tensor:
        """Standard deviation of the noise, float64, of t's shape."""

    @abstractmethod
    def d_alpha(self, t: Tensor) -> Tensor:
        """dα/dt."""

    @abstractmethod
    def d_sigma(self, t: Tensor) -> Tensor:
        """dσ/dt."""

    @abstractmethod
    def time_of_level(self, level: Tensor) -> Tensor:
        """The t at which σ_t/α_t is `level`: the inverse of `level`."""

    def network_time(self, t: Tensor) -> Tensor:
        """What a network without preconditioning is told of the time, float32: 1000 t."""
        return (1000 * t.double()).float()

    def start(self, noise: Tensor, t: Tensor) -> Tensor:
        """What sampling starts from at time t, of standard normal noise: the noise itself (the signal is taken to be gone)."""
        return noise

    # ---- what follows ---------------------------------------------------------------------------------------------

    def level(self, t: Tensor) -> Tensor:
        """σ_t/α_t, float64; infinite where α is 0."""
        return self.sigma(t) / self.alpha(t)

    def log_snr(self, t: Tensor) -> Tensor:
        """Half the log signal-to-noise ratio, log(α_t/σ_t)."""
        return self.alpha(t).log() - self.sigma(t).log()

    def time_of_log_snr(self, value: Tensor) -> Tensor:
        """The inverse of `log_snr`."""
        return self.time_of_level(torch.exp(-value.double()))

    def add_noise(self, x0: Tensor, noise: Tensor, t_B: Tensor) -> Tensor:
        """x_t = α_t x0 + σ_t ε, in x0's type."""
        alpha, sigma = (expand(c.to(x0.dtype), x0) for c in (self.alpha(t_B), self.sigma(t_B)))
        return alpha * x0 + sigma * noise

    def target(self, x0: Tensor, noise: Tensor, t_B: Tensor, kind: Kind) -> Tensor:
        """What a perfect prediction of this kind would be for a known x0 and ε (for 'score' the conditional score −ε/σ).

        Raises:
            InputError: the kind is unknown, or 'v' with a schedule that does not preserve variance.
        """
        self.check(kind)
        if kind == "x0":
            return x0
        if kind == "eps":
            return noise
        if kind == "score":
            return -noise / expand(divisor(self.sigma(t_B)).to(x0.dtype), x0)
        if kind == "v":
            alpha, sigma = (expand(c.to(x0.dtype), x0) for c in (self.alpha(t_B), self.sigma(t_B)))
            return alpha * noise - sigma * x0
        d_alpha, d_sigma = (expand(c.to(x0.dtype), x0) for c in (self.d_alpha(t_B), self.d_sigma(t_B)))
        return d_alpha * x0 + d_sigma * noise

    def convert(self, x_t: Tensor, prediction: Tensor, t_B: Tensor, source: Kind, target: Kind) -> Tensor:
        """A prediction in another form, at the same x_t [B, ...] and t [B]; computed in float64, returned in the prediction's type (our sheet, §2).

        Kinds: 'x0', 'eps', 'v' (= α ε − σ x0), 'velocity' (= α' x0 + σ' ε, the drift of the probability-flow ODE), 'score' (= −ε/σ). Divisors are kept at
        1e-6 or more.

        Raises:
            InputError: a kind is unknown, or 'v' with a schedule that does not preserve variance.
        """
        self.check(source)
        self.check(target)
        if source == target:
            return prediction
        x, given = x_t.double(), prediction.double()
        alpha, sigma = (expand(c, x) for c in (self.alpha(t_B), self.sigma(t_B)))
        d_alpha, d_sigma = (expand(c, x) for c in (self.d_alpha(t_B), self.d_sigma(t_B)))
        if source == "x0":
            x0, eps = given, (x - alpha * given) / divisor(sigma)
        elif source == "v":
            x0, eps = alpha * x - sigma * given, sigma * x + alpha * given
        elif source == "velocity":
            wronskian = divisor(alpha * d_sigma - sigma * d_alpha)
            x0, eps = (d_sigma * x - sigma * given) / wronskian, (alpha * given - d_alpha * x) / wronskian
        else:
            eps = given if source == "eps" else -sigma * given
            x0 = (x - sigma * eps) / divisor(alpha)
        if target == "x0":
            found = x0
        elif target == "eps":
            found = eps
        elif target == "score":
            found = -eps / divisor(sigma)
        elif target == "v":
            found = alpha * eps - sigma * x0
        else:
            found = d_alpha * x0 + d_sigma * eps
        return found.to(prediction.dtype)

    def check(self, kind: str) -> None:
        """Raise InputError for a kind of prediction that this schedule does not have."""
        if kind not in KINDS:
            raise InputError(f"unknown kind of prediction '{kind}'.", where="prediction", fix=suggestion(kind, KINDS))
        if kind == "v" and not self.preserves_variance:
            raise InputError(f"'v' needs α² + σ² = 1, which the schedule '{self.name}' has not.", where="prediction", fix="Use 'velocity'.")

    # ---- lists of times -------------------------------------------------------------------------------------------

    def grid(self, count: int) -> Tensor:
        """[count] float64 times, ascending in noise: the list that 'uniform over levels' means. Here equally spaced in t."""
        return torch.linspace(self.t_min, self.t_max, count, dtype=torch.float64)

    def kept_grid(self, count: int, device: torch.device) -> Tensor:
        """`grid` on a device, made once."""
        key = (count, device)
        if key not in self._grids:
            self._grids[key] = self.grid(count).to(device)
        return self._grids[key]

    def steps(self, count: int) -> tuple[float, ...]:
        """Times of a sampler of `count` steps, descending from t_max; the step after the last goes to the data.

        Raises:
            InputError: fewer than one.
        """
        if count < 1:
            raise InputError(f"a sampler takes at least one step, not {count}.", where="steps")
        return tuple(self.grid(count).flip(0).tolist()) if count > 1 else (self.t_max,)

    def few_steps(self, count: int, levels: int = 1000) -> tuple[float, ...]:
        """Times of a generator of `count` calls, descending: every levels/count-th of `grid(levels)` from the top (DMD2: 999, 749, 499, 249 of 1000).

        Raises:
            InputError: count is not in 1..levels.
        """
        if not 1 <= count <= levels:
            raise InputError(f"a generator of {count} steps cannot be made of {levels} levels.", where="steps")
        grid = self.grid(levels)
        return tuple(float(grid[levels - 1 - k * levels // count]) for k in range(count))


class EDM(NoiseSchedule):
    """Variance exploding: α = 1, σ = t (Karras et al. 2022, arXiv 2206.00364)."""

    name = "edm"

    def __init__(self, t_min: float = 0.002, t_max: float = 80.0, rho: float = 7.0) -> None:
        super().__init__(t_min, t_max)
        if not 0 < rho < math.inf:
            raise InputError(f"rho must be positive, not {rho}.", where="rho")
        self.rho = float(rho)

    def alpha(self, t: Tensor) -> Tensor:
        """1."""
        return torch.ones_like(t, dtype=torch.float64)

    def sigma(self, t: Tensor) -> Tensor:
        """t."""
        return t.double()

    def d_alpha(self, t: Tensor) -> Tensor:
        """0."""
        return torch.zeros_like(t, dtype=torch.float64)

    def d_sigma(self, t: Tensor) -> Tensor:
        """1."""
        return torch.ones_like(t, dtype=torch.float64)

    def time_of_level(self, level: Tensor) -> Tensor:
        """The level itself."""
        return level.double()

    def network_time(self, t: Tensor) -> Tensor:
        """ln(σ)/4."""
        return (t.double().clamp_min(1e-12).log() / 4).float()

    def start(self, noise: Tensor, t: Tensor) -> Tensor:
        """σ z."""
        return expand(t.to(noise.dtype), noise) * noise

    def grid(self, count: int) -> Tensor:
        """The Karras list: equally spaced in σ^{1/ρ}, ascending."""
        low, high = self.t_min ** (1 / self.rho), self.t_max ** (1 / self.rho)
        found = torch.linspace(low, high, count, dtype=torch.float64) ** self.rho
        if count > 1:
            found[0], found[-1] = self.t_min, self.t_max
        return found


class VPDiscrete(NoiseSchedule):
    """Variance preserving, of β_n linear in √β over `count` steps (Stable Diffusion), at t = n/count; between the steps log ᾱ is interpolated."""

    name = "vp"
    preserves_variance = True

    def __init__(
        self, beta_start: float = 0.00085, beta_end: float = 0.012, count: int = 1000, kind: Literal["scaled_linear", "linear"] = "scaled_linear"
    ) -> None:
        if not (0 < beta_start < beta_end < 1 and count >= 2):
            raise InputError(f"betas must satisfy 0 < start < end < 1, these are {beta_start} and {beta_end}, over {count} steps.", where="beta_start")
        if count != int(count):
            raise InputError(f"the steps are a whole number, not {count}.", where="count")
        if kind not in ("scaled_linear", "linear"):
            raise InputError(f"unknown kind of betas '{kind}'.", where="kind", fix="Use scaled_linear or linear.")
        super().__init__(0.0, (count - 1) / count)
        self.beta_start, self.beta_end, self.count, self.kind = beta_start, beta_end, int(count), kind
        self._tables: dict[torch.device, Tensor] = {}

    def _log_alpha_bar(self, device: torch.device) -> Tensor:
        """log ᾱ of every step, made once a device: no copy from the host in a training step."""
        if device not in self._tables:
            root = self.kind == "scaled_linear"
            power = 0.5 if root else 1.0
            betas = torch.linspace(self.beta_start**power, self.beta_end**power, self.count, dtype=torch.float64)
            self._tables[device] = torch.log1p(-(betas**2 if root else betas)).cumsum(0).to(device)
        return self._tables[device]

    def _interpolated(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """log ᾱ(t) and its derivative in t."""
        table = self._log_alpha_bar(t.device)
        place = t.double() * self.count
        low = place.floor().clamp(0, self.count - 2).long()
        slope = table[low + 1] - table[low]
        return table[low] + (place - low) * slope, slope * self.count

    def alpha(self, t: Tensor) -> Tensor:
        """√ᾱ."""
        return (self._interpolated(t)[0] / 2).exp()

    def sigma(self, t: Tensor) -> Tensor:
        """√(1 − ᾱ)."""
        return (-torch.expm1(self._interpolated(t)[0])).clamp_min(0).sqrt()

    def d_alpha(self, t: Tensor) -> Tensor:
        """α (log ᾱ)'/2."""
        value, slope = self._interpolated(t)
        return (value / 2).exp() * slope / 2

    def d_sigma(self, t: Tensor) -> Tensor:
        """−ᾱ (log ᾱ)'/(2σ)."""
        value, slope = self._interpolated(t)
        return -value.exp() * slope / (2 * divisor((-torch.expm1(value)).clamp_min(0).sqrt()))

    def time_of_level(self, level: Tensor) -> Tensor:
        """Where log ᾱ = −log(1 + level²)."""
        table = -self._log_alpha_bar(level.device)
        wanted = torch.log1p(level.double() ** 2)
        high = torch.searchsorted(table, wanted.contiguous()).clamp(1, self.count - 1)
        low = high - 1
        return (low + (wanted - table[low]) / (table[high] - table[low])) / self.count

    def grid(self, count: int) -> Tensor:
        """The steps n/1000 themselves where all are asked for, else equally spaced ones."""
        if count == self.count:
            return torch.arange(count, dtype=torch.float64) / count
        return super().grid(count)


class VPCosine(NoiseSchedule):
    """Variance preserving: α = cos(πt/2), σ = sin(πt/2)."""

    name = "cosine"
    preserves_variance = True

    def __init__(self, t_min: float = 0.001, t_max: float = 0.999) -> None:
        super().__init__(t_min, t_max)
        if t_max > 1:
            raise InputError(f"the cosine schedule ends at 1, not {t_max}.", where="t_max")

    def alpha(self, t: Tensor) -> Tensor:
        """cos(πt/2)."""
        return torch.cos(t.double() * (math.pi / 2))

    def sigma(self, t: Tensor) -> Tensor:
        """sin(πt/2)."""
        return torch.sin(t.double() * (math.pi / 2))

    def d_alpha(self, t: Tensor) -> Tensor:
        """−(π/2) σ."""
        return -(math.pi / 2) * self.sigma(t)

    def d_sigma(self, t: Tensor) -> Tensor:
        """(π/2) α."""
        return (math.pi / 2) * self.alpha(t)

    def time_of_level(self, level: Tensor) -> Tensor:
        """(2/π) atan(level)."""
        return torch.atan(level.double()) * (2 / math.pi)


class Flow(NoiseSchedule):
    """Rectified flow: α = 1 − t, σ = t."""

    name = "flow"

    def __init__(self, t_min: float = 0.001, t_max: float = 0.999) -> None:
        super().__init__(t_min, t_max)
        if t_max > 1:
            raise InputError(f"the flow schedule ends at 1, not {t_max}.", where="t_max")

    def alpha(self, t: Tensor) -> Tensor:
        """1 − t."""
        return 1 - t.double()

    def sigma(self, t: Tensor) -> Tensor:
        """t."""
        return t.double()

    def d_alpha(self, t: Tensor) -> Tensor:
        """−1."""
        return torch.full_like(t, -1.0, dtype=torch.float64)

    def d_sigma(self, t: Tensor) -> Tensor:
        """1."""
        return torch.ones_like(t, dtype=torch.float64)

    def time_of_level(self, level: Tensor) -> Tensor:
        """level/(1 + level)."""
        return level.double() / (1 + level.double())

    def start(self, noise: Tensor, t: Tensor) -> Tensor:
        """t z."""
        return expand(t.to(noise.dtype), noise) * noise


class Trig(NoiseSchedule):
    """α = cos t, σ = sin t (TrigFlow): the velocity is v."""

    name = "trig"
    preserves_variance = True

    def __init__(self, t_min: float = 0.001, t_max: float = math.pi / 2 - 0.001) -> None:
        super().__init__(t_min, t_max)
        if t_max > math.pi / 2:
            raise InputError(f"the trigonometric schedule ends at π/2, not {t_max}.", where="t_max")

    def alpha(self, t: Tensor) -> Tensor:
        """cos t."""
        return torch.cos(t.double())

    def sigma(self, t: Tensor) -> Tensor:
        """sin t."""
        return torch.sin(t.double())

    def d_alpha(self, t: Tensor) -> Tensor:
        """−sin t."""
        return -torch.sin(t.double())

    def d_sigma(self, t: Tensor) -> Tensor:
        """cos t."""
        return torch.cos(t.double())

    def time_of_level(self, level: Tensor) -> Tensor:
        """atan(level)."""
        return torch.atan(level.double())

    def network_time(self, t: Tensor) -> Tensor:
        """t."""
        return t.float()


SCHEDULES: dict[str, type[NoiseSchedule]] = {cls.name: cls for cls in (EDM, VPDiscrete, VPCosine, Flow, Trig)}


def make_schedule(name: str, **options: float) -> NoiseSchedule:
    """A schedule by name: edm, vp, cosine, flow, trig.

    Raises:
        InputError: the name or an option is unknown or out of range.
    """
    if name not in SCHEDULES:
        raise InputError(f"unknown schedule '{name}'.", where="schedule", fix=suggestion(name, SCHEDULES))
    try:
        return SCHEDULES[name](**options)
    except TypeError as error:
        raise InputError(f"the schedule '{name}' does not take these options: {error}.", where="schedule") from error


def times_descend(times: Sequence[float]) -> None:
    """Raise InputError unless there is a time and they descend."""
    if not len(times) or math.isnan(times[0]) or any(not later < earlier for earlier, later in pairwise(times)):
        raise InputError(f"the times of a sampler must descend: {[round(t, 6) for t in times]}.", where="levels")
