"""The typed recipe: everything that decides a run's result, from YAML or Python (DESIGN §7)."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import Field, ValidationError, field_validator, model_validator

from limbeck.components import Component
from limbeck.contract import Frozen, input_error
from limbeck.data.augment import AugmentSpec
from limbeck.data.views import ViewSpec
from limbeck.errors import InputError
from limbeck.evaluate.features import FeatureSpec
from limbeck.evaluate.synthetic_sets import SetTraining
from limbeck.evaluate.transfer import TransferSpec
from limbeck.models import CATALOGUE
from limbeck.synthetic.experts import ExpertSpec
from limbeck.train.config import TrainConfig

_MAX_BYTES = 4 * 2**20  # of a recipe
_MAX_FIELDS = 100_000  # of a recipe, what aliases repeat counted each time


class DataSpec(Frozen):
    """Where the data come from and which part of them is used."""

    source: Component
    train_size: int | None = Field(None, ge=1, description="training samples kept (a class-balanced subset)")
    test_size: int | None = Field(None, ge=1, description="test samples kept (a class-balanced subset)")
    validation: int = Field(0, ge=0, description="training samples held out for methods that choose knobs")
    labelled: int | None = Field(None, ge=1, description="training samples that keep their label (drawn anew for every seed)")
    label_noise: float = Field(0.0, ge=0, le=1, description="fraction of training labels replaced by a wrong one (drawn anew for every seed)")
    augment: AugmentSpec = AugmentSpec()
    views: ViewSpec | None = Field(None, description="a fixed set of looks at every sample, which a record can answer for; null: a new look every epoch")
    whiten: bool = Field(False, description="ZCA, fitted on the training data, in place of the source's normalisation (images)")
    pool: tuple[Component, ...] = Field((), description="sources whose training inputs come behind the data, unlabelled")

    @model_validator(mode="after")
    def _views_fit(self) -> Self:
        if self.views is not None:
            try:
                self.views.check(self.augment)
            except InputError as error:
                raise ValueError(f"{error.what} {error.fix}") from error
        return self


class ModelSpec(Frozen):
    """A network: how it is built, where its weights come from, and how it is trained here first, if it is."""

    model: Component
    weights: str | None = Field(None, description="a safetensors or torch file with its state dict")
    train: TrainConfig | None = Field(None, description="train it first, on the labels unless `method` says otherwise")
    data: DataSpec | None = Field(None, description="what it is trained on first; null: the run's data")
    method: Component = Field(Component(name="supervised"), description="the method of that first training")
    seed: Annotated[int, Field(ge=0, lt=2**62)] | None = Field(None, description="of its weights and first training; null: the run's, anew for every seed")

    @model_validator(mode="after")
    def _own_teacher(self) -> Self:
        if self.train is None and self.method != Component(name="supervised"):
            raise ValueError("'method' says how the network is trained first: it needs 'train'.")
        if self.train is None and self.data is not None:
            raise ValueError("'data' says what the network is trained on first: it needs 'train'.")
        return self


class TeacherSpec(ModelSpec):
    """A teacher: a network, by default one for all seeds, a record of one, or the recorded weights of networks in training."""

    model: Component | None = None  # type: ignore[assignment]
    seed: Annotated[int, Field(ge=0, lt=2**62)] | None = 0
    record: str | None = Field(None, description="instead of a model: the folder (or URL) of a record that `limbeck record` made")
    make: str | None = Field(None, description="the record recipe that is run first where there is no finished record yet")
    fingerprint: str | None = Field(None, description="of the teacher that the record must be of (or its beginning); null: any")
    experts: ExpertSpec | None = Field(None, description="instead of a model: students that are trained on the real data, their weights kept after every epoch")
    folder: str | None = Field(None, description="'experts': where they lie, to be shared by runs; null: in the run's folder")

    @model_validator(mode="after")
    def _network_or_record(self) -> Self:
        if self.experts is not None:
            if self.model is not None or self.record is not None or self.weights is not None or self.train is not None or self.make is not None:
                raise ValueError("'experts' are networks as the student is: they stand without 'model', 'record', 'weights', 'train' and 'make'.")
            return self
        if self.folder is not None:
            raise ValueError("'folder' belongs to 'experts'.")
        if (self.model is None) == (self.record is None):
            raise ValueError("a teacher is a network or a record: give 'model' or 'record', one of them.")
        if self.record is not None and (self.weights is not None or self.train is not None):
            raise ValueError("a recorded teacher has neither 'weights' nor 'train': it is not loaded.")
        if self.record is None and (self.make is not None or self.fingerprint is not None):
            raise ValueError("'make' and 'fingerprint' belong to a 'record'.")
        return self


class EvaluateSpec(Frozen):
    """What is measured at the end."""

    batch_size: int = Field(512, ge=1, le=1_000_000)
    latency: bool = Field(True, description="time student and teacher side by side, batch 1")
    latency_repeats: int = Field(50, ge=3, le=100_000)
    samples: int = Field(2000, ge=16, le=1_000_000, description="generators: samples that are drawn and compared with as many real ones")
    features: FeatureSpec | None = Field(None, description="generators: what images are compared by; null: a small classifier, pixels without labels")
    teacher_steps: tuple[Annotated[int, Field(ge=1, le=10_000)], ...] = Field(
        (2, 4, 18), min_length=1, description="generators: steps of the teacher that are shown; the most, with `teacher_sampler`, is its best, fewer are DDIM's"
    )
    teacher_sampler: Literal["heun", "ddim", "euler"] = Field("heun", description="generators: how the teacher samples (heun: 2 · steps − 1 calls)")
    networks: int = Field(5, ge=1, le=1000, description="data sets: fresh networks that are trained on a set")
    training: SetTraining | None = Field(None, description="data sets: how a fresh network is trained on a set; null: as the method says")
    full_training: SetTraining | None = Field(None, description="data sets: how it is trained on all real data; null: as `training` says")
    baselines: tuple[Literal["random", "kmeans", "full"], ...] = Field(
        ("random", "kmeans", "full"), description="data sets: what stands beside: real images of as many a class, drawn or nearest to centres; all real data"
    )
    architectures: tuple[Component, ...] = Field((), description="data sets: other networks that are trained on the set, which it was not made with")
    transfer: TransferSpec | None = Field(None, description="sets of pairs: how a network pre-trained on one goes on to a task; null: the defaults")
    tasks: dict[str, DataSpec] = Field(default_factory=dict, description="sets of pairs: labelled data that it goes on to, by name; none: the run's own")
    search_rate: bool = Field(False, description="data sets: let the real images choose their learning rate on data.validation, where the step size is learned")


class CompareSpec(Frozen):
    """What the distilled student is compared with."""

    alone: bool = Field(True, description="the same student trained on the labels (a language model: on the text) alone, for as many steps")
    live: bool = Field(False, description="a recorded teacher: also the same student distilled from the networks that the record's `make` names")


class Written(Frozen):
    """What recipes share: a name, teachers and data, and how they are read from YAML."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$", description="of the folder")
    teacher: tuple[TeacherSpec, ...] = Field((), description="one, or a list: an ensemble")
    data: DataSpec
    threads: int | None = Field(None, ge=1, le=4096, description="torch threads; null: torch's own choice")
    device: Literal["auto", "cpu"] = "auto"

    @field_validator("teacher", mode="before")
    @classmethod
    def _one_teacher(cls, value: Any) -> Any:
        return () if value is None else [value] if isinstance(value, Mapping | TeacherSpec) else value

    @classmethod
    def read(cls, path: str | Path, overrides: Sequence[str] = ()) -> Self:
        """Read a YAML recipe; overrides are `field.path=value`, the value in YAML.

        Raises:
            InputError: the file is missing, no UTF-8, no YAML, or a field is wrong; names file and line, or the field path.
        """
        path = Path(path)
        text = read_text(path)
        values, lines = parse_yaml(text, str(path))
        return cls.parse(override(values, overrides), lambda place: f"{path}:{line_of(lines, place) or 1}")

    @classmethod
    def parse(cls, values: Mapping[str, Any], locate: Any = None) -> Self:
        """Build a recipe from plain values. `locate` turns a field path into a place in a file.

        Raises:
            InputError: a field is wrong.
        """
        try:
            return cls.model_validate(expand(values))
        except ValidationError as error:
            wrong = input_error(error, cls)
            if isinstance(values.get("teacher"), Mapping):  # the list it is kept in is not the writer's
                wrong = InputError(wrong.what, where=re.sub(r"^teacher\.0\b", "teacher", wrong.where), fix=wrong.fix)
        except InputError as error:
            wrong = error
        if locate is not None:
            raise InputError(wrong.what, where=f"{locate(wrong.where)}, field '{wrong.where}'" if wrong.where else locate(""), fix=wrong.fix)
        raise wrong

    def to_yaml(self) -> str:
        """The resolved recipe, as YAML that `read` takes."""
        return yaml.dump(self.model_dump(mode="json"), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=140)


class Recipe(Written):
    """Everything that decides a run's result."""

    method: Component
    student: ModelSpec
    train: TrainConfig
    seeds: tuple[Annotated[int, Field(ge=0, lt=2**62)], ...] = Field((0,), min_length=1, max_length=1000)
    evaluate: EvaluateSpec = EvaluateSpec()
    compare: CompareSpec = CompareSpec()

    @model_validator(mode="before")
    @classmethod
    def _student_like_its_teacher(cls, values: Any) -> Any:
        """A recipe without a student has one that is built as its only teacher is, where that is one of limbeck's denoisers."""
        if not isinstance(values, Mapping) or values.get("student") is not None:
            return values
        teacher = values.get("teacher")
        alone = teacher[0] if isinstance(teacher, list | tuple) and len(teacher) == 1 else teacher
        model = alone.get("model") if isinstance(alone, Mapping) else getattr(alone, "model", None)
        name = model.get("name") if isinstance(model, Mapping) else getattr(model, "name", model)
        denoises = isinstance(name, str) and CATALOGUE.get(name, "").startswith("limbeck.diffusion.")
        return {**values, "student": {"model": model}} if denoises else values

    @model_validator(mode="after")
    def _distinct_seeds(self) -> Self:
        if len(set(self.seeds)) != len(self.seeds):
            raise ValueError("'seeds' holds a seed twice.")
        if any(teacher.record is not None for teacher in self.teacher) and len(self.teacher) > 1:
            raise ValueError("a recorded teacher stands alone: record an ensemble as one.")
        if any(teacher.experts is not None for teacher in self.teacher) and len(self.teacher) > 1:
            raise ValueError("experts stand alone: their number is 'experts.count'.")
        return self

    @property
    def recorded(self) -> TeacherSpec | None:
        """The recorded teacher, where there is one."""
        return next((teacher for teacher in self.teacher if teacher.record is not None), None)

    @property
    def experts(self) -> TeacherSpec | None:
        """The teacher that is experts, where there is one."""
        return next((teacher for teacher in self.teacher if teacher.experts is not None), None)


class RecordSpec(Frozen):
    """What is kept of a teacher's answers."""

    codec: Component = Field(Component(name="full"), description="how logits are stored: full, half, log8, topk, topk8; of language models compact, plain_topk")
    prior_rows: int = Field(8192, ge=1, le=10**7, description="'compact': positions of the text on which the codec's prior is fitted first")
    members: bool = Field(False, description="keep every member of an ensemble, not the mean of their probabilities alone")
    features: tuple[str, ...] = Field((), description="modules whose outputs are kept too, as float16 (of one network)")
    scores: tuple[str, ...] = Field((), description="per-sample scores that are kept too: confidence, margin, entropy, el2n, loss")
    test: bool = Field(True, description="record the test data too, plain, so that reports can compare with the teacher")
    shard_rows: int = Field(65_536, ge=1, le=10**8, description="rows a file")
    batch_size: int = Field(256, ge=1, le=1_000_000, description="samples a forward pass; it may change the last bits")
    workers: int = Field(0, ge=0, le=256, description="processes that read, decode and cut ahead of the teacher; the record does not depend on them")
    tokenizer: str | None = Field(None, description="fingerprint of the tokenizer that made the inputs; null: there is none")


class RecordRecipe(Written):
    """Everything that decides a record."""

    record: RecordSpec = RecordSpec()
    seed: int = Field(0, ge=0, lt=2**62, description="of what the data section draws, and of teachers with seed null")

    @model_validator(mode="after")
    def _a_network(self) -> Self:
        if not self.teacher or any(teacher.model is None for teacher in self.teacher):
            raise ValueError("a record is made of a network's answers: give 'teacher' a 'model'.")
        return self


def read_text(path: Path) -> str:
    """A recipe's text. Raises InputError: missing, a folder, too large, or not UTF-8."""
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise InputError("the recipe is larger than 4 MiB.", where=str(path), fix="Is this the right file?")
        content = path.read_bytes()
    except FileNotFoundError as error:
        raise InputError("there is no such recipe.", where=str(path), fix="`limbeck new METHOD` writes one; ready ones are in recipes/.") from error
    except (OSError, ValueError) as error:
        raise InputError(f"the recipe cannot be read: {error}.", where=str(path)) from error
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise InputError("the recipe is not UTF-8 text.", where=f"{path}:{line}", fix="Save it as UTF-8.") from error


class _Loader(yaml.SafeLoader):
    """SafeLoader that reads 1e-3 as a number and refuses a key given twice."""


class _Dumper(yaml.SafeDumper):
    """SafeDumper that puts quotes around a text such as 1e-3, which `_Loader` would read as a number."""


for _side in (_Loader, _Dumper):
    _side.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(
            r"^[-+]?(?:[0-9][0-9_]*\.?[0-9_]*(?:[eE][-+]?[0-9]+)|[0-9][0-9_]*\.[0-9_]*|\.[0-9]+(?:[eE][-+]?[0-9]+)?|\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
        ),
        list("-+0123456789."),
    )


def parse_yaml(text: str, where: str) -> tuple[dict[str, Any], dict[str, int]]:
    """Plain values of a YAML mapping and the line of each field path.

    Raises:
        InputError: a syntax error (with its line), a key given twice, or no mapping at the top.
    """
    values, lines = _plain_values(text, where)
    if not isinstance(values, dict):
        raise InputError("the file must hold a mapping of fields ('name: …').", where=f"{where}:1")
    return values, lines


def _plain_values(text: str, where: str) -> tuple[Any, dict[str, int]]:
    """Plain values of YAML text, and the line of each field path. Raises InputError."""
    try:
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
            lines: dict[str, int] = {}
            _note_lines(node, "", lines, where, 0)
            values = loader.construct_document(node) if node is not None else None
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"{where}:{mark.line + 1}" if mark else where
        raise InputError(f"this is not YAML: {error.problem or error.context}.", where=place) from error
    except (yaml.YAMLError, ValueError, RecursionError, OverflowError, TypeError, AttributeError, LookupError) as error:  # a wrong !!tag raises anything
        raise InputError(f"this is not YAML: {str(error).splitlines()[0] if str(error) else type(error).__name__}.", where=where) from error
    return values, lines


def _note_lines(node: yaml.Node | None, path: str, lines: dict[str, int], where: str, depth: int) -> None:
    if depth > 50:
        raise InputError("the nesting is deeper than 50.", where=where)
    if len(lines) > _MAX_FIELDS:
        raise InputError(f"it has more than {_MAX_FIELDS:,} fields, aliases counted each time.", where=where)
    if isinstance(node, yaml.MappingNode):
        seen: set[str] = set()
        for key, value in node.value:
            name = str(key.value)
            if name in seen:
                raise InputError(f"the key '{name}' is given twice.", where=f"{where}:{key.start_mark.line + 1}", fix="Delete one.")
            seen.add(name)
            here = f"{path}.{name}" if path else name
            lines[here] = key.start_mark.line + 1
            _note_lines(value, here, lines, where, depth + 1)
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            here = f"{path}.{index}" if path else str(index)
            lines[here] = value.start_mark.line + 1
            _note_lines(value, here, lines, where, depth + 1)
    elif isinstance(node, yaml.ScalarNode) and any("\ud800" <= c <= "\udfff" for c in node.value):
        raise InputError("half a surrogate pair is no character.", where=f"{where}:{node.start_mark.line + 1}")


def line_of(lines: Mapping[str, int], place: str) -> int | None:
    """The line of a field path, or of the nearest part of it that is in the file."""
    parts = place.split(".")
    while parts:
        if ".".join(parts) in lines:
            return lines[".".join(parts)]
        # arguments may be written beside a component's name
        flat = [p for p in parts if p != "args"]
        if ".".join(flat) in lines:
            return lines[".".join(flat)]
        parts.pop()
    return None


def override(values: Mapping[str, Any], settings: Sequence[str]) -> dict[str, Any]:
    """A copy with `field.path=value` settings put in; values are YAML.

    Raises:
        InputError: a setting has no '=', or leads through something that is no mapping or list.
    """
    import copy

    out = copy.deepcopy(dict(values))
    for setting in settings:
        path, equals, text = setting.partition("=")
        if not equals or not path.strip():
            raise InputError(f"'{setting}' is not a setting.", where="--set", fix="Write it as --set field.path=value.")
        put(out, path.strip(), _plain_values(text, f"--set {path.strip()}")[0])
    return out


def put(values: dict[str, Any], path: str, value: Any) -> None:
    """Set one dotted field path in nested plain values, making mappings on the way."""
    here: Any = values
    parts = path.split(".")
    for depth, part in enumerate(parts):
        last = depth == len(parts) - 1
        if isinstance(here, list):
            if not part.isdigit() or int(part) >= len(here):
                raise InputError(f"'{path}': the list has no entry '{part}'.", where="--set")
            key: Any = int(part)
        elif isinstance(here, dict):
            key = part
        else:
            raise InputError(f"'{path}': '{'.'.join(parts[:depth])}' is not a mapping.", where="--set")
        if last:
            here[key] = value
        else:
            if isinstance(here, dict) and here.get(key) is None:
                here[key] = {}
            here = here[key]


def expand(value: Any, path: str = "") -> Any:
    """Replace `${NAME}` in texts by environment variables.

    Raises:
        InputError: a variable is not set; names the field.
    """
    if isinstance(value, Mapping):
        return {k: expand(v, f"{path}.{k}" if path else str(k)) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [expand(v, f"{path}.{i}" if path else str(i)) for i, v in enumerate(value)]
    if isinstance(value, str) and "${" in value:

        def look(match: re.Match[str]) -> str:
            found = os.environ.get(match.group(1))
            if found is None:
                raise InputError(f"the environment variable {match.group(1)} is not set.", where=path, fix=f"export {match.group(1)}=…")
            return found

        return re.sub(r"\$\{([A-Za-z_][A-Za-z0-9_]*)\}", look, value)
    return value
