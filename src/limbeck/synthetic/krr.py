"""A ridge head in closed form, with gradients to what it was fitted on: how well would features of these few pairs predict the targets of real ones?

Source: KRR-ST, 2310.06511; equation numbers are those of our sheet `krr_st`. The paper's: (2) to (6), the relative ridge, the constant feature.
Ours: the primal form, the choice between the two, Cholesky in float64 with jitter.

Legend: M synthetic pairs, N real samples, P features (Q = P + 1 with the constant one), D entries of a target; φ features, K = φ φᵀ kernels, r ridge.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from limbeck.errors import InputError

Form = Literal["auto", "dual", "primal"]
JITTERS = (0.0, 1.0, 10.0, 100.0)
"""What is tried on the diagonal, in units of the trace times the type's rounding error, until the factorisation succeeds."""


def with_constant(features_BP: Tensor) -> Tensor:
    """φ̃ = [φ ; 1], [B, P + 1]: a constant feature, so that the head has a bias (which is penalised as the rest is). Source: eq. 2."""
    return torch.cat([features_BP, features_BP.new_ones(len(features_BP), 1)], dim=1)


def relative_ridge(features_MQ: Tensor, ratio: float = 1e-6) -> Tensor:
    """r = ratio · trace(K_ss), a scalar without gradient. Source: eq. 3.

    features_MQ: of the synthetic images, the constant one included if there is one; trace(φ φᵀ) = trace(φᵀ φ) = the sum of all squares.
    """
    return ratio * features_MQ.detach().square().sum()


def ridge_predictions(features_MQ: Tensor, targets_MD: Tensor, features_NQ: Tensor, ridge: Tensor, form: Form = "auto") -> Tensor:
    """Ŷ [N, D] of the ridge regression from features to targets; differentiable in all three tensors. Source: eq. 4.

    dual: K_ns (K_ss + rI)⁻¹ Y_s, the cost M³ + NMQ. primal: φ_n (φ_sᵀ φ_s + rI)⁻¹ φ_sᵀ Y_s, the cost Q³ + MQ². The same numbers; auto takes the cheaper.

    Args:
        features_MQ, targets_MD: of the synthetic pairs. features_NQ: of the samples to predict. ridge: scalar, above 0 where the matrix is singular.

    Raises:
        InputError: the shapes do not fit together.
    """
    (m, q), d = features_MQ.shape, targets_MD.shape[-1]
    if targets_MD.shape != (m, d) or features_NQ.ndim != 2 or features_NQ.shape[1] != q:
        shapes = f"{list(features_MQ.shape)}, {list(targets_MD.shape)} and {list(features_NQ.shape)}"
        raise InputError(f"synthetic features, targets and real features of shapes {shapes} do not belong together.", where="features")
    if form == "dual" or (form == "auto" and m <= q):
        return (features_NQ @ features_MQ.T) @ _solve(features_MQ @ features_MQ.T, targets_MD, ridge)
    return features_NQ @ _solve(features_MQ.T @ features_MQ, features_MQ.T @ targets_MD, ridge)


def ridge_loss(
    features_MP: Tensor,
    targets_MD: Tensor,
    features_NP: Tensor,
    targets_ND: Tensor,
    *,
    ratio: float = 1e-6,
    form: Form = "auto",
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """J: the mean over all N·D entries of (Ŷ − Y)², a scalar in `dtype`. Source: eqs. 2 to 5.

    Args:
        features_MP, targets_MD: φ(X_s) and Y_s; both carry gradient where they need one. features_NP, targets_ND: φ(X_r) and Y_r = g(X_r).
        ratio: of the ridge to the trace of K_ss. form: see `ridge_predictions`. dtype: that everything is computed in (the paper's code: float32).

    Raises:
        InputError: the shapes do not fit together.
    """
    phi_MQ, phi_NQ = with_constant(features_MP.to(dtype)), with_constant(features_NP.to(dtype))
    predicted_ND = ridge_predictions(phi_MQ, targets_MD.to(dtype), phi_NQ, relative_ridge(phi_MQ, ratio), form)
    if predicted_ND.shape != targets_ND.shape:
        raise InputError(f"predictions {list(predicted_ND.shape)} and real targets {list(targets_ND.shape)} do not belong together.", where="targets")
    return (predicted_ND - targets_ND.to(dtype)).square().mean()


def _solve(matrix_QQ: Tensor, right_QD: Tensor, ridge: Tensor) -> Tensor:
    """(A + rI)⁻¹ B by Cholesky; jitter is added only where the factorisation fails without. Nothing is read on the host."""
    eye = torch.eye(len(matrix_QQ), dtype=matrix_QQ.dtype, device=matrix_QQ.device)
    regular = matrix_QQ + ridge * eye
    factor = torch.linalg.cholesky_ex(regular + _jitter(regular.detach()) * eye).L
    return torch.cholesky_solve(right_QD, factor)


def _jitter(matrix_QQ: Tensor) -> Tensor:
    """The smallest of `JITTERS` with which the matrix can be factorised, the largest where it cannot; a scalar."""
    unit = matrix_QQ.trace() * torch.finfo(matrix_QQ.dtype).eps
    eye = torch.eye(len(matrix_QQ), dtype=matrix_QQ.dtype, device=matrix_QQ.device)
    found = unit * JITTERS[-1]
    for level in reversed(JITTERS[:-1]):
        failed = torch.linalg.cholesky_ex(matrix_QQ + level * unit * eye).info
        found = torch.where(failed == 0, level * unit, found)
    return found
