"""iCT and CT: knobs, what a step computes, the lagging teacher, restarts, a run that learns, the artefact."""

import copy

import pytest
import torch
from torch import Tensor, nn

from limbeck.components import Component
from limbeck.contract import IGNORE, Batch, Clock, OptimiserSpec
from limbeck.data import ArrayData
from limbeck.data.points import gaussian_ring
from limbeck.diffusion.build import mlp_denoiser
from limbeck.diffusion.consistency import ConsistencyGenerator, consistency_generator, consistency_pair, inverse_gap
from limbeck.errors import InputError
from limbeck.evaluate.samples import energy_distance
from limbeck.export import folder as artefacts
from limbeck.methods.generators.ict import ICT
from limbeck.models import CATALOGUE, build_model
from limbeck.train import TrainConfig, Trainer

CT = {"curriculum": "ct", "s0": 2, "s1": 150, "intervals": "uniform", "weighting": "one", "distance": "squared_l2", "teacher_ema": 0.9}


def student(seed: int = 0, **options) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        found = mlp_denoiser((2,), 3, **{"widths": (16, 16), "precondition": "consistency", "conditional": False, **options})
        nn.init.normal_(found.network.head.weight, std=0.3)  # a zero head has no gradient below it and no dropout to see
        return found


def bound(*, student_options: dict | None = None, train=None, **knobs) -> ICT:
    return ICT(**knobs).bind(student=student(**(student_options or {})), train=train)


def points(count: int = 24, seed: int = 0) -> Tensor:
    return 0.5 * torch.randn(count, 2, generator=torch.Generator().manual_seed(seed))


def loss_of(method: ICT, inputs: Tensor, clock: Clock, targets: Tensor | None = None) -> Tensor:
    (update,) = method.updates(Batch(inputs, targets), clock)
    assert update.player == "generator"
    return update.loss


# ---- what is refused --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "said"),
    [({"precondition": "edm"}, "precondition 'edm'"), ({"precondition": "none"}, "'none'"), ({"schedule": "trig"}, "schedule 'trig'")],
)
def test_a_student_without_the_boundary_condition_is_refused_with_the_fix(options, said) -> None:
    with pytest.raises(InputError, match=said) as caught:
        bound(student_options=options)
    assert "precondition: consistency" in caught.value.fix
    assert caught.value.where == "student.model"
    with pytest.raises(InputError, match="Linear"):
        ICT().bind(student=nn.Linear(2, 2))


@pytest.mark.parametrize("knobs", [{"s0": 10, "s1": 5}, {"s0": 0}, {"huber_c": 0.0}, {"teacher_ema": 1.0}, {"steps": 3}, {"p_std": 0.0}, {"curriculum": "x"}])
def test_impossible_knobs_are_refused(knobs) -> None:
    with pytest.raises(InputError):
        ICT(**knobs)


@pytest.mark.parametrize("tau", [80.0, 100.0, 0.001])
def test_a_second_level_outside_the_schedule_is_refused(tau) -> None:
    with pytest.raises(InputError, match="outside") as caught:
        bound(tau=tau)
    assert caught.value.where == "method.tau"


# ---- a step -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("knobs", [{"s1": 160}, {**CT, "teacher_ema": 0.0}, {"s1": 40, "distance": "squared_l2"}, {"weighting": "one", "huber_c": 0.1}])
def test_the_loss_is_the_sheets_written_out(knobs) -> None:
    """Equation 5 from the drawn numbers, without any of the shared parts."""
    method, x, clock = bound(**knobs), points(), Clock(seed=3, step=70, steps=100)
    found = loss_of(method, x, clock)
    config, generator = method.config, clock.generator("noise")
    N = method.points(clock)
    grid = (0.002 ** (1 / 7) + torch.arange(N, dtype=torch.float64) / (N - 1) * (80 ** (1 / 7) - 0.002 ** (1 / 7))) ** 7
    p = torch.ones(N - 1, dtype=torch.float64) if config.intervals == "uniform" else torch.erf((grid.log() + 1.1) / (2**0.5 * 2)).diff()
    u = torch.rand(len(x), dtype=torch.float64, generator=generator)
    i = (u[:, None] >= (p / p.sum()).cumsum(0)).sum(1).clamp_max(N - 2)
    z = torch.randn(len(x), 2, generator=generator)
    low, high = grid[i], grid[i + 1]
    f = method.student
    a = f(x + high[:, None].float() * z, high)
    b = f(x + low[:, None].float() * z, low).detach()
    squared = (a - b).square().sum(1)
    c = config.huber_c or 0.00054 * 2**0.5
    d = squared if config.distance == "squared_l2" else (squared + c**2).sqrt() - c
    weight = 1 / (high - low) if config.weighting == "inverse_gap" else torch.ones_like(high)
    expected = (d * weight.float()).mean()
    torch.testing.assert_close(found, expected, rtol=2e-4, atol=1e-6)
    ours = torch.autograd.grad(found, list(f.parameters()))
    torch.testing.assert_close(ours, torch.autograd.grad(expected, list(f.parameters())), rtol=2e-3, atol=1e-4)


def test_the_curriculum_follows_the_clock() -> None:
    paper, old, fixed = bound(s1=160), bound(**CT), bound(curriculum="constant", s1=160)
    clocks = [Clock(step=k, steps=100) for k in (0, 19, 20, 99)]
    assert [paper.points(c) for c in clocks] == [11, 11, 21, 161]
    assert old.points(clocks[0]) == 2
    assert [fixed.points(c) for c in clocks] == [161] * 4
    first = paper.grid(11, torch.device("cpu"))
    assert paper.grid(11, torch.device("cpu")) is first
    assert len(paper.grid(21, torch.device("cpu")).times_N) == 21


@pytest.mark.parametrize("teacher_ema", [0.0, 0.9])
def test_both_evaluations_of_a_step_share_mask_noise_and_labels(teacher_ema) -> None:
    method = bound(student_options={"dropout": 0.5, "conditional": True}, teacher_ema=teacher_ema)
    method.student.train()
    masks, labels, inputs, hooks = [], [], [], []
    for network in (method.student.network,) if method.lagging is None else (method.student.network, method.lagging.eval().network):
        hooks.append(network.dropout.register_forward_hook(lambda _m, _i, o: masks.append(o != 0)))
        hooks.append(network.register_forward_pre_hook(lambda _m, given: (inputs.append(given[0]), labels.append(given[2]))[0]))
    targets = torch.tensor([0, 1, 2, IGNORE] * 6)
    loss_of(method, points(), Clock(step=0), targets)
    for hook in hooks:
        hook.remove()
    assert len(masks) == 4
    assert torch.equal(masks[0], masks[2])
    assert torch.equal(masks[1], masks[3])
    assert torch.equal(labels[0], labels[1])
    assert labels[0][:4].tolist() == [0, 1, 2, 3]  # the unlabelled get the null class
    assert inputs[0].shape == inputs[1].shape
    unconditional = bound()
    assert unconditional.conditions(Batch(points(), targets)) is None


def test_the_step_is_a_function_of_the_clock_and_leaves_no_trace_in_the_global_generator() -> None:
    method = bound(student_options={"dropout": 0.5})
    method.student.train()
    torch.manual_seed(0)
    first = loss_of(method, points(), Clock(seed=1, step=5))
    after = torch.rand(1)
    torch.manual_seed(0)
    assert torch.equal(loss_of(method, points(), Clock(seed=1, step=5)), first)
    torch.manual_seed(0)
    method.student(points(), torch.ones(24, dtype=torch.float64))
    assert torch.equal(torch.rand(1), after)  # as after one forward pass
    assert not torch.equal(loss_of(method, points(), Clock(seed=1, step=6)), first)


def test_nothing_is_read_on_the_host_in_a_step() -> None:
    """On the meta device any `.item()`, `bool()` or `float()` of a tensor raises."""
    method = bound(**CT)
    method.student.to("meta")
    method.lagging.to("meta")
    low, high = (t.to("meta") for t in method.grid(9, torch.device("cpu")).draw(24, torch.Generator()))  # what is drawn comes from a CPU generator
    x = torch.empty(24, 2, device="meta")
    a, b = consistency_pair(method.student, method.lagging, x, x, low, high)
    assert (method.distance(a, b) * inverse_gap(method.student.schedule, low, high)).mean().device.type == "meta"


# ---- the lagging teacher ----------------------------------------------------------------------------------------------------


def test_a_lagging_teacher_answers_gets_no_gradient_and_follows_by_the_old_schedule() -> None:
    method, clock = bound(**CT), Clock(step=0, steps=10)
    assert list(method.players()) == ["generator", "teacher"]
    assert [phase.trains for phase in method.phases()] == [("generator",)]
    before = copy.deepcopy(method.lagging)
    with torch.no_grad():
        for p in method.student.parameters():
            p.add_(0.1)
    loss = loss_of(method, points(), clock)
    loss.backward()
    assert all(p.grad is None for p in method.lagging.parameters())
    method.after_step("generator", clock)
    mu = 0.9 ** (2 / 2)
    expected = [mu * t + (1 - mu) * s for t, s in zip(before.parameters(), method.student.parameters(), strict=True)]
    torch.testing.assert_close(list(method.lagging.parameters()), expected)
    assert not torch.allclose(loss_of(method, points(), clock), loss_of(bound(**{**CT, "teacher_ema": 0.0}), points(), clock))


def test_without_ema_the_teacher_is_the_student_itself() -> None:
    method = bound()
    assert method.lagging is None
    assert list(method.players()) == ["generator"]
    method.after_step("generator", Clock())


def trained(folder, knobs: dict, *, steps: int = 12, stop: int | None = None, dropout: float = 0.3, **config) -> ICT:
    data = ArrayData(points(200), None, [])
    method = bound(student_options={"dropout": dropout}, train=data, **knobs)
    if stop is not None:

        class Stopping(ICT):
            def after_step(self, player, clock):
                super().after_step(player, clock)
                if clock.step + 1 == stop:
                    raise KeyboardInterrupt

        method.__class__ = Stopping
    settings = {"steps": steps, "batch_size": 32, "log_every": 3, "ema": 0.9, "checkpoint_steps": 4, "keep": 9, **config}
    Trainer(method, data, TrainConfig(optimiser=OptimiserSpec(name="radam", lr=1e-3), **settings), seed=5, folder=folder, cpu=True).fit()
    return method


@pytest.mark.parametrize("knobs", [{"s0": 4, "s1": 16}, {**CT, "s1": 16}])
def test_a_restarted_run_ends_bit_for_bit_as_one_that_never_stopped(tmp_path, knobs) -> None:
    whole = trained(tmp_path / "whole", knobs)
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path / "cut", knobs, stop=7)
    again = trained(tmp_path / "cut", knobs)
    for one, two in [(whole.student, again.student)] + ([(whole.lagging, again.lagging)] if whole.lagging is not None else []):
        for name, value in one.state_dict().items():
            assert torch.equal(value, two.state_dict()[name]), name
    assert (tmp_path / "whole" / "metrics.jsonl").read_bytes() == (tmp_path / "cut" / "metrics.jsonl").read_bytes()


@pytest.mark.parametrize(("knobs", "share"), [({"s0": 10, "s1": 40, "huber_c": 0.01}, 0.35), ({**CT, "s1": 40}, 0.9)])
def test_a_small_run_is_better_than_its_start_and_two_steps_than_one(knobs, share) -> None:
    splits = gaussian_ring(modes=4, count=4000, test=1000)
    method = ICT(**knobs).bind(student=student(widths=(48, 48)), train=splits.train)
    real = splits.test.prepare(splits.test.fetch(torch.arange(1000))[0])
    noise = torch.randn(1000, 2, generator=torch.Generator().manual_seed(1))

    def distance(steps: int) -> float:
        with torch.no_grad():
            return energy_distance(real, method.generator.with_steps(steps)(noise, None, torch.Generator().manual_seed(2)))

    before = distance(1)
    config = TrainConfig(steps=400, batch_size=128, ema=0.98, optimiser=OptimiserSpec(name="radam", lr=2e-3))
    Trainer(method, splits.train, config, seed=1, cpu=True).fit()
    assert distance(1) < share * before
    assert distance(2) < distance(1)


# ---- what comes out ---------------------------------------------------------------------------------------------------------


def test_the_artefact_builds_the_same_sampler_again(tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(CATALOGUE, "consistency_generator", f"{consistency_generator.__module__}:{consistency_generator.__name__}")
    splits = gaussian_ring(modes=4, count=50, test=10)
    component = {"name": "mlp_denoiser", "widths": [16, 16], "precondition": "consistency", "conditional": False}
    model = Component.model_validate(component)
    method = ICT(steps=2, tau=0.7).bind(student=build_model(model, num_classes=4, input_shape=(2,), seed=1), train=splits.train)
    made = method.artefact()
    assert made.kind == "generator"
    artefacts.save(made, tmp_path / "a", model=made.around(model), num_classes=4, input_shape=(2,), preprocess={}, classes=(), extra={})
    loaded = artefacts.load(tmp_path / "a")
    assert isinstance(loaded, ConsistencyGenerator)
    assert loaded.times == (80.0, 0.7)
    assert torch.equal(loaded.sample(6, seed=3), method.generator.sample(6, seed=3))
    assert torch.equal(loaded.sample(6, seed=3, steps=1), method.generator.sample(6, seed=3, steps=1))
    assert method.facts() == {"huber_c": pytest.approx(0.00054 * 2**0.5), "levels": [80.0, 0.7]}
