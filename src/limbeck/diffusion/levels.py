"""How noise levels are drawn in training (our sheet, §4)."""

from __future__ import annotations

from typing import Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from limbeck.contract import Frozen
from limbeck.diffusion.schedules import NoiseSchedule
from limbeck.errors import InputError


class LevelSpec(Frozen):
    """A distribution of training times.

    index: uniform over a list of `levels` times (`NoiseSchedule.grid`), cut to the part between low and high. lognormal: ln(σ/α) ~ N(mean, std²).
    logit_normal: t = t_min + (t_max − t_min)·sigmoid(N(mean, std²)). uniform: t uniform in [t_min, t_max] (cut as 'index').
    """

    kind: Literal["index", "lognormal", "logit_normal", "uniform"] = "index"
    levels: int = Field(1000, ge=2, le=1_000_000)
    low: float = Field(0.0, ge=0, lt=1, description="'index', 'uniform': the lowest fraction of the list")
    high: float = Field(1.0, gt=0, le=1, description="'index', 'uniform': the highest fraction of the list, itself included")
    mean: float = -1.2
    std: float = Field(1.2, gt=0)
    shift: float = Field(1.0, gt=0, description="t' = s t/(1 + (s − 1) t), for schedules whose times lie in [0, 1]")

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if not self.low < self.high:
            raise ValueError(f"'low' must be below 'high', these are {self.low} and {self.high}.")
        return self

    def sample(self, schedule: NoiseSchedule, count: int, generator: torch.Generator) -> Tensor:
        """[count] float64 times on the generator's device.

        Raises:
            InputError: a shift with a schedule whose times go beyond 1.
        """
        if self.shift != 1 and schedule.t_max > 1:
            raise InputError(f"a shift is for times in [0, 1], and those of '{schedule.name}' go to {schedule.t_max:g}.", where="shift", fix="Leave it at 1.")
        device = generator.device
        if self.kind == "index":
            grid = schedule.kept_grid(self.levels, device)
            first = min(round(self.low * self.levels), self.levels - 1)
            last = min(max(round(self.high * self.levels), first) + 1, self.levels)  # the upper end is drawn too, as in DMD2's code (980 of 1000)
            t = grid[torch.randint(first, last, (count,), generator=generator, device=device)]
        elif self.kind == "uniform":
            u = torch.rand(count, dtype=torch.float64, generator=generator, device=device)
            t = schedule.t_min + (schedule.t_max - schedule.t_min) * (self.low + (self.high - self.low) * u)
        else:
            normal = self.mean + self.std * torch.randn(count, dtype=torch.float64, generator=generator, device=device)
            spread = (schedule.t_max - schedule.t_min) * normal.sigmoid()
            t = schedule.time_of_level(normal.exp()) if self.kind == "lognormal" else schedule.t_min + spread
        if self.shift != 1:
            t = self.shift * t / (1 + (self.shift - 1) * t)
        return t.clamp(schedule.t_min, schedule.t_max)


def default_levels(schedule: NoiseSchedule) -> LevelSpec:
    """What denoisers of this schedule are usually trained on: lognormal(−1.2, 1.2) for EDM, logit-normal(0, 1) for flow, uniform else."""
    if schedule.name == "edm":
        return LevelSpec(kind="lognormal")
    if schedule.name == "flow":
        return LevelSpec(kind="logit_normal", mean=0.0, std=1.0)
    return LevelSpec(kind="uniform")
