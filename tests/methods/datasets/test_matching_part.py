"""Trajectory matching (MTT): the sheet's invariants, what is a function of the step, what is refused, and that it learns."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from limbeck.contract import Batch, Clock, OptimiserSpec, Paper
from limbeck.data.arrays import ArrayData
from limbeck.errors import InputError
from limbeck.methods.datasets.matching_part import SMALLEST_STEP, TrajectoryMatching
from limbeck.synthetic.augment import DSASpec
from limbeck.synthetic.flat import FlatNetwork
from limbeck.synthetic.hypergradient import Target
from limbeck.train.config import TrainConfig
from limbeck.train.trainer import Trainer

CLASSES = 3


class MTT(TrajectoryMatching):
    """The base alone."""

    paper = Paper("Dataset Distillation by Matching Training Trajectories", "2203.11932", "CVPR", 2022)


def network(seed: int = 0, side: int = 6) -> nn.Module:
    """A convolution, a group norm and a linear layer on 1 × side × side images."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.GroupNorm(4, 4), nn.Softplus(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(side * side, CLASSES))


def real(count: int = 60, seed: int = 5) -> ArrayData:
    """Three classes: a bright row each, and noise."""
    draw = torch.Generator().manual_seed(seed)
    y = torch.arange(count) % CLASSES
    x = 0.4 * torch.randn(count, 1, 6, 6, generator=draw)
    x[torch.arange(count), 0, 2 * y] += 1.0
    return ArrayData(x, y)


class Experts:
    """Trajectories in memory: gradient descent on all images at once, each expert from its own start."""

    def __init__(self, count: int = 3, epochs: int = 5, lr: float = 0.5) -> None:
        self.count, self.epochs, self.flat, data = count, epochs, FlatNetwork(network()), real()
        self.size = self.flat.size
        self.rows: list[list[Tensor]] = []
        for expert in range(count):
            theta = self.flat.vector(network(expert + 1)).requires_grad_()
            rows = [theta.detach()]
            for _ in range(epochs):
                (slope,) = torch.autograd.grad(F.cross_entropy(self.flat(theta, data.inputs), data.targets), theta)
                theta = (theta.detach() - lr * slope).requires_grad_()
                rows.append(theta.detach())
            self.rows.append(rows)

    def weights(self, expert: int, epoch: int) -> Tensor:
        return self.rows[expert][epoch].clone()


EXPERTS = Experts()


def bound(experts: object = EXPERTS, student: nn.Module | None = None, data: ArrayData | None = None, seed: int = 0, **knobs) -> MTT:
    knobs = {"images_per_class": 2, "steps": 5, "expert_epochs": 2, "latest_start": 3, "step_size": 0.1, "augment": None, **knobs}
    return MTT(**knobs).bind(student=student or network(9), teacher=experts, train=data or real(), num_classes=CLASSES, seed=seed)


def double(**knobs) -> MTT:
    """A method whose images, step size and weights are float64."""
    method = bound(student=network(9).double(), **knobs)
    method.synthetic.double()
    start, targets = method.start_weights, method.targets
    method.start_weights = lambda *args: start(*args).double()  # type: ignore[method-assign]
    method.targets = lambda *args: [Target(t.step, t.weights_P.double(), t.weight) for t in targets(*args)]  # type: ignore[method-assign]
    return method


def at(step: int, seed: int = 0) -> Clock:
    return Clock(seed=seed, step=step, steps=10)


def trained(method: TrajectoryMatching, steps: int, folder=None, *, rate: float = 5.0, checkpoint: int | None = None):
    optimiser = OptimiserSpec(name="sgd", lr=rate, momentum=0.5)
    config = TrainConfig(steps=steps, optimiser=optimiser, batch_size=1, log_every=5, checkpoint_steps=checkpoint, keep=100)
    return Trainer(method, method.data, config, folder=folder, cpu=True).fit()


# ---- the mathematics ------------------------------------------------------------------------------------------------


def test_one_step_is_the_closed_form() -> None:
    method = double(steps=1)
    found, (expert, epoch) = method.matched(at(0)), method.segment(at(0))
    images, labels, eta = method.synthetic.images.detach().requires_grad_(), method.synthetic.targets, method.synthetic.step_size.detach()
    start, target = EXPERTS.weights(expert, epoch).double().requires_grad_(), EXPERTS.weights(expert, epoch + 2).double()
    (g,) = torch.autograd.grad(F.cross_entropy(method.flat(start, images), labels), start, create_graph=True)
    end, distance = (start - eta * g).detach(), (start - target).square().sum().detach()
    (slope,) = torch.autograd.grad(((end - target) * g).sum(), images)
    torch.testing.assert_close(found.variables[0], -2 * eta / distance * slope, rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(found.loss, (end - target).square().sum() / distance)
    torch.testing.assert_close(found.step_size, (-2 / distance * ((end - target) * g).sum()).detach())


def test_the_loss_is_one_without_steps_and_nothing_on_target() -> None:
    method = double()
    method.synthetic.step_size.data.zero_()
    assert float(method.matched(at(0)).loss) == 1
    method.synthetic.step_size.data.fill_(0.1)
    end = method.matched(at(0)).end_P
    method.targets = lambda *args: [Target(5, end)]  # type: ignore[method-assign]
    assert float(method.matched(at(0)).loss) < 1e-30


def test_the_loss_is_the_mean_squared_distance_over_the_mean_squared_distance() -> None:
    method = bound()
    found, (expert, epoch) = method.matched(at(0)), method.segment(at(0))
    start, target = EXPERTS.weights(expert, epoch), EXPERTS.weights(expert, epoch + 2)
    torch.testing.assert_close(found.loss, (found.end_P - target).square().mean() / (start - target).square().mean())


@pytest.mark.parametrize("knobs", [{}, {"augment": {}}, {"augment": {}, "inner_batch": 4}, {"momentum": 0.7, "inner_batch": 5}])
def test_all_exact_modes_agree(knobs) -> None:
    found = {mode: double(gradient=mode, **knobs).matched(at(2)) for mode in ("adjoint", "unroll", "checkpoint")}
    for mode in ("unroll", "checkpoint"):
        torch.testing.assert_close(found[mode].variables[0], found["adjoint"].variables[0], rtol=1e-10, atol=1e-13)
        torch.testing.assert_close(found[mode].step_size, found["adjoint"].step_size, rtol=1e-10, atol=1e-13)
        torch.testing.assert_close(found[mode].loss, found["adjoint"].loss, rtol=1e-12, atol=1e-13)


def test_tesla_is_exact_for_one_step_only_and_its_release_is_half() -> None:
    exact, formula, released = (
        double(steps=1, gradient=g, tesla=t).matched(at(0)) for g, t in (("adjoint", "formula"), ("tesla", "formula"), ("tesla", "released"))
    )
    torch.testing.assert_close(formula.variables[0], exact.variables[0])
    torch.testing.assert_close(2 * released.variables[0], exact.variables[0])
    assert not torch.allclose(double(gradient="tesla").matched(at(0)).variables[0], double().matched(at(0)).variables[0], rtol=1e-3)


def test_the_scale_multiplies_the_inner_loss() -> None:
    method, one = bound(), EXPERTS.weights(0, 0)
    images = [method.synthetic.images.detach()]
    torch.testing.assert_close(method.step_loss(at(0), 3.0)(one, images, 1), 3 * method.step_loss(at(0))(one, images, 1))


# ---- one outer step -------------------------------------------------------------------------------------------------


def test_two_updates_come_from_one_gradient(monkeypatch) -> None:
    method, calls = bound(), []
    matched = method.matched
    monkeypatch.setattr(method, "matched", lambda clock: calls.append(clock) or matched(clock))
    updates = method.updates(Batch(torch.empty(1, 0)), at(0))
    images = next(updates)
    expected = matched(at(0))
    assert images.player == "images"
    assert float(images.metrics["matching"]) == float(expected.loss)
    assert torch.equal(torch.autograd.grad(images.loss, method.synthetic.images)[0], expected.variables[0])
    with torch.no_grad():
        method.synthetic.images += 1  # the images are stepped before the step size is
    size = next(updates)
    assert size.player == "step_size"
    assert torch.equal(torch.autograd.grad(size.loss, method.synthetic.step_size)[0], expected.step_size)
    assert len(calls) == 1
    assert next(updates, None) is None


def test_a_players_update_reaches_nothing_else() -> None:
    method = bound()
    for update in method.updates(Batch(torch.empty(1, 0)), at(0)):
        update.loss.backward()
        touched = {"images": method.synthetic.images.grad, "step_size": method.synthetic.step_size.grad}
        assert [name for name, gradient in touched.items() if gradient is not None] == [update.player]
        method.synthetic.images.grad = method.synthetic.step_size.grad = None
    assert all(p.grad is None for p in method.student.parameters())


def test_experts_are_visited_in_a_shuffled_order_each_once_a_lap() -> None:
    method = bound(Experts(count=7, epochs=4, lr=0.1))
    laps = [[method.segment(at(7 * lap + i))[0] for i in range(7)] for lap in range(4)]
    assert all(sorted(lap) == list(range(7)) for lap in laps)
    assert len({tuple(lap) for lap in laps}) == 4


def test_starts_are_uniform_below_the_latest() -> None:
    method = bound()
    counts = torch.bincount(torch.tensor([method.segment(at(step))[1] for step in range(600)]), minlength=3)
    assert len(counts) == 3
    assert bool(((counts - 200).abs() < 60).all())


def test_chunks_are_used_up_and_shuffled_again() -> None:
    method = bound(inner_batch=4, steps=7)  # six images: chunks of 4 and 2
    parts = method.batches(at(0))
    assert [len(p) for p in parts if p is not None] == [4, 2, 4, 2, 4, 2, 4]
    orders = [torch.cat([a, b]) for a, b in ((parts[0], parts[1]), (parts[2], parts[3]), (parts[4], parts[5]))]
    assert all(sorted(order.tolist()) == list(range(6)) for order in orders)
    assert len({tuple(order.tolist()) for order in orders}) > 1


@pytest.mark.parametrize("size", [None, 6])
def test_all_images_are_seen_in_every_step_by_default(size) -> None:
    assert bound(inner_batch=size).batches(at(0)) == [None] * 5


def test_augmentation_is_drawn_once_and_replayed() -> None:
    method = bound(augment=DSASpec(operations=("crop", "rotate")), inner_batch=4)
    drawn = method.augmentations(method.batches(at(3)), at(3))
    assert [len(d) for d in drawn] == [4, 2, 4, 2, 4]
    loss, one, images = method.step_loss(at(3)), EXPERTS.weights(0, 0), [method.synthetic.images.detach()]
    assert len({float(loss(one, images, t)) for t in (0, 0, 0)}) == 1
    assert float(loss(one, images, 0)) != float(loss(one, images, 2))


def test_everything_random_is_a_function_of_seed_and_step() -> None:
    knobs = {"augment": {}, "inner_batch": 4}
    first, again = bound(**knobs), bound(**knobs)
    again.matched(at(0))
    assert torch.equal(first.matched(at(3)).variables[0], again.matched(at(3)).variables[0])
    assert first.segment(at(3)) == again.segment(at(3))
    assert not torch.equal(first.matched(at(3)).variables[0], first.matched(at(4)).variables[0])
    assert not torch.equal(first.matched(at(3)).variables[0], bound(seed=1, **knobs).matched(at(3, seed=1)).variables[0])


def test_no_global_random_number_is_drawn() -> None:
    method = bound(augment={}, inner_batch=4)
    torch.manual_seed(3)
    state = torch.get_rng_state()
    list(method.updates(Batch(torch.empty(1, 0)), at(0)))
    assert torch.equal(torch.get_rng_state(), state)


def test_the_step_size_stays_positive() -> None:
    method = bound()
    method.synthetic.step_size.data.fill_(-2.0)
    with torch.no_grad():
        method.after_step("images", at(0))
        assert float(method.synthetic.step_size) == -2
        method.after_step("step_size", at(0))
    assert method.facts()["step_size"] == pytest.approx(SMALLEST_STEP)


# ---- in the engine --------------------------------------------------------------------------------------------------


def test_matching_comes_closer_and_what_comes_out_is_what_was_learned(tmp_path) -> None:
    method = bound(start="noise", step_size_optimiser=OptimiserSpec(name="sgd", lr=3e-2, momentum=0.5))
    before, start, eta = float(method.matched(at(0)).loss), method.synthetic.images.detach().clone(), method.facts()["step_size"]
    weights = method.flat.vector()
    trained(method, 40, tmp_path, rate=10.0)
    made = method.artefact().module
    assert made is method.inference() is method.synthetic
    assert float(method.matched(at(0)).loss) < 0.75 * before
    assert not torch.equal(made.images, start)
    assert float(made.step_size) != eta
    assert method.facts()["step_size"] == made.step_size.item()
    assert torch.equal(method.flat.vector(), weights), "the network is structure alone"


def test_a_restart_is_bit_exact(tmp_path) -> None:
    knobs = {"augment": {}, "inner_batch": 4, "step_size_optimiser": OptimiserSpec(name="sgd", lr=1e-3, momentum=0.5)}
    whole, cut = bound(**knobs), bound(**knobs)
    trained(whole, 9, tmp_path / "whole")
    trained(cut, 9, tmp_path / "cut", checkpoint=4)
    resumed = bound(**knobs)
    for later in ("step-8", "step-9"):
        (tmp_path / "cut" / "checkpoints" / later).rename(tmp_path / later)
    assert trained(resumed, 9, tmp_path / "cut", checkpoint=4).steps == 9
    assert torch.equal(whole.synthetic.images, resumed.synthetic.images)
    assert torch.equal(whole.synthetic.step_size, resumed.synthetic.step_size)


def test_what_goes_wrong_is_told() -> None:
    method = bound()
    assert method.notice({"images/matching": 0.4, "images/step_size": 0.1}) == []
    assert "further" in method.notice({"images/matching": 1.4, "images/step_size": 0.1, "progress": 0.5})[0]
    assert method.notice({"images/matching": 1.4, "images/step_size": 0.1, "progress": 0.4}) == [], "at the start it may be so"
    assert "step size" in method.notice({"images/matching": 0.4, "images/step_size": 30.0})[0]
    assert "step size" in method.notice({"images/matching": 0.4, "images/step_size": 1e-6})[0]


def test_the_first_images_are_real_ones_of_their_class() -> None:
    method, data = bound(), real()
    for image, label in zip(method.synthetic.images.detach(), method.synthetic.targets, strict=True):
        same = (data.inputs == image).flatten(1).all(1)
        assert int(same.sum()) == 1
        assert int(data.targets[same]) == int(label)
    assert method.synthetic.targets.tolist() == [0, 0, 1, 1, 2, 2]


# ---- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("knobs", "where", "what"),
    [
        ({"latest_start": 5}, "method.latest_start", "needs more than 5"),
        ({"expert_epochs": 4}, "method.latest_start", "needs more than 5"),
        ({"inner_batch": 7}, "method.inner_batch", "of 6 images"),
        ({"images_per_class": 21}, "method.images_per_class", "class"),
        ({"gradient": "tesla", "momentum": 0.5}, "", "no momentum"),
        ({"tesla": "released"}, "", "halves"),
        ({"step_size": 0.0}, "step_size", "greater than 0"),
        ({"experts": object()}, "teacher", "no expert trajectories"),
        ({"student": network(0, side=4)}, "student.model", "weights"),
    ],
)
def test_wrong_settings_are_refused(knobs, where, what) -> None:
    with pytest.raises(InputError, match=what) as caught:
        bound(**knobs)
    assert caught.value.where == where


def test_the_last_stored_epoch_may_be_the_target() -> None:
    method = bound(latest_start=4)
    assert {method.segment(at(step))[1] for step in range(60)} == {0, 1, 2, 3}
    assert all(torch.isfinite(method.matched(at(step)).loss) for step in range(8))


def test_an_expert_that_has_not_moved_is_refused() -> None:
    still = Experts()
    still.rows = [[row[0]] * 6 for row in still.rows]
    with pytest.raises(InputError, match="distance from the start is 0"):
        bound(still).matched(at(0))


def test_augmentation_is_for_images() -> None:
    data = ArrayData(torch.randn(60, 36), torch.arange(60) % CLASSES)
    torch.manual_seed(0)
    student = nn.Sequential(nn.Linear(36, 4), nn.Tanh(), nn.Linear(4, CLASSES))
    toy = Experts()
    toy.size = sum(p.numel() for p in student.parameters())
    with pytest.raises(InputError, match="no images"):
        bound(toy, student=student, data=data, augment={})
    assert bound(toy, student=student, data=data).synthetic.images.shape == (6, 36)
