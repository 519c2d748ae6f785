"""The discriminator's loss and the reversal of gradients."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck

from limbeck.losses import discriminator_loss, gradient_reversal


@given(st.floats(0, 3), st.integers(0, 2**31))
@settings(deadline=None, max_examples=30)
def test_reversal_is_the_identity_forward_and_negative_backward(scale: float, seed: int) -> None:
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(seed)).requires_grad_()
    y = gradient_reversal(x, scale)
    assert torch.equal(y, x)
    (plain,) = torch.autograd.grad((x**3).sum(), x)
    (reversed_,) = torch.autograd.grad((y**3).sum(), x)
    torch.testing.assert_close(reversed_, -scale * plain)


def test_discriminator_loss_is_the_mean_over_rows_and_outputs() -> None:
    a, b = torch.randn(2, 5, 2, dtype=torch.float64).unbind()
    log = torch.nn.functional.logsigmoid
    expected = -(log(a[:, 0]) + log(-a[:, 1]) + log(-b[:, 0]) + log(b[:, 1])).sum() / (10 * 2)
    torch.testing.assert_close(discriminator_loss(a, b), expected)
    assert gradcheck(discriminator_loss, (a.requires_grad_(), b.requires_grad_()))


def test_zero_outputs_give_ln2_and_sure_right_ones_zero() -> None:
    zeros = torch.zeros(3, 2)
    assert discriminator_loss(zeros, zeros).item() == pytest.approx(math.log(2), abs=1e-7)
    sure = torch.tensor([[50.0, -50.0]]).expand(3, 2)
    assert discriminator_loss(sure, -sure).item() < 1e-12
    assert discriminator_loss(-sure, sure).item() == pytest.approx(50.0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_upcast_under_autocast(dtype) -> None:
    a, b = (torch.randn(2, 4, 2) * 1000).to(dtype).unbind()
    a.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = discriminator_loss(a, b)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), discriminator_loss(a.detach().double(), b.double()))
    assert torch.autograd.grad(loss, a)[0].isfinite().all()
