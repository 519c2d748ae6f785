"""Losses with labels and soft labels: the identities of the sheets, unlabelled rows, reductions."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck

from limbeck.contract import IGNORE
from limbeck.losses import cross_entropy, hinton, hinton_terms, kl_divergence, mean_probabilities, partial_kd, prob_mse, soft_cross_entropy

SETTINGS = settings(deadline=None, max_examples=40)
SEEDS = st.integers(0, 2**31)


def drawn(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2


@given(SEEDS, st.floats(0.5, 10), st.floats(0, 1))
@SETTINGS
def test_hinton_value_and_gradient(seed: int, temperature: float, weight: float) -> None:
    s, t, y = drawn(seed, 6, 5).requires_grad_(), drawn(seed + 1, 6, 5), torch.arange(6) % 5
    loss = hinton(s, t, y, temperature, weight)
    expected = weight * temperature**2 * kl_divergence(t, s, temperature) + (1 - weight) * F.cross_entropy(s, y)
    torch.testing.assert_close(loss, expected)
    soft = temperature * (torch.softmax(s / temperature, -1) - torch.softmax(t / temperature, -1))
    hard = torch.softmax(s, -1) - F.one_hot(y, 5)
    torch.testing.assert_close(torch.autograd.grad(loss, s)[0], (weight * soft + (1 - weight) * hard) / 6)


def test_hinton_in_the_limit_of_high_temperature_matches_logits() -> None:
    """1503.02531 eq. 4: for T ≫ logits of zero mean, the gradient of T² KL tends to (s − t)/C, here with the batch mean."""
    s, t = drawn(0, 3, 5), drawn(1, 3, 5)
    s, t = (s - s.mean(-1, keepdim=True)).requires_grad_(), t - t.mean(-1, keepdim=True)
    (gradient,) = torch.autograd.grad(hinton(s, t, None, temperature=1e6, weight=1.0), s)
    torch.testing.assert_close(gradient, (s.detach() - t) / 5 / 3, rtol=1e-4, atol=1e-6)


@given(SEEDS, st.floats(0.5, 10))
@SETTINGS
def test_reduction_code_divides_the_soft_term_alone_by_the_classes(seed: int, temperature: float) -> None:
    """1802.05668 eq. 4 as coded: 0.7 · 4/C on the batch-mean KL at T = 2."""
    s, t, y = drawn(seed, 4, 10), drawn(seed + 1, 4, 10), torch.arange(4)
    soft, hard = hinton_terms(s, t, y, temperature)
    soft_code, hard_code = hinton_terms(s, t, y, temperature, "code")
    torch.testing.assert_close(soft_code, soft / 10)
    torch.testing.assert_close(hard_code, hard)
    old_pytorch = F.kl_div(torch.log_softmax(s / temperature, -1), torch.softmax(t / temperature, -1), reduction="sum") * temperature**2 / 40
    torch.testing.assert_close(hinton(s, t, y, temperature, 0.7, "code"), 0.7 * old_pytorch + 0.3 * F.cross_entropy(s, y))


@pytest.mark.parametrize("targets", [None, torch.full((4,), IGNORE)])
def test_a_batch_without_a_label_has_no_hard_term_and_no_nan(targets) -> None:
    s, t = drawn(0, 4, 3).requires_grad_(), drawn(1, 4, 3)
    assert cross_entropy(s, targets).item() == 0.0
    loss = hinton(s, t, targets, 4.0, 0.5)
    torch.testing.assert_close(loss, 8 * kl_divergence(t, s, 4.0))
    assert torch.autograd.grad(loss, s)[0].isfinite().all()


@given(SEEDS, st.lists(st.booleans(), min_size=6, max_size=6))
@SETTINGS
def test_hard_term_is_the_mean_over_labelled_samples_and_ignores_the_others(seed: int, labelled: list[bool]) -> None:
    s, y, keep = drawn(seed, 6, 4).requires_grad_(), torch.arange(6) % 4, torch.tensor(labelled)
    loss = cross_entropy(s, torch.where(keep, y, IGNORE))
    torch.testing.assert_close(loss, F.cross_entropy(s[keep], y[keep]) if keep.any() else torch.zeros((), dtype=torch.float64))
    assert (torch.autograd.grad(loss, s)[0][~keep] == 0).all()


def test_soft_targets_and_smoothing() -> None:
    s, y = drawn(0, 6, 4), torch.arange(6) % 4
    p = torch.softmax(drawn(1, 6, 4), -1)
    torch.testing.assert_close(cross_entropy(s, p.float()), soft_cross_entropy(s, p), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(cross_entropy(s, F.one_hot(y, 4).double()), cross_entropy(s, y))
    smooth = 0.8 * F.one_hot(y, 4) + 0.2 / 4
    torch.testing.assert_close(cross_entropy(s, y, 0.2), soft_cross_entropy(s, smooth))
    half = torch.where(torch.arange(6) < 3, y, IGNORE)
    torch.testing.assert_close(cross_entropy(s, half, 0.2), soft_cross_entropy(s[:3], smooth[:3]))


def test_soft_rows_weigh_what_they_sum_to() -> None:
    """A mixture of a labelled and an unlabelled sample is a part of a sample; zeros are unlabelled, with smoothing too."""
    s, y = drawn(0, 6, 4).requires_grad_(), torch.arange(6) % 4
    share = torch.tensor([1.0, 0.0, 0.25, 1.0, 0.0, 0.75], dtype=torch.float64)
    soft = F.one_hot(y, 4) * share[:, None]
    rows = F.cross_entropy(s, y, reduction="none", label_smoothing=0.1)
    loss = cross_entropy(s, soft, 0.1)
    torch.testing.assert_close(loss, (rows * share).sum() / 3)
    assert (torch.autograd.grad(loss, s)[0][share == 0] == 0).all()
    assert cross_entropy(s, torch.zeros(6, 4), 0.1).item() == 0.0


@given(SEEDS, st.integers(1, 6), st.floats(0.5, 5))
@SETTINGS
def test_partial_kd_renormalises_over_old_classes_and_leaves_new_logits_alone(seed: int, old: int, temperature: float) -> None:
    """1911.07053 eq. 2 and the invariants of its sheet."""
    o, prior = drawn(seed, 5, 6).requires_grad_(), drawn(seed + 1, 5, old)
    loss = partial_kd(o, prior, temperature)
    q_hat, q = torch.softmax(prior / temperature, -1), torch.softmax(o[:, :old] / temperature, -1)
    torch.testing.assert_close(loss, -(q_hat * q.log()).sum(-1).mean())
    (gradient,) = torch.autograd.grad(loss, o)
    torch.testing.assert_close(gradient[:, :old], (q - q_hat) / (temperature * 5))
    assert (gradient[:, old:] == 0).all()


def test_partial_kd_of_unchanged_logits_is_the_entropy_with_zero_gradient() -> None:
    o = drawn(0, 5, 6).requires_grad_()
    loss = partial_kd(o, o[:, :4].detach(), 2.0)
    q = torch.softmax(o[:, :4] / 2, -1)
    torch.testing.assert_close(loss, -(q * q.log()).sum(-1).mean())
    assert torch.autograd.grad(loss, o)[0].abs().max() < 1e-12


@given(SEEDS, st.floats(0, 1))
@SETTINGS
def test_prob_mse_is_a_mean_over_batch_and_classes_and_mixes_as_the_sheet_says(seed: int, alpha: float) -> None:
    """2102.13088 eq. 9: two terms have the gradient of one with the mixed target."""
    s, r, y = drawn(seed, 4, 3).requires_grad_(), torch.softmax(drawn(seed + 1, 4, 3), -1), F.one_hot(torch.arange(4) % 3, 3).double()
    torch.testing.assert_close(prob_mse(s, r), ((torch.softmax(s, -1) - r) ** 2).sum() / 12)
    assert prob_mse(s, torch.softmax(s, -1)).item() < 1e-30
    two = torch.autograd.grad(alpha * prob_mse(s, y) + (1 - alpha) * prob_mse(s, r), s)[0]
    torch.testing.assert_close(two, torch.autograd.grad(prob_mse(s, alpha * y + (1 - alpha) * r), s)[0])


@given(SEEDS, st.integers(1, 4))
@SETTINGS
def test_mean_probabilities(seed: int, teachers: int) -> None:
    """2009.08453 eq. 1: p sums to 1, identical teachers give their own softmax."""
    t = drawn(seed, teachers, 5, 6)
    p = mean_probabilities(t)
    torch.testing.assert_close(p, sum(torch.softmax(one, -1) for one in t) / teachers)
    torch.testing.assert_close(p.sum(-1), torch.ones(5, dtype=torch.float64))
    torch.testing.assert_close(mean_probabilities(t[:1].expand(3, 5, 6)), torch.softmax(t[0], -1))


def test_mean_of_probabilities_is_not_softmax_of_mean_logits_when_scales_differ() -> None:
    t = torch.stack([drawn(0, 5, 6), 10 * drawn(1, 5, 6)])
    assert (mean_probabilities(t) - torch.softmax(t.mean(0), -1)).abs().max() > 0.1


def test_gradchecks() -> None:
    s, t, y = drawn(0, 3, 4).requires_grad_(), drawn(1, 3, 4).requires_grad_(), torch.tensor([0, IGNORE, 3])
    p = torch.softmax(drawn(2, 3, 4), -1)
    assert gradcheck(lambda a, b: hinton(a, b, y, 3.0, 0.6), (s, t))
    assert gradcheck(lambda a, b: hinton(a, b, y, 3.0, 0.6, "code"), (s, t))
    assert gradcheck(lambda a: cross_entropy(a, p, 0.1), (s,))
    assert gradcheck(lambda a: partial_kd(a, t.detach()[:, :2]), (s,))
    assert gradcheck(lambda a: prob_mse(a, p), (s,))
    assert gradcheck(lambda a: mean_probabilities(a).square().sum(), (torch.stack([s, t]).detach().requires_grad_(),))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_upcast(dtype) -> None:
    s, t, y = (drawn(0, 8, 10) * 100).to(dtype).requires_grad_(), (drawn(1, 8, 10) * 100).to(dtype), torch.arange(8)
    p = torch.softmax(t.double(), -1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = [hinton(s, t, y), cross_entropy(s, y), cross_entropy(s, p.to(dtype)), partial_kd(s, t[:, :4]), prob_mse(s, p.to(dtype))]
    exact_s, exact_t = s.detach().double(), t.double()
    exact = [hinton(exact_s, exact_t, y), cross_entropy(exact_s, y), cross_entropy(exact_s, p.to(dtype).double())]
    exact += [partial_kd(exact_s, exact_t[:, :4]), prob_mse(exact_s, p.to(dtype).double())]
    for loss, reference in zip(losses, exact, strict=True):
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss.double(), reference, rtol=1e-5, atol=1e-5)
        assert torch.autograd.grad(loss, s, retain_graph=True)[0].isfinite().all()
