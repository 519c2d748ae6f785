"""Measures of class-incremental learning."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from limbeck.evaluate.incremental import (
    average_incremental_accuracy,
    error_rates,
    forgetting,
    step_measures,
    summary,
    task_accuracies,
)

SIZES = (2, 3, 1)
answers = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=40)
fast = settings(deadline=None, max_examples=50)


def columns(pairs):
    predictions, targets = zip(*pairs, strict=True)
    return torch.tensor(predictions), torch.tensor(targets)


@fast
@given(answers)
def test_task_accuracies_count_each_tasks_own_samples(pairs):
    tasks = [0, 0, 1, 1, 1, 2]
    for task, found in enumerate(task_accuracies(*columns(pairs), SIZES)):
        own = [p == t for p, t in pairs if tasks[t] == task]
        assert found == (sum(own) / len(own) if own else None)


@fast
@given(answers, st.integers(1, 5))
def test_the_error_rates_add_up_to_the_error(pairs, old):
    predictions, targets = columns(pairs)
    rates = error_rates(predictions, targets, old)
    is_old = sum(t < old for _, t in pairs) / len(pairs)
    crossing = is_old * (rates.old_to_new or 0) + (1 - is_old) * (rates.new_to_old or 0)
    error = sum(p != t for p, t in pairs) / len(pairs)
    assert crossing + rates.within_group == pytest.approx(error)
    assert (rates.old_to_new is None) == (is_old == 0)
    assert (rates.new_to_old is None) == (is_old == 1)


def test_error_rates_of_a_hand_made_table():
    targets = torch.tensor([0, 0, 1, 1, 2, 2, 3, 3])
    predictions = torch.tensor([0, 2, 3, 0, 2, 3, 0, 3])
    rates = error_rates(predictions, targets, 2)
    assert (rates.old_to_new, rates.new_to_old, rates.within_group) == (0.5, 0.25, 0.25)


def test_forgetting_is_the_mean_drop_from_the_best_earlier_accuracy():
    matrix = [[0.9], [0.95, 0.8], [0.5, 0.85, 0.7]]
    assert forgetting(matrix) == pytest.approx(((0.95 - 0.5) + (0.8 - 0.85)) / 2)
    assert forgetting(matrix[:1]) is None
    assert forgetting([]) is None
    assert forgetting([[0.9], [0.6, None], [0.5, None, 0.7]]) == pytest.approx(0.4)


def test_average_incremental_accuracy_counts_every_step_once():
    assert average_incremental_accuracy([1.0, 0.5, 0.3]) == pytest.approx(0.6)


def test_the_summary_holds_the_last_steps_errors_and_only_what_is_defined():
    first = step_measures(torch.tensor([0, 1, 1]), torch.tensor([0, 1, 0]), (2,))
    assert first == {
        "accuracy": pytest.approx(2 / 3),
        "tasks": [pytest.approx(2 / 3)],
        "old_to_new": None,
        "new_to_old": 0.0,
        "within_group": pytest.approx(1 / 3),
    }
    assert "forgetting" not in summary([first])
    assert "old_to_new" not in summary([first])
    second = step_measures(torch.tensor([0, 2, 2, 1]), torch.tensor([0, 1, 2, 2]), (2, 1))
    found = summary([first, second])
    assert found == {
        "final_accuracy": 0.5,
        "average_accuracy": pytest.approx((2 / 3 + 0.5) / 2),
        "forgetting": pytest.approx(2 / 3 - 0.5),
        "old_to_new": 0.5,
        "new_to_old": 0.5,
        "within_group": 0.0,
    }
    assert json.loads(json.dumps([first, second])) == [first, second]
    assert summary([]) == {}
