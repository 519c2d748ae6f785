"""INFER: data-set distillation with inter-class feature compensators (arXiv 2408.06927).

A few real images of every class stay as they are. What is learned are patterns of an image's size, one for each group of images and each teacher, which are
added to ALL classes alike and give every image M further versions; static soft labels of the teachers come with all of them.

Legend: C classes, K groups, M teachers f_m (eval mode, frozen), x_k [C, c, h, w] one real image of every class, u_km [c, h, w] a compensator.
    s = x_k + u_km                                                                (1)  u starts at 0; one batch holds all C classes
    L(u_km) = CE(f_m(roll(s)), 0 … C−1) + r_bn Σ_l a_l R_l                        (2)  mean over C; a_1 = 10, else 1
    R_l = ‖var_l − V_l‖ + ‖mean_l − M_l‖                                          (3)  of what comes into batch norm l, see `synthetic.batch_statistics`
    roll: circular, by random integers of 0 … J on each axis, one draw a compensator and step (4)
    the set: {x_k} ∪ {x_k + u_km}, clipped to pixels                              (5)  K = ⌊ipc/(1 + M/C)⌋ (6)
    z̄ = (1/M) Σ_m f_m(s), the mean of LOGITS, of every image of the set           (7)
A user trains on it with mixup of images and logits at a high temperature, (8) and (9): `evaluate.synthetic_sets`. Equation numbers are those of our sheet.

The code's (the paper's text could not be had): all of the above; the last iterate is kept, and u itself is never clipped, only the images it makes.
Ours: images and compensators are kept apart, not as K C (M + 1) JPEG files; layers that never run are not tapped; the gradient of (3) at its kink is 0;
users' crops and flips are not switched on unasked, for what does no harm depends on the data.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from limbeck import seeds
from limbeck.contract import Batch, Clock, Frozen, OptimiserSpec, Paper, Phase, Player, ScheduleSpec, Update, Workbench
from limbeck.errors import InputError
from limbeck.evaluate.predict import device_of
from limbeck.evaluate.synthetic_sets import SetTraining
from limbeck.methods.datasets._base import DatasetMethod, Learned
from limbeck.models.outputs import logits_of, mean_logits
from limbeck.synthetic.batch_statistics import matching_loss, tapped
from limbeck.synthetic.budget import compensated_groups, compensated_images_per_class
from limbeck.synthetic.hypergradient import with_gradients
from limbeck.synthetic.synthetic_set import SyntheticSet

FEW = 50
"""With fewer classes than this a run says that the method is not for them (ours; the results on 10 classes are those of random images)."""
ADAM = OptimiserSpec(name="adam", lr=0.25, betas=(0.5, 0.9), eps=1e-8, schedule=ScheduleSpec(name="cosine"))
ADAMW = OptimiserSpec(name="adamw", lr=1e-3, weight_decay=0.01, schedule=ScheduleSpec(name="cosine"))


class InferConfig(Frozen):
    """Knobs of `INFER`. The compensators' iterations are `train.steps` (CIFAR: 1000, ImageNet: 2000)."""

    images_per_class: int = Field(10, ge=1, le=100_000, description="ipc, the budget: K real images a class and K M compensators are no more than this")
    statistics_weight: float = Field(1.0, ge=0, le=1e4, description="r_bn (CIFAR: 1, ImageNet: 0.01)")
    first_layer: float = Field(10.0, ge=0, le=1e4, description="a_1, the weight of the first batch norm's statistics")
    shift: int = Field(4, ge=0, le=4096, description="J, the most pixels that the batch is rolled by (CIFAR, 32 pixels: 4; ImageNet: 32)")
    optimiser: OptimiserSpec | None = Field(ADAM, description="of the compensators (code: Adam, 0.25, betas 0.5 and 0.9, cosine to 0); null: the recipe's")
    groups_at_once: int | None = Field(None, ge=1, description="groups in one pass through a teacher: memory, not mathematics; null: all")


class INFER(DatasetMethod):
    """Few real images, patterns that all classes share, and static soft labels, out of a pool of networks with batch norm."""

    Config = InferConfig
    paper: ClassVar[Paper] = Paper(
        title="Breaking Class Barriers: Efficient Dataset Distillation via Inter-Class Feature Compensator",
        arxiv="2408.06927",
        venue="ICLR",
        year=2025,
        official_code="zhangxin-xd/UFC",
        reconstructed="The paper's text was not at hand: the equations are those of its abstract and of the authors' code.",
    )
    config: InferConfig
    training: ClassVar[SetTraining] = SetTraining(epochs=80, batch_size=64, optimiser=ADAMW, drop_at=None, mixup=0.8, temperature=30.0)
    """How a user trains on the set, (8) and (9), unless the recipe says otherwise: 400 epochs over M + 1, for the code's four teachers on CIFAR."""

    def setup(self) -> None:
        """The real images, compensators of 0. Raises InputError: the budget, the data or the teachers do not do."""
        C, M = int(self.num_classes or 0), len(self.members)
        try:
            self.groups = compensated_groups(self.config.images_per_class, M, C)
        except InputError as error:
            raise InputError(error.what, where="method.images_per_class", fix=error.fix) from error
        chosen_KC = self.chosen(self.groups).view(C, self.groups).T  # class by class → group by group
        images = self.prepared(chosen_KC.flatten())
        if images.dim() != 4 or len(images) != self.groups * C:
            raise InputError(f"{C} classes of images [c, h, w] are needed, there are {len(images) // self.groups} of {list(images.shape[1:])}.", where="data")
        self.check_teachers(images[:C])
        place = torch.arange(self.groups * M * C).view(self.groups, M, C)
        image, pattern = place // (M * C) * C + place % C, place // C  # of k, m, c: k C + c and k M + m
        labels, u = torch.arange(C).repeat(self.groups), torch.zeros(self.groups * M, *images.shape[1:])
        hard = SyntheticSet.compensated(images, labels, C, u, image.flatten(), pattern.flatten(), data=self.data)
        self.synthetic = hard.relabelled(torch.zeros(len(hard), C))

    @property
    def members(self) -> Sequence[nn.Module]:
        """f_1 … f_M. Raises InputError: the teacher is no network."""
        members = getattr(self.teacher, "members", None)
        if not members:
            what = f"compensators take gradients through the teachers, and {type(self.teacher).__name__} is no network of this process."
            raise InputError(what, where="teacher", fix="Give one network with batch norm, or a list of them.")
        return list(members)

    def check_teachers(self, images: Tensor) -> None:
        """Raise InputError where a teacher has no batch norm that runs, or other classes. images: [C, c, h, w]."""
        for number, member in enumerate(self.members):
            with torch.no_grad(), tapped(member) as fired:
                logits = logits_of(member(images.to(device_of(member))))
            if not fired:
                what = f"teacher {number} runs no batch norm with running statistics."
                raise InputError(what, where="teacher", fix="Give networks with batch norm (convnet with norm: batch, resnet20).")
            if logits.shape != (len(images), len(images)):
                raise InputError(f"teacher {number} has {logits.shape[-1]} classes, the data {len(images)}.", where="teacher")

    def players(self) -> Mapping[str, Player]:
        """The compensators [K M, c, h, w]: Adam works on every number alone, so one optimiser is as good as K M."""
        return {"compensators": Player(Learned(self.synthetic.patterns), self.config.optimiser)}

    def phases(self) -> list[Phase]:
        """One, without further data."""
        return [Phase("compensate", data_free=True)]

    # ---- one step -------------------------------------------------------------------------------------------------

    def shifts(self, k: int, m: int, clock: Clock) -> tuple[int, int]:
        """Rows and columns in 0 … J that group k is rolled by before teacher m (4); the same on every process, and known without asking the device."""
        down, right = (seeds.derive(clock.seed, clock.phase_index, clock.step, "shift", k, m, axis) % (self.config.shift + 1) for axis in ("down", "right"))
        return down, right

    def objective(self, images_KC: Sequence[Tensor], groups: Sequence[int], m: int, clock: Clock) -> tuple[Tensor, Tensor]:
        """Cross-entropy and Σ_l a_l R_l of some groups for teacher m, [K] each (2); images_KC: K = len(groups) batches [C, c, h, w], not rolled yet."""
        s = torch.cat([images.roll(self.shifts(k, m, clock), (2, 3)) for k, images in zip(groups, images_KC, strict=True)])
        with tapped(self.members[m], len(groups)) as fired:
            logits = logits_of(self.members[m](s))
        classes = len(s) // len(groups)
        labels = torch.arange(classes, device=logits.device).repeat(len(groups))
        cross_entropy_K = F.cross_entropy(logits.float(), labels, reduction="none").view(-1, classes).mean(1)
        return cross_entropy_K, matching_loss(fired, self.config.first_layer)

    def updates(self, batch: Batch, clock: Clock) -> Iterator[Update]:
        """The sum of the K M objectives, none of which knows another's compensator: a pass a teacher (and portion of groups), its graph freed at once."""
        u, M, portion = self.synthetic.patterns, len(self.members), self.config.groups_at_once or self.groups
        x_KC = self.synthetic.images.detach().unflatten(0, (self.groups, -1))
        gradient, sums = torch.zeros_like(u), torch.zeros(2, device=u.device)
        for m in range(M):
            for first in range(0, self.groups, portion):
                groups = range(first, min(first + portion, self.groups))
                cross_entropy_K, statistics_K = self.objective([x_KC[k] + u[k * M + m] for k in groups], groups, m, clock)
                sums += torch.stack([cross_entropy_K.detach().sum(), statistics_K.detach().sum()])
                gradient += torch.autograd.grad((cross_entropy_K + self.config.statistics_weight * statistics_K).sum(), u)[0]
        cross_entropy, statistics = (sums / len(u)).unbind()
        loss = cross_entropy + self.config.statistics_weight * statistics
        yield Update("compensators", with_gradients(loss, [u], [gradient]), {"cross_entropy": cross_entropy, "statistics": statistics})

    def leave(self, phase: Phase, clock: Clock, bench: Workbench) -> None:
        """The static labels (7), of the images as a user gets them: clipped, not augmented."""
        with torch.no_grad():
            samples, targets = self.synthetic.expanded()
            targets.copy_(torch.cat([mean_logits(self.members, x) for x in samples.split(int(self.num_classes or 0))]))

    # ---- what is told and kept ------------------------------------------------------------------------------------

    def notice(self, row: Mapping[str, float]) -> Sequence[str]:
        """Says where there are so few classes that batch statistics are noise and sharing saves nothing."""
        C = int(self.num_classes or 0)
        return [f"with {C} classes a compensator sees the statistics of {C} images only; the method is for 100 and more."] if C < FEW else []

    def facts(self) -> dict[str, Any]:
        """Groups, teachers, what the set costs in images a class and how many samples it makes, the compensators' mean norm in network units."""
        K, M, C = self.groups, len(self.members), int(self.num_classes or 0)
        norm = float(self.synthetic.patterns.detach().flatten(1).norm(dim=1).mean())
        paid = compensated_images_per_class(K, M, C)
        return super().facts() | {"groups": K, "teachers": M, "paid_images_per_class": paid, "samples_per_class": K * (M + 1), "compensator_norm": norm}

    def state_dict(self) -> dict[str, Any]:
        """The labels, which a run that is stopped after the last step has already."""
        return {"targets": self.synthetic.targets.detach().clone()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put them back."""
        with torch.no_grad():
            self.synthetic.targets.copy_(state["targets"])
