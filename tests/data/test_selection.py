"""Kept sets: nested, of the right size, balanced, guarded; the best of each class; near-duplicates."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from limbeck.contract import IGNORE
from limbeck.data import ArrayData
from limbeck.data.selection import (
    classes_in_turn,
    difference_hash,
    easiest_first,
    hardest_first,
    kept_count,
    near_duplicate_inputs,
    near_duplicates,
    random_order,
    select,
    top_per_class,
)
from limbeck.errors import InputError

SETTINGS = settings(deadline=None, max_examples=60)
SCORES = st.lists(st.sampled_from([0.0, 1.0, 1.5, 2.0, -3.0, math.inf, -math.inf]), min_size=1, max_size=30)  # many ties
FRACTIONS = st.floats(1e-3, 1.0)
RULES = st.sampled_from(["hardest", "easiest", "random"])


def classes_of(count: int, seed: int, kinds: int = 4) -> Tensor:
    return torch.randint(-1, kinds - 1, (count,), generator=torch.Generator().manual_seed(seed))


@given(SCORES, FRACTIONS, FRACTIONS, RULES, st.booleans(), st.integers(0, 99))
@SETTINGS
def test_kept_sets_are_nested_sorted_and_of_the_right_size(scores, f, g, rule, balanced, seed) -> None:
    small, large = sorted((f, g))
    scores_N = torch.tensor(scores)
    knobs = {"scores_N": scores_N, "classes_N": classes_of(len(scores), seed), "balanced": balanced, "seed": seed}
    few, many, everything = (select(rule, fraction, **knobs) for fraction in (small, large, 1.0))
    assert set(few.tolist()) <= set(many.tolist())
    for kept, fraction in ((few, small), (many, large)):
        assert kept.dtype == torch.int64
        assert kept.tolist() == sorted(set(kept.tolist()))
        assert len(kept) == kept_count(len(scores), fraction)
    assert everything.tolist() == list(range(len(scores)))


@given(SCORES, FRACTIONS)
@SETTINGS
def test_hardest_and_easiest_are_the_sorted_ends_with_ties_by_position(scores, f) -> None:
    count, scores_N = kept_count(len(scores), f), torch.tensor(scores)
    by_fall = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
    by_rise = sorted(range(len(scores)), key=lambda i: (scores[i], i))
    assert hardest_first(scores_N).tolist() == by_fall
    assert easiest_first(scores_N).tolist() == by_rise
    assert select("hardest", f, scores_N=scores_N).tolist() == sorted(by_fall[:count])
    assert select("easiest", f, scores_N=scores_N).tolist() == sorted(by_rise[:count])


@pytest.mark.parametrize(
    ("total", "fraction", "expected"),
    [(10, 0.05, 1), (10, 0.25, 3), (10, 0.35, 4), (50, 0.29, 15), (10, 0.24, 2), (3, 1.0, 3), (7, 1e-9, 1), (20000, 0.02, 400), (5, 1, 5)],
)
def test_halves_round_up_and_one_is_the_least(total, fraction, expected) -> None:
    assert kept_count(total, fraction) == expected


def test_random_depends_on_the_seed_alone() -> None:
    first = select("random", 0.3, total=1000, seed=1)
    torch.manual_seed(5)
    assert torch.equal(first, select("random", 0.3, scores_N=torch.randn(1000), seed=1))
    other = select("random", 0.3, total=1000, seed=2)
    shared = len(set(first.tolist()) & set(other.tolist()))
    assert 60 < shared < 120  # 90 by chance, standard deviation 6.6
    assert sorted(random_order(50, 3).tolist()) == list(range(50))


@given(st.integers(1, 40), st.integers(0, 999), FRACTIONS, RULES)
@SETTINGS
def test_balanced_shares_are_equal_and_what_is_left_over_is_passed_on(total, seed, f, rule) -> None:
    scores, classes = torch.randn(total, generator=torch.Generator().manual_seed(seed)), classes_of(total, seed)
    kept = select(rule, f, scores_N=scores, classes_N=classes, balanced=True, seed=seed)
    shares = {c: (int((classes[kept] == c).sum()), int((classes == c).sum())) for c in classes.unique().tolist()}
    most = max(share for share, _ in shares.values())
    assert all(share >= min(size, most - 1) for share, size in shares.values())
    if rule == "hardest":
        for c, (share, _) in shares.items():
            members = (classes == c).nonzero()[:, 0].tolist()
            best = sorted(members, key=lambda i: (-float(scores[i]), i))[:share]
            assert sorted(best) == kept[classes[kept] == c].tolist()


@given(st.integers(1, 40), st.integers(0, 999), FRACTIONS, st.integers(0, 4), RULES)
@SETTINGS
def test_the_guard_keeps_its_number_of_every_class_and_else_changes_as_little_as_it_can(total, seed, f, guard, rule) -> None:
    scores, classes = torch.randn(total, generator=torch.Generator().manual_seed(seed)), classes_of(total, seed)
    knobs = {"scores_N": scores, "classes_N": classes, "seed": seed}
    needed = sum(min(guard, int((classes == c).sum())) for c in classes.unique())
    if needed > kept_count(total, f):
        with pytest.raises(InputError, match="min_per_class"):
            select(rule, f, min_per_class=guard, **knobs)
        return
    kept, plain = select(rule, f, min_per_class=guard, **knobs), select(rule, f, **knobs)
    short = 0
    for c in classes.unique():
        least = min(guard, int((classes == c).sum()))
        assert int((classes[kept] == c).sum()) >= least
        short += max(0, least - int((classes[plain] == c).sum()))
    assert len(set(kept.tolist()) - set(plain.tolist())) == short  # exactly what was missing came in
    assert set(kept.tolist()) <= set(select(rule, 1.0, min_per_class=guard, **knobs).tolist())


def test_hardest_first_drops_a_class_and_the_guard_and_the_balance_do_not() -> None:
    scores, classes = torch.tensor([9.0, 8, 7, 6, 1, 0.5]), torch.tensor([0, 0, 0, 0, 1, 1])
    assert select("hardest", 0.5, scores_N=scores).tolist() == [0, 1, 2]
    assert select("hardest", 0.5, scores_N=scores, classes_N=classes, min_per_class=1).tolist() == [0, 1, 4]
    assert select("hardest", 2 / 3, scores_N=scores, classes_N=classes, balanced=True).tolist() == [0, 1, 4, 5]
    assert select("hardest", 5 / 6, scores_N=scores, classes_N=classes, balanced=True).tolist() == [0, 1, 2, 4, 5]  # class 1 has no more to give
    assert classes_in_turn(torch.arange(6), classes).tolist() == [0, 4, 1, 5, 2, 3]


def test_wrong_selections_are_told() -> None:
    scores, classes = torch.arange(4.0), torch.zeros(4, dtype=torch.int64)
    nan = torch.tensor([1.0, torch.nan, 2.0, 0.0])
    wrong = [
        ("scores: 1 of 4", lambda: select("hardest", 0.5, scores_N=nan)), ("rule", lambda: select("best", 0.5, scores_N=scores)),
        ("scores", lambda: select("hardest", 0.5, total=4)), ("classes", lambda: select("random", 0.5, total=4, balanced=True)),
        ("classes", lambda: select("random", 0.5, total=4, min_per_class=1)), ("different numbers", lambda: select("hardest", 0.5, scores_N=scores, total=5)),
        ("different numbers", lambda: select("hardest", 0.5, scores_N=scores, classes_N=classes[:3])), ("total", lambda: select("random", 0.5)),
        ("min_per_class", lambda: select("random", 0.5, classes_N=classes, min_per_class=-1)), ("total", lambda: select("random", 0.5, total=0)),
        ("shape", lambda: select("hardest", 0.5, scores_N=scores[None])), ("shape", lambda: select("random", 0.5, classes_N=classes[None])),
        ("k", lambda: top_per_class(scores, classes, 0)), ("NaN", lambda: top_per_class(nan, classes, 1)),
        ("different", lambda: top_per_class(scores, classes[:2], None)), ("classes", lambda: classes_in_turn(torch.arange(4), classes[:2])),
        *[("fraction", lambda f=f: select("random", f, total=4)) for f in (0.0, -0.1, 1.01, math.nan)],
    ]  # fmt: skip
    for match, call in wrong:
        with pytest.raises(InputError, match=match):
            call()


@given(SCORES, st.integers(1, 8), st.integers(0, 99))
@SETTINGS
def test_top_per_class_is_its_definition(scores, k, seed) -> None:
    classes = classes_of(len(scores), seed)
    expected = []
    for c in classes.unique().tolist():
        members = (classes == c).nonzero()[:, 0].tolist()
        expected += sorted(members, key=lambda i: (-scores[i], i))[:k]
    assert top_per_class(torch.tensor(scores), classes, k).tolist() == sorted(expected)
    for everything in (None, len(scores)):
        assert top_per_class(torch.tensor(scores), classes, everything).tolist() == list(range(len(scores)))


def test_lower_scores_change_nothing_and_an_empty_pool_gives_nothing() -> None:
    scores, classes = torch.rand(20) + 1, torch.arange(20) % 3
    more = torch.cat([scores, torch.rand(30)]), torch.cat([classes, torch.arange(30) % 3])
    assert torch.equal(top_per_class(scores, classes, 4), top_per_class(*more, 4))
    assert top_per_class(scores[:0], classes[:0], 4).tolist() == []


# ---- near-duplicates -----------------------------------------------------------------------------------------------------


def smooth(count: int, side: int = 24, seed: int = 0, channels: int = 3) -> Tensor:
    """Random images with structure, as photographs have."""
    coarse = torch.rand(count, channels, 6, 6, generator=torch.Generator().manual_seed(seed))
    return F.interpolate(coarse, size=(side, side), mode="bicubic", align_corners=False)


def test_the_hash_outlives_brightness_contrast_size_and_noise_and_tells_images_apart() -> None:
    images = smooth(60)
    bits = difference_hash(images)
    assert bits.shape == (60, 128)
    assert torch.equal(difference_hash(images * 0.5 + 0.3), bits)
    noisy = images + 0.01 * torch.randn(images.shape, generator=torch.Generator().manual_seed(1))
    larger = F.interpolate(images, size=(40, 36), mode="bilinear")
    for changed in (noisy, larger):
        assert near_duplicate_inputs(changed, images, 0.9).all()
    assert not near_duplicate_inputs(smooth(60, seed=9), images, 0.9).any()
    assert not near_duplicate_inputs(images.flip(-1), images, 0.9).any()
    blank = torch.full((2, 1, 8, 8), 0.1) + torch.tensor([0.0, 0.7])[:, None, None, None]
    assert not difference_hash(blank).any()


def test_a_samples_hash_does_not_depend_on_the_batch() -> None:
    images = smooth(33)
    assert torch.equal(difference_hash(images), torch.cat([difference_hash(image[None]) for image in images]))


@given(st.integers(0, 128), st.floats(0.01, 1.0))
@SETTINGS
def test_the_threshold_is_the_share_of_equal_bits(seed, threshold) -> None:
    some, others = smooth(5, seed=seed), smooth(4, seed=seed + 1000)
    share = (difference_hash(some)[:, None] == difference_hash(others)[None]).double().mean(-1).amax(1)
    assert near_duplicate_inputs(some, others, threshold).tolist() == (share >= threshold - 1e-12).tolist()


def test_flat_features_and_tiny_images_are_compared_exactly() -> None:
    rows = torch.randn(5, 7)
    nearly = rows.clone()
    nearly[1] += 1e-3
    zero = torch.zeros(1, 7)
    assert near_duplicate_inputs(rows, nearly, 0.1).tolist() == [True, False, True, True, True]
    assert near_duplicate_inputs(zero, -zero, 1.0).all()
    tiny = torch.rand(4, 1, 3, 8)
    assert near_duplicate_inputs(tiny, tiny[[2]], 0.5).tolist() == [False, False, True, False]


def test_a_class_keeps_at_most_its_cap_and_smaller_fractions_stay_inside() -> None:
    scores, classes = torch.rand(200, generator=torch.Generator().manual_seed(1)), torch.arange(200) % 3 // 2  # two thirds are of class 0
    hardest = scores.argsort(descending=True, stable=True)
    kept = select("hardest", 0.5, scores_N=scores, classes_N=classes, max_per_class=20)
    assert torch.bincount(classes[kept]).tolist() == [20, 20]
    wanted = torch.cat([hardest[classes[hardest] == c][:20] for c in (0, 1)]).sort().values
    assert torch.equal(kept, wanted)
    fewer = select("hardest", 0.1, scores_N=scores, classes_N=classes, max_per_class=20)
    assert len(fewer) == 20
    assert torch.isin(fewer, kept).all()
    assert torch.equal(select("hardest", 0.5, scores_N=scores, classes_N=classes, max_per_class=200), select("hardest", 0.5, scores_N=scores))
    with pytest.raises(InputError, match="max_per_class"):
        select("hardest", 0.5, scores_N=scores, classes_N=classes, min_per_class=5, max_per_class=4)


def test_in_data_sets_by_position_prepared_and_in_batches() -> None:
    train = (smooth(1300, side=8, channels=1).clamp(0, 1) * 255).to(torch.uint8)
    test = train[[1200, 7]].float() / 255 * 2 - 1  # the same images, as floats, scaled otherwise
    ids = torch.arange(5, 1300)
    found = near_duplicates(ArrayData(train, None, mean=[0.3], std=[0.2]), ids, ArrayData(test), threshold=1.0)
    assert found.dtype == torch.bool
    assert {7, 1200} <= set(ids[found].tolist())
    assert int(found.sum()) < 5
    nothing = ArrayData(test[:0])
    assert near_duplicates(ArrayData(train), ids, nothing, threshold=0.9).tolist() == [False] * len(ids)
    assert near_duplicates(ArrayData(train), ids[:0], ArrayData(test), threshold=0.9).tolist() == []


def test_what_cannot_be_compared_is_told() -> None:
    images, rows = smooth(2), torch.randn(2, 5)
    for inputs, reference, threshold in ((images, rows, 0.9), (rows, rows[:, :3], 0.9), (images, images, 0.0), (images, images, 1.1), (rows, rows, math.nan)):
        with pytest.raises(InputError, match="threshold"):
            near_duplicate_inputs(inputs, reference, threshold)
    with pytest.raises(InputError, match="threshold"):
        near_duplicates(ArrayData(rows), torch.arange(2), ArrayData(rows), threshold=2.0)
    assert IGNORE < 0  # unlabelled samples are a class of their own above
