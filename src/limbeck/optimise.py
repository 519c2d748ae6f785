"""Optimisers and schedules. The learning rate is a pure function of the step, so that a restart needs no scheduler state."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import nn

from limbeck.contract import OptimiserSpec, ScheduleSpec


def build_optimiser(parameters: Iterable[nn.Parameter], spec: OptimiserSpec) -> torch.optim.Optimizer:
    """A torch optimiser over the parameters."""
    params = list(parameters)
    if spec.name == "sgd":
        nesterov = spec.nesterov and spec.momentum > 0
        return torch.optim.SGD(params, lr=spec.lr, momentum=spec.momentum, nesterov=nesterov, weight_decay=spec.weight_decay)
    kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW, "radam": torch.optim.RAdam}[spec.name]
    return kind(params, lr=spec.lr, betas=spec.betas, eps=spec.eps, weight_decay=spec.weight_decay)


def factor(schedule: ScheduleSpec, step: int, steps: int) -> float:
    """What the base rate is multiplied by at batch `step` (from 0) of `steps`.

    Warm-up rises linearly to 1 over the first `warmup` of the phase; cosine and linear then fall to `final` at the phase's end.
    """
    rising = schedule.warmup * steps
    if step < rising:
        return (step + 1) / (rising + 1)
    done = (step - rising) / max(steps - rising, 1e-9)
    if schedule.name == "cosine":
        return schedule.final + (1 - schedule.final) * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))
    if schedule.name == "linear":
        return schedule.final + (1 - schedule.final) * (1 - min(done, 1.0))
    if schedule.name == "step":
        return float(schedule.gamma ** sum(step >= milestone * steps for milestone in schedule.milestones))
    return 1.0


def set_rate(optimiser: torch.optim.Optimizer, spec: OptimiserSpec, step: int, steps: int) -> float:
    """Set the rate for this step; returns it."""
    rate = spec.lr * factor(spec.schedule, step, steps)
    for group in optimiser.param_groups:
        group["lr"] = rate
    return rate
