"""Networks on one flat vector: the same function, copies, two derivatives, refusals."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from limbeck.errors import InputError
from limbeck.models.small import convnet3, mlp
from limbeck.synthetic.flat import FlatNetwork


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def small() -> nn.Module:
    return convnet3(3, (2, 8, 8), width=4).double()


@given(st.integers(0, 2**31), st.integers(1, 5), st.sampled_from(["convnet3", "mlp"]))
def test_a_vector_written_and_read_back_is_the_same_function(seed: int, batch: int, name: str) -> None:
    def build() -> nn.Module:
        return small() if name == "convnet3" else mlp([5], 3, (2, 8, 8)).double()

    net, other = FlatNetwork(build()), build()
    theta, x = drawn(net.size, seed=seed), drawn(batch, 2, 8, 8, seed=seed)
    net.write(theta, other)
    torch.testing.assert_close(net(theta, x), other(x), rtol=0, atol=0)
    torch.testing.assert_close(net.vector(other), theta, rtol=0, atol=0)


def test_the_size_is_the_number_of_parameters_of_the_papers_network() -> None:
    assert FlatNetwork(convnet3(10, (3, 32, 32))).size == 320_010  # our sheet `ftd`
    assert FlatNetwork(convnet3(10, (1, 28, 28))).size == 317_706


@pytest.mark.parametrize("module", [nn.Linear(3, 2), nn.Linear(3, 2, bias=False)])  # of one tensor alone a careless copy is a view
def test_a_vector_is_a_copy(module: nn.Module) -> None:
    net = FlatNetwork(module)
    theta = net.vector()
    before = theta.clone()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(1.0)
    torch.testing.assert_close(theta, before, rtol=0, atol=0)
    net.write(theta)
    theta.zero_()
    torch.testing.assert_close(net.vector(), before, rtol=0, atol=0)
    assert not theta.requires_grad


def test_calls_leave_the_modules_own_parameters_alone() -> None:
    net = FlatNetwork(small())
    before = net.vector()
    theta = drawn(net.size, seed=1).requires_grad_()
    net(theta, drawn(2, 2, 8, 8)).sum().backward()
    assert theta.grad is not None
    assert all(parameter.grad is None for parameter in net.module.parameters())
    torch.testing.assert_close(net.vector(), before, rtol=0, atol=0)


def test_a_split_is_of_views_in_the_modules_order() -> None:
    net = FlatNetwork(nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1)))
    theta = torch.arange(float(net.size))
    pieces = net.split(theta)
    assert {name: tuple(p.shape) for name, p in pieces.items()} == {"0.weight": (3, 2), "0.bias": (3,), "1.weight": (1, 3), "1.bias": (1,)}
    pieces["0.bias"][1] = -1.0
    assert theta[7] == -1.0


def test_two_derivatives() -> None:
    net = FlatNetwork(nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.GroupNorm(2, 2), nn.Tanh(), nn.Flatten(), nn.Linear(18, 2)).double())
    theta, x = 0.5 * drawn(net.size).requires_grad_(), drawn(2, 1, 3, 3, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda w, v: net(w, v), (theta, x))
    assert torch.autograd.gradgradcheck(lambda w, v: net(w, v).square(), (theta, x))


def test_tied_weights_count_once() -> None:
    tied = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3)).double()
    tied[2].weight = tied[0].weight
    net = FlatNetwork(tied)
    assert net.size == 9 + 3 + 3
    theta, x = drawn(net.size), drawn(4, 3)
    other = copy.deepcopy(tied)
    net.write(theta, other)
    torch.testing.assert_close(net(theta, x), other(x), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("module", "name"),
    [
        (nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)), "network.1: BatchNorm2d"),
        (nn.Sequential(nn.Conv2d(1, 2, 3), nn.InstanceNorm2d(2, track_running_stats=True)), "running statistics"),
        (nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.1)), "network.1: Dropout"),
        (nn.Sequential(nn.Linear(2, 2), nn.RReLU()), "random numbers"),
        (nn.MultiheadAttention(4, 2, dropout=0.5), "random numbers"),
        (nn.LSTM(2, 2, 2, dropout=0.5), "random numbers"),
        (nn.ReLU(), "no parameters"),
        (nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2).double()), "several precisions"),
    ],
)
def test_modules_that_are_no_function_of_weights_and_inputs_are_refused(module: nn.Module, name: str) -> None:
    with pytest.raises(InputError, match=name):
        FlatNetwork(module)


@pytest.mark.parametrize("norm", [nn.utils.parametrizations.spectral_norm, nn.utils.spectral_norm])
def test_spectral_norm_is_refused(norm) -> None:
    with pytest.raises(InputError, match=r"network\.1.*spectral norm"):
        FlatNetwork(nn.Sequential(nn.Linear(2, 2), norm(nn.Linear(2, 3))))


class Odd(nn.Module):
    """A linear layer whose calls have a side: drops, counts, or neither."""

    def __init__(self, side: str) -> None:
        super().__init__()
        self.layer, self.side = nn.Linear(3, 2), side
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.side == "counts":
            self.calls += 1
        elif self.side == "renews":
            self.calls = self.calls + 1
        return nn.functional.dropout(self.layer(x), 0.5, self.training and self.side == "drops")


@pytest.mark.parametrize(("side", "words"), [("drops", "two answers"), ("counts", "buffer 'calls'"), ("renews", "buffer 'calls'")])
def test_two_calls_tell_what_a_forward_does(side: str, words: str) -> None:
    net, x = FlatNetwork(Odd(side)), torch.ones(4, 3)
    before = torch.random.get_rng_state()
    with pytest.raises(InputError, match=words):
        net.check(x)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert net.module.calls == 0


def test_functions_pass_the_check() -> None:
    orthogonal = nn.utils.parametrizations.orthogonal(nn.Linear(3, 3))  # has a buffer, which no call changes
    for module, x in ((Odd("none"), torch.ones(4, 3)), (small().float(), torch.ones(2, 2, 8, 8)), (orthogonal, torch.eye(3))):
        FlatNetwork(module).check(x)


def test_harmless_relatives_are_let_in() -> None:
    class Distance(nn.Module):
        p = 2.0  # the order of a norm

    parts = [nn.Conv2d(1, 2, 3), nn.InstanceNorm2d(2), nn.BatchNorm2d(2, track_running_stats=False), nn.Dropout(0.0), Distance()]
    assert FlatNetwork(nn.Sequential(*parts)).module.training
    assert FlatNetwork(nn.MultiheadAttention(4, 2)).size == 4 * 4 * 4 + 4 * 4


def test_wrong_shapes_are_refused() -> None:
    net = FlatNetwork(nn.Linear(3, 2))
    for theta in (torch.zeros(7), torch.zeros(1, 8)):
        with pytest.raises(InputError, match="needs \\[8\\]"):
            net(theta, torch.zeros(1, 3))
    with pytest.raises(InputError, match="other names or shapes"):
        net.vector(nn.Linear(2, 3))
    with pytest.raises(InputError, match="other names or shapes"):
        net.write(torch.zeros(8), nn.Sequential(nn.Linear(3, 2)))
