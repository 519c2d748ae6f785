"""What the claim of Robust Active Distillation stands on beside trainings: the game, the degraded teacher, data apart, the truth."""

import copy

import pytest
import torch

from limbeck.claims.studies import robust_active as study
from limbeck.data import ArrayData
from limbeck.data.sources import FASHION_MNIST_FOLDER, fashion_mnist
from limbeck.data.splits import hide_labels, hold_out, stratified_subset
from limbeck.errors import InputError
from limbeck.teachers import as_teacher

needs_images = pytest.mark.skipif(not FASHION_MNIST_FOLDER.is_dir(), reason="Fashion-MNIST is not installed")


def test_the_game_is_won_for_every_m_and_agrees_with_a_solver() -> None:
    found = study.game(seed=3, items=30, budget=4)
    assert found["solver_deviation"] < 1e-12
    for rival in ("uniform", "proportional", "top"):
        assert 0 <= found[f"mean_ratio_{rival}"] < 0.8
    assert found["worst_ratio_top"] == pytest.approx(1.0)  # m = 0: the same
    assert max(found["worst_ratio_uniform"], found["worst_ratio_proportional"]) < 1
    assert found == study.game(seed=3, items=30, budget=4)
    assert found != study.game(seed=4, items=30, budget=4)


def degraded(share: float, seed: int = 0) -> study.Degraded:
    torch.manual_seed(0)
    return study.degraded_cnn([4, 4], num_classes=10, input_shape=(1, 8, 8), share=share, seed=seed)


def test_a_degraded_teacher_is_plain_while_it_trains() -> None:
    network, x = degraded(1.0), torch.randn(16, 1, 8, 8)
    plain = copy.deepcopy(network.network)
    assert torch.equal(network.train()(x), plain.train()(x))
    assert not torch.equal(network.eval()(x), plain.eval()(x))
    assert torch.equal(degraded(0.0).eval()(x), degraded(0.0).network.eval()(x))


def test_a_degraded_teacher_is_wrong_on_a_fixed_share_of_the_inputs_whatever_the_batch() -> None:
    network, x = degraded(0.2).eval(), torch.randn(4000, 1, 8, 8)
    with torch.no_grad():
        plain, answers = network.network(x), network(x)
        order = torch.randperm(4000)
        again = torch.cat([as_teacher(network)(part) for part in x[order].split(77)])
    torch.testing.assert_close(again, answers[order])
    hit = answers.argmax(1) != plain.argmax(1)
    assert torch.equal(again.argmax(1) != plain[order].argmax(1), hit[order])
    assert abs(float(hit.double().mean()) - 0.2) < 4 * (0.16 / 4000) ** 0.5
    assert torch.equal(answers[~hit], plain[~hit])
    assert torch.equal(answers[hit].sort(1).values, plain[hit].sort(1).values)  # as sure as before
    moved = (answers.argmax(1) - plain.argmax(1))[hit] % 10
    assert set(moved.tolist()) == set(range(1, 10))  # any other class
    other = degraded(0.2, seed=1).eval()
    other.network = network.network
    assert not torch.equal(other(x).argmax(1) != plain.argmax(1), hit)


def test_a_teacher_that_is_mistaken_when_unsure_takes_one_class_for_the_next_there_alone() -> None:
    torch.manual_seed(0)
    network, x = study.cnn_mistaken_when_unsure([4, 4], 10, (1, 8, 8), below=0.5), torch.randn(500, 1, 8, 8)
    assert torch.equal(network.train()(x), network.network(x))
    with torch.no_grad():
        plain = network.eval().network(x)
        sure = plain.softmax(1).amax(1)
        network.below = float(sure.median())
        answers = network(x)
    unsure = sure < network.below
    assert 0.4 < float(unsure.double().mean()) < 0.6
    assert torch.equal(answers[~unsure], plain[~unsure])
    assert torch.equal(answers[unsure].argmax(1), (plain[unsure].argmax(1) + 1) % 10)
    assert torch.equal(answers.sort(1).values, plain.sort(1).values)


def test_content_keys_depend_on_the_content_alone() -> None:
    x = torch.randint(0, 256, (50, 1, 5, 5), dtype=torch.uint8)
    keys = study.content_keys(x)
    assert keys.shape == (50,)
    assert torch.equal(study.content_keys(x[10:20]), keys[10:20])
    assert len(keys.unique()) == 50
    changed = x.clone()
    changed[:, 0, 4, 4] ^= 1
    assert not bool((study.content_keys(changed) == keys).any())
    assert study.content_keys(x.float()).shape == (50,)


@needs_images
def test_the_truth_is_what_was_hidden() -> None:
    whole = stratified_subset(fashion_mnist().train, 700, seed=0)
    rest, _ = hold_out(whole, 50, seed=0)
    truth = study.fashion_mnist_truth(hide_labels(rest, 30, seed=5))
    assert torch.equal(truth, rest.targets)
    with pytest.raises(InputError, match="not Fashion-MNIST's"):
        study.fashion_mnist_truth(ArrayData(torch.zeros(3, 1, 28, 28, dtype=torch.uint8), torch.zeros(3, dtype=torch.int64)))


@needs_images
def test_data_apart_shares_no_sample() -> None:
    taken, apart = stratified_subset(fashion_mnist().train, 1000, seed=0), study.apart(skip=1000, count=500)
    assert len(apart.train) == 500
    assert not bool(torch.isin(study.content_keys(apart.train.inputs), study.content_keys(taken.inputs)).any())
    assert bool((torch.bincount(apart.train.targets) >= 48).all())
    with pytest.raises(InputError, match="more than there are"):
        study.apart(skip=59_900, count=200)
