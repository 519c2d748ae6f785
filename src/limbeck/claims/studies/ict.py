"""What the claim of iCT (2310.14189) measures beside the usual: how far one-step and two-step samples are from held-out data, from the same noise."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from limbeck.evaluate.samples import energy_distance, sliced_wasserstein
from limbeck.methods.generators.ict import ICT
from limbeck.modes import evaluating

SEED = 31_000
LEAST = 2000
"""So many samples at least are compared with the test data."""


class TwoStepICT(ICT):
    """ICT that also reports the distances of its one-step and two-step samples to the test data. It trains exactly as `ICT` does."""

    def setup(self) -> None:
        """Nothing is measured yet."""
        super().setup()
        self.distances: dict[str, float] | None = None

    def facts(self) -> dict[str, Any]:
        """Those of `ICT`; `metrics` with one_step_ and two_step_ energy_distance and sliced_wasserstein, in network units (of pixels for images), and
        second_call_gains, the first energy distance less the second."""
        if self.distances is None and self.test is not None:
            real = self.test.prepare(self.test.fetch(torch.arange(len(self.test)))[0]).flatten(1)
            found: dict[str, float] = {}
            for name, steps in (("one_step", 1), ("two_step", 2)):
                fake = self.samples(max(len(real), LEAST), steps)
                if bool(fake.isfinite().all()):  # else there is nothing to report, and a check that needs it does not hold
                    found[f"{name}_energy_distance"] = energy_distance(real, fake)
                    found[f"{name}_sliced_wasserstein"] = sliced_wasserstein(real, fake)
            if len(found) == 4:
                found["second_call_gains"] = found["one_step_energy_distance"] - found["two_step_energy_distance"]
            self.distances = found
        return super().facts() | ({} if self.distances is None else {"metrics": self.distances})

    @torch.no_grad()
    def samples(self, count: int, steps: int) -> Tensor:
        """[count, d] in network units; the same noise for every arm and seed."""
        device = next(self.student.parameters()).device
        noise = torch.randn(count, *self.generator.shape, generator=torch.Generator().manual_seed(SEED)).to(device)
        later = torch.Generator(device).manual_seed(SEED + 1)
        classes = self.generator.num_classes
        cond = torch.arange(count, device=device) % classes if classes else None
        with evaluating(self.student):
            return self.generator.with_steps(steps)(noise, cond, later).flatten(1).float().cpu()
