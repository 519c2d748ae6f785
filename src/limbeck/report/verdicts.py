"""A run in words, whatever it made: which wording speaks for which kind."""

from __future__ import annotations

from limbeck.report import dataset_wording, generator_wording, language_wording, wording
from limbeck.report.measures import measure_of
from limbeck.report.summary import RunSummary

BESIDE = {
    "generator": ("the student", "the undistilled teacher"),
    "dataset": ("the set", f"as many {dataset_wording.BESIDE}"),
    "language_model": ("the distilled student", "the student on the text alone"),
}
"""What the verdict's difference is between, in words."""
SENTENCES = {"generator": generator_wording.sentence, "dataset": dataset_wording.sentence, "language_model": language_wording.sentence}


def sentence(summary: RunSummary) -> str:
    """The run in one sentence."""
    speaks = SENTENCES.get(summary.kind, wording.sentence)
    return speaks(summary)


def verdict(summary: RunSummary) -> wording.Verdict | None:
    """What the paired difference of the student to the arm "alone" says; None where there is no such difference."""
    difference = summary.difference()
    if difference is None:
        return None
    if summary.kind == "classifier":
        return wording.verdict(difference)
    mine, other = BESIDE[summary.kind]
    return generator_wording.verdict(difference, measure_of(summary.judged_by), mine, other)


def compared_with(summary: RunSummary) -> str:
    """What the verdict's difference is between."""
    return {"generator": "Student − undistilled teacher", "dataset": "Distilled − random real"}.get(summary.kind, "Distilled − alone")
