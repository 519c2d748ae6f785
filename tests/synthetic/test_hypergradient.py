"""Gradients through an inner training: four ways, closed forms, invariants (our sheet on evaluation, part B; `ftd`; `ast`)."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from limbeck.errors import InputError
from limbeck.models.small import convnet3
from limbeck.seeds import generator
from limbeck.synthetic.flat import FlatNetwork
from limbeck.synthetic.hypergradient import StepLoss, Target, TrajectoryGradient, trajectory_gradient, with_gradients

EXACT = ("unroll", "checkpoint", "adjoint")
CLASSES, COUNT, SHAPE = 3, 6, (2, 8, 8)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Problem:
    """A ConvNet on a few images with soft labels; each step takes its own batch and its own random transform, both chosen by t alone."""

    def __init__(self, *, batch: int | None = None, transform: bool = False, seed: int = 0) -> None:
        self.net = FlatNetwork(convnet3(CLASSES, SHAPE, width=4).double())
        self.images, self.soft, self.eta = drawn(COUNT, *SHAPE, seed=seed + 1), drawn(COUNT, CLASSES, seed=seed + 2), torch.tensor(0.2, dtype=torch.float64)
        self.start = 0.3 * drawn(self.net.size, seed=seed + 3)
        self.batch, self.transform, self.calls = batch, transform, 0

    def target(self, step: int, weight: float = 1.0) -> Target:
        return Target(step, self.start + 0.1 * drawn(self.net.size, seed=100 + step), weight)

    def loss(self, theta: Tensor, variables: Sequence[Tensor], t: int) -> Tensor:
        self.calls += 1
        images, soft = variables
        draw = generator("step", t)
        if self.batch is not None:
            chosen = torch.randperm(COUNT, generator=draw)[: self.batch]
            images, soft = images[chosen], soft[chosen]
        if self.transform:
            images = images.roll(int(torch.randint(-2, 3, (), generator=draw)), -1) * (0.5 + torch.rand(len(images), 1, 1, 1, generator=draw).double())
        return F.cross_entropy(self.net(theta, images), soft.softmax(1))

    def gradient(self, steps: int, targets: Sequence[Target] | None = None, **options: Any) -> TrajectoryGradient:
        targets = [self.target(steps)] if targets is None else targets
        return trajectory_gradient(self.loss, [self.images, self.soft], options.pop("eta", self.eta), self.start, targets, steps, **options)


def error(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


def assert_same(found: TrajectoryGradient, wanted: TrajectoryGradient, within: float = 1e-10) -> None:
    for a, b in zip(
        (*found.variables, found.step_size, found.losses_J, found.loss, found.end_P),
        (*wanted.variables, wanted.step_size, wanted.losses_J, wanted.loss, wanted.end_P),
        strict=True,
    ):
        assert a.shape == b.shape
        assert not a.requires_grad
        assert error(a, b) < within


# ---- exact is exact ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("steps", [1, 2, 7, 30])
def test_the_exact_modes_agree(steps: int, momentum: float) -> None:
    problem = Problem(batch=4, transform=True)
    middle = [problem.target(max(1, steps // 2), 0.5), problem.target(max(1, steps // 3), 2.0)]
    for targets in ([problem.target(steps)], [*middle, problem.target(steps)]):
        unrolled = problem.gradient(steps, targets, mode="unroll", momentum=momentum)
        for mode in ("checkpoint", "adjoint"):
            assert_same(problem.gradient(steps, targets, mode=mode, momentum=momentum), unrolled)


@settings(max_examples=25)
@given(st.integers(1, 6), st.sampled_from([0.0, 0.5, 0.9]), st.floats(-0.3, 0.6), st.sampled_from([None, 1, 3]), st.booleans(), st.integers(1, 7), st.data())
def test_the_exact_modes_agree_anywhere(steps: int, momentum: float, eta: float, batch: int | None, transform: bool, keep: int, data: st.DataObject) -> None:
    problem = Problem(batch=batch, transform=transform, seed=data.draw(st.integers(0, 1000)))
    places = [*data.draw(st.lists(st.integers(1, steps), max_size=2)), steps]
    targets = [problem.target(place, weight) for place, weight in zip(places, (0.3, 1.7, 1.0), strict=False)]
    options: dict[str, Any] = {"momentum": momentum, "eta": torch.tensor([eta], dtype=torch.float64), "origin_P": problem.start + 1}
    unrolled = problem.gradient(steps, targets, mode="unroll", **options)
    others = [problem.gradient(steps, targets, mode="checkpoint", **options), problem.gradient(steps, targets, keep_every=keep, **options)]
    for found in others:
        for a, b in zip((*found.variables, found.step_size, found.loss), (*unrolled.variables, unrolled.step_size, unrolled.loss), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("mode", EXACT)
def test_against_finite_differences(mode: Any) -> None:
    class Loss(torch.autograd.Function):
        """The loss with the gradients that the mode gives."""

        @staticmethod
        def forward(ctx: Any, images: Tensor, soft: Tensor, eta: Tensor) -> Tensor:
            found = trajectory_gradient(problem.loss, [images, soft], eta, problem.start, targets, 3, momentum=0.8, mode=mode)
            ctx.save_for_backward(*found.variables, found.step_size)
            return found.loss

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Any:
            return tuple(grad * g for g in ctx.saved_tensors)

    problem = Problem()
    targets = [problem.target(2, 0.5), problem.target(3)]
    images = problem.images.clone().requires_grad_()
    assert torch.autograd.gradcheck(Loss.apply, (images, problem.soft.clone().requires_grad_(), problem.eta.clone().requires_grad_()), fast_mode=True)


def test_one_step_is_the_two_line_closed_form() -> None:
    problem, target = Problem(), Problem().target(1)
    images, theta = problem.images.clone().requires_grad_(), problem.start.clone().requires_grad_()
    g = torch.autograd.grad(problem.loss(theta, [images, problem.soft], 0), theta, create_graph=True)[0]
    distance, scale = (problem.start - problem.eta * g - target.weights_P).detach(), (problem.start - target.weights_P).square().sum()
    wanted = torch.autograd.grad(-2 * problem.eta / scale * (distance @ g), images)[0]
    for mode in (*EXACT, "tesla"):
        assert error(problem.gradient(1, [target], mode=mode).variables[0], wanted) < 1e-12  # type: ignore[arg-type]


# ---- the quadratic's closed forms -------------------------------------------------------------------------------------


class Quadratic:
    """ℓ = ½ (θ − x)ᵀ H (θ − x): θ_T − x = (I − ηH)^T (θ_0 − x) without momentum."""

    def __init__(self, size: int, steps: int, eta: float, seed: int) -> None:
        root = drawn(size, size, seed=seed)
        self.H = root @ root.T / size + 0.1 * torch.eye(size, dtype=torch.float64)
        self.x, self.start, self.goal = drawn(size, seed=seed + 1), drawn(size, seed=seed + 2), drawn(size, seed=seed + 3)
        self.eta, self.steps = torch.tensor(eta, dtype=torch.float64), steps
        self.power = torch.linalg.matrix_power(torch.eye(size, dtype=torch.float64) - eta * self.H, steps)
        self.end = self.x + self.power @ (self.start - self.x)
        self.D = (self.start - self.goal).square().sum()

    def loss(self, theta: Tensor, variables: Sequence[Tensor], t: int) -> Tensor:
        return 0.5 * (theta - variables[0]) @ self.H @ (theta - variables[0])

    def gradient(self, **options: Any) -> TrajectoryGradient:
        return trajectory_gradient(self.loss, [self.x], self.eta, self.start, [Target(self.steps, self.goal)], self.steps, **options)


@settings(max_examples=40)
@given(st.integers(1, 6), st.integers(1, 12), st.floats(0.01, 0.4), st.integers(0, 10_000))
def test_the_quadratic(size: int, steps: int, eta: float, seed: int) -> None:
    q = Quadratic(size, steps, eta, seed)
    one = torch.eye(size, dtype=torch.float64)
    exact_x = 2 / q.D * (one - q.power).T @ (q.end - q.goal)
    before = torch.linalg.matrix_power(one - eta * q.H, steps - 1)
    exact_eta = 2 / q.D * (q.end - q.goal) @ (-steps * q.H @ before @ (q.start - q.x))
    for mode in EXACT:
        found = q.gradient(mode=mode)
        torch.testing.assert_close(found.end_P, q.end, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(found.variables[0], exact_x, rtol=1e-8, atol=1e-10)
        torch.testing.assert_close(found.step_size, exact_eta, rtol=1e-8, atol=1e-10)
        torch.testing.assert_close(found.loss, (q.end - q.goal).square().sum() / q.D, rtol=1e-9, atol=1e-12)
    tesla, G = q.gradient(mode="tesla"), (q.start - q.end) / eta
    torch.testing.assert_close(tesla.variables[0], 2 * eta / q.D * steps * q.H @ (q.end - q.goal), rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(tesla.step_size, 2 / q.D * (eta * G.square().sum() - (q.start - q.goal) @ G), rtol=1e-8, atol=1e-10)


# ---- TESLA ------------------------------------------------------------------------------------------------------------


def test_tesla_is_exact_for_one_step_and_only_then() -> None:
    problem = Problem()
    assert_same(problem.gradient(1, mode="tesla"), problem.gradient(1, mode="unroll"))
    errors = [error(problem.gradient(steps, mode="tesla").variables[0], problem.gradient(steps).variables[0]) for steps in (2, 10)]
    assert 1e-3 < errors[0] < errors[1]


@pytest.mark.parametrize("steps", [1, 4])
def test_the_released_image_gradient_is_half_and_the_step_sizes_is_not(steps: int) -> None:
    problem = Problem()
    formula, released = problem.gradient(steps, mode="tesla"), problem.gradient(steps, mode="tesla", tesla="released")
    for whole, half in zip(formula.variables, released.variables, strict=True):
        torch.testing.assert_close(half, whole / 2, rtol=0, atol=0)
    assert released.step_size == formula.step_size
    assert released.loss == formula.loss


# ---- invariants -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [*EXACT, "tesla"])
def test_a_step_size_of_zero(mode: Any) -> None:
    problem, target, steps = Problem(batch=3), Problem().target(4), 4
    found = problem.gradient(steps, [target], mode=mode, eta=torch.zeros((), dtype=torch.float64))
    assert found.loss == 1
    assert all((g == 0).all() for g in found.variables)
    theta = problem.start.clone().requires_grad_()
    G = torch.stack([torch.autograd.grad(problem.loss(theta, [problem.images, problem.soft], t), theta)[0] for t in range(steps)]).sum(0)
    apart = problem.start - target.weights_P
    torch.testing.assert_close(found.step_size, -2 / apart.square().sum() * (apart @ G))
    torch.testing.assert_close(found.end_P, problem.start, rtol=0, atol=0)


@pytest.mark.parametrize("mode", [*EXACT, "tesla"])
def test_a_target_that_is_reached_costs_nothing(mode: Any) -> None:
    problem = Problem(batch=3, transform=True)
    end = problem.gradient(5).end_P
    found = problem.gradient(5, [Target(5, end)], mode=mode)
    assert float(found.loss) < 1e-25
    assert all(float(g.norm()) < 1e-12 for g in (*found.variables, found.step_size))


def test_momentum_does_nothing_in_one_step() -> None:
    problem = Problem()
    assert_same(problem.gradient(1, momentum=0.9), problem.gradient(1), within=1e-14)


def test_the_denominator_is_measured_from_the_origin() -> None:
    problem, target = Problem(), Problem().target(3)
    origin = problem.start + 0.2
    ratio = (problem.start - target.weights_P).square().sum() / (origin - target.weights_P).square().sum()
    own, other = problem.gradient(3, [target]), problem.gradient(3, [target], origin_P=origin)
    torch.testing.assert_close(other.loss, own.loss * ratio)
    torch.testing.assert_close(other.variables[0], own.variables[0] * ratio)


def test_targets_add_with_their_weights() -> None:
    problem = Problem()
    first, second, last = problem.target(1), problem.target(2), problem.target(4)
    parts = [problem.gradient(4, [Target(4, last.weights_P, 0.0), t]) for t in (first, second)] + [problem.gradient(4, [last])]
    found = problem.gradient(4, [Target(1, first.weights_P, 0.5), last, Target(2, second.weights_P, 3.0)])
    torch.testing.assert_close(found.losses_J, torch.stack([parts[0].losses_J[1], parts[2].losses_J[0], parts[1].losses_J[1]]))
    torch.testing.assert_close(found.loss, found.losses_J @ torch.tensor([0.5, 1.0, 3.0], dtype=torch.float64))
    for k in range(2):
        torch.testing.assert_close(found.variables[k], 0.5 * parts[0].variables[k] + 3 * parts[1].variables[k] + parts[2].variables[k])


@pytest.mark.parametrize("mode", [*EXACT, "tesla"])
def test_the_same_inputs_give_the_same_bits_and_stay_as_they_were(mode: Any) -> None:
    problem = Problem(batch=3, transform=True)
    before = [x.clone() for x in (problem.images, problem.soft, problem.eta, problem.start)]
    first, second = problem.gradient(6, mode=mode), problem.gradient(6, mode=mode)
    for a, b in zip((*first.variables, *first[:2], *first[3:]), (*second.variables, *second[:2], *second[3:]), strict=True):
        assert torch.equal(a, b)
    for was, now in zip(before, (problem.images, problem.soft, problem.eta, problem.start), strict=True):
        assert torch.equal(was, now)
        assert now.grad is None


def test_variables_that_a_step_does_not_use_or_that_nothing_uses() -> None:
    problem, idle = Problem(), torch.zeros(3, dtype=torch.float64)

    def loss(theta: Tensor, variables: Sequence[Tensor], t: int) -> Tensor:
        return problem.loss(theta, [variables[t % 2], problem.soft], t)

    given = [problem.images, problem.images + 0.1, idle]
    found = {mode: trajectory_gradient(loss, given, problem.eta, problem.start, [problem.target(3)], 3, mode=mode) for mode in EXACT}
    for mode in EXACT:
        assert all(error(a, b) < 1e-10 for a, b in zip(found[mode].variables[:2], found["unroll"].variables[:2], strict=True))
        assert (found[mode].variables[2] == 0).all()
    only = {mode: trajectory_gradient(lambda w, v, t: loss(w, given, t), [], problem.eta, problem.start, [problem.target(3)], 3, mode=mode) for mode in EXACT}
    for mode in EXACT:  # the step size alone
        assert only[mode].variables == ()
        torch.testing.assert_close(only[mode].step_size, found["unroll"].step_size)


def test_works_under_no_grad_and_with_a_step_size_of_another_precision() -> None:
    problem = Problem()
    wanted = problem.gradient(3)
    for mode in EXACT:
        with torch.no_grad():
            found = problem.gradient(3, mode=mode, eta=torch.full((1,), 0.2, dtype=torch.float32, requires_grad=True))
        assert error(found.variables[0], wanted.variables[0]) < 1e-6
        assert found.step_size.shape == (1,)
        assert found.step_size.dtype == torch.float32


# ---- work and memory --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("mode", "keep", "calls"), [("unroll", 1, 8), ("checkpoint", 1, 16), ("adjoint", 1, 15), ("tesla", 1, 15), ("adjoint", 3, 19)])
def test_no_pass_is_taken_twice_for_nothing(mode: Any, keep: int, calls: int) -> None:
    problem = Problem()
    problem.gradient(8, mode=mode, keep_every=keep)
    assert problem.calls == calls  # the last step's graph is the forward sweep's; with keep_every 3 the steps to θ_1, θ_2, θ_4, θ_5 are taken anew


def test_the_forward_sweep_builds_no_graph_to_the_images_and_the_first_step_none_to_the_weights() -> None:
    seen: list[bool] = []
    problem = Problem()

    def loss(theta: Tensor, variables: Sequence[Tensor], t: int) -> Tensor:
        assert theta.requires_grad
        assert theta.is_leaf
        seen.append(any(v.requires_grad for v in variables))
        return problem.loss(theta, variables, t)

    trajectory_gradient(loss, [problem.images, problem.soft], problem.eta, problem.start, [problem.target(4)], 4)
    assert seen == [False] * 3 + [True] * 4


def held(mode: str, steps: int) -> int:
    """Most bytes that graphs held at once, as seen by hooks on what autograd saves."""
    alive = most = 0

    class Box:
        def __init__(self, tensor: Tensor) -> None:
            nonlocal alive, most
            self.tensor, self.size = tensor, tensor.numel() * tensor.element_size()
            alive += self.size
            most = max(most, alive)

        def __del__(self) -> None:
            nonlocal alive
            alive -= self.size

    problem = Problem()
    with torch.autograd.graph.saved_tensors_hooks(Box, lambda box: box.tensor):
        problem.gradient(steps, mode=mode)
    return most


def test_graphs_hold_one_step_at_a_time() -> None:
    assert held("adjoint", 24) == held("adjoint", 8) == held("adjoint", 2)
    assert held("tesla", 24) == held("tesla", 8) <= held("adjoint", 8)
    assert held("unroll", 24) > 2.5 * held("unroll", 8)


# ---- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"targets": lambda p: [Target(2, p.start.clone())]}, "0 or not finite"),
        ({"targets": lambda p: [Target(2, p.start * float("nan"))]}, "0 or not finite"),
        ({"targets": lambda p: [p.target(2), Target(1, p.start.clone(), 0.0)]}, "0 or not finite"),
        ({"targets": lambda p: [p.target(2), p.target(3)]}, "beyond the inner steps"),
        ({"targets": lambda p: [p.target(2), p.target(0)]}, "beyond the inner steps"),
        ({"targets": lambda p: [p.target(1)]}, "no target at the last"),
        ({"targets": lambda p: []}, "no target at the last"),
        ({"targets": lambda p: [Target(2, p.start[:-1])]}, "one length"),
        ({"steps": lambda p: 0}, "1 or more"),
        ({"momentum": lambda p: 1.0}, "momentum"),
        ({"momentum": lambda p: -0.1}, "momentum"),
        ({"momentum": lambda p: 0.5, "mode": lambda p: "tesla"}, "no momentum"),
        ({"mode": lambda p: "adjoin"}, "Did you mean 'adjoint'"),
        ({"tesla": lambda p: "released"}, "mode is 'adjoint'"),
        ({"tesla": lambda p: "paper", "mode": lambda p: "tesla"}, "variant"),
        ({"eta": lambda p: torch.ones(2, dtype=torch.float64)}, "one number"),
        ({"eta": lambda p: torch.tensor(1)}, "floating point"),
        ({"keep_every": lambda p: 0}, "keep_every"),
    ],
)
def test_wrong_input_is_refused(change: dict[str, Callable[[Problem], Any]], text: str) -> None:
    problem = Problem()
    options = {"steps": 2, "targets": [problem.target(2)]} | {name: value(problem) for name, value in change.items()}
    with pytest.raises(InputError, match=text):
        problem.gradient(**options)
    assert problem.calls == 0


# ---- into the engine --------------------------------------------------------------------------------------------------


def test_given_gradients_reach_their_tensors_scaled_and_one_at_a_time() -> None:
    images, eta = nn.Parameter(drawn(4, 2)), nn.Parameter(torch.tensor(0.3, dtype=torch.float64))
    gradients = [drawn(4, 2, seed=5), torch.tensor(-2.0, dtype=torch.float64)]
    value = torch.tensor(1.5, dtype=torch.float64)
    scalar = with_gradients(value, [images, eta], gradients)
    assert scalar == value
    (3 * scalar).backward(inputs=[images])
    torch.testing.assert_close(images.grad, 3 * gradients[0], rtol=0, atol=0)
    assert eta.grad is None
    with torch.no_grad():
        images -= 1  # the engine steps the first player before the second's backward pass
    (scalar / 4).backward(inputs=[eta])
    torch.testing.assert_close(eta.grad, gradients[1] / 4, rtol=0, atol=0)
    torch.testing.assert_close(images.grad, 3 * gradients[0], rtol=0, atol=0)


def test_given_gradients_go_on_into_what_made_the_tensor() -> None:
    code = drawn(3).requires_grad_()
    with_gradients(torch.tensor(0.0), [code * 2], [torch.tensor([1.0, 2.0, 3.0]).double()]).backward()
    torch.testing.assert_close(code.grad, torch.tensor([2.0, 4.0, 6.0]).double())


def test_a_missing_or_misshapen_gradient_is_refused() -> None:
    for gradients in ([], [torch.zeros(2)]):
        with pytest.raises(InputError, match="gradient of its own shape"):
            with_gradients(torch.tensor(0.0), [torch.zeros(3)], gradients)


def test_a_whole_method_of_steepest_descent_finds_the_target() -> None:
    """Images that were made by training on them are matched again from a start near by."""
    problem = Problem()
    loss: StepLoss = problem.loss
    end = problem.gradient(3).end_P
    images, eta = nn.Parameter(problem.images + 0.05 * drawn(*problem.images.shape, seed=9)), nn.Parameter(problem.eta.clone())
    optimiser, seen = torch.optim.Adam([images, eta], lr=3e-3), []
    for _ in range(30):
        found = trajectory_gradient(loss, [images, problem.soft], eta, problem.start, [Target(3, end)], 3)
        optimiser.zero_grad()
        with_gradients(found.loss, [images, eta], [found.variables[0], found.step_size]).backward()
        optimiser.step()
        seen.append(float(found.loss))
    assert seen[-1] < 0.1 * seen[0]
