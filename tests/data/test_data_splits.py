import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from limbeck.contract import IGNORE, Data
from limbeck.data import ArrayData, Splits, View, WrappedData, corrupt_labels, hide_labels, hold_out, stratified_subset, subset, with_targets
from limbeck.data.splits import stratified_order
from limbeck.errors import InputError


def _data(targets: Tensor | None, count: int | None = None) -> ArrayData:
    count = len(targets) if targets is not None else count or 0
    return ArrayData(torch.arange(float(count))[:, None], targets)


def _marks(data: Data) -> list[int]:
    """Which samples of `_data` a data set holds, in order."""
    return data.fetch(torch.arange(len(data)))[0][:, 0].long().tolist()


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(0, 4), min_size=1, max_size=120), st.integers(0, 3))
def test_every_prefix_of_the_stratified_order_is_in_proportion(targets: list[int], seed: int) -> None:
    targets_N = torch.tensor(targets)
    order = stratified_order(targets_N, seed, "test")
    assert sorted(order.tolist()) == list(range(len(targets)))
    share = torch.nn.functional.one_hot(targets_N, 5).double().mean(0)
    for k in range(1, len(targets) + 1):
        counts = torch.bincount(targets_N[order[:k]], minlength=5)
        assert (counts - share * k).abs().max() <= 2.0
    assert torch.equal(order, stratified_order(targets_N, seed, "test"))


def test_balanced_classes_stay_balanced_within_one_and_the_order_is_random() -> None:
    targets_N = torch.arange(10).repeat(50)
    orders = [stratified_order(targets_N, seed, "test") for seed in (0, 1)]
    for order in orders:
        for k in range(1, 500):
            counts = torch.bincount(targets_N[order[:k]], minlength=10)
            assert counts.max() - counts.min() <= 1
    assert not torch.equal(*orders)
    assert orders[0][:10].tolist() != sorted(orders[0][:10].tolist())


def test_hold_out_is_a_stratified_partition() -> None:
    data = _data(torch.arange(4).repeat_interleave(25))
    rest, held = hold_out(data, 20, seed=3)
    assert sorted(_marks(rest) + _marks(held)) == list(range(100))
    assert _marks(rest) == sorted(_marks(rest))
    assert held.targets is not None
    assert torch.bincount(held.targets).tolist() == [5, 5, 5, 5]
    assert _marks(hold_out(data, 20, seed=3)[1]) == _marks(held) != _marks(hold_out(data, 20, seed=4)[1])


def test_without_targets_the_split_is_plainly_random() -> None:
    rest, held = hold_out(_data(None, 30), 10, seed=0)
    assert sorted(_marks(rest) + _marks(held)) == list(range(30))
    assert _marks(held) != list(range(10))


def test_a_smaller_subset_is_a_prefix_of_a_larger_one() -> None:
    data = _data(torch.arange(3).repeat(40))
    small, large = stratified_subset(data, 12, seed=1), stratified_subset(data, 60, seed=1)
    assert _marks(large)[:12] == _marks(small)
    assert small.targets is not None
    assert torch.bincount(small.targets).tolist() == [4, 4, 4]
    assert _marks(stratified_subset(data, 12, seed=2)) != _marks(small)
    assert sorted(_marks(stratified_subset(data, 120, seed=1))) == list(range(120))


def test_hidden_labels_keep_a_stratified_nested_choice_of_those_there_were() -> None:
    targets = torch.arange(5).repeat(20)
    targets[:10] = IGNORE
    data = _data(targets)
    few, many = hide_labels(data, 10, seed=0).targets, hide_labels(data, 45, seed=0).targets
    assert few is not None
    assert many is not None
    kept = few != IGNORE
    assert kept.sum() == 10
    assert torch.equal(few[kept], targets[kept])
    assert torch.bincount(few[kept]).tolist() == [2] * 5
    assert (many[kept] == few[kept]).all()
    assert (many != IGNORE).sum() == 45
    assert (many[:10] == IGNORE).all()
    assert _marks(hide_labels(data, 10, seed=0)) == list(range(100))


def test_wrong_labels_are_wrong_as_many_as_asked_and_of_every_other_class() -> None:
    targets = torch.arange(5).repeat(200)
    targets[:100] = IGNORE
    data = _data(targets)
    found = corrupt_labels(data, 0.3, seed=0).targets
    changed = found != targets
    assert changed.sum() == 270
    assert (found[:100] == IGNORE).all()
    shifts = torch.bincount((found - targets)[changed] % 5, minlength=5)
    assert shifts[0] == 0
    assert shifts[1:].min() > 40
    assert torch.equal(found, corrupt_labels(data, 0.3, seed=0).targets)
    assert not torch.equal(found, corrupt_labels(data, 0.3, seed=1).targets)
    for impossible in (_data(None, 5), _data(torch.zeros(5, dtype=torch.int64))):
        with pytest.raises(InputError, match="two classes or more"):
            corrupt_labels(impossible, 0.3, seed=0)


class _Noisy(torch.utils.data.Dataset[tuple[Tensor, int]]):
    def __len__(self) -> int:
        return 12

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        return torch.cat((torch.tensor([float(i)]), torch.rand(1))), i % 3


def test_any_data_can_be_divided_and_relabelled_through_views() -> None:
    data = WrappedData(_Noisy())
    part = subset(data, torch.tensor([7, 2, 5]))
    assert isinstance(part, View)
    assert isinstance(part, Data)
    assert len(part) == 3
    assert part.targets is not None
    assert part.targets.tolist() == [1, 2, 2]
    ids = torch.tensor([2, 0])
    raw, targets = part.fetch(ids, seed=4, epoch=2)
    assert targets is not None
    assert targets.tolist() == [2, 1]
    assert raw[:, 0].tolist() == [5.0, 7.0]
    assert torch.equal(raw, data.fetch(torch.tensor([5, 7]), seed=4, epoch=2)[0])  # the sample's own randomness
    assert torch.equal(part.prepare(raw), raw)
    other = with_targets(part, torch.tensor([0, IGNORE, 1]))
    fetched = other.fetch(ids)[1]
    assert fetched is not None
    assert fetched.tolist() == [1, 0]
    assert other.targets is not None
    assert other.targets.tolist() == [0, IGNORE, 1]
    hidden = hide_labels(data, 3, seed=0)
    assert hidden.targets is not None
    assert (hidden.targets != IGNORE).sum() == 3


@pytest.mark.parametrize("count", [-1, 0, 30, 31, 10**12])
def test_impossible_counts_are_refused(count: int) -> None:
    data = _data(torch.zeros(30, dtype=torch.int64))
    with pytest.raises(InputError, match="between 1 and 29"):
        hold_out(data, count, seed=0)
    if count != 30:
        with pytest.raises(InputError, match="between 1 and 30"):
            stratified_subset(data, count, seed=0)
        with pytest.raises(InputError, match="between 1 and 30"):
            hide_labels(data, count, seed=0)


def test_there_must_be_labels_to_hide() -> None:
    with pytest.raises(InputError, match="no labels"):
        hide_labels(_data(None, 5), 1, seed=0)


def test_splits_know_their_width_and_shape() -> None:
    images = torch.zeros(4, 3, 8, 6, dtype=torch.uint8)
    named = Splits(ArrayData(images, torch.zeros(4, dtype=torch.int64), ["a", "b", "c"]), ArrayData(images))
    assert named.num_classes == 3
    assert named.input_shape == (3, 8, 6)
    wrapped = WrappedData(_Noisy())
    assert Splits(wrapped, wrapped).num_classes == 3
    assert Splits(wrapped, wrapped).input_shape == (2,)
    with pytest.raises(InputError, match="neither"):
        _ = Splits(ArrayData(images), ArrayData(images)).num_classes
