import json
import math
from dataclasses import replace

import pytest
import torch

from limbeck.errors import InputError
from limbeck.evaluate.classifier import classifier_metrics
from limbeck.evaluate.statistics import Bin, paired
from limbeck.report.summary import Arm, Curve, Outcome, RunSummary


def test_json_there_and_back(run):
    back = RunSummary.from_json(run.to_json())
    assert back == run
    assert back.to_json() == run.to_json()


def test_not_finite_numbers_become_null(run):
    broken = Outcome(0, 0.1, nll=math.nan, curves=(Curve("student", "loss", (0, 1), (math.inf, 1.0)),))
    summary = replace(run, arms=(Arm("alone", "alone", (broken,)),), facts={"gap": math.nan, "inner": [math.inf]})
    text = summary.to_json()
    json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    back = RunSummary.from_json(text)
    assert back.arms[0].outcomes[0].nll is None
    assert back.arms[0].outcomes[0].curves[0].values == (None, 1.0)
    assert back.facts == {"gap": None, "inner": [None]}


@pytest.mark.parametrize(
    ("text", "where"),
    [("", ""), ("[]", ""), ('{"title": 3, "arms": []}', "title"), ('{"title": "a", "arms": [{"role": "boss", "label": "b", "outcomes": []}]}', "arms.0.role")],
)
def test_other_files_are_refused_with_the_field(text, where):
    with pytest.raises(InputError, match="not a run summary") as caught:
        RunSummary.from_json(text)
    assert caught.value.where == where


def test_the_difference_is_paired_by_seed(run):
    teacher, alone, distilled = run.arms
    shuffled = replace(run, arms=(teacher, replace(alone, outcomes=alone.outcomes[::-1]), replace(distilled, outcomes=distilled.outcomes[1:])))
    expected = paired([o.accuracy for o in distilled.outcomes[1:]], [o.accuracy for o in alone.outcomes[1:]])
    assert shuffled.difference() == expected
    assert expected.n == 4
    assert replace(run, arms=(teacher, distilled)).difference() is None
    other_seeds = replace(alone, outcomes=tuple(replace(o, seed=o.seed + 100) for o in alone.outcomes))
    assert replace(run, arms=(other_seeds, distilled)).difference() is None


def test_a_measure_that_a_seed_lacks_has_no_mean(run):
    teacher, alone, _ = run.arms
    assert teacher.mean("agreement") is None
    assert alone.mean("agreement") == (pytest.approx(0.9), pytest.approx(0, abs=1e-12))
    assert replace(alone, outcomes=(*alone.outcomes, Outcome(9, 0.5))).mean("agreement") is None
    assert Arm("other", "empty", ()).mean("accuracy") is None


def test_bins_of_several_seeds_are_pooled_by_count():
    a = Outcome(0, 1.0, bins=(Bin(0, 0.5, 0, None, None), Bin(0.5, 1, 30, 0.9, 1.0)))
    b = Outcome(1, 0.0, bins=(Bin(0, 0.5, 0, None, None), Bin(0.5, 1, 10, 0.7, 0.2)))
    assert Arm("alone", "x", (a, b)).bins() == [Bin(0, 0.5, 0, None, None), Bin(0.5, 1, 40, pytest.approx(0.85), pytest.approx(0.8))]
    other = Outcome(2, 0.0, bins=(Bin(0, 1, 10, 0.7, 0.2),))
    assert Arm("alone", "x", (a, other)).bins() == []
    assert Arm("alone", "x", (a, Outcome(3, 0.0))).bins() == []


def test_classes_are_averaged_over_the_seeds_that_have_them():
    outcomes = (Outcome(0, 0.0, per_class=(0.5, None, None)), Outcome(1, 0.0, per_class=(0.7, 0.2, None)))
    assert Arm("alone", "x", outcomes).per_class() == [pytest.approx(0.6), 0.2, None]
    assert Arm("alone", "x", (*outcomes, Outcome(2, 0.0))).per_class() == []


def test_an_outcome_holds_the_metrics_it_is_made_of():
    logits = torch.tensor([[2.0, 0.0], [0.0, 1.0], [3.0, 0.0]])
    metrics = classifier_metrics(logits, torch.tensor([0, 1, 1]), logits)
    made = Outcome.of(7, metrics, training_seconds=3.0, examples_seen=9, curves=[Curve("student", "loss", (0,), (1.0,))])
    assert (made.seed, made.training_seconds, made.examples_seen, len(made.curves)) == (7, 3.0, 9, 1)
    for name in ("accuracy", "nll", "ece", "brier", "agreement", "kl_to_teacher", "per_class", "bins", "nonfinite"):
        assert getattr(made, name) == getattr(metrics, name)
