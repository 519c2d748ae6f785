"""Denoisers and generators by name, as recipes and saved artefacts build them: entries of `limbeck.models.CATALOGUE`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from pydantic import ValidationError
from torch import nn

from limbeck.components import Component, build
from limbeck.diffusion.denoisers import Denoiser, MixtureDenoiser, NetworkDenoiser, Precondition
from limbeck.diffusion.generator import DataScale, DirectGenerator, Generator, Mode
from limbeck.diffusion.networks import DenoisingNetwork, Embedding, MLPNetwork, UNetNetwork
from limbeck.diffusion.schedules import Kind, NoiseSchedule, make_schedule
from limbeck.errors import InputError
from limbeck.models import CATALOGUE

Schedule = str | Mapping[str, Any]


def schedule_of(schedule: Schedule) -> NoiseSchedule:
    """A schedule out of a recipe: a name, or {name: edm, t_max: 80}.

    Raises:
        InputError: there is no name, or it or an option is unknown.
    """
    if isinstance(schedule, str):
        return make_schedule(schedule)
    if not isinstance(schedule, Mapping) or "name" not in schedule:
        raise InputError("a schedule is a name or a mapping with a 'name'.", where="schedule", fix="Use edm, vp, cosine, flow or trig.")
    return make_schedule(str(schedule["name"]), **{str(k): v for k, v in schedule.items() if k != "name"})


def _embedding(embedding: Embedding | None, precondition: Precondition, schedule: NoiseSchedule) -> Embedding:
    """What suits the time that the network will be given."""
    if embedding is not None:
        return embedding
    return "positional" if precondition == "none" and schedule.name in ("vp", "cosine", "flow") else "smooth"


def mlp_denoiser(
    input_shape: Sequence[int],
    num_classes: int,
    widths: Sequence[int] = (128, 128, 128),
    schedule: Schedule = "edm",
    prediction: Kind = "x0",
    precondition: Precondition = "edm",
    sigma_data: float = 0.5,
    conditional: bool = True,
    dropout: float = 0.0,
    residual: bool = False,
    embedding: Embedding | None = None,
    time_frequencies: int = 8,
    fourier_scale: float = 1.0,
) -> NetworkDenoiser:
    """A perceptron as a denoiser, for points and small flattened images.

    Args:
        schedule: edm, vp, cosine, flow, trig, or {name: …, options}. prediction, precondition, sigma_data: see `NetworkDenoiser`.
        conditional: take the data's classes as conditions. embedding: of time; null: what suits the schedule.

    Raises:
        InputError: an argument is unknown or out of range.
    """
    made = schedule_of(schedule)
    network = MLPNetwork(
        input_shape, widths, num_classes=num_classes if conditional else 0, dropout=dropout, residual=residual,
        embedding=_embedding(embedding, precondition, made), time_frequencies=time_frequencies, fourier_scale=fourier_scale,
    )  # fmt: skip
    return NetworkDenoiser(network, made, prediction=prediction, precondition=precondition, sigma_data=sigma_data)


def unet_denoiser(
    input_shape: Sequence[int],
    num_classes: int,
    width: int = 32,
    multipliers: Sequence[int] = (1, 2),
    blocks: int = 1,
    schedule: Schedule = "edm",
    prediction: Kind = "x0",
    precondition: Precondition = "edm",
    sigma_data: float = 0.5,
    conditional: bool = True,
    dropout: float = 0.0,
    attention: Sequence[int] | None = None,
    embedding: Embedding | None = None,
    time_frequencies: int = 8,
    fourier_scale: float = 1.0,
) -> NetworkDenoiser:
    """A small U-Net as a denoiser, for images of 8×8 to 32×32.

    Args:
        width, multipliers, blocks, attention: see `UNetNetwork`. The others: as for `mlp_denoiser`.

    Raises:
        InputError: an argument is unknown or out of range.
    """
    made = schedule_of(schedule)
    network = UNetNetwork(
        input_shape, width=width, multipliers=multipliers, blocks=blocks, num_classes=num_classes if conditional else 0, dropout=dropout, attention=attention,
        embedding=_embedding(embedding, precondition, made), time_frequencies=time_frequencies, fourier_scale=fourier_scale,
    )  # fmt: skip
    return NetworkDenoiser(network, made, prediction=prediction, precondition=precondition, sigma_data=sigma_data)


def mixture_denoiser(
    means: Sequence[Sequence[float]],
    std: float | Sequence[float],
    weights: Sequence[float] | None = None,
    classes: Sequence[int] | None = None,
    schedule: Schedule = "edm",
) -> MixtureDenoiser:
    """The exact denoiser of a Gaussian mixture, as a teacher without error.

    Args:
        means: K points. std: one for all, or K. weights: K, need not sum to 1. classes: K class numbers, for conditions.

    Raises:
        InputError: the lengths do not fit together.
    """
    try:
        points = torch.tensor(means, dtype=torch.float64)
    except (TypeError, ValueError) as error:
        raise InputError("means must be points of equal length.", where="means") from error
    stds = torch.as_tensor(std, dtype=torch.float64).expand(len(points)) if isinstance(std, int | float) else torch.tensor(std, dtype=torch.float64)
    return MixtureDenoiser(
        schedule_of(schedule),
        points,
        stds.clone(),
        None if weights is None else torch.tensor(weights, dtype=torch.float64),
        None if classes is None else torch.tensor(classes),
    )


class NoiseMap(nn.Module):
    """A network that maps noise to samples directly: a `DenoisingNetwork` asked at time 0, its output moved by `offset`."""

    def __init__(self, network: DenoisingNetwork, offset: Sequence[float] = ()) -> None:
        super().__init__()
        self.network, self.shape, self.num_classes = network, network.shape, network.num_classes
        self.offset = nn.Parameter(torch.tensor(tuple(offset) or (0.0,) * network.shape[0]).view(-1, *[1] * (len(network.shape) - 1)))

    def reset_parameters(self) -> None:
        """Nothing of its own: the offset is where training starts."""

    def forward(self, noise: torch.Tensor, cond: torch.Tensor | None = None) -> torch.Tensor:
        """Noise [B, *shape] → samples [B, *shape]."""
        return self.network(noise, noise.new_zeros(len(noise)), cond) + self.offset


def mlp_generator(
    input_shape: Sequence[int], num_classes: int, widths: Sequence[int] = (64, 64, 64), conditional: bool = True, offset: Sequence[float] = ()
) -> NoiseMap:
    """A perceptron from noise to samples, which is no denoiser: a student of any smaller shape.

    Args:
        offset: added to the output at the start of training (a channel each), a parameter.

    Raises:
        InputError: an argument is out of range.
    """
    if offset and len(offset) != input_shape[0]:
        raise InputError(f"'offset' has {len(offset)} numbers for {input_shape[0]} channels.", where="offset")
    return NoiseMap(MLPNetwork(input_shape, widths, num_classes=num_classes if conditional else 0, zero_output=False), offset)


def inner_module(component: Mapping[str, Any], num_classes: int, input_shape: Sequence[int], where: str) -> nn.Module:
    """The module that a generator is built around. Raises InputError: it is no component, cannot be built, or is no module."""
    try:
        found = build(Component.model_validate(component), CATALOGUE, "model", num_classes=num_classes, input_shape=tuple(input_shape))
    except ValidationError as error:
        raise InputError("this is no component: give 'name' or 'target', with 'args'.", where=where) from error
    except InputError as error:
        raise error.at(where) from error
    if not isinstance(found, nn.Module):
        raise InputError("this builds no module.", where=where)
    return found


def generator(
    denoiser: Mapping[str, Any],
    times: Sequence[float],
    num_classes: int,
    input_shape: Sequence[int],
    mode: Mode = "renoise",
    share: float = 0.2,
    scale: Mapping[str, Any] | None = None,
) -> Generator:
    """A generator around a denoiser, as artefacts of kind 'generator' name it; see `Generator`.

    Raises:
        InputError: the denoiser cannot be built or is none, or the times do not fit it.
    """
    inner = inner_module(denoiser, num_classes, input_shape, "denoiser")
    if not isinstance(inner, Denoiser):
        raise InputError(f"{type(inner).__name__} is no denoiser.", where="denoiser")
    return Generator(inner, times, mode=mode, share=share, scale=artefact_scale(scale))


def artefact_scale(given: Mapping[str, Any] | None) -> DataScale:
    """The data scale of an artefact. Raises InputError: it is none."""
    try:
        return DataScale(**(given or {}))
    except (TypeError, ValueError) as error:
        raise InputError(f"this is no data scale: {error}.", where="scale", fix="Give mean, std and bounded.") from error


def direct_generator(module: Mapping[str, Any], num_classes: int, input_shape: Sequence[int], scale: Mapping[str, Any] | None = None) -> DirectGenerator:
    """A generator around a module that maps noise to samples; see `DirectGenerator`.

    Raises:
        InputError: the module cannot be built.
    """
    inner = inner_module(module, num_classes, input_shape, "module")
    return DirectGenerator(inner, input_shape, num_classes=int(getattr(inner, "num_classes", 0)), scale=artefact_scale(scale))
