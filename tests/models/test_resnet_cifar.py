import io
import os
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from limbeck.errors import InputError
from limbeck.models import load_weights, resnet_cifar
from limbeck.models.resnet_cifar import BasicBlock, resnet

DATA = os.environ.get("LIMBECK_DATA")
needs_data = pytest.mark.skipif(DATA is None, reason="LIMBECK_DATA is not set: the published CIFAR-10 weights and test images lie there")


@pytest.mark.parametrize(("depth", "count"), [(20, 269_722), (32, 464_154), (44, 658_586), (56, 853_018), (110, 1_727_962)])
def test_parameter_counts_by_name(depth: int, count: int) -> None:
    network = getattr(resnet_cifar, f"resnet{depth}")()
    assert sum(p.numel() for p in network.parameters()) == count
    assert sum(isinstance(m, torch.nn.Conv2d | torch.nn.Linear) for m in network.modules()) == depth  # no layer in the shortcuts


def test_width_8_is_about_four_times_smaller_than_resnet20() -> None:
    assert 3.9 < 269_722 / sum(p.numel() for p in resnet(20, width=8).parameters()) < 4.1


@pytest.mark.parametrize("side", [8, 7])
def test_shortcut_takes_every_second_pixel_and_pads_channels_on_both_sides(side: int) -> None:
    block = BasicBlock(3, 6, stride=2).eval()
    torch.nn.init.zeros_(block.bn2.weight)  # the residual branch gives nothing
    x = torch.rand(2, 3, side, side)
    expected = torch.zeros(2, 6, (side + 1) // 2, (side + 1) // 2)
    expected[:, 1:4] = x[:, :, ::2, ::2]  # 3 channels to add: 1 before, 2 after
    assert torch.equal(block(x), expected)


def test_logits_are_linear_in_non_negative_features_of_any_image() -> None:
    network = resnet(8, width=5, num_classes=7, input_shape=(1, 28, 28)).eval()
    x = torch.randn(3, 1, 28, 28)
    features = network.features(x)
    assert features.shape == (3, 20)
    last = network.layer3(network.layer2(network.layer1(F.relu(network.bn1(network.conv1(x))))))
    torch.testing.assert_close(features, last.flatten(2).mean(2))
    assert (features >= 0).all()
    assert torch.equal(network(x), network.linear(features))
    assert network(x).shape == (3, 7)


def test_convolutions_start_he_normal() -> None:
    weight = resnet(8).layer3[0].conv2.weight.detach()
    deviation = (2 / (64 * 9)) ** 0.5
    assert abs(weight.std().item() / deviation - 1) < 0.03
    assert weight.abs().max() > 3 * deviation  # normal, not uniform


def test_relu_in_place_changes_neither_gradient_nor_input() -> None:
    block = BasicBlock(2, 2, stride=1).double()
    x = torch.randn(3, 2, 5, 5, dtype=torch.float64, requires_grad=True)
    before = x.detach().clone()
    plain = F.relu(block.bn2(block.conv2(F.relu(block.bn1(block.conv1(x))))) + x)
    assert torch.equal(block(x), plain)
    assert torch.equal(x.detach(), before)
    assert torch.equal(*(torch.autograd.grad(out.square().sum(), x)[0] for out in (block(x), plain)))


@pytest.mark.parametrize(
    ("arguments", "where"),
    [
        ({"depth": 21}, "depth"),
        ({"depth": 2}, "depth"),
        ({"depth": 20, "width": 0}, "width"),
        ({"depth": 20, "width": True}, "width"),
        ({"depth": 20, "width": 10**9}, "width"),
        ({"depth": 20, "num_classes": -1}, "num_classes"),
        ({"depth": 20, "input_shape": (64,)}, "input_shape"),
    ],
)
def test_wrong_arguments_are_named(arguments: dict, where: str) -> None:
    with pytest.raises(InputError) as caught:
        resnet(**arguments)
    assert caught.value.where == where


@pytest.fixture(scope="module")
def cifar10_test() -> tuple[torch.Tensor, torch.Tensor]:
    """The 10,000 exact test images, normalised as the published weights expect, and their labels."""
    import numpy as np
    import pyarrow.parquet as pq
    from PIL import Image

    table = pq.read_table(Path(DATA or "") / "cifar10_test.parquet")
    images = [np.asarray(Image.open(io.BytesIO(strip)).convert("RGB")).reshape(-1, 32, 32, 3) for strip in table["strip"].to_pylist()]
    assert set(table["step"].to_pylist()) == {1}
    x = torch.from_numpy(np.concatenate(images)).permute(0, 3, 1, 2).contiguous().float() / 255
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    labels = torch.frombuffer(bytearray(b"".join(table["labels"].to_pylist())), dtype=torch.uint8)
    return (x - mean[:, None, None]) / std[:, None, None], labels


@needs_data
@pytest.mark.parametrize(
    ("depth", "published"),
    [(20, 91.73), *(pytest.param(depth, accuracy, marks=pytest.mark.slow) for depth, accuracy in [(32, 92.63), (44, 93.10), (56, 93.39)])],
)
def test_published_weights_reach_their_published_accuracy(depth: int, published: float, cifar10_test: tuple[torch.Tensor, torch.Tensor]) -> None:
    network = resnet(depth).eval()
    load_weights(network, Path(DATA or "") / f"cifar10_resnet{depth}.safetensors")
    x, labels = cifar10_test
    with torch.inference_mode():
        right = sum((network(part).argmax(1) == wanted).sum().item() for part, wanted in zip(x.split(500), labels.split(500), strict=True))
    assert len(labels) == 10_000
    assert abs(100 * right / 10_000 - published) <= 0.1
