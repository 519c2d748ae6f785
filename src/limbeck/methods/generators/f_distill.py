"""f-distill: One-step Diffusion Models with f-Divergence Distribution Matching (Xu, Nie, Vahdat and others, 2025; arXiv 2502.15681).

DMD2 with each sample's score difference weighted by h(r), r the teacher/student density ratio that the discriminator knows, so that any D_f(p‖q) is minimised.

Legend: x = G_θ(z) samples [B, ...]; D_φ critic, D_T teacher (x0 predictions), ℓ the discriminator's logit, all at ONE x_t = α x + σ ε for the generator's step.
    r̂ = clip(exp ℓ), r̃ = r̂/(its mean per noise bin), h̄ = h(r̃)/(its mean over the batch)                    (4, 5, 6)
    g = h̄ · (D_φ − D_T)/(mean |x − D_T| + 1e-6)                                                               (7)
    L_G = 0.5·mean (x − sg[x − g])² + w_g · mean softplus(−ℓ(x_t));  h never multiplies the second term       (7)
    L_ψ = softplus(ℓ_fake) + softplus(−ℓ_real) + γ (ℓ(real) − ℓ(real + 0.1 noise))²                           (8)
Step i of R: the generator alone where i mod R = 0, else critic and discriminator on fresh samples. Equation numbers are those of our sheet.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from limbeck.components import Component
from limbeck.contract import Batch, Clock, OptimiserSpec, Paper, Phase, Player, Update
from limbeck.diffusion.denoisers import NetworkDenoiser, denoising_loss
from limbeck.diffusion.discriminator import generator_loss
from limbeck.diffusion.distribution import at_least_float32, direction_weight, inject, normal, untrained, without_broken
from limbeck.diffusion.f_divergences import DIVERGENCES, Name
from limbeck.diffusion.levels import LevelSpec
from limbeck.diffusion.noised_discriminator import NoisedDiscriminator, look, noised_pair, own_trunk, pair_loss
from limbeck.diffusion.ratio import BinAxis, BinnedMean, RatioWeights, Stages, Weights, WeightStatistics, not_in_parts
from limbeck.diffusion.schedules import expand
from limbeck.errors import InputError
from limbeck.methods.generators._base import GeneratorConfig, GeneratorMethod

SATURATED = 0.9
"""Where more than this share of the ratios is clipped, the weights say little (ours)."""


class FDistillConfig(GeneratorConfig):
    """Knobs of `FDistill`."""

    divergence: Name = Field("jensen_shannon", description="f; paper: forward_kl for CIFAR-10, jensen_shannon for ImageNet-64 and SD1.5; reverse_kl is DMD2")
    ratio: int = Field(5, ge=2, le=10_000, description="R: one step in R is the generator's, the others critic's and discriminator's (5; SD1.5: 10)")
    matching_weight: float = Field(1.0, ge=0, le=1e4, description="weight of the score term; 0: adversarial alone (ours, for comparison)")
    adversarial_weight: float = Field(1e-3, ge=0, le=1e4, description="w_g (paper: 1e-3, ImageNet-64 3e-3)")
    normalise: Stages = Field("both", description="stage 1 (ratio per noise bin), stage 2 (weights), both, or neither")
    bins: int = Field(10, ge=1, le=1000, description="noise bins of stage 1 (FastGen: 10)")
    bin_axis: BinAxis = Field("index", description="what the bins are equally wide in: place in the list of times (ours), 'time' (FastGen), 'log_level' (ours)")
    bin_decay: float = Field(0.0, ge=0, lt=1, description="ρ of the bins' moving mean (FastGen: 0, ImageNet-64 0.5)")
    logit_clip: float = Field(10.0, gt=0, le=80, description="bound on |ℓ| (FastGen: 10)")
    ratio_low: float = Field(0.1, gt=0, le=1, description="least ratio (FastGen: 0.1)")
    ratio_high: float = Field(20.0, ge=1, le=1e6, description="largest ratio (FastGen: 20)")
    warmup: float = Field(0.0, ge=0, le=1, description="share of the training with h = 1, until the discriminator is worth asking (ours)")
    levels: LevelSpec = Field(LevelSpec(low=0.002, high=0.998), description="times of all three losses (FastGen: 0.2 % to 99.8 % of EDM's list of 1000)")
    critic: Literal["teacher", "student"] = Field("teacher", description="what the critic starts as a copy of; student: where the teacher is no network (ours)")
    critic_optimiser: OptimiserSpec | None = Field(None, description="null: train.optimiser (paper: one learning rate for all)")
    discriminator: Literal["teacher", "critic", "own"] = Field("teacher", description="features that its heads read: frozen teacher's, critic's, own network's")
    discriminator_model: Component | None = Field(None, description="'own': a denoiser as a trunk; null: mlp_denoiser [128, 128], unet_denoiser for images")
    discriminator_optimiser: OptimiserSpec | None = Field(None, description="null: train.optimiser")
    taps: tuple[str, ...] = Field(("bottleneck",), description="where features are read (paper: resolutions 32, 16, 8 for CIFAR-10, else 8)")
    trunk_weight: float = Field(0.0, ge=0, le=1e4, description="w_d, 'critic': what its loss gets of the discriminator's; 0: heads alone learn (DMD2: 1e-2)")
    r1_weight: float = Field(0.0, ge=0, le=1e6, description="γ of the approximate R1 (paper: 1, ImageNet-64 0)")
    r1_noise: float = Field(0.1, gt=0, le=10, description="its noise, added to the real samples (FastGen: 0.1)")


class FDistill(GeneratorMethod):
    """Distribution matching in a divergence of one's choice: a one-step (or few-step) generator out of a denoiser and real samples."""

    Config = FDistillConfig
    paper: ClassVar[Paper] = Paper(
        "One-step Diffusion Models with f-Divergence Distribution Matching", "2502.15681", "arXiv", 2025, "https://github.com/NVlabs/FastGen"
    )

    def setup(self) -> None:
        """Generator, critic, discriminator. Raises InputError: nothing would be learnt, or a part does not fit the teacher."""
        super().setup()
        config = self.config
        if not (config.matching_weight or config.adversarial_weight):
            raise InputError("both weights are 0: the generator would learn nothing.", where="method.matching_weight")
        self.schedule = self.denoiser_teacher.schedule
        self.ratio_weights = RatioWeights(
            DIVERGENCES[config.divergence], BinnedMean(config.bins, config.bin_decay), axis=config.bin_axis, stages=config.normalise,
            logit_clip=config.logit_clip, low=config.ratio_low, high=config.ratio_high,
        )  # fmt: skip
        self.statistics = WeightStatistics()
        self.critic = self.make_critic() if config.matching_weight else None
        self.weighted = bool(config.matching_weight) and config.divergence != "reverse_kl"
        self.discriminator = self.make_discriminator() if self.weighted or config.adversarial_weight else None

    def make_critic(self) -> NetworkDenoiser:
        """A trainable copy of the teacher, or of the student as it starts. Raises InputError: that is no network denoiser of the teacher's schedule."""
        if self.config.critic == "teacher":
            return super().make_critic()
        if not isinstance(self.student, NetworkDenoiser):
            raise InputError(f"the critic starts as a copy of the student, a {type(self.student).__name__}, no denoiser.", where="method.critic")
        if self.student.schedule != self.denoiser_teacher.schedule:
            raise InputError("the student, of whom the critic is a copy, has another schedule than the teacher.", where="student.model")
        return copy.deepcopy(self.student).requires_grad_(True)

    def make_discriminator(self) -> NoisedDiscriminator:
        """Heads on their trunk. Raises InputError: the trunk shows no features, there is no critic to look through, or real samples have no label."""
        self.check_labels("Label all, or set the teacher's conditional: false.")
        config, trunk = self.config, self.denoiser_teacher if self.config.discriminator == "teacher" else self.critic
        if config.discriminator == "own":
            trunk = own_trunk(config.discriminator_model, self.schedule, self.generator.shape, self.generator.num_classes, self.seed)
        if not isinstance(trunk, NetworkDenoiser):
            raise InputError(f"there is no network in the {config.discriminator} to read features of.", where="method.discriminator", fix="Set it to own.")
        return NoisedDiscriminator(trunk, config.taps, owns=config.discriminator == "own", seed=self.seed)

    def players(self) -> Mapping[str, Player]:
        """Generator, and critic and discriminator where they are needed."""
        found = {"generator": Player(self.student)}
        if self.critic is not None:
            found["critic"] = Player(self.critic, self.config.critic_optimiser)
        if self.discriminator is not None:
            found["discriminator"] = Player(self.discriminator, self.config.discriminator_optimiser)
        return found

    def phases(self) -> Iterable[Phase]:
        """One; without a discriminator no data are read."""
        return [Phase(data_free=self.discriminator is None)]

    # ---- the steps ------------------------------------------------------------------------------------------------

    def updates(self, batch: Batch, clock: Clock) -> Iterator[Update]:
        """The generator's update at every R-th step, else the critic's and the discriminator's."""
        if clock.step % self.config.ratio == 0:
            yield self.generator_update(len(batch), clock)
            return
        with torch.no_grad():
            x, cond = self.generated(len(batch), clock)
        judge, gamma = self.discriminator, self.config.r1_weight
        features = {} if judge is None else self.judged(judge, x, cond, batch, clock)
        if self.critic is not None:
            t, noise = self.noised(len(x), clock.generator("critic"))
            loss = denoising_loss(self.critic, x, t, noise, cond)
            if judge is not None and self.trunk_learns:
                with untrained(judge):
                    loss = loss + self.config.trunk_weight * pair_loss(judge.judge(features), gamma)
            yield Update("critic", loss)
        if judge is not None:
            alone = {tap: f.detach() for tap, f in features.items()} if self.trunk_learns else features
            yield Update("discriminator", pair_loss(judge.judge(alone), gamma))

    def noised(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Times [B] and noise [B, ...]."""
        return self.config.levels.sample(self.schedule, count, generator), normal(count, self.generator.shape, generator)

    def generator_update(self, count: int, clock: Clock) -> Update:
        """Eq. 7."""
        config = self.config
        x, cond = self.generated(count, clock)
        t, noise = self.noised(count, clock.generator("generator"))
        x_t = self.schedule.add_noise(at_least_float32(x if config.adversarial_weight else x.detach()), noise, t)  # ratios alone need no graph
        real, fake, logits_BH = look(x_t, t, cond, self.guided, self.critic, self.discriminator)
        loss, metrics = 0.0 * x.mean(), self.watched(x)  # no number where the samples are none, which `generator_loss` leaves out
        if logits_BH is not None and config.adversarial_weight:
            metrics["adversarial"] = generator_loss(logits_BH)
            loss = loss + config.adversarial_weight * metrics["adversarial"]
        if real is not None and fake is not None:
            scale_B, weights = direction_weight(x.detach(), real, t, self.schedule, "normalised"), None
            if self.weighted and logits_BH is not None:
                not_in_parts(clock.micro if config.normalise != "none" else 0, clock.world)
                weights = self.ratio_weights(logits_BH, self.schedule, t, clock.total)
                if clock.progress < config.warmup:
                    weights = Weights(torch.ones_like(weights.value), weights.clipped)
                scale_B = scale_B * weights.value.to(scale_B.dtype)
            g, broken = without_broken(expand(scale_B, x) * (fake - real))
            loss = loss + config.matching_weight * inject(x, g)
            metrics |= {"broken": broken.float().mean(), **self.statistics.add(g, weights)}
        return Update("generator", loss, metrics)

    @property
    def trunk_learns(self) -> bool:
        """Whether the critic gets a share of the discriminator's loss."""
        return self.discriminator is not None and self.discriminator.trunk is self.critic and self.config.trunk_weight > 0

    def judged(self, discriminator: NoisedDiscriminator, fake: Tensor, cond: Tensor | None, batch: Batch, clock: Clock) -> dict[str, Tensor]:
        """The discriminator's features of fake and real samples, each at a time and noise of its own, and of real ones moved a little where R1 asks."""
        config, draw = self.config, clock.generator("discriminator")
        if cond is not None and batch.targets is not None:  # real samples come with their own classes
            cond = torch.cat([cond, batch.targets])
        t, noise = self.noised(2 * len(fake), draw)
        shift = config.r1_noise * normal(len(fake), self.generator.shape, draw) if config.r1_weight else None
        with torch.set_grad_enabled(config.discriminator == "own" or self.trunk_learns):
            return discriminator.features(*noised_pair(self.schedule, fake, batch.inputs, t, noise, cond, shift))

    # ---- what is said and kept ------------------------------------------------------------------------------------

    def notice(self, row: Mapping[str, float]) -> Sequence[str]:
        """Also says when nearly all ratios are clipped."""
        found = list(super().notice(row))
        if row.get("generator/clipped", 0.0) > SATURATED:
            found.append("nearly all density ratios are clipped: the discriminator is too sure, and every divergence then acts as the reverse KL.")
        return found

    def facts(self) -> dict[str, Any]:
        """The divergence; of the training: the share of clipped ratios, the variation of weights within a batch and of ‖g‖ over the steps."""
        return {"divergence": self.config.divergence, "metrics": self.statistics.summary()}

    def state_dict(self) -> dict[str, Any]:
        """The bins' means and the sums behind `facts`."""
        return {**super().state_dict(), "bins": self.ratio_weights.bins.state_dict(), "sums": self.statistics.sums}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put them back. Raises InputError: another number of bins."""
        super().load_state_dict(state)
        self.ratio_weights.bins.load_state_dict(state["bins"])
        self.statistics.sums = state["sums"]
