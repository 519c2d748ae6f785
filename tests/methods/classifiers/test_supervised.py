"""Training on labels alone."""

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from limbeck.contract import IGNORE, Batch, Clock
from limbeck.errors import InputError
from limbeck.methods import Supervised


@dataclass
class Labels:
    """A training set of which only the labels are looked at."""

    targets: torch.Tensor | None


def one_update(method: Supervised, batch: Batch):
    (update,) = method.updates(batch, Clock())
    assert update.player == "student"
    return update


def test_loss_is_cross_entropy_with_smoothing() -> None:
    student, x, y = nn.Linear(4, 3), torch.randn(6, 4), torch.tensor([0, 1, 2, 0, 1, 2])
    update = one_update(Supervised(label_smoothing=0.1).bind(student=student), Batch(x, y))
    torch.testing.assert_close(update.loss, F.cross_entropy(student(x), y, label_smoothing=0.1))


def test_unlabelled_samples_change_nothing() -> None:
    student, x, y = nn.Linear(4, 3), torch.randn(6, 4), torch.tensor([0, IGNORE, 2, IGNORE, 1, 2])
    method = Supervised().bind(student=student)
    alone = one_update(method, Batch(x[y != IGNORE], y[y != IGNORE])).loss
    torch.testing.assert_close(one_update(method, Batch(x, y)).loss, alone)
    assert one_update(method, Batch(x, torch.full((6,), IGNORE))).loss.item() == 0.0


def test_mixed_targets_are_taken() -> None:
    student, x, y = nn.Linear(4, 3), torch.randn(6, 4), torch.softmax(torch.randn(6, 3), -1)
    update = one_update(Supervised().bind(student=student), Batch(x, y))
    torch.testing.assert_close(update.loss, F.cross_entropy(student(x), y))


def test_a_loop_of_ones_own_learns() -> None:
    torch.manual_seed(0)
    x = torch.randn(200, 2)
    y = (x[:, 0] > x[:, 1]).long()
    student = nn.Linear(2, 2)
    method = Supervised().bind(student=student)
    optimiser = torch.optim.SGD(student.parameters(), lr=1.0)
    for _ in range(50):
        for update in method.updates(Batch(x, y), Clock()):
            update.loss.backward()
            optimiser.step()
            optimiser.zero_grad()
    assert (student(x).argmax(-1) == y).float().mean() > 0.97


def test_it_needs_labels_and_no_teacher() -> None:
    assert Supervised.needs_labels
    assert not Supervised.needs_teacher
    for targets in (None, torch.full((5,), IGNORE)):
        with pytest.raises(InputError, match="no training sample has one"):
            Supervised().bind(student=nn.Linear(1, 1), train=Labels(targets))
    Supervised().bind(student=nn.Linear(1, 1), train=Labels(torch.tensor([IGNORE, 0])))


def test_a_wrong_knob_is_named() -> None:
    with pytest.raises(InputError, match="label_smoothing"):
        Supervised(label_smoothing=1.5)
    with pytest.raises(InputError, match="Did you mean 'label_smoothing'"):
        Supervised(label_smooth=0.1)
