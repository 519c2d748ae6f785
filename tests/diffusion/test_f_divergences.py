"""The table of f and h: second derivatives, closed forms for Gaussians, sums and inequalities."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from limbeck.diffusion.f_divergences import DIVERGENCES, divergence
from limbeck.errors import InputError

R = torch.logspace(-2, 2, 401, dtype=torch.float64)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_h_is_the_second_derivative_of_f_times_r_squared(name) -> None:
    r, found = R.clone().requires_grad_(), DIVERGENCES[name]
    (first,) = torch.autograd.grad(found.f(r).sum(), r, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), r)
    torch.testing.assert_close(found.h(R), second * R**2, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_f_is_zero_at_one_and_h_is_positive_and_keeps_shape_and_type(name) -> None:
    found, one = DIVERGENCES[name], torch.ones(1, dtype=torch.float64)
    assert found.f(one).abs() < 1e-14
    assert (found.h(R) > 0).all()
    for dtype in (torch.float32, torch.float64):
        assert found.h(torch.ones(2, 3, dtype=dtype)).shape == (2, 3)
        assert found.h(torch.ones(2, dtype=dtype)).dtype == dtype


def gaussians(difference: float, variance: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Grid, q on it (times the spacing), and r = p/q for p = N(0, v), q = N(Δ, v)."""
    x = torch.linspace(-30, 30, 60_001, dtype=torch.float64)
    log_p, log_q = -(x**2) / (2 * variance), -((x - difference) ** 2) / (2 * variance)
    return x, log_q.exp() / log_q.exp().sum(), (log_p - log_q).exp()


def expected(name: str, difference: float, variance: float) -> float | None:
    a = difference**2 / variance
    return {
        "reverse_kl": 1.0, "forward_kl": 1.0, "jeffreys": 2.0, "squared_hellinger": math.exp(-a / 8) / 4,
        "neyman": 2 * math.exp(a), "pearson": 2 * math.exp(a),
    }.get(name)  # fmt: skip


@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize(("difference", "variance"), [(0.3, 1.0), (-1.1, 0.7), (1.5, 2.0)])
def test_gaussians_of_equal_variance(name, difference, variance) -> None:
    """E_q[h] in closed form, and dD_f/dm_q = E_q[h]·Δ/v by a difference quotient of D_f itself."""

    def value(m: float) -> float:
        _, q, r = gaussians(m, variance)
        keep = q > 1e-300  # far out q underflows, and r with it
        return float((q[keep] * DIVERGENCES[name].f(r[keep])).sum())

    _, q, r = gaussians(difference, variance)
    keep = q > 1e-300
    mean_h = float((q[keep] * DIVERGENCES[name].h(r[keep])).sum())
    closed = expected(name, difference, variance)
    if closed is not None:
        assert mean_h == pytest.approx(closed, rel=1e-6)
    step = 1e-4
    slope = (value(difference + step) - value(difference - step)) / (2 * step)
    assert slope == pytest.approx(mean_h * difference / variance, rel=1e-5)


@given(st.floats(0.01, 100))
def test_relations(value: float) -> None:
    r, table = torch.tensor(value, dtype=torch.float64), DIVERGENCES
    assert float(table["jensen_shannon"].h(r) + table["softened_reverse_kl"].h(r)) == pytest.approx(1)
    assert float(table["jeffreys"].h(r)) == pytest.approx(float(table["forward_kl"].h(r) + table["reverse_kl"].h(r)))
    for name, mirrored in (("pearson", "neyman"), ("forward_kl", "reverse_kl"), ("jensen_shannon", "jensen_shannon"), ("jeffreys", "jeffreys")):
        assert float(table[name].h(r)) == pytest.approx(value * float(table[mirrored].h(1 / r)))  # p and q exchanged: f(r) ↔ r f(1/r)
    for found in table.values():  # convex above its tangent at 1
        slope = torch.autograd.functional.jacobian(found.f, torch.ones(1, dtype=torch.float64))[0, 0]
        assert float(found.f(r) - slope * (r - 1)) >= -1e-12


def test_reverse_kl_gives_ones_of_rs_shape() -> None:
    assert torch.equal(DIVERGENCES["reverse_kl"].h(torch.rand(3, 2) + 1), torch.ones(3, 2))  # FastGen's returns a scalar


def test_by_name() -> None:
    assert divergence("jeffreys") is DIVERGENCES["jeffreys"]
    with pytest.raises(InputError, match="jensen_shannon"):
        divergence("jensen_shanon")
    with pytest.raises(AttributeError):
        DIVERGENCES["jeffreys"].variance = "low"  # type: ignore[misc]
