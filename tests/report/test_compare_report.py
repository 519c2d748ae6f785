from dataclasses import replace

import pytest
from report_pages import Page, check_self_contained

from limbeck.errors import InputError
from limbeck.report import compare
from limbeck.report.summary import Arm, Outcome, RunSummary


def test_runs_stand_side_by_side(make_run):
    runs = [make_run("first", 0.03), replace(make_run("second", -0.02), recipe="name: second\nmethod: {name: kd, temperature: 2.0}\ntrain: {epochs: 6}\n")]
    text = compare.render(runs)
    page = Page(text)
    check_self_contained(text, page)
    for run in runs:
        for arm in run.arms:
            assert f"{run.title} {arm.label}" in page.text  # a row of the table
            assert any(f"{run.title} · {arm.label}" in a["aria-label"] for a in page.all("svg"))
    assert "distillation gained +3.2 ± 0.1 points" in page.text
    assert "distillation lost 1.8 ± 0.1 points" in page.text
    assert "method.temperature 4 2" in page.text
    assert "train.epochs" not in page.text
    curves = [a["aria-label"] for a in page.all("svg") if "player student" in a["aria-label"]]
    assert len(curves) == 1
    assert "first · Student distilled from" in curves[0]
    assert "second · Student distilled from" in curves[0]
    assert "Teacher" not in curves[0]


def test_runs_of_one_name_are_numbered_and_missing_parts_left_out(make_run):
    runs = [make_run("same"), RunSummary("same", (Arm("other", "odd", (Outcome(0, 0.5),)),)), RunSummary("bare", ())]
    text = compare.render(runs)
    page = Page(text)
    check_self_contained(text, page)
    assert compare.unique_titles(runs) == ["same (1)", "same (2)", "bare"]
    assert "same (1) · same (2) · bare" in page.text
    assert "same (2) odd 50.00 %" in page.text


def test_recipes_are_compared_field_by_field():
    first = "name: a\nseeds: [0, 1]\nteacher:\n- {model: mlp}\n- {model: cnn}\ntrain: {epochs: 6, clip: null, lr: 0.05}\n"
    second = "name: b\nseeds: [0, 1, 2]\nteacher:\n- {model: mlp}\ntrain: {epochs: 6, clip: 1.0, lr: 0.05}\nextra: true\n"
    found = [(d.field, *d.values) for d in compare.recipe_differences([first, second])]
    assert found == [
        ("name", "a", "b"),
        ("seeds", "0, 1", "0, 1, 2"),
        ("teacher.1.model", "cnn", "–"),
        ("train.clip", "n/a", "1"),
        ("extra", "–", "yes"),
    ]
    assert compare.recipe_differences([first, first]) == []
    assert [d.values for d in compare.recipe_differences(["name: a", ""])] == [("a", "–")]


def test_equal_recipes_differ_in_nothing(run):
    assert "In nothing." in Page(compare.render([run, run])).text


def test_one_run_is_no_comparison(run):
    with pytest.raises(InputError, match="at least two runs, not 1"):
        compare.render([run])


def test_a_title_is_escaped(run):
    text = compare.render([replace(run, title="<script>x</script>"), run])
    assert "<script" not in text
    assert not Page(text).all("script")


def test_writing(run, tmp_path):
    compare.write([run, run], tmp_path / "compare.html")
    assert [p.name for p in tmp_path.iterdir()] == ["compare.html"]
