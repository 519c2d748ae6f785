"""Noise schedules: coefficients and derivatives, every conversion there and back, times of levels, lists of times, wrong input."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from limbeck.diffusion.schedules import EDM, KINDS, SCHEDULES, Flow, Kind, NoiseSchedule, VPCosine, VPDiscrete, divisor, expand, make_schedule, times_descend
from limbeck.errors import InputError

NAMES = st.sampled_from(sorted(SCHEDULES))
FRACTIONS = st.floats(0.02, 0.98)
SEEDS = st.integers(0, 2**31)


def kinds(schedule: NoiseSchedule) -> tuple[Kind, ...]:
    return tuple(kind for kind in KINDS if kind != "v" or schedule.preserves_variance)


def drawn(schedule: NoiseSchedule, fraction: float, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """x0, ε [3, 2, 2] and t [3], float64."""
    draw = torch.Generator().manual_seed(seed)
    x0, noise = torch.randn(2, 3, 2, 2, generator=draw, dtype=torch.float64)
    t = schedule.t_min + (schedule.t_max - schedule.t_min) * torch.tensor([fraction, 1 - fraction, fraction**2], dtype=torch.float64)
    return x0, noise, t


@pytest.fixture(params=sorted(SCHEDULES))
def schedule(request: pytest.FixtureRequest) -> NoiseSchedule:
    return make_schedule(request.param)


# Coefficients


def test_coefficients_are_those_of_the_sheet() -> None:
    t = torch.tensor([0.1, 0.5, 0.9])
    exact = t.double()
    expected = {
        "edm": (torch.ones(3).double(), exact),
        "cosine": (torch.cos(math.pi / 2 * exact), torch.sin(math.pi / 2 * exact)),
        "flow": (1 - exact, exact),
        "trig": (torch.cos(exact), torch.sin(exact)),
    }
    for name, (alpha, sigma) in expected.items():
        made = make_schedule(name)
        torch.testing.assert_close(made.alpha(t), alpha)
        torch.testing.assert_close(made.sigma(t), sigma)


def test_vp_is_the_product_of_one_minus_beta_at_its_steps() -> None:
    for kind in ("scaled_linear", "linear"):
        made = VPDiscrete(kind=kind)
        bar, wanted = 1.0, {0, 1, 499, 998, 999}
        for n in range(1000):
            low, high = 0.00085, 0.012
            beta = (low**0.5 + n / 999 * (high**0.5 - low**0.5)) ** 2 if kind == "scaled_linear" else low + n / 999 * (high - low)
            bar *= 1 - beta
            if n in wanted:
                assert made.alpha(torch.tensor(n / 1000)).item() ** 2 == pytest.approx(bar, rel=1e-6)
    last = VPDiscrete().alpha(torch.tensor([0.999], dtype=torch.float64)).item() ** 2
    assert last == pytest.approx(0.0047, abs=5e-5)  # not pure noise


def test_vp_between_two_steps_is_the_geometric_mean_of_alpha_bar() -> None:
    made = VPDiscrete()
    low, mid, high = made.alpha(torch.tensor([0.2, 0.2005, 0.201], dtype=torch.float64)).tolist()
    assert mid == pytest.approx(math.sqrt(low * high), rel=1e-12)


def test_variance_is_preserved_where_it_is_said(schedule: NoiseSchedule) -> None:
    t = schedule.grid(50)
    total = schedule.alpha(t) ** 2 + schedule.sigma(t) ** 2
    assert torch.allclose(total, torch.ones_like(total), atol=1e-12) == schedule.preserves_variance


@given(NAMES, FRACTIONS)
def test_derivatives_are_those_of_finite_differences(name: str, fraction: float) -> None:
    made = make_schedule(name)
    place = made.t_min + fraction * (made.t_max - made.t_min)
    if name == "vp":  # log ᾱ is linear between the knots, so away from them
        place = (math.floor(place * 1000) + 0.25 + fraction / 2) / 1000
    h = 1e-6
    below, t, above = torch.tensor([[place - h], [place], [place + h]], dtype=torch.float64)
    for value, slope in ((made.alpha, made.d_alpha), (made.sigma, made.d_sigma)):
        torch.testing.assert_close(slope(t), (value(above) - value(below)) / (2 * h), rtol=1e-6, atol=1e-8)


def test_coefficients_are_float64_of_the_times_shape_even_for_float32_times(schedule: NoiseSchedule) -> None:
    t = torch.full((2, 3), 0.3)
    for function in (schedule.alpha, schedule.sigma, schedule.d_alpha, schedule.d_sigma, schedule.level, schedule.log_snr):
        found = function(t)
        assert found.dtype == torch.float64
        assert found.shape == (2, 3)


def test_level_rises_with_time(schedule: NoiseSchedule) -> None:
    levels = schedule.level(schedule.grid(200))
    assert (levels.diff() > 0).all()


@given(NAMES, st.floats(0, 1))
@example("vp", 0.0)
@example("vp", 1.0)
def test_times_of_levels_and_of_log_snr_are_inverses(name: str, fraction: float) -> None:
    made = make_schedule(name)
    t = torch.tensor([made.t_min + fraction * (made.t_max - made.t_min)], dtype=torch.float64)
    torch.testing.assert_close(made.time_of_level(made.level(t)), t, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(made.time_of_log_snr(made.log_snr(t)), t, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(made.level(t), torch.exp(-made.log_snr(t)))
    level = made.level(t).clamp_min(1e-4)
    torch.testing.assert_close(made.level(made.time_of_level(level)), level, rtol=1e-8, atol=0)


# Conversions


@given(NAMES, FRACTIONS, SEEDS)
def test_every_conversion_of_a_known_pair_is_its_target_and_comes_back(name: str, fraction: float, seed: int) -> None:
    made = make_schedule(name)
    x0, noise, t = drawn(made, fraction, seed)
    x_t = made.add_noise(x0, noise, t)
    torch.testing.assert_close(x_t, expand(made.alpha(t), x0) * x0 + expand(made.sigma(t), x0) * noise)
    for source in kinds(made):
        given_ = made.target(x0, noise, t, source)
        for target in kinds(made):
            torch.testing.assert_close(made.convert(x_t, given_, t, source, target), made.target(x0, noise, t, target), rtol=1e-8, atol=1e-8)


@given(NAMES, FRACTIONS, SEEDS)
def test_conversions_of_an_arbitrary_prediction_are_round_trips_and_chain(name: str, fraction: float, seed: int) -> None:
    made = make_schedule(name)
    x_t, prediction, t = drawn(made, fraction, seed)
    for source in kinds(made):
        for target in kinds(made):
            there = made.convert(x_t, prediction, t, source, target)
            torch.testing.assert_close(made.convert(x_t, there, t, target, source), prediction, rtol=1e-7, atol=1e-7)
            direct = made.convert(x_t, prediction, t, source, "x0")
            torch.testing.assert_close(made.convert(x_t, there, t, target, "x0"), direct, rtol=1e-7, atol=1e-7)


@given(FRACTIONS, SEEDS)
def test_conversions_are_the_formulas_of_the_sheet(fraction: float, seed: int) -> None:
    for name in SCHEDULES:
        made = make_schedule(name)
        x, p, t = drawn(made, fraction, seed)
        a, s, da, ds = (expand(f(t), x) for f in (made.alpha, made.sigma, made.d_alpha, made.d_sigma))
        tight = {"rtol": 1e-8, "atol": 1e-9}
        torch.testing.assert_close(made.convert(x, p, t, "eps", "x0"), (x - s * p) / a, **tight)
        torch.testing.assert_close(made.convert(x, p, t, "x0", "eps"), (x - a * p) / s, **tight)
        torch.testing.assert_close(made.convert(x, p, t, "x0", "score"), (a * p - x) / s**2, **tight)
        torch.testing.assert_close(made.convert(x, p, t, "velocity", "x0"), (x * ds / s - p) / (a * ds / s - da), rtol=1e-7, atol=1e-7)
        if name == "flow":
            torch.testing.assert_close(made.convert(x, p, t, "velocity", "x0"), x - s * p, **tight)
            torch.testing.assert_close(made.convert(x, p, t, "velocity", "eps"), x + a * p, **tight)
        if name == "edm":
            torch.testing.assert_close(made.convert(x, p, t, "x0", "velocity"), (x - p) / s, **tight)
        if name == "trig":
            torch.testing.assert_close(made.convert(x, p, t, "velocity", "v"), p, **tight)


def test_the_velocity_is_the_time_derivative_along_a_fixed_pair(schedule: NoiseSchedule) -> None:
    x0, noise, t = drawn(schedule, 0.37, 0)
    t = (torch.floor(t * 1000) + 0.5) / 1000 if schedule.name == "vp" else t
    slope = (schedule.add_noise(x0, noise, t + 1e-6) - schedule.add_noise(x0, noise, t - 1e-6)) / 2e-6
    torch.testing.assert_close(schedule.target(x0, noise, t, "velocity"), slope, rtol=1e-6, atol=1e-6)


def test_a_conversion_keeps_the_predictions_type_and_is_computed_in_float64(schedule: NoiseSchedule) -> None:
    x0, noise, t = drawn(schedule, 0.3, 1)
    x_t = schedule.add_noise(x0, noise, t)
    for target in kinds(schedule):
        found = schedule.convert(x_t.float(), x0.float(), t, "x0", target)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, schedule.convert(x_t.float().double(), x0.float().double(), t, "x0", target).float(), rtol=0, atol=0)


def test_conversions_at_the_very_ends_are_finite() -> None:
    for made in (Flow(0, 1), VPCosine(0, 1), EDM(0, 80)):
        for t in (made.t_min, made.t_max):
            for source in kinds(made):
                for target in kinds(made):
                    found = made.convert(torch.ones(1, 2), torch.ones(1, 2), torch.tensor([t], dtype=torch.float64), source, target)
                    assert found.isfinite().all()


def test_divisor_moves_away_from_zero_and_keeps_the_sign() -> None:
    values = torch.tensor([0.0, 1e-9, -1e-9, 2e-6, -3.0], dtype=torch.float64)
    torch.testing.assert_close(divisor(values), torch.tensor([1e-6, 1e-6, -1e-6, 2e-6, -3.0], dtype=torch.float64), rtol=1e-6, atol=0)


# What networks and samplers are given


def test_network_times_and_starts_are_those_of_the_sheet() -> None:
    t, z = torch.tensor([0.25, 0.75], dtype=torch.float64), torch.randn(2, 3, generator=torch.Generator().manual_seed(0))
    for name, time, start in (
        ("edm", t.log() / 4, t.float().unsqueeze(1) * z),
        ("vp", 1000 * t, z),
        ("cosine", 1000 * t, z),
        ("flow", 1000 * t, t.float().unsqueeze(1) * z),
        ("trig", t, z),
    ):
        made = make_schedule(name)
        assert made.network_time(t).dtype == torch.float32
        torch.testing.assert_close(made.network_time(t), time.float())
        torch.testing.assert_close(made.start(z, t), start)


def test_karras_list_by_hand_and_its_share_below_eight() -> None:
    made = EDM()
    grid = made.grid(1000)
    for i in (0, 1, 500, 999):
        expected = (80 ** (1 / 7) + (999 - i) / 999 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
        assert grid[i].item() == pytest.approx(expected, rel=1e-10)
    assert (grid[0].item(), grid[-1].item()) == (0.002, 80.0)
    assert (grid < 8).double().mean().item() == pytest.approx(0.64, abs=0.01)


def test_few_steps_of_known_lists() -> None:
    for name in ("vp", "cosine", "flow"):
        assert make_schedule(name).few_steps(4) == pytest.approx((0.999, 0.749, 0.499, 0.249), abs=1e-3)
    assert VPDiscrete().few_steps(4) == (0.999, 0.749, 0.499, 0.249)
    assert EDM().few_steps(4) == pytest.approx((80, 17.498, 2.504, 0.168), abs=1e-3)
    assert EDM().few_steps(1) == (80.0,)


def test_lists_of_times_descend_from_the_top_within_the_schedule(schedule: NoiseSchedule) -> None:
    for count in (1, 2, 3, 7, 18, 1000):
        for times in (schedule.steps(count), schedule.few_steps(count)):
            assert len(times) == count
            assert times[0] == schedule.t_max
            assert times[-1] >= schedule.t_min
            assert all(later < earlier for earlier, later in pairwise(times))
        assert count == 1 or schedule.steps(count)[-1] == schedule.t_min
    torch.testing.assert_close(torch.tensor(schedule.few_steps(1000), dtype=torch.float64), schedule.grid(1000).flip(0), rtol=0, atol=0)


def test_a_kept_grid_is_made_once_and_is_the_grid(schedule: NoiseSchedule) -> None:
    kept = schedule.kept_grid(10, torch.device("cpu"))
    assert kept is schedule.kept_grid(10, torch.device("cpu"))
    assert torch.equal(kept, schedule.grid(10))


def test_the_vp_table_is_made_once_a_device() -> None:
    schedule = VPDiscrete()
    cpu, meta = torch.device("cpu"), torch.device("meta")
    assert schedule._log_alpha_bar(cpu) is schedule._log_alpha_bar(cpu)
    assert schedule._log_alpha_bar(meta) is schedule._log_alpha_bar(meta)
    assert schedule._log_alpha_bar(meta).device == meta
    assert torch.equal(schedule._log_alpha_bar(cpu), VPDiscrete()._log_alpha_bar(cpu))


def test_schedules_are_equal_by_type_and_options(schedule: NoiseSchedule) -> None:
    again = make_schedule(schedule.name)
    again.kept_grid(10, torch.device("cpu"))
    again.alpha(torch.zeros(1))
    assert schedule == again
    assert hash(schedule) == hash(again)
    assert all(schedule != make_schedule(name) for name in SCHEDULES if name != schedule.name)
    assert schedule != schedule.name
    assert EDM() != EDM(rho=5.0)
    assert EDM() != EDM(t_max=10.0)
    assert VPDiscrete() != VPDiscrete(kind="linear")
    assert VPDiscrete() != VPDiscrete(count=500)


# Wrong input


@pytest.mark.parametrize(
    ("name", "options", "where"),
    [
        ("edn", {}, "schedule"),
        ("edm", {"beta": 1.0}, "schedule"),
        ("edm", {"t_max": "80"}, "schedule"),
        ("edm", {"rho": 0.0}, "rho"),
        ("edm", {"rho": math.inf}, "rho"),
        ("edm", {"t_min": 80.0}, "t_min"),
        ("edm", {"t_max": math.inf}, "t_min"),
        ("flow", {"t_min": -0.1}, "t_min"),
        ("flow", {"t_max": 1.2}, "t_max"),
        ("cosine", {"t_max": 1.2}, "t_max"),
        ("trig", {"t_max": 1.6}, "t_max"),
        ("vp", {"beta_start": 0.5}, "beta_start"),
        ("vp", {"beta_end": math.nan}, "beta_start"),
        ("vp", {"count": 1}, "beta_start"),
        ("vp", {"count": 10.5}, "count"),
        ("vp", {"kind": "cubic"}, "kind"),
    ],
)
def test_schedules_that_cannot_be(name: str, options: dict[str, float], where: str) -> None:
    with pytest.raises(InputError) as caught:
        make_schedule(name, **options)
    assert caught.value.where == where


def test_a_misspelt_schedule_is_suggested() -> None:
    with pytest.raises(InputError, match="Did you mean 'cosine'"):
        make_schedule("cosin")


@pytest.mark.parametrize("name", ["edm", "flow"])
def test_v_needs_a_preserved_variance(name: str) -> None:
    made, x, t = make_schedule(name), torch.ones(1, 2), torch.tensor([0.5])
    for call in (lambda: made.convert(x, x, t, "v", "x0"), lambda: made.convert(x, x, t, "x0", "v"), lambda: made.target(x, x, t, "v")):
        with pytest.raises(InputError, match="velocity") as caught:
            call()
        assert caught.value.where == "prediction"


def test_unknown_kinds_and_counts_are_told() -> None:
    made, x, t = EDM(), torch.ones(1, 2), torch.tensor([0.5])
    for call, where in (
        (lambda: made.convert(x, x, t, "epz", "x0"), "prediction"),  # type: ignore[arg-type]
        (lambda: made.target(x, x, t, "epz"), "prediction"),  # type: ignore[arg-type]
        (lambda: made.steps(0), "steps"),
        (lambda: made.few_steps(0), "steps"),
        (lambda: made.few_steps(11, levels=10), "steps"),
    ):
        with pytest.raises(InputError) as caught:
            call()
        assert caught.value.where == where


@pytest.mark.parametrize("times", [(), (1.0, 1.0), (1.0, 2.0), (3.0, 1.0, 2.0), (math.nan,), (2.0, math.nan), (2.0, math.nan, 1.0)])
def test_times_that_do_not_descend(times: tuple[float, ...]) -> None:
    with pytest.raises(InputError) as caught:
        times_descend(times)
    assert caught.value.where == "levels"
