"""How smooth a trajectory is, how flat it lies, and what errors do along it (arXiv 2310.10541 and 2211.11004; our sheets `ast` and `ftd`, eq. 5).

Legend: E+1 snapshots of P weights, from the initial ones on.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from limbeck.errors import InputError
from limbeck.synthetic.sharpness import perturbation


def _long_enough(path_EP: Tensor, least: int) -> None:
    if path_EP.dim() != 2 or len(path_EP) < least:
        raise InputError(f"a path of at least {least} snapshots of P weights is needed, this one has the shape {list(path_EP.shape)}.", where="path_EP")


def step_norms(path_EP: Tensor) -> Tensor:
    """‖θ_{e+1} − θ_e‖ for every epoch, [E].

    path_EP: [E+1, P].

    Raises:
        InputError: there are fewer than two snapshots.
    """
    _long_enough(path_EP, 2)
    return path_EP.diff(dim=0).norm(dim=1)


def largest_step(path_EP: Tensor) -> Tensor:
    """max_e ‖θ_{e+1} − θ_e‖, a scalar (our sheet `ast`, claim 2). Raises InputError as `step_norms`."""
    return step_norms(path_EP).max()


def roughness(path_EP: Tensor) -> Tensor:
    """Σ_e ‖θ_{e+1} − 2 θ_e + θ_{e−1}‖, the sum of second differences, a scalar; 0 where the weights move evenly along a line (our sheet `ast`, claim 2).

    path_EP: [E+1, P].

    Raises:
        InputError: there are fewer than three snapshots.
    """
    _long_enough(path_EP, 3)
    return path_EP.diff(n=2, dim=0).norm(dim=1).sum()


def accumulated_error(reached_P: Tensor, expert_P: Tensor, start_P: Tensor) -> Tensor:
    """‖ε_e‖ / ‖θ*_e − θ*_0‖ with ε_e = θ̂_e − θ*_e, over the last dimension (our sheet `ftd`, eq. 5 and claim b).

    Args:
        reached_P: θ̂_e [..., P], where training on the synthetic images is. expert_P: θ*_e. start_P: θ*_0.

    Raises:
        InputError: the expert has not moved from its start.
    """
    moved = (expert_P - start_P).norm(dim=-1)
    if bool((moved == 0).any()):
        raise InputError("the expert has not moved from its start, so that no error can be measured by its way.", where="expert_P", fix="Take a later epoch.")
    return (reached_P - expert_P).norm(dim=-1) / moved


class ErrorParts(NamedTuple):
    """The three terms of ε_{e+E} = ε_e + I(θ*_e, ε_e) + δ_{e+E}, each [P]: carried over, of the displaced start, of the matching."""

    carried: Tensor
    start: Tensor
    matching: Tensor


def error_parts(reached_P: Tensor, expert_P: Tensor, target_P: Tensor, displacement: Callable[[Tensor], Tensor]) -> ErrorParts:
    """Where the error after E more epochs comes from (our sheet `ftd`, eq. 5); the parts add up to θ̂_e + U(θ̂_e) − θ*_{e+E}.

    Args:
        reached_P: θ̂_e [P]. expert_P: θ*_e [P]. target_P: θ*_{e+E} [P].
        displacement: U_S, weights [P] -> how far T steps on the synthetic images move them, [P].
    """
    from_expert_P = displacement(expert_P)
    return ErrorParts(reached_P - expert_P, displacement(reached_P) - from_expert_P, expert_P + from_expert_P - target_P)


def sharpness(loss: Callable[[Tensor], Tensor], theta_P: Tensor, rho: float) -> Tensor:
    """Loss(θ + ρ v) − Loss(θ) with v = ∇Loss(θ)/‖∇Loss(θ)‖, one step of ascent, a detached scalar (our sheet `ftd`, eq. 6 and claim b).

    Args:
        loss: weights [P] -> scalar, the same function every time it is called. theta_P: [P]. rho: ρ.
    """
    start_P = theta_P.detach().clone().requires_grad_()
    value = loss(start_P)
    (g_P,) = torch.autograd.grad(value, start_P)
    with torch.no_grad():
        return loss(start_P + perturbation(start_P, g_P, rho, adaptive=False)) - value
