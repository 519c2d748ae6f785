"""FTD: flat-trajectory distillation (arXiv 2211.11004), with MTT (arXiv 2203.11932) as its special case.

FTD's experts are trained towards flat minima (`teacher.experts.sharpness`), so that a network that is a little off the expert's path, as every network
trained on the images is, stays near it; and the images that come out are a moving average (equation 11). With experts of plain SGD and no average it is MTT.

The paper's: (5), (6), the average, the table of settings. The released code runs GSAM with an adaptive perturbation, (7) to (10), instead of (6): both are
modes of the experts. Ours: the exact gradient in constant memory (the official code unrolls all steps), η kept positive, the last images are what counts, and
fresh networks judge the average (the official code goes on with a network that the images themselves have trained). The average starts at the images after
the first step, not before it.

Legend: S images, η step size, θ*_e an expert after e epochs, U_S(θ) the displacement by T steps on S from θ.
    ε_{e+E} = ε_e + I(θ*_e, ε_e) + δ_{e+E},  I(θ, ε) = U_S(θ + ε) − U_S(θ)      (5)  δ is what matching makes small, I what flat experts do
    S̄ ← κ S̄ + (1 − κ) S  after each outer step                                   (11)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from pydantic import Field

from limbeck.contract import Batch, Clock, Paper, Update
from limbeck.methods.datasets.matching_part import MatchingConfig, TrajectoryMatching

MOSTLY_START = 0.1
"""The share κ^steps of the first images in the average that is told (ours)."""


class FTDConfig(MatchingConfig):
    """Knobs of `FTD`."""

    image_ema: float = Field(0.999, ge=0, lt=1, description="κ of the images' moving average (CIFAR-10: .9999, .9995, .999); 0: none (MTT)")


class FTD(TrajectoryMatching):
    """Images on which a network that starts at an expert's weights lands where the expert went."""

    Config = FTDConfig
    paper = Paper(
        title="Minimizing the Accumulated Trajectory Error to Improve Dataset Distillation",
        arxiv="2211.11004",
        venue="CVPR",
        year=2023,
        official_code="https://github.com/AngusDujw/FTD-distillation",
    )

    def image_average(self) -> float | None:
        """κ, where there is an average."""
        return self.config.image_ema or None

    def updates(self, batch: Batch, clock: Clock) -> Iterator[Update]:
        """As all that match trajectories do."""
        self.length = clock.steps
        yield from super().updates(batch, clock)

    def notice(self, row: Mapping[str, float]) -> Sequence[str]:
        """As all that match trajectories do; and, at the end, an average that is still mostly of the first images."""
        left = self.config.image_ema**self.length
        if row.get("progress", 0.0) < 1 or left <= MOSTLY_START:
            return super().notice(row)
        text = f"the images' average still holds {left:.0%} of the first ones: lower image_ema ({self.config.image_ema:g}), or train longer."
        return [*super().notice(row), text]
