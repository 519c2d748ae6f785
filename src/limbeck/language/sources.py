"""Where a teacher's signal comes from: networks in this process, or a record that came with the batch (engine sheet §9)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal, Self

import torch
from torch import Tensor, nn

from limbeck.errors import InputError
from limbeck.language.models import LanguageModel
from limbeck.language.signals import HeadSignal, MixedSignal, TeacherSignal, TopKSignal
from limbeck.language.tokens import TokenBatch
from limbeck.modes import evaluating

Policy = Literal["tail", "renorm_teacher", "renorm_both"]
RECORDED_IDS, RECORDED_LOGP, RECORDED_PRESENT = "tokens/ids", "tokens/logp", "tokens/present"
"""Names under which a record's rows travel with a batch: [B, L, k] int64, [B, L, k] float32, [B, L] bool."""


class ModelSource(nn.Module):
    """Frozen language models that teach; several teach with the mean of their probabilities. They are taken over, not copied.

    Raises:
        InputError: there is no member, one is no language model, or they differ in vocabulary.
    """

    def __init__(self, members: Sequence[nn.Module]) -> None:
        super().__init__()
        if not members:
            raise InputError("an ensemble needs at least one teacher.", where="teacher", fix="Add one.")
        for member in members:
            if not isinstance(member, LanguageModel):
                raise InputError(f"{type(member).__name__} is no language model.", where="teacher.model", fix="Use decoder, causal_lm or smollm2, say.")
        sizes = {member.vocabulary for member in members if isinstance(member, LanguageModel)}
        if len(sizes) > 1:
            raise InputError(f"the teachers differ in vocabulary: {', '.join(map(str, sorted(sizes)))}.", where="teacher", fix="Use 'cross_tokenizer'.")
        self.members = nn.ModuleList(members)
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> Self:
        """Stays in eval mode, whatever is asked."""
        return super().train(False)

    @property
    def vocabulary(self) -> int:
        """V."""
        return self.models[0].vocabulary

    @property
    def models(self) -> list[LanguageModel]:
        """The members."""
        return [member for member in self.members if isinstance(member, LanguageModel)]

    @torch.no_grad()
    def get(self, tokens: TokenBatch) -> HeadSignal | MixedSignal:
        """What the members say of `tokens.rows()`: hidden states and head, never [N, V]."""
        rows = tokens.rows()
        with evaluating(self):
            signals = [HeadSignal(rows.gather(model.hidden(tokens)), model.head()) for model in self.models]
        return signals[0] if len(signals) == 1 else MixedSignal(tuple(signals), (1.0 / len(signals),) * len(signals))

    @torch.no_grad()
    def forward(self, inputs: Tensor) -> Tensor:
        """Inputs [B, 2|4, L] int64 → logits [B, L, V] of the first member (for timings)."""
        return self.models[0](inputs)


def recorded_signal(tokens: TokenBatch, policy: Policy = "tail") -> TopKSignal:
    """The signal that came with a batch out of a record, over `tokens.rows()`.

    Raises:
        InputError: the batch carries no recorded tokens.
    """
    if RECORDED_IDS not in tokens.annotations:
        raise InputError("the batch carries no recorded tokens.", where="batch", fix="Train through a record of these windows.")
    rows = tokens.rows()
    return TopKSignal(rows.annotations[RECORDED_IDS], rows.annotations[RECORDED_LOGP], policy=policy)


def with_policy(signal: TeacherSignal, policy: Policy) -> TeacherSignal:
    """The same signal; where it has k entries, with this policy for the rest of the vocabulary."""
    return replace(signal, policy=policy) if isinstance(signal, TopKSignal) else signal
