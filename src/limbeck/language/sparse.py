"""Comparing over k kept entries and a tail: a few outcomes a position instead of the vocabulary, and the way back to the vocabulary's gradient (sheet §4).

Legend: n positions, V vocabulary, k kept entries S, o outcomes (k, or k + 1 with the tail last), z student's logits, x = z/τ_q, q = softmax(x).

Every f-divergence is taken between outcomes; with logits a_v = x_v (v ∈ S) and a_r = log Σ_{v∉S} e^{x_v} the student's outcomes are softmax(a), so that
∂ℓ/∂x_v = g_v on S and g_r q_v/q_r off it, where g = ∂ℓ/∂a. q_r is a sum of what is left, not 1 − Σ_S q: nothing cancels and nothing needs a clamp (ours; the
sheet's log(1 − e^{lse}) serves the teacher's side, of which only the kept entries are known).
"""

from __future__ import annotations

import torch
from torch import Tensor

from limbeck.errors import InputError
from limbeck.language.signals import ABSENT, TailPolicy, TopKSignal
from limbeck.losses.divergences import full_precision

LEAST_TAIL = 1e-7
"""Where the kept log-probabilities leave less than this, rounding has eaten the tail; −lse is kept above it."""


def log_tail(logp_nk: Tensor) -> Tensor:
    """log(1 − Σ_k e^{log p}), [n, 1], by log(−expm1(lse)) with lse ≤ −1e-7 (sheet §4)."""
    return torch.log(-torch.expm1(torch.logsumexp(logp_nk, -1, keepdim=True).clamp(max=-LEAST_TAIL)))


def has_tail(signal: TopKSignal, vocabulary: int) -> bool:
    """Whether the outcomes have the tail among them: not where all V entries are kept, and not with "renorm_both"."""
    return signal.policy in ("tail", "renorm_teacher") and signal.kept < vocabulary


def teacher_outcomes(signal: TopKSignal, temperature: float, vocabulary: int) -> Tensor:
    """log p of the outcomes at τ_p, [n, o], rows that sum to 1, at least float32.

    Args:
        signal: any policy but "sampled". temperature: τ_p. vocabulary: V.

    At τ_p ≠ τ_c the kept entries are exact up to a constant, p^{τ_c/τ_p}, but what the tail would sum to is not known: it counts as ONE entry of mass p_r (an
    approximation of the policy "tail"; the other two have no tail to know). Kept masses that sum to 1 or more (a lossy codec) are scaled to 1.

    Raises:
        InputError: the signal is `strict` and the tail would be approximated, or more entries are kept than there are.
    """
    if signal.kept > vocabulary + int((signal.target_logp_N) is not None):
        raise InputError(f"{signal.kept} entries are kept of a vocabulary of {vocabulary}.", where="signal", fix="Compare models that share a tokenizer.")
    logp_nk = full_precision(signal.logp_Nk)
    tail = has_tail(signal, vocabulary)
    if tail:
        rest_n1 = log_tail(logp_nk) if signal.policy == "tail" else torch.full_like(logp_nk[:, :1], -torch.inf)
        logp_nk = torch.cat((logp_nk, rest_n1), 1)
    if temperature != signal.temperature:
        if signal.strict and tail and signal.policy == "tail":
            raise InputError(
                f"the teacher's entries were collected at τ = {signal.temperature:g}; at {temperature:g} their tail is not known.",
                where="temperature",
                fix="Use the record's temperature, or a signal that is not strict: the tail then counts as one entry.",
            )
        logp_nk = logp_nk * (signal.temperature / temperature)
    return torch.log_softmax(logp_nk, -1)


def entries(ids_nk: Tensor) -> tuple[Tensor, Tensor]:
    """(ids to gather and scatter with, which of them are ABSENT), [n, k] each: an absent one points at the row's first."""
    absent_nk = ids_nk == ABSENT
    return torch.where(absent_nk, ids_nk[:, :1], ids_nk), absent_nk


def student_outcomes(x_nV: Tensor, ids_nk: Tensor, *, tail: bool) -> Tensor:
    """log q of the outcomes, [n, o], with a graph to x (the plain path).

    Args:
        x_nV: [n, V] z/τ_q, at least float32. ids_nk: [n, k]. tail: with the tail as the last outcome; without, q is divided by its sum over the entries.
    """
    ids_nk, absent_nk = entries(ids_nk)
    a_no = x_nV.gather(1, ids_nk).masked_fill(absent_nk, -torch.inf)
    if tail:
        rest_nV = x_nV.scatter(1, ids_nk, -torch.inf).clamp(min=torch.finfo(x_nV.dtype).min)  # finite: logsumexp has no gradient where all is −inf
        a_no = torch.cat((a_no, torch.logsumexp(rest_nV, -1, keepdim=True)), 1)
    return torch.log_softmax(a_no, -1)


def student_masses(logq_nk: Tensor, prob_nV: Tensor, ids_nk: Tensor) -> tuple[Tensor, Tensor]:
    """(log q of the k + 1 outcomes [n, k + 1], q with its kept entries set to 0 [n, V], which `spread_tail` wants); no graph.

    Args:
        logq_nk: [n, k] log q of the entries, −inf where absent. prob_nV: [n, V] q. ids_nk: [n, k], as `entries` gives them.
    """
    rest_nV = prob_nV.scatter(1, ids_nk, 0.0)
    return torch.cat((logq_nk, rest_nV.sum(-1, keepdim=True).log()), 1), rest_nV


def spread_tail(slope_no: Tensor, rest_nV: Tensor, rest_n1: Tensor, ids_nk: Tensor) -> Tensor:
    """∂ℓ/∂x [n, V] out of ∂ℓ/∂a [n, k + 1] (module); overwrites rest_nV.

    Args:
        rest_nV: [n, V] q with its kept entries 0. rest_n1: [n, 1] q_r, their sum. ids_nk: [n, k].
    """
    ids_nk, absent_nk = entries(ids_nk)
    rest_nV.mul_(slope_no[:, -1:] / rest_n1.clamp(min=torch.finfo(rest_nV.dtype).tiny))
    return rest_nV.scatter_add_(1, ids_nk, slope_no[:, :-1].masked_fill(absent_nk, 0.0))


def spread_kept(slope_no: Tensor, ids_nk: Tensor, vocabulary: int) -> Tensor:
    """∂ℓ/∂x [n, V] where there is no tail: the slopes at their entries, 0 elsewhere."""
    ids_nk, absent_nk = entries(ids_nk)
    return slope_no.new_zeros(len(slope_no), vocabulary).scatter_add_(1, ids_nk, slope_no.masked_fill(absent_nk, 0.0))


def draw_weights(signal: TopKSignal) -> Tensor:
    """[n, k] importance weights of draws: 1/k where they come from p itself."""
    if signal.draw_weight_Nk is not None:
        return full_precision(signal.draw_weight_Nk)
    return torch.full_like(full_precision(signal.logp_Nk), 1.0 / signal.kept)


def check_policy(policy: TailPolicy, name: str, *, infinite: bool) -> None:
    """Raise InputError where a divergence is infinite or has no estimator under a policy."""
    if policy == "renorm_teacher" and infinite:
        raise InputError(
            f"{name} with 'renorm_teacher' is infinite: the teacher's probability off its kept entries is 0.",
            where="policy",
            fix="Use 'tail' or 'renorm_both'.",
        )
    if policy == "sampled" and name != "forward_kl":
        raise InputError(f"draws estimate the forward KL, not {name}.", where="policy", fix="Use divergence 'forward_kl', or kept entries and a tail.")
