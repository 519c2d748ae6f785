"""ConvNet-D and the networks of the cross-architecture test: the published parameter counts, small and odd images, norms."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from limbeck.errors import InputError
from limbeck.models.convnet import alexnet_small, convnet, resnet18_small, vgg11_small
from limbeck.models.small import Network, convnet3

OTHERS = [alexnet_small, vgg11_small, resnet18_small]


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize(
    ("classes", "shape", "depth", "published"),
    [(10, (3, 32, 32), 3, 320_010), (100, (3, 32, 32), 3, 504_420), (10, (1, 28, 28), 3, 317_706), (200, (3, 64, 64), 4, 857_160)],
)
def test_convnet_has_the_published_number_of_parameters(classes: int, shape: tuple[int, ...], depth: int, published: int) -> None:
    assert count(convnet(classes, shape, depth=depth)) == published


def test_depth_three_is_convnet3() -> None:
    for shape in ((1, 28, 28), (3, 16, 24)):
        mine, theirs = convnet(4, shape, width=6), convnet3(4, shape, width=6)
        mine.load_state_dict(theirs.state_dict())
        x = torch.randn(3, *shape)
        assert torch.equal(mine(x), theirs(x))


@pytest.mark.parametrize(
    ("shape", "padding", "dim"), [((1, 14, 14), None, 4 * 4), ((1, 14, 14), 1, 3 * 3), ((3, 14, 14), None, 3 * 3), ((1, 8, 16), 1, 2 * 4), ((1, 8, 8), 1, 4)]
)
def test_average_pooling_floors(shape: tuple[int, int, int], padding: int | None, dim: int) -> None:
    network = convnet(10, shape, depth=2, width=5, padding=padding)
    assert isinstance(network, Network)
    features = network.features(torch.randn(3, *shape))
    assert features.shape == (3, 5 * dim)
    assert network.head(features).shape == (3, 10)


def test_instance_norm_acts_on_each_image_alone_in_training_as_in_evaluation() -> None:
    network, x = convnet(5, (3, 16, 16), depth=2, width=6), torch.randn(4, 3, 16, 16)
    trained = network.train()(x)
    assert torch.equal(trained, network.eval()(x))
    assert torch.allclose(trained[1:2], network(x[1:2]), atol=1e-5)
    assert not list(network.buffers())


def test_growing_widths_with_batch_norm_and_no_norm_at_all() -> None:
    network = convnet(7, (1, 14, 14), widths=[16, 32], norm="batch", padding=1)
    assert [m.num_features for m in network.modules() if isinstance(m, nn.BatchNorm2d)] == [16, 32]
    assert network.head.in_features == 32 * 3 * 3
    bare = convnet(7, (3, 16, 16), depth=2, width=4, norm="none")
    assert {type(m) for m in bare.features} == {nn.Conv2d, nn.ReLU, nn.AvgPool2d, nn.Flatten}


@pytest.mark.parametrize("build", OTHERS)
@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 8, 16), (1, 14, 14), (3, 32, 32), (3, 64, 64), (2, 9, 63)])
def test_other_families_take_images_from_8_to_64(build: Callable[..., Network], shape: tuple[int, int, int]) -> None:
    network = build(6, shape, width=4)
    x = torch.randn(2, *shape)
    logits = network(x)
    assert logits.shape == (2, 6)
    assert torch.equal(logits, network.head(network.features(x)))
    assert network.features(x).std(0).max() > 1e-4, "a norm over one pixel makes all images alike"
    assert not any(isinstance(m, nn.Dropout) for m in network.modules())
    assert not list(network.buffers())
    one = network(x[:1])  # a single image in training mode: no norm may see a single value
    assert torch.allclose(one, logits[:1], atol=1e-4)


@pytest.mark.parametrize("build", [convnet, *OTHERS])
@pytest.mark.parametrize("norm", ["batch", "none"])
def test_other_norms_give_gradients_to_all_parameters(build: Callable[..., Network], norm: str) -> None:
    network = build(3, (3, 16, 16), width=4, norm=norm)
    assert any(isinstance(m, nn.BatchNorm2d) for m in network.modules()) == (norm == "batch")
    assert not any(isinstance(m, nn.GroupNorm) for m in network.modules())
    network(torch.randn(4, 3, 16, 16)).square().sum().backward()
    assert all(p.grad is not None for p in network.parameters())


def test_full_sizes_are_those_of_the_families() -> None:
    resnet, vgg = resnet18_small(10, (3, 32, 32), norm="batch"), vgg11_small(10, (3, 32, 32), norm="none")
    assert count(resnet) == 11_173_962  # ResNet-18 on CIFAR, as commonly counted
    assert count(vgg) == 9_220_480 + 5_130  # VGG-11's convolutions (arXiv 1409.1556), one linear layer


@pytest.mark.parametrize(
    ("make", "where"),
    [
        (lambda: convnet(3, (3, 8, 8), depth=4), "input_shape"),
        (lambda: convnet(3, (8, 8)), "input_shape"),
        (lambda: convnet(3, (3, 8, 8), norm="layer"), "norm"),  # type: ignore[arg-type]
        (lambda: convnet(3, (3, 8, 8), width=4, widths=[4, 4]), "widths"),
        (lambda: convnet(3, (3, 8, 8), depth=3, widths=[4, 4]), "widths"),
        (lambda: convnet(3, (3, 8, 8), widths=[]), "widths"),
        (lambda: convnet(3, (3, 8, 8), padding=-1), "padding"),
        (lambda: convnet(3, (3, 8, 8), width=0), "width"),
        (lambda: alexnet_small(3, (3, 7, 8)), "input_shape"),
        (lambda: vgg11_small(3, (3, 8, 65)), "input_shape"),
        (lambda: resnet18_small(3, (3, 128, 128)), "input_shape"),
        (lambda: alexnet_small(3, (3, 8, 8), norm="x"), "norm"),  # type: ignore[arg-type]
    ],
)
def test_what_does_not_fit_is_refused_with_a_place(make: Callable[[], Network], where: str) -> None:
    with pytest.raises(InputError) as caught:
        make()
    assert caught.value.where == where
