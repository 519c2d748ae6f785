"""How good a set is to train on: fresh networks, one frozen recipe, the last epoch (our sheet on evaluation, E1 to E6; arXiv 2207.09639, 2505.13300).

N samples to train on, B of them a batch, C classes, K networks. Images are in network units. Nothing is chosen on test data, and no network is used twice.
Deterministic in the seed: shuffles, augmentation and mixing draw from generators of their own; dropout from torch's, which is seeded within and put back.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Literal, Self

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from limbeck import models, seeds
from limbeck.contract import Frozen, OptimiserSpec
from limbeck.data import AugmentSpec
from limbeck.data.augment import beta_quantile, transform
from limbeck.errors import InputError
from limbeck.evaluate import classifier
from limbeck.evaluate.predict import device_of
from limbeck.evaluate.statistics import paired
from limbeck.losses.divergences import soft_cross_entropy
from limbeck.models.outputs import mean_logits
from limbeck.modes import evaluating
from limbeck.optimise import build_optimiser, factor
from limbeck.synthetic.augment import DSASpec, dsa

RATES = (0.001, 0.005, 0.01, 0.05, 0.1)
"""DD-Ranking's grid of learning rates for baselines."""
Soft = Literal["logits", "probabilities"]
TOLERANCE = 1e-3
"""How far rows of probabilities may be from a sum of 1."""


class SetTraining(Frozen):
    """How a fresh network is trained on a set. The defaults are DC-BENCH's recipe without augmentation (arXiv 2207.09639, our E6)."""

    epochs: int = Field(300, ge=1, description="passes over the set")
    steps: int | None = Field(None, ge=1, description="steps, in place of epochs: the same work for every set")
    batch_size: int = Field(256, ge=1, description="the most samples a step; a larger set is shuffled and cut into near-equal batches")
    optimiser: OptimiserSpec = OptimiserSpec(lr=0.01, momentum=0.9, weight_decay=5e-4)
    use_step_size: bool = Field(True, description="take the set's learned step size as SGD's learning rate, where it has one (other optimisers keep theirs)")
    drop_at: float | None = Field(0.5, gt=0, lt=1, description="fraction of the training after which the rate is multiplied by 'drop'; null: never")
    drop: float = Field(0.1, gt=0, le=1)
    fresh_momentum: bool = Field(True, description="start with an empty momentum buffer after the drop, as the released code of MTT and FTD does")
    augment: DSASpec | None = Field(None, description="DSA, one operation a batch")
    transform: AugmentSpec | None = Field(None, description="crop, flip, noise and cutout of each sample, after DSA")
    mixup: float = Field(0.0, ge=0, le=100, description="alpha of lambda ~ Beta(alpha, alpha), one lambda a batch (INFER: 0.8); 0: off")
    temperature: float = Field(1.0, gt=0, le=1000, description="tau of KL(softmax(z/tau) || softmax(f/tau)), without tau squared (INFER: 30)")
    soft: Soft = Field("logits", description="what soft labels are: logits z, or probabilities, which count as z = log p; mixup mixes what is given")
    labels: Literal["static", "dynamic"] = Field("static", description="static: the set's; dynamic: the teachers' mean logits on the batch as it is trained on")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.drop_at is not None and self.optimiser.schedule.name != "constant":
            raise ValueError("a schedule and a drop would both change the rate: set drop_at: null, or leave the schedule constant")
        if self.transform is not None and self.transform.mixes:
            raise ValueError("mixing is asked for by 'mixup' here: leave mixup and cutmix out of 'transform'")
        return self


def check_samples(training: SetTraining, input_shape: Sequence[int]) -> None:
    """Raises InputError: the recipe augments images, and samples of this shape (without the batch axis) are none."""
    if training.augment is not None and len(input_shape) != 3:
        raise InputError(f"samples of shape {list(input_shape)} are no images, which DSA is for.", where="training.augment", fix="Set it to null.")
    spec = training.transform
    if spec is not None and (spec.crop or spec.flip or spec.cutout) and len(input_shape) != 3:
        what = f"samples of shape {list(input_shape)} are no images, which crop, flip and cutout are for."
        raise InputError(what, where="training.transform", fix="Leave them out.")


# ---- one network ---------------------------------------------------------------------------------------------------------


def target_probabilities(targets_BC: Tensor, temperature: float = 1.0, soft: Soft = "logits") -> Tensor:
    """softmax(z/τ) [B, C] of soft labels: z are the logits given, or log p of the probabilities given, so that τ = 1 leaves these as they are."""
    if soft == "logits":
        return torch.softmax(targets_BC / temperature, -1)
    return targets_BC if temperature == 1.0 else torch.softmax(targets_BC.log() / temperature, -1)


def label_loss(logits_BC: Tensor, probabilities_BC: Tensor, temperature: float = 1.0) -> Tensor:
    """KL(p ‖ softmax(f/τ)): sum over classes, mean over the batch, no factor τ² (our sheet `infer`, eq. 9; τ = 1 and one-hot p: cross-entropy)."""
    return soft_cross_entropy(_tempered(logits_BC, temperature), probabilities_BC) + torch.special.xlogy(probabilities_BC, probabilities_BC).sum(-1).mean()


def _tempered(logits_BC: Tensor, temperature: float) -> Tensor:
    return logits_BC if temperature == 1.0 else logits_BC / temperature


def train_on(
    network: nn.Module,
    images_N: Tensor,
    targets: Tensor,
    training: SetTraining,
    *,
    seed: int,
    step_size: float | Tensor | None = None,
    teachers: Sequence[nn.Module] = (),
    rate: float | None = None,
) -> nn.Module:
    """Trains `network` on a set, in place, on the images' device, and returns it in train mode, as its last step left it.

    Args:
        images_N: [N, ...] float32 in network units. targets: [N] int64, or [N, C] (see `SetTraining.soft`). seed: of shuffles, augmentation, mixing, dropout.
        step_size: the set's learned one (None: it has none). rate: a learning rate that goes before it and before the recipe's.
        teachers: give the labels of every batch where `training.labels` is "dynamic"; they are moved to the images' device then, and left alone otherwise.

    Raises:
        InputError: targets do not fit the images or the network, a rate is not positive, dynamic labels have no teacher, or samples are no images, which
            augmentation is for.
    """
    _check(images_N, targets, training, teachers)
    device, count = images_N.device, len(images_N)
    network.to(device).train()
    spec = training.optimiser.model_copy(update={"lr": chosen_rate(training, step_size, rate)})
    batches = math.ceil(count / training.batch_size)
    steps = training.steps or training.epochs * batches
    drop = steps if training.drop_at is None else int(training.drop_at * steps)
    generator = seeds.generator(seed, "set training")
    fixed = training.labels == "static" and not training.mixup  # then the labels of a full batch are the same in every step
    optimiser = build_optimiser((p for p in network.parameters() if p.requires_grad), spec)
    with _dropout(seed, device), ExitStack() as stack:
        for teacher in teachers if training.labels == "dynamic" else ():
            stack.enter_context(evaluating(teacher.to(device)))
        for step, (epoch, ids_B) in zip(range(steps), _batches(count, batches, generator, device), strict=False):
            if step == drop and training.fresh_momentum:
                optimiser = build_optimiser((p for p in network.parameters() if p.requires_grad), spec)
            for group in optimiser.param_groups:
                group["lr"] = spec.lr * factor(spec.schedule, step, steps) * (training.drop if step >= drop else 1.0)
            x_B, y = (images_N, targets) if ids_B is None else (images_N[ids_B], targets[ids_B])
            if training.augment is not None:
                x_B = dsa(x_B, training.augment, generator)
            if training.transform is not None:
                ids = torch.arange(count, device=device) if ids_B is None else ids_B
                x_B = transform(x_B, ids, spec=training.transform, seed=seed, epoch=epoch)
            mixing = _mixing(len(x_B), training.mixup, generator, device) if training.mixup else None
            if mixing is not None:
                x_B = mixing(x_B)
            logits_BC = models.logits_of(network(x_B))
            if step == 0:
                _check_classes(targets, logits_BC.shape[-1])
            with torch.no_grad():
                if not fixed or ids_B is not None or step == 0:
                    p_BC = _probabilities(logits_BC, x_B, y, training, teachers, mixing)
            optimiser.zero_grad(set_to_none=True)
            F.cross_entropy(_tempered(logits_BC, training.temperature), p_BC).backward()  # `label_loss` but for p's entropy, which is a constant
            optimiser.step()
    return network


def accuracy(network: nn.Module, inputs_N: Tensor, labels_N: Tensor, *, batch_size: int = 512) -> float:
    """Fraction of labelled samples that the network gets right, in eval mode, on its device. Raises InputError: there are none, or labels do not fit."""
    place = device_of(network)
    with torch.no_grad(), evaluating(network):
        parts = [models.logits_of(network(part.to(place))).float().cpu() for part in inputs_N.split(batch_size)]
    if not parts:
        raise InputError("there is no sample to test on.")
    return classifier.accuracy(torch.cat(parts), labels_N.cpu())


def chosen_rate(training: SetTraining, step_size: float | Tensor | None = None, rate: float | None = None) -> float:
    """The learning rate: `rate`, else the set's step size (SGD only, where the recipe wants it), else the recipe's. Raises InputError: it is not positive."""
    found = training.optimiser.lr
    if training.use_step_size and step_size is not None and training.optimiser.name == "sgd":
        found = float(step_size)
    if rate is not None:
        found = rate
    if not (math.isfinite(found) and found > 0):
        raise InputError(f"the learning rate is {found}.", where="step_size" if rate is None else "rate", fix="A step size that was learned must stay above 0.")
    return found


# ---- K networks ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Evaluation:
    """Test accuracies (fractions) of K fresh networks at their last epoch.

    std: of the sample (K − 1), None for one network. interval: Student's 95 % of the mean, (None, None) for one. seeds: of the networks. rate: where training
    began. seconds: all K trainings and tests. peak_bytes: the most that the accelerator held, None on the CPU.
    """

    accuracies: tuple[float, ...]
    mean: float
    std: float | None
    interval: tuple[float | None, float | None]
    seeds: tuple[int, ...]
    rate: float
    seconds: float
    peak_bytes: int | None = None


@dataclass(frozen=True)
class Evaluator:
    """K fresh networks, trained by one recipe and tested once each (E1). The k-th network of every arm starts from the same weights.

    networks: seed → a new network, on any device. test_inputs, test_labels: [N, ...] in network units, [N] int64. count: K. seed: of everything drawn.

    Raises:
        InputError: `count` is below 1.
    """

    networks: Callable[[int], nn.Module]
    training: SetTraining
    test_inputs: Tensor
    test_labels: Tensor
    count: int = 5
    seed: int = 0

    def __post_init__(self) -> None:
        if self.count < 1:
            raise InputError(f"{self.count} networks cannot be trained.", where="networks", fix="Use 5 or more.")

    def evaluate(
        self, images: Tensor, targets: Tensor, step_size: float | Tensor | None = None, teachers: Sequence[nn.Module] = (), rate: float | None = None
    ) -> Evaluation:
        """Trains the K networks on a set and tests them. Arguments and errors as in `train_on`."""
        cuda = images.device.type == "cuda"
        if cuda:
            torch.cuda.reset_peak_memory_stats(images.device)
        began = time.perf_counter()
        numbers = tuple(seeds.derive(self.seed, "network", k) % 2**31 for k in range(self.count))
        found = tuple(self._trained(number, images, targets, step_size, teachers, rate) for number in numbers)
        seconds = time.perf_counter() - began
        interval = paired(found, [0.0] * len(found))
        return Evaluation(
            found, statistics.fmean(found), statistics.stdev(found) if len(found) > 1 else None, (interval.low, interval.high), numbers,
            chosen_rate(self.training, step_size, rate), seconds, torch.cuda.max_memory_allocated(images.device) if cuda else None,
        )  # fmt: skip

    def _trained(
        self, number: int, images: Tensor, targets: Tensor, step_size: float | Tensor | None, teachers: Sequence[nn.Module], rate: float | None
    ) -> float:
        network = train_on(self.networks(number), images, targets, self.training, seed=number, step_size=step_size, teachers=teachers, rate=rate)
        return accuracy(network, self.test_inputs, self.test_labels)

    def rate_accuracies(
        self,
        images: Tensor,
        targets: Tensor,
        validation_inputs: Tensor,
        validation_labels: Tensor,
        rates: Sequence[float] = RATES,
        teachers: Sequence[nn.Module] = (),
        *,
        count: int = 2,
    ) -> dict[float, float]:
        """Learning rate → mean accuracy on validation data of `count` networks, other ones than `evaluate` trains; the same for every rate.

        validation_inputs, validation_labels: cut from the real TRAINING set. Errors as in `train_on`; InputError: there is no rate.
        """
        if not rates or count < 1:
            raise InputError(f"nothing can be found out with {len(rates)} rates and {count} networks.", where="rates")
        numbers = [seeds.derive(self.seed, "search", k) % 2**31 for k in range(count)]

        def one(rate: float, number: int) -> float:
            network = train_on(self.networks(number), images, targets, self.training, seed=number, teachers=teachers, rate=rate)
            return accuracy(network, validation_inputs, validation_labels)

        return {rate: statistics.fmean(one(rate, number) for number in numbers) for rate in rates}

    def search_rate(
        self,
        images: Tensor,
        targets: Tensor,
        validation_inputs: Tensor,
        validation_labels: Tensor,
        rates: Sequence[float] = RATES,
        teachers: Sequence[nn.Module] = (),
        *,
        count: int = 2,
    ) -> float:
        """The rate that is best on validation data (the smallest of equals): so that baselines without a learned rate are not handicapped (E4).

        Arguments and errors as in `rate_accuracies`.
        """
        found = self.rate_accuracies(images, targets, validation_inputs, validation_labels, rates, teachers, count=count)
        return min(found, key=lambda rate: (-found[rate], rate))


# ---- parts of the loop ---------------------------------------------------------------------------------------------------


def _check(images_N: Tensor, targets: Tensor, training: SetTraining, teachers: Sequence[nn.Module]) -> None:
    if not images_N.is_floating_point() or len(images_N) == 0 or len(targets) != len(images_N):
        raise InputError(f"there are {len(images_N)} images ({images_N.dtype}) and {len(targets)} targets.", where="targets")
    check_samples(training, images_N.shape[1:])
    if targets.device != images_N.device:
        raise InputError(f"images are on {images_N.device}, targets on {targets.device}.", where="targets")
    if training.labels == "dynamic" and not teachers:
        raise InputError("dynamic labels are the teachers' answers, and there is no teacher.", where="training.labels", fix="Use 'static', or give teachers.")
    if not targets.is_floating_point():
        if targets.dim() != 1 or int(targets.min()) < 0:
            raise InputError(f"hard labels are [N] classes from 0, these have the shape {list(targets.shape)}.", where="targets")
    elif targets.dim() != 2:
        raise InputError(f"soft labels are [N, C], these have the shape {list(targets.shape)}.", where="targets")
    elif training.soft == "probabilities" and not (bool((targets >= 0).all()) and bool(((targets.sum(1) - 1).abs() <= TOLERANCE).all())):
        raise InputError("these soft labels are no probabilities.", where="training.soft", fix="Set it to 'logits'.")


def _check_classes(targets: Tensor, classes: int) -> None:
    most = targets.shape[1] if targets.is_floating_point() else int(targets.max()) + 1
    if most > classes or (targets.is_floating_point() and most < classes):
        raise InputError(f"the network tells {classes} classes apart, the labels {most}.", where="targets")


def _batches(count: int, batches: int, generator: torch.Generator, device: torch.device) -> Iterator[tuple[int, Tensor | None]]:
    """Epoch and places of each step, for ever; None: all, in order."""
    epoch = 0
    while True:
        if batches == 1:
            yield epoch, None
        else:
            for ids_B in torch.randperm(count, generator=generator).to(device).tensor_split(batches):
                yield epoch, ids_B
        epoch += 1


def _mixing(count: int, alpha: float, generator: torch.Generator, device: torch.device) -> Callable[[Tensor], Tensor]:
    """v ↦ λ v + (1 − λ) v_π, with one λ ~ Beta(α, α) and one permutation π for inputs and labels (our sheet `infer`, eq. 8)."""
    share = float(beta_quantile(torch.rand(1, generator=generator, dtype=torch.float64), alpha))
    order_B = torch.randperm(count, generator=generator).to(device)
    return lambda values: share * values + (1 - share) * values[order_B]


def _probabilities(
    logits_BC: Tensor, x_B: Tensor, y: Tensor, training: SetTraining, teachers: Sequence[nn.Module], mixing: Callable[[Tensor], Tensor] | None
) -> Tensor:
    """What the network is trained towards, [B, C]."""
    if training.labels == "dynamic":
        return target_probabilities(mean_logits(teachers, x_B), training.temperature)
    hard = not y.is_floating_point()
    y_BC = F.one_hot(y, logits_BC.shape[-1]).to(logits_BC.dtype) if hard else y
    return target_probabilities(y_BC if mixing is None else mixing(y_BC), training.temperature, "probabilities" if hard else training.soft)


@contextmanager
def _dropout(seed: int, device: torch.device) -> Iterator[None]:
    """torch's own generators, which dropout draws from, seeded within and put back after."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.default_generator.manual_seed(seeds.derive(seed, "dropout"))
        if device.type == "cuda":
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seeds.derive(seed, "dropout"))
        yield
