"""Token groups against the bytes at which both sides end, and merged rows against joint probabilities."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from limbeck.errors import InputError
from limbeck.language.alignment import NONE, Groups, Side, byte_groups, merged_rows

SIZES = st.lists(st.integers(0, 4), max_size=12)


@given(SIZES, SIZES)
def test_groups_lie_between_the_bytes_at_which_both_sides_end(student: list[int], teacher: list[int]) -> None:
    group_s, group_t = byte_groups(student, teacher, start=5)
    ends_s, ends_t = np.cumsum(student), np.cumsum(teacher)
    common = sorted((set(ends_s.tolist()) & set(ends_t.tolist())) - {0})
    for sizes, ends, groups in ((student, ends_s, group_s), (teacher, ends_t, group_t)):
        for size, end, group in zip(sizes, ends, groups, strict=True):
            place = next((i for i, byte in enumerate(common) if end <= byte), None)
            assert group == (NONE if size == 0 or place is None else 5 + place)


def test_the_side_that_ends_earlier_goes_on() -> None:
    # "the cat" as the| cat and t|he| c|a|t
    a, b = byte_groups([3, 4], [1, 2, 2, 1, 1])
    assert a.tolist() == [0, 1]
    assert b.tolist() == [0, 0, 1, 1, 1]
    a, b = byte_groups([2, 2], [3, 1])  # no common end but the last
    assert a.tolist() == [0, 0]
    assert b.tolist() == [0, 0]
    a, b = byte_groups([1, 0, 2, 5], [1, 0, 0, 1, 1])  # zero widths, and a student text that is longer
    assert a.tolist() == [0, NONE, 1, NONE]
    assert b.tolist() == [0, NONE, NONE, 1, 1]
    with pytest.raises(InputError, match="fewer than 0"):
        byte_groups([-1], [1])


@given(st.lists(st.integers(1, 4), min_size=1, max_size=12))
def test_equal_tokenisations_give_one_token_a_group_and_merged_rows_are_the_rows(sizes: list[int]) -> None:
    """Invariant (viii)."""
    group, other = byte_groups(sizes, sizes)
    assert group.tolist() == other.tolist() == list(range(len(sizes)))
    logp = torch.randn(len(sizes), 5).log_softmax(1)
    target = logp[torch.arange(len(sizes)), torch.randint(5, (len(sizes),))]
    for strategy in ("first", "last"):
        torch.testing.assert_close(merged_rows(logp, target, Side.of(group), strategy), logp)  # type: ignore[arg-type]


def test_merged_rows_hold_the_probability_of_the_group_at_the_realised_token() -> None:
    generator = torch.Generator().manual_seed(0)
    V = 6
    logp = torch.randn(7, V, generator=generator, dtype=torch.float64).log_softmax(1).requires_grad_()
    y = torch.randint(V, (7,), generator=generator)
    taken = logp.gather(1, y[:, None])[:, 0]
    side = Side.of([0, 0, 0, NONE, 1, 2, 2])
    spans = [(0, 3), (4, 5), (5, 7)]
    first, last = merged_rows(logp, taken, side, "first"), merged_rows(logp, taken, side, "last")
    for g, (begin, end) in enumerate(spans):
        joint = taken[begin:end].sum()
        torch.testing.assert_close(first[g, y[begin]], joint)
        torch.testing.assert_close(last[g, y[end - 1]], joint)
        torch.testing.assert_close(first[g].exp(), logp[begin].exp() * taken[begin + 1 : end].sum().exp())
        torch.testing.assert_close(last[g].exp(), logp[end - 1].exp() * taken[begin : end - 1].sum().exp())
        assert float(first[g].exp().sum()) <= 1 + 1e-12
    assert float(first[0].exp().sum()) < 0.9  # less than 1 on purpose
    # the gradient reaches every factor and nothing else
    (slope,) = torch.autograd.grad(first[0].sum(), logp)
    assert slope[3:].abs().sum() == 0
    assert (slope[0] == 1).all()
    assert slope[1].nonzero()[:, 0].tolist() == [int(y[1])]


def test_cutting_groups_gives_the_same_rows() -> None:
    group = [0, 0, NONE, 1, 2, 2, 2, NONE, 3]
    side = Side.of(group)
    logp = torch.randn(9, 4).log_softmax(1)
    taken = logp[:, 1]
    whole = merged_rows(logp, taken, side, "last")
    parts = []
    for start, stop in ((0, 1), (1, 3), (3, 4)):
        part, begin, end = side.cut(start, stop)
        parts.append(merged_rows(logp[begin:end], taken[begin:end], part, "last"))
    torch.testing.assert_close(torch.cat(parts), whole)
    torch.testing.assert_close(side.totals(torch.ones(9)), torch.tensor([2.0, 1.0, 3.0, 1.0]))
    assert len(Side.of([NONE, NONE])) == 0
    assert Side.of([NONE, NONE]).totals(torch.ones(2)).shape == (0,)


def test_wrong_groups_are_refused() -> None:
    for wrong in ([1, 2], [0, 2], [0, 1, 0]):
        with pytest.raises(InputError, match="numbered from 0"):
            Side.of(wrong)
    with pytest.raises(InputError, match="one side"):
        Groups(Side.of([0, 1]), Side.of([0]))
    with pytest.raises(InputError, match="strategy"):
        Side.of([0]).picked("middle")  # type: ignore[arg-type]
