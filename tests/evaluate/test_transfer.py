"""Pre-training by regression, the swap of the head, fine-tuning, probing: exact, repeatable, and it helps where it must."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from limbeck import seeds
from limbeck.components import Component
from limbeck.data.augment import AugmentSpec
from limbeck.errors import InputError
from limbeck.evaluate.transfer import (
    FineTuning,
    Pretraining,
    Probing,
    Task,
    TransferSpec,
    few_labels,
    fine_tune,
    held_out_loss,
    pretrain,
    probe,
    transfer,
)
from limbeck.models import build_model
from limbeck.synthetic.krr import ridge_loss
from limbeck.synthetic.pool import frozen_features

QUICK = TransferSpec(
    pretraining=Pretraining(epochs=60, lr=0.05, weight_decay=0.0),
    fine_tuning=FineTuning(steps=40, batch_size=32, augment=AugmentSpec()),
    probing=Probing(steps=60, batch_size=32),
)


def small(seed: int) -> nn.Module:
    return build_model(Component(name="cnn", args={"widths": [6]}), num_classes=10, input_shape=(1, 6, 6), seed=seed)


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=seeds.generator(seed))


def task(seed: int = 0, count: int = 40) -> Task:
    """Two classes that differ in the sign of a pattern, under noise."""
    pattern, labels = drawn(99, 1, 6, 6), torch.arange(count) % 2
    x = drawn(seed, 2 * count, 1, 6, 6) + 0.8 * pattern * (2.0 * labels.repeat(2) - 1).view(-1, 1, 1, 1)
    return Task(x[:count], labels, x[count:], labels, 2)


def state(network: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in network.state_dict().items()}


def test_pretraining_is_sgd_on_the_mean_square_over_all_entries() -> None:
    """Against a loop written out: full batch, train mode, no augmentation, a fresh head, constant rate."""
    x, y = drawn(0, 12, 1, 6, 6), drawn(1, 12, 4)
    network = small(0)
    spec = Pretraining(epochs=3, lr=0.05, momentum=0.9, weight_decay=1e-3)
    last = pretrain(network, x, y, spec, seed=7)
    again = small(0)
    pretrain(again, x, y, Pretraining(epochs=1, lr=1e-12, momentum=0.0), seed=7)  # what the head starts as
    by_hand = small(0)
    by_hand.head = again.head
    optimiser = torch.optim.SGD(by_hand.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3)
    by_hand.train()
    for _ in range(3):
        loss = ((by_hand(x) - y) ** 2).sum() / (12 * 4)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert last == pytest.approx(float(loss.detach()), rel=1e-5)
    for name, value in by_hand.state_dict().items():
        torch.testing.assert_close(network.state_dict()[name], value, rtol=1e-4, atol=1e-6)
    assert not network.training


def test_batches_are_near_equal_and_cover_all() -> None:
    """65 pairs in batches of at most 32: 22, 22, 21, never one alone."""
    seen: list[int] = []

    class Watched(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            seen.append(len(x))
            return self.head(x)

    pretrain(Watched(), drawn(0, 65, 2), drawn(1, 65, 3), Pretraining(epochs=2, batch_size=32), seed=0)
    assert seen == [22, 22, 21] * 2


def test_all_but_the_head_is_carried_over() -> None:
    network, t = small(0), task()
    pretrain(network, drawn(0, 8, 1, 6, 6), drawn(1, 8, 4), QUICK.pretraining, 0)
    before = state(network)
    probe(network, t.inputs, t.labels, 2, QUICK.probing, 0)
    after = network.state_dict()
    assert after["head.weight"].shape == (2, 54)
    for name, value in before.items():
        assert name.startswith("head.") or torch.equal(after[name], value), name  # a probe changes nothing else, statistics included
    fine_tune(network, t.inputs, t.labels, 2, QUICK.fine_tuning, 0)
    assert not torch.equal(network.state_dict()["features.0.weight"], before["features.0.weight"])


def test_a_probe_is_logistic_regression() -> None:
    network, t = small(0).eval(), task()
    features, spec = frozen_features(network, t.inputs).detach(), Probing(steps=400, batch_size=512, lr=0.2)
    probe(network, t.inputs, t.labels, 2, spec, 0)
    found = F.cross_entropy(network(t.inputs), t.labels)
    head = nn.Linear(54, 2)
    optimiser = torch.optim.LBFGS(head.parameters(), max_iter=200)

    def closure() -> Tensor:
        optimiser.zero_grad()
        loss = F.cross_entropy(head(features), t.labels)
        loss.backward()
        return loss

    optimiser.step(closure)
    assert float(found.detach()) == pytest.approx(float(closure().detach()), abs=0.02)


@pytest.mark.parametrize("mode", ["fine_tune", "probe"])
def test_it_is_a_function_of_its_seed_and_leaves_the_global_generator_alone(mode) -> None:
    spec, pairs = QUICK.model_copy(update={"mode": mode}), (drawn(0, 8, 1, 6, 6), drawn(1, 8, 4))
    kept = copy.deepcopy(pairs)
    torch.manual_seed(1)
    one = transfer(pairs, small, task(), spec, 5)
    expected = torch.rand(2)
    torch.manual_seed(1)
    assert torch.equal(torch.rand(2), expected)
    assert transfer(pairs, small, task(), spec, 5) == one
    assert transfer(pairs, small, task(), spec, 6) != one
    assert all(torch.equal(a, b) for a, b in zip(pairs, kept, strict=True))
    assert transfer(None, small, task(), spec, 5).regression is None


def test_pairs_that_tell_of_the_task_help() -> None:
    """Vectors that are the pattern's strength: with two labels a class the head finds what it needs."""
    whole = task(3, 200)
    x = drawn(8, 256, 1, 6, 6)
    y = (x * drawn(99, 1, 6, 6)).sum((1, 2, 3))[:, None].expand(-1, 3) / 6
    few = Task(whole.inputs[:4], whole.labels[:4], whole.test_inputs, whole.test_labels, 2)
    spec = QUICK.model_copy(update={"mode": "probe", "pretraining": Pretraining(epochs=200, lr=0.05)})
    with_pairs = sum(transfer((x, y), small, few, spec, s).accuracy for s in range(3)) / 3
    without = sum(transfer(None, small, few, spec, s).accuracy for s in range(3)) / 3
    assert with_pairs > without + 0.1


def test_fine_tuning_ends_at_a_rate_of_0_and_augments() -> None:
    t, rates = task(), []
    original = torch.optim.SGD.step

    def watched(self, closure=None):
        rates.append(self.param_groups[0]["lr"])
        return original(self, closure)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.SGD, "step", watched)
        plain = small(0)
        fine_tune(plain, t.inputs, t.labels, 2, QUICK.fine_tuning, 0)
    assert rates[0] == 0.01
    assert rates[20] == pytest.approx(0.005)
    assert 0 < rates[-1] < 1e-4
    other = small(0)
    fine_tune(other, t.inputs, t.labels, 2, QUICK.fine_tuning.model_copy(update={"augment": AugmentSpec(crop=1, flip=True)}), 0)
    assert not torch.equal(other.state_dict()["features.0.weight"], plain.state_dict()["features.0.weight"])


def test_j_on_held_out_images() -> None:
    networks, x, y, real, answers = [small(0).eval(), small(1).eval()], drawn(0, 8, 1, 6, 6), drawn(1, 8, 4), drawn(2, 600, 1, 6, 6), drawn(3, 600, 4)
    networks[0].train()
    before = state(networks[0])
    found = held_out_loss((x, y), real, answers, networks)
    assert networks[0].training
    assert all(torch.equal(value, before[name]) for name, value in networks[0].state_dict().items())
    each = [ridge_loss(frozen_features(n.eval(), x), y, frozen_features(n, real), answers) for n in networks]
    assert found == pytest.approx(float(torch.stack(each).mean().detach()), rel=1e-5)


def test_few_labels() -> None:
    labels = torch.arange(60) % 3
    found = few_labels(labels, 4, 3, seed=0)
    assert labels[found].tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert len(found.unique()) == 12
    assert not torch.equal(found, few_labels(labels, 4, 3, seed=1))
    with pytest.raises(InputError, match="class 2 has 0 samples"):
        few_labels(labels[labels < 2], 4, 3, seed=0)


def test_wrong_input() -> None:
    with pytest.raises(InputError, match="are no pairs"):
        pretrain(small(0), drawn(0, 8, 1, 6, 6), drawn(1, 7, 4), QUICK.pretraining, 0)
    t = task()
    with pytest.raises(InputError, match="none of the 1 classes"):
        Task(t.inputs, t.labels, t.test_inputs, t.test_labels, 1)
    with pytest.raises(InputError, match="Unlabelled"):
        Task(t.inputs, t.labels - 100, t.test_inputs, t.test_labels, 2)
    with pytest.raises(InputError, match="40 training inputs and 39 labels"):
        Task(t.inputs, t.labels[1:], t.test_inputs, t.test_labels, 2)
