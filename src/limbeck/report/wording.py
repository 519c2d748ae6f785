"""Numbers and sentences for people: how a report puts into words what was measured."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from limbeck.evaluate.statistics import Paired
from limbeck.report.summary import Arm, RunSummary

NA = "n/a"
MINUS, NBSP, TIMES = "−", "\u00a0", "×"
SAME = "the same"


def number(value: float, digits: int = 3) -> str:
    """A number to so many significant digits, without an exponent where a person would write none.

    >>> number(12345.6), number(0.012345), number(2.0), number(3.2e-9)
    ('12346', '0.0123', '2.00', '3.20e−09')
    """
    if not math.isfinite(value):
        return NA
    if value != 0 and not 1e-4 <= abs(value) < 1e7:
        return f"{value:.{digits - 1}e}".replace("-", MINUS)
    before = math.floor(math.log10(abs(value))) + 1 if value else 1
    return f"{value:.{max(digits - before, 0)}f}".replace("-", MINUS)


def _scaled(value: float, base: float, units: Sequence[str]) -> str:
    """The value in the largest unit that leaves at least 1, to three digits; whole numbers of the first unit."""
    step = 0
    while step + 1 < len(units) and abs(value) >= base:
        value, step = value / base, step + 1
    text = f"{value:.0f}" if step == 0 else number(value)
    return f"{text}{NBSP}{units[step]}" if units[step] else text


def count(value: int | None) -> str:
    """A count: 812, 12.3 k, 1.20 M."""
    return NA if value is None else _scaled(value, 1000, ("", "k", "M", "G", "T"))


def grouped(value: int) -> str:
    """A count in full, its digits in groups of three: 1 200."""
    return f"{value:,}".replace(",", " ")


def size(value: int | None) -> str:
    """Bytes: 812 B, 12.3 KiB, 1.20 MiB."""
    return NA if value is None else _scaled(value, 1024, ("B", "KiB", "MiB", "GiB", "TiB"))


def milliseconds(seconds: float | None) -> str:
    """Seconds as milliseconds: 0.142 ms."""
    return NA if seconds is None else f"{number(seconds * 1000)}{NBSP}ms"


def duration(seconds: float | None) -> str:
    """A stretch of time: 4.2 s, 3 min 12 s, 2 h 05 min."""
    if seconds is None or not math.isfinite(seconds):
        return NA
    if seconds < 60:
        return f"{seconds:.1f}{NBSP}s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes}{NBSP}min {rest:02d}{NBSP}s"
    return f"{minutes // 60}{NBSP}h {minutes % 60:02d}{NBSP}min"


def percent(mean: tuple[float, float | None] | None, digits: int = 2) -> str:
    """A fraction with its standard error, in percent: 98.92 ± 0.12 %; without the error where there is none."""
    if mean is None:
        return NA
    error = "" if mean[1] is None else f" ±{NBSP}{mean[1] * 100:.{digits}f}"
    return f"{mean[0] * 100:.{digits}f}{error}{NBSP}%"


def plain(mean: tuple[float, float | None] | None) -> str:
    """A number with its standard error: 0.312 ± 0.004."""
    if mean is None:
        return NA
    return number(mean[0]) if mean[1] is None else f"{mean[0]:.3f} ±{NBSP}{mean[1]:.3f}"


def spread(value: float, error: float | None, digits: int = 3) -> str:
    """A number of any size with its standard error, both rounded where the error says so: two digits of it, but no more than the value bears.

    >>> spread(45.123, 3.21), spread(0.05123, 0.00041), spread(12345.6, 210.0), spread(3.21456, 1e-9), spread(2.0, None)
    ('45.1 ±\\xa03.2', '0.05123 ±\\xa00.00041', '12346 ±\\xa0210', '3.215 ±\\xa00.000', '2.00')
    """
    if error is None or not math.isfinite(value) or not math.isfinite(error):
        return number(value, digits)
    most = max(digits - (math.floor(math.log10(abs(value))) + 1 if value else 1), 0) + 1
    places = min(max(1 - math.floor(math.log10(error)), 0), most) if error > 0 else most - 1
    return f"{value:.{places}f} ±{NBSP}{error:.{places}f}".replace("-", MINUS)


def points(difference: Paired, digits: int = 2) -> str:
    """A difference of fractions in percentage points, signed, with its standard error: +1.30 ± 0.21."""
    error = f" ±{NBSP}{NA}" if difference.stderr is None else f" ±{NBSP}{difference.stderr * 100:.{digits}f}"
    return f"{signed(difference.mean * 100, digits)}{error}"


def signed(value: float, digits: int) -> str:
    """A number with its sign, which zero has not."""
    text = f"{abs(value):.{digits}f}"
    if float(text) == 0:
        return text
    return f"{'+' if value > 0 else MINUS}{text}"


def ratio(value: float) -> str:
    """A factor of 1 or more: 1.04×, 1.3×, 23×."""
    digits = 2 if value < 1.1 else 1 if value < 10 else 0
    return f"{value:.{digits}f}{TIMES}"


def compared(mine: float | None, other: float | None, less: str, more: str) -> str:
    """How many times less or more mine is than the other's: '23× smaller'; '' where unknown, SAME within one per cent."""
    if not mine or not other:
        return ""
    factor = other / mine
    if 1 / 1.01 < factor < 1.01:
        return SAME
    return f"{ratio(factor)} {less}" if factor > 1 else f"{ratio(1 / factor)} {more}"


@dataclass(frozen=True)
class Verdict:
    """What a paired difference says: whether quality is higher or lower, a short judgement, the numbers, the interval."""

    kind: Literal["higher", "lower", "unclear"]
    text: str
    difference: str
    interval: str


def verdict(difference: Paired) -> Verdict:
    """Distillation against training alone, in words; a difference counts when it is more than two standard errors from zero."""
    numbers = f"{points(difference)} points"
    if difference.stderr is None or difference.low is None or difference.high is None:
        return Verdict("unclear", "One seed only: whether distillation helped cannot be told from chance.", numbers, NA)
    text = {
        "higher": "Distillation helped: the paired difference is more than two standard errors above zero.",
        "lower": "Distillation hurt: the paired difference is more than two standard errors below zero.",
        "unclear": "No clear difference: the paired difference is within two standard errors of zero.",
    }[difference.verdict]
    interval = f"{signed(difference.low * 100, 2)} to {signed(difference.high * 100, 2)} points (95{NBSP}%, Student’s t, {difference.n} seeds)"
    if difference.verdict != "unclear" and difference.low <= 0 <= difference.high:
        text += f" With {difference.n} seeds the 95{NBSP}% interval still includes zero."
    return Verdict(difference.verdict, text, numbers, interval)


def sentence(summary: RunSummary) -> str:
    """The run in one sentence: size and speed and accuracy against the teacher, and what distillation gained or lost."""
    student = summary.arm("distilled") or summary.arm("alone")
    if student is None:
        return "This run has no student."
    parts = []
    teacher = summary.arm("teacher")
    if teacher is not None:
        parts += _against_teacher(student, teacher)
    accuracy = student.mean("accuracy")
    if teacher is None and accuracy is not None:
        parts.append(f"the student is right on {accuracy[0]:.1%} of the test inputs".replace("%", f"{NBSP}%"))
    parts.append(_gain(summary))
    text = "; ".join(part for part in parts if part) + "."
    return text[0].upper() + text[1:]


def _against_teacher(student: Arm, teacher: Arm) -> list[str]:
    by_bytes = student.bytes is not None and teacher.bytes is not None
    mine, other = (student.bytes, teacher.bytes) if by_bytes else (student.parameters, teacher.parameters)
    sizes = common_batch_sizes([student, teacher])
    mine_s, other_s = (x.median_s if (x := arm.latency(sizes[0])) else None for arm in (student, teacher)) if sizes else (None, None)
    traits = [(compared(mine, other, "smaller", "larger"), "as large"), (compared(mine_s, other_s, "faster", "slower"), "as fast")]
    differs = [text for text, _ in traits if text and text != SAME]
    equals = [equal for text, equal in traits if text == SAME]
    parts = []
    if differs:
        parts.append(" and ".join([f"the student is {' and '.join(differs)} than its teacher", *equals]))
    elif equals:
        parts.append(f"the student is {' and '.join(equals)} as its teacher")
    own, theirs = student.mean("accuracy"), teacher.mean("accuracy")
    if own and theirs and theirs[0] > 0:
        parts.append(_accuracy_against(own[0], theirs[0], ("it", "its") if parts else ("the student", "its teacher’s")))
    return parts


def _accuracy_against(own: float, theirs: float, words: tuple[str, str]) -> str:
    subject, whose = words
    above = f"{(own - theirs) * 100:.2f}"
    if own >= theirs:
        return f"{subject} is as accurate as its teacher" if above == "0.00" else f"{subject} is {above} points more accurate than its teacher"
    kept = math.floor(own / theirs * 1000) / 10  # rounded down, so that 100 % is never claimed for less
    return f"{subject} keeps {kept:.1f}{NBSP}% of {whose} accuracy"


def _gain(summary: RunSummary) -> str:
    difference = summary.difference()
    if summary.arm("distilled") is None:
        return ""
    if difference is None:
        missing = "was not trained alone" if summary.arm("alone") is None else "was trained alone with other seeds only"
        return f"the same student {missing}, so what distillation gained is not known"
    gain = difference.mean * 100
    digits = 1 if abs(gain) >= 1 else 2
    error = "" if difference.stderr is None else f" ±{NBSP}{difference.stderr * 100:.{digits}f}"
    chance = " (one seed, so this may be chance)" if difference.stderr is None else ""
    if gain == 0 or (difference.stderr is not None and difference.verdict == "unclear"):
        return f"distillation made no clear difference to training it alone ({signed(gain, digits)}{error} points){chance}"
    if gain > 0:
        return f"distillation gained {signed(gain, digits)}{error} points over training it alone{chance}"
    return f"distillation lost {abs(gain):.{digits}f}{error} points against training it alone{chance}"


def common_batch_sizes(arms: Sequence[Arm]) -> list[int]:
    """The batch sizes at which every one of the arms was timed, ascending."""
    timed = [{x.batch_size for x in arm.latencies} for arm in arms]
    return sorted(set.intersection(*timed)) if timed else []
