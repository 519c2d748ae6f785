"""What the claim of BOOT compares with: pairs that cost what they may and are learnt from the same start, and the teacher's sampler untouched."""

import torch

from limbeck.claims.studies.boot import FewSteps, PairRegression
from limbeck.contract import Batch, Clock
from limbeck.data.points import gaussian_ring
from limbeck.diffusion import samplers
from limbeck.diffusion.build import mlp_denoiser
from limbeck.diffusion.denoisers import NetworkDenoiser
from limbeck.diffusion.distribution import normal
from limbeck.train import TrainConfig, Trainer


def network(seed: int) -> NetworkDenoiser:
    torch.manual_seed(seed)
    found = mlp_denoiser((2,), 8, widths=[16], schedule="trig", precondition="none")
    torch.nn.init.normal_(found.network.head.weight)
    return found


def test_pairs_cost_their_budget_and_are_the_samplers() -> None:
    method = PairRegression(teacher_budget=1000, pair_steps=20).bind(student=network(1), teacher=network(2), num_classes=8, seed=3)
    method.guided.denoiser.register_forward_hook(lambda _module, inputs, _out: shown.append(len(inputs[0])))
    shown: list[int] = []
    (update,) = method.updates(Batch(torch.zeros(4, 0)), Clock())
    assert sum(shown) == method.facts()["metrics"]["teacher_calls"] == 1000
    noise, samples, cond = method.pairs.noise, method.pairs.samples, method.pairs.cond
    assert len(noise) == len(samples) == 50
    torch.testing.assert_close(samples, samplers.ddim(method.teacher, noise, method.teacher.schedule.steps(20), cond))
    chosen = torch.randint(50, (4,), generator=Clock().generator("pairs"))
    torch.testing.assert_close(update.loss, (method.g(noise[chosen], cond[chosen]) - samples[chosen]).square().mean())
    assert all(torch.equal(a, b) for a, b in zip(method.student.parameters(), method.teacher.parameters(), strict=True))
    shown.clear()
    list(method.updates(Batch(torch.zeros(4, 0)), Clock(step=1)))
    assert shown == []  # they are made once


def test_few_steps_train_nothing_and_sample_with_ddim() -> None:
    data, teacher = gaussian_ring(count=64, test=16).train, network(2)
    method = FewSteps(steps=3).bind(student=network(1), teacher=teacher, train=data, num_classes=8)
    assert Trainer(method, data, TrainConfig(steps=5)).fit().steps == 0
    noise, cond = normal(600, (2,), torch.Generator().manual_seed(0)), torch.arange(600) % 8
    torch.testing.assert_close(method.inference()(noise, cond), samplers.ddim(teacher, noise, teacher.schedule.steps(3), cond))
    assert method.inference().calls == 3
    assert method.artefact().module is method.inference()
