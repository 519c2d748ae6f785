"""Consistency training: curricula, intervals of a noise grid, distances, two evaluations with one set of random numbers, the sampler.

A consistency function f(x_t, t) maps every point of a trajectory to its end at t_min: f(x, t_min) = x, and f is the same at neighbouring times
(Song et al. 2023, arXiv 2303.01469). Everything here serves iCT (arXiv 2310.14189) first and other methods of the kind too; numbers are those of our
sheet `ict`. Legend: B samples, N points of a grid, M = N − 1 intervals, k step of K, t times (float64, ascending in a grid), d entries of a sample.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from limbeck.diffusion.build import generator as build_generator
from limbeck.diffusion.denoisers import Denoiser
from limbeck.diffusion.generator import DataScale, Generator
from limbeck.diffusion.samplers import at, lift
from limbeck.diffusion.schedules import NoiseSchedule
from limbeck.errors import InputError

HUBER_FACTOR = 0.00054
"""c of the pseudo-Huber distance over √d (arXiv 2310.14189)."""

Distance = Callable[[Tensor, Tensor], Tensor]
"""Two batches [B, ...] → one number a sample [B]."""

# ---- curricula: how fine the grid is at step k of K -------------------------------------------------------------------------


def doubling_count(step: int, steps: int, s0: int, s1: int) -> int:
    """N(k) = min(s0·2^⌊k/K'⌋, s1) + 1 with K' = ⌊K/(log2⌊s1/s0⌋ + 1)⌋: grid points, doubled in equal stages (arXiv 2310.14189; sheet eq. 3).

    >>> [doubling_count(k, 100, 10, 160) for k in (0, 19, 20, 40, 60, 80, 99)]
    [11, 11, 21, 41, 81, 161, 161]

    Raises:
        InputError: s1 < s0, or they are not positive.
    """
    _check_counts(s0, s1)
    length = max(1, math.floor(steps / (math.log2(s1 // s0) + 1)))
    stage = min(step // length, s1.bit_length())  # beyond that s0·2^stage is above s1 in any case
    return min(s0 * 2**stage, s1) + 1


def square_root_count(step: int, steps: int, s0: int, s1: int) -> int:
    """N_CT(k) = ⌈√(k/K·((s1+1)² − s0²) + s0²) − 1⌉ + 1, at least 2: the old curriculum (arXiv 2303.01469, app. C; there s0 = 2, s1 = 150).

    Raises:
        InputError: s1 < s0, or they are not positive.
    """
    _check_counts(s0, s1)
    return max(math.ceil(math.sqrt(step / max(steps, 1) * ((s1 + 1) ** 2 - s0**2) + s0**2) - 1), 1) + 1


def teacher_decay(points: int, s0: int, first: float) -> float:
    """μ(k) = exp(s0 ln μ0 / N(k)): decay of a teacher that is a moving average (arXiv 2303.01469, app. C); first: μ0, 0 for none."""
    return math.exp(s0 * math.log(first) / points) if first else 0.0


def _check_counts(s0: int, s1: int) -> None:
    if not 1 <= s0 <= s1:
        raise InputError(f"a curriculum runs from s0 ≥ 1 intervals to s1 ≥ s0, these are {s0} and {s1}.", where="s1")


# ---- intervals of a grid ----------------------------------------------------------------------------------------------------


def lognormal_probabilities(levels_N: Tensor, mean: float, std: float) -> Tensor:
    """p_i ∝ erf((ln σ_{i+1} − mean)/(√2 std)) − erf((ln σ_i − mean)/(√2 std)), [M] float64, of ascending levels [N] (sheet eq. 4).

    The difference is taken of erfc on the side where that loses no digits.

    Raises:
        InputError: the law gives no interval a weight that can be told from 0.
    """
    place_N = (levels_N.double().log() - mean) / (math.sqrt(2) * std)
    low_M, high_M = place_N[:-1], place_N[1:]
    weight_M = torch.where(low_M > 0, torch.erfc(low_M) - torch.erfc(high_M), torch.erfc(-high_M) - torch.erfc(-low_M))
    total = weight_M.sum()
    if not total > 0:
        raise InputError(f"a lognormal of mean {mean} and deviation {std} puts nothing on these noise levels.", where="p_mean", fix="Move p_mean towards −1.")
    return weight_M / total


@dataclass(frozen=True)
class Intervals:
    """A grid of times and how its intervals are drawn.

    times_N: [N] float64, ascending. cumulative_M: [M] float64, the intervals' probabilities summed up, ending at 1.
    """

    times_N: Tensor
    cumulative_M: Tensor

    @classmethod
    def of(cls, times_N: Tensor, probabilities_M: Tensor | None = None) -> Intervals:
        """Of a grid and the probabilities of its intervals; None: all alike. Raises InputError for fewer than two points."""
        times_N = times_N.double()
        if len(times_N) < 2:
            raise InputError("a grid of one point has no interval.", where="s0")
        count = len(times_N) - 1
        weight_M = torch.full((count,), 1 / count, dtype=torch.float64, device=times_N.device) if probabilities_M is None else probabilities_M.to(times_N)
        summed_M = weight_M.cumsum(0)
        return cls(times_N, summed_M / summed_M[-1])

    def draw(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Lower and upper times [count] float64 of intervals drawn independently."""
        u_B = torch.rand(count, dtype=torch.float64, generator=generator, device=self.times_N.device)
        i_B = torch.searchsorted(self.cumulative_M, u_B, right=True).clamp_max(len(self.cumulative_M) - 1)
        return self.times_N[i_B], self.times_N[i_B + 1]


# ---- distances --------------------------------------------------------------------------------------------------------------


def huber_constant(shape: Sequence[int]) -> float:
    """c = 0.00054·√d for samples of this shape (sheet eq. 6): 0.03 for 3×32×32."""
    return HUBER_FACTOR * math.sqrt(math.prod(shape))


def squared_l2(a: Tensor, b: Tensor) -> Tensor:
    """‖a − b‖² of each sample over all its entries: [B, ...] → [B], at least float32."""
    return (_full(a) - _full(b)).square().flatten(1).sum(1)


def pseudo_huber(a: Tensor, b: Tensor, c: float) -> Tensor:
    """√(‖a − b‖² + c²) − c of each sample: [B, ...] → [B], at least float32 (sheet eq. 6).

    The norm is of the whole sample, not of an entry. Written ‖·‖²/(√(‖·‖² + c²) + c), which loses no digits near 0; the gradient
    (a − b)/√(‖a − b‖² + c²) is shorter than 1.

    Raises:
        InputError: c is not positive.
    """
    if not c > 0:
        raise InputError(f"c must be positive, not {c}.", where="huber_c")
    squared_B = squared_l2(a, b)
    return squared_B / ((squared_B + c**2).sqrt() + c)


def _full(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


# ---- the loss ---------------------------------------------------------------------------------------------------------------


def same_randomness(first: Callable[[], Tensor], second: Callable[[], Tensor], device: torch.device) -> tuple[Tensor, Tensor]:
    """first(), then second() from the state that torch's global generators had before first(): dropout draws the same masks in both.

    The CPU's generator and, on a CUDA device, that device's are put back. Where both draw as much, the generators end as after first() alone.
    """
    cuda = device.type == "cuda"
    host = torch.default_generator.get_state()
    card = torch.cuda.get_rng_state(device) if cuda else None
    one = first()
    torch.default_generator.set_state(host)
    if card is not None:
        torch.cuda.set_rng_state(card, device)
    return one, second()


def consistency_pair(
    student: Denoiser, teacher: Denoiser, x0: Tensor, noise: Tensor, t_low: Tensor, t_high: Tensor, cond: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """f_θ(x_{t_high}, t_high) with gradient and f_θ⁻(x_{t_low}, t_low) without, of the same x0, ε and dropout masks; [B, ...] each (sheet eq. 5).

    x0, noise: [B, ...]. t_low, t_high: [B] float64. teacher: f_θ⁻, which may be the student itself. The noisier pass comes first.
    """
    schedule = student.schedule

    def noisier() -> Tensor:
        return student(schedule.add_noise(x0, noise, t_high), t_high, cond)

    @torch.no_grad()
    def cleaner() -> Tensor:
        return teacher(schedule.add_noise(x0, noise, t_low), t_low, cond)

    return same_randomness(noisier, cleaner, x0.device)


def inverse_gap(schedule: NoiseSchedule, t_low: Tensor, t_high: Tensor) -> Tensor:
    """λ = 1/(σ_{i+1} − σ_i) in noise levels, [B] float64 (sheet eq. 5)."""
    return 1 / (schedule.level(t_high) - schedule.level(t_low))


@torch.no_grad()
def follow(teacher: nn.Module, student: nn.Module, decay: float) -> None:
    """θ⁻ ← μ θ⁻ + (1 − μ) θ, in place; buffers are copied."""
    torch._foreach_lerp_(list(teacher.parameters()), [p.detach() for p in student.parameters()], 1 - decay)
    for kept, new in zip(teacher.buffers(), student.buffers(), strict=True):
        kept.copy_(new)


# ---- the sampler ------------------------------------------------------------------------------------------------------------


class ConsistencyGenerator(Generator):
    """A consistency function as a generator: f(σ_max z, σ_max), then for each further time τ f(x̂ + √(τ² − σ_min²) z', τ) (arXiv 2303.01469, alg. 1).

    `Generator` in mode 'renoise' takes x̂ for clean data; here it is a point at t_min, which already holds σ_min of noise, so that τ = t_min changes nothing.

    ladder: the times for as many calls as it is long, descending from t_max. steps: how many of them are used; None: all.

    Raises:
        InputError: the times do not descend or lie outside the schedule, or steps is not possible.
    """

    builder = "consistency_generator"

    def __init__(self, denoiser: Denoiser, ladder: Sequence[float], *, steps: int | None = None, scale: DataScale | None = None) -> None:
        if steps is not None and not 1 <= steps <= len(ladder):
            raise InputError(f"{steps} calls of a generator with {len(ladder)} times.", where="steps", fix="Give it more times.")
        super().__init__(denoiser, ladder, mode="renoise", scale=scale)
        self.ladder, self.times = self.times, self.times[:steps]

    def reached(self, k: int, noise: Tensor, cond: Tensor | None = None, generator: torch.Generator | None = None) -> Tensor:
        """The input of the k-th call (from 0), with gradient."""
        schedule, x_t = self.denoiser.schedule, self.start(noise)
        for before, after in zip(range(k), self.times[1 : k + 1], strict=True):
            x0 = self.call(x_t, before, cond)
            fresh = torch.randn(x0.shape, dtype=x0.dtype, device=x0.device, generator=generator)
            x_t = lift(schedule, x0, at(schedule.t_min, x0), at(after, x0), fresh)
        return x_t

    def forward(self, noise: Tensor, cond: Tensor | None = None, generator: torch.Generator | None = None) -> Tensor:
        """Noise [B, *shape] → samples [B, *shape] in network units."""
        last = len(self.times) - 1
        return self.call(self.reached(last, noise, cond, generator), last, cond)

    @torch.no_grad()
    def simulate(self, k: int, noise: Tensor, cond: Tensor | None = None, *, generator: torch.Generator | None = None) -> Tensor:
        """The input of the k-th call as sampling makes it, without gradient."""
        return self.reached(k, noise, cond, generator)

    def with_steps(self, steps: int) -> Generator:
        """The same weights with fewer times of the ladder, or with the schedule's own list for more calls than it has."""
        if steps == self.calls:
            return self
        ladder = self.ladder if steps <= len(self.ladder) else self.denoiser.schedule.few_steps(steps)
        return ConsistencyGenerator(self.denoiser, ladder, steps=steps, scale=self.scale)

    @property
    def arguments(self) -> Mapping[str, Any]:
        """What, beside the denoiser, builds this generator again (JSON values)."""
        return {"ladder": list(self.ladder), "steps": self.calls, "scale": self.scale.arguments}


def consistency_generator(
    denoiser: Mapping[str, Any],
    ladder: Sequence[float],
    num_classes: int,
    input_shape: Sequence[int],
    steps: int | None = None,
    scale: Mapping[str, Any] | None = None,
) -> ConsistencyGenerator:
    """A consistency generator around a denoiser, as artefacts name it; see `ConsistencyGenerator`.

    Raises:
        InputError: the denoiser cannot be built or is none, or the times do not fit it.
    """
    plain = build_generator(denoiser, ladder, num_classes, input_shape, scale=scale)
    return ConsistencyGenerator(plain.denoiser, ladder, steps=steps, scale=plain.scale)
