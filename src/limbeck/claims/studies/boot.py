"""What the claim of BOOT (2306.05544) compares it with: regression on pairs of noise and sample, and the teacher's own sampler with few steps."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from pydantic import Field

from limbeck.contract import Artefact, Batch, Clock, Frozen, Phase, Player, Update
from limbeck.diffusion.generator import Sampling, TeacherSampler, data_scale
from limbeck.diffusion.pairs import Pairs, make_pairs
from limbeck.methods.generators._base import GeneratorMethod
from limbeck.methods.generators.boot import Boot, BootConfig


class PairConfig(BootConfig):
    """Knobs of `PairRegression`."""

    teacher_budget: int = Field(1_000_000, ge=1, description="teacher calls that the pairs may cost")
    pair_steps: int = Field(50, ge=1, description="DDIM steps of a pair")


class PairRegression(Boot):
    """The obvious way: pairs of noise and sample, made beforehand by the teacher's sampler, and g(ε, t_min) regressed on them. Same network, same start."""

    Config = PairConfig

    def setup(self) -> None:
        """As BOOT; the pairs come with the first step."""
        super().setup()
        self.pairs: Pairs | None = None

    def updates(self, batch: Batch, clock: Clock) -> Iterator[Update]:
        """One update of the generator, on pairs drawn with replacement."""
        steps = self.config.pair_steps
        if self.pairs is None:
            self.pairs = make_pairs(self.guided, self.config.teacher_budget // steps, steps, self.seed, clock.device, sampler="ddim")
            self.teacher_calls = len(self.pairs.noise) * steps
        noise, samples, cond = self.pairs.draw(len(batch), clock.generator("pairs"))
        g = self.g(noise, cond)
        yield Update("generator", (g - samples).square().mean(), self.watched(g))


class FewStepsConfig(Frozen):
    """Knobs of `FewSteps`."""

    steps: int = Field(1, ge=1, le=1000, description="DDIM steps")
    guidance_scale: float = Field(1.0, ge=0)


class FewSteps(GeneratorMethod):
    """No training at all: the teacher with its DDIM sampler, as an arm."""

    Config = FewStepsConfig
    paper = Boot.paper

    def make_generator(self) -> Sampling:
        """The teacher's sampler."""
        return TeacherSampler(self.denoiser_teacher, self.config.steps, sampler="ddim", scale=data_scale(self.train_data, self.denoiser_teacher.shape))

    def players(self) -> Mapping[str, Player]:
        """Nobody."""
        return {}

    def phases(self) -> Sequence[Phase]:
        """None."""
        return []

    def updates(self, batch: Batch, clock: Clock) -> Iterator[Update]:
        """None."""
        return iter(())

    def artefact(self) -> Artefact:
        """The sampler."""
        return Artefact("generator", self.generator)
