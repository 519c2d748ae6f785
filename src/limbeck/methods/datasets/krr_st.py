"""KRR-ST: Self-Supervised Dataset Distillation for Transfer Learning (Lee et al., arXiv 2310.06511).

A few pairs (image, vector) such that a network that has regressed them is a good start for other tasks. The vectors are those of a frozen self-supervised g.

Legend: M pairs (X_s, Y_s), N real images X_r of a batch, D entries of g(x); φ_ω the features of a pool network ω, φ̃ = [φ ; 1].
    min_ω mean (head(φ_ω(X_s)) − Y_s)²                                         (1)  what users do with the pairs, and what the pool does
    K_ss = φ̃_s φ̃_sᵀ,  K_rs = φ̃_r φ̃_sᵀ, in eval mode;  Y_r = g(X_r)            (2)
    r = 1e-6 · trace(sg[K_ss]);   Ŷ_r = K_rs (K_ss + r I)⁻¹ Y_s                (3, 4)
    J = mean (Ŷ_r − Y_r)²,  whose gradient reaches X_s and Y_s alone           (5, 6)
    then the pool network takes one step of (1), or is made anew after Z       (7)

The paper's: all of that, and the age of a network that is made anew is 0. The released code's, behind knobs: it stays Z (`reset`), X_s starts from pixels in
[0, 1] (`start`). Ours: the solve in float64 in whichever form is cheaper; g's answers to all real images are computed once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from limbeck import seeds
from limbeck.contract import Batch, Clock, Frozen, OptimiserSpec, Paper, Phase, Player, Update
from limbeck.errors import InputError
from limbeck.evaluate.predict import predict
from limbeck.methods.datasets._base import DatasetMethod
from limbeck.modes import evaluating
from limbeck.synthetic.krr import ridge_loss
from limbeck.synthetic.pool import NetworkPool, frozen_features
from limbeck.synthetic.synthetic_set import SyntheticSet

_DTYPES = {"float64": torch.float64, "float32": torch.float32}


class KRRSTConfig(Frozen):
    """Knobs of `KRRST`. The optimiser of the pairs is the recipe's (paper: AdamW without decay, 1e-4 or 1e-5, linear to a thousandth)."""

    images: int = Field(1000, ge=1, le=1_000_000, description="M, pairs (CIFAR-100, ImageNet-64: 1000; Tiny-ImageNet: 2000)")
    start: Literal["normalised", "pixels"] = Field(
        "normalised", description="what X_s starts as: real images as networks take them, or (released code) their pixels in [0, 1], not normalised"
    )
    networks: int = Field(10, ge=1, le=1000, description="L, networks of the pool")
    life: int = Field(1000, ge=1, le=1_000_000, description="Z, steps a network of the pool takes before it is made anew")
    reset: Literal["paper", "released"] = Field(
        "paper", description="'released': a network that was made anew once is made anew at every visit, and never trained again"
    )
    inner: OptimiserSpec = Field(OptimiserSpec(name="sgd", lr=0.1, momentum=0.9, weight_decay=1e-3), description="of the pool networks")
    ridge: float = Field(1e-6, gt=0, le=1e3, description="the ridge over the trace of K_ss")
    precision: Literal["float64", "float32"] = Field("float64", description="of kernels and solve (code: float32)")


class KRRST(DatasetMethod):
    """Pairs of image and vector, learned through kernel ridge regression on the features of an online pool of networks."""

    Config = KRRSTConfig
    paper: ClassVar[Paper] = Paper(
        "Self-Supervised Dataset Distillation for Transfer Learning", "2310.06511", "ICLR", 2024, "db-Lee/selfsup_dd"
    )  # fmt: skip
    needs_labels = False
    takes_augmented: ClassVar[bool] = False
    """g's answers are kept for the images as they are."""
    config: KRRSTConfig

    def setup(self) -> None:
        """The first pairs and the pool. Raises InputError: too few images, no fresh networks, or g gives no vectors."""
        images, targets = self.first_pairs(self.chosen_images())
        self.synthetic = SyntheticSet.vectors(images, targets, num_classes=int(self.num_classes or 1), data=self.data)
        self.pairs = nn.ParameterList([self.synthetic.images, self.synthetic.targets])
        self.answers_ND: Tensor | None = None
        self.networks = self.make_pool(targets.shape[1])

    def make_pool(self, outputs: int) -> NetworkPool:
        """L networks with `outputs` outputs. Raises InputError: there is one network only."""
        config, build = self.config, self.fresh_student
        if build is None:
            raise InputError("the pool is made of fresh networks, and there is only one module.", where="student", fix="Give a model by name or by a factory.")
        return NetworkPool(build, size=config.networks, life=config.life, outputs=outputs, seed=self.seed, reset=config.reset)

    # ---- what the pairs start as --------------------------------------------------------------------------------------

    def chosen_images(self) -> Tensor:
        """[M] int64: positions of random real images. Raises InputError: there are too few."""
        count, wanted = len(self.data), self.config.images
        if wanted > count:
            raise InputError(f"{wanted} pairs of {count} real images.", where="method.images", fix="Lower it.")
        return torch.randperm(count, generator=seeds.generator(self.seed, "chosen"))[:wanted]

    def first_pairs(self, positions_M: Tensor) -> tuple[Tensor, Tensor]:
        """Images [M, ...] and g's vectors [M, D] of real images; the vectors are always those of the images as networks take them."""
        targets = self.answered(positions_M)
        if self.config.start == "normalised":
            return self.prepared(positions_M).clone(), targets
        raw = self.data.fetch(positions_M)[0]
        return (raw.float() / 255 if raw.dtype == torch.uint8 else raw.float().clone()), targets

    def answered(self, positions_K: Tensor | None = None, device: torch.device | None = None) -> Tensor:
        """[K, D] g's answers to real images (None: to all), in eval mode, without gradient, on the CPU."""
        assert self.teacher is not None
        module, teacher = self.teacher if isinstance(self.teacher, nn.Module) else nn.Identity(), self.teacher
        return predict(module, self.data, indices=positions_K, device=device, forward=lambda x: teacher.logits(Batch(x)))

    # ---- the loop -----------------------------------------------------------------------------------------------------

    def players(self) -> Mapping[str, Player]:
        """The pairs, images and vectors under one optimiser, and each network of the pool under its own."""
        pool = {f"pool-{i}": Player(member, self.config.inner) for i, member in enumerate(self.networks.members)}
        return {"pairs": Player(self.pairs), **pool}

    def phases(self) -> list[Phase]:
        """The pool first, each network for as long as its random age says, then the pairs."""
        warm_up = Phase("warm_up", steps=max(self.networks.starts), trains=[f"pool-{i}" for i in range(len(self.networks))], data_free=True)
        return [warm_up, Phase("distil")]

    def updates(self, batch: Batch, clock: Clock) -> Iterator[Update]:
        """The pairs by J on a drawn network; then that network by (1) on the new pairs, unless it is old (`after_step` has made it anew then)."""
        if clock.phase == "warm_up":
            yield from (self.member_update(i) for i, start in enumerate(self.networks.starts) if clock.step < start)
            return
        i = self.visited(clock)
        old = self.networks.old(i)
        yield Update("pairs", self.outer_loss(batch, self.networks.members[i], clock))
        if not old:
            yield self.member_update(i)

    def visited(self, clock: Clock) -> int:
        """Which network of the pool this step is about; the same on every process and for every part of a batch."""
        return self.networks.drawn(clock.phase_index, clock.step)

    def outer_loss(self, batch: Batch, member: nn.Module, clock: Clock) -> Tensor:
        """J (2 to 5): synthetic and real features in eval mode, with the statistics that the member has from the synthetic images."""
        images, targets = self.pairs
        with evaluating(member):
            with torch.no_grad():
                features_NP = frozen_features(member, batch.inputs)
            features_MP = frozen_features(member, images)
        dtype = _DTYPES[self.config.precision]
        return ridge_loss(features_MP, targets, features_NP, self.answers(batch, clock), ratio=self.config.ridge, dtype=dtype)

    def answers(self, batch: Batch, clock: Clock) -> Tensor:
        """Y_r [N, D] = g(X_r), of the images without augmentation; computed for all when they are first asked for (after a restart: anew, the same)."""
        if self.answers_ND is None:
            self.answers_ND = self.answered(device=clock.device).to(clock.device)
        assert batch.ids is not None
        return self.answers_ND[batch.ids]

    def member_update(self, i: int) -> Update:
        """(1) on all pairs, in train mode; the first step of a life starts without momentum."""
        images, targets = self.pairs
        loss = F.mse_loss(self.networks.members[i](images.detach()), targets.detach())
        return Update(f"pool-{i}", loss, fresh=self.networks.ages[i] == 0)

    def after_step(self, player: str, clock: Clock) -> None:
        """After the pairs' step an old network is made anew; any other that is stepped is a step older."""
        if player == "pairs":
            i = self.visited(clock)
            if self.networks.old(i):
                self.networks.reset(i)
        else:
            self.networks.aged(int(player.removeprefix("pool-")))

    # ---- what is told and kept ----------------------------------------------------------------------------------------

    def facts(self) -> dict[str, Any]:
        """How many pairs of what width, the pool's ages and how often each was made anew."""
        pool = {"ages": list(self.networks.ages), "resets": list(self.networks.resets)}
        return super().facts() | {"vector": self.synthetic.targets.shape[1], "pool": pool, "metrics": {"resets": sum(self.networks.resets)}}

    def state_dict(self) -> dict[str, Any]:
        """Ages and resets of the pool."""
        return {"pool": self.networks.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put them back."""
        self.networks.load_state_dict(state["pool"])
