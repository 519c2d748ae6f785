"""A language model's run in words: perplexity on held-out text, the distance to the teacher, and how much smaller and faster the student is."""

from __future__ import annotations

from limbeck.report.generator_wording import shown, speed_ratio
from limbeck.report.measures import measure_of
from limbeck.report.summary import RunSummary

FOOTER = (
    "Numbers are means over seeds ± one standard error (none where all seeds have the same number); ↓ lower is better, ↑ higher is better. "
    "Everything is measured on the held-out text, teacher-forced; nats and probabilities are averages over its tokens. Perplexities of models with different "
    "tokenizers cannot be compared, bits a byte can. A difference counts when it is more than two standard errors of the paired difference from zero."
)


def sentence(summary: RunSummary) -> str:
    """The run in one sentence."""
    student, teacher, alone = summary.arm("distilled"), summary.arm("teacher"), summary.arm("alone")
    measure = measure_of(summary.judged_by)
    own = student.mean(measure.key) if student is not None else None
    if student is None or own is None:
        return "This run has no student that could be measured."
    text = f"The distilled student has a {measure.name} of {shown(measure, own)} on the held-out text"
    if teacher is not None and (theirs := teacher.mean(measure.key)) is not None:
        text += f", its teacher {shown(measure, theirs)}"
    if alone is not None and (theirs := alone.mean(measure.key)) is not None:
        text += f", the same student trained on the text alone {shown(measure, theirs)}"
    if teacher is not None and student.parameters and teacher.parameters:
        text += f"; it has {teacher.parameters / student.parameters:.1f} times fewer parameters"
        if ratio := speed_ratio(student, teacher):
            text += f" and is {ratio[1] / ratio[0]:.1f} times as fast"
    return text + "."
