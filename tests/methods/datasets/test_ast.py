"""AST: every invariant of its sheet and what is easily missed; with all its parts off it is MTT to the bit."""

import json
import math
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from limbeck.contract import Batch, Clock, Data, OptimiserSpec, Phase
from limbeck.data.arrays import ArrayData
from limbeck.errors import InputError
from limbeck.methods.datasets.ast import AST, inner_loss_scale, landings, perturbed
from limbeck.methods.datasets.ftd import FTD
from limbeck.synthetic.flat import FlatNetwork
from limbeck.synthetic.hypergradient import trajectory_gradient
from limbeck.train.config import TrainConfig
from limbeck.train.trainer import Trainer

MTT = {"perturbation": 0.0, "balance": False, "momentum": 0.0, "intermediate": "none", "start": "real"}
"""AST's parts, all off."""
CLASSES = 3


def network(seed: int = 0) -> nn.Module:
    """Two convolutions, a group norm and a linear layer on 1 × 6 × 6 images."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.GroupNorm(4, 4), nn.Softplus(), nn.AvgPool2d(2), nn.Conv2d(4, 4, 3, padding=1), nn.Softplus(), nn.Flatten(),
        nn.Linear(36, CLASSES),
    )  # fmt: skip


def images(count: int = 60, seed: int = 5) -> ArrayData:
    """Three classes: a bright row each, and noise."""
    draw = torch.Generator().manual_seed(seed)
    y = torch.arange(count) % CLASSES
    x = 0.4 * torch.randn(count, 1, 6, 6, generator=draw)
    x[torch.arange(count), 0, 2 * y] += 1.0
    return ArrayData(x, y)


class Experts:
    """Trajectories in memory: plain SGD on all images at once, from another start each."""

    def __init__(self, count: int = 2, epochs: int = 6, lr: float = 0.3, data: ArrayData | None = None) -> None:
        self.epochs, self.flat = epochs, FlatNetwork(network())
        self.size = self.flat.size
        data = images() if data is None else data
        self.rows: list[list[Tensor]] = []
        for expert in range(count):
            theta = self.flat.vector(network(expert + 1)).requires_grad_()
            rows = [theta.detach()]
            for _ in range(epochs):
                (slope,) = torch.autograd.grad(F.cross_entropy(self.flat(theta, data.inputs), data.targets), theta)
                theta = (theta.detach() - lr * slope).requires_grad_()
                rows.append(theta.detach())
            self.rows.append(rows)

    @property
    def count(self) -> int:
        return len(self.rows)

    def weights(self, expert: int, epoch: int) -> Tensor:
        return self.rows[expert][epoch].clone()


class Bench:
    """What the engine lends: here batches of 16."""

    device = torch.device("cpu")
    asked = 0

    def outputs(self, forward: Callable[[Tensor], Tensor], data: Data, indices: Tensor | None = None) -> Tensor:
        self.asked += 1
        return torch.cat([forward(data.prepare(data.fetch(part)[0])) for part in torch.arange(len(data)).split(16)])

    def average(self, player: str) -> nn.Module:
        raise NotImplementedError


EXPERTS, BENCH = Experts(), Bench()


def bound(kind: type[AST] | type[FTD] = AST, experts: Experts = EXPERTS, data: ArrayData | None = None, seed: int = 0, **knobs):
    """A method on the toy; three segments of at most three epochs, six inner steps."""
    knobs = {"images_per_class": 2, "steps": 6, "expert_epochs": 3, "latest_start": 3, "step_size": 0.1, "augment": None, **knobs}
    method = kind(**knobs).bind(student=network(9), teacher=experts, train=images() if data is None else data, num_classes=CLASSES, seed=seed)
    method.enter(Phase("match"), Clock(seed=seed), BENCH)
    return method


def at(step: int, seed: int = 0) -> Clock:
    return Clock(seed=seed, step=step, steps=10)


def fit(method: AST | FTD, outer: int) -> list[Tensor]:
    """Outer steps by hand: each one's loss, then the images and the step size that come out."""
    players = method.players()
    rates = {"images": 5.0, "step_size": 1e-3}
    optimisers = {name: torch.optim.SGD(player.module.parameters(), lr=rates[name], momentum=0.5) for name, player in players.items()}
    losses = []
    for step in range(outer):
        for update in method.updates(Batch(torch.empty(1, 0)), at(step)):
            parameters = list(players[update.player].module.parameters())
            for parameter, gradient in zip(parameters, torch.autograd.grad(update.loss, parameters), strict=True):
                parameter.grad = gradient
            optimisers[update.player].step()
            with torch.no_grad():
                method.after_step(update.player, at(step))
            if update.player == "images":
                losses.append(update.loss.detach())
    return [*losses, method.synthetic.images.detach(), method.synthetic.step_size.detach()]


# ---- MTT is a special case ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("augmented", [False, True])
def test_with_all_its_parts_off_it_is_mtt_to_the_bit(augmented) -> None:
    knobs = {} if not augmented else {"augment": {}}
    plain, off = fit(bound(FTD, image_ema=0.0, **knobs), 4), fit(bound(AST, **MTT, **knobs), 4)
    assert all(torch.equal(a, b) for a, b in zip(plain, off, strict=True))


@pytest.mark.parametrize("part", [{"perturbation": 1.0}, {"balance": True}, {"momentum": 0.9}, {"intermediate": "aggregate"}, {"start": "representative"}])
def test_each_part_alone_changes_the_loss(part) -> None:
    assert not torch.equal(fit(bound(AST, **MTT), 1)[0], fit(bound(AST, **MTT | part), 1)[0])


def test_one_epoch_has_no_intermediate_terms() -> None:
    one = {"expert_epochs": 1, **MTT}
    a, b = fit(bound(AST, **one), 3), fit(bound(AST, **one | {"intermediate": "aggregate"}), 3)
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_the_released_settings_are_the_defaults() -> None:
    config = AST().config
    assert (config.momentum, config.perturbation, config.balance, config.intermediate, config.start) == (0.9, 1.0, True, "aggregate", "representative")


# ---- the whole, by hand ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["adjoint", "unroll"])
def test_equations_5_to_10_by_hand(mode) -> None:
    method, clock = bound(AST, start="real", intermediate="adaptive", gradient=mode, steps=7), at(1)
    expert, epoch = method.segment(clock)
    found = method.matched(clock)

    draws, start = clock.generator("perturbation"), []
    for weight in method.flat.split(EXPERTS.weights(expert, epoch)).values():
        if weight.dim() == 4:
            d = torch.randn(weight.shape, generator=draws)
            weight = weight + d / d.pow(2).sum().sqrt() * weight
        start.append(weight.reshape(-1))
    theta = origin = torch.cat(start).double().requires_grad_()
    flat = FlatNetwork(network(9).double())
    x, eta = method.synthetic.images.detach().double().requires_grad_(), method.synthetic.step_size.detach().double().requires_grad_()
    b = math.log(epoch - 1 + 8, 5) if epoch >= 1 else 1 / math.log(1 - epoch + 8, 5)
    path, velocity = [theta], torch.zeros_like(theta)
    for _ in range(7):
        slope = torch.autograd.grad(b * F.cross_entropy(flat(path[-1], x), method.synthetic.targets), path[-1], create_graph=True)[0]
        velocity = 0.9 * velocity + slope
        path.append(path[-1] - eta * velocity)
    total = torch.zeros((), dtype=torch.float64)
    for step, j, w in ((2, 1, 1 / 3), (4, 2, 2 / 3), (7, 3, 1.0)):
        goal = EXPERTS.weights(expert, epoch + j).double()
        total = total + w * (path[step] - goal).square().sum() / (origin - goal).square().sum().detach()
    for_images, for_eta = torch.autograd.grad(total, [x, eta])
    torch.testing.assert_close(found.loss.double(), total.detach(), rtol=1e-5, atol=0)
    torch.testing.assert_close(found.variables[0].double(), for_images, rtol=1e-3, atol=1e-5 * float(for_images.abs().max()))
    torch.testing.assert_close(found.step_size.double(), for_eta, rtol=1e-4, atol=0)


@pytest.mark.parametrize("augment", [None, {}])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_an_expert_that_the_inner_rule_made_leaves_no_loss(augment, momentum) -> None:
    knobs = {"start": "real", "perturbation": 0.0, "balance": False, "momentum": momentum, "augment": augment, "latest_start": 1, "inner_batch": 3}
    experts = Experts(count=1, epochs=3)
    method, clock = bound(AST, experts=experts, **knobs), at(0)
    theta, velocity = experts.weights(0, 0), torch.zeros(experts.size)
    loss, eta = method.step_loss(clock), method.synthetic.step_size.detach()
    for t in range(6):
        theta = theta.detach().requires_grad_()
        (slope,) = torch.autograd.grad(loss(theta, [method.synthetic.images.detach()], t), theta)
        velocity = momentum * velocity + slope
        theta = theta.detach() - eta * velocity
        if t % 2:
            experts.rows[0][(t + 1) // 2] = theta.clone()
    found = method.matched(clock)
    assert len(found.losses_J) == 3
    assert float(found.losses_J.max()) < 1e-9
    assert float(bound(AST, experts=Experts(count=1, epochs=3), **knobs).matched(clock).losses_J.min()) > 0.01


# ---- the perturbed start (5) ----------------------------------------------------------------------------------------


@given(st.integers(0, 2**31), st.floats(0, 5))
def test_no_convolution_moves_farther_than_a_times_its_largest_weight(seed, scale) -> None:
    flat = FlatNetwork(network())
    theta = flat.vector(network(3))
    before, moved = flat.split(theta.clone()), flat.split(perturbed(theta, flat, scale, torch.Generator().manual_seed(seed)))
    assert torch.equal(theta, flat.vector(network(3)))
    for name, weight in moved.items():
        if weight.dim() == 4:
            assert float((weight - before[name]).norm()) <= scale * float(before[name].abs().max()) * (1 + 1e-5)
        else:
            assert torch.equal(weight, before[name])


def test_ones_move_by_exactly_a() -> None:
    flat = FlatNetwork(network())
    ones = torch.ones(flat.size)
    moved = flat.split(perturbed(ones, flat, 0.7, torch.Generator().manual_seed(0)))
    for weight in moved.values():
        assert float((weight - 1).norm()) == pytest.approx(0.7 if weight.dim() == 4 else 0.0, abs=1e-6)


def test_the_start_is_a_function_of_the_step_and_the_denominators_are_measured_from_it() -> None:
    method, clock = bound(AST, start="real", balance=False), at(2)
    expert, epoch = method.segment(clock)
    start = method.start_weights(expert, epoch, clock)
    assert torch.equal(start, method.start_weights(expert, epoch, at(2)))
    assert not torch.equal(start, method.start_weights(expert, epoch, at(3)))
    clean, goals = EXPERTS.weights(expert, epoch), method.targets(expert, epoch, clock)
    found = method.matched(clock)
    from_start = (found.end_P - goals[-1].weights_P).square().sum() / (start - goals[-1].weights_P).square().sum()
    from_clean = (found.end_P - goals[-1].weights_P).square().sum() / (clean - goals[-1].weights_P).square().sum()
    torch.testing.assert_close(found.losses_J[-1], from_start)
    assert abs(float(from_start - from_clean)) > 1e-3 * float(from_start)


# ---- the balanced loss (6) and momentum (7) -------------------------------------------------------------------------


def test_values_of_b() -> None:
    assert [round(inner_loss_scale(s, 20), 3) for s in (0, 9, 10, 19)] == [0.557, 0.732, 1.292, 1.76]
    assert inner_loss_scale(10, 20) == pytest.approx(math.log(8, 5))
    assert inner_loss_scale(9, 20) == pytest.approx(1 / math.log(9, 5))


@given(st.integers(1, 100))
def test_b_rises_with_the_start(latest) -> None:
    values = [inner_loss_scale(s, latest) for s in range(latest)]
    assert all(a < b for a, b in pairwise(values))
    assert values[latest // 2 :][0] == pytest.approx(math.log(8, 5))


def test_b_acts_as_a_step_size_of_its_own() -> None:
    """θ_t of the loss b · CE at η are those of CE at b η, with momentum too."""
    method, clock = bound(AST, start="real", perturbation=0.0, intermediate="none"), at(0)
    expert, epoch = method.segment(clock)
    b = inner_loss_scale(epoch, 3)
    assert b != 1
    plain = trajectory_gradient(
        method.step_loss(clock), [method.synthetic.images], b * method.synthetic.step_size, EXPERTS.weights(expert, epoch),
        method.targets(expert, epoch, clock), 6, momentum=0.9,
    )  # fmt: skip
    torch.testing.assert_close(method.matched(clock).end_P, plain.end_P)


def test_momentum_does_nothing_in_one_step_and_something_in_two() -> None:
    knobs = {"start": "real", "expert_epochs": 1}
    for steps, same in ((1, True), (2, False)):
        heavy, light = (fit(bound(AST, steps=steps, momentum=m, **knobs), 2) for m in (0.9, 0.0))
        assert torch.equal(heavy[0], light[0]) is same
        assert torch.allclose(heavy[-2], light[-2], atol=1e-6) is same


# ---- intermediate terms (8 to 10) -----------------------------------------------------------------------------------


@given(st.integers(1, 60), st.integers(1, 8), st.sampled_from(["aggregate", "adaptive"]))
def test_there_is_a_term_for_every_epoch(steps, epochs, weights) -> None:
    if steps < epochs:
        return
    terms = landings(steps, epochs, weights)
    assert [j for _, j, _ in terms] == list(range(1, epochs + 1))
    assert [t for t, _, _ in terms] == [j * (steps // epochs) for j in range(1, epochs)] + [steps]
    assert [w for _, _, w in terms] == [1.0 if weights == "aggregate" or j == epochs else j / epochs for j in range(1, epochs + 1)]


def test_steps_that_the_epochs_do_not_divide() -> None:
    assert landings(7, 3, "aggregate") == [(2, 1, 1.0), (4, 2, 1.0), (7, 3, 1.0)]
    assert landings(30, 2, "adaptive") == [(15, 1, 0.5), (30, 2, 1.0)]
    assert landings(2, 5, "none") == [(2, 5, 1.0)]


@pytest.mark.parametrize("weights", ["aggregate", "adaptive"])
def test_the_total_is_the_last_term_and_the_weighted_others(weights) -> None:
    method = bound(AST, start="real", intermediate=weights)
    found = method.matched(at(0))
    w = torch.tensor([1.0, 1.0, 1.0] if weights == "aggregate" else [1 / 3, 2 / 3, 1.0])
    torch.testing.assert_close(found.loss, (w * found.losses_J).sum())
    assert found.loss >= found.losses_J[-1]
    torch.testing.assert_close(found.losses_J[-1:], bound(AST, start="real", intermediate="none").matched(at(0)).losses_J)


def test_fewer_steps_than_epochs_are_refused() -> None:
    with pytest.raises(InputError, match="one by one"):
        AST(steps=2, expert_epochs=3)
    assert AST(steps=2, expert_epochs=3, intermediate="none").config.steps == 2


# ---- the representative start (11) ----------------------------------------------------------------------------------


@pytest.mark.parametrize("per_class", [1, 4, 20])
def test_the_start_is_real_images_of_their_class_none_twice(per_class) -> None:
    method = bound(AST, images_per_class=per_class)
    chosen = method.representative(BENCH)
    assert len(set(chosen.tolist())) == per_class * CLASSES
    assert images().targets[chosen].tolist() == sorted([*range(CLASSES)] * per_class)
    assert torch.equal(method.synthetic.images.detach(), images().inputs[chosen])
    assert method.synthetic.targets.tolist() == sorted([*range(CLASSES)] * per_class)
    assert method.synthetic.images.requires_grad


def test_images_that_stand_twice_in_the_data_are_chosen_by_place() -> None:
    data = images(12)
    doubled = ArrayData(torch.cat([data.inputs] * 3), torch.cat([data.targets] * 3))
    assert len(set(bound(AST, data=doubled, images_per_class=6).representative(BENCH).tolist())) == 18


def test_one_image_a_class_is_the_nearest_to_the_mean_of_its_logits() -> None:
    method = bound(AST, images_per_class=1)
    logits, labels = EXPERTS.flat(EXPERTS.weights(0, 6), images().inputs).detach(), images().targets  # the first expert, its last epoch, in batches
    torch.testing.assert_close(method.expert_logits(BENCH), logits)
    for c, place in enumerate(method.representative(BENCH).tolist()):
        away = (logits - logits[labels == c].mean(0)).norm(dim=1)
        assert float(away[place]) == pytest.approx(float(away[labels == c].min()))


def test_no_expert_is_asked_before_training_begins() -> None:
    """`Method.bind` is called to check a recipe when experts are not trained yet."""

    class Planned:
        count, epochs, size = 2, 6, EXPERTS.size

        def weights(self, expert: int, epoch: int) -> Tensor:
            raise RuntimeError

    method = AST(images_per_class=2, latest_start=3).bind(student=network(9), teacher=Planned(), train=images(), num_classes=CLASSES)
    assert torch.equal(method.synthetic.images, bound(FTD).synthetic.images)


def test_an_expert_that_diverged_is_named() -> None:
    broken = Experts(count=1)
    broken.rows[0][-1] *= torch.inf
    with pytest.raises(InputError, match="not finite") as caught:
        bound(AST, experts=broken)
    assert caught.value.where == "teacher.experts"


def test_a_class_with_too_few_images_is_named() -> None:
    with pytest.raises(InputError, match="class") as caught:
        bound(AST, images_per_class=21)
    assert caught.value.where == "method.images_per_class"


def test_other_starts() -> None:
    asked = BENCH.asked
    real = bound(AST, start="real").synthetic.images
    assert torch.equal(real, bound(FTD).synthetic.images)
    assert float(bound(AST, start="noise", images_per_class=20).synthetic.images.detach().std()) == pytest.approx(1, abs=0.1)
    assert BENCH.asked == asked
    assert not torch.equal(real, bound(AST).synthetic.images)


# ---- it learns ------------------------------------------------------------------------------------------------------


def test_in_the_engine_it_comes_nearer_to_the_experts_and_a_restart_changes_nothing(tmp_path) -> None:
    def trained(folder: Path, resume_from: str | None = None) -> AST:
        method = bound(AST, seed=3, step_size_optimiser=OptimiserSpec(name="sgd", lr=1e-3, momentum=0.5), augment={})
        optimiser = OptimiserSpec(name="sgd", lr=2.0, momentum=0.5)
        config = TrainConfig(steps=30, batch_size=1, log_every=1, checkpoint_steps=10, keep=5, optimiser=optimiser)
        Trainer(method, images(), config, seed=3, folder=folder, cpu=True, resume_from=resume_from).fit()
        return method

    once = trained(tmp_path).synthetic
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    losses = [row["images/matching"] for row in rows if "images/matching" in row]
    assert sum(losses[-8:]) < 0.9 * sum(losses[:8])
    again = trained(tmp_path, "step-10").synthetic
    assert torch.equal(once.images, again.images)
    assert torch.equal(once.step_size, again.step_size)
