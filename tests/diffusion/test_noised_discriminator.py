"""Discriminators of noised samples: whose parameters, which features, which gradients, one pass a network."""

import copy
import math

import pytest
import torch

from limbeck.components import Component
from limbeck.diffusion.build import mlp_denoiser, unet_denoiser
from limbeck.diffusion.denoisers import Guided
from limbeck.diffusion.discriminator import discriminator_loss, generator_loss
from limbeck.diffusion.noised_discriminator import NoisedDiscriminator, feature_shapes, look, noised_pair, own_trunk, pair_loss
from limbeck.diffusion.schedules import EDM, Flow
from limbeck.errors import InputError


def denoiser(seed: int, num_classes: int = 0, width: int = 8):
    torch.manual_seed(seed)
    found = mlp_denoiser((2,), num_classes, widths=[width, width])
    for p in found.parameters():
        p.data += 0.3 * torch.randn(p.shape)
    return found


def inputs(count: int = 6, seed: int = 0):
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(count, 2, generator=draw), 0.1 + 3 * torch.rand(count, generator=draw, dtype=torch.float64)


def test_logits_are_those_of_the_heads_on_the_trunks_features() -> None:
    trunk = denoiser(0)
    found = NoisedDiscriminator(trunk, ("hidden1", "bottleneck"), owns=False, seed=0)
    x, t = inputs()
    assert found(x, t).shape == (6, 2)
    torch.testing.assert_close(found(x, t), found.heads(trunk.features(x, t, None, ("hidden1", "bottleneck"))))
    again = NoisedDiscriminator(trunk, ("hidden1", "bottleneck"), owns=False, seed=0)
    assert torch.equal(again(x, t), found(x, t))  # a function of the seed
    assert not torch.equal(NoisedDiscriminator(trunk, ("hidden1", "bottleneck"), owns=False, seed=1)(x, t), found(x, t))


def test_a_lent_trunk_is_no_part_of_it_an_own_one_is() -> None:
    trunk = denoiser(0)
    lent, own = (NoisedDiscriminator(trunk, ("bottleneck",), owns=owns, seed=0) for owns in (False, True))
    theirs = {id(p) for p in trunk.parameters()}
    assert not theirs & {id(p) for p in lent.parameters()}
    assert theirs <= {id(p) for p in own.parameters()}
    assert own.trunk is lent.trunk is trunk


def test_shapes_of_features() -> None:
    assert feature_shapes(denoiser(0), ("hidden1",)) == {"hidden1": (8,)}
    unet = unet_denoiser((1, 8, 8), 3, width=4)
    assert feature_shapes(unet, ("bottleneck", "up1")) == {"bottleneck": (8, 4, 4), "up1": (8, 4, 4)}


def test_own_trunks() -> None:
    points, images = own_trunk(None, Flow(), (2,), 0, seed=0), own_trunk(None, EDM(), (1, 8, 8), 10, seed=0)
    assert points.network.widths == [128, 128]
    assert isinstance(points.schedule, Flow)
    assert images.num_classes == 10
    small = own_trunk(Component(name="mlp_denoiser", args={"widths": [5]}), EDM(), (2,), 0, seed=0)
    assert feature_shapes(small, ("bottleneck",)) == {"bottleneck": (5,)}
    with pytest.raises(InputError, match="features"):
        own_trunk(Component(name="mixture_denoiser", args={"means": [[0.0, 0.0]], "std": 1.0}), EDM(), (2,), 0, seed=0)


def test_wrong_taps_are_named() -> None:
    for taps in ((), ("bottleneck", "bottleneck")):
        with pytest.raises(InputError, match="taps"):
            NoisedDiscriminator(denoiser(0), taps, owns=False, seed=0)
    with pytest.raises(InputError, match="hidden9"):
        NoisedDiscriminator(denoiser(0), ("hidden9",), owns=False, seed=0)


# ---- pairs -----------------------------------------------------------------------------------------------------------------


def test_a_pair_is_noised_row_by_row_and_the_moved_copy_gets_the_same_time_noise_and_class() -> None:
    (fake, _), (real, _) = inputs(3, 1), inputs(3, 2)
    (noise, t), (shift, _) = inputs(6, 3), inputs(3, 4)
    cond = torch.arange(6)
    x_t, times, labels = noised_pair(EDM(), fake, real, t, noise, cond)
    torch.testing.assert_close(x_t, torch.cat([fake, real]) + t.float()[:, None] * noise)
    assert torch.equal(times, t)
    assert torch.equal(labels, cond)
    moved_x, moved_t, moved_labels = noised_pair(EDM(), fake, real, t, noise, cond, shift)
    torch.testing.assert_close(moved_x[:6], x_t)
    torch.testing.assert_close(moved_x[6:], x_t[3:] + shift)
    assert torch.equal(moved_t[6:], t[3:])
    assert moved_labels.tolist() == [0, 1, 2, 3, 4, 5, 3, 4, 5]
    assert noised_pair(EDM(), fake, real, t, noise, None, shift)[2] is None


def test_pair_loss() -> None:
    zeros = torch.zeros(8, 2)
    assert float(pair_loss(zeros)) == pytest.approx(2 * math.log(2))
    logits = torch.randn(9, 1, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(pair_loss(logits[:6]), discriminator_loss(logits[:3], logits[3:6]))
    torch.testing.assert_close(pair_loss(logits, 2.0), pair_loss(logits[:6]) + 2 * (logits[3:6] - logits[6:]).square().mean())


def test_the_penalty_is_the_squared_slope_for_a_linear_discriminator() -> None:
    slope, draw = torch.tensor([[1.5], [-2.0]]), torch.Generator().manual_seed(0)
    real, s = torch.randn(200_000, 2, generator=draw), 0.1
    logits = real @ slope
    moved = (real + s * torch.randn(real.shape, generator=draw)) @ slope
    penalty = pair_loss(torch.cat([logits, logits, moved]), 1.0) - pair_loss(torch.cat([logits, logits]))
    assert float(penalty) == pytest.approx(s**2 * float(slope.square().sum()), rel=0.02)


# ---- one look --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["teacher", "critic", "own"])
@pytest.mark.parametrize("scale", [1.0, 2.5, 0.0])
def test_a_look_says_what_the_networks_say_and_runs_each_once(source, scale) -> None:
    teacher, critic = denoiser(0, 3), denoiser(1, 3)
    trunk = {"teacher": teacher, "critic": critic, "own": denoiser(2, 3)}[source]
    judge = NoisedDiscriminator(trunk, ("bottleneck",), owns=source == "own", seed=0)
    guided = Guided(teacher, scale)
    x, t = inputs()
    cond = torch.arange(6) % 3
    x.requires_grad_()
    rows: dict[str, int] = {"teacher": 0, "critic": 0}
    handles = [
        network.network.hidden[0].register_forward_hook(lambda _m, given, _o, name=name: rows.__setitem__(name, rows[name] + len(given[0])))
        for name, network in (("teacher", teacher), ("critic", critic))
    ]
    found = look(x, t, cond, guided, critic, judge)
    for handle in handles:
        handle.remove()
    conditional = source == "teacher" or scale != 0
    assert rows == {"teacher": 6 * (conditional + (scale != 1)), "critic": 6}
    torch.testing.assert_close(found.teacher_x0, guided(x, t, cond).detach())
    torch.testing.assert_close(found.critic_x0, critic(x, t, cond).detach())
    torch.testing.assert_close(found.logits, judge(x, t, cond))
    assert not found.teacher_x0.requires_grad
    assert not found.critic_x0.requires_grad
    found.logits.sum().backward()
    assert x.grad.abs().sum() > 0
    for network in (teacher, critic, judge, trunk):
        assert all(p.grad is None and p.requires_grad for p in network.parameters())


def test_a_look_leaves_out_what_nobody_needs() -> None:
    teacher, critic = denoiser(0), denoiser(1)
    x, t = inputs()
    without = look(x, t, None, Guided(teacher), critic, None)
    assert without.logits is None
    torch.testing.assert_close(without.teacher_x0, teacher(x, t).detach())
    alone = look(x, t, None, Guided(teacher), None, NoisedDiscriminator(teacher, ("hidden1",), owns=False, seed=0))
    assert alone.teacher_x0 is None
    assert alone.critic_x0 is None
    assert alone.logits.shape == (6, 1)


@pytest.mark.parametrize("source", ["teacher", "critic", "own"])
def test_nobody_drops_anything_in_a_look(source) -> None:
    teacher = denoiser(0)
    teacher.network.dropout.p = 0.5
    critic = copy.deepcopy(teacher).train()
    trunk = {"teacher": teacher.eval(), "critic": critic, "own": copy.deepcopy(teacher).train()}[source]
    judge = NoisedDiscriminator(trunk, ("bottleneck",), owns=source == "own", seed=0).train()
    x, t = inputs()
    first, second = (look(x, t, None, Guided(teacher), critic, judge) for _ in range(2))
    assert torch.equal(first.teacher_x0, first.critic_x0)
    assert torch.equal(first.logits, second.logits)
    assert critic.training
    assert critic.network.dropout.training
    assert judge.training
    assert source != "own" or trunk.training


@pytest.mark.parametrize("source", ["teacher", "critic"])
def test_the_graph_of_a_look_ends_at_the_taps(source) -> None:
    teacher, critic = denoiser(0), denoiser(1)
    trunk = {"teacher": teacher, "critic": critic}[source]
    judge, (x, t) = NoisedDiscriminator(trunk, ("hidden1",), owns=False, seed=0), inputs()
    traced = []
    for layer in (trunk.network.hidden[0], trunk.network.hidden[1], trunk.network.head):
        layer.register_forward_hook(lambda _m, _i, out: traced.append(out.requires_grad))
    assert look(x.requires_grad_(), t, None, Guided(teacher), critic, judge).logits.requires_grad
    assert traced == [True, False, False]
    traced.clear()
    assert not look(x.detach(), t, None, Guided(teacher), critic, judge).logits.requires_grad
    assert not any(traced)


def test_a_broken_answer_of_the_trunk_reaches_no_sample() -> None:
    teacher, (x, t) = denoiser(0), inputs()
    judge, broken = NoisedDiscriminator(teacher, ("bottleneck",), owns=False, seed=0), torch.arange(6) == 2
    x.requires_grad_()
    spoil = teacher.network.hidden[0].register_forward_hook(lambda _m, _i, out: out + torch.where(broken[:, None], float("nan"), 0.0))
    logits = look(x, t, None, Guided(teacher), denoiser(1), judge).logits
    spoil.remove()
    assert logits.isnan()[:, 0].tolist() == broken.tolist()
    (gradient,) = torch.autograd.grad(generator_loss(logits), x)
    assert not gradient[2].any()
    rest = x.detach()[~broken].requires_grad_()
    (expected,) = torch.autograd.grad(generator_loss(judge(rest, t[~broken])), rest)
    torch.testing.assert_close(gradient[~broken], expected)
