"""The closed forms of self-distilled kernel ridge regression against each other and against plain linear algebra (2102.13088)."""

import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from limbeck.errors import InputError
from limbeck.losses.kernel_ridge import (
    closed_form,
    constant_filter,
    effective_ridge,
    factorise,
    greedy_schedule,
    limit_duals,
    limit_filter,
    mixture_weights,
    optimal_alpha,
    pure_chains,
    rbf,
    self_distil,
    smoother,
    solve,
    spectral_filters,
)

few = settings(deadline=None, max_examples=40)
seeds = st.integers(0, 2**32)
ridges = st.floats(0.01, 5.0)
weights = st.floats(0.0, 1.0)
schedules = st.lists(weights, max_size=7)


def problem(seed: int, points: int = 9, outputs: int = 2):
    """Points, K, targets and the kernel of five other points, float64."""
    noise = torch.Generator().manual_seed(seed)
    x, other = torch.rand(points, 2, generator=noise, dtype=torch.float64), torch.rand(5, 2, generator=noise, dtype=torch.float64)
    Y, other_Y = torch.randn(points, outputs, generator=noise, dtype=torch.float64), torch.randn(5, outputs, generator=noise, dtype=torch.float64)
    kernel = rbf(6.0)
    return kernel(x, x), Y, kernel(other, x), other_Y


def by_inversion(K, Y, alphas, ridge):
    """Eq. 1-2 with an explicit inverse, independent of the eigen-cache: all Ŷ_t."""
    A = K @ torch.linalg.inv(K + ridge * torch.eye(len(K), dtype=torch.float64))
    fits = [A @ Y]
    for alpha in alphas:
        fits.append(A @ (alpha * Y + (1 - alpha) * fits[-1]))
    return torch.stack(fits)


def close(a, b, tolerance=1e-10):
    torch.testing.assert_close(a, b, rtol=0, atol=tolerance)


def test_rbf_is_the_kernel_of_the_sheet():
    close(rbf(80.0)(torch.tensor([[0.1]]), torch.tensor([[0.1], [0.2]])), torch.tensor([[1.0, math.exp(-0.8)]], dtype=torch.float64), 1e-7)


@few
@given(seeds, ridges)
def test_factorisation_gives_the_matrix_the_inverse_and_the_smoother_back(seed, ridge):
    K, Y, _, _ = problem(seed)
    factor = factorise(K)
    close(factor.vectors @ torch.diag(factor.values) @ factor.vectors.T, K)
    assert (factor.values.diff() <= 0).all()
    inverse = torch.linalg.inv(K + ridge * torch.eye(len(K), dtype=torch.float64))
    close(solve(factor, Y, ridge), inverse @ Y, 1e-9)
    close(smoother(factor, ridge), K @ inverse)


@pytest.mark.parametrize(
    ("matrix", "word"),
    [
        (torch.ones(2, 3), "square"),
        (torch.tensor([[1.0, 0.5], [0.0, 1.0]]), "symmetric"),
        (torch.tensor([[1.0, math.nan], [math.nan, 1.0]]), "finite"),
        (torch.tensor([[1.0, 2.0], [2.0, 1.0]]), "negative eigenvalue"),
    ],
)
def test_a_matrix_that_is_no_kernel_is_refused(matrix, word):
    with pytest.raises(InputError, match=word):
        factorise(matrix)


@few
@given(seeds, ridges, schedules)
def test_recursion_mixture_and_spectral_form_agree(seed, ridge, alphas):
    K, Y, k, _ = problem(seed)
    factor = factorise(K)
    expected = by_inversion(K, Y, alphas, ridge)
    rounds = self_distil(factor, Y, alphas, ridge)
    close(rounds.fits, expected)
    close(K @ rounds.duals, expected)
    filters = spectral_filters(factor.values, alphas, ridge)
    assert filters.shape == (len(alphas) + 1, len(K))
    close(factor.vectors @ (filters[:, :, None] * (factor.vectors.T @ Y)), expected)
    chains = pure_chains(factor, Y, ridge, len(alphas) + 1)
    mixed = (mixture_weights(alphas)[:, None, None] * chains).sum(0)
    close(k @ mixed, k @ rounds.duals[-1], 1e-9)


@few
@given(seeds, ridges, st.lists(st.tuples(weights, weights), max_size=5))
def test_one_weight_an_output_is_two_problems_side_by_side(seed, ridge, pairs):
    K, Y, _, _ = problem(seed)
    factor = factorise(K)
    alphas = torch.tensor(pairs, dtype=torch.float64).reshape(-1, 2)
    together = self_distil(factor, Y, alphas, ridge)
    filters, mixture = spectral_filters(factor.values, alphas, ridge), mixture_weights(alphas)
    close(factor.vectors @ (filters * (factor.vectors.T @ Y)), together.fits)
    for column in range(2):
        close(together.fits[:, :, column : column + 1], by_inversion(K, Y[:, column : column + 1], alphas[:, column], ridge))
        close(mixture[:, column], mixture_weights(alphas[:, column]))


@few
@given(seeds, ridges, weights, st.integers(1, 12))
def test_constant_weight_has_the_closed_form(seed, ridge, alpha, t):
    K, Y, _, _ = problem(seed)
    A = K @ torch.linalg.inv(K + ridge * torch.eye(len(K), dtype=torch.float64))
    power = torch.linalg.matrix_power
    eq3 = (1 - alpha) ** (t - 1) * power(A, t) @ Y
    for i in range(1, t):
        eq3 = eq3 + alpha * (1 - alpha) ** (i - 1) * power(A, i) @ Y
    close(closed_form(factorise(K), Y, alpha, ridge, t), eq3)
    close(by_inversion(K, Y, [alpha] * (t - 1), ridge)[-1], eq3)


@few
@given(seeds, st.floats(0.1, 5.0), weights)
def test_five_hundred_rounds_are_the_limit_and_the_limit_is_an_amplified_ridge(seed, ridge, alpha):
    K, Y, k, _ = problem(seed)
    factor = factorise(K)
    rate = (1 - alpha) * float(factor.values[0] / (factor.values[0] + ridge))
    assume(rate**500 < 1e-12)
    iterated = self_distil(factor, Y, [alpha] * 500, ridge)
    close(iterated.fits[-1], closed_form(factor, Y, alpha, ridge, math.inf))
    close(k @ iterated.duals[-1], k @ limit_duals(factor, Y, alpha, ridge))
    close(closed_form(factor, Y, alpha, ridge, 501), iterated.fits[-1])
    if alpha > 1e-3:
        amplified = torch.linalg.solve(alpha * K + ridge * torch.eye(len(K), dtype=torch.float64), alpha * Y)
        close(limit_duals(factor, Y, alpha, ridge), amplified, 1e-8)
        assert effective_ridge(ridge, alpha) == ridge / alpha


def test_without_ground_truth_the_limit_is_zero():
    K, Y, k, _ = problem(0)
    factor = factorise(K)
    assert (k @ limit_duals(factor, Y, 0.0, 0.2)).abs().max() == 0
    assert closed_form(factor, Y, 0.0, 0.2, math.inf).abs().max() == 0
    assert effective_ridge(0.2, 0.0) == math.inf


@few
@given(seeds, ridges, st.integers(1, 6))
def test_weight_one_never_moves_and_weight_zero_is_a_power(seed, ridge, t):
    K, Y, _, _ = problem(seed)
    factor = factorise(K)
    fits = self_distil(factor, Y, [1.0] * (t - 1), ridge).fits
    close(fits, fits[:1].expand_as(fits))
    power = torch.linalg.matrix_power(smoother(factor, ridge), t) @ Y
    close(self_distil(factor, Y, [0.0] * (t - 1), ridge).fits[-1], power)


@few
@given(schedules)
def test_mixture_weights_are_a_distribution_and_the_products_of_the_sheet(alphas):
    found = mixture_weights(alphas)
    T = len(alphas) + 1
    alpha = dict(enumerate(alphas, start=2)) | {1: 1.0}
    written = [alpha[T - i + 1] * math.prod(1 - alpha[j] for j in range(T - i + 2, T + 1)) for i in range(1, T)]
    written.append(math.prod(1 - alpha[j] for j in range(2, T + 1)))
    close(found, torch.tensor(written, dtype=torch.float64), 1e-14)
    assert (found >= 0).all()
    assert float(found.sum()) == pytest.approx(1, abs=1e-12)


@few
@given(seeds, ridges, weights)
def test_filters_shrink_from_the_first_fit_to_the_limit(seed, ridge, alpha):
    values = factorise(problem(seed)[0]).values
    filters = spectral_filters(values, [alpha] * 6, ridge)
    assert ((filters > 0) | (values < 1e-9)).all()
    assert (filters < 1).all()
    assert (filters.diff(dim=0) <= 1e-16).all()
    limit = limit_filter(values, alpha, ridge)
    assert (filters[-1] >= limit - 1e-15).all()
    close(constant_filter(values, alpha, ridge, 6, filters[0]), filters[-1], 1e-14)
    close(constant_filter(values, alpha, ridge, 2, filters[3]), filters[5], 1e-14)


@few
@given(st.floats(0.2, 5.0), st.floats(1.05, 5.0), ridges, weights)
def test_sparsification_ratio_rises_above_the_first_fit_and_tends_to_its_limit(low, factor, ridge, alpha):
    high = low * factor
    values = torch.tensor([high, low], dtype=torch.float64)
    filters = spectral_filters(values, [alpha] * 20, ridge)
    ratios = filters[:, 0] / filters[:, 1]
    assert (ratios >= ratios[0] * (1 - 1e-12)).all()
    if alpha > 1e-3:
        limit = limit_filter(values, alpha, ridge)
        expected = high * (alpha * low + ridge) / (low * (alpha * high + ridge))
        assert float(limit[0] / limit[1]) == pytest.approx(expected, rel=1e-10)
        far = constant_filter(values, alpha, ridge, 100_000, filters[0])
        assert float(far[0] / far[1]) == pytest.approx(expected, rel=1e-10)
    without = spectral_filters(values, [0.0] * 20, ridge)
    a = values / (values + ridge)
    close((without[:, 0] / without[:, 1]).log(), (a[0] / a[1]).log() * torch.arange(1, 22), 1e-9)


def test_with_ground_truth_the_ratio_can_overshoot_its_limit():
    """The sheet has it growing with t for every α; exact arithmetic with d = (2, 1), λ = 1, α = ½ says otherwise."""
    filters = spectral_filters(torch.tensor([2.0, 1.0], dtype=torch.float64), [0.5, 0.5, 0.5], 1.0)
    close(filters[:, 0] / filters[:, 1], torch.tensor([4 / 3, 40 / 27, 448 / 297, 5248 / 3483], dtype=torch.float64))
    assert (filters[2, 0] / filters[2, 1]) > (filters[3, 0] / filters[3, 1]) > 1.5


# ---- the weight of eq. 7 --------------------------------------------------------------------------------------------------


def held_out(seed: int):
    noise = torch.Generator().manual_seed(seed)
    return torch.randn(3, 8, 2, generator=noise, dtype=torch.float64)


@few
@given(seeds)
def test_the_weight_minimises_the_validation_loss(seed):
    p, q, y = held_out(seed)
    free, kept = optimal_alpha(p, q, y, clip=False), optimal_alpha(p, q, y)

    def loss(alpha):
        return (alpha * p + (1 - alpha) * q - y).square().sum()

    at = free.alpha.clone().requires_grad_()
    (slope,) = torch.autograd.grad(loss(at), at)
    assert abs(float(slope)) < 1e-10
    assert loss(kept.alpha) <= min(loss(0.0), loss(1.0)) + 1e-12
    assert 0 <= kept.alpha <= 1
    assert kept.unclipped == free.alpha == free.unclipped
    assert not free.degenerate


@few
@given(seeds)
def test_the_weight_of_perfect_predictors(seed):
    p, q, _ = held_out(seed)
    assert float(optimal_alpha(p, q, q, clip=False).alpha) == pytest.approx(0, abs=1e-12)
    assert float(optimal_alpha(p, q, p, clip=False).alpha) == pytest.approx(1, abs=1e-12)


def test_the_same_predictor_twice_gives_one_and_says_so():
    p, _, y = held_out(0)
    nearly = torch.nextafter(p, 2 * p)
    assert not torch.equal(nearly, p)
    found = optimal_alpha(p, nearly, y)
    assert float(found.alpha) == 1
    assert bool(found.degenerate)
    zero = torch.zeros(4)
    assert bool(optimal_alpha(zero, zero, zero + 1).degenerate)


@few
@given(seeds)
def test_one_weight_an_output(seed):
    p, q, y = held_out(seed)
    p[:, 1] = q[:, 1]
    found = optimal_alpha(p, q, y, clip=False, per_output=True)
    alone = optimal_alpha(p[:, 0], q[:, 0], y[:, 0], clip=False)
    close(found.alpha, torch.stack([alone.alpha, torch.ones((), dtype=torch.float64)]), 1e-12)
    assert found.degenerate.tolist() == [False, True]


@pytest.mark.parametrize(("truth", "unclipped"), [(2.0, 2.0), (-1.0, -1.0)])
def test_clipping_keeps_the_weight_in_bounds(truth, unclipped):
    p, q, y = torch.ones(3), torch.zeros(3), torch.full((3,), truth)
    assert float(optimal_alpha(p, q, y).alpha) == min(max(unclipped, 0.0), 1.0)
    assert float(optimal_alpha(p, q, y, clip=False).alpha) == unclipped


def test_on_training_points_the_weight_is_one_or_more():
    K, Y, _, _ = problem(3)
    factor = factorise(K)
    fits = self_distil(factor, Y, [0.0], 0.2).fits
    assert float(optimal_alpha(fits[0], fits[1], Y, clip=False).alpha) >= 1


@few
@given(seeds, ridges, st.booleans(), st.booleans())
def test_the_greedy_schedule_is_the_best_weight_for_every_round(seed, ridge, clip, per_output):
    K, Y, k, Y_v = problem(seed)
    factor = factorise(K)
    found = greedy_schedule(factor, Y, k, Y_v, ridge, 5, clip=clip, per_output=per_output)
    assert found.alphas.shape == ((4, 2) if per_output else (4,))
    inverse = torch.linalg.inv(K + ridge * torch.eye(len(K), dtype=torch.float64))
    p, before = k @ inverse @ Y, K @ inverse @ Y
    for alpha in found.alphas:
        q = k @ inverse @ before
        expected = optimal_alpha(p, q, Y_v, clip=clip, per_output=per_output).alpha
        torch.testing.assert_close(alpha, expected, rtol=1e-6, atol=1e-6)
        before = K @ inverse @ (alpha * Y + (1 - alpha) * before)
    errors = (k @ self_distil(factor, Y, found.alphas, ridge).duals - Y_v).square().mean((1, 2))
    assert (errors[1:] <= errors[0] + 1e-10).all()  # the weight 1, always allowed, is the plain fit
