"""Fresh networks on synthetic sets: the recipe, determinism, labels hard, soft and dynamic, and the evaluator."""

import math
import statistics

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from limbeck import seeds
from limbeck.contract import OptimiserSpec, ScheduleSpec, validated
from limbeck.data import AugmentSpec
from limbeck.errors import InputError
from limbeck.evaluate.synthetic_sets import (
    Evaluation,
    Evaluator,
    SetTraining,
    accuracy,
    chosen_rate,
    label_loss,
    target_probabilities,
    train_on,
)
from limbeck.synthetic.augment import DSASpec

CLASSES = 3
PLAIN = SetTraining(steps=12, batch_size=8, drop_at=None)


def network(seed: int, hidden: int = 12, dropout: float = 0.0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Flatten(), nn.Linear(16, hidden), nn.ReLU(), nn.Dropout(dropout), nn.Linear(hidden, CLASSES))


def blobs(count: int, seed: int = 0, spread: float = 0.5) -> tuple[Tensor, Tensor]:
    """Three clouds of [1, 4, 4] images."""
    centres = torch.randn(CLASSES, 1, 4, 4, generator=seeds.generator("centres"))
    labels = torch.arange(count) % CLASSES
    return centres[labels] + spread * torch.randn(count, 1, 4, 4, generator=seeds.generator(seed, "noise")), labels


def weights(module: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in module.parameters()])


def trained(images: Tensor, targets: Tensor, training: SetTraining, seed: int = 0, **given: object) -> Tensor:
    return weights(train_on(network(1), images, targets, training, seed=seed, **given))


# ---- the loop -----------------------------------------------------------------------------------------------------------------


def test_full_batches_by_hand_with_the_drop() -> None:
    images, labels = blobs(6)
    training = SetTraining(epochs=7, drop_at=0.5, drop=0.1)
    module = network(1)
    optimiser = torch.optim.SGD(module.parameters(), lr=0.2, momentum=0.9, weight_decay=5e-4)
    for step in range(7):
        if step == 3:  # 0.5 · 7, rounded down; the momentum is lost
            optimiser = torch.optim.SGD(module.parameters(), lr=0.02, momentum=0.9, weight_decay=5e-4)
        optimiser.zero_grad()
        F.cross_entropy(module(images), labels).backward()
        optimiser.step()
    torch.testing.assert_close(trained(images, labels, training, step_size=0.2), weights(module), rtol=1e-5, atol=1e-6)
    kept = trained(images, labels, training.model_copy(update={"fresh_momentum": False}), step_size=0.2)
    assert (kept - weights(module)).abs().max() > 1e-3


@pytest.mark.parametrize("count", [6, 20])
def test_one_hot_soft_labels_are_hard_labels_bit_for_bit(count: int) -> None:
    images, labels = blobs(count)
    soft = PLAIN.model_copy(update={"soft": "probabilities"})
    assert torch.equal(trained(images, labels, PLAIN), trained(images, F.one_hot(labels, CLASSES).float(), soft))


def test_log_probabilities_as_logits_are_these_probabilities() -> None:
    images, labels = blobs(6)
    p = torch.softmax(torch.randn(6, CLASSES, generator=seeds.generator("p")), -1)
    training = PLAIN.model_copy(update={"temperature": 3.0})
    a = trained(images, p.log() + 5, training)
    b = trained(images, p, training.model_copy(update={"soft": "probabilities"}))
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert (a - trained(images, labels, training)).abs().max() > 1e-4


FULL = {
    "augment": DSASpec(),
    "transform": AugmentSpec(crop=1, flip=True),
    "mixup": 0.8,
}


@pytest.mark.parametrize("change", [{}, *({name: value} for name, value in FULL.items()), FULL], ids=["plain", *FULL, "all"])
def test_the_seed_decides_everything_and_torchs_generator_is_left_alone(change: dict[str, object]) -> None:
    images, labels = blobs(20)
    training = PLAIN.model_copy(update=change)
    before = torch.random.get_rng_state()
    first = train_on(network(1, dropout=0.3), images, labels, training, seed=4)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.rand(5)
    assert torch.equal(weights(first), weights(train_on(network(1, dropout=0.3), images, labels, training, seed=4)))
    assert not torch.equal(weights(first), weights(train_on(network(1, dropout=0.3), images, labels, training, seed=5)))


@pytest.mark.parametrize("name", list(FULL))
def test_augmentation_and_mixing_do_something_and_leave_the_set_alone(name: str) -> None:
    images, labels = blobs(6)
    kept = images.clone()
    plain = trained(images, labels, PLAIN)
    assert not torch.equal(plain, trained(images, labels, PLAIN.model_copy(update={name: FULL[name]})))
    assert torch.equal(images, kept)


def test_a_large_set_is_seen_in_near_equal_batches_once_an_epoch() -> None:
    seen: list[Tensor] = []

    class Watch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(1, CLASSES)

        def forward(self, x: Tensor) -> Tensor:
            seen.append(x.detach().flatten())
            return self.layer(x)

    train_on(Watch(), torch.arange(17.0)[:, None], torch.arange(17) % CLASSES, SetTraining(epochs=2, batch_size=8), seed=0)
    assert [len(part) for part in seen] == [6, 6, 5] * 2
    first, second = torch.cat(seen[:3]), torch.cat(seen[3:])
    assert first.sort().values.tolist() == second.sort().values.tolist() == list(range(17))
    assert first.tolist() != second.tolist()


def test_the_order_of_the_images_changes_nothing_but_rounding() -> None:
    images, labels = blobs(6)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    torch.testing.assert_close(trained(images, labels, PLAIN), trained(images[order], labels[order], PLAIN), rtol=1e-4, atol=1e-6)


def test_rates_of_a_schedule() -> None:
    images, labels = blobs(6)
    spec = OptimiserSpec(name="sgd", lr=0.3, momentum=0.0, schedule=ScheduleSpec(name="cosine", warmup=0.25))
    module = network(1)
    for step in range(8):
        factor = (step + 1) / 3 if step < 2 else 0.5 * (1 + math.cos(math.pi * (step - 2) / 6))
        module.zero_grad()
        F.cross_entropy(module(images), labels).backward()
        with torch.no_grad():
            for parameter in module.parameters():
                parameter -= 0.3 * factor * parameter.grad
    torch.testing.assert_close(trained(images, labels, SetTraining(steps=8, drop_at=None, optimiser=spec)), weights(module), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["adam", "adamw", "radam"])
def test_other_optimisers_keep_their_rate(name: str) -> None:
    images, labels = blobs(6)
    training = SetTraining(steps=5, drop_at=None, optimiser=OptimiserSpec(name=name, lr=0.01))
    assert torch.equal(trained(images, labels, training), trained(images, labels, training, step_size=0.5))
    assert not torch.equal(trained(images, labels, training), trained(images, labels, training, rate=0.5))


def test_which_rate() -> None:
    assert chosen_rate(PLAIN) == 0.01
    assert chosen_rate(PLAIN, torch.tensor(0.25)) == 0.25
    assert chosen_rate(PLAIN, 0.25, rate=0.5) == 0.5
    assert chosen_rate(PLAIN.model_copy(update={"use_step_size": False}), 0.25) == 0.01
    for wrong in (0.0, -0.1, math.nan, math.inf):
        with pytest.raises(InputError, match="learning rate"):
            chosen_rate(PLAIN, wrong)


# ---- labels ---------------------------------------------------------------------------------------------------------------------


def test_label_loss_is_the_divergence_without_tau_squared() -> None:
    z, f = (torch.randn(5, CLASSES, generator=seeds.generator(name), dtype=torch.float64) for name in "zf")
    p, q = torch.softmax(z / 30, -1), torch.softmax(f / 30, -1)
    torch.testing.assert_close(label_loss(f, target_probabilities(z, 30.0), 30.0), (p * (p / q).log()).sum() / 5)
    assert abs(float(label_loss(z, target_probabilities(z, 7.0), 7.0))) < 1e-15
    torch.testing.assert_close(target_probabilities(torch.softmax(z, -1), 7.0, "probabilities"), target_probabilities(z, 7.0))
    one_hot = F.one_hot(torch.tensor([2, 0, 1, 1, 0]), CLASSES).double()
    assert torch.equal(target_probabilities(one_hot, 30.0, "probabilities"), one_hot)
    torch.testing.assert_close(label_loss(f, one_hot), F.cross_entropy(f, one_hot.argmax(1)))


def linear(seed: int) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Flatten(), nn.Linear(16, CLASSES))


def test_mixed_labels_of_linear_teachers_are_their_answers_to_mixed_images() -> None:
    """An affine map commutes with mixing, if it is the LOGITS that are mixed, by the images' own share and partners."""
    images, _ = blobs(6)
    teachers = [linear(7), linear(8)]
    with torch.no_grad():
        z = torch.stack([teacher(images) for teacher in teachers]).mean(0)
    training = SetTraining(steps=10, drop_at=None, mixup=0.8, temperature=4.0)
    static = trained(images, z, training, rate=1.0)
    dynamic = trained(images, z.zero_(), training.model_copy(update={"labels": "dynamic"}), rate=1.0, teachers=teachers)
    torch.testing.assert_close(static, dynamic, rtol=1e-4, atol=1e-5)
    plain = trained(images, torch.zeros(6, CLASSES), training, rate=1.0)
    assert (static - plain).abs().max() > 1e-3


def test_a_student_that_is_the_teacher_stays_and_teachers_are_left_alone() -> None:
    images, labels = blobs(20)
    teacher = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(16), nn.Linear(16, CLASSES)).train()
    state = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    spec = OptimiserSpec(lr=0.5, momentum=0.0, weight_decay=0.0)
    training = SetTraining(steps=6, drop_at=None, labels="dynamic", temperature=30.0, mixup=0.8, augment=DSASpec(), optimiser=spec)
    train_on(network(1), images, labels, training, seed=0, teachers=[teacher])
    assert all(torch.equal(tensor, state[name]) for name, tensor in teacher.state_dict().items())
    assert teacher.training  # as it was
    student = train_on(network(3), images, labels, training, seed=0, teachers=[network(3)])
    torch.testing.assert_close(weights(student), weights(network(3)), rtol=0, atol=1e-6)


def test_teachers_are_moved_for_dynamic_labels_alone() -> None:
    moved: list[object] = []

    class Stays(nn.Sequential):
        def to(self, *given, **named):
            moved.append(given)
            return super().to(*given, **named)

    images, labels = blobs(6)
    teacher = Stays(*linear(7))
    trained(images, labels, PLAIN, teachers=[teacher])
    assert not moved
    trained(images, labels, PLAIN.model_copy(update={"labels": "dynamic"}), teachers=[teacher])
    assert moved


# ---- the evaluator --------------------------------------------------------------------------------------------------------------


def evaluator(training: SetTraining = PLAIN, count: int = 3, seed: int = 0, made: list[int] | None = None) -> Evaluator:
    def fresh(number: int) -> nn.Module:
        if made is not None:
            made.append(number)
        return network(number)

    return Evaluator(fresh, training, *blobs(60, seed=1), count=count, seed=seed)


def same(a: Evaluation, b: Evaluation) -> bool:
    return (a.accuracies, a.seeds, a.rate) == (b.accuracies, b.seeds, b.rate)


def test_networks_are_fresh_recorded_and_the_same_for_every_arm() -> None:
    made: list[int] = []
    judge = evaluator(made=made)
    images, labels = blobs(6, spread=1.5)
    first = judge.evaluate(images, labels)
    second = judge.evaluate(images, labels)
    assert same(first, second)
    assert made == [*first.seeds] * 2
    assert len(set(first.seeds)) == 3
    assert not set(evaluator(seed=1).evaluate(images, labels).seeds) & set(first.seeds)
    alone = train_on(network(first.seeds[1]), images, labels, PLAIN, seed=first.seeds[1])
    assert accuracy(alone, *blobs(60, seed=1)) == first.accuracies[1]


def test_what_is_reported() -> None:
    found = evaluator().evaluate(*blobs(6, spread=1.5))
    assert found.mean == pytest.approx(statistics.fmean(found.accuracies))
    assert found.std == pytest.approx(statistics.stdev(found.accuracies))
    reach = 4.302653 * found.std / 3**0.5  # Student's t, 2 degrees of freedom
    assert found.interval == (pytest.approx(found.mean - reach), pytest.approx(found.mean + reach))
    assert found.rate == 0.01
    assert found.seconds > 0
    assert found.peak_bytes is None
    single = evaluator(count=1).evaluate(*blobs(6))
    assert (single.std, single.interval) == (None, (None, None))


def test_all_real_data_as_a_set_give_the_full_number() -> None:
    training = SetTraining(epochs=30, batch_size=16, optimiser=OptimiserSpec(lr=0.1, momentum=0.9))
    images, labels = blobs(60, seed=2)
    full = evaluator(training).evaluate(images, labels)
    assert full.mean > 0.95
    again = evaluator(training).evaluate(images.clone(), labels.clone())
    assert same(full, again)


def test_accuracy_in_batches_in_eval_mode() -> None:
    module = network(1, dropout=0.9).train()
    inputs, labels = blobs(50)
    found = accuracy(module, inputs, labels, batch_size=7)
    assert module.training
    module.eval()
    assert found == (module(inputs).argmax(1) == labels).double().mean().item()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.fill_(torch.nan)
    assert accuracy(module, inputs, labels) == 0.0  # a network that diverged has no answer


def test_the_rate_is_searched_on_validation_data() -> None:
    judge = evaluator(SetTraining(steps=30, drop_at=None))
    images, labels = blobs(6)
    inputs, targets = blobs(30, seed=5)
    found = judge.rate_accuracies(images, labels, inputs, targets, (1e-6, 0.05, 1e4))
    assert list(found) == [1e-6, 0.05, 1e4]
    assert found[0.05] > max(found[1e-6], found[1e4])
    assert judge.search_rate(images, labels, inputs, targets, (1e-6, 0.05, 1e4)) == 0.05
    assert judge.search_rate(images, labels, inputs, targets, (0.06, 0.05, 0.055)) == 0.05  # of equals the smallest
    assert judge.evaluate(images, labels, rate=0.05).rate == 0.05
    with pytest.raises(InputError, match="0 rates"):
        judge.search_rate(images, labels, inputs, targets, ())


# ---- what is refused ------------------------------------------------------------------------------------------------------------


def test_wrong_input_is_told() -> None:
    images, labels = blobs(6)
    soft = SetTraining(steps=1, soft="probabilities")
    for call, said in (
        (lambda: trained(images, labels[:5], PLAIN), "5 targets"),
        (lambda: trained(images, torch.randn(6, CLASSES), soft), "no probabilities"),
        (lambda: trained(images, torch.randn(6, 5), PLAIN), "3 classes apart, the labels 5"),
        (lambda: trained(images, labels + 1, PLAIN), "3 classes apart, the labels 4"),
        (lambda: trained(images, labels - 1, PLAIN), "classes from 0"),
        (lambda: trained(images, labels, PLAIN.model_copy(update={"labels": "dynamic"})), "teacher"),
        (lambda: trained(images, labels, PLAIN, step_size=-0.1), "learning rate"),
        (lambda: trained(images.flatten(1), labels, PLAIN.model_copy(update={"augment": DSASpec()})), r"training\.augment: samples of shape \[16\]"),
        (lambda: trained(images.flatten(1), labels, PLAIN.model_copy(update={"transform": AugmentSpec(flip=True)})), r"training\.transform: samples"),
        (lambda: evaluator(count=0), "0 networks"),
        (lambda: validated(SetTraining, {"optimiser": {"schedule": {"name": "cosine"}}}), "drop_at: null"),
        (lambda: validated(SetTraining, {"transform": {"mixup": 1.0}}), "transform"),
        (lambda: validated(SetTraining, {"epoch": 3}), "epochs"),
    ):
        with pytest.raises(InputError, match=said):
            call()
