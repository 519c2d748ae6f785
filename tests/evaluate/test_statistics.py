import json
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from limbeck.errors import InputError
from limbeck.evaluate.statistics import Latency, mean_stderr, paired, quantile

numbers = st.floats(-100, 100)
pairs = st.lists(st.tuples(numbers, numbers), min_size=2, max_size=12)


@given(pairs)
def test_paired_interval_is_the_one_of_scipys_paired_t_test(values):
    a, b = (list(side) for side in zip(*values, strict=True))
    found = paired(a, b)
    differences = np.subtract(a, b)
    assert found.n == len(values)
    assert found.mean == pytest.approx(differences.mean(), abs=1e-9)
    assert found.stderr == pytest.approx(stats.sem(differences), abs=1e-9)
    if found.stderr > 1e-9:
        interval = stats.ttest_rel(a, b).confidence_interval(0.95)
        assert (found.low, found.high) == pytest.approx((interval.low, interval.high), rel=1e-6, abs=1e-8)


@given(pairs)
def test_swapping_the_sides_flips_the_difference(values):
    a, b = (list(side) for side in zip(*values, strict=True))
    one, other = paired(a, b), paired(b, a)
    assert one.mean == pytest.approx(-other.mean, abs=1e-12)
    assert (one.low, one.high) == pytest.approx((-other.high, -other.low), abs=1e-9)


def test_a_single_pair_has_no_error_and_settles_nothing():
    found = paired([0.9], [0.5])
    assert (found.mean, found.stderr, found.low, found.high, found.n) == (0.4, None, None, None, 1)
    assert found.verdict == "unclear"
    assert mean_stderr([3.0]) == (3.0, None)


@pytest.mark.parametrize(("shift", "verdict"), [(0.5, "higher"), (-0.5, "lower"), (0.0, "unclear")])
def test_the_verdict_needs_two_standard_errors(shift, verdict):
    noise = [0.01, -0.02, 0.015, -0.01, 0.005]
    assert paired([shift + e for e in noise], [0.0] * 5).verdict == verdict


def test_two_standard_errors_are_the_border():
    # differences 1 and 3: mean 2, standard error 1, exactly two of them
    assert paired([1.0, 3.0], [0.0, 0.0]).verdict == "unclear"
    assert paired([1.01, 3.0], [0.0, 0.0]).verdict == "higher"


def test_equal_results_differ_by_nothing():
    found = paired([0.3, 0.4, 0.5], [0.3, 0.4, 0.5])
    assert (found.mean, found.stderr, found.verdict) == (0.0, 0.0, "unclear")


def test_wrong_numbers_of_values_are_refused():
    with pytest.raises(InputError, match="3 and 2"):
        paired([1, 2, 3], [1, 2])
    for empty in (lambda: mean_stderr([]), lambda: paired([], []), lambda: quantile([], 0.5)):
        with pytest.raises(InputError):
            empty()


@given(st.lists(numbers, min_size=1, max_size=40), st.floats(0, 1))
def test_quantile_is_numpys(values, q):
    assert quantile(values, q) == pytest.approx(float(np.quantile(values, q)), abs=1e-9)


def test_latency_summarises_its_values():
    found = Latency.of([0.5, 0.1, 0.2, 0.3, 0.4], batch_size=64)
    assert found.batch_size == 64
    assert (found.median_s, found.p10, found.p90) == pytest.approx((0.3, 0.14, 0.46))
    assert found.values == (0.5, 0.1, 0.2, 0.3, 0.4)
    assert json.dumps(found.values)


def test_a_report_can_be_made_without_importing_torch_or_matplotlib():
    code = "import sys, limbeck.report.html, limbeck.report.console, limbeck.report.compare; print({'torch', 'matplotlib', 'scipy'} & set(sys.modules))"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "set()"
