"""Runs: a recipe, or objects, distilled in a folder that holds everything about it (DESIGN §7, §8).

runs/NAME/            recipe.yaml, environment.json, metrics.jsonl, checkpoints/, artefact/ (of the first seed), report.html, result.json
runs/NAME/teacher/    the teacher, where it was trained here; student/: a student trained beforehand; alone/: the student without a teacher
runs/NAME/seed-S/     the same for every further seed
"""

from __future__ import annotations

import copy
import hashlib
import json
import shutil
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from limbeck import data as datasets
from limbeck import files, models, recording
from limbeck.components import Component
from limbeck.contract import Data, Method
from limbeck.data import AugmentSpec, ViewSpec
from limbeck.environment import describe
from limbeck.errors import InputError
from limbeck.evaluate.cost import torch_threads
from limbeck.evaluate.statistics import Latency
from limbeck.export import folder as artefacts
from limbeck.export import rebuild
from limbeck.ingredients import Ingredients, Prepared, from_recipe, make_method, replay, width
from limbeck.kinds import Measured, kind_of
from limbeck.language.models import LanguageModel
from limbeck.recipe import CompareSpec, EvaluateSpec, Recipe
from limbeck.records import Record
from limbeck.report import html
from limbeck.report.summary import Arm, RunSummary
from limbeck.runner import Made, Runner, Style, barrier, rank, start_processes
from limbeck.teachers import as_teacher
from limbeck.train import TrainConfig, locked


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
    if fresh or not (folder / "recipe.yaml").exists():
        runner.check()
    start_processes(cpu=parts.cpu)
    made = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"the run folder cannot be made: {error.strerror}.", where=str(folder), fix="Give another with --run.") from error
    with locked(folder) if rank() == 0 else nullcontext():
        try:
            if rank() == 0:
                if fresh:
                    _empty(folder)
                _claim(folder, parts)
            barrier()
            if resume_from is not None and not list(folder.glob(f"**/checkpoints/{resume_from}")):
                raise InputError(f"there is no checkpoint '{resume_from}' in this run.", where="--from")
            if (folder / "result.json").exists():
                return _finished(runner, folder)
            return _all_seeds(runner)
        except InputError:
            if made and rank() == 0 and not list(folder.glob("**/step-*")) and not list(folder.glob("**/artefact")):
                shutil.rmtree(folder, ignore_errors=True)
            raise


def _finished(runner: Runner, folder: Path) -> Result:
    """What an earlier process finished, read back."""
    summary = RunSummary.from_json((folder / "result.json").read_text(encoding="utf-8"))
    return Result(_kept_student(runner.parts, folder), _metrics(runner, summary), summary, folder)


def _kept_student(parts: Ingredients, folder: Path) -> nn.Module:
    if parts.student_spec is not None:
        return artefacts.load(folder, trust_imports=any(part.target is not None for part in rebuild.within(parts.student_spec.model)))
    prepared = parts.data(parts.seeds[0])
    method = parts.method()
    if method.produces == "classifier":
        return artefacts.load(folder, model=parts.student(prepared, 0))
    method.bind(  # the artefact is the generator around the student
        student=parts.student(prepared, 0), teacher=parts.given_teacher, train=prepared.train, num_classes=prepared.num_classes, seed=parts.seeds[0]
    )
    return artefacts.load(folder, model=method.inference())


def _metrics(runner: Runner, summary: RunSummary) -> dict[str, float]:
    """The first seed's numbers of the distilled student, the method's own included."""
    arm = summary.arm("distilled")
    found = {} if arm is None else runner.kind.metrics(arm.outcomes[0])
    return found | {k: float(v) for k, v in summary.facts.get("metrics", {}).items()}


def _empty(folder: Path) -> None:
    """Delete a run, its recipe last: it is what marks a run. Raises InputError, and deletes nothing, where the folder holds something else."""
    if not (folder / "recipe.yaml").exists() and _strangers(folder):
        raise InputError("the folder holds other things than a run; it is left alone.", where=str(folder), fix="Give this run another folder with --run.")
    for item in sorted(folder.iterdir(), key=lambda found: found.name == "recipe.yaml"):
        if item.name != ".lock":
            shutil.rmtree(item) if item.is_dir() and not item.is_symlink() else item.unlink()


def _strangers(folder: Path) -> list[str]:
    """Names that a run which was killed at its very start does not leave."""
    return [item.name for item in folder.iterdir() if not item.name.startswith(".") and item.name != "environment.json"]


def _claim(folder: Path, parts: Ingredients) -> None:
    """Write recipe and environment, or check that the folder's recipe is this one."""
    path = folder / "recipe.yaml"
    if not path.exists():
        if others := _strangers(folder):
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
    parts, folder, kind = runner.parts, runner.folder, runner.kind
    by_label: dict[str, list[Arm]] = {}
    notes: list[str] = []
    first_part: RunSummary | None = None
    first: Made | None = None
    for seed in parts.seeds:
        kept = folder / "outcomes" / f"seed-{seed}.json" if folder is not None else None
        if kept is not None and kept.exists():
            part = RunSummary.from_json(kept.read_text(encoding="utf-8"))
        else:
            found = runner.seed(seed)
            first = found.made if first is None and seed == parts.seeds[0] else first
            arms = tuple(_arm(arm, found.costs.get(arm.role, {})) for arm in found.arms)
            part = RunSummary(parts.name, arms, facts=_plain(found.facts), notes=_told(found.notes, seed, parts.seeds), pictures=found.pictures)
            if kept is not None and rank() == 0:
                files.write_atomic(kept, part.to_json())
        first_part = first_part or part
        notes += part.notes
        for made in part.arms:
            by_label.setdefault(made.label, []).append(made)
    assert first_part is not None
    prepared = parts.data(parts.seeds[0])
    summary = RunSummary(
        title=parts.name,
        arms=tuple(replace(arms[0], outcomes=tuple(outcome for arm in arms for outcome in arm.outcomes)) for arms in by_label.values()),
        method=type(parts.method()).__name__,
        recipe=parts.recipe,
        created=time.strftime("%Y-%m-%d %H:%M:%S"),
        environment=describe(),
        classes=tuple(str(c) for c in prepared.train.classes),
        facts=first_part.facts,
        notes=tuple(notes),
        pictures=first_part.pictures,
        kind=kind.name,
        headline=kind.headline(prepared),
    )
    if folder is not None and rank() == 0:
        html.write(summary, folder / "report.html")
        files.write_atomic(folder / "result.json", summary.to_json())
    barrier()
    if first is None and folder is not None:  # an earlier process made it
        return Result(_kept_student(parts, folder), _metrics(runner, summary), summary, folder)
    return Result(None if first is None else first.module, _metrics(runner, summary), summary, folder)


def _told(notes: Sequence[str], seed: int, seeds: Sequence[int]) -> tuple[str, ...]:
    """What was noticed, with the seed where there are several."""
    return tuple(f"seed {seed}: {note}" if len(seeds) > 1 else note for note in notes)


def _arm(measured: Measured, costs: Mapping[str, Any]) -> Arm:
    latencies: tuple[Latency, ...] = tuple(costs.get("latencies") or ())
    return Arm(measured.role, measured.label, (measured.outcome,), costs.get("parameters"), costs.get("macs"), costs.get("bytes"), latencies)


def _plain(value: Any) -> Any:
    """Facts as JSON values."""
    return json.loads(json.dumps(value, default=float))


# ---- front doors ----------------------------------------------------------------------------------------------------


def distill(
    recipe: Recipe | str | Path | None = None,
    *,
    teacher: Any = None,
    student: nn.Module | None = None,
    data: Any = None,
    method: Method | None = None,
    train: TrainConfig | Mapping[str, Any] | None = None,
    augment: AugmentSpec | None = None,
    views: ViewSpec | None = None,
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
        teacher: an nn.Module, a list of them (an ensemble), a `limbeck.Record`, or anything with `logits(batch)`; None for methods without one.
        student: the module to train; a classifier is trained in place and returned as `Result.student`, a denoiser becomes `Result.student`, a generator.
        data: (train, test), each a torch Dataset of (input, label) pairs, a pair of tensors, or a limbeck data set.
        method: such as `limbeck.methods.KD(temperature=4)`; the default is KD, of a language model TokenKD.
        train: a TrainConfig or its fields; the default is 10 epochs of SGD.
        views: the looks at every sample, as the record has them. augment, validation, seed: see TrainConfig and Method.bind.
        alone: also train a copy of the student without a teacher.
        run: the run's folder; None: runs/NAME for a recipe, nothing written for objects.

    Returns:
        Result: the student, its metrics on the test data, the summary.

    Raises:
        InputError: something does not fit; says what and where.
    """
    if recipe is not None:
        found = recipe if isinstance(recipe, Recipe) else Recipe.read(recipe)
        folder = Path(run) if run is not None else Path("runs") / found.name
        with torch_threads(found.threads):
            recording.ensure(found, style)
            return execute(from_recipe(found), folder, style=style, fresh=fresh, resume_from=resume_from)
    if student is None or data is None:
        raise InputError("distill needs a recipe, or at least student= and data=(train, test).")
    if not isinstance(data, tuple | list) or len(data) != 2:
        raise InputError("data must be a pair (train, test).", where="data")
    train_data, test_data = (datasets.as_data(part) for part in data)
    chosen = method if method is not None else make_method(Component(name="token_kd" if isinstance(student, LanguageModel) else "kd"))
    config = train if isinstance(train, TrainConfig) else _train_config(train)
    example = train_data.prepare(train_data.fetch(torch.arange(min(2, len(train_data))))[0])
    with torch.no_grad():
        classes = _classes(student, example) if chosen.produces == "classifier" else width(datasets.Splits(train_data, test_data))
    prepared = Prepared(
        train_data, test_data, None if validation is None else datasets.as_data(validation), classes, tuple(example.shape[1:])
    )  # fmt: skip
    recorded = teacher if isinstance(teacher, Record) else None
    members = list(teacher) if isinstance(teacher, list | tuple) else [copy.deepcopy(teacher) if teacher is student else teacher]
    generates = chosen.produces != "classifier"  # its teacher is no source of logits
    given = None if teacher is None or recorded is not None else kind_of(chosen, EvaluateSpec()).teacher(members) if generates else as_teacher(teacher)
    parts = Ingredients(
        name=Path(run).name if run is not None else type(chosen).__name__,
        seeds=(seed,),
        method=lambda: type(chosen)(chosen.config),
        data=lambda _seed: prepared,
        student=lambda _prepared, _seed: copy.deepcopy(student),
        fresh=lambda _prepared, of: models.reinitialise(student, of),
        teachers=(),
        given_teacher=given,
        train=config,
        augment=augment or AugmentSpec(),
        evaluate=EvaluateSpec(latency=True) if run is not None else EvaluateSpec(latency=False, baselines=()),  # without a report nothing stands beside
        compare=CompareSpec(alone=alone),
        student_spec=None,
        views=views or (None if recorded is None else ViewSpec(count=1)),
        record=None if recorded is None else lambda of: replay(recorded, views, augment or AugmentSpec(), of),
        data_key="objects",
        recipe=json.dumps(
            {
                "method": type(chosen).__name__,
                "knobs": chosen.config.model_dump(mode="json"),
                "train": config.model_dump(mode="json"),
                "seed": seed,
                "alone": alone,
                "augment": (augment or AugmentSpec()).model_dump(mode="json"),
                "student": [type(student).__name__, [[name, list(value.shape)] for name, value in student.state_dict().items()]],
                "views": None if views is None else views.model_dump(mode="json"),
                "teacher": _identity(given) if recorded is None else recorded.identity["teacher"],
                "data": [_data_identity(part) for part in (train_data, test_data, prepared.validation)],
            }
        ),
    )
    result = execute(parts, None if run is None else Path(run), style=style, fresh=fresh, resume_from=resume_from)
    if result.student is not None and type(result.student) is type(student):
        student.load_state_dict(result.student.state_dict())
        result.student = student.eval()
    return result


def _identity(teacher: Any) -> str:
    """What tells one teacher from another."""
    return models.fingerprint(teacher) if isinstance(teacher, nn.Module) else type(teacher).__name__


def _data_identity(data: Data | None) -> list[Any]:
    """What tells one data set from another: its length and labels."""
    if data is None:
        return []
    targets = data.targets
    if targets is None:
        return [len(data), datasets.inputs_fingerprint(data)]
    return [len(data), hashlib.sha256(targets.contiguous().numpy().tobytes()).hexdigest()]


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
        What the kind of artefact is measured by (accuracy, nll, …; mmd2, fid, calls, …), the same of the teacher as teacher/NAME, seconds, and the method's
        own metrics.
    """
    found = Recipe.parse({**recipe, "name": arm, "seeds": [seed], "compare": {"alone": False}, "evaluate": {**recipe.get("evaluate", {}), "latency": False}})
    runner = Runner(from_recipe(found), None, cache=cache, style=style)
    with torch_threads(found.threads):
        recording.ensure(found, style)
        prepared = runner.parts.data(seed)
        teacher, reference = runner.teacher(prepared, seed)
        start = runner.student(prepared, seed, teacher)
        made = runner._train(runner.parts.method(), start, prepared, seed, found.train, None, teacher=teacher, label=f"{arm} seed {seed}", test=True)
        outcome = runner._outcome(made, prepared, seed, reference)
        of_teacher = next((m.outcome for m in runner.kind.teacher_arms(seed, teacher, made.module, prepared, reference) if m.role == "teacher"), None)
    values = runner.kind.metrics(outcome)
    if of_teacher is not None:
        values |= {f"teacher/{name}": value for name, value in runner.kind.metrics(of_teacher).items()}
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
    module = load(folder, trust_imports=any(part.target is not None for part in rebuild.within(recipe.student.model)))
    parts = from_recipe(recipe)
    kind = kind_of(parts.method(), recipe.evaluate)
    kind.fresh, kind.seed = parts.fresh, recipe.seeds[0]
    return kind.evaluated(module, parts.data(recipe.seeds[0]))
