import pytest
import torch
from torch import nn

from limbeck.errors import InputError
from limbeck.models.small import cnn, convnet3, feature_cnn, mlp


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize(
    ("network", "shape", "dim"),
    [
        (mlp([16, 8], 5, (1, 8, 8), "gelu"), (1, 8, 8), 8),
        (mlp([], 5, [30]), (30,), 30),
        (cnn([4, 6], 5, (1, 28, 28)), (1, 28, 28), 6 * 7 * 7),
        (cnn([4, 6, 8], 5, (3, 9, 8), hidden=11, batch_norm=False), (3, 9, 8), 11),
        (convnet3(5, (3, 32, 32), width=4), (3, 32, 32), 4 * 4 * 4),
        (convnet3(5, (1, 8, 8), width=4), (1, 8, 8), 4),
        (feature_cnn(5, (1, 28, 28)), (1, 28, 28), 64),
    ],
)
def test_logits_are_the_head_of_the_features(network: nn.Module, shape: tuple[int, ...], dim: int) -> None:
    x = torch.randn(3, *shape)
    network.eval()
    assert network.features(x).shape == (3, dim)
    assert network(x).shape == (3, 5)
    assert torch.equal(network(x), network.head(network.features(x)))


@pytest.mark.parametrize(("shape", "classes", "parameters"), [((3, 32, 32), 10, 320_010), ((3, 32, 32), 100, 504_420), ((1, 28, 28), 10, 317_706)])
def test_convnet3_has_the_parameter_counts_of_the_sheet(shape: tuple[int, ...], classes: int, parameters: int) -> None:
    assert count(convnet3(classes, shape)) == parameters


def test_convnet3_answers_alike_in_training_and_evaluation_and_alone() -> None:
    network = convnet3(5, (3, 16, 16), width=8)
    x = torch.randn(4, 3, 16, 16)
    together = network.train()(x)
    assert torch.equal(together, network.eval()(x))
    torch.testing.assert_close(network(x[:1]), together[:1])


def test_feature_cnn_gives_non_negative_features_and_a_head_without_bias() -> None:
    network = feature_cnn(4, (1, 12, 12), width=3, dim=7)
    features = network.features(torch.randn(5, 1, 12, 12))
    assert features.shape == (5, 7)
    assert (features >= 0).all()
    assert (features > 0).any()
    assert network.head.bias is None
    assert network.head.weight.shape == (4, 7)


def test_batch_norm_and_hidden_layer_are_what_was_asked_for() -> None:
    with_norm, without = cnn([4], 2, (1, 4, 4), hidden=3), cnn([4], 2, (1, 4, 4), batch_norm=False)
    assert count(with_norm) == 4 * 9 + 2 * 4 + (16 * 3 + 3) + (3 * 2 + 2)
    assert count(without) == (4 * 9 + 4) + (16 * 2 + 2)


def test_activation_is_used() -> None:
    assert any(isinstance(m, nn.Tanh) for m in mlp([3], 2, (4,), "tanh").modules())
    assert any(isinstance(m, nn.ReLU) for m in mlp([3], 2, (4,)).modules())


@pytest.mark.parametrize(
    ("build", "where", "says"),
    [
        (lambda: mlp([8], 3, (4,), "rleu"), "activation", "Did you mean 'relu'"),
        (lambda: mlp("64", 3, (4,)), "hidden", "list"),
        (lambda: mlp([8, -1], 3, (4,)), "hidden", "-1"),
        (lambda: mlp([8], 0, (4,)), "num_classes", "0"),
        (lambda: mlp([8], 3, ()), "input_shape", "no dimension"),
        (lambda: mlp([2.5], 3, (4,)), "hidden", "2.5"),
        (lambda: cnn([8], 3, (64,)), "input_shape", "mlp"),
        (lambda: cnn([8] * 4, 3, (1, 8, 8)), "widths", "4 times"),
        (lambda: cnn([8], 3, (1, 8, 8), hidden=-1), "hidden", "-1"),
        (lambda: cnn([8], 3, (1, 8, 8), batch_norm="no"), "batch_norm", "neither"),
        (lambda: convnet3(3, (3, 7, 32)), "input_shape", "7×32"),
        (lambda: feature_cnn(3, (1, 3, 3)), "input_shape", "3×3"),
        (lambda: feature_cnn(3, (1, 8, 8), dim=0), "dim", "0"),
    ],
)
def test_wrong_arguments_are_named(build, where: str, says: str) -> None:
    with pytest.raises(InputError) as caught:
        build()
    assert caught.value.where == where
    assert says in str(caught.value)
