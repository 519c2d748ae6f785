"""Losses of classifiers that learn from logits: labels, soft labels, both, or some of the classes.

Legend as in `divergences`. Targets y are [B] int64 class indices (IGNORE = −100 where unlabelled), [B, C] class probabilities, or None.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from limbeck.contract import IGNORE
from limbeck.losses.divergences import full_precision, kl_divergence, log_probabilities, soft_cross_entropy

HintonReduction = Literal["batchmean", "code"]
"""How `hinton` reduces its soft term: "batchmean", or "code" = divided by C as well, as old PyTorch's `KLDivLoss` did (1802.05668)."""


def cross_entropy(logits_BC: Tensor, targets: Tensor | None, label_smoothing: float = 0.0) -> Tensor:
    """Cross-entropy with labels, averaged over the labelled samples; 0, not NaN, where there are none.

    Args:
        logits_BC: [B, C]. targets: [B] int64 (IGNORE = unlabelled), [B, C] probabilities (a row that sums to less than 1 counts as
            that part of a sample, a row of zeros is unlabelled), or None (all unlabelled).
        label_smoothing: share of the target spread evenly over the classes, in [0, 1].
    """
    logits_BC = full_precision(logits_BC)
    if targets is None:
        return logits_BC.new_zeros(())
    if targets.is_floating_point():
        targets_BC = full_precision(targets)
        labelled_B = targets_BC.sum(-1)
        if label_smoothing > 0:
            targets_BC = (1 - label_smoothing) * targets_BC + label_smoothing / targets_BC.shape[-1] * labelled_B[:, None]
        total = soft_cross_entropy(logits_BC, targets_BC, "sum")
    else:
        labelled_B = targets != IGNORE
        total = F.cross_entropy(logits_BC, targets, ignore_index=IGNORE, reduction="sum", label_smoothing=label_smoothing)
    return total / labelled_B.sum().clamp(min=1)


def hinton_terms(
    student_logits_BC: Tensor,
    teacher_logits_BC: Tensor,
    targets: Tensor | None,
    temperature: float = 4.0,
    reduction: HintonReduction = "batchmean",
) -> tuple[Tensor, Tensor]:
    """The two terms of `hinton`, unweighted: T² KL(σ(t/T)‖σ(s/T)) and CE(y, s). Arguments as there."""
    divergence = kl_divergence(teacher_logits_BC, student_logits_BC, temperature, "mean" if reduction == "code" else "batchmean")
    return temperature**2 * divergence, cross_entropy(student_logits_BC, targets)


def hinton(
    student_logits_BC: Tensor,
    teacher_logits_BC: Tensor,
    targets: Tensor | None,
    temperature: float = 4.0,
    weight: float = 0.9,
    reduction: HintonReduction = "batchmean",
) -> Tensor:
    """w T² KL(σ(t/T)‖σ(s/T)) + (1 − w) CE(y, s).

    Args:
        student_logits_BC, teacher_logits_BC: [B, C]. targets: as in `cross_entropy`: unlabelled samples count in the soft term alone.
        temperature: T > 0. weight: w in [0, 1], of the soft term. reduction: of the soft term, see `HintonReduction`; the CE is a mean.

    Its gradient at s, all samples labelled, "batchmean": (w T (σ(s/T) − σ(t/T)) + (1 − w)(σ(s) − y))/B.
    Source: 1503.02531 section 2; 1802.05668 eq. 4 of our sheet ("code": w = 0.7, T = 2).
    """
    soft, hard = hinton_terms(student_logits_BC, teacher_logits_BC, targets, temperature, reduction)
    return weight * soft + (1.0 - weight) * hard


def partial_kd(logits_BC: Tensor, old_logits_BK: Tensor, temperature: float = 2.0) -> Tensor:
    """Distillation over the first K classes alone: −(1/B) Σ_b Σ_{c≤K} q̂_bc log q_bc, without the factor T².

    q̂ = σ(old/T) and q = σ(logits_{1..K}/T), each normalised over the K old classes.

    Args:
        logits_BC: [B, C] of the grown model. old_logits_BK: [B, K] of the old one, K ≤ C. temperature: T > 0.

    Its gradient at logit c is (q_c − q̂_c)/(T·B) for c ≤ K, 0 for the new classes. Source: 1911.07053 eq. 2 of our sheet.
    """
    old_probs_BK = torch.softmax(full_precision(old_logits_BK) / temperature, dim=-1)
    return soft_cross_entropy(full_precision(logits_BC[:, : old_logits_BK.shape[1]]) / temperature, old_probs_BK)


def prob_mse(logits_BC: Tensor, probs_BC: Tensor) -> Tensor:
    """Squared error of probabilities, (1/(B·C)) Σ (σ(logits) − p)²: mean over batch AND classes. Source: 2102.13088 eq. 9 of our sheet."""
    return F.mse_loss(torch.softmax(full_precision(logits_BC), dim=-1), full_precision(probs_BC))


def log_mean_probabilities(logits_TBC: Tensor) -> Tensor:
    """log (1/T) Σ_k σ(t_k), [B, C], at least float32: the logits of the ensemble's soft target.

    Args:
        logits_TBC: [T, B, C], one slice a teacher. Source: 2009.08453 eq. 1 of our sheet.
    """
    return log_probabilities(logits_TBC).logsumexp(0) - math.log(len(logits_TBC))


def mean_probabilities(logits_TBC: Tensor) -> Tensor:
    """The ensemble's soft target p = (1/T) Σ_k σ(t_k), [B, C]: the mean of probabilities, not the softmax of mean logits.

    Args:
        logits_TBC: [T, B, C], one slice a teacher. Source: 2009.08453 eq. 1 of our sheet.
    """
    return torch.softmax(full_precision(logits_TBC), dim=-1).mean(0)
