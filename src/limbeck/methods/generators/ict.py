"""iCT: Improved Techniques for Training Consistency Models (Song, Dhariwal; arXiv 2310.14189), and its predecessor CT (arXiv 2303.01469) by its knobs.

A one- or two-step generator straight from data: f_θ learns to give the same answer at neighbouring noise levels of one trajectory, and f_θ(x, σ_min) = x.

Legend: x data of standard deviation ≈ σ_data, z ~ N(0, I), x_σ = x + σ z, σ_1 < … < σ_N the grid at step k of K, sg stop-gradient, d entries of a sample.
    f_θ(x, σ) = c_skip x + c_out F_θ(c_in x, ¼ ln σ)                                              (1)  the student's `precondition: consistency`
    σ_i = [σ_min^{1/ρ} + (i−1)/(N−1) (σ_max^{1/ρ} − σ_min^{1/ρ})]^ρ                                (2)
    N(k) = min(s0 2^⌊k/K'⌋, s1) + 1,  K' = ⌊K/(log2⌊s1/s0⌋ + 1)⌋                                   (3)
    p_i ∝ erf((ln σ_{i+1} − P_mean)/(√2 P_std)) − erf((ln σ_i − P_mean)/(√2 P_std))                (4)
    L = E [ d(f_θ(x + σ_{i+1} z, σ_{i+1}), sg f_θ⁻(x + σ_i z, σ_i)) / (σ_{i+1} − σ_i) ],  θ⁻ = θ   (5)  one z, one dropout mask
    d(a, b) = √(‖a − b‖² + c²) − c,  c = 0.00054 √d                                                (6)
Equation numbers are those of our sheet. The weights that are sampled from (7) are the recipe's `train.ema`, the sampler (8) is `ConsistencyGenerator`.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from limbeck.contract import IGNORE, Batch, Clock, Frozen, Paper, Phase, Player, Update, Workbench
from limbeck.diffusion.consistency import (
    ConsistencyGenerator,
    Distance,
    Intervals,
    consistency_pair,
    doubling_count,
    follow,
    huber_constant,
    inverse_gap,
    lognormal_probabilities,
    pseudo_huber,
    square_root_count,
    squared_l2,
    teacher_decay,
)
from limbeck.diffusion.denoisers import NetworkDenoiser
from limbeck.diffusion.distribution import normal
from limbeck.diffusion.generator import data_scale
from limbeck.errors import InputError
from limbeck.methods.generators._base import GeneratorMethod


class ICTConfig(Frozen):
    """Knobs of `ICT`. CT of 2023: {curriculum: ct, s0: 2, s1: 150, intervals: uniform, weighting: one, distance: squared_l2, teacher_ema: 0.9}."""

    curriculum: Literal["ict", "ct", "constant"] = Field("ict", description="N(k): 'ict' doubles (eq. 3), 'ct' grows as a root of k, 'constant' is s1 + 1")
    s0: int = Field(10, ge=1, le=100_000, description="intervals at the start (iCT: 10, CT: 2)")
    s1: int = Field(1280, ge=1, le=1_000_000, description="intervals at the end (iCT: 1280, CT: 150)")
    intervals: Literal["lognormal", "uniform"] = Field("lognormal", description="how i is drawn (eq. 4; CT: uniform)")
    p_mean: float = Field(-1.1, ge=-20, le=20, description="P_mean, of ln σ")
    p_std: float = Field(2.0, gt=0, le=100, description="P_std, of ln σ")
    weighting: Literal["inverse_gap", "one"] = Field("inverse_gap", description="λ of eq. 5 (CT: one)")
    distance: Literal["pseudo_huber", "squared_l2"] = Field("pseudo_huber", description="d of eq. 6, on the norm of the whole sample (CT: LPIPS or L2)")
    huber_c: float | None = Field(None, gt=0, le=1e6, description="c of eq. 6; null: 0.00054 √d")
    teacher_ema: float = Field(0.0, ge=0, lt=1, description="μ0 of a teacher θ⁻ that lags behind; 0: θ⁻ = θ (CT: 0.9)")
    steps: int = Field(1, ge=1, le=2, description="network calls of the generator")
    tau: float = Field(0.821, gt=0, description="σ of the second call (CIFAR-10: 0.821, ImageNet-64: 1.526)")

    @model_validator(mode="after")
    def _growing(self) -> Self:
        if self.s1 < self.s0:
            raise ValueError(f"'s1' must be at least 's0' = {self.s0}.")
        return self


class ICT(GeneratorMethod):
    """Consistency training without a teacher network."""

    Config = ICTConfig
    paper: ClassVar[Paper] = Paper(
        "Improved Techniques for Training Consistency Models", "2310.14189", "ICLR", 2024, "", "no code was released; from the paper and its predecessor's code"
    )
    needs_teacher = False
    example_model = "{name: mlp_denoiser, widths: [64, 64], precondition: consistency}"

    def make_generator(self) -> ConsistencyGenerator:
        """The student as a one- or two-step sampler. Raises InputError: it keeps no boundary condition, or τ lies outside its schedule."""
        student: Any = self.student
        if not isinstance(student, NetworkDenoiser) or student.precondition != "consistency" or student.schedule.name != "edm":
            found = type(student).__name__
            if isinstance(student, NetworkDenoiser):
                found += f" with precondition '{student.precondition}' and schedule '{student.schedule.name}'"
            raise InputError(
                f"'ict' needs a denoiser with f(x, σ_min) = x, the student is {found}.",
                where="student.model",
                fix="Use mlp_denoiser or unet_denoiser with precondition: consistency and schedule: edm.",
            )
        schedule, tau = student.schedule, self.config.tau
        if not schedule.t_min <= tau < schedule.t_max:
            raise InputError(f"σ = {tau} lies outside of [{schedule.t_min:g}, {schedule.t_max:g}).", where="method.tau")
        self.f: NetworkDenoiser = student
        self.lagging = copy.deepcopy(student).requires_grad_(False) if self.config.teacher_ema else None
        self.c = self.config.huber_c or huber_constant(student.shape)
        self.distance: Distance = squared_l2 if self.config.distance == "squared_l2" else partial(pseudo_huber, c=self.c)
        self.kept: tuple[int, torch.device, Intervals] | None = None
        return ConsistencyGenerator(student, (schedule.t_max, tau), steps=self.config.steps, scale=data_scale(self.train_data, student.shape))

    def players(self) -> Mapping[str, Player]:
        """The generator; and the lagging teacher, which is never stepped, so that it is moved and saved with the rest."""
        found = {"generator": Player(self.student)}
        return found if self.lagging is None else found | {"teacher": Player(self.lagging)}

    def phases(self) -> Iterable[Phase]:
        """One, in which the generator alone is trained."""
        return [Phase(trains=("generator",))]

    def enter(self, phase: Phase, clock: Clock, bench: Workbench) -> None:
        """A lagging teacher starts where the student does."""
        if self.lagging is not None:
            self.lagging.load_state_dict(self.f.state_dict())

    def points(self, clock: Clock) -> int:
        """N(k), eq. 3 or the old one."""
        if self.config.curriculum == "constant":
            return int(self.config.s1) + 1
        count = doubling_count if self.config.curriculum == "ict" else square_root_count
        return count(clock.step, clock.steps, self.config.s0, self.config.s1)

    def grid(self, points: int, device: torch.device) -> Intervals:
        """Grid (2) and law (4) of N points, made anew when N changes."""
        if self.kept is None or self.kept[:2] != (points, device):
            times_N = self.f.schedule.grid(points)
            law = lognormal_probabilities(times_N, self.config.p_mean, self.config.p_std) if self.config.intervals == "lognormal" else None
            made = Intervals.of(times_N, law)
            self.kept = points, device, Intervals(made.times_N.to(device), made.cumulative_M.to(device))
        return self.kept[2]

    def updates(self, batch: Batch, clock: Clock) -> Iterator[Update]:
        """One update on L (5)."""
        f, generator = self.f, clock.generator("noise")
        t_low, t_high = self.grid(self.points(clock), generator.device).draw(len(batch), generator)
        noise = normal(len(batch), f.shape, generator)
        teacher = f
        if self.lagging is not None:
            teacher = self.lagging.train(f.training)  # dropout as in the student
        a, b = consistency_pair(f, teacher, batch.inputs, noise, t_low, t_high, self.conditions(batch))
        distance_B = self.distance(a, b)
        weighted_B = distance_B * inverse_gap(f.schedule, t_low, t_high).to(distance_B) if self.config.weighting == "inverse_gap" else distance_B
        yield Update("generator", weighted_B.mean(), {"distance": distance_B.mean()})

    def conditions(self, batch: Batch) -> Tensor | None:
        """[B] the labels, the same in both evaluations, unlabelled samples as the null class; None for a network without classes."""
        classes = self.f.num_classes
        return batch.targets.masked_fill(batch.targets == IGNORE, classes) if classes and batch.targets is not None else None

    def after_step(self, player: str, clock: Clock) -> None:
        """θ⁻ ← μ(k) θ⁻ + (1 − μ(k)) θ, where the teacher lags."""
        if self.lagging is not None:
            follow(self.lagging, self.f, teacher_decay(self.points(clock), self.config.s0, self.config.teacher_ema))

    def facts(self) -> dict[str, Any]:
        """c of eq. 6 and the sampler's noise levels."""
        return {"huber_c": self.c, "levels": list(self.generator.arguments["ladder"])}
