"""Distiller: A Systematic Study of Model Distillation Methods in NLP (He and others; arXiv 2109.11105): any pipeline of its search space, MI-α among them.

L = w_kd L_pred + w_int Σ_{(n→m)} L_int(H^S_n, H^T_m) + w_hard L_hard                                     (1)
L_pred: −Σ_c σ(z^T/τ)_c log σ(z^S/τ)_c (2), or the mean of ((z^S − z^T)/τ)² (3); neither has a factor τ². L_hard: the cross-entropy with the labels.
L_int: between hidden states (4) to (7), between attention maps (8), or −I_α(h^S; h^T) (10). Teachers are constants; everything else is trained together.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from limbeck import seeds
from limbeck.contract import Batch, Clock, Method, Paper, Player, Update
from limbeck.language.mixup import doubled, draw_mix, mixing
from limbeck.losses import cross_entropy, soft_cross_entropy
from limbeck.losses.divergences import full_precision
from limbeck.methods.language.distiller_part import Bundle, LiveTeacher, Matching, MatchingConfig, RecordedTeacher, probe, said
from limbeck.modes import evaluating


class DistillerConfig(MatchingConfig):
    """Knobs of `Distiller`: those of the matching, and:"""

    prediction: Literal["ce", "mse"] = Field("ce", description="L_pred")
    temperature: float = Field(1.0, gt=0, le=1000, description="τ, divides both sides' logits; the loss is not multiplied by τ² (code: 1)")
    w_kd: float = Field(1.0, ge=0, le=1e6, description="weight of L_pred (code: 1)")
    w_int: float = Field(1.0, ge=0, le=1e6, description="weight of the sum of L_int (code: 1)")
    w_hard: float = Field(0.0, ge=0, le=1e6, description="weight of the labels, where there are any (code: 0)")
    mixup: float = Field(0.0, ge=0, le=100, description="β of λ ~ Beta(β, β), once a batch, of word embeddings; the batch doubles (code: 0.4); 0: off")
    taps: tuple[str, ...] = Field((), description="a recorded teacher's features that are its hidden states 0 to K in order, '' where one is left out")


class Distiller(Method):
    """A student encoder learns a teacher's logits and, layer by layer, its hidden states.

    Student and teacher have `encode(inputs)` (`limbeck.language.encoders.EncoderClassifier`). One optimiser trains the student, projections, critics and
    baselines; the student alone comes out. Bounds need batches of 3 and more without repeated samples: set `train.drop_last`; each micro-batch counts alone.
    """

    Config = DistillerConfig
    paper: ClassVar[Paper] = Paper(
        "Distiller: A Systematic Study of Model Distillation Methods in Natural Language Processing", "2109.11105", "SustaiNLP at EMNLP", 2021,
        "Cli212/Distiller",
    )  # fmt: skip

    def setup(self) -> None:
        """Projections, critics and baselines. Raises InputError: student or teacher do not show what is to be matched."""
        c = self.config
        hidden, attention = c.intermediate != "none" and c.w_int > 0, c.intermediate == "attention" and c.w_int > 0
        self.source: LiveTeacher | RecordedTeacher
        if getattr(self.teacher, "members", None) is not None:
            self.source = LiveTeacher(self.teacher, hidden=hidden, attention=attention)
        else:
            self.source = RecordedTeacher(self.teacher, c.taps, hidden=hidden, attention=attention, mixup=c.mixup > 0)
        device = next((parameter.device for parameter in self.student.parameters()), torch.device("cpu"))
        with torch.no_grad(), evaluating(self.student):
            shape = said(self.student, probe(device), "student", attention=attention).shape
        matching = None
        if self.source.shape is not None:
            matching = Matching(c, shape, self.source.shape, seeds.generator(self.seed, "distiller nets")).to(device)
        self.attention = attention
        self.bundle = Bundle(self.student, matching)

    def players(self) -> Mapping[str, Player]:
        """The student and what is trained with it, under one optimiser."""
        return {"student": Player(self.bundle)}

    def updates(self, batch: Batch, clock: Clock) -> Iterator[Update]:
        """One update of everything that is trained."""
        c = self.config
        mix = draw_mix(len(batch), replace(clock, device=torch.device("cpu")).generator("mixup"), c.mixup) if c.mixup > 0 else None
        inputs = batch.inputs if mix is None else doubled(batch.inputs)
        teacher = self.source.of(batch, inputs, mix)
        with nullcontext() if mix is None else mixing(self.student, mix):
            student = said(self.student, inputs, "student", attention=self.attention)
        prediction = prediction_loss(student.logits_BC, teacher.logits_BC, c.prediction, c.temperature)
        loss, metrics = c.w_kd * prediction, {"prediction": prediction}
        if self.bundle.matching is not None:
            metrics["intermediate"] = self.bundle.matching(student, teacher)
            loss = loss + c.w_int * metrics["intermediate"]
        if c.w_hard > 0:
            metrics["hard"] = cross_entropy(student.logits_BC[: len(batch)], batch.targets)
            loss = loss + c.w_hard * metrics["hard"]
        yield Update("student", loss, metrics)

    def inference(self) -> nn.Module:
        """The student, without projections and critics."""
        return self.student

    def facts(self) -> dict[str, Any]:
        """The matched layers, and how many weights the matching's nets have."""
        matching = self.bundle.matching
        if matching is None:
            return {}
        return {"matched_layers": [list(pair) for pair in matching.pairs], "matching_parameters": sum(p.numel() for p in matching.parameters())}


def prediction_loss(student_BC: Tensor, teacher_BC: Tensor, kind: Literal["ce", "mse"], temperature: float) -> Tensor:
    """L_pred: (2), the mean over samples, or (3), the mean over samples and classes; no factor τ²."""
    s_BC, t_BC = full_precision(student_BC) / temperature, full_precision(teacher_BC.detach()) / temperature
    return soft_cross_entropy(s_BC, torch.softmax(t_BC, -1)) if kind == "ce" else F.mse_loss(s_BC, t_BC)
