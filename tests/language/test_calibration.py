"""Transforms of k kept probabilities, calibration error, trust, and the grid that fits c (sheet `first`, invariants 1, 2, 7, 9)."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from limbeck import seeds
from limbeck.contract import IGNORE
from limbeck.errors import InputError
from limbeck.evaluate.classifier import calibration
from limbeck.language.calibration import (
    COARSE,
    answer_positions,
    expected_calibration_error,
    fit_constant,
    label_smoothing,
    power,
    renormalised,
    softmax_of_prob,
    transformed,
    trust_score,
)  # fmt: skip
from limbeck.language.tokens import TokenBatch


def kept(count: int = 64, k: int = 5, sharp: float = 3.0, seed: int = 0) -> torch.Tensor:
    """[count, k] the largest of 20 probabilities."""
    logits = sharp * torch.randn(count, 20, generator=seeds.generator(seed, "kept"))
    return logits.softmax(-1).topk(k, -1).values


def test_worked_example_of_the_sheet() -> None:
    found = softmax_of_prob(torch.tensor([[1.0, 0, 0, 0, 0]]), 1.0)
    assert torch.allclose(found, torch.tensor([[0.4046, 0.1488, 0.1488, 0.1488, 0.1488]]), atol=5e-5)


def test_limits_of_c() -> None:
    probs = kept()
    assert torch.allclose(softmax_of_prob(probs, 1e6), torch.full((64, 5), 0.2), atol=1e-6)
    assert torch.allclose(softmax_of_prob(probs, 1e-6).amax(-1), torch.ones(64))
    tied = torch.tensor([[0.4, 0.4, 0.1, 0.05, 0.05]])
    assert torch.allclose(softmax_of_prob(tied, 1e-4), torch.tensor([[0.5, 0.5, 0, 0, 0]]))


@given(c=st.floats(0.02, 50), k=st.integers(1, 8), seed=st.integers(0, 100))
def test_order_is_kept_and_every_entry_is_positive(c: float, k: int, seed: int) -> None:
    probs = kept(8, k, seed=seed)
    for found in (softmax_of_prob(probs, c), power(probs, max(c, 0.2))):
        assert torch.allclose(found.sum(-1), torch.ones(8), atol=1e-5)
        assert bool((found[:, :-1] >= found[:, 1:]).all())
    assert bool((softmax_of_prob(probs, c) > 0).all())


def test_the_paper_flattens_where_classical_scaling_sharpens() -> None:
    probs = torch.tensor([[0.9, 0.04, 0.03, 0.02, 0.01]])
    assert softmax_of_prob(probs, 0.3)[0, 0].item() == pytest.approx(0.8, abs=0.03)
    assert power(probs, 0.3)[0, 0].item() > 0.99
    assert torch.allclose(power(probs, 1.0), renormalised(probs))


def test_temperature_scaling_is_that_of_logits() -> None:
    logits = torch.randn(6, 7, generator=seeds.generator(0, "l"), dtype=torch.float64)
    assert torch.allclose(power(logits.softmax(-1), 2.0), (logits / 2).softmax(-1))


def test_label_smoothing_moves_delta_and_clips() -> None:
    probs = torch.tensor([[0.1, 0.7, 0.2]])
    assert torch.allclose(label_smoothing(probs, 0.1), torch.tensor([[0.15, 0.6, 0.25]]))
    clipped = label_smoothing(torch.tensor([[0.3, 0.2, 0.2]]), 0.6)
    assert torch.allclose(clipped, torch.tensor([[0.0, 0.5, 0.5]]))
    assert torch.equal(label_smoothing(torch.tensor([[0.3]]), 0.1), torch.ones(1, 1))
    assert torch.allclose(label_smoothing(kept(), 0.0), renormalised(kept()))


def test_transforms_by_name() -> None:
    probs = kept()
    assert torch.equal(transformed(probs, "softmax_of_prob", 0.3), softmax_of_prob(probs, 0.3))
    assert torch.equal(transformed(probs, "power", 0.3), power(probs, 0.3))
    assert torch.equal(transformed(probs, "label_smoothing", 0.3), label_smoothing(probs, 0.3))
    assert torch.equal(transformed(probs, "none", 0.3), renormalised(probs))


@pytest.mark.parametrize("c", [0.0, -1.0, math.inf, math.nan])
def test_a_constant_must_be_above_zero(c: float) -> None:
    with pytest.raises(InputError, match="above 0"):
        softmax_of_prob(kept(), c)


def test_smoothing_must_be_a_share() -> None:
    with pytest.raises(InputError, match="share"):
        label_smoothing(kept(), 1.5)


def test_calibration_error_of_simple_predictors() -> None:
    right = torch.ones(50, dtype=torch.bool)
    assert expected_calibration_error(torch.ones(50), right).item() == 0
    correct = torch.arange(50) < 30
    for p in (0.05, 0.35, 0.72, 1.0):
        assert expected_calibration_error(torch.full((50,), p, dtype=torch.float64), correct).item() == pytest.approx(abs(p - 0.6))


def test_calibration_error_is_that_of_classifiers_whatever_the_order() -> None:
    rng = seeds.generator(0, "ece")
    probs = (2 * torch.randn(200, 9, generator=rng)).softmax(-1).double()
    targets = torch.randint(9, (200,), generator=rng)
    order = torch.randperm(200, generator=rng)
    confidence, guess = probs.max(-1)
    found = expected_calibration_error(confidence, guess == targets)
    assert found.item() == pytest.approx(calibration(probs, targets, 10)[0])
    assert expected_calibration_error(confidence[order], (guess == targets)[order]).item() == pytest.approx(found.item())
    assert 0 <= found.item() <= 1


def test_bins_are_closed_on_the_right() -> None:
    confidence = torch.tensor([0.5, 0.5 + 1e-9], dtype=torch.float64)
    # apart: |1 − 0.5|/2 + |0 − 0.5|/2; in one bin they would cancel
    assert expected_calibration_error(confidence, torch.tensor([True, False])).item() == pytest.approx(0.5)


def test_trust_is_never_above_accuracy() -> None:
    assert trust_score(0.8, 0.1) == pytest.approx(0.7)
    assert trust_score(0.8, 0.0) == 0.8


def test_calibration_error_refuses_nothing() -> None:
    with pytest.raises(InputError):
        expected_calibration_error(torch.ones(0), torch.ones(0))
    with pytest.raises(InputError):
        expected_calibration_error(torch.ones(3), torch.ones(2))


@pytest.mark.parametrize("transform", ["softmax_of_prob", "power"])
def test_the_fitted_constant_is_no_worse_than_any_grid_point(transform: str) -> None:
    probs = kept(400, sharp=6.0)
    correct = torch.rand(400, generator=seeds.generator(1, "correct")) < 0.7
    found = fit_constant(probs, correct, transform)  # type: ignore[arg-type]
    grid = [c for c, _ in found.table]
    assert set(COARSE) <= set(grid)
    assert grid == sorted(grid)
    assert grid[0] > 0
    assert grid[-1] <= 1
    for c, ece in found.table:
        of_c = expected_calibration_error(transformed(probs, transform, c).amax(-1), correct).item()  # type: ignore[arg-type]
        assert ece == pytest.approx(of_c, abs=1e-9)
        assert found.ece <= of_c + 1e-12
    best_coarse = min((ece, c) for c, ece in found.table if c in COARSE)[1]
    fine = [c for c in grid if c not in COARSE]
    assert len(fine) >= 4
    assert all(abs(c - best_coarse) < 0.1 and abs(c * 50 - round(c * 50)) < 1e-6 for c in fine)


def test_fitting_calibrates_an_over_confident_teacher() -> None:
    """Right 70 % of the time, nearly sure always: re-calibrated it says about 0.7."""
    probs = torch.tensor([[0.97, 0.01, 0.005, 0.005, 0.005]]).expand(1000, 5)
    correct = torch.arange(1000) % 10 < 7
    found = fit_constant(probs, correct)
    assert found.plain_ece == pytest.approx(0.97 / 0.995 - 0.7, abs=1e-3)
    assert found.ece < 0.02
    assert softmax_of_prob(probs[:1], found.c).amax().item() == pytest.approx(0.7, abs=0.02)


def test_of_equal_constants_the_smallest_is_taken() -> None:
    """One kept entry: every constant gives it the probability 1."""
    found = fit_constant(torch.full((10, 1), 0.5), torch.ones(10, dtype=torch.bool))
    assert found.c == min(c for c, _ in found.table) == 0.02


def test_what_has_no_constant_is_refused() -> None:
    for transform in ("none", "label_smoothing"):
        with pytest.raises(InputError, match="no c"):
            fit_constant(kept(), torch.ones(64), transform)  # type: ignore[arg-type]


def test_answers_are_the_first_targets_of_segments() -> None:
    # two segments (prompt of 2, answer of 2; prompt of 1, answer of 1), padding; a row with no target in its first segment
    targets = torch.tensor([[IGNORE, IGNORE, 7, 8, IGNORE, 9, IGNORE, IGNORE], [IGNORE, IGNORE, IGNORE, 4, 5, 6, IGNORE, IGNORE]])
    segments = torch.tensor([[0, 0, 0, 0, 1, 1, -1, -1], [0, 0, 0, 1, 1, 1, 1, -1]])
    ids = torch.zeros_like(targets)
    found = answer_positions(TokenBatch(ids, ids, segments, targets))
    assert found.nonzero().tolist() == [[0, 2], [0, 5], [1, 3]]


def test_answers_of_whole_rows() -> None:
    rows = torch.zeros(3, 2, 4, dtype=torch.int64)
    rows[1, 1, :2] = IGNORE
    assert answer_positions(TokenBatch.from_inputs(rows)).nonzero().tolist() == [[0, 0], [1, 2], [2, 0]]
