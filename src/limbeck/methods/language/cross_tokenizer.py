"""Teachers of another tokenizer: ULD (Boizard et al., arXiv 2402.12030), and the hybrid that TRL calls GOLD.

L = soft · mean over groups ℓ + hard · CE(y, q). ℓ compares merged rows of probabilities of token groups that cover the same bytes (sheet
`_language_distillation_engine` §7; `limbeck.language.cross_tokenizer`).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from limbeck.contract import Batch, Clock, Frozen, Paper, Update
from limbeck.errors import InputError
from limbeck.language.alignment import Strategy
from limbeck.language.cross_tokenizer import GOLD, ULD, Alignment, CrossTokenizerSource, MergedLoss, cross_tokenizer_loss, matching
from limbeck.language.divergences import CrossEntropy
from limbeck.language.linear_divergence import linear_divergence
from limbeck.language.rollout import Sampler
from limbeck.language.token_sources import Draws, Each, GKDSource, PromptSpec, live_model, stopping, tokenizer_of
from limbeck.language.tokenizers import tokenizer_from
from limbeck.language.tokens import DATA, TokenBatch
from limbeck.methods.language._base import LanguageMethod

PADDED = 0.05
"""How much a head may differ in size from its tokenizer, as a fraction: heads are padded to round numbers."""


class CrossTokenizerConfig(Frozen):
    """Knobs of `CrossTokenizer`."""

    teacher_tokenizer: str | dict[str, Any] = Field("bytes", description="of the teacher: bytes, characters, smollm2, gemma, …, or a folder")
    objective: Literal["uld", "gold"] = Field(
        "uld", description="'uld': sorted distance; 'gold': a divergence on ids of equal spelling, the distance on the rest"
    )
    soft: float = Field(1.5, gt=0, description="of the comparison with the teacher (ULD 1.5, from memory; GOLD 1)")
    hard: float = Field(1.0, ge=0, description="of the cross-entropy with the tokens (ULD 1; GOLD 0)")
    alignment: Alignment = Field("bytes", description="'bytes': groups that end at the same byte; 'positions': ULD's paper, the i-th token with the i-th")
    strategy: Strategy = Field("first", description="which token of a group keeps its whole row")
    beta: float = Field(0.5, ge=0, le=1, description="'gold': β of the divergence on matched ids")
    weights: tuple[float, float] | None = Field(
        None, description="'gold': of matched ids and of the rest; null: the matched share of the vocabulary, and 1 − it"
    )
    student_share: float = Field(0.0, ge=0, le=1, description="λ, probability of the student's own tokens (ULD 0; GOLD 0.5); the others are the data's")
    each: Each = Field("batch", description="one choice a batch, or a row")
    sampler: Sampler = Field(Sampler(), description="how the student's tokens are drawn (GOLD: top_p 0.95)")
    prompts: PromptSpec = Field(PromptSpec(), description="what is given of a row where the rest is drawn")

    @model_validator(mode="after")
    def _positive(self) -> Self:
        if self.weights is not None and (min(self.weights) < 0 or max(self.weights) == 0):
            raise ValueError("'weights' must not be negative, nor both 0.")
        return self


class CrossTokenizer(LanguageMethod):
    """The student learns from a teacher that reads the same text in tokens of its own."""

    Config = CrossTokenizerConfig
    paper: ClassVar[Paper] = Paper(
        "Towards Cross-Tokenizer Distillation: the Universal Logit Distillation Loss for LLMs", "2402.12030", "TMLR 2025", 2025,
        reconstructed="the hybrid 'gold' is TRL's code, which no paper describes",
    )  # fmt: skip
    foreign_teacher: ClassVar[bool] = True

    def setup(self) -> None:
        """Bring the two tokenizers together."""
        config = self.config
        mine = tokenizer_of(self.train_data)
        if mine is None:
            raise InputError("the data do not say which tokenizer made them.", where="data.source", fix="Use a text source (novels, text_file, prompts).")
        teacher = live_model(self.teacher, "'cross_tokenizer'")
        theirs = tokenizer_from(config.teacher_tokenizer)
        if abs(theirs.vocabulary - teacher.vocabulary) > PADDED * teacher.vocabulary:
            what = f"'{theirs.name}' has {theirs.vocabulary} tokens, the teacher {teacher.vocabulary}."
            raise InputError(what, where="teacher_tokenizer", fix="Name the tokenizer that the teacher was trained with.")
        self.crossing = CrossTokenizerSource(teacher, theirs, mine, alignment=config.alignment, strategy=config.strategy)
        self.objective: MergedLoss = ULD()
        self.matched = 0
        if config.objective == "gold":
            matches = matching(mine, theirs, (self.student.vocabulary, teacher.vocabulary))
            self.objective, self.matched = GOLD(matches, config.beta, config.weights), len(matches.student)
        sampler = stopping(config.sampler, self.train_data)
        self.source = GKDSource(self.student, None, sampler, config.prompts, config.student_share, "data", config.each)
        self._kept: dict[tuple[int, int, int], TokenBatch] = {}

    def weigh(self, batch: Batch, clock: Clock) -> Tensor:
        """The number of the student's targets; tokens that have to be drawn are drawn here and kept for `updates`."""
        self._kept[clock.phase_index, clock.step, clock.micro] = tokens = self.source.next(self.tokens(batch), Draws.at(clock, self.config.each))
        return tokens.valid.sum()

    def updates(self, batch: Batch, clock: Clock) -> Iterator[Update]:
        """One update of the student."""
        config = self.config
        kept = self._kept.pop((clock.phase_index, clock.step, clock.micro), None)
        tokens = self.source.next(self.tokens(batch), Draws.at(clock, config.each)) if kept is None else kept
        signal = self.crossing.pair(tokens)
        rows, head = tokens.rows(), self.student.head()
        hidden_Nd = rows.gather(self.student.hidden(tokens))
        found = cross_tokenizer_loss(hidden_Nd, head, rows.targets_N, signal, self._objective(hidden_Nd.device), strategy=config.strategy)
        loss = config.soft * found.loss
        metrics = {"soft": found.loss, **found.parts}
        if config.hard > 0:
            metrics["hard"] = linear_divergence(hidden_Nd, head, None, CrossEntropy(), rows).loss
            loss = loss + config.hard * metrics["hard"]
        if tokens.source is not None:
            metrics["drawn"] = (tokens.source != DATA).float().mean()
        yield Update("student", loss, metrics)

    def _objective(self, device: torch.device) -> MergedLoss:
        """The objective with its ids on the device, where they are moved once."""
        if isinstance(self.objective, GOLD) and self.objective.matches.student.device != device:
            self.objective = GOLD(self.objective.matches.to(device), self.objective.beta, self.objective.weights)
        return self.objective

    def facts(self) -> dict[str, Any]:
        """How many ids of both vocabularies spell the same ('gold')."""
        return {"matched_ids": self.matched} if self.config.objective == "gold" else {}
