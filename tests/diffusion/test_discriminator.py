"""Heads for features of any size, and the losses: their values, gradients and optimum."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from limbeck.diffusion.discriminator import Heads, MapHead, discriminator_loss, generator_loss
from limbeck.errors import InputError


@settings(max_examples=25)
@given(st.sampled_from([1, 3, 4, 12, 16, 40]), st.integers(1, 20), st.integers(1, 20), st.integers(1, 4))
def test_a_map_of_any_size_gives_one_logit_a_sample(channels: int, height: int, width: int, batch: int) -> None:
    heads = Heads({"map": (channels, height, width)})
    draw = torch.Generator().manual_seed(height)
    found = heads({"map": torch.randn(batch, channels, height, width, generator=draw)})
    assert found.shape == (batch, 1)
    assert found.isfinite().all()


@pytest.mark.parametrize(("side", "convolutions"), [(1, 2), (4, 2), (5, 3), (7, 3), (8, 3), (14, 4), (16, 4), (28, 5), (32, 5)])
def test_a_map_is_halved_until_four_are_left_a_side(side: int, convolutions: int) -> None:
    head = MapHead(8, side)
    assert sum(isinstance(layer, nn.Conv2d) for layer in head.layers) == convolutions
    x = torch.zeros(1, 8, side, side)
    for layer in head.layers:
        x = layer(x)
    assert x.shape == (1, 1, 1, 1)


@pytest.mark.parametrize("channels", [1, 3, 4, 8, 16, 32, 48, 64])
@pytest.mark.parametrize("side", [1, 4, 7, 8])
def test_the_logit_of_a_map_depends_on_it_and_hands_gradient_down(channels: int, side: int) -> None:
    torch.manual_seed(0)
    head = MapHead(channels, side)
    x = torch.randn(16, channels, side, side, requires_grad=True)
    logits = head(x)
    assert logits.std() > 1e-3  # a norm of one channel a group would make all of them equal
    (slope,) = torch.autograd.grad(logits.sum(), x)
    assert slope.abs().mean() > 1e-5


def test_samples_do_not_see_each_other() -> None:
    heads = Heads({"a": (16, 8, 8), "b": (5,)})
    features = {"a": torch.randn(4, 16, 8, 8), "b": torch.randn(4, 5)}
    whole = heads(features)
    assert whole.shape == (4, 2)
    torch.testing.assert_close(heads({k: v[1:2] for k, v in features.items()}), whole[1:2], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(whole[:, 1], heads.heads["b"](features["b"]))


@pytest.mark.parametrize("shapes", [{}, {"a": ()}, {"a": (3, 4)}, {"a": (1, 2, 3, 4)}])
def test_features_that_no_head_takes(shapes: dict[str, tuple[int, ...]]) -> None:
    with pytest.raises(InputError) as caught:
        Heads(shapes)
    assert caught.value.where == "method.taps"


def test_values_at_zero() -> None:
    zero = torch.zeros(5, 3)
    assert discriminator_loss(zero, zero).item() == pytest.approx(2 * math.log(2))
    assert generator_loss(zero).item() == pytest.approx(math.log(2))


@given(st.integers(0, 2**31))
def test_losses_are_cross_entropies_of_real_and_fake(seed: int) -> None:
    fake, real = 3 * torch.randn(2, 6, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    expected = -(1 - fake.sigmoid()).log().mean() - real.sigmoid().log().mean()
    torch.testing.assert_close(discriminator_loss(fake, real), expected)
    torch.testing.assert_close(generator_loss(fake), -fake.sigmoid().log().mean())
    fake.requires_grad_()
    (slope,) = torch.autograd.grad(generator_loss(fake), fake)
    torch.testing.assert_close(slope, (fake.sigmoid() - 1) / fake.numel())  # does not fade where the fake is found out


def test_losses_of_far_logits_are_finite() -> None:
    far = torch.full((2, 1), 1e4)
    for value in (discriminator_loss(far, -far), discriminator_loss(-far, far), generator_loss(-far)):
        assert value.isfinite()


def test_the_optimum_is_the_log_ratio_of_the_densities() -> None:
    p = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
    q = torch.tensor([0.4, 0.1, 0.3, 0.2], dtype=torch.float64)
    # 10 samples of each, in proportion
    real, fake = (torch.repeat_interleave(torch.arange(4), (10 * d).round().long()) for d in (p, q))
    logits = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.LBFGS([logits], max_iter=100, tolerance_grad=1e-12, tolerance_change=1e-14, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimiser.zero_grad()
        loss = discriminator_loss(logits[fake].unsqueeze(1), logits[real].unsqueeze(1))
        loss.backward()
        return loss

    optimiser.step(closure)  # type: ignore[arg-type]
    torch.testing.assert_close(logits.detach(), (p / q).log(), atol=1e-5, rtol=0)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_logits_that_are_no_numbers_are_left_out_of_the_generators_loss(bad: float) -> None:
    logits = torch.tensor([[0.5, -1.0], [bad, 0.3], [2.0, 0.1]], requires_grad=True)
    good = logits.detach()[[0, 2]].requires_grad_()
    loss, expected = generator_loss(logits), generator_loss(good)
    torch.testing.assert_close(loss, expected)
    loss.backward()
    expected.backward()
    torch.testing.assert_close(logits.grad, torch.stack([good.grad[0], torch.zeros(2), good.grad[1]]))
    assert generator_loss(torch.full((3, 1), bad)) == 0


def test_finite_logits_are_a_plain_mean_to_the_last_bit() -> None:
    logits = torch.randn(97, 3, generator=torch.Generator().manual_seed(0)).requires_grad_()
    found, plain = generator_loss(logits), torch.nn.functional.softplus(-logits).mean()
    assert torch.equal(found, plain)
    assert torch.equal(*(torch.autograd.grad(loss, logits)[0] for loss in (found, plain)))
