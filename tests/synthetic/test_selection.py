"""Real images that stand for their class."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from limbeck.contract import IGNORE
from limbeck.errors import InputError
from limbeck.synthetic.selection import kmeans_per_class, random_per_class


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def labels_of(seed: int, classes: int = 3, each: int = 8) -> torch.Tensor:
    labels = torch.arange(classes).repeat(each)
    return labels[torch.randperm(len(labels), generator=generator(seed))]


@given(st.integers(0, 2**31), st.integers(1, 8))
def test_random_choice_is_distinct_and_of_the_right_class(seed: int, per_class: int) -> None:
    labels = labels_of(seed)
    found = random_per_class(labels, per_class, generator(seed))
    assert labels[found].tolist() == torch.arange(3).repeat_interleave(per_class).tolist()
    assert len(found.unique()) == len(found)
    assert torch.equal(found, random_per_class(labels, per_class, generator(seed)))


@settings(max_examples=8)
@given(st.integers(0, 2**31), st.integers(1, 8))
def test_kmeans_choice_is_distinct_and_of_the_right_class(seed: int, per_class: int) -> None:
    labels = labels_of(seed)
    features = torch.randn(len(labels), 2, generator=generator(seed)).round()  # many are equal
    found = kmeans_per_class(features, labels, per_class, seed)
    assert labels[found].tolist() == torch.arange(3).repeat_interleave(per_class).tolist()
    assert len(found.unique()) == len(found)
    assert torch.equal(found, kmeans_per_class(features, labels, per_class, seed))


def test_every_sample_is_drawn_equally_often() -> None:
    labels = torch.tensor([0, 1, 0, 1, 0])
    counts = torch.zeros(5)
    g = generator(0)
    for _ in range(900):
        counts[random_per_class(labels, 1, g)] += 1
    assert counts[[0, 2, 4]].sum() == counts[[1, 3]].sum() == 900
    assert (counts[[0, 2, 4]] - 300).abs().max() < 60
    assert (counts[[1, 3]] - 450).abs().max() < 60


def test_kmeans_finds_the_sample_in_the_middle_of_each_clump() -> None:
    offsets = torch.tensor([[0.0, 0.0], [1.0, 0.0], [-1.0, 0.1], [0.1, 1.0], [0.0, -1.0]])
    clumps = torch.cat([offsets + torch.tensor(centre) for centre in ((0.0, 0.0), (30.0, 0.0), (0.0, 40.0))])
    features = torch.cat([clumps, clumps + 100])
    labels = torch.tensor([0] * 15 + [1] * 15)
    found = kmeans_per_class(features, labels, 3, 0)
    assert sorted(found[:3].tolist()) == [0, 5, 10]
    assert sorted(found[3:].tolist()) == [15, 20, 25]


def test_one_centre_is_the_mean() -> None:
    features = torch.tensor([[0.0], [1.0], [2.1], [9.0]])  # mean 3.0
    assert kmeans_per_class(features, torch.zeros(4, dtype=torch.int64), 1, 3).tolist() == [2]


def test_equal_samples_fill_up() -> None:
    found = kmeans_per_class(torch.zeros(6, 2), torch.zeros(6, dtype=torch.int64), 4, 0)
    assert len(found.unique()) == 4


def test_unlabelled_samples_are_left_out_and_missing_classes_are_told() -> None:
    labels = torch.tensor([IGNORE, 0, 0, 1, IGNORE, 1])
    assert sorted(random_per_class(labels, 2, generator(0)).tolist()) == [1, 2, 3, 5]
    for choose in (
        lambda n, c: random_per_class(labels, n, generator(0), num_classes=c),
        lambda n, c: kmeans_per_class(torch.rand(6, 2), labels, n, 0, num_classes=c),
    ):
        with pytest.raises(InputError, match="class 0 has 2 samples, 3 are asked for"):
            choose(3, None)
        with pytest.raises(InputError, match="class 2 has 0 samples"):
            choose(1, 3)
        with pytest.raises(InputError, match="per_class"):
            choose(0, None)


def test_features_must_be_a_table_of_numbers() -> None:
    labels = torch.zeros(4, dtype=torch.int64)
    with pytest.raises(InputError, match="features"):
        kmeans_per_class(torch.rand(4, 1, 2), labels, 1, 0)
    with pytest.raises(InputError, match="finite"):
        kmeans_per_class(torch.tensor([[0.0], [1.0], [torch.nan], [2.0]]), labels, 1, 0)
