"""One run as one HTML page that needs nothing but itself: no scripts, no network, readable on a telephone and on paper."""

from __future__ import annotations

from pathlib import Path

from limbeck.files import write_atomic
from limbeck.report import plots, tables
from limbeck.report.page import fill, present
from limbeck.report.summary import RunSummary
from limbeck.report.wording import sentence, verdict


def render(summary: RunSummary) -> str:
    """The page. Parts that the summary does not have (a teacher, a second seed, latencies) are left out of it or said to be missing."""
    series = plots.series_of(summary.arms)
    by_role = {s.arm.role: s for s in reversed(series)}
    student = by_role.get("distilled") or by_role.get("alone")
    other = by_role.get("teacher") or (by_role.get("alone") if student is by_role.get("distilled") else None)
    sizes = sorted({x.batch_size for arm in summary.arms for x in arm.latencies})
    difference = summary.difference()
    header, rows = tables.by_seed(summary)
    return fill(
        "run.html",
        {
            "summary": summary,
            "title": summary.title,
            "sentence": sentence(summary),
            "verdict": verdict(difference) if difference else None,
            "headline": tables.headline(summary.arms, summary.arm("teacher")),
            "quality": tables.quality(summary.arms),
            "cost": tables.cost(summary.arms),
            "latency_rows": tables.latency_rows(summary.arms),
            "seed_header": header,
            "seed_rows": rows,
            "warnings": _warnings(summary),
            "size_plot": plots.accuracy_by_size(series),
            "quality_plots": present(
                [plots.reliability(series), plots.per_class(student, other, summary.classes) if student is not None and other is not None else None]
            ),
            "curve_plots": plots.curves(series),
            "latency_plots": present([plots.latency(series, size, f"latency{size}") for size in sizes]),
            "colours": {s.label: s.colour % plots.COLOURS for s in series},
        },
    )


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
            found.append(f"{arm.label}: {broken:,} {answers} not finite numbers (NaN or infinite); they count as wrong.".replace(",", " "))
    return found
