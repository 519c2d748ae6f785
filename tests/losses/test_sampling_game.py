"""The sampling game: closed form and capped batch against a linear-programme solver, every invariant of the sheet, dependent rounding."""

import doctest
import itertools
import time

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog
from torch import Tensor

from limbeck import seeds
from limbeck.errors import InputError
from limbeck.losses import sampling_game
from limbeck.losses.sampling_game import (
    dependent_rounding,
    guaranteed_payoff,
    proportional_batch,
    robust_batch,
    robust_sampling,
    worst_labels,
)

SETTINGS = settings(deadline=None, max_examples=60)
EXAMPLE = torch.tensor([1.0, 0.8, 0.5, 0.2, 0.05])
KINDS = ("uniform", "ties", "wide", "saturated", "equal")


def gains(kind: str, count: int, generator: np.random.Generator) -> np.ndarray:
    """[count] gains in [1e-3, 1]: the solver's own tolerance is about 1e-7."""
    return {
        "uniform": lambda: generator.uniform(1e-3, 1, count),
        "ties": lambda: generator.choice([0.2, 0.5, 1.0], count),
        "wide": lambda: 10 ** generator.uniform(-3, 0, count),
        "saturated": lambda: np.where(generator.random(count) < 0.6, 1e-3, generator.uniform(1e-3, 1, count)),
        "equal": lambda: np.full(count, 0.3),
    }[kind]()


def best_payoff(g_N: np.ndarray, wrong: int, loss: float = 0.0, budget: int | None = None) -> float:
    """The game's value from a solver: max Σ q g − (1+w)(m t + Σ u), u ≥ q g − t, u ≥ 0, Σ q = b (and q ≤ 1 for a batch)."""
    count = len(g_N)
    objective = np.concatenate([-g_N, [(1 + loss) * wrong], np.full(count, 1 + loss)])
    above = np.concatenate([np.diag(g_N), -np.ones((count, 1)), -np.eye(count)], axis=1)
    total = np.concatenate([np.ones(count), np.zeros(count + 1)])[None]
    bounds = [(0, None if budget is None else 1)] * count + [(0, None)] * (count + 1)
    solved = linprog(objective, A_ub=above, b_ub=np.zeros(count), A_eq=total, b_eq=[budget or 1], bounds=bounds, method="highs")
    assert solved.status == 0
    return -solved.fun


@st.composite
def games(draw: st.DrawFn, least: int = 1) -> tuple[Tensor, int, int, float]:
    """(gains, m, b, w)."""
    count = draw(st.integers(least, 14))
    generator = np.random.default_rng(draw(st.integers(0, 2**31)))
    g_N = gains(draw(st.sampled_from(KINDS)), count, generator)
    return torch.from_numpy(g_N), draw(st.integers(0, count + 1)), draw(st.integers(1, count)), draw(st.sampled_from([0.0, 0.0, 0.5, 2.0]))


# ---- against a solver ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_values_are_a_linear_programmes_for_every_m_and_b(kind) -> None:
    generator = np.random.default_rng(seeds.derive("lp", kind))
    for count, loss in itertools.product((1, 2, 3, 5, 8), (0.0, 1.0)):
        g_N = gains(kind, count, generator)
        for wrong in range(count + 2):
            one = robust_sampling(torch.from_numpy(g_N), wrong, loss)
            if one.hopeless:
                assert (1 + loss) * wrong >= count
                continue
            assert one.value == pytest.approx(best_payoff(g_N, wrong, loss), abs=1e-12)
            for budget in range(1, count + 1):
                batch = robust_batch(torch.from_numpy(g_N), budget, wrong, loss)
                assert batch.value == pytest.approx(best_payoff(g_N, wrong, loss, budget), abs=1e-12)


@given(games())
@SETTINGS
def test_values_are_a_linear_programmes_on_drawn_games(game) -> None:
    g_N, wrong, budget, loss = game
    one, batch = robust_sampling(g_N, wrong, loss), robust_batch(g_N, budget, wrong, loss)
    assume(not one.hopeless)
    assert one.value == pytest.approx(best_payoff(g_N.numpy(), wrong, loss), abs=1e-12)
    assert batch.value == pytest.approx(best_payoff(g_N.numpy(), wrong, loss, budget), abs=1e-12)


# ---- one draw ------------------------------------------------------------------------------------------------------------


@given(games())
@SETTINGS
def test_one_draw_is_a_distribution_on_the_largest_gains_with_equal_products(game) -> None:
    g_N, wrong, _, loss = game
    found = robust_sampling(g_N, wrong, loss)
    p_N = found.probabilities
    assert p_N.dtype == torch.float64
    assert bool((p_N >= 0).all())
    assert float(p_N.sum()) == pytest.approx(1, abs=1e-12)
    assert found.value == pytest.approx(guaranteed_payoff(p_N, g_N, wrong, loss), abs=1e-12)
    if found.hopeless:
        return
    k, sorted_N = found.support, g_N.sort(descending=True).values
    inside_N = p_N > 0
    assert int(inside_N.sum()) == k
    if k < len(g_N):
        assert float(g_N[inside_N].min()) > float(g_N[~inside_N].max())  # ties stay together
    products_K = (p_N * g_N)[inside_N]
    torch.testing.assert_close(products_K, products_K[:1].expand(k), rtol=1e-12, atol=0)
    assert found.value == pytest.approx((k - (1 + loss) * wrong) / float(sorted_N[:k].reciprocal().sum()), rel=1e-12)
    for other in range(1, len(g_N) + 1):
        assert (other - (1 + loss) * wrong) / float(sorted_N[:other].reciprocal().sum()) <= found.value * (1 + 1e-9) + 1e-15
    if k > 1 and len(sorted_N.unique()) == len(sorted_N):  # the sheet's rule: extend while g_{k+1} > (k − m)/H_k, over the k that are worth anything
        first = int((1 + loss) * wrong) + 1
        while first < len(g_N) and float(sorted_N[first]) > (first - (1 + loss) * wrong) / float(sorted_N[:first].reciprocal().sum()):
            first += 1
        assert first == k


@given(games(), st.integers(0, 2**31))
@SETTINGS
def test_no_other_distribution_guarantees_more(game, seed: int) -> None:
    g_N, wrong, budget, loss = game
    found, batch = robust_sampling(g_N, wrong, loss), robust_batch(g_N, budget, wrong, loss)
    assume(not found.hopeless)
    noise = np.random.default_rng(seed)
    for power in (0.3, 1.0, 3.0):
        p_N = torch.from_numpy(noise.dirichlet(np.full(len(g_N), power)))
        assert guaranteed_payoff(p_N, g_N, wrong, loss) <= found.value + 1e-12
        near_N = 0.9 * found.probabilities + 0.1 * p_N
        assert guaranteed_payoff(near_N, g_N, wrong, loss) <= found.value + 1e-12
    other_N = proportional_batch(torch.from_numpy(noise.uniform(0.1, 1, len(g_N))), budget)
    assert guaranteed_payoff(other_N, g_N, wrong, loss) <= batch.value + 1e-12


@given(games())
@SETTINGS
def test_the_value_falls_with_m_and_w_and_scales_with_the_gains(game) -> None:
    g_N, wrong, budget, loss = game
    found, more = robust_sampling(g_N, wrong, loss), robust_sampling(g_N, wrong + 1, loss)
    assume(not found.hopeless)
    if not more.hopeless:
        assert more.value <= found.value + 1e-12
        assert more.support >= found.support
        assert robust_batch(g_N, budget, wrong + 1, loss).value <= robust_batch(g_N, budget, wrong, loss).value + 1e-12
    scaled = robust_sampling(4 * g_N, wrong, loss)
    assert scaled.value == pytest.approx(4 * found.value, rel=1e-12)
    torch.testing.assert_close(scaled.probabilities, found.probabilities, rtol=1e-12, atol=0)
    torch.testing.assert_close(robust_batch(4 * g_N, budget, wrong, loss).probabilities, robust_batch(g_N, budget, wrong, loss).probabilities)
    assert robust_sampling(g_N, wrong, loss + 1).value <= found.value + 1e-12


@given(games(), st.integers(0, 2**31))
@SETTINGS
def test_the_order_of_the_items_does_not_matter_and_equal_gains_are_treated_alike(game, seed: int) -> None:
    g_N, wrong, budget, loss = game
    order_N = torch.randperm(len(g_N), generator=torch.Generator().manual_seed(seed))
    for solve in (lambda g: robust_sampling(g, wrong, loss), lambda g: robust_batch(g, budget, wrong, loss)):
        p_N = solve(g_N).probabilities
        torch.testing.assert_close(solve(g_N[order_N]).probabilities, p_N[order_N], rtol=1e-9, atol=1e-12)
        for value in g_N.unique():
            assert float(p_N[g_N == value].max() - p_N[g_N == value].min()) < 1e-12


def test_the_sheets_example() -> None:
    found = robust_sampling(EXAMPLE, 1)
    torch.testing.assert_close(found.probabilities, torch.tensor([0.23529, 0.29412, 0.47059, 0, 0], dtype=torch.float64), rtol=0, atol=5e-6)
    assert found.value == pytest.approx(0.47059, abs=5e-6)
    assert (found.support, found.hopeless) == (3, False)
    assert worst_labels(found.probabilities, EXAMPLE, 1).shape == (1,)
    assert doctest.testmod(sampling_game).failed == 0


def test_probabilities_are_inverse_to_the_gain() -> None:
    p_N = robust_sampling(EXAMPLE, 1).probabilities
    assert float(p_N[0]) < float(p_N[1]) < float(p_N[2])  # the less informative of the informative more often


@pytest.mark.parametrize(("wrong", "count"), [(1, 5), (4, 5), (3, 100)])
def test_equal_gains_give_the_uniform_distribution(wrong, count) -> None:
    found = robust_sampling(torch.full((count,), 0.3, dtype=torch.float64), wrong)
    torch.testing.assert_close(found.probabilities, torch.full((count,), 1 / count, dtype=torch.float64))
    assert found.support == count
    assert found.value == pytest.approx(0.3 * (count - wrong) / count)


def test_without_wrong_labels_one_draw_is_the_largest_gain_and_a_batch_the_b_largest() -> None:
    assert robust_sampling(EXAMPLE.flip(0), 0).probabilities.tolist() == [0, 0, 0, 0, 1]
    noise = torch.rand(300, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 1e-6
    for budget in (1, 2, 37, 299, 300):
        q_N = robust_batch(noise, budget, 0).probabilities
        expected_N = torch.zeros(300, dtype=torch.float64)
        expected_N[noise.topk(budget).indices] = 1
        assert torch.equal(q_N, expected_N)


@pytest.mark.parametrize(("wrong", "loss"), [(5, 0.0), (9, 0.0), (3, 1.0)])
def test_with_too_many_wrong_labels_sampling_is_uniform_and_says_so(wrong, loss) -> None:
    for found, total in ((robust_sampling(EXAMPLE, wrong, loss), 1), (robust_batch(EXAMPLE, 2, wrong, loss), 2)):
        assert found.hopeless
        assert found.probabilities.tolist() == pytest.approx([total / 5] * 5)
        assert found.value <= 0


def test_zero_gains_are_kept_finite_by_their_floor() -> None:
    g_N = torch.full((10_000,), 1e-6, dtype=torch.float64)
    g_N[:50] = torch.linspace(0.1, 1, 50, dtype=torch.float64)
    for wrong in (0, 20, 2_000):
        batch = robust_batch(g_N, 200, wrong)
        assert bool(batch.probabilities.isfinite().all())
        assert float(batch.probabilities.sum()) == pytest.approx(200, abs=1e-9)
        assert batch.value >= max(guaranteed_payoff(other_N, g_N, wrong) for other_N in (torch.full_like(g_N, 0.02), proportional_batch(g_N, 200)))


# ---- the adversary ---------------------------------------------------------------------------------------------------------


@given(games(), st.integers(0, 2**31))
@SETTINGS
def test_the_adversarys_answer_is_the_worst_of_all_sets(game, seed: int) -> None:
    g_N, wrong, _, loss = game
    assume(len(g_N) <= 8)
    p_N = torch.from_numpy(np.random.default_rng(seed).dirichlet(np.ones(len(g_N))))
    products = (p_N * g_N).tolist()
    sets = itertools.combinations(range(len(g_N)), min(wrong, len(g_N)))
    worst = min(sum(products) - (1 + loss) * sum(products[i] for i in chosen) for chosen in sets)
    assert guaranteed_payoff(p_N, g_N, wrong, loss) == pytest.approx(worst, abs=1e-12)
    assert len(worst_labels(p_N, g_N, wrong)) == min(wrong, len(g_N))


def test_on_the_support_the_adversary_is_indifferent() -> None:
    p_N, g_N = robust_sampling(EXAMPLE, 1).probabilities, EXAMPLE.double()
    payoffs = [float((p_N * g_N).sum() - p_N[i] * g_N[i]) for i in range(3)]
    assert payoffs == pytest.approx([payoffs[0]] * 3, abs=1e-14)


# ---- batches ---------------------------------------------------------------------------------------------------------------


@given(games())
@SETTINGS
def test_a_batch_has_probabilities_that_sum_to_b(game) -> None:
    g_N, wrong, budget, loss = game
    batch, one = robust_batch(g_N, budget, wrong, loss), robust_sampling(g_N, wrong, loss)
    q_N = batch.probabilities
    assert bool(((q_N >= 0) & (q_N <= 1)).all())
    assert float(q_N.sum()) == pytest.approx(budget, abs=1e-9)
    if budget * float(one.probabilities.max()) <= 1:
        assert torch.equal(q_N, budget * one.probabilities)
        assert batch.value == pytest.approx(budget * one.value, abs=1e-12)
    if budget == len(g_N) and not one.hopeless:
        torch.testing.assert_close(q_N, torch.ones_like(q_N), rtol=0, atol=1e-12)


def test_the_cap_loses_no_budget_and_beats_clipping() -> None:
    g_N = torch.tensor([1.0, 0.9, 0.8, 0.7, 0.1, 0.05], dtype=torch.float64)
    batch = robust_batch(g_N, 4, 1)
    assert 4 * float(robust_sampling(g_N, 1).probabilities.max()) > 1  # so the cap binds
    assert float(batch.probabilities.sum()) == pytest.approx(4)
    clipped_N = (4 * robust_sampling(g_N, 1).probabilities).clamp(max=1)
    assert float(clipped_N.sum()) < 3.9
    assert batch.value > guaranteed_payoff(clipped_N, g_N, 1) + 0.05


@given(games())
@SETTINGS
def test_proportional_probabilities_are_capped_and_proportional_below_the_cap(game) -> None:
    g_N, _, budget, _ = game
    q_N = proportional_batch(g_N, budget)
    assert float(q_N.sum()) == pytest.approx(budget, abs=1e-9)
    assert bool(((q_N > 0) & (q_N <= 1)).all())
    below_N = q_N < 1 - 1e-12
    if bool(below_N.any()):
        scale_M = q_N[below_N] / g_N[below_N]
        torch.testing.assert_close(scale_M, scale_M[:1].expand_as(scale_M), rtol=1e-9, atol=0)
        assert bool((g_N[~below_N] * scale_M[0] >= 1 - 1e-9).all())


def test_fifty_thousand_items_are_solved_in_a_tenth_of_a_second() -> None:
    g_N = (torch.rand(50_000, generator=torch.Generator().manual_seed(1), dtype=torch.float64) ** 4).clamp(min=1e-6)
    times = []
    for budget, wrong in ((1_000, 10_000), (1_000, 0), (45_000, 30_000)) * 3:  # the last two are capped
        begun = time.perf_counter()
        robust_batch(g_N, budget, wrong)
        times.append(time.perf_counter() - begun)
    assert min(times[0::3]) < 0.1
    assert min(times[1::3]) < 0.3  # of a busy machine; see the method's page for the measured ones
    assert min(times[2::3]) < 0.3


# ---- dependent rounding ----------------------------------------------------------------------------------------------------


@given(games(), st.integers(0, 2**31))
@SETTINGS
def test_rounding_gives_exactly_b_different_items_out_of_the_support(game, seed: int) -> None:
    g_N, wrong, budget, loss = game
    q_N = robust_batch(g_N, budget, wrong, loss).probabilities
    drawn_DB = dependent_rounding(q_N, torch.Generator().manual_seed(seed), draws=3)
    assert drawn_DB.shape == (3, budget)
    for drawn_B in drawn_DB:
        assert len(drawn_B.unique()) == budget
        assert bool((q_N[drawn_B] > 0).all())
        assert set((q_N == 1).nonzero()[:, 0].tolist()) <= set(drawn_B.tolist())


@pytest.mark.parametrize(
    "q", [(0.2, 0.3, 0.5, 0.7, 0.3), (0.9, 0.6, 0.5, 1.0, 0.0, 0.55, 0.45), (1 / 3,) * 12, (0.999, 0.001, 0.5, 0.5, 0.25, 0.75), (0.4, 0.6)]
)
def test_inclusion_frequencies_are_the_probabilities_and_memberships_are_negatively_correlated(q) -> None:
    draws, q_N = 20_000, torch.tensor(q, dtype=torch.float64)
    drawn_DB = dependent_rounding(q_N, torch.Generator().manual_seed(11), draws)
    member_DN = torch.zeros(draws, len(q), dtype=torch.float64).scatter_(1, drawn_DB, 1.0)
    assert bool((member_DN.sum(1) == round(sum(q))).all())
    error_N = (q_N * (1 - q_N) / draws).sqrt()
    assert bool(((member_DN.mean(0) - q_N).abs() <= 4 * error_N + 1e-12).all())
    both_NN = member_DN.T @ member_DN / draws
    error_NN = (both_NN * (1 - both_NN) / draws).sqrt()
    alone_NN = torch.outer(q_N, q_N)
    apart_NN = ~torch.eye(len(q), dtype=torch.bool)
    assert bool((both_NN <= alone_NN + 4 * error_NN + 1e-3)[apart_NN].all())
    variance = float((member_DN @ torch.arange(1.0, len(q) + 1, dtype=torch.float64)).var())
    independent = float((q_N * (1 - q_N) * torch.arange(1.0, len(q) + 1, dtype=torch.float64).square()).sum())
    assert variance < independent  # so the realised gain concentrates


def test_rounding_is_seeded_and_certain_probabilities_leave_nothing_to_chance() -> None:
    q_N = torch.full((40,), 0.25, dtype=torch.float64)
    first, again, other = (dependent_rounding(q_N, torch.Generator().manual_seed(s)) for s in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    certain_N = torch.tensor([1.0, 0.0, 1.0, 1.0, 0.0])
    assert all(dependent_rounding(certain_N, torch.Generator().manual_seed(s)).tolist() == [[0, 2, 3]] for s in range(5))
    torch.manual_seed(0)
    before = torch.get_rng_state()
    dependent_rounding(q_N, torch.Generator().manual_seed(3))
    assert torch.equal(torch.get_rng_state(), before)


def test_the_probability_of_every_pair_is_exact_for_two_of_three() -> None:
    """Three items at 2/3: each pair has probability 1/3, whoever plays first."""
    drawn_DB = dependent_rounding(torch.full((3,), 2 / 3, dtype=torch.float64), torch.Generator().manual_seed(5), 20_000)
    left_out = 3 - drawn_DB.sum(1)
    counts = torch.bincount(left_out, minlength=3).double() / 20_000
    assert bool(((counts - 1 / 3).abs() < 4 * (2 / 9 / 20_000) ** 0.5).all())


# ---- wrong input -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [torch.tensor([]), torch.tensor([0.5, 0.0]), torch.tensor([0.5, float("nan")]), torch.tensor([float("inf")]), torch.ones(2, 2)])
def test_gains_must_be_positive_and_finite(bad) -> None:
    for call in (lambda: robust_sampling(bad, 1), lambda: robust_batch(bad, 1, 1), lambda: proportional_batch(bad, 1)):
        with pytest.raises(InputError, match="positive finite"):
            call()


def test_impossible_numbers_are_refused() -> None:
    for call in (lambda: robust_sampling(EXAMPLE, -1), lambda: robust_sampling(EXAMPLE, 1, -0.5), lambda: robust_sampling(EXAMPLE, 1, float("nan"))):
        with pytest.raises(InputError, match="neither may be negative"):
            call()
    for budget in (0, 6):
        for solve in (lambda b: robust_batch(EXAMPLE, b, 1), lambda b: proportional_batch(EXAMPLE, b)):
            with pytest.raises(InputError, match="cannot be drawn from 5"):
                solve(budget)
    for q in ((0.5, 0.6), (1.5, 0.5), (-0.5, 0.5)):
        with pytest.raises(InputError, match="whole sum"):
            dependent_rounding(torch.tensor(q), torch.Generator())
