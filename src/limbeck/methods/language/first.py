"""FIRST: Teach A Reliable Large Language Model Through Efficient Trustworthy Distillation (Shum and others; arXiv 2408.12168).

L = (1/D) Σ_n KL(P̃_T(·|n) ‖ P̃_S(·|n)) over the k entries S that the teacher finds most likely, where P̃_T = softmax(P_T / c) re-calibrates the teacher with
one constant c, fitted on validation data, and P̃_S is the student's full softmax, normalised over S (equations (1), (3), (5), (6) of our sheet; the tail is
(7)). There is no loss of the true labels.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from limbeck.contract import IGNORE, Batch, Clock, Frozen, Paper, Phase, Update, Workbench
from limbeck.data import evaluation_batches
from limbeck.errors import InputError
from limbeck.language.calibration import Calibration, TransformName, answer_positions, fit_constant, transformed
from limbeck.language.linear_divergence import linear_divergence
from limbeck.language.tokens import TokenBatch
from limbeck.methods.language._base import LanguageMethod
from limbeck.methods.language.first_part import Against, Matching, kept, matching, recalibrated, top


class FIRSTConfig(Frozen):
    """Knobs of `FIRST`."""

    answers: Literal["tokens", "classes"] = Field(
        "tokens", description="what is predicted: 'tokens', the next one (makes a language model), or 'classes' (a classifier, whose labels are its vocabulary)"
    )
    k: int = Field(5, ge=1, le=1024, description="entries kept of every distribution of the teacher")
    transform: TransformName = Field(
        "softmax_of_prob", description="of the kept probabilities: 'softmax_of_prob' is (1), 'label_smoothing' (2), 'power' classical temperature scaling"
    )
    c: float | None = Field(None, gt=0, le=100, description="of (1) and of 'power'; null: fitted on data.validation to the smallest ECE (3)")
    smoothing: float = Field(0.1, ge=0, lt=1, description="δ of (2)")
    student: Literal["linear", "softmax"] = Field("linear", description="how the student is normalised over the kept entries; 'linear' (5) is our reading")
    student_c: float | None = Field(None, gt=0, le=100, description="c of the student's 'softmax'; null: the teacher's")
    epsilon: float = Field(1e-6, ge=0, lt=1, description="ε of (5), 'linear'")
    policy: Literal["renormalised", "tail"] = Field("renormalised", description="(6), or (7): all other entries as one more outcome; the k share κ of the mass")
    reduction: Literal["mean", "sum_per_example"] = Field(
        "mean", description="over positions; 'sum_per_example' is the code's: their sum in an example, averaged over examples"
    )
    fit_at: Literal["answer", "targets"] = Field("answer", description="'tokens': c is fitted at the first target of every example, or at all targets")

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.student == "softmax" and (self.policy == "tail" or (self.student_c is None and self.transform != "softmax_of_prob")):
            raise ValueError("student 'softmax' has no tail, and a c of its own ('student_c') or that of the transform 'softmax_of_prob'")
        return self


class FIRST(LanguageMethod):
    """A student learns a fine-tuned teacher's k largest probabilities, re-calibrated, so that it is right and knows how sure it may be."""

    Config = FIRSTConfig
    paper: ClassVar[Paper] = Paper(
        "FIRST: Teach A Reliable Large Language Model Through Efficient Trustworthy Distillation",
        "2408.12168",
        "EMNLP 2024",
        2024,
        "SHUMKASHUN/FIRST",
        reconstructed="how the student is normalised over the kept entries (the code's one flag serves both sides; the text writes plain probabilities)",
    )
    config: FIRSTConfig

    def __init__(self, config: Frozen | None = None, /, **knobs: Any) -> None:
        super().__init__(config, **knobs)
        if self.config.answers == "classes":
            self.produces = "classifier"  # type: ignore[misc]

    def setup(self) -> None:
        """Raises InputError: c is to be fitted and there are no validation data."""
        self.c: float | None = self.config.c
        self.fit: Calibration | None = None
        self.found: dict[str, float] = {}
        self.fits = self.c is None and self.config.transform in ("softmax_of_prob", "power")
        if self.fits and self.validation is None:
            raise InputError("c is fitted on validation data, and there are none.", where="data.validation", fix="Hold some out, or give method.c.")
        if self.config.answers == "classes" and self.num_classes is not None and self.config.k > self.num_classes:
            raise InputError(f"{self.num_classes} classes have no {self.config.k} entries to keep.", where="method.k", fix=f"At most {self.num_classes}.")

    def enter(self, phase: Phase, clock: Clock, bench: Workbench) -> None:
        """Where c is to be fitted: ask the teacher (or its record) about the validation data, fit, and note how much the k entries cover."""
        if not self.fits or self.fit is not None:
            return
        with torch.no_grad():
            probs_Mk, correct_M = self._validated(bench.device)
        self.fit = fit_constant(probs_Mk, correct_M, self.config.transform)
        self.c = self.fit.c
        self.found = {
            "coverage": probs_Mk.sum(-1).mean().item(),
            "teacher_accuracy": correct_M.double().mean().item(),
            "ece_uncalibrated": self.fit.plain_ece,
            "ece_calibrated": self.fit.ece,
        }

    def _validated(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """[M, k] the teacher's kept probabilities at positions of the validation data that are labelled, and [M] bool, whether its first is right."""
        assert self.validation is not None
        teacher: Any = self.teacher
        record = teacher.attach(self.validation) if getattr(teacher, "is_record", False) else None
        found = []
        for inputs, targets_B, ids_B in evaluation_batches(self.validation, 32 if self.config.answers == "tokens" else 512):
            recorded = {} if record is None else record.lookup(ids_B, torch.zeros_like(ids_B))
            batch = Batch(inputs, targets_B, ids_B, recorded=recorded).to(device)
            ids_Nk, probs_Nk, targets_N = self._asked(batch)
            known_N = targets_N != IGNORE
            found.append((probs_Nk[known_N], (ids_Nk[:, 0] == targets_N)[known_N]))
        probs_Mk, correct_M = torch.cat([probs for probs, _ in found]), torch.cat([correct for _, correct in found])
        if not len(probs_Mk):
            raise InputError("no validation sample is labelled: c cannot be fitted.", where="data.validation", fix="Give method.c.")
        return probs_Mk, correct_M

    def _asked(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Where c is fitted: kept ids [N, k], their probabilities [N, k], targets [N] (IGNORE: none)."""
        if self.config.answers == "classes":
            if batch.targets is None:
                raise InputError("the validation data have no labels: c cannot be fitted.", where="data.validation", fix="Give method.c.")
            return *self._kept_classes(batch), batch.targets
        tokens = self.tokens(batch)
        rows = tokens.rows()
        ids_Nk, logp_Nk = kept(self.asked(tokens), self.config.k)
        targets_N = rows.targets_N
        if self.config.fit_at == "answer":
            targets_N = targets_N.masked_fill(~rows.gather(answer_positions(tokens)[..., None])[:, 0], IGNORE)
        return ids_Nk, logp_Nk.exp(), targets_N

    def _kept_classes(self, batch: Batch) -> tuple[Tensor, Tensor]:
        teacher: Any = self.teacher
        ids_Bk, logp_Bk = top(torch.log_softmax(teacher.logits(batch).float(), -1), self.config.k)
        return ids_Bk, logp_Bk.exp()

    def targets(self, probs_Nk: Tensor) -> Tensor:
        """P̃_T of the teacher's kept probabilities, [N, k]: rows sum to 1, with the policy 'tail' to what they sum to before."""
        config = self.config
        calibrated_Nk = transformed(probs_Nk, config.transform, config.smoothing if config.transform == "label_smoothing" else float(self.c or 1.0))
        return calibrated_Nk * probs_Nk.sum(-1, keepdim=True).clamp(max=1) if config.policy == "tail" else calibrated_Nk

    @property
    def against(self) -> Against:
        """How the student is compared with the targets."""
        config = self.config
        return Against("tail" if config.policy == "tail" else config.student, config.epsilon, float(config.student_c or self.c or 1.0))

    def weigh(self, batch: Batch, clock: Clock) -> Tensor | None:
        """What the loss is a mean over: positions or examples; of classes, samples."""
        if self.config.answers == "classes":
            return None
        if self.config.reduction == "sum_per_example":
            return answer_positions(self.tokens(batch)).sum()
        return super().weigh(batch, clock)

    def updates(self, batch: Batch, clock: Clock) -> Iterator[Update]:
        """One update of the student."""
        if self.config.answers == "classes":
            with torch.no_grad():
                ids_Bk, probs_Bk = self._kept_classes(batch)
            loss = matching(self.student(batch.inputs), ids_Bk, self.targets(probs_Bk), self.against).mean()
            yield Update("student", loss, {"coverage": probs_Bk.sum(-1).mean()})
            return
        tokens: TokenBatch = self.tokens(batch)
        rows = tokens.rows()
        ids_Nk, logp_Nk = kept(self.asked(tokens), self.config.k)
        signal = recalibrated(ids_Nk, self.targets(logp_Nk.exp()))
        denominator = answer_positions(tokens).sum().float() if self.config.reduction == "sum_per_example" else None
        hidden_Nd = rows.gather(self.student.hidden(tokens))
        loss = linear_divergence(hidden_Nd, self.student.head(), signal, Matching(self.against), rows, denominator=denominator).loss
        yield Update("student", loss, {"coverage": logp_Nk.exp().sum(-1).mean()})

    def facts(self) -> dict[str, Any]:
        """c, how it was fitted, and how well the teacher is calibrated with it, on the validation data."""
        told: dict[str, Any] = {"c": self.c} | self.found
        if self.fit is not None:
            told |= {"grid": [list(row) for row in self.fit.table], "positions": self.fit.positions}
        return told | {"metrics": {} if self.c is None else {"c": self.c}}

    def state_dict(self) -> dict[str, Any]:
        """What was fitted."""
        return {"c": self.c, "found": self.found, "fit": None if self.fit is None else asdict(self.fit)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put it back."""
        fit = state["fit"]
        self.c, self.found = state["c"], dict(state["found"])
        self.fit = None if fit is None else Calibration(**{**fit, "table": tuple((float(c), float(ece)) for c, ece in fit["table"])})
