"""Barlow Twins: self-supervised learning via redundancy reduction (Zbontar et al., arXiv 2103.03230). It trains the target model g of KRR-ST.

Two random views of each image; an encoder, and a projector that is thrown away afterwards. Over a batch every entry of the projections is normalised, and
their cross-correlation should be the identity: alike in both views (invariance), different from all other entries (no redundancy).

Legend: B images, D entries of the encoder's output, E of a projection z; C the cross-correlation [E, E].
    C_ij = Σ_b z¹_bi z²_bj / B,  z normalised over the batch (mean 0, variance 1)
    L = Σ_i (1 − C_ii)² + λ Σ_{i≠j} C_ij²

The paper's: the loss, λ = 5e-3, a projector of linear layers with batch norm and ReLU between them. Ours: views of crop, flip and cutout (the paper's colour
jitter, blur and solarisation are for large colour images), what is outside an image is black, small widths, the head as the identity.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import Annotated, Any, ClassVar, Literal, cast

import torch
from pydantic import Field
from torch import Tensor, nn

from limbeck import seeds
from limbeck.contract import Batch, Clock, Frozen, Method, Paper, Player, Update
from limbeck.data.augment import AugmentSpec, transform
from limbeck.errors import InputError
from limbeck.models.growing import find_head
from limbeck.modes import evaluating

SMALLEST_VARIANCE = 1e-5
"""Added to the variance of each entry of a projection, as batch norm does."""


def cross_correlation(first_BE: Tensor, second_BE: Tensor) -> Tensor:
    """C [E, E] of two batches of projections, each entry normalised over its batch. Source: 2103.03230 eq. 2."""
    return _normalised(first_BE).T @ _normalised(second_BE) / len(first_BE)


def barlow_twins_loss(first_BE: Tensor, second_BE: Tensor, off_diagonal: float = 5e-3) -> Tensor:
    """Σ_i (1 − C_ii)² + λ Σ_{i≠j} C_ij², a scalar; symmetric in the two. Source: 2103.03230 eq. 1.

    first_BE, second_BE: projections of two views of the same images. off_diagonal: λ.
    """
    c_EE = cross_correlation(first_BE, second_BE)
    on = (1 - c_EE.diagonal()).square().sum()
    return on + off_diagonal * (c_EE.square().sum() - c_EE.diagonal().square().sum())


def make_projector(widths: tuple[int, ...], generator: torch.Generator) -> nn.Sequential:
    """Linear layers from widths[0] to widths[-1], batch norm and ReLU between them; weights by PyTorch's rule, drawn from the generator (on the CPU)."""
    layers: list[nn.Module] = []
    for number, (before, after) in enumerate(pairwise(widths)):
        if number:
            layers += [nn.BatchNorm1d(before), nn.ReLU()]
        layer = nn.utils.skip_init(nn.Linear, before, after, bias=False)
        with torch.no_grad():
            layer.weight.copy_(torch.empty(layer.weight.shape).uniform_(-(before**-0.5), before**-0.5, generator=generator))
        layers.append(layer)
    return nn.Sequential(*layers)


def make_identity(network: nn.Module) -> None:
    """The network's head becomes the identity and takes no gradient: its outputs are its features, and it is still built as it was.

    Raises:
        InputError: it has no linear head, or one that does not have as many outputs as inputs.
    """
    path = find_head(network)
    head = cast(nn.Linear, network.get_submodule(path))
    if head.in_features != head.out_features:
        what = f"the network has {head.in_features} features and {head.out_features} outputs; features can be read off it where the two are equal."
        raise InputError(what, where="model", fix=f"Set its num_classes to {head.in_features}, or method.representation to outputs.")
    with torch.no_grad():
        head.weight.copy_(torch.eye(head.in_features))
        if head.bias is not None:
            head.bias.zero_()
    head.requires_grad_(False)


def _normalised(z_BE: Tensor) -> Tensor:
    centred = z_BE - z_BE.mean(0)
    return centred * (centred.square().mean(0) + SMALLEST_VARIANCE).rsqrt()


class BarlowTwinsConfig(Frozen):
    """Knobs of `BarlowTwins`."""

    off_diagonal: float = Field(5e-3, ge=0, le=1e3, description="λ, weight of the redundancy")
    projector: tuple[Annotated[int, Field(ge=1, le=65536)], ...] = Field(
        (128, 128), description="widths of its layers (paper: three of 8192); none: no projector"
    )
    representation: Literal["features", "outputs"] = Field(
        "features", description="what is learned: what goes into the student's head, which is the identity then and is not trained, or what comes out of it"
    )
    views: AugmentSpec = Field(AugmentSpec(crop=2, flip=True, cutout=5), description="what is done to an image, twice; neither mixup nor cutmix")


class BarlowTwins(Method):
    """Trains the student without labels; its outputs are the representation afterwards. The projector is left behind."""

    Config = BarlowTwinsConfig
    paper: ClassVar[Paper] = Paper(
        "Barlow Twins: Self-Supervised Learning via Redundancy Reduction", "2103.03230", "ICML", 2021, "facebookresearch/barlowtwins"
    )  # fmt: skip
    produces = "encoder"
    needs_teacher = False
    config: BarlowTwinsConfig

    def setup(self) -> None:
        """The projector, and what black is. Raises InputError: no data, mixing views, or a network that gives no vectors."""
        if self.train_data is None:
            raise InputError("an encoder is trained on images.", where="data")
        if self.config.views.mixes:
            raise InputError("a view that is mixed of two images is a view of neither.", where="method.views", fix="Leave mixup and cutmix out.")
        raw = self.train_data.fetch(torch.zeros(1, dtype=torch.int64))[0]
        self.black = self.train_data.prepare(torch.zeros_like(raw))
        if self.config.representation == "features":
            make_identity(self.student)
        place = next(self.student.parameters()).device
        with evaluating(self.student), torch.no_grad():
            answer = self.student(self.train_data.prepare(raw).to(place))
        if answer.ndim != 2:
            raise InputError(f"the network's outputs are {list(answer.shape)}, not [batch, entries].", where="student.model")
        self.projector = make_projector((answer.shape[1], *self.config.projector), seeds.generator(self.seed, "projector"))
        self.both = nn.ModuleDict({"encoder": self.student, "projector": self.projector})

    def players(self) -> Mapping[str, Player]:
        """Encoder and projector, under one optimiser."""
        return {"student": Player(self.both)}

    def view(self, batch: Batch, number: int, clock: Clock) -> Tensor:
        """View 0 or 1 of a batch, [B, C, H, W]: a function of seed, epoch, view and the images' ids."""
        ids = torch.arange(len(batch), device=batch.inputs.device) if batch.ids is None else batch.ids
        black = self.black.to(batch.inputs)
        seed = seeds.derive(self.seed, "view", number)
        return transform(batch.inputs - black, ids, spec=self.config.views, seed=seed, epoch=clock.epoch) + black

    def updates(self, batch: Batch, clock: Clock) -> Iterator[Update]:
        """One update of both."""
        first, second = (self.projector(self.student(self.view(batch, number, clock))) for number in (0, 1))
        loss = barlow_twins_loss(first, second, self.config.off_diagonal)
        yield Update("student", loss, {"alike": cross_correlation(first.detach(), second.detach()).diagonal().mean()})

    def facts(self) -> dict[str, Any]:
        """The width of the representation."""
        return {"vector": self.projector[0].in_features}
