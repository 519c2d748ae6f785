"""Learning from the next token alone: the student without a teacher, and how teachers are trained."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

from limbeck.contract import Batch, Clock, Frozen, Paper, Update
from limbeck.language.divergences import CrossEntropy
from limbeck.methods.language._base import LanguageMethod


class NextTokenConfig(Frozen):
    """It has no knobs."""


class NextToken(LanguageMethod):
    """Cross-entropy with the next token, averaged over the positions that have one."""

    Config = NextTokenConfig
    paper: ClassVar[Paper] = Paper("prediction of the next symbol (C. E. Shannon); text only, no teacher", "", "Bell System Technical Journal 30", 1951)
    needs_teacher: ClassVar[bool] = False

    def updates(self, batch: Batch, clock: Clock) -> Iterator[Update]:
        """One update of the student."""
        yield Update("student", self.losses(self.tokens(batch), CrossEntropy()).loss)
