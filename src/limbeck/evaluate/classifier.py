"""How well a classifier does: accuracy, likelihood, calibration, and how closely it follows its teacher.

Shapes: N samples, C classes. Samples whose target is IGNORE are left out of everything that needs a target. A row of logits that
is no distribution (it holds NaN or +inf, or −inf only) counts as a wrong answer and makes the averages over it NaN.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from limbeck.contract import IGNORE
from limbeck.errors import InputError
from limbeck.evaluate.statistics import Bin

BINS = 15
"""Bins of a reliability table (Guo et al. 2017, arXiv 1706.04599)."""


@dataclass(frozen=True)
class ClassifierMetrics:
    """What is reported of a classifier. Every value is JSON-safe: None where it is undefined or not a finite number.

    labelled: samples with a target. accuracy: fraction. nll: nats a sample. ece: in [0, 1]. brier: in [0, 2].
    per_class: [C] recall, None for a class without samples. agreement and kl_to_teacher (nats): over all samples, None without a teacher.
    nonfinite: rows of logits that are no distribution.
    """

    labelled: int
    accuracy: float
    nll: float | None
    ece: float | None
    brier: float | None
    per_class: tuple[float | None, ...]
    bins: tuple[Bin, ...]
    agreement: float | None
    kl_to_teacher: float | None
    nonfinite: int


def nonfinite(logits_NC: Tensor) -> Tensor:
    """[N] bool: the rows that are no distribution (NaN, +inf, or −inf everywhere)."""
    return ~torch.isfinite(torch.logsumexp(logits_NC.double(), -1))


def predictions(logits_NC: Tensor) -> Tensor:
    """[N] int64: the most likely class, the first of equals; −1 for a row that is no distribution."""
    return logits_NC.argmax(-1).masked_fill(nonfinite(logits_NC), -1)


def _labelled(values_NC: Tensor, targets_N: Tensor) -> tuple[Tensor, Tensor]:
    if values_NC.ndim != 2 or targets_N.shape != values_NC.shape[:1]:
        raise InputError(f"expected [N, C] and [N] targets, not {list(values_NC.shape)} and {list(targets_N.shape)}.")
    keep = targets_N != IGNORE
    if not keep.any():
        raise InputError("there is no labelled sample to evaluate on.")
    targets = targets_N[keep].long()
    if targets.min() < 0 or targets.max() >= values_NC.shape[1]:
        raise InputError(f"targets run from {int(targets.min())} to {int(targets.max())}, but there are {values_NC.shape[1]} classes.")
    return values_NC[keep], targets


def accuracy(logits_NC: Tensor, targets_N: Tensor) -> float:
    """Fraction of labelled samples whose most likely class is the target. Raises InputError without any, or for a target outside [0, C)."""
    logits, targets = _labelled(logits_NC, targets_N)
    return (predictions(logits) == targets).double().mean().item()


def per_class_accuracy(logits_NC: Tensor, targets_N: Tensor) -> Tensor:
    """[C] float64: the accuracy on the samples of each class (recall); NaN for a class without samples."""
    logits, targets = _labelled(logits_NC, targets_N)
    classes = logits.shape[1]
    correct = torch.bincount(targets[predictions(logits) == targets], minlength=classes)
    return correct.double() / torch.bincount(targets, minlength=classes)


def nll(logits_NC: Tensor, targets_N: Tensor) -> float:
    """Mean negative log-likelihood of the targets, in nats."""
    logits, targets = _labelled(logits_NC, targets_N)
    return F.cross_entropy(logits.double(), targets).item()


def brier(probs_NC: Tensor, targets_N: Tensor) -> float:
    """Mean over samples of the squared distance between the probabilities and the one-hot target, in [0, 2] (Brier 1950)."""
    probs, targets = _labelled(probs_NC.double(), targets_N)
    return (probs - F.one_hot(targets, probs.shape[1])).square().sum(-1).mean().item()


def calibration(probs_NC: Tensor, targets_N: Tensor, bins: int = BINS) -> tuple[float, tuple[Bin, ...]]:
    """Expected calibration error and its reliability table, with equal-width bins (low, high] (Guo et al. 2017, arXiv 1706.04599, eq. 5).

    ECE = Σ_m |B_m|/N · |accuracy(B_m) − confidence(B_m)|, confidence being the largest probability; in [0, 1], NaN if a probability is NaN.
    """
    probs, targets = _labelled(probs_NC.double(), targets_N)
    confidence, guess = probs.max(-1)
    correct = (guess == targets).double()
    edges = torch.linspace(0, 1, bins + 1, dtype=torch.float64, device=probs.device)
    place = torch.bucketize(confidence, edges[1:-1])
    counts = torch.bincount(place, minlength=bins)
    mean_confidence = (torch.bincount(place, confidence, minlength=bins) / counts).tolist()
    mean_accuracy = (torch.bincount(place, correct, minlength=bins) / counts).tolist()
    table = []
    ece = 0.0
    for m, count in enumerate(counts.tolist()):
        conf, acc = (mean_confidence[m], mean_accuracy[m]) if count else (None, None)
        table.append(Bin(edges[m].item(), edges[m + 1].item(), count, _finite(conf), acc))
        if conf is not None and acc is not None:
            ece += count / len(targets) * abs(acc - conf)
    return ece, tuple(table)


def agreement(student_logits_NC: Tensor, teacher_logits_NC: Tensor) -> float:
    """Fraction of samples on which student and teacher name the same class; a row that is no distribution agrees with nothing."""
    student, teacher = predictions(student_logits_NC), predictions(teacher_logits_NC)
    return ((student == teacher) & (student >= 0)).double().mean().item()


def kl_to_teacher(student_logits_NC: Tensor, teacher_logits_NC: Tensor) -> float:
    """Mean KL(teacher ‖ student) of the class distributions, in nats, at temperature 1."""
    student, teacher = student_logits_NC.double().log_softmax(-1), teacher_logits_NC.double().log_softmax(-1)
    terms = torch.where(teacher == -torch.inf, 0.0, teacher.exp() * (teacher - student))
    return terms.sum(-1).mean().item()


def confusion(logits_NC: Tensor, targets_N: Tensor) -> Tensor:
    """[C, C] int64 counts; row: the true class, column: the predicted one. Rows of logits that are no distribution are in no column."""
    logits, targets = _labelled(logits_NC, targets_N)
    guesses, classes = predictions(logits), logits.shape[1]
    answered = guesses >= 0
    return torch.bincount(targets[answered] * classes + guesses[answered], minlength=classes**2).view(classes, classes)


def classifier_metrics(logits_NC: Tensor, targets_N: Tensor, teacher_logits_NC: Tensor | None = None) -> ClassifierMetrics:
    """Everything above in one value.

    Raises:
        InputError: no sample is labelled, a target is outside [0, C), or the shapes do not fit.
    """
    probs_NC = logits_NC.double().softmax(-1)
    ece, bins = calibration(probs_NC, targets_N)
    return ClassifierMetrics(
        labelled=int((targets_N != IGNORE).sum()),
        accuracy=accuracy(logits_NC, targets_N),
        nll=_finite(nll(logits_NC, targets_N)),
        ece=_finite(ece),
        brier=_finite(brier(probs_NC, targets_N)),
        per_class=tuple(_finite(a) for a in per_class_accuracy(logits_NC, targets_N).tolist()),
        bins=bins,
        agreement=None if teacher_logits_NC is None else agreement(logits_NC, teacher_logits_NC),
        kl_to_teacher=None if teacher_logits_NC is None else _finite(kl_to_teacher(logits_NC, teacher_logits_NC)),
        nonfinite=int(nonfinite(logits_NC).sum()),
    )


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
