"""Training times: each distribution against its own, cuts, shift, determinism, wrong settings."""

import math
from collections.abc import Callable

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from limbeck.diffusion.levels import LevelSpec, default_levels
from limbeck.diffusion.schedules import EDM, SCHEDULES, Flow, NoiseSchedule, VPDiscrete, make_schedule
from limbeck.errors import InputError

COUNT = 20_000
LIMIT = 1.95 / math.sqrt(COUNT)
"""Of the Kolmogorov–Smirnov statistic: the 99.9th percentile."""


def sampled(spec: LevelSpec, schedule: NoiseSchedule, seed: int = 0, count: int = COUNT) -> Tensor:
    return spec.sample(schedule, count, torch.Generator().manual_seed(seed))


def distance(values: Tensor, cdf: Callable[[Tensor], Tensor]) -> float:
    """The Kolmogorov–Smirnov statistic of values against a continuous distribution function."""
    ordered, count = values.double().sort().values, len(values)
    expected, steps = cdf(ordered), torch.arange(count + 1, dtype=torch.float64) / count
    return max(float((steps[1:] - expected).max()), float((expected - steps[:-1]).max()))


def normal_cdf(mean: float, std: float) -> Callable[[Tensor], Tensor]:
    return lambda x: torch.distributions.Normal(torch.tensor(mean).double(), torch.tensor(std).double()).cdf(x)


@pytest.fixture(params=sorted(SCHEDULES))
def schedule(request: pytest.FixtureRequest) -> NoiseSchedule:
    return make_schedule(request.param)


def test_uniform_is_uniform_over_the_times(schedule: NoiseSchedule) -> None:
    t = sampled(LevelSpec(kind="uniform"), schedule)
    assert distance(t, lambda x: (x - schedule.t_min) / (schedule.t_max - schedule.t_min)) < LIMIT


def test_uniform_is_cut_to_its_part() -> None:
    schedule = Flow()
    t = sampled(LevelSpec(kind="uniform", low=0.2, high=0.6), schedule)
    first, last = (schedule.t_min + share * (schedule.t_max - schedule.t_min) for share in (0.2, 0.6))
    assert distance(t, lambda x: (x - first) / (last - first)) < LIMIT


@pytest.mark.parametrize("name", ["edm", "vp", "flow", "cosine", "trig"])
def test_lognormal_is_normal_in_the_log_of_the_level(name: str) -> None:
    schedule = EDM(1e-4, 1e4) if name == "edm" else make_schedule(name)
    spec = LevelSpec(kind="lognormal", mean=0.0, std=0.7)
    assert distance(schedule.level(sampled(spec, schedule)).log(), normal_cdf(0.0, 0.7)) < LIMIT


def test_a_lognormal_of_edm_by_default_is_minus_one_point_two() -> None:
    assert distance(sampled(default_levels(EDM()), EDM()).log(), normal_cdf(-1.2, 1.2)) < LIMIT


def test_logit_normal_is_normal_in_the_logit_of_the_time() -> None:
    schedule = Flow(0.1, 0.9)
    t = sampled(LevelSpec(kind="logit_normal", mean=0.3, std=0.8), schedule)
    assert distance(torch.logit((t - 0.1) / 0.8), normal_cdf(0.3, 0.8)) < LIMIT


def test_index_draws_each_time_of_the_list_equally_often(schedule: NoiseSchedule) -> None:
    spec = LevelSpec(levels=10)
    t = sampled(spec, schedule)
    counts = torch.stack([(t == time).sum() for time in schedule.grid(10)])
    assert int(counts.sum()) == COUNT
    chi_square = float(((counts - COUNT / 10) ** 2 / (COUNT / 10)).sum())
    assert chi_square < 27.9  # 9 degrees of freedom, 99.9 %


def test_index_is_cut_to_two_and_ninety_eight_per_cent() -> None:
    schedule = EDM()
    t, grid = sampled(LevelSpec(low=0.02, high=0.98), schedule, count=100_000), schedule.grid(1000)
    assert (t.min().item(), t.max().item()) == (grid[20].item(), grid[980].item())  # both ends, as randint(20, 981) of DMD2's code
    assert len(t.unique()) == 961
    whole = sampled(LevelSpec(), schedule, count=100_000)
    assert (whole.min().item(), whole.max().item()) == (schedule.t_min, schedule.t_max)


def test_index_of_vp_are_its_own_steps() -> None:
    t = sampled(LevelSpec(), VPDiscrete())
    torch.testing.assert_close(t * 1000, (t * 1000).round(), rtol=0, atol=1e-9)
    assert distance(t, lambda x: x) < LIMIT + 1e-3


@pytest.mark.parametrize(("low", "high"), [(0.0, 0.0004), (0.5, 0.5001), (0.9999, 1.0)])
def test_a_cut_thinner_than_a_level_leaves_one(low: float, high: float) -> None:
    assert len(sampled(LevelSpec(low=low, high=high), EDM(), count=100).unique()) == 1


def test_shift_moves_times_by_its_formula_towards_noise() -> None:
    schedule = Flow(0.0, 1.0)
    plain, shifted = (sampled(LevelSpec(kind="uniform", shift=s), schedule) for s in (1.0, 3.0))
    torch.testing.assert_close(shifted, 3 * plain / (1 + 2 * plain))
    assert (shifted >= plain).all()
    # a shift multiplies σ/α
    torch.testing.assert_close(schedule.level(shifted), 3 * schedule.level(plain))


def test_times_stay_within_the_schedule_in_float64(schedule: NoiseSchedule) -> None:
    for kind in ("index", "lognormal", "logit_normal", "uniform"):
        t = sampled(LevelSpec(kind=kind, mean=0.0, std=30.0), schedule, count=2000)  # type: ignore[arg-type]
        assert t.dtype == torch.float64
        assert t.shape == (2000,)
        assert t.min() >= schedule.t_min
        assert t.max() <= schedule.t_max


@pytest.mark.parametrize("kind", ["index", "lognormal", "logit_normal", "uniform"])
def test_times_are_a_function_of_the_generator(kind: str) -> None:
    spec = LevelSpec(kind=kind)  # type: ignore[arg-type]
    before = torch.get_rng_state()
    assert torch.equal(sampled(spec, Flow(), 3, 20), sampled(spec, Flow(), 3, 20))
    assert not torch.equal(sampled(spec, Flow(), 3, 20), sampled(spec, Flow(), 4, 20))
    assert torch.equal(before, torch.get_rng_state())
    assert sampled(spec, Flow(), count=5).device.type == "cpu"


def test_defaults_of_each_schedule() -> None:
    kinds = {name: default_levels(make_schedule(name)).kind for name in SCHEDULES}
    assert kinds == {"edm": "lognormal", "flow": "logit_normal", "vp": "uniform", "cosine": "uniform", "trig": "uniform"}
    flow = default_levels(Flow())
    assert (flow.mean, flow.std) == (0.0, 1.0)


@pytest.mark.parametrize(
    "fields",
    [{"kind": "normal"}, {"levels": 1}, {"low": -0.1}, {"high": 1.1}, {"std": 0.0}, {"shift": 0.0}, {"low": 0.9, "high": 0.1}, {"low": 0.5, "high": 0.5}],
)
def test_settings_that_make_no_sense(fields: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        LevelSpec(**fields)  # type: ignore[arg-type]


def test_a_shift_of_times_beyond_one_is_refused() -> None:
    for name in ("edm", "trig"):
        with pytest.raises(InputError) as caught:
            sampled(LevelSpec(kind="uniform", shift=3.0), make_schedule(name))
        assert caught.value.where == "shift"
