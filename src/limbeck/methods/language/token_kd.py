"""Distilling next-token distributions on given text: any divergence, dense or recorded teacher (word-level distillation, Kim and Rush, arXiv 1606.07947).

L = soft · D(p, q) + hard · CE(y, q), both means over the positions that have a target; p teacher, q student.

The paper's word-level KD is D = KL(p‖q) at temperature 1 on the training text. The other divergences are those of GKD (2306.13649), DistiLLM (2402.03898)
and f-distill as the engine sheet collects them (§2); learning from k recorded entries and a tail is §4's.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, ClassVar, Literal

from pydantic import Field
from torch import nn

from limbeck.contract import Batch, Clock, Frozen, Paper, Update
from limbeck.errors import InputError
from limbeck.language.divergences import (
    CrossEntropy,
    ForwardKL,
    GeneralisedJSD,
    Mixed,
    ReverseKL,
    SkewForwardKL,
    SkewReverseKL,
    Tempered,
    TotalVariation,
)  # fmt: skip
from limbeck.language.sources import with_policy
from limbeck.language.sparse import check_policy
from limbeck.methods.language._base import LanguageMethod, logged

Name = Literal["forward_kl", "reverse_kl", "jsd", "skew_forward_kl", "skew_reverse_kl", "total_variation"]


class TokenKDConfig(Frozen):
    """Knobs of `TokenKD`."""

    divergence: Name = Field("forward_kl", description="between teacher p and student q; the paper's is forward_kl")
    beta: float = Field(0.5, ge=0, le=1, description="'jsd': β p + (1 − β) q is the middle; 0 is forward KL and 1 reverse KL, by convention (sheet §2)")
    normalise_beta: bool = Field(False, description="'jsd': divide by β (1 − β), so that the family is continuous at 0 and 1; ours")
    alpha: Annotated[float, Field(ge=0, lt=1)] = Field(0.1, description="'skew_…': share of the other side in the middle (DistiLLM: 0.1)")
    temperature: float = Field(1.0, gt=0, le=1000, description="τ, divides both sides' logits; the loss is multiplied by τ² where tau_sq")
    tau_sq: bool = Field(True, description="whether the soft term is multiplied by τ²")
    soft: float = Field(1.0, ge=0, description="weight of the divergence")
    hard: float = Field(0.0, ge=0, description="weight of the cross-entropy with the text")
    tail: Literal["tail", "renorm_teacher", "renorm_both"] = Field("tail", description="k entries: what becomes of the rest of the vocabulary (sheet §4)")


def divergence_of(config: TokenKDConfig) -> Tempered:
    """The soft term that a configuration asks for."""
    T, tau_sq = config.temperature, config.tau_sq
    match config.divergence:
        case "forward_kl":
            return ForwardKL(temperature=T, tau_sq=tau_sq)
        case "reverse_kl":
            return ReverseKL(temperature=T, tau_sq=tau_sq)
        case "jsd":
            return GeneralisedJSD(beta=config.beta, normalise_beta=config.normalise_beta, temperature=T, tau_sq=tau_sq)
        case "skew_forward_kl":
            return SkewForwardKL(alpha=config.alpha, temperature=T, tau_sq=tau_sq)
        case "skew_reverse_kl":
            return SkewReverseKL(alpha=config.alpha, temperature=T, tau_sq=tau_sq)
        case "total_variation":
            return TotalVariation(temperature=T, tau_sq=tau_sq)


class TokenKD(LanguageMethod):
    """A student learns a teacher's next-token distributions on the training text, and the text itself where `hard` is above 0."""

    Config = TokenKDConfig
    paper: ClassVar[Paper] = Paper("Sequence-Level Knowledge Distillation", "1606.07947", "EMNLP 2016", 2016)

    def setup(self) -> None:
        """Put the loss together."""
        config = self.config
        if config.soft == 0 and config.hard == 0:
            raise InputError("'soft' and 'hard' are both 0: there is nothing to learn.", where="soft")
        if config.soft > 0 and not isinstance(self.teacher, nn.Module):  # a record: some divergences are infinite where its tail is left out
            try:
                check_policy(config.tail, config.divergence, infinite=divergence_of(config).unbounded_by_teacher)
            except InputError as error:
                raise InputError(error.what, where="tail", fix=error.fix) from error
        parts = [(config.soft, divergence_of(config)), (config.hard, CrossEntropy())]
        self.divergence = Mixed(tuple((weight, part) for weight, part in parts if weight > 0))

    def updates(self, batch: Batch, clock: Clock) -> Iterator[Update]:
        """One update of the student."""
        tokens = self.tokens(batch)
        signal = with_policy(self.asked(tokens), self.config.tail) if self.config.soft > 0 else None
        found = self.losses(tokens, self.divergence, signal)
        yield Update("student", found.loss, logged(found))
