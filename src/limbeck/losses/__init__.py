"""Losses as pure functions of tensors, for the methods and for a person's own loop."""

from limbeck.losses.adversarial import discriminator_loss, gradient_reversal
from limbeck.losses.divergences import Reduction, jensen_shannon, kl_divergence, reverse_kl, soft_cross_entropy
from limbeck.losses.logits import HintonReduction, cross_entropy, hinton, hinton_terms, log_mean_probabilities, mean_probabilities, partial_kd, prob_mse

__all__ = [
    "HintonReduction",
    "Reduction",
    "cross_entropy",
    "discriminator_loss",
    "gradient_reversal",
    "hinton",
    "hinton_terms",
    "jensen_shannon",
    "kl_divergence",
    "log_mean_probabilities",
    "mean_probabilities",
    "partial_kd",
    "prob_mse",
    "reverse_kl",
    "soft_cross_entropy",
]
