"""Divergences between a teacher's and a student's next-token distributions, with their exact gradients at the student's logits (engine sheet §1, §2, §4).

Legend: N positions, n of a chunk, V vocabulary (or any outcomes), p = softmax(u/τ_p) teacher, q = softmax(z/τ_q) student, m a mixture.
Natural logarithms. Half precision is computed in float32. 0 · (−inf) = 0: an entry that is masked (−inf) on a side has probability 0 there and adds what
its limit adds. A value that IS infinite is infinite: KL(p‖q) where p > 0 = q, KL(q‖p) where q > 0 = p; gradients are undefined there.

| class | ℓ | τ_q ∂ℓ/∂z_v |
|---|---|---|
| ForwardKL | KL(p‖q) | q_v − p_v |
| ReverseKL | KL(q‖p) | q_v (log(q_v/p_v) − ℓ) |
| GeneralisedJSD β | β KL(p‖m) + (1 − β) KL(q‖m), m = βp + (1 − β)q | (1 − β) q_v (log(q_v/m_v) − Σ_u q_u log(q_u/m_u)) |
| SkewForwardKL α | KL(p‖m), m = αp + (1 − α)q | −(1 − α) q_v (p_v/m_v − Σ_u q_u p_u/m_u) |
| SkewReverseKL α | KL(q‖m), m = (1 − α)p + αq | q_v (r_v − Σ_u q_u r_u), r = log(q/m) − α q/m |
| TotalVariation | ½ Σ|p − q| | ½ q_v (sgn(q − p)_v − Σ_u q_u sgn(q − p)_u) |
| LogitMSE | (1/V) Σ (z − u)² | 2 (z_v − u_v)/V |
| CrossEntropy | −log q_y | q_v − 1[v = y] |

Sources: KL of both directions and β (GKD, arXiv 2306.13649), skew (DistiLLM, 2402.03898); gradients: the sheet's. Each row of one sums to 0 (that of LogitMSE
where centred).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from limbeck.errors import InputError, suggestion
from limbeck.language.signals import DenseLike, TakenSignal, TeacherSignal, TopKSignal
from limbeck.language.sparse import (
    check_policy,
    draw_weights,
    entries,
    has_tail,
    spread_kept,
    spread_tail,
    student_masses,
    student_outcomes,
    teacher_outcomes,
)  # fmt: skip
from limbeck.language.tokens import TokenRows
from limbeck.losses.divergences import full_precision, log_probabilities

# ---- functions of log-probabilities, with a graph -----------------------------------------------------------------------


def _expected(prob_NV: Tensor, what_NV: Tensor) -> Tensor:
    """Σ_v prob · what, [N], with 0 · anything = 0 in value and gradient."""
    return (prob_NV * torch.where(prob_NV > 0, what_NV, torch.zeros_like(what_NV))).sum(-1)


def _log(m_NV: Tensor) -> Tensor:
    """log m, finite where m is 0."""
    return m_NV.clamp(min=torch.finfo(m_NV.dtype).tiny).log()


def forward_kl(logp_NV: Tensor, logq_NV: Tensor) -> Tensor:
    """KL(p‖q) = Σ p log(p/q), [N]. Arguments of all these functions: log-probabilities [N, V], −inf allowed."""
    return _expected(logp_NV.exp(), logp_NV - logq_NV)


def reverse_kl(logp_NV: Tensor, logq_NV: Tensor) -> Tensor:
    """KL(q‖p), [N]."""
    return forward_kl(logq_NV, logp_NV)


def generalised_jsd(logp_NV: Tensor, logq_NV: Tensor, beta: float, *, normalise: bool = False) -> Tensor:
    """β KL(p‖m) + (1 − β) KL(q‖m), m = βp + (1 − β)q, [N].

    Args:
        beta: in [0, 1]. 0 is forward KL and 1 reverse KL BY CONVENTION (GKD's): the formula itself goes to 0 there, so the loss jumps.
        normalise: divide by β(1 − β): then 0 and 1 are its limits, and there is no jump (ours).
    """
    if beta == 0.0:
        return forward_kl(logp_NV, logq_NV)
    if beta == 1.0:
        return reverse_kl(logp_NV, logq_NV)
    p_NV, q_NV = logp_NV.exp(), logq_NV.exp()
    logm_NV = _log(beta * p_NV + (1 - beta) * q_NV)
    found_N = beta * _expected(p_NV, logp_NV - logm_NV) + (1 - beta) * _expected(q_NV, logq_NV - logm_NV)
    return found_N / (beta * (1 - beta)) if normalise else found_N


def skew_forward_kl(logp_NV: Tensor, logq_NV: Tensor, alpha: float) -> Tensor:
    """KL(p‖αp + (1 − α)q), [N], at most log(1/α). alpha: in [0, 1)."""
    if alpha == 0.0:
        return forward_kl(logp_NV, logq_NV)
    p_NV = logp_NV.exp()
    return _expected(p_NV, logp_NV - _log(alpha * p_NV + (1 - alpha) * logq_NV.exp()))


def skew_reverse_kl(logp_NV: Tensor, logq_NV: Tensor, alpha: float) -> Tensor:
    """KL(q‖(1 − α)p + αq), [N], at most log(1/α). alpha: in [0, 1)."""
    return skew_forward_kl(logq_NV, logp_NV, alpha)


def total_variation(logp_NV: Tensor, logq_NV: Tensor) -> Tensor:
    """½ Σ|p − q|, [N], in [0, 1]; no gradient through the corners p = q."""
    return 0.5 * (logq_NV.exp() - logp_NV.exp()).abs().sum(-1)


def logit_mse(u_NV: Tensor, z_NV: Tensor, *, centred: bool = False) -> Tensor:
    """(1/V) Σ (z − u)², [N], of LOGITS; centred: both are brought to mean 0 over the vocabulary first. Entries that are −inf on both sides are left out."""
    d_NV, here_NV = _difference(u_NV, z_NV)
    if centred:
        d_NV = torch.where(here_NV, d_NV - d_NV.sum(-1, keepdim=True) / here_NV.sum(-1, keepdim=True).clamp(min=1), 0)
    return d_NV.square().sum(-1) / z_NV.shape[-1]


def _difference(u_NV: Tensor, z_NV: Tensor) -> tuple[Tensor, Tensor]:
    """(z − u, 0 where both are −inf; where not)."""
    here_NV = (z_NV != -torch.inf) | (u_NV != -torch.inf)
    return torch.where(here_NV, z_NV, 0) - torch.where(here_NV, u_NV, 0), here_NV


def cross_entropy(logq_NV: Tensor, targets_N: Tensor) -> Tensor:
    """−log q_y, [N]. targets_N: [N] int64 in [0, V)."""
    return -logq_NV.gather(1, targets_N[:, None])[:, 0]


# ---- values with slopes, without a graph --------------------------------------------------------------------------------


FLOOR = -1e35
"""Stands for log 0: finite, so that 0 · log 0 is 0 without a mask (which costs as much as an exponential); a divergence that meets it elsewhere is infinite."""
INFINITE = 1e8
"""Above this a value has met FLOOR."""


class Side(NamedTuple):
    """One side's distribution over outcomes: log prob = log + shift. log_nV: [n, V] ≥ FLOOR, prob_nV: [n, V], shift_n1: [n, 1]. Nobody writes into these."""

    log_nV: Tensor
    prob_nV: Tensor
    shift_n1: Tensor

    @classmethod
    def of(cls, x_nV: Tensor) -> Side:
        """softmax(x): one exponential an entry; the logarithm of the largest probability is the constant."""
        log_nV = (x_nV - x_nV.amax(-1, keepdim=True)).clamp_(min=FLOOR)
        prob_nV = torch.softmax(log_nV, -1)
        return cls(log_nV, prob_nV, prob_nV.amax(-1, keepdim=True).log_())

    @classmethod
    def known(cls, logp_no: Tensor) -> Side:
        """Log-probabilities."""
        return cls(logp_no.clamp(min=FLOOR), logp_no.exp(), torch.zeros_like(logp_no[:, :1]))

    def log_of(self, ids_nk: Tensor) -> Tensor:
        """log prob of some entries, [n, k]."""
        return self.log_nV.gather(1, ids_nk) + self.shift_n1

    def log_to(self, other_nV: Tensor) -> Tensor:
        """log prob − other, a new tensor."""
        return (self.log_nV - other_nV).add_(self.shift_n1)


def _honest(ell_n: Tensor) -> Tensor:
    """ℓ, infinite where it met log 0."""
    return ell_n.masked_fill(ell_n > INFINITE, torch.inf)


def _dot(a_nV: Tensor, b_nV: Tensor) -> Tensor:
    """Σ_v a b, [n, 1]."""
    return torch.linalg.vecdot(a_nV, b_nV)[:, None]


def _centred(weight_nV: Tensor, what_nV: Tensor) -> tuple[Tensor, Tensor]:
    """(w · (what − Σ w what), Σ w what [n, 1]); overwrites what."""
    mean_n1 = _dot(weight_nV, what_nV)
    return what_nV.sub_(mean_n1).mul_(weight_nV), mean_n1


def _forward_slope(P: Side, Q: Side) -> tuple[Tensor, Tensor]:
    d_nV = P.log_nV - Q.log_nV
    ell_n1 = _dot(P.prob_nV, d_nV) + (P.shift_n1 - Q.shift_n1)
    return ell_n1[:, 0], torch.sub(Q.prob_nV, P.prob_nV, out=d_nV)


def _reverse_slope(P: Side, Q: Side) -> tuple[Tensor, Tensor]:
    slope_nV, mean_n1 = _centred(Q.prob_nV, Q.log_nV - P.log_nV)
    return (mean_n1 + (Q.shift_n1 - P.shift_n1))[:, 0], slope_nV


def _log_mixture(P: Side, Q: Side, share: float) -> Tensor:
    """log(share · p + (1 − share) · q), finite where both are 0."""
    return torch.lerp(Q.prob_nV, P.prob_nV, share).clamp_(min=torch.finfo(Q.prob_nV.dtype).tiny).log_()


def _jsd_slope(P: Side, Q: Side, beta: float, scale: float) -> tuple[Tensor, Tensor]:
    logm_nV = _log_mixture(P, Q, beta)
    b_nV = Q.log_to(logm_nV)
    a_n1 = _dot(P.prob_nV, P.log_to(logm_nV))
    slope_nV, mean_n1 = _centred(Q.prob_nV, b_nV)
    return ((beta * a_n1 + (1 - beta) * mean_n1) * scale)[:, 0], slope_nV.mul_((1 - beta) * scale)


def _skew_forward_slope(P: Side, Q: Side, alpha: float) -> tuple[Tensor, Tensor]:
    m_nV = torch.lerp(Q.prob_nV, P.prob_nV, alpha).clamp_(min=torch.finfo(Q.prob_nV.dtype).tiny)
    ratio_nV = P.prob_nV / m_nV
    ell_n1 = _dot(P.prob_nV, P.log_to(m_nV.log_()))
    slope_nV, _ = _centred(Q.prob_nV, ratio_nV)
    return ell_n1[:, 0], slope_nV.mul_(alpha - 1)


def _skew_reverse_slope(P: Side, Q: Side, alpha: float) -> tuple[Tensor, Tensor]:
    m_nV = torch.lerp(Q.prob_nV, P.prob_nV, 1 - alpha).clamp_(min=torch.finfo(Q.prob_nV.dtype).tiny)
    ratio_nV = Q.prob_nV / m_nV
    r_nV = Q.log_to(m_nV.log_())
    ell_n1 = _dot(Q.prob_nV, r_nV)
    slope_nV, _ = _centred(Q.prob_nV, r_nV.sub_(ratio_nV, alpha=alpha))
    return ell_n1[:, 0], slope_nV


def _variation_slope(P: Side, Q: Side) -> tuple[Tensor, Tensor]:
    d_nV = Q.prob_nV - P.prob_nV
    ell_n = 0.5 * d_nV.abs().sum(-1)
    slope_nV, _ = _centred(Q.prob_nV, d_nV.sign_())
    return ell_n, slope_nV.mul_(0.5)


# ---- objects ------------------------------------------------------------------------------------------------------------


class Student:
    """The student's logits of a chunk, z [n, V] at least float32, and their softmax at every temperature that was asked for: parts of a `Mixed` share it."""

    def __init__(self, z_nV: Tensor) -> None:
        self.z_nV = z_nV
        self._sides: dict[float, Side] = {}

    def scaled(self, temperature: float) -> Tensor:
        """z/τ."""
        return self.z_nV if temperature == 1.0 else self.z_nV / temperature

    def at(self, temperature: float) -> Side:
        """softmax(z/τ)."""
        if temperature not in self._sides:
            self._sides[temperature] = Side.of(self.scaled(temperature))
        return self._sides[temperature]


class Divergence(ABC):
    """How a student is compared. Values are [n] a position, without weights and denominators (those are eq. 1's, of whoever sums them)."""

    name: ClassVar[str]
    needs_teacher: ClassVar[bool] = True

    @property
    def parts(self) -> tuple[tuple[float, Divergence], ...]:
        """(weight, what) of a sum; itself, once, otherwise."""
        return ((1.0, self),)

    @property
    def names(self) -> tuple[str, ...]:
        """One name a part; of equals the second gets _2."""
        plain = [part.name for _, part in self.parts]
        return tuple(name if plain[:i].count(name) == 0 else f"{name}_{plain[:i].count(name) + 1}" for i, name in enumerate(plain))

    @property
    def uses_teacher(self) -> bool:
        """Whether any part asks the teacher."""
        return any(part.needs_teacher for _, part in self.parts)

    @abstractmethod
    def value(self, z_nV: Tensor, signal: TeacherSignal | None, rows: TokenRows) -> Tensor:
        """ℓ [n] with a graph to z.

        Args:
            z_nV: [n, V] student's logits, any floating dtype. signal: of these n positions (None where no part asks). rows: the same positions.

        Raises:
            InputError: the signal cannot answer what this divergence asks, or the vocabularies differ.
        """

    @abstractmethod
    def slope(self, student: Student, signal: TeacherSignal | None, rows: TokenRows) -> tuple[Tensor, Tensor]:
        """(ℓ [n], ∂ℓ/∂z [n, V], a new tensor); no graph. As `value_and_grad`, with the softmax shared."""

    @torch.no_grad()
    def value_and_grad(self, z_nV: Tensor, signal: TeacherSignal | None, rows: TokenRows) -> tuple[Tensor, Tensor]:
        """(ℓ [n], G = ∂ℓ/∂z [n, V]), without a graph; arguments and errors as in `value`."""
        return self.slope(Student(full_precision(z_nV)), signal, rows)


def _check_temperature(what: str, value: float) -> None:
    if not (value > 0 and value != float("inf")):
        raise InputError(f"τ = {value:g} is not a number above 0.", where=what, fix="1 leaves logits as they are.")


@dataclass(frozen=True)
class Tempered(Divergence):
    """An f-divergence at temperatures: what all of them share. It takes dense signals, k kept entries under every policy, and single log-probabilities.

    temperature: τ_q > 0. teacher_temperature: τ_p, None: the same. tau_sq: multiply by τ² where both are the same (gradients then do not shrink with τ when
    mixed with cross-entropy); never with two different ones, nor where a transform gave every position its own.
    """

    temperature: float = 1.0
    teacher_temperature: float | None = None
    tau_sq: bool = True
    unbounded_by_teacher: ClassVar[bool] = False

    def __post_init__(self) -> None:
        for what, value in (("temperature", self.temperature), ("teacher_temperature", self.tau_p)):
            _check_temperature(what, value)

    @property
    def tau_p(self) -> float:
        """τ_p."""
        return self.temperature if self.teacher_temperature is None else self.teacher_temperature

    @property
    def factor(self) -> float:
        """τ² or 1 (sheet eq. 2)."""
        return self.temperature**2 if self.tau_sq and self.tau_p == self.temperature else 1.0

    @abstractmethod
    def between(self, logp_NV: Tensor, logq_NV: Tensor) -> Tensor:
        """ℓ [N] of log-probabilities over any outcomes, with a graph."""

    @abstractmethod
    def between_slope(self, P: Side, Q: Side) -> tuple[Tensor, Tensor]:
        """(ℓ [n], ∂ℓ/∂Q.log [n, V], a new tensor)."""

    def value(self, z_nV: Tensor, signal: TeacherSignal | None, rows: TokenRows) -> Tensor:
        """See `Divergence`."""
        x_nV = full_precision(z_nV) / self.temperature if self.temperature != 1.0 else full_precision(z_nV)
        known = _known(signal, rows, self.name, len(z_nV), z_nV.shape[1])
        if not isinstance(known, TopKSignal):
            logp_nV = known.log_probs(0, len(z_nV), self.tau_p).to(x_nV.dtype)
            return self.factor * self.between(logp_nV, torch.log_softmax(x_nV, -1))
        check_policy(known.policy, self.name, infinite=self.unbounded_by_teacher)
        if known.policy == "sampled":
            weight_nk, logp_nk = self._draws(known)
            logq_nk = torch.log_softmax(x_nV, -1).gather(1, known.ids_Nk)
            return self.factor * (weight_nk * (logp_nk - logq_nk)).sum(-1)
        logp_no = teacher_outcomes(known, self.tau_p, z_nV.shape[1]).to(x_nV.dtype)
        return self.factor * self.between(logp_no, student_outcomes(x_nV, known.ids_Nk, tail=has_tail(known, z_nV.shape[1])))

    def slope(self, student: Student, signal: TeacherSignal | None, rows: TokenRows) -> tuple[Tensor, Tensor]:
        """See `Divergence`."""
        z_nV = student.z_nV
        known = _known(signal, rows, self.name, len(z_nV), z_nV.shape[1])
        if not isinstance(known, TopKSignal):
            u_nV = known.logits(0, len(z_nV)).to(z_nV.dtype)
            ell_n, slope_nV = self.between_slope(Side.of(u_nV if self.tau_p == 1.0 else u_nV / self.tau_p), student.at(self.temperature))
        else:
            check_policy(known.policy, self.name, infinite=self.unbounded_by_teacher)
            ell_n, slope_nV = self._sampled_slope(student, known) if known.policy == "sampled" else self._sparse_slope(student, known)
        factor, scale = self.factor, self.factor / self.temperature
        return _honest(ell_n) if factor == 1.0 else _honest(ell_n) * factor, slope_nV if scale == 1.0 else slope_nV.mul_(scale)

    def _sparse_slope(self, student: Student, known: TopKSignal) -> tuple[Tensor, Tensor]:
        z_nV = student.z_nV
        P = Side.known(teacher_outcomes(known, self.tau_p, z_nV.shape[1]).to(z_nV.dtype))
        if not has_tail(known, z_nV.shape[1]):
            x_nk = z_nV.gather(1, entries(known.ids_Nk)[0]) / self.temperature
            Q = Side.known(torch.log_softmax(x_nk.masked_fill(entries(known.ids_Nk)[1], -torch.inf), -1))
            ell_n, slope_no = self.between_slope(P, Q)
            return ell_n, spread_kept(slope_no, known.ids_Nk, z_nV.shape[1])
        full, (ids_nk, absent_nk) = student.at(self.temperature), entries(known.ids_Nk)
        logq_no, rest_nV = student_masses(full.log_of(ids_nk).masked_fill(absent_nk, -torch.inf), full.prob_nV, ids_nk)
        Q = Side.known(logq_no)
        ell_n, slope_no = self.between_slope(P, Q)
        return ell_n, spread_tail(slope_no, rest_nV, Q.prob_nV[:, -1:], known.ids_Nk)

    def _sampled_slope(self, student: Student, known: TopKSignal) -> tuple[Tensor, Tensor]:
        weight_nk, logp_nk = self._draws(known)
        full = student.at(self.temperature)
        logq_nk = full.log_of(known.ids_Nk)
        slope_nV = full.prob_nV * weight_nk.sum(-1, keepdim=True)
        return (weight_nk * (logp_nk - logq_nk)).sum(-1), slope_nV.scatter_add_(1, known.ids_Nk, -weight_nk.to(slope_nV.dtype))

    def _draws(self, known: TopKSignal) -> tuple[Tensor, Tensor]:
        if self.tau_p != known.temperature:
            raise InputError(
                f"draws were made at τ = {known.temperature:g}; they say nothing of {self.tau_p:g}.", where="temperature", fix="Use the record's temperature."
            )
        return draw_weights(known), full_precision(known.logp_Nk)


def _known(signal: TeacherSignal | None, rows: TokenRows, name: str, n: int, vocabulary: int) -> DenseLike | TopKSignal:
    """The signal as one that f-divergences can use."""
    if isinstance(signal, TakenSignal):
        signal = signal.kept(rows.targets_N)
    if signal is None:
        raise InputError(f"{name} asks the teacher, and there is no signal.", where="signal", fix="Give the method a teacher.")
    if isinstance(signal, TopKSignal):
        known: DenseLike | TopKSignal = signal
    elif isinstance(signal, DenseLike):
        known = signal
        if signal.vocabulary != vocabulary:
            raise InputError(
                f"the teacher's vocabulary has {signal.vocabulary:,} entries, the student's {vocabulary:,}.",
                where="teacher",
                fix="Models of one tokenizer that were padded differently: cut both (transforms.CropVocabulary, crop_head). Others: 'cross_tokenizer'.",
            )
    else:
        raise InputError(f"{name} cannot compare with a {type(signal).__name__}.", where="signal", fix="Use a signal over the vocabulary.")
    if len(known) != n:
        raise InputError(f"the signal has {len(known)} positions, the student {n}.", where="signal", fix="Both are over the rows of one batch.")
    return known


@dataclass(frozen=True)
class ForwardKL(Tempered):
    """KL(p‖q): covers the teacher's whole distribution."""

    name: ClassVar[str] = "forward_kl"

    def between(self, logp_NV: Tensor, logq_NV: Tensor) -> Tensor:
        """See `forward_kl`."""
        return forward_kl(logp_NV, logq_NV)

    def between_slope(self, P: Side, Q: Side) -> tuple[Tensor, Tensor]:
        """See `Tempered`."""
        return _forward_slope(P, Q)


@dataclass(frozen=True)
class ReverseKL(Tempered):
    """KL(q‖p): seeks modes of the teacher."""

    name: ClassVar[str] = "reverse_kl"
    unbounded_by_teacher: ClassVar[bool] = True

    def between(self, logp_NV: Tensor, logq_NV: Tensor) -> Tensor:
        """See `reverse_kl`."""
        return reverse_kl(logp_NV, logq_NV)

    def between_slope(self, P: Side, Q: Side) -> tuple[Tensor, Tensor]:
        """See `Tempered`."""
        return _reverse_slope(P, Q)


@dataclass(frozen=True)
class GeneralisedJSD(Tempered):
    """See `generalised_jsd`: β = 0 and 1 are forward and reverse KL by convention. DistiLLM's λ of its "js" is 1 − β (`from_lambda`).

    beta: in [0, 1]. normalise_beta: divide by β(1 − β).
    """

    beta: float = 0.5
    normalise_beta: bool = False
    name: ClassVar[str] = "jsd"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.beta <= 1:
            raise InputError(f"β = {self.beta:g} is not in [0, 1].", where="beta", fix="0.5 is the Jensen-Shannon divergence.")

    @classmethod
    def from_lambda(cls, lam: float) -> GeneralisedJSD:
        """DistiLLM's λ KL(q‖m) + (1 − λ) KL(p‖m) with m = (1 − λ)p + λq: β = 1 − λ."""
        return cls(beta=1 - lam)

    @property
    def unbounded_by_teacher(self) -> bool:  # type: ignore[override]
        """At β = 1 alone."""
        return self.beta == 1.0

    def between(self, logp_NV: Tensor, logq_NV: Tensor) -> Tensor:
        """See `generalised_jsd`."""
        return generalised_jsd(logp_NV, logq_NV, self.beta, normalise=self.normalise_beta)

    def between_slope(self, P: Side, Q: Side) -> tuple[Tensor, Tensor]:
        """See `Tempered`."""
        if self.beta == 0.0:
            return _forward_slope(P, Q)
        if self.beta == 1.0:
            return _reverse_slope(P, Q)
        return _jsd_slope(P, Q, self.beta, 1 / (self.beta * (1 - self.beta)) if self.normalise_beta else 1.0)


@dataclass(frozen=True)
class SkewForwardKL(Tempered):
    """KL(p‖αp + (1 − α)q): bounded, and so are its gradients where q ≈ 0. alpha: in [0, 1), DistiLLM's 0.1; 0 is forward KL."""

    alpha: float = 0.1
    name: ClassVar[str] = "skew_forward_kl"

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_alpha(self.alpha)

    def between(self, logp_NV: Tensor, logq_NV: Tensor) -> Tensor:
        """See `skew_forward_kl`."""
        return skew_forward_kl(logp_NV, logq_NV, self.alpha)

    def between_slope(self, P: Side, Q: Side) -> tuple[Tensor, Tensor]:
        """See `Tempered`."""
        return _skew_forward_slope(P, Q, self.alpha) if self.alpha > 0 else _forward_slope(P, Q)


@dataclass(frozen=True)
class SkewReverseKL(Tempered):
    """KL(q‖(1 − α)p + αq). alpha: in [0, 1), DistiLLM's 0.1; 0 is reverse KL."""

    alpha: float = 0.1
    name: ClassVar[str] = "skew_reverse_kl"

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_alpha(self.alpha)

    @property
    def unbounded_by_teacher(self) -> bool:  # type: ignore[override]
        """At α = 0 alone."""
        return self.alpha == 0.0

    def between(self, logp_NV: Tensor, logq_NV: Tensor) -> Tensor:
        """See `skew_reverse_kl`."""
        return skew_reverse_kl(logp_NV, logq_NV, self.alpha)

    def between_slope(self, P: Side, Q: Side) -> tuple[Tensor, Tensor]:
        """See `Tempered`."""
        return _skew_reverse_slope(P, Q, self.alpha) if self.alpha > 0 else _reverse_slope(P, Q)


def _check_alpha(alpha: float) -> None:
    if not 0 <= alpha < 1:
        raise InputError(f"α = {alpha:g} is not in [0, 1).", where="alpha", fix="DistiLLM's is 0.1.")


@dataclass(frozen=True)
class TotalVariation(Tempered):
    """½ Σ|p − q|."""

    name: ClassVar[str] = "total_variation"

    def between(self, logp_NV: Tensor, logq_NV: Tensor) -> Tensor:
        """See `total_variation`."""
        return total_variation(logp_NV, logq_NV)

    def between_slope(self, P: Side, Q: Side) -> tuple[Tensor, Tensor]:
        """See `Tempered`."""
        return _variation_slope(P, Q)


@dataclass(frozen=True)
class LogitMSE(Divergence):
    """(1/V) Σ (z − u)² of logits, without temperatures. centred: both sides at mean 0 first. It takes dense signals; a mixture's logits are its log p."""

    centred: bool = False
    name: ClassVar[str] = "logit_mse"

    def value(self, z_nV: Tensor, signal: TeacherSignal | None, rows: TokenRows) -> Tensor:
        """See `Divergence`."""
        z_nV = full_precision(z_nV)
        return logit_mse(self._logits(z_nV, signal, rows), z_nV, centred=self.centred)

    def slope(self, student: Student, signal: TeacherSignal | None, rows: TokenRows) -> tuple[Tensor, Tensor]:
        """See `Divergence`."""
        z_nV = student.z_nV
        d_nV, here_nV = _difference(self._logits(z_nV, signal, rows), z_nV)
        if self.centred:
            d_nV = d_nV.sub_(d_nV.sum(-1, keepdim=True) / here_nV.sum(-1, keepdim=True).clamp(min=1)).masked_fill_(~here_nV, 0.0)
        return _dot(d_nV, d_nV)[:, 0] / z_nV.shape[1], d_nV.mul_(2 / z_nV.shape[1])

    def _logits(self, z_nV: Tensor, signal: TeacherSignal | None, rows: TokenRows) -> Tensor:
        known = _known(signal, rows, self.name, len(z_nV), z_nV.shape[1])
        if isinstance(known, TopKSignal):
            raise InputError("kept entries have no logits.", where="signal", fix="Use a divergence of probabilities, or a teacher that is at hand.")
        return known.logits(0, len(z_nV)).to(z_nV.dtype)


@dataclass(frozen=True)
class CrossEntropy(Divergence):
    """−log q_y with the true target; asks no teacher. temperature: τ_q > 0, 1 as a rule."""

    temperature: float = 1.0
    name: ClassVar[str] = "cross_entropy"
    needs_teacher: ClassVar[bool] = False

    def __post_init__(self) -> None:
        _check_temperature("temperature", self.temperature)

    def value(self, z_nV: Tensor, signal: TeacherSignal | None, rows: TokenRows) -> Tensor:
        """See `Divergence`."""
        return cross_entropy(log_probabilities(z_nV, self.temperature), rows.targets_N)

    def slope(self, student: Student, signal: TeacherSignal | None, rows: TokenRows) -> tuple[Tensor, Tensor]:
        """See `Divergence`."""
        full = student.at(self.temperature)
        targets_n1 = rows.targets_N[:, None]
        ell_n = _honest(-full.log_of(targets_n1)[:, 0])
        slope_nV = full.prob_nV.scatter_add(1, targets_n1, -torch.ones_like(full.shift_n1))
        return ell_n, slope_nV if self.temperature == 1.0 else slope_nV.div_(self.temperature)


@dataclass(frozen=True)
class Mixed(Divergence):
    """Σ_i w_i ℓ_i in one pass over the student's logits. terms: ((weight, divergence), ...), weights ≥ 0; a weight of 0 leaves its term out."""

    terms: tuple[tuple[float, Divergence], ...]
    name: ClassVar[str] = "mixed"

    def __post_init__(self) -> None:
        if not self.parts or any(weight < 0 for weight, _ in self.terms):
            raise InputError("a mixture needs a term of a weight above 0, and none below.", where="divergence")

    @property
    def parts(self) -> tuple[tuple[float, Divergence], ...]:
        """The terms, those of mixtures within it too."""
        return tuple((outer * inner, part) for outer, term in self.terms if outer > 0 for inner, part in term.parts)

    def value(self, z_nV: Tensor, signal: TeacherSignal | None, rows: TokenRows) -> Tensor:
        """See `Divergence`."""
        return torch.stack([weight * part.value(z_nV, signal, rows) for weight, part in self.parts]).sum(0)

    def slope(self, student: Student, signal: TeacherSignal | None, rows: TokenRows) -> tuple[Tensor, Tensor]:
        """See `Divergence`."""
        ells, slope_nV = slopes(self, student, signal, rows)
        return torch.stack([weight * ell_n for (weight, _), ell_n in zip(self.parts, ells, strict=True)]).sum(0), slope_nV


def slopes(divergence: Divergence, student: Student, signal: TeacherSignal | None, rows: TokenRows) -> tuple[list[Tensor], Tensor]:
    """(ℓ [n] of every part, unweighted; the weighted sum of their ∂ℓ/∂z [n, V]); no graph."""
    ells: list[Tensor] = []
    total_nV: Tensor | None = None
    for weight, part in divergence.parts:
        ell_n, slope_nV = part.slope(student, signal, rows)
        ells.append(ell_n)
        if total_nV is not None:
            total_nV.add_(slope_nV, alpha=weight)
        else:
            total_nV = slope_nV if weight == 1.0 else slope_nV.mul_(weight)
    assert total_nV is not None
    return ells, total_nV


DIVERGENCES: dict[str, Callable[..., Divergence]] = {
    made.name: made for made in (ForwardKL, ReverseKL, GeneralisedJSD, SkewForwardKL, SkewReverseKL, TotalVariation, LogitMSE, CrossEntropy)
}
"""By the names that recipes use."""


def divergence_from(name: str, **fields: float | bool | None) -> Divergence:
    """The divergence of this name. fields: those of its class (`temperature`, `beta`, ...).

    Raises:
        InputError: the name or a field is unknown, or a value is out of its range.
    """
    if name not in DIVERGENCES:
        raise InputError(f"unknown divergence '{name}'.", where="divergence", fix=suggestion(name, DIVERGENCES))
    made = DIVERGENCES[name]
    known = getattr(made, "__dataclass_fields__", {})
    for field in fields:
        if field not in known:
            raise InputError(f"{name} has no '{field}'.", where=f"divergence.{field}", fix=suggestion(field, known))
    return made(**fields)
