"""Samplers: order on a Gaussian in closed form, moments on a mixture, their limits and their calls; wrong input."""

import math
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from limbeck.diffusion import samplers
from limbeck.diffusion.denoisers import Denoiser, MixtureDenoiser
from limbeck.diffusion.samplers import SAMPLERS, at, calls, ddim, ddim_step, euler, gamma, heun, lift, renoise
from limbeck.diffusion.schedules import EDM, SCHEDULES, Flow, NoiseSchedule, VPCosine, make_schedule
from limbeck.errors import InputError

MEAN, STD = 0.4, 0.5


def gaussian(schedule: NoiseSchedule, std: float = STD) -> MixtureDenoiser:
    return MixtureDenoiser(schedule, torch.tensor([[MEAN, -MEAN]]), torch.tensor([std], dtype=torch.float64))


def exact(schedule: NoiseSchedule, x: Tensor, t: float, s: float) -> Tensor:
    """Where the probability-flow ODE of N(m, s²) takes x from time t to s: (x − α m)/√(α² s² + σ²) stays."""
    m = torch.tensor([[MEAN, -MEAN]], dtype=x.dtype)

    def moments(time: float) -> tuple[float, float]:
        where = torch.tensor(time, dtype=torch.float64)
        a, b = float(schedule.alpha(where)), float(schedule.sigma(where))
        return a, math.hypot(a * STD, b)

    (a, size), (a_s, size_s) = moments(t), moments(s)
    return a_s * m + size_s / size * (x - a * m)


class Counted(Denoiser):
    """Another denoiser, counting calls and remembering times."""

    def __init__(self, inner: Denoiser) -> None:
        super().__init__(inner.schedule, inner.shape, inner.num_classes)
        self.inner, self.times = inner, [0.0][:0]

    def x0(self, x_t: Tensor, t: Tensor, cond: Tensor | None = None) -> Tensor:
        assert (t == t[0]).all()
        self.times.append(float(t[0]))
        return self.inner(x_t, t, cond)


@pytest.fixture(params=sorted(SCHEDULES))
def schedule(request: pytest.FixtureRequest) -> NoiseSchedule:
    return make_schedule(request.param)


def start(schedule: NoiseSchedule, count: int = 16, time: float | None = None, seed: int = 0) -> Tensor:
    z = torch.randn(count, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return schedule.start(z, at(schedule.t_max if time is None else time, z))


# Order


def error(sampler: Callable[..., Tensor], schedule: NoiseSchedule, steps: int) -> float:
    """At a moderate time, of a list between two fixed times, before the last jump to the data."""
    high, low = (float(schedule.time_of_level(torch.tensor(level, dtype=torch.float64))) for level in (4.0, 0.25))
    times = torch.linspace(high, low, steps + 1, dtype=torch.float64).tolist()
    x, found = start(schedule, time=high), []

    class Last(Counted):
        def x0(self, x_t: Tensor, t: Tensor, cond: Tensor | None = None) -> Tensor:
            found.append(x_t)
            return self.inner(x_t, t, cond)

    sampler(Last(gaussian(schedule)), x, times)
    return float((found[-1] - exact(schedule, x, high, low)).square().mean().sqrt())


@pytest.mark.parametrize(("sampler", "order"), [(ddim, 1), (euler, 1), (heun, 2)])
def test_halving_the_steps_divides_the_error_by_two_to_the_order(sampler: Callable[..., Tensor], order: int, schedule: NoiseSchedule) -> None:
    coarse, fine = error(sampler, schedule, 64), error(sampler, schedule, 128)
    assert coarse / fine == pytest.approx(2**order, rel=0.12)
    assert fine < (0.03 if order == 1 else 5e-4)


@pytest.mark.parametrize(("sampler", "tolerance"), [(ddim, 0.02), (euler, 0.03), (heun, 0.005)])
def test_deterministic_samplers_land_on_the_closed_form(sampler: Callable[..., Tensor], tolerance: float, schedule: NoiseSchedule) -> None:
    x = start(schedule)
    found = sampler(gaussian(schedule), x, schedule.steps(300))
    lowest = exact(schedule, x, schedule.t_max, schedule.t_min)
    expected = gaussian(schedule)(lowest, at(schedule.t_min, x))
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=0)


def test_heun_on_a_list_of_few_steps_is_closer_than_ddim_with_as_many_calls(schedule: NoiseSchedule) -> None:
    x = start(schedule, 200)
    expected = gaussian(schedule)(exact(schedule, x, schedule.t_max, schedule.t_min), at(schedule.t_min, x))
    of_heun = (heun(gaussian(schedule), x, schedule.steps(18)) - expected).square().mean().sqrt()
    of_ddim = (ddim(gaussian(schedule), x, schedule.steps(35)) - expected).square().mean().sqrt()
    assert of_heun < of_ddim


def test_one_step_from_the_top_is_the_denoiser(schedule: NoiseSchedule) -> None:
    x = start(schedule)
    for sampler in SAMPLERS.values():
        torch.testing.assert_close(sampler(gaussian(schedule), x, schedule.steps(1)), gaussian(schedule)(x, at(schedule.t_max, x)), rtol=0, atol=0)


def test_euler_of_edm_and_of_flow_is_ddim() -> None:
    for schedule in (EDM(), Flow()):
        x = start(schedule)
        torch.testing.assert_close(euler(gaussian(schedule), x, schedule.steps(12)), ddim(gaussian(schedule), x, schedule.steps(12)))


def test_ddim_is_the_same_in_every_schedule_at_equal_levels() -> None:
    x = start(EDM(), time=20.0)
    levels = EDM(0.05, 20.0).steps(10)
    expected = ddim(gaussian(EDM()), x, levels)
    for name in ("cosine", "flow", "trig"):
        schedule = make_schedule(name)
        times = schedule.time_of_level(torch.tensor(levels, dtype=torch.float64))
        torch.testing.assert_close(ddim(gaussian(schedule), x * schedule.alpha(times[0]), times.tolist()), expected)


def test_heun_of_edm_is_the_papers_step_by_hand() -> None:
    x, d = start(EDM(), time=10.0), gaussian(EDM())
    slope = (x - d(x, at(10.0, x))) / 10
    ahead = x + (3.0 - 10.0) * slope
    slope_ahead = (ahead - d(ahead, at(3.0, x))) / 3
    y = x + (3.0 - 10.0) * (slope + slope_ahead) / 2
    torch.testing.assert_close(heun(d, x, (10.0, 3.0)), d(y, at(3.0, x)))


@pytest.mark.parametrize("schedule", [Flow(0.0, 1.0), VPCosine(0.0, 1.0)])
def test_lists_from_nothing_but_noise_down_to_the_data_themselves(schedule: NoiseSchedule) -> None:
    x = start(schedule)
    m = torch.tensor([[MEAN, -MEAN]], dtype=torch.float64)
    for sampler in (ddim, euler, heun):
        torch.testing.assert_close(sampler(gaussian(schedule), x, schedule.steps(200)), m + STD * x, atol=0.02, rtol=0)


# Moments


def below_80(schedule: NoiseSchedule) -> list[float]:
    """Times of 60 steps, from the noise level 80 or the schedule's top down."""
    top = float(schedule.time_of_level(torch.tensor(min(80.0, float(schedule.level(torch.tensor(schedule.t_max)))), dtype=torch.float64)))
    return [t for t in schedule.steps(60) if t < top]


@pytest.mark.parametrize("sampler", sorted(SAMPLERS.keys() - {"renoise"}))
def test_samples_of_a_mixture_have_its_moments(sampler: str, schedule: NoiseSchedule) -> None:
    means = torch.tensor([[1.0, 0.0], [-0.5, 0.5]], dtype=torch.float64)
    made = MixtureDenoiser(schedule, means, torch.full((2,), 0.2, dtype=torch.float64), torch.tensor([1.0, 3.0]))
    options = {"generator": torch.Generator().manual_seed(1)} if sampler == "gamma" else {}
    times = below_80(schedule)
    x = SAMPLERS[sampler](made, start(schedule, 3000, times[0]), times, **options)
    torch.testing.assert_close(x.mean(0), torch.tensor([-0.125, 0.375], dtype=torch.float64), atol=0.1, rtol=0)
    expected = torch.tensor([0.04 + 0.25 * 0.75 * 1.5**2, 0.04 + 0.25 * 0.75 * 0.25], dtype=torch.float64)
    torch.testing.assert_close(x.var(0), expected, rtol=0.25, atol=0)


def test_re_noising_keeps_what_symmetry_keeps_and_is_its_own_loop(schedule: NoiseSchedule) -> None:
    """Of an exact denoiser it is no exact sampler (it re-noises posterior means); two equal modes stay equal, and every step is denoise, then noise."""
    means = torch.tensor([[0.75, -0.25], [-0.75, 0.25]], dtype=torch.float64)
    made = MixtureDenoiser(schedule, means, torch.full((2,), 0.2, dtype=torch.float64))
    times = below_80(schedule)[::10]
    begun = start(schedule, 3000, times[0])
    x = SAMPLERS["renoise"](made, begun, times, generator=torch.Generator().manual_seed(1))
    assert bool((x.mean(0).abs() < 4 * x.std(0) / 3000**0.5).all())
    by_hand, fresh = begun, torch.Generator().manual_seed(1)
    for now, after in pairwise(times):
        noise = torch.randn(by_hand.shape, dtype=by_hand.dtype, generator=fresh)
        t, s = (torch.full((3000,), time, dtype=torch.float64) for time in (now, after))
        by_hand = schedule.alpha(s)[:, None] * made(by_hand, t) + schedule.sigma(s)[:, None] * noise
    torch.testing.assert_close(x, made(by_hand, torch.full((3000,), times[-1], dtype=torch.float64)))


def test_stochastic_ddim_keeps_the_variance_of_a_point_and_of_a_gaussian() -> None:
    draw = torch.Generator().manual_seed(0)
    for name in SCHEDULES:
        schedule = make_schedule(name)
        t, s = (float(schedule.time_of_level(torch.tensor(level, dtype=torch.float64))) for level in (1.0, 0.4))
        m = torch.tensor([[MEAN, -MEAN]], dtype=torch.float64)
        noise, fresh = torch.randn(2, 40_000, 2, generator=draw, dtype=torch.float64)
        for eta in (0.0, 0.5, 1.0):
            # of a single known x0 the step goes from N(α_t x0, σ_t²) to N(α_s x0, σ_s²), whatever η
            x_t = schedule.add_noise(m.expand_as(noise), noise, at(t, noise))
            x_s = ddim_step(schedule, x_t, m.expand_as(noise), at(t, noise), at(s, noise), eta=eta, noise=fresh)
            ideal = schedule.add_noise(m, torch.zeros_like(m), at(s, m))
            torch.testing.assert_close(x_s.mean(0, keepdim=True), ideal, atol=0.02, rtol=0)
            torch.testing.assert_close(x_s.std(0), schedule.sigma(at(s, noise[:2])), rtol=0.02, atol=0)
        # η = 1 is the ancestral step: with the posterior mean its variance is c² + (coefficient of x_t)² Var x_t
        c2 = float(schedule.sigma(at(s, noise[:1])) ** 2) * (1 - 0.4**2)
        d = gaussian(schedule)
        x_t = schedule.add_noise(m + STD * noise, fresh, at(t, noise))
        fresh = torch.randn(40_000, 2, generator=draw, dtype=torch.float64)
        plain = ddim_step(schedule, x_t, d(x_t, at(t, x_t)), at(t, x_t), at(s, x_t), eta=1.0, noise=torch.zeros_like(x_t))
        full = ddim_step(schedule, x_t, d(x_t, at(t, x_t)), at(t, x_t), at(s, x_t), eta=1.0, noise=fresh)
        torch.testing.assert_close(full, plain + math.sqrt(c2) * fresh)


def test_many_stochastic_steps_still_end_in_the_gaussian() -> None:
    for schedule in (EDM(), VPCosine()):
        x = ddim(gaussian(schedule), start(schedule, 6000), schedule.steps(150), eta=1.0, generator=torch.Generator().manual_seed(3))
        torch.testing.assert_close(x.mean(0), torch.tensor([MEAN, -MEAN]).double(), atol=0.03, rtol=0)
        torch.testing.assert_close(x.std(0), torch.full((2,), STD).double(), atol=0.03, rtol=0)


def test_the_stochastic_share_is_that_of_the_paper_where_variance_is_preserved() -> None:
    schedule, t, s = VPCosine(), torch.tensor([0.7], dtype=torch.float64), torch.tensor([0.4], dtype=torch.float64)
    zero, one = torch.zeros(1, 1, dtype=torch.float64), torch.ones(1, 1, dtype=torch.float64)
    a_t, a_s, s_t, s_s = (float(f(x)) for f, x in ((schedule.alpha, t), (schedule.alpha, s), (schedule.sigma, t), (schedule.sigma, s)))
    found = float(ddim_step(schedule, zero, zero, t, s, eta=0.3, noise=one))
    assert found == pytest.approx(0.3 * s_s / s_t * math.sqrt(1 - a_t**2 / a_s**2))


# Limits


def test_gamma_of_share_zero_is_ddim_and_of_share_one_is_renoise_with_equal_noise(schedule: NoiseSchedule) -> None:
    x, times = start(schedule), schedule.few_steps(4)
    d = gaussian(schedule)

    def draw() -> torch.Generator:
        return torch.Generator().manual_seed(7)

    torch.testing.assert_close(gamma(d, x, times, share=0.0, generator=draw()), ddim(d, x, times), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(gamma(d, x, times, share=1.0, generator=draw()), renoise(d, x, times, generator=draw()), rtol=0, atol=0)
    between = gamma(d, x, times, share=0.3, generator=draw())
    assert not torch.allclose(between, ddim(d, x, times))


def test_lifting_makes_the_noise_of_the_higher_time(schedule: NoiseSchedule) -> None:
    b, s = (float(schedule.time_of_level(torch.tensor(level, dtype=torch.float64))) for level in (0.3, 1.5))
    draw = torch.Generator().manual_seed(0)
    noise, fresh = torch.randn(2, 40_000, 1, generator=draw, dtype=torch.float64)
    x_b = schedule.add_noise(torch.ones_like(noise), noise, at(b, noise))
    x_s = lift(schedule, x_b, at(b, noise), at(s, noise), fresh)
    torch.testing.assert_close(x_s.mean(0), schedule.alpha(at(s, noise[:1])), atol=0.02, rtol=0)
    torch.testing.assert_close(x_s.std(0), schedule.sigma(at(s, noise[:1])), rtol=0.02, atol=0)
    torch.testing.assert_close(lift(schedule, x_b, None, at(s, noise), fresh), schedule.add_noise(x_b, fresh, at(s, noise)))


def test_renoising_by_hand() -> None:
    schedule, times = EDM(), (80.0, 5.0)
    x, d = start(schedule), gaussian(EDM())
    fresh = torch.randn(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(9))
    expected = d(d(x, at(80.0, x)) + 5 * fresh, at(5.0, x))
    torch.testing.assert_close(renoise(d, x, times, generator=torch.Generator().manual_seed(9)), expected)


# Calls, types, gradients


@pytest.mark.parametrize("sampler", sorted(SAMPLERS))
def test_calls_are_counted_right_and_conditions_arrive(sampler: str) -> None:
    schedule = EDM()
    inner = MixtureDenoiser(schedule, torch.tensor([[1.0, 0.0], [-1.0, 0.0]]), torch.full((2,), 0.1), classes=torch.tensor([0, 1]))
    counted = Counted(inner)
    cond = torch.tensor([0, 1]).repeat(8)
    x = SAMPLERS[sampler](counted, start(schedule).float(), schedule.steps(6), cond)
    assert len(counted.times) == calls(sampler, 6)
    assert x.dtype == torch.float32
    assert (x[:, 0].sign() == 1 - 2 * cond).all()
    assert set(counted.times) == set(schedule.steps(6))


def test_gradient_flows_through_all_steps() -> None:
    for sampler in (ddim, heun, euler, renoise, gamma):
        x = start(EDM()).requires_grad_()
        (slope,) = torch.autograd.grad(sampler(gaussian(EDM()), x, (80.0, 2.0, 0.3)).sum(), x)
        assert slope.isfinite().all()
        assert (slope != 0).all()


# Wrong input


@pytest.mark.parametrize("sampler", sorted(SAMPLERS))
def test_times_must_descend(sampler: str) -> None:
    for times in ((), (1.0, 2.0), (1.0, 1.0)):
        with pytest.raises(InputError) as caught:
            SAMPLERS[sampler](gaussian(EDM()), start(EDM()), times)
        assert caught.value.where == "levels"


def test_shares_out_of_range() -> None:
    x, d = start(EDM()), gaussian(EDM())
    for call, where in (
        (lambda: gamma(d, x, (2.0, 1.0), share=1.1), "gamma"),
        (lambda: gamma(d, x, (2.0, 1.0), share=math.nan), "gamma"),
        (lambda: ddim(d, x, (2.0, 1.0), eta=-0.1), "eta"),
        (lambda: ddim(d, x, (2.0, 1.0), eta=1.1), "eta"),
        (lambda: ddim_step(EDM(), x, x, at(2.0, x), at(1.0, x), eta=0.5), "noise"),
    ):
        with pytest.raises(InputError) as caught:
            call()
        assert caught.value.where == where
    assert samplers.SAMPLERS["ddim"] is ddim
