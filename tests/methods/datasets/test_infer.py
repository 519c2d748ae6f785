"""INFER: every invariant of its sheet, what takes gradients and what does not, restarts, and what it refuses."""

import copy
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from limbeck.contract import Batch, Clock, OptimiserSpec
from limbeck.data.arrays import ArrayData
from limbeck.errors import InputError
from limbeck.evaluate.synthetic_sets import label_loss, target_probabilities
from limbeck.methods.datasets.infer import ADAM, INFER
from limbeck.models.outputs import mean_logits
from limbeck.optimise import build_optimiser, factor, set_rate
from limbeck.synthetic.batch_statistics import matching_loss, tapped
from limbeck.teachers.module import EnsembleTeacher, FunctionTeacher, ModuleTeacher
from limbeck.train.config import TrainConfig
from limbeck.train.trainer import Trainer

CLASSES, SHAPE = 5, (1, 4, 6)


class Net(nn.Module):
    """A convolution, a norm, a linear head; and a norm that never runs."""

    def __init__(self, seed: int, classes: int = CLASSES) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.conv, self.norm, self.unused = nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.BatchNorm2d(7)
        self.head = nn.Linear(4 * 24, classes)
        self.norm.running_mean.normal_()
        self.norm.running_var.uniform_(0.5, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.softplus(self.norm(self.conv(x))).flatten(1))


class Linear(nn.Module):
    """An affine map of its inputs: batch norm in eval mode, and a linear head."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.norm, self.head = nn.BatchNorm2d(1), nn.Linear(24, CLASSES)
        self.norm.running_mean.normal_()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(x).flatten(1))


def real(per_class: int = 8, classes: int = CLASSES, low: float = 0.2, high: float = 0.8) -> ArrayData:
    """Random grey images with pixels between low and high, standardised."""
    draw = torch.Generator().manual_seed(3)
    images = torch.rand(per_class * classes, *SHAPE, generator=draw) * (high - low) + low
    return ArrayData(images, torch.arange(per_class * classes) % classes, [str(c) for c in range(classes)], mean=(0.5,), std=(0.2,))


def bound(*teachers: nn.Module, data: ArrayData | None = None, seed: int = 0, ipc: int = 4, **knobs) -> INFER:
    given = EnsembleTeacher(list(teachers or (Net(1), Net(2))))
    data = data or real()
    return INFER(images_per_class=ipc, **knobs).bind(student=Net(9), teacher=given, train=data, num_classes=len(data.classes), seed=seed)


def trained(method: INFER, steps: int = 4, folder=None, **knobs) -> INFER:
    Trainer(method, method.data, TrainConfig(steps=steps, **knobs), seed=method.seed, folder=folder, cpu=True).fit()
    return method


def update(method: INFER, step: int = 0):
    (found,) = method.updates(Batch(torch.empty(8, 0)), Clock(step=step, steps=10))
    return found


def gradient(method: INFER, step: int = 0) -> Tensor:
    return torch.autograd.grad(update(method, step).loss, method.synthetic.patterns)[0]


def away_from_zero(method: INFER) -> INFER:
    with torch.no_grad():
        method.synthetic.patterns.copy_(0.1 * torch.randn(method.synthetic.patterns.shape, generator=torch.Generator().manual_seed(5)))
    return method


# ---- the set -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("classes", "teachers", "ipc", "groups"), [(100, 4, 10, 9), (100, 4, 50, 48), (10, 4, 10, 7), (1000, 3, 10, 9), (100, 2, 5, 4)])
def test_the_budget_is_the_tables(classes, teachers, ipc, groups):
    class Sizes(nn.Module):
        """As many classes as are asked for, at no cost."""

        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm2d(1)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(x).flatten(1)[:, :1].expand(-1, classes)

    method = bound(*(Sizes() for _ in range(teachers)), data=real(per_class=groups, classes=classes), ipc=ipc)
    facts = method.facts()
    assert (facts["groups"], facts["samples_per_class"]) == (groups, groups * (teachers + 1))
    assert facts["paid_images_per_class"] <= ipc < (groups + 1) * (1 + teachers / classes)
    assert len(method.synthetic.patterns) == groups * teachers
    assert len(method.synthetic) == classes * groups * (teachers + 1)


def test_a_group_is_one_image_of_every_class_and_its_compensators_are_added_to_all():
    method = away_from_zero(bound())
    K, M, C = 2, 2, CLASSES
    images, samples = method.synthetic.images.detach(), method.synthetic.expanded()[0].detach()
    assert (len(images), len(method.synthetic.patterns), len(samples)) == (K * C, K * M, K * C * (M + 1))
    known = {image.numpy().tobytes(): int(label) for image, label in zip(method.data.prepare(method.data.inputs), method.labels, strict=True)}
    assert [known[image.numpy().tobytes()] for image in images] == list(range(C)) * K
    assert len({image.numpy().tobytes() for image in images}) == K * C
    assert torch.equal(samples[: K * C], images)
    made = samples[K * C :].view(K, M, C, *SHAPE)
    for k in range(K):
        for m in range(M):
            expected = method.synthetic.clipped(images.view(K, C, *SHAPE)[k] + method.synthetic.patterns[k * M + m].detach())
            torch.testing.assert_close(made[k, m], expected)


def test_compensators_of_zero_give_the_originals_and_their_labels():
    method = trained(bound(shift=0), steps=0)
    images, targets = method.synthetic.expanded()
    original = method.synthetic.images
    assert torch.equal(images, original[torch.cat((torch.arange(10), method.synthetic.pair_image))])
    expected = mean_logits(method.members, original)
    torch.testing.assert_close(targets[:10], expected)
    torch.testing.assert_close(targets[10:], expected[method.synthetic.pair_image])


def test_images_are_a_function_of_the_seed():
    assert torch.equal(bound().synthetic.images, bound().synthetic.images)
    assert not torch.equal(bound().synthetic.images, bound(seed=1).synthetic.images)


# ---- the objective -------------------------------------------------------------------------------------------------------


def test_the_objective_by_hand():
    method = away_from_zero(bound(shift=0, statistics_weight=0.3, first_layer=7.0))
    x, total, entropies = method.synthetic.images.detach().view(2, CLASSES, *SHAPE), 0.0, 0.0
    for k in range(2):
        for m, net in enumerate(method.members):
            s = x[k] + method.synthetic.patterns[2 * k + m].detach()
            into = net.conv(s).transpose(0, 1).flatten(1)
            r = (into.var(1, correction=0) - net.norm.running_var).norm() + (into.mean(1) - net.norm.running_mean).norm()
            entropy = F.cross_entropy(net(s), torch.arange(CLASSES))
            total, entropies = total + entropy + 0.3 * 7.0 * r, entropies + entropy
    found = update(method)
    torch.testing.assert_close(found.loss.detach(), total / 4)  # told as a mean; the gradient is the sum's, see below
    torch.testing.assert_close(found.metrics["cross_entropy"], entropies / 4)


def test_the_gradient_is_the_sum_over_the_batch_of_each_images():
    method = away_from_zero(bound(shift=1))
    found, C = gradient(method, step=3), CLASSES
    x, clock = method.synthetic.images.detach().view(2, C, *SHAPE), Clock(step=3, steps=10)
    for k in range(2):
        for m, net in enumerate(method.members):
            own = method.synthetic.patterns[2 * k + m].detach().expand(C, *SHAPE).clone().requires_grad_()  # one for every image
            with tapped(net) as fired:
                logits = net((x[k] + own).roll(method.shifts(k, m, clock), (2, 3)))
            loss = F.cross_entropy(logits, torch.arange(C)) + matching_loss(fired).sum()
            each = torch.autograd.grad(loss, own)[0]
            torch.testing.assert_close(found[2 * k + m], each.sum(0), rtol=1e-4, atol=1e-6)
            assert (each - each.mean(0)).abs().max() > 1e-3


@pytest.mark.parametrize("portion", [1, 2, 3])
def test_portions_change_nothing(portion):
    whole, parts = (away_from_zero(bound(ipc=6, groups_at_once=n)) for n in (None, portion))
    assert whole.groups == 4
    torch.testing.assert_close(gradient(whole), gradient(parts), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(update(whole).loss, update(parts).loss)


def test_all_together_they_are_what_each_is_alone():
    method = trained(bound(shift=1), steps=5)
    alone = bound(shift=1)
    spec = ADAM.model_copy()
    x = alone.synthetic.images.detach().view(2, CLASSES, *SHAPE)
    for k, m in ((0, 1), (1, 0)):
        u = nn.Parameter(torch.zeros(SHAPE))
        optimiser = build_optimiser([u], spec)
        for step in range(5):
            set_rate(optimiser, spec, step, 5)
            with tapped(alone.members[m]) as fired:
                logits = alone.members[m]((x[k] + u).roll(alone.shifts(k, m, Clock(step=step)), (2, 3)))
            optimiser.zero_grad()
            (F.cross_entropy(logits, torch.arange(CLASSES)) + matching_loss(fired).sum()).backward()
            optimiser.step()
        torch.testing.assert_close(method.synthetic.patterns[2 * k + m], u, rtol=1e-3, atol=1e-4)


def test_the_shift_is_uniform_and_of_its_own_for_each_compensator_and_step():
    method = bound(shift=3)
    drawn = torch.tensor([[[method.shifts(k, m, Clock(step=step)) for m in range(2)] for k in range(2)] for step in range(400)])
    counts = drawn.flatten().bincount(minlength=4)
    assert len(counts) == 4
    assert ((counts / drawn.numel() - 0.25).abs() < 0.04).all()
    flat = drawn.view(400, 8).double()
    assert (torch.corrcoef(flat.T) - torch.eye(8)).abs().max() < 0.2
    assert method.shifts(0, 0, Clock(step=5, rank=1, micro=1)) == method.shifts(0, 0, Clock(step=5))  # every process sees the same


def test_the_whole_batch_is_rolled_alike():
    seen = []

    class Watched(Net):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(x.detach())
            return super().forward(x)

    method = bound(Watched(1), ipc=2, shift=2)
    seen.clear()
    for step in range(6):
        update(method, step)
        down, right = method.shifts(0, 0, Clock(step=step))
        assert torch.equal(seen[-1], method.synthetic.images.detach().roll((down, right), (2, 3)))
    assert len(seen) == 6  # no pass twice


def test_the_rate_is_a_cosine_from_the_first_step_to_zero():
    assert (ADAM.name, ADAM.lr, ADAM.betas, ADAM.eps) == ("adam", 0.25, (0.5, 0.9), 1e-8)
    rates = [ADAM.lr * factor(ADAM.schedule, step, 1000) for step in range(1000)]
    assert rates[0] == 0.25
    assert rates[500] == pytest.approx(0.125)
    assert rates[-1] < 1e-6
    assert all(b < a for a, b in pairwise(rates))
    assert bound().players()["compensators"].optimiser == ADAM
    assert bound(optimiser=OptimiserSpec(lr=0.1)).players()["compensators"].optimiser.lr == 0.1


# ---- what stays as it was ------------------------------------------------------------------------------------------------


def test_only_the_compensators_are_changed():
    method = bound(Net(1), Net(2))
    teachers, images = copy.deepcopy(method.teacher.state_dict()), method.synthetic.images.detach().clone()
    method.teacher.train()
    trained(method)
    assert all(torch.equal(value, teachers[name]) for name, value in method.teacher.state_dict().items())
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in method.teacher.parameters())
    assert torch.equal(method.synthetic.images, images)
    assert method.synthetic.images.grad is None
    assert (method.synthetic.patterns.detach().flatten(1).norm(dim=1) > 0.1).all()
    assert not any(module._forward_pre_hooks for module in method.teacher.modules())


def test_it_lowers_its_objective():
    method = bound(shift=0)
    before = float(update(method).loss.detach())
    trained(method, steps=60)
    assert float(update(method).loss.detach()) < 0.7 * before


def test_the_sum_is_clipped_and_not_the_compensator():
    method = bound(shift=0, optimiser=OptimiserSpec(name="adam", lr=3.0))
    trained(method, steps=4)
    patterns, samples = method.synthetic.patterns.detach(), method.synthetic.expanded()[0].detach()
    assert patterns.abs().max() > 5  # black to white
    pixels = samples * 0.2 + 0.5
    assert pixels.min() >= -1e-6
    assert pixels.max() <= 1 + 1e-6
    assert ((pixels < 1e-6) | (pixels > 1 - 1e-6)).any()


# ---- labels --------------------------------------------------------------------------------------------------------------


def test_labels_are_the_mean_logits_of_the_finished_images():
    method = trained(bound())
    images, targets = method.synthetic.expanded()
    with torch.no_grad():
        torch.testing.assert_close(targets, (method.members[0](images) + method.members[1](images)) / 2, rtol=1e-4, atol=1e-5)
    assert not targets.requires_grad
    assert method.synthetic.labels == "soft"


def test_of_one_teacher_the_labels_are_its_logits():
    net = Net(4)
    method = trained(bound(net))
    images, targets = method.synthetic.expanded()
    with torch.no_grad():
        torch.testing.assert_close(targets, net(images), rtol=1e-4, atol=1e-5)


def test_of_linear_teachers_mixed_labels_are_the_labels_of_mixed_images():
    members, draw = [Linear(1).eval(), Linear(2).eval()], torch.Generator().manual_seed(0)
    x, weight, other = torch.randn(6, *SHAPE, generator=draw), 0.3, torch.tensor([3, 1, 0, 5, 2, 4])
    static = weight * mean_logits(members, x) + (1 - weight) * mean_logits(members, x[other])
    dynamic = mean_logits(members, weight * x + (1 - weight) * x[other])
    torch.testing.assert_close(static, dynamic, rtol=1e-4, atol=1e-5)
    probabilities = weight * mean_logits(members, x).softmax(1) + (1 - weight) * mean_logits(members, x[other]).softmax(1)
    assert (probabilities - dynamic.softmax(1)).abs().max() > 1e-3  # mixing after the softmax is something else


@pytest.mark.parametrize("temperature", [1.0, 4.0, 30.0])
def test_a_student_that_is_the_teacher_has_loss_0(temperature):
    net, x = Net(1).eval(), torch.randn(6, *SHAPE)
    with torch.no_grad():
        probabilities = target_probabilities(mean_logits([net], x), temperature)
        same, other = label_loss(net(x), probabilities, temperature), label_loss(-net(x), probabilities, temperature)
    torch.testing.assert_close(same, torch.tensor(0.0), atol=1e-6, rtol=0)
    assert float(other) > 1e-4


def test_how_a_user_trains_unless_the_recipe_says_otherwise():
    training = INFER(images_per_class=4).training  # needs no binding: `limbeck evaluate` has none
    assert (training.epochs, training.batch_size, training.mixup, training.temperature) == (80, 64, 0.8, 30)
    assert (training.optimiser.name, training.optimiser.lr, training.optimiser.weight_decay) == ("adamw", 1e-3, 0.01)
    assert (training.optimiser.schedule.name, training.labels, training.soft, training.drop_at) == ("cosine", "static", "logits", None)


# ---- what comes out ------------------------------------------------------------------------------------------------------


def test_the_artefact_keeps_images_and_compensators_apart():
    method = trained(bound())
    found = method.artefact()
    assert (found.kind, found.module) == ("dataset", method.synthetic)
    bytes_of = found.facts["bytes"]
    assert bytes_of["images"] == 2 * CLASSES * 24 * 4
    assert bytes_of["patterns"] == 2 * 2 * 24 * 4
    assert bytes_of["labels"] == 3 * 2 * CLASSES * CLASSES * 4


def test_a_stopped_run_goes_on_to_the_same_bits(tmp_path):
    whole = trained(bound(), steps=6)
    stopped, steps = bound(), []

    class Stop(Exception):
        """As if the machine had gone."""

    def after_step(player, clock):
        steps.append(clock.step)
        if len(steps) == 4:
            raise Stop

    stopped.after_step = after_step
    with pytest.raises(Stop):
        trained(stopped, steps=6, folder=tmp_path, checkpoint_steps=1)
    again = trained(bound(), steps=6, folder=tmp_path, checkpoint_steps=1)
    finished = trained(bound(), steps=6, folder=tmp_path, checkpoint_steps=1)  # nothing is left to do but to read it
    for found in (again, finished):
        assert torch.equal(found.synthetic.patterns, whole.synthetic.patterns)
        assert torch.equal(found.synthetic.targets, whole.synthetic.targets)
    assert float(finished.synthetic.targets.abs().max()) > 0


def test_few_classes_are_told_of():
    assert "5 classes" in bound().notice({})[0]
    many = bound()
    many.num_classes = 100
    assert not many.notice({})


# ---- what it refuses -----------------------------------------------------------------------------------------------------


class Plain(nn.Module):
    """No norm."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.unused = nn.Linear(24, CLASSES), nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x.flatten(1))


def test_teachers_that_cannot_teach():
    with pytest.raises(InputError, match="teacher 1 runs no batch norm"):
        bound(Net(1), Plain())
    with pytest.raises(InputError, match="has 3 classes"):
        bound(Net(1, classes=3))
    with pytest.raises(InputError, match="batch norm"):
        INFER(images_per_class=4).bind(student=Net(0), teacher=FunctionTeacher(lambda x: x.flatten(1)[:, :CLASSES]), train=real(), num_classes=CLASSES)

    class Served:
        """Answers, and nothing else."""

        def logits(self, batch):
            return batch.inputs

        all_logits = logits

    with pytest.raises(InputError, match="no network of this process"):
        INFER(images_per_class=4).bind(student=Net(0), teacher=Served(), train=real(), num_classes=CLASSES)
    single = INFER(images_per_class=2).bind(student=Net(0), teacher=ModuleTeacher(Net(1)), train=real(), num_classes=CLASSES)
    assert single.facts()["teachers"] == 1


def test_budgets_and_data_that_do_not_do():
    with pytest.raises(InputError) as caught:
        bound(ipc=1)
    assert caught.value.where == "method.images_per_class"
    with pytest.raises(InputError) as caught:
        bound(data=real(per_class=2), ipc=10)
    assert caught.value.where == "method.images_per_class"
    with pytest.raises(InputError, match="pixels"):
        bound(data=real(low=-3.0, high=0.0))
