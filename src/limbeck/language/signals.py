"""What a teacher says of the valid positions of a batch, and the head that turns hidden states into logits (engine sheet §3, §4, §9).

Legend: N positions, n of them in a chunk, V vocabulary, k kept entries, d width, G groups. u teacher's logits, p its probabilities, log p their logarithm.
A signal is data only. `cut` gives views; nothing here holds [N, V] unless it was given as that.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from limbeck.errors import InputError
from limbeck.language.tokens import TokenBatch, TokenRows
from limbeck.losses.divergences import full_precision

TailPolicy = Literal["tail", "renorm_teacher", "renorm_both", "sampled"]
"""What becomes of the vocabulary that k kept entries leave out (sheet §4).

"tail": k + 1 outcomes, the rest being one. "renorm_teacher": the kept entries sum to 1, the student has the whole vocabulary (its tail is pushed to 0).
"renorm_both": both sides are divided by their sum over the kept entries (the student's tail is not touched). "sampled": the entries are draws.
"""
POLICIES: tuple[TailPolicy, ...] = ("tail", "renorm_teacher", "renorm_both", "sampled")
ABSENT = -1
"""An id that stands for no entry (rows that keep fewer than k)."""


@dataclass(frozen=True)
class Head:
    """z = scale · (h Wᵀ + b), then soft_cap · tanh(z / soft_cap) where there is a cap.

    weight_Vd: [V, d]. bias_V: [V] | None. scale: 1 for most models. soft_cap: > 0 | None.
    """

    weight_Vd: Tensor
    bias_V: Tensor | None = None
    scale: float = 1.0
    soft_cap: float | None = None

    def __post_init__(self) -> None:
        if self.weight_Vd.ndim != 2 or (self.bias_V is not None and self.bias_V.shape != self.weight_Vd.shape[:1]):
            shapes = [list(self.weight_Vd.shape)] + ([] if self.bias_V is None else [list(self.bias_V.shape)])
            raise InputError(f"a head takes a weight [V, d] and a bias [V], not {shapes}.", where="head")
        if self.soft_cap is not None and not self.soft_cap > 0:
            raise InputError(f"soft_cap = {self.soft_cap:g} is not above 0.", where="head.soft_cap", fix="Use None for no cap.")

    @property
    def vocabulary(self) -> int:
        """V."""
        return len(self.weight_Vd)

    def cast(self, dtype: torch.dtype) -> Head:
        """The same head with weight and bias in this dtype."""
        return replace(self, weight_Vd=self.weight_Vd.to(dtype), bias_V=None if self.bias_V is None else self.bias_V.to(dtype))

    def detach(self) -> Head:
        """The same head without a graph."""
        return replace(self, weight_Vd=self.weight_Vd.detach(), bias_V=None if self.bias_V is None else self.bias_V.detach())

    def logits(self, hidden_nd: Tensor) -> Tensor:
        """[n, V] logits of hidden states [n, d], in the dtype of the product; a graph to all three where they have one."""
        z_nV = torch.nn.functional.linear(hidden_nd, self.weight_Vd, self.bias_V)
        if self.scale != 1.0:
            z_nV = z_nV * self.scale
        return z_nV if self.soft_cap is None else self.soft_cap * torch.tanh(z_nV / self.soft_cap)

    def logits_into(self, hidden_nd: Tensor, out_nV: Tensor) -> Tensor:
        """The same numbers written into out_nV [n, V], without a graph."""
        if self.bias_V is None:
            torch.mm(hidden_nd, self.weight_Vd.t(), out=out_nV)
        else:
            torch.addmm(self.bias_V, hidden_nd, self.weight_Vd.t(), out=out_nV)
        if self.scale != 1.0:
            out_nV.mul_(self.scale)
        return out_nV if self.soft_cap is None else out_nV.div_(self.soft_cap).tanh_().mul_(self.soft_cap)


# ---- signals that know the whole vocabulary ---------------------------------------------------------------------------


@runtime_checkable
class DenseLike(Protocol):
    """A signal that can work out logits of any of its rows."""

    @property
    def vocabulary(self) -> int:
        """V."""
        ...

    def __len__(self) -> int:
        """N."""
        ...

    def cut(self, start: int, stop: int) -> DenseLike:
        """Rows start to stop − 1."""
        ...

    def logits(self, start: int, stop: int) -> Tensor:
        """[n, V] logits of rows start to stop − 1, up to a constant a row."""
        ...

    def log_probs(self, start: int, stop: int, temperature: float = 1.0) -> Tensor:
        """[n, V] log softmax(u/τ) of rows start to stop − 1, at least float32."""
        ...


def _log_probs(signal: DenseLike, start: int, stop: int, temperature: float) -> Tensor:
    u_nV = full_precision(signal.logits(start, stop))
    return torch.log_softmax(u_nV if temperature == 1.0 else u_nV / temperature, -1)


@dataclass(frozen=True)
class DenseSignal:
    """Logits of the teacher, held by whoever made them; they are only sliced. logits_NV: [N, V], any floating dtype, −inf for masked entries."""

    logits_NV: Tensor

    @property
    def vocabulary(self) -> int:
        """V."""
        return self.logits_NV.shape[1]

    def __len__(self) -> int:
        return len(self.logits_NV)

    def cut(self, start: int, stop: int) -> DenseSignal:
        """Rows start to stop − 1, a view."""
        return DenseSignal(self.logits_NV[start:stop])

    def logits(self, start: int, stop: int) -> Tensor:
        """[n, V], a view."""
        return self.logits_NV[start:stop]

    def log_probs(self, start: int, stop: int, temperature: float = 1.0) -> Tensor:
        """[n, V] log softmax(u/τ), at least float32."""
        return _log_probs(self, start, stop, temperature)


@dataclass(frozen=True)
class HeadSignal:
    """The teacher's hidden states and head: its logits exist for a chunk at a time only. hidden_Nd: [N, d_t]; head: its V is the student's."""

    hidden_Nd: Tensor
    head: Head

    @property
    def vocabulary(self) -> int:
        """V."""
        return self.head.vocabulary

    def __len__(self) -> int:
        return len(self.hidden_Nd)

    def cut(self, start: int, stop: int) -> HeadSignal:
        """Rows start to stop − 1, a view."""
        return HeadSignal(self.hidden_Nd[start:stop], self.head)

    def logits(self, start: int, stop: int) -> Tensor:
        """[n, V], worked out."""
        return self.head.logits(self.hidden_Nd[start:stop])

    def log_probs(self, start: int, stop: int, temperature: float = 1.0) -> Tensor:
        """[n, V] log softmax(u/τ), at least float32."""
        return _log_probs(self, start, stop, temperature)

    def cast(self, dtype: torch.dtype) -> HeadSignal:
        """Without a graph and with hidden states and head in this dtype, so that the conversion is done once and not for every chunk."""
        return HeadSignal(self.hidden_Nd.detach().to(dtype), self.head.detach().cast(dtype))


@dataclass(frozen=True)
class MixedSignal:
    """Several teachers: p = Σ_i w_i p_i, the mean of probabilities. signals: all dense, of one N and V; weights: ≥ 0, they sum to 1."""

    signals: tuple[DenseLike, ...]
    weights: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.signals or len(self.signals) != len(self.weights):
            raise InputError(f"{len(self.signals)} signals came with {len(self.weights)} weights.", where="signal", fix="Give every teacher one weight.")
        if any(not isinstance(signal, DenseLike) for signal in self.signals):
            raise InputError("only signals that know the whole vocabulary can be averaged.", where="signal", fix="Average before keeping k entries.")
        if min(self.weights) < 0 or not math.isclose(sum(self.weights), 1.0, abs_tol=1e-6):
            raise InputError(f"the weights {list(self.weights)} are no shares that sum to 1.", where="signal.weights")
        if len({(len(signal), signal.vocabulary) for signal in self.signals}) > 1:
            raise InputError("the teachers differ in positions or vocabulary.", where="signal", fix="Average teachers of one tokenizer.")

    @property
    def vocabulary(self) -> int:
        """V."""
        return self.signals[0].vocabulary

    def __len__(self) -> int:
        return len(self.signals[0])

    def cut(self, start: int, stop: int) -> MixedSignal:
        """Rows start to stop − 1, views."""
        return MixedSignal(tuple(signal.cut(start, stop) for signal in self.signals), self.weights)

    def logits(self, start: int, stop: int) -> Tensor:
        """[n, V] log Σ_i w_i p_i, at least float32. A temperature that is asked for later acts on this mean, not on the members."""
        total_nV: Tensor | None = None
        for weight, signal in zip(self.weights, self.signals, strict=True):
            if weight > 0:
                part_nV = signal.log_probs(start, stop).exp_().mul_(weight)
                total_nV = part_nV if total_nV is None else total_nV.add_(part_nV)
        assert total_nV is not None
        return total_nV.log_()

    def log_probs(self, start: int, stop: int, temperature: float = 1.0) -> Tensor:
        """[n, V], at least float32."""
        return self.logits(start, stop) if temperature == 1.0 else _log_probs(self, start, stop, temperature)


@dataclass(frozen=True)
class Recast:
    """A dense signal after a transform, worked out for the rows that are asked for (`transforms`).

    source: what it is made of. change: ([n, V_source] logits at least float32, their rows) → [n, V] logits; a pure function of both, so that neither chunks nor
    asking twice change it. rows: the N positions. vocabulary: V.
    """

    source: DenseLike
    change: Callable[[Tensor, TokenRows], Tensor]
    rows: TokenRows
    vocabulary: int

    def __len__(self) -> int:
        return len(self.source)

    def cut(self, start: int, stop: int) -> Recast:
        """Rows start to stop − 1."""
        return Recast(self.source.cut(start, stop), self.change, self.rows.cut(start, stop), self.vocabulary)

    def logits(self, start: int, stop: int) -> Tensor:
        """[n, V], worked out."""
        return self.change(full_precision(self.source.logits(start, stop)), self.rows.cut(start, stop))

    def log_probs(self, start: int, stop: int, temperature: float = 1.0) -> Tensor:
        """[n, V], at least float32."""
        return _log_probs(self, start, stop, temperature)


# ---- signals that know a part of it -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class TopKSignal:
    """k kept entries a position: ids and log-probabilities under the whole vocabulary (sheet §4).

    ids_Nk: [N, k] int64, no id twice in a row, ABSENT (−1) where a row keeps fewer; with "sampled" they are draws and may repeat. logp_Nk: [N, k] log p.
    temperature: τ_c at which log p was collected. policy: see `TailPolicy`. target_logp_N: [N] log p of the true target | None.
    strict: refuse another teacher temperature than τ_c where the tail would be approximated by one atom.
    draw_weight_Nk: "sampled" only: importance weights p/(k r) of draws from r | None: draws from p, 1/k each.
    """

    ids_Nk: Tensor
    logp_Nk: Tensor
    temperature: float = 1.0
    policy: TailPolicy = "tail"
    target_logp_N: Tensor | None = None
    strict: bool = False
    draw_weight_Nk: Tensor | None = None

    def __post_init__(self) -> None:
        if self.ids_Nk.ndim != 2 or self.ids_Nk.shape != self.logp_Nk.shape or not self.ids_Nk.shape[1]:
            raise InputError(f"kept entries take ids and log p [N, k], k > 0, not {list(self.ids_Nk.shape)} and {list(self.logp_Nk.shape)}.", where="signal")
        if self.policy not in POLICIES:
            raise InputError(f"unknown policy '{self.policy}'.", where="signal.policy", fix=f"Known: {', '.join(POLICIES)}.")
        if not self.temperature > 0:
            raise InputError(f"τ_c = {self.temperature:g} is not above 0.", where="signal.temperature")
        if self.draw_weight_Nk is not None and self.policy != "sampled":
            raise InputError(f"importance weights belong to draws, not to '{self.policy}'.", where="signal.draw_weight_Nk", fix="Use policy 'sampled'.")

    def __len__(self) -> int:
        return len(self.ids_Nk)

    @property
    def kept(self) -> int:
        """k."""
        return self.ids_Nk.shape[1]

    def cut(self, start: int, stop: int) -> TopKSignal:
        """Rows start to stop − 1, views."""
        target_n, weight_nk = self.target_logp_N, self.draw_weight_Nk
        return TopKSignal(
            self.ids_Nk[start:stop],
            self.logp_Nk[start:stop],
            self.temperature,
            self.policy,
            None if target_n is None else target_n[start:stop],
            self.strict,
            None if weight_nk is None else weight_nk[start:stop],
        )

    def with_target(self, targets_N: Tensor) -> TopKSignal:
        """The true target as one more kept entry wherever it is not kept yet, k + 1 entries (ABSENT elsewhere); its log p is `target_logp_N`.

        Raises:
            InputError: there is no `target_logp_N`, or the entries are draws.
        """
        if self.target_logp_N is None or self.policy == "sampled":
            raise InputError("the true target cannot be added.", where="signal", fix="Record its log-probability, and use kept entries, not draws.")
        here_N1 = (self.ids_Nk == targets_N[:, None]).any(1, keepdim=True)
        ids_N1 = torch.where(here_N1, ABSENT, targets_N[:, None])
        logp_N1 = torch.where(here_N1, -torch.inf, self.target_logp_N[:, None].to(self.logp_Nk.dtype))
        return replace(self, ids_Nk=torch.cat((self.ids_Nk, ids_N1), 1), logp_Nk=torch.cat((self.logp_Nk, logp_N1), 1))


@dataclass(frozen=True)
class TakenSignal:
    """One number a position, the teacher's log p of the target that was taken. logp_N: [N]. A divergence sees {target, everything else}."""

    logp_N: Tensor

    def __len__(self) -> int:
        return len(self.logp_N)

    def cut(self, start: int, stop: int) -> TakenSignal:
        """Rows start to stop − 1, a view."""
        return TakenSignal(self.logp_N[start:stop])

    def kept(self, targets_N: Tensor) -> TopKSignal:
        """As one kept entry and a tail."""
        return TopKSignal(targets_N[:, None], self.logp_N[:, None])


@dataclass(frozen=True)
class FeatureSignal:
    """What else a teacher gives: hidden states, attention. features: name → [N, ...]."""

    features: Mapping[str, Tensor]

    def __len__(self) -> int:
        return len(next(iter(self.features.values()), ()))

    def cut(self, start: int, stop: int) -> FeatureSignal:
        """Rows start to stop − 1, views."""
        return FeatureSignal({name: feature[start:stop] for name, feature in self.features.items()})


@dataclass(frozen=True)
class MergedSignal:
    """Rows of a teacher with another tokenizer, one a group of tokens (sheet §7); sub-stochastic on purpose.

    rows_GV: [G, V_t] masses. groups: [G, ...] int64, which positions a row stands for, as the alignment has them. Divergences do not take it.
    """

    rows_GV: Tensor
    groups: Tensor

    def __len__(self) -> int:
        return len(self.rows_GV)

    def cut(self, start: int, stop: int) -> MergedSignal:
        """GROUPS start to stop − 1, views."""
        return MergedSignal(self.rows_GV[start:stop], self.groups[start:stop])


TeacherSignal = DenseSignal | HeadSignal | MixedSignal | Recast | TopKSignal | TakenSignal | FeatureSignal | MergedSignal | DenseLike
"""What a source may answer."""


class SignalSource(Protocol):
    """Who answers for the teacher."""

    def get(self, tokens: TokenBatch) -> TeacherSignal:
        """The signal over `tokens.rows()`, without a graph."""
        ...


# ---- making sparse ones -----------------------------------------------------------------------------------------------


def top_k(signal: DenseLike, k: int, *, targets_N: Tensor | None = None, temperature: float = 1.0, policy: TailPolicy = "tail", chunk: int = 256) -> TopKSignal:
    """The k largest entries of a dense signal, largest first, `chunk` rows at a time.

    Args:
        k: 1..V. targets_N: [N] int64, to keep log p of the true target too | None. temperature: τ_c.

    Raises:
        InputError: k is out of range.
    """
    if not 1 <= k <= signal.vocabulary:
        raise InputError(f"k = {k} is not in 1..{signal.vocabulary}.", where="k")
    values, ids, taken = [], [], []
    for start in range(0, max(len(signal), 1), chunk):
        logp_nV = signal.log_probs(start, min(start + chunk, len(signal)), temperature)
        found = logp_nV.topk(k, -1)
        values.append(found.values)
        ids.append(found.indices)
        if targets_N is not None:
            taken.append(logp_nV.gather(1, targets_N[start : start + chunk, None])[:, 0])
    return TopKSignal(torch.cat(ids), torch.cat(values), temperature, policy, torch.cat(taken) if taken else None)


def draw(signal: DenseLike, k: int, generator: torch.Generator, *, proposal: float = 1.0, chunk: int = 256) -> TopKSignal:
    """k draws a position with weights that make the forward KL unbiased (sheet §4 d), `chunk` rows at a time.

    Args:
        k: > 0, with replacement. generator: on the signal's device. proposal: draws come from r ∝ p^proposal, with weights p/(k r); 1: from p, weights 1/k.

    Raises:
        InputError: k or `proposal` is not above 0.
    """
    if k < 1 or not proposal > 0:
        raise InputError(f"k = {k} and proposal = {proposal:g} must be above 0.", where="draw")
    ids, values, weights = [], [], []
    for start in range(0, max(len(signal), 1), chunk):
        logp_nV = signal.log_probs(start, min(start + chunk, len(signal)))
        logr_nV = logp_nV if proposal == 1.0 else torch.log_softmax(logp_nV * proposal, -1)
        drawn_nk = torch.multinomial(logr_nV.exp(), k, replacement=True, generator=generator) if len(logr_nV) else logr_nV.new_zeros(0, k, dtype=torch.int64)
        ids.append(drawn_nk)
        values.append(logp_nV.gather(1, drawn_nk))
        weights.append((values[-1] - logr_nV.gather(1, drawn_nk)).exp() / k)
    return TopKSignal(torch.cat(ids), torch.cat(values), policy="sampled", draw_weight_Nk=torch.cat(weights))
