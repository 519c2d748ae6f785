"""One run as one HTML page that needs nothing but itself: no scripts, no network, readable on a telephone and on paper."""

from __future__ import annotations

from pathlib import Path

from limbeck.files import write_atomic
from limbeck.report import dataset_wording, generator_tables, language_wording, plots, tables
from limbeck.report.generator_wording import cautions, ordered
from limbeck.report.measures import CALLS, SECONDS, measure_of
from limbeck.report.page import fill, present
from limbeck.report.summary import Picture, RunSummary
from limbeck.report.verdicts import compared_with, sentence, verdict
from limbeck.report.wording import grouped

GENERATOR_FOOTER = (
    "Numbers are means over seeds ± one standard error (none where all seeds have the same number); ↓ lower is better, ↑ higher is better. "
    "A difference counts when it is more than two standard errors of the paired difference from zero. "
    "Times of all arms were measured on one machine."
)
FOOTERS = {"generator": GENERATOR_FOOTER, "dataset": dataset_wording.FOOTER, "language_model": language_wording.FOOTER}


def render(summary: RunSummary) -> str:
    """The page of a run, in the form of its kind. Parts that the summary does not have are left out of it or said to be missing."""
    return _classifier(summary) if summary.kind == "classifier" else _judged_by_measures(summary)


def _classifier(summary: RunSummary) -> str:
    series = plots.series_of(summary.arms)
    by_role = {s.arm.role: s for s in reversed(series)}
    student = by_role.get("distilled") or by_role.get("alone")
    other = by_role.get("teacher") or (by_role.get("alone") if student is by_role.get("distilled") else None)
    header, rows = tables.by_seed(summary)
    reliability = plots.reliability(series)
    classes = plots.per_class(student, other, summary.classes) if student is not None and other is not None else None
    return fill(
        "run.html",
        _shared(summary, series)
        | {
            "headline": tables.headline(summary.arms, summary.arm("teacher")),
            "quality": tables.quality(summary.arms),
            "cost": tables.cost(summary.arms),
            "latency_rows": tables.latency_rows(summary.arms),
            "seed_header": header,
            "seed_rows": rows,
            "warnings": _warnings(summary),
            "size_plot": plots.accuracy_by_size(series),
            "quality_plots": present([reliability, classes]),
        },
    )


def _judged_by_measures(summary: RunSummary) -> str:
    arms = ordered(summary.arms)
    series = plots.series_of(arms)
    first, teacher, judge = generator_tables.leading([summary.headline]), summary.arm("teacher"), measure_of(summary.judged_by)
    header, rows = generator_tables.by_seed(summary, arms)
    generates = summary.kind == "generator"
    ladders = [plots.ladder("teacher", series)]
    costs = [plots.quality_by_cost(ladders, judge, measure_of(key), key) for key in (CALLS, SECONDS)] if generates else []
    return fill(
        "generator.html",
        _shared(summary, series)
        | {
            "arms": arms,
            "headline": generator_tables.headline(arms, teacher, first),
            "compared_with": compared_with(summary),
            "cost_plots": present(costs),
            "pictures": _grouped(summary.pictures),
            "further": generator_tables.further(arms, first),
            "explanations": generator_tables.explanations(arms),
            "judged_by": judge.heading,
            "seed_header": header,
            "seed_rows": rows,
            "cost": tables.cost(arms),
            "latency_rows": tables.latency_rows(arms),
            "warnings": cautions(summary),
            "footer": FOOTERS[summary.kind],
        },
    )


def _shared(summary: RunSummary, series: list[plots.Series]) -> dict[str, object]:
    """What the pages of all kinds show."""
    sizes = sorted({x.batch_size for arm in summary.arms for x in arm.latencies})
    return {
        "summary": summary,
        "title": summary.title,
        "sentence": sentence(summary),
        "verdict": verdict(summary),
        "curve_plots": plots.curves(series),
        "latency_plots": present([plots.latency(series, size, f"latency{size}") for size in sizes]),
        "colours": {s.label: s.colour % plots.COLOURS for s in series},
    }


def _grouped(pictures: tuple[Picture, ...]) -> list[tuple[str, list[Picture]]]:
    """The pictures by group, in the order in which groups first come; those without one under "Samples"."""
    found: dict[str, list[Picture]] = {}
    for picture in pictures:
        found.setdefault(picture.group or "Samples", []).append(picture)
    return list(found.items())


def write(summary: RunSummary, path: Path | str) -> None:
    """`render` into a file, whole or not at all."""
    write_atomic(path, render(summary))


def _warnings(summary: RunSummary) -> list[str]:
    """What a reader must know before believing the tables."""
    found = []
    for arm in summary.arms:
        broken = sum(outcome.nonfinite for outcome in arm.outcomes)
        if broken:
            answers = "answer was" if broken == 1 else "answers were"
            found.append(f"{arm.label}: {grouped(broken)} {answers} not finite numbers (NaN or infinite); they count as wrong.")
    return found
