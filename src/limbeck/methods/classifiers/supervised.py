"""Training without a teacher: the baseline of every distilled student, and how teachers are made. Maximum likelihood, no paper.

L = −(1/B_labelled) Σ_b log σ(s(x_b))_{y_b}
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

from pydantic import Field

from limbeck.contract import Batch, Clock, Frozen, Method, Paper, Update
from limbeck.losses import cross_entropy
from limbeck.methods.classifiers._base import require_labels


class SupervisedConfig(Frozen):
    """Knobs of `Supervised`."""

    label_smoothing: float = Field(0.0, ge=0, lt=1, description="share of each label spread evenly over the classes (1512.00567 section 7)")


class Supervised(Method):
    """Plain cross-entropy on the labels; unlabelled samples (IGNORE) are left out of the mean."""

    Config = SupervisedConfig
    paper: ClassVar[Paper] = Paper("maximum likelihood (R. A. Fisher); labels only, no teacher", "", "Phil. Trans. R. Soc. A 222", 1922)
    needs_teacher = False
    needs_labels = True

    def setup(self) -> None:
        """Check that there are labels."""
        require_labels(self.train_data, "'supervised'")

    def updates(self, batch: Batch, clock: Clock) -> Iterator[Update]:
        """One update of the student."""
        yield Update("student", cross_entropy(self.student(batch.inputs), batch.targets, self.config.label_smoothing))
