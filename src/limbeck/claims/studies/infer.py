"""What INFER (2408.06927) is compared with in its claim: real images with the same soft labels, SRe2L's images, and noise in place of compensators."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from limbeck import seeds
from limbeck.contract import Batch, Clock, OptimiserSpec, Paper, Phase, Player, Update, Workbench
from limbeck.errors import InputError
from limbeck.methods.datasets._base import Learned
from limbeck.methods.datasets.infer import ADAM, INFER, InferConfig
from limbeck.models.outputs import mean_logits
from limbeck.synthetic.synthetic_set import SyntheticSet


class NoiseCompensators(INFER):
    """INFER, but every compensator is, once learned, replaced by Gaussian noise of its own norm; then labelled as INFER labels."""

    def leave(self, phase: Phase, clock: Clock, bench: Workbench) -> None:
        """Noise first, then the labels."""
        with torch.no_grad():
            self.synthetic.patterns.copy_(noise_of_norm(self.synthetic.patterns, seeds.generator(self.seed, "noise compensators")))
        super().leave(phase, clock, bench)


class SoftRealConfig(InferConfig):
    """Knobs of `SoftReal`: those of INFER that say how many images there are, and:"""

    extra_images: int = Field(0, ge=0, le=100_000, description="images on top, one each of as many classes, spread evenly: to spend exactly INFER's bytes")


class SoftReal(INFER):
    """Random real images with the teachers' mean logits as labels: nothing is learned. `images_per_class` is what there are."""

    Config: ClassVar[type[InferConfig]] = SoftRealConfig
    config: SoftRealConfig

    def setup(self) -> None:
        """Images and labels. Raises InputError: a class has too few images, or there are more extra ones than classes."""
        C, per_class, extra = int(self.num_classes or 0), self.config.images_per_class, self.config.extra_images
        if extra > C:
            raise InputError(f"{extra} extra images for {C} classes.", where="method.extra_images", fix="Raise images_per_class instead.")
        self.groups = per_class
        chosen_CK = self.chosen(per_class + (extra > 0)).view(C, -1)
        spread = torch.arange(extra) * C // max(extra, 1)
        images = self.prepared(torch.cat((chosen_CK[:, :per_class].T.flatten(), chosen_CK[spread, -1])))
        self.check_teachers(images[:C])
        with torch.no_grad():
            self.synthetic = SyntheticSet.soft(images, mean_logits(self.members, images), data=self.data)

    def phases(self) -> list[Phase]:
        """None: there is nothing to train."""
        return []


class SRe2LConfig(InferConfig):
    """Knobs of `SRe2L`: those of INFER, `optimiser` being the images', and:"""

    start: Literal["real", "noise"] = Field("noise", description="where images start: normal noise (the paper's), or random real images")
    optimiser: OptimiserSpec | None = Field(ADAM.model_copy(update={"lr": 0.1}), description="of the images (CIFAR: Adam, 0.1, betas 0.5 and 0.9)")


class SRe2L(INFER):
    """SRe2L's recovery (arXiv 2306.13092): every image is a variable of its own, under INFER's objective (2); static soft labels as INFER's.

    Group k, one image of every class, is matched to teacher k mod M (SRe2L has one teacher). Images are kept within the pixels' range after every step, as
    its code does. SRe2L itself relabels in every epoch; with static labels it is the baseline of INFER's table.
    """

    Config: ClassVar[type[InferConfig]] = SRe2LConfig
    paper: ClassVar[Paper] = Paper(
        "Squeeze, Recover and Relabel: Dataset Condensation at ImageNet Scale From A New Perspective", "2306.13092", "NeurIPS", 2023, "VILA-Lab/SRe2L"
    )  # fmt: skip
    config: SRe2LConfig

    def setup(self) -> None:
        """The images at their start. Raises InputError: the data or the teachers do not do."""
        C, self.groups = int(self.num_classes or 0), self.config.images_per_class
        real = self.prepared(self.chosen(self.groups).view(C, -1).T.flatten())
        self.check_teachers(real[:C])
        images = real if self.config.start == "real" else torch.randn(real.shape, generator=seeds.generator(self.seed, "start"))
        self.synthetic = SyntheticSet.soft(images, torch.zeros(len(images), C), data=self.data)

    def players(self) -> Mapping[str, Player]:
        """The images."""
        return {"images": Player(Learned(self.synthetic.images), self.config.optimiser)}

    def updates(self, batch: Batch, clock: Clock) -> Iterator[Update]:
        """The sum over the groups of their objectives: one pass a teacher."""
        x_KC, terms = self.synthetic.images.unflatten(0, (self.groups, -1)), []
        for m in range(len(self.members)):
            if groups := range(m, self.groups, len(self.members)):
                terms.append(torch.stack(self.objective([x_KC[k] for k in groups], groups, m, clock)))
        cross_entropy, statistics = torch.cat(terms, 1).sum(1).unbind()
        loss = cross_entropy + self.config.statistics_weight * statistics
        yield Update("images", loss, {"cross_entropy": cross_entropy / self.groups, "statistics": statistics / self.groups})

    def after_step(self, player: str, clock: Clock) -> None:
        """Pixels stay pixels."""
        self.synthetic.images.copy_(self.synthetic.clipped(self.synthetic.images))


def noise_of_norm(patterns_U: Tensor, generator: torch.Generator) -> Tensor:
    """Gaussian noise [U, ...] in which every pattern has the norm of the one it stands for. generator: on the CPU."""
    noise = torch.randn(patterns_U.shape, generator=generator).to(patterns_U)
    scale_U = patterns_U.flatten(1).norm(dim=1) / noise.flatten(1).norm(dim=1)
    return noise * scale_U.view(-1, *[1] * (noise.dim() - 1))
