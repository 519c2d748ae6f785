"""Log-probabilities of whole texts, MiniLLM's policy gradient, and preference losses (sheet `_language_distillation_engine` §6 and §9).

Legend: B rows, L positions (position t holds what predicts y_t, `mask_BL` says where there is one), V vocabulary; p teacher, q student, μ what was drawn from.

MiniLLM (2306.08543) minimises KL(q‖p) of texts y ~ q with r_t = log p(y_t) − log q(y_t):

    ∇KL(q‖p) = − E_y [ Σ_t A_t ∇log q(y_t) ],   A_t = Σ_{t'≥t} γ^{t'−t} r_{t'}   (γ = 1)
             = E_y [ Σ_t ∇KL_t − Σ_t A⁺_t ∇log q(y_t) ],   A⁺_t = Σ_{t'>t} …,   KL_t = KL(q‖p) of the one next token, exact over V

Two readings: with `start` "own" A_t holds r_t itself and no other term is needed; with "next" (the paper) the single-step part is the exact reverse KL at every
position, with its gradient: `divergences.ReverseKL` on the drawn rows. The released code uses "own" together with the single-step part, which counts r_t twice.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid
from torch.utils.checkpoint import checkpoint

from limbeck.errors import InputError
from limbeck.language.models import LanguageModel
from limbeck.language.signals import Head
from limbeck.language.tokens import TokenBatch

Start = Literal["own", "next"]
"""Whether A_t begins with r_t or with r_{t+1}."""
Normalise = Literal["none", "count", "discounted"]
"""What A_t is divided by: nothing; the number of its terms (the paper, for γ = 1); the sum of its terms' discounts, so that A_t is a mean (TRL). For γ = 1 the
last two are the same; for γ = 0 "count" divides r_t by the remaining length, "discounted" leaves it."""


# ---- log-probabilities -----------------------------------------------------------------------------------------------


def token_logprob(model: LanguageModel, tokens: TokenBatch, *, temperature: float = 1.0, chunk: int = 512) -> Tensor:
    """log q(y) of every target, [B, L] at least float32, 0 where there is none; with a graph to the model.

    chunk: rows whose logits [chunk, V] are held at once; they are computed again in the backward pass.

    Raises:
        InputError: temperature or chunk is not positive.
    """
    if temperature <= 0 or chunk < 1:
        raise InputError("temperature and chunk must be positive.", where="temperature")
    rows, head = tokens.rows(), model.head()
    hidden_Nd = rows.gather(model.hidden(tokens))
    parts = [
        checkpoint(_chunk_logprob, hidden_Nd[at : at + chunk], head, rows.targets_N[at : at + chunk], temperature, use_reentrant=False)
        for at in range(0, max(len(rows), 1), chunk)  # without any target one part of no rows, so that there is a graph
    ]
    logp_N = torch.cat(parts)
    return logp_N.new_zeros(tokens.targets.numel()).index_copy(0, rows.where_N, logp_N).view_as(tokens.targets)


def _chunk_logprob(hidden_nd: Tensor, head: Head, targets_n: Tensor, temperature: float) -> Tensor:
    logits_nV = head.logits(hidden_nd)
    logits_nV = logits_nV.to(torch.promote_types(logits_nV.dtype, torch.float32)) / temperature
    return logits_nV.gather(1, targets_n[:, None])[:, 0] - logits_nV.logsumexp(1)


def sequence_logprob(model: LanguageModel, tokens: TokenBatch, *, chunk: int = 512) -> Tensor:
    """Σ_t log q(y_t) of each row, [B], over its targets; with a graph to the model. Token weights do not count."""
    return token_logprob(model, tokens, chunk=chunk).sum(1)


# ---- MiniLLM ---------------------------------------------------------------------------------------------------------


def rewards(teacher_logp_BL: Tensor, student_logp_BL: Tensor, mask_BL: Tensor, *, scale: float = 1.0, largest: float = math.inf) -> Tensor:
    """r_t = (log p(y_t) − log q(y_t))/scale within ±largest, 0 outside the mask, without a graph: [B, L]. MiniLLM's released code: scale 0.5, largest 100."""
    r_BL = ((teacher_logp_BL - student_logp_BL).detach() / scale).clamp(-largest, largest)
    return torch.where(mask_BL, r_BL, 0)


def advantages(rewards_BL: Tensor, mask_BL: Tensor, *, gamma: float = 1.0, start: Start = "own", normalise: Normalise = "discounted") -> Tensor:
    """A_t = Σ_{t'≥t} γ^{t'−t} r_{t'} (or t' > t) over what `normalise` says, [B, L], 0 outside the mask (top of this file; 2306.08543, sheet §6).

    mask_BL: the drawn positions of each row, one stretch without gaps. With γ = 0 and start "own" A_t = r_t, unless "count" divides it.

    Raises:
        InputError: gamma outside [0, 1], an unknown start or normalisation.
    """
    if not 0 <= gamma <= 1:
        raise InputError(f"the discount must lie in [0, 1], this is {gamma}.", where="gamma")
    if start not in ("own", "next") or normalise not in ("none", "count", "discounted"):
        raise InputError(f"unknown start '{start}' or normalisation '{normalise}'.", where="start", fix="own, next; none, count, discounted.")
    L = rewards_BL.shape[1]
    places = torch.arange(L, device=rewards_BL.device)
    ahead_LL = places[:, None] - places[None, :]  # [t', t]: t' − t
    seen_LL = ahead_LL >= (0 if start == "own" else 1)
    # from r_{t+1} on the first term has the discount 1: γ^{t'−t−1}, as Σ_{t'≥t+1} γ^{t'−(t+1)}
    power_LL = (ahead_LL - (0 if start == "own" else 1)).clamp(min=0)
    discount_LL = torch.where(seen_LL, torch.as_tensor(gamma, dtype=rewards_BL.dtype, device=rewards_BL.device) ** power_LL, 0)
    mask = mask_BL.to(rewards_BL.dtype)
    sums_BL = (rewards_BL * mask) @ discount_LL
    if normalise != "none":
        terms_BL = mask @ (seen_LL.to(mask.dtype) if normalise == "count" else discount_LL)
        sums_BL = sums_BL / terms_BL.clamp(min=1)
    return sums_BL * mask


def whitened(advantages_BL: Tensor, mask_BL: Tensor) -> Tensor:
    """Mean 0 and variance 1 over the mask, [B, L], 0 outside (MiniLLM's released code; it breaks the equality with the gradient of KL)."""
    mask = mask_BL.to(advantages_BL.dtype)
    count = mask.sum().clamp(min=1)
    mean = (advantages_BL * mask).sum() / count
    variance = ((advantages_BL - mean).square() * mask).sum() / count
    return (advantages_BL - mean) * (variance + 1e-8).rsqrt() * mask


def policy_loss(
    logp_BL: Tensor, old_logp_BL: Tensor, advantages_BL: Tensor, mask_BL: Tensor, *, weight_BL: Tensor | None = None, clip: float | None = 0.2,
) -> Tensor:  # fmt: skip
    """−Σ min(ρ A w, clamp(ρ, 1 ± clip) A w)/(number of drawn tokens), a scalar; ρ = q/q_old (PPO's objective, 1707.06347; sheet §6).

    logp_BL: of the student, with a graph. old_logp_BL: of the student that drew. weight_BL: `rollout.importance_weights`, a constant (None: 1).
    clip: None: no clipping. At ρ = 1 the gradient is −Σ A w ∇log q/(number).

    Raises:
        InputError: clip is not positive.
    """
    if clip is not None and clip <= 0:
        raise InputError(f"a clip of {clip} is not positive.", where="clip", fix="Take 0.2, say, or none.")
    A_BL = advantages_BL.detach() if weight_BL is None else (advantages_BL * weight_BL).detach()
    ratio_BL = torch.where(mask_BL, logp_BL - old_logp_BL.detach(), 0).exp()
    gain_BL = ratio_BL * A_BL
    if clip is not None:
        gain_BL = torch.minimum(gain_BL, ratio_BL.clamp(1 - clip, 1 + clip) * A_BL)
    return -torch.where(mask_BL, gain_BL, 0).sum() / mask_BL.sum().clamp(min=1)


# ---- preferences -----------------------------------------------------------------------------------------------------


def preference_margin(chosen_B: Tensor, rejected_B: Tensor, chosen_reference_B: Tensor, rejected_reference_B: Tensor) -> Tensor:
    """h = log(q(y⁺)/q_ref(y⁺)) − log(q(y⁻)/q_ref(y⁻)), [B]; the reference is a constant. Arguments: `sequence_logprob` of both answers, [B]."""
    return (chosen_B - rejected_B) - (chosen_reference_B - rejected_reference_B).detach()


def dpo_loss(margin_B: Tensor, *, beta: float = 0.1, label_smoothing: float = 0.0) -> Tensor:
    """−(1 − ε) log σ(βh) − ε log σ(−βh), [B] (DPO, 2305.18290 eq. 7; ε > 0: its conservative form). At h = 0 it is ln 2.

    Raises:
        InputError: beta is not positive, or the smoothing lies outside [0, 1/2).
    """
    if beta <= 0 or not 0 <= label_smoothing < 0.5:
        raise InputError(f"beta must be positive and the smoothing in [0, 1/2); these are {beta} and {label_smoothing}.", where="beta")
    return -(1 - label_smoothing) * logsigmoid(beta * margin_B) - label_smoothing * logsigmoid(-beta * margin_B)


def ipo_loss(margin_B: Tensor, *, beta: float = 0.1) -> Tensor:
    """(h − 1/(2β))², [B] (IPO, 2310.12036 eq. 17). h is of sums over tokens, as in the paper; TRL takes means.

    Raises:
        InputError: beta is not positive.
    """
    if beta <= 0:
        raise InputError(f"beta must be positive, this is {beta}.", where="beta")
    return (margin_B - 1 / (2 * beta)).square()
