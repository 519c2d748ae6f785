"""The tables of runs that are judged by measures (generators, data sets) as text, for the page and for the terminal alike."""

from __future__ import annotations

from collections.abc import Sequence

from limbeck.report.generator_wording import against, change, shown
from limbeck.report.measures import CALLS, SECONDS, Measure, in_order, measure_of
from limbeck.report.summary import Arm, RunSummary
from limbeck.report.tables import Cell, Row, amounts
from limbeck.report.verdicts import compared_with

ABSENT = "–"


def leading(headlines: Sequence[Sequence[str]]) -> list[str]:
    """The measures that come first: the headline of each run in turn, then calls and time."""
    return list(dict.fromkeys(key for keys in (*headlines, (CALLS, SECONDS)) for key in keys))


def headline(arms: Sequence[Arm], reference: Arm | None, first: Sequence[str]) -> list[Row]:
    """The measures `first` that any arm has, then parameters, MACs, bytes and seeds; the notes compare with `reference` (the teacher, say)."""
    rows = [row for key in first if (row := _measure_row(measure_of(key), arms, reference)).known]
    rows += [row for row in amounts(arms, reference, macs="MACs a sample") if row.known]
    return [*rows, Row("Seeds", tuple(Cell(str(len(arm.outcomes)), "no standard error" if len(arm.outcomes) == 1 else "") for arm in arms))]


def further(arms: Sequence[Arm], first: Sequence[str]) -> list[Row]:
    """Every other measure that an arm has in all its seeds."""
    keys = in_order(key for arm in arms for outcome in arm.outcomes for key in outcome.measures)
    return [row for key in keys if key not in first and (row := _measure_row(measure_of(key), arms, None)).known]


def explanations(arms: Sequence[Arm]) -> list[tuple[str, str]]:
    """Name and meaning of every measure that an arm has and of which a report knows the meaning."""
    keys = in_order(key for arm in arms for outcome in arm.outcomes for key in outcome.measures)
    return [(measure.label, measure.explanation) for measure in map(measure_of, keys) if measure.explanation]


def by_seed(summary: RunSummary, arms: Sequence[Arm]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the judging measure by seed, with the distilled arm minus the one "alone" where both have the seed."""
    measure = measure_of(summary.judged_by)
    found = [{o.seed: v for o in arm.outcomes if (v := o.measure(measure.key)) is not None} for arm in arms]
    student, alone = (next((f for f, arm in zip(found, arms, strict=True) if arm.role == role), {}) for role in ("distilled", "alone"))
    paired = bool(student and alone)
    header = ["Seed", *(arm.label for arm in arms), *([compared_with(summary)] if paired else [])]
    rows = []
    for seed in sorted({seed for f in found for seed in f}):
        row = [str(seed), *(shown(measure, (f[seed], None)) if seed in f else ABSENT for f in found)]
        if paired:
            row.append(change(measure, student[seed] - alone[seed]) if seed in student and seed in alone else ABSENT)
        rows.append(row)
    return header, rows


def _measure_row(measure: Measure, arms: Sequence[Arm], reference: Arm | None) -> Row:
    standard = reference.mean(measure.key) if reference is not None else None

    def cell(arm: Arm) -> Cell:
        mean = arm.mean(measure.key)
        note = against(measure, mean[0], standard[0]) if mean and standard and arm is not reference else ""
        return Cell(shown(measure, mean), note)

    return Row(measure.heading, tuple(cell(arm) for arm in arms))
