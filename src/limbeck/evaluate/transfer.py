"""How good a start is it? Pre-train a fresh network by regression on pairs (image, vector), swap its head, fine-tune or probe it on a task with few labels.

Source: KRR-ST, 2310.06511, "pre-train", "fine-tune" and "linear probe" of our sheet `krr_st`, whose numbers are the defaults. Ours: batches of near-equal
size (the paper's last one may be small, which batch norm does not like), all random numbers from a seed of one's own, J on held-out images.

Legend: M pairs, N samples of the task, D entries of a vector, C classes, B batch; X the shape of one input. Inputs are prepared, as networks take them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from limbeck import seeds
from limbeck.contract import IGNORE, Frozen
from limbeck.data.augment import AugmentSpec, transform
from limbeck.errors import InputError
from limbeck.evaluate.predict import device_of
from limbeck.models.growing import find_head, head_inputs
from limbeck.modes import evaluating
from limbeck.synthetic.krr import ridge_loss
from limbeck.synthetic.pool import frozen_features, with_outputs

CHUNK = 512
"""Inputs a call where nothing is trained."""


class Descent(Frozen):
    """SGD: how long and how fast."""

    batch_size: int = Field(256, ge=1, le=1_000_000, description="the most samples a step")
    lr: float = Field(0.1, gt=0, le=1e4)
    momentum: float = Field(0.9, ge=0, lt=1)
    weight_decay: float = Field(0.0, ge=0, le=1e3)


class Pretraining(Descent):
    """Regression on the pairs: train mode, mean squared error over all entries, constant rate, no augmentation. Source: eq. 1."""

    epochs: int = Field(1000, ge=0, le=1_000_000, description="passes over the pairs; 0: no pre-training")
    weight_decay: float = Field(1e-3, ge=0, le=1e3)


class FineTuning(Descent):
    """All weights on the task's labels: train mode, cross-entropy, cosine to 0."""

    steps: int = Field(10_000, ge=1, le=10_000_000, description="steps (paper: 5,000 on fine-grained sets)")
    lr: float = Field(0.01, gt=0, le=1e4)
    weight_decay: float = Field(5e-4, ge=0, le=1e3)
    augment: AugmentSpec = Field(AugmentSpec(crop=4, flip=True), description="of the task's images (paper: zero padding 4 and a crop, a flip)")


class Probing(Descent):
    """A linear head on frozen features in eval mode, constant rate, no augmentation. The momentum is ours: our source does not name it."""

    steps: int = Field(5000, ge=1, le=10_000_000)
    batch_size: int = Field(512, ge=1, le=1_000_000, description="samples a step")
    lr: float = Field(0.2, gt=0, le=1e4)


class TransferSpec(Frozen):
    """Pre-training and what follows it."""

    mode: Literal["fine_tune", "probe"] = Field("fine_tune", description="all weights on the task, or a linear head on frozen features")
    labels_per_class: int = Field(10, ge=1, le=1_000_000, description="labelled samples a class that the task has")
    pretraining: Pretraining = Pretraining()
    fine_tuning: FineTuning = FineTuning()
    probing: Probing = Probing()


@dataclass(frozen=True)
class Task:
    """A labelled task: training inputs [N, X] and labels [N] int64, as many test inputs and labels as there are, the number C of classes."""

    inputs: Tensor
    labels: Tensor
    test_inputs: Tensor
    test_labels: Tensor
    classes: int

    def __post_init__(self) -> None:
        for inputs, labels, name in ((self.inputs, self.labels, "training"), (self.test_inputs, self.test_labels, "test")):
            if len(inputs) != len(labels) or not len(inputs):
                raise InputError(f"{len(inputs)} {name} inputs and {len(labels)} labels.", where="task", fix="Give one label an input.")
            if bool(((labels < 0) | (labels >= self.classes)).any()):
                missing = " Unlabelled samples are none of a task's." if bool((labels == IGNORE).any()) else ""
                raise InputError(f"a {name} label is none of the {self.classes} classes.{missing}", where="task")


@dataclass(frozen=True)
class Transferred:
    """accuracy: on the task's test part, a fraction. train_accuracy: on its labelled samples. regression: last loss of pre-training; None: there was none."""

    accuracy: float
    train_accuracy: float
    regression: float | None


def few_labels(labels_N: Tensor, per_class: int, classes: int, seed: int) -> Tensor:
    """[C · per_class] int64: positions of so many random samples of each class, class by class.

    Raises:
        InputError: a class has fewer.
    """
    found = []
    for k in range(classes):
        own = (labels_N == k).nonzero()[:, 0]
        if len(own) < per_class:
            raise InputError(f"class {k} has {len(own)} samples, {per_class} are wanted.", where="labels_per_class", fix="Lower it.")
        found.append(own[torch.randperm(len(own), generator=seeds.generator(seed, "few labels", k))[:per_class]])
    return torch.cat(found)


def pretrain(network: nn.Module, images_MX: Tensor, targets_MD: Tensor, spec: Pretraining, seed: int) -> float:
    """Regress the pairs; the network, whose head gets D fresh outputs, is changed in place. Returns the last step's loss. Source: eq. 1.

    Args:
        images_MX, targets_MD: the pairs, where the network is. seed: of the head and of the order.

    Raises:
        InputError: there are not as many vectors as images, or none; the network has no linear head.
    """
    if targets_MD.ndim != 2 or len(images_MX) != len(targets_MD) or not len(images_MX):
        raise InputError(f"images {list(images_MX.shape)} and vectors {list(targets_MD.shape)} are no pairs.", where="synthetic")
    with_outputs(network, targets_MD.shape[1], seeds.generator(seed, "head"))
    images_MX, targets_MD = images_MX.detach(), targets_MD.detach()
    count = -(-len(images_MX) // spec.batch_size)

    def loss(rows: Tensor, _epoch: int) -> Tensor:
        return F.mse_loss(network(images_MX[rows]), targets_MD[rows])

    return _descend(network, network.parameters(), loss, len(images_MX), spec, spec.epochs * count, seed, anneal=False)


def fine_tune(network: nn.Module, inputs_NX: Tensor, labels_N: Tensor, classes: int, spec: FineTuning, seed: int) -> float:
    """A fresh head of C classes, then all weights on the labels; in place. Returns the last step's loss.

    Raises:
        InputError: the network has no linear head, or images are to be augmented that are none.
    """
    with_outputs(network, classes, seeds.generator(seed, "new head"))

    def loss(rows: Tensor, epoch: int) -> Tensor:
        looks = transform(inputs_NX[rows], rows, spec=spec.augment, seed=seed, epoch=epoch)
        return F.cross_entropy(network(looks), labels_N[rows])

    return _descend(network, network.parameters(), loss, len(inputs_NX), spec, spec.steps, seed, anneal=True)


def probe(network: nn.Module, inputs_NX: Tensor, labels_N: Tensor, classes: int, spec: Probing, seed: int) -> float:
    """A fresh head of C classes on frozen eval-mode features; nothing else of the network changes, its statistics included. Returns the last loss.

    Raises:
        InputError: the network has no linear head.
    """
    with_outputs(network, classes, seeds.generator(seed, "new head"))
    path, place = find_head(network), device_of(network)
    with evaluating(network), torch.no_grad():
        features_NP = torch.cat([head_inputs(network, path, part.to(place)) for part in inputs_NX.split(CHUNK)])
    head = network.get_submodule(path)

    def loss(rows: Tensor, _epoch: int) -> Tensor:
        return F.cross_entropy(head(features_NP[rows]), labels_N[rows])

    return _descend(head, head.parameters(), loss, len(inputs_NX), spec, spec.steps, seed, anneal=False)


def transfer(pairs: tuple[Tensor, Tensor] | None, fresh: Callable[[int], nn.Module], task: Task, spec: TransferSpec, seed: int) -> Transferred:
    """Pre-train a fresh network on pairs and carry it over to a task. The same seed gives the same network, head and order whatever the pairs are.

    Args:
        pairs: images [M, X] and vectors [M, D]; None: no pre-training. fresh: a network from a seed, with any linear head. task: all of its labels are used.

    Raises:
        InputError: pairs, network and task do not fit together.
    """
    network = fresh(seeds.derive(seed, "transfer"))
    regression = None if pairs is None else pretrain(network, *pairs, spec.pretraining, seed)
    if spec.mode == "probe":
        probe(network, task.inputs, task.labels, task.classes, spec.probing, seed)
    else:
        fine_tune(network, task.inputs, task.labels, task.classes, spec.fine_tuning, seed)
    return Transferred(_accuracy(network, task.test_inputs, task.test_labels), _accuracy(network, task.inputs, task.labels), regression)


def held_out_loss(pairs: tuple[Tensor, Tensor], inputs_NX: Tensor, answers_ND: Tensor, networks: Sequence[nn.Module], *, ratio: float = 1e-6) -> float:
    """J on real images that the pairs were not made with, the mean over networks (say, those that `pretrain` made of the pairs). Source: eqs. 2 to 5.

    Args:
        pairs: images [M, X] and vectors [M, D]. inputs_NX: real images. answers_ND: g's answers to them. ratio: of the ridge.
    """
    images_MX, targets_MD = pairs
    found = []
    for network in networks:
        with evaluating(network), torch.no_grad():
            features_NP = torch.cat([frozen_features(network, part) for part in inputs_NX.split(CHUNK)])
            found.append(ridge_loss(frozen_features(network, images_MX), targets_MD, features_NP, answers_ND, ratio=ratio))
    return float(torch.stack(found).mean())


# ---- the loop ----------------------------------------------------------------------------------------------------------------


def _descend(
    module: nn.Module,
    parameters: Iterator[nn.Parameter],
    loss: Callable[[Tensor, int], Tensor],
    samples: int,
    spec: Descent,
    steps: int,
    seed: int,
    *,
    anneal: bool,
) -> float:
    """SGD over shuffled passes in near-equal batches, the module in train mode meanwhile and in eval mode afterwards. Returns the last loss."""
    optimiser = torch.optim.SGD(parameters, lr=spec.lr, momentum=spec.momentum, weight_decay=spec.weight_decay)
    value = torch.zeros(())
    module.train()
    with _seeded(seed):
        for step, (epoch, rows) in zip(range(steps), _batches(samples, spec.batch_size, seed, device_of(module)), strict=False):
            if anneal:
                optimiser.param_groups[0]["lr"] = spec.lr * 0.5 * (1 + math.cos(math.pi * step / steps))
            optimiser.zero_grad(set_to_none=True)
            value = loss(rows, epoch)
            value.backward()
            optimiser.step()
    module.eval()
    return float(value.detach())


def _batches(samples: int, size: int, seed: int, device: torch.device) -> Iterator[tuple[int, Tensor]]:
    """(epoch, positions [B]) without end: each epoch in an order of its own, cut into near-equal parts of at most `size`."""
    parts, everyone, epoch = -(-samples // size), torch.arange(samples, device=device), 0
    while True:
        order = everyone if parts == 1 else torch.randperm(samples, generator=seeds.generator(seed, "order", epoch)).to(device)
        for rows in order.tensor_split(parts):
            yield epoch, rows
        epoch += 1


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """torch's global CPU generator (dropout's) is a function of the seed within, and as it was afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seeds.derive(seed, "descent"))
        yield


def _accuracy(network: nn.Module, inputs_NX: Tensor, labels_N: Tensor) -> float:
    place = device_of(network)
    with evaluating(network), torch.no_grad():
        guesses = torch.cat([network(part.to(place)).argmax(1) for part in inputs_NX.split(CHUNK)])
    return float((guesses.cpu() == labels_N.cpu()).double().mean())
