"""Runs: a recipe, or objects, distilled in a folder that holds everything about it (DESIGN §6, §7).

runs/NAME/            recipe.yaml, environment.json, metrics.jsonl, checkpoints/, artefact/ (of the first seed), report.html, result.json
runs/NAME/teacher/    the teacher, where it was trained here; student/: a student trained beforehand; alone/: the student without a teacher
runs/NAME/seed-S/     the same for every further seed
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from limbeck import data as datasets
from limbeck import files, methods, models, seeds
from limbeck.components import Component, build, resolve
from limbeck.contract import IGNORE, Data, Method, Teacher
from limbeck.data import AugmentSpec, BatchPlan
from limbeck.environment import available_memory, describe
from limbeck.errors import InputError
from limbeck.evaluate import cost
from limbeck.evaluate.classifier import ClassifierMetrics, classifier_metrics
from limbeck.evaluate.predict import predict
from limbeck.evaluate.statistics import Latency
from limbeck.export import folder as artefacts
from limbeck.models.weights import load_weights
from limbeck.recipe import CompareSpec, DataSpec, EvaluateSpec, ModelSpec, Recipe, TeacherSpec
from limbeck.report import html
from limbeck.report.summary import Arm, Curve, Outcome, RunSummary
from limbeck.teachers import as_teacher
from limbeck.train import TrainConfig, Trained, Trainer, locked
from limbeck.train.progress import choose

Style = Literal["auto", "plain", "quiet"]


@dataclass(frozen=True)
class Prepared:
    """The data of one seed."""

    train: Data
    test: Data
    validation: Data | None
    num_classes: int
    input_shape: tuple[int, ...]

    @property
    def labelled(self) -> Tensor | None:
        """Positions of the labelled training samples, where some are not; None where all are."""
        targets = self.train.targets
        if targets is None or bool((targets != IGNORE).all()):
            return None
        return (targets != IGNORE).nonzero()[:, 0]


@dataclass(frozen=True)
class Ingredients:
    """What a run is made of, whether it came from a recipe or from objects."""

    name: str
    seeds: tuple[int, ...]
    method: Callable[[], Method]
    data: Callable[[int], Prepared]
    student: Callable[[Prepared, int], nn.Module]
    fresh: Callable[[Prepared, int], nn.Module]
    teachers: tuple[TeacherSpec, ...]
    given_teacher: Teacher | None
    train: TrainConfig
    augment: AugmentSpec
    evaluate: EvaluateSpec
    compare: CompareSpec
    student_spec: ModelSpec | None
    data_key: str
    recipe: str = ""
    cpu: bool = False


@dataclass
class Result:
    """What a distillation gave.

    student: the distilled module, in eval mode (of the first seed). metrics: of the first seed, on the test data.
    summary: everything the report shows. folder: of the run, None where nothing was written.
    """

    student: nn.Module | None
    metrics: dict[str, float]
    summary: RunSummary
    folder: Path | None = None

    @property
    def report(self) -> Path | None:
        """The report's path."""
        return None if self.folder is None else self.folder / "report.html"


# ---- from a recipe to ingredients -----------------------------------------------------------------------------------


@lru_cache(maxsize=4)
def _splits(source_json: str) -> Any:
    return build(Component.model_validate_json(source_json), datasets.CATALOGUE, "data set")


def prepare(spec: DataSpec, seed: int) -> Prepared:
    """The data of a recipe for one seed. Raises InputError with the field that is wrong."""
    try:
        splits = _splits(spec.source.model_dump_json())
    except InputError as error:
        raise error.at("data.source") from error
    if not isinstance(splits, datasets.Splits):
        raise InputError("the data source must return limbeck.data.Splits(train, test).", where="data.source")
    train, test, validation = splits.train, splits.test, None
    if spec.train_size is not None:
        with _field("data.train_size"):
            train = datasets.stratified_subset(train, spec.train_size, seed=0)
    if spec.test_size is not None:
        with _field("data.test_size"):
            test = datasets.stratified_subset(test, spec.test_size, seed=0)
    if spec.validation:
        with _field("data.validation"):
            train, validation = datasets.hold_out(train, spec.validation, seed=0)
    if spec.label_noise:
        with _field("data.label_noise"):
            train = datasets.corrupt_labels(train, spec.label_noise, seed=seed)
    if spec.labelled is not None:
        with _field("data.labelled"):
            train = datasets.hide_labels(train, spec.labelled, seed=seed)
    return Prepared(train, test, validation, splits.num_classes, tuple(splits.input_shape))


@contextmanager
def _field(path: str) -> Iterator[None]:
    """Errors name this field of the recipe, whatever the argument is called where they come from."""
    try:
        yield
    except InputError as error:
        raise InputError(error.what, where=path, fix=error.fix) from error


def make_method(component: Component) -> Method:
    """The method that a recipe names, with its knobs. Raises InputError."""
    try:
        found = resolve(component, methods.catalogue(), "method")
        if not (isinstance(found, type) and issubclass(found, Method)):
            raise InputError(f"'{component}' is not a method.", where="target", fix="Name a subclass of limbeck.Method.")
        return found(**component.args)
    except InputError as error:
        raise error.at("method") from error


def network(spec: ModelSpec, prepared: Prepared, seed: int, where: str) -> nn.Module:
    """A network as its recipe section says, its weights loaded but not trained. Raises InputError."""
    try:
        _fits_memory(spec.model, prepared)
        module = models.build_model(spec.model, num_classes=prepared.num_classes, input_shape=prepared.input_shape, seed=seed)
    except InputError as error:
        raise error.at(f"{where}.model") from error
    if spec.weights is not None:
        try:
            load_weights(module, spec.weights)
        except InputError as error:
            raise error.at(f"{where}.weights") from error
        except OSError as error:  # a name too long, a folder that may not be entered
            raise InputError(f"the weights cannot be read: {error.strerror}.", where=f"{where}.weights") from error
    return module


def _fits_memory(component: Component, prepared: Prepared) -> None:
    """Raise InputError where a model of the catalogue has more weights than there is memory, before any of it is taken."""
    if component.name is None or component.args.get("pretrained") or component.args.get("weights"):
        return  # a person's own code is run once, and weights are fetched once
    try:
        with torch.device("meta"):
            module = models.build_model(component, num_classes=prepared.num_classes, input_shape=prepared.input_shape, seed=0)
    except (InputError, RuntimeError, NotImplementedError):
        return  # wrong, which the real building says; or it wants numbers where there are none
    needed, free = cost.tensor_bytes(module), available_memory()
    if free is not None and 3 * needed > free:  # weights, gradients, the optimiser's state
        raise InputError(
            f"'{component}' has weights of {needed / 2**30:,.1f} GiB, three times which training needs, and {free / 2**30:,.1f} GiB of memory are free.",
            where="args",
            fix="Make it smaller.",
        )


def from_recipe(recipe: Recipe) -> Ingredients:
    """Ingredients of a recipe; nothing is loaded yet."""
    return Ingredients(
        name=recipe.name,
        seeds=recipe.seeds,
        method=lambda: make_method(recipe.method),
        data=lambda seed: prepare(recipe.data, seed),
        student=lambda prepared, seed: network(recipe.student, prepared, seed, "student"),
        fresh=lambda prepared, seed: network(recipe.student, prepared, seed, "student"),
        teachers=recipe.teacher,
        given_teacher=None,
        train=recipe.train,
        augment=recipe.data.augment,
        evaluate=recipe.evaluate,
        compare=recipe.compare,
        student_spec=recipe.student,
        data_key=recipe.data.model_dump_json(),
        recipe=recipe.to_yaml(),
        cpu=recipe.device == "cpu",
    )


# ---- one seed -------------------------------------------------------------------------------------------------------


@dataclass
class _Made:
    """A network that came out of a training (or was given), and what that cost."""

    module: nn.Module
    trained: Trained | None = None
    method: Method | None = None


@dataclass
class Runner:
    """Trains and measures, seed by seed. folder: where it all goes (None: nowhere); cache: where networks shared by arms are kept."""

    parts: Ingredients
    folder: Path | None = None
    cache: Path | None = None
    style: Style = "quiet"
    resume_from: str | None = None
    _teachers: dict[str, tuple[Teacher, Tensor | None]] = field(default_factory=dict)

    def check(self) -> None:
        """Build everything once and pass two samples through it, so that a wrong recipe fails before anything is written."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # they come again in earnest
            self._check()

    def _check(self) -> None:
        parts, seed = self.parts, self.parts.seeds[0]
        method = parts.method()
        if method.needs_teacher and not parts.teachers and parts.given_teacher is None:
            raise InputError(f"the method '{type(method).__name__}' needs a teacher.", where="teacher", fix="Add a 'teacher:' section.")
        prepared = parts.data(seed)
        if method.needs_labels and prepared.train.targets is None:
            raise InputError("the method needs labels, the data have none.", where="data")
        if parts.train.sharding == "fsdp2" and parts.train.ema is not None:
            raise InputError("a moving average of sharded weights is not supported.", where="train.ema", fix="Leave out ema, or sharding.")
        ids = torch.arange(min(2, len(prepared.train)))
        raw, targets = prepared.train.fetch(ids)
        try:
            datasets.augment(raw, targets, ids, spec=parts.augment, seed=seed, epoch=0, num_classes=prepared.num_classes)
        except InputError as error:
            raise error.at("data.augment") from error
        example = prepared.train.prepare(raw)
        student = parts.student(prepared, seed)
        _fits(student, example, prepared, "student")
        if not any(p.requires_grad for p in student.parameters()):
            raise InputError("the student has no parameters to train.", where="student")
        if parts.given_teacher is not None:
            _fits(_Answering(parts.given_teacher).eval(), example, prepared, "teacher")
        members = []
        for index, spec in enumerate(parts.teachers):
            where = "teacher" if len(parts.teachers) == 1 else f"teacher.{index}"
            members.append(network(spec, prepared, 0, where))
            _fits(members[-1], example, prepared, where)
            if spec.train is not None:
                self._rehearse(make_method(spec.method), members[-1], prepared, seed, spec.train, None, where)
        teacher = parts.given_teacher if parts.given_teacher is not None else as_teacher(members) if members else None
        if parts.student_spec is not None and parts.student_spec.train is not None:
            self._rehearse(make_method(parts.student_spec.method), _copy(student), prepared, seed, parts.student_spec.train, teacher, "student")
        self._rehearse(method, _copy(student), prepared, seed, parts.train, teacher, "")

    def _rehearse(self, method: Method, student: nn.Module, prepared: Prepared, seed: int, config: TrainConfig, teacher: Teacher | None, where: str) -> None:
        """Bind a method and cut its data into batches, without training. Raises InputError."""
        try:
            prepared = self._bind(method, student, prepared, seed, teacher, test=False)
        except InputError as error:
            raise (error.at("method") if error.where.split(".")[0] in type(method.config).model_fields else error) from error
        try:
            BatchPlan(len(prepared.train), config.batch_size, seed=0, drop_last=config.drop_last)
        except InputError as error:
            raise error.at(f"{where}.train" if where else "train") from error

    def seed(self, seed: int) -> tuple[dict[str, Outcome], _Made, dict[str, Any]]:
        """Train and measure one seed: outcomes by role (teacher, alone, distilled), the distilled student, costs by role."""
        parts = self.parts
        prepared = parts.data(seed)
        place = self._place(seed)
        targets = prepared.test.targets
        if targets is None:
            raise InputError("the test data have no labels to measure against.", where="data")
        teacher, teacher_logits = self.teacher(prepared, seed)
        outcomes: dict[str, Outcome] = {}
        if teacher_logits is not None:
            outcomes["teacher"] = Outcome.of(seed, classifier_metrics(teacher_logits, targets))
        method = parts.method()
        start = self.student(prepared, seed, teacher)
        alone: _Made | None = None
        if parts.compare.alone and type(method).__name__ != "Supervised" and method.produces == "classifier" and prepared.train.targets is not None:
            alone = self._alone(prepared, seed, start, None if place is None else place / "alone")
            outcomes["alone"] = self._outcome(alone, prepared, seed, teacher_logits)
        student = _copy(start)
        made = self._train(method, student, prepared, seed, parts.train, place, teacher=teacher, label=f"{parts.name} seed {seed}", test=True)
        outcomes["distilled"] = self._outcome(made, prepared, seed, teacher_logits)
        costs: dict[str, Any] = {}
        if seed == parts.seeds[0]:
            costs = self._costs({"teacher": teacher, "alone": alone, "distilled": made}, prepared)
        if place is not None and _rank() == 0:
            self._keep(made, prepared, place / "artefact", outcomes["distilled"])
            if alone is not None:
                self._keep(alone, prepared, place / "alone" / "artefact", outcomes["alone"])
        _barrier()
        return outcomes, made, costs

    # -- networks that are trained beforehand

    def teacher(self, prepared: Prepared, seed: int) -> tuple[Teacher | None, Tensor | None]:
        """The teacher of a seed and its logits on the test data; trained once where it does not depend on the seed."""
        parts = self.parts
        if parts.given_teacher is None and not parts.teachers:
            return None, None
        if parts.given_teacher is not None:
            key = "given"
            if key not in self._teachers:
                self._teachers[key] = (parts.given_teacher, self._teacher_logits(parts.given_teacher, prepared))
            return self._teachers[key]
        own = [seed if spec.seed is None else spec.seed for spec in parts.teachers]
        key = json.dumps(own)
        if key not in self._teachers:
            members = []
            for index, (spec, of) in enumerate(zip(parts.teachers, own, strict=True)):
                where = "teacher" if len(parts.teachers) == 1 else f"teacher.{index}"
                name = "teacher" if len(parts.teachers) == 1 else f"teacher-{index + 1}"
                module = network(spec, prepared, seeds.derive(of, "teacher", index), where)
                if spec.train is not None:
                    shared = spec.seed is not None
                    base = parts.data(of) if shared else prepared
                    module = self._beforehand(spec, module, base, of, name, self.folder if shared else self._place(seed), teacher=None)
                members.append(module)
            teacher = as_teacher(members[0] if len(members) == 1 else members)
            self._teachers = {key: (teacher, self._teacher_logits(teacher, prepared))}
        return self._teachers[key]

    def _teacher_logits(self, teacher: Teacher, prepared: Prepared) -> Tensor | None:
        from limbeck.contract import Batch

        module = teacher if isinstance(teacher, nn.Module) else nn.Identity()
        return predict(module, prepared.test, batch_size=self.parts.evaluate.batch_size, forward=lambda x: teacher.logits(Batch(x)))

    def student(self, prepared: Prepared, seed: int, teacher: Teacher | None) -> nn.Module:
        """The student that distillation starts from: built, its weights loaded, trained beforehand where the recipe says so."""
        spec = self.parts.student_spec
        of = seed if spec is None or spec.seed is None else spec.seed
        module = self.parts.student(prepared, seeds.derive(of, "student"))
        if spec is None or spec.train is None:
            return module
        return self._beforehand(spec, module, prepared, of, "student", self._place(seed), teacher=teacher)

    def _beforehand(
        self, spec: ModelSpec, module: nn.Module, prepared: Prepared, seed: int, name: str, folder: Path | None, *, teacher: Teacher | None
    ) -> nn.Module:
        assert spec.train is not None
        facts = [spec.model_dump_json(), self.parts.data_key, str(seed), str(self.parts.cpu)]
        if teacher is not None and make_method(spec.method).needs_teacher:
            facts += [t.model_dump_json() for t in self.parts.teachers]
        key = hashlib.sha256("\n".join(facts).encode()).hexdigest()[:20]
        place = self.cache / f"{name}-{key}" if self.cache is not None else None if folder is None else folder / name
        if place is not None and (place / "artefact" / "config.json").exists():
            kept = artefacts.read_config(place / "artefact")
            if kept.extra.get("key") == key:
                return artefacts.load(place / "artefact", model=module)
        method = make_method(spec.method)
        made = self._train(method, module, prepared, seed, spec.train, place, teacher=teacher, label=f"{name} seed {seed}", test=False)
        if place is not None and _rank() == 0:
            self._keep(made, prepared, place / "artefact", None, spec=spec, key=key)
        _barrier()
        return made.module.eval()

    def _alone(self, prepared: Prepared, seed: int, start: nn.Module, folder: Path | None) -> _Made:
        """The same student from the same start, on the labels alone, for as many steps and with the same optimiser."""
        config = self.parts.train
        if config.steps is None and prepared.labelled is not None:
            steps = (config.epochs or 0) * -(-len(prepared.train) // config.batch_size)
            config = config.model_copy(update={"epochs": None, "steps": steps})
        method = make_method(Component(name="supervised"))
        return self._train(method, _copy(start), prepared, seed, config, folder, teacher=None, label=f"alone seed {seed}", test=True)

    # -- training, measuring, keeping

    def _train(
        self, method: Method, student: nn.Module, prepared: Prepared, seed: int, config: TrainConfig, folder: Path | None,
        *, teacher: Teacher | None, label: str, test: bool,
    ) -> _Made:  # fmt: skip
        prepared = self._bind(method, student, prepared, seed, teacher, test=test)
        curve_data = prepared.validation or prepared.test

        def evaluate(current: Method) -> dict[str, float]:
            logits = predict(current.inference(), curve_data, batch_size=self.parts.evaluate.batch_size)
            assert curve_data.targets is not None
            found = classifier_metrics(logits, curve_data.targets)
            return {"accuracy": found.accuracy} | ({} if found.nll is None else {"nll": found.nll})

        trainer = Trainer(
            method, prepared.train, config, seed=seed, folder=folder, augment=self.parts.augment, evaluate=evaluate,
            progress=choose(self.style if _rank() == 0 else "quiet"), label=label, resume_from=self.resume_from if test else None,
            num_classes=prepared.num_classes, cpu=self.parts.cpu,
        )  # fmt: skip
        trained = trainer.fit()
        return _Made(method.inference().eval(), trained, method)

    def _bind(self, method: Method, student: nn.Module, prepared: Prepared, seed: int, teacher: Teacher | None, *, test: bool) -> Prepared:
        """Bind a method; returns the data that it trains on: of partly labelled ones the labelled, where it needs labels."""
        if method.needs_labels and (labelled := prepared.labelled) is not None:
            prepared = replace(prepared, train=datasets.subset(prepared.train, labelled))
        method.bind(
            student=student,
            teacher=teacher,
            fresh_student=lambda s: self.parts.fresh(prepared, s),
            train=prepared.train,
            validation=prepared.validation,
            test=prepared.test if test else None,
            num_classes=prepared.num_classes,
            seed=seed,
        )
        return prepared

    def _outcome(self, made: _Made, prepared: Prepared, seed: int, teacher_logits: Tensor | None) -> Outcome:
        assert prepared.test.targets is not None
        logits = predict(made.module, prepared.test, batch_size=self.parts.evaluate.batch_size)
        metrics: ClassifierMetrics = classifier_metrics(logits, prepared.test.targets, teacher_logits)
        trained = made.trained
        return Outcome.of(
            seed,
            metrics,
            training_seconds=None if trained is None else trained.seconds,
            examples_seen=None if trained is None else trained.samples,
            curves=() if trained is None else _curves(trained.rows),
        )

    def _costs(self, made: Mapping[str, Any], prepared: Prepared) -> dict[str, Any]:
        """Parameters, multiply-accumulates, bytes and latencies by role, measured side by side."""
        modules: dict[str, nn.Module] = {}
        for role, found in made.items():
            module = found.module if isinstance(found, _Made) else found
            if isinstance(module, nn.Module):
                modules[role] = _Answering(found) if role == "teacher" else module
        example = prepared.test.prepare(prepared.test.fetch(torch.arange(min(64, len(prepared.test))))[0])
        costs: dict[str, Any] = {}
        for role, module in modules.items():
            costs[role] = {"parameters": cost.parameters(module), "macs": _macs(module, prepared.input_shape), "bytes": _bytes(made[role], module)}
        if self.parts.evaluate.latency:
            measured = cost.latencies(modules, example, repeats=self.parts.evaluate.latency_repeats)
            for role in modules:
                costs[role]["latencies"] = list(measured[role])
        return costs

    def _keep(self, made: _Made, prepared: Prepared, folder: Path, outcome: Outcome | None, *, spec: ModelSpec | None = None, key: str = "") -> None:
        assert made.method is not None
        artefact = made.method.artefact()
        preprocessing = getattr(prepared.train, "preprocessing", None)
        spec = spec or self.parts.student_spec
        metrics = {} if outcome is None else {"accuracy": outcome.accuracy, "nll": outcome.nll, "ece": outcome.ece}
        artefacts.save(
            artefact,
            folder,
            model=None if spec is None else spec.model,
            num_classes=prepared.num_classes,
            input_shape=prepared.input_shape,
            preprocess=preprocessing() if callable(preprocessing) else {},
            classes=list(prepared.train.classes),
            extra={"key": key, "metrics": metrics, "method": type(made.method).__name__},
        )

    def _place(self, seed: int) -> Path | None:
        if self.folder is None:
            return None
        return self.folder if seed == self.parts.seeds[0] else self.folder / f"seed-{seed}"


class _Answering(nn.Module):
    """A teacher as a plain module, for timing."""

    def __init__(self, teacher: Any) -> None:
        super().__init__()
        self.teacher = teacher

    def forward(self, inputs: Tensor) -> Tensor:
        from limbeck.contract import Batch

        return self.teacher.logits(Batch(inputs))


def _macs(module: nn.Module, input_shape: Sequence[int]) -> int | None:
    try:
        return cost.macs(module, input_shape)
    except (RuntimeError, NotImplementedError):
        return None


def _curves(rows: Sequence[Mapping[str, Any]]) -> tuple[Curve, ...]:
    """Learning curves out of metrics.jsonl's rows; steps count over all phases."""
    found: dict[str, tuple[list[int], list[float | None]]] = {}
    before, last, phase = 0, 0, None
    for row in rows:
        if row["phase"] != phase:
            before, phase = before + last, row["phase"]
        last = row["step"]
        for name, value in row.items():
            if "/" in name and not name.endswith("/lr"):
                steps, values = found.setdefault(name, ([], []))
                steps.append(before + last)
                values.append(value)
    return tuple(Curve(name.split("/", 1)[0], name.split("/", 1)[1], tuple(s), tuple(v)) for name, (s, v) in found.items())


def _copy(module: nn.Module) -> nn.Module:
    import copy

    return copy.deepcopy(module)


def _bytes(made: Any, module: nn.Module) -> int:
    """Of the tensors as they go to disk: packed where the method packs them."""
    artefact = made.method.artefact() if isinstance(made, _Made) and made.method is not None else None
    if artefact is None or artefact.encoder is None:
        return cost.tensor_bytes(module)
    return sum(t.numel() * t.element_size() for t in artefact.encoder.encode(artefact.module.state_dict()).values())


def _fits(module: nn.Module, example: Tensor, prepared: Prepared, where: str) -> None:
    """Raise InputError unless the network turns the data's inputs into one logit a class."""
    was = module.training
    module.eval()
    try:
        with torch.no_grad():
            out = models.logits_of(module(example.to(next(module.parameters(), example).device)))
    except (RuntimeError, ValueError, TypeError, IndexError, AttributeError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(
            f"the {where.split('.')[0]} cannot take the data's inputs of shape {list(example.shape[1:])}: {first}", where=f"{where}.model"
        ) from error
    finally:
        module.train(was)
    if tuple(out.shape) != (len(example), prepared.num_classes):
        raise InputError(
            f"the {where.split('.')[0]} gives outputs of shape {list(out.shape[1:])}, the data have {prepared.num_classes} classes.",
            where=f"{where}.model",
            fix=f"It must return logits of shape [batch, {prepared.num_classes}].",
        )


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))


def _barrier() -> None:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()


# ---- a whole run ----------------------------------------------------------------------------------------------------


def execute(parts: Ingredients, folder: Path | None, *, style: Style = "quiet", fresh: bool = False, resume_from: str | None = None) -> Result:
    """Run all seeds in a folder (or nowhere), report, and return. A run that was cut short goes on where it stood.

    Raises:
        InputError: the recipe is wrong, or the folder holds another recipe's run or is in use.
        TrainingError, Interrupted: see Trainer.fit; what was done so far stays.
    """
    runner = Runner(parts, folder, style=style, resume_from=resume_from)
    if folder is None:
        runner.check()
        return _all_seeds(runner)
    existed = folder.exists()
    if not existed or fresh or not (folder / "recipe.yaml").exists():
        runner.check()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"the run folder cannot be made: {error.strerror}.", where=str(folder), fix="Give another with --run.") from error
    try:
        with locked(folder) if _rank() == 0 else nullcontext():
            if fresh and _rank() == 0:
                _empty(folder)
            if _rank() == 0:
                _claim(folder, parts)
            _barrier()
            done = folder / "result.json"
            if done.exists() and not fresh:
                return _finished(parts, folder)
            return _all_seeds(runner)
    except InputError:
        if not existed and _rank() == 0 and not list(folder.glob("**/step-*")) and not list(folder.glob("**/artefact")):
            shutil.rmtree(folder, ignore_errors=True)
        raise


def _finished(parts: Ingredients, folder: Path) -> Result:
    """What an earlier process finished, read back."""
    summary = RunSummary.from_json((folder / "result.json").read_text(encoding="utf-8"))
    own = None if parts.student_spec is not None else parts.student(parts.data(parts.seeds[0]), 0)
    trusted = parts.student_spec is not None and parts.student_spec.model.target is not None
    student = artefacts.load(folder, model=own, trust_imports=trusted)
    return Result(student, _metrics(summary), summary, folder)


def _metrics(summary: RunSummary) -> dict[str, float]:
    """The first seed's numbers of the distilled student, the method's own included."""
    arm = summary.arm("distilled")
    names = ("accuracy", "nll", "ece", "brier", "agreement", "kl_to_teacher")
    found = {} if arm is None else {k: float(v) for k in names if (v := getattr(arm.outcomes[0], k)) is not None}
    return found | {k: float(v) for k, v in summary.facts.get("metrics", {}).items()}


def _empty(folder: Path) -> None:
    for item in folder.iterdir():
        if item.name != ".lock":
            shutil.rmtree(item) if item.is_dir() else item.unlink()


def _claim(folder: Path, parts: Ingredients) -> None:
    """Write recipe and environment, or check that the folder's recipe is this one."""
    path = folder / "recipe.yaml"
    if not path.exists():
        others = [item.name for item in folder.iterdir() if item.name != ".lock"]
        if others:
            raise InputError(f"the folder is not empty and no run ('{others[0]}' is in it).", where=str(folder), fix="Give this run another folder with --run.")
        files.write_json(folder / "environment.json", describe())
        files.write_atomic(path, parts.recipe)
        return
    if path.read_text(encoding="utf-8") != parts.recipe:
        raise InputError(
            f"the folder holds the run of another recipe ({_first_difference(path.read_text(encoding='utf-8'), parts.recipe)}).",
            where=str(folder),
            fix="Give this run another folder with --run, or start it anew with --fresh.",
        )


def _first_difference(old: str, new: str) -> str:
    from itertools import zip_longest

    for number, (a, b) in enumerate(zip_longest(old.splitlines(), new.splitlines(), fillvalue=""), 1):
        if a != b:
            return f"line {number} of its recipe.yaml is '{a.strip()}', now '{b.strip()}'"
    return "same fields"


def _all_seeds(runner: Runner) -> Result:
    parts, folder = runner.parts, runner.folder
    by_role: dict[str, list[Outcome]] = {}
    costs: dict[str, Any] = {}
    facts: dict[str, Any] = {}
    first: _Made | None = None
    for seed in parts.seeds:
        kept = folder / "outcomes" / f"seed-{seed}.json" if folder is not None else None
        if kept is not None and kept.exists():
            part = RunSummary.from_json(kept.read_text(encoding="utf-8"))
        else:
            outcomes, made, seed_costs = runner.seed(seed)
            first = made if first is None and seed == parts.seeds[0] else first
            arms = tuple(_arm(role, (outcome,), seed_costs.get(role, {})) for role, outcome in outcomes.items())
            assert made.method is not None
            part = RunSummary(parts.name, arms, facts=_plain(made.method.facts()))
            if kept is not None and _rank() == 0:
                files.write_atomic(kept, part.to_json())
        for arm in part.arms:
            by_role.setdefault(arm.role, []).extend(arm.outcomes)
            if seed == parts.seeds[0]:
                costs[arm.role] = {"parameters": arm.parameters, "macs": arm.macs, "bytes": arm.bytes, "latencies": arm.latencies}
        if seed == parts.seeds[0]:
            facts = dict(part.facts)
    method = parts.method()
    summary = RunSummary(
        title=parts.name,
        arms=tuple(_arm(role, tuple(outcomes), costs.get(role, {})) for role, outcomes in by_role.items()),
        method=type(method).__name__,
        recipe=parts.recipe,
        created=time.strftime("%Y-%m-%d %H:%M:%S"),
        environment=describe(),
        classes=tuple(str(c) for c in parts.data(parts.seeds[0]).train.classes),
        facts=facts,
    )
    if folder is not None and _rank() == 0:
        html.write(summary, folder / "report.html")
        files.write_atomic(folder / "result.json", summary.to_json())
    _barrier()
    return Result(None if first is None else first.module, _metrics(summary), summary, folder)


_LABELS = {"teacher": "teacher", "alone": "student alone", "distilled": "student distilled"}


def _arm(role: Any, outcomes: tuple[Outcome, ...], costs: Mapping[str, Any]) -> Arm:
    latencies: tuple[Latency, ...] = tuple(costs.get("latencies") or ())
    return Arm(role, _LABELS[role], outcomes, costs.get("parameters"), costs.get("macs"), costs.get("bytes"), latencies)


def _plain(value: Any) -> Any:
    """Facts as JSON values."""
    return json.loads(json.dumps(value, default=float))


# ---- front doors ----------------------------------------------------------------------------------------------------


@contextmanager
def threads(count: int | None) -> Iterator[None]:
    """Torch's threads within the block."""
    before = torch.get_num_threads()
    if count is not None:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def distill(
    recipe: Recipe | str | Path | None = None,
    *,
    teacher: Any = None,
    student: nn.Module | None = None,
    data: Any = None,
    method: Method | None = None,
    train: TrainConfig | Mapping[str, Any] | None = None,
    augment: AugmentSpec | None = None,
    validation: Any = None,
    seed: int = 0,
    alone: bool = False,
    run: str | Path | None = None,
    style: Style = "quiet",
    fresh: bool = False,
    resume_from: str | None = None,
) -> Result:
    """Distil: a recipe (object or path), or a teacher into a student on data by a method.

    Args:
        recipe: a Recipe or the path of one; then nothing but run, style, fresh and resume_from is given.
        teacher: an nn.Module, a list of them (an ensemble), or anything with `logits(batch)`; None for methods without one.
        student: the module to train; it is trained in place and returned as `Result.student`.
        data: (train, test), each a torch Dataset of (input, label) pairs, a pair of tensors, or a limbeck data set.
        method: such as `limbeck.methods.KD(temperature=4)`; the default is KD.
        train: a TrainConfig or its fields; the default is 10 epochs of SGD.
        augment, validation, seed: see TrainConfig and Method.bind. alone: also train a copy of the student without a teacher.
        run: the run's folder; None: runs/NAME for a recipe, nothing written for objects.

    Returns:
        Result: the student, its metrics on the test data, the summary.

    Raises:
        InputError: something does not fit; says what and where.
    """
    if recipe is not None:
        found = recipe if isinstance(recipe, Recipe) else Recipe.read(recipe)
        folder = Path(run) if run is not None else Path("runs") / found.name
        with threads(found.threads):
            return execute(from_recipe(found), folder, style=style, fresh=fresh, resume_from=resume_from)
    if student is None or data is None:
        raise InputError("distill needs a recipe, or at least student= and data=(train, test).")
    if not isinstance(data, tuple | list) or len(data) != 2:
        raise InputError("data must be a pair (train, test).", where="data")
    train_data, test_data = (datasets.as_data(part) for part in data)
    chosen = method if method is not None else make_method(Component(name="kd"))
    config = train if isinstance(train, TrainConfig) else _train_config(train)
    example = train_data.prepare(train_data.fetch(torch.arange(min(2, len(train_data))))[0])
    with torch.no_grad():
        classes = _classes(student, example)
    prepared = Prepared(
        train_data, test_data, None if validation is None else datasets.as_data(validation), classes, tuple(example.shape[1:])
    )  # fmt: skip
    parts = Ingredients(
        name=Path(run).name if run is not None else type(chosen).__name__,
        seeds=(seed,),
        method=lambda: type(chosen)(chosen.config),
        data=lambda _seed: prepared,
        student=lambda _prepared, _seed: _copy(student),
        fresh=lambda _prepared, of: models.reinitialise(student, of),
        teachers=(),
        given_teacher=None if teacher is None else as_teacher(teacher),
        train=config,
        augment=augment or AugmentSpec(),
        evaluate=EvaluateSpec(latency=run is not None),
        compare=CompareSpec(alone=alone),
        student_spec=None,
        data_key="objects",
        recipe=json.dumps(
            {"method": type(chosen).__name__, "knobs": chosen.config.model_dump(mode="json"), "train": config.model_dump(mode="json"), "seed": seed}
        ),
    )
    result = execute(parts, None if run is None else Path(run), style=style, fresh=fresh, resume_from=resume_from)
    if result.student is not None and type(result.student) is type(student):
        student.load_state_dict(result.student.state_dict())
        result.student = student.eval()
    return result


def _train_config(values: Mapping[str, Any] | None) -> TrainConfig:
    from limbeck.contract import validated

    try:
        return validated(TrainConfig, {"epochs": 10} if values is None else values)
    except InputError as error:
        raise error.at("train") from error


def _classes(student: nn.Module, example: Tensor) -> int:
    was = student.training
    student.eval()
    try:
        out = models.logits_of(student(example.to(next(student.parameters(), example).device)))
    except (RuntimeError, ValueError, TypeError) as error:
        raise InputError(f"the student cannot take the data's inputs of shape {list(example.shape[1:])}: {error}", where="student") from error
    finally:
        student.train(was)
    return int(out.shape[-1])


def measure(recipe: Mapping[str, Any], *, seed: int, cache: Path, arm: str, style: Style = "quiet") -> dict[str, float]:
    """Train and measure one arm of a claim at one seed; networks shared between arms are kept in `cache`.

    Returns:
        accuracy, nll, ece, agreement, kl_to_teacher, seconds, and the method's own metrics.
    """
    found = Recipe.parse({**recipe, "name": arm, "seeds": [seed], "compare": {"alone": False}, "evaluate": {"latency": False}})
    runner = Runner(from_recipe(found), None, cache=cache, style=style)
    with threads(found.threads):
        prepared = runner.parts.data(seed)
        teacher, teacher_logits = runner.teacher(prepared, seed)
        start = runner.student(prepared, seed, teacher)
        made = runner._train(runner.parts.method(), start, prepared, seed, found.train, None, teacher=teacher, label=f"{arm} seed {seed}", test=True)
        outcome = runner._outcome(made, prepared, seed, teacher_logits)
    names = ("accuracy", "nll", "ece", "agreement", "kl_to_teacher")
    values = {name: float(value) for name in names if (value := getattr(outcome, name)) is not None}
    assert made.method is not None
    assert made.trained is not None
    return values | {"seconds": made.trained.seconds} | {k: float(v) for k, v in made.method.facts().get("metrics", {}).items()}


def read_summary(folder: str | Path) -> RunSummary:
    """The results of a finished run folder. Raises InputError: there are none, or they cannot be read."""
    path = Path(folder) / "result.json"
    try:
        return RunSummary.from_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        fix = "It was cut short: `limbeck distill` goes on." if (Path(folder) / "recipe.yaml").exists() else "Is it a run folder?"
        raise InputError("there is no result here.", where=str(path), fix=fix) from error
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"the result cannot be read: {error}.", where=str(path)) from error
    except InputError as error:
        raise error.at(str(path)) from error


def evaluate_run(folder: str | Path, settings: Sequence[str] = ()) -> dict[str, float]:
    """Measure a run's artefact anew on the test data of its recipe; settings override fields (other data, say).

    Raises:
        InputError: the folder is no run, or the artefact does not fit the data.
    """
    from limbeck.export import load

    recipe = Recipe.read(Path(folder) / "recipe.yaml", settings)
    module = load(folder, trust_imports=recipe.student.model.target is not None)
    prepared = prepare(recipe.data, recipe.seeds[0])
    example = prepared.test.prepare(prepared.test.fetch(torch.arange(min(2, len(prepared.test))))[0])
    _fits(module, example, prepared, "student")
    if prepared.test.targets is None:
        raise InputError("the test data have no labels to measure against.", where="data")
    found = classifier_metrics(predict(module, prepared.test, batch_size=recipe.evaluate.batch_size), prepared.test.targets)
    values = {"accuracy": found.accuracy, "nll": found.nll, "ece": found.ece, "brier": found.brier, "samples": found.labelled}
    return {k: float(v) for k, v in values.items() if v is not None}
