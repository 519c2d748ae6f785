"""Reports of data sets: words, tables, page and terminal of runs that are judged by what networks learn from a set."""

import re

import pytest

from limbeck.report import console, html
from limbeck.report.compare import render as compare
from limbeck.report.summary import Arm, Outcome, Picture, RunSummary
from limbeck.report.verdicts import compared_with, sentence, verdict


def arm(role, label, accuracies, **measures):
    outcomes = tuple(Outcome(seed, measures={"accuracy": a, **measures}) for seed, a in enumerate(accuracies))
    return Arm(role, label, outcomes)


def summary(distilled=(0.62, 0.64, 0.63), random=(0.4, 0.43, 0.41), **changes):
    arms = (
        arm("teacher", "all real data", (0.97,) * 3, bytes=256000.0, compression=1.0),
        arm("alone", "random real images", random, bytes=2560.0, compression=0.01),
        arm("other", "k-means real images", (0.5, 0.5, 0.52), bytes=2560.0, compression=0.01),
        arm("distilled", "distilled", distilled, bytes=2574.0, compression=0.01, label_robust_score=0.31, **{"cross/mlp": 0.5}),
    )
    values = {"title": "digits", "arms": arms, "kind": "dataset", "headline": ("accuracy", "accuracy_std", "bytes", "compression")}
    return RunSummary(**(values | changes))


def text_of(page):
    return re.sub(r"\s+", " ", re.sub(r"<style>.*?</style>|<[^>]+>", " ", page, flags=re.DOTALL))


def test_the_sentence_names_all_three_and_the_size():
    said = sentence(summary())
    assert "63.0 ± 0.6" in said.replace("\u00a0", " ")
    assert "1.00" in said
    assert "random real images" in said
    assert "21.7" in said
    assert "less" in said
    assert "97.0" in said
    assert "more" in sentence(summary(distilled=(0.3, 0.31, 0.32)))
    assert "could be judged" in sentence(summary(arms=()))


@pytest.mark.parametrize(("distilled", "kind", "word"), [((0.62, 0.64, 0.63), "higher", "helped"), ((0.2, 0.22, 0.21), "lower", "hurt")])
def test_the_verdict_is_against_random_real_images(distilled, kind, word):
    found = verdict(summary(distilled=distilled))
    assert found is not None
    assert found.kind == kind
    assert word in found.text
    assert "as many random real images" in found.text
    assert "teacher" not in found.text
    assert compared_with(summary()) == "Distilled − random real"


def test_the_page_shows_images_first_class_and_no_costs_of_calls():
    page = html.render(
        summary(pictures=(Picture("aGk=", "ten images", "One column a class", "Synthetic images"),), notes=("the average holds the first images",))
    )
    text = text_of(page)
    told = ("Synthetic images", "One column a class", "k-means real images", "Label-robust score", "Accuracy of mlp", "the average holds")
    for part in (*told, "Distilled − random real"):
        assert part in text
    for part in ("Quality against cost", "undistilled", "Network calls", "MACs a sample"):
        assert part not in text


def test_the_terminal_and_the_comparison():
    plain = console.plain(summary())
    assert "Accuracy" in plain
    assert "Parameters" not in plain
    assert "k-means real images" in plain
    page = text_of(compare([summary(), summary(title="other")]))
    assert "random real images" in page
    assert "calls" not in page.lower().replace("so-calls", "")
