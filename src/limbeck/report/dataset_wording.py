"""A data set's run in words: what networks learn from the set, from as many real images, and from all of them."""

from __future__ import annotations

from limbeck.report.generator_wording import CHANCE, change, shown
from limbeck.report.measures import measure_of
from limbeck.report.summary import RunSummary
from limbeck.report.wording import MINUS

BESIDE = "random real images"
FOOTER = (
    "Numbers are means over seeds ± one standard error (none where all seeds have the same number); ↓ lower is better, ↑ higher is better. "
    "Accuracy is that of fresh networks at their last epoch, the mean over networks; arms of as many images have the same networks and recipe, "
    "all real data by those of the first seed; k-means is in pixel space; real data count as float32. "
    "A difference counts when it is more than two standard errors of the paired difference from zero."
)


def sentence(summary: RunSummary) -> str:
    """The run in one sentence: what networks reach on the set, on as many real images, on all of them, and how small the set is."""
    made, measure = summary.arm("distilled"), measure_of(summary.judged_by)
    own = made.mean(measure.key) if made is not None else None
    if made is None or own is None:
        return "This run has no set that could be judged."
    text = f"Networks trained on the distilled set reach {shown(measure, own)}"
    size = made.mean("compression")
    if size is not None:
        text += f" with {shown(measure_of('compression'), size)} of the bytes"
    random, full, difference = summary.arm("alone"), summary.arm("teacher"), summary.difference()
    theirs = random.mean(measure.key) if random is not None else None
    if theirs is not None and difference is not None:
        amount, chance = change(measure, difference.mean, difference.stderr), CHANCE if difference.stderr is None else ""
        text += f"; on as many {BESIDE} {shown(measure, theirs)}, {amount.lstrip(f'+{MINUS}')} {'less' if difference.mean > 0 else 'more'}{chance}"
    whole = full.mean(measure.key) if full is not None else None
    return text + (f"; on all real data {shown(measure, whole)}." if whole is not None else ".")
