"""What the claim of f-distill (2502.15681) trains on: the exact denoiser of a grid of Gaussians, and a student that knows a corner of it only."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from limbeck import seeds
from limbeck.contract import Artefact, Batch, Clock, Frozen, Paper, Update
from limbeck.data import Splits
from limbeck.data.points import PointData, gaussian_grid, mixture_of, network_mixture_of
from limbeck.diffusion.denoisers import MixtureDenoiser, NetworkDenoiser, denoising_loss
from limbeck.diffusion.distribution import normal
from limbeck.diffusion.generator import Generator, Sampling, TeacherSampler, data_scale
from limbeck.diffusion.levels import LevelSpec
from limbeck.diffusion.schedules import EDM
from limbeck.errors import InputError
from limbeck.methods.generators._base import GeneratorMethod
from limbeck.methods.generators.f_distill import FDistill


def exact_grid_denoiser(grid: Mapping[str, Any]) -> MixtureDenoiser:
    """The exact denoiser, in network units and on EDM's schedule, of the points that `gaussian_grid` draws with these arguments.

    Raises:
        InputError: an argument is not possible.
    """
    return _exact(gaussian_grid(**(dict(grid) | {"count": 1, "test": 1})).train)


def grid_corner(grid: Mapping[str, Any], modes: Sequence[int]) -> Splits:
    """The points of some of a grid's Gaussians, in the network units of all of it and without labels.

    Raises:
        InputError: an argument is not possible, or there are no such Gaussians.
    """
    whole = gaussian_grid(**(dict(grid) | {"labels": "component"}))
    law = mixture_of(whole.train)
    assert law is not None
    if not modes or not all(0 <= mode < len(law.weights_K) for mode in modes):
        raise InputError(f"the modes {list(modes)} are not all among {len(law.weights_K)}.", where="modes")
    chosen = torch.tensor(sorted(set(modes)))
    kept = replace(law, means_KD=law.means_KD[chosen], weights_K=law.weights_K[chosen] / law.weights_K[chosen].sum(), classes_K=None)

    def part(data: Any) -> PointData:
        points, component = data.fetch(torch.arange(len(data)))
        found = PointData(points[torch.isin(component, chosen)], None, (), mean=data.mean, std=data.std)
        found.mixture = kept
        return found

    return Splits(part(whole.train), part(whole.test))


def _exact(data: Any) -> MixtureDenoiser:
    law = network_mixture_of(data)
    if law is None:
        raise InputError("the data are no mixture of Gaussians.", where="data")
    return MixtureDenoiser(EDM(), law.means_KD, torch.full((len(law.means_KD),), law.std, dtype=torch.float64), law.weights_K)


class KnownModesConfig(Frozen):
    """Knobs of `KnownModes`."""

    pairs: int = Field(4096, ge=1, description="noises with the sample that the exact sampler makes of them")
    steps: int = Field(18, ge=1, description="of that sampler (Heun)")
    below: LevelSpec = Field(LevelSpec(high=0.9), description="times at which the student learns to denoise")


class KnownModes(GeneratorMethod):
    """Fits a student to its data in both of its trades: as a one-step generator at the highest level (regression on pairs of noise and exact sample), as a
    denoiser at all lower ones, so that a critic may start as its copy."""

    Config = KnownModesConfig
    paper: ClassVar[Paper] = FDistill.paper
    needs_teacher = False

    def make_generator(self) -> Sampling:
        """The student in one call; the pairs. Raises InputError: the student is no network denoiser, or the data are no mixture."""
        if not isinstance(self.student, NetworkDenoiser):
            raise InputError(f"the student is {type(self.student).__name__}, no denoiser with a network.", where="student.model")
        self.denoiser, exact = self.student, TeacherSampler(_exact(self.train_data), self.config.steps)
        self.noise = normal(self.config.pairs, self.student.shape, seeds.generator(self.seed, "pairs"))
        with torch.no_grad():
            self.target = torch.cat([exact(part) for part in self.noise.split(512)])
        return Generator(self.student, self.student.schedule.few_steps(1), scale=data_scale(self.train_data, self.student.shape))

    def inference(self) -> nn.Module:
        """The denoiser itself, from which students of other methods start."""
        return self.denoiser

    def artefact(self) -> Artefact:
        """The denoiser."""
        return Artefact("denoiser", self.denoiser)

    def updates(self, batch: Batch, clock: Clock) -> Iterator[Update]:
        """Regression at the top plus denoising below it."""
        draw = clock.generator("noise")
        which = torch.randint(len(self.noise), (len(batch),), generator=draw, device=draw.device).cpu()
        noise, target = (source[which].to(batch.inputs) for source in (self.noise, self.target))
        top: Tensor = (self.generator(noise) - target).square().mean() / self.denoiser.sigma_data**2
        t = self.config.below.sample(self.denoiser.schedule, len(batch), draw)
        yield Update("student", top + denoising_loss(self.denoiser, batch.inputs, t, normal(len(batch), self.denoiser.shape, draw)))
