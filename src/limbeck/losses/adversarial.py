"""Losses between a discriminator and those it watches."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from limbeck.losses.divergences import full_precision


class _Reversal(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: float) -> Tensor:
        ctx.scale = scale
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None]:
        return grads[0] * -ctx.scale, None


def gradient_reversal(x: Tensor, scale: float = 1.0) -> Tensor:
    """The identity, whose gradient is multiplied by −scale: what follows is minimised by its own weights and maximised by x.

    Args:
        x: any shape. scale: ≥ 0. Source: 1409.7495 eq. 4-5 (gradient reversal layer).
    """
    return _Reversal.apply(x, scale)


def discriminator_loss(student_outputs_B2: Tensor, teacher_outputs_B2: Tensor) -> Tensor:
    """Binary cross-entropy of a two-output discriminator, mean over the 2B rows × 2 outputs; ln 2 where it knows nothing.

    Args:
        student_outputs_B2: its logits for the student's rows, target [1, 0]. teacher_outputs_B2: for the teacher's rows, target [0, 1].

    Source: 2009.08453 eq. 4 of our sheet.
    """
    outputs_B2 = torch.cat([full_precision(student_outputs_B2), full_precision(teacher_outputs_B2)])
    targets_B2 = torch.zeros_like(outputs_B2)
    targets_B2[: len(student_outputs_B2), 0] = 1.0
    targets_B2[len(student_outputs_B2) :, 1] = 1.0
    return F.binary_cross_entropy_with_logits(outputs_B2, targets_B2)
