"""The ridge head: its two forms, its limits, its gradients."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from limbeck.errors import InputError
from limbeck.synthetic.krr import relative_ridge, ridge_loss, ridge_predictions, with_constant

SEEDS = st.integers(0, 2**31)


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def problem(seed: int = 0, m: int = 7, n: int = 11, p: int = 9, d: int = 3) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return drawn(seed, m, p), drawn(seed + 1, m, d), drawn(seed + 2, n, p), drawn(seed + 3, n, d)


@given(SEEDS, st.integers(1, 12), st.integers(1, 12), st.floats(1e-3, 10))
def test_dual_is_primal_and_both_are_the_formulas(seed: int, m: int, p: int, ridge: float) -> None:
    phi_s, y_s, phi_r, _ = problem(seed, m=m, p=p)
    r = torch.tensor(ridge, dtype=torch.float64)
    eye_m, eye_p = torch.eye(m, dtype=torch.float64), torch.eye(p, dtype=torch.float64)
    by_hand = phi_r @ phi_s.T @ torch.linalg.inv(phi_s @ phi_s.T + r * eye_m) @ y_s
    primal_by_hand = phi_r @ torch.linalg.inv(phi_s.T @ phi_s + r * eye_p) @ phi_s.T @ y_s
    for form in ("dual", "primal", "auto"):
        found = ridge_predictions(phi_s, y_s, phi_r, r, form)  # type: ignore[arg-type]
        torch.testing.assert_close(found, by_hand, rtol=1e-6, atol=1e-8)
        torch.testing.assert_close(found, primal_by_hand, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(("m", "p"), [(6, 20), (20, 6)])
def test_dual_and_primal_have_the_same_gradients(m: int, p: int) -> None:
    found = []
    for form in ("dual", "primal"):
        phi_s, y_s, phi_r, y_r = problem(3, m=m, p=p)
        phi_s.requires_grad_()
        y_s.requires_grad_()
        found.append(torch.autograd.grad(ridge_loss(phi_s, y_s, phi_r, y_r, ratio=1e-3, form=form), (phi_s, y_s)))  # type: ignore[arg-type]
    for dual, primal in zip(*found, strict=True):
        torch.testing.assert_close(dual, primal, rtol=1e-6, atol=1e-9)


def test_the_gradient_is_that_of_differences_with_a_ridge_that_stands_still() -> None:
    phi_s, y_s, phi_r, y_r = problem(5)
    ridge = relative_ridge(with_constant(phi_s), 1e-2)

    def fixed(phi: Tensor, y: Tensor) -> Tensor:
        return (ridge_predictions(with_constant(phi), y, with_constant(phi_r), ridge) - y_r).square().mean()

    assert torch.autograd.gradcheck(fixed, (phi_s.clone().requires_grad_(), y_s.clone().requires_grad_()))
    a, b = phi_s.clone().requires_grad_(), phi_s.clone().requires_grad_()
    (through,) = torch.autograd.grad(ridge_loss(a, y_s, phi_r, y_r, ratio=1e-2), a)
    (still,) = torch.autograd.grad(fixed(b, y_s), b)
    torch.testing.assert_close(through, still)  # the trace of the ridge is stopped: eq. 3
    (moving,) = torch.autograd.grad(ridge_predictions(b, y_s, phi_r, 1e-2 * b.square().sum()).sum(), b)
    (stopped,) = torch.autograd.grad(ridge_predictions(b, y_s, phi_r, relative_ridge(b, 1e-2)).sum(), b)
    assert not torch.allclose(moving, stopped)


@given(SEEDS)
def test_without_a_ridge_the_pairs_are_met_and_with_a_huge_one_nothing_is_predicted(seed: int) -> None:
    phi_s, y_s, phi_r, _ = problem(seed, m=6, p=9)
    zero = torch.zeros((), dtype=torch.float64)
    torch.testing.assert_close(ridge_predictions(phi_s, y_s, phi_s, zero + 1e-12), y_s, rtol=1e-5, atol=1e-6)
    assert float(ridge_loss(phi_s, y_s, phi_s, y_s, ratio=1e-13)) < 1e-8
    assert float(ridge_predictions(phi_s, y_s, phi_r, zero + 1e12).abs().max()) < 1e-8


@given(SEEDS)
def test_j_is_0_where_the_targets_are_a_linear_function_of_features_that_the_pairs_span(seed: int) -> None:
    phi_s, _, phi_r, _ = problem(seed, m=20, p=5)
    w, b = drawn(seed + 9, 5, 3), drawn(seed + 10, 3)
    assert float(ridge_loss(phi_s, phi_s @ w + b, phi_r, phi_r @ w + b, ratio=1e-13)) < 1e-12  # b: only with the constant feature
    assert float((ridge_predictions(phi_s, phi_s @ w + b, phi_r, torch.tensor(1e-12)) - phi_r @ w - b).square().mean()) > 1e-6


@given(SEEDS)
def test_the_gradient_in_the_targets_is_linear_and_one_newton_step_is_the_minimum(seed: int) -> None:
    phi_s, y_s, phi_r, y_r = problem(seed)
    y_s.requires_grad_()
    (found,) = torch.autograd.grad(ridge_loss(phi_s, y_s, phi_r, y_r, ratio=1e-3), y_s)
    phi_s1, phi_r1 = with_constant(phi_s), with_constant(phi_r)
    a = ridge_predictions(phi_s1, torch.eye(7, dtype=torch.float64), phi_r1, relative_ridge(phi_s1, 1e-3))
    torch.testing.assert_close(found, 2 / y_r.numel() * a.T @ (a @ y_s.detach() - y_r), rtol=1e-7, atol=1e-12)
    newton = y_s.detach() - torch.linalg.solve(2 / y_r.numel() * a.T @ a, found)
    best = newton.clone().requires_grad_()
    loss = ridge_loss(phi_s, best, phi_r, y_r, ratio=1e-3)
    (rest,) = torch.autograd.grad(loss, best)
    assert float(rest.abs().max()) < 1e-6 * max(float(found.abs().max()), 1.0)
    assert float(loss.detach()) <= float(ridge_loss(phi_s, y_s.detach(), phi_r, y_r, ratio=1e-3)) + 1e-12


@given(SEEDS)
def test_order_of_pairs_and_repetition_of_the_real_batch_do_not_matter(seed: int) -> None:
    phi_s, y_s, phi_r, y_r = problem(seed)
    j, order = ridge_loss(phi_s, y_s, phi_r, y_r), torch.randperm(7, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(ridge_loss(phi_s[order], y_s[order], phi_r, y_r), j, rtol=1e-6, atol=0)
    torch.testing.assert_close(ridge_loss(phi_s, y_s, torch.cat([phi_r, phi_r]), torch.cat([y_r, y_r])), j, rtol=1e-9, atol=0)


@given(SEEDS, st.floats(1e-3, 1e3))
def test_the_ridge_is_relative(seed: int, scale: float) -> None:
    phi_s, y_s, phi_r, _ = problem(seed)
    one = ridge_predictions(phi_s, y_s, phi_r, relative_ridge(phi_s, 1e-2))
    scaled = ridge_predictions(scale * phi_s, y_s, scale * phi_r, relative_ridge(scale * phi_s, 1e-2))
    torch.testing.assert_close(scaled, one, rtol=1e-7, atol=1e-10)
    torch.testing.assert_close(relative_ridge(phi_s, 1e-2), 1e-2 * (phi_s @ phi_s.T).trace())


def test_more_pairs_than_features_in_half_of_the_digits() -> None:
    """K_ss is singular: float32 needs its jitter, and comes near float64."""
    phi_s, y_s, phi_r, y_r = (t.float() for t in problem(1, m=300, n=50, p=4))
    exact = ridge_loss(phi_s, y_s, phi_r, y_r)
    assert exact.dtype == torch.float64
    for form in ("dual", "primal"):
        found = ridge_loss(phi_s, y_s, phi_r, y_r, form=form, dtype=torch.float32)  # type: ignore[arg-type]
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), exact, rtol=1e-2, atol=0)
    phi_s.requires_grad_()
    (gradient,) = torch.autograd.grad(ridge_loss(phi_s, y_s, phi_r, y_r, ratio=0.0, form="dual", dtype=torch.float32), phi_s)
    assert gradient.isfinite().all()  # no ridge at all: the jitter alone


def test_the_loss_is_a_mean_over_all_entries() -> None:
    phi_s, y_s, phi_r, y_r = problem()
    predicted = ridge_predictions(with_constant(phi_s), y_s, with_constant(phi_r), relative_ridge(with_constant(phi_s), 1e-6))
    torch.testing.assert_close(ridge_loss(phi_s, y_s, phi_r, y_r), ((predicted - y_r) ** 2).sum() / (11 * 3))


def test_shapes_that_do_not_fit() -> None:
    phi_s, y_s, phi_r, y_r = problem()
    with pytest.raises(InputError, match="do not belong together"):
        ridge_loss(phi_s, y_s[:-1], phi_r, y_r)
    with pytest.raises(InputError, match="do not belong together"):
        ridge_loss(phi_s, y_s, phi_r[:, :-1], y_r)
    with pytest.raises(InputError, match="do not belong together"):
        ridge_loss(phi_s, y_s, phi_r, y_r[:, :1])
