"""DSA: each formula against a loop in numpy, identities, replay, ranges, and derivatives of second order."""

from __future__ import annotations

import math
from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from limbeck import seeds
from limbeck.errors import InputError
from limbeck.synthetic.augment import Drawn, DSASpec, Operation, apply, draw, dsa

OPERATIONS: tuple[Operation, ...] = get_args(Operation)
IDENTITY = {"color": [0.0, 1.0, 1.0], "crop": [0.0, 0.0], "cutout": [3.0, 3.0, 0.0, 5.0], "flip": [0.0], "scale": [1.0, 1.0], "rotate": [0.0]}


def images(count: int = 3, channels: int = 2, height: int = 6, width: int = 8, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(count, channels, height, width, generator=seeds.generator(0, "images"), dtype=dtype)


def drawn_of(operation: Operation, count: int = 3, height: int = 6, width: int = 8, seed: int = 0) -> Drawn:
    return draw(DSASpec(operations=(operation,)), count, height, width, seeds.generator(seed, operation))


def by_hand(image_CHW: np.ndarray, operation: str, v: list[float]) -> np.ndarray:
    """One image by the sheet's words, pixel by pixel."""
    channels, height, width = image_CHW.shape
    if operation == "color":
        x = image_CHW + v[0]
        grey = x.mean(0, keepdims=True)
        x = (x - grey) * v[1] + grey
        return (x - x.mean()) * v[2] + x.mean()

    def pixel(c: int, i: int, j: int) -> float:
        return float(image_CHW[c, i, j]) if 0 <= i < height and 0 <= j < width else 0.0

    out = np.zeros_like(image_CHW)
    for c in range(channels):
        for i in range(height):
            for j in range(width):
                if operation == "crop":
                    out[c, i, j] = pixel(c, i + int(v[0]), j + int(v[1]))
                elif operation == "cutout":
                    out[c, i, j] = 0 if v[0] <= i < v[1] and v[2] <= j < v[3] else pixel(c, i, j)
                elif operation == "flip":
                    out[c, i, j] = pixel(c, i, width - 1 - j if v[0] else j)
                else:
                    a, b, d, e = (v[0], 0, 0, v[1]) if operation == "scale" else (math.cos(v[0]), -math.sin(v[0]), math.sin(v[0]), math.cos(v[0]))
                    gx, gy = 2 * j / (width - 1) - 1, 2 * i / (height - 1) - 1
                    x, y = (a * gx + b * gy + 1) / 2 * (width - 1), (d * gx + e * gy + 1) / 2 * (height - 1)
                    left, top = math.floor(x), math.floor(y)
                    out[c, i, j] = sum(
                        pixel(c, top + p, left + q) * (y - top if p else 1 - y + top) * (x - left if q else 1 - x + left) for p in (0, 1) for q in (0, 1)
                    )
    return out


@pytest.mark.parametrize("operation", OPERATIONS)
def test_each_operation_is_the_sheets_formula(operation: Operation) -> None:
    x, drawn = images(5), drawn_of(operation, 5)
    wanted = np.stack([by_hand(image, operation, row) for image, row in zip(x.numpy(), drawn.values.double().tolist(), strict=True)])
    found = apply(x, drawn)
    assert np.abs(found.numpy() - wanted).max() < 1e-9
    assert not torch.allclose(found, x, atol=1e-3)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_zero_strength_is_the_identity(operation: Operation) -> None:
    x = images()
    assert torch.allclose(apply(x, Drawn(operation, torch.tensor([IDENTITY[operation]]).repeat(3, 1))), x, atol=1e-12)
    weak = DSASpec(operations=("crop", "cutout", "flip", "scale", "rotate"), crop=0, cutout=0, flip=0, scale=1, rotate=0)
    generator = seeds.generator(1)
    for _ in range(10):
        assert torch.allclose(dsa(x, weak, generator), x, atol=1e-12)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_derivatives_of_first_and_second_order_are_right(operation: Operation) -> None:
    x, drawn = images(2, 2, 4, 5).requires_grad_(), drawn_of(operation, 2, 4, 5, seed=3)
    assert torch.autograd.gradcheck(lambda x: apply(x, drawn), (x,))
    assert torch.autograd.gradgradcheck(lambda x: apply(x, drawn).sin(), (x,))


@pytest.mark.parametrize("operation", OPERATIONS)
def test_images_get_a_gradient_through_a_step_of_training(operation: Operation) -> None:
    network = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.GroupNorm(4, 4), nn.ReLU(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(4 * 3 * 4, 3)).double()
    x, drawn, labels = images().requires_grad_(), drawn_of(operation), torch.tensor([0, 1, 2])

    def moved(x: Tensor) -> Tensor:
        loss = nn.functional.cross_entropy(network(apply(x, drawn)), labels)
        return torch.stack([g.square().sum() for g in torch.autograd.grad(loss, list(network.parameters()), create_graph=True)]).sum()

    (gradient,) = torch.autograd.grad(moved(x), x)
    direction = torch.randn(x.shape, generator=seeds.generator(5), dtype=torch.float64)
    step = 1e-6
    slope = (moved(x + step * direction) - moved(x - step * direction)) / (2 * step)
    assert gradient.abs().amax((1, 2, 3)).min() > 0
    assert torch.allclose((gradient * direction).sum(), slope, rtol=1e-4)


def test_a_draw_can_be_replayed_and_comes_from_the_generator_alone() -> None:
    x, spec = images(dtype=torch.float32), DSASpec()
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = draw(spec, 3, 6, 8, seeds.generator(4))
    again = draw(spec, 3, 6, 8, seeds.generator(4))
    assert first.operation == again.operation
    assert torch.equal(first.values, again.values)
    assert torch.equal(apply(x, first), apply(x, first))
    assert torch.equal(apply(x, first), dsa(x, spec, seeds.generator(4)))
    assert torch.equal(torch.get_rng_state(), before)
    assert apply(x, first).dtype == torch.float32
    assert len(first.to("cpu")) == 3


def test_every_image_has_its_own_numbers_and_one_row_serves_all() -> None:
    x = images(4)
    for operation in OPERATIONS:
        drawn = drawn_of(operation, 4, seed=2)
        parts = [apply(x[i : i + 1], Drawn(operation, drawn.values[i : i + 1])) for i in range(4)]
        assert torch.allclose(apply(x, drawn), torch.cat(parts), atol=1e-12)
        assert torch.allclose(apply(x, Drawn(operation, drawn.values[:1]))[0], parts[0][0], atol=1e-12)
    assert len(drawn_of("scale", 64).values.unique(dim=0)) == 64


def test_one_operation_a_batch_uniformly() -> None:
    generator, spec = seeds.generator(0, "uniform"), DSASpec()
    found = [draw(spec, 2, 8, 8, generator).operation for _ in range(1200)]
    assert all(150 < found.count(operation) < 250 for operation in OPERATIONS)  # 200 ± 13
    only = DSASpec(operations=("flip", "crop"))
    assert {draw(only, 2, 8, 8, generator).operation for _ in range(40)} == {"flip", "crop"}


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(OPERATIONS), st.integers(1, 40), st.integers(1, 40), st.integers(0, 10**6))
def test_numbers_lie_in_the_sheets_ranges(operation: Operation, height: int, width: int, seed: int) -> None:
    v = drawn_of(operation, 30, height, width, seed).values
    assert v.shape[0] == 30
    assert v.dtype == torch.float32
    if operation == "color":
        assert (v[:, 0].abs() <= 0.5).all()
        assert (v[:, 1] >= 0).all()
        assert (v[:, 1] < 2).all()
        assert (v[:, 2] >= 0.5).all()
        assert (v[:, 2] <= 1.5).all()
    elif operation == "crop":
        most = torch.tensor([int(side / 8 + 0.5) for side in (height, width)])
        assert (v.abs() <= most).all()
        assert torch.equal(v, v.round())
    elif operation == "cutout":
        for edges, side in ((v[:, :2], height), (v[:, 2:], width)):
            size = edges[:, 1] - edges[:, 0]
            assert (edges >= 0).all()
            assert (edges <= side).all()
            assert (size <= int(side / 2 + 0.5)).all()
            assert (size >= int(side / 2 + 0.5) // 2).all()
    elif operation == "flip":
        assert set(v[:, 0].tolist()) <= {0.0, 1.0}
    elif operation == "scale":
        assert (v >= 1 / 1.2 - 1e-6).all()
        assert (v <= 1.2 + 1e-6).all()
        assert v.shape == (30, 2)
    else:
        assert (v.abs() <= math.radians(15) + 1e-6).all()


def test_the_ranges_are_filled() -> None:
    crop = drawn_of("crop", 4000, 32, 32).values
    assert set(crop[:, 0].tolist()) == set(crop[:, 1].tolist()) == {float(k) for k in range(-4, 5)}
    assert abs(float(drawn_of("flip", 4000).values.mean()) - 0.5) < 0.03
    scale = drawn_of("scale", 4000).values
    assert scale.min() < 0.835
    assert scale.max() > 1.198
    assert abs(float(scale.mean()) - (1.2 + 1 / 1.2) / 2) < 0.01
    angle = drawn_of("rotate", 4000).values
    assert angle.min() < -math.radians(14.8)
    assert angle.max() > math.radians(14.8)
    top = drawn_of("cutout", 4000, 8, 8).values[:, 0]
    assert set(top.tolist()) == {0.0, 1, 2, 3, 4, 5, 6}  # centres 0 to 8, minus 2, clipped


def test_spec_is_json_and_refuses_what_makes_no_sense() -> None:
    spec = DSASpec(operations=("flip",), rotate=10)
    assert DSASpec.model_validate_json(spec.model_dump_json()) == spec
    for wrong in ({"operations": ()}, {"operations": ("blur",)}, {"scale": 0.5}, {"flip": 2}, {"angle": 3}):
        with pytest.raises(ValueError):
            DSASpec.model_validate(wrong)


def test_wrong_images_and_counts_are_refused() -> None:
    drawn = drawn_of("flip", 3)
    for x in (images(4), images()[0], images().to(torch.int64)):
        with pytest.raises(InputError):
            apply(x, drawn)
    for x in (images()[:, 0, 0], images()[0], torch.tensor(1.0), images().to(torch.int64)):
        with pytest.raises(InputError, match="float images"):
            dsa(x, DSASpec(), seeds.generator(0))
    with pytest.raises(InputError):
        draw(DSASpec(), 0, 8, 8, seeds.generator(0))
