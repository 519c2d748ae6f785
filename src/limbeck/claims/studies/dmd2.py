"""Arms of the `dmd2` claim that are not the method itself: DMD2 with an eye on its fluctuations, and the teacher's own samples at so many calls."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from limbeck.claims.studies.boot import FewSteps
from limbeck.contract import Clock
from limbeck.diffusion.generator import Sampling, TeacherSampler, data_scale
from limbeck.evaluate.samples import mmd2
from limbeck.methods.generators.dmd2 import DMD2

LOOKS = 20
"""How often MMD² is measured over the last third of training."""
SAMPLES = 500


class Watched(DMD2):
    """DMD2, with metrics of its own: the standard deviation of MMD² (of the raw, not the averaged weights) over the last third of training."""

    def setup(self) -> None:
        """Real samples to compare with."""
        super().setup()
        self.looks: list[float] = []
        assert self.test is not None
        count = min(SAMPLES, len(self.test))
        self.real: Tensor = self.test.prepare(self.test.fetch(torch.arange(count))[0])

    def after_step(self, player: str, clock: Clock) -> None:
        """Look at the generator now and then, late in training, always at the same noise."""
        every = max(clock.steps // (3 * LOOKS), 1)
        if player != "critic" or clock.step < 2 * clock.steps // 3 or clock.step % every:
            return
        draw = torch.Generator().manual_seed(1)
        noise = torch.randn(len(self.real), *self.generator.shape, generator=draw)
        self.looks.append(mmd2(self.real, self.generator(noise, None, draw)))

    def facts(self) -> dict[str, Any]:
        """The method's, and the fluctuation."""
        found = torch.tensor(self.looks, dtype=torch.float64)
        return super().facts() | ({"metrics": {"mmd2_fluctuation": float(found.std())}} if len(found) > 1 else {})


class HeunSteps(FewSteps):
    """No training at all: the teacher with Heun's sampler."""

    def make_generator(self) -> Sampling:
        """The teacher's sampler."""
        return TeacherSampler(self.denoiser_teacher, self.config.steps, sampler="heun", scale=data_scale(self.train_data, self.denoiser_teacher.shape))
