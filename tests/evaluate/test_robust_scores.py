"""DD-Ranking's scores: reference points, what they depend on, intervals."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from limbeck.errors import InputError
from limbeck.evaluate.robust_scores import (
    augmentation_robust_score,
    augmentation_robustness,
    hard_label_recovery,
    improvement_over_random,
    label_robust_score,
    label_robustness,
    normalised,
)
from limbeck.evaluate.statistics import mean_stderr

FRACTION = st.floats(0, 1)


@pytest.mark.parametrize(("difference", "score"), [(-1.0, 0.0), (0.0, 0.2689), (0.5, 0.5449), (1.0, 1.0)])
def test_reference_points(difference: float, score: float) -> None:
    assert normalised(difference) == pytest.approx(score, abs=5e-5)


def test_scores_by_hand() -> None:
    hlr, ior = hard_label_recovery(0.9, 0.6), improvement_over_random(0.7, 0.5)
    assert (hlr, ior) == (pytest.approx(0.3), pytest.approx(0.2))
    a = 0.5 * 0.2 - 0.5 * 0.3
    assert label_robust_score(ior, hlr) == pytest.approx((math.exp(a) - math.exp(-1)) / (math.e - math.exp(-1)))
    assert label_robust_score(0.0, 0.0) == pytest.approx(0.2689, abs=5e-5)  # no better than random, all recovered
    assert augmentation_robust_score(0.2, 0.4) == pytest.approx(normalised(0.3))
    assert augmentation_robust_score(0.2, 0.4, weight=0.25) == pytest.approx(normalised(0.35))


@given(FRACTION, FRACTION, FRACTION, FRACTION)
def test_weights_leave_one_term(full: float, hard: float, own: float, random: float) -> None:
    hlr, ior = hard_label_recovery(full, hard), improvement_over_random(own, random)
    assert label_robust_score(ior, hlr, weight=1) == normalised(ior)
    assert label_robust_score(ior, hlr, weight=0) == normalised(-hlr)
    assert 0 <= label_robust_score(ior, hlr) <= 1


@given(FRACTION, FRACTION, FRACTION, FRACTION, st.floats(0.01, 0.99))
def test_scores_rise_with_the_accuracy_of_the_set(full: float, random: float, low: float, high: float, weight: float) -> None:
    low, high = sorted((low, high))

    def score(accuracy: float) -> float:
        return label_robust_score(improvement_over_random(accuracy, random), hard_label_recovery(full, accuracy), weight)

    assert score(low) <= score(high) + 1e-15
    if high - low > 1e-6:
        assert score(low) < score(high)
        assert augmentation_robust_score(low - random, 0.0, weight) < augmentation_robust_score(high - random, 0.0, weight)


def test_percentages_and_nonsense_are_refused() -> None:
    for call in (
        lambda: hard_label_recovery(56.5, 0.3),
        lambda: hard_label_recovery(0.5, -0.1),
        lambda: improvement_over_random(0.5, 1.01),
        lambda: improvement_over_random(math.nan, 0.1),
        lambda: label_robust_score(12.0, 0.0),
        lambda: label_robust_score(0.0, -30.0),
        lambda: augmentation_robust_score(1.5, -1.0),  # whose mean would be in range
        lambda: label_robust_score(0.1, 0.1, weight=1.5),
        lambda: normalised(math.nan),
        lambda: label_robustness([0.9], [0.5], [50.0], [0.4]),
        lambda: label_robustness([0.9, 0.8], [0.5], [0.5], [0.4]),
        lambda: augmentation_robustness([], [], [], []),
    ):
        with pytest.raises(InputError):
            call()


def test_score_of_several_networks() -> None:
    full, hard, own, random = [0.9, 0.92, 0.91], [0.6, 0.65, 0.7], [0.7, 0.8, 0.75], [0.5, 0.55, 0.45]
    found = label_robustness(full, hard, own, random)
    singles = [label_robust_score(o - r, f - h) for f, h, o, r in zip(full, hard, own, random, strict=True)]
    assert found.values == pytest.approx(singles)
    mean, stderr = mean_stderr(singles)
    assert stderr is not None
    assert found.mean == pytest.approx(mean)
    assert (found.low, found.high) == (pytest.approx(mean - 4.302653 * stderr), pytest.approx(mean + 4.302653 * stderr))  # Student's t, 2 degrees of freedom
    assert found.value == pytest.approx(label_robust_score(0.75 - 0.5, 0.91 - 0.65))
    assert found.mean > found.value  # the exponential is convex


def test_equal_networks_have_one_score_and_one_network_no_interval() -> None:
    found = augmentation_robustness([0.6] * 3, [0.5] * 3, [0.4] * 3, [0.4] * 3)
    assert found.value == pytest.approx(found.mean) == pytest.approx(normalised(0.05))
    assert found.high == pytest.approx(found.low)
    alone = augmentation_robustness([0.6], [0.5], [0.4], [0.4])
    assert (alone.low, alone.high, len(alone.values)) == (None, None, 1)
    swapped = augmentation_robustness([0.6], [0.6], [0.4], [0.4])  # a set that is random images
    assert swapped.value == normalised(0.0)
