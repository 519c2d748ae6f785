"""The stream of classes, herding, the exemplar memory."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from limbeck.errors import InputError
from limbeck.methods.classifiers.exemplars_part import ExemplarMemory, class_stream, herding

fast = settings(deadline=None, max_examples=40)


def features(seed: int, count: int, width: int) -> torch.Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed)).relu()


def slow_distances(features_nd: torch.Tensor, picks: list[int]) -> dict[int, float]:
    """Distance of the mean from what the running mean becomes with each free sample (1611.07725, algorithm 4), in plain numbers."""
    rows = [[v / sum(u * u for u in row) ** 0.5 for v in row] for row in features_nd.double().tolist()]
    mean = [sum(column) / len(rows) for column in zip(*rows, strict=True)]
    distances = {}
    for free in set(range(len(rows))) - set(picks):
        running = [sum(column) / (len(picks) + 1) for column in zip(*(rows[k] for k in [*picks, free]), strict=True)]
        distances[free] = sum((a - b) ** 2 for a, b in zip(mean, running, strict=True)) ** 0.5
    return distances


@fast
@given(st.integers(0, 10**6), st.integers(1, 14), st.integers(3, 8), st.integers(0, 16))
def test_herding_takes_the_best_free_sample_each_time(seed, count, width, wanted):
    x = features(seed, count, width)
    x[x.sum(1) == 0] = 1.0
    picks = herding(x, wanted).tolist()
    assert len(picks) == min(count, wanted)
    for k, pick in enumerate(picks):
        distances = slow_distances(x, picks[:k])
        assert distances[pick] <= min(distances.values()) + 1e-9


def test_herding_starts_at_the_nearest_to_the_mean_and_a_shorter_choice_is_a_prefix():
    x = features(1, 200, 8)
    unit = torch.nn.functional.normalize(x, dim=1)
    assert herding(x, 20)[0] == (unit - unit.mean(0)).norm(dim=1).argmin()
    assert torch.equal(herding(x, 20)[:7], herding(x, 7))


def test_herding_does_not_depend_on_the_length_of_the_features_and_survives_dead_ones():
    x = features(2, 50, 8)
    assert torch.equal(herding(x, 10), herding(x * torch.linspace(0.5, 4, 50)[:, None], 10))
    assert sorted(herding(torch.zeros(4, 3), 9).tolist()) == [0, 1, 2, 3]


def test_herding_follows_the_mean_better_than_the_first_samples_do():
    x = torch.nn.functional.normalize(features(3, 300, 16), dim=1)
    mean = x.mean(0)
    assert (x[herding(x, 10)].mean(0) - mean).norm() < 0.5 * (x[:10].mean(0) - mean).norm()


@fast
@given(st.integers(0, 40), st.lists(st.integers(1, 3), min_size=1, max_size=5), st.integers(0, 1000))
def test_the_memory_keeps_its_budget_equal_shares_and_prefixes(budget, sizes, seed):
    memory, seen = ExemplarMemory(budget), 0
    labels = torch.arange(sum(sizes)).repeat_interleave(12)
    ids = 1000 + torch.arange(len(labels))
    x = features(seed, len(labels), 5)
    for size in sizes:
        before, new = memory.lists, range(seen, seen + size)
        own = (labels >= seen) & (labels < seen + size)
        seen += size
        memory.update(x[own], ids[own], labels[own], new, seen)
        assert len(memory.lists) == seen
        assert len(memory.indices()) <= budget
        assert {len(kept) for kept in memory.lists} == {min(budget // seen, 12)}
        for kept, earlier in zip(memory.lists, before, strict=False):
            assert torch.equal(kept, earlier[: len(kept)])
        for label, kept in enumerate(memory.lists):
            assert len(set(kept.tolist())) == len(kept)
            assert (labels[kept - 1000] == label).all()
    assert torch.equal(memory.indices(1), memory.lists[0])


def test_a_stream_covers_all_classes_once_and_follows_the_seed():
    stream = class_stream("seed", 3, 10, seed=5)
    assert sorted(stream.order) == list(range(10))
    assert stream.spans == [(0, 3), (3, 6), (6, 9), (9, 10)]
    assert [stream.order[p] for p in stream.positions] != stream.order
    assert all(stream.order[position] == label for label, position in enumerate(stream.positions.tolist()))
    assert stream == class_stream("seed", 3, 10, seed=5) != class_stream("seed", 3, 10, seed=6)
    assert class_stream("natural", (4, 2), 6, seed=5).order == (0, 1, 2, 3, 4, 5)
    assert class_stream((2, 0, 1), 1, 3, seed=5).samples(torch.tensor([0, 1, 2, -100, 2]), 0, 1).tolist() == [2, 4]


def test_a_wrong_order_or_wrong_sizes_are_refused():
    with pytest.raises(InputError, match=r"method\.class_order.*each class from 0 to 2 once"):
        class_stream((0, 1, 1), 1, 3, seed=0)
    with pytest.raises(InputError, match=r"method\.classes_per_step.*5 classes in all, the data 6"):
        class_stream("natural", (2, 3), 6, seed=0)
