"""Generators: their calls, starts and simulations, `sample` by seed and labels, data scale, building again; wrong input."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from limbeck.data.arrays import ArrayData
from limbeck.diffusion import samplers
from limbeck.diffusion.build import generator as build_generator
from limbeck.diffusion.denoisers import MixtureDenoiser, NetworkDenoiser
from limbeck.diffusion.generator import DataScale, DirectGenerator, Generator, Sampling, TeacherSampler, data_scale
from limbeck.diffusion.networks import MLPNetwork
from limbeck.diffusion.schedules import EDM, Flow, VPDiscrete
from limbeck.errors import InputError

COMPONENT = {"name": "mlp_denoiser", "args": {"widths": [8], "schedule": "flow", "prediction": "velocity", "precondition": "none"}}


def network(num_classes: int = 3, dropout: float = 0.0) -> NetworkDenoiser:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return NetworkDenoiser(MLPNetwork((2,), (16,), num_classes=num_classes, dropout=dropout, zero_output=False), EDM(), precondition="edm")


def mixture() -> MixtureDenoiser:
    return MixtureDenoiser(EDM(), torch.tensor([[1.0, 0.0], [-1.0, 0.0]]), torch.full((2,), 0.1), classes=torch.tensor([0, 1]))


def noise(count: int = 6, seed: int = 0) -> Tensor:
    return torch.randn(count, 2, generator=torch.Generator().manual_seed(seed))


# Calls


def test_one_step_is_one_call_at_the_top() -> None:
    d, cond = network(), torch.tensor([0, 1, 2, 0, 1, 2])
    made = Generator(d, (80.0,))
    torch.testing.assert_close(made(noise(), cond), d(80 * noise(), samplers.at(80.0, noise()), cond), rtol=0, atol=0)
    torch.testing.assert_close(made.call(made.start(noise()), 0, cond), made(noise(), cond), rtol=0, atol=0)
    assert made.calls == 1
    assert made(noise(), cond).requires_grad


@pytest.mark.parametrize(("mode", "sampler"), [("renoise", samplers.renoise), ("ode", samplers.ddim), ("gamma", samplers.gamma)])
def test_modes_are_their_samplers(mode: Any, sampler: Any) -> None:
    d, times = network(), EDM().few_steps(3)
    options = {} if mode == "ode" else {"generator": torch.Generator().manual_seed(5)}
    options |= {"share": 0.4} if mode == "gamma" else {}
    found = Generator(d, times, mode=mode, share=0.4)(noise(), None, torch.Generator().manual_seed(5))
    torch.testing.assert_close(found, sampler(d, 80 * noise(), times, **options), rtol=0, atol=0)


def test_the_start_is_the_noise_at_the_first_time() -> None:
    for schedule, factor in ((EDM(), 80.0), (Flow(), 0.999), (VPDiscrete(), 1.0)):
        d = MixtureDenoiser(schedule, torch.zeros(1, 2), torch.ones(1))
        made = Generator(d, schedule.few_steps(2))
        torch.testing.assert_close(made.start(noise()), factor * noise())
        torch.testing.assert_close(made.simulate(0, noise()), made.start(noise()), rtol=0, atol=0)


def test_simulated_inputs_are_those_that_sampling_makes() -> None:
    made, seen = Generator(network(), EDM().few_steps(4)), []
    cond = torch.tensor([0, 1, 2, 0, 1, 2])
    made.denoiser.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    made(noise(), cond, torch.Generator().manual_seed(1))
    inputs, seen = seen, []
    for k in range(4):
        found = made.simulate(k, noise(), cond, generator=torch.Generator().manual_seed(1))
        torch.testing.assert_close(found, inputs[k], rtol=0, atol=0)
        assert not found.requires_grad


def test_statistics_of_a_simulated_input() -> None:
    made = Generator(mixture(), (80.0, 1.5))
    x = made.simulate(1, noise(20_000), generator=torch.Generator().manual_seed(2))
    # one call at σ = 80 gives nearly the mean of all data, 0 ± 80/(1 + 80²)·…: what is left is the fresh noise
    torch.testing.assert_close(x.mean(0), torch.zeros(2), atol=0.05, rtol=0)
    torch.testing.assert_close(x.std(0), torch.full((2,), 1.5), atol=0.03, rtol=0)
    torch.testing.assert_close(torch.corrcoef(torch.stack((x[:, 1], noise(20_000)[:, 1])))[0, 1], torch.tensor(0.0), atol=0.03, rtol=0)


def test_with_steps_shares_the_weights() -> None:
    made = Generator(network(), (80.0,), mode="ode", scale=DataScale([1.0, 2.0], [3.0, 4.0]))
    assert made.with_steps(1) is made
    four = made.with_steps(4)
    assert four.calls == 4
    assert four.times == EDM().few_steps(4)
    assert four.denoiser is made.denoiser
    assert (four.mode, four.scale) == ("ode", made.scale)
    torch.testing.assert_close(made.sample(4, steps=4, seed=3), four.sample(4, seed=3), rtol=0, atol=0)


# sample()


def test_samples_are_a_function_of_the_seed() -> None:
    made, before = Generator(network(), EDM().few_steps(2)), torch.get_rng_state()
    assert torch.equal(made.sample(5, seed=1), made.sample(5, seed=1))
    assert not torch.equal(made.sample(5, seed=1), made.sample(5, seed=2))
    assert torch.equal(before, torch.get_rng_state())
    assert made.sample(5).shape == (5, 2)
    assert not made.sample(5).requires_grad


def test_the_start_noise_does_not_depend_on_the_batch_size() -> None:
    made = Generator(network(), (80.0,))
    for size in (1, 3, 7, 300):
        torch.testing.assert_close(made.sample(20, batch_size=size), made.sample(20), rtol=1e-5, atol=1e-6)


def test_noise_between_calls_is_not_the_start_noise_of_another_seed() -> None:
    class Keep(Generator):
        def forward(self, noise: Tensor, cond: Tensor | None = None, generator: torch.Generator | None = None) -> Tensor:
            return torch.randn(noise.shape, generator=generator) if cond is not None else noise

    made = Keep(network(), (80.0, 1.0))
    between = made.sample(40, seed=0)
    unconditional = Keep(network(0), (80.0, 1.0))
    for seed in range(4):
        assert not torch.isin(between, unconditional.sample(40, seed=seed)).any()


def test_sampling_is_in_eval_mode_and_leaves_the_mode_as_it_was() -> None:
    made = Generator(network(dropout=0.5), (80.0,)).train()
    made.denoiser.network.hidden.eval()  # type: ignore[union-attr,operator]
    flags = [part.training for part in made.modules()]
    assert torch.equal(made.sample(50), made.sample(50))
    assert flags == [part.training for part in made.modules()]
    assert torch.equal(made.sample(50, steps=2), made.sample(50, steps=2))


def test_labels_in_turn_one_for_all_or_one_each() -> None:
    made = Generator(mixture(), EDM().few_steps(4), mode="ode")
    sign = made.sample(6)[:, 0].sign().tolist()
    assert sign == [1, -1, 1, -1, 1, -1]
    assert made.sample(3, labels=1)[:, 0].sign().tolist() == [-1, -1, -1]
    assert made.sample(3, labels=[0])[:, 0].sign().tolist() == [1, 1, 1]
    for labels in ([0, 0, 1], torch.tensor([0, 0, 1]), torch.tensor([[0], [0], [1]])):
        assert made.sample(3, labels=labels)[:, 0].sign().tolist() == [1, 1, -1]
    assert made.sample(3, labels=[0, 0, 1], batch_size=2)[:, 0].sign().tolist() == [1, 1, -1]
    assert made.conditions(5).tolist() == [0, 1, 0, 1, 0]  # type: ignore[union-attr]
    assert Generator(network(0), (80.0,)).conditions(5) is None


@pytest.mark.parametrize(
    ("options", "where"),
    [
        ({"count": 0}, "count"),
        ({"labels": 3}, "labels"),
        ({"labels": -1}, "labels"),
        ({"labels": [0, 1]}, "labels"),
        ({"labels": []}, "labels"),
        ({"labels": 0.5}, "labels"),
        ({"labels": ["cat"]}, "labels"),
        ({"steps": 0}, "steps"),
        ({"steps": 1001}, "steps"),
        ({"batch_size": 0}, "batch_size"),
    ],
)
def test_samples_that_cannot_be(options: dict[str, Any], where: str) -> None:
    with pytest.raises(InputError) as caught:
        Generator(network(), (80.0,)).sample(**({"count": 5} | options))
    assert caught.value.where == where


def test_labels_for_a_generator_without_classes() -> None:
    with pytest.raises(InputError) as caught:
        Generator(network(0), (80.0,)).sample(2, labels=0)
    assert caught.value.where == "labels"


@pytest.mark.parametrize(
    ("times", "options", "where"),
    [
        ((), {}, "levels"),
        ((1.0, 2.0), {}, "levels"),
        ((81.0,), {}, "times"),
        ((80.0, 0.001), {}, "times"),
        ((math.nan,), {}, "levels"),
        ((80.0,), {"mode": "heun"}, "mode"),
        ((80.0,), {"share": 1.5}, "share"),
    ],
)
def test_generators_that_cannot_be(times: tuple[float, ...], options: dict[str, Any], where: str) -> None:
    with pytest.raises(InputError) as caught:
        Generator(network(), times, **options)
    assert caught.value.where == where


@pytest.mark.parametrize("k", [-1, 2])
def test_calls_that_do_not_exist_are_not_simulated(k: int) -> None:
    with pytest.raises(InputError) as caught:
        Generator(network(), (80.0, 1.0)).simulate(k, noise())
    assert caught.value.where == "k"


# Scale


def test_data_scale_a_channel_and_clipping() -> None:
    points = DataScale([1.0, -1.0], [2.0, 3.0])
    torch.testing.assert_close(points(torch.tensor([[1.0, 1.0]])), torch.tensor([[3.0, 2.0]]))
    images = DataScale([0.5, 0.4], [0.5, 0.2], bounded=True)
    x = torch.full((1, 2, 2, 2), 1.0)
    torch.testing.assert_close(images(x)[0, :, 0, 0], torch.tensor([1.0, 0.6]))
    assert images(9 * x).max() == 1
    assert images(-9 * x).min() == 0
    torch.testing.assert_close(DataScale()(x), x)
    assert DataScale(**points.arguments).arguments == points.arguments
    assert not DataScale([1.0]).state_dict()


def test_the_scale_of_data_is_the_inverse_of_its_normalisation() -> None:
    pixels = torch.randint(0, 256, (8, 1, 4, 4), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    data = ArrayData(pixels, None, (), mean=(0.3,), std=(0.2,))
    scale = data_scale(data, (1, 4, 4))
    assert scale.bounded
    torch.testing.assert_close(scale(data.prepare(pixels)), pixels / 255)
    points = torch.randn(8, 2)
    plain = data_scale(ArrayData(points, None, ()), (2,))
    assert not plain.bounded
    torch.testing.assert_close(plain(points), points)
    assert data_scale(None, (2,)).arguments == DataScale().arguments
    assert data_scale(None, (3, 8, 8)).bounded


def test_samples_are_in_data_units() -> None:
    d = network(0)
    plain, scaled = Generator(d, (80.0,)), Generator(d, (80.0,), scale=DataScale([1.0, -1.0], [2.0, 3.0]))
    torch.testing.assert_close(scaled.sample(4), plain.sample(4) * torch.tensor([2.0, 3.0]) + torch.tensor([1.0, -1.0]))


# Building again


@pytest.mark.parametrize("mode", ["renoise", "ode", "gamma"])
def test_arguments_build_a_generator_of_equal_samples(mode: Any) -> None:
    first = build_generator(COMPONENT, (0.999, 0.3), 3, (2,), mode=mode, share=0.35, scale={"mean": [0.1, 0.2], "std": [0.7, 0.9], "bounded": False})
    torch.nn.init.normal_(first.denoiser.network.head.weight)  # type: ignore[union-attr,arg-type]
    again = build_generator(COMPONENT, num_classes=3, input_shape=(2,), **first.arguments)
    again.load_state_dict(first.state_dict())
    assert again.arguments == first.arguments
    assert torch.equal(again.sample(9, seed=4), first.sample(9, seed=4))


# The others


class Shift(nn.Module):
    def forward(self, z: Tensor, cond: Tensor | None = None) -> Tensor:
        return z + 1 if cond is None else z + cond.unsqueeze(1)


def test_a_direct_generator_is_its_module() -> None:
    plain, conditional = DirectGenerator(Shift(), (2,)), DirectGenerator(Shift(), (2,), num_classes=3, scale=DataScale([0.0], [2.0]))
    torch.testing.assert_close(plain(noise()), noise() + 1)
    torch.testing.assert_close(conditional.sample(6, seed=1), 2 * (noise(6, 1) + torch.tensor([0, 1, 2, 0, 1, 2]).unsqueeze(1)))
    assert plain.calls == 1
    assert plain.with_steps(1) is plain
    assert conditional.arguments == {"scale": {"mean": [0.0], "std": [2.0], "bounded": False}}
    with pytest.raises(InputError) as caught:
        plain.sample(2, steps=2)
    assert caught.value.where == "steps"


@pytest.mark.parametrize("sampler", sorted(samplers.SAMPLERS))
def test_a_teacher_sampler_makes_the_calls_it_says(sampler: str) -> None:
    d, made = network(), []
    d.network.register_forward_hook(lambda *_: made.append(1))
    teacher = TeacherSampler(d, 5, sampler=sampler)
    found = teacher(noise(), torch.zeros(6, dtype=torch.long), torch.Generator().manual_seed(0))
    assert len(made) == teacher.calls == (9 if sampler == "heun" else 5)
    assert found.shape == (6, 2)
    assert torch.equal(teacher.sample(4, seed=2), teacher.sample(4, seed=2))


def test_a_teacher_samples_its_data() -> None:
    x = TeacherSampler(mixture(), 40).sample(2000)
    torch.testing.assert_close(x[::2].mean(0), torch.tensor([1.0, 0.0]), atol=0.02, rtol=0)
    torch.testing.assert_close(x[1::2].std(0), torch.full((2,), 0.1), atol=0.02, rtol=0)


def test_teacher_samplers_that_cannot_be() -> None:
    for options, where in (({"steps": 0}, "steps"), ({"steps": 3, "sampler": "huen"}, "sampler")):
        with pytest.raises(InputError) as caught:
            TeacherSampler(network(), **options)  # type: ignore[arg-type]
        assert caught.value.where == where
    with pytest.raises(InputError) as caught:
        TeacherSampler(network(), 5).sample(2, steps=4)
    assert caught.value.where == "steps"


def test_sampling_is_abstract() -> None:
    with pytest.raises(TypeError):
        Sampling()  # type: ignore[abstract]
