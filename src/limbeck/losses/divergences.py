"""Divergences between categorical distributions given by logits, in nats.

Legend: B samples, C classes, t teacher logits, s student logits, T temperature, σ softmax over the last dimension, p = σ(t/T), q = σ(s/T).
Half-precision inputs are computed in float32; logits must be finite. Gradients flow into every tensor that asks for them.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Reduction = Literal["batchmean", "mean", "sum", "none"]
"""What becomes of the per-sample values (each a sum over classes): "batchmean" their mean; "mean" that mean divided by C, as PyTorch's
`kl_div` has it; "sum" their sum; "none" all of them, [B]."""


def full_precision(x: Tensor) -> Tensor:
    """The tensor in float32 where it is half precision; float32 and float64 stay as they are."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def log_probabilities(logits_BC: Tensor, temperature: float = 1.0) -> Tensor:
    """log σ(logits/T), at least float32, [B, C]."""
    logits_BC = full_precision(logits_BC)
    return torch.log_softmax(logits_BC if temperature == 1.0 else logits_BC / temperature, dim=-1)


def reduced(values_B: Tensor, classes: int, reduction: Reduction) -> Tensor:
    """Per-sample values to what `reduction` asks for."""
    if reduction == "none":
        return values_B
    if reduction == "sum":
        return values_B.sum()
    return values_B.mean() if reduction == "batchmean" else values_B.mean() / classes


def soft_cross_entropy(logits_BC: Tensor, probs_BC: Tensor, reduction: Reduction = "batchmean") -> Tensor:
    """Cross-entropy with soft targets: −(1/B) Σ_b Σ_c p_bc log σ(logits)_bc, which is KL(p‖σ(logits)) + H(p).

    Args:
        logits_BC: [B, C]. probs_BC: [B, C], rows sum to 1. reduction: see `Reduction`.

    Its gradient at the logits is (σ(logits) − p)/B. Source: 2009.08453 eq. 2 of our sheet.
    """
    values_B = -(full_precision(probs_BC) * log_probabilities(logits_BC)).sum(-1)
    return reduced(values_B, logits_BC.shape[-1], reduction)


def _kl(log_p_BC: Tensor, log_q_BC: Tensor) -> Tensor:
    """KL(p‖q) of each sample, [B]."""
    return (log_p_BC.exp() * (log_p_BC - log_q_BC)).sum(-1)


def kl_divergence(teacher_logits_BC: Tensor, student_logits_BC: Tensor, temperature: float = 1.0, reduction: Reduction = "batchmean") -> Tensor:
    """KL(σ(t/T)‖σ(s/T)), WITHOUT the factor T² (see `hinton`).

    Args:
        teacher_logits_BC, student_logits_BC: [B, C]. temperature: T > 0. reduction: see `Reduction`.

    Its gradient at s is (q − p)/(T·B). Source: 1503.02531 section 2.
    """
    log_p_BC, log_q_BC = log_probabilities(teacher_logits_BC, temperature), log_probabilities(student_logits_BC, temperature)
    return reduced(_kl(log_p_BC, log_q_BC), student_logits_BC.shape[-1], reduction)


def reverse_kl(teacher_logits_BC: Tensor, student_logits_BC: Tensor, temperature: float = 1.0, reduction: Reduction = "batchmean") -> Tensor:
    """KL(σ(s/T)‖σ(t/T)), the mode-seeking direction, without the factor T². Arguments as in `kl_divergence`.

    Its gradient at s_k is q_k (log(q_k/p_k) − KL(q‖p))/(T·B).
    """
    log_p_BC, log_q_BC = log_probabilities(teacher_logits_BC, temperature), log_probabilities(student_logits_BC, temperature)
    return reduced(_kl(log_q_BC, log_p_BC), student_logits_BC.shape[-1], reduction)


def jensen_shannon(teacher_logits_BC: Tensor, student_logits_BC: Tensor, temperature: float = 1.0, reduction: Reduction = "batchmean") -> Tensor:
    """½ KL(p‖m) + ½ KL(q‖m) with m = ½(p + q): symmetric, at most ln 2 a sample. Arguments as in `kl_divergence`.

    Not the symmetrised KL, ½ KL(p‖q) + ½ KL(q‖p), that some papers call "JS".
    """
    log_p_BC, log_q_BC = log_probabilities(teacher_logits_BC, temperature), log_probabilities(student_logits_BC, temperature)
    log_m_BC = torch.logaddexp(log_p_BC, log_q_BC) - torch.log(log_p_BC.new_tensor(2.0))
    return reduced(0.5 * (_kl(log_p_BC, log_m_BC) + _kl(log_q_BC, log_m_BC)), student_logits_BC.shape[-1], reduction)
