"""What the claim of BOOT (2306.05544) compares it with: regression on pairs of noise and sample, and the teacher's own sampler with few steps."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from pydantic import Field
from torch import Tensor

from limbeck import seeds
from limbeck.contract import Artefact, Batch, Clock, Frozen, Phase, Player, Update
from limbeck.diffusion import samplers
from limbeck.diffusion.denoisers import Denoiser
from limbeck.diffusion.distribution import normal, random_labels
from limbeck.diffusion.generator import Sampling, TeacherSampler, data_scale
from limbeck.methods.generators._base import GeneratorMethod
from limbeck.methods.generators.boot import Boot, BootConfig

BATCH = 512
"""Noises that a sampler is run on at once."""


def ddim_samples(teacher: Denoiser, noise: Tensor, cond: Tensor | None, steps: int) -> Tensor:
    """[N, *shape]: where `steps` DDIM steps of the teacher take the noise [N, *shape]."""
    schedule, found = teacher.schedule, []
    with torch.no_grad():
        for first in range(0, len(noise), BATCH):
            some = noise[first : first + BATCH]
            start = schedule.start(some, samplers.at(schedule.t_max, some))
            found.append(samplers.ddim(teacher, start, schedule.steps(steps), None if cond is None else cond[first : first + BATCH]))
    return torch.cat(found)


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
        self.pairs: tuple[Tensor, Tensor | None, Tensor] | None = None

    def made_pairs(self, device: torch.device) -> tuple[Tensor, Tensor | None, Tensor]:
        """Noise, classes and samples [N, ...]; a function of the run's seed alone, so that a restart makes the same."""
        if self.pairs is None:
            count, random = self.config.teacher_budget // self.config.pair_steps, seeds.generator(self.seed, "pairs", device=device)
            noise, cond = normal(count, self.g.shape, random), random_labels(count, self.g.num_classes, random)
            self.pairs = noise, cond, ddim_samples(self.guided, noise, cond, self.config.pair_steps)
            self.teacher_calls = count * self.config.pair_steps
        return self.pairs

    def updates(self, batch: Batch, clock: Clock) -> Iterator[Update]:
        """One update of the generator, on pairs drawn with replacement."""
        noise, cond, samples = self.made_pairs(clock.device)
        chosen = torch.randint(len(noise), (len(batch),), generator=clock.generator("pairs"), device=noise.device)
        g = self.g(noise[chosen], None if cond is None else cond[chosen])
        yield Update("generator", (g - samples[chosen]).square().mean(), self.watched(g))


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
