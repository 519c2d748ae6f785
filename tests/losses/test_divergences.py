"""Divergences: values from definitions in float64, exact gradients, limits, half precision."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck

from limbeck.losses import jensen_shannon, kl_divergence, reverse_kl, soft_cross_entropy

SETTINGS = settings(deadline=None, max_examples=40)
SEEDS = st.integers(0, 2**31)
TEMPERATURES = st.floats(0.25, 20.0)


def pair(seed: int, scale: float = 3.0, batch: int = 5, classes: int = 7) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    t, s = torch.randn(2, batch, classes, generator=generator, dtype=torch.float64) * scale
    return t, s.requires_grad_()


def entropy(p: torch.Tensor) -> torch.Tensor:
    return -torch.special.xlogy(p, p).sum(-1)


@given(SEEDS, TEMPERATURES)
@SETTINGS
def test_kl_is_its_definition_and_its_gradient_is_q_minus_p_over_tb(seed: int, temperature: float) -> None:
    t, s = pair(seed)
    p, q = torch.softmax(t / temperature, -1), torch.softmax(s / temperature, -1)
    loss = kl_divergence(t, s, temperature)
    torch.testing.assert_close(loss, (p * (p / q).log()).sum(-1).mean())
    torch.testing.assert_close(torch.autograd.grad(loss, s)[0], (q - p) / (temperature * len(s)))


@given(SEEDS, TEMPERATURES)
@SETTINGS
def test_reverse_kl_swaps_the_arguments_and_has_the_mode_seeking_gradient(seed: int, temperature: float) -> None:
    t, s = pair(seed)
    loss = reverse_kl(t, s, temperature)
    torch.testing.assert_close(loss, kl_divergence(s, t, temperature))
    p, q = torch.softmax(t / temperature, -1), torch.softmax(s / temperature, -1)
    log_ratio = (q / p).log()
    expected = q * (log_ratio - (q * log_ratio).sum(-1, keepdim=True)) / (temperature * len(s))
    torch.testing.assert_close(torch.autograd.grad(loss, s)[0], expected)


@given(SEEDS, TEMPERATURES)
@SETTINGS
def test_jensen_shannon_is_symmetric_bounded_and_entropy_of_mixture_minus_mean_entropy(seed: int, temperature: float) -> None:
    t, s = pair(seed, scale=10)
    p, q = torch.softmax(t / temperature, -1), torch.softmax(s / temperature, -1)
    rows = jensen_shannon(t, s, temperature, "none")
    torch.testing.assert_close(rows, entropy((p + q) / 2) - (entropy(p) + entropy(q)) / 2)
    torch.testing.assert_close(rows, jensen_shannon(s, t, temperature, "none"))
    assert (rows >= -1e-12).all()
    assert (rows <= math.log(2) + 1e-12).all()


def test_jensen_shannon_reaches_ln2_for_disjoint_answers() -> None:
    t, s = torch.tensor([[200.0, 0.0]]), torch.tensor([[0.0, 200.0]])
    assert jensen_shannon(t, s).item() == pytest.approx(math.log(2), abs=1e-6)


@given(SEEDS)
@SETTINGS
def test_soft_cross_entropy_is_kl_plus_entropy_with_gradient_q_minus_p_over_b(seed: int) -> None:
    t, s = pair(seed)
    p = torch.softmax(t, -1)
    loss = soft_cross_entropy(s, p)
    torch.testing.assert_close(loss, kl_divergence(t, s) + entropy(p).mean())
    assert loss >= entropy(p).mean()
    torch.testing.assert_close(torch.autograd.grad(loss, s)[0], (torch.softmax(s, -1) - p) / len(s))


@given(SEEDS)
@SETTINGS
def test_at_equal_distributions_value_and_gradient_vanish(seed: int) -> None:
    t, _ = pair(seed)
    s = (t + 1.7).requires_grad_()  # a shift changes no probability
    for divergence in (kl_divergence, reverse_kl, jensen_shannon):
        loss = divergence(t, s, 2.0)
        assert abs(loss.item()) < 1e-12
        assert torch.autograd.grad(loss, s)[0].abs().max() < 1e-12
    loss = soft_cross_entropy(s, torch.softmax(t, -1))
    torch.testing.assert_close(loss, entropy(torch.softmax(t, -1)).mean())
    assert torch.autograd.grad(loss, s)[0].abs().max() < 1e-12


@pytest.mark.parametrize("divergence", [kl_divergence, reverse_kl, jensen_shannon])
def test_reductions_agree(divergence) -> None:
    t, s = pair(0)
    rows = divergence(t, s, 2.0, "none")
    assert rows.shape == (5,)
    torch.testing.assert_close(divergence(t, s, 2.0, "sum"), rows.sum())
    torch.testing.assert_close(divergence(t, s, 2.0, "batchmean"), rows.mean())
    torch.testing.assert_close(divergence(t, s, 2.0, "mean"), rows.mean() / 7)


def test_kl_matches_pytorch() -> None:
    t, s = pair(1)
    log_p, log_q = torch.log_softmax(t, -1), torch.log_softmax(s, -1)
    for reduction in ("batchmean", "sum"):
        torch.testing.assert_close(kl_divergence(t, s, 1.0, reduction), torch.nn.functional.kl_div(log_q, log_p, reduction=reduction, log_target=True))


@pytest.mark.parametrize("divergence", [kl_divergence, reverse_kl, jensen_shannon])
def test_gradcheck_in_both_arguments(divergence) -> None:
    t, s = pair(2, batch=3, classes=4)
    assert gradcheck(lambda a, b: divergence(a, b, 1.5), (t.requires_grad_(), s))


def test_gradcheck_of_soft_cross_entropy() -> None:
    t, s = pair(3, batch=3, classes=4)
    assert gradcheck(lambda a: soft_cross_entropy(a, torch.softmax(t, -1)), (s,))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("divergence", [kl_divergence, reverse_kl, jensen_shannon, lambda t, s: soft_cross_entropy(s, torch.softmax(t, -1))])
def test_half_precision_is_computed_in_float32_and_stays_finite_for_extreme_logits(divergence, dtype) -> None:
    t, s = pair(4, scale=300, batch=8, classes=10)
    t, s = t.detach().to(dtype), s.detach().to(dtype).requires_grad_()
    exact = divergence(t.double(), s.detach().double())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = divergence(t, s)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), exact, rtol=2e-3 if dtype is torch.bfloat16 else 1e-3, atol=1e-4)
    (gradient,) = torch.autograd.grad(loss, s)
    assert gradient.dtype == dtype
    assert gradient.isfinite().all()
