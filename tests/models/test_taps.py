import pytest
import torch
from torch import nn

import limbeck
from limbeck.errors import InputError
from limbeck.models import taps
from limbeck.models.resnet_cifar import resnet


@pytest.fixture
def network() -> nn.Module:
    return resnet(8, width=2).eval()


def hooks_of(module: nn.Module) -> int:
    return sum(len(m._forward_hooks) for m in module.modules())


def test_features_are_what_the_modules_return(network: nn.Module) -> None:
    x = torch.randn(2, 3, 8, 8)
    with limbeck.taps.tap(network, ["layer2", "layer3.0.conv1"]) as features:
        logits = network(x)
    h = network.layer2(network.layer1(torch.relu(network.bn1(network.conv1(x)))))
    assert torch.equal(features["layer2"], h)
    assert torch.equal(features["layer3.0.conv1"], network.layer3[0].conv1(h))
    assert list(features) == ["layer2", "layer3.0.conv1"]
    assert torch.equal(logits, network(x))
    assert hooks_of(network) == 0


def test_one_path_may_be_a_plain_string(network: nn.Module) -> None:
    with taps.tap(network, "layer1") as features:
        network(torch.randn(1, 3, 8, 8))
    assert set(features) == {"layer1"}


def test_gradients_flow_through_features_unless_detached(network: nn.Module) -> None:
    x = torch.randn(2, 3, 8, 8)
    with taps.tap(network, ["layer2"]) as features:
        network(x)
    features["layer2"].square().sum().backward()
    assert network.conv1.weight.grad.abs().sum() > 0
    assert network.layer3[0].conv1.weight.grad is None
    with taps.tap(network, ["layer2"], detach=True) as detached:
        network(x)
    assert not detached["layer2"].requires_grad
    assert torch.equal(detached["layer2"], features["layer2"])


def test_hooks_go_on_an_exception_in_the_block_and_on_a_wrong_path(network: nn.Module) -> None:
    with pytest.raises(ZeroDivisionError), taps.tap(network, ["layer1"]):
        assert hooks_of(network) == 1
        raise ZeroDivisionError
    with pytest.raises(InputError), taps.tap(network, ["layer1", "layer9"]):
        pass
    assert hooks_of(network) == 0


def test_functional_call_is_tapped_with_its_own_parameters(network: nn.Module) -> None:
    x = torch.randn(2, 3, 8, 8)
    doubled = {name: 2 * p.detach() for name, p in network.named_parameters()}
    with taps.tap(network, ["conv1"]) as features:
        torch.func.functional_call(network, doubled, (x,))
    torch.testing.assert_close(features["conv1"], 2 * network.conv1(x))


def test_taps_work_inside_torch_func_grad(network: nn.Module) -> None:
    x = torch.randn(2, 3, 8, 8)
    parameters = {name: p.detach() for name, p in network.named_parameters()}

    def loss(weights: dict[str, torch.Tensor]) -> torch.Tensor:
        with taps.tap(network, ["layer1"]) as features:
            torch.func.functional_call(network, weights, (x,))
        return features["layer1"].sum()

    gradient = torch.func.grad(loss)(parameters)
    assert gradient["conv1.weight"].abs().sum() > 0
    assert gradient["linear.weight"].abs().sum() == 0


def test_taps_nest_and_work_in_inference_mode(network: nn.Module) -> None:
    with torch.inference_mode(), taps.tap(network, ["layer1"]) as outer:
        with taps.tap(network, ["layer1", "linear"]) as inner:
            network(torch.randn(1, 3, 8, 8))
        network(torch.randn(1, 3, 8, 8))
    assert "linear" not in outer
    assert not torch.equal(outer["layer1"], inner["layer1"])


def test_a_module_that_runs_twice_keeps_its_last_output() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 3)
            self.alias = self.layer

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(self.layer(x))

    network = Twice()
    assert taps.paths(network) == ["layer", "alias"]
    with taps.tap(network, ["layer", "alias"]) as features:
        out = network(torch.randn(2, 3))
    assert torch.equal(features["layer"], out)
    assert torch.equal(features["alias"], out)


def test_paths_lists_every_module(network: nn.Module) -> None:
    listed = taps.paths(network)
    assert {"conv1", "layer1", "layer3.0", "layer3.0.bn2", "linear"} <= set(listed)
    assert "" not in listed
    with taps.tap(network, listed) as features:
        network(torch.randn(1, 3, 8, 8))
    assert set(features) == set(listed)
    assert all(features[path] is not None for path in listed)  # nothing in a CIFAR ResNet overwrites another module's output


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("layr2", ["Did you mean 'layer2'?", "At the top: conv1, bn1, layer1"]),
        ("layer2.7.conv1", ["Did you mean 'layer2.0.conv1'?", "Inside 'layer2': 0"]),
        ("linear.x", ["Inside 'linear': nothing"]),
        ("", ["has no module ''", "At the top: conv1"]),
    ],
)
def test_unknown_paths_get_the_nearest(network: nn.Module, path: str, says: list[str]) -> None:
    with pytest.raises(InputError) as caught, taps.tap(network, [path]):
        pass
    assert all(part in str(caught.value) for part in says), str(caught.value)


def test_reading_before_the_module_ran_or_one_not_tapped_is_refused(network: nn.Module) -> None:
    with taps.tap(network, ["layer1"]) as features, pytest.raises(InputError, match="has not run"):
        features["layer1"]
    assert len(features) == 0


def test_an_overwritten_output_is_refused_not_silently_wrong() -> None:
    network = nn.Sequential(nn.Linear(3, 3), nn.ReLU(inplace=True), nn.Linear(3, 2))
    with taps.tap(network, ["0", "1"]) as features:
        network(torch.randn(4, 3))
    assert (features["1"] >= 0).all()
    with pytest.raises(InputError, match="in-place operation overwrote the output of '0'"):
        features["0"]


def test_tuples_give_their_first_element_and_other_outputs_are_refused() -> None:
    recurrent = nn.Sequential(nn.GRU(3, 4, batch_first=True))
    x = torch.randn(2, 5, 3)
    with taps.tap(recurrent, ["0"]) as features:
        whole, _ = recurrent(x)
    assert torch.equal(features["0"], whole)

    class Named(nn.Module):
        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"x": x}

    with pytest.raises(InputError, match="returned dict"), taps.tap(holder := nn.Sequential(Named()), ["0"]):
        holder(x)
    assert hooks_of(holder) == 0
