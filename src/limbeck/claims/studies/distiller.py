"""What the claim of Distiller (2109.11105) measures: a small student from scratch, one intermediate loss an arm, a teacher whose states are kept in memory.

The teacher is MiniLM, frozen, with a linear head that is fitted to the training texts; its hidden states are computed once a process, as float16. Every arm
has the same steps, batches and number of tries: rates (and weights of its intermediate loss) are chosen on validation texts that are held out of the training
split, with another seed. Test texts are looked at once a run, at its end.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import torch
from torch import Tensor, nn

from limbeck import seeds
from limbeck.contract import Batch, Clock, OptimiserSpec, ScheduleSpec
from limbeck.data.splits import stratified_order
from limbeck.errors import InputError
from limbeck.language.build import minilm, text_transformer
from limbeck.language.classification import TextData, text_classification
from limbeck.language.encoders import EncoderClassifier
from limbeck.methods.language.distiller import Distiller
from limbeck.optimise import build_optimiser, set_rate

UNKNOWN = 0
"""What a token that no training text has becomes: the padding's number, which the mask tells apart."""


@dataclass(frozen=True)
class Part:
    """Texts of one purpose. inputs_N2L: int64, ids of the small vocabulary, mask. targets_N.

    logits_NC: the teacher's (of validation texts it is not asked: [0, C]). hidden: [N, L, d] float16 by layer, of training texts.
    """

    inputs_N2L: Tensor
    targets_N: Tensor
    logits_NC: Tensor
    hidden: dict[int, Tensor]


@dataclass(frozen=True)
class Task:
    """One data set with what the teacher says of it. vocabulary: of the training texts. teacher_layers: K_T."""

    train: Part
    validation: Part
    test: Part
    vocabulary: int
    teacher_layers: int


@lru_cache(maxsize=2)
def task(file: str, train: int, validation: int, test: int | None, length: int, layers: tuple[int, ...]) -> Task:
    """Texts and the teacher's answers, once a process.

    Args:
        file: as for `text_classification`. train, validation: texts of the training split, drawn class by class, the same for every seed. test: texts of the
            test split, None: all. length: L. layers: hidden states of the training texts that are kept.

    Raises:
        InputError: there are not so many texts, or the data or MiniLM are not there.
    """
    splits = text_classification(file, "minilm", length)
    assert isinstance(splits.train, TextData)
    assert splits.train.targets is not None
    assert splits.test.targets is not None
    if train + validation > len(splits.train):
        raise InputError(f"{train} and {validation} texts are asked for, there are {len(splits.train)}.", where="train")
    order = stratified_order(splits.train.targets, "distiller study")
    chosen = {"train": order[:train], "validation": order[train : train + validation]}
    raw = {name: splits.train.fetch(ids) for name, ids in chosen.items()}
    raw["test"] = splits.test.fetch(stratified_order(splits.test.targets, "distiller study")[:test])
    network = minilm(len(splits.train.classes), (2, length), head_only=True).eval()
    answers = {name: _answers(network, raw[name][0], layers if name == "train" else ()) for name in ("train", "test")}
    answers["validation"] = (torch.empty(0, network.width), {})
    head = _fitted_head(answers["train"][0], raw["train"][1], len(splits.train.classes))
    known = raw["train"][0][:, 0].unique()
    place = torch.full((30_522,), UNKNOWN)
    place[known] = torch.arange(1, len(known) + 1)
    parts = {}
    for name, (inputs, targets) in raw.items():
        small = torch.stack((place[inputs[:, 0]] * inputs[:, 1], inputs[:, 1]), 1)
        with torch.no_grad():
            parts[name] = Part(small, targets, head(answers[name][0]), answers[name][1])
    return Task(**parts, vocabulary=len(known) + 1, teacher_layers=network.layers)


@torch.no_grad()
def _answers(network: EncoderClassifier, inputs: Tensor, layers: Sequence[int]) -> tuple[Tensor, dict[int, Tensor]]:
    """MiniLM's sentence vectors [N, d], and the hidden states that are wanted."""
    vectors, kept = [], {layer: torch.empty(len(inputs), inputs.shape[2], network.width, dtype=torch.float16) for layer in layers}
    for start in range(0, len(inputs), 128):
        found = network.encode(inputs[start : start + 128])
        vectors.append(nn.functional.normalize(network.pooled(found.hidden[-1], found.mask_BL), dim=1))
        for layer, states in kept.items():
            states[start : start + 128] = found.hidden[layer]
    return torch.cat(vectors), kept


def _fitted_head(vectors_Nd: Tensor, targets_N: Tensor, classes: int) -> nn.Linear:
    """A linear head by logistic regression (scikit-learn's, C = 30: its choice is no part of the comparison)."""
    from sklearn.linear_model import LogisticRegression

    found = LogisticRegression(C=30.0, max_iter=200).fit(vectors_Nd.numpy(), targets_N.numpy())
    head = nn.Linear(vectors_Nd.shape[1], classes)
    with torch.no_grad():
        head.weight.zero_()
        head.bias.fill_(-30.0)  # a class that no training text has
        head.weight[found.classes_] = torch.from_numpy(found.coef_).float()
        head.bias[found.classes_] = torch.from_numpy(found.intercept_).float()
    return head.requires_grad_(False)


# ---- one training --------------------------------------------------------------------------------------------------------


class Kept:
    """The teacher's answers in memory, as a recorded teacher gives them to `Distiller`: they come with the batch."""

    def __init__(self, part: Part) -> None:
        self.part = part

    def lookup(self, ids_B: Tensor, views_B: Tensor) -> dict[str, Tensor]:
        """Answers for training texts."""
        hidden = {f"features/{layer}": states[ids_B].float() for layer, states in self.part.hidden.items()}
        return {"logits": self.part.logits_NC[ids_B][:, None], **hidden}

    def logits(self, batch: Batch) -> Tensor:
        """[B, C]."""
        return batch.recorded["logits"][:, 0]

    def all_logits(self, batch: Batch) -> Tensor:
        """[1, B, C]."""
        return batch.recorded["logits"].transpose(0, 1)

    def batch(self, ids_B: Tensor, *, hidden: bool) -> Batch:
        """A batch of training texts with its answers."""
        recorded = self.lookup(ids_B, ids_B) if hidden else {"logits": self.part.logits_NC[ids_B][:, None]}
        return Batch(self.part.inputs_N2L[ids_B], self.part.targets_N[ids_B], ids_B, recorded=recorded)


@dataclass(frozen=True)
class Training:
    """How a student is made: what all arms share. width, layers, heads: its shape. clip: of the gradient's norm (ours; the paper's scripts have none)."""

    steps: int = 250
    batch_size: int = 64
    width: int = 128
    layers: int = 2
    heads: int = 2
    dropout: float = 0.1
    weight_decay: float = 0.1
    clip: float = 1.0


@dataclass(frozen=True)
class Trained:
    """A student and the intermediate loss of every step, [steps] (0 without one)."""

    student: nn.Module
    intermediate: Tensor


def train(found: Task, knobs: dict[str, Any], training: Training, rate: float, seed: int) -> Trained:
    """One student from scratch. Raises InputError: a knob is wrong, or the student has more layers than the teacher."""
    classes, length = found.train.logits_NC.shape[1], found.train.inputs_N2L.shape[2]
    teacher = Kept(found.train)
    wants = knobs.get("intermediate", "none") != "none"
    taps = [str(layer) if layer in found.train.hidden else "" for layer in range(found.teacher_layers + 1)]
    losses = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seeds.derive(seed, "student"))
        shape = {"layers": training.layers, "width": training.width, "heads": training.heads, "dropout": training.dropout}
        student = text_transformer(classes, (2, length), vocabulary=found.vocabulary, **shape)
        method = Distiller(**knobs, taps=taps).bind(student=student, teacher=teacher, num_classes=classes, seed=seed)
        parameters = list(method.players()["student"].module.parameters())
        schedule = ScheduleSpec(name="linear", warmup=0.1)
        spec = OptimiserSpec(name="adamw", lr=rate, weight_decay=training.weight_decay, schedule=schedule)
        optimiser = build_optimiser(parameters, spec)
        student.train()
        for step, ids_B in zip(range(training.steps), _orders(len(found.train.targets_N), training.batch_size, seed), strict=False):
            torch.manual_seed(seeds.derive(seed, "dropout", step))
            (update,) = method.updates(teacher.batch(ids_B, hidden=wants), Clock(seed=seed, step=step, steps=training.steps))
            optimiser.zero_grad(set_to_none=True)
            update.loss.backward()
            nn.utils.clip_grad_norm_(parameters, training.clip)
            set_rate(optimiser, spec, step, training.steps)
            optimiser.step()
            losses.append(update.metrics.get("intermediate", torch.zeros(())).detach())
    return Trained(student.eval(), torch.stack(losses))


def _orders(count: int, batch_size: int, seed: int) -> Iterator[Tensor]:
    """Whole batches of one pass after the other, without repeats within a pass."""
    for epoch in range(1_000_000):
        order = torch.randperm(count, generator=seeds.generator(seed, "order", epoch))
        yield from order[: count - count % batch_size].split(batch_size)


@torch.no_grad()
def predicted(student: nn.Module, part: Part) -> Tensor:
    """[N] int64: the student's classes."""
    return torch.cat([student(inputs).argmax(1) for inputs in part.inputs_N2L.split(512)])


def accuracy(student: nn.Module, part: Part) -> float:
    """The share of texts that are classified rightly."""
    return float((predicted(student, part) == part.targets_N).double().mean())


# ---- an arm --------------------------------------------------------------------------------------------------------------

Arm = Literal["no_kd", "none", "mse", "cosine", "mi"]


def arm(
    seed: int,
    loss: Arm,
    alpha: float = 0.9,
    rates: Sequence[float] = (1e-3, 3e-3),
    weights: Sequence[float] = (0.1, 1.0, 10.0),
    search_seeds: Sequence[int] = (100,),
    data: dict[str, Any] | None = None,
    training: dict[str, Any] | None = None,
) -> dict[str, float]:
    """A student by one pipeline, at the rate and weight that did best on the validation texts with other seeds.

    Args:
        loss: "no_kd": the labels alone; "none": the teacher's logits alone; else an intermediate loss beside them. alpha: of "mi".
        rates, weights: what is tried, every rate with every weight w_int ("no_kd" and "none": rates alone; give as many).
        data: arguments of `task` beside the layers. training: of `Training`.

    Returns:
        accuracy on the test texts, validation_accuracy of the choice, rate, weight, teacher_accuracy, agreement with the teacher on the test texts.
        With a loss also intermediate (its mean over the last half of the steps) and intermediate_sd, its standard deviation there, of the sum over the
        matched layers; step_sd: without its trend, from the differences of neighbouring steps; for "mi" with ln_ (of the sum of bounds): the logarithms.
    """
    given = {"file": "banking77", "train": 4000, "validation": 1000, "test": None, "length": 24, **(data or {})}
    how = Training(**(training or {}))
    found = task(**given, layers=_layers(how.layers))
    rate, weight, best = _searched(loss, alpha, tuple(rates), tuple(weights), tuple(search_seeds), tuple(sorted(given.items())), how)
    made = train(found, knobs_of(loss, alpha, weight), how, rate, seed)
    classes_N, taught_N = predicted(made.student, found.test), found.test.logits_NC.argmax(1)
    measures = {
        "accuracy": float((classes_N == found.test.targets_N).double().mean()),
        "validation_accuracy": best,
        "rate": rate,
        "weight": weight,
        "teacher_accuracy": float((taught_N == found.test.targets_N).double().mean()),
        "agreement": float((classes_N == taught_N).double().mean()),
    }
    return measures | (_spread(made.intermediate) if loss not in ("no_kd", "none") else {})


def knobs_of(loss: Arm, alpha: float, weight: float) -> dict[str, Any]:
    """Knobs of `Distiller` for an arm. MiniLM is read by the mean of its tokens, and so is the student: bounds look at that, not at the first token."""
    if loss == "no_kd":
        return {"intermediate": "none", "w_kd": 0.0, "w_hard": 1.0}
    if loss == "none":
        return {"intermediate": "none"}
    return {"intermediate": loss, "alpha": alpha, "w_int": weight, "vector": "mean"}


@lru_cache(maxsize=64)
def _searched(
    loss: Arm,
    alpha: float,
    rates: tuple[float, ...],
    weights: tuple[float, ...],
    search_seeds: tuple[int, ...],
    data: tuple[tuple[str, Any], ...],
    how: Training,
) -> tuple[float, float, float]:
    """Rate, weight, and the mean validation accuracy that they had: the best of the grid (the first of equals)."""
    found = task(**dict(data), layers=_layers(how.layers))
    grid = [(rate, weight) for weight in (weights if loss not in ("no_kd", "none") else (1.0,)) for rate in rates]
    scores = []
    for rate, weight in grid:
        made = [train(found, knobs_of(loss, alpha, weight), how, rate, seed).student for seed in search_seeds]
        scores.append(sum(accuracy(student, found.validation) for student in made) / len(made))
    best = max(range(len(grid)), key=lambda i: scores[i])
    return (*grid[best], scores[best])


def _layers(student_layers: int, teacher_layers: int = 6) -> tuple[int, ...]:
    """MiniLM's hidden states that skip matches with."""
    return tuple(n * teacher_layers // student_layers for n in range(student_layers + 1))


def _spread(intermediate: Tensor) -> dict[str, float]:
    """Mean and standard deviations over the last half of the steps."""
    late = intermediate[len(intermediate) // 2 :].double()
    deviation = float(late.std())
    differences = float(late.diff().square().mean().div(2).sqrt())
    found = {"intermediate": float(late.mean()), "intermediate_sd": deviation, "step_sd": differences}
    return found | {f"ln_{name}": math.log(max(value, 1e-12)) for name, value in (("intermediate_sd", deviation), ("step_sd", differences))}
