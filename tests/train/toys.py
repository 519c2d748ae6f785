"""A small method that uses every part of the contract, for the engine's tests: two players, two phases, noise, dropout, state."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from limbeck.contract import Batch, Clock, Frozen, Method, OptimiserSpec, Paper, Phase, Player, Update, Workbench
from limbeck.data import ArrayData
from limbeck.train import checkpoint as checkpoints


class ToyConfig(Frozen):
    """Knobs of the toy."""

    pause: float = 0.0
    nan_at: int = -1
    critic: bool = True


class Toy(Method):
    """A student fits targets under noise; a critic, stepped twice a batch, guesses the student's error."""

    Config = ToyConfig
    paper = Paper("toy", "", "tests", 2026)
    needs_teacher = False

    def setup(self) -> None:
        torch.manual_seed(0)
        self.critic = nn.Linear(3, 1)
        self.seen = torch.zeros((), dtype=torch.int64)
        self.entered: list[str] = []

    def players(self) -> dict[str, Player]:
        found = {"student": Player(self.student, ema=0.9)}
        return found | ({"critic": Player(self.critic, OptimiserSpec(name="adam", lr=1e-3))} if self.config.critic else {})

    def phases(self) -> list[Phase]:
        return [Phase("first"), Phase("second", steps=9, indices=torch.arange(0, 40, 2))]

    def enter(self, phase: Phase, clock: Clock, bench: Workbench) -> None:
        self.entered.append(phase.name)

    def updates(self, batch: Batch, clock: Clock) -> Iterator[Update]:
        if self.config.pause:
            time.sleep(self.config.pause)
        noise = torch.randn(batch.inputs.shape, generator=clock.generator("noise"))
        out = self.student(batch.inputs + 0.1 * noise)
        assert batch.targets is not None
        targets = batch.targets if batch.targets.ndim == 2 else nn.functional.one_hot(batch.targets, 3).float()
        loss = (out - targets).square().mean()
        if clock.step == self.config.nan_at:
            loss = loss * float("nan")
        yield Update("student", loss, {"largest": out.abs().max()})
        for _ in range(2 if self.config.critic else 0):
            guess = self.critic(self.student(batch.inputs).detach())
            yield Update("critic", (guess - loss.detach()).square().mean())

    def after_step(self, player: str, clock: Clock) -> None:
        self.seen += 1

    def state_dict(self) -> dict[str, Any]:
        return {"seen": self.seen, "entered": list(self.entered)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.seen, self.entered = state["seen"].clone(), list(state["entered"])


def toy_data(count: int = 44) -> ArrayData:
    """Features of 6 numbers in 3 classes."""
    generator = torch.Generator().manual_seed(5)
    inputs = torch.randn(count, 6, generator=generator)
    return ArrayData(inputs, inputs[:, :3].argmax(1), ["a", "b", "c"])


def toy_student(dropout: float = 0.2) -> nn.Module:
    """A small network with batch norm and dropout, always the same weights."""
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(dropout), nn.Linear(8, 3))


def plain_student() -> nn.Module:
    """A small network without batch norm or dropout, always the same weights."""
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))


def weights_of(module: nn.Module) -> dict[str, Tensor]:
    """A copy of the state dict."""
    return {k: v.clone() for k, v in module.state_dict().items()}


def same_folders(a: Path, b: Path) -> None:
    """Assert that two training folders hold the same metrics and checkpoints, bit for bit."""
    assert (a / "metrics.jsonl").read_bytes() == (b / "metrics.jsonl").read_bytes()
    steps = checkpoints.steps(a / "checkpoints")
    assert steps == checkpoints.steps(b / "checkpoints")
    for step in steps:
        one, two = (checkpoints.read(folder / "checkpoints" / f"step-{step}") for folder in (a, b))
        same(one.weights, two.weights)
        same(one.state, two.state)


def same(a: Any, b: Any) -> None:
    """Assert that nested values are equal, tensors bit for bit."""
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            same(a[key], b[key])
    elif isinstance(a, list | tuple):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            same(x, y)
    else:
        assert a == b
