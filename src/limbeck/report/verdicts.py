"""A run in words, whatever it made: which wording speaks for which kind."""

from __future__ import annotations

from limbeck.report import generator_wording, wording
from limbeck.report.measures import measure_of
from limbeck.report.summary import RunSummary


def sentence(summary: RunSummary) -> str:
    """The run in one sentence."""
    return generator_wording.sentence(summary) if summary.kind == "generator" else wording.sentence(summary)


def verdict(summary: RunSummary) -> wording.Verdict | None:
    """What the paired difference of the student to the arm "alone" says; None where there is no such difference."""
    difference = summary.difference()
    if difference is None:
        return None
    return generator_wording.verdict(difference, measure_of(summary.judged_by)) if summary.kind == "generator" else wording.verdict(difference)


def compared_with(summary: RunSummary) -> str:
    """What the verdict's difference is between."""
    return "Student − undistilled teacher" if summary.kind == "generator" else "Distilled − alone"
