"""The few types that everything meets in: Method, Player, Phase, Update, Clock, Batch, Artefact, Paper (DESIGN §3).

A method holds mathematics only. It says which players it trains, in which phases, and, batch by batch, which losses to step:

    def updates(self, batch, clock):
        x = self.generate(batch)
        yield Update("critic", self.critic_loss(x.detach()))
        if clock.step % self.config.ratio == 0:
            yield Update("generator", self.distribution_matching_loss(x))

Whoever drives it (limbeck's trainer, or a person's own loop) does backward, clipping, stepping and devices.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Protocol, Self, TypeVar, runtime_checkable

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor, nn

from limbeck import seeds
from limbeck.components import Component
from limbeck.errors import InputError, suggestion

IGNORE = -100
"""The target of an unlabelled sample, which `torch.nn.functional.cross_entropy` ignores."""


class Frozen(BaseModel):
    """Base of every configuration: immutable, typed, no unknown fields."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, protected_namespaces=())


class ScheduleSpec(Frozen):
    """How the learning rate moves over a phase; a pure function of the step."""

    name: Literal["constant", "cosine", "linear", "step"] = "constant"
    warmup: float = Field(0.0, ge=0, le=1, description="fraction of the phase spent rising linearly from 0")
    milestones: tuple[float, ...] = Field((), description="'step': fractions of the phase at which the rate is multiplied by gamma")
    gamma: float = Field(0.1, gt=0, le=1, description="'step': the factor at each milestone")
    final: float = Field(0.0, ge=0, le=1, description="'cosine' and 'linear': the last factor")


class OptimiserSpec(Frozen):
    """An optimiser and its schedule. Fields that an optimiser does not have are ignored by it (betas by SGD)."""

    name: Literal["sgd", "adam", "adamw", "radam"] = "sgd"
    lr: float = Field(0.1, ge=0, le=1e4)
    momentum: float = Field(0.9, ge=0, lt=1)
    nesterov: bool = False
    weight_decay: float = Field(0.0, ge=0, le=1e3)
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = Field(1e-8, gt=0)
    schedule: ScheduleSpec = ScheduleSpec()


@dataclass(frozen=True)
class Paper:
    """Where a method comes from. `official_code` is "" where none was published."""

    title: str
    arxiv: str
    venue: str
    year: int
    official_code: str = ""
    reconstructed: str = ""
    """What had to be reconstructed, "" if nothing."""

    @property
    def published(self) -> str:
        """Venue and year, the year once."""
        return self.venue if str(self.year) in self.venue else f"{self.venue} {self.year}".strip()


@dataclass(frozen=True)
class Batch:
    """One batch as a method sees it.

    inputs: [B, ...] floats (normalised, augmented); targets: [B] int64 (IGNORE where unlabelled), [B, C] soft, or None;
    ids: [B] int64 positions in the training set; views: [B] int64, which view of each sample (None without `data.views`);
    recorded: what a record holds for these samples and views: "logits" [B, T, C], "features/TAP" [B, ...], "scores/NAME" [B]; empty without a record.
    """

    inputs: Tensor
    targets: Tensor | None = None
    ids: Tensor | None = None
    views: Tensor | None = None
    recorded: Mapping[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.inputs)

    def to(self, device: torch.device, non_blocking: bool = True) -> Batch:
        """The same batch on another device."""

        def moved(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.to(device, non_blocking=non_blocking)

        recorded = {name: tensor.to(device, non_blocking=non_blocking) for name, tensor in self.recorded.items()}
        return Batch(self.inputs.to(device, non_blocking=non_blocking), moved(self.targets), moved(self.ids), moved(self.views), recorded)

    def cut(self, parts: int) -> list[Batch]:
        """Near-equal parts, views of this batch; empty ones are left out."""
        if parts == 1:
            return [self]

        def pieces(tensor: Tensor | None) -> list[Tensor | None]:
            return [None] * parts if tensor is None else list(tensor.tensor_split(parts))

        recorded = {name: tensor.tensor_split(parts) for name, tensor in self.recorded.items()}
        cut = zip(self.inputs.tensor_split(parts), pieces(self.targets), pieces(self.ids), pieces(self.views), strict=True)
        return [Batch(*piece, {name: t[i] for name, t in recorded.items()}) for i, piece in enumerate(cut) if len(piece[0])]


@runtime_checkable
class Data(Protocol):
    """A finite set of inputs, with targets where there are any, fetched by position."""

    classes: Sequence[str]
    """Names of the classes; empty where there are none."""

    @property
    def targets(self) -> Tensor | None:
        """[N] int64, IGNORE where unlabelled, or None."""
        ...

    def __len__(self) -> int: ...

    def fetch(self, ids_B: Tensor, *, seed: int = 0, epoch: int = 0) -> tuple[Tensor, Tensor | None]:
        """Raw inputs [B, ...] (uint8 or float) and targets [B]; seed and epoch matter only where a user's own transform is random."""
        ...

    def prepare(self, raw: Tensor) -> Tensor:
        """Raw inputs to what a network takes: float32, scaled, normalised."""
        ...


class Teacher(Protocol):
    """Where supervision comes from. Frozen; its answers carry no gradient."""

    def logits(self, batch: Batch) -> Tensor:
        """[B, C]; for an ensemble the log of the mean of the members' probabilities."""
        ...

    def all_logits(self, batch: Batch) -> Tensor:
        """[T, B, C], one slice a member (T = 1 for a single teacher)."""
        ...


@dataclass(frozen=True)
class Player:
    """A named set of parameters with its own optimiser. `optimiser` None: the recipe's `train.optimiser`."""

    module: nn.Module
    optimiser: OptimiserSpec | None = None
    ema: float | None = None
    """Decay of an exponential moving average of the weights, kept by the engine; None: none."""


@dataclass(frozen=True)
class Update:
    """One optimiser step that a method asks for: `loss` is a scalar with a graph to the player's parameters.

    metrics: scalar tensors to log; they are detached and never read on the host before a logging step. fresh: the player's optimiser forgets what it has
    gathered (momentum) before this step, its weights having been made anew.
    """

    player: str
    loss: Tensor
    metrics: Mapping[str, Tensor] = field(default_factory=dict)
    fresh: bool = False


@dataclass(frozen=True)
class Phase:
    """A stretch of training with its own data, length and optimisers.

    epochs or steps: its length; both None: the recipe's. indices: which training samples ([M] int64), None: all.
    optimisers: overrides by player; rate: what every player's learning rate is multiplied by. `trains`: names of the players that take part, None: all.
    With `data.views`: views_per_sample n views of a sample stand side by side in a batch, which then holds batch_size // n samples, and an epoch is a pass
    over the samples; over the phase's last `single_last` passes of one view each a batch holds batch_size samples with one view; usable [N, V] bool says
    which views may be drawn (None: all). data_free: nothing is fetched; batches have ids and empty inputs [B, 0], so that len(batch) still says how many.
    """

    name: str = "train"
    epochs: int | None = None
    steps: int | None = None
    indices: Tensor | None = None
    optimisers: Mapping[str, OptimiserSpec] = field(default_factory=dict)
    trains: Sequence[str] | None = None
    rate: float = 1.0
    views_per_sample: int = 1
    single_last: int = 0
    usable: Tensor | None = None
    data_free: bool = False


def _itself(sums: Tensor) -> Tensor:
    return sums


@dataclass
class Clock:
    """Where training stands. `step` counts batches within the phase, `epoch` passes over its data (both from 0)."""

    seed: int = 0
    phase: str = "train"
    phase_index: int = 0
    step: int = 0
    steps: int = 1
    epoch: int = 0
    rank: int = 0
    micro: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    world: int = 1
    total: Callable[[Tensor], Tensor] = field(default=_itself, repr=False)
    """A tensor's sum over all processes, which every one of them must ask for at the same point."""

    @property
    def progress(self) -> float:
        """Fraction of the phase that is done, in [0, 1)."""
        return self.step / max(self.steps, 1)

    def generator(self, name: str) -> torch.Generator:
        """A generator seeded by (run seed, phase, step, process, micro-batch, name): the same after a restart."""
        return seeds.generator(self.seed, self.phase_index, self.step, self.rank, self.micro, name, device=self.device)


@runtime_checkable
class Encoder(Protocol):
    """How an artefact's tensors are put into bytes (packed low-bit weights, say). `decoder` is the import path of its inverse."""

    decoder: str

    def encode(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """State dict to the tensors that go to disk."""
        ...


@dataclass(frozen=True)
class Artefact:
    """What comes out. kind: classifier, encoder, generator, scene, dataset, language_model, adapter."""

    kind: str
    module: nn.Module
    encoder: Encoder | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)
    """JSON values worth keeping with it (bits a weight, aligned gammas)."""
    around: Callable[[Component], Component] | None = None
    """Where the module is built around the student's: how the student's component becomes the module's. None: the module is the student's."""


class Workbench(Protocol):
    """What the engine lends a method between steps: forward passes on its devices, averaged weights."""

    @property
    def device(self) -> torch.device:
        """Where modules and batches are."""
        ...

    def outputs(self, forward: Callable[[Tensor], Tensor], data: Data, indices: Tensor | None = None) -> Tensor:
        """`forward` over data in order, in eval mode, without gradient or augmentation: [M, ...] float32 on the CPU, the same on every process."""
        ...

    def average(self, player: str) -> nn.Module:
        """The exponential moving average of a player that has one."""
        ...


class Method(ABC):
    """One published system. Subclasses set `Config` and `paper`, and write `players` and `updates`.

        method = KD(temperature=4.0).bind(student=student, teacher=teacher)
        for update in method.updates(batch, clock): ...

    Raises:
        InputError: a knob is unknown or out of range.
    """

    Config: ClassVar[type[Frozen]] = Frozen
    paper: ClassVar[Paper]
    produces: ClassVar[str] = "classifier"
    needs_teacher: ClassVar[bool] = True
    needs_labels: ClassVar[bool] = False
    starts_trained: ClassVar[bool] = False
    """Whether the method expects a student that was trained before."""
    needs_record: ClassVar[bool] = False
    """Whether the method learns from a recorded teacher alone, over views of kind "boxes"."""
    takes_augmented: ClassVar[bool] = True
    """Methods that make data sets: whether batches of real images may be augmented."""
    needs_experts: ClassVar[bool] = False
    """Whether the teacher is the recorded weights of networks in training (a teacher's section `experts`)."""
    example_model: ClassVar[str] = "{name: mlp_denoiser, widths: [64, 64]}"
    """Methods that make generators: the denoiser (in YAML) that `limbeck new` writes into a recipe."""
    reads_text: ClassVar[bool] = False
    """Methods that make classifiers: whether the networks are encoders that read token rows."""
    foreign_teacher: ClassVar[bool] = False
    """Methods that make language models: whether the teacher may have a tokenizer of its own, that of its section's `data`."""
    needs_unlabelled: ClassVar[bool] = False
    """Whether the method expects training samples without a label, to choose among."""

    def __init__(self, config: Frozen | None = None, /, **knobs: Any) -> None:
        self.config: Any = config if config is not None else validated(self.Config, knobs)

    def bind(
        self,
        *,
        student: nn.Module,
        teacher: Teacher | None = None,
        fresh_student: Callable[[int], nn.Module] | None = None,
        train: Data | None = None,
        validation: Data | None = None,
        test: Data | None = None,
        num_classes: int | None = None,
        pool: Tensor | None = None,
        seed: int = 0,
    ) -> Self:
        """Give the method what it works on; returns itself.

        Args:
            student: the module to train. teacher: where supervision comes from (anything with `logits(batch)`).
            fresh_student: builds the student anew from a seed, for methods that train several rounds.
            train, validation, test: the data sets; test is only ever reported on, validation may choose knobs.
            num_classes: width of the logits. seed: of the run.
            pool: [M] int64, positions in `train` of the extra, unlabelled inputs of `data.pool`; None: there are none.
        """
        if self.needs_teacher and teacher is None:
            raise InputError(f"the method '{type(self).__name__}' needs a teacher.", where="teacher", fix="Add a 'teacher:' section to the recipe.")
        self.student, self.teacher = student, teacher
        self.fresh_student, self.train_data, self.validation, self.test = fresh_student, train, validation, test
        self.num_classes, self.pool, self.seed = num_classes, pool, seed
        self.setup()
        return self

    def setup(self) -> None:
        """Build what the method needs beyond student and teacher (a discriminator, say). Called once by `bind`."""

    def players(self) -> Mapping[str, Player]:
        """The parameters being trained, by name. Asked anew at the start of every phase."""
        return {"student": Player(self.student)}

    def frozen(self) -> Sequence[nn.Module]:
        """Modules that only give answers; the engine moves them to its device and keeps them in eval mode."""
        return [self.teacher] if isinstance(self.teacher, nn.Module) else []

    def phases(self) -> Iterable[Phase]:
        """The stretches of training, in order. Cheap and repeatable: after a restart it is asked again, and those done are skipped."""
        return [Phase()]

    def check_length(self, steps: int) -> None:
        """Raise InputError where the recipe's `steps` are too few for a phase of that length; asked before anything is trained."""

    def enter(self, phase: Phase, clock: Clock, bench: Workbench) -> None:
        """Before a phase's first step and before its players are asked for: copy an old model, grow a head, start afresh."""

    def leave(self, phase: Phase, clock: Clock, bench: Workbench) -> None:
        """After a phase's last step: align weights, choose exemplars, measure."""

    @abstractmethod
    def updates(self, batch: Batch, clock: Clock) -> Iterator[Update]:
        """The losses to step on one batch, in order; each is stepped before the next is computed."""

    def weigh(self, batch: Batch, clock: Clock) -> Tensor | None:
        """How much a batch counts, a scalar tensor on its device, where its losses are means over something else than its samples (over tokens).

        Micro-batches and processes are weighed by it: a batch then gives the gradient that it would give in one piece. None: by samples. It is asked
        before `updates`, once a micro-batch, and only where there are several; a method that makes its own samples may make them here and keep them.
        """
        return None

    def after_step(self, player: str, clock: Clock) -> None:
        """After each optimiser step of a player, without gradient: clip, sort, project."""

    def notice(self, row: Mapping[str, float]) -> Sequence[str]:
        """What a reader must know, out of one logged row: sentences for the log and the report.

        row: "PLAYER/METRIC" → mean since the last row; "progress": fraction of the phase that is done.
        """
        return ()

    def inference(self) -> nn.Module:
        """The module to evaluate and to save; by default the student."""
        return self.student

    def artefact(self) -> Artefact:
        """What comes out."""
        return Artefact(self.produces, self.inference())

    def facts(self) -> dict[str, Any]:
        """JSON values for the report (gammas, chosen weights, sizes)."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """State beyond the players' modules (tensors, numbers, texts, lists, dicts): what a restart needs."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put `state_dict`'s content back, structure first (grow heads, make old models): the players' weights are loaded afterwards."""


C = TypeVar("C", bound=BaseModel)


def validated(model: type[C], values: Mapping[str, Any]) -> C:
    """Build a configuration; a wrong value becomes an InputError that names the field and the likely fix."""
    try:
        return model.model_validate(dict(values))
    except ValidationError as error:
        raise input_error(error, model) from error


def input_error(error: ValidationError, model: type[BaseModel]) -> InputError:
    """The first complaint of pydantic as an InputError with a field path and, for a misspelt key, a suggestion."""
    found = error.errors(include_url=False)
    first = next((e for e in found if e["type"] == "extra_forbidden"), found[0])  # a misspelt key also makes one missing
    place = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        known = _fields_at(model, first["loc"][:-1])
        return InputError(f"unknown field '{first['loc'][-1]}'.", where=place, fix=suggestion(str(first["loc"][-1]), known))
    if first["type"] == "missing":
        return InputError(f"the field '{first['loc'][-1]}' is missing.", where=place, fix="Add it.")
    given = repr(first.get("input"))
    given = given if len(given) <= 60 else given[:57] + "…"
    return InputError(f"{first['msg'].removeprefix('Value error, ')} (given: {given}).", where=place)


def _fields_at(model: type[BaseModel], path: Sequence[int | str]) -> list[str]:
    """Field names of the model found by walking `path` through nested models; empty where the path leaves them."""
    here: Any = model
    for part in path:
        if isinstance(part, int):
            continue
        annotation = here.model_fields[part].annotation if part in getattr(here, "model_fields", {}) else None
        nested = [a for a in (annotation, *getattr(annotation, "__args__", ())) if isinstance(a, type) and issubclass(a, BaseModel)]
        if not nested:
            return []
        here = nested[0]
    return list(getattr(here, "model_fields", {}))
