"""A divergence over a head, forward and backward in one pass, that never holds [N, V] (engine sheet §1 eq. 1, §3).

L = Σ_n w_n ℓ_n / D. Legend: N positions, n of a chunk, V vocabulary, d width, P parts of a mixture; z student's logits, G = ∂L/∂z.

For every chunk of rows: z = h Wᵀ + b, the teacher's rows, ℓ and G by `divergences`, then dW += Gᵀ h, db += Σ G, dh = G W. The chunk's logits are the only
thing of width V; within a chunk the elementwise work goes over a few rows at a time that stay in the processor's cache. Floor of the arithmetic: three
products of 2·N·V·d operations for the student (2 where the head is frozen) and one for a teacher that is given as hidden states and head.
Gradients of gradients are refused.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from limbeck.errors import InputError
from limbeck.language.divergences import Divergence, Student, slopes
from limbeck.language.signals import DenseLike, DenseSignal, Head, HeadSignal, MixedSignal, Recast, TeacherSignal
from limbeck.language.tokens import TokenRows
from limbeck.losses.divergences import full_precision

CACHED_FLOATS = 1 << 18
"""About how many logits the elementwise work of a chunk goes over at a time on a CPU."""


class Losses(NamedTuple):
    """loss: L, a scalar with a graph to hidden states and head. parts: name → its weighted mean Σ w ℓ_i / D, detached, without the part's own weight in a
    mixture. values_N: [N] ℓ of every position, detached, without w."""

    loss: Tensor
    parts: dict[str, Tensor]
    values_N: Tensor


def linear_divergence(
    hidden_Nd: Tensor,
    head: Head,
    signal: TeacherSignal | None,
    divergence: Divergence,
    rows: TokenRows,
    *,
    denominator: Tensor | float | None = None,
    chunk: int | None = None,
) -> Losses:
    """L of hidden states under a head, with its gradients worked out in the same pass (sheet eq. 1, §3).

    Args:
        hidden_Nd: [N, d] student's hidden states at `rows`. head: the student's; a weight that does not require grad costs no product. A weight tied to the
            embedding gets both gradients.
        signal: what the teacher says of `rows` | None where no part asks it. A teacher given as `HeadSignal` has no [N, V] either; a `DenseSignal` is sliced.
        rows: targets and weights of the N positions. denominator: D; None: Σ w of these rows. 0 or no rows: L is 0, its gradients too.
        chunk: rows at a time; None: `chunk_rows`.

    Under autocast the products are made in its dtype; softmax, ℓ and the sums over chunks are float32 (float64 where the inputs are).

    Raises:
        InputError: shapes disagree, the signal cannot answer, `chunk` is below 1, or weights require a gradient (they get none here).
    """
    N = len(rows)
    if hidden_Nd.ndim != 2 or hidden_Nd.shape != (N, head.weight_Vd.shape[1]):
        raise InputError(
            f"hidden states {list(hidden_Nd.shape)} do not fit {N} positions and a head of width {head.weight_Vd.shape[1]}.", where="hidden", fix="Give [N, d]."
        )
    if chunk is not None and chunk < 1:
        raise InputError(f"chunk = {chunk} is not above 0.", where="chunk")
    _check_weights(rows, denominator)
    work = _Work(head, signal, divergence, rows, _denominator(rows, denominator, hidden_Nd.device), chunk or chunk_rows(N, *head.weight_Vd.shape))
    loss, parts_P, values_N = _LinearDivergence.apply(hidden_Nd, head.weight_Vd, head.bias_V, work, torch.is_grad_enabled())
    return Losses(loss, dict(zip(divergence.names, parts_P.unbind(), strict=True)), values_N)


def dense_divergence(
    logits_NV: Tensor, signal: TeacherSignal | None, divergence: Divergence, rows: TokenRows, denominator: Tensor | float | None = None
) -> Losses:
    """The same L of logits [N, V] by plain autograd: for models that give no hidden states, and to check the other. Arguments and errors as there.

    The graph reaches whatever the logits and the weights come from, and gradients of gradients exist.
    """
    D = _denominator(rows, denominator, logits_NV.device)
    weight_N = rows.weight_N
    values = [part.value(logits_NV, signal, rows) for _, part in divergence.parts]
    means = [(weight_N.to(value_N.dtype) * value_N).sum() / D for value_N in values]
    loss = torch.stack([share * mean for (share, _), mean in zip(divergence.parts, means, strict=True)]).sum()
    total_N = torch.stack([share * value_N.detach() for (share, _), value_N in zip(divergence.parts, values, strict=True)]).sum(0)
    return Losses(loss, {name: mean.detach() for name, mean in zip(divergence.names, means, strict=True)}, total_N)


def chunk_rows(N: int, V: int, d: int) -> int:
    """N·d/V to the nearest power of two, so that a chunk of logits is about as large as the hidden states, within [512, 1024].

    The sheet's lower bound is 128; every chunk reads and writes dW [V, d] once, which below 512 rows costs a CPU more than is saved (ours, measured).
    """
    return min(max(1 << round(math.log2(max(N * d / max(V, 1), 1.0))), 512), 1024)


def _check_weights(rows: TokenRows, denominator: Tensor | float | None) -> None:
    if rows.weight_N.requires_grad or (isinstance(denominator, Tensor) and denominator.requires_grad):
        raise InputError("weights that are learned get no gradient here.", where="rows.weight_N", fix="Detach them, or use dense_divergence.")


def _denominator(rows: TokenRows, denominator: Tensor | float | None, device: torch.device) -> Tensor:
    """D, a scalar on the device; 1 where it is 0, so that 0/0 is 0."""
    if denominator is None:
        denominator = rows.weight_N.sum()
    D = torch.as_tensor(denominator, device=device)
    return torch.where(D > 0, D, torch.ones_like(D))


@dataclass(frozen=True)
class _Work:
    """What a pass needs beside the tensors that get gradients. D: scalar tensor. chunk: rows at a time."""

    head: Head
    signal: TeacherSignal | None
    divergence: Divergence
    rows: TokenRows
    D: Tensor
    chunk: int


class _Wanted(NamedTuple):
    hidden: bool
    weight: bool
    bias: bool


class _LinearDivergence(torch.autograd.Function):
    """(h, W, b) → L, with dh, dW, db worked out on the way and kept for the backward pass."""

    @staticmethod
    def forward(ctx: Any, hidden_Nd: Tensor, weight_Vd: Tensor, bias_V: Tensor | None, work: _Work, grad: bool) -> tuple[Tensor, Tensor, Tensor]:
        wanted = _Wanted(*(grad and needed for needed in ctx.needs_input_grad[:3]))
        dtype = _product_dtype(hidden_Nd, weight_Vd)
        with torch.autocast(hidden_Nd.device.type, enabled=False):
            sums_P, values_N, gradients = _pass(hidden_Nd.detach(), work, wanted, dtype)
        ctx.save_for_backward(*gradients)
        ctx.dtypes = (hidden_Nd.dtype, weight_Vd.dtype, None if bias_V is None else bias_V.dtype)
        shares_P = sums_P.new_tensor([share for share, _ in work.divergence.parts])
        ctx.mark_non_differentiable(sums_P, values_N)
        return torch.dot(shares_P, sums_P), sums_P, values_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, loss_grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        found = [None if gradient is None else gradient.mul(loss_grad).to(dtype) for gradient, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)]
        return (*found, None, None)


def _product_dtype(hidden_Nd: Tensor, weight_Vd: Tensor) -> torch.dtype:
    """What the products are made in: autocast's dtype, else that which both promote to."""
    device = hidden_Nd.device.type
    both = torch.promote_types(hidden_Nd.dtype, weight_Vd.dtype)
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) and both != torch.float64 else both


def _pass(hidden_Nd: Tensor, work: _Work, wanted: _Wanted, dtype: torch.dtype) -> tuple[Tensor, Tensor, tuple[Tensor | None, Tensor | None, Tensor | None]]:
    """(Σ w ℓ_i/D of every part [P], ℓ [N], (dh, dW, db)), the last where wanted."""
    hidden_Nd, head, signal = hidden_Nd.to(dtype), work.head.detach().cast(dtype), _without_graph(work.signal, dtype)
    N, d = hidden_Nd.shape
    V, exact = head.vocabulary, torch.promote_types(dtype, torch.float32)
    device, parts = hidden_Nd.device, work.divergence.parts
    sums_P = torch.zeros(len(parts), dtype=exact, device=device)
    values_N = torch.zeros(N, dtype=exact, device=device)
    dh_Nd = torch.empty(N, d, dtype=dtype, device=device) if wanted.hidden else None
    dW_Vd = torch.zeros(V, d, dtype=exact, device=device) if wanted.weight else None
    db_V = torch.zeros(V, dtype=exact, device=device) if wanted.bias else None
    scale_N = (work.rows.weight_N.to(exact) / work.D.to(exact)) if N else work.rows.weight_N.to(exact)
    chunk, block = min(work.chunk, max(N, 1)), block_rows(V, device)
    z_cV = torch.empty(chunk, V, dtype=dtype, device=device)
    u_cV = _room(signal, chunk)
    for start in range(0, N, chunk):
        stop = min(start + chunk, N)
        z_nV = head.logits_into(hidden_Nd[start:stop], z_cV[: stop - start])
        told = _told(signal, start, stop, u_cV)
        for low in range(start, stop, block):
            high = min(low + block, stop)
            z_bV = z_nV[low - start : high - start]
            here = None if told is None else told.cut(low - start, high - start)
            scale_b = scale_N[low:high]
            ells = _block(work.divergence, z_bV, here, work.rows.cut(low, high), scale_b, head, any(wanted))
            for i, ((share, _), ell_b) in enumerate(zip(parts, ells, strict=True)):
                sums_P[i] += torch.dot(scale_b, ell_b)
                values_N[low:high].add_(ell_b, alpha=share)
        if dh_Nd is not None:
            torch.mm(z_nV, head.weight_Vd, out=dh_Nd[start:stop])
        if dW_Vd is not None:
            _add_product(dW_Vd, z_nV.t(), hidden_Nd[start:stop])
        if db_V is not None:
            db_V += z_nV.sum(0, dtype=exact)
    return sums_P, values_N, (dh_Nd, dW_Vd, db_V)


def _block(divergence: Divergence, z_bV: Tensor, signal: TeacherSignal | None, rows: TokenRows, scale_b: Tensor, head: Head, grad: bool) -> list[Tensor]:
    """ℓ [b] of every part; z is overwritten with ∂L/∂(h Wᵀ + b) where a gradient is wanted."""
    exact_bV = full_precision(z_bV)
    if not grad:
        return [part.value(exact_bV, signal, rows).to(scale_b) for _, part in divergence.parts]
    ells, slope_bV = slopes(divergence, Student(exact_bV), signal, rows)
    if head.soft_cap is not None:
        slope_bV.mul_(1 - (exact_bV / head.soft_cap).square())
    scale_b1 = (scale_b * head.scale)[:, None]
    if z_bV.dtype == slope_bV.dtype:
        torch.mul(slope_bV, scale_b1, out=z_bV)
    else:
        z_bV.copy_(slope_bV.mul_(scale_b1))
    return [ell_b.to(scale_b) for ell_b in ells]


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a b, summed in total's dtype."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    else:
        total.add_(a @ b)


def block_rows(V: int, device: torch.device) -> int:
    """Rows that are worked on at a time: some that fit the cache on a CPU, all of a chunk elsewhere."""
    return max(1, CACHED_FLOATS // max(V, 1)) if device.type == "cpu" else 1 << 30


def _without_graph(signal: TeacherSignal | None, dtype: torch.dtype) -> TeacherSignal | None:
    """The signal with its heads prepared once: detached, in the dtype of the products (a float64 student leaves its teacher as it is)."""
    return _prepared(signal, dtype) if isinstance(signal, DenseLike) else signal


def _prepared(signal: DenseLike, dtype: torch.dtype) -> DenseLike:
    if isinstance(signal, HeadSignal):
        both = torch.promote_types(signal.hidden_Nd.dtype, signal.head.weight_Vd.dtype)
        return signal.cast(both if dtype == torch.float64 else dtype)
    if isinstance(signal, MixedSignal):
        return replace(signal, signals=tuple(_prepared(member, dtype) for member in signal.signals))
    return replace(signal, source=_prepared(signal.source, dtype)) if isinstance(signal, Recast) else signal


def _room(signal: TeacherSignal | None, rows: int) -> Tensor | None:
    """A place [rows, V] for the logits of a chunk, where a head is to give them."""
    while isinstance(signal, Recast):
        signal = signal.source
    if not isinstance(signal, HeadSignal):
        return None
    return torch.empty(rows, signal.vocabulary, dtype=signal.hidden_Nd.dtype, device=signal.hidden_Nd.device)


def _told(signal: TeacherSignal | None, start: int, stop: int, u_cV: Tensor | None) -> TeacherSignal | None:
    """The signal of a chunk, with heads' products made for the whole chunk, into u where there is room."""
    if isinstance(signal, DenseLike):
        return _worked_out(signal, start, stop, u_cV)
    return None if signal is None else signal.cut(start, stop)


def _worked_out(signal: DenseLike, start: int, stop: int, u_cV: Tensor | None) -> DenseLike:
    if isinstance(signal, HeadSignal):
        hidden_nd = signal.hidden_Nd[start:stop]
        return DenseSignal(signal.head.logits(hidden_nd) if u_cV is None else signal.head.logits_into(hidden_nd, u_cV[: stop - start]))
    if isinstance(signal, MixedSignal):
        return replace(signal, signals=tuple(_worked_out(member, start, stop, None) for member in signal.signals))
    if isinstance(signal, Recast):
        return replace(signal, source=_worked_out(signal.source, start, stop, u_cV), rows=signal.rows.cut(start, stop))
    return signal.cut(start, stop)
