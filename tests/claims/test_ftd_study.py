"""What the claim of FTD measures of experts and errors, and that measuring changes nothing."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from limbeck.claims.studies.ftd import MeasuredFTD
from limbeck.contract import Batch, Clock
from limbeck.data.arrays import ArrayData
from limbeck.methods.datasets.ftd import FTD
from limbeck.synthetic.flat import FlatNetwork


def network(seed: int) -> nn.Module:
    """A linear layer on 1 × 4 × 4 images."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 2))


def real() -> ArrayData:
    draw = torch.Generator().manual_seed(0)
    return ArrayData(torch.randn(40, 1, 4, 4, generator=draw), torch.arange(40) % 2)


class Experts:
    """Two experts; the weights are given by a function."""

    count, epochs, size = 2, 4, 34

    def __init__(self, rows: list[list[Tensor]]) -> None:
        self.rows = rows

    def weights(self, expert: int, epoch: int) -> Tensor:
        return self.rows[expert][epoch].clone()


def wandering() -> Experts:
    draw = torch.Generator().manual_seed(1)
    return Experts([[torch.randn(34, generator=draw) for _ in range(5)] for _ in range(2)])


def bound(kind: type[FTD], experts: Experts, **knobs) -> FTD:
    knobs = {"steps": 3, "expert_epochs": 2, "latest_start": 3, "step_size": 0.1, "image_ema": 0.0, "augment": None, **knobs}
    return kind(**knobs).bind(student=network(0), teacher=experts, train=real(), num_classes=2)


def test_a_student_on_the_experts_own_images_makes_no_error() -> None:
    method = bound(MeasuredFTD, wandering())
    flat, images, labels = FlatNetwork(network(0)), method.synthetic.images.detach(), method.synthetic.targets
    rows = []
    for seed in (1, 2):
        path = [flat.vector(network(seed))]
        for _ in range(6):
            leaf = path[-1].requires_grad_()
            path.append((leaf - 0.1 * torch.autograd.grad(F.cross_entropy(flat(leaf, images), labels), leaf)[0]).detach())
        rows.append([path[e].detach() for e in (0, 0, 3, 3, 6)])
    method.teacher = Experts(rows)  # type: ignore[assignment]
    for name in ("matching_error", "accumulated_error", "start_error"):
        assert method.facts()["metrics"][name] < 1e-5, name


def test_errors_are_those_of_a_student_that_goes_on_from_its_own_weights() -> None:
    experts = wandering()
    method = bound(MeasuredFTD, experts)
    flat, images, labels = method.flat, method.synthetic.images.detach(), method.synthetic.targets

    def after(theta: Tensor) -> Tensor:
        for _ in range(3):
            leaf = theta.detach().requires_grad_()
            theta = leaf.detach() - 0.1 * torch.autograd.grad(F.cross_entropy(flat(leaf, images), labels), leaf)[0]
        return theta

    for expert in range(2):
        zero, two, four = (experts.weights(expert, e) for e in (0, 2, 4))
        measured, once = method.measured(expert), after(zero)
        twice = after(once)
        assert measured["matching_error"] == pytest.approx(float((once - two).norm() / (two - zero).norm()), rel=1e-5)
        assert measured["accumulated_error"] == pytest.approx(float((twice - four).norm() / (four - zero).norm()), rel=1e-5)
        displaced = (twice - once) - (after(two) - two)
        assert measured["start_error"] == pytest.approx(float(displaced.norm() / (four - zero).norm()), rel=1e-4)


def test_sharpness_is_of_the_last_epoch_on_all_real_images() -> None:
    experts, data = wandering(), real()
    method = bound(MeasuredFTD, experts, sharpness_radius=0.3)
    theta = experts.weights(1, 4).requires_grad_()
    value = F.cross_entropy(method.flat(theta, data.inputs), data.targets)
    (g,) = torch.autograd.grad(value, theta)
    above = F.cross_entropy(method.flat(theta + 0.3 * g / g.norm(), data.inputs), data.targets)
    measured = method.measured(1)
    assert measured["expert_loss"] == pytest.approx(float(value.detach()), rel=1e-5)
    assert measured["sharpness"] == pytest.approx(float((above - value).detach()), rel=1e-4)


def test_the_metrics_are_means_over_the_experts_beside_the_step_size() -> None:
    method = bound(MeasuredFTD, wandering())
    metrics, rows = method.facts()["metrics"], [method.measured(0), method.measured(1)]
    assert metrics["sharpness"] == pytest.approx((rows[0]["sharpness"] + rows[1]["sharpness"]) / 2)
    assert set(metrics) == {*rows[0], "step_size"}
    assert metrics["step_size"] == pytest.approx(0.1)


def test_the_last_epoch_is_the_last_that_segments_reach() -> None:
    """latest_start 3, E = 2: s + E is 4 at most, two segments; with latest_start 1 it is one."""
    experts = wandering()
    one = bound(MeasuredFTD, experts, latest_start=1).measured(0)
    assert one["accumulated_error"] == one["matching_error"]
    assert one["start_error"] == 0


def test_it_trains_as_ftd_does_and_measuring_changes_nothing() -> None:
    plain, measured = bound(FTD, wandering(), augment={"operations": ["crop"]}), bound(MeasuredFTD, wandering(), augment={"operations": ["crop"]})
    before = measured.synthetic.images.detach().clone()
    assert measured.facts()["metrics"] == measured.facts()["metrics"]
    assert torch.equal(measured.synthetic.images, before)
    updates = [next(method.updates(Batch(torch.empty(1, 0)), Clock(step=2, steps=5))) for method in (plain, measured)]
    gradients = [torch.autograd.grad(u.loss, m.synthetic.images)[0] for u, m in zip(updates, (plain, measured), strict=True)]
    assert torch.equal(*gradients)
