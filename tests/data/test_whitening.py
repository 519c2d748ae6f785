"""ZCA: eigenvalues of the outputs, inverse, fewer images than pixels, and whitened data sets."""

from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor

from limbeck import seeds
from limbeck.contract import Data
from limbeck.data import ZCA, ArrayData, Whitened, origins, preprocessing, subset, whiten, whitening
from limbeck.errors import InputError


def images(count: int = 300, shape: tuple[int, int, int] = (3, 4, 4), seed: int = 0) -> Tensor:
    """Correlated pixels in [0, 1]."""
    generator = seeds.generator(seed, "images")
    size = shape[0] * shape[1] * shape[2]
    mixed = torch.randn(count, size, generator=generator) @ torch.randn(size, size, generator=seeds.generator("mixing")) / size**0.5
    return mixed.sigmoid().view(count, *shape)


def data(count: int = 300, seed: int = 0) -> ArrayData:
    return ArrayData((images(count, seed=seed) * 255).round().to(torch.uint8), torch.arange(count) % 5, mean=(0.4,), std=(0.2,))


def test_the_outputs_covariance_has_the_eigenvalues_lambda_over_lambda_plus_epsilon() -> None:
    for epsilon in (0.1, 0.003):
        x = images()
        zca = ZCA.fit(x, epsilon)
        lambdas = torch.linalg.eigvalsh(torch.cov(x.flatten(1).double().T))
        whitened = zca.forward(x).flatten(1).double()
        assert whitened.mean(0).abs().max() < 1e-5
        assert torch.allclose(torch.linalg.eigvalsh(torch.cov(whitened.T)), lambdas / (lambdas + epsilon), atol=1e-5)


def test_it_is_the_equation_and_symmetric() -> None:
    x = images(50)
    flat = x.flatten(1).double()
    lambdas, axes = torch.linalg.eigh((flat - flat.mean(0)).T @ (flat - flat.mean(0)) / 49)
    wanted = (flat - flat.mean(0)) @ (axes @ torch.diag((lambdas + 0.1) ** -0.5) @ axes.T)
    zca = ZCA.fit(x)
    assert torch.allclose(zca.forward(x).flatten(1).double(), wanted, atol=1e-5)
    assert torch.allclose(zca.matrix, zca.matrix.T, atol=1e-6)
    assert zca.forward(x).shape == x.shape
    assert zca.forward(x).dtype == torch.float32


@pytest.mark.parametrize("count", [300, 7])
def test_inverse_undoes_forward_also_with_fewer_images_than_pixels(count: int) -> None:
    zca, other = ZCA.fit(images(count)), images(20, seed=9)
    assert torch.allclose(zca.inverse(zca.forward(other)), other, atol=1e-5)
    assert torch.isfinite(zca.matrix).all()


def test_unseen_directions_are_multiplied_by_epsilon_to_minus_one_half() -> None:
    x = images(7)
    zca = ZCA.fit(x)
    axes = torch.linalg.svd((x - x.mean(0)).flatten(1).double(), full_matrices=True).Vh
    assert torch.allclose(axes[6:] @ zca.matrix.double(), axes[6:] * 0.1**-0.5, atol=1e-5)
    constant = ZCA.fit(torch.full((4, 1, 2, 2), 0.25))
    assert torch.allclose(constant.forward(torch.full((1, 1, 2, 2), 0.25)), torch.zeros(1, 1, 2, 2), atol=1e-6)


def test_chunks_and_raw_types_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = ZCA.fit(data())
    monkeypatch.setattr(whitening, "_CHUNK", 37)
    pieces = ZCA.fit(data())
    assert torch.allclose(whole.matrix, pieces.matrix, atol=1e-6)
    floats = ZCA.fit(data().inputs.float() / 255)
    assert torch.allclose(whole.matrix, floats.matrix, atol=1e-5)
    assert torch.allclose(whole.mean, floats.mean, atol=1e-6)
    assert torch.equal(ZCA.fit(data().inputs).matrix, pieces.matrix)


def test_forward_and_inverse_carry_gradients_and_move() -> None:
    zca, x = ZCA.fit(images()).to("cpu"), images(4).requires_grad_()
    zca.inverse(zca.forward(x)).sum().backward()
    assert torch.allclose(x.grad, torch.ones_like(x), atol=1e-4)


def test_all_parts_are_whitened_by_the_first_ones_fit() -> None:
    train, test = data(), data(40, seed=5)
    whitened, other = whiten(train, test)
    assert isinstance(whitened, Data)
    assert whitened.zca is other.zca
    raw, targets = other.fetch(torch.tensor([3, 1]))
    assert raw.dtype == torch.uint8
    assert targets is not None
    assert targets.tolist() == [3, 1]
    pixels = raw.float() / 255
    assert torch.equal(other.prepare(raw), ZCA.fit(train).forward(pixels)), "the set's own mean and std must not be applied"
    assert torch.equal(other.prepare(pixels), other.prepare(raw))
    assert len(other) == 40
    assert other.classes == test.classes
    assert torch.equal(other.targets, test.targets)


def test_a_whitened_data_set_says_so_in_small_json() -> None:
    (whitened,) = whiten(data())
    said = preprocessing(subset(whitened, torch.arange(3)))
    assert said["name"] == "zca"
    assert said["epsilon"] == 0.1
    assert said["divide_by"] == 255
    assert said["shape"] == [3, 4, 4]
    assert said["samples"] == 300
    assert len(json.dumps(said)) < 400


def test_origins_and_fingerprints_are_those_of_the_data_within() -> None:
    whole = data()
    half, rest = whole.subset(torch.arange(0, 300, 2)), whole.subset(torch.arange(1, 300, 2))
    first, second = whiten(half, rest)
    assert torch.equal(first.origins, half.origins)
    assert torch.equal(first.root.data.inputs, whole.inputs)
    assert first.inputs_fingerprint == second.inputs_fingerprint != whole.inputs_fingerprint
    assert first.inputs_fingerprint != whiten(half, epsilon=0.2)[0].inputs_fingerprint
    assert first.inputs_fingerprint != whiten(rest)[0].inputs_fingerprint, "fitted on other images"
    view = subset(first, torch.tensor([4, 2]))
    assert torch.equal(view.prepare(view.fetch(torch.tensor([0]))[0]), first.prepare(half.inputs[4:5]))
    assert len(origins(view)) == 2


def test_wrong_inputs_are_refused() -> None:
    (whitened,) = whiten(data())
    for wrong in (
        lambda: ZCA.fit(images() * 3),
        lambda: ZCA.fit(torch.full((4, 2), float("nan"))),
        lambda: ZCA.fit(images(1)),
        lambda: ZCA.fit(images(), epsilon=0.0),
        lambda: whitened.prepare(torch.zeros(2, 3, 5, 5)),
        lambda: whiten(whitened),
        lambda: whiten(subset(whitened, torch.arange(9))),
        lambda: Whitened(ArrayData(torch.zeros(4, 3, 5, 5)), whitened.zca),
    ):
        with pytest.raises(InputError):
            wrong()
