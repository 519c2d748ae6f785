"""Distilling the Knowledge in a Neural Network (Hinton, Vinyals, Dean; arXiv 1503.02531).

L = w T² KL(σ(t/T)‖σ(s/T)) + (1 − w) CE(y, s)
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

from pydantic import Field

from limbeck.contract import Batch, Clock, Frozen, Method, Paper, Teacher, Update
from limbeck.losses import HintonReduction, hinton_terms
from limbeck.methods.classifiers._base import require_labels


class KDConfig(Frozen):
    """Knobs of `KD`."""

    temperature: float = Field(4.0, gt=0, le=1000, description="T, divides both sets of logits; the paper tried 1 to 20")
    weight: float = Field(0.9, ge=0, le=1, description="w, of the soft term; the paper puts 'considerably lower weight' on the labels; 0.9 is ours")
    reduction: HintonReduction = Field("batchmean", description="of the soft term: 'batchmean', or 'code' = divided by the number of classes too (1802.05668)")


class KD(Method):
    """Soft labels at a temperature, plus the true labels where there are any; unlabelled samples count in the soft term alone."""

    Config = KDConfig
    paper: ClassVar[Paper] = Paper("Distilling the Knowledge in a Neural Network", "1503.02531", "NIPS 2014 deep learning workshop", 2015)
    teacher: Teacher

    def setup(self) -> None:
        """Where the labels are all that counts, check that there are some."""
        if self.config.weight == 0:
            require_labels(self.train_data, "'kd' with weight 0")

    def updates(self, batch: Batch, clock: Clock) -> Iterator[Update]:
        """One update of the student."""
        w = self.config.weight
        t, s = self.teacher.logits(batch), self.student(batch.inputs)
        soft, hard = hinton_terms(s, t, batch.targets, self.config.temperature, self.config.reduction)
        yield Update("student", w * soft + (1 - w) * hard, {"soft": soft, "hard": hard})
