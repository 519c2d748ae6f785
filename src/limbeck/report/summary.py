"""What a report is made from: plain dataclasses that go to JSON and back, without tensors."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any, Literal

from limbeck.errors import InputError
from limbeck.evaluate.statistics import Bin, Latency, Paired, mean_stderr, paired

if TYPE_CHECKING:
    from pydantic import TypeAdapter

    from limbeck.evaluate.classifier import ClassifierMetrics

Role = Literal["teacher", "alone", "distilled", "other"]


@dataclass(frozen=True)
class Curve:
    """A learning curve: what one player's metric was at which step. None where it was not a finite number."""

    player: str
    metric: str
    steps: tuple[int, ...]
    values: tuple[float | None, ...]


@dataclass(frozen=True)
class Outcome:
    """What one seed of one arm gave. Fractions in [0, 1], nats, seconds; None: not measured, or not a finite number.

    measures: numbers of one kind of artefact by name; the names that a report knows are those of `limbeck.report.measures`.
    """

    seed: int
    accuracy: float | None = None
    nll: float | None = None
    ece: float | None = None
    brier: float | None = None
    agreement: float | None = None
    kl_to_teacher: float | None = None
    per_class: tuple[float | None, ...] = ()
    bins: tuple[Bin, ...] = ()
    nonfinite: int = 0
    training_seconds: float | None = None
    examples_seen: int | None = None
    curves: tuple[Curve, ...] = ()
    measures: Mapping[str, float | None] = field(default_factory=dict)

    def measure(self, name: str) -> float | None:
        """A number of this outcome: one of `measures`, or a field of the same name (accuracy, nll, training_seconds …); None where it has none."""
        return self.measures[name] if name in self.measures else getattr(self, name) if name in FIELDS else None

    @classmethod
    def of(
        cls,
        seed: int,
        metrics: ClassifierMetrics,
        *,
        training_seconds: float | None = None,
        examples_seen: int | None = None,
        curves: Sequence[Curve] = (),
    ) -> Outcome:
        """From a classifier's metrics and what its training cost."""
        return cls(
            seed=seed,
            accuracy=metrics.accuracy,
            nll=metrics.nll,
            ece=metrics.ece,
            brier=metrics.brier,
            agreement=metrics.agreement,
            kl_to_teacher=metrics.kl_to_teacher,
            per_class=metrics.per_class,
            bins=metrics.bins,
            nonfinite=metrics.nonfinite,
            training_seconds=training_seconds,
            examples_seen=examples_seen,
            curves=tuple(curves),
        )


FIELDS = frozenset({"accuracy", "nll", "ece", "brier", "agreement", "kl_to_teacher", "training_seconds", "examples_seen"})
"""The fields of an outcome that are numbers of its quality or cost."""


@dataclass(frozen=True)
class Arm:
    """One of the things compared: the teacher, the student trained alone, the student distilled, or another.

    Of a generator's run "teacher" is the teacher with its best sampler, "alone" the undistilled teacher with as many network calls as the
    student makes, "distilled" the student, and "other" a further rung of the teacher's ladder (2, 4, 8 calls …).

    label: what it is called in tables. outcomes: one a seed. parameters, macs (one input), bytes (on disk): None if unknown.
    latencies: one a batch size, measured side by side with the other arms'.
    """

    role: Role
    label: str
    outcomes: tuple[Outcome, ...]
    parameters: int | None = None
    macs: int | None = None
    bytes: int | None = None
    latencies: tuple[Latency, ...] = ()

    def values(self, measure: str) -> list[float]:
        """The measure by seed (`Outcome.measure`); empty if a seed lacks it."""
        found = [outcome.measure(measure) for outcome in self.outcomes]
        known = [v for v in found if v is not None]
        return known if len(known) == len(found) else []

    def mean(self, measure: str) -> tuple[float, float | None] | None:
        """Mean and standard error over the seeds (None for one seed); None if a seed lacks the measure."""
        values = self.values(measure)
        return mean_stderr(values) if values else None

    def per_class(self) -> list[float | None]:
        """[C] accuracy of each class, averaged over the seeds that have it; empty if a seed has no such table."""
        tables = [outcome.per_class for outcome in self.outcomes]
        if not tables or len({len(t) for t in tables}) != 1:
            return []
        columns = [[v for v in column if v is not None] for column in zip(*tables, strict=True)]
        return [math.fsum(c) / len(c) if c else None for c in columns]

    def bins(self) -> list[Bin]:
        """The reliability table of all seeds' samples together; empty if a seed has none or the bins differ."""
        tables = [outcome.bins for outcome in self.outcomes]
        if not tables or len({tuple((b.low, b.high) for b in t) for t in tables}) != 1:
            return []
        return [_pooled(row) for row in zip(*tables, strict=True)]

    def latency(self, batch_size: int) -> Latency | None:
        """The latency at a batch size, None where it was not measured."""
        return next((x for x in self.latencies if x.batch_size == batch_size), None)


def _pooled(bins: Sequence[Bin]) -> Bin:
    count = sum(b.count for b in bins)

    def mean(values: Sequence[float | None]) -> float | None:
        known = [(b.count, v) for b, v in zip(bins, values, strict=True) if b.count]
        return math.fsum(n * v for n, v in known if v is not None) / count if known and all(v is not None for _, v in known) else None

    return Bin(bins[0].low, bins[0].high, count, mean([b.confidence for b in bins]), mean([b.accuracy for b in bins]))


@dataclass(frozen=True)
class Picture:
    """A sample image for the page: a PNG as base64 text, and what it shows in words.

    caption: printed below it; "": `alt`. group: pictures of one group stand side by side under this heading; "": under none.
    """

    png_base64: str
    alt: str
    caption: str = ""
    group: str = ""


@dataclass(frozen=True)
class RunSummary:
    """Everything a report shows.

    title: the run's name. method: its name, "" for none. recipe: the resolved recipe as YAML. created: ISO date and time.
    environment, facts: JSON values, nested at will, shown as small tables; facts are what the method says of itself.
    classes: names, in the order of `per_class`. notes: sentences for the reader; on a generator's page they stand at the top, as warnings.
    kind: what the run made, "classifier", "generator", "dataset" or "language_model". headline: the measures that come first in tables, the first being the one that
    judges a generator's quality; a classifier's run has none (it is judged by accuracy).
    """

    title: str
    arms: tuple[Arm, ...]
    method: str = ""
    recipe: str = ""
    created: str = ""
    environment: Mapping[str, Any] = field(default_factory=dict)
    classes: tuple[str, ...] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    pictures: tuple[Picture, ...] = ()
    kind: str = "classifier"
    headline: tuple[str, ...] = ()

    @property
    def judged_by(self) -> str:
        """The measure that decides which arm is better: accuracy, or a generator's first headline measure ("" where none is named)."""
        return "accuracy" if self.kind == "classifier" else next(iter(self.headline), "")

    def arm(self, role: Role) -> Arm | None:
        """The first arm of a role."""
        return next((arm for arm in self.arms if arm.role == role), None)

    def difference(self) -> Paired | None:
        """The distilled student minus the arm "alone" in what judges the run (`judged_by`), paired by seed; None without common seeds that have it.

        Accuracy as a fraction; of a generator the first headline measure, whichever direction is the better one.
        """
        distilled, alone = self.arm("distilled"), self.arm("alone")
        if distilled is None or alone is None:
            return None
        mine, other = ({o.seed: v for o in arm.outcomes if (v := o.measure(self.judged_by)) is not None} for arm in (distilled, alone))
        seeds = [s for s in mine if s in other]
        return paired([mine[s] for s in seeds], [other[s] for s in seeds]) if seeds else None

    def to_json(self) -> str:
        """The summary as JSON text; numbers that are not finite become null."""
        return _adapter().dump_json(self, indent=2).decode()

    @classmethod
    def from_json(cls, text: str) -> RunSummary:
        """Back from `to_json`. Raises InputError that names the field where the text is not a run summary."""
        from pydantic import ValidationError

        try:
            return _adapter().validate_json(text)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            place = ".".join(str(part) for part in first["loc"])
            raise InputError(f"this is not a run summary: {first['msg']}.", where=place, fix="Was the file made by limbeck, and is it whole?") from error


@cache
def _adapter() -> TypeAdapter[RunSummary]:
    from pydantic import TypeAdapter

    return TypeAdapter(RunSummary)
