"""MEAL V2: every invariant of its sheet, the directions of the discriminator, CutMix in front of it."""

import copy
import math
from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from limbeck import losses
from limbeck.contract import IGNORE, Batch, Clock, OptimiserSpec, Update
from limbeck.data.augment import AugmentSpec, augment, cutmix
from limbeck.errors import InputError
from limbeck.methods import KD, MealV2
from limbeck.methods.classifiers.meal_v2 import build_discriminator, discriminator_widths

C = 10
SETTINGS = settings(deadline=None, max_examples=25)
SEEDS = st.integers(0, 2**31)


class Bare(nn.Module):
    """A student whose logits are its parameter: gradients at the logits can be read off."""

    def __init__(self, logits_BC: Tensor) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits_BC)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.logits * 1.0


@dataclass
class Ensemble:
    """Fixed answers, [T, B, C]."""

    answers: Tensor

    def all_logits(self, batch: Batch) -> Tensor:
        return self.answers

    def logits(self, batch: Batch) -> Tensor:
        return losses.mean_probabilities(self.answers).log()


class Networks(Ensemble):
    """Real teachers that note what they were shown."""

    def __init__(self, *modules: nn.Module) -> None:
        self.modules, self.shown = modules, []

    @torch.no_grad()
    def all_logits(self, batch: Batch) -> Tensor:
        self.shown.append(batch.inputs.clone())
        return torch.stack([module(batch.inputs) for module in self.modules])


@dataclass
class Labels:
    targets: Tensor | None


def drawn(seed: int, *shape: int) -> Tensor:
    return 2 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def bound(seed: int, teachers: int = 3, batch: int = 6, **knobs) -> tuple[MealV2, Batch]:
    method = MealV2(**knobs).bind(student=Bare(drawn(seed, batch, C)), teacher=Ensemble(drawn(seed + 1, teachers, batch, C)), num_classes=C, seed=seed)
    if method.config.mode != "off":
        method.discriminator.double()
    return method, Batch(torch.zeros(batch, 1), torch.arange(batch) % C)


def gradient_of(update: Update, method: MealV2) -> Tensor:
    return torch.autograd.grad(update.loss, method.student.logits, retain_graph=True)[0]


def student_update(method: MealV2, batch: Batch) -> Update:
    """The student's update, without stepping anybody."""
    return next(update for update in method.updates(batch, Clock()) if update.player == "student")


# ---- L_KL --------------------------------------------------------------------------------------------------------------


@given(SEEDS, st.integers(1, 4))
@SETTINGS
def test_soft_gradient_is_student_minus_target_over_b(seed: int, teachers: int) -> None:
    method, batch = bound(seed, teachers, mode="off")
    p = torch.softmax(method.teacher.answers, -1).mean(0)
    (update,) = method.updates(batch, Clock())
    torch.testing.assert_close(gradient_of(update, method), (torch.softmax(method.student.logits, -1) - p) / len(batch))
    entropy = -(p * p.log()).sum(-1).mean()
    assert update.loss >= entropy
    method.student.logits.data = p.log() + 3.0
    (update,) = method.updates(batch, Clock())
    torch.testing.assert_close(update.loss, entropy)
    assert gradient_of(update, method).abs().max() < 1e-12


@given(SEEDS)
@SETTINGS
def test_one_teacher_and_no_discriminator_is_kd_at_temperature_1_with_weight_1(seed: int) -> None:
    method, batch = bound(seed, teachers=1, mode="off")
    kd = KD(temperature=1.0, weight=1.0).bind(student=method.student, teacher=Ensemble(method.teacher.answers))
    ours, hinton = next(method.updates(batch, Clock())), next(kd.updates(batch, Clock()))
    torch.testing.assert_close(gradient_of(ours, method), gradient_of(hinton, method))
    p = torch.softmax(method.teacher.answers[0], -1)
    torch.testing.assert_close(ours.loss, hinton.loss - (p * p.log()).sum(-1).mean())  # they differ by H(p)


# ---- the discriminator ---------------------------------------------------------------------------------------------------


def test_widths_are_the_papers_at_1000_classes_and_guarded_at_few() -> None:
    assert discriminator_widths(1000) == (1000, 125, 15, 2)
    assert discriminator_widths(10, 8, 1) == (10, 1, 1, 2)  # eq. 3 would end at 0
    assert discriminator_widths(10) == (10, 8, 8, 2)
    assert discriminator_widths(100, 4, 1) == (100, 25, 6, 2)
    method = MealV2().bind(student=nn.Identity(), teacher=Ensemble(torch.zeros(1, 1, 1000)), num_classes=1000)
    shapes = [(layer.in_features, layer.out_features) for layer in method.discriminator if isinstance(layer, nn.Linear)]
    assert shapes == [(1000, 125), (125, 15), (15, 2)]
    assert method.facts()["discriminator_widths"] == [1000, 125, 15, 2]


@pytest.mark.parametrize("last_relu", [True, False])
def test_relu_stands_after_each_layer_and_last_only_if_asked(last_relu) -> None:
    kinds = [type(layer) for layer in build_discriminator((10, 8, 8, 2), last_relu, seed=0)]
    assert kinds == ([nn.Linear, nn.ReLU] * 3)[: 6 if last_relu else 5]


def test_the_discriminator_depends_on_the_runs_seed_alone_and_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = build_discriminator((10, 8, 8, 2), False, seed=7)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert torch.equal(first[0].weight, build_discriminator((10, 8, 8, 2), False, seed=7)[0].weight)
    assert not torch.equal(first[0].weight, build_discriminator((10, 8, 8, 2), False, seed=8)[0].weight)


@given(SEEDS, st.booleans())
@SETTINGS
def test_official_student_loss_is_the_plain_sum_with_the_mean_raw_logits_judged(seed: int, last_relu: bool) -> None:
    method, batch = bound(seed, mode="official", last_relu=last_relu)
    s, t = method.student.logits, method.teacher.answers
    l_d = losses.discriminator_loss(method.discriminator(s), method.discriminator(t.mean(0)))
    l_kl = losses.soft_cross_entropy(s, losses.mean_probabilities(t))
    torch.testing.assert_close(student_update(method, batch).loss, l_kl + l_d)


@given(SEEDS)
@SETTINGS
def test_adversarial_gradient_from_the_discriminator_is_minus_the_officials(seed: int) -> None:
    official, batch = bound(seed, mode="official")
    adversarial, _ = bound(seed, mode="adversarial")
    off, _ = bound(seed, mode="off")
    plain = gradient_of(student_update(off, batch), off)
    from_d = gradient_of(student_update(official, batch), official) - plain
    against_d = gradient_of(student_update(adversarial, batch), adversarial) - plain
    torch.testing.assert_close(against_d, -from_d)
    assert from_d.abs().max() > 1e-6


@pytest.mark.parametrize("mode", ["official", "adversarial"])
def test_the_discriminators_own_loss_reaches_no_student_and_matches_the_joint_gradient(mode) -> None:
    method, batch = bound(3, mode=mode)
    joint = losses.discriminator_loss(method.discriminator(method.student.logits), method.discriminator(method.teacher.answers.mean(0)))
    expected = torch.autograd.grad(joint, list(method.discriminator.parameters()))
    (update,) = (u for u in method.updates(batch, Clock()) if u.player == "discriminator")
    found = torch.autograd.grad(update.loss, list(method.discriminator.parameters()), retain_graph=True)
    torch.testing.assert_close(found, expected)
    assert torch.autograd.grad(update.loss, method.student.logits, allow_unused=True) == (None,)


def drive(method: MealV2, batch: Batch, steps: int, lr: float = 0.1) -> list[str]:
    """The loop of whoever drives a method."""
    players = method.players()
    optimisers = {name: torch.optim.SGD(player.module.parameters(), lr=lr) for name, player in players.items()}
    order = []
    for step in range(steps):
        clock = Clock(seed=0, step=step, steps=steps)
        for update in method.updates(batch, clock):
            update.loss.backward(inputs=list(players[update.player].module.parameters()))
            optimisers[update.player].step()
            optimisers[update.player].zero_grad()
            method.after_step(update.player, clock)
            order.append(update.player)
    return order


def test_official_mode_is_one_joint_sgd_step_and_adversarial_steps_the_discriminator_first() -> None:
    method, batch = bound(5, mode="official")
    student, discriminator = copy.deepcopy(method.student), copy.deepcopy(method.discriminator)
    l_d = losses.discriminator_loss(discriminator(student.logits), discriminator(method.teacher.answers.mean(0)))
    total = losses.soft_cross_entropy(student.logits, losses.mean_probabilities(method.teacher.answers)) + l_d
    parameters = [*student.parameters(), *discriminator.parameters()]
    joint = torch.optim.SGD(parameters, lr=0.1)
    total.backward()
    joint.step()
    assert drive(method, batch, 1) == ["student", "discriminator"]
    torch.testing.assert_close([*method.student.parameters(), *method.discriminator.parameters()], parameters)
    method, batch = bound(5, mode="adversarial")
    assert drive(method, batch, 2) == ["discriminator", "student"] * 2


def test_adversarial_student_is_judged_by_the_stepped_discriminator() -> None:
    method, batch = bound(6, mode="adversarial")
    after = copy.deepcopy(method)
    running = method.updates(batch, Clock())
    first = next(running)
    grads = torch.autograd.grad(first.loss, list(method.discriminator.parameters()))
    with torch.no_grad():
        for parameter, gradient in zip(method.discriminator.parameters(), grads, strict=True):
            parameter -= 0.5 * gradient
    after.discriminator.load_state_dict(method.discriminator.state_dict())
    expected = gradient_of(student_update(after, batch), after)
    torch.testing.assert_close(gradient_of(next(running), method), expected)


def test_the_directions_do_what_they_say() -> None:
    """Without L_KL in the way: against the discriminator its loss rises towards ln 2, with it the loss falls below."""
    found = {}
    for mode in ("official", "adversarial"):
        method, batch = bound(8, mode=mode, batch=32)
        drive(method, batch, 60, lr=2.0)
        found[mode] = method.judge(method.student.logits, method.teacher.answers.mean(0)).item()
    assert found["official"] < found["adversarial"]
    assert found["official"] < 0.3


def test_off_has_no_discriminator_to_touch() -> None:
    method, batch = bound(0, mode="off")
    assert list(method.players()) == ["student"]
    assert [update.player for update in method.updates(batch, Clock())] == ["student"]
    assert method.facts() == {"mode": "off"}
    adversarial, _ = bound(0)
    before = copy.deepcopy(adversarial.discriminator.state_dict())
    student_update(adversarial, batch).loss.backward(inputs=[adversarial.student.logits])  # the student's step is not D's
    torch.testing.assert_close(adversarial.discriminator.state_dict(), before)
    assert all(p.grad is None for p in adversarial.discriminator.parameters())


@given(SEEDS)
@SETTINGS
def test_matched_logits_are_worth_ln2_to_the_best_discriminator_and_their_gradients_cancel(seed: int) -> None:
    s = drawn(seed, 6, C)
    t = s.clone()
    linear = nn.Linear(C, 2).double()
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    loss = losses.discriminator_loss(linear(s), linear(t))
    assert loss.item() == pytest.approx(math.log(2))
    assert all(gradient.abs().max() < 1e-12 for gradient in torch.autograd.grad(loss, list(linear.parameters())))  # the optimum
    nn.init.normal_(linear.weight)
    assert losses.discriminator_loss(linear(s), linear(t)).item() >= math.log(2) - 1e-12  # nothing is better


@pytest.mark.parametrize("mode", ["official", "adversarial"])
def test_a_dead_discriminator_is_ln2_without_any_gradient_and_is_reported(mode) -> None:
    method, batch = bound(1, mode=mode, last_relu=True)
    nn.init.constant_(method.discriminator[4].bias, -1e3)  # both outputs are cut to zero for every input
    off, _ = bound(1, mode="off")
    update = {u.player: u for u in method.updates(batch, Clock())}
    assert update["discriminator"].loss.item() == pytest.approx(math.log(2), abs=1e-12)
    assert all(not g.any() for g in torch.autograd.grad(update["discriminator"].loss, list(method.discriminator.parameters())))
    torch.testing.assert_close(gradient_of(update["student"], method), gradient_of(student_update(off, batch), off))
    assert bool(update["discriminator"].metrics["dead"])
    assert method.facts()["discriminator_dead"] == 1.0


def test_a_living_discriminator_is_not_reported_dead_and_the_count_survives_a_restart() -> None:
    method, batch = bound(1)
    drive(method, batch, 3)
    assert method.facts() == {"mode": "adversarial", "discriminator_widths": [10, 8, 8, 2], "discriminator_dead": 0.0}
    nn.init.zeros_(method.discriminator[4].weight)  # without the last ReLU: every row gets the bias
    list(method.updates(batch, Clock()))
    assert method.facts()["discriminator_dead"] == 0.25
    again, _ = bound(1)
    again.load_state_dict(method.state_dict())
    assert again.facts()["discriminator_dead"] == 0.25


def test_nothing_is_read_on_the_host_in_a_step() -> None:
    """On the meta device any `.item()`, `bool()` or `float()` of a tensor raises."""
    with torch.device("meta"):
        student = nn.Linear(4, C)
        teacher = Ensemble(torch.empty(3, 6, C))
    for mode in ("official", "adversarial", "off"):
        method = MealV2(mode=mode).bind(student=student, teacher=teacher, num_classes=C)
        if mode != "off":
            method.discriminator.to("meta")
            method.dead = method.dead.to("meta")
        assert [u.loss.device.type for u in method.updates(Batch(torch.empty(6, 4, device="meta")), Clock())] == ["meta"] * len(method.players())


# ---- labels --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["official", "adversarial", "off"])
def test_labels_have_no_effect(mode) -> None:
    gradients = []
    for targets in (torch.arange(6), torch.arange(6).flip(0), torch.full((6,), IGNORE), None):
        method, batch = bound(2, mode=mode)
        gradients.append(gradient_of(student_update(method, replace(batch, targets=targets)), method))
    assert all(torch.equal(g, gradients[0]) for g in gradients)


def test_hard_weight_adds_cross_entropy() -> None:
    with_labels, batch = bound(2, mode="off", hard_weight=0.5)
    without, _ = bound(2, mode="off")
    update = student_update(with_labels, batch)
    expected = F.cross_entropy(with_labels.student.logits, batch.targets)
    torch.testing.assert_close(update.loss, student_update(without, batch).loss + 0.5 * expected)
    torch.testing.assert_close(update.metrics["hard"], expected)
    assert set(student_update(without, batch).metrics) == {"soft"}


# ---- CutMix is the recipe's data.augment.cutmix ---------------------------------------------------------------------------


class Seeing(nn.Module):
    """A network that notes what it was shown."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.shown = nn.Linear(64, C), []

    def forward(self, inputs: Tensor) -> Tensor:
        self.shown.append(inputs.clone())
        return self.layer(inputs.flatten(1))


def test_student_and_teachers_see_the_same_mixture_and_the_mixed_labels_have_no_effect() -> None:
    torch.manual_seed(0)
    teacher, student = Networks(Seeing(), Seeing()), Seeing()
    method = MealV2().bind(student=student, teacher=teacher, num_classes=C)
    images, labels, ids = torch.rand(6, 1, 8, 8), torch.arange(6), torch.arange(6)
    mixed, soft = augment(images, labels, ids, spec=AugmentSpec(cutmix=1.0), seed=0, epoch=0, num_classes=C)
    assert not torch.equal(mixed, images)
    found = []
    for targets in (soft, labels, None):
        found.append(next(u.loss for u in method.updates(Batch(mixed, targets, ids), Clock()) if u.player == "student"))
    assert found[0] == found[1] == found[2]
    assert all(torch.equal(inputs, mixed) for inputs in student.shown + teacher.shown + [i for m in teacher.modules for i in m.shown])


def test_cutmix_with_lambda_1_is_no_cutmix() -> None:
    images, middle = torch.rand(6, 1, 8, 8), torch.full((6,), 4)
    mixed, kept = cutmix(images, images.flip(0), torch.ones(6), middle, middle)
    assert torch.equal(mixed, images)
    assert torch.equal(kept, torch.ones(6))


# ---- the contract --------------------------------------------------------------------------------------------------------


def test_the_discriminator_takes_the_recipes_optimiser_unless_it_has_its_own() -> None:
    assert bound(0)[0].players()["discriminator"].optimiser is None
    own = bound(0, discriminator_optimiser={"name": "adam", "lr": 1e-4})[0].players()
    assert own["discriminator"].optimiser == OptimiserSpec(name="adam", lr=1e-4)
    assert own["student"].optimiser is None


def test_what_comes_out_is_the_student_alone() -> None:
    method, _ = bound(0)
    assert method.artefact().module is method.student
    assert method.artefact().kind == "classifier"


def test_off_may_be_written_as_yaml_reads_it() -> None:
    assert MealV2(**yaml.safe_load("mode: off")).config.mode == "off"


def test_wrong_input_is_named() -> None:
    with pytest.raises(InputError, match="num_classes"):
        MealV2().bind(student=nn.Identity(), teacher=Ensemble(torch.zeros(1, 1, C)))
    with pytest.raises(InputError, match="no training sample has one"):
        MealV2(hard_weight=1.0).bind(student=nn.Identity(), teacher=Ensemble(torch.zeros(1, 1, C)), num_classes=C, train=Labels(None))
    for knobs in ({"mode": "on"}, {"mode": True}, {"shrink": 1}, {"min_width": 0}, {"discriminator_optimiser": {"lr": -1}}):
        with pytest.raises(InputError, match=next(iter(knobs))):
            MealV2(**knobs)
