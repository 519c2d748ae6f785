"""A table of finished distillations, and what it says of a new data set: which pipelines to try (AutoDistiller, arXiv 2109.11105, end of our sheet's loop).

A row is (task, its features, pipeline, score, teacher's score). A regressor learns the ratio score/teacher's score of features and pipeline; for a new data set
it ranks candidate pipelines, and a person runs the first few. It is judged by regret (what the best of the first n lacks to the best of all), never by fit:
tables are unbalanced, and a mean over rows says nothing of the best.

The paper's: the ratio as target, a tabular regressor (AutoGluon's), leave-one-task-out. The released data describe a task by 100 numbers "of its text" (two
vectors of 50), its examples and labels; how these were made is not documented. Ours: mean and standard deviation of the texts' vectors, each brought to 50
numbers by one fixed random projection; an ensemble of trees (scikit-learn); regret against the exact expectation of n at random.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import product
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
import yaml
from numpy.typing import NDArray
from torch import Tensor

from limbeck import seeds
from limbeck.errors import InputError
from limbeck.files import sync_folder
from limbeck.language.classification import bag_of_words

Value = str | float | int | bool | None
Pipeline = Mapping[str, Value]
Facts = Mapping[str, float]
"""Features of a data set by name."""


@dataclass(frozen=True)
class Run:
    """One distillation. score, teacher_score: of the same measure on the same data, the more the better; facts: features of the data set; seed: of the run.

    Raises:
        InputError: a score is not finite, or the teacher's is not above 0 (the ratio would mean nothing).
    """

    task: str
    pipeline: Pipeline
    score: float
    teacher_score: float
    facts: Facts = field(default_factory=dict)
    seed: int = 0

    def __post_init__(self) -> None:
        if not math.isfinite(self.score) or not math.isfinite(self.teacher_score) or self.teacher_score <= 0:
            what = f"the score {self.score:g} beside the teacher's {self.teacher_score:g} gives no ratio."
            raise InputError(what, where=f"task {self.task}", fix="Use a measure of which more is better and that is above 0 for the teacher.")

    @property
    def ratio(self) -> float:
        """Score divided by the teacher's: what is predicted."""
        return self.score / self.teacher_score


class RunTable:
    """Rows in a file of JSON lines that only grows. Several processes may append; a row that a killed process left half-written is dropped.

    Raises:
        InputError: on reading, a line is no row.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)

    def append(self, rows: Iterable[Run]) -> None:
        """Put rows at the end: all of them, on the disk, when this returns."""
        text = "".join(json.dumps(asdict(row), sort_keys=True, allow_nan=False) + "\n" for row in rows)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.seek(0)
            content = file.read()
            if content and not content.endswith(b"\n"):
                file.truncate(content.rfind(b"\n") + 1)
            file.seek(0, os.SEEK_END)
            file.write(text.encode())
            file.flush()
            os.fsync(file.fileno())
        sync_folder(self.path.parent)

    def rows(self) -> list[Run]:
        """All whole rows in order; none where there is no file."""
        if not self.path.exists():
            return []
        found = []
        for number, line in enumerate(self.path.read_bytes().split(b"\n")[:-1], 1):
            try:
                found.append(Run(**json.loads(line)))
            except (ValueError, TypeError, InputError) as error:
                raise InputError(f"this is no row: {error}.", where=f"{self.path}:{number}", fix="Rows are written by RunTable.append.") from error
        return found


# ---- rows out of run folders ---------------------------------------------------------------------------------------------


def runs_of_folder(folder: Path | str, task: str, facts: Facts, defaults: Pipeline | None = None, measure: str = "accuracy") -> list[Run]:
    """Rows of a finished run's folder, one a seed: the distilled student's score beside the mean of the teacher's.

    Args:
        folder: that `limbeck distill` made. task: what the data are called. facts: their features, see `dataset_facts`.
        defaults: the method's own (`Distiller.Config().model_dump()`), for knobs that the recipe leaves alone. measure: of the outcomes.

    Raises:
        InputError: the run is not finished, or lacks a teacher or the measure.
    """
    path = Path(folder) / "result.json"
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
        recipe = yaml.safe_load(told["recipe"])
        arms = {arm["role"]: arm["outcomes"] for arm in told["arms"]}
    except FileNotFoundError as error:
        raise InputError("there is no result.", where=str(path), fix="Is the run finished?") from error
    except (ValueError, KeyError, TypeError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"this is no result of a run: {error}.", where=str(path)) from error
    scores = {
        role: [(o.get("seed", 0), o.get(measure, (o.get("measures") or {}).get(measure))) for o in arms.get(role, ())] for role in ("teacher", "distilled")
    }
    for role, found in scores.items():
        if not found or any(score is None for _, score in found):
            raise InputError(f"the {role} has no '{measure}'.", where=str(path), fix="Only runs with a teacher and that measure make rows.")
    teacher_score = math.fsum(score for _, score in scores["teacher"]) / len(scores["teacher"])
    pipeline = {**(defaults or {}), **recipe["method"].get("args", {}), "method": recipe["method"]["name"] or recipe["method"]["target"]}
    flat = {name: value if isinstance(value, Value) else json.dumps(value) for name, value in pipeline.items()}
    return [Run(task, flat, score, teacher_score, facts, seed) for seed, score in scores["distilled"]]


# ---- what describes a data set -------------------------------------------------------------------------------------------


def dataset_facts(
    texts: Sequence[Sequence[str]],
    classes: int,
    vectors: Callable[[Sequence[Sequence[str]]], Tensor] | None = None,
    width: int = 50,
) -> dict[str, float]:
    """Features of a data set: "text_mean_K" and "text_sd_K" (K < width), "ln_examples", "ln_classes", "ln_words" (a text's mean number) and "pair".

    Args:
        texts: of each sample one text, or two. classes: labels. vectors: texts → [N, d]; None: hashed bags of words of 2,048 columns, of length 1 each;
            `classification.sentence_embeddings` is another. width: numbers that mean and deviation become, by a Gaussian projection that is always the same.

    Raises:
        InputError: there are no texts.
    """
    if not texts:
        raise InputError("there are no texts.", where="texts")
    if vectors is None:
        bags_Nd = bag_of_words(texts, 2048)
        found_Nd = bags_Nd / bags_Nd.norm(dim=1, keepdim=True).clamp(min=1)
    else:
        found_Nd = vectors(texts).float()
    projection_dw = torch.randn(found_Nd.shape[1], width, generator=seeds.generator("dataset facts", found_Nd.shape[1], width)) / width**0.5
    summary = {"mean": found_Nd.mean(0) @ projection_dw, "sd": found_Nd.std(0, correction=0) @ projection_dw}
    facts = {f"text_{name}_{k:02d}": float(value) for name, values_w in summary.items() for k, value in enumerate(values_w.tolist())}
    words = sum(len(text.split()) for pair in texts for text in pair) / len(texts)
    return facts | {"ln_examples": math.log(len(texts)), "ln_classes": math.log(classes), "ln_words": math.log(max(words, 1)), "pair": float(len(texts[0]) > 1)}


# ---- the recommender ------------------------------------------------------------------------------------------------------


def candidates(space: Mapping[str, Sequence[Value]], sensible: Callable[[Pipeline], bool] = lambda pipeline: True) -> list[dict[str, Value]]:
    """Every pipeline of a space (knob → its values) that is sensible, in the order of the space."""
    every = (dict(zip(space, values, strict=True)) for values in product(*space.values()))
    return [pipeline for pipeline in every if sensible(pipeline)]


class Recommender:
    """Ranks pipelines for a data set by the ratio that a forest of extremely random trees predicts (scikit-learn's ExtraTreesRegressor).

    Knobs that are text or truth values become a column a value, numbers stay; a knob or feature that a row lacks is 0 there. trees: of the forest. seed: of it.
    """

    def __init__(self, trees: int = 200, seed: int = 0) -> None:
        self.trees, self.seed = trees, seed

    def fit(self, rows: Sequence[Run]) -> Self:
        """Learn from rows. Raises InputError: fewer than 2."""
        from sklearn.ensemble import ExtraTreesRegressor
        from sklearn.feature_extraction import DictVectorizer

        if len(rows) < 2:
            raise InputError(f"{len(rows)} rows teach nothing.", where="rows", fix="Log some runs first.")
        self.columns = DictVectorizer(sparse=False, sort=True)
        table_RF = self.columns.fit_transform([_columns(row.pipeline, row.facts) for row in rows])
        self.forest = ExtraTreesRegressor(self.trees, min_samples_leaf=2, random_state=seeds.derive(self.seed, "recommender") % 2**32)
        self.forest.fit(table_RF, np.array([row.ratio for row in rows]))
        return self

    def predict(self, facts: Facts, pipelines: Sequence[Pipeline]) -> NDArray[np.float64]:
        """The predicted ratio of each pipeline, [P]."""
        found: NDArray[np.float64] = self.forest.predict(self.columns.transform([_columns(pipeline, facts) for pipeline in pipelines]))
        return found

    def top(self, facts: Facts, pipelines: Sequence[Pipeline], count: int) -> list[Pipeline]:
        """The `count` best by prediction, best first; equals in the order given."""
        order = np.argsort(-self.predict(facts, pipelines), kind="stable")
        return [pipelines[i] for i in order[:count]]


def _columns(pipeline: Pipeline, facts: Facts) -> dict[str, Any]:
    knobs = {f"pipeline.{name}": str(value) if isinstance(value, bool) else value for name, value in pipeline.items() if value is not None}
    return {**knobs, **{f"fact.{name}": float(value) for name, value in facts.items()}}


@dataclass(frozen=True)
class Regret:
    """What the best of `count` pipelines lacks to the best of all, in units of the ratio, on a task that was not learned from.

    recommended: of the recommended ones. random: expected, of as many at random without replacement. mean: the most frequent advice, those whose mean ratio on
    the other tasks is best. pipelines: P on the task.
    """

    task: str
    recommended: float
    random: float
    mean: float
    pipelines: int


def leave_one_task_out(rows: Sequence[Run], count: int = 3, recommender: Callable[[], Recommender] = Recommender) -> list[Regret]:
    """Regrets, a task each: learned from all other tasks' rows, asked about the pipelines that were run on it (a pipeline's ratio: the mean over its seeds).

    Raises:
        InputError: fewer than 2 tasks, or a task with fewer than `count` pipelines.
    """
    tasks = sorted({row.task for row in rows})
    if len(tasks) < 2:
        raise InputError(f"there are rows of {len(tasks)} task.", where="rows", fix="Leaving one out needs two.")
    found = []
    for task in tasks:
        others = [row for row in rows if row.task != task]
        facts = next(row.facts for row in rows if row.task == task)
        ratios = _mean_ratios(row for row in rows if row.task == task)
        if len(ratios) < count:
            raise InputError(f"the task '{task}' has {len(ratios)} pipelines.", where="count", fix=f"Run {count}, or ask for fewer.")
        by_key = {_key(row.pipeline): row.pipeline for row in rows if row.task == task}
        keys = list(ratios)
        best = max(ratios.values())
        chosen = recommender().fit(others).top(facts, [by_key[key] for key in keys], count)
        elsewhere = _mean_ratios(others)
        usual = sorted(keys, key=lambda key, known=elsewhere: -known.get(key, -math.inf))[:count]  # type: ignore[misc]
        found.append(
            Regret(
                task,
                best - max(ratios[_key(pipeline)] for pipeline in chosen),
                best - expected_best(list(ratios.values()), count),
                best - max(ratios[key] for key in usual),
                len(keys),
            )
        )
    return found


def expected_best(values: Sequence[float], count: int) -> float:
    """The expected largest of `count` of the values, drawn without replacement: exact. Raises InputError: more are drawn than there are."""
    if not 1 <= count <= len(values):
        raise InputError(f"{count} of {len(values)} cannot be drawn.", where="count")
    whole = math.comb(len(values), count)
    return math.fsum(value * math.comb(place, count - 1) / whole for place, value in enumerate(sorted(values)))


@dataclass(frozen=True)
class Saving:
    """The regret that recommendation saves against chance: mean over tasks of random − recommended, with a bootstrap interval (95 %) over tasks."""

    mean: float
    low: float
    high: float
    tasks: int


def saving(regrets: Sequence[Regret], resamples: int = 2000, seed: int = 0) -> Saving:
    """Bootstrap over tasks; with few of them the interval is coarse. Raises InputError: there are none."""
    if not regrets:
        raise InputError("there are no regrets to average.", where="regrets")
    saved_T = torch.tensor([regret.random - regret.recommended for regret in regrets], dtype=torch.float64)
    draws_RT = torch.randint(len(regrets), (resamples, len(regrets)), generator=seeds.generator(seed, "saving"))
    low, high = saved_T[draws_RT].mean(1).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Saving(float(saved_T.mean()), low, high, len(regrets))


def _key(pipeline: Pipeline) -> str:
    return json.dumps(dict(pipeline), sort_keys=True)


def _mean_ratios(rows: Iterable[Run]) -> dict[str, float]:
    """Pipeline → its mean ratio over seeds (and tasks), in the order of first sight."""
    found: dict[str, list[float]] = {}
    for row in rows:
        found.setdefault(_key(row.pipeline), []).append(row.ratio)
    return {key: math.fsum(values) / len(values) for key, values in found.items()}
