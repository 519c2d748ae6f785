"""Evidence files and how they are shown: docs/evidence/SLUG.json, on a terminal, and as plain lines."""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from limbeck import environment
from limbeck.errors import InputError
from limbeck.files import write_json

if TYPE_CHECKING:
    from rich.console import Group


def write(evidence: Mapping[str, Any], folder: Path | str) -> Path:
    """Write SLUG.json, whole or not at all; returns its path. ValueError: a value that JSON cannot hold."""
    file = Path(folder) / f"{evidence['slug']}.json"
    write_json(file, evidence)
    return file


def read_all(folder: Path | str) -> dict[str, dict[str, Any]]:
    """Every evidence file of a folder (claims and benchmarks), by file name without .json, sorted.

    Raises:
        InputError: a file is not JSON; names it.
    """
    found = {}
    for file in sorted(Path(folder).glob("*.json")):
        try:
            found[file.stem] = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise InputError(f"not JSON: {error}.", where=str(file), fix="Write it anew with `limbeck claims`.") from error
    return found


def provenance() -> dict[str, Any]:
    """What a measured number depends on beside the recipe: commit ('-dirty' marks a changed tree), versions, machine, and the date (UTC)."""
    import torch

    return {
        "commit": environment.commit() or "unknown",
        "versions": environment.versions(),
        "machine": f"{environment.machine()}, {torch.get_num_threads()} threads",
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def arm_rows(evidence: Mapping[str, Any], *, every_metric: bool) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the table arms × metrics (mean ± standard error), the metrics of the checks alone or all of them."""
    arms: Mapping[str, Mapping[str, Any]] = evidence["arms"]
    metrics = list(dict.fromkeys(metric for columns in arms.values() for metric in columns))
    if not every_metric:
        texts = " ".join(f" {check['text']}".replace("(", " ") for check in evidence["checks"])
        metrics = [metric for metric in metrics if f" {metric} of " in texts] or metrics
    rows = [[arm, *(mean_text(columns[metric]) if metric in columns else "" for metric in metrics)] for arm, columns in arms.items()]
    return ["arm", *metrics], [row for row in rows if any(row[1:])]


def mean_text(value: Mapping[str, Any] | None) -> str:
    """'mean ± standard error' of a summary or of a check's value; '—' where there is none."""
    if value is None or value["mean"] is None:
        return "—"
    return f"{value['mean']:.4g}" if value["stderr"] is None else f"{value['mean']:.4g} ± {value['stderr']:.2g}"


def interval_text(value: Mapping[str, Any] | None) -> str:
    """The 95 % interval of a check's value; '—' where there is none."""
    return "—" if value is None or value["low"] is None else f"{value['low']:.4g} … {value['high']:.4g}"


def origin_text(evidence: Mapping[str, Any]) -> str:
    """Seeds, duration, date, commit and machine in one line."""
    seeds = ", ".join(str(seed) for seed in evidence["seeds"])
    return (
        f"seeds {seeds} · {evidence['seconds']:.0f} s · {evidence['date']} · commit {short(evidence['commit'])} · "
        f"limbeck {evidence['versions']['limbeck']}, torch {evidence['versions'].get('torch', '?')} · "
        f"{evidence['machine']}"
    )


def short(revision: str) -> str:
    """The first twelve digits of a commit, and its mark if it has one."""
    head, dash, mark = revision.partition("-")
    return f"{head[:12]}{dash}{mark}"


def table(evidence: Mapping[str, Any]) -> Group:
    """The evidence for a terminal (a rich renderable)."""
    from rich.console import Group
    from rich.markup import escape
    from rich.table import Table

    colour = {"holds": "green", "holds in part": "yellow", "does not hold": "red"}[evidence["verdict"]]
    checks = Table("check", "holds", "mean ± s.e.", "95 % interval", title="checks", title_justify="left")
    for check in evidence["checks"]:
        holds = "[green]yes[/green]" if check["holds"] else "[red]no[/red]"
        checks.add_row(escape(check["text"]), holds, mean_text(check["value"]), interval_text(check["value"]))
    header, rows = arm_rows(evidence, every_metric=False)
    arms = Table(*header, title="arms (mean ± s.e.)", title_justify="left")
    for row in rows:
        arms.add_row(*(escape(cell) for cell in row))
    heading = f"[bold]{escape(evidence['slug'])}[/bold]: {escape(evidence['claim'])}"
    return Group(heading, checks, arms, f"[dim]{escape(origin_text(evidence))}[/dim]", f"verdict: [bold {colour}]{evidence['verdict']}[/bold {colour}]")


def plain(evidence: Mapping[str, Any]) -> str:
    """The evidence as plain lines, for logs and pipes."""
    lines = [f"{evidence['slug']}: {evidence['claim']}"]
    for check in evidence["checks"]:
        value = check["value"]
        numbers = "" if value is None else f" [{mean_text(value)}; 95 % interval {interval_text(value)}]"
        lines.append(f"  {'yes' if check['holds'] else 'no '}  {check['text']}{numbers}")
    header, rows = arm_rows(evidence, every_metric=False)
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    lines += ["  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in (header, *rows)]
    lines += [f"  {origin_text(evidence)}", f"verdict: {evidence['verdict']}"]
    return "\n".join(lines)
