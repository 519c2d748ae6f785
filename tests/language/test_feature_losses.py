"""Masked feature losses: values by hand, zero where states agree, padding and teachers out of it, half precision."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck

from limbeck.errors import InputError
from limbeck.language.feature_losses import attention_mse, masked_cosine, masked_cross_entropy, masked_mse, pkd, token_vectors

SETTINGS = settings(deadline=None, max_examples=25)
SEEDS = st.integers(0, 2**31)
MASKED = (masked_mse, masked_cross_entropy, masked_cosine)


def draw(seed: int, B: int = 3, L: int = 5, d: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    """Student's and teacher's states [B, L, d], and a mask whose rows have 1 to L tokens."""
    generator = torch.Generator().manual_seed(seed)
    s, t = torch.randn(2, B, L, d, generator=generator, dtype=torch.float64)
    lengths = torch.randint(1, L + 1, (B,), generator=generator)
    return s, t, (torch.arange(L)[None] < lengths[:, None]).to(torch.int64)


@given(SEEDS)
@SETTINGS
def test_each_loss_is_a_mean_over_the_tokens_that_are_there(seed: int) -> None:
    s, t, mask = draw(seed)
    places = [(b, i) for b in range(3) for i in range(5) if mask[b, i]]
    mse = sum((s[b, i] - t[b, i]).square().sum() for b, i in places) / (4 * len(places))
    ce = sum(-(t[b, i].softmax(0) * s[b, i].log_softmax(0)).sum() for b, i in places) / len(places)
    cosine = sum(1 - s[b, i] @ t[b, i] / (s[b, i].norm() * t[b, i].norm()) for b, i in places) / len(places)
    for loss, expected in zip(MASKED, (mse, ce, cosine), strict=True):
        torch.testing.assert_close(loss(s, t, mask), expected)
        torch.testing.assert_close(loss(s, t, mask.bool()), expected)


@given(SEEDS)
@SETTINGS
def test_pkd_looks_at_the_first_token_alone(seed: int) -> None:
    s, t, _ = draw(seed)
    expected = ((s[:, 0] / s[:, 0].norm(dim=1, keepdim=True) - t[:, 0] / t[:, 0].norm(dim=1, keepdim=True)).square().sum(1)).mean()
    torch.testing.assert_close(pkd(s, t), expected)
    torch.testing.assert_close(pkd(s, t), 2 * masked_cosine(s[:, :1], t[:, :1], torch.ones(3, 1)))
    s[:, 1:] += 7
    torch.testing.assert_close(pkd(s, t), expected)


@given(SEEDS)
@SETTINGS
def test_attention_counts_pairs_of_tokens_that_are_both_there(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    s, t = torch.rand(2, 2, 3, 4, 4, generator=generator, dtype=torch.float64)
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]])
    pairs = [(b, i, j) for b in range(2) for i in range(4) for j in range(4) if mask[b, i] and mask[b, j]]
    expected = sum((s[b, :, i, j] - t[b, :, i, j]).square().mean() for b, i, j in pairs) / len(pairs)
    torch.testing.assert_close(attention_mse(s, t, mask), expected)


def test_states_that_agree_cost_nothing_but_their_entropy() -> None:
    s, _, mask = draw(1)
    for loss in (masked_mse, masked_cosine):
        assert loss(s, s.clone(), mask).abs() < 1e-12
    assert pkd(s, s.clone()).abs() < 1e-12
    p = s.softmax(-1)
    entropy = -(p * p.log()).sum(-1)
    torch.testing.assert_close(masked_cross_entropy(s, s.clone(), mask), entropy[mask.bool()].mean())
    attention = torch.rand(2, 3, 4, 4)
    assert attention_mse(attention, attention.clone(), torch.ones(2, 4)) == 0


@pytest.mark.parametrize("loss", MASKED)
def test_padding_and_the_teacher_get_nothing(loss) -> None:
    s, t, mask = draw(2)
    assert not bool(mask.all())
    s, t = s.requires_grad_(), t.requires_grad_()
    before = loss(s, t, mask)
    slopes = torch.autograd.grad(before, (s, t), allow_unused=True)
    assert slopes[1] is None
    assert (slopes[0][mask == 0] == 0).all()
    with torch.no_grad():
        s[mask == 0] = 100.0
        t[mask == 0] = -50.0
    torch.testing.assert_close(loss(s, t, mask), before)


def test_gradients_are_those_of_finite_differences() -> None:
    s, t, mask = draw(3)
    s = s.requires_grad_()
    for loss in MASKED:
        assert gradcheck(lambda s, loss=loss: loss(s, t, mask), (s,))
    assert gradcheck(lambda s: pkd(s, t), (s,))


def test_a_batch_without_tokens_costs_0_with_a_graph_and_half_precision_is_computed_in_float32() -> None:
    s, t, mask = draw(4)
    s = s.requires_grad_()
    for loss in MASKED:
        nothing = loss(s, t, torch.zeros_like(mask))
        assert nothing == 0
        assert torch.autograd.grad(nothing, s)[0].abs().sum() == 0
        half = loss(s.detach().half(), t.half(), mask)
        assert half.dtype == torch.float32
        torch.testing.assert_close(half.double(), loss(s, t, mask), rtol=1e-2, atol=1e-2)


def test_vectors_of_samples() -> None:
    s, _, mask = draw(5)
    torch.testing.assert_close(token_vectors(s, mask, mean=False), s[:, 0])
    expected = torch.stack([row[m.bool()].mean(0) for row, m in zip(s, mask, strict=True)])
    torch.testing.assert_close(token_vectors(s, mask, mean=True), expected)


def test_shapes_that_do_not_fit_are_refused() -> None:
    s, t, mask = draw(6)
    for call in (lambda: masked_mse(s, t[..., :2], mask), lambda: pkd(s, t[..., :2]), lambda: attention_mse(s[:, None], t[:, None].expand(3, 2, 5, 4), mask)):
        with pytest.raises(InputError, match="the teacher's"):
            call()
