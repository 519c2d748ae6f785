"""What the claim of DisBack (2408.15991) measures on the way: MMD² of the student against passes through networks, stage 1 included."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from limbeck import seeds
from limbeck.contract import Clock
from limbeck.diffusion.distribution import normal
from limbeck.diffusion.generator import TeacherSampler
from limbeck.errors import InputError
from limbeck.evaluate.samples import median_bandwidth, mmd2
from limbeck.methods.generators.disback import DisBack, DisBackConfig
from limbeck.modes import evaluating

FLOOR = 1e-4
"""MMD² below this counts as this: the estimate is unbiased, and below 0 by chance."""


class TracedDisBackConfig(DisBackConfig):
    """Knobs of `TracedDisBack`."""

    trace_every: int = Field(50, ge=1, description="generator updates between two points of the curve")
    trace_samples: int = Field(1000, ge=2, description="samples of the student, of the teacher and of the test set")
    teacher_steps: int = Field(18, ge=1, description="of Heun's sampler, for the teacher's own MMD²")
    goal: float = Field(0.05, gt=0, description="the MMD² to be reached (the sheet's twice the teacher's own is lost in the noise where the teacher is good)")
    horizon: int = Field(14_000, ge=1, description="passes over which the area under log10 MMD² is taken")


class TracedDisBack(DisBack):
    """DisBack that also notes MMD² on a fixed set of noises against fixed test samples. It trains exactly as `DisBack` does."""

    Config: ClassVar[type[DisBackConfig]] = TracedDisBackConfig

    def setup(self) -> None:
        """Fix the noises. Raises InputError: there are no test samples."""
        super().setup()
        if self.test is None:
            raise InputError("the curve is measured against test samples, and there are none.", where="data")
        ids = torch.arange(min(self.config.trace_samples, len(self.test)))
        self.real = self.test.prepare(self.test.fetch(ids)[0])
        self.noise = normal(self.config.trace_samples, self.generator.shape, seeds.generator(0, "trace"))
        self.points: list[tuple[int, Tensor]] = [(0, self.sampled())]

    @torch.no_grad()
    def sampled(self) -> Tensor:
        """The student's samples on the fixed noises, in network units, in main memory."""
        parameter = next(self.generator.parameters())
        with evaluating(self.generator):
            return self.generator(self.noise.to(parameter.device), self.generator.conditions(len(self.noise))).cpu()

    def after_step(self, player: str, clock: Clock) -> None:
        """A point of the curve, now and then."""
        super().after_step(player, clock)
        if player == "generator" and (clock.step + 1) % self.config.trace_every == 0:
            self.points.append((sum(self.passes.values()), self.sampled()))

    def facts(self) -> dict[str, Any]:
        """Those of `DisBack`; the curve, and in `metrics` what is read off it."""
        found, config = super().facts(), self.config
        bandwidth = median_bandwidth(self.real.flatten(1))
        curve = [(passes, mmd2(self.real.flatten(1), x.flatten(1), bandwidth=bandwidth)) for passes, x in self.points]
        sampler = TeacherSampler(self.denoiser_teacher, config.teacher_steps)
        with torch.no_grad():
            device = next(self.generator.parameters()).device
            own = sampler(self.noise.to(device), sampler.conditions(len(self.noise))).cpu()
        needed = passes_to(curve, config.goal)
        metrics = {
            "traced_teacher": mmd2(self.real.flatten(1), own.flatten(1), bandwidth=bandwidth),
            "reached": float(needed is not None),
            "passes_to_goal": float(curve[-1][0] if needed is None else needed),
            "log_area": log_area(curve, config.horizon),
            "traced_last": curve[-1][1],
        }
        return {**found, "curve": curve, "metrics": {**found["metrics"], **metrics}}

    def state_dict(self) -> dict[str, Any]:
        """With the points so far."""
        return super().state_dict() | {"points": [[passes, x] for passes, x in self.points]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put them back."""
        super().load_state_dict(state)
        self.points = [(int(passes), x) for passes, x in state["points"]]


def passes_to(curve: Sequence[tuple[int, float]], goal: float) -> int | None:
    """The first passes at which the curve is at the goal or below; None: never."""
    return next((passes for passes, value in curve if value <= goal), None)


def log_area(curve: Sequence[tuple[int, float]], horizon: int) -> float:
    """Mean of log10 MMD² over the first `horizon` passes (trapezia; the last value holds where the curve ends before). Values below FLOOR count as FLOOR."""
    logs = [(passes, math.log10(max(value, FLOOR))) for passes, value in curve]
    if logs[-1][0] < horizon:
        logs.append((horizon, logs[-1][1]))
    total = 0.0
    for (left, a), (right, b) in pairwise(logs):
        if left >= horizon:
            break
        end = min(right, horizon)
        height = a + (b - a) * (end - left) / (right - left) if right > left else b
        total += (end - left) * (a + height) / 2
    return total / horizon
