"""The adversarial term's parts: which trunk, fresh noise for each sample, one pass, and where gradients go."""

import pytest
import torch
from torch import Tensor

from limbeck.diffusion.denoisers import MixtureDenoiser, NetworkDenoiser
from limbeck.diffusion.gan import GanSpec, generated_logits, make_discriminator, noised_features, pair_logits
from limbeck.diffusion.levels import LevelSpec
from limbeck.diffusion.networks import MLPNetwork, UNetNetwork
from limbeck.diffusion.schedules import make_schedule
from limbeck.errors import InputError


def denoiser(shape: tuple[int, ...] = (2,), classes: int = 0) -> NetworkDenoiser:
    torch.manual_seed(0)
    network = MLPNetwork(shape, (8, 8), num_classes=classes) if len(shape) == 1 else UNetNetwork(shape, width=8, num_classes=classes)
    return NetworkDenoiser(network, make_schedule("edm"), precondition="edm")


def draws(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("shape", [(2,), (1, 8, 8)])
@pytest.mark.parametrize("trunk", ["critic", "teacher", "own"])
def test_the_trunk_and_what_is_trained(trunk, shape) -> None:
    critic, teacher = denoiser(shape, 3), denoiser(shape, 3)
    found = make_discriminator(GanSpec(trunk=trunk), critic, teacher, seed=1)
    assert (found.trunk is critic, found.trunk is teacher) == (trunk == "critic", trunk == "teacher")
    trained, heads = {id(p) for p in found.parameters()}, {id(p) for p in found.heads.parameters()}
    assert trained == heads | (set() if trunk == "teacher" else {id(p) for p in found.trunk.parameters()})
    x, cond = torch.randn(5, *shape, generator=draws()), torch.tensor([0, 1, 2, 0, 1])
    assert generated_logits(found, LevelSpec(), x, cond, draws()).shape == (5, 1)
    assert found.trunk.schedule is critic.schedule or trunk == "teacher"
    again = make_discriminator(GanSpec(trunk=trunk), critic, teacher, seed=1)
    assert torch.equal(generated_logits(found, LevelSpec(), x, cond, draws()), generated_logits(again, LevelSpec(), x, cond, draws()))


def test_several_taps_have_a_head_each() -> None:
    found = make_discriminator(GanSpec(taps=("hidden1", "bottleneck")), denoiser(), denoiser(), seed=0)
    assert generated_logits(found, LevelSpec(), torch.zeros(3, 2), None, draws()).shape == (3, 2)


def test_every_sample_has_its_own_time_and_noise() -> None:
    found = make_discriminator(GanSpec(), denoiser(), denoiser(), seed=0)
    logits = generated_logits(found, LevelSpec(), torch.full((6, 2), 0.3), None, draws())
    assert len(set(logits.flatten().tolist())) == 6
    random = draws(4)
    features = noised_features(found, LevelSpec(), torch.ones(6, 2), None, random)
    again = draws(4)
    t = LevelSpec().sample(found.trunk.schedule, 6, again)
    x_t = 1 + t[:, None].float() * torch.randn(6, 2, generator=again)
    torch.testing.assert_close(features["bottleneck"], found.features(x_t, t)["bottleneck"])


def test_the_generators_logits_have_a_gradient_in_x_alone() -> None:
    found = make_discriminator(GanSpec(), denoiser(), denoiser(), seed=0)
    x = torch.randn(4, 2, generator=draws()).requires_grad_()
    generated_logits(found, LevelSpec(), x, None, draws()).sum().backward()
    assert bool(x.grad.abs().sum() > 0)
    assert all(p.grad is None and p.requires_grad for p in found.parameters())


@pytest.mark.parametrize("frozen", [True, False])
def test_the_pair_is_one_pass_of_detached_samples(frozen, monkeypatch) -> None:
    found = make_discriminator(GanSpec(), denoiser(classes=2), denoiser(classes=2), seed=0)
    sizes = []
    features = found.trunk.features
    monkeypatch.setattr(found.trunk, "features", lambda x, t, cond, taps: (sizes.append((len(x), cond.tolist())), features(x, t, cond, taps))[1])
    fake, real = torch.randn(3, 2, generator=draws()).requires_grad_(), torch.randn(4, 2, generator=draws(1))
    labels = (torch.tensor([0, 1, 0]), torch.tensor([1, 1, 0, 0]))
    of_fake, of_real = pair_logits(found, LevelSpec(), fake, labels[0], real, labels[1], draws(), frozen=frozen)
    assert sizes == [(7, [0, 1, 0, 1, 1, 0, 0])]
    assert (of_fake.shape, of_real.shape) == ((3, 1), (4, 1))
    (of_fake.sum() + of_real.sum()).backward()
    assert fake.grad is None
    reached = [p.grad is not None for p in found.trunk.network.hidden.parameters()]
    assert reached == [not frozen] * len(reached)
    assert all(p.grad is not None for p in found.heads.parameters())


def test_a_teacher_without_features_is_no_trunk() -> None:
    exact = MixtureDenoiser(make_schedule("edm"), torch.zeros(1, 2), torch.ones(1))
    with pytest.raises(InputError, match="no inner features"):
        make_discriminator(GanSpec(trunk="teacher"), denoiser(), exact, seed=0)
    with pytest.raises(InputError, match="no tap"):
        make_discriminator(GanSpec(taps=("top",)), denoiser(), exact, seed=0)


def test_logits_are_finite_for_every_level() -> None:
    found = make_discriminator(GanSpec(), denoiser(), denoiser(), seed=0)

    def at_level(low: float, high: float) -> Tensor:
        return generated_logits(found, LevelSpec(low=low, high=high), torch.randn(50, 2, generator=draws()), None, draws())

    assert all(bool(at_level(low, low + 0.1).isfinite().all()) for low in (0.0, 0.5, 0.9))
