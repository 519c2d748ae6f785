"""GKD: On-Policy Distillation of Language Models (Agarwal et al., arXiv 2306.13649), with DistiLLM's schedule (Ko et al., arXiv 2402.03898) as an option.

L = D(p, q), a mean over the targets of tokens that come from the student (probability λ), else from the data or, for sequence-level distillation, the teacher.
D is the generalised Jensen–Shannon divergence β KL(p‖m) + (1 − β) KL(q‖m), m = βp + (1 − β)q; p teacher, q student (sheet `_language_distillation_engine`
§2, §6). Nothing flows through the drawing of tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from limbeck.contract import Batch, Clock, Frozen, Paper, Update
from limbeck.errors import InputError
from limbeck.language.divergences import CrossEntropy, Divergence, divergence_from
from limbeck.language.rollout import Sampler
from limbeck.language.token_sources import (
    AdaptiveThreshold,
    DistiLLMSource,
    Draws,
    Each,
    GKDSource,
    PromptSpec,
    ReplayBuffer,
    TokenSource,
    live_model,
    stopping,
)  # fmt: skip
from limbeck.language.tokens import DATA, TokenBatch
from limbeck.methods.language._base import LanguageMethod
from limbeck.modes import evaluating

VALIDATION_BATCH = 16
"""Rows of one forward pass of a validation."""


class DistiLLMSpec(Frozen):
    """DistiLLM's schedule. It needs validation data."""

    every: int = Field(200, ge=1, description="steps between two validations of the student; the first is before the first step")
    rows: int = Field(256, ge=1, description="validation rows that are looked at, from the first on")
    rise: float = Field(0.1, gt=0, le=1, description="what φ rises by (code)")
    tolerance: float = Field(0.1, ge=0, description="nats above the reference at which φ rises (code)")
    reference: Literal["previous", "last_rise"] = Field("previous", description="what a validation is compared with; the released code: 'last_rise'")
    capacity: int = Field(1000, ge=1, le=1_000_000, description="student texts that are kept for replay (paper)")
    filling: Literal["replay", "generate"] = Field("replay", description="from ψ to φ before the buffer is full; the released code: 'generate'")


class GKDConfig(Frozen):
    """Knobs of `GKD`."""

    divergence: Literal["jsd", "forward_kl", "reverse_kl", "skew_forward_kl", "skew_reverse_kl"] = Field("jsd", description="D; DistiLLM: skew_…")
    beta: float = Field(0.5, ge=0, le=1, description="'jsd': β, 0 is forward and 1 reverse KL, by convention (paper: 0.1, 0.5, 0.9)")
    alpha: float = Field(0.1, ge=0, lt=1, description="'skew_…': α (DistiLLM: 0.1)")
    temperature: float = Field(1.0, gt=0, le=1000, description="τ of the divergence, both sides; not the sampler's")
    student_share: float = Field(0.5, ge=0, le=1, description="λ, probability of the student's tokens; schedule 'distillm' has φ instead")
    rest: Literal["data", "teacher"] = Field("data", description="the other tokens: the data's, or drawn from the teacher (sequence-level distillation)")
    each: Each = Field("batch", description="one choice a batch (paper), or a row, which is steadier on small batches")
    schedule: Literal["fixed", "distillm"] = Field("fixed", description="λ fixed, or DistiLLM's adaptive threshold with replay")
    distillm: DistiLLMSpec = DistiLLMSpec()
    sampler: Sampler = Field(Sampler(), description="how tokens are drawn; without stop ids the tokenizer's end of text")
    prompts: PromptSpec = Field(PromptSpec(), description="what is given of a row where the rest is drawn")


def divergence_of(config: GKDConfig) -> Divergence:
    """D."""
    own: dict[str, float] = {"beta": config.beta} if config.divergence == "jsd" else {"alpha": config.alpha} if "skew" in config.divergence else {}
    return divergence_from(config.divergence, temperature=config.temperature, **own)


class GKD(LanguageMethod):
    """The student learns what a live teacher says of the student's own texts, and of the data's (or the teacher's)."""

    Config = GKDConfig
    paper: ClassVar[Paper] = Paper("On-Policy Distillation of Language Models: Learning from Self-Generated Mistakes", "2306.13649", "ICLR 2024", 2024)

    def setup(self) -> None:
        """Choose the source of tokens."""
        config = self.config
        self.divergence = divergence_of(config)
        self._kept: dict[tuple[int, int, int], TokenBatch] = {}
        sampler = stopping(config.sampler, self.train_data)
        self.source: TokenSource
        if config.schedule == "distillm":
            if self.validation is None or not len(self.validation):
                what = "the schedule 'distillm' follows the student's loss on validation data, and there are none."
                raise InputError(what, where="data.validation", fix="Set data.validation, or schedule: fixed.")
            self.require_live("the schedule 'distillm'")
            spec = config.distillm
            threshold = AdaptiveThreshold(spec.rise, spec.tolerance, spec.reference)
            self.source = DistiLLMSource(self.student, sampler, config.prompts, threshold, ReplayBuffer(spec.capacity), spec.filling, config.each)
            return
        if config.student_share > 0:
            self.require_live("'gkd' with student_share above 0")
        teacher = live_model(self.teacher, "'rest: teacher'") if config.rest == "teacher" else None
        self.source = GKDSource(self.student, teacher, sampler, config.prompts, config.student_share, config.rest, config.each)

    def weigh(self, batch: Batch, clock: Clock) -> Tensor:
        """The number of targets of the tokens that the step learns from; those that have to be drawn are drawn here and kept for `updates`."""
        self._kept[clock.phase_index, clock.step, clock.micro] = tokens = self._drawn(batch, clock)
        return tokens.valid.sum()

    def updates(self, batch: Batch, clock: Clock) -> Iterator[Update]:
        """One update of the student."""
        kept = self._kept.pop((clock.phase_index, clock.step, clock.micro), None)
        tokens = self._drawn(batch, clock) if kept is None else kept
        found = self.losses(tokens, self.divergence, self.asked(tokens))
        metrics: dict[str, Tensor] = {}
        if tokens.source is not None:
            metrics["drawn"] = (tokens.source != DATA).float().mean()
        if isinstance(self.source, DistiLLMSource):
            metrics["threshold"] = torch.tensor(self.source.threshold.value)
        yield Update("student", found.loss, metrics)

    def _drawn(self, batch: Batch, clock: Clock) -> TokenBatch:
        """The tokens of this step."""
        if isinstance(self.source, DistiLLMSource) and clock.micro == 0 and clock.step % self.config.distillm.every == 0:
            self.source.threshold.observe(self._validated(batch.inputs.device))
        return self.source.next(self.tokens(batch), Draws.at(clock, self.config.each))

    @torch.no_grad()
    def _validated(self, device: torch.device) -> float:
        """The student's cross-entropy on validation rows, nats a target."""
        data = self.validation
        assert data is not None
        sums = torch.zeros(2, dtype=torch.float64, device=device)
        with evaluating(self.student):
            for ids in torch.arange(min(len(data), self.config.distillm.rows)).split(VALIDATION_BATCH):
                tokens = TokenBatch.from_inputs(data.prepare(data.fetch(ids)[0]).to(device))
                count = tokens.valid.sum()
                sums += torch.stack((self.losses(tokens, CrossEntropy()).loss * count, count)).to(sums)
        return float(sums[0] / sums[1].clamp(min=1))

    def state_dict(self) -> dict[str, Any]:
        """DistiLLM's threshold and replay buffer (those of the first process)."""
        if not isinstance(self.source, DistiLLMSource):
            return {}
        return {"threshold": self.source.threshold.state_dict(), "buffer": self.source.buffer.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put them back."""
        if isinstance(self.source, DistiLLMSource) and state:
            self.source.threshold.load_state_dict(state["threshold"])
            self.source.buffer.load_state_dict(state["buffer"])

    def facts(self) -> dict[str, Any]:
        """Where φ ended, and how many texts were kept."""
        if not isinstance(self.source, DistiLLMSource):
            return {}
        return {"threshold": self.source.threshold.value, "kept_texts": len(self.source.buffer)}
