"""What a teacher costs: a ledger of its calls with a budget, and a teacher that is asked once a sample."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from limbeck.contract import Batch, Teacher
from limbeck.errors import InputError


class Ledger:
    """Counts teacher calls, a sample and a round; one sample shown to the teacher is one call. Never passes its budget.

    Args:
        budget: calls that may be made in all, ≥ 0; None: any number, they are only counted.

    Raises:
        InputError: a negative budget.
    """

    def __init__(self, budget: int | None = None) -> None:
        if budget is not None and budget < 0:
            raise InputError(f"a budget of {budget} teacher calls is negative.", where="budget", fix="Give a number of calls, or none for no limit.")
        self.budget = budget
        self._calls: dict[int, int] = {}
        self._rounds: list[dict[int, int]] = [{}]

    @property
    def total(self) -> int:
        """Calls made."""
        return sum(self._calls.values())

    @property
    def remaining(self) -> int | None:
        """Calls that may still be made; None: any number."""
        return None if self.budget is None else self.budget - self.total

    def charge(self, ids_M: Tensor) -> None:
        """Enter one call for each of `ids_M` ([M] integers; an id that stands there twice is two calls), all of them or none.

        To be called before the teacher is asked: a call that then fails stays in the ledger, since it may have been paid for.

        Raises:
            InputError: the calls would pass the budget. Nothing is entered then.
        """
        ids = [int(i) for i in ids_M.tolist()]
        if self.budget is not None and self.total + len(ids) > self.budget:
            what = f"{len(ids)} more teacher calls would pass the budget of {self.budget}, of which {self.total} are spent."
            raise InputError(what, where="budget", fix="Ask about fewer samples, or raise the budget.")
        for part in (self._calls, self._rounds[-1]):
            for i in ids:
                part[i] = part.get(i, 0) + 1

    def begin_round(self) -> None:
        """Close the current round, the first of which is open from the start: what is charged from now on is the next one's."""
        self._rounds.append({})

    def calls(self, ids_M: Tensor) -> Tensor:
        """Calls made for each of `ids_M` ([M] integers): [M] int64."""
        return torch.tensor([self._calls.get(int(i), 0) for i in ids_M.tolist()], dtype=torch.int64)

    def table(self) -> list[dict[str, int | None]]:
        """One row a round: `round` (from 0), `calls`, `samples` (different ones), `total` (calls so far), `remaining` (None: no limit)."""
        rows: list[dict[str, int | None]] = []
        total = 0
        for number, calls in enumerate(self._rounds):
            total += sum(calls.values())
            left = None if self.budget is None else self.budget - total
            rows.append({"round": number, "calls": sum(calls.values()), "samples": len(calls), "total": total, "remaining": left})
        return rows

    def state_dict(self) -> dict[str, Any]:
        """The calls, round by round: lists of ids and counts. The budget is not part of it: it is the constructor's."""
        return {"rounds": [{"ids": list(calls), "calls": list(calls.values())} for calls in self._rounds]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put the calls back, in place of those counted here.

        Raises:
            InputError: they are more than this ledger's budget. Nothing is changed then.
        """
        rounds = [dict(zip(row["ids"], row["calls"], strict=True)) for row in state["rounds"]]
        spent = sum(sum(calls.values()) for calls in rounds)
        if self.budget is not None and spent > self.budget:
            raise InputError(f"{spent} teacher calls were made, and the budget is {self.budget}.", where="budget", fix="Raise the budget to go on.")
        self._rounds, self._calls = rounds, {}
        for calls in rounds:
            for i, count in calls.items():
                self._calls[i] = self._calls.get(i, 0) + count


class MeteredTeacher:
    """A teacher that is asked once about each sample and pays for it; its answers are kept, and are free from then on (a `contract.Teacher`).

    An answer belongs to a sample's id, not to its input: it is the one to the input that was shown first, whatever augmentation shows later.
    Kept on the CPU, in the type in which they were given. An ensemble is one teacher here: what is kept is the logits of its mean.

    Args:
        teacher: the one that is asked. ledger: where its calls are entered, before they are made.
    """

    def __init__(self, teacher: Teacher, ledger: Ledger) -> None:
        self.teacher, self.ledger = teacher, ledger
        self._row: dict[int, int] = {}  # id → row of the answers
        self._answers: Tensor | None = None

    def __len__(self) -> int:
        return len(self._row)

    @torch.no_grad()
    def logits(self, batch: Batch) -> Tensor:
        """[B, C] without gradient, on the inputs' device; reads the ids on the host. A sample that stands in the batch twice is one call.

        Raises:
            InputError: a batch without ids; new samples would pass the ledger's budget (nothing is asked or entered then);
                the answers are not [B, C], or differ in C from earlier ones.
        """
        if batch.ids is None:
            fix = "Give Batch(inputs, ids=…), positions in the training set."
            raise InputError("samples without ids cannot be told from those already asked about.", where="batch.ids", fix=fix)
        ids = [int(i) for i in batch.ids.tolist()]
        new = {i: place for place, i in reversed(list(enumerate(ids))) if i not in self._row}  # the first place of each
        if new:
            self._ask(batch, torch.tensor(sorted(new.values()), device=batch.ids.device))
        if self._answers is None:
            raise InputError("an empty batch before any answer: the number of classes is not known.", where="batch", fix="Ask about a sample first.")
        return self._answers[torch.tensor([self._row[i] for i in ids], dtype=torch.int64)].to(batch.inputs.device)

    def all_logits(self, batch: Batch) -> Tensor:
        """[1, B, C] without gradient: `logits`, as the one teacher's slice."""
        return self.logits(batch)[None]

    def state_dict(self) -> dict[str, Any]:
        """The answers and whose they are; the ledger's state is its own."""
        return {"ids": torch.tensor(list(self._row), dtype=torch.int64), "answers": self._answers}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put the answers back; they are free."""
        self._row = {i: row for row, i in enumerate(state["ids"].tolist())}
        self._answers = state["answers"]

    def _ask(self, batch: Batch, places_M: Tensor) -> None:
        """Charge for the samples at these places, ask the teacher about them in one batch, keep the answers."""
        assert batch.ids is not None
        part = _rows(batch, places_M)
        assert part.ids is not None
        self.ledger.charge(part.ids)
        answers = self.teacher.logits(part).detach().cpu()
        classes = answers.shape[-1] if self._answers is None else self._answers.shape[1]
        if answers.shape != (len(part), classes):
            what = f"the teacher's answers to {len(part)} samples have the shape {list(answers.shape)}, not [{len(part)}, {classes}]."
            raise InputError(what, where="teacher", fix="Give a classifier: logits of shape [B, C].")
        start = len(self._row)
        self._row |= {i: start + k for k, i in enumerate(part.ids.tolist())}
        self._answers = answers if self._answers is None else torch.cat([self._answers, answers])


def _rows(batch: Batch, places_M: Tensor) -> Batch:
    """Some rows of a batch."""

    def taken(t: Tensor | None) -> Tensor | None:
        return None if t is None else t[places_M.to(t.device)]

    recorded = {name: t[places_M.to(t.device)] for name, t in batch.recorded.items()}
    return Batch(batch.inputs[places_M.to(batch.inputs.device)], taken(batch.targets), taken(batch.ids), taken(batch.views), recorded)
