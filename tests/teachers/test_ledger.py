"""The ledger refuses exactly at its boundary, also after a restart; a metered teacher is asked once a sample."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from limbeck.contract import Batch
from limbeck.errors import InputError
from limbeck.teachers.ledger import Ledger, MeteredTeacher

SETTINGS = settings(deadline=None, max_examples=40)
REQUESTS = st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=6), max_size=8)


class Noting:
    """A teacher that notes what it is shown; its answer is the input, so it tells which augmentation was asked about."""

    def __init__(self, fails: bool = False) -> None:
        self.fails, self.batches = fails, []

    def logits(self, batch: Batch) -> Tensor:
        self.batches.append(batch)
        if self.fails:
            raise RuntimeError("no answer")
        return batch.inputs.clone().requires_grad_()

    @property
    def ids(self) -> list[int]:
        return [i for batch in self.batches for i in batch.ids.tolist()]


def batch(ids: list[int], shift: float = 0.0) -> Batch:
    ids_B = torch.tensor(ids, dtype=torch.int64)
    return Batch(ids_B[:, None] * torch.tensor([1.0, 10.0, 100.0]) + shift, ids_B + 50, ids_B, ids_B * 2, {"scores/x": ids_B.double()})


@given(REQUESTS, st.integers(0, 12))
@SETTINGS
def test_each_sample_is_asked_once_and_the_budget_is_never_passed(requests, budget) -> None:
    teacher, ledger = Noting(), Ledger(budget)
    metered, asked = MeteredTeacher(teacher, ledger), set()
    for ids in requests:
        new = set(ids) - asked
        if len(asked) + len(new) > budget:
            with pytest.raises(InputError, match="budget"):
                metered.logits(batch(ids))
        else:
            asked |= new
            assert torch.equal(metered.logits(batch(ids)), batch(ids).inputs)
        assert teacher.ids == list(dict.fromkeys(teacher.ids))
        assert set(teacher.ids) == asked
        assert (ledger.total, ledger.remaining, len(metered)) == (len(asked), budget - len(asked), len(asked))
    assert ledger.calls(torch.arange(10)).tolist() == [int(i in asked) for i in range(10)]


@given(st.integers(0, 9), st.integers(1, 5))
@SETTINGS
def test_the_ledger_refuses_exactly_at_the_boundary_and_enters_nothing(budget, over) -> None:
    ledger = Ledger(budget)
    with pytest.raises(InputError, match=f"budget of {budget}"):
        ledger.charge(torch.arange(budget + over))
    assert ledger.total == 0
    ledger.charge(torch.arange(budget))
    assert ledger.remaining == 0
    ledger.charge(torch.zeros(0, dtype=torch.int64))
    with pytest.raises(InputError):
        ledger.charge(torch.zeros(1, dtype=torch.int64))
    assert ledger.total == budget


def test_a_refused_request_asks_nothing_and_the_boundary_holds_after_a_restart() -> None:
    teacher = Noting()
    ledger = Ledger(3)
    metered = MeteredTeacher(teacher, ledger)
    metered.logits(batch([4, 7]))
    states = ledger.state_dict(), metered.state_dict()
    metered.logits(batch([9]))  # after the state was taken: must not be in it
    again_ledger, again = Ledger(3), None
    again_ledger.load_state_dict(states[0])
    again = MeteredTeacher(teacher, again_ledger)
    again.load_state_dict(states[1])
    seen = len(teacher.batches)
    assert torch.equal(again.logits(batch([7, 4])), batch([7, 4]).inputs)
    assert len(teacher.batches) == seen
    with pytest.raises(InputError):
        again.logits(batch([1, 2]))
    assert (again_ledger.total, len(teacher.batches)) == (2, seen)
    again.logits(batch([1]))
    with pytest.raises(InputError):
        again.logits(batch([2]))
    assert again_ledger.total == 3


def test_state_goes_through_a_checkpoint_file(tmp_path) -> None:
    ledger = Ledger(5)
    metered = MeteredTeacher(Noting(), ledger)
    metered.logits(batch([3, 1]))
    ledger.begin_round()
    ledger.charge(torch.tensor([3]))
    torch.save([ledger.state_dict(), metered.state_dict()], tmp_path / "state.pt")
    states = torch.load(tmp_path / "state.pt", weights_only=True)
    other = Ledger(5)
    other.load_state_dict(states[0])
    assert other.table() == ledger.table()
    assert other.calls(torch.tensor([1, 3])).tolist() == [1, 2]
    with pytest.raises(InputError, match="budget"):
        Ledger(2).load_state_dict(states[0])
    empty = MeteredTeacher(Noting(), Ledger())
    empty.load_state_dict(MeteredTeacher(Noting(), Ledger()).state_dict())
    assert len(empty) == 0


def test_the_table_has_a_row_a_round() -> None:
    ledger = Ledger(10)
    ledger.charge(torch.tensor([1, 2, 2]))
    ledger.begin_round()
    ledger.begin_round()
    ledger.charge(torch.tensor([2, 5]))
    assert ledger.table() == [
        {"round": 0, "calls": 3, "samples": 2, "total": 3, "remaining": 7},
        {"round": 1, "calls": 0, "samples": 0, "total": 3, "remaining": 7},
        {"round": 2, "calls": 2, "samples": 2, "total": 5, "remaining": 5},
    ]
    free = Ledger()
    free.charge(torch.arange(1000))
    assert (free.total, free.remaining, free.table()[0]["remaining"]) == (1000, None, None)


def test_the_first_shown_input_is_asked_about_with_all_that_belongs_to_it() -> None:
    teacher = Noting()
    metered = MeteredTeacher(teacher, Ledger(9))
    shown = batch([5, 2, 5])
    shown.inputs[2] += 7  # another augmentation of sample 5 in the same batch
    answers = metered.logits(shown)
    (asked,) = teacher.batches
    assert asked.ids.tolist() == [5, 2]
    assert (asked.targets.tolist(), asked.views.tolist(), asked.recorded["scores/x"].tolist()) == ([55, 52], [10, 4], [5.0, 2.0])
    assert torch.equal(answers, shown.inputs[[0, 1, 0]])
    assert not answers.requires_grad
    assert torch.equal(metered.logits(batch([2], shift=3.0)), batch([2]).inputs)  # an answer belongs to the id
    assert torch.equal(metered.all_logits(batch([2, 5])), batch([2, 5]).inputs[None])


def test_a_call_that_fails_stays_in_the_ledger_and_leaves_no_answer() -> None:
    ledger = Ledger(2)
    metered = MeteredTeacher(Noting(fails=True), ledger)
    with pytest.raises(RuntimeError):
        metered.logits(batch([1]))
    assert (ledger.total, len(metered)) == (1, 0)


def test_wrong_input_is_told() -> None:
    metered = MeteredTeacher(Noting(), Ledger())
    with pytest.raises(InputError, match=r"batch\.ids"):
        metered.logits(Batch(torch.zeros(2, 3)))
    with pytest.raises(InputError, match="empty batch"):
        metered.logits(batch([]))
    with pytest.raises(InputError, match="shape"):
        metered.logits(Batch(torch.zeros(2, 3, 4), ids=torch.arange(2)))
    metered.logits(batch([1]))
    assert metered.logits(batch([])).shape == (0, 3)
    with pytest.raises(InputError, match="not"):
        metered.logits(Batch(torch.zeros(1, 4), ids=torch.tensor([8])))
    with pytest.raises(InputError, match="negative"):
        Ledger(-1)
