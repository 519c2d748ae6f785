"""The tables of a report as text, for the page and for the terminal alike."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from limbeck.report.summary import Arm, RunSummary
from limbeck.report.wording import NA, NBSP, common_batch_sizes, compared, count, duration, milliseconds, percent, plain, signed, size


@dataclass(frozen=True)
class Cell:
    """A value and, in smaller print, how it compares."""

    text: str
    note: str = ""


@dataclass(frozen=True)
class Row:
    """A quantity and its value for each arm."""

    label: str
    cells: tuple[Cell, ...]

    @property
    def known(self) -> bool:
        """Whether any arm has it."""
        return any(cell.text != NA for cell in self.cells)


def headline(arms: Sequence[Arm], reference: Arm | None) -> list[Row]:
    """Accuracy, parameters, MACs, bytes and latency of each arm; the notes compare with `reference` (the teacher, say)."""
    rows = [Row("Accuracy", tuple(Cell(percent(arm.mean("accuracy")), _seeds(arm)) for arm in arms)), *amounts(arms, reference)]
    for batch_size in sorted({x.batch_size for arm in arms for x in arm.latencies}):
        rows.append(_latency_row(batch_size, arms, reference))
    return rows


def amounts(arms: Sequence[Arm], reference: Arm | None, macs: str = "MACs") -> list[Row]:
    """Parameters, MACs (called `macs`) and bytes of each arm; the notes compare with `reference`."""
    return [
        _row("Parameters", arms, reference, lambda arm: arm.parameters, count, "fewer"),
        _row(macs, arms, reference, lambda arm: arm.macs, count, "fewer"),
        _row("Size on disk", arms, reference, lambda arm: arm.bytes, size, "smaller"),
    ]


def _row(label: str, arms: Sequence[Arm], reference: Arm | None, get: Callable[[Arm], int | None], show: Callable[[int | None], str], less: str) -> Row:
    def cell(arm: Arm) -> Cell:
        note = compared(get(arm), get(reference), less, "more" if less == "fewer" else "larger") if reference is not None and arm is not reference else ""
        return Cell(show(get(arm)), note)

    return Row(label, tuple(cell(arm) for arm in arms))


def _latency_row(batch_size: int, arms: Sequence[Arm], reference: Arm | None) -> Row:
    standard = reference.latency(batch_size) if reference is not None else None

    def cell(arm: Arm) -> Cell:
        own = arm.latency(batch_size)
        if own is None:
            return Cell(NA)
        note = compared(own.median_s, standard.median_s, "faster", "slower") if standard is not None and arm is not reference else ""
        return Cell(milliseconds(own.median_s), note)

    return Row(f"Latency, batch {batch_size}", tuple(cell(arm) for arm in arms))


def _seeds(arm: Arm) -> str:
    n = len(arm.outcomes)
    return {0: "not measured", 1: "one seed, s.e. n/a"}.get(n, f"{n} seeds")


def quality(arms: Sequence[Arm]) -> list[Row]:
    """Agreement, calibration and likelihood of each arm; rows that no arm has are left out."""
    rows = [
        Row("Agreement with the teacher", tuple(Cell(percent(arm.mean("agreement"))) for arm in arms)),
        Row("KL to the teacher, nats", tuple(Cell(plain(arm.mean("kl_to_teacher"))) for arm in arms)),
        Row("Calibration error (ECE)", tuple(Cell(percent(arm.mean("ece"))) for arm in arms)),
        Row("Log-loss, nats", tuple(Cell(plain(arm.mean("nll"))) for arm in arms)),
        Row("Brier score", tuple(Cell(plain(arm.mean("brier"))) for arm in arms)),
    ]
    return [row for row in rows if row.known]


def cost(arms: Sequence[Arm]) -> list[Row]:
    """What training each arm took, as means over the seeds; rows that no arm has are left out."""

    def seconds(arm: Arm) -> Cell:
        mean = arm.mean("training_seconds")
        return Cell(duration(mean[0]) if mean else NA)

    def examples(arm: Arm) -> Cell:
        mean = arm.mean("examples_seen")
        return Cell(count(round(mean[0])) if mean else NA)

    rows = [Row("Training time a seed", tuple(seconds(arm) for arm in arms)), Row("Examples seen a seed", tuple(examples(arm) for arm in arms))]
    return [row for row in rows if row.known]


def latency_rows(arms: Sequence[Arm]) -> list[Row]:
    """Median and the 10th to 90th percentile of each batch size."""
    rows = []
    for batch_size in sorted({x.batch_size for arm in arms for x in arm.latencies}):
        found = [arm.latency(batch_size) for arm in arms]
        cells = (Cell(milliseconds(x.median_s), f"{milliseconds(x.p10)} to {milliseconds(x.p90)}") if x else Cell(NA) for x in found)
        rows.append(Row(f"Batch {batch_size}", tuple(cells)))
    return rows


def by_seed(summary: RunSummary) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the accuracies by seed, with distilled − alone in points where both have the seed."""
    arms = summary.arms
    seeds = sorted({o.seed for arm in arms for o in arm.outcomes})
    found = [{o.seed: v for o in arm.outcomes if (v := o.measure("accuracy")) is not None} for arm in arms]
    distilled, alone = (next((f for f, arm in zip(found, arms, strict=True) if arm.role == role), {}) for role in ("distilled", "alone"))
    header = ["Seed", *(arm.label for arm in arms), *(["Distilled − alone"] if distilled and alone else [])]
    rows = []
    for seed in seeds:
        row = [str(seed), *(f"{f[seed]:.2%}".replace("%", f"{NBSP}%") if seed in f else "–" for f in found)]
        if distilled and alone:
            both = seed in distilled and seed in alone
            row.append(signed((distilled[seed] - alone[seed]) * 100, 2) if both else "–")
        rows.append(row)
    return header, rows


def first_batch_size(arms: Sequence[Arm]) -> int | None:
    """The smallest batch size at which all the timed arms were timed; None if there is none."""
    sizes = common_batch_sizes([arm for arm in arms if arm.latencies])
    return sizes[0] if sizes else None
