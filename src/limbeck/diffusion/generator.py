"""Generators: what comes out of distillation, a module that turns noise into samples in one or a few calls, and says how.

A generator carries its schedule, kind of prediction, list of times and data scale, so that one saved folder is enough to sample from.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from limbeck import seeds
from limbeck.contract import Data
from limbeck.data import preprocessing
from limbeck.diffusion import samplers
from limbeck.diffusion.denoisers import Denoiser
from limbeck.diffusion.schedules import times_descend
from limbeck.errors import InputError
from limbeck.modes import evaluating

Mode = Literal["renoise", "ode", "gamma"]


class DataScale(nn.Module):
    """From network units to data units: x·std + mean a channel, images kept within [0, 1]."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float] = (), std: Sequence[float] = (), *, bounded: bool = False) -> None:
        super().__init__()
        self.bounded = bounded
        self.register_buffer("mean", torch.tensor(tuple(mean) or (0.0,)), persistent=False)
        self.register_buffer("std", torch.tensor(tuple(std) or (1.0,)), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Samples [B, C, ...] in network units → data units."""
        shape = (-1, *[1] * (x.dim() - 2))
        scaled = x * self.std.to(x).view(shape) + self.mean.to(x).view(shape)
        return scaled.clamp(0, 1) if self.bounded else scaled

    @property
    def arguments(self) -> dict[str, Any]:
        """What builds the same scale again."""
        return {"mean": self.mean.tolist(), "std": self.std.tolist(), "bounded": self.bounded}


def data_scale(data: Data | None, shape: Sequence[int]) -> DataScale:
    """From network units back to the data's, as they were normalised; images (samples of one or three channels) are kept within [0, 1]. Fetches nothing."""
    said: Mapping[str, Any] = {} if data is None else preprocessing(data)
    return DataScale(said.get("mean", ()), said.get("std", ()), bounded=len(shape) == 3 and shape[0] in (1, 3))


class Sampling(nn.Module, ABC):
    """What `limbeck.load` returns for a generator. Attributes: shape (of one sample), num_classes, scale, and `calls` (network calls a sample)."""

    builder: ClassVar[str] = ""
    """Name in `limbeck.models.CATALOGUE` of what builds it again, from `arguments` and the module within, which it takes as `inner`."""
    inner: ClassVar[str] = "denoiser"
    shape: tuple[int, ...]
    num_classes: int
    scale: DataScale

    @property
    @abstractmethod
    def calls(self) -> int:
        """Network calls a sample takes."""

    @property
    def arguments(self) -> Mapping[str, Any]:
        """What, beside the module within, builds this generator again (JSON values)."""
        return {}

    @abstractmethod
    def forward(self, noise: Tensor, cond: Tensor | None = None, generator: torch.Generator | None = None) -> Tensor:
        """Standard normal noise [B, *shape] → samples [B, *shape] in network units; `generator` draws what is needed between steps."""

    def with_steps(self, steps: int) -> Sampling:
        """The same weights with another number of steps. Raises InputError where there is but one way to sample."""
        if steps != self.calls:
            raise InputError(f"this generator samples in {self.calls} call{'s' * (self.calls != 1)} only.", where="steps", fix="Leave it out.")
        return self

    def sample(
        self,
        count: int,
        *,
        labels: int | Sequence[int] | Tensor | None = None,
        steps: int | None = None,
        seed: int = 0,
        batch_size: int = 256,
    ) -> Tensor:
        """[count, *shape] samples in data units (images in [0, 1]), a function of the seed, without gradient.

        labels: one class, or [count] of them; None: classes in turn where the generator has any. steps: another number of calls, where that is possible.
        batch_size: the start noise does not depend on it; noise drawn between the calls does.

        Raises:
            InputError: a label is out of range, the count, steps or batch size are not possible.
        """
        if batch_size < 1:
            raise InputError(f"a batch holds at least one sample, not {batch_size}.", where="batch_size")
        chosen = self if steps is None else self.with_steps(steps)
        device = next(iter((*self.parameters(), *self.buffers())), torch.empty(0)).device
        cond = self.conditions(count, labels)
        noise, found = torch.randn(count, *self.shape, generator=torch.Generator().manual_seed(seed)), []
        later = seeds.generator(seed, "between", device=device)
        with torch.no_grad(), evaluating(self):
            for first in range(0, count, batch_size):
                part = slice(first, first + batch_size)
                found.append(chosen(noise[part].to(device), None if cond is None else cond[part].to(device), later))
        return self.scale(torch.cat(found))

    def conditions(self, count: int, labels: int | Sequence[int] | Tensor | None = None) -> Tensor | None:
        """[count] int64 labels as `sample` uses them, or None for a generator without classes.

        Raises:
            InputError: fewer than one sample, or labels that the generator does not have.
        """
        if count < 1:
            raise InputError(f"at least one sample must be asked for, not {count}.", where="count")
        if not self.num_classes:
            if labels is not None:
                raise InputError("this generator has no classes.", where="labels", fix="Leave the labels out.")
            return None
        if labels is None:
            return torch.arange(count) % self.num_classes
        try:
            given = torch.as_tensor(labels).reshape(-1)
        except (TypeError, ValueError, RuntimeError) as error:
            raise InputError("labels are whole numbers.", where="labels") from error
        if len(given) and (given.is_floating_point() or given.is_complex()):
            raise InputError("labels are whole numbers.", where="labels")
        found = given.long().cpu()
        found = found.expand(count) if len(found) == 1 else found
        if len(found) != count:
            raise InputError(f"there are {len(found)} labels for {count} samples.", where="labels")
        if int(found.min()) < 0 or int(found.max()) >= self.num_classes:
            raise InputError(f"labels run from {int(found.min())} to {int(found.max())}, the classes from 0 to {self.num_classes - 1}.", where="labels")
        return found


class Generator(Sampling):
    """A denoiser used as a generator: K calls at a stored list of times, K = 1 being one call at the top (our sheet, §10.4).

    times: descending; the step after the last goes to the data. mode: 'renoise' (fresh noise between the calls), 'ode' (DDIM), 'gamma' (a share γ of it).

    Raises:
        InputError: the times do not descend or lie outside the schedule, the mode is unknown, or γ is not in [0, 1].
    """

    builder = "generator"

    def __init__(self, denoiser: Denoiser, times: Sequence[float], *, mode: Mode = "renoise", share: float = 0.2, scale: DataScale | None = None) -> None:
        super().__init__()
        times_descend(times)
        if times[0] > denoiser.schedule.t_max * (1 + 1e-9) or times[-1] < denoiser.schedule.t_min:
            raise InputError(f"the times {list(times)} are not all within {denoiser.schedule}.", where="times")
        if mode not in ("renoise", "ode", "gamma"):
            raise InputError(f"unknown mode '{mode}'.", where="mode", fix="Use renoise, ode or gamma.")
        if not 0 <= share <= 1:
            raise InputError(f"γ must be in [0, 1], not {share}.", where="share")
        self.denoiser, self.times, self.mode, self.share = denoiser, tuple(float(t) for t in times), mode, share
        self.shape, self.num_classes, self.scale = denoiser.shape, denoiser.num_classes, scale or DataScale()

    @property
    def calls(self) -> int:
        """As many as there are times."""
        return len(self.times)

    def start(self, noise: Tensor) -> Tensor:
        """What the first call is given: the noise at the level of times[0]."""
        return self.denoiser.schedule.start(noise, samplers.at(self.times[0], noise))

    def call(self, x_t: Tensor, k: int, cond: Tensor | None = None) -> Tensor:
        """The k-th call (from 0): x̂0 of an input at times[k]. Gradient flows."""
        return self.denoiser(x_t, samplers.at(self.times[k], x_t), cond)

    def forward(self, noise: Tensor, cond: Tensor | None = None, generator: torch.Generator | None = None) -> Tensor:
        """Noise [B, *shape] → samples [B, *shape] in network units."""
        x = self.start(noise)
        if self.mode == "ode":
            return samplers.ddim(self.denoiser, x, self.times, cond)
        if self.mode == "gamma":
            return samplers.gamma(self.denoiser, x, self.times, cond, share=self.share, generator=generator)
        return samplers.renoise(self.denoiser, x, self.times, cond, generator=generator)

    @torch.no_grad()
    def simulate(self, k: int, noise: Tensor, cond: Tensor | None = None, *, generator: torch.Generator | None = None) -> Tensor:
        """The input of the k-th call as sampling in the mode 'renoise' makes it, without gradient (DMD2's backward simulation, arXiv 2405.14867, §4.5).

        k = 0: the start itself. Else k calls at times[0..k−1] with fresh noise between them, and the last x̂0 noised to times[k] independently.

        Raises:
            InputError: there is no k-th call.
        """
        if not 0 <= k < len(self.times):
            raise InputError(f"there is no call {k} of {len(self.times)}.", where="k")
        x = self.start(noise)
        for now, after in zip(self.times[:k], self.times[1 : k + 1], strict=True):
            x0 = self.denoiser(x, samplers.at(now, x), cond)
            fresh = torch.randn(x.shape, dtype=x.dtype, device=x.device, generator=generator)
            x = self.denoiser.schedule.add_noise(x0, fresh, samplers.at(after, x))
        return x

    def with_steps(self, steps: int) -> Generator:
        """The same weights at the list of times for another number of steps."""
        if steps == len(self.times):
            return self
        return Generator(self.denoiser, self.denoiser.schedule.few_steps(steps), mode=self.mode, share=self.share, scale=self.scale)

    @property
    def arguments(self) -> Mapping[str, Any]:
        """What, beside the denoiser, builds this generator again (JSON values)."""
        return {"times": list(self.times), "mode": self.mode, "share": self.share, "scale": self.scale.arguments}


class DirectGenerator(Sampling):
    """Any module that maps noise to samples in one call, of no schedule: module(noise) or module(noise, cond)."""

    builder, inner = "direct_generator", "module"

    def __init__(self, module: nn.Module, shape: Sequence[int], *, num_classes: int = 0, scale: DataScale | None = None) -> None:
        super().__init__()
        self.module, self.shape, self.num_classes, self.scale = module, tuple(shape), num_classes, scale or DataScale()

    @property
    def calls(self) -> int:
        """One."""
        return 1

    def forward(self, noise: Tensor, cond: Tensor | None = None, generator: torch.Generator | None = None) -> Tensor:
        """Noise [B, *shape] → samples [B, *shape]."""
        made: Tensor = self.module(noise, cond) if self.num_classes else self.module(noise)
        return made.to(noise.dtype)  # autocast may have rounded it

    @property
    def arguments(self) -> Mapping[str, Any]:
        """What builds it again, beside the module."""
        return {"scale": self.scale.arguments}


class TeacherSampler(Sampling):
    """A denoiser with its many-step sampler: the teacher as a generator, for comparison."""

    def __init__(self, denoiser: Denoiser, steps: int, *, sampler: str = "heun", scale: DataScale | None = None) -> None:
        super().__init__()
        if sampler not in samplers.SAMPLERS:
            raise InputError(f"unknown sampler '{sampler}'.", where="sampler", fix=f"Known: {', '.join(samplers.SAMPLERS)}.")
        self.denoiser, self.steps, self.sampler = denoiser, steps, sampler
        self.times = denoiser.schedule.steps(steps)
        self.shape, self.num_classes, self.scale = denoiser.shape, denoiser.num_classes, scale or DataScale()

    @property
    def calls(self) -> int:
        """Steps, or 2·steps − 1 with Heun's."""
        return samplers.calls(self.sampler, self.steps)

    def forward(self, noise: Tensor, cond: Tensor | None = None, generator: torch.Generator | None = None) -> Tensor:
        """Noise [B, *shape] → samples [B, *shape] in network units."""
        x = self.denoiser.schedule.start(noise, samplers.at(self.times[0], noise))
        stochastic = {"generator": generator} if self.sampler in ("renoise", "gamma") else {}
        return samplers.SAMPLERS[self.sampler](self.denoiser, x, self.times, cond, **stochastic)
