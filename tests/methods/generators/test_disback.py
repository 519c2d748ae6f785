"""DisBack: every invariant of its sheet, plain score distillation as its case without a path, restarts across a switch."""

import copy
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from limbeck.contract import Batch, Clock, OptimiserSpec, Phase, Update, Workbench
from limbeck.data.points import gaussian_ring
from limbeck.diffusion.build import mlp_denoiser, mlp_generator
from limbeck.diffusion.denoisers import NetworkDenoiser
from limbeck.diffusion.distribution import normal
from limbeck.diffusion.generator import DirectGenerator, Generator
from limbeck.diffusion.levels import LevelSpec
from limbeck.diffusion.schedules import EDM
from limbeck.errors import InputError
from limbeck.methods.generators.disback import BACKTRACK, DEGRADE, DisBack
from limbeck.train import TrainConfig, Trainer

B, LR = 6, 0.01
LEVELS = LevelSpec(kind="lognormal")


def ring():
    return gaussian_ring(count=64, test=32, scale=None, labels="none")


def denoiser(seed: int = 0, classes: int = 0, dropout: float = 0.0) -> NetworkDenoiser:
    torch.manual_seed(seed)
    made = mlp_denoiser((2,), classes, widths=(8, 8), sigma_data=2.0, dropout=dropout)
    nn.init.normal_(made.network.head.weight)
    return made


def small(seed: int = 1) -> nn.Module:
    torch.manual_seed(seed)
    return mlp_generator((2,), 0, widths=(6,), offset=(6.0, 6.0))


def bound(student: nn.Module | None = None, teacher: nn.Module | None = None, *, kind=DisBack, seed: int = 3, **knobs) -> DisBack:
    knobs.setdefault("start", "fresh")
    return kind(**knobs).bind(student=student or small(), teacher=teacher or denoiser(), train=ring().train, test=ring().test, seed=seed)


def config(steps: int, **changes) -> TrainConfig:
    return TrainConfig(**{"steps": steps, "batch_size": B, "log_every": 1, "optimiser": OptimiserSpec(name="adam", lr=LR)} | changes)


def train(method: DisBack, steps: int, **changes) -> DisBack:
    Trainer(method, method.train_data, config(steps, **changes), seed=method.seed).fit()
    return method


def state(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def same(a, b) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def batch(count: int = B) -> Batch:
    return Batch(torch.empty(count, 0))


class Points(nn.Module):
    """A student whose samples are its parameter: gradients at the samples can be read off."""

    shape, num_classes = (2,), 0

    def __init__(self, count: int = B) -> None:
        super().__init__()
        self.x = nn.Parameter(torch.randn(count, 2, generator=torch.Generator().manual_seed(5)))

    def forward(self, noise: Tensor) -> Tensor:
        return self.x * 1.0


class Noting(DisBack):
    """Notes the weights of everybody on the way; stops where it is told to."""

    stop_at = ("", -1)

    def setup(self) -> None:
        super().setup()
        self.targets: list[dict[str, Tensor]] = []
        self.critics: list[dict[str, Tensor]] = []
        self.order: list[str] = []
        self.phase_ends: dict[str, dict[str, Tensor]] = {}
        self.begun_with: dict[str, Tensor] = {}

    def updates(self, batch: Batch, clock: Clock) -> Iterator[Update]:
        if (clock.phase, clock.step) == self.stop_at:
            raise RuntimeError("stopped")
        if clock.phase == BACKTRACK and clock.step == 0:
            self.begun_with = state(self.critic)
        for update in super().updates(batch, clock):
            self.order.append(update.player)
            if update.player == "generator":
                self.targets.append(state(self.scheduled.denoiser if self.scheduled is not None else self.teacher))
            yield update

    def after_step(self, player: str, clock: Clock) -> None:
        super().after_step(player, clock)
        if clock.phase == DEGRADE:
            self.critics.append(state(self.critic))

    def leave(self, phase: Phase, clock: Clock, bench: Workbench) -> None:
        self.phase_ends[phase.name] = state(self.student)


# ---- plain score distillation ----------------------------------------------------------------------------------------------


def test_without_a_path_it_is_plain_score_distillation_bit_for_bit() -> None:
    """The loop of Diff-Instruct, by hand, from the same draws."""
    method = bound(stage1_steps=0)
    student, teacher, critic = (copy.deepcopy(m) for m in (method.student, method.teacher, method.critic))
    assert same(state(critic), state(teacher))
    train(method, 6)
    generator_step, critic_step = (torch.optim.Adam(m.parameters(), lr=LR) for m in (student, critic))
    for step in range(6):
        clock = Clock(seed=3, step=step)
        z = normal(B, (2,), clock.generator("critic noise 0"))
        draw = clock.generator("critic 0")
        sigma = LEVELS.sample(EDM(), B, draw)
        x = student(z).detach()
        y = x + sigma[:, None].float() * normal(B, (2,), draw)
        weight = (sigma**2 + 2.0**2) / (sigma * 2.0) ** 2  # 1/c_out²
        loss = ((critic(y, sigma) - x).square().mean(1) * weight.float()).mean()
        critic_step.zero_grad()
        loss.backward()
        critic_step.step()
        z = normal(B, (2,), clock.generator("noise"))
        draw = clock.generator("direction")
        sigma = LEVELS.sample(EDM(), B, draw)
        x = student(z)
        y = (x + sigma[:, None].float() * normal(B, (2,), draw)).detach()
        bracket = (critic(y, sigma) - teacher(y, sigma)).detach()
        generator_step.zero_grad()
        (bracket * x).sum(1).mean().backward()
        generator_step.step()
    assert same(state(method.student), state(student))
    assert same(state(method.critic), state(critic))
    assert list(method.phases()) == [Phase(BACKTRACK, data_free=True)]
    assert method.facts()["targets"] == 1


def test_the_gradient_is_the_detached_bracket_and_reaches_nobody_else() -> None:
    method = bound(Points(), stage1_steps=0)
    nn.init.normal_(method.critic.network.head.weight)
    clock = Clock(seed=3)
    update = method.generator_update(method.guided, B, clock)
    update.loss.backward()
    draw = clock.generator("direction")
    t = LEVELS.sample(EDM(), B, draw)
    x = method.student.x.detach()
    x_t = x + t[:, None].float() * normal(B, (2,), draw)
    with torch.no_grad():
        bracket = method.critic(x_t, t) - method.teacher(x_t, t)
    torch.testing.assert_close(method.student.x.grad, bracket / B)
    assert bracket.abs().max() > 0.1
    assert all(p.grad is None for module in (method.critic, method.teacher) for p in module.parameters())


def test_normalised_weight_divides_by_the_distance_to_the_denoised_and_averages_over_entries() -> None:
    method = bound(Points(), stage1_steps=0, weight="normalised")
    nn.init.normal_(method.critic.network.head.weight)
    method.generator_update(method.guided, B, Clock(seed=3)).loss.backward()
    draw = Clock(seed=3).generator("direction")
    t = LEVELS.sample(EDM(), B, draw)
    x = method.student.x.detach()
    x_t = x + t[:, None].float() * normal(B, (2,), draw)
    with torch.no_grad():
        real = method.teacher(x_t, t)
        expected = (method.critic(x_t, t) - real) / ((x - real).abs().mean(1, keepdim=True) + 1e-6) / (2 * B)
    torch.testing.assert_close(method.student.x.grad, expected)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_equal_scores_give_no_gradient_dropout_or_not(dropout) -> None:
    method = bound(Points(), denoiser(dropout=dropout), stage1_steps=0)
    method.teacher.eval()  # as the engine has it
    method.critic.train()
    method.generator_update(method.guided, B, Clock()).loss.backward()
    assert not method.student.x.grad.any()
    assert method.critic.training


# ---- Gaussians, where everything is known ---------------------------------------------------------------------------------


SPREAD = 0.8


class Mean(nn.Module):
    """F of the exact denoiser of N(μ, s²) with σ_data = s: level/√(level² + s²) · b, b = μ/s."""

    shape, num_classes = (2,), 0

    def __init__(self, mean: tuple[float, float]) -> None:
        super().__init__()
        self.b = nn.Parameter(torch.tensor(mean) / SPREAD)

    def forward(self, x: Tensor, time: Tensor, cond: Tensor | None = None) -> Tensor:
        level = (4 * time).exp()
        return (level / (level**2 + SPREAD**2).sqrt())[:, None] * self.b


class Shifted(nn.Module):
    """μ + s z."""

    shape, num_classes = (2,), 0

    def __init__(self, mean: tuple[float, float]) -> None:
        super().__init__()
        self.mean = nn.Parameter(torch.tensor(mean))

    def forward(self, noise: Tensor) -> Tensor:
        return self.mean + SPREAD * noise


def gaussian(mean: tuple[float, float], schedule: EDM | None = None) -> NetworkDenoiser:
    return NetworkDenoiser(Mean(mean), schedule or EDM(), precondition="edm", sigma_data=SPREAD)


def test_the_optimum_of_stage_1_is_the_denoiser_of_the_initial_student() -> None:
    method = bound(Shifted((2.0, -1.0)), gaussian((0.0, 0.0)), stage1_steps=300, targets="teacher", critic_optimiser={"name": "adam", "lr": 0.05})
    train(method, 1, batch_size=64)
    assert float((method.critic.network.b.detach() * SPREAD - torch.tensor([2.0, -1.0])).norm()) < 0.3
    x, t = torch.randn(4, 2), torch.full((4,), 0.7, dtype=torch.float64)
    exact = (SPREAD**2 * x + 0.7**2 * torch.tensor([2.0, -1.0])) / (SPREAD**2 + 0.7**2)
    torch.testing.assert_close(gaussian((2.0, -1.0))(x, t), exact)


def test_a_step_moves_the_mean_towards_the_node_and_not_towards_the_teacher() -> None:
    sigma, teacher_mean, node_mean, mean = 0.7, (0.0, 0.0), (3.0, -2.0), (2.0, 2.0)
    schedule = EDM(t_min=sigma, t_max=2 * sigma)
    one_level = LevelSpec(kind="index", levels=2, high=0.1)
    method = bound(Shifted(mean), gaussian(teacher_mean, schedule), stage1_steps=2, record_every=1, iterations_per_node=1, levels=one_level)
    method.path.record(gaussian(node_mean))
    method.path.record(gaussian(mean))
    method.critic.load_state_dict(gaussian(mean).state_dict())
    target = method.target_at(0)
    (gradient,) = torch.autograd.grad(method.generator_update(target, B, Clock()).loss, method.student.mean)
    expected = sigma**2 * (torch.tensor(mean) - torch.tensor(node_mean)) / (SPREAD**2 + sigma**2)  # w (μ − μ_i)/(s² + σ²), w = σ²
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-5)
    target = method.target_at(1)
    (gradient,) = torch.autograd.grad(method.generator_update(target, B, Clock()).loss, method.student.mean)
    torch.testing.assert_close(gradient, sigma**2 * torch.tensor(mean) / (SPREAD**2 + sigma**2), rtol=1e-4, atol=1e-5)


# ---- the path ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("stage1", "every", "nodes"), [(6, 2, 3), (7, 3, 3), (3, 1, 3)])
def test_the_path_is_recorded_and_gone_back_as_the_sheet_says(stage1, every, nodes) -> None:
    method = bound(kind=Noting, stage1_steps=stage1, record_every=every, iterations_per_node=2)
    teacher, student = state(method.teacher), state(method.student)
    train(method, 2 * nodes + 1)
    path, recorded = method.path.states, [k for k in range(1, stage1 + 1) if k % every == 0 or k == stage1]
    assert len(path) == nodes + 1
    assert same(path[0], teacher)
    assert all(same(path[i], method.critics[k - 1]) for i, k in enumerate(recorded, 1))  # the critic, each time as it was
    assert same(method.phase_ends[DEGRADE], student)  # stage 1 leaves the student alone
    assert not same(method.phase_ends[BACKTRACK], student)
    assert same(method.begun_with, path[-1])  # φ starts at the degraded end
    degrade, backtrack = method.phases()
    assert degrade == Phase(DEGRADE, steps=stage1, trains=("critic",), data_free=True)
    assert backtrack == Phase(BACKTRACK, data_free=True)
    order = [nodes - 1 - k // 2 for k in range(2 * (nodes - 1))] + [0] * 3
    assert all(same(target, path[node]) for target, node in zip(method.targets, order, strict=True))
    assert same(method.targets[-1], teacher)
    assert same(state(method.teacher), teacher)
    changed = [k for k in range(1, len(order)) if not same(method.targets[k], method.targets[k - 1])]
    assert changed == method.facts()["switches"] == [2 * k for k in range(1, nodes)]
    assert all(not torch.equal(method.targets[k][name], method.targets[k - 1][name]) for k in changed for name in ("network.head.weight",))


def test_the_control_warms_the_critic_and_keeps_the_teacher() -> None:
    path = train(bound(kind=Noting, stage1_steps=4, record_every=2, iterations_per_node=2), 4)
    warm = train(bound(kind=Noting, stage1_steps=4, targets="teacher"), 4)
    assert same(warm.begun_with, path.begun_with)
    assert all(same(target, state(warm.teacher)) for target in warm.targets)
    assert (warm.facts()["switches"], warm.facts()["targets"]) == ([], 1)
    assert len(warm.path) == 0


def test_ratio_and_settling_order_the_updates() -> None:
    method = train(bound(kind=Noting, stage1_steps=2, record_every=1, iterations_per_node=2, ratio=2, settle_steps=3), 3)
    assert method.order == ["critic"] * 2 + [*["critic"] * 2, "generator"] * 2 + [*["critic"] * 5, "generator"]


def test_a_critic_update_reaches_no_student() -> None:
    method = bound(stage1_steps=0)
    method.critic_update(B, Clock(), 0).loss.backward()
    assert all(parameter.grad is None for parameter in method.student.parameters())
    assert all(parameter.grad is not None for parameter in method.critic.parameters())


def test_the_critic_of_each_update_draws_its_own_samples() -> None:
    method = bound(stage1_steps=0)
    assert not torch.equal(method.critic_update(B, Clock(), 0).loss, method.critic_update(B, Clock(), 1).loss)


def test_passes_are_counted_by_network_with_stage_1() -> None:
    method = train(bound(stage1_steps=4, record_every=2, iterations_per_node=2, ratio=2), 5)
    found = method.facts()
    assert found["passes"] == {"teacher_forward": 5, "critic_forward": 4 + 15, "critic_backward": 4 + 10, "student_forward": 4 + 15, "student_backward": 5}
    assert found["metrics"]["passes"] == 5 + 19 + 14 + 19 + 5


def test_mismatch_is_small_for_the_first_target_and_one_for_the_teacher() -> None:
    method = train(bound(stage1_steps=60, record_every=20, iterations_per_node=2), 6)
    mismatch = method.facts()["mismatch"]
    assert list(mismatch) == ["2", "1", "0"]
    assert mismatch["0"] == 1
    assert mismatch["2"] < 0.5
    assert method.facts()["metrics"]["mismatch_2"] == mismatch["2"]


def test_training_that_ends_before_the_teachers_turn_is_refused() -> None:
    with pytest.raises(InputError, match="teacher's turn"):
        train(bound(stage1_steps=3, record_every=1, iterations_per_node=2), 4)
    train(bound(stage1_steps=3, record_every=1, iterations_per_node=2), 5)


# ---- students and conditions ----------------------------------------------------------------------------------------------


def test_a_student_from_the_teacher_starts_at_its_level() -> None:
    method = bound(denoiser(9), start="teacher", start_level=1.5, stage1_steps=2, record_every=1, iterations_per_node=1)
    assert isinstance(method.generator, Generator)
    assert method.generator.times == (1.5,)
    z = torch.randn(3, 2)
    torch.testing.assert_close(method.generator(z), method.teacher(1.5 * z, torch.full((3,), 1.5, dtype=torch.float64)))
    train(method, 2)
    assert method.artefact().around is not None
    assert bound(denoiser(9), start="teacher").generator.times == (80.0,)


def test_guidance_goes_to_the_target_of_the_moment() -> None:
    method = bound(denoiser(9, 3), denoiser(0, 3), start="teacher", guidance_scale=2.0, stage1_steps=2, record_every=1, iterations_per_node=1)
    train(method, 2)
    method.target_at(0)
    node, x_t, t, cond = denoiser(0, 3), torch.randn(4, 2), torch.full((4,), 0.5, dtype=torch.float64), torch.tensor([0, 1, 2, 0])
    method.path.load(1, node)
    conditional, free = node(x_t, t, cond), node(x_t, t, torch.full((4,), 3))
    torch.testing.assert_close(method.target_at(0)(x_t, t, cond), free + 2 * (conditional - free))
    assert method.facts()["passes"]["teacher_forward"] == 4


@pytest.mark.parametrize(
    ("knobs", "field"),
    [
        ({"steps": 2}, "steps"),
        ({"ratio": 0}, "ratio"),
        ({"record_every": 0}, "record_every"),
        ({"targets": "nodes"}, "targets"),
        ({"start_level": 0}, "start_level"),
    ],
)
def test_knobs_out_of_range_are_refused(knobs, field) -> None:
    with pytest.raises(InputError) as caught:
        DisBack(**knobs)
    assert caught.value.where == field


def test_a_level_for_a_student_that_has_none_and_a_teacher_that_is_no_network_are_refused() -> None:
    with pytest.raises(InputError, match="level to start from"):
        bound(start_level=1.0)
    with pytest.raises(InputError, match="cannot start from the teacher"):
        bound(start="teacher")
    with pytest.raises(InputError, match="no denoiser"):
        bound(teacher=nn.Linear(2, 2))


# ---- the engine ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stop", [(DEGRADE, 3), (BACKTRACK, 1), (BACKTRACK, 2), (BACKTRACK, 5)])
def test_a_stopped_run_goes_on_bit_for_bit_across_a_switch(stop, tmp_path) -> None:
    knobs = {"kind": Noting, "stage1_steps": 4, "record_every": 2, "iterations_per_node": 2}
    changes = {"checkpoint_steps": 1, "ema": 0.5}
    whole = train(bound(**knobs), 6, **changes)
    stopped = bound(**knobs)
    stopped.stop_at = stop
    with pytest.raises(RuntimeError, match="stopped"):
        Trainer(stopped, stopped.train_data, config(6, **changes), seed=3, folder=tmp_path).fit()
    again = bound(**knobs)
    Trainer(again, again.train_data, config(6, **changes), seed=3, folder=tmp_path).fit()
    assert same(state(again.student), state(whole.student))
    assert same(state(again.critic), state(whole.critic))
    assert all(same(a, b) for a, b in zip(again.path.states, whole.path.states, strict=True))
    assert all(same(a, b) for a, b in zip(reversed(again.targets), reversed(whole.targets), strict=False))
    assert again.facts() == whole.facts()


def test_nothing_is_read_on_the_host_in_a_step_with_a_switch(monkeypatch) -> None:
    method = bound(stage1_steps=2, record_every=1, iterations_per_node=1)
    method.path.record(denoiser(1))
    method.path.record(denoiser(2))

    def refuse(*_):
        raise AssertionError("read on the host")

    for name in ("item", "tolist", "__bool__", "__float__", "__int__"):
        monkeypatch.setattr(Tensor, name, refuse)
    found = [update.loss for update in method.updates(batch(), Clock(phase=BACKTRACK, step=1, steps=2))]
    monkeypatch.undo()
    assert all(bool(loss.isfinite()) for loss in found)


def test_a_tiny_run_moves_the_blob_to_the_data() -> None:
    teacher = mlp_denoiser((2,), 0, widths=(16, 16), sigma_data=2.0)  # untrained: D = c_skip x, exact for N(0, 2²)
    method = train(bound(teacher=teacher, stage1_steps=20, record_every=5, iterations_per_node=20), 160, batch_size=32)
    assert isinstance(method.generator, DirectGenerator)
    samples, start = method.generator.sample(200), small()(torch.randn(200, 2)).detach()
    assert samples.isfinite().all()
    assert samples.mean(0).norm() < 0.5 * start.mean(0).norm()
