"""The result of a run in the terminal: a table where there is one, plain lines where there is not."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from limbeck.report.summary import RunSummary
from limbeck.report.tables import first_batch_size
from limbeck.report.wording import count, milliseconds, percent, sentence, size, verdict

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

HEADER = ("", "Accuracy", "Parameters", "MACs", "Bytes", "Latency")


def rows(summary: RunSummary) -> list[tuple[str, ...]]:
    """One row an arm: label, accuracy mean ± s.e., parameters, MACs, bytes, median latency of the smallest batch."""
    batch = first_batch_size(summary.arms)
    found: list[tuple[str, ...]] = []
    for arm in summary.arms:
        timed = arm.latency(batch) if batch is not None else None
        latency = milliseconds(timed.median_s if timed else None)
        found.append((arm.label, percent(arm.mean("accuracy")), count(arm.parameters), count(arm.macs), size(arm.bytes), latency))
    return found


def table(summary: RunSummary) -> Table:
    """The rows as a rich table."""
    from rich import box
    from rich.markup import escape
    from rich.table import Table
    from rich.text import Text

    made = Table(title=Text(summary.title), title_justify="left", caption=Text(_gain(summary)), caption_justify="left", box=box.SIMPLE_HEAD)
    for i, name in enumerate(HEADER):
        made.add_column(escape(name), justify="left" if i == 0 else "right")
    for row in rows(summary):
        made.add_row(*(Text(cell) for cell in row))
    return made


def plain(summary: RunSummary) -> str:
    """The same as aligned text, for files and pipes."""
    lines = [HEADER, *rows(summary)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(HEADER))]
    body = ("  ".join(cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True))) for line in lines)
    return "\n".join(text.rstrip() for text in (summary.title, *body, _gain(summary)) if text)


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


def _gain(summary: RunSummary) -> str:
    difference = summary.difference()
    if difference is None:
        return sentence(summary)
    said = verdict(difference)
    return f"Distilled − alone: {said.difference}. {said.text}"
