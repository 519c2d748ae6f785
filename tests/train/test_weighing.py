"""Losses that are means over something else than samples: any cut into micro-batches gives the gradient of the whole batch."""

import pytest
import torch
from torch import nn

from limbeck.contract import IGNORE, Batch, Clock, Frozen, Method, OptimiserSpec, Paper, Update
from limbeck.data.arrays import ArrayData
from limbeck.train.config import TrainConfig
from limbeck.train.trainer import Trainer


class Marked(Method):
    """Cross-entropy averaged over the samples that have a label."""

    Config = Frozen
    paper = Paper("", "", "", 0)
    needs_teacher = False
    weighs = True

    def weigh(self, batch: Batch, clock: Clock):
        return (batch.targets != IGNORE).sum() if self.weighs else None

    def updates(self, batch: Batch, clock: Clock):
        total = nn.functional.cross_entropy(self.student(batch.inputs), batch.targets, ignore_index=IGNORE, reduction="sum")
        yield Update("student", total / (batch.targets != IGNORE).sum().clamp(min=1))


def trained(accumulate: int, *, weighs: bool = True) -> torch.Tensor:
    draw = torch.Generator().manual_seed(0)
    targets = torch.randint(0, 3, (24,), generator=draw)
    targets[torch.rand(24, generator=draw) < 0.6] = IGNORE
    torch.manual_seed(1)
    student = nn.Linear(5, 3).double()
    data = ArrayData(torch.randn(24, 5, generator=draw), targets, ["a", "b", "c"])
    data.prepare = lambda raw: raw.double()  # type: ignore[method-assign]
    method = Marked().bind(student=student, train=data, num_classes=3)
    method.weighs = weighs
    config = TrainConfig(steps=6, batch_size=12, accumulate=accumulate, optimiser=OptimiserSpec(name="sgd", lr=0.5, momentum=0.9))
    Trainer(method, data, config, cpu=True, num_classes=3).fit()
    return student.weight.detach().clone()


@pytest.mark.parametrize("parts", [2, 3, 4, 12])
def test_any_cut_gives_the_whole_batchs_steps(parts: int) -> None:
    torch.testing.assert_close(trained(parts), trained(1), rtol=0, atol=1e-7)


def test_means_of_means_are_another_thing() -> None:
    assert not torch.allclose(trained(4, weighs=False), trained(1, weighs=False), atol=1e-3)


def test_a_method_that_does_not_weigh_is_weighed_by_samples() -> None:
    torch.testing.assert_close(trained(1, weighs=False), trained(1))
