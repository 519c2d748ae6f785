"""Ratios out of logits, the two normalisations, the statistics."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from limbeck.diffusion.f_divergences import DIVERGENCES
from limbeck.diffusion.levels import LevelSpec
from limbeck.diffusion.ratio import BinnedMean, RatioWeights, Weights, WeightStatistics, density_ratio, mean_one, noise_bins, not_in_parts
from limbeck.diffusion.schedules import EDM, SCHEDULES, make_schedule
from limbeck.errors import InputError

SEEDS = st.integers(0, 2**31)


def drawn(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ---- the ratio -----------------------------------------------------------------------------------------------------------


def test_a_perfect_discriminator_gives_the_ratio_of_the_densities() -> None:
    x = drawn(0, 500)
    p, q = torch.distributions.Normal(0.3, 1.0), torch.distributions.Normal(0.0, 1.2)
    logits = p.log_prob(x) - q.log_prob(x)
    found = density_ratio(logits[:, None], low=1e-4, high=1e4)
    torch.testing.assert_close(found.value, (p.log_prob(x).exp() / q.log_prob(x).exp()), rtol=1e-4, atol=1e-6)
    assert not found.clipped.any()


def test_heads_are_averaged_before_anything_else() -> None:
    logits = torch.tensor([[1.0, -3.0], [30.0, -30.0]])
    torch.testing.assert_close(density_ratio(logits).value, torch.tensor([torch.e**-1, 1.0]))


def test_clips() -> None:
    logits = torch.tensor([[-100.0], [-3.0], [0.0], [2.0], [5.0], [1000.0]])
    found = density_ratio(logits)
    torch.testing.assert_close(found.value, torch.tensor([0.1, 0.1, 1.0, torch.e**2, 20.0, 20.0]))
    assert found.clipped.tolist() == [True, True, False, False, True, True]
    wide = density_ratio(logits, low=1e-9, high=1e9).value
    torch.testing.assert_close(wide[[0, -1]], torch.tensor([-10.0, 10.0]).exp())  # the logit is clipped first: no overflow
    with pytest.raises(InputError, match="bounds"):
        density_ratio(logits, low=2.0, high=1.0)


def test_no_gradient_and_float32_from_half_precision() -> None:
    logits = drawn(1, 8, 2).requires_grad_()
    assert not density_ratio(logits).value.requires_grad
    half = density_ratio(drawn(1, 8, 2).bfloat16()).value
    assert half.dtype == torch.float32


# ---- bins ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("axis", ["index", "time", "log_level"])
def test_bins_cover_the_range_in_order(name, axis) -> None:
    schedule = make_schedule(name)
    t = schedule.grid(1000)
    bins = noise_bins(schedule, t, 10, axis)
    assert bins[0] == 0
    assert bins[-1] == 9
    assert (bins.diff() >= 0).all()
    assert noise_bins(schedule, torch.tensor([schedule.t_min - 1e-12, schedule.t_max + 1e-9], dtype=torch.float64), 10, axis).tolist() == [0, 9]


def test_in_the_lists_index_every_bin_gets_as_many_draws_and_linear_in_t_64_percent_fall_into_the_lowest() -> None:
    schedule, draw = EDM(), torch.Generator().manual_seed(0)
    t = LevelSpec().sample(schedule, 20_000, draw)
    share = {axis: noise_bins(schedule, t, 10, axis).bincount(minlength=10) / len(t) for axis in ("index", "time", "log_level")}  # type: ignore[arg-type]
    assert ((share["index"] - 0.1).abs() < 0.01).all()
    assert share["time"][0] == pytest.approx(0.64, abs=0.015)
    assert share["log_level"].max() < 0.3


# ---- stage 1 ---------------------------------------------------------------------------------------------------------------


@given(SEEDS, st.integers(1, 12))
def test_without_memory_every_bin_that_is_visited_has_the_mean_1(seed: int, count: int) -> None:
    r, bins = drawn(seed, 64).exp(), torch.randint(count, (64,), generator=torch.Generator().manual_seed(seed))
    found = BinnedMean(count).normalise(r, bins)
    for k in bins.unique():
        assert float(found[bins == k].mean()) == pytest.approx(1, abs=2e-5)
        if (bins == k).sum() == 1:
            assert float(found[bins == k]) == pytest.approx(1, abs=2e-5)


def test_memory_moves_the_means_of_visited_bins_alone() -> None:
    stage = BinnedMean(3, decay=0.5)
    first = stage.normalise(torch.tensor([3.0, 5.0, 2.0]), torch.tensor([0, 0, 2]))
    torch.testing.assert_close(stage.means_N, torch.tensor([0.5 + 0.5 * 4, 1.0, 0.5 + 0.5 * 2]))
    torch.testing.assert_close(first, torch.tensor([3 / 2.5, 5 / 2.5, 2 / 1.5]), rtol=1e-5, atol=1e-5)
    stage.normalise(torch.tensor([1.0]), torch.tensor([1]))
    torch.testing.assert_close(stage.means_N, torch.tensor([2.5, 1.0, 1.5]))
    # a ratio whose expectation is 1 leaves the means at 1
    for seed in range(200):
        stage.normalise((0.3 * drawn(seed, 300) - 0.045).exp(), torch.arange(300) % 3)
    assert ((stage.means_N - 1).abs() < 0.05).all()


def test_means_are_kept() -> None:
    stage, other = BinnedMean(4, decay=0.9), BinnedMean(4, decay=0.9)
    stage.normalise(drawn(0, 16).exp(), torch.arange(16) % 4)
    other.load_state_dict(copy.deepcopy(stage.state_dict()))
    r, bins = drawn(1, 16).exp(), torch.arange(16) % 4
    assert torch.equal(stage.normalise(r, bins), other.normalise(r, bins))
    with pytest.raises(InputError, match="4 bins"):
        BinnedMean(5).load_state_dict(stage.state_dict())
    for count, decay in ((0, 0.0), (3, 1.0), (3, -0.1)):
        with pytest.raises(InputError):
            BinnedMean(count, decay)


# ---- stage 2, and both -----------------------------------------------------------------------------------------------------


@given(SEEDS, st.sampled_from(sorted(DIVERGENCES)), st.sampled_from(["both", "weight"]))
def test_weights_have_the_mean_1_are_positive_and_carry_no_gradient(seed: int, name: str, stages) -> None:
    logits = (2 * drawn(seed, 64, 2)).requires_grad_()
    t = LevelSpec().sample(EDM(), 64, torch.Generator().manual_seed(seed))
    found = RatioWeights(DIVERGENCES[name], BinnedMean(10), stages=stages)(logits, EDM(), t).value  # type: ignore[index]
    assert float(found.mean()) == pytest.approx(1, abs=2e-5)
    assert (found >= 0).all()
    assert not found.requires_grad


@pytest.mark.parametrize("name", DIVERGENCES)
def test_equal_distributions_and_equal_ratios_weigh_all_alike(name) -> None:
    t = LevelSpec().sample(EDM(), 32, torch.Generator().manual_seed(0))
    for logit in (0.0, 1.3, -8.0):
        found = RatioWeights(DIVERGENCES[name], BinnedMean(10))(torch.full((32, 1), logit), EDM(), t).value
        torch.testing.assert_close(found, torch.ones(32), atol=2e-5, rtol=0)


def test_each_stage_alone() -> None:
    logits, t = drawn(3, 40, 1), LevelSpec().sample(EDM(), 40, torch.Generator().manual_seed(3))
    r = logits[:, 0].exp().clamp(0.1, 20)
    kl = DIVERGENCES["forward_kl"]
    torch.testing.assert_close(RatioWeights(kl, BinnedMean(10), stages="none")(logits, EDM(), t).value, r)
    torch.testing.assert_close(RatioWeights(kl, BinnedMean(10), stages="weight")(logits, EDM(), t).value, r / (r.mean() + 1e-6))
    by_bin = BinnedMean(10).normalise(r, noise_bins(EDM(), t, 10))
    torch.testing.assert_close(RatioWeights(kl, BinnedMean(10), stages="ratio")(logits, EDM(), t).value, by_bin)
    torch.testing.assert_close(RatioWeights(kl, BinnedMean(10))(logits, EDM(), t).value, by_bin / (by_bin.mean() + 1e-6))


def test_sums_run_over_all_processes() -> None:
    """Another process that saw ratios of 3 in bin 0, as many as we did: what is added is what it would add."""
    theirs = torch.tensor([[12.0, 0.0], [4.0, 0.0]])

    def total(sums: torch.Tensor) -> torch.Tensor:
        return sums + (theirs if sums.dim() == 2 else torch.tensor([36.0, 4.0]))

    stage = BinnedMean(2)
    found = stage.normalise(torch.ones(4), torch.zeros(4, dtype=torch.long), total=total)
    torch.testing.assert_close(stage.means_N, torch.tensor([2.0, 1.0]))
    torch.testing.assert_close(found, torch.full((4,), 0.5))
    torch.testing.assert_close(mean_one(torch.ones(4), total=total), torch.full((4,), 1 / 5), rtol=1e-5, atol=0)
    weights = RatioWeights(DIVERGENCES["forward_kl"], BinnedMean(1), stages="ratio")
    ones = weights(torch.zeros(4, 1), EDM(), torch.full((4,), 1.0, dtype=torch.float64), lambda sums: 2 * sums)
    torch.testing.assert_close(ones.value, torch.ones(4), rtol=1e-5, atol=0)


# ---- statistics ------------------------------------------------------------------------------------------------------------


def test_statistics() -> None:
    found = WeightStatistics()
    assert found.summary() == {}
    first = found.add(torch.tensor([3.0, 4.0]), Weights(torch.tensor([0.5, 1.5]), torch.tensor([True, False])))
    assert {k: pytest.approx(float(v)) for k, v in first.items()} == {
        "direction": 5.0, "weight_min": 0.5, "weight_mean": 1.0, "weight_max": 1.5, "clipped": 0.5, "weight_cv": 0.5,
    }  # fmt: skip
    found.add(torch.tensor([3.0, 0.0]), None)
    assert found.summary() == {"clipped": pytest.approx(0.25), "weight_cv": pytest.approx(0.25), "direction_cv": pytest.approx(0.25)}


# ---- what is no number -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("stages", ["both", "ratio", "weight", "none"])
def test_a_logit_that_is_no_number_counts_for_nothing(bad: float, stages) -> None:
    logits, t = drawn(3, 40, 2), LevelSpec().sample(EDM(), 40, torch.Generator().manual_seed(3))
    spoilt = logits.clone()
    spoilt[7, 1] = bad
    rest = torch.arange(40) != 7
    one, other = (RatioWeights(DIVERGENCES["forward_kl"], BinnedMean(10, 0.5), stages=stages) for _ in range(2))
    found, expected = one(spoilt, EDM(), t), other(logits[rest], EDM(), t[rest])
    torch.testing.assert_close(found.value[rest], expected.value)
    torch.testing.assert_close(one.bins.means_N, other.bins.means_N)
    assert found.value.isfinite().all()
    assert not found.clipped[7]
    r = density_ratio(spoilt)
    assert (r.value[7], r.known.tolist()) == (1, rest.tolist())
    nothing = RatioWeights(DIVERGENCES["forward_kl"], BinnedMean(10), stages=stages)(torch.full((4, 1), bad), EDM(), t[:4])
    torch.testing.assert_close(nothing.value, torch.ones(4), rtol=1e-5, atol=0)


def test_known_logits_give_what_they_gave_to_the_last_bit() -> None:
    r, bins, everyone = drawn(4, 97).exp(), torch.randint(10, (97,), generator=torch.Generator().manual_seed(4)), torch.ones(97, dtype=torch.bool)
    assert torch.equal(BinnedMean(10).normalise(r, bins, everyone), BinnedMean(10).normalise(r, bins))
    assert torch.equal(mean_one(r, everyone), r / (r.sum() / 97 + 1e-6))


def test_batches_in_parts_are_refused_where_there_are_several_processes() -> None:
    not_in_parts(1, 1)
    not_in_parts(0, 2)
    with pytest.raises(InputError, match="cut into parts"):
        not_in_parts(1, 2)


@pytest.mark.parametrize("name", sorted(SCHEDULES))
def test_the_bins_ends_are_no_copies_from_the_host(name: str, monkeypatch) -> None:
    schedule, t = make_schedule(name), torch.full((3,), 0.5, dtype=torch.float64)
    schedule.level(t)  # tables that are made once
    found = noise_bins(schedule, t, 10, "log_level")
    for constructor in ("tensor", "as_tensor", "linspace"):
        monkeypatch.setattr(torch, constructor, None)
    assert torch.equal(noise_bins(schedule, t, 10, "log_level"), found)
