"""The result of a run in the terminal: a table where there is one, plain lines where there is not."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from limbeck.report.generator_wording import cautions, ordered, shown
from limbeck.report.measures import CALLS, SECONDS, Measure, measure_of
from limbeck.report.summary import RunSummary
from limbeck.report.tables import first_batch_size
from limbeck.report.verdicts import compared_with, sentence, verdict
from limbeck.report.wording import count, milliseconds, percent, size

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

HEADER = ("", "Accuracy", "Parameters", "MACs", "Bytes", "Latency")
MOST_MEASURES = 3
"""Headline measures of a generator that a terminal is wide enough for; the page has them all."""


SIZED = ("generator", "language_model")
"""Kinds whose arms have a number of parameters worth a column."""


def header(summary: RunSummary) -> tuple[str, ...]:
    """The names of the columns of `rows`."""
    if summary.kind == "classifier":
        return HEADER
    return ("", *(measure.heading for measure in _shown_measures(summary)), *(["Parameters"] if summary.kind in SIZED else []))


def rows(summary: RunSummary) -> list[tuple[str, ...]]:
    """One row an arm. Classifiers: label, accuracy mean ± s.e., parameters, MACs, bytes, median latency of the smallest batch.

    Generators: label, the first MOST_MEASURES headline measures, calls and time a sample, parameters. Data sets: label, the headline measures.
    Language models: label, the headline measures that some arm has, parameters.
    """
    if summary.kind != "classifier":
        measures = _shown_measures(summary)
        last = [(count(arm.parameters),) if summary.kind in SIZED else () for arm in ordered(summary.arms)]
        return [(arm.label, *(shown(m, arm.mean(m.key)) for m in measures), *end) for arm, end in zip(ordered(summary.arms), last, strict=True)]
    batch = first_batch_size(summary.arms)
    found: list[tuple[str, ...]] = []
    for arm in summary.arms:
        timed = arm.latency(batch) if batch is not None else None
        latency = milliseconds(timed.median_s if timed else None)
        found.append((arm.label, percent(arm.mean("accuracy")), count(arm.parameters), count(arm.macs), size(arm.bytes), latency))
    return found


def _shown_measures(summary: RunSummary) -> list[Measure]:
    quality = [key for key in summary.headline if key not in (CALLS, SECONDS)]
    if summary.kind == "dataset":
        return [measure_of(key) for key in quality]
    if summary.kind == "language_model":
        return [measure_of(key) for key in quality if any(arm.values(key) for arm in summary.arms)]
    return [measure_of(key) for key in (*quality[:MOST_MEASURES], CALLS, SECONDS)]


def table(summary: RunSummary) -> Table:
    """The rows as a rich table."""
    from rich import box
    from rich.markup import escape
    from rich.table import Table
    from rich.text import Text

    made = Table(title=Text(summary.title), title_justify="left", caption=Text(_said(summary)), caption_justify="left", box=box.SIMPLE_HEAD)
    for i, name in enumerate(header(summary)):
        made.add_column(escape(name), justify="left" if i == 0 else "right")
    for row in rows(summary):
        made.add_row(*(Text(cell) for cell in row))
    return made


def plain(summary: RunSummary) -> str:
    """The same as aligned text, for files and pipes."""
    lines = [header(summary), *rows(summary)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    body = ("  ".join(cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True))) for line in lines)
    return "\n".join(text.rstrip() for text in (summary.title, *body, _said(summary)) if text)


def show(summary: RunSummary, console: Console) -> None:
    """Print the table, or plain text where the console is not a terminal."""
    if console.is_terminal:
        console.print(table(summary))
    else:
        console.print(plain(summary), markup=False, highlight=False, soft_wrap=True)


def show_record(summary: Mapping[str, Any], console: Console) -> None:
    """Print what a record holds: rows, bytes a row against raw float32 logits, and the codec's measured error."""
    for name, part in summary["parts"].items():
        logits = part["fields"]["logits"]
        members, classes = logits["shape"]
        error = part["errors"].get("logits", {})
        lost = error.get("kl_mean") is None
        said = "KL error infinite: classes are dropped" if lost else f"KL error {error['kl_mean']:.2g} nats (mean), {error['kl_max']:.2g} (largest)"
        console.print(
            f"{name}: {part['samples']:,} samples × {part['views']:,} views = {part['rows']:,} rows, codec {logits['codec']['name']}, "
            f"{part['bytes_per_row']:.1f} bytes a row ({4 * members * classes} as float32 logits), {said}",
            markup=False, highlight=False, soft_wrap=True,
        )  # fmt: skip
    console.print(f"record: {summary['url']} ({size(summary['bytes'])})", markup=False, highlight=False, soft_wrap=True)


def _said(summary: RunSummary) -> str:
    """The verdict, or the run in a sentence where there is none; a generator's warnings below it."""
    found = verdict(summary)
    said = sentence(summary) if found is None else f"{compared_with(summary)}: {found.difference}. {found.text}"
    warnings = cautions(summary) if summary.kind != "classifier" else []
    return "\n".join([said, *(f"Warning: {text}" for text in warnings)])
