"""Self-distillation of kernel ridge regression, exactly: every round and the limit from one factorisation of K.

Source: 2102.13088; equation numbers are those of our sheet. All results are float64, on the device of K.

Legend: N training points, M other points, C outputs, T rounds, K kernel matrix, d its eigenvalues, V its eigenvectors, λ ridge (> 0; the problem
sums over points, so with a mean λ has to be multiplied by N), A = K(K + λI)⁻¹, a = d/(d + λ) its eigenvalues, α weight of the GROUND TRUTH.
`alphas` is always (α_2, …, α_T): α_1 ≡ 1, as there is no teacher yet, so that an empty schedule is the plain fit f_1. It is [T−1], one weight
for all outputs, or [T−1, C]. Weights may lie outside [0, 1] in the recursion and what follows from it; the limits need α ∈ [0, 1].
A function of the reproducing space is kept as its dual coefficients c: f(x) = k(x)ᵀc, so predictions at M points are `k_MN @ c_NC`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from limbeck.errors import InputError

Kernel = Callable[[Tensor, Tensor], Tensor]
"""[M, D], [N, D] → [M, N], positive semi-definite."""


class Factorisation(NamedTuple):
    """K = V diag(d) Vᵀ, the cache that every other function works from."""

    values: Tensor
    """[N] eigenvalues d, descending, ≥ 0."""
    vectors: Tensor
    """[N, N] eigenvectors V, one a column."""


class Rounds(NamedTuple):
    """T rounds of self-distillation; slice t−1 is round t."""

    duals: Tensor
    """[T, N, C] with f_t(x) = k(x)ᵀ duals[t−1]."""
    fits: Tensor
    """[T, N, C], Ŷ_t = f_t(X)."""


class MixingWeight(NamedTuple):
    """The best weight of the ground truth: a scalar, or [C] with one weight an output."""

    alpha: Tensor
    unclipped: Tensor
    """Where the optimum lies without the bounds 0 and 1."""
    degenerate: Tensor
    """bool: p = q, so that every weight is as good and 1 was returned."""


class Schedule(NamedTuple):
    """Mixing weights of rounds 2 to T, [T−1] or [T−1, C] each."""

    alphas: Tensor
    unclipped: Tensor
    degenerate: Tensor


def rbf(gamma: float) -> Kernel:
    """The kernel exp(−γ‖x − x′‖²) in float64."""

    def kernel(x_MD: Tensor, x_ND: Tensor) -> Tensor:
        distances_MN = torch.cdist(x_MD.double(), x_ND.double(), compute_mode="donot_use_mm_for_euclid_dist")
        return torch.exp(-gamma * distances_MN.square())

    return kernel


def factorise(K_NN: Tensor) -> Factorisation:
    """Eigendecomposition of a kernel matrix; eigenvalues that rounding made negative become 0.

    Raises:
        InputError: K is not square, not finite, not symmetric, or has an eigenvalue that is truly negative.
    """
    K_NN = K_NN.double()
    if K_NN.ndim != 2 or K_NN.shape[0] != K_NN.shape[1]:
        raise InputError(f"a kernel matrix is square, not {list(K_NN.shape)}.", where="kernel")
    if not torch.allclose(K_NN, K_NN.T):  # NaN is not close to itself
        raise InputError("the kernel matrix is not symmetric, or not finite.", where="kernel", fix="Use a symmetric kernel k(x, x′) = k(x′, x).")
    values_N, vectors_NN = torch.linalg.eigh(K_NN)
    if values_N[0] < -1e-6 * values_N[-1].abs():
        raise InputError(f"the kernel matrix has the negative eigenvalue {float(values_N[0]):.3g}.", where="kernel", fix="Use a positive semi-definite kernel.")
    return Factorisation(values_N.flip(0).clamp(min=0), vectors_NN.flip(1))


def solve(factor: Factorisation, Z_NC: Tensor, ridge: float) -> Tensor:
    """(K + λI)⁻¹ Z, the dual coefficients of the ridge fit to Z, [N, C]."""
    return factor.vectors @ ((factor.vectors.T @ Z_NC.double()) / (factor.values + ridge)[:, None])


def smoother(factor: Factorisation, ridge: float) -> Tensor:
    """A = K(K + λI)⁻¹, [N, N]: what one fit does to its targets. Source: eq. 2."""
    return (factor.vectors * (factor.values / (factor.values + ridge))) @ factor.vectors.T


def apply_kernel(factor: Factorisation, duals_NC: Tensor) -> Tensor:
    """K c, the values at the training points of the function with dual coefficients c, [N, C]."""
    return factor.vectors @ (factor.values[:, None] * (factor.vectors.T @ duals_NC))


def self_distil(factor: Factorisation, Y_NC: Tensor, alphas: Tensor | Sequence[float], ridge: float) -> Rounds:
    """All rounds by the recursion: Z_t = α_t Y + (1−α_t) Ŷ_{t−1}, c_t = (K + λI)⁻¹ Z_t, Ŷ_t = K c_t. Source: eq. 1-2."""
    Y_NC = Y_NC.double()
    duals = [solve(factor, Y_NC, ridge)]
    fits = [apply_kernel(factor, duals[0])]
    for alpha in torch.as_tensor(alphas, dtype=torch.float64, device=Y_NC.device):
        duals.append(solve(factor, alpha * Y_NC + (1 - alpha) * fits[-1], ridge))
        fits.append(apply_kernel(factor, duals[-1]))
    return Rounds(torch.stack(duals), torch.stack(fits))


def pure_chains(factor: Factorisation, Y_NC: Tensor, ridge: float, rounds: int) -> Tensor:
    """Dual coefficients of u_1 … u_T, the fits with α = 0 throughout: (K + λI)⁻¹ A^{i−1} Y, [T, N, C]. Source: eq. 4."""
    return self_distil(factor, Y_NC, [0.0] * (rounds - 1), ridge).duals


def mixture_weights(alphas: Tensor | Sequence[float]) -> Tensor:
    """w with f_T = Σ_i w_i u_i, [T] or [T, C], summing to 1 over T; ≥ 0 where every α is in [0, 1].

    w_i = α_{T−i+1} Π_{j=T−i+2..T} (1−α_j) for i < T, w_T = Π_{j=2..T} (1−α_j): a round shifts all chains by one and puts in α of u_1. Source: eq. 4.
    """
    alphas = torch.as_tensor(alphas, dtype=torch.float64)
    weights = torch.ones(1, *alphas.shape[1:], dtype=torch.float64, device=alphas.device)
    for alpha in alphas:
        weights = torch.cat([alpha[None], (1 - alpha) * weights])
    return weights


def spectral_filters(values_N: Tensor, alphas: Tensor | Sequence[float], ridge: float) -> Tensor:
    """Diagonals of B_1 … B_T with Ŷ_t = V B_t Vᵀ Y: B_1 = a, B_t = a((1−α_t)B_{t−1} + α_t). Source: eq. 6.

    Args:
        values_N: eigenvalues of K. alphas: [T−1], giving [T, N]; or [T−1, C], giving [T, N, C].
    """
    alphas = torch.as_tensor(alphas, dtype=torch.float64, device=values_N.device)
    a = (values_N / (values_N + ridge)).reshape(-1, *[1] * (alphas.ndim - 1))
    filters = [a.expand(-1, *alphas.shape[1:])]
    for alpha in alphas:
        filters.append(a * ((1 - alpha) * filters[-1] + alpha))
    return torch.stack(filters)


def limit_filter(values_N: Tensor, alpha: Tensor | float, ridge: float) -> Tensor:
    """Diagonal of B_∞ = αd/(αd + λ) for constant α ∈ [0, 1] (a number or [1, C], values_N then [N, 1]); 0 for α = 0. Source: eq. 5-6."""
    return alpha * values_N / (alpha * values_N + ridge)


def constant_filter(values_N: Tensor, alpha: Tensor | float, ridge: float, rounds: float, start_N: Tensor) -> Tensor:
    """The filter after `rounds` more rounds (0 to ∞) with constant α ∈ [0, 1] from the filter `start_N`, without iterating.

    B_{s+m} = B_∞ + ((1−α)a)^m (B_s − B_∞): eq. 3 with its geometric sum carried out; it shows the linear convergence of eq. 5.
    `alpha` is a number, or [1, C] with values_N and start_N [N, 1] or [N, C].
    """
    limit = limit_filter(values_N, alpha, ridge)
    if math.isinf(rounds):
        return limit
    return limit + ((1 - alpha) * values_N / (values_N + ridge)) ** rounds * (start_N - limit)


def closed_form(factor: Factorisation, Y_NC: Tensor, alpha: float, ridge: float, t: float) -> Tensor:
    """Ŷ_t for constant α ∈ [0, 1] and any t from 1 to ∞, [N, C]. Source: eq. 3, and eq. 5 for t = ∞."""
    a_N = factor.values / (factor.values + ridge)
    b_N = constant_filter(factor.values, alpha, ridge, t - 1, a_N)
    return factor.vectors @ (b_N[:, None] * (factor.vectors.T @ Y_NC.double()))


def limit_duals(factor: Factorisation, Y_NC: Tensor, alpha: float, ridge: float) -> Tensor:
    """Dual coefficients of f_∞ for α ∈ [0, 1], [N, C]: α(αK + λI)⁻¹ Y, ridge regression with the ridge λ/α; 0 for α = 0. Source: eq. 5."""
    return solve(factor, Y_NC, effective_ridge(ridge, alpha))


def effective_ridge(ridge: float, alpha: float) -> float:
    """The ridge λ/α that infinitely many rounds with constant α amount to; ∞ for α = 0. Source: eq. 5."""
    return ridge / alpha if alpha > 0 else math.inf


def optimal_alpha(p: Tensor, q: Tensor, y: Tensor, *, clip: bool = True, per_output: bool = False) -> MixingWeight:
    """The α that minimises ‖α p + (1−α) q − y‖² on held-out points: ⟨y − q, p − q⟩/‖p − q‖². Source: eq. 7.

    Args:
        p: predictions of the fit to labels only, [M] or [M, C]. q: of the fit to the teacher only. y: the truth.
        clip: keep the weight within [0, 1]. per_output: one weight a column, [C], rather than one for all.

    On training points p fits y best and the weight comes out at 1 or above: use held-out ones. Where p = q (to rounding) the weight is 1
    and `degenerate` says so.
    """
    p, q, y = p.double(), q.double(), y.double()
    over = (0,) if per_output else tuple(range(p.ndim))
    numerator, denominator = ((y - q) * (p - q)).sum(over), (p - q).square().sum(over)
    rounding = (4 * torch.finfo(torch.float64).eps) ** 2 * (p.square() + q.square()).sum(over)
    degenerate = denominator <= rounding
    unclipped = torch.where(degenerate, 1.0, numerator / torch.where(degenerate, 1.0, denominator))
    return MixingWeight(unclipped.clamp(0, 1) if clip else unclipped, unclipped, degenerate)


def greedy_schedule(
    factor: Factorisation,
    Y_NC: Tensor,
    k_MN: Tensor,
    Y_MC: Tensor,
    ridge: float,
    rounds: int,
    *,
    clip: bool = True,
    per_output: bool = False,
) -> Schedule:
    """α*_2 … α*_T, each the best for its own round on validation pairs, given the rounds before it. Source: eq. 7.

    Args:
        Y_NC: training targets. k_MN: kernel of the M validation points with the training points. Y_MC: their targets. rounds: T ≥ 2.
    """
    Y_NC, k_MN = Y_NC.double(), k_MN.double()
    labels_only = solve(factor, Y_NC, ridge)
    p_MC, fit_NC = k_MN @ labels_only, apply_kernel(factor, labels_only)
    found = []
    for _ in range(rounds - 1):
        q_MC = k_MN @ solve(factor, fit_NC, ridge)
        found.append(optimal_alpha(p_MC, q_MC, Y_MC, clip=clip, per_output=per_output))
        alpha = found[-1].alpha
        fit_NC = apply_kernel(factor, solve(factor, alpha * Y_NC + (1 - alpha) * fit_NC, ridge))
    return Schedule(*(torch.stack(column) for column in zip(*found, strict=True)))
