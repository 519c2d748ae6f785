"""FKD's label types, FerKD's regions and labels, SelfMix: the invariants of the sheet."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from limbeck.contract import IGNORE
from limbeck.errors import InputError
from limbeck.methods.classifiers import ferkd_part as part

C = 10
SETTINGS = settings(deadline=None, max_examples=25)
SEEDS = st.integers(0, 2**31)
TYPES = ("full", "hard", "smoothing", "marginal_smoothing", "marginal_renorm")


def drawn(seed: int, rows: int = 7, classes: int = C, sharp: float = 3.0) -> Tensor:
    return torch.softmax(sharp * torch.randn(rows, classes, generator=torch.Generator().manual_seed(seed), dtype=torch.float64), -1)


def through(q: Tensor, label_type: str, k: int = 5) -> Tensor:
    return part.recover(part.quantise(q, label_type, k), label_type, q.shape[-1])


# ---- label types ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("label_type", TYPES)
@given(SEEDS, st.integers(1, C))
@SETTINGS
def test_recovered_labels_are_distributions_with_the_same_top_class(label_type: str, seed: int, k: int) -> None:
    q = drawn(seed)
    found = through(q, label_type, k)
    assert found.shape == q.shape
    assert (found >= 0).all()
    torch.testing.assert_close(found.sum(-1), torch.ones(7, dtype=torch.float64))
    assert torch.equal(found.argmax(-1), q.argmax(-1))


@given(SEEDS, st.integers(1, C))
@SETTINGS
def test_marginal_smoothing_keeps_the_top_values_exactly_and_spreads_the_rest_over_the_other_classes(seed: int, k: int) -> None:
    q = drawn(seed)
    found, (values, indices) = through(q, "marginal_smoothing", k), q.topk(k, -1)
    assert torch.equal(found.gather(-1, indices), values)
    if k < C:
        rest = torch.ones_like(q).scatter(-1, indices, 0).bool()
        expected = ((1 - values.sum(-1)) / (C - k))[:, None].expand(-1, C - k)
        torch.testing.assert_close(found[rest].view(7, -1), expected)


@given(SEEDS, st.integers(1, C - 1))
@SETTINGS
def test_marginal_smoothing_returns_what_has_k_entries_and_a_uniform_rest(seed: int, k: int) -> None:
    top = drawn(seed, classes=k + 1).sort(-1, descending=True).values  # the last one is shared by the rest: never above the others
    q = torch.cat((top[:, :k], top[:, k:].expand(-1, C - k) / (C - k)), -1)
    q = q[:, torch.randperm(C, generator=torch.Generator().manual_seed(seed))]
    torch.testing.assert_close(through(q, "marginal_smoothing", k), q)


@pytest.mark.parametrize("k", [1, 5, C])
@pytest.mark.parametrize("label_type", ["full", "smoothing", "marginal_smoothing"])
def test_uniform_labels_stay_uniform(label_type: str, k: int) -> None:
    q = torch.full((3, C), 1 / C, dtype=torch.float64)
    torch.testing.assert_close(through(q, label_type, k), q)


def test_all_classes_kept_is_the_label_itself() -> None:
    q = drawn(0).float()
    for label_type in ("full", "marginal_smoothing"):
        assert torch.equal(through(q, label_type, C), q)
    torch.testing.assert_close(through(q, "marginal_renorm", C), q)


@given(SEEDS)
@SETTINGS
def test_hard_is_smoothing_with_value_1_and_smoothing_is_marginal_smoothing_of_one(seed: int) -> None:
    q = drawn(seed)
    stored = part.quantise(q, "smoothing")
    ones = part.StoredLabels(stored.indices, torch.ones_like(stored.values))
    assert torch.equal(part.recover(ones, "smoothing", C), through(q, "hard"))
    assert torch.equal(through(q, "hard"), torch.nn.functional.one_hot(q.argmax(-1), C).double())
    assert torch.equal(through(q, "smoothing"), through(q, "marginal_smoothing", 1))


@given(SEEDS, st.integers(1, C))
@SETTINGS
def test_renormalising_returns_what_lives_on_k_classes_and_scales_the_others_alike(seed: int, k: int) -> None:
    q = torch.cat((drawn(seed, classes=k), torch.zeros(7, C - k, dtype=torch.float64)), -1)
    torch.testing.assert_close(through(q, "marginal_renorm", k), q)
    q, (values, indices) = drawn(seed), drawn(seed).topk(k, -1)
    torch.testing.assert_close(through(q, "marginal_renorm", k).gather(-1, indices), values / values.sum(-1, keepdim=True))


def test_indices_are_whole_numbers_beyond_float16() -> None:
    q = torch.zeros(1, 5000).index_fill(1, torch.tensor([4097]), 1.0)
    stored = part.quantise(q, "marginal_smoothing", 3)
    assert stored.indices.dtype == torch.int64
    assert stored.indices[0, 0] == 4097
    assert (stored.values.diff(dim=-1) <= 0).all()


@pytest.mark.parametrize("k", [0, C + 1])
def test_impossible_k_is_refused(k: int) -> None:
    with pytest.raises(InputError, match="largest of 10 classes"):
        part.quantise(drawn(0), "marginal_renorm", k)
    part.quantise(drawn(0), "hard", k)  # k does not count there


# ---- regions -------------------------------------------------------------------------------------------------------------


def test_regions_have_the_papers_borders() -> None:
    s = torch.tensor([0.0, 0.1, 0.2, 0.49, 0.5, 0.9, 0.95])
    D, H, S = part.DISCARD, part.HARD, part.SOFT
    assert part.crop_regions(s, low=0.2, middle=0.5, top=0.9).tolist() == [D, D, H, H, S, S, D]
    assert part.crop_regions(s, 0.0, 0.0, 1.0).tolist() == [S] * 7
    assert part.crop_regions(s, 0.0, 1.1, 1.0).tolist() == [H] * 7
    assert part.crop_regions(s, 0.2, 0.2, 1.0).tolist() == [D, D, S, S, S, S, S]


@given(SEEDS, st.floats(0, 1), st.floats(0, 2), st.floats(0, 1))
@SETTINGS
def test_the_regions_partition_the_scores(seed: int, low: float, middle: float, top: float) -> None:
    s = torch.rand(50, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    found = part.crop_regions(s, low, middle, top)
    discard = (s < low) | (s > top)
    hard, soft = (s >= low) & (s <= top) & (s < middle), (s >= low) & (s <= top) & (s >= middle)
    assert torch.equal(found == part.DISCARD, discard)
    assert torch.equal(found == part.HARD, hard)
    assert torch.equal(found == part.SOFT, soft)
    assert ((discard.int() + hard.int() + soft.int()) == 1).all()


def test_scores_are_the_largest_probability_or_the_labels() -> None:
    q = torch.tensor([[0.2, 0.7, 0.1], [0.5, 0.3, 0.2], [0.1, 0.1, 0.8]])
    y = torch.tensor([0, 0, IGNORE])
    torch.testing.assert_close(part.crop_scores(q, y), torch.tensor([0.7, 0.5, 0.8]))
    torch.testing.assert_close(part.crop_scores(q, y, "label"), torch.tensor([0.2, 0.5, 0.8]))
    torch.testing.assert_close(part.crop_scores(q, None, "label"), torch.tensor([0.7, 0.5, 0.8]))
    assert part.crop_scores(torch.tensor([[1 + 2e-7, 0.0]]), None).item() == 1.0


def test_quantiles_are_values_with_at_most_that_share_below() -> None:
    s = torch.randperm(101, generator=torch.Generator().manual_seed(0)).view(1, 101).float()
    assert [part.quantile(s, share) for share in (0.0, 0.05, 0.5, 0.99, 1.0)] == [0, 5, 50, 99, 100]
    assert part.quantile(s, 1.5) == float("inf")
    assert part.quantile(torch.full((3, 4), 0.5), 0.99) == 0.5


def test_every_image_keeps_a_crop() -> None:
    D, H, S = part.DISCARD, part.HARD, part.SOFT
    s = torch.tensor([[0.1, 0.05], [0.3, 0.7], [0.3, 0.2], [0.05, 0.1], [0.3, 0.7]])
    region, bare = part.keep_a_crop(part.crop_regions(s, 0.2, 0.5, 1.0), s, torch.tensor([True, True, False, False, False]))
    assert region.tolist() == [[H, D], [H, S], [S, D], [D, S], [D, S]]
    assert bare == 3
    region, bare = part.keep_a_crop(part.crop_regions(s[:1], 0.0, 0.0, 0.02), s[:1], torch.tensor([True]))
    assert region.tolist() == [[H, D]]
    assert bare == 1


# ---- labels --------------------------------------------------------------------------------------------------------------


def test_only_hard_regions_get_the_smoothed_truth() -> None:
    q, y = drawn(1, rows=3), torch.tensor([4, 2, IGNORE])
    found = part.adapted_labels(q, y, torch.tensor([part.HARD, part.SOFT, part.SOFT]), epsilon=0.1)
    assert torch.equal(found[1:], q[1:])
    expected = torch.full((C,), 0.1 / 9, dtype=torch.float64)
    expected[4] = 0.9
    torch.testing.assert_close(found[0], expected, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(found.sum(-1), torch.ones(3, dtype=torch.float64), rtol=1e-6, atol=1e-6)
    assert torch.equal(part.smoothed_truth(y[:2], C, 0.0), torch.nn.functional.one_hot(y[:2], C).float())


# ---- SelfMix -------------------------------------------------------------------------------------------------------------


def test_mates_are_the_next_crop_of_the_same_image() -> None:
    assert part.same_image_mates(torch.tensor([7, 7, 7, 7, 3, 3, 5])).tolist() == [1, 2, 3, 0, 5, 4, 6]
    assert part.same_image_mates(torch.tensor([7, 3, 5])).tolist() == [0, 1, 2]
    assert part.same_image_mates(torch.tensor([7, 7])).tolist() == [1, 0]
    assert part.same_image_mates(torch.tensor([], dtype=torch.int64)).tolist() == []


@pytest.mark.parametrize("images", [2, 3, 8])
def test_ordinary_mates_are_of_another_image(images: int) -> None:
    ids = torch.arange(images).repeat_interleave(4)
    mates = part.other_image_mates(ids)
    assert sorted(mates.tolist()) == list(range(len(ids)))
    assert (ids[mates] != ids).all()


@given(SEEDS, st.floats(0, 1), st.floats(0, 1, exclude_max=True), st.floats(0, 1, exclude_max=True))
@SETTINGS
def test_mixing_a_crop_with_itself_or_keeping_all_is_the_identity(seed: int, keep: float, row: float, column: float) -> None:
    noise = torch.Generator().manual_seed(seed)
    x, y, own, other = torch.randn(4, 3, 8, 8, generator=noise), drawn(seed, 4), torch.arange(4), torch.arange(4).roll(1)
    for mates, share in ((own, keep), (other, 1.0)):
        for mixed in (part.mixup(x, y, mates, share), part.cutmix(x, y, mates, share, row, column)):
            assert torch.equal(mixed[0], x)
            assert torch.equal(mixed[1], y)


@given(SEEDS, st.floats(0, 1), st.floats(0, 1, exclude_max=True), st.floats(0, 1, exclude_max=True))
@SETTINGS
def test_labels_are_mixed_by_the_exact_share(seed: int, keep: float, row: float, column: float) -> None:
    y, mates = drawn(seed, 4), torch.arange(4).roll(1)
    x = torch.arange(4.0).view(4, 1, 1, 1).expand(4, 1, 8, 12)
    mixed, labels = part.cutmix(x, y, mates, keep, row, column)
    share = (mixed == x).double().mean((1, 2, 3))
    assert (share == share[0]).all()
    assert share[0] >= keep - 1e-9
    torch.testing.assert_close(labels, share[0] * y + (1 - share[0]) * y[mates])
    mixed, labels = part.mixup(x, y, mates, keep)
    torch.testing.assert_close(mixed, keep * x + (1 - keep) * x[mates])
    torch.testing.assert_close(labels, keep * y + (1 - keep) * y[mates])
    torch.testing.assert_close(labels.sum(-1), torch.ones(4, dtype=torch.float64))


def test_crops_with_equal_labels_keep_them() -> None:
    y = drawn(0, 1).expand(4, C)
    x = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    for mixed in (part.mixup(x, y, torch.arange(4).roll(1), 0.3), part.cutmix(x, y, torch.arange(4).roll(1), 0.3, 0.4, 0.6)):
        assert torch.equal(mixed[1], y)
        assert not torch.equal(mixed[0], x)


def test_cutmix_pastes_the_wanted_box() -> None:
    x = torch.stack((torch.zeros(1, 8, 8), torch.ones(1, 8, 8)))
    mixed, labels = part.cutmix(x, torch.eye(2), torch.tensor([1, 0]), keep=0.75, row=0.5, column=0.5)
    expected = torch.zeros(8, 8)
    expected[2:6, 2:6] = 1
    assert torch.equal(mixed[0, 0], expected)
    assert labels.tolist() == [[0.75, 0.25], [0.25, 0.75]]
    mixed, labels = part.cutmix(x, torch.eye(2), torch.tensor([1, 0]), keep=0.75, row=0.0, column=0.99)
    assert mixed[0, 0].sum() == 2 * 3
    assert labels[0, 1] == 6 / 64
    mixed, labels = part.cutmix(x, torch.eye(2), torch.tensor([1, 0]), keep=0.0, row=0.5, column=0.5)
    assert (mixed[0] == 1).all()
    assert labels.tolist() == [[0, 1], [1, 0]]


def test_cutmix_of_features_is_refused() -> None:
    with pytest.raises(InputError, match="cutmix needs images"):
        part.cutmix(torch.zeros(2, 5), torch.eye(2), torch.tensor([1, 0]), 0.5, 0.5, 0.5)
