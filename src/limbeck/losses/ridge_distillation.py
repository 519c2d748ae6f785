"""Ridge regression that learns from labels and from a teacher's predictions, in closed form: the theory of pruning with distillation (2403.07854).

Legend: D features, N samples, M of them in a subset; X [D, M] has one sample a column, y = Xᵀθ* + η with E[η] = 0; λ the ridge, α the teacher's weight.
    θ_t = (X_t X_tᵀ + λI)⁻¹ X_t y_t                                         the teacher, on the fraction f_t
    θ_s = (X_f X_fᵀ + λI)⁻¹ X_f [(1 − α) y_f + α X_fᵀ θ_t]                  the student, on the fraction f
    E[θ_s] − θ* = −P_f θ* − α (I − P_f) P_t θ*,  P = λ(X Xᵀ + λI)⁻¹         the bias
The statement that the error falls with f_t is the paper's; notation and derivation are our sheet's (item 3). Everything is float64.
"""

from __future__ import annotations

import torch
from torch import Tensor

from limbeck.errors import InputError


def ridge_fit(X_DM: Tensor, y_M: Tensor, ridge: float) -> Tensor:
    """θ = (X Xᵀ + λI)⁻¹ X y, [D], or [R, D] for R targets at once.

    Args:
        X_DM: [D, M], one sample a column. y_M: [M], or [R, M]. ridge: λ > 0.

    Raises:
        InputError: shapes that do not fit, or λ ≤ 0.
    """
    _check(X_DM, ridge)
    if y_M.dim() not in (1, 2) or y_M.shape[-1] != X_DM.shape[1]:
        raise InputError(f"targets of shape {list(y_M.shape)} for {X_DM.shape[1]} samples.", where="y", fix="Give [M], or [R, M].")
    X_DM, y_M = X_DM.double(), y_M.double()
    return torch.linalg.solve(_regularised(X_DM, ridge), X_DM @ y_M.reshape(-1, X_DM.shape[1]).T).T.reshape(*y_M.shape[:-1], len(X_DM))


def distilled_ridge(X_DM: Tensor, y_M: Tensor, teacher_D: Tensor, ridge: float, alpha: float) -> Tensor:
    """θ_s: the ridge fit to (1 − α) y + α Xᵀθ_t, [D], or [R, D].

    Args:
        X_DM: the kept samples, [D, M]. y_M: their targets, [M] or [R, M]. teacher_D: θ_t, [D] or [R, D].
        ridge: λ > 0. alpha: weight of the teacher, in [0, 1].

    Raises:
        InputError: shapes that do not fit, λ ≤ 0, or α outside [0, 1].

    Source: 2403.07854 item 3 of our sheet.
    """
    _check_alpha(alpha)
    if teacher_D.shape[-1] != len(X_DM):
        raise InputError(f"a teacher of shape {list(teacher_D.shape)} for {len(X_DM)} features.", where="teacher", fix="Give [D], or [R, D].")
    predicted_M = teacher_D.double() @ X_DM.double()
    return ridge_fit(X_DM, (1 - alpha) * y_M.double() + alpha * predicted_M, ridge)


def shrinkage(X_DM: Tensor, ridge: float) -> Tensor:
    """P = λ(X Xᵀ + λI)⁻¹, [D, D]: symmetric, eigenvalues in (0, 1]; the bias of a ridge fit is −P θ*. Raises InputError where λ ≤ 0."""
    _check(X_DM, ridge)
    return ridge * torch.linalg.inv(_regularised(X_DM.double(), ridge))


def distillation_bias(X_student_DM: Tensor, X_teacher_DM: Tensor, truth_D: Tensor, ridge: float, alpha: float) -> Tensor:
    """E[θ_s] − θ* = −P_f θ* − α (I − P_f) P_t θ*, [D], the mean over the labels' noise.

    For fixed λ it does NOT say that α > 0 makes the bias smaller than α = 0 does: what a teacher gains over labels is variance, and their noise.

    Args:
        X_student_DM: the student's samples. X_teacher_DM: the teacher's, which may be the same, others, or more. truth_D: θ*. ridge: λ > 0, of both.
        alpha: weight of the teacher, in [0, 1].

    Raises:
        InputError: shapes that do not fit, λ ≤ 0, or α outside [0, 1].

    Source: 2403.07854 item 3 of our sheet.
    """
    _check_alpha(alpha)
    if X_student_DM.shape[0] != X_teacher_DM.shape[0] or truth_D.shape != X_student_DM.shape[:1]:
        shapes = f"{list(X_student_DM.shape)}, {list(X_teacher_DM.shape)} and {list(truth_D.shape)}"
        raise InputError(f"student, teacher and truth have the shapes {shapes}.", where="truth", fix="Give [D, M], [D, M′] and [D].")
    student_DD, truth_D = shrinkage(X_student_DM, ridge), truth_D.double()
    teacher_bias_D = shrinkage(X_teacher_DM, ridge) @ truth_D
    return -student_DD @ truth_D - alpha * (teacher_bias_D - student_DD @ teacher_bias_D)


def isotropic_bias_factor(fraction: float, teacher_fraction: float, total: int, ridge: float, alpha: float) -> float:
    """p_f + α (1 − p_f) p_t with p_f = λ/(fN + λ): the bias is −(this) θ* where X_f X_fᵀ = fN·I; it falls with f_t (unless α = 0).

    Args:
        fraction: f, teacher_fraction: f_t, both in (0, 1]. total: N. ridge: λ > 0. alpha: weight of the teacher, in [0, 1].

    Raises:
        InputError: a number out of its range.

    >>> isotropic_bias_factor(0.1, 1.0, 100, 10.0, 1.0)  # p_f = 1/2, p_t = 1/11
    0.5454545454545454

    Source: 2403.07854 item 3 of our sheet.
    """
    _check_alpha(alpha)
    _check_ridge(ridge)
    for name, value in (("fraction", fraction), ("teacher_fraction", teacher_fraction)):
        if not 0 < value <= 1:  # NaN too
            raise InputError(f"{name} is {value}.", where=name, fix="It is the part that is kept, in (0, 1].")
    if total < 1:
        raise InputError(f"there are {total} samples.", where="total", fix="Give one or more.")
    p_student, p_teacher = (ridge / (f * total + ridge) for f in (fraction, teacher_fraction))
    return p_student + alpha * (1 - p_student) * p_teacher


def _regularised(X_DM: Tensor, ridge: float) -> Tensor:
    """X Xᵀ + λI, [D, D]."""
    return X_DM @ X_DM.T + ridge * torch.eye(len(X_DM), dtype=X_DM.dtype, device=X_DM.device)


def _check(X_DM: Tensor, ridge: float) -> None:
    if X_DM.dim() != 2:
        raise InputError(f"the samples have the shape {list(X_DM.shape)}.", where="X", fix="Give [D, M], one sample a column.")
    _check_ridge(ridge)


def _check_ridge(ridge: float) -> None:
    if not ridge > 0:
        raise InputError(f"the ridge is {ridge}.", where="ridge", fix="Give a number above 0.")


def _check_alpha(alpha: float) -> None:
    if not 0 <= alpha <= 1:
        raise InputError(f"alpha is {alpha}.", where="alpha", fix="Give a weight in [0, 1].")
