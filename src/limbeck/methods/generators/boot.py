"""BOOT: Data-free Distillation of Denoising Diffusion Models with Bootstrapping (Gu, Zhai, Zhang, Liu, Susskind; arXiv 2306.05544).

A one-call generator learnt without any data. Unlike consistency models the student starts from the noise end: it is given the noise ε of a whole DDIM path
and a time, and answers with that path's signal y_t = (x_t − σ_t ε)/α_t, which it learns from its own answer at a noisier time.

Legend: g the student, f the teacher's denoiser (guided: f̃), sg stop-gradient, λ = log(σ/α); per step, ε ~ N(0, I), condition c and t drawn, s = t − δ:
    ŷ_t  = sg g(ε, t),  x̂_t = α_t ŷ_t + σ_t ε                                    the student's own path, no data
    L_BS = mean w ‖ g(ε, s) − sg[ŷ_t + k (f(x̂_t, t) − ŷ_t)] ‖²,  k = 1 − e^{λ_s − λ_t}    (4)
    L_BC = mean ‖ g(ε, t_max) − sg f(x_T, t_max) ‖²                              (5)
    L    = L_BS + β L_BC;   f̃ = f_∅ + κ (f_c − f_∅), κ ~ U[κ_min, κ_max] per sample, which g is told (6)
Equation numbers are those of our sheet. No code was published and the method section was not available: the algorithm follows the abstracts, reviews and a
third party's flow version (yuanzhi-zhu/OFTSR); all defaults are ours.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from limbeck import seeds
from limbeck.contract import Batch, Clock, Frozen, Paper, Phase, Player, Update
from limbeck.diffusion import samplers, signal
from limbeck.diffusion.denoisers import NetworkDenoiser
from limbeck.diffusion.distribution import normal, random_labels
from limbeck.diffusion.generator import data_scale
from limbeck.errors import InputError
from limbeck.methods.generators._base import GeneratorMethod, same_weights

_LOOK = 64  # paths of the teacher that say how far samples should spread
_LOOK_STEPS = 10


class BootConfig(Frozen):
    """Knobs of `Boot`. Fractions of the range are of the way from t_min to t_max (see `signal.time_at`)."""

    delta: float = Field(0.04, gt=0, lt=0.5, description="δ, the step from t to s, a fraction of the range (ours; the paper's was not recovered)")
    final_delta: float | None = Field(None, gt=0, lt=0.5, description="δ at the end of training, reached geometrically; null: it stays")
    boundary_weight: float = Field(0.1, ge=0, le=1e6, description="β (OFTSR; the paper's was not recovered)")
    boundary_share: float = Field(0.25, ge=0, le=1, description="part of the batch on which L_BC is taken")
    weight: signal.Weight = Field("unit", description="w: 1, 1/δ² (the sheet's (4), the same up to a constant), or 1/max(k, cap)²")
    cap: float = Field(0.05, gt=0, le=1, description="'inverse_k': the least k that is divided by (ours)")
    end_share: float = Field(0.25, ge=0, le=1, description="part of the batch whose s is t_min, the one time that sampling uses (ours)")
    solver: signal.Solver = Field("euler", description="'heun' asks the teacher again at s and takes the mean: second order, twice the calls")
    space: signal.Space = Field("signal", description="what g puts out: y_t, or x_t ('noisy', a comparison that loses)")
    guidance_scale: float = Field(1.0, ge=0, le=100, description="κ of the teacher; with a range, the κ that the artefact samples at")
    guidance_range: tuple[float, float] | None = Field(None, description="κ_min, κ_max: drawn per sample and told to g; null: guidance_scale for all")
    start: Literal["teacher", "fresh"] = Field("teacher", description="the student's first weights: the teacher's, or those that it has")

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.guidance_range is not None and not 0 <= self.guidance_range[0] <= self.guidance_scale <= self.guidance_range[1] != self.guidance_range[0]:
            raise ValueError("'guidance_range' must rise from 0 or more, and hold 'guidance_scale'.")
        return self


class Boot(GeneratorMethod):
    """The signal along a teacher's deterministic path, bootstrapped from the noise down; data-free, strictly one call."""

    Config = BootConfig
    paper: ClassVar[Paper] = Paper(
        "Data-free Distillation of Diffusion Models with Bootstrapping", "2306.05544", "ICML", 2024,
        reconstructed="the equations of the method section (derived from the abstracts, reviews and a third party's code), all hyper-parameters",
    )  # fmt: skip
    example_model = "{name: mlp_denoiser, widths: [64, 64], schedule: cosine, precondition: none}"

    def setup(self) -> None:
        """The signal generator around the student. Raises InputError: student and teacher do not fit."""
        self.teacher_calls = 0
        super().setup()

    def make_generator(self) -> signal.SignalGenerator:
        """The student, which must be a network that denoises as the teacher's schedule has it. Raises InputError."""
        student, teacher, config = self.student, self.denoiser_teacher, self.config
        if not isinstance(student, NetworkDenoiser):
            what = f"'boot' trains a denoiser's network, the student is {type(student).__name__}."
            raise InputError(what, where="student.model", fix="Use mlp_denoiser, say.")
        if (student.schedule, student.shape, student.num_classes) != (teacher.schedule, teacher.shape, teacher.num_classes):
            what = f"the student's {student.schedule}, shape and classes are not the teacher's {teacher.schedule}, shape and classes."
            raise InputError(what, where="student.model", fix="Leave the student out of the recipe, or build it alike.")
        if not teacher.num_classes and config.guidance_range is not None:
            raise InputError("guidance needs a teacher with classes.", where="method.guidance_range", fix="Leave it out.")
        if config.start == "teacher":
            same_weights(student, teacher)
        scale = data_scale(self.train_data, teacher.shape)
        self.g = signal.SignalGenerator(
            student, guidance_range=config.guidance_range, guidance_scale=config.guidance_scale, space=config.space, scale=scale
        )  # fmt: skip
        return self.g

    def players(self) -> Mapping[str, Player]:
        """The generator: the student's network and, with a range of guidance, the embedding of κ."""
        return {"generator": Player(self.g)}

    def phases(self) -> Sequence[Phase]:
        """One, without data."""
        return [Phase(data_free=True)]

    # ---- the step -------------------------------------------------------------------------------------------------

    def updates(self, batch: Batch, clock: Clock) -> Iterator[Update]:
        """One update of the generator."""
        config, schedule, count, random = self.config, self.guided.schedule, len(batch), clock.generator("noise")
        noise, cond = normal(count, self.g.shape, random), random_labels(count, self.g.num_classes, random)
        scale = self.draw_scale(count, random)
        delta, ended = signal.annealed(config.delta, config.final_delta, clock.progress), round(config.end_share * count)
        t, s = (signal.time_at(schedule, place) for place in signal.draw_places(count, delta, ended, random))
        top = round(config.boundary_share * count) if config.boundary_weight else 0  # L_BC is taken on the last `top` samples
        rows = torch.arange(count + top, device=t.device)
        rows = torch.where(rows < count, rows, rows - top)
        noises, conds, scales = noise[rows], None if cond is None else cond[rows], None if scale is None else scale[rows]
        t_top = t.new_full((top,), schedule.t_max)

        with torch.no_grad():
            known = self.g.signal(noise, t, cond, scale)
            x_t = signal.noisy(schedule, known, noise, t, config.space)
            f, f_top = self.predict(torch.cat([x_t, self.g.start(noises[count:])]), torch.cat([t, t_top]), conds, scales).split([count, top])

            def predict(x: Tensor, time: Tensor) -> Tensor:
                return self.predict(x, time, cond, scale)

            target = signal.bootstrap_target(predict, schedule, known, f, noise, t, s, config.solver, config.space)
            target_top = signal.of_signal(schedule, f_top, noises[count:], t_top, config.space)
        g, g_top = self.g.signal(noises, torch.cat([s, t_top]), conds, scales).split([count, top])

        weight = signal.loss_weight(signal.signal_rate(schedule, t, s), delta, config.weight, config.cap)
        loss = bootstrap = signal.bootstrap_loss(g, target, weight)
        metrics = {"bootstrap": bootstrap} | (self.watched(g[:ended]) if ended > 1 else {})
        if top:
            metrics["boundary"] = boundary = signal.boundary_loss(g_top, target_top)
            loss = bootstrap + config.boundary_weight * boundary
        yield Update("generator", loss, metrics)

    def draw_scale(self, count: int, random: torch.Generator) -> Tensor | None:
        """[B] κ uniform in the range, float64; None without one."""
        if self.config.guidance_range is None:
            return None
        low, high = self.config.guidance_range
        return low + (high - low) * torch.rand(count, dtype=torch.float64, generator=random, device=random.device)

    @torch.no_grad()
    def predict(self, x_t: Tensor, t: Tensor, cond: Tensor | None, scale: Tensor | None) -> Tensor:
        """f̃(x_t, t): the guided teacher, never clipped (a clipped x̂0 breaks the linear step). Calls are counted, both halves of guidance."""
        both = scale is not None or self.guided.scale not in (0.0, 1.0)
        self.teacher_calls += len(x_t) * (2 if both else 1)
        return self.guided(x_t, t, cond, scale=scale)

    # ---- what comes out -------------------------------------------------------------------------------------------

    def expected_spread(self) -> float | None:
        """The spread of a few samples of the teacher, in network units: there are no data to look at."""
        if self.spread is None:
            device = next(self.g.parameters()).device
            random, schedule = seeds.generator(self.seed, "spread", device=device), self.guided.schedule
            noise, cond = normal(_LOOK, self.g.shape, random), random_labels(_LOOK, self.g.num_classes, random)
            with torch.no_grad():
                x = samplers.ddim(self.guided, schedule.start(noise, samplers.at(schedule.t_max, noise)), schedule.steps(_LOOK_STEPS), cond)
            self.spread = float(x.flatten(1).std(0).mean())
        return self.spread

    def facts(self) -> dict[str, Any]:
        """Teacher calls (samples × passes, of this process), and how much the network's errors are magnified in the sample."""
        return {"magnification": self.g.magnification, "metrics": {"teacher_calls": self.teacher_calls}}

    def state_dict(self) -> dict[str, Any]:
        """What the watch remembers, and the count."""
        return super().state_dict() | {"teacher_calls": self.teacher_calls}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put it back."""
        super().load_state_dict(state)
        self.teacher_calls = int(state["teacher_calls"])
