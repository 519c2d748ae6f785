"""A generator's run in words: the numbers of its measures, and what the student keeps of its teacher with how many network calls."""

from __future__ import annotations

from collections.abc import Sequence

from limbeck.evaluate.statistics import Paired
from limbeck.report.measures import CALLS, SECONDS, Measure, measure_of
from limbeck.report.summary import Arm, RunSummary
from limbeck.report.wording import MINUS, NA, NBSP, SAME, Verdict, common_batch_sizes, compared, duration, grouped, size, spread

UNIFORM = 1e-12
"""A standard error below this part of the mean is the rounding of equal numbers."""
CHANCE = " (one seed, so this may be chance)"


def shown(measure: Measure, mean: tuple[float, float | None] | None) -> str:
    """A mean and its standard error in the measure's unit: 3.21 ± 0.12, 97.3 ± 0.4 %, 12.3 ± 0.2 ms, 18; n/a for none.

    Where every seed has the same number (a teacher measured once) there is no spread to show, and none is shown.
    """
    if mean is None:
        return NA
    value, error = mean
    if error is not None and error <= UNIFORM * abs(value):
        error = None
    if measure.unit == "percent":
        text = f"{value * 100:.{measure.digits}f}" + ("" if error is None else f" ±{NBSP}{error * 100:.{measure.digits}f}")
        return f"{text}{NBSP}%".replace("-", MINUS)
    if measure.unit == "whole" and error is None:
        return f"{value:g}".replace("-", MINUS)
    if measure.unit == "bytes":
        return size(round(value))
    if measure.unit == "seconds":
        return _time(value, error, measure.digits)
    return spread(value * measure.factor, None if error is None else error * measure.factor, measure.digits)


def _time(value: float, error: float | None, digits: int) -> str:
    if value >= 60:
        return duration(value)
    factor, unit = (1000.0, "ms") if value < 1 else (1.0, "s")
    return f"{spread(value * factor, None if error is None else error * factor, digits)}{NBSP}{unit}"


def change(measure: Measure, value: float, error: float | None = None) -> str:
    """A difference in the measure's unit, signed, with its standard error: −41.9 ± 0.4; of percentages in points."""
    factor = 100 if measure.unit == "percent" else measure.factor
    bare = measure.unit == "whole" and error is None
    text = f"{abs(value):g}" if bare else spread(abs(value) * factor, None if error is None else error * factor, measure.digits)
    sign = "" if value == 0 else "+" if value > 0 else MINUS
    return f"{sign}{text} points" if measure.unit == "percent" else f"{sign}{text}"


def against(measure: Measure, mine: float | None, other: float | None) -> str:
    """How a value compares with another's, for small print: '1.3× lower', '2.1 points lower', '18× fewer'; '' where it cannot be said."""
    if mine is None or other is None:
        return ""
    if measure.unit == "percent":
        points = f"{abs(mine - other) * 100:.{measure.digits}f}"
        return SAME if float(points) == 0 else f"{points} points {'higher' if mine > other else 'lower'}"
    if min(mine, other) <= 0:  # a ratio says nothing
        return ""
    words = {CALLS: ("fewer", "more"), SECONDS: ("faster", "slower")}.get(measure.key, ("lower", "higher"))
    return compared(mine, other, *words)


def verdict(difference: Paired, measure: Measure, mine: str = "the student", other: str = "the undistilled teacher") -> Verdict:
    """What distillation made against what stands beside it (the teacher with as many calls), in words; `kind` is 'higher' where `mine` is better.

    A difference counts when it is more than two standard errors from zero.
    """
    hint = "" if measure.better == "none" else f" ({measure.better} is better)"
    numbers = f"{measure.label} {change(measure, difference.mean, difference.stderr)}{hint}"
    if difference.stderr is None or difference.low is None or difference.high is None:
        return Verdict("unclear", "One seed only: whether distillation helped cannot be told from chance.", numbers, NA)
    interval = f"{change(measure, difference.low)} to {change(measure, difference.high)} (95{NBSP}%, Student’s t, {difference.n} seeds)"
    if measure.better == "none":
        return Verdict("unclear", "Which direction of this measure is better is not known, so nothing is said of it.", numbers, interval)
    if difference.verdict == "unclear":
        return Verdict("unclear", "No clear difference: the paired difference is within two standard errors of zero.", numbers, interval)
    better = measure.improvement(difference.mean) > 0
    text = f"Distillation {'helped' if better else 'hurt'}: {mine} is clearly {'better' if better else 'worse'} than {other}."
    if difference.low <= 0 <= difference.high:
        text += f" With {difference.n} seeds the 95{NBSP}% interval still includes zero."
    return Verdict("higher" if better else "lower", text, numbers, interval)


def sentence(summary: RunSummary) -> str:
    """The run in one sentence: the student's quality and its teacher's, each with its calls; speed; and the undistilled teacher with as few calls."""
    student = summary.arm("distilled")
    if student is None:
        return "This run has no student."
    teacher, measure = summary.arm("teacher"), measure_of(summary.judged_by)
    parts = [_quality(student, teacher, measure), _speed(student, teacher), _gain(summary, student, measure)]
    text = "; ".join(part for part in parts if part) + "."
    return text[0].upper() + text[1:]


def speed_ratio(student: Arm, teacher: Arm) -> tuple[float, float] | None:
    """Seconds of the student and of the teacher for the same work: a sample, or else the smallest batch at which both were timed; None if unknown."""
    mine, other = student.mean(SECONDS), teacher.mean(SECONDS)
    if mine and other:
        return mine[0], other[0]
    sizes = common_batch_sizes([student, teacher])
    timed = [x.median_s for arm in (student, teacher) if sizes and (x := arm.latency(sizes[0]))]
    return (timed[0], timed[1]) if len(timed) == 2 else None


def calls_of(arm: Arm) -> str:
    """'1 network call', '18 network calls'; '' where the calls are not known."""
    mean = arm.mean(CALLS)
    return "" if mean is None else f"{mean[0]:g} network call{'' if mean[0] == 1 else 's'}"


def cautions(summary: RunSummary) -> list[str]:
    """What a reader must know before believing the tables: the run's notes, seeds that lack something, and unequal numbers of calls."""
    found = list(summary.notes)
    student, alone = summary.arm("distilled"), summary.arm("alone")
    if summary.kind == "generator" and student is not None and alone is not None:
        mine, other = student.mean(CALLS), alone.mean(CALLS)
        if mine and other and mine[0] != other[0]:
            found.append(f"The student makes {calls_of(student)} a sample, and the undistilled teacher beside it {calls_of(alone)}.")
    for arm in summary.arms:
        broken = sum(outcome.nonfinite for outcome in arm.outcomes)
        if broken:
            found.append(f"{arm.label}: {grouped(broken)} sample{' was' if broken == 1 else 's were'} not finite (NaN or infinite).")
        for key in summary.headline:
            lacking = [str(o.seed) for o in arm.outcomes if o.measure(key) is None]
            if lacking and any(o.measure(key) is not None for other in summary.arms for o in other.outcomes):
                seeds = "every seed" if len(lacking) == len(arm.outcomes) else f"seed{'s' * (len(lacking) > 1)} {', '.join(lacking)}"
                found.append(f"{arm.label}: {measure_of(key).label} was not measured, or is not a finite number, for {seeds}.")
    return found


def _with(arm: Arm) -> str:
    calls = calls_of(arm)
    return f" with {calls} a sample" if calls else ""


def _quality(student: Arm, teacher: Arm | None, measure: Measure) -> str:
    own = student.mean(measure.key)
    if own is None:
        return f"the student’s {measure.name or 'quality'} was not measured"
    hint = "" if measure.better == "none" else f" ({measure.better} is better)"
    text = f"the student’s {measure.name}{hint} is {shown(measure, own)}{_with(student)}"
    theirs = teacher.mean(measure.key) if teacher is not None else None
    return text if teacher is None or theirs is None else f"{text}, its teacher’s {shown(measure, theirs)}{_with(teacher).removesuffix(' a sample')}"


def _speed(student: Arm, teacher: Arm | None) -> str:
    seconds = speed_ratio(student, teacher) if teacher is not None else None
    said = compared(*seconds, "faster", "slower") if seconds else ""
    if not said:
        return ""
    return "in wall-clock time it is as fast as its teacher" if said == SAME else f"in wall-clock time it is {said} than its teacher"


def _gain(summary: RunSummary, student: Arm, measure: Measure) -> str:
    alone, difference = summary.arm("alone"), summary.difference()
    theirs = alone.mean(measure.key) if alone is not None else None
    if alone is None or difference is None:
        if student.mean(measure.key) is None:
            return ""
        what = "was not measured with as few calls" if alone is None else "was measured with other seeds only"
        return f"the undistilled teacher {what}, so what distillation gained is not known"
    calls = f" with {calls_of(alone)}" if calls_of(alone) else " with as few calls"
    text = f"the undistilled teacher{calls} has {shown(measure, theirs)}" if theirs else f"the undistilled teacher was measured{calls}"
    amount = change(measure, difference.mean, difference.stderr)
    chance = CHANCE if difference.stderr is None else ""
    if measure.better == "none":
        return f"{text}, a difference of {amount}{chance}"
    if difference.mean == 0 or (difference.stderr is not None and difference.verdict == "unclear"):
        return f"{text}, from which the student does not clearly differ ({amount})"
    worth = "improved on that" if measure.improvement(difference.mean) > 0 else "made that worse"
    return f"{text}; distillation {worth} by {amount.lstrip(f'+{MINUS}')}{chance}"


def ordered(arms: Sequence[Arm]) -> list[Arm]:
    """The arms of a generator's run as its tables show them: the teacher, its further rungs by falling calls, at the student's calls, the student."""
    places = {"teacher": 0, "other": 1, "alone": 2, "distilled": 3}
    return sorted(arms, key=lambda arm: (places[arm.role], -(arm.mean(CALLS) or (0.0, None))[0] if arm.role == "other" else 0.0))
