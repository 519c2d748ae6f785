"""Even your Teacher Needs Guidance: Ground-Truth Targets Dampen Regularization Imposed by Self-Distillation (Borup & Andersen; arXiv 2102.13088).

    L = α MSE(σ(s), y) + (1 − α) MSE(σ(s), r) + c Σ_p ‖θ_p‖₂,   r = σ(previous network), frozen, on the same augmented input

Round 1 learns from the labels alone. Every later round trains a network from a fresh initialisation against labels and the network before it.
α weights the GROUND TRUTH, the reverse of most distillation code. Equation numbers are those of our sheet.
For regression with a kernel, `SelfDistilledRidge` does any number of rounds in closed form.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from limbeck import seeds
from limbeck.contract import IGNORE, Batch, Clock, Data, Frozen, Method, Paper, Phase, Update, Workbench
from limbeck.errors import InputError
from limbeck.losses import prob_mse
from limbeck.losses.kernel_ridge import mixture_weights, optimal_alpha
from limbeck.methods.classifiers.self_distillation_part import Alpha, SelfDistilledRidge, rbf

__all__ = ["SelfDistillation", "SelfDistillationConfig", "SelfDistilledRidge", "mixed_mse", "norm_penalty", "rbf"]


def mixed_mse(logits_BC: Tensor, labels_BC: Tensor, teacher_BC: Tensor, alpha: float) -> Tensor:
    """α MSE(σ(s), y) + (1−α) MSE(σ(s), r), means over batch and classes. Source: 2102.13088 eq. 9.

    Args:
        logits_BC: of the student. labels_BC: one-hot. teacher_BC: probabilities. alpha: weight of the labels.
    """
    return alpha * prob_mse(logits_BC, labels_BC) + (1 - alpha) * prob_mse(logits_BC, teacher_BC)


def norm_penalty(parameters: Iterable[Tensor]) -> Tensor:
    """Σ_p ‖θ_p‖₂: the norms of all parameter tensors, not squared; its gradient at a tensor of zeros is 0. Source: 2102.13088 eq. 9 (code)."""
    return torch.stack([torch.linalg.vector_norm(p, dtype=torch.promote_types(p.dtype, torch.float32)) for p in parameters]).sum()


class SelfDistillationConfig(Frozen):
    """Knobs of `SelfDistillation`."""

    rounds: int = Field(5, ge=1, le=1000, description="networks in the chain, the plain one of round 1 included, as the official code counts")
    alpha: Alpha = Field(
        0.6, description="α from round 2 on, weight of the GROUND TRUTH: a number (README: 0.6), one for each of rounds 2, 3, …, or 'estimate' (eq. 8)"
    )
    clip: bool = Field(True, description="'estimate': keep α within [0, 1] (eq. 7)")
    penalty: float = Field(1e-4, ge=0, le=1e3, description="c, of the un-squared norms of all parameter tensors (official code: 1e-4)")

    @model_validator(mode="after")
    def _schedule_fits(self) -> SelfDistillationConfig:
        if isinstance(self.alpha, tuple) and len(self.alpha) != self.rounds - 1:
            raise ValueError(f"alpha lists {len(self.alpha)} weights, {self.rounds} rounds need {self.rounds - 1}: one for each round from the second on")
        return self


class SelfDistillation(Method):
    """A chain of networks of one architecture, each taught by the labels and by the one before it; `previous` is that one, `alpha` the weight now."""

    Config = SelfDistillationConfig
    paper: ClassVar[Paper] = Paper(
        "Even your Teacher Needs Guidance: Ground-Truth Targets Dampen Regularization Imposed by Self-Distillation",
        "2102.13088",
        "NeurIPS",
        2021,
        "https://github.com/Kennethborup/self_distillation",
        "the estimate of α for networks (eq. 8) from the abstract and the closed form of eq. 7; its printed form was not re-read",
    )
    needs_teacher = False
    needs_labels = True

    def setup(self) -> None:
        """Start in round 1; check that there is what the rounds need."""
        config = self.config
        if config.rounds > 1 and self.fresh_student is None:
            what = "every round starts from a fresh network, and there is only one module."
            raise InputError(what, where="student", fix="Give a model by name or by a factory.")
        if self._estimates and _labels(self.validation) is None:
            what = "estimating alpha needs labelled held-out samples."
            raise InputError(what, where="data.validation", fix="Set it to a number of samples, say 500, or give alpha a number.")
        targets = None if self.train_data is None else self.train_data.targets
        if targets is not None and (targets == IGNORE).any():
            raise InputError("self-distillation needs the label of every training sample.", where="data.labelled", fix="Leave it out.")
        self.alpha, self.previous = 1.0, None
        self.labels_only: Tensor | None = None  # round 1's validation probabilities, the p of eq. 7
        fixed = () if config.alpha == "estimate" else config.alpha if isinstance(config.alpha, tuple) else (config.alpha,) * (config.rounds - 1)
        self.alphas: list[float] = list(fixed)
        self.history: list[dict[str, Any]] = []
        self.estimates: list[dict[str, Any]] = []

    alpha: float
    previous: nn.Module | None

    @property
    def _estimates(self) -> bool:
        return self.config.alpha == "estimate" and self.config.rounds > 1

    def phases(self) -> list[Phase]:
        """One training a round; with an estimate, one with α = 0 before each from the second on (eq. 8)."""
        names = ["round-1"]
        for t in range(2, self.config.rounds + 1):
            names += [f"round-{t}-teacher-only", f"round-{t}"] if self._estimates else [f"round-{t}"]
        return [Phase(name) for name in names]

    def enter(self, phase: Phase, clock: Clock, bench: Workbench) -> None:
        """A fresh student; the one that was becomes the teacher, unless it only served the estimate."""
        t, teacher_only = _parsed(phase)
        if t == 1:
            return
        if teacher_only or not self._estimates:
            self.previous = copy.deepcopy(self.student).requires_grad_(False).eval()
        assert self.fresh_student is not None
        self.student = self.fresh_student(seeds.derive(self.seed, "self_distillation", phase.name))
        self.alpha = 0.0 if teacher_only else self.alphas[t - 2]

    def leave(self, phase: Phase, clock: Clock, bench: Workbench) -> None:
        """Measure; after a teacher-only training, find this round's α from its validation outputs q and round 1's p (eq. 7)."""
        t, teacher_only = _parsed(phase)
        labels_V = _labels(self.validation)
        q_VC = None if labels_V is None else bench.outputs(self.student, self.validation).softmax(-1)  # type: ignore[arg-type]
        if teacher_only:
            assert q_VC is not None
            assert labels_V is not None
            assert self.labels_only is not None
            known_V = labels_V != IGNORE
            best = optimal_alpha(self.labels_only[known_V], q_VC[known_V], F.one_hot(labels_V[known_V], q_VC.shape[1]), clip=self.config.clip)
            self.alphas.append(float(best.alpha))
            self.estimates.append({"round": t, "alpha": float(best.alpha), "unclipped": float(best.unclipped), "degenerate": bool(best.degenerate)})
            return
        if t == 1:
            self.labels_only = q_VC
        row: dict[str, Any] = {"round": t, "alpha": self.alpha}
        if q_VC is not None and labels_V is not None:
            row["validation_accuracy"] = _accuracy(q_VC, labels_V)
        labels_T = _labels(self.test)
        if labels_T is not None:
            row["test_accuracy"] = _accuracy(bench.outputs(self.student, self.test), labels_T)  # type: ignore[arg-type]
        self.history.append(row)

    def updates(self, batch: Batch, clock: Clock) -> Iterator[Update]:
        """One update of the student."""
        logits_BC = self.student(batch.inputs)
        assert batch.targets is not None
        labels_BC = batch.targets if batch.targets.is_floating_point() else F.one_hot(batch.targets, logits_BC.shape[1])
        if self.previous is None:
            fit = prob_mse(logits_BC, labels_BC)
        else:
            with torch.no_grad():
                teacher_BC = self.previous(batch.inputs).float().softmax(-1)
            fit = mixed_mse(logits_BC, labels_BC, teacher_BC, self.alpha)
        norms = norm_penalty(self.student.parameters())
        yield Update("student", fit + self.config.penalty * norms, {"fit": fit, "norms": norms})

    def frozen(self) -> Sequence[nn.Module]:
        """The network of the round before."""
        return [] if self.previous is None else [self.previous]

    def facts(self) -> dict[str, Any]:
        """Weights and accuracies a round, trainings done, and the regularisation they imply for ridge regression (eq. 4-5)."""
        done = self.alphas[: max(len(self.history) - 1, 0)]
        trainings = len(self.history) + len(self.estimates)
        return {
            "trainings": trainings,
            "rounds": self.history,
            "estimates": self.estimates,
            "implied_mixture_weights": mixture_weights(done).tolist(),
            "implied_ridge_factor_in_the_limit": 1 / done[-1] if done and done[-1] > 0 else None,
            "metrics": {"trainings": trainings} | {f"alpha_round_{t}": alpha for t, alpha in enumerate(done, start=2)},
        }

    def state_dict(self) -> dict[str, Any]:
        """The weight now, those found, what was measured, and the network before."""
        previous = None if self.previous is None else dict(self.previous.state_dict())
        kept = {"alpha": self.alpha, "alphas": list(self.alphas), "history": list(self.history), "estimates": list(self.estimates)}
        return {**kept, "p": self.labels_only, "previous": previous}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put it back; the network before is built anew."""
        self.alpha, self.alphas, self.labels_only = state["alpha"], list(state["alphas"]), state["p"]
        self.history, self.estimates = list(state["history"]), list(state["estimates"])
        if state["previous"] is not None:
            assert self.fresh_student is not None
            self.previous = self.fresh_student(0).requires_grad_(False).eval()
            self.previous.load_state_dict(state["previous"])


def _parsed(phase: Phase) -> tuple[int, bool]:
    """Round and whether the teacher alone teaches, from 'round-2' or 'round-2-teacher-only'."""
    return int(phase.name.split("-")[1]), phase.name.endswith("teacher-only")


def _labels(data: Data | None) -> Tensor | None:
    return None if data is None else data.targets


def _accuracy(outputs_NC: Tensor, labels_N: Tensor) -> float:
    return float((outputs_NC.argmax(-1) == labels_N)[labels_N != IGNORE].double().mean())
