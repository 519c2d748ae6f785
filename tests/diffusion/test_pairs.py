"""Pairs of noise and the teacher's deterministic samples."""

import math

import torch

from limbeck.diffusion.denoisers import MixtureDenoiser
from limbeck.diffusion.pairs import Pairs, RegressionSpec, make_pairs, pair_distance
from limbeck.diffusion.samplers import ddim, heun
from limbeck.diffusion.schedules import make_schedule

MEANS = torch.tensor([[-0.5, 0.0], [0.5, 0.0], [0.0, 0.5]])
TEACHER = MixtureDenoiser(make_schedule("edm"), MEANS, torch.full((3,), 0.05), classes=torch.tensor([0, 1, 1]))
CPU = torch.device("cpu")


def test_pairs_are_heuns_samples_and_a_function_of_the_seed() -> None:
    made, again, other = make_pairs(TEACHER, 30, 6, 3, CPU), make_pairs(TEACHER, 30, 6, 3, CPU, batch_size=7), make_pairs(TEACHER, 30, 6, 4, CPU)
    assert made.noise.shape == made.samples.shape == (30, 2)
    torch.testing.assert_close(made.samples, heun(TEACHER, 80.0 * made.noise, TEACHER.schedule.steps(6), made.cond))
    torch.testing.assert_close(made.samples, again.samples)
    assert torch.equal(made.noise, again.noise)
    assert not torch.equal(made.noise, other.noise)
    assert set(made.cond.tolist()) == {0, 1}
    coarse = make_pairs(TEACHER, 30, 6, 3, CPU, sampler="ddim")
    assert torch.equal(coarse.noise, made.noise)
    torch.testing.assert_close(coarse.samples, ddim(TEACHER, 80.0 * made.noise, TEACHER.schedule.steps(6), made.cond))
    nearest = torch.cdist(make_pairs(TEACHER, 30, 30, 3, CPU).samples, MEANS).min(1)
    assert bool((nearest.values < 0.25).all())
    assert torch.equal((nearest.indices > 0).long(), made.cond)  # a sample lies where its condition says


def test_a_draw_keeps_noise_samples_and_conditions_together() -> None:
    numbers = torch.arange(10.0).view(10, 1)
    pairs = Pairs(numbers, numbers + 100, torch.arange(10))
    noise, samples, cond = pairs.draw(50, torch.Generator().manual_seed(0))
    assert torch.equal(noise + 100, samples)
    assert torch.equal(noise[:, 0].long(), cond)
    assert len(set(cond.tolist())) > 5
    assert Pairs(numbers, numbers).draw(2, torch.Generator().manual_seed(0))[2] is None


def test_distances() -> None:
    x, y = torch.tensor([[3.0, 4.0], [0.0, 0.0]]), torch.zeros(2, 2)
    assert pair_distance(x, y, "squared").item() == 25 / 4
    c = 0.00054 * math.sqrt(2)
    torch.testing.assert_close(pair_distance(x, y, "pseudo_huber").item(), (math.sqrt(25 + c * c) - c) / 2)
    z = torch.zeros(2, 2, requires_grad=True)
    assert not torch.autograd.grad(pair_distance(z, y, "pseudo_huber"), z)[0].any()  # smooth where they meet


def test_pairs_are_used_where_something_asks_for_them() -> None:
    assert [RegressionSpec().used, RegressionSpec(weight=0.1).used, RegressionSpec(warm_up=1).used] == [False, True, True]
