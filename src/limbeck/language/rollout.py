"""Drawing texts from a language model: prompts, samplers, rows that say what was drawn and how likely it was (sheet `_language_distillation_engine` §6).

Legend: B rows, P width of the prompts, T tokens drawn, V vocabulary, d width; z logits, τ the sampler's temperature, π = σ(z/τ) the model at that temperature,
μ what is really drawn from: π cut to its nucleus and renormalised, or a mixture of two such. A position i of the result holds what predicts target y:

    behaviour/model_logp    log π(y)   of the first model, uncut and unmixed
    behaviour/sampler_logp  log μ(y)   so that exp(model − sampler) is the importance weight π/μ of what was drawn

Prompts are padded on the left; positions count from the first real token. The last token drawn is a target only, as in
`TokenBatch.from_text`. Nothing here carries a gradient; models answer in eval mode and are as they were afterwards.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from limbeck import seeds
from limbeck.contract import IGNORE, Frozen
from limbeck.errors import InputError
from limbeck.language.models import LanguageModel
from limbeck.language.tokens import PADDING, STUDENT, TokenBatch
from limbeck.modes import evaluating

MODEL_LOGP, SAMPLER_LOGP, PROMPT, SAMPLER = "behaviour/model_logp", "behaviour/sampler_logp", "prompt", "sampler"
"""Annotations of drawn rows: [B, L] float32 (0 where nothing was drawn), the same, [B, L] bool, and [B] int64 (`Sampler.identity`)."""

CHECK_EVERY = 8
"""Tokens between two looks at whether every row has ended (each is a wait for the device)."""


class Sampler(Frozen):
    """How tokens are drawn. Defaults: GKD's (sheet §6). `top_k` 1 is greedy."""

    temperature: float = Field(0.9, gt=0, le=1000, description="τ, divides the logits; another thing than a divergence's temperature")
    top_p: float = Field(1.0, gt=0, le=1, description="the smallest set of tokens with at least this probability (GOLD: 0.95); 1: all")
    top_k: int = Field(0, ge=0, description="the most likely k tokens; 0: all")
    max_new: int = Field(128, ge=1, le=1_000_000, description="tokens drawn at most")
    stop: tuple[int, ...] = Field((), description="ids that end a text; the first one is kept, as a target")

    @property
    def identity(self) -> int:
        """A number of 63 bits, the same for equal settings: the sampler id of drawn rows."""
        return seeds.derive("sampler", *(repr(value) for value in (self.temperature, self.top_p, self.top_k, self.max_new, self.stop)))


@dataclass(frozen=True)
class Prompts:
    """Left-padded prompts: ids_BP [B, P] int64 (0 at padding), mask_BP [B, P] bool (False at padding)."""

    ids_BP: Tensor
    mask_BP: Tensor

    def __len__(self) -> int:
        return len(self.ids_BP)

    @classmethod
    def of(cls, rows: Sequence[Sequence[int]], device: torch.device | str = "cpu") -> Prompts:
        """Lists of ids.

        Raises:
            InputError: there is none, or one is empty.
        """
        if not rows or not all(len(row) for row in rows):
            raise InputError(
                "a prompt needs at least one token, and there must be one prompt.", where="prompts", fix="Begin each with the tokenizer's first token."
            )
        width = max(len(row) for row in rows)
        ids = torch.tensor([[0] * (width - len(row)) + list(row) for row in rows], dtype=torch.int64)
        mask = torch.tensor([[False] * (width - len(row)) + [True] * len(row) for row in rows])
        return cls(ids.to(device), mask.to(device))

    @classmethod
    def prefixes(cls, tokens: TokenBatch, length: int) -> Prompts:
        """The first `length` tokens of each row's first text (fewer where it is shorter): [B, ≤ length].

        Raises:
            InputError: length is below 1.
        """
        if length < 1:
            raise InputError(f"a prompt of {length} tokens is none.", where="length", fix="Take 1 or more.")
        return _left_padded(tokens.input_ids, _first_text(tokens) & (tokens.positions < length), length)

    @classmethod
    def parts(cls, tokens: TokenBatch) -> Prompts:
        """The prompt part of each row's first text: what stands before its first target token (all of it where there is no target).

        Targets are shifted: the position that predicts the first of them is the prompt's last. Rows without a mask have prompts of one token.
        """
        text_BL = _first_text(tokens)
        answered_BL = (tokens.valid & text_BL).to(torch.int64).cumsum(1)  # 1 at the position of the first target, more behind it
        first_BL = (answered_BL == 0) | ((answered_BL == 1) & tokens.valid)
        return _left_padded(tokens.input_ids, text_BL & first_BL, tokens.input_ids.shape[1])

    def repeated(self, n: int) -> Prompts:
        """Each prompt n times, side by side."""
        return self if n == 1 else Prompts(self.ids_BP.repeat_interleave(n, 0), self.mask_BP.repeat_interleave(n, 0))


@dataclass(frozen=True)
class Mixture:
    """A second model that draws along: μ = (1 − share)·first + share·model, each cut by the sampler (MiniLLM's teacher-mixed sampling, share a = 0.2)."""

    model: LanguageModel
    share: float = 0.2


def _first_text(tokens: TokenBatch) -> Tensor:
    """[B, L] bool: the positions of each row's first segment that is no padding."""
    text_BL = tokens.segments != PADDING
    first_B1 = text_BL.to(torch.int8).argmax(1, keepdim=True)
    return text_BL & (tokens.segments == tokens.segments.gather(1, first_B1))


def _left_padded(ids_BL: Tensor, keep_BL: Tensor, width: int) -> Prompts:
    """The kept tokens of each row at its right end, in order; at most `width` columns (no row keeps more)."""
    order_BL = keep_BL.to(torch.int8).argsort(dim=1, stable=True)
    mask_BP = keep_BL.gather(1, order_BL)[:, -width:]
    ids_BP = ids_BL.gather(1, order_BL)[:, -width:]
    return Prompts(ids_BP.masked_fill(~mask_BP, 0), mask_BP)


def truncated(logp_BV: Tensor, sampler: Sampler) -> Tensor:
    """Log-probabilities cut to the sampler's k most likely tokens, then to its nucleus, renormalised: [B, V], −inf outside.

    The nucleus is the fewest most likely tokens that reach `top_p`; the most likely one is always in it.
    """
    V = logp_BV.shape[1]
    if 0 < sampler.top_k < V:
        values_Bk, places_Bk = logp_BV.topk(sampler.top_k, dim=1)
        logp_BV = torch.full_like(logp_BV, -math.inf).scatter(1, places_Bk, values_Bk).log_softmax(1)
    if sampler.top_p < 1:
        sorted_BV, places_BV = logp_BV.sort(dim=1, descending=True, stable=True)
        p_BV = sorted_BV.exp()
        before_BV = p_BV.cumsum(1) - p_BV
        before_BV[:, 0] = 0
        cut_BV = sorted_BV.masked_fill(before_BV >= sampler.top_p, -math.inf)
        logp_BV = torch.empty_like(cut_BV).scatter(1, places_BV, cut_BV).log_softmax(1)
    return logp_BV


class _Walker:
    """One model, its cache, and where its rows stand."""

    def __init__(self, model: LanguageModel) -> None:
        self.model, self.head, self.cache = model, model.head(), None

    def step(self, ids_BT: Tensor, positions_BT: Tensor, attention_BS: Tensor, temperature: float) -> Tensor:
        """log π of the next token of every row, [B, V] float32."""
        hidden_BTd, self.cache = self._step(ids_BT, positions_BT, attention_BS)
        logits_BV = self.head.logits(hidden_BTd[:, -1])
        return (logits_BV.to(torch.promote_types(logits_BV.dtype, torch.float32)) / temperature).log_softmax(-1)

    def _step(self, ids_BT: Tensor, positions_BT: Tensor, attention_BS: Tensor) -> tuple[Tensor, Any]:
        return self.model.step(ids_BT, positions_BT, attention_BS, self.cache)


class Rollout:
    """How texts are drawn from a model (sheet §9)."""

    @staticmethod
    @torch.no_grad()
    def generate(
        model: LanguageModel,
        prompts: Prompts,
        sampler: Sampler,
        n: int,
        generator: torch.Generator,
        *,
        source: int = STUDENT,
        mixed_with: Mixture | None = None,
    ) -> TokenBatch:
        """Draw n continuations of each prompt.

        Args:
            prompts: B of them; those of one prompt stand side by side in the result. generator: on the model's device; the same state gives the same tokens.
            source: what `TokenBatch.source` says (STUDENT or TEACHER). mixed_with: a second model that draws along.

        Returns:
            [B·n, P + T − 1], T ≤ max_new: prompts, then what was drawn; targets at drawn tokens only, a first stop id included and nothing after it.
            Annotations: see the top of this file. A row whose prompt is all padding draws nothing.

        Raises:
            InputError: n below 1, models of different vocabularies, or a share outside [0, 1].
        """
        if n < 1:
            raise InputError(f"{n} continuations cannot be drawn.", where="n", fix="Draw 1 or more.")
        if mixed_with is not None and mixed_with.model.vocabulary != model.vocabulary:
            what = f"two models draw together, with vocabularies of {model.vocabulary} and {mixed_with.model.vocabulary}."
            raise InputError(what, where="mixed_with", fix="Both must have one tokenizer.")
        if mixed_with is not None and not 0 <= mixed_with.share <= 1:
            raise InputError(f"a share of {mixed_with.share} lies outside [0, 1].", where="mixed_with.share")
        prompts = prompts.repeated(n)
        if mixed_with is None:
            with evaluating(model):
                return _draw([_Walker(model)], 0.0, prompts, sampler, generator, source)
        with evaluating(model), evaluating(mixed_with.model):
            return _draw([_Walker(model), _Walker(mixed_with.model)], mixed_with.share, prompts, sampler, generator, source)


def _draw(walkers: list[_Walker], share: float, prompts: Prompts, sampler: Sampler, generator: torch.Generator, source: int) -> TokenBatch:
    """The loop over tokens."""
    ids_BT, mask_BP = prompts.ids_BP, prompts.mask_BP
    device = ids_BT.device
    positions_BT = (mask_BP.cumsum(1) - 1).clamp(min=0)
    done_B = ~mask_BP.any(1)
    attention_BS = mask_BP.clone()
    attention_BS[:, -1] |= done_B  # a row of padding sees one token, so that its softmax is defined
    length_B = mask_BP.sum(1)
    stop = torch.tensor(sampler.stop, dtype=torch.int64, device=device)
    drawn: list[Tensor] = []
    live = [~done_B]
    own: list[Tensor] = []
    behaviour: list[Tensor] = []
    for t in range(sampler.max_new):
        told = [walker.step(ids_BT, positions_BT, attention_BS, sampler.temperature) for walker in walkers]
        cut_BV = truncated(told[0], sampler)
        if len(walkers) > 1:
            cut_BV = _mixed(cut_BV, truncated(told[1], sampler), share)
        y_B1 = torch.multinomial(cut_BV.exp(), 1, generator=generator)
        drawn.append(y_B1[:, 0])
        own.append(told[0].gather(1, y_B1)[:, 0])
        behaviour.append(cut_BV.gather(1, y_B1)[:, 0])
        if sampler.stop:
            done_B = done_B | torch.isin(y_B1[:, 0], stop)
        live.append(~done_B)
        if sampler.stop and (t + 1) % CHECK_EVERY == 0 and bool(done_B.all()):
            break
        ids_BT = y_B1.masked_fill(done_B[:, None], 0)
        positions_BT = length_B[:, None]
        length_B = length_B + live[-1].to(length_B.dtype)
        attention_BS = torch.cat((attention_BS, live[-1][:, None]), 1)
    return _rows(prompts, torch.stack(drawn, 1), torch.stack(live, 1), torch.stack(own, 1), torch.stack(behaviour, 1), sampler, source)


def _mixed(first_BV: Tensor, second_BV: Tensor, share: float) -> Tensor:
    """log((1 − share)·first + share·second), −inf where both have nothing."""
    if share in (0.0, 1.0):
        return second_BV if share else first_BV
    return torch.logaddexp(first_BV + math.log1p(-share), second_BV + math.log(share))


def _rows(prompts: Prompts, drawn_BT: Tensor, live_BT1: Tensor, own_BT: Tensor, behaviour_BT: Tensor, sampler: Sampler, source: int) -> TokenBatch:
    """What was drawn as a batch; live_BT1 [B, T + 1]: whether a row had not ended before its t-th token."""
    B, P = prompts.ids_BP.shape
    live_BT = live_BT1[:, :-1]
    text_BL = torch.cat((prompts.mask_BP, live_BT1[:, 1:-1]), 1)
    ids_BL = torch.cat((prompts.ids_BP, drawn_BT[:, :-1]), 1).masked_fill(~text_BL, 0)

    def behind(values_BT: Tensor, elsewhere: float) -> Tensor:
        """[B, L]: values of drawn tokens at the positions that predict them."""
        before_BP = values_BT.new_full((B, P - 1), elsewhere)
        return torch.cat((before_BP, values_BT.masked_fill(~live_BT, elsewhere)), 1)

    prompt_BL = torch.cat((prompts.mask_BP, torch.zeros_like(live_BT[:, 1:])), 1)
    return TokenBatch(
        input_ids=ids_BL,
        positions=(text_BL.cumsum(1) - 1).clamp(min=0),
        segments=torch.where(text_BL, 0, PADDING),
        targets=behind(drawn_BT, IGNORE),
        source=ids_BL.new_full((B,), source),
        annotations={
            MODEL_LOGP: behind(own_BT, 0.0),
            SAMPLER_LOGP: behind(behaviour_BT, 0.0),
            PROMPT: prompt_BL,
            SAMPLER: ids_BL.new_full((B,), sampler.identity),
        },
    )


def importance_weights(tokens: TokenBatch, *, largest: float = math.inf) -> Tensor:
    """π(y)/μ(y) of every drawn token, [B, L] float32, 0 where there is no target: what corrects an expectation over μ to one over π, token by token.

    π is the model at the sampling temperature. MiniLLM uses these per-token weights in place of the product over the text (2306.08543, sheet §6).
    largest: what they are cut to; no cut by default.

    Raises:
        InputError: the rows were not drawn by `Rollout`.
    """
    if SAMPLER_LOGP not in tokens.annotations:
        raise InputError("the rows carry no behaviour log-probabilities.", where="tokens", fix="Draw them with Rollout.generate.")
    weight_BL = (tokens.annotations[MODEL_LOGP] - tokens.annotations[SAMPLER_LOGP]).exp().clamp(max=largest)
    return torch.where(tokens.valid, weight_BL, 0.0)
