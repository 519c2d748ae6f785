"""Hinton's distillation as a method: its loss, its parts, whom its gradient reaches."""

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from limbeck.contract import IGNORE, Batch, Clock
from limbeck.errors import InputError
from limbeck.losses import hinton
from limbeck.methods import KD


@dataclass
class Frozen:
    """A teacher that is one module."""

    module: nn.Module

    def logits(self, batch: Batch) -> Tensor:
        with torch.no_grad():
            return self.module(batch.inputs)

    def all_logits(self, batch: Batch) -> Tensor:
        return self.logits(batch)[None]


@dataclass
class Labels:
    targets: torch.Tensor | None


@pytest.fixture
def bound():
    torch.manual_seed(0)
    return nn.Linear(4, 3), Frozen(nn.Linear(4, 3)), Batch(torch.randn(6, 4), torch.tensor([0, 1, 2, IGNORE, 1, IGNORE]))


@pytest.mark.parametrize("reduction", ["batchmean", "code"])
def test_the_update_is_hintons_loss_with_its_parts(bound, reduction) -> None:
    student, teacher, batch = bound
    method = KD(temperature=3.0, weight=0.7, reduction=reduction).bind(student=student, teacher=teacher)
    (update,) = method.updates(batch, Clock())
    assert update.player == "student"
    torch.testing.assert_close(update.loss, hinton(student(batch.inputs), teacher.logits(batch), batch.targets, 3.0, 0.7, reduction))
    torch.testing.assert_close(update.metrics["soft"] * 0.7 + update.metrics["hard"] * 0.3, update.loss)
    torch.testing.assert_close(update.metrics["hard"], F.cross_entropy(student(batch.inputs), batch.targets, ignore_index=IGNORE))


def test_defaults_are_temperature_4_and_weight_09() -> None:
    assert KD().config.model_dump() == {"temperature": 4.0, "weight": 0.9, "reduction": "batchmean"}


def test_with_weight_1_labels_have_no_effect_and_with_weight_0_the_teacher_has_none(bound) -> None:
    student, teacher, batch = bound
    soft = KD(weight=1.0).bind(student=student, teacher=teacher)
    losses = [next(soft.updates(Batch(batch.inputs, y), Clock())).loss for y in (batch.targets, batch.targets.flip(0), None)]
    assert losses[0] == losses[1] == losses[2]
    hard = KD(weight=0.0).bind(student=student, teacher=teacher)
    before = next(hard.updates(batch, Clock())).loss
    nn.init.ones_(teacher.module.weight)
    assert next(hard.updates(batch, Clock())).loss == before


def test_the_gradient_reaches_the_student_alone(bound) -> None:
    student, teacher, batch = bound
    (update,) = KD().bind(student=student, teacher=teacher).updates(batch, Clock())
    update.loss.backward()
    assert student.weight.grad.abs().sum() > 0
    assert all(p.grad is None for p in teacher.module.parameters())


def test_a_loop_of_ones_own_brings_the_student_to_the_teacher(bound) -> None:
    student, teacher, batch = bound
    method = KD(temperature=2.0, weight=1.0).bind(student=student, teacher=teacher)
    optimiser = torch.optim.SGD(student.parameters(), lr=0.5)
    for _ in range(300):
        for update in method.updates(batch, Clock()):
            update.loss.backward()
            optimiser.step()
            optimiser.zero_grad()
    torch.testing.assert_close(student(batch.inputs).softmax(-1), teacher.logits(batch).softmax(-1), atol=5e-3, rtol=0)


def test_labels_are_required_only_where_they_are_all_there_is() -> None:
    unlabelled = Labels(torch.full((5,), IGNORE))
    with pytest.raises(InputError, match="weight 0"):
        KD(weight=0.0).bind(student=nn.Linear(1, 1), teacher=Frozen(nn.Linear(1, 1)), train=unlabelled)
    KD(weight=0.5).bind(student=nn.Linear(1, 1), teacher=Frozen(nn.Linear(1, 1)), train=unlabelled)


def test_wrong_input_is_named() -> None:
    with pytest.raises(InputError, match="needs a teacher"):
        KD().bind(student=nn.Linear(1, 1))
    for knobs in ({"temperature": 0.0}, {"temperature": -1}, {"weight": 1.1}, {"temperature": float("nan")}, {"reduction": "sum"}):
        with pytest.raises(InputError, match=next(iter(knobs))):
            KD(**knobs)
