"""Directions towards flat minima: SAM and GSAM on flat vectors, for the experts of FTD (arXiv 2211.11004; our sheet `ftd`, eqs. 6 to 10).

Legend: P parameters of one network; a leading "..." is any number of networks that go at once: every norm and product runs over the last dimension alone.
The weights are never written to, so that there is nothing to restore after the ascent.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from pydantic import Field
from torch import Tensor

from limbeck.contract import Frozen

SMALLEST = 1e-12
"""Added to every norm that is divided by (the released code's)."""


class SharpnessSpec(Frozen):
    """Which sharpness-aware direction takes the place of the gradient; a step costs exactly two forward and backward passes.

    sam_mix: the paper's (6), (1 − α) g + α g_p, whose α = 1 is SAM. gsam: what the released code runs, (7) to (10), whose α = 0 is SAM. The two α do not
    mean the same thing.
    """

    mode: Literal["sam_mix", "gsam"] = Field("gsam", description="'sam_mix': the paper's (6); 'gsam': the released code's (7) to (10)")
    rho: float = Field(0.01, ge=0, description="ρ, length of the ascent (released run script and readme; its argument parser's 2.0 is not meant)")
    alpha: float | None = Field(
        None,
        ge=0,
        description="α of the mode; none: 0.4 with 'gsam' (released default), 0.3 with 'sam_mix' (paper's table for CIFAR-10, 1 and 10 images a class)",
    )
    adaptive: bool | None = Field(
        None, description="whether the ascent is scaled by the weights, (7); none: with 'gsam' (released code), not with 'sam_mix' (6)"
    )

    def weight(self) -> float:
        """α, with the mode's default."""
        return self.alpha if self.alpha is not None else {"gsam": 0.4, "sam_mix": 0.3}[self.mode]

    def scaled(self) -> bool:
        """Whether the ascent is the adaptive one, with the mode's default."""
        return self.adaptive if self.adaptive is not None else self.mode == "gsam"


def _norm(x: Tensor) -> Tensor:
    return x.norm(dim=-1, keepdim=True)


def perturbation(theta: Tensor, g: Tensor, rho: float, adaptive: bool) -> Tensor:
    """The ascent e, eq. 7: ρ θ⊙θ⊙g / (‖|θ|⊙g‖ + 1e-12) where adaptive, else ρ g / (‖g‖ + 1e-12).

    theta, g: [..., P] weights and gradient. rho: ρ ≥ 0.
    """
    if adaptive:
        return rho * theta.square() * g / (_norm(theta.abs() * g) + SMALLEST)
    return rho * g / (_norm(g) + SMALLEST)


def sam_mix(g: Tensor, g_p: Tensor, alpha: float) -> Tensor:
    """The paper's direction, eq. 6: (1 − α) g + α g_p; α = 0 is plain descent, α = 1 SAM.

    g, g_p: [..., P] gradients at the weights and at the ascended weights.
    """
    return (1 - alpha) * g + alpha * g_p


def gsam_direction(g: Tensor, g_p: Tensor, alpha: float) -> Tensor:
    """The released code's direction, eqs. 9 and 10: d = g_p − α g_⊥, with g_⊥ the part of g that is orthogonal to g_p; α = 0 is SAM, and ⟨d, g_p⟩ = ‖g_p‖².

    g, g_p: [..., P] gradients at the weights and at the ascended weights.
    """
    length, length_p = _norm(g), _norm(g_p)
    cosine = (g * g_p).sum(-1, keepdim=True) / (length * length_p + SMALLEST)
    orthogonal = g - cosine * length * g_p / (length_p + SMALLEST)
    return g_p - alpha * orthogonal


def descent_direction(spec: SharpnessSpec | None, gradient: Callable[[Tensor], tuple[Tensor, Tensor]], theta: Tensor) -> tuple[Tensor, Tensor]:
    """The direction that takes the gradient's place in a step, and the value of the loss at `theta` itself.

    Args:
        spec: which direction; None: the gradient (one pass).
        gradient: weights [..., P] -> (gradient [..., P], loss [...]), of the same batch and the same augmentation every time it is called.
        theta: [..., P] the weights; they are not changed.

    Returns:
        d [..., P] and the loss [...].
    """
    g, value = gradient(theta)
    if spec is None:
        return g, value
    g_p, _ = gradient(theta + perturbation(theta, g, spec.rho, spec.scaled()))
    return (gsam_direction if spec.mode == "gsam" else sam_mix)(g, g_p, spec.weight()), value
