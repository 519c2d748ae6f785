"""Matching training trajectories (MTT, arXiv 2203.11932): what FTD and AST share.

A student starts at an expert's weights after s epochs, takes T steps on the synthetic images, and should land on the expert's weights after s + E epochs
(equations 1 to 4 of our sheet `ftd`). The images and the step size take the gradient of the normalised distance through all T steps.

Legend: M images, C classes, T inner steps, P weights, B images an inner step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from limbeck import seeds
from limbeck.contract import Batch, Clock, OptimiserSpec, Phase, Player, Update
from limbeck.errors import InputError
from limbeck.methods.datasets._base import DatasetConfig, DatasetMethod, Learned
from limbeck.synthetic.augment import Drawn, DSASpec, apply, draw
from limbeck.synthetic.flat import FlatNetwork
from limbeck.synthetic.hypergradient import Target, TrajectoryGradient, trajectory_gradient, with_gradients
from limbeck.synthetic.synthetic_set import SyntheticSet

SMALLEST_STEP = 1e-6
"""The learned step size is kept above this (ours: the official code lets it become negative)."""
GROWN = 100.0
"""A step size this many times what it was, or as small a part of it, is told (ours)."""


class MatchingConfig(DatasetConfig):
    """Knobs of trajectory matching."""

    steps: int = Field(30, ge=1, le=10_000, description="T, inner steps (CIFAR-10: 50, 30, 30 for 1, 10, 50 images a class)")
    expert_epochs: int = Field(2, ge=1, le=1000, description="E, epochs of the expert that the T steps should cover")
    latest_start: int = Field(20, ge=1, le=10_000, description="s is drawn from 0 … this − 1 (CIFAR-10: 2, 20, 40)")
    inner_batch: int | None = Field(None, ge=1, description="images an inner step; null: all")
    momentum: float = Field(0.0, ge=0, lt=1, description="μ of the inner steps (MTT, FTD: none)")
    step_size: float = Field(0.01, gt=0, le=100, description="η at the start")
    step_size_optimiser: OptimiserSpec = Field(OptimiserSpec(name="sgd", lr=1e-5, momentum=0.5), description="of η (CIFAR-10: lr 1e-7, 1e-5, 1e-5)")
    augment: DSASpec | None = Field(DSASpec(), description="differentiable augmentation in the inner steps; null: none")
    gradient: Literal["adjoint", "unroll", "checkpoint", "tesla"] = Field("adjoint", description="how the hypergradient is computed; tesla is not exact")
    tesla: Literal["formula", "released"] = Field("formula", description="'tesla': the paper's image gradient, or the released code's (half of it)")

    @model_validator(mode="after")
    def _gradient_fits(self) -> Self:
        if self.gradient == "tesla" and self.momentum:
            raise ValueError("TESLA's formula has no momentum: set momentum: 0, or gradient: adjoint.")
        if self.gradient != "tesla" and self.tesla == "released":
            raise ValueError("'released' halves TESLA's image gradient: set gradient: tesla.")
        return self


class TrajectoryMatching(DatasetMethod):
    """Base of methods that match expert trajectories. The teacher is `limbeck.synthetic.trajectories.Trajectories`."""

    Config = MatchingConfig
    needs_experts = True

    def setup(self) -> None:
        """The flat network, images and step size. Raises InputError: the experts do not reach s + E, or are of another network; the data are no images."""
        config, experts = self.config, self.experts
        self.flat = FlatNetwork(self.student)
        if experts.size != self.flat.size:
            what = f"the experts have {experts.size:,} weights, the student {self.flat.size:,}."
            raise InputError(what, where="student.model", fix="Train the experts on this network.")
        if config.latest_start - 1 + config.expert_epochs > experts.epochs:
            what = f"an expert that starts after {config.latest_start - 1} epochs and goes on for {config.expert_epochs} needs more than {experts.epochs}."
            raise InputError(what, where="method.latest_start", fix="Lower it, or train the experts longer.")
        images, labels = self.first_images()
        if config.inner_batch is not None and config.inner_batch > len(images):
            raise InputError(f"an inner batch of {config.inner_batch} of {len(images)} images.", where="method.inner_batch", fix="Lower it.")
        if config.augment is not None and images.dim() != 4:
            what = f"samples of shape {list(images.shape[1:])} are no images, which the augmentation is for."
            raise InputError(what, where="method.augment", fix="Set it to null.")
        try:
            self.flat.check(images[:2].to(next(self.student.parameters())))
        except InputError as error:
            raise InputError(error.what, where="student.model", fix=error.fix) from error
        self.synthetic = SyntheticSet.hard(images, labels, int(self.num_classes or 0), step_size=config.step_size, data=self.data)
        self.images, self.step_size = Learned(self.synthetic.images), Learned(self.synthetic.step_size)

    @property
    def experts(self) -> Any:
        """The expert trajectories. Raises InputError: the teacher is something else."""
        teacher: Any = self.teacher
        if not hasattr(teacher, "weights") or not hasattr(teacher, "epochs"):
            raise InputError(f"the teacher is {type(teacher).__name__}, no expert trajectories.", where="teacher", fix="Give 'teacher' a section 'experts'.")
        return teacher

    def players(self) -> dict[str, Player]:
        """The images (the recipe's optimiser; MTT: SGD, momentum 0.5) and the step size."""
        return {"images": Player(self.images, ema=self.image_average()), "step_size": Player(self.step_size, self.config.step_size_optimiser)}

    def image_average(self) -> float | None:
        """Decay of the images' moving average, which is what comes out; None: the images themselves do."""
        return None

    def frozen(self) -> Sequence[nn.Module]:
        """The network, for its structure."""
        return [self.student, self.synthetic]

    def phases(self) -> list[Phase]:
        """One, without real data."""
        return [Phase("match", data_free=True)]

    # ---- one outer step -------------------------------------------------------------------------------------------

    def segment(self, clock: Clock) -> tuple[int, int]:
        """Which expert (all in a shuffled order, then again) and the epoch s that it starts from: functions of the seed and the step."""
        lap, place = divmod(clock.step, self.experts.count)
        order = torch.randperm(self.experts.count, generator=seeds.generator(self.seed, "experts", lap))
        start = torch.randint(self.config.latest_start, (1,), generator=seeds.generator(self.seed, "start", clock.step))
        return int(order[place]), int(start)

    def batches(self, clock: Clock) -> list[Tensor | None]:
        """[B] positions of each inner step's images: chunks of a shuffled order, which is shuffled again when it is used up; None: all."""
        size, count, device = self.config.inner_batch, len(self.synthetic.images), self.synthetic.images.device
        if size is None or size == count:
            return [None] * self.config.steps
        found: list[Tensor | None] = []
        generator = clock.generator("batches")
        while len(found) < self.config.steps:
            found += torch.randperm(count, generator=generator, device=device).split(size)
        return found[: self.config.steps]

    def augmentations(self, batches: Sequence[Tensor | None], clock: Clock) -> list[Drawn | None]:
        """One drawn augmentation an inner step, to be replayed; drawn on the host, which on an accelerator would wait for every operation's name."""
        spec = self.config.augment
        if spec is None:
            return [None] * len(batches)
        images, (height, width) = self.synthetic.images, self.synthetic.images.shape[-2:]
        generator = seeds.generator(clock.seed, clock.phase_index, clock.step, clock.rank, clock.micro, "augment")
        return [draw(spec, len(images) if b is None else len(b), height, width, generator).to(images.device) for b in batches]

    def step_loss(self, clock: Clock, scale: float = 1.0) -> Callable[[Tensor, Sequence[Tensor], int], Tensor]:
        """(θ [P], (images,), t) → CE of the t-th inner step's batch, augmented as drawn, times `scale`; a function of t alone."""
        batches = self.batches(clock)
        drawn, targets = self.augmentations(batches, clock), self.synthetic.targets

        def loss(theta_P: Tensor, variables: Sequence[Tensor], t: int) -> Tensor:
            which, looks = batches[t], drawn[t]
            x, y = (variables[0], targets) if which is None else (variables[0][which], targets[which])
            cross_entropy = F.cross_entropy(self.flat(theta_P, x if looks is None else apply(x, looks)), y)
            return cross_entropy if scale == 1 else scale * cross_entropy

        return loss

    def start_weights(self, expert: int, epoch: int, clock: Clock) -> Tensor:
        """θ_0 [P]: the expert's weights after `epoch` epochs."""
        return self.experts.weights(expert, epoch).to(clock.device)

    def targets(self, expert: int, epoch: int, clock: Clock) -> list[Target]:
        """Where the steps should land: the expert's weights E epochs later, after T steps."""
        return [Target(self.config.steps, self.experts.weights(expert, epoch + self.config.expert_epochs).to(clock.device))]

    def loss_scale(self, epoch: int) -> float:
        """What the inner loss is multiplied by, for a segment that starts after `epoch` epochs."""
        return 1.0

    def matched(self, clock: Clock) -> TrajectoryGradient:
        """The distance and its gradients at this step."""
        config, (expert, epoch) = self.config, self.segment(clock)
        return trajectory_gradient(
            self.step_loss(clock, self.loss_scale(epoch)), [self.synthetic.images], self.synthetic.step_size, self.start_weights(expert, epoch, clock),
            self.targets(expert, epoch, clock), config.steps, momentum=config.momentum, mode=config.gradient, tesla=config.tesla,
        )  # fmt: skip

    def updates(self, batch: Batch, clock: Clock) -> Iterator[Update]:
        """The images' step, then the step size's: both gradients are taken before either is stepped."""
        found = self.matched(clock)
        metrics = {"matching": found.losses_J[-1], "step_size": self.synthetic.step_size.detach()}
        yield Update("images", with_gradients(found.loss, [self.synthetic.images], found.variables), metrics)
        yield Update("step_size", with_gradients(found.loss, [self.synthetic.step_size], [found.step_size]))

    def after_step(self, player: str, clock: Clock) -> None:
        """η stays positive."""
        if player == "step_size":
            self.synthetic.step_size.clamp_(min=SMALLEST_STEP)

    def notice(self, row: Mapping[str, float]) -> Sequence[str]:
        """A student that, in the second half, ends further from its target than it started; a step size that runs away."""
        found = []
        if row.get("images/matching", 0.0) > 1 and row.get("progress", 0.0) >= 0.5:
            found.append("the student ends further from the expert than it starts (a matching loss above 1): lower the images' or the step size's rate.")
        ratio = row.get("images/step_size", self.config.step_size) / self.config.step_size
        if not 1 / GROWN <= ratio <= GROWN:
            found.append(f"the step size is {ratio:.1g} times what it was: lower step_size_optimiser.lr.")
        return found

    def facts(self) -> dict[str, Any]:
        """The learned step size beside what every set tells."""
        return super().facts() | {"step_size": float(self.synthetic.step_size.detach())}
