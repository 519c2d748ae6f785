"""What a run asks of the kind of artefact that it makes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor, nn

from limbeck.contract import Artefact, Data, Method
from limbeck.data import AugmentSpec
from limbeck.ingredients import Prepared
from limbeck.methods.classifiers.supervised import Supervised
from limbeck.recipe import EvaluateSpec
from limbeck.report.summary import Outcome, Picture, Role
from limbeck.train import TrainConfig, Trained


@dataclass(frozen=True)
class Measured:
    """One seed of one arm: its role and name in the report, its numbers."""

    role: Role
    label: str
    outcome: Outcome


class Kind(ABC):
    """How runs that make one kind of artefact check, measure and show. One object serves a run; it may keep what is costly (features, samples)."""

    name: ClassVar[str]
    labels: ClassVar[Mapping[str, str]] = {"teacher": "teacher", "alone": "student alone", "distilled": "student distilled", "live": "student distilled live"}
    most_repeats: ClassVar[int | None] = None
    """The most timings that are taken of each module; None: as many as the recipe says."""
    keeps_first: ClassVar[bool] = False
    """Whether what came out is kept before it is measured, because measuring takes long."""
    trains_alone: ClassVar[bool] = False
    """Whether the student can also be trained without a teacher, for comparison."""

    fresh: Callable[[Prepared, int], nn.Module] | None = None
    """Builds the recipe's student anew from a seed; set by whoever runs it."""
    seed: int = 0
    """The run's first seed; set by whoever runs it."""

    def __init__(self, method: Method, evaluate: EvaluateSpec) -> None:
        self.method, self.evaluate = method, evaluate

    def headline(self, prepared: Prepared) -> tuple[str, ...]:
        """Measures that come first in a report; none for classifiers, which are judged by accuracy."""
        return ()

    @abstractmethod
    def check(self, prepared: Prepared, train: TrainConfig, augment: AugmentSpec) -> None:
        """Raise InputError where the data cannot be measured against, or cannot be trained on as the recipe says."""

    def beforehand(self, method: Method) -> Artefact:
        """What a network that was trained beforehand goes on as."""
        return method.artefact()

    def plain(self) -> Method:
        """How a network learns from the data alone, without a teacher."""
        return Supervised()

    def trained(self, outcome: Outcome, trained: Trained, prepared: Prepared) -> Outcome:
        """An outcome with what its training tells of the kind's own measures."""
        return outcome

    @abstractmethod
    def fits(self, module: nn.Module, example: Tensor, prepared: Prepared, where: str) -> None:
        """Raise InputError where a network cannot take the data's inputs ([B, ...] prepared) or gives something of another shape."""

    def asked(self, teacher: Any) -> nn.Module:
        """A teacher that was given as an object, as a module that `fits` can look at."""
        return teacher

    @abstractmethod
    def teacher(self, members: Sequence[nn.Module]) -> Any:
        """What a method is bound to, of the networks that the recipe names. Raises InputError."""

    @abstractmethod
    def reference(self, teacher: Any, prepared: Prepared, place: Path | None) -> Any:
        """What students are compared with (the teacher's answers, real samples); made once a teacher. place: where what must be kept is kept."""

    @abstractmethod
    def curve(self, method: Method, data: Data) -> dict[str, float]:
        """Numbers for a learning curve."""

    @abstractmethod
    def outcome(self, seed: int, module: nn.Module, prepared: Prepared, reference: Any) -> Outcome:
        """How good a student (or other network) is."""

    @abstractmethod
    def teacher_arms(self, seed: int, teacher: Any, student: nn.Module, prepared: Prepared, reference: Any) -> list[Measured]:
        """The teacher's own numbers, in as many ways as are worth showing beside this student."""

    @abstractmethod
    def timed(self, role: str, module: Any) -> nn.Module | None:
        """The module whose cost is measured for a role: maps an example to an answer; None: there is none."""

    @abstractmethod
    def example(self, prepared: Prepared) -> Tensor:
        """[B, ...] what the timed modules are given."""

    def pictures(self, teacher: Any, student: nn.Module, prepared: Prepared, reference: Any) -> tuple[Picture, ...]:
        """Samples for the report; none by default."""
        return ()

    def facts(self, reference: Any) -> dict[str, Any]:
        """JSON values on how it was measured."""
        return {}

    @abstractmethod
    def metrics(self, outcome: Outcome) -> dict[str, float]:
        """An outcome's numbers by name, for `Result.metrics` and claims."""

    @abstractmethod
    def evaluated(self, module: nn.Module, prepared: Prepared) -> dict[str, float]:
        """What `limbeck evaluate` prints of an artefact. Raises InputError where it does not fit the data."""
