"""Two-dimensional data for generators: points whose law is known exactly, so that what a sampler misses can be counted.

Every source returns `Splits` of float32 points [N, 2] in *data units*, drawn independently. `prepare` gives *network units*: the centre moved to the
origin and both coordinates divided by one number, so that a Gaussian stays round. The constants are those of the law, not of the sample: two sets
with other sizes and seeds have the same network units.

Units: D = 2 coordinates, K components.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from limbeck import seeds
from limbeck.contract import Data
from limbeck.data.arrays import ArrayData
from limbeck.data.splits import Joined, Splits, root
from limbeck.errors import InputError

Labels = Literal["component", "none"] | int
"""What a point's class is: the component that it was drawn from, nothing, or (a number n) the component's number modulo n."""

Draw = Callable[[int, torch.Generator], tuple[Tensor, Tensor]]
"""(count, generator) → points [count, 2] float64 and their components [count] int64."""


@dataclass(frozen=True, eq=False)
class Mixture:
    """Σ_k weights_k N(means_k, std² I): what points were drawn from.

    means_KD: [K, D] float64. std: of every component, in each coordinate. weights_K: [K] float64, their sum is 1.
    classes_K: [K] int64, the class of each component; None where the points have no labels.
    """

    means_KD: Tensor
    std: float
    weights_K: Tensor
    classes_K: Tensor | None = None

    def sample(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """`count` independent points [count, D] float64 and the component [count] int64 of each, on the CPU."""
        component_N = torch.multinomial(self.weights_K, count, replacement=True, generator=generator)
        noise_ND = torch.randn(count, self.means_KD.shape[1], dtype=torch.float64, generator=generator)
        return self.means_KD[component_N] + self.std * noise_ND, component_N

    def moments(self) -> tuple[Tensor, float]:
        """The mean [D] and the standard deviation of a coordinate: the root of the variance averaged over the coordinates."""
        return _moments(self.means_KD, self.weights_K, self.std**2)


class PointData(ArrayData):
    """Points in memory with the mixture that they were drawn from (None: their law is no mixture of Gaussians); see `mixture_of`."""

    mixture: Mixture | None = None


def mixture_of(data: Data) -> Mixture | None:
    """The mixture behind points, in data units, through subsets, replaced labels and joined parts; None where there is none."""
    whole = root(data)
    if isinstance(whole, Joined):
        return mixture_of(whole.parts[0])
    return whole.mixture if isinstance(whole, PointData) else None


def network_mixture_of(data: Data) -> Mixture | None:
    """`mixture_of` in the units of prepared points: means (m − mean) / std, deviations divided by std."""
    found, whole = mixture_of(data), root(data)
    if found is None:
        return None
    while isinstance(whole, Joined):
        whole = root(whole.parts[0])
    assert isinstance(whole, PointData)
    centre, scale = torch.tensor(whole.mean or (0.0,), dtype=torch.float64), whole.std[0] if whole.std else 1.0
    return replace(found, means_KD=(found.means_KD - centre) / scale, std=found.std / scale)


def gaussian_grid(
    side: int = 5,
    spacing: float = 1.0,
    std: float = 0.05,
    count: int = 20_000,
    test: int = 5_000,
    weights_ratio: float = 1.0,
    seed: int = 0,
    labels: Labels = "component",
    scale: float | None = 0.5,
) -> Splits:
    """side² Gaussians on a square grid about the origin, numbered row by row from below left.

    Args:
        side: Gaussians a side. spacing: between neighbours' centres. std: of each Gaussian. count, test: points of the training and the test set.
        weights_ratio: the first component's weight over the last one's; the weights fall geometrically with the number (1: all equal).
        seed: what the points depend on. labels: see `Labels`. scale: standard deviation of a coordinate in network units (the law's, averaged over the
            two coordinates); null: network units are data units.

    Raises:
        InputError: a number that is not possible (named).
    """
    _check(count, test, scale, side=side, spacing=spacing, std=std)
    places = (torch.arange(side, dtype=torch.float64) - (side - 1) / 2) * spacing
    y_KK, x_KK = torch.meshgrid(places, places, indexing="ij")
    return _from_mixture("gaussian_grid", torch.stack((x_KK.reshape(-1), y_KK.reshape(-1)), 1), std, weights_ratio, count, test, seed, labels, scale)


def gaussian_ring(
    modes: int = 8,
    radius: float = 4.0,
    std: float = 0.15,
    count: int = 20_000,
    test: int = 5_000,
    weights_ratio: float = 1.0,
    seed: int = 0,
    labels: Labels = "component",
    scale: float | None = 0.5,
) -> Splits:
    """Gaussians with evenly spaced centres on a circle about the origin, the first at (radius, 0), then anticlockwise.

    Args:
        modes: how many Gaussians. radius: of the circle. std: of each Gaussian. The others as in `gaussian_grid`; with labels = modes / 2 (an even
            number of modes) opposite Gaussians form a class.

    Raises:
        InputError: a number that is not possible (named).
    """
    _check(count, test, scale, modes=modes, radius=radius, std=std)
    angles_K = torch.arange(modes, dtype=torch.float64) * (2 * math.pi / modes)
    centres_KD = radius * torch.stack((angles_K.cos(), angles_K.sin()), 1)
    return _from_mixture("gaussian_ring", centres_KD, std, weights_ratio, count, test, seed, labels, scale)


def two_moons(
    count: int = 20_000,
    test: int = 5_000,
    noise: float = 0.05,
    seed: int = 0,
    labels: Labels = "component",
    scale: float | None = 0.5,
) -> Splits:
    """Two interleaved half circles of radius 1, drawn with equal odds, each uniform in the angle θ in [0, π].

    The upper moon is (cos θ, sin θ), the lower (1 − cos θ, 1/2 − sin θ). They are no mixture of Gaussians: `mixture_of` gives None.

    Args:
        noise: standard deviation of the normal noise added to every coordinate. The others as in `gaussian_grid`.

    Raises:
        InputError: a number that is not possible (named).
    """
    _check(count, test, scale)
    if not (math.isfinite(noise) and noise >= 0):
        raise InputError(f"the noise's standard deviation cannot be {noise}.", where="noise", fix="Give 0 or more.")

    def draw(number: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        lower_N = torch.randint(0, 2, (number,), generator=generator)
        theta_N = math.pi * torch.rand(number, dtype=torch.float64, generator=generator)
        upper_ND = torch.stack((theta_N.cos(), theta_N.sin()), 1)
        lower_ND = torch.stack((1 - theta_N.cos(), 0.5 - theta_N.sin()), 1)
        noise_ND = noise * torch.randn(number, 2, dtype=torch.float64, generator=generator)
        return torch.where(lower_N[:, None] == 1, lower_ND, upper_ND) + noise_ND, lower_N

    # E sin θ = 2/π, E sin² θ = E cos² θ = 1/2; both moons together: Var x = 3/4, E y² = (5/4 − 2/π) / 2
    centre = torch.tensor((0.5, 0.25), dtype=torch.float64)
    variance = (0.75 + (1.25 - 2 / math.pi) / 2 - 0.0625) / 2 + noise**2
    return _splits("two_moons", draw, (centre, math.sqrt(variance)), count, test, seed, labels, ("upper", "lower"), scale)


def checkerboard(
    side: int = 4,
    width: float = 1.0,
    count: int = 20_000,
    test: int = 5_000,
    seed: int = 0,
    labels: Labels = "component",
    scale: float | None = 0.5,
) -> Splits:
    """Uniform points on the dark fields of a board about the origin, numbered row by row from below left, where the first dark field is.

    They are no mixture of Gaussians: `mixture_of` gives None.

    Args:
        side: fields a side. width: of a field. The others as in `gaussian_grid`; the component is the field.

    Raises:
        InputError: a number that is not possible (named).
    """
    _check(count, test, scale, side=side, width=width)
    row_F, column_F = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    dark_F = (row_F + column_F) % 2 == 0
    centres_KD = (torch.stack((column_F[dark_F], row_F[dark_F]), 1).to(torch.float64) - (side - 1) / 2) * width

    def draw(number: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        field_N = torch.randint(0, len(centres_KD), (number,), generator=generator)
        return centres_KD[field_N] + width * (torch.rand(number, 2, dtype=torch.float64, generator=generator) - 0.5), field_N

    weights_K = torch.full((len(centres_KD),), 1 / len(centres_KD), dtype=torch.float64)
    moments = _moments(centres_KD, weights_K, width**2 / 12)
    return _splits("checkerboard", draw, moments, count, test, seed, labels, _names(len(centres_KD)), scale)


def geometric_weights(count: int, ratio: float) -> Tensor:
    """[count] float64, falling geometrically, their sum 1 and the first `ratio` times the last. Raises InputError where `ratio` is below 1."""
    if not (math.isfinite(ratio) and ratio >= 1):
        raise InputError(f"the largest weight cannot be {ratio} times the smallest.", where="weights_ratio", fix="Give 1 (equal weights) or more.")
    powers = torch.linspace(0, -1, count, dtype=torch.float64) if count > 1 else torch.zeros(1, dtype=torch.float64)
    weights_K = torch.tensor(ratio, dtype=torch.float64) ** powers
    return weights_K / weights_K.sum()


def _from_mixture(name: str, means_KD: Tensor, std: float, ratio: float, count: int, test: int, seed: int, labels: Labels, scale: float | None) -> Splits:
    law = Mixture(means_KD, std, geometric_weights(len(means_KD), ratio))
    made = _splits(name, law.sample, law.moments(), count, test, seed, labels, _names(len(means_KD)), scale)
    classes_K = _classes(torch.arange(len(means_KD)), labels, len(means_KD))
    for part in (made.train, made.test):
        assert isinstance(part, PointData)
        part.mixture = replace(law, classes_K=classes_K)
    return made


def _splits(
    name: str,
    draw: Draw,
    moments: tuple[Tensor, float],
    count: int,
    test: int,
    seed: int,
    labels: Labels,
    names: tuple[str, ...],
    scale: float | None,
) -> Splits:
    """Training and test points drawn by `seed` and the part's name, with the classes and the normalisation that were asked for."""
    mean, std = ((), ()) if scale is None else (tuple(moments[0].tolist()), (moments[1] / scale,))

    def part(number: int, purpose: str) -> PointData:
        points_ND, component_N = draw(number, seeds.generator(seed, name, purpose))
        targets_N = _classes(component_N, labels, len(names))
        classes = () if targets_N is None else names if isinstance(labels, str) else _names(labels)
        return PointData(points_ND.to(torch.float32), targets_N, classes, mean=mean, std=std)

    return Splits(part(count, "train"), part(test, "test"))


def _classes(component_N: Tensor, labels: Labels, components: int) -> Tensor | None:
    """The class of each point; None for no labels. Raises InputError where `labels` is none of the three forms."""
    if labels == "none":
        return None
    if labels == "component":
        return component_N
    if isinstance(labels, bool) or not isinstance(labels, int) or not 1 <= labels <= components:
        fix = f"Give component, none, or a number of classes from 1 to {components}."
        raise InputError(f"'{labels}' says nothing about labels.", where="labels", fix=fix)
    return component_N % labels


def _names(count: int) -> tuple[str, ...]:
    return tuple(str(k) for k in range(count))


def _moments(centres_KD: Tensor, weights_K: Tensor, variance: float) -> tuple[Tensor, float]:
    """Mean [D] and pooled standard deviation of a mixture of shapes whose coordinates vary by `variance` about their centres."""
    mean_D = weights_K @ centres_KD
    spread_D = weights_K @ (centres_KD - mean_D).square()
    return mean_D, math.sqrt(float(spread_D.mean()) + variance)


def _check(count: int, test: int, scale: float | None, **sizes: float) -> None:
    for name, whole in (("count", count), ("test", test), *((n, v) for n, v in sizes.items() if n in ("side", "modes"))):
        if isinstance(whole, bool) or not isinstance(whole, int) or whole < 1:
            raise InputError(f"'{name}' cannot be {whole}.", where=name, fix="Give a whole number of at least 1.")
    for name, size in (*sizes.items(), *([] if scale is None else [("scale", scale)])):
        if not (math.isfinite(size) and size > 0):
            raise InputError(f"'{name}' cannot be {size}.", where=name, fix="Give a positive number.")
