"""What the claim of `capacity_gap` compares: planted laws, the curve over teachers, and that all arms' students are of one size."""

from pathlib import Path

import pytest

from limbeck.claims import read
from limbeck.claims.studies.capacity_gap import curve, of_law, planted_law
from limbeck.language.capacity_law import PAPER
from limbeck.language.decoder import decoder

CLAIM = Path(__file__).resolve().parents[2] / "recipes" / "claims" / "capacity_gap.yaml"
TEXT = {"name": "python_manual", "tokenizer": "bytes", "length": 16}


def test_a_planted_law_is_found_and_noise_stays_in_its_interval() -> None:
    found = planted_law(trials=40, draws=200)
    for how in ("surface", "bins"):
        assert found[f"slope_{how}"] == pytest.approx(2.5)
        assert found[f"intercept_{how}"] == pytest.approx(0, abs=1e-9)
        assert found[f"r2_{how}"] == pytest.approx(1)
        assert found[f"covered_{how}"] >= 0.875
        assert 0 < found[f"width_{how}"] < 2
    assert planted_law(1.5, trials=1, draws=20)["slope_surface"] == pytest.approx(1.5)


def test_the_curve_has_a_student_for_every_larger_teacher_and_a_law() -> None:
    found = curve(1, TEXT, layers=1, widths=(16, 24, 32), students=(2000, 2800, 5000), teacher_steps=1, student_steps=1, test_rows=64)
    teachers = {name.removeprefix("teacher_"): value for name, value in found.items() if name.startswith("teacher_")}
    sizes = [round(decoder(256, (2, 16), layers=1, width=width, heads=width // 8).shape.layer_parameters / 1e3) for width in (16, 24, 32)]
    assert [int(name) for name in teachers] == sizes
    pairs = sorted(f"s{S}_t{T}" for T in sizes for S in (2, 3, 5) if S < T or (S, T) == (3, 3))  # 2,800 < 3,376
    assert sorted(name for name in found if name.startswith("s") and "_t" in name) == pairs
    assert {"slope", "slope_low", "slope_high", "intercept", "explained"} <= set(found)
    assert sum(name.startswith("best_") for name in found) == sum(name.startswith("inside_") for name in found) == 3
    assert all(3 < value < 20 for value in teachers.values())  # bits a character, at the start of training


def test_a_law_without_an_interval_has_none() -> None:
    told = of_law(PAPER)
    assert told["slope"] == 2.498
    assert told["slope_low"] != told["slope_low"]  # not a number


def test_arms_differ_in_what_they_compare_alone() -> None:
    spec = read(CLAIM)
    recipes = spec.recipes(quick=False)
    for name, recipe in recipes.items():
        same = {key: value for key, value in recipe.items() if key not in ("method", "train")}
        assert same == {key: value for key, value in recipes["pruned"].items() if key not in ("method", "train")}, name
        assert recipe["train"]["steps"] == (0 if name.endswith("untrained") else recipes["pruned"]["train"]["steps"])
        assert "parameters" not in recipe["method"]  # so that all are as large as the recipe's student
        assert "sparsity" not in recipe["method"]
    args = {key: value for key, value in recipes["pruned"]["student"]["model"].items() if key != "name"}
    assert decoder(27, (2, 64), **args).shape.layer_parameters == 30_168
