"""Gradients through a whole inner training: of the distance between the weights it ends at and an expert's, in what it was trained on.

θ_{t+1} = θ_t − η v_t, v_t = μ v_{t−1} + g_t, v_{−1} = 0, g_t = ∇_θ ℓ_t(θ_t; X), t = 0..T−1, and L = Σ_j w_j ‖θ_{t_j} − θ*_j‖²/‖θ_0 − θ*_j‖² over targets j
(arXiv 2203.11932; momentum and intermediate targets: arXiv 2310.10541's code; our sheets `ftd`, eqs. 2 to 4, and `ast`, eqs. 7 to 10). Gradients, four ways:

    unroll      the graph of all T steps at once: exact, memory grows with T. What the released codes do.
    checkpoint  the same graph, of which every step keeps its inputs only and is taken again in the backward pass (torch.utils.checkpoint): exact.
    adjoint     exact, and one step's graph at a time (ours; our sheet on evaluation, part B). The default.
    tesla       an approximation (arXiv 2211.10586): every θ_t counts as a constant. It is the exact gradient for T = 1 only.

The adjoint: forward, T ordinary steps that leave θ_t and no graph. Backward, λ = ∂L/∂θ_{t+1} as far as it goes through later steps and targets, from λ = 0:

    λ ← λ + Σ_{j: t_j = t+1} (2 w_j/D_j)(θ_{t+1} − θ*_j),   κ ← μ κ + λ   (−ηκ is ∂L/∂v_t),
    ∂L/∂η −= ⟨κ, g_t⟩,   ∂L/∂X −= η ∂⟨κ, g_t⟩/∂X,   λ ← λ − η ∂⟨κ, g_t⟩/∂θ_t   (κ is a constant in the brackets).

κ makes ∂L/∂η = −Σ_t ⟨λ_{t+1}, v_t⟩ out of the g_t alone, so that no v_t is kept. TESLA's gradient is this sweep without the last update of λ.

Legend: P parameters, J targets. Results are detached; equal inputs give equal bits where the kernels of `step_loss` do.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from limbeck.errors import InputError, suggestion

Mode = Literal["unroll", "checkpoint", "adjoint", "tesla"]
"""How the gradient through the inner training is had."""
Tesla = Literal["formula", "released"]
"""TESLA's image gradient: as the paper has it, or half of it, as the released code does. The step size's gradient is the same."""
MODES: tuple[Mode, ...] = ("unroll", "checkpoint", "adjoint", "tesla")

StepLoss = Callable[[Tensor, Sequence[Tensor], int], Tensor]
"""(theta_P, variables, t) -> ℓ_t, a scalar: a deterministic function of its arguments. It may be asked for the same t twice, so batch and augmentation are
chosen by t, and both lie in the graph to the variables. Whatever else it uses must not require gradients."""


@dataclass(frozen=True)
class Target:
    """Where the weights should be after `step` inner steps: θ*_j [P] with the weight w_j in the loss."""

    step: int
    weights_P: Tensor
    weight: float = 1.0


class TrajectoryGradient(NamedTuple):
    """L, every target's own part of it ([J], without its weight), ∂L/∂X for every variable, ∂L/∂η, and θ_T [P]. All detached."""

    loss: Tensor
    losses_J: Tensor
    variables: tuple[Tensor, ...]
    step_size: Tensor
    end_P: Tensor


def trajectory_gradient(
    step_loss: StepLoss,
    variables: Sequence[Tensor],
    step_size: Tensor,
    start_P: Tensor,
    targets: Sequence[Target],
    steps: int,
    *,
    momentum: float = 0.0,
    mode: Mode = "adjoint",
    tesla: Tesla = "formula",
    origin_P: Tensor | None = None,
    keep_every: int = 1,
) -> TrajectoryGradient:
    """The loss of matching a trajectory and its gradients (our sheets `ftd`, eqs. 2 to 4, `ast`, eqs. 7 to 10, and on evaluation, part B).

    Args:
        step_loss: ℓ_t. variables: what is learned beside η (images, soft labels, ...), floating point; any shapes. step_size: η, one number.
        start_P: θ_0, a constant. targets: at steps 1..T, at least one at T. steps: T ≥ 1.
        momentum: μ in [0, 1) of the inner steps. mode: see the module; with "tesla" momentum is refused.
        origin_P: what the denominators D_j = ‖origin − θ*_j‖² are measured from (None: θ_0). They are constants.
        keep_every: the adjoint and TESLA keep every n-th θ_t (and v_t) and take the steps between them once more (1: keep all, T·P numbers).

    Raises:
        InputError: a target beyond the inner steps, none at the last, weights of another shape, a denominator that is 0 or not finite, momentum with TESLA,
            tesla="released" in another mode, or a number out of its range.
    """
    _check(variables, step_size, start_P, targets, steps, momentum, mode, tesla, keep_every)
    start_P = start_P.detach()
    goals = _goals(targets, start_P, start_P if origin_P is None else origin_P.detach())
    sources = [variable.detach() for variable in variables]
    with torch.enable_grad():
        if mode in ("adjoint", "tesla"):
            walk = _Walk(step_loss, sources, step_size.detach().to(start_P), momentum, mode == "adjoint")
            return walk.gradient(start_P, goals, steps, keep_every, 0.5 if tesla == "released" else 1.0, step_size)
        return _through_the_graph(step_loss, sources, step_size, start_P, goals, steps, momentum, mode == "checkpoint")


# ---- targets --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Goal:
    """One target: its step, θ*_j [P] like the start, w_j, and D_j, a scalar tensor."""

    step: int
    weights_P: Tensor
    weight: float
    denominator: Tensor

    def loss(self, theta_P: Tensor) -> Tensor:
        return (theta_P - self.weights_P).square().sum() / self.denominator

    def slope(self, theta_P: Tensor) -> Tensor:
        """w_j ∂L_j/∂θ, [P]."""
        return (theta_P - self.weights_P).mul_(2 * self.weight / self.denominator)


def _goals(targets: Sequence[Target], start_P: Tensor, origin_P: Tensor) -> list[_Goal]:
    """The targets on the start's device with their denominators, which are looked at once."""
    weights = [target.weights_P.detach().to(start_P) for target in targets]
    denominators_J = torch.stack([(origin_P - w_P).square().sum() for w_P in weights])
    if not bool(((denominators_J > 0) & denominators_J.isfinite()).all()):
        fix = "Choose an epoch at which the expert has moved; snapshots must be copies, not views of the weights that are trained."
        raise InputError("a target's distance from the start is 0 or not finite, and the loss divides by it.", where="targets", fix=fix)
    parts = zip(targets, weights, denominators_J.unbind(), strict=True)
    return [_Goal(target.step, w_P, target.weight, denominator) for target, w_P, denominator in parts]


def _total(losses: Sequence[Tensor], goals: Sequence[_Goal]) -> Tensor:
    """Σ_j w_j L_j."""
    return torch.stack([goal.weight * loss for goal, loss in zip(goals, losses, strict=True)]).sum()


# ---- one step's graph at a time --------------------------------------------------------------------------------------


class _State(NamedTuple):
    """θ_t [P] and v_{t−1} [P] (None: 0), detached."""

    theta_P: Tensor
    velocity_P: Tensor | None


class _Walk:
    """The adjoint's two sweeps; `exact` False is TESLA's."""

    def __init__(self, step_loss: StepLoss, sources: Sequence[Tensor], eta: Tensor, momentum: float, exact: bool) -> None:
        self.step_loss, self.sources, self.eta, self.momentum, self.exact = step_loss, sources, eta.reshape(()), momentum, exact
        self.leaves = [source.detach().requires_grad_() for source in sources]

    def gradient(self, start_P: Tensor, goals: Sequence[_Goal], steps: int, keep_every: int, factor: float, step_size: Tensor) -> TrajectoryGradient:
        """Forward to θ_T, then back. factor: on the variables' gradients."""
        losses: dict[int, Tensor] = {}
        kept: dict[int, _State] = {}
        state = _State(start_P, None)
        for t in range(steps - 1):
            if t % keep_every == 0:
                kept[t] = state
            state = self._after(state, self._slope(state.theta_P, t))
            self._measure(losses, goals, t + 1, state.theta_P)
        kept[steps - 1] = state
        # The last step is taken with its graph, with which the backward sweep begins: one pass fewer.
        theta_P, g_P = self._graph(state.theta_P, steps - 1)
        end_P = later_P = self._after(state, g_P.detach()).theta_P
        self._measure(losses, goals, steps, end_P)

        lambda_P, kappa_P, eta_gradient = torch.zeros_like(start_P), torch.zeros_like(start_P), torch.zeros_like(self.eta)
        sums = [torch.zeros_like(source) for source in self.sources]
        for t in reversed(range(steps)):
            for goal in goals:
                if goal.step == t + 1:
                    lambda_P += goal.slope(later_P)
            if t < steps - 1:
                self._fill(kept, t, keep_every)
                theta_P, g_P = self._graph(kept[t].theta_P, t)
            kappa_P = kappa_P.mul_(self.momentum).add_(lambda_P) if self.momentum else lambda_P
            eta_gradient -= torch.dot(kappa_P, g_P.detach())
            along = self._along(kappa_P, g_P, [*self.leaves, *([theta_P] if self.exact and t > 0 else [])])
            for total, part in zip(sums, along, strict=False):
                if part is not None:
                    total += part
            if len(along) > len(sums) and along[-1] is not None:
                lambda_P.addcmul_(along[-1], self.eta, value=-1)
            later_P = kept.pop(t).theta_P
            del theta_P, g_P, along
        gradients = tuple(total.mul_(-factor * self.eta) for total in sums)
        ordered = [losses[j] for j in range(len(goals))]
        return TrajectoryGradient(_total(ordered, goals), torch.stack(ordered), gradients, eta_gradient.to(step_size).view_as(step_size), end_P)

    @staticmethod
    def _along(kappa_P: Tensor, g_P: Tensor, wanted: Sequence[Tensor]) -> Sequence[Tensor | None]:
        """∂⟨κ, g_t⟩/∂ of what is wanted (None: no part of the graph); frees the graph."""
        return torch.autograd.grad(g_P, wanted, kappa_P, allow_unused=True) if wanted and g_P.requires_grad else [None] * len(wanted)

    def _measure(self, losses: dict[int, Tensor], goals: Sequence[_Goal], step: int, theta_P: Tensor) -> None:
        losses.update({j: goal.loss(theta_P) for j, goal in enumerate(goals) if goal.step == step})

    def _slope(self, theta_P: Tensor, t: int) -> Tensor:
        """g_t without a graph, and none to the variables on the way."""
        theta_P = theta_P.detach().requires_grad_()
        return torch.autograd.grad(self.step_loss(theta_P, self.sources, t), theta_P)[0]

    def _graph(self, theta_P: Tensor, t: int) -> tuple[Tensor, Tensor]:
        """θ_t as a leaf, and g_t with its graph to it and to the variables."""
        theta_P = theta_P.detach().requires_grad_()
        return theta_P, torch.autograd.grad(self.step_loss(theta_P, self.leaves, t), theta_P, create_graph=True)[0]

    def _after(self, state: _State, g_P: Tensor) -> _State:
        # Written as the unrolled step is, without fused operations: one rounding more or less turns a ReLU in some step, and float32 gradients then part.
        velocity_P = g_P if state.velocity_P is None else g_P + self.momentum * state.velocity_P
        return _State(state.theta_P - self.eta * velocity_P, velocity_P if self.momentum else None)

    def _fill(self, kept: dict[int, _State], t: int, keep_every: int) -> None:
        """Where the state at t was not kept: the steps from the last one before it that was, once more."""
        if t not in kept:
            for earlier in range(t - t % keep_every, t):
                kept[earlier + 1] = self._after(kept[earlier], self._slope(kept[earlier].theta_P, earlier))


# ---- the graph of all steps ------------------------------------------------------------------------------------------


def _through_the_graph(
    step_loss: StepLoss,
    sources: Sequence[Tensor],
    step_size: Tensor,
    start_P: Tensor,
    goals: Sequence[_Goal],
    steps: int,
    momentum: float,
    recompute: bool,
) -> TrajectoryGradient:
    """Unrolled training. recompute: every step keeps its inputs only."""
    leaves = [source.detach().requires_grad_() for source in sources]
    eta = step_size.detach().requires_grad_()

    def step(t: int, theta_P: Tensor, velocity_P: Tensor | None, rate: Tensor, *given: Tensor) -> tuple[Tensor, Tensor]:
        keep = torch.is_grad_enabled()  # False in the first pass of a checkpointed step, which needs g_t and no graph
        with torch.enable_grad():
            point_P = theta_P if keep and theta_P.requires_grad else theta_P.detach().requires_grad_()
            loss = step_loss(point_P, given if keep else [x.detach() for x in given], t)
            g_P = torch.autograd.grad(loss, point_P, create_graph=keep)[0]
        velocity_P = g_P if velocity_P is None else g_P + momentum * velocity_P
        return theta_P - rate.to(start_P).reshape(()) * velocity_P, velocity_P

    theta_P: Tensor = start_P
    velocity_P: Tensor | None = None
    losses: dict[int, Tensor] = {}
    for t in range(steps):
        before_P = velocity_P if momentum else None
        if recompute:
            theta_P, velocity_P = checkpoint(step, t, theta_P, before_P, eta, *leaves, use_reentrant=True, preserve_rng_state=False)
        else:
            theta_P, velocity_P = step(t, theta_P, before_P, eta, *leaves)
        losses.update({j: goal.loss(theta_P) for j, goal in enumerate(goals) if goal.step == t + 1})
    ordered = [losses[j] for j in range(len(goals))]
    total = _total(ordered, goals)
    total.backward(inputs=None if recompute else [*leaves, eta])  # a reentrant checkpoint takes no list of inputs
    gradients = tuple(torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in leaves)
    assert eta.grad is not None
    return TrajectoryGradient(total.detach(), torch.stack(ordered).detach(), gradients, eta.grad, theta_P.detach())


# ---- into the engine -------------------------------------------------------------------------------------------------


class _Given(torch.autograd.Function):
    """A scalar whose gradients are known already."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, gradients: tuple[Tensor, ...], *tensors: Tensor) -> Tensor:
        ctx.gradients = gradients  # constants: they may be asked for again by the next player's update
        return value.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        needed = ctx.needs_input_grad[2:]
        given = (grad_output.to(g) * g if need else None for g, need in zip(ctx.gradients, needed, strict=True))
        return None, None, *given


def with_gradients(value: Tensor, tensors: Sequence[Tensor], gradients: Sequence[Tensor]) -> Tensor:
    """A scalar equal to `value` whose backward pass gives each tensor its precomputed gradient, times what comes in.

    So that `Update("images", with_gradients(found.loss, [images], found.variables))` goes through the engine's own backward. It may be run several times.

    Args:
        value: a scalar, taken as a constant. tensors: leaves or not. gradients: one a tensor, of its shape.

    Raises:
        InputError: a gradient is missing or has another shape than its tensor.
    """
    if [tensor.shape for tensor in tensors] != [gradient.shape for gradient in gradients]:
        raise InputError("every tensor needs one gradient of its own shape.", where="gradients")
    result: Tensor = _Given.apply(value.detach(), tuple(gradient.detach() for gradient in gradients), *tensors)
    return result


# ---- input -----------------------------------------------------------------------------------------------------------


def _check(
    variables: Sequence[Tensor],
    step_size: Tensor,
    start_P: Tensor,
    targets: Sequence[Target],
    steps: int,
    momentum: float,
    mode: str,
    tesla: str,
    keep_every: int,
) -> None:
    """Raise InputError for what `trajectory_gradient` says; looks at no number on a device."""
    if mode not in MODES:
        raise InputError(f"unknown mode '{mode}'.", where="mode", fix=suggestion(mode, MODES))
    if tesla not in ("formula", "released"):
        raise InputError(f"unknown variant of TESLA '{tesla}'.", where="tesla", fix=suggestion(tesla, ("formula", "released")))
    if tesla == "released" and mode != "tesla":
        raise InputError(f"'released' halves TESLA's image gradient, and the mode is '{mode}'.", where="tesla", fix="Set the mode to 'tesla'.")
    if steps < 1 or keep_every < 1:
        raise InputError(f"inner steps and keep_every must be 1 or more, these are {steps} and {keep_every}.", where="steps")
    if not 0 <= momentum < 1:
        raise InputError(f"the inner momentum must lie in [0, 1), this is {momentum}.", where="momentum")
    if momentum and mode == "tesla":
        raise InputError("TESLA's formula has no momentum.", where="momentum", fix="Use the mode 'adjoint', which is exact and needs as little memory.")
    if step_size.numel() != 1:
        raise InputError(f"the step size is one number, this has the shape {list(step_size.shape)}.", where="step_size")
    if not all(variable.is_floating_point() for variable in (*variables, step_size, start_P)):
        raise InputError("variables, step size and weights must be floating point.", where="variables", fix="Keep hard labels inside step_loss.")
    if not any(target.step == steps for target in targets):
        raise InputError(f"no target at the last inner step {steps}.", where="targets", fix="Add one, or take fewer inner steps.")
    for j, target in enumerate(targets):
        if not 1 <= target.step <= steps:
            raise InputError(f"the target at step {target.step} lies beyond the inner steps 1 to {steps}.", where=f"targets.{j}.step")
        if start_P.dim() != 1 or target.weights_P.shape != start_P.shape:
            what = f"start and target must be vectors of one length, they have the shapes {list(start_P.shape)} and {list(target.weights_P.shape)}."
            raise InputError(what, where=f"targets.{j}.weights_P")
