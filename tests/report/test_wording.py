import doctest
from dataclasses import replace

import pytest

import limbeck.report.wording as w
from limbeck.evaluate.statistics import Paired, paired
from limbeck.report.summary import Arm, Outcome

NO_SPACE = str.maketrans({w.NBSP: " "})


def said(text):
    return text.translate(NO_SPACE)


def test_doctests_hold():
    assert doctest.testmod(w).failed == 0


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (w.count(812), "812"),
        (w.count(54_321), "54.3 k"),
        (w.count(1_200_000), "1.20 M"),
        (w.count(None), "n/a"),
        (w.size(812), "812 B"),
        (w.size(213 * 1024), "213 KiB"),
        (w.size(5 * 1024**2), "5.00 MiB"),
        (w.milliseconds(0.000142), "0.142 ms"),
        (w.milliseconds(1.5), "1500 ms"),
        (w.duration(4.25), "4.2 s"),
        (w.duration(192), "3 min 12 s"),
        (w.duration(7500), "2 h 05 min"),
        (w.percent((0.98923, 0.00123)), "98.92 ± 0.12 %"),
        (w.percent((0.98923, None)), "98.92 %"),
        (w.percent(None), "n/a"),
        (w.plain((0.3121, 0.0042)), "0.312 ± 0.004"),
        (w.number(float("nan")), "n/a"),
        (w.number(-0.5), "−0.500"),
        (w.number(0.0), "0.00"),
        (w.signed(-1.25, 1), "−1.2"),
        (w.signed(0.001, 2), "0.00"),
        (w.signed(-0.001, 2), "0.00"),
    ],
)
def test_numbers_for_people(text, expected):
    assert said(text) == expected


def arm(role, accuracy, bytes=None, seconds=None, parameters=None):
    from limbeck.evaluate.statistics import Latency

    latencies = () if seconds is None else (Latency.of([seconds], 1),)
    values = accuracy if isinstance(accuracy, list) else [accuracy]
    return Arm(role, role, tuple(Outcome(i, a) for i, a in enumerate(values)), bytes=bytes, parameters=parameters, latencies=latencies)


def run_of(run, *arms):
    return said(w.sentence(replace(run, arms=arms)))


def test_the_sentence_of_a_run_that_won(run):
    found = run_of(
        run, arm("teacher", 0.91, 23_000, 0.0031), arm("alone", [0.887, 0.885, 0.889], 1000, 0.001), arm("distilled", [0.9, 0.899, 0.901], 1000, 0.001)
    )
    assert found == (
        "The student is 23× smaller and 3.1× faster than its teacher; it keeps 98.9 % of its accuracy; "
        "distillation gained +1.3 ± 0.1 points over training it alone."
    )


def test_the_sentence_of_a_run_that_lost(run):
    found = run_of(run, arm("teacher", 0.91, 500, 0.001), arm("alone", [0.90, 0.91, 0.92], 1000, 0.003), arm("distilled", [0.88, 0.889, 0.901], 1000, 0.003))
    assert found == (
        "The student is 2.0× larger and 3.0× slower than its teacher; it keeps 97.8 % of its accuracy; "
        "distillation lost 2.0 ± 0.1 points against training it alone."
    )


def test_the_sentence_does_not_claim_what_chance_may_have_done(run):
    found = run_of(run, arm("teacher", 0.9, 2000), arm("alone", [0.80, 0.82], 1000), arm("distilled", [0.81, 0.815], 1000))
    assert found.endswith("distillation made no clear difference to training it alone (+0.25 ± 0.75 points).")
    one_seed = run_of(run, arm("alone", 0.8), arm("distilled", 0.9))
    assert one_seed == (
        "The student is right on 90.0 % of the test inputs; distillation gained +10.0 points over training it alone (one seed, so this may be chance)."
    )


def test_the_sentence_without_the_student_alone_says_so(run):
    assert run_of(run, arm("teacher", 0.8), arm("distilled", 0.9)) == (
        "The student is 10.00 points more accurate than its teacher; the same student was not trained alone, so what distillation gained is not known."
    )


def test_equal_size_and_speed_are_called_equal(run):
    assert run_of(run, arm("teacher", 0.8, 1000, 0.002), arm("alone", 0.8, 1000, 0.002)) == (
        "The student is as large and as fast as its teacher; it is as accurate as its teacher."
    )
    assert run_of(run, arm("teacher", 0.8, 1000, 0.002), arm("alone", 0.7, 100, 0.002)).startswith(
        "The student is 10× smaller than its teacher and as fast; it keeps 87.4 % of its accuracy."
    )


def test_parameters_stand_in_for_bytes_that_are_unknown(run):
    assert "4.0× smaller" in run_of(run, arm("teacher", 0.8, None, None, 4000), arm("alone", 0.7, 99, None, 1000))


def test_a_hair_less_than_the_teacher_is_not_all_of_it(run):
    assert "keeps 99.9 % of its teacher’s accuracy" in run_of(run, arm("teacher", 0.9), arm("alone", 0.89999))


def test_a_run_without_a_student(run):
    assert run_of(run, arm("teacher", 0.9)) == "This run has no student."


@pytest.mark.parametrize(
    ("difference", "kind", "words"),
    [
        (paired([0.9, 0.91, 0.92], [0.8, 0.812, 0.819]), "higher", "Distillation helped"),
        (paired([0.8, 0.812, 0.819], [0.9, 0.91, 0.92]), "lower", "Distillation hurt"),
        (paired([0.8, 0.9], [0.81, 0.88]), "unclear", "No clear difference"),
        (paired([0.8], [0.7]), "unclear", "One seed only"),
        (Paired(0.03, 0.01, -0.001, 0.061, 3), "higher", "still includes zero"),
    ],
)
def test_verdicts(difference, kind, words):
    found = w.verdict(difference)
    assert found.kind == kind
    assert words in found.text
    assert ("still includes zero" in found.text) == (words == "still includes zero")
    assert (found.interval == "n/a") == (difference.n == 1)


def test_a_verdict_shows_its_numbers():
    found = w.verdict(Paired(-0.0123, 0.0021, -0.0165, -0.0081, 5))
    assert said(found.difference) == "−1.23 ± 0.21 points"
    assert said(found.interval) == "−1.65 to −0.81 points (95 %, Student’s t, 5 seeds)"
