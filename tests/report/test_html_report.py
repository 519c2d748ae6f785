import re
import time
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from report_pages import Page, check_self_contained

from limbeck.report import html, plots
from limbeck.report.summary import Arm, Curve, Outcome, RunSummary


def test_the_page_shows_every_arm_and_every_part(run):
    text = html.render(run)
    page = Page(text)
    check_self_contained(text, page)
    for arm in run.arms:
        assert arm.label in page.text
    for expected in (
        "The student is 24× smaller and 3.3× faster than its teacher; it keeps 97.5 % of its accuracy",
        "distillation gained +3.2 ± 0.1 points",
        "90.50 ± 0.50 %",
        "85.10 ± 0.33 %",
        "1.20 M",
        "195 KiB",
        "1.20 ms",
        "Distilled − alone: +3.20 ± 0.07 points",
        "95 %, Student’s t, 5 seeds",
        "1 min 15 s",
        "480 k",
        "task 1",
        "The teacher saw all labels.",
        "temperature: 4.0",
        "2.14.1",
    ):
        assert expected in page.text, expected
    for title in ("Accuracy against size", "Reliability", "Accuracy by class", "Latency, batch 1", "Latency, batch 64", "student: loss", "discriminator: loss"):
        assert title in page.text_in["h3"]
    assert len(page.all("svg")) == 7
    assert page.all("img") == [{"src": page.all("img")[0]["src"], "alt": "a red dot"}]
    labels = " ".join(a["aria-label"] for a in page.all("svg"))
    for expected in ("Student distilled has a calibration error of 4.00", "Learning curves of loss of the player discriminator", "Latency of a batch of 64"):
        assert expected in labels


def test_the_page_is_made_for_telephones_paper_and_the_dark(run):
    text = html.render(run)
    assert 'name="viewport" content="width=device-width, initial-scale=1"' in text
    assert "prefers-color-scheme: dark" in text
    assert "@media print" in text
    assert ".scroll { overflow-x: auto" in text
    colours = set(re.findall(r"(?:fill|stroke): ([^;\"]+)", text.partition("<body>")[2]))
    assert colours <= {"none", "currentColor", *(f"var(--{n})" for n in ("soft", "rule", "paper", *(f"s{i}" for i in range(plots.COLOURS))))}
    wide = re.findall(r"<table class=\"(?:arms|wide)\">", text)
    assert len(wide) == text.count('class="scroll" role="region"') - 3  # by seed, facts, environment scroll as well


def test_everything_a_person_wrote_is_escaped(run):
    evil = "<script>alert('x')</script>"
    teacher, alone, distilled = run.arms
    curves = (Curve(evil, evil, (0, 1), (1.0, 0.5)),)
    marked = replace(
        run,
        title=evil,
        method=evil,
        created=evil,
        recipe=f"name: {evil}",
        environment={evil: evil, "list": [evil]},
        classes=(evil, "$x^{2}$ & y", 'a"b'),
        facts={evil: [{evil: evil}]},
        notes=(evil,),
        arms=(teacher, replace(alone, label=evil), replace(distilled, outcomes=tuple(replace(o, curves=curves) for o in distilled.outcomes))),
    )
    text = html.render(marked)
    page = Page(text)
    assert not page.all("script")
    assert "<script" not in text
    assert "alert('x')</script>" in page.text
    assert "$x^{2}$ & y" in page.text


def without(run, *roles):
    return replace(run, arms=tuple(arm for arm in run.arms if arm.role not in roles))


@pytest.mark.parametrize(
    "take_away",
    [
        lambda run: without(run, "teacher"),
        lambda run: without(run, "alone"),
        lambda run: without(run, "distilled"),
        lambda run: without(run, "teacher", "alone"),
        lambda run: without(run, "teacher", "alone", "distilled"),
        lambda run: replace(run, arms=tuple(replace(a, outcomes=a.outcomes[:1]) for a in run.arms)),
        lambda run: replace(run, arms=tuple(Arm(a.role, a.label, (Outcome(0, 0.5),)) for a in run.arms)),
        lambda run: replace(run, arms=tuple(replace(a, outcomes=()) for a in run.arms)),
        lambda run: replace(run, arms=tuple(replace(a, latencies=a.latencies[:i]) for i, a in enumerate(run.arms))),
        lambda run: replace(run, arms=(*run.arms, *(Arm("other", f"extra {i}", (Outcome(0, 0.1 * i),), bytes=10**i) for i in range(9)))),
        lambda run: RunSummary("bare", ()),
    ],
    ids=[
        "no teacher",
        "no alone",
        "no distilled",
        "distilled only",
        "no arms",
        "one seed",
        "accuracy only",
        "no outcomes",
        "few latencies",
        "many arms",
        "bare",
    ],
)
def test_what_is_missing_is_left_out(run, take_away):
    summary = take_away(run)
    text = html.render(summary)
    page = Page(text)
    check_self_contained(text, page)
    for arm in summary.arms:
        assert arm.label in page.text
    assert "nan" not in page.text.lower().split()
    assert "None" not in page.text


def test_one_seed_is_said_to_be_one_seed(run):
    page = Page(html.render(replace(run, arms=tuple(replace(a, outcomes=a.outcomes[:1]) for a in run.arms))))
    assert "one seed, s.e. n/a" in page.text
    assert "One seed only: whether distillation helped cannot be told from chance." in page.text
    assert "+3.00 ± n/a points" in page.text
    assert "Interval" not in page.text


def test_a_loss_is_shown_as_a_loss(make_run):
    page = Page(html.render(make_run(gain=-0.05)))
    assert "distillation lost 4.8 ± 0.1 points against training it alone" in page.text
    assert "Distillation hurt" in page.text


def test_answers_that_are_not_numbers_are_reported(run):
    teacher, alone, distilled = run.arms
    broken = replace(alone, outcomes=(replace(alone.outcomes[0], nonfinite=1200, nll=None), *alone.outcomes[1:]))
    page = Page(html.render(replace(run, arms=(teacher, replace(broken, label="Student, alone"), distilled))))
    assert "Student, alone: 1 200 answers were not finite numbers" in page.text
    assert "not finite" not in Page(html.render(run)).text


def test_many_classes_are_cut_to_the_largest_differences(run):
    def widen(arm, shift):
        return replace(arm, outcomes=tuple(replace(o, per_class=tuple(0.5 + shift * i / 1000 for i in range(100))) for o in arm.outcomes))

    teacher, _, distilled = run.arms
    summary = replace(run, arms=(widen(teacher, 0), widen(distilled, 1)), classes=tuple(f"class {i}" for i in range(100)))
    text = html.render(summary)
    page = Page(text)
    assert "Of 100 classes, the 12 with the largest losses and the 12 with the largest gains are shown." in page.text
    assert "from 0.0 (class 0) to +9.9 (class 99), over 100 classes" in " ".join(a["aria-label"] for a in page.all("svg"))
    shown = [f"class {i}" for i in range(100) if f">class {i}<" in text]
    assert shown == [f"class {i}" for i in (*range(12), *range(88, 100))]


def test_long_curves_are_thinned_and_gaps_kept(run):
    steps = tuple(range(100_000))
    values = tuple(None if 40_000 <= i < 60_000 else 2.0 + i // 1000 % 2 for i in steps)
    distilled = run.arms[2]
    long = replace(distilled, outcomes=(replace(distilled.outcomes[0], curves=(Curve("student", "loss", steps, values),)),))
    found = plots.curves(plots.series_of([long]))[0]
    assert len(found.svg) < 15_000
    assert found.alt == "Learning curves of loss of the player student: Student distilled from 2.00 to 3.00."
    line = max(re.findall(r' d="([^"]*)"', found.svg), key=len)
    assert 80 < line.count("L") <= plots.MOST_POINTS
    assert line.count("M") == 2  # one piece before the gap, one after


def test_the_same_run_gives_the_same_bytes(run):
    assert html.render(run) == html.render(RunSummary.from_json(run.to_json()))


def test_a_page_is_made_in_under_four_seconds(run):
    start = time.process_time()
    html.render(run)
    assert time.process_time() - start < 4


def test_writing_leaves_the_page_and_nothing_else(run, tmp_path):
    html.write(run, tmp_path / "report.html")
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == html.render(run)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**9), 10**9) | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=40)
@given(st.dictionaries(st.text(max_size=6), json_values, max_size=5))
def test_any_facts_make_a_page(facts):
    Page(html.render(RunSummary("facts", (), facts=facts, environment=facts)))
