import dataclasses
import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from limbeck.contract import IGNORE
from limbeck.errors import InputError
from limbeck.evaluate import classifier as m


def sample(seed, n=60, classes=5, scale=2.0):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(n, classes, generator=generator) * scale
    return logits, torch.randint(classes, (n,), generator=generator)


samples = st.builds(sample, st.integers(0, 10**6), st.integers(1, 80), st.integers(2, 7), st.sampled_from([0.01, 1.0, 5.0, 60.0]))


def test_accuracy_nll_brier_and_confusion_are_those_of_sklearn():
    from sklearn import metrics

    logits, targets = sample(0, n=300)
    probs = logits.double().softmax(-1)
    guesses = logits.argmax(-1)
    assert m.accuracy(logits, targets) == pytest.approx(metrics.accuracy_score(targets, guesses))
    assert m.nll(logits, targets) == pytest.approx(metrics.log_loss(targets, probs, labels=range(5)))
    assert m.confusion(logits, targets).tolist() == metrics.confusion_matrix(targets, guesses, labels=range(5)).tolist()
    assert m.per_class_accuracy(logits, targets).tolist() == pytest.approx(metrics.recall_score(targets, guesses, average=None).tolist())
    one_against_rest = sum(metrics.brier_score_loss((targets == c).long(), probs[:, c]) for c in range(5))
    assert m.brier(probs, targets) == pytest.approx(one_against_rest)


@pytest.mark.parametrize("bins", [5, 15])
def test_calibration_error_is_torchmetrics(bins):
    from torchmetrics.functional.classification import multiclass_calibration_error

    logits, targets = sample(1, n=400)
    probs = logits.double().softmax(-1)
    ece, table = m.calibration(probs, targets, bins)
    assert ece == pytest.approx(multiclass_calibration_error(probs, targets, num_classes=5, n_bins=bins).item(), abs=1e-6)
    assert len(table) == bins
    assert sum(b.count for b in table) == 400


def test_kl_to_the_teacher_is_torchmetrics():
    from torchmetrics.functional import kl_divergence

    student, teacher = sample(2)[0], sample(3)[0]
    assert m.kl_to_teacher(student, teacher) == pytest.approx(kl_divergence(teacher.double().softmax(-1), student.double().softmax(-1)).item())


def test_agreement_by_hand():
    student = torch.tensor([[2.0, 1.0], [0.0, 1.0], [3.0, 1.0], [0.0, 5.0]])
    teacher = torch.tensor([[9.0, 1.0], [1.0, 0.0], [1.0, 0.0], [0.0, 0.1]])
    assert m.agreement(student, teacher) == 0.75


def test_calibration_by_hand():
    # two answers of confidence 0.8 (one right), one of 0.6 (right): |0.5 - 0.8| * 2/3 + |1 - 0.6| * 1/3
    probs = torch.tensor([[0.8, 0.2], [0.2, 0.8], [0.6, 0.4]], dtype=torch.float64)
    ece, table = m.calibration(probs, torch.tensor([0, 0, 0]), bins=4)
    assert ece == pytest.approx(0.2 + 0.4 / 3)
    assert [b.count for b in table] == [0, 0, 1, 2]
    assert table[3].confidence == pytest.approx(0.8)
    assert (table[0].confidence, table[0].accuracy, table[3].accuracy) == (None, None, 0.5)


def test_bins_are_open_below_and_closed_above():
    probs = torch.tensor([[0.75, 0.25], [1.0, 0.0], [0.5, 0.5]], dtype=torch.float64)
    assert [b.count for b in m.calibration(probs, torch.tensor([0, 0, 0]), bins=4)[1]] == [0, 1, 1, 1]


@given(samples)
def test_values_are_in_their_ranges(drawn):
    logits, targets = drawn
    found = m.classifier_metrics(logits, targets, logits.flip(0))
    for value in (found.accuracy, found.ece, found.agreement, *(a for a in found.per_class if a is not None)):
        assert -1e-9 <= value <= 1 + 1e-9
    assert 0 <= found.brier <= 2 + 1e-9
    assert found.nll >= 0
    assert found.kl_to_teacher >= -1e-9
    assert sum(b.count for b in found.bins) == len(targets)
    json.dumps(dataclasses.asdict(found), allow_nan=False)


@given(samples, st.integers(0, 10**6))
def test_the_order_of_samples_does_not_matter(drawn, seed):
    logits, targets = drawn
    order = torch.randperm(len(targets), generator=torch.Generator().manual_seed(seed))
    one = dataclasses.asdict(m.classifier_metrics(logits, targets, logits.roll(1, 1)))
    other = dataclasses.asdict(m.classifier_metrics(logits[order], targets[order], logits.roll(1, 1)[order]))
    assert flat(one) == pytest.approx(flat(other), abs=1e-9)


@given(samples, st.integers(0, 10**6))
def test_the_names_of_classes_do_not_matter(drawn, seed):
    logits, targets = drawn
    order = torch.randperm(logits.shape[1], generator=torch.Generator().manual_seed(seed))
    one, other = m.classifier_metrics(logits, targets), m.classifier_metrics(logits[:, order], order.argsort()[targets])
    assert (one.accuracy, one.nll, one.ece, one.brier) == pytest.approx((other.accuracy, other.nll, other.ece, other.brier), abs=1e-9)
    assert [one.per_class[i] for i in order] == pytest.approx(list(other.per_class))


@given(st.integers(0, 10**6), st.integers(2, 7))
def test_a_perfect_predictor(seed, classes):
    _, targets = sample(seed, classes=classes)
    logits = torch.nn.functional.one_hot(targets, classes) * 100.0
    found = m.classifier_metrics(logits, targets, logits)
    assert (found.accuracy, found.agreement) == (1, 1)
    assert (found.ece, found.nll, found.brier, found.kl_to_teacher) == pytest.approx((0, 0, 0, 0), abs=1e-9)
    assert set(found.per_class) <= {1.0, None}


def test_a_uniform_predictor_is_as_unsure_as_it_should_be():
    targets = torch.arange(4).repeat(5)
    found = m.classifier_metrics(torch.zeros(20, 4), targets)
    assert found.nll == pytest.approx(math.log(4))
    assert found.ece == pytest.approx(0)
    assert found.brier == pytest.approx(0.75)
    assert found.accuracy == 0.25  # the first of equals
    assert (found.agreement, found.kl_to_teacher) == (None, None)


def test_unlabelled_samples_are_left_out_but_may_agree():
    logits, targets = sample(4)
    teacher = sample(5)[0]
    hidden = targets.clone()
    hidden[::3] = IGNORE
    keep = hidden != IGNORE
    found, kept = m.classifier_metrics(logits, hidden, teacher), m.classifier_metrics(logits[keep], hidden[keep])
    assert found.labelled == int(keep.sum())
    assert (found.accuracy, found.nll, found.ece, found.brier, found.per_class) == (kept.accuracy, kept.nll, kept.ece, kept.brier, kept.per_class)
    assert m.confusion(logits, hidden).sum() == keep.sum()
    assert found.agreement == m.agreement(logits, teacher)


def test_a_class_without_samples_has_no_accuracy():
    found = m.classifier_metrics(torch.eye(3), torch.tensor([0, 0, 2]))
    assert found.per_class == (0.5, None, 1.0)


def test_broken_logits_are_counted_and_count_as_wrong():
    logits, targets = torch.eye(4) * 9, torch.arange(4)
    logits[0, 0], logits[1, 2], logits[2] = math.nan, math.inf, -math.inf
    found = m.classifier_metrics(logits, targets, logits)
    assert found.nonfinite == 3
    assert found.accuracy == 0.25
    assert found.agreement == 0.25
    assert (found.nll, found.ece, found.brier, found.kl_to_teacher) == (None, None, None, None)
    assert m.confusion(logits, targets).sum() == 1
    json.dumps(dataclasses.asdict(found), allow_nan=False)


def test_a_masked_class_is_a_distribution_all_the_same():
    logits = torch.tensor([[1.0, -math.inf, 0.0]])
    found = m.classifier_metrics(logits, torch.tensor([0]), logits)
    assert (found.nonfinite, found.accuracy, found.kl_to_teacher) == (0, 1.0, 0.0)


def test_wrong_targets_are_refused():
    logits = torch.zeros(3, 2)
    with pytest.raises(InputError, match="no labelled sample"):
        m.accuracy(logits, torch.full((3,), IGNORE))
    with pytest.raises(InputError, match="0 to 2, but there are 2 classes"):
        m.nll(logits, torch.tensor([0, 1, 2]))
    with pytest.raises(InputError, match=r"\[3, 2\] and \[4\]"):
        m.classifier_metrics(logits, torch.zeros(4, dtype=torch.long))


def flat(value):
    """Every number of nested dicts, lists and tuples; None as −1."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list | tuple):
        return [x for item in value for x in flat(item)]
    return [-1.0 if value is None else value]
