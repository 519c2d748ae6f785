"""What a run is made of: data, networks and a method, built from a recipe's sections, with the field that is wrong in every error."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from limbeck import data as datasets
from limbeck import methods, models
from limbeck.components import Component, build, resolve
from limbeck.contract import IGNORE, Data, Method, Teacher
from limbeck.data import AugmentSpec, ViewSpec
from limbeck.environment import available_memory
from limbeck.errors import InputError
from limbeck.evaluate import cost
from limbeck.models.weights import load_weights
from limbeck.recipe import CompareSpec, DataSpec, EvaluateSpec, ModelSpec, Recipe, RecordRecipe, TeacherSpec
from limbeck.records import Record, check_identity
from limbeck.teachers.recorded import RecordTeacher, TokenRecordTeacher
from limbeck.train import TrainConfig


@dataclass(frozen=True)
class Prepared:
    """The data of one seed."""

    train: Data
    test: Data
    validation: Data | None
    num_classes: int  # 0: the data have neither classes nor targets; of tokens the vocabulary
    input_shape: tuple[int, ...]
    pool: Tensor | None = None
    """Positions in `train` of the extra, unlabelled inputs of `data.pool`."""

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
    views: ViewSpec | None = None
    record: Callable[[Prepared], RecordTeacher] | None = None
    """Opens the recorded teacher, where the recipe has one."""
    live: tuple[TeacherSpec, ...] = ()
    """The networks that the record was made of, where the recipe compares with them."""
    experts: TeacherSpec | None = None
    """The teacher whose weights in training are kept, where the recipe has one."""


@lru_cache(maxsize=8)
def _splits(source_json: str) -> Any:
    return build(Component.model_validate_json(source_json), datasets.CATALOGUE, "data set")


def _source(component: Component, where: str) -> Any:
    try:
        splits = _splits(component.model_dump_json())
    except InputError as error:
        raise error.at(where) from error
    if not isinstance(splits, datasets.Splits):
        raise InputError("the data source must return limbeck.data.Splits(train, test).", where=where)
    return splits


def prepare(spec: DataSpec, seed: int) -> Prepared:
    """The data of a recipe for one seed. Raises InputError with the field that is wrong."""
    splits = _source(spec.source, "data.source")
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
    if spec.whiten:
        with _field("data.whiten"):
            train, test, validation = _whitened(train, test, validation)
    pool = None
    if spec.pool:
        own, extra = len(train), [_source(component, f"data.pool.{number}").train for number, component in enumerate(spec.pool)]
        try:
            train = datasets.Joined(train, *extra)
        except InputError as error:
            raise error.at("data.pool") from error
        pool = torch.arange(own, len(train))
    return Prepared(train, test, validation, width(splits), tuple(splits.input_shape), pool)


def width(splits: datasets.Splits) -> int:
    """What a network's outputs number: classes, a tokenizer's vocabulary, 0 where there are neither."""
    vocabulary = getattr(datasets.root(splits.train), "vocabulary", None)
    if vocabulary is not None:
        return int(vocabulary)
    return 0 if not splits.train.classes and splits.train.targets is None else splits.num_classes


def _whitened(train: Data, test: Data, validation: Data | None) -> tuple[Data, Data, Data | None]:
    """The three through ZCA that is fitted on the first."""
    found = datasets.whiten(train, test, *(() if validation is None else (validation,)))
    return found[0], found[1], found[2] if validation is not None else None


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
    recorded, views = recipe.recorded, recipe.data.views
    if recorded is not None and views is None:
        views = ViewSpec(count=1)
    return Ingredients(
        name=recipe.name,
        seeds=recipe.seeds,
        method=lambda: make_method(recipe.method),
        data=lru_cache(maxsize=2)(lambda seed: prepare(recipe.data, seed)),
        student=lambda prepared, seed: network(recipe.student, prepared, seed, "student"),
        fresh=lambda prepared, seed: network(recipe.student, prepared, seed, "student"),
        teachers=tuple(spec for spec in recipe.teacher if spec.model is not None),
        given_teacher=None,
        train=recipe.train,
        augment=recipe.data.augment,
        evaluate=recipe.evaluate,
        compare=recipe.compare,
        student_spec=recipe.student,
        data_key=recipe.data.model_dump_json(),
        recipe=recipe.to_yaml(),
        cpu=recipe.device == "cpu",
        views=views,
        record=None if recorded is None else lambda prepared: open_teacher(recorded, recipe.data, prepared),
        experts=recipe.experts,
        live=_live(recipe),
    )


def _live(recipe: Recipe) -> tuple[TeacherSpec, ...]:
    """The networks that the recipe's record is made of, where the recipe compares with them. Raises InputError."""
    if not recipe.compare.live:
        return ()
    if recipe.recorded is None or recipe.recorded.make is None:
        raise InputError("only a recorded teacher that says how it was made can be had live.", where="compare.live", fix="Give teacher.record and teacher.make.")
    try:
        return RecordRecipe.read(recipe.recorded.make).teacher
    except InputError as error:
        raise error.at("teacher.make") from error


@dataclass(frozen=True)
class PlannedExperts:
    """What will be known of experts before they are trained: how many, for how many epochs, with how many weights."""

    count: int
    epochs: int
    size: int

    def weights(self, expert: int, epoch: int) -> Tensor:
        """There are none yet."""
        raise RuntimeError(f"expert {expert} is not trained yet, so it has no weights after epoch {epoch}")


def all_inputs(data: Data, chunk: int = 4096) -> Tensor:
    """[N, ...] all inputs of a data set as networks take them."""
    ids = torch.arange(len(data))
    return torch.cat([data.prepare(data.fetch(part)[0]) for part in ids.split(chunk)])


def data_identity(prepared: Prepared, *, test: bool) -> dict[str, Any]:
    """What tells one record's data from another's, labels aside."""
    found: dict[str, Any] = {"fingerprint": datasets.inputs_fingerprint(prepared.train)}
    return found | {"test": datasets.inputs_fingerprint(prepared.test)} if test else found


def open_teacher(spec: TeacherSpec, data: DataSpec, prepared: Prepared) -> RecordTeacher:
    """The recorded teacher of a recipe.

    Raises:
        InputError: it is no finished record, or was made of other data, other views or another teacher; `where` is the field.
    """
    assert spec.record is not None
    try:
        record = Record.open(spec.record)
    except InputError as error:
        raise InputError(error.what, where=f"teacher.record ({spec.record})", fix=error.fix) from error
    known = str(record.identity["teacher"]["fingerprint"])
    if spec.fingerprint is not None and not known.startswith(spec.fingerprint):
        raise InputError(
            f"the record is of the teacher {known[:12]}…, the recipe expects {spec.fingerprint}.",
            where="teacher.fingerprint",
            fix="Name the right record, or leave the fingerprint out.",
        )
    return replay(record, data.views, data.augment, prepared)


def replay(record: Record, views: ViewSpec | None, augment: AugmentSpec, prepared: Prepared) -> RecordTeacher:
    """A record as the teacher of these data in these views (None: one plain look).

    Raises:
        InputError: it was made of other data or other views; `where` is the field.
    """
    shown, identity, part = views or ViewSpec(count=1), record.identity, record.parts["train"]
    wanted = {"data": data_identity(prepared, test=False), "views": shown.policy(augment)}
    check_identity({"data": {"fingerprint": identity["data"]["fingerprint"]}, "views": identity["views"]}, wanted)
    if shown.count > part.views or (views is None and part.views > 1):
        raise InputError(
            f"the record has {part.views} views of each sample, the recipe {'names none' if views is None else f'asks for {shown.count}'}.",
            where="data.views.count",
            fix=f"Say data.views.count: {part.views}, or record more.",
        )
    if "tokens" in part.fields:
        tokenizer, own = identity["tokenizer"], tokenizer_of(prepared)
        if own is None or tokenizer != own:
            what = f"the record's tokens are those of the tokenizer {str(tokenizer)[:12]}…, the data's of {str(own)[:12]}…." if own else "the record is of text."
            raise InputError(what, where="data.source", fix="Use the tokenizer that the record was made with.")
        return TokenRecordTeacher(record, prepared.train)
    classes = int(part.fields["logits"].shape[-1])
    if classes != prepared.num_classes:
        raise InputError(f"the record has {classes} classes, the data have {prepared.num_classes}.", where="teacher.record")
    return RecordTeacher(record, prepared.train)


def tokenizer_of(prepared: Prepared) -> str | None:
    """The fingerprint of the tokenizer that made the training data; None where they are no tokens."""
    tokenizer = getattr(datasets.root(prepared.train), "tokenizer", None)
    return None if tokenizer is None else str(tokenizer.fingerprint)


def fits(module: nn.Module, example: Tensor, prepared: Prepared, where: str) -> None:
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
