import doctest
import io
import json
import re
from dataclasses import replace

import pytest
from generator_runs import generator_run, outcome, rung, timed
from report_pages import Page, check_self_contained
from rich.console import Console

from limbeck.errors import InputError
from limbeck.evaluate.statistics import paired
from limbeck.report import compare, console, generator_wording, html, plots, wording
from limbeck.report.measures import MEASURES, in_order, measure_of
from limbeck.report.summary import Arm, Outcome, RunSummary
from limbeck.report.verdicts import sentence, verdict


def said(text):
    return text.replace("\u00a0", " ")


@pytest.fixture
def run():
    return generator_run()


def swap(run, role, *arms):
    """The run with other arms in place of those of a role."""
    return replace(run, arms=tuple(arm for arm in run.arms if arm.role != role) + arms)


# the summary


def test_a_generators_run_goes_to_json_and_back(run):
    back = RunSummary.from_json(run.to_json())
    assert back == run
    assert (back.kind, back.headline, back.judged_by) == ("generator", ("fid", "recall"), "fid")
    assert back.pictures[1].group == "From the same noise"


def test_a_result_of_an_earlier_version_is_still_read(make_run):
    old = json.loads(make_run().to_json())
    for name in ("kind", "headline"):
        del old[name]
    for arm in old["arms"]:
        for found in arm["outcomes"]:
            del found["measures"]
    for picture in old["pictures"]:
        del picture["caption"], picture["group"]
    assert RunSummary.from_json(json.dumps(old)) == make_run()


def test_measures_and_fields_are_found_by_name():
    arm = Arm("distilled", "x", (outcome(0, 3.0, 1), outcome(1, 5.0, 1)))
    assert arm.values("fid") == [3.0, 5.0]
    assert arm.mean("fid") == (4.0, pytest.approx(1.0))
    assert arm.mean("no such measure") is None
    assert arm.mean("curves") is None  # a field, but no number
    assert Outcome(0, 0.5, measures={"accuracy": 0.7}).measure("accuracy") == 0.7
    assert replace(arm, outcomes=(*arm.outcomes, Outcome(2, measures={"fid": None}))).mean("fid") is None
    assert json.loads(RunSummary("t", (Arm("alone", "a", (Outcome(0, measures={"fid": float("nan")}),)),)).to_json())["arms"][0]["outcomes"][0]["measures"] == {
        "fid": None
    }


def test_the_difference_is_that_of_the_first_headline_measure(run):
    assert run.difference() == paired([4.9, 5.2, 5.0], [46.0, 45.1, 47.2])
    recall = replace(run, headline=("recall",)).difference()
    assert recall.mean == pytest.approx((46.1 - 5.0333333) / 1000)
    assert replace(run, headline=()).difference() is None


def test_a_seed_without_the_measure_is_left_out_of_the_difference(run):
    broken = swap(run, "distilled", Arm("distilled", "student", (outcome(0, 4.9, 1), Outcome(1, measures={"fid": None, "calls": 1.0}), outcome(2, 5.0, 1))))
    assert broken.difference() == paired([4.9, 5.0], [46.0, 47.2])
    assert "student: FID was not measured, or is not a finite number, for seed 1." in generator_wording.cautions(broken)


# words


def test_the_sentence_of_a_run(run):
    assert said(sentence(run)) == (
        "The student’s FID (lower is better) is 5.033 ± 0.088 with 1 network call a sample, its teacher’s 3.100 ± 0.058 with 18 network calls; "
        "in wall-clock time it is 18× faster than its teacher; "
        "the undistilled teacher with 1 network call has 46.10 ± 0.61; distillation improved on that by 41.07 ± 0.66."
    )


def test_the_sentence_tells_a_loss_chance_and_one_seed(run):
    worse = swap(run, "distilled", rung("distilled", "student", (60.0, 61.0, 63.0), 1))
    assert "distillation made that worse by 15.23 ± 0.62" in said(sentence(worse))
    assert verdict(worse).kind == "lower"
    assert "hurt" in verdict(worse).text
    alike = swap(run, "distilled", rung("distilled", "student", (46.5, 44.9, 47.0), 1))
    assert "from which the student does not clearly differ (+0.03 ± 0.23)" in said(sentence(alike))
    assert (verdict(alike).kind, verdict(alike).text[:19]) == ("unclear", "No clear difference")
    one = replace(run, arms=tuple(replace(a, outcomes=a.outcomes[:1]) for a in run.arms))
    assert sentence(one).endswith("improved on that by 41.1 (one seed, so this may be chance).")
    assert verdict(one).text.startswith("One seed only")


def test_higher_is_better_where_the_measure_says_so(run):
    found = verdict(replace(run, headline=("recall",)))
    assert (found.kind, said(found.difference)) == ("higher", "Recall +4.1 ± 0.1 points (higher is better)")
    assert "the student’s recall (higher is better) is 69.5 ± 0.0 %" in said(sentence(replace(run, headline=("recall",)))).lower()


def test_of_an_unknown_measure_nothing_is_claimed(run):
    odd = replace(run, headline=("texture",))
    assert verdict(odd).kind == "unclear"
    assert "better" not in verdict(odd).difference
    assert "better" not in sentence(odd)
    assert measure_of("texture_of_things").label == "Texture of things"


def test_a_difference_that_barely_counts_says_that_its_interval_includes_zero():
    found = generator_wording.verdict(paired([1.0, 1.0, 1.0], [2.0, 1.6, 1.1]), MEASURES["fid"])
    assert found.kind == "higher"
    assert "still includes zero" in found.text


def test_what_is_missing_is_said(run):
    assert "was not measured with as few calls" in sentence(swap(run, "alone"))
    assert sentence(swap(run, "distilled")) == "This run has no student."
    assert said(sentence(swap(run, "teacher"))).startswith("The student’s FID (lower is better) is 5.033 ± 0.088 with 1 network call a sample; the undist")
    bare = RunSummary("bare", (Arm("distilled", "student", (Outcome(0),)),), kind="generator", headline=("fid",))
    assert sentence(bare) == "The student’s FID was not measured."
    nameless = replace(bare, headline=())
    assert sentence(nameless) == "The student’s quality was not measured."
    shifted = swap(run, "alone", replace(rung("alone", "few", (46.0,), 1), outcomes=(outcome(9, 46.0, 1),)))
    assert "was measured with other seeds only" in sentence(shifted)


def test_latencies_stand_in_for_seconds_a_sample(run):
    def bare(arm, seconds):
        return timed(replace(arm, outcomes=tuple(replace(o, measures={"fid": o.measures["fid"]}) for o in arm.outcomes)), seconds)

    arms = tuple(bare(arm, 0.5 if arm.role == "teacher" else 0.02) for arm in run.arms)
    assert "in wall-clock time it is 25× faster than its teacher" in sentence(replace(run, arms=arms))


def test_cautions_are_notes_broken_samples_and_unequal_calls(run):
    odd = swap(run, "alone", Arm("alone", "teacher, 2 calls", tuple(outcome(i, 40.0, 2, nonfinite=600) for i in range(3))))
    assert generator_wording.cautions(odd) == [
        "The student covers 3 of 25 modes: it has collapsed.",
        "The student makes 1 network call a sample, and the undistilled teacher beside it 2 network calls.",
        "teacher, 2 calls: 1 800 samples were not finite (NaN or infinite).",
    ]
    assert generator_wording.cautions(run) == list(run.notes)


@pytest.mark.parametrize(
    ("key", "mean", "expected"),
    [
        ("fid", (3.2145, 0.12), "3.21 ± 0.12"),
        ("fid", (312.4, None), "312"),
        ("mmd2", (0.00012, 0.00003), "0.120 ± 0.030"),
        ("mmd2", (-0.00002, 0.00003), "−0.020 ± 0.030"),
        ("coverage", (0.973, 0.004), "97.3 ± 0.4 %"),
        ("outliers", (0.0003, None), "0.03 %"),
        ("calls", (18.0, 0.0), "18"),
        ("modes_covered", (25.0, None), "25"),
        ("modes_covered", (24.3333, 0.3333), "24.33 ± 0.33"),
        ("fid", (3.0, 1e-17), "3.00"),
        ("seconds_per_sample", (0.0123, 0.0002), "12.30 ± 0.20 ms"),
        ("seconds_per_sample", (0.0000042, None), "0.00420 ms"),
        ("seconds_per_sample", (2.5, None), "2.50 s"),
        ("seconds_per_sample", (125.0, 3.0), "2 min 05 s"),
        ("fid", None, "n/a"),
    ],
)
def test_numbers_are_written_as_their_measure_wants(key, mean, expected):
    assert said(generator_wording.shown(measure_of(key), mean)) == expected


@pytest.mark.parametrize(
    ("key", "mine", "other", "expected"),
    [
        ("fid", 6.0, 3.0, "2.0× higher"),
        ("fid", 3.0, 6.0, "2.0× lower"),
        ("fid", 3.0, 3.001, "the same"),
        ("mmd2", -0.001, 0.002, ""),
        ("mmd2", 0.0, 0.002, ""),
        ("recall", 0.5, 0.62, "12.0 points lower"),
        ("recall", 0.5, 0.5, "the same"),
        ("calls", 1.0, 18.0, "18× fewer"),
        ("seconds_per_sample", 0.1, 0.05, "2.0× slower"),
        ("fid", None, 3.0, ""),
    ],
)
def test_comparisons_for_small_print(key, mine, other, expected):
    assert generator_wording.against(measure_of(key), mine, other) == expected


def test_every_measure_has_its_place_and_its_meaning():
    assert in_order(["calls", "odd", "fid", "calls"]) == ["fid", "calls", "odd"]
    for measure in MEASURES.values():
        assert measure.better in ("lower", "higher")
        assert measure.explanation.endswith(".")
    of_sets = {"accuracy", "accuracy_low", "accuracy_high", "improvement_over_random", "label_robust_score", "label_robust_low", "label_robust_high"}
    of_text = {"answer_accuracy", "answer_trust", "next_token_accuracy", "agreement", "acceptance", "training_tokens_per_second"}
    assert {key for key, m in MEASURES.items() if m.better == "higher"} == {"precision", "recall", "density", "coverage", "modes_covered"} | of_sets | of_text
    assert [MEASURES[key].name for key in ("fid", "energy_distance", "mmd2")] == ["FID", "energy distance", "MMD² (×10³)"]
    assert doctest.testmod(wording).failed == 0


# the page


def test_the_page_shows_every_arm_and_every_part(run):
    text = html.render(run)
    page = Page(text)
    check_self_contained(text, page)
    for expected in (
        *(arm.label for arm in run.arms),
        "FID ↓ 3.100 ± 0.058",
        "5.033 ± 0.088 1.6× higher",
        "Recall ↑",
        "0.400 ms 18× faster",
        "Student − undistilled teacher: FID −41.07 ± 0.66 (lower is better)",
        "Distillation helped",
        "95 %, Student’s t, 3 seeds",
        "MMD² (×10³) ↓",
        "Texture",
        "Fréchet distance",
        "1 min 15 s",
        "updates",
        "method: {name: dmd2}",
        "3.11.2",
        "teacher, 18 calls",
    ):
        assert expected in page.text, expected
    headings = page.text_in["h2"]
    assert headings.index("Real images") < headings.index("From the same noise") < headings.index("Samples")
    assert [a["alt"] for a in page.all("img")] == [p.alt for p in run.pictures]
    assert page.text_in["figcaption"][-1] == "loose"
    labels = [a["aria-label"] for a in page.all("svg")]
    assert len(labels) == 3
    assert "teacher 3.100 ± 0.058 at 18" in said(labels[0])
    assert "student 5.033 ± 0.088 at 0.400 ms" in said(labels[1])
    assert text.index('class="warning"') < text.index("<table")
    assert "The student covers 3 of 25 modes: it has collapsed." in page.text
    assert "Accuracy" not in page.text


def test_a_measure_stands_in_one_table_and_differences_by_seed_in_another(run):
    text = html.render(run)
    rows = [said(row) for row in re.findall(r'<th scope="row">([^<]*)</th>', text)]
    assert [rows.count(name) for name in ("FID ↓", "Recall ↑", "Network calls a sample ↓", "MMD² (×10³) ↓", "Texture")] == [1] * 5
    assert "0 3.10 6.40 30.1 46.0 4.90 −41.1" in Page(text).text


def test_columns_go_from_the_teacher_down_its_ladder_to_the_student(run):
    header = re.search(r"<thead>.*?</thead>", html.render(run), re.DOTALL).group()
    assert re.findall(r"</span>([^<]+)</th>", header) == ["teacher", "teacher, 8 calls", "teacher, 2 calls", "teacher, 1 call", "student"]


def test_the_page_follows_light_dark_and_paper(run):
    text = html.render(run)
    assert "prefers-color-scheme: dark" in text
    assert "@media print" in text
    colours = set(re.findall(r"(?:fill|stroke): ([^;\"]+)", text.partition("<body>")[2]))
    assert colours <= {"none", "currentColor", *(f"var(--{n})" for n in ("soft", "rule", "paper", *(f"s{i}" for i in range(plots.COLOURS))))}
    assert {"var(--s0)", "var(--s1)", "var(--s2)"} <= colours


def test_everything_a_person_wrote_is_escaped(run):
    evil = "<script>alert('x')</script>"
    marked = replace(
        run,
        title=evil,
        notes=(evil,),
        headline=(evil,),
        pictures=tuple(replace(p, alt=evil, caption=evil, group=evil) for p in run.pictures),
        arms=tuple(replace(a, label=evil, outcomes=tuple(replace(o, measures={**o.measures, evil: 1.0 + o.seed}) for o in a.outcomes)) for a in run.arms),
    )
    text = html.render(marked)
    assert "<script" not in text
    assert "alert('x')" in Page(text).text
    assert "<script" not in compare.render([marked, marked])


@pytest.mark.parametrize(
    "take_away",
    [
        lambda run: swap(run, "teacher"),
        lambda run: swap(run, "alone"),
        lambda run: swap(run, "distilled"),
        lambda run: swap(run, "other"),
        lambda run: replace(run, arms=()),
        lambda run: replace(run, headline=()),
        lambda run: replace(run, pictures=(), notes=(), facts={}, environment={}, recipe=""),
        lambda run: replace(run, arms=tuple(replace(a, outcomes=()) for a in run.arms)),
        lambda run: replace(run, arms=tuple(Arm(a.role, a.label, (Outcome(0),)) for a in run.arms)),
        lambda run: replace(run, arms=tuple(Arm(a.role, a.label, (Outcome(0, measures={"fid": 2.0}),)) for a in run.arms)),
        lambda run: replace(run, arms=tuple(Arm(a.role, a.label, (Outcome(0, measures={"fid": 0.0, "calls": 0.0}),)) for a in run.arms)),
        lambda run: replace(run, arms=tuple(timed(a, 0.01) for a in run.arms)),
        lambda run: replace(run, arms=run.arms * 4),
        lambda run: replace(run, arms=(rung("teacher", "teacher", (1e-3, 2e-3), 1), rung("distilled", "student", (1e5, 2e5), 1))),
    ],
    ids=[
        "no teacher",
        "no alone",
        "no student",
        "no rungs",
        "no arms",
        "no headline",
        "numbers only",
        "no outcomes",
        "no measures",
        "quality only",
        "zeros",
        "latencies",
        "many arms",
        "far apart",
    ],
)
def test_what_is_missing_is_left_out(run, take_away):
    summary = take_away(run)
    text = html.render(summary)
    page = Page(text)
    check_self_contained(text, page)
    assert "nan" not in page.text.lower().split()
    assert "None" not in page.text
    assert console.plain(summary)


def test_the_same_run_gives_the_same_bytes(run):
    assert html.render(run) == html.render(RunSummary.from_json(run.to_json()))


def test_the_plot_has_one_curve_of_rungs_and_the_students_seeds(run):
    series = plots.series_of(generator_wording.ordered(run.arms))
    found = plots.quality_by_cost([plots.ladder("teacher", series)], MEASURES["fid"], MEASURES["calls"], "p")
    strokes = re.findall(r'<path d="([^"]*)"[^>]*style="[^"]*stroke: var\(--s0\)[^"]*stroke-width: 1.2', str(found.svg))
    assert any(path.count("L") == 3 for path in strokes), strokes  # four rungs, joined
    dots = [use for use in re.findall(r"<use[^>]*>", str(found.svg)) if "fill: var(--s2); fill-opacity: 0.5" in use]
    assert len(dots) == 3  # one a seed
    assert found.title == "FID against network calls"
    only = plots.ladder("teacher", [s for s in series if s.arm.role == "distilled"])
    assert plots.quality_by_cost([only], MEASURES["fid"], MEASURES["calls"], "p") is None
    free = [plots.Series("free", 0, rung("teacher", "free", (3.0,), 0)), *(s for s in series if s.arm.role != "teacher")]
    assert "free" not in plots.quality_by_cost([plots.ladder("teacher", free)], MEASURES["fid"], MEASURES["calls"], "p").alt  # 0 has no place on a log axis


# side by side


def test_generators_stand_side_by_side(run):
    other = generator_run("two steps", students=(3.9, 4.0, 4.1), headline=("fid", "texture"))
    text = compare.render([run, other])
    page = Page(text)
    check_self_contained(text, page)
    for expected in (
        "one step student 5.033 ± 0.088",
        "two steps student 4.000 ± 0.058",
        "FID ↓",
        "Recall ↑",
        "Texture",
        "distillation improved on that by 42.10",
    ):
        assert expected in page.text, expected
    labels = [said(a["aria-label"]) for a in page.all("svg")]
    assert "two steps · student 4.000 ± 0.058 at 1" in labels[0]
    assert "Accuracy" not in page.text


def test_runs_judged_differently_share_a_table_and_a_plot_of_what_both_have(run):
    page = Page(compare.render([run, generator_run("b", headline=("mmd2",))]))
    titles = [title for title in page.text_in["h3"] if "against" in title]
    assert titles == ["FID against network calls", "FID against time", "MMD² (×10³) against network calls", "MMD² (×10³) against time"]


def test_a_classifier_and_a_generator_are_not_compared(run, make_run):
    with pytest.raises(InputError, match="'quickstart' made a classifier, 'one step' a generator") as caught:
        compare.render([make_run(), run])
    assert caught.value.fix


# in the terminal


def test_the_terminal_has_the_measures_calls_time_and_parameters(run):
    run = replace(run, headline=("fid", "recall", "mmd2", "texture", "calls"))
    for terminal in (True, False):
        out = io.StringIO()
        console.show(run, Console(file=out, force_terminal=terminal, width=140, color_system=None))
        text = said(out.getvalue())
        for expected in ("FID ↓", "Recall ↑", "Network calls a sample ↓", "Time a sample ↓", "Parameters"):
            assert expected in text
        assert "Texture" not in text
        row = next(line for line in text.splitlines() if line.strip().startswith("student"))
        assert re.split(r"\s{2,}", row.strip()) == ["student", "5.033 ± 0.088", "69.5 ± 0.0 %", "5.033 ± 0.088", "1", "0.400 ms", "80.0 k"]
        assert "Student − undistilled teacher: FID −41.07 ± 0.66 (lower is better). Distillation helped" in " ".join(text.split())
        assert "Warning: The student covers 3 of 25 modes" in " ".join(text.split())
