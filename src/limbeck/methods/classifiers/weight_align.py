"""Weight aligning (WA): learn new classes in steps, with distillation from the previous model and one rescaling of the new classes' weights.

Zhao et al., "Maintaining Discrimination and Fairness in Class Incremental Learning", CVPR 2020, arXiv 1911.07053. Equation numbers are the sheet's.
Legend: B batch, d features, K = C_old classes known, C = K + C_new classes after the step; classes stand in their order of appearance.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Annotated, Any, Literal, cast

import torch
from pydantic import Field
from torch import Tensor, nn

from limbeck import losses, seeds
from limbeck.contract import Artefact, Batch, Clock, Data, Frozen, Method, Paper, Phase, Update, Workbench
from limbeck.errors import InputError
from limbeck.evaluate.incremental import step_measures, summary
from limbeck.methods.classifiers._base import require_labels
from limbeck.methods.classifiers.exemplars_part import ExemplarMemory, Order, class_stream
from limbeck.models.growing import find_head, fresh_head, grown_head, head_inputs, in_class_order

GammaRule = Literal["paper", "shrink_only"]


class WeightAlignConfig(Frozen):
    """Knobs. "Ours": not from the paper. Optimiser, epochs a task and augmentation are the recipe's."""

    classes_per_step: Annotated[int, Field(ge=1)] | tuple[Annotated[int, Field(ge=1)], ...] = Field(
        2, description="classes of every task, or a list with one number a task (ours; the paper has 20 of CIFAR-100)"
    )
    class_order: Order | tuple[int, ...] = Field("seed", description="shuffled by the run's seed, 0 1 2 …, or a list of all classes (ours)")
    memory: int = Field(2000, ge=0, description="exemplars of old classes kept, over all classes (paper, CIFAR-100)")
    temperature: float = Field(2.0, gt=0, description="T of the distillation (re-implementations)")
    distil: bool = Field(True, description="distil from the previous model, eq. 2 and 3; off: cross-entropy alone")
    align: bool = Field(True, description="align the new classes' weights after each task but the first, eq. 4")
    gamma: GammaRule = Field("paper", description="γ as it comes (paper), or min(γ, 1) as some re-implementations have it")
    clip: bool = Field(True, description="head weights ≥ 0 after every step, eq. 5 (paper); off where features may be negative")
    bias: bool = Field(False, description="keep the head's bias, where it has one; it is not aligned (paper's analysis: none)")
    head: str = Field("", description="dotted path of the student's linear head; empty: it is searched for")


def incremental_loss(logits_BC: Tensor, targets: Tensor, old_logits_BK: Tensor | None, temperature: float = 2.0) -> tuple[Tensor, Tensor, Tensor]:
    """(1 − λ) L_CE + λ L_KD with λ = K/C (eq. 1 to 3), and its two parts: (loss, L_CE, L_KD).

    Args:
        logits_BC: [B, C]. targets: [B] int64 positions in order of appearance, or [B, C] soft.
        old_logits_BK: [B, K] of the frozen previous model; None at the first task: λ = 0. temperature: T > 0; no factor T².
    """
    ce = losses.cross_entropy(logits_BC, targets)
    if old_logits_BK is None:
        return ce, ce, torch.zeros_like(ce)
    kd = losses.partial_kd(logits_BC, old_logits_BK, temperature)
    lam = old_logits_BK.shape[1] / logits_BC.shape[1]
    return (1.0 - lam) * ce + lam * kd, ce, kd


def align_weights(W_Cd: Tensor, old: int, new: int, rule: GammaRule = "paper") -> tuple[Tensor, Tensor]:
    """Rows [old, old + new) times γ = (mean norm of the first `old` rows)/(mean norm of the new rows) (eq. 4): (weights [C, d], γ []).

    Args:
        W_Cd: [C, d] head weights without bias, a class a row; neither group all zero. rule: "shrink_only" takes min(γ, 1).
    """
    norms_C = torch.linalg.vector_norm(W_Cd, dim=1)
    gamma = norms_C[:old].mean() / norms_C[old : old + new].mean()
    if rule == "shrink_only":
        gamma = gamma.clamp(max=1.0)
    return torch.cat((W_Cd[:old], gamma * W_Cd[old : old + new], W_Cd[old + new :])), gamma


class WeightAlign(Method):
    """One phase a task. `phases` is lazy: item i holds the new samples of task i and the exemplars in memory when it is asked for,
    so it must be asked for after `leave` of item i − 1 (as a `for` loop does, and a fresh call with `islice` after a restart).
    """

    Config = WeightAlignConfig
    paper = Paper(
        "Maintaining Discrimination and Fairness in Class Incremental Learning", "1911.07053", "CVPR", 2020,
        reconstructed="no official code; T, λ and schedules from re-implementations; the form of the clipping, max(w, 0) each step, from memory",
    )  # fmt: skip
    needs_teacher = False
    needs_labels = True

    def setup(self) -> None:
        """Find the head, and fix the order and the groups of the classes."""
        require_labels(self.train_data, "'weight_align'")
        if self.train_data is None or self.train_data.targets is None:
            raise InputError("'weight_align' splits its training set into tasks, and there is none.", where="data", fix="Give bind(train=…).")
        self.head_path = find_head(self.student, self.config.head)
        self.given_bias = self.head.bias is not None
        self.bias = self.given_bias and self.config.bias
        self.targets = self.train_data.targets
        classes = self.num_classes or len(self.train_data.classes)
        self.stream = class_stream(self.config.class_order, self.config.classes_per_step, classes, self.seed)
        self.positions_C = self.stream.positions
        self.memory = ExemplarMemory(self.config.memory)
        self.task = 0  # tasks begun
        self.old: nn.Module | None = None
        self.gammas: list[float] = []
        self.measures: list[dict[str, Any]] = []

    @property
    def head(self) -> nn.Linear:
        """The student's linear head: one row a class seen."""
        return cast(nn.Linear, self.student.get_submodule(self.head_path))

    @property
    def span(self) -> tuple[int, int]:
        """Positions [C_old, C) of the current task's classes."""
        return self.stream.spans[self.task - 1]

    def frozen(self) -> Sequence[nn.Module]:
        """The previous model, aligned."""
        return [] if self.old is None else [self.old]

    def phases(self) -> Iterator[Phase]:
        """One a task: all samples of its new classes, and the exemplars of the older ones that are in memory now."""
        for task, (start, end) in enumerate(self.stream.spans, 1):
            yield Phase(f"task-{task}", indices=torch.cat((self.stream.samples(self.targets, start, end), self.memory.indices(start))))

    def enter(self, phase: Phase, clock: Clock, bench: Workbench) -> None:
        """Freeze a copy of the aligned model as "old", then enlarge the head; the first task starts with a new, small head."""
        self.task += 1
        start, end = self.span
        generator = seeds.generator(self.seed, "head", self.task)
        if start == 0:
            head = fresh_head(self.head, end, bias=self.bias, generator=generator)
        else:
            self.old = copy.deepcopy(self.student).eval().requires_grad_(False) if self.config.distil else None
            head = grown_head(self.head, end - start, generator=generator)
        if self.config.clip:
            with torch.no_grad():
                head.weight[start:].abs_()  # clipping would kill half of a fresh row
        self.student.set_submodule(self.head_path, head)

    def updates(self, batch: Batch, clock: Clock) -> Iterator[Update]:
        """One update: eq. 3 on new samples and exemplars alike."""
        assert batch.targets is not None
        old_logits_BK = None
        if self.old is not None:
            with torch.no_grad():
                old_logits_BK = self.old(batch.inputs)
        logits_BC = self.student(batch.inputs)
        loss, ce, kd = incremental_loss(logits_BC, self._positions(batch.targets), old_logits_BK, self.config.temperature)
        yield Update("student", loss, {"ce": ce, "kd": kd})

    def _positions(self, targets: Tensor) -> Tensor:
        """Labels to positions in order of appearance: [B] to [B], or [B, classes] soft to [B, C]."""
        self.positions_C = self.positions_C.to(targets.device)
        return targets[:, self.positions_C.argsort()[: self.span[1]]] if targets.is_floating_point() else self.positions_C[targets]

    @torch.no_grad()
    def after_step(self, player: str, clock: Clock) -> None:
        """Eq. 5: w ← max(w, 0)."""
        if self.config.clip:
            self.head.weight.clamp_(min=0)

    def leave(self, phase: Phase, clock: Clock, bench: Workbench) -> None:
        """Align once (eq. 4), choose exemplars with the aligned model, measure on all classes seen."""
        start, end = self.span
        if self.config.align and start > 0:
            with torch.no_grad():
                aligned_Cd, gamma = align_weights(self.head.weight, start, end - start, self.config.gamma)
                self.head.weight.copy_(aligned_Cd)
            self.gammas.append(float(gamma))
        ids_N = self.stream.samples(self.targets, start, end)
        features_Nd = bench.outputs(partial(head_inputs, self.student, self.head_path), cast(Data, self.train_data), ids_N)
        self.memory.update(features_Nd, ids_N, self.targets[ids_N], self.stream.order[start:end], end)
        if self.test is not None and self.test.targets is not None:
            ids_N = self.stream.samples(self.test.targets, 0, end)
            predictions_N = bench.outputs(self.student, self.test, ids_N).argmax(1)
            self.measures.append(step_measures(predictions_N, self.stream.positions[self.test.targets[ids_N]], self.stream.sizes[: self.task]))

    def inference(self) -> nn.Module:
        """A copy of the student, shaped as it was given: its outputs in the data's class order, very low for a class that has not come yet."""
        if self.task == 0:
            return self.student
        return in_class_order(self.student, self.head_path, self.stream.positions, bias=self.given_bias)

    def artefact(self) -> Artefact:
        """The classifier over all classes."""
        return Artefact(self.produces, self.inference(), facts={"class_order": list(self.stream.order), "gammas": self.gammas})

    def facts(self) -> dict[str, Any]:
        """γ, exemplars and, where there is a test set, what was measured after every task; `metrics` are numbers of the whole stream."""
        metrics = summary(self.measures)
        if self.gammas:
            metrics |= {"gamma_max": max(self.gammas), "gamma_below_one": sum(gamma < 1 for gamma in self.gammas) / len(self.gammas)}
        exemplars = [len(ids) for ids in self.memory.lists]
        known = {"class_order": list(self.stream.order), "gammas": self.gammas, "exemplars_per_class": exemplars, "steps": self.measures}
        return known | metrics | {"metrics": metrics}

    def state_dict(self) -> dict[str, Any]:
        """Task number (hence the head's size), class order, old model, exemplars, and what was measured."""
        old = None if self.old is None else self.old.state_dict()
        known = {"task": self.task, "order": list(self.stream.order), "old": old, "exemplars": self.memory.lists}
        return known | {"gammas": list(self.gammas), "measures": list(self.measures)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Grow the head and build the old model as they were; the student's weights are loaded afterwards."""
        self.task, self.gammas, self.measures = state["task"], list(state["gammas"]), list(state["measures"])
        self.stream = replace(self.stream, order=tuple(state["order"]))
        self.positions_C = self.stream.positions
        self.memory = ExemplarMemory(self.config.memory, state["exemplars"])
        if self.task > 0:
            start, end = self.span
            if state["old"] is not None:
                self.old = self._sized(copy.deepcopy(self.student), start).eval().requires_grad_(False)
                self.old.load_state_dict(state["old"])
            self._sized(self.student, end)

    def _sized(self, model: nn.Module, classes: int) -> nn.Module:
        """The model with a head of so many rows, to load weights into."""
        model.set_submodule(self.head_path, fresh_head(self.head, classes, bias=self.bias, generator=torch.Generator()))
        return model
