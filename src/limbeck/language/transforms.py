"""Changing what a teacher says before a student is compared with it (engine sheet §5): composed in order, pure, and as lazy as the signal itself.

Legend: N positions, n of a chunk, V vocabulary, k kept entries, u teacher's logits, p its probabilities, κ = Σ_k p what k kept entries cover.
A transform takes a dense signal to a dense one, worked out for the rows that are asked for, and k kept entries to k kept entries. `preserves` says of the
probabilities: simplex, rows still sum to what they summed to; order, a larger one stays larger; sparsity, zeros stay zeros (and kept entries the same).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, Protocol

import torch
from torch import Tensor

from limbeck import seeds
from limbeck.errors import InputError
from limbeck.language import calibration
from limbeck.language.signals import ABSENT, DenseLike, Head, HeadSignal, MixedSignal, Recast, TeacherSignal, TopKSignal
from limbeck.language.sparse import log_tail
from limbeck.language.tokens import TokenRows
from limbeck.losses.divergences import full_precision

Mass = Literal["one", "kept"]
"""What k kept entries sum to afterwards: "one" (FIRST), or what they summed to before, κ, so that the policy "tail" still has its tail."""


@dataclass(frozen=True)
class Preserves:
    """What a transform leaves; see the module."""

    simplex: bool
    order: bool
    sparsity: bool

    def __and__(self, other: Preserves) -> Preserves:
        return Preserves(self.simplex and other.simplex, self.order and other.order, self.sparsity and other.sparsity)


class Transform(Protocol):
    """(signal, its rows) → signal. It raises InputError where the signal is of a kind that it cannot change."""

    @property
    def preserves(self) -> Preserves:
        """Facts."""
        ...

    def __call__(self, signal: TeacherSignal, rows: TokenRows) -> TeacherSignal:
        """The changed signal over the same rows."""
        ...


@dataclass(frozen=True)
class Chain:
    """Transforms one after the other, the first first."""

    transforms: tuple[Transform, ...]

    @property
    def preserves(self) -> Preserves:
        """What all of them preserve."""
        found = Preserves(True, True, True)
        for transform in self.transforms:
            found = found & transform.preserves
        return found

    def __call__(self, signal: TeacherSignal, rows: TokenRows) -> TeacherSignal:
        """See `Transform`."""
        for transform in self.transforms:
            signal = transform(signal, rows)
        return signal


# ---- the family of temperatures -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Temperature:
    """softmax(u/τ), the teacher alone (sheet §5; per position: Swing).

    tau: τ > 0, or the name of an annotation [N] with one for every position. With kept entries and the policy "tail" the tail is taken for one entry of its
    mass, or refused where the signal is `strict`; other policies are exact. The result counts as collected at temperature 1.
    """

    tau: float | str
    preserves: ClassVar[Preserves] = Preserves(True, True, True)

    def __post_init__(self) -> None:
        if not isinstance(self.tau, str):
            _above_zero(self.tau, "tau")

    def __call__(self, signal: TeacherSignal, rows: TokenRows) -> TeacherSignal:
        """See `Transform`. Raises InputError: there is no such annotation, or the signal is strict."""
        if isinstance(signal, TopKSignal):
            _refuse_draws(signal)
            return self._sparse(signal, self._taus(rows))
        return _recast(signal, rows, lambda u_nV, cut: u_nV / self._taus(cut))

    def _taus(self, rows: TokenRows) -> float | Tensor:
        if not isinstance(self.tau, str):
            return self.tau
        return full_precision(_annotation(rows, self.tau))[:, None]

    def _sparse(self, signal: TopKSignal, taus: float | Tensor) -> TopKSignal:
        logp_Nk = full_precision(signal.logp_Nk)
        if signal.policy == "tail":
            if signal.strict:
                raise InputError(
                    "the tail of kept entries has no known temperature.", where="temperature", fix="Use a signal that is not strict, or dense ones."
                )
            logp_Nk = torch.cat((logp_Nk, log_tail(logp_Nk)), 1)
        target_N1 = None if signal.target_logp_N is None else full_precision(signal.target_logp_N)[:, None]
        power = signal.temperature / taus
        lse_N1 = torch.logsumexp(logp_Nk * power, -1, keepdim=True)
        logp_Nk = (logp_Nk[:, : signal.kept] * power) - lse_N1
        return replace(signal, logp_Nk=logp_Nk, temperature=1.0, target_logp_N=None if target_N1 is None else (target_N1 * power - lse_N1)[:, 0])


@dataclass(frozen=True)
class Power:
    """p^{1/c}, divided by its sum: classical temperature scaling, which sharpens for c < 1. On kept entries over these alone (FIRST's alternative).

    c: > 0. mass: of kept entries, see `Mass`.
    """

    c: float
    mass: Mass = "one"
    preserves: ClassVar[Preserves] = Preserves(True, True, True)

    def __post_init__(self) -> None:
        _above_zero(self.c, "c")

    def __call__(self, signal: TeacherSignal, rows: TokenRows) -> TeacherSignal:
        """See `Transform`."""
        if isinstance(signal, TopKSignal):
            return _of_kept(signal, calibration.power(_probs(signal), self.c), self.mass)
        return _recast(signal, rows, lambda u_nV, cut: u_nV / self.c)


@dataclass(frozen=True)
class SoftmaxOfProb:
    """softmax(p/c): of PROBABILITIES (FIRST eq. 1), over the kept entries or, for a dense signal, the vocabulary. Entries of probability 0 get a share.

    c: > 0; large makes rows uniform, small one-hot. mass: of kept entries, see `Mass`; "one" is the paper's.
    """

    c: float
    mass: Mass = "one"
    preserves: ClassVar[Preserves] = Preserves(True, True, False)

    def __post_init__(self) -> None:
        _above_zero(self.c, "c")

    def __call__(self, signal: TeacherSignal, rows: TokenRows) -> TeacherSignal:
        """See `Transform`."""
        if isinstance(signal, TopKSignal):
            return _of_kept(signal, calibration.softmax_of_prob(_probs(signal), self.c), self.mass)
        return _recast(signal, rows, lambda u_nV, cut: torch.softmax(u_nV, -1) / self.c)


@dataclass(frozen=True)
class LabelSmooth:
    """δ less for the largest entry, δ/(m − 1) more for each of the m − 1 others, clipped at 0 and divided by the sum (FIRST eq. 2); m = k, or V if dense.

    delta: δ in [0, 1]; a large one can turn the order around. mass: of kept entries, see `Mass`.
    """

    delta: float
    mass: Mass = "one"
    preserves: ClassVar[Preserves] = Preserves(True, False, False)

    def __post_init__(self) -> None:
        if not 0 <= self.delta <= 1:
            raise InputError(f"δ = {self.delta:g} is not a share in [0, 1].", where="delta", fix="The released code's is 0.1.")

    def __call__(self, signal: TeacherSignal, rows: TokenRows) -> TeacherSignal:
        """See `Transform`."""
        if isinstance(signal, TopKSignal):
            return _of_kept(signal, calibration.label_smoothing(_probs(signal), self.delta), self.mass)
        return _recast(signal, rows, lambda u_nV, cut: calibration.label_smoothing(torch.softmax(u_nV, -1), self.delta).log())


# ---- the others ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Noise:
    """p̂ = max(p + r, 0) divided by its sum, or softmax(u + r): noise of one draw an entry (Swing eq. 4). No privacy guarantee follows from it.

    kind: of r. scale: its standard deviation σ ("gaussian"), or b ("laplace"), ≥ 0; over a large vocabulary what is clipped at 0 adds about 0.4 σ V of mass.
    key: which draw (`limbeck.seeds.derive(run seed, step)`, say; one number for good: frozen noise, which does not average out).
    on: probabilities or logits. where: the name of an annotation [N] of bools | None: all positions. ids: the name of an annotation [N] int64 that numbers the
    positions | None: their place in the batch. A row's noise is a pure function of its number and `key`. On kept entries only these get noise.
    """

    kind: Literal["gaussian", "laplace"]
    scale: float
    key: int
    on: Literal["probabilities", "logits"] = "probabilities"
    where: str | None = None
    ids: str | None = None
    mass: Mass = "one"
    preserves: ClassVar[Preserves] = Preserves(True, False, False)

    def __post_init__(self) -> None:
        if not (self.scale >= 0 and math.isfinite(self.scale)):
            raise InputError(f"a noise of scale {self.scale:g} cannot be drawn.", where="scale", fix="Give a number from 0.")

    def __call__(self, signal: TeacherSignal, rows: TokenRows) -> TeacherSignal:
        """See `Transform`. Raises InputError: there is no such annotation, or logits of kept entries are asked for."""
        if isinstance(signal, TopKSignal):
            if self.on == "logits":
                raise InputError("kept entries have no logits.", where="on", fix="Use noise on probabilities.")
            plain_Nk = _probs(signal)
            noisy_Nk = calibration.renormalised(self._noisy(plain_Nk, rows))
            made = _of_kept(signal, noisy_Nk, self.mass)
            return made if self.where is None else replace(made, logp_Nk=self._only(made.logp_Nk, self._untouched(signal, plain_Nk), rows))
        return _recast(signal, rows, self._dense)

    def _dense(self, u_nV: Tensor, rows: TokenRows) -> Tensor:
        loud_nV = u_nV + self.scale * self._draw(rows, u_nV) if self.on == "logits" else self._noisy(torch.softmax(u_nV, -1), rows).log()
        return self._only(loud_nV, u_nV, rows)

    def _noisy(self, probs: Tensor, rows: TokenRows) -> Tensor:
        """max(p + r, 0), p itself where nothing is left of a row."""
        noisy = (probs + self.scale * self._draw(rows, probs)).clamp(min=0)
        return torch.where(noisy.sum(-1, keepdim=True) > 0, noisy, probs)

    def _untouched(self, signal: TopKSignal, probs_Nk: Tensor) -> Tensor:
        return (calibration.renormalised(probs_Nk) if self.mass == "one" else probs_Nk).log()

    def _only(self, made: Tensor, plain: Tensor, rows: TokenRows) -> Tensor:
        return made if self.where is None else torch.where(_annotation(rows, self.where).bool()[:, None], made, plain)

    def _draw(self, rows: TokenRows, like: Tensor) -> Tensor:
        """[n, V] or [n, k] of scale 1."""
        numbers_n = rows.where_N if self.ids is None else _annotation(rows, self.ids)
        centred = seeds.uniform(numbers_n, like.shape[1], self.key, "noise") - 0.5 + 2.0**-54  # in (−0.5, 0.5)
        drawn = math.sqrt(2) * torch.erfinv(2 * centred) if self.kind == "gaussian" else -centred.sign() * torch.log1p(-2 * centred.abs())
        return drawn.to(like)


@dataclass(frozen=True)
class CropVocabulary:
    """The first `size` entries of the vocabulary, divided by their sum: for models of one tokenizer whose vocabularies were padded differently (sheet §7).

    Kept entries beyond become ABSENT and their mass is divided out; what the tail held beyond is not known and stays. The student's side: `crop_head`.
    """

    size: int
    preserves: ClassVar[Preserves] = Preserves(True, True, True)

    def __post_init__(self) -> None:
        if self.size < 1:
            raise InputError(f"a vocabulary of {self.size} is none.", where="size")

    def __call__(self, signal: TeacherSignal, rows: TokenRows) -> TeacherSignal:
        """See `Transform`. Raises InputError: the teacher's vocabulary is smaller."""
        if isinstance(signal, TopKSignal):
            return self._sparse(signal)
        if isinstance(signal, HeadSignal):
            return HeadSignal(signal.hidden_Nd, crop_head(signal.head, self.size))
        if isinstance(signal, DenseLike) and signal.vocabulary < self.size:
            raise InputError(f"the teacher's vocabulary has {signal.vocabulary} entries, not {self.size}.", where="size", fix="Crop both to the smaller one.")
        return _recast(signal, rows, lambda u_nV, cut: u_nV[:, : self.size], vocabulary=self.size)

    def _sparse(self, signal: TopKSignal) -> TopKSignal:
        _refuse_draws(signal)
        logp_Nk = full_precision(signal.logp_Nk)
        out_Nk = signal.ids_Nk >= self.size
        gone_N1 = logp_Nk.masked_fill(~out_Nk, -torch.inf).exp().sum(-1, keepdim=True).clamp(max=1 - 1e-7)
        left_N1 = torch.log1p(-gone_N1)
        target_N = None if signal.target_logp_N is None else full_precision(signal.target_logp_N) - left_N1[:, 0]
        ids_Nk, logp_Nk = signal.ids_Nk.masked_fill(out_Nk, ABSENT), (logp_Nk - left_N1).masked_fill(out_Nk, -torch.inf)
        order_Nk = out_Nk.to(torch.int8).argsort(dim=-1, stable=True)  # a row's first entry must not be absent
        return replace(signal, ids_Nk=ids_Nk.gather(1, order_Nk), logp_Nk=logp_Nk.gather(1, order_Nk), target_logp_N=target_N)


def crop_head(head: Head, size: int) -> Head:
    """The rows of a head that give the first `size` logits, views with a graph. Raises InputError: there are not so many."""
    if not 1 <= size <= head.vocabulary:
        raise InputError(f"the head gives {head.vocabulary} logits, not {size}.", where="size", fix="Crop both to the smaller vocabulary.")
    return replace(head, weight_Vd=head.weight_Vd[:size], bias_V=None if head.bias_V is None else head.bias_V[:size])


def mix(signals: Sequence[DenseLike], weights: Sequence[float]) -> MixedSignal:
    """Σ_i w_i p_i of several dense signals (ensembles): it keeps the simplex, not each member's order. Raises InputError: as `MixedSignal`."""
    return MixedSignal(tuple(signals), tuple(weights))


@dataclass(frozen=True)
class LogitStandardise:
    """scale · (u − mean)/sd over the vocabulary (sd of the population; arXiv 2403.01047), dense signals alone. Masked entries stay masked and do not count.

    The paper does this to both sides; this is the teacher's. scale: > 0, its 1/τ.
    """

    scale: float = 1.0
    preserves: ClassVar[Preserves] = Preserves(True, True, True)

    def __post_init__(self) -> None:
        _above_zero(self.scale, "scale")

    def __call__(self, signal: TeacherSignal, rows: TokenRows) -> TeacherSignal:
        """See `Transform`."""
        return _recast(signal, rows, lambda u_nV, cut: self._standardised(u_nV))

    def _standardised(self, u_nV: Tensor) -> Tensor:
        here_nV = u_nV != -torch.inf
        count_n1 = here_nV.sum(-1, keepdim=True).clamp(min=1)
        centred_nV = u_nV - u_nV.masked_fill(~here_nV, 0).sum(-1, keepdim=True) / count_n1
        sd_n1 = (centred_nV.masked_fill(~here_nV, 0).square().sum(-1, keepdim=True) / count_n1).sqrt()
        return centred_nV * (self.scale / sd_n1.clamp(min=1e-7))


@dataclass(frozen=True)
class CorrectWithLabel:
    """Where the teacher's most likely token is not the true one: "swap" their probabilities, or "mix", (1 − λ)p + λ e_y. Elsewhere nothing changes.

    kind: "swap" keeps every row's set of probabilities. weight: λ in [0, 1], of "mix" alone. Kept entries: "swap" is exact whether or not the true token is
    kept; "mix" adds it as one more entry and needs its recorded log-probability.
    """

    kind: Literal["swap", "mix"] = "swap"
    weight: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.weight <= 1:
            raise InputError(f"λ = {self.weight:g} is not in [0, 1].", where="weight")

    @property
    def preserves(self) -> Preserves:
        """ "mix" gives mass to a token that may have had none, and both change who is first."""
        return Preserves(True, False, self.kind == "swap")

    def __call__(self, signal: TeacherSignal, rows: TokenRows) -> TeacherSignal:
        """See `Transform`. Raises InputError: "mix" of kept entries without the true target's log-probability."""
        if isinstance(signal, TopKSignal):
            _refuse_draws(signal)
            return self._swapped(signal, rows) if self.kind == "swap" else self._mixed(signal, rows)
        return _recast(signal, rows, self._dense)

    def _dense(self, u_nV: Tensor, rows: TokenRows) -> Tensor:
        y_n1, top_n1 = rows.targets_N[:, None], u_nV.argmax(-1, keepdim=True)
        if self.kind == "swap":
            u_y_n1, u_top_n1 = u_nV.gather(1, y_n1), u_nV.gather(1, top_n1)
            return u_nV.scatter(1, top_n1, u_y_n1).scatter(1, y_n1, u_top_n1)
        p_nV = torch.softmax(u_nV, -1)
        return torch.where(top_n1 == y_n1, u_nV, (p_nV * (1 - self.weight)).scatter_add(1, y_n1, torch.full_like(p_nV[:, :1], self.weight)).log())

    def _swapped(self, signal: TopKSignal, rows: TokenRows) -> TopKSignal:
        """The two ids trade places; a true token that is not kept takes the first one's place, which goes to the tail with the true one's old probability."""
        y_N1, place_N1 = rows.targets_N[:, None], signal.logp_Nk.argmax(-1, keepdim=True)
        top_N1 = signal.ids_Nk.gather(1, place_N1)
        ids_Nk = torch.where(signal.ids_Nk == y_N1, top_N1, signal.ids_Nk).scatter(1, place_N1, y_N1)
        target_N = None if signal.target_logp_N is None else signal.logp_Nk.gather(1, place_N1)[:, 0]
        return replace(signal, ids_Nk=ids_Nk, target_logp_N=target_N)

    def _mixed(self, signal: TopKSignal, rows: TokenRows) -> TopKSignal:
        y_N1 = rows.targets_N[:, None]
        wrong_N1 = signal.ids_Nk.gather(1, signal.logp_Nk.argmax(-1, keepdim=True)) != y_N1
        signal = signal.with_target(rows.targets_N)
        p_Nk = full_precision(signal.logp_Nk).exp()
        mixed_Nk = (1 - self.weight) * p_Nk + self.weight * (signal.ids_Nk == y_N1)
        logp_Nk = torch.where(wrong_N1, mixed_Nk, p_Nk).log()
        target_N = logp_Nk.masked_fill(signal.ids_Nk != y_N1, -torch.inf).amax(-1)
        return replace(signal, logp_Nk=logp_Nk, target_logp_N=target_N)


# ---- what they share ----------------------------------------------------------------------------------------------------


def _recast(signal: TeacherSignal, rows: TokenRows, change: Callable[[Tensor, TokenRows], Tensor], vocabulary: int | None = None) -> Recast:
    if isinstance(signal, TopKSignal) or not isinstance(signal, DenseLike):
        raise InputError(f"a {type(signal).__name__} cannot be changed so.", where="transform", fix="Use a signal over the whole vocabulary.")
    if len(signal) != len(rows):
        raise InputError(f"the signal has {len(signal)} positions, the rows {len(rows)}.", where="transform")
    return Recast(signal, change, rows, signal.vocabulary if vocabulary is None else vocabulary)


def _of_kept(signal: TopKSignal, probs_Nk: Tensor, mass: Mass) -> TopKSignal:
    """The signal with these probabilities of its kept entries, which sum to 1, or scaled to what it covered. What it knew of the true target is dropped."""
    _refuse_draws(signal)
    logp_Nk = calibration.renormalised(probs_Nk.masked_fill(signal.ids_Nk == ABSENT, 0.0)).log()
    if mass == "kept":
        logp_Nk = logp_Nk + torch.logsumexp(full_precision(signal.logp_Nk), -1, keepdim=True)
    elif signal.policy == "tail":
        raise InputError(
            "kept entries that sum to 1 have no tail.", where="transform.mass", fix="Use mass 'kept', or the policy 'renorm_teacher' or 'renorm_both'."
        )
    return replace(signal, logp_Nk=logp_Nk, target_logp_N=None)


def _probs(signal: TopKSignal) -> Tensor:
    if signal.temperature != 1.0:
        raise InputError(f"the entries were collected at τ = {signal.temperature:g}.", where="transform", fix="Apply Temperature(1.0) first.")
    return full_precision(signal.logp_Nk).exp()


def _refuse_draws(signal: TopKSignal) -> None:
    if signal.policy == "sampled":
        raise InputError("draws cannot be changed after they were made.", where="transform", fix="Change the teacher's distribution, then draw.")


def _annotation(rows: TokenRows, name: str) -> Tensor:
    if name not in rows.annotations:
        raise InputError(f"the rows carry no annotation '{name}'.", where="transform", fix=f"They carry: {', '.join(sorted(rows.annotations)) or 'none'}.")
    return rows.annotations[name]


def _above_zero(value: float, where: str) -> None:
    if not (value > 0 and math.isfinite(value)):
        raise InputError(f"{value:g} is not a number above 0.", where=where)
