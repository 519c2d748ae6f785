"""What AST's claim says about experts: test accuracy, the largest step and the bending of their way."""

import math

import pytest

from limbeck.claims.studies.ast import expert_quality
from limbeck.errors import InputError

DATA = {"source": {"name": "digits"}, "train_size": 100, "test_size": 50}
MODEL = {"name": "mlp", "hidden": [8]}
EXPERTS = {"count": 1, "epochs": 3, "batch_size": 50, "lr": 0.05, "augment": None}


def found(seed: int = 0, **knobs) -> dict[str, float]:
    return expert_quality(DATA, MODEL, EXPERTS | knobs, seed=seed)


@pytest.fixture(scope="module")
def plain() -> dict[str, float]:
    return found()


def test_it_is_a_function_of_the_seed(plain) -> None:
    assert found() == plain
    assert found(1) != plain
    assert set(plain) == {"expert_accuracy", "ln_largest_step", "ln_roughness"}


def test_half_the_loss_at_twice_the_rate_is_the_same_expert(plain) -> None:
    half = found(loss_scale={"start": 0.5, "step": 0.0}, lr=0.1)
    for name, value in plain.items():
        assert half[name] == pytest.approx(value, abs=1e-3)


def test_a_slower_expert_takes_smaller_and_more_even_steps_and_knows_less(plain) -> None:
    slow, fast = found(lr=0.001), plain
    assert slow["ln_largest_step"] < fast["ln_largest_step"] - math.log(10)
    assert slow["ln_roughness"] < fast["ln_roughness"]
    assert slow["expert_accuracy"] < fast["expert_accuracy"]


def test_a_wrong_section_is_named() -> None:
    with pytest.raises(InputError, match="epochz"):
        found(epochz=3)
