"""FIRST's loss: a student's probabilities of the teacher's k kept entries, normalised over these, against calibrated targets (2408.12168; our sheet's numbers).

Legend: N positions, n of a chunk, V vocabulary (or classes), k kept entries S, ε of the normaliser; P_S the student's probabilities of S under the whole
vocabulary, P̃_S what the student is compared with, t = P̃_T the targets, κ = Σ t.

    "linear":  P̃_S(i) = (P_S(i) + ε) / Σ_j (P_S(j) + ε)               (5)    ℓ = Σ_S t log(t / P̃_S)                              (6)
    "softmax": P̃_S(i) = exp(P_S(i)/c) / Σ_j exp(P_S(j)/c)                     ℓ as (6); what the released script does with its one flag
    "tail":    the k entries and all others as one, t_r = 1 − κ, q_r = 1 − Σ P_S    ℓ = Σ_S t log(t / P_S) + t_r log(t_r / q_r)   (7)
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from limbeck.errors import InputError
from limbeck.language.divergences import Divergence, ForwardKL, Student, forward_kl
from limbeck.language.signals import DenseLike, TeacherSignal, TopKSignal, top_k
from limbeck.language.sparse import has_tail, student_outcomes, teacher_outcomes
from limbeck.language.tokens import TokenRows
from limbeck.losses.divergences import full_precision

Comparison = Literal["linear", "softmax", "tail"]


@dataclass(frozen=True)
class Against:
    """What the student is compared with the targets by. epsilon: of "linear". c > 0: of "softmax"."""

    comparison: Comparison = "linear"
    epsilon: float = 1e-6
    c: float = 1.0

    def normalised(self, logq_Nk: Tensor) -> Tensor:
        """log P̃_S of log P_S, [N, k], without a tail."""
        if self.comparison == "softmax":
            return torch.log_softmax(logq_Nk.exp() / self.c, -1)
        if self.epsilon > 0:
            logq_Nk = torch.logaddexp(logq_Nk, torch.full_like(logq_Nk, math.log(self.epsilon)))
        return torch.log_softmax(logq_Nk, -1)


def matching(logits_NV: Tensor, ids_Nk: Tensor, targets_Nk: Tensor, against: Against = Against()) -> Tensor:
    """ℓ of every position, [N], in nats, with a graph to the logits (at least float32).

    Args:
        logits_NV: [N, V] of the student. ids_Nk: [N, k] int64 in [0, V), different within a row.
        targets_Nk: [N, k] t ≥ 0; rows sum to 1, or with "tail" to at most 1. against: how they are compared.

    The gradient of a row at z is, with q = softmax(z): "linear", ε = 0: P̃_S − t on S and 0 elsewhere, so that the mass outside S is never touched and k = 1
    teaches nothing; "tail": q − t on S, q_v (1 − t_r/q_r) elsewhere. It sums to 0 over v.
    """
    z_NV = full_precision(logits_NV)
    if against.comparison == "tail":
        signal = recalibrated(ids_Nk, targets_Nk)
        tail = has_tail(signal, z_NV.shape[1])
        return forward_kl(teacher_outcomes(signal, 1.0, z_NV.shape[1]).to(z_NV.dtype), student_outcomes(z_NV, ids_Nk, tail=tail))
    logq_Nk = z_NV.gather(1, ids_Nk) - torch.logsumexp(z_NV, -1, keepdim=True)
    return _divergence(targets_Nk.to(z_NV.dtype), against.normalised(logq_Nk))


def _divergence(t_Nk: Tensor, logs_Nk: Tensor) -> Tensor:
    """Σ_S t log(t / P̃_S), [N], with 0 log 0 = 0."""
    return (torch.xlogy(t_Nk, t_Nk) - torch.where(t_Nk > 0, t_Nk * logs_Nk, 0.0)).sum(-1)


def recalibrated(ids_Nk: Tensor, targets_Nk: Tensor) -> TopKSignal:
    """Targets as a signal of kept entries, whose rest is a tail."""
    return TopKSignal(ids_Nk, targets_Nk.log(), policy="tail")


@dataclass(frozen=True)
class Matching(Divergence):
    """`matching` as a divergence: of targets that come as kept entries (`recalibrated`). against: how they are compared."""

    against: Against = Against()
    name: ClassVar[str] = "first"

    def value(self, z_nV: Tensor, signal: TeacherSignal | None, rows: TokenRows) -> Tensor:
        """See `Divergence`."""
        told = _told(signal)
        return matching(z_nV, told.ids_Nk, told.logp_Nk.exp(), self.against)

    def slope(self, student: Student, signal: TeacherSignal | None, rows: TokenRows) -> tuple[Tensor, Tensor]:
        """See `Divergence`. With w_i = P_S(i) ∂ℓ/∂P_S(i) on S the gradient is w_v [v ∈ S] − q_v Σ_S w."""
        told = _told(signal)
        against, ids_nk = self.against, told.ids_Nk
        if against.comparison == "tail":
            return ForwardKL().slope(student, replace(told, policy="tail"), rows)
        full = student.at(1.0)
        t_nk = told.logp_Nk.exp().to(full.prob_nV.dtype)
        logq_nk = full.x_nV.gather(1, ids_nk) - full.lse_n1
        logs_nk = against.normalised(logq_nk)
        w_nk = logs_nk.exp() * t_nk.sum(-1, keepdim=True) - t_nk
        ell_n = _divergence(t_nk, logs_nk)
        if against.comparison == "linear" and against.epsilon == 0:  # Σ_S w = 0
            return ell_n, torch.zeros_like(full.prob_nV).scatter_add_(1, ids_nk, w_nk)
        reached_nk = torch.sigmoid(logq_nk - math.log(against.epsilon)) if against.comparison == "linear" else logq_nk.exp() / against.c  # P_S / (P_S + ε)
        w_nk = w_nk * reached_nk
        return ell_n, (full.prob_nV * -w_nk.sum(-1, keepdim=True)).scatter_add_(1, ids_nk, w_nk)


def _told(signal: TeacherSignal | None) -> TopKSignal:
    if not isinstance(signal, TopKSignal):
        raise InputError(f"'first' compares k kept entries, not a {type(signal).__name__}.", where="signal", fix="Give it `recalibrated` targets.")
    return signal


def kept(signal: TeacherSignal, k: int) -> tuple[Tensor, Tensor]:
    """The k most likely entries of every position: ids [N, k] int64 and log-probabilities [N, k] at temperature 1, most likely first.

    Args:
        signal: what a teacher says; a dense one is looked at some rows at a time. k ≥ 1.

    Raises:
        InputError: the signal keeps fewer than k entries, or was recorded at another temperature; its vocabulary is smaller than k; it is of another sort.
    """
    if isinstance(signal, DenseLike):
        found = top_k(signal, k)
        return found.ids_Nk, found.logp_Nk
    if not isinstance(signal, TopKSignal):
        raise InputError(f"a {type(signal).__name__} has no probabilities of tokens.", where="teacher", fix="Use a language model, or a record of its tokens.")
    if signal.kept < k:
        raise InputError(f"the record keeps {signal.kept} entries, and {k} are asked for.", where="method.k", fix=f"Set k to {signal.kept}, or record anew.")
    if signal.temperature != 1.0:
        raise InputError(f"the record was made at the temperature {signal.temperature:g}.", where="teacher.record", fix="Record at temperature 1.")
    return top(signal.logp_Nk, k, signal.ids_Nk)


def top(logp_NV: Tensor, k: int, ids_NV: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The k largest entries of every row, the largest first, in float32: ids [N, k] int64 (or what `ids_NV` calls them) and values [N, k].

    Raises:
        InputError: there are fewer than k.
    """
    if logp_NV.shape[1] < k:
        raise InputError(f"there are {logp_NV.shape[1]} outcomes, and {k} are to be kept.", where="method.k", fix="Lower k.")
    best_Nk, order_Nk = logp_NV.float().topk(k, -1)
    return (order_Nk if ids_NV is None else ids_NV.gather(1, order_Nk)), best_Nk
