"""Ridge regression with a teacher: the estimator against its normal equations, the bias against the estimator, by hand and by Monte Carlo."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from limbeck.claims.studies.data_pruning import ridge_bias
from limbeck.errors import InputError
from limbeck.losses.ridge_distillation import distillation_bias, distilled_ridge, isotropic_bias_factor, ridge_fit, shrinkage

few = settings(deadline=None, max_examples=40)
numbers = st.integers(0, 2**32)
weights = st.floats(0, 1)
ridges = st.floats(0.01, 100)


def problem(seed: int, features: int = 4, samples: int = 12) -> tuple[Tensor, Tensor, Tensor]:
    noise = torch.Generator().manual_seed(seed)
    X = torch.randn(features, samples, generator=noise, dtype=torch.float64)
    return X, torch.randn(features, generator=noise, dtype=torch.float64), torch.randn(samples, generator=noise, dtype=torch.float64)


# ---- the estimators ------------------------------------------------------------------------------------------------------


@few
@given(numbers, ridges, weights)
def test_the_student_minimises_squared_errors_to_labels_and_teacher_and_the_penalty(seed, ridge, alpha):
    X, teacher, y = problem(seed)
    theta = distilled_ridge(X, y, teacher, ridge, alpha).requires_grad_()
    (1 / 2 * ((1 - alpha) * (theta @ X - y).square().sum() + alpha * (theta @ X - teacher @ X).square().sum() + ridge * theta.square().sum())).backward()
    torch.testing.assert_close(theta.grad, torch.zeros_like(theta), atol=1e-9 * (1 + float(X.square().sum())), rtol=0)


def test_a_fit_by_hand():
    X, y = torch.tensor([[1.0, 2.0]]), torch.tensor([3.0, 5.0])  # XXᵀ = 5, Xy = 13
    torch.testing.assert_close(ridge_fit(X, y, 1.5), torch.tensor([2.0], dtype=torch.float64))
    torch.testing.assert_close(distilled_ridge(X, y, torch.tensor([4.0]), 1.5, 0.25), torch.tensor([(0.75 * 13 + 0.25 * 5 * 4) / 6.5], dtype=torch.float64))


@few
@given(numbers)
def test_many_targets_at_once_are_the_fits_one_by_one(seed):
    X, teacher, y = problem(seed)
    ys, teachers = torch.stack([y, 2 * y, y.flip(0)]), torch.stack([teacher, -teacher, teacher.flip(0)])
    torch.testing.assert_close(ridge_fit(X, ys, 0.7), torch.stack([ridge_fit(X, one, 0.7) for one in ys]))
    one_by_one = torch.stack([distilled_ridge(X, one, by, 0.7, 0.3) for one, by in zip(ys, teachers, strict=True)])
    torch.testing.assert_close(distilled_ridge(X, ys, teachers, 0.7, 0.3), one_by_one)


@few
@given(numbers)
def test_without_a_teachers_weight_it_is_a_plain_fit_and_with_all_of_it_labels_are_not_used(seed):
    X, teacher, y = problem(seed)
    torch.testing.assert_close(distilled_ridge(X, y, teacher, 0.5, 0.0), ridge_fit(X, y, 0.5))
    torch.testing.assert_close(distilled_ridge(X, y, teacher, 0.5, 1.0), distilled_ridge(X, y.flip(0) + 9, teacher, 0.5, 1.0))


# ---- the bias ------------------------------------------------------------------------------------------------------------


@few
@given(numbers, ridges, weights, st.integers(1, 12))
def test_the_bias_is_the_estimate_without_noise_minus_the_truth(seed, ridge, alpha, kept):
    X, truth, _ = problem(seed)
    teacher = ridge_fit(X, truth @ X, ridge)
    student = distilled_ridge(X[:, :kept], (truth @ X)[:kept], teacher, ridge, alpha)
    torch.testing.assert_close(distillation_bias(X[:, :kept], X, truth, ridge, alpha), student - truth, rtol=1e-7, atol=1e-9)


@few
@given(numbers, ridges, weights)
def test_with_the_truth_as_teacher_the_bias_is_the_labels_own_for_every_alpha(seed, ridge, alpha):
    X, truth, _ = problem(seed)
    found = distilled_ridge(X, truth @ X, truth, ridge, alpha) - truth
    torch.testing.assert_close(found, -shrinkage(X, ridge) @ truth, rtol=1e-7, atol=1e-9)


@few
@given(numbers, ridges)
def test_shrinkage_is_symmetric_between_0_and_1_and_falls_with_samples(seed, ridge):
    X, _, _ = problem(seed)
    some, all_of_them = shrinkage(X[:, :5], ridge), shrinkage(X, ridge)
    torch.testing.assert_close(some, some.T)
    values = torch.linalg.eigvalsh(some)
    assert values.min() > 0
    assert values.max() <= 1 + 1e-12
    assert torch.linalg.eigvalsh(some - all_of_them).min() > -1e-9


@few
@given(st.sampled_from([0.25, 0.5, 1.0]), st.sampled_from([0.25, 0.5, 1.0]), ridges, weights)
def test_the_isotropic_factor_is_the_formula_where_samples_are_orthogonal(fraction, teacher_fraction, ridge, alpha):
    total = 12
    X = (total / 4) ** 0.5 * torch.eye(3, dtype=torch.float64).repeat(1, 4)  # XXᵀ = f·12·I for quarters
    truth = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    bias = distillation_bias(X[:, : int(fraction * total)], X[:, : int(teacher_fraction * total)], truth, ridge, alpha)
    torch.testing.assert_close(bias, -isotropic_bias_factor(fraction, teacher_fraction, total, ridge, alpha) * truth)


@few
@given(st.floats(0.01, 1), st.floats(0.01, 1), ridges, weights)
def test_the_isotropic_factor_falls_with_the_teachers_fraction_and_is_never_below_the_labels(f, f_t, ridge, alpha):
    labels = isotropic_bias_factor(f, f_t, 200, ridge, 0.0)
    assert isotropic_bias_factor(f, 1.0, 200, ridge, alpha) <= isotropic_bias_factor(f, f_t, 200, ridge, alpha)
    assert isotropic_bias_factor(f, f_t, 200, ridge, alpha) >= labels  # what the theory does not say: that bias falls with alpha
    assert math.isclose(labels, ridge / (f * 200 + ridge))


def test_the_bias_agrees_with_monte_carlo():
    found = ridge_bias(seed=0)
    assert found["largest_deviation"] < 4
    assert found["largest_exact_deviation"] < 1e-9
    assert found["bias_1_full"] < found["bias_1_half"] < found["bias_1_pruned"]
    assert found["error_1_full"] < found["error_1_pruned"]
    assert found["bias_0_labels"] < found["bias_1_full"]  # more bias than labels, and still the smaller error
    assert found["error_1_full"] < found["error_0_labels"]


# ---- wrong input ---------------------------------------------------------------------------------------------------------


def test_wrong_input_is_named():
    X, truth, y = problem(0)
    for call, where in [
        (lambda: ridge_fit(X[0], y, 1.0), "X"),
        (lambda: ridge_fit(X, y[:3], 1.0), "y"),
        (lambda: ridge_fit(X, y, 0.0), "ridge"),
        (lambda: ridge_fit(X, y, math.nan), "ridge"),
        (lambda: shrinkage(X, -1.0), "ridge"),
        (lambda: distilled_ridge(X, y, truth[:2], 1.0, 0.5), "teacher"),
        (lambda: distilled_ridge(X, y, truth, 1.0, 1.5), "alpha"),
        (lambda: distillation_bias(X, X[:2], truth, 1.0, 0.5), "truth"),
        (lambda: distillation_bias(X, X, truth[:2], 1.0, 0.5), "truth"),
        (lambda: distillation_bias(X, X, truth, 1.0, -0.1), "alpha"),
        (lambda: isotropic_bias_factor(0.0, 1.0, 10, 1.0, 0.5), "fraction"),
        (lambda: isotropic_bias_factor(0.5, 1.5, 10, 1.0, 0.5), "teacher_fraction"),
        (lambda: isotropic_bias_factor(0.5, 1.0, 0, 1.0, 0.5), "total"),
        (lambda: isotropic_bias_factor(0.5, 1.0, 10, 0.0, 0.5), "ridge"),
    ]:
        with pytest.raises(InputError) as caught:
            call()
        assert caught.value.where == where
