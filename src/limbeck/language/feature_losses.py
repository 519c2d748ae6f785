"""Losses between hidden states, token vectors and attention maps, over the tokens that are there (Distiller, arXiv 2109.11105; eqs. (4) to (8) of our sheet).

Legend: B samples, L tokens, d width, H heads. mask_BL: 1 (or True) where a token is, 0 at padding. The student's states already have the teacher's width
(projected where they are narrower). Teachers are constants: no gradient goes to them. Values are computed in float32 at least; a batch without a single
token gives 0 with a graph to the student.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from limbeck.errors import InputError
from limbeck.losses.divergences import full_precision


def masked_mse(student_BLd: Tensor, teacher_BLd: Tensor, mask_BL: Tensor) -> Tensor:
    """Σ m ‖s − t‖² / (d · Σ m), a scalar (eq. (4), W h^S in place of s). Raises InputError: shapes that do not fit."""
    student_BLd, teacher_BLd = _pair(student_BLd, teacher_BLd)
    return masked_mean((student_BLd - teacher_BLd).square().mean(-1), mask_BL)


def masked_cross_entropy(student_BLd: Tensor, teacher_BLd: Tensor, mask_BL: Tensor) -> Tensor:
    """States taken for logits: the mean over tokens of −Σ_i σ(t)_i log σ(s)_i (eq. (5)); at s = t the entropy of σ(t). Raises InputError: shapes."""
    student_BLd, teacher_BLd = _pair(student_BLd, teacher_BLd)
    return masked_mean(-(torch.softmax(teacher_BLd, -1) * torch.log_softmax(student_BLd, -1)).sum(-1), mask_BL)


def masked_cosine(student_BLd: Tensor, teacher_BLd: Tensor, mask_BL: Tensor) -> Tensor:
    """The mean over tokens of 1 − cos(s, t) (eq. (6)). Raises InputError: shapes that do not fit."""
    student_BLd, teacher_BLd = _pair(student_BLd, teacher_BLd)
    return masked_mean(1 - F.cosine_similarity(student_BLd, teacher_BLd, dim=-1), mask_BL)


def pkd(student_BLd: Tensor, teacher_BLd: Tensor) -> Tensor:
    """The mean over samples of ‖s/‖s‖ − t/‖t‖‖² at token 0 alone (eq. (7); patient distillation, arXiv 1908.09355). Raises InputError: shapes."""
    student_BLd, teacher_BLd = _pair(student_BLd, teacher_BLd)
    return (F.normalize(student_BLd[:, 0], dim=-1) - F.normalize(teacher_BLd[:, 0], dim=-1)).square().sum(-1).mean()


def attention_mse(student_BHLL: Tensor, teacher_BHLL: Tensor, mask_BL: Tensor) -> Tensor:
    """The mean of (A^S − A^T)² over heads and over pairs of tokens that are both there (eq. (8)).

    Raises:
        InputError: shapes that do not fit; heads are compared one by one, so there must be as many.
    """
    student_BHLL, teacher_BHLL = _pair(student_BHLL, teacher_BHLL)
    mask_BL = mask_BL.to(student_BHLL.dtype)
    pairs_BLL = mask_BL[:, :, None] * mask_BL[:, None, :]
    return masked_mean((student_BHLL - teacher_BHLL).square().mean(1), pairs_BLL)


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Σ m v / Σ m of tensors of one shape; 0 where no mask is set."""
    mask = mask.to(values.dtype)
    return (values * mask).sum() / mask.sum().clamp(min=1)


def token_vectors(states_BLd: Tensor, mask_BL: Tensor, *, mean: bool) -> Tensor:
    """One vector a sample, [B, d]: that of token 0 (the paper's), or with `mean` the mean over its tokens (ours, for encoders that are read so)."""
    if not mean:
        return states_BLd[:, 0]
    mask_BL1 = mask_BL.to(states_BLd.dtype)[..., None]
    return (states_BLd * mask_BL1).sum(1) / mask_BL1.sum(1).clamp(min=1)


def _pair(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Both in full precision, the teacher a constant."""
    if student.shape != teacher.shape:
        raise InputError(
            f"the student's states are {list(student.shape)}, the teacher's {list(teacher.shape)}.",
            where="intermediate",
            fix="Project the student's to the teacher's width; attention maps need as many heads on both sides.",
        )
    return full_precision(student), full_precision(teacher.detach())
