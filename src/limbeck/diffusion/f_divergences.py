"""f-divergences D_f(p‖q) = E_q[f(p/q)] and what they weigh a score difference with (arXiv 2502.15681, table 1; our sheet `f_distill`, eqs. 1 and 2).

    ∇_θ D_f(p‖q_θ) = −E[ h(r(x)) (∇ log p − ∇ log q)(x) ∂x/∂θ ],   h(r) = f''(r) r²,   r = p/q,

so that every f differs from the reverse KL only by one number per sample. Shapes: r and what comes out are elementwise, of any shape, r > 0; f is convex,
f(1) = 0. The factors are those of f, so that D_f and its gradient agree exactly (FastGen's h of `squared_hellinger` is 4 times, of `neyman` half of ours;
weights of mean one do not see the difference). `neyman` is in FastGen's code only; `pearson` is ours, for completeness.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from limbeck.errors import InputError, suggestion

Name = Literal["reverse_kl", "softened_reverse_kl", "jensen_shannon", "squared_hellinger", "forward_kl", "jeffreys", "neyman", "pearson"]
Amount = Literal["none", "low", "medium", "high", "very high"]


@dataclass(frozen=True)
class Divergence(ABC):
    """One f with its h. mode_seeking: how much it prefers to leave modes out; variance: of the weights h, where the ratio is far from 1 (the paper's words)."""

    mode_seeking: Amount
    variance: Amount

    @abstractmethod
    def f(self, r: Tensor) -> Tensor:
        """The generator f(r)."""

    @abstractmethod
    def h(self, r: Tensor) -> Tensor:
        """f''(r) r², at least 0."""


class ReverseKL(Divergence):
    """KL(q‖p): f = −log r, h = 1."""

    def f(self, r: Tensor) -> Tensor:
        """−log r."""
        return -r.log()

    def h(self, r: Tensor) -> Tensor:
        """1, of r's shape."""
        return torch.ones_like(r)


class SoftenedReverseKL(Divergence):
    """f = (r + 1) log(1/2 + 1/(2r)), h = 1/(r + 1)."""

    def f(self, r: Tensor) -> Tensor:
        """(r + 1) log((r + 1)/(2r))."""
        return (r + 1) * (torch.log1p(1 / r) - math.log(2))

    def h(self, r: Tensor) -> Tensor:
        """1/(r + 1)."""
        return 1 / (r + 1)


class JensenShannon(Divergence):
    """f = r log r − (r + 1) log((r + 1)/2), h = r/(r + 1)."""

    def f(self, r: Tensor) -> Tensor:
        """r log r − (r + 1) log((r + 1)/2)."""
        return r * r.log() - (r + 1) * ((r + 1) / 2).log()

    def h(self, r: Tensor) -> Tensor:
        """r/(r + 1)."""
        return r / (r + 1)


class SquaredHellinger(Divergence):
    """f = 1 − √r, h = √r/4."""

    def f(self, r: Tensor) -> Tensor:
        """1 − √r."""
        return 1 - r.sqrt()

    def h(self, r: Tensor) -> Tensor:
        """√r/4."""
        return r.sqrt() / 4


class ForwardKL(Divergence):
    """KL(p‖q): f = r log r, h = r."""

    def f(self, r: Tensor) -> Tensor:
        """r log r."""
        return r * r.log()

    def h(self, r: Tensor) -> Tensor:
        """r."""
        return r


class Jeffreys(Divergence):
    """KL(p‖q) + KL(q‖p): f = (r − 1) log r, h = r + 1."""

    def f(self, r: Tensor) -> Tensor:
        """(r − 1) log r."""
        return (r - 1) * r.log()

    def h(self, r: Tensor) -> Tensor:
        """r + 1."""
        return r + 1


class Neyman(Divergence):
    """Neyman's χ²: f = 1/r − 1, h = 2/r."""

    def f(self, r: Tensor) -> Tensor:
        """1/r − 1."""
        return 1 / r - 1

    def h(self, r: Tensor) -> Tensor:
        """2/r."""
        return 2 / r


class Pearson(Divergence):
    """Pearson's χ²: f = (r − 1)², h = 2 r²."""

    def f(self, r: Tensor) -> Tensor:
        """(r − 1)²."""
        return (r - 1).square()

    def h(self, r: Tensor) -> Tensor:
        """2 r²."""
        return 2 * r.square()


DIVERGENCES: dict[Name, Divergence] = {
    "reverse_kl": ReverseKL("high", "none"),
    "softened_reverse_kl": SoftenedReverseKL("high", "low"),
    "jensen_shannon": JensenShannon("medium", "low"),
    "squared_hellinger": SquaredHellinger("medium", "low"),
    "forward_kl": ForwardKL("none", "high"),
    "jeffreys": Jeffreys("none", "high"),
    "neyman": Neyman("very high", "high"),
    "pearson": Pearson("none", "very high"),
}


def divergence(name: str) -> Divergence:
    """The divergence of this name.

    Raises:
        InputError: there is none.
    """
    if name not in DIVERGENCES:
        raise InputError(f"unknown divergence '{name}'.", where="divergence", fix=suggestion(name, get_args(Name)))
    return DIVERGENCES[name]
