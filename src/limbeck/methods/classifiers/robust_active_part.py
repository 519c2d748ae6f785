"""What Robust Active Distillation does between trainings: gains, inclusion probabilities, questions to the teacher (2210.01213)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from limbeck.contract import IGNORE, Batch, Data, Teacher
from limbeck.losses import scores
from limbeck.losses.sampling_game import Sampling, guaranteed_payoff, proportional_batch, robust_batch

Gain = Literal["margin", "entropy", "confidence"]
Selection = Literal["robust", "top", "uniform", "proportional"]
AT_ONCE = 256
"""Samples a forward pass of the teacher."""


def gains_of(logits_NC: Tensor, gain: Gain, floor: float = 1e-6) -> Tensor:
    """How much a label of each item would teach, [N] float64 in [floor, 1].

    Args:
        logits_NC: of the student. floor: ε > 0, the least gain.
        gain: 'margin' 1 − (top − second probability), 'entropy' H/log C, 'confidence' 1 − top probability.

    Source: 2210.01213 item 1 of our sheet.
    """
    if gain == "entropy":
        found_N = scores.entropy(logits_NC, normalised=True)
    else:
        found_N = 1 - (scores.margin(logits_NC) if gain == "margin" else scores.confidence(logits_NC))
    return found_N.clamp(floor, max(floor, 1.0))


def batch_sampling(gains_N: Tensor, budget: int, selection: Selection, wrong: int, wrong_loss: float = 0.0) -> Sampling:
    """Inclusion probabilities of b items: 'robust' solves the game, the others are what it is compared with and do not look at m.

    Args:
        gains_N: [N], positive. budget: b. wrong: m. wrong_loss: w. Ties of 'top' at the b-th gain are shared.
    """
    if selection == "robust":
        return robust_batch(gains_N, budget, wrong, wrong_loss)
    if selection == "top":
        q_N = robust_batch(gains_N, budget, 0).probabilities
    else:
        q_N = proportional_batch(gains_N, budget) if selection == "proportional" else torch.full_like(gains_N, budget / len(gains_N))
    return Sampling(q_N, guaranteed_payoff(q_N, gains_N, wrong, wrong_loss), int((q_N > 0).sum()))


@torch.no_grad()
def ask(teacher: Teacher, data: Data, ids_M: Tensor, device: torch.device) -> Tensor:
    """The teacher's logits at some samples, without augmentation: [M, C] float32 on the CPU. A recorded teacher is read, at view 0.

    Args:
        ids_M: positions in `data`, each of which the teacher is shown once.
    """
    answers = []
    for ids_B in ids_M.split(AT_ONCE):
        inputs = data.prepare(data.fetch(ids_B)[0]).to(device)
        answers.append(teacher.logits(Batch(inputs, None, ids_B.to(device))).float().cpu())
    return torch.cat(answers)


def accuracy(teacher: Teacher, data: Data, device: torch.device) -> float:
    """Share of the labelled samples of held-out data that the teacher labels correctly."""
    assert data.targets is not None
    known_M = (data.targets != IGNORE).nonzero()[:, 0]
    return float((ask(teacher, data, known_M, device).argmax(-1) == data.targets[known_M]).double().mean())
