"""Classifiers: logits against labels, and against the teacher's logits."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from limbeck.contract import Batch, Data, Method, Teacher
from limbeck.data import AugmentSpec, root
from limbeck.errors import InputError
from limbeck.evaluate.classifier import classifier_metrics
from limbeck.evaluate.predict import predict
from limbeck.ingredients import Prepared, fits
from limbeck.kinds.base import Kind, Measured
from limbeck.report.summary import Outcome
from limbeck.teachers import as_teacher
from limbeck.teachers.recorded import RecordTeacher
from limbeck.train import TrainConfig

NAMES = ("accuracy", "nll", "ece", "brier", "agreement", "kl_to_teacher")


class ClassifierKind(Kind):
    """Accuracy, likelihood, calibration, agreement with the teacher. The reference is the teacher's logits on the test data [N, C], None without one."""

    name = "classifier"
    trains_alone = True

    def check(self, prepared: Prepared, train: TrainConfig, augment: AugmentSpec) -> None:
        """There must be classes, and the test data must have labels."""
        self._measurable(prepared)

    def _measurable(self, prepared: Prepared) -> None:
        if not prepared.num_classes:
            raise InputError("the training set has neither class names nor targets.", where="data", fix="Give it targets, or name its classes.")
        if prepared.test.targets is None:
            raise InputError("the test data have no labels to measure against.", where="data")

    def fits(self, module: nn.Module, example: Tensor, prepared: Prepared, where: str) -> None:
        """One logit a class; of text no more tokens than an encoder knows."""
        tokenizer, known = getattr(root(prepared.train), "tokenizer", None), getattr(module, "vocabulary", None)
        if tokenizer is not None and known is not None and tokenizer.vocabulary > known:
            raise InputError(
                f"it knows {known:,} tokens, the data's tokenizer '{tokenizer.name}' has {tokenizer.vocabulary:,}.",
                where=f"{where}.model",
                fix="Use the model's own tokenizer in data.source.",
            )
        fits(module, example, prepared, where)

    def asked(self, teacher: Any) -> nn.Module:
        """What answers with logits."""
        return Answering(teacher).eval()

    def teacher(self, members: Sequence[nn.Module]) -> Teacher:
        """One network, or an ensemble."""
        return as_teacher(members[0] if len(members) == 1 else list(members))

    def reference(self, teacher: Any, prepared: Prepared, place: Path | None) -> Tensor | None:
        """[N, C] the teacher's logits on the test data; None without a teacher, or where a record does not have them."""
        if teacher is None:
            return None
        if isinstance(teacher, RecordTeacher):
            return teacher.test_logits(prepared.test)
        module = teacher if isinstance(teacher, nn.Module) else nn.Identity()
        return predict(module, prepared.test, batch_size=self.evaluate.batch_size, forward=lambda x: teacher.logits(Batch(x)))

    def curve(self, method: Method, data: Data) -> dict[str, float]:
        """Accuracy and likelihood."""
        assert data.targets is not None
        found = classifier_metrics(predict(method.inference(), data, batch_size=self.evaluate.batch_size), data.targets)
        return {"accuracy": found.accuracy} | ({} if found.nll is None else {"nll": found.nll})

    def outcome(self, seed: int, module: nn.Module, prepared: Prepared, reference: Tensor | None) -> Outcome:
        """On the test data."""
        assert prepared.test.targets is not None
        logits = predict(module, prepared.test, batch_size=self.evaluate.batch_size)
        return Outcome.of(seed, classifier_metrics(logits, prepared.test.targets, reference))

    def teacher_arms(self, seed: int, teacher: Any, student: nn.Module, prepared: Prepared, reference: Tensor | None) -> list[Measured]:
        """The teacher, where its logits are known."""
        if reference is None or prepared.test.targets is None:
            return []
        return [Measured("teacher", self.labels["teacher"], Outcome.of(seed, classifier_metrics(reference, prepared.test.targets)))]

    def timed(self, role: str, module: Any) -> nn.Module | None:
        """The network; a teacher as what answers with logits."""
        if not isinstance(module, nn.Module):
            return None
        return Answering(module) if role == "teacher" else module

    def example(self, prepared: Prepared) -> Tensor:
        """Test inputs."""
        return prepared.test.prepare(prepared.test.fetch(torch.arange(min(64, len(prepared.test))))[0])

    def metrics(self, outcome: Outcome) -> dict[str, float]:
        """Those that are known."""
        return {name: float(value) for name in NAMES if (value := outcome.measure(name) if name != "brier" else outcome.brier) is not None}

    def evaluated(self, module: nn.Module, prepared: Prepared) -> dict[str, float]:
        """On the test data, without a teacher."""
        self.fits(module, prepared.test.prepare(prepared.test.fetch(torch.arange(min(2, len(prepared.test))))[0]), prepared, "student")
        self._measurable(prepared)
        assert prepared.test.targets is not None
        found = classifier_metrics(predict(module, prepared.test, batch_size=self.evaluate.batch_size), prepared.test.targets)
        values = {"accuracy": found.accuracy, "nll": found.nll, "ece": found.ece, "brier": found.brier, "samples": found.labelled}
        return {k: float(v) for k, v in values.items() if v is not None}


class Answering(nn.Module):
    """A teacher as a plain module."""

    def __init__(self, teacher: Any) -> None:
        super().__init__()
        self.teacher = teacher

    def forward(self, inputs: Tensor) -> Tensor:
        """Inputs [B, ...] → logits [B, C]."""
        return self.teacher.logits(Batch(inputs))
