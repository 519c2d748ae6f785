"""Several runs side by side on one page, in the form of a run's own report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from limbeck.errors import InputError
from limbeck.files import write_atomic
from limbeck.report import generator_tables, plots, tables
from limbeck.report.generator_wording import ordered
from limbeck.report.measures import CALLS, SECONDS, measure_of
from limbeck.report.page import fill, present, scalar
from limbeck.report.summary import Arm, RunSummary
from limbeck.report.verdicts import compared_with, sentence, verdict

ABSENT = "–"
ONE_MACHINE = "Latencies are comparable only between runs measured on the same machine."


@dataclass(frozen=True)
class Difference:
    """A field of the recipe in which runs differ, and its value in each (ABSENT where a run has no such field)."""

    field: str
    values: tuple[str, ...]


def render(summaries: Sequence[RunSummary]) -> str:
    """The page. Raises InputError for fewer than two runs, and for runs that made different kinds of things."""
    if len(summaries) < 2:
        raise InputError(f"a comparison needs at least two runs, not {len(summaries)}.")
    names = unique_titles(summaries)
    for name, summary in zip(names, summaries, strict=True):
        if summary.kind != summaries[0].kind:
            what = f"'{names[0]}' made a {summaries[0].kind}, '{name}' a {summary.kind}: they share no measure."
            raise InputError(what, fix="Compare runs that made the same kind of thing.")
    lines = [(name, arm) for name, summary in zip(names, summaries, strict=True) for arm in _arms(summary)]
    arms = [arm for _, arm in lines]
    series = [plots.Series(f"{name} · {arm.label}", i, arm) for i, (name, arm) in enumerate(lines)]
    students = [s for s in series if any(s.arm is _student(summary) for summary in summaries)]
    sizes = sorted({x.batch_size for s in series for x in s.arm.latencies})
    return fill(
        "compare.html",
        {
            "title": " · ".join(names),
            "runs": [
                {"name": name, "summary": summary, "sentence": sentence(summary), "verdict": verdict(summary), "compared_with": compared_with(summary)}
                for name, summary in zip(names, summaries, strict=True)
            ],
            "lines": [(name, arm.label) for name, arm in lines],
            "cost": tables.cost(arms),
            "differences": recipe_differences([summary.recipe for summary in summaries]),
            "names": names,
            "curve_plots": plots.curves(students),
            "latency_plots": present([plots.latency(series, size, f"latency{size}") for size in sizes]),
        }
        | (_classifiers(arms, series, students) if summaries[0].kind == "classifier" else _judged_by_measures(names, summaries, arms)),
    )


def _classifiers(arms: Sequence[Arm], series: Sequence[plots.Series], students: Sequence[plots.Series]) -> dict[str, object]:
    return {
        "headline": tables.headline(arms, None),
        "quality": tables.quality(arms),
        "size_plot": plots.accuracy_by_size(series),
        "quality_plots": present([plots.reliability(students)]),
        "footer": f"Accuracy is the mean over seeds ± one standard error. {ONE_MACHINE}",
    }


def _judged_by_measures(names: Sequence[str], summaries: Sequence[RunSummary], arms: Sequence[Arm]) -> dict[str, object]:
    first = generator_tables.leading([summary.headline for summary in summaries])
    ladders = []
    for i, (name, summary) in enumerate(zip(names, summaries, strict=True)):  # a run has one colour: its teacher's line, its student's mark
        ladders.append(plots.ladder(f"{name} · teacher", [plots.Series(f"{name} · {arm.label}", i, arm) for arm in _arms(summary)]))
    shared = [key for key in dict.fromkeys(s.judged_by for s in summaries) if all(any(a.mean(key) for a in s.arms) for s in summaries)]
    costs = (CALLS, SECONDS) if summaries[0].kind == "generator" else ()
    found = [plots.quality_by_cost(ladders, measure_of(key), measure_of(cost), f"{key}-{cost}") for key in shared for cost in costs]
    return {
        "headline": generator_tables.headline(arms, None, first),
        "quality": generator_tables.further(arms, first),
        "size_plot": None,
        "quality_plots": present(found),
        "footer": f"Numbers are means over seeds ± one standard error; ↓ lower is better, ↑ higher is better. {ONE_MACHINE}",
    }


def _arms(summary: RunSummary) -> Sequence[Arm]:
    return summary.arms if summary.kind == "classifier" else ordered(summary.arms)


def write(summaries: Sequence[RunSummary], path: Path | str) -> None:
    """`render` into a file, whole or not at all."""
    write_atomic(path, render(summaries))


def unique_titles(summaries: Sequence[RunSummary]) -> list[str]:
    """The runs' titles, numbered where several runs share one."""
    titles = [s.title for s in summaries]
    return [f"{t} ({titles[: i + 1].count(t)})" if titles.count(t) > 1 else t for i, t in enumerate(titles)]


def recipe_differences(recipes: Sequence[str]) -> list[Difference]:
    """The fields, as dotted paths, in which resolved recipes (YAML) differ, in the order in which they first appear."""
    flat = [_flattened(yaml.safe_load(text)) for text in recipes]
    fields = dict.fromkeys(field for recipe in flat for field in recipe)
    rows = [Difference(field, tuple(recipe.get(field, ABSENT) for recipe in flat)) for field in fields]
    return [row for row in rows if len(set(row.values)) > 1]


def _flattened(value: Any, path: str = "") -> dict[str, str]:
    """Dotted path → text of every leaf; a list of plain values is a leaf."""
    if isinstance(value, Mapping) and value:
        pairs = [(str(key), item) for key, item in value.items()]
    elif isinstance(value, list) and any(isinstance(item, Mapping | list) for item in value):
        pairs = [(str(i), item) for i, item in enumerate(value)]
    else:
        text = ", ".join(scalar(item) for item in value) if isinstance(value, list) else scalar(value)
        return {path: text} if path else {}
    found: dict[str, str] = {}
    for key, item in pairs:
        found |= _flattened(item, f"{path}.{key}" if path else key)
    return found


def _student(summary: RunSummary) -> Arm | None:
    """The distilled student of a run, or what it has in place of one."""
    return summary.arm("distilled") or summary.arm("alone") or next(iter(summary.arms), None)
