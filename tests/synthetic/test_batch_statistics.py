"""Batch statistics against running ones: the norm, its kink, groups, and which layers count."""

import copy

import pytest
import torch
from torch import nn

from limbeck.errors import InputError
from limbeck.synthetic.batch_statistics import distance, layer_distances, matching_loss, moments, tapped


def drawn(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Net(nn.Module):
    """Two norms that run, in another order than they are built, one that never does, and one without running statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.never = nn.BatchNorm2d(3)
        self.late = nn.BatchNorm1d(5)
        self.early = nn.BatchNorm2d(4)
        self.stateless = nn.BatchNorm2d(4, track_running_stats=False)
        self.conv, self.linear, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4, 5), nn.Linear(5, 2)
        generator = torch.Generator().manual_seed(7)
        for norm in (self.never, self.late, self.early):
            norm.running_mean.copy_(torch.randn(norm.num_features, generator=generator))
            norm.running_var.copy_(torch.rand(norm.num_features, generator=generator) + 0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu_(self.early(self.conv(x)))
        return self.head(self.late(self.linear(self.stateless(x).mean((2, 3)))))


@pytest.fixture
def net() -> nn.Module:
    torch.manual_seed(0)
    return Net().eval().requires_grad_(False)


# ---- the statistics ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(6, 5), (6, 5, 7), (6, 5, 3, 4)])
def test_moments_are_the_mean_and_the_biased_variance_of_each_channel(shape):
    x = drawn(0, *shape).double()
    mean, variance = moments(x)
    flat = x.transpose(0, 1).flatten(1)
    torch.testing.assert_close(mean[0], flat.mean(1))
    torch.testing.assert_close(variance[0], flat.var(1, correction=0))
    assert mean.shape == variance.shape == (1, 5)


def test_groups_are_what_separate_passes_are():
    x = drawn(1, 12, 3, 4, 4)
    mean, variance = moments(x, 3)
    for k in range(3):
        alone = moments(x[4 * k : 4 * k + 4])
        torch.testing.assert_close((mean[k : k + 1], variance[k : k + 1]), alone)
    with pytest.raises(InputError, match="groups"):
        moments(x, 5)


def test_half_precision_is_counted_in_single():
    assert moments(drawn(0, 4, 2).bfloat16())[1].dtype == torch.float32


# ---- the norm ------------------------------------------------------------------------------------------------------------


def test_the_distance_is_the_norm_and_not_its_square():
    x = torch.tensor([[3.0, 4.0], [0.0, 0.5]])
    torch.testing.assert_close(distance(x, torch.zeros(2)), torch.tensor([5.0, 0.5]))


def test_at_the_kink_the_gradient_is_zero_and_elsewhere_that_of_the_norm():
    target = drawn(2, 4)
    x = torch.stack([target, target + drawn(3, 4)]).requires_grad_()
    found = distance(x, target)
    assert float(found[0].detach()) == 0
    (gradient,) = torch.autograd.grad(found.sum(), x)
    assert torch.equal(gradient[0], torch.zeros(4))
    offset = (x - target)[1].detach()
    torch.testing.assert_close(gradient[1], offset / offset.norm())


def test_a_batch_with_the_running_statistics_has_loss_0_and_a_finite_gradient():
    norm = nn.BatchNorm2d(3).eval()
    x = drawn(4, 8, 3, 4, 4).double()
    mean, variance = (found[0] for found in moments(x))
    norm.running_mean, norm.running_var = mean.clone(), variance.clone()  # float64, so that nothing is rounded
    x.requires_grad_()
    with tapped(norm.double()) as fired:
        norm(x)
    loss = matching_loss(fired)
    assert float(loss.sum().detach()) == 0
    (gradient,) = torch.autograd.grad(loss.sum(), x)
    assert torch.equal(gradient, torch.zeros_like(gradient))
    for moved in (x.detach() + 0.1, x.detach() * 1.1):
        with tapped(norm) as fired:
            norm(moved)
        assert float(matching_loss(fired).sum()) > 0.01


def test_by_hand():
    norm = nn.BatchNorm1d(2).eval()
    norm.running_mean.copy_(torch.tensor([1.0, 0.0]))
    norm.running_var.copy_(torch.tensor([1.0, 2.0]))
    with tapped(norm) as fired:
        norm(torch.tensor([[3.0, 1.0], [5.0, 5.0]]))  # means 4 and 3, variances 1 and 4
    torch.testing.assert_close(layer_distances(fired), torch.tensor([[18**0.5 + 2.0]]))
    torch.testing.assert_close(matching_loss(fired), torch.tensor([10 * (18**0.5 + 2.0)]))
    torch.testing.assert_close(matching_loss(fired, first=1.0), torch.tensor([18**0.5 + 2.0]))


# ---- the taps ------------------------------------------------------------------------------------------------------------


def test_layers_that_run_are_tapped_in_the_order_of_running_and_no_others(net):
    x = drawn(5, 6, 3, 6, 6)
    with tapped(net, groups=2) as fired:
        net(x)
    assert [layer.path for layer in fired] == ["early", "late"]
    mean, variance = moments(net.conv(x), 2)
    torch.testing.assert_close((fired[0].mean_KC, fired[0].variance_KC), (mean, variance))
    torch.testing.assert_close(fired[0].running_mean_C, net.early.running_mean)
    torch.testing.assert_close(fired[1].running_variance_C, net.late.running_var)
    each = layer_distances(fired)
    torch.testing.assert_close(matching_loss(fired, first=10.0), 10 * each[0] + each[1])


def test_a_layer_that_runs_twice_counts_twice(net):
    with tapped(net) as fired:
        net(drawn(5, 6, 3, 6, 6))
        net(drawn(6, 6, 3, 6, 6))
    assert [layer.path for layer in fired] == ["early", "late", "early", "late"]


def test_the_network_answers_as_without_taps_and_keeps_nothing(net):
    x, before = drawn(5, 6, 3, 6, 6), copy.deepcopy(net.state_dict())
    plain = net(x)
    with tapped(net) as fired:
        assert torch.equal(net(x), plain)
    net(x)
    assert len(fired) == 2
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    with pytest.raises(RuntimeError), tapped(net) as fired:
        raise RuntimeError
    assert not any(module._forward_pre_hooks for module in net.modules())


def test_a_network_in_training_mode_is_judged_by_what_it_had_before(net):
    net.train()
    was = net.early.running_mean.clone()
    with tapped(net) as fired:
        net(drawn(5, 6, 3, 6, 6))
    assert torch.equal(fired[0].running_mean_C, was)
    assert not torch.equal(net.early.running_mean, was)


def test_gradients_are_those_of_differences(net):
    net.double()
    x = drawn(8, 6, 3, 5, 5).double().requires_grad_()

    def loss(x: torch.Tensor) -> torch.Tensor:
        with tapped(net, groups=2) as fired:
            net(x)
        return matching_loss(fired)

    assert torch.autograd.gradcheck(loss, x)


def test_without_batch_norm_it_says_so():
    with tapped(nn.Linear(2, 2)) as fired:
        pass
    with pytest.raises(InputError, match="batch norm"):
        matching_loss(fired)
