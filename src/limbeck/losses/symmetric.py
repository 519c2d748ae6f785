"""The symmetrised Kullback-Leibler divergence, half of Jeffreys' (2103.05959 calls it "JS"; it is not the bounded Jensen-Shannon divergence).

Legend and conventions as in `divergences`: t teacher logits, s student logits, q = σ(t/T), p = σ(s/T), in nats, logits finite.
"""

from __future__ import annotations

from torch import Tensor

from limbeck.losses.divergences import Reduction, log_probabilities, reduced


def symmetric_kl(
    teacher_logits_BC: Tensor,
    student_logits_BC: Tensor,
    temperature: float = 1.0,
    reduction: Reduction = "batchmean",
    eps: float | None = None,
) -> Tensor:
    """½ [KL(q‖p) + KL(p‖q)] = ½ Σ_c (p_c − q_c)(log p_c − log q_c), without the factor T².

    Args:
        teacher_logits_BC, student_logits_BC: [B, C]. temperature: T > 0.
        reduction: see `Reduction`. The authors' code multiplies by C and averages over B·C, which is "batchmean".
        eps: None: logarithms of the softmax itself, exact for any logits. ε > 0: each log-ratio is log((a_c + ε)/(b_c + ε)), as the authors'
            code has it (1e-12, in 2020 1e-10): at most log((1 + ε)/ε), a mild clip of saturated logits.

    Symmetric in its two arguments, not bounded, at least twice `jensen_shannon`. Its gradient at s_k, eps None:
    ½ [(p_k − q_k) + p_k (log(p_k/q_k) − KL(p‖q))]/(T·B), which tends to that of `soft_cross_entropy` as s tends to t.
    Source: 2103.05959, items 1, 2 and 4 of our sheet.
    """
    log_q_BC, log_p_BC = log_probabilities(teacher_logits_BC, temperature), log_probabilities(student_logits_BC, temperature)
    q_BC, p_BC = log_q_BC.exp(), log_p_BC.exp()
    log_ratio_BC = log_p_BC - log_q_BC if eps is None else (p_BC + eps).log() - (q_BC + eps).log()
    return reduced(0.5 * ((p_BC - q_BC) * log_ratio_BC).sum(-1), student_logits_BC.shape[-1], reduction)
