"""AST: alignment with smooth and high-quality expert trajectories (Shen, Yang, Lam, arXiv 2310.10541), on the base of MTT (arXiv 2203.11932).

Strong experts (momentum, weight decay) run too fast to be matched. AST slows and smooths them (equations 1 to 4 of our sheet: `teacher.experts`), and makes
the student side, which is here, less sensitive to its random choices.

Legend: P weights, θ [P]; s the epoch at which the student starts, s_max = `latest_start`, m = ⌊s_max/2⌋; T steps for E epochs; θ* an expert; M images S.
    θ_0   = θ*_s with W ← W + a (d/‖d‖_F) ⊙ W for every convolution's W, d ~ N(0, I)                    (5)
    b(s)  = log_5(s − m + 8) if s ≥ m, else 1 / log_5(m − s + 8)                                         (6)
    g_t   = ∇_θ [b(s) · CE],  v_t = μ v_{t−1} + g_t,  θ_{t+1} = θ_t − η v_t                              (7)
    L_j   = ‖θ_{t_j} − θ*_{s+j}‖² / ‖θ_0 − θ*_{s+j}‖²,  t_j = j ⌊T/E⌋ for j < E;  t_E = T                (8, 9)
    total = L_E + Σ_{j<E} w_j L_j,  w_j = 1 or j/E                                                       (10)
    S starts at the real images nearest to the centres of k-means on a class's logits                    (11)
The released code's: all of this (the paper's text was not available to us). Ours: which expert gives the logits of (11), E > T is refused.
"""

from __future__ import annotations

import math
from typing import ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from limbeck import seeds
from limbeck.contract import Clock, Paper, Phase, Workbench
from limbeck.errors import InputError
from limbeck.methods.datasets.matching_part import MatchingConfig, TrajectoryMatching
from limbeck.synthetic.flat import FlatNetwork
from limbeck.synthetic.hypergradient import Target
from limbeck.synthetic.selection import kmeans_per_class

OFFSET = 8
"""Of the logarithm in b(s); it and the base are empirical (the released code's)."""
BASE = 5.0
"""Of the logarithm in b(s)."""


def inner_loss_scale(epoch: int, latest_start: int) -> float:
    """b(s) of the inner loss of a segment that starts after s = `epoch` epochs, s < s_max = `latest_start`; it rises with s (arXiv 2310.10541, code; (6))."""
    middle = latest_start // 2
    if epoch >= middle:
        return math.log(epoch - middle + OFFSET, BASE)
    return 1 / math.log(middle - epoch + OFFSET, BASE)


def perturbed(theta_P: Tensor, network: FlatNetwork, scale: float, generator: torch.Generator) -> Tensor:
    """[P] weights whose convolutions' are W + a (d/‖d‖_F) ⊙ W; the others are as they were (arXiv 2310.10541, code; (5)).

    Args:
        theta_P: weights of `network`; they are not changed. scale: a ≥ 0; at 0 nothing is drawn. generator: of d, on the weights' device.
    """
    found = theta_P.detach().clone()
    if scale == 0:
        return found
    for weight in network.split(found).values():
        if weight.dim() == 4:
            direction = torch.randn(weight.shape, generator=generator, device=weight.device, dtype=weight.dtype)
            weight.addcmul_(weight, direction / direction.norm(), value=scale)
    return found


def landings(steps: int, expert_epochs: int, weights: Literal["aggregate", "adaptive", "none"]) -> list[tuple[int, int, float]]:
    """(inner step t_j, epoch j after the start, weight w_j) of the terms of the loss (8 to 10), in order; the last is (T, E, 1) (arXiv 2310.10541, code).

    Args:
        steps: T ≥ expert_epochs, unless weights is "none". weights: w_j = 1 ("aggregate") or j/E ("adaptive") for j < E; "none": no such terms.
    """
    stride, between = steps // expert_epochs, range(1, expert_epochs) if weights != "none" else ()
    early = [(j * stride, j, 1.0 if weights == "aggregate" else j / expert_epochs) for j in between if j * stride < steps]
    return [*early, (steps, expert_epochs, 1.0)]


class ASTConfig(MatchingConfig):
    """Knobs of `AST`."""

    start: Literal["representative", "real", "noise"] = Field(  # type: ignore[assignment]
        "representative", description="where the images start: real ones nearest to the centres of their class's logits, random real ones, or noise"
    )
    momentum: float = Field(0.9, ge=0, lt=1, description="μ of the inner steps (code: 0.9); an expert with momentum is out of reach without")
    perturbation: float = Field(1.0, ge=0, le=100, description="a: how far the start's convolutions are moved (code: 1); 0: not")
    balance: bool = Field(True, description="whether the inner loss is multiplied by b(s), less for early starts and more for late ones")
    intermediate: Literal["aggregate", "adaptive", "none"] = Field(
        "aggregate", description="the loss where the expert's epochs between start and end should be met: weight 1, weight j/E, or none (MTT)"
    )

    @model_validator(mode="after")
    def _a_step_an_epoch(self) -> Self:
        if self.intermediate != "none" and self.steps < self.expert_epochs:
            raise ValueError(f"{self.steps} steps cannot meet {self.expert_epochs} epochs one by one: raise 'steps', or set 'intermediate: none'.")
        return self


class AST(TrajectoryMatching):
    """Images on which a network that starts near a smooth, strong expert's weights meets the expert's epochs one after the other."""

    Config = ASTConfig
    paper: ClassVar[Paper] = Paper(
        title="Efficient Dataset Distillation through Alignment with Smooth and High-Quality Expert Trajectories",
        arxiv="2310.10541",
        venue="arXiv",
        year=2023,
        official_code="https://github.com/shenjiyuan123/AST-Alignment-with-Smooth-Expert",
    )
    config: ASTConfig

    # ---- the start of the images (11) -----------------------------------------------------------------------------

    def enter(self, phase: Phase, clock: Clock, bench: Workbench) -> None:
        """The images become representative ones, which takes a trained expert; until then they are random real ones."""
        super().enter(phase, clock, bench)
        if self.config.start == "representative":
            with torch.no_grad():
                self.synthetic.images.copy_(self.prepared(self.representative(bench)))

    def representative(self, bench: Workbench) -> Tensor:
        """[M] positions of the real samples nearest to the centres of their class's logits, class by class, none twice.

        Raises InputError: the expert's logits are not finite.
        """
        logits_NC, per_class = self.expert_logits(bench), self.config.images_per_class
        try:
            return kmeans_per_class(logits_NC, self.labels, per_class, seeds.derive(self.seed, "representative"), num_classes=self.num_classes)
        except InputError as error:
            raise InputError(f"the first expert's logits: {error.what}", where="teacher.experts", fix="Lower the experts' learning rate.") from error

    @torch.no_grad()
    def expert_logits(self, bench: Workbench) -> Tensor:
        """[N, C] logits of all real samples by the first expert after its last epoch."""
        theta_P = self.experts.weights(0, self.experts.epochs).to(bench.device)
        return bench.outputs(lambda inputs: self.flat(theta_P, inputs), self.data)

    # ---- the segment (5, 6, 8 to 10) ------------------------------------------------------------------------------

    def start_weights(self, expert: int, epoch: int, clock: Clock) -> Tensor:
        """θ_0 [P]: the expert's weights with its convolutions perturbed; it is the start in the denominators too."""
        return perturbed(super().start_weights(expert, epoch, clock), self.flat, self.config.perturbation, clock.generator("perturbation"))

    def loss_scale(self, epoch: int) -> float:
        """b(s)."""
        return inner_loss_scale(epoch, self.config.latest_start) if self.config.balance else 1.0

    def targets(self, expert: int, epoch: int, clock: Clock) -> list[Target]:
        """The expert's weights after each epoch up to the E-th, at the steps that should meet them."""
        config = self.config
        terms = landings(config.steps, config.expert_epochs, config.intermediate)
        return [Target(step, self.experts.weights(expert, epoch + j).to(clock.device), weight) for step, j, weight in terms]
