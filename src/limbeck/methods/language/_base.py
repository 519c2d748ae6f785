"""What methods that make language models share: token batches, the student's hidden states, one pass of the divergence over its head, weighing by tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn

from limbeck.contract import IGNORE, Batch, Clock, Method
from limbeck.errors import InputError
from limbeck.language.divergences import Divergence
from limbeck.language.linear_divergence import Losses, linear_divergence
from limbeck.language.models import LanguageModel
from limbeck.language.signals import SignalSource, TeacherSignal
from limbeck.language.tokens import TokenBatch


class LanguageMethod(Method):
    """A method whose student is a `LanguageModel` and whose teacher, where it has one, is a `SignalSource`.

    Losses are weighted means over the positions that have a target (sheet eq. 1); the engine weighs micro-batches and processes by their number, so that
    D is the sum over the whole optimiser step.
    """

    produces: ClassVar[str] = "language_model"
    student: LanguageModel
    teacher: SignalSource  # type: ignore[assignment]

    def weigh(self, batch: Batch, clock: Clock) -> Tensor | None:
        """The number of positions that have a target (`Batch.inputs` [B, 2|4, L]: the second channel holds the targets)."""
        return (batch.inputs[:, 1] != IGNORE).sum()

    def tokens(self, batch: Batch) -> TokenBatch:
        """The batch as tokens; what a record holds for it becomes annotations."""
        return TokenBatch.of(batch)

    def losses(self, tokens: TokenBatch, divergence: Divergence, signal: TeacherSignal | None = None) -> Losses:
        """The student against a signal: a mean over valid positions with a graph to the student, and its parts for the log.

        signal: what the teacher says of `tokens.rows()`; None: nothing is needed of a teacher.
        """
        rows = tokens.rows()
        return linear_divergence(rows.gather(self.student.hidden(tokens)), self.student.head(), signal, divergence, rows)

    def asked(self, tokens: TokenBatch) -> TeacherSignal:
        """What the teacher says of `tokens.rows()`, without gradient."""
        with torch.no_grad():
            return self.teacher.get(tokens)

    def require_live(self, why: str) -> None:
        """Raise InputError where the teacher is a record, which cannot answer for tokens that it has not seen. why: the start of the sentence."""
        if not isinstance(self.teacher, nn.Module):
            raise InputError(f"{why} asks the teacher about new tokens, and a record cannot answer.", where="teacher", fix="Give 'teacher' a 'model'.")


def logged(losses: Losses) -> Mapping[str, Tensor]:
    """A loss's parts as metrics: one name a part; nothing where there is only one."""
    return losses.parts if len(losses.parts) > 1 else {}
