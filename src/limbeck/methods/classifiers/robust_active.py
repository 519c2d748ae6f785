"""Robust Active Distillation: which inputs to have soft-labelled by a teacher that is costly and sometimes wrong (Baykal et al.; arXiv 2210.01213).

Rounds: train the student, score the unlabelled pool, solve a game against the teacher's errors, ask the teacher about b items, train again.

Legend: A labelled samples, pool the unlabelled ones, n_r what is left of it in round r; s_i the student's probabilities at item i; B samples, C classes.
    g_i = 1 − (s_i,(1) − s_i,(2)), at least ε                                                        (1)
    m   = round((1 − acc) n_r): how many of the pool the teacher would label wrongly                 (2)
    q   = the inclusion probabilities of b items with the best guaranteed Σ_{i right} q_i g_i        (3 to 6, `losses.sampling_game`)
    b items drawn with P(i) = q_i by dependent rounding                                              (7)
    L   = (1/N) [ Σ_{i∈A} CE(y_i, s_i) + T² Σ_{i queried} CE(σ(t_i/T), s_i(T)) ]                     (8)
Equation numbers are those of our sheet, which had no text of the paper beyond its abstract: the game is as recollected, the loop and the loss are ours.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from limbeck import seeds
from limbeck.components import import_object
from limbeck.contract import IGNORE, Batch, Clock, Frozen, Method, Paper, Phase, Teacher, Update, Workbench
from limbeck.errors import InputError
from limbeck.losses.divergences import full_precision, log_probabilities, soft_cross_entropy
from limbeck.losses.sampling_game import dependent_rounding
from limbeck.methods.classifiers._base import require_labels
from limbeck.methods.classifiers.robust_active_part import Gain, Selection, accuracy, ask, batch_sampling, gains_of
from limbeck.teachers.ledger import Ledger, MeteredTeacher


class RobustActiveConfig(Frozen):
    """Knobs of `RobustActive`."""

    rounds: int = Field(4, ge=1, le=1000, description="R, rounds of asking; the student is trained R + 1 times (ours)")
    budget: int = Field(250, ge=1, description="b, items the teacher is asked about in a round; 2 to 5 % of the pool (ours)")
    gain: Gain = Field("margin", description="g: 'margin' = 1 − (top − second) (paper, as recollected), 'entropy' over log C, 'confidence' = 1 − top")
    selection: Selection = Field("robust", description="'robust': the game (paper); to compare: 'top' b gains, 'uniform', 'proportional' to the gain")
    teacher_accuracy: float | None = Field(None, ge=0, le=1, description="of the teacher on the pool; null: measured on the validation data (paper)")
    wrong_loss: float = Field(0.0, ge=0, le=1000, description="w: a wrong label costs w g_i (0: it is only worth nothing)")
    start: Literal["scratch", "warm"] = Field("scratch", description="of every later training: fresh weights, or those of the round before (ours)")
    floor: float = Field(1e-6, gt=0, le=1, description="ε, the least gain: keeps 1/g finite where the student is sure (ours)")
    temperature: float = Field(1.0, gt=0, le=1000, description="T of the soft labels, whose loss is multiplied by T² (1: inferred)")
    truth: str | None = Field(
        None, description="benchmarks: 'package.module:function' from the training data to its hidden labels [N]; only the report asks it, after training"
    )


def active_loss(logits_BC: Tensor, targets_B: Tensor, answers_BC: Tensor, queried_B: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """The two terms of eq. 8, each a sum divided by the N samples of the batch: (hard, soft); their sum is the loss.

    Args:
        logits_BC: of the student. targets_B: [B] int64, IGNORE where unlabelled.
        answers_BC: the teacher's logits; rows that were not queried do not count. queried_B: [B] bool. temperature: T > 0.
    """
    hard = F.cross_entropy(full_precision(logits_BC), targets_B, ignore_index=IGNORE, reduction="sum")
    probs_BC = log_probabilities(answers_BC, temperature).exp()
    soft_B = soft_cross_entropy(full_precision(logits_BC) / temperature, probs_BC, "none")
    return hard / len(targets_B), temperature**2 * torch.where(queried_B, soft_B, 0.0).sum() / len(targets_B)


class RobustActive(Method):
    """A student that chooses, round by round, what its teacher is asked; `chosen` are the items, `answers` what the teacher said."""

    Config = RobustActiveConfig
    needs_unlabelled = True
    paper: ClassVar[Paper] = Paper(
        "Robust Active Distillation",
        "2210.01213",
        "ICLR",
        2023,
        "",
        "everything but the abstract: the game is as recollected, re-derived and checked against a solver; rounds and student training are ours",
    )
    teacher: Teacher

    def setup(self) -> None:
        """Find A and the pool; check that there is enough of all that the rounds need.

        Raises:
            InputError: no labels, no pool or too small a one, no way to know the teacher's accuracy, or no factory for fresh students.
        """
        config = self.config
        require_labels(self.train_data, "'robust_active'")
        if self.train_data is None or self.train_data.targets is None:
            raise InputError("the method chooses from a pool, and needs the training data.", where="data", fix="Give 'train' to bind().")
        targets_N = self.train_data.targets
        self.labelled = (targets_N != IGNORE).nonzero()[:, 0]
        unlabelled = len(targets_N) - len(self.labelled)
        if not unlabelled:
            fix = "Set data.labelled to the number of samples that keep their label, or add unlabelled ones by data.pool."
            raise InputError("every training sample has a label: there is no pool to choose from.", where="data.labelled", fix=fix)
        if config.rounds * config.budget > unlabelled:
            what = f"{config.rounds} rounds of {config.budget} are more than the {unlabelled} unlabelled samples."
            raise InputError(what, where="method.budget", fix=f"At most {unlabelled // config.rounds} a round are possible.")
        if config.start == "scratch" and self.fresh_student is None:
            fix = "Give a model by name or by a factory, or start: warm."
            raise InputError("every round starts from a fresh network, and there is only one module.", where="student", fix=fix)
        if config.selection == "robust" and config.teacher_accuracy is None:
            labels = None if self.validation is None else self.validation.targets
            if labels is None or not (labels != IGNORE).any():
                fix = "Set data.validation to a number of samples, say 100, or give teacher_accuracy."
                raise InputError("the teacher's accuracy is measured on held-out labels, and there are none.", where="data.validation", fix=fix)
            if getattr(self.teacher, "is_record", False):
                what = "a record holds answers to training samples only, so the teacher's accuracy on held-out ones cannot be measured."
                raise InputError(what, where="method.teacher_accuracy", fix="Give it as a number.")
        if config.truth is not None:
            import_object(config.truth)  # that it is there; it is asked in `facts`
        self.ledger = Ledger(config.rounds * config.budget)
        self.metered = MeteredTeacher(self.teacher, self.ledger)
        self.accuracy = config.teacher_accuracy
        self.chosen = torch.zeros(0, dtype=torch.int64)  # positions in the training data, round after round
        self.answers = torch.zeros(0, self.num_classes or 1)  # teacher logits, row by row as `chosen`
        self.history: list[dict[str, Any]] = []
        self._placed: tuple[Tensor, Tensor] | None = None

    accuracy: float | None

    def phases(self) -> list[Phase]:
        """Round 0 on A, then one training a round on A and all that was asked so far."""
        b = self.config.budget
        return [Phase(f"round-{r}", indices=torch.cat([self.labelled, self.chosen[: r * b]])) for r in range(self.config.rounds + 1)]

    def enter(self, phase: Phase, clock: Clock, bench: Workbench) -> None:
        """A fresh student for every round after round 0, unless it starts warm."""
        if _round(phase) and self.config.start == "scratch":
            assert self.fresh_student is not None
            self.student = self.fresh_student(seeds.derive(self.seed, "robust_active", phase.name))

    def leave(self, phase: Phase, clock: Clock, bench: Workbench) -> None:
        """Choose what the next round learns from, and ask the teacher, once an item."""
        r, config, train = _round(phase), self.config, self.train_data
        if r == config.rounds:
            return
        assert train is not None
        if config.selection == "robust" and self.accuracy is None:
            assert self.validation is not None
            self.accuracy = accuracy(self.teacher, self.validation, bench.device)
        taken_N = torch.zeros(len(train), dtype=torch.bool)
        taken_N[torch.cat([self.labelled, self.chosen])] = True
        pool = (~taken_N).nonzero()[:, 0]
        g = gains_of(bench.outputs(self.student, train, pool), config.gain, config.floor)
        m = 0 if self.accuracy is None else round((1 - self.accuracy) * len(pool))
        solved = batch_sampling(g, config.budget, config.selection, m, config.wrong_loss)
        if solved.hopeless:
            warnings.warn(f"the teacher is too often wrong for any choice to guarantee a gain ({m} of {len(pool)}): drawing uniformly.", stacklevel=2)
        places = dependent_rounding(solved.probabilities, seeds.generator(self.seed, "robust_active", "draw", r))[0]
        ids = pool[places]
        if r:
            self.ledger.begin_round()
        answers = ask(self.metered, train, ids, bench.device)
        self._learn(torch.cat([self.chosen, ids]), torch.cat([self.answers, answers]) if len(self.chosen) else answers)
        self.history.append(
            {
                "round": r + 1, "pool": len(pool), "queries": len(ids), "wrong_expected": None if self.accuracy is None else m,
                "support": solved.support, "guaranteed": None if self.accuracy is None else solved.value,
                "mean_gain": float(g[places].mean()), "mean_gain_of_pool": float(g.mean()),
            }
        )  # fmt: skip

    def _learn(self, chosen: Tensor, answers: Tensor) -> None:
        self.chosen, self.answers, self._placed = chosen, answers, None

    def _answers(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Row of each training sample in the answers ([N], -1: not asked) and the answers, on a device."""
        if self._placed is None or self._placed[0].device != device:
            assert self.train_data is not None
            row_N = torch.full((len(self.train_data),), -1, dtype=torch.int64)
            row_N[self.chosen] = torch.arange(len(self.chosen))
            self._placed = row_N.to(device), self.answers.to(device)
        return self._placed

    def updates(self, batch: Batch, clock: Clock) -> Iterator[Update]:
        """One update of the student, eq. 8."""
        assert batch.targets is not None
        assert batch.ids is not None
        if batch.targets.is_floating_point():
            what = "the teacher was asked about whole samples, not about mixtures of two."
            raise InputError(what, where="data.augment", fix="Leave out mixup and cutmix.")
        row_N, answers_QC = self._answers(batch.inputs.device)
        logits_BC, row_B = self.student(batch.inputs), row_N[batch.ids]
        answers_BC = answers_QC[row_B.clamp(min=0)] if len(answers_QC) else torch.zeros_like(logits_BC)
        hard, soft = active_loss(logits_BC, batch.targets, answers_BC, row_B >= 0, self.config.temperature)
        yield Update("student", hard + soft, {"hard": hard, "soft": soft})

    def facts(self) -> dict[str, Any]:
        """Queries, gains and m, round by round; with `truth`, the share of right teacher labels among the queried."""
        rounds, metrics = [dict(row) for row in self.history], {"queries": float(self.ledger.total)}
        if self.accuracy is not None:
            metrics["teacher_accuracy"] = self.accuracy
        if rounds:
            metrics["mean_gain"] = sum(row["mean_gain"] for row in rounds) / len(rounds)
            metrics |= {"support": float(rounds[-1]["support"])}
        if self.config.truth is not None and len(self.chosen):
            truth_N = import_object(self.config.truth)(self.train_data)
            right = (self.answers.argmax(-1) == truth_N[self.chosen]).double()
            metrics["share_correct"] = float(right.mean())
            for row, part in zip(rounds, right.split(self.config.budget), strict=True):
                row["share_correct"] = float(part.mean())
        return {"rounds": rounds, "teacher_accuracy": self.accuracy, "ledger": self.ledger.table(), "metrics": metrics}

    def state_dict(self) -> dict[str, Any]:
        """What was asked and answered, the ledger, and what was measured."""
        kept = {"chosen": self.chosen, "answers": self.answers, "accuracy": self.accuracy, "history": [dict(row) for row in self.history]}
        return kept | {"ledger": self.ledger.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put it back."""
        self._learn(state["chosen"], state["answers"])
        self.accuracy, self.history = state["accuracy"], [dict(row) for row in state["history"]]
        self.ledger.load_state_dict(state["ledger"])


def _round(phase: Phase) -> int:
    return int(phase.name.split("-")[1])
