"""Phases without data, what a method notices on the way, the generator's average, RAdam."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import pytest
import torch
from torch import Tensor, nn

from limbeck.contract import Batch, Clock, Method, OptimiserSpec, Paper, Phase, Player, Update
from limbeck.errors import Interrupted
from limbeck.optimise import build_optimiser
from limbeck.train import TrainConfig, Trainer


class Untouchable:
    """Data that must not be looked at: their length is all there is."""

    classes: Sequence[str] = ()

    @property
    def targets(self) -> Tensor | None:
        raise AssertionError("the targets were looked at")

    def __len__(self) -> int:
        return 20

    def fetch(self, ids_B: Tensor, *, seed: int = 0, epoch: int = 0) -> tuple[Tensor, Tensor | None]:
        raise AssertionError("a sample was fetched")

    def prepare(self, raw: Tensor) -> Tensor:
        raise AssertionError("a sample was prepared")


class Dreaming(Method):
    """A student that learns from noise alone, under the name of a generator."""

    paper = Paper("toy", "", "tests", 2026)
    needs_teacher = False
    produces = "generator"

    def setup(self) -> None:
        self.sizes: list[int] = []
        self.rows: list[dict[str, float]] = []

    def players(self) -> Mapping[str, Player]:
        return {"generator": Player(self.student)}

    def phases(self) -> list[Phase]:
        return [Phase("dream", data_free=True)]

    def updates(self, batch: Batch, clock: Clock) -> Iterator[Update]:
        self.sizes.append(len(batch))
        assert batch.inputs.shape == (len(batch), 0)
        assert batch.targets is None
        noise = torch.randn(len(batch), 2, generator=clock.generator("noise"))
        yield Update("generator", self.student(noise).square().mean())

    def notice(self, row: Mapping[str, float]) -> Sequence[str]:
        self.rows.append(dict(row))
        return ["always said"] + (["said late"] if row["progress"] > 0.5 else [])


def trained(folder=None, stop_at: int | None = None, **settings) -> tuple[Dreaming, Trainer]:
    torch.manual_seed(0)
    method = Dreaming().bind(student=nn.Linear(2, 1))
    config = TrainConfig(steps=8, batch_size=8, log_every=2, checkpoint_steps=2, optimiser=OptimiserSpec(name="radam", lr=0.1), **settings)
    trainer = Trainer(method, Untouchable(), config, folder=folder)
    if stop_at is not None:
        inner = method.updates

        def stopping(batch: Batch, clock: Clock) -> Iterator[Update]:
            trainer._signal = 15 if clock.step == stop_at else trainer._signal
            yield from inner(batch, clock)

        method.updates = stopping  # type: ignore[method-assign]
    return method, trainer


def test_a_data_free_phase_fetches_nothing_and_has_batches_of_the_same_sizes():
    method, trainer = trained()
    trainer.fit()
    assert method.sizes == [8, 8, 4, 8, 8, 4, 8, 8]


def test_what_is_noticed_is_kept_once_and_said(capsys, tmp_path):
    from limbeck.train.progress import Plain

    method, trainer = trained(tmp_path)
    trainer.progress = Plain()
    found = trainer.fit()
    assert found.notes == ["always said", "said late"]
    assert capsys.readouterr().err.count("always said") == 1
    assert [row["progress"] for row in method.rows] == [0.25, 0.5, 0.75, 1.0]
    assert all("generator/loss" in row for row in method.rows)


def test_notices_survive_a_restart(tmp_path):
    _, trainer = trained(tmp_path, stop_at=5)
    with pytest.raises(Interrupted):
        trainer.fit()
    assert trainer.notes == ["always said", "said late"]
    method, trainer = trained(tmp_path)
    method.notice = lambda row: ()  # type: ignore[method-assign]
    assert trainer.fit().notes == ["always said", "said late"]


def test_a_data_free_run_that_stopped_ends_as_one_that_did_not(tmp_path):
    whole, trainer = trained(tmp_path / "a")
    trainer.fit()
    _, trainer = trained(tmp_path / "b", stop_at=3)
    with pytest.raises(Interrupted):
        trainer.fit()
    again, trainer = trained(tmp_path / "b")
    trainer.fit()
    for name, value in whole.student.state_dict().items():
        assert torch.equal(value, again.student.state_dict()[name])
    assert (tmp_path / "a" / "metrics.jsonl").read_bytes() == (tmp_path / "b" / "metrics.jsonl").read_bytes()


def test_micro_batches_of_nothing():
    method, trainer = trained(accumulate=2)
    trainer.fit()
    assert method.sizes[:4] == [4, 4, 4, 4]


def test_the_recipes_average_is_of_the_generator():
    plain, trainer = trained()
    trainer.fit()
    averaged, trainer = trained(ema=0.9)
    trainer.fit()
    assert not torch.equal(plain.student.weight, averaged.student.weight)


def test_radam_is_torchs():
    parameter = nn.Parameter(torch.ones(3))
    made = build_optimiser([parameter], OptimiserSpec(name="radam", lr=0.1, betas=(0.5, 0.9)))
    assert isinstance(made, torch.optim.RAdam)
    assert made.defaults["betas"] == (0.5, 0.9)
