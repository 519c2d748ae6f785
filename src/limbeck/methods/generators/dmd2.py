"""DMD2: Improved Distribution Matching Distillation for Fast Image Synthesis (Yin et al., arXiv 2405.14867), and its base DMD (arXiv 2311.18828).

A generator learns from the difference of two denoisers, the frozen teacher and a critic that is trained online on the generator's samples.

Legend: B samples of d entries; z noise, c condition, x = G_θ(z, c); x_t = α_t x + σ_t ε; D_T teacher, D_φ critic (x0 predictions), ℓ logits of heads ψ.
    g_b  = (D_φ(x_t, t) − D_T(x_t, t)) / (mean |x − D_T(x_t, t)| + 1e-6)     (3)  D_T may be guided (8); no gradient anywhere
    L_DM = 0.5 mean (x − sg[x − g])²,  so that ∂L_DM/∂x = g/(B d)             (4)
    L_φ  = mean squared error of the critic's own output on sg[x]            (5)
    L_D  = mean softplus(ℓ(x_τ)) + mean softplus(−ℓ(real_τ))                 (6)
    L_G  = mean softplus(−ℓ(x_τ)),  through the trunk to x, never into φ, ψ   (6)
    generator: L_DM + w_g L_G [+ w_reg ℓ(G(z_i), y_i)];  critic: L_φ + w_d L_D     (7, 9)
Few steps: x = G(x_{t_k}, t_k) at times t_1 > … > t_K, its input simulated by the generator itself (10). Equation numbers are those of our sheet.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from limbeck.contract import Batch, Clock, OptimiserSpec, Paper, Phase, Player, Update
from limbeck.diffusion.denoisers import denoising_loss
from limbeck.diffusion.discriminator import discriminator_loss, generator_loss
from limbeck.diffusion.distribution import inject, normal, score_direction
from limbeck.diffusion.gan import GanSpec, generated_logits, make_discriminator, pair_logits
from limbeck.diffusion.generator import Generator, Sampling
from limbeck.diffusion.levels import LevelSpec
from limbeck.diffusion.pairs import Pairs, RegressionSpec, make_pairs, pair_distance
from limbeck.diffusion.samplers import at
from limbeck.errors import InputError
from limbeck.methods.generators._base import GeneratorConfig, GeneratorMethod
from limbeck.modes import evaluating

CERTAIN = 8.0
"""Mean logits of real and generated samples that are this far apart say that the discriminator has won (ours)."""


class DMD2Config(GeneratorConfig):
    """Knobs of `DMD2`."""

    times: tuple[float, ...] = Field((), description="the generator's times, descending; empty: every (1000/steps)-th of 1000 levels (SDXL, one step: [0.399])")
    ratio: int = Field(5, ge=1, le=1000, description="R: the generator is stepped on every R-th batch, the critic on each (paper: 5; SD1.5: 10)")
    order: Literal["official", "alternate"] = Field("official", description="'alternate': no critic step on the generator's batches (FastGen)")
    inputs: Literal["simulated", "real"] = Field("simulated", description="of a call after the first: what sampling gives, or noised real data (FastGen)")
    levels: LevelSpec = Field(LevelSpec(low=0.02, high=0.98), description="times of the direction g (code: 2 to 98 % of 1000 levels)")
    critic_levels: LevelSpec = Field(LevelSpec(), description="times of the critic's loss (code: all 1000 levels)")
    gan: GanSpec = Field(GanSpec(), description="the adversarial term on real data")
    regression: RegressionSpec = Field(RegressionSpec(), description="DMD's paired regression, which DMD2 drops")
    critic_optimiser: OptimiserSpec | None = Field(None, description="of the critic; null: the recipe's (official: one rate for both)")

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.times and len(self.times) != self.steps:
            raise ValueError(f"{len(self.times)} times are given for {self.steps} steps.")
        if self.order == "alternate" and self.ratio == 1:
            raise ValueError("with order 'alternate' and ratio 1 the critic is never trained.")
        if self.regression.used and self.steps > 1:
            raise ValueError("paired regression is for generators of one step.")
        return self


class DMD2(GeneratorMethod):
    """Distribution matching with a critic on its own time scale, an adversarial term on real data, and backward simulation for few steps."""

    Config = DMD2Config
    paper: ClassVar[Paper] = Paper(
        "Improved Distribution Matching Distillation for Fast Image Synthesis", "2405.14867", "NeurIPS", 2024, "tianweiy/DMD2"
    )  # fmt: skip
    config: DMD2Config

    def setup(self) -> None:
        """Critic, and trunk and heads where there is an adversarial term and there are real data. Raises InputError: the parts do not fit together."""
        super().setup()
        self.critic = self.make_critic()
        self.pairs: Pairs | None = None
        self.adversarial = self.config.gan.weight > 0 and self.train_data is not None
        self.uses_data = self.adversarial or (self.config.inputs == "real" and self.config.steps > 1)
        if self.uses_data:
            self.check_data()
        if self.adversarial:
            self.discriminator = make_discriminator(self.config.gan, self.critic, self.denoiser_teacher, self.seed)

    def make_generator(self) -> Sampling:
        """The student at its times. Raises InputError: it has none."""
        made = super().make_generator()
        if isinstance(made, Generator) and made is not self.student:
            return Generator(made.denoiser, self.config.times, scale=made.scale) if self.config.times else made
        if self.config.times or made.calls > 1:
            raise InputError(f"{type(self.student).__name__} has no times to train at.", where="method.times", fix="Give a denoiser as the student.")
        return made

    def check_data(self) -> None:
        """Raise InputError where real data are asked for and missing, or labels are, which generator, critic and heads are told."""
        if self.train_data is None:
            raise InputError("inputs: real needs training data.", where="method.inputs", fix="Use inputs: simulated.")
        self.check_labels("Label all, or set the teacher's conditional: false, or gan.weight: 0.")

    def players(self) -> Mapping[str, Player]:
        """Generator and critic; the heads belong to the critic if it is their trunk, else there is a discriminator."""
        generator, critic = Player(self.student), Player(self.critic, self.config.critic_optimiser)
        if not self.adversarial:
            return {"generator": generator, "critic": critic}
        if self.config.gan.trunk == "critic":
            return {"generator": generator, "critic": replace(critic, module=self.discriminator)}
        return {"generator": generator, "critic": critic, "discriminator": Player(self.discriminator, self.config.gan.optimiser)}

    def phases(self) -> Iterable[Phase]:
        """Perhaps a warm-up on pairs, then the method; data are fetched only where they are used."""
        warm_up = [Phase("warm_up", steps=self.config.regression.warm_up, trains=("generator",), data_free=True)] if self.config.regression.warm_up else []
        return [*warm_up, Phase(data_free=not self.uses_data)]

    # ---- one batch ------------------------------------------------------------------------------------------------

    def updates(self, batch: Batch, clock: Clock) -> Iterator[Update]:
        """On every R-th batch the generator, then (from the same, detached samples) critic and heads; on the others these alone."""
        if clock.phase == "warm_up":
            yield Update("generator", self.regress(len(batch), clock))
            return
        turn = clock.step % self.config.ratio == 0
        with torch.set_grad_enabled(turn):
            x, cond = self.generate(batch, clock)
        if turn:
            yield self.generator_update(x, cond, clock)
        if not turn or self.config.order == "official":
            yield from self.critic_updates(x.detach(), cond, batch, clock)

    def generate(self, batch: Batch, clock: Clock) -> tuple[Tensor, Tensor | None]:
        """x and its condition, by one call of the generator (10)."""
        generator = self.generator
        if self.config.inputs == "simulated" or not isinstance(generator, Generator) or generator.calls == 1:
            return self.generated(len(batch), clock)
        k, noise, cond = self.drawn_call(clock), self.draw(len(batch), clock)[0], self.labels(batch)
        x_t = generator.start(noise) if k == 0 else generator.denoiser.schedule.add_noise(batch.inputs, noise, at(generator.times[k], noise))
        return generator.call(x_t, k, cond), cond

    def labels(self, batch: Batch) -> Tensor | None:
        """The conditions of the real samples."""
        return batch.targets if self.generator.num_classes else None

    def generator_update(self, x: Tensor, cond: Tensor | None, clock: Clock) -> Update:
        """L_DM + w_g L_G + w_reg ℓ (7, 9). Critic, heads and teacher take no gradient, nor does any arithmetic go into one."""
        config, draws = self.config, clock.generator("generator")
        t = config.levels.sample(self.guided.schedule, len(x), draws)
        with evaluating(self.critic):
            direction = score_direction(x, self.guided, self.critic, t, normal(len(x), self.generator.shape, draws), cond)
        loss = inject(x, direction.g)
        metrics = self.watched(x, direction.broken) | {"matching": loss}
        if self.adversarial:
            with evaluating(self.discriminator):
                metrics["gan"] = generator_loss(generated_logits(self.discriminator, config.gan.levels, x, cond, draws))
            loss = loss + config.gan.weight * metrics["gan"]
        if config.regression.weight > 0:
            metrics["regression"] = self.regress(len(x), clock)
            loss = loss + config.regression.weight * metrics["regression"]
        return Update("generator", loss, metrics)

    def critic_updates(self, x: Tensor, cond: Tensor | None, batch: Batch, clock: Clock) -> Iterator[Update]:
        """L_φ (5) and L_D (6): one update where the critic is the trunk, else two."""
        config, draws = self.config, clock.generator("critic")
        t = config.critic_levels.sample(self.critic.schedule, len(x), draws)
        loss = denoising_loss(self.critic, x, t, normal(len(x), self.generator.shape, draws), cond)
        if not self.adversarial:
            yield Update("critic", loss)
            return
        if config.gan.trunk != "critic":
            yield Update("critic", loss)
        levels, frozen = config.gan.levels, config.gan.trunk == "teacher"
        fake_BH, real_BH = pair_logits(self.discriminator, levels, x, cond, batch.inputs, self.labels(batch), draws, frozen=frozen)
        judged = discriminator_loss(fake_BH, real_BH)
        metrics = {"gan": judged, "logit_fake": fake_BH.mean(), "logit_real": real_BH.mean()}
        if config.gan.trunk == "critic":
            yield Update("critic", loss + config.gan.discriminator_weight * judged, metrics | {"denoising": loss})
        else:
            yield Update("discriminator", judged, metrics)

    def regress(self, count: int, clock: Clock) -> Tensor:
        """ℓ(G(z_i), y_i) on pairs (9), which the teacher makes when they are first asked for (anew after a restart: the same)."""
        spec = self.config.regression
        if self.pairs is None:
            self.pairs = make_pairs(self.guided, spec.pairs, spec.steps, self.seed, clock.device)
        noise, y, cond = self.pairs.draw(count, clock.generator("pairs"))
        return pair_distance(self.generator(noise, cond), y, spec.distance)

    # ---- what is told and kept ------------------------------------------------------------------------------------

    def notice(self, row: Mapping[str, float]) -> Sequence[str]:
        """As all generators' (collapse, divergence, broken directions), and a discriminator that has won."""
        gaps = [row[f"{who}/logit_real"] - row[f"{who}/logit_fake"] for who in ("critic", "discriminator") if f"{who}/logit_real" in row]
        won = [f"the discriminator is certain: its logits of real and generated samples are {CERTAIN:g} apart."] if any(g > CERTAIN for g in gaps) else []
        return [*super().notice(row), *won]

    def facts(self) -> dict[str, Any]:
        """The times, the time scales and where real data come in."""
        times = list(self.generator.times) if isinstance(self.generator, Generator) else []
        return {"times": times, "ratio": self.config.ratio, "trunk": self.config.gan.trunk if self.adversarial else None, "real_data": self.uses_data}
