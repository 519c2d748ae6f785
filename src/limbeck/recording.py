"""Running a teacher once and keeping what it says: `limbeck record`, and the check that a record belongs to a recipe."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from limbeck import data as datasets
from limbeck.contract import Batch, validated
from limbeck.data import AugmentSpec, Views, ViewSpec
from limbeck.errors import InputError, suggestion
from limbeck.evaluate import cost
from limbeck.ingredients import Ingredients, Prepared, data_identity, network, prepare, tokenizer_of, width
from limbeck.language.models import LanguageModel
from limbeck.language.sources import ModelSource
from limbeck.losses.scores import RECORDED
from limbeck.methods.classifiers.supervised import Supervised
from limbeck.methods.language.next_token import NextToken
from limbeck.models import taps
from limbeck.models.weights import fingerprint
from limbeck.recipe import CompareSpec, EvaluateSpec, Recipe, RecordRecipe, RecordSpec
from limbeck.records import Codec, Field, Part, Record, RecordWriter, Task, TokenCodec, codec_from
from limbeck.records.stores import store_for
from limbeck.records.writer import load_index, load_manifest
from limbeck.recording_tokens import TokenRecorder

from limbeck.runner import Runner, Style, rank, start_processes
from limbeck.teachers import as_teacher
from limbeck.teachers.recorded import combined
from limbeck.train import TrainConfig, locked, parallel
from limbeck.train.progress import Progress, Silent, choose


def record_teacher(
    teacher: Any,
    prepared: Prepared,
    url: str | Path,
    *,
    views: ViewSpec,
    augment: AugmentSpec,
    spec: RecordSpec,
    progress: Progress | None = None,
    cpu: bool = False,
) -> Record:
    """Run a teacher over all views of the training data (and once over the test data) and write a record; goes on where an earlier call stopped.

    Args:
        teacher: a module that is a `contract.Teacher` (`limbeck.teachers.as_teacher`). url: folder, or an fsspec URL.

    Raises:
        InputError: the folder holds another record (naming the first field that differs), or the record cannot be made of this teacher.
    """
    accelerator = parallel.accelerator("no", cpu=cpu)
    rank, world, device = int(accelerator.process_index), int(accelerator.num_processes), accelerator.device
    if device.type == "cpu":
        parallel.keep_freed_memory()
    module = teacher if isinstance(teacher, nn.Module) else None
    if module is not None:
        module.to(device)
    recorder: _Recorder | TokenRecorder
    if isinstance(teacher, ModelSource):
        if views != ViewSpec(count=1) or augment != AugmentSpec():
            raise InputError("text has no views.", where="data.views", fix="Leave out data.views and data.augment.")
        recorder = TokenRecorder(teacher, prepared, spec, device)
    else:
        recorder = _Recorder(teacher, module, prepared, Views(views, augment, prepared.train), spec, device)
    writer = RecordWriter(
        url,
        identity={
            "teacher": {"fingerprint": "" if module is None else fingerprint(module), "members": recorder.members},
            "data": data_identity(prepared, test=spec.test),
            "views": views.policy(augment),
            "codec": recorder.codec.identity() if isinstance(recorder.codec, TokenCodec) else recorder.codec.spec(),
            "contents": {"features": list(spec.features), "scores": list(spec.scores), "members": spec.members, "batch_size": spec.batch_size},
            "tokenizer": recorder.tokenizer,
        },
        about=recorder.about(),
        parts=recorder.parts(),
        shard_rows=spec.shard_rows,
        rank=rank,
        world=world,
    )
    tasks = list(writer.pending())  # of a finished record those that are missing or damaged
    if any(parallel.agree([int(bool(tasks) or not writer.complete)], device, world)):
        chunks = _Chunks(recorder, tasks, spec.batch_size)
        watched = Silent() if progress is None or rank else progress
        watched.start("record", sum(len(task.ids) for task in tasks), 0, "rows")
        done = 0
        try:
            batches = datasets.ahead(chunks, range(len(chunks)), spec.workers)
            for task in tasks:
                rows = []
                for _ in chunks.sizes(task):
                    batch, extra = next(batches)
                    rows.append(recorder.rows(task.part, batch, extra))
                    done += len(batch)
                    watched.advance(done)
                writer.write(task, recorder.assembled(rows))
        finally:
            watched.stop()
        if world > 1:
            accelerator.wait_for_everyone()
        if rank == 0:
            writer.finish()
        if world > 1:
            accelerator.wait_for_everyone()
    return Record.open(url)


def checked(spec: RecordSpec, prepared: Prepared) -> Codec:
    """The codec of a record section. Raises InputError where section and data do not fit, before a teacher is made."""
    codec = codec_from({"name": str(spec.codec), **spec.codec.args}, where="record.codec")
    try:
        codec.check(prepared.num_classes)
    except InputError as error:
        raise error.at("record.codec") from error
    for name in spec.scores:
        if name not in RECORDED:
            raise InputError(f"unknown score '{name}'.", where="record.scores", fix=suggestion(name, RECORDED))
        if RECORDED[name].needs_labels and prepared.train.targets is None:
            raise InputError(f"the score '{name}' needs labels, the data have none.", where="record.scores")
    return codec


class _Recorder:
    """Rows of a record: what the teacher says of samples and views."""

    def __init__(self, teacher: Any, module: nn.Module | None, prepared: Prepared, views: Views, spec: RecordSpec, device: torch.device) -> None:
        self.teacher, self.module, self.prepared, self.views, self.spec, self.device = teacher, module, prepared, views, spec, device
        self.codec, self.tokenizer = checked(spec, prepared), spec.tokenizer
        self.tapped: nn.Module | None = None
        if spec.features:
            members = getattr(module, "members", None)
            if members is None or len(members) != 1:
                raise InputError("features are recorded of one network.", where="record.features", fix="Give one teacher that is a module.")
            self.tapped = members[0]
        try:
            first = self.batch("train", torch.zeros(1, dtype=torch.int64), 0)
            self.dtype, probe = first[0].inputs.dtype, self.rows("train", *first)
        except InputError as error:
            raise (InputError(error.what, where="record.features", fix=error.fix) if error.where == "paths" else error) from error
        self.members = int(probe["logits"].shape[1])
        self.shapes = {name: tuple(value.shape[1:]) for name, value in probe.items()}

    def parts(self) -> dict[str, Part]:
        members, classes = self.shapes["logits"]
        logits = Field.logits(self.codec, classes, members)
        features = [Field.features(name.partition("/")[2], shape) for name, shape in self.shapes.items() if name.startswith("features/")]
        scores = [Field.score(name) for name in self.spec.scores]
        boxes = [Field.boxes(), Field.flip()] if self.views.spec.kind == "boxes" else []
        found = {"train": Part(datasets.origins(self.prepared.train).numpy(), self.views.spec.count, (logits, *features, *scores, *boxes))}
        if self.spec.test:
            found["test"] = Part(datasets.origins(self.prepared.test).numpy(), 1, (logits,))
        return found

    def about(self) -> dict[str, Any]:
        """What a report says of the teacher."""
        found: dict[str, Any] = {"teacher": type(self.teacher).__name__, "classes": list(map(str, self.prepared.train.classes))}
        if self.module is None:
            return found
        members = getattr(self.module, "members", [self.module])
        found["teacher"] = ", ".join(type(member).__name__ for member in members)
        found |= {"parameters": cost.parameters(self.module), "bytes": cost.tensor_bytes(self.module)}
        try:
            found["macs"] = sum(cost.macs(member, self.prepared.input_shape, self.dtype) for member in members)
        except (RuntimeError, NotImplementedError):
            found["macs"] = None
        return found

    def batch(self, part: str, positions: Tensor, view: int) -> tuple[Batch, dict[str, Tensor]]:
        """What the teacher is shown of samples (positions in the part's data) in one view, prepared; and boxes and flips, where there are some."""
        if part != "train":
            raw, targets = self.prepared.test.fetch(positions)
            return Batch(self.prepared.test.prepare(raw), targets, positions), {}
        batch = self.views.batch(positions, torch.full((len(positions), 1), view))
        extra: dict[str, Tensor] = {}
        if self.views.spec.kind == "boxes":
            boxes, flips = self.views.boxes(positions, torch.full_like(positions, view))
            extra = {"boxes": boxes, "flip": flips.to(torch.uint8)}
        return replace(batch, inputs=self.prepared.train.prepare(batch.inputs)), extra

    def rows(self, part: str, batch: Batch, extra: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
        """Name → [R, ...] of what is kept of a batch."""
        found: dict[str, Tensor] = dict(extra)
        inputs = batch.inputs.to(self.device)
        if self.tapped is not None and part == "train":
            with taps.tap(self.tapped, self.spec.features, detach=True) as features:
                answers = self._answers(inputs)
                found |= {f"features/{name}": features[name] for name in self.spec.features}
        else:
            answers = self._answers(inputs)
        found["logits"] = answers.transpose(0, 1).float()
        if part == "train":
            logits = combined(answers.float())
            targets = None if batch.targets is None else batch.targets.to(self.device)
            found |= {f"scores/{name}": RECORDED[name](logits, targets).float() for name in self.spec.scores}
        return {name: value.cpu().numpy() for name, value in found.items()}

    def assembled(self, rows: Sequence[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
        """What the writer takes of one task."""
        return {name: np.concatenate([row[name] for row in rows]) for name in rows[0]}

    @torch.no_grad()
    def _answers(self, inputs: Tensor) -> Tensor:
        """[T, B, C]: every member, or the ensemble as one."""
        batch = Batch(inputs)
        return self.teacher.all_logits(batch) if self.spec.members else self.teacher.logits(batch)[None]


class _Chunks(Dataset[Any]):
    """What the teacher is shown, batch by batch over all tasks. A batch lies within one task: a file does not depend on the others."""

    def __init__(self, recorder: _Recorder | TokenRecorder, tasks: Sequence[Task], batch_size: int) -> None:
        self.show, self.batch_size = recorder.batch, batch_size
        self.places = [(task, part) for task in tasks for part in self.sizes(task)]

    def sizes(self, task: Task) -> list[np.ndarray]:
        """Positions of a task, cut into batches."""
        return np.array_split(task.positions, max(1, -(-len(task.positions) // self.batch_size)))

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> Any:
        task, positions = self.places[index]
        try:
            return self.show(task.part, torch.from_numpy(positions.astype(np.int64)), task.view)
        except InputError as error:
            return InputError(error.what, where=error.where, fix=error.fix)


def record(
    recipe: RecordRecipe | str | Path | None = None,
    *,
    teacher: Any = None,
    data: Any = None,
    views: ViewSpec | None = None,
    augment: AugmentSpec | None = None,
    settings: RecordSpec | Mapping[str, Any] | None = None,
    output: str | Path | None = None,
    style: Style = "quiet",
) -> Record:
    """Run a teacher once and keep its answers: by a record recipe (object or path), or a teacher over data.

    Args:
        recipe: a RecordRecipe or the path of one; then nothing but output and style is given.
        teacher: an nn.Module, a list of them, or a `contract.Teacher`. data: the training set, or (train, test), as `limbeck.distill` takes them.
        views, augment: the looks at every sample; one plain look without them. settings: a RecordSpec or its fields (codec, features, scores, …).
        output: folder or fsspec URL; the default is records/NAME for a recipe.

    Returns:
        The record, opened. Where it was there already, whole, nothing is done; where it was begun, recording goes on.

    Raises:
        InputError: something does not fit, or the folder holds another record (naming the first field that differs).
    """
    if recipe is not None:
        found = recipe if isinstance(recipe, RecordRecipe) else RecordRecipe.read(recipe)
        with cost.torch_threads(found.threads):
            return _from_recipe(found, output, style)
    if teacher is None or data is None or output is None:
        raise InputError("record needs a recipe, or teacher=, data= and output=.")
    pair = data if isinstance(data, tuple | list) and len(data) == 2 and not isinstance(data[0], Tensor) else (data, None)
    train, test = (None if part is None else datasets.as_data(part) for part in pair)
    assert train is not None
    spec = settings if isinstance(settings, RecordSpec) else validated(RecordSpec, {"test": test is not None} | dict(settings or {}))
    if spec.test and test is None:
        raise InputError("there are no test data to record.", where="settings.test", fix="Give data=(train, test), or test=False.")
    example = train.prepare(train.fetch(torch.zeros(1, dtype=torch.int64))[0])
    members = list(teacher) if isinstance(teacher, list | tuple) else [teacher]
    if all(isinstance(member, LanguageModel) for member in members):
        prepared = Prepared(train, test if test is not None else train, None, width(datasets.Splits(train, test or train)), tuple(example.shape[1:]))
        return record_teacher(
            ModelSource(members), prepared, output, views=views or ViewSpec(count=1), augment=augment or AugmentSpec(), spec=spec, progress=choose(style)
        )
    taught = as_teacher(teacher)
    try:
        classes = int(taught.logits(Batch(example)).shape[1])
    except (RuntimeError, ValueError, TypeError) as error:
        first = str(error).strip().splitlines()[0]
        raise InputError(f"the teacher cannot take the data's inputs of shape {list(example.shape[1:])}: {first}", where="teacher") from error
    prepared = Prepared(train, test if test is not None else train, None, classes, tuple(example.shape[1:]))
    return record_teacher(taught, prepared, output, views=views or ViewSpec(count=1), augment=augment or AugmentSpec(), spec=spec, progress=choose(style))


def _from_recipe(recipe: RecordRecipe, output: str | Path | None, style: Style) -> Record:
    url = str(output) if output is not None else f"records/{recipe.name}"
    start_processes(cpu=recipe.device == "cpu")
    tokens = tokenizer_of(prepare(recipe.data, recipe.seed))
    parts = Ingredients(
        name=recipe.name, seeds=(recipe.seed,), method=Supervised if tokens is None else NextToken, data=lambda seed: prepare(recipe.data, seed), student=_none, fresh=_none,
        teachers=recipe.teacher, given_teacher=None, train=TrainConfig(epochs=0), augment=recipe.data.augment, evaluate=EvaluateSpec(),
        compare=CompareSpec(alone=False), student_spec=None, data_key=recipe.data.model_dump_json(), cpu=recipe.device == "cpu",
    )  # fmt: skip
    runner = Runner(parts, None, style=style)
    local = "://" not in url
    folder = Path(url) if local else None
    work = None if folder is None else folder.with_name(f".{folder.name}.work")  # lock, and teachers trained here: a record holds nothing else
    if work is not None:
        try:
            work.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"the record cannot be made there: {error.strerror}.", where=url, fix="Give another folder with --output.") from error
    with locked(work) if work is not None and rank() == 0 else nullcontext():
        try:
            prepared = parts.data(recipe.seed)
            if tokens is None:
                checked(recipe.record, prepared)
            example = prepared.train.prepare(prepared.train.fetch(torch.zeros(1, dtype=torch.int64))[0])
            for index, spec in enumerate(recipe.teacher):
                where = "teacher" if len(recipe.teacher) == 1 else f"teacher.{index}"
                runner.kind.fits(network(spec, prepared, 0, where), example, prepared, where)
            runner.cache = work
            teacher, _ = runner.teacher(prepared, recipe.seed)
            assert teacher is not None
            views = recipe.data.views or ViewSpec(count=1)
            return record_teacher(
                teacher, prepared, url, views=views, augment=recipe.data.augment, spec=recipe.record, progress=choose(style if rank() == 0 else "quiet"),
                cpu=parts.cpu,
            )  # fmt: skip
        except InputError:
            if work is not None and rank() == 0 and not any(item.is_dir() for item in work.iterdir()):  # no teacher was trained
                shutil.rmtree(work, ignore_errors=True)
            raise


def ensure(recipe: Recipe, style: Style = "quiet") -> None:
    """Make the record that a recipe's teacher names, by its `make`, where it is not there or not finished.

    Raises:
        InputError: the record recipe is wrong.
    """
    spec = recipe.recorded
    if spec is None or spec.make is None:
        return
    assert spec.record is not None
    try:
        if not finished(spec.record):
            record(spec.make, output=spec.record, style=style)
    except InputError as error:
        raise error.at("teacher.make") from error


def finished(url: str) -> bool:
    """Whether a whole record lies there. Raises InputError where what lies there is damaged."""
    store = store_for(url)
    return load_manifest(store) is not None and load_index(store) is not None


def _none(prepared: Prepared, seed: int) -> nn.Module:
    raise AssertionError("a record has no student")
