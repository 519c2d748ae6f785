"""Barlow Twins: the loss, the views, the head that is none, and that it learns without labels."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from limbeck import seeds
from limbeck.components import Component
from limbeck.contract import Batch, Clock, OptimiserSpec
from limbeck.data import ArrayData, AugmentSpec
from limbeck.errors import InputError
from limbeck.methods.datasets.barlow_twins import BarlowTwins, barlow_twins_loss, cross_correlation, make_projector
from limbeck.models import build_model
from limbeck.train import TrainConfig, Trainer

SEEDS = st.integers(0, 2**31)


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=seeds.generator(seed), dtype=torch.float64)


def small(outputs: int = 16) -> nn.Module:
    return build_model(Component(name="cnn", args={"widths": [8, 16]}), num_classes=outputs, input_shape=(1, 4, 4), seed=0)


def data(count: int = 256) -> ArrayData:
    """Two kinds of images, bright on the left or on top, under noise."""
    kinds = torch.arange(count) % 2
    images = torch.rand(count, 1, 4, 4, generator=seeds.generator(1)) * 0.5
    images[kinds == 0, :, :, :2] += 0.5
    images[kinds == 1, :, :2] += 0.5
    return ArrayData(images, kinds, mean=(0.5,), std=(0.25,))


def bound(**knobs) -> BarlowTwins:
    knobs = {"projector": (12,), "views": AugmentSpec(crop=1, noise=0.1)} | knobs
    return BarlowTwins(**knobs).bind(student=small(), train=data(), seed=3)


@given(SEEDS, st.floats(0, 1))
def test_the_loss_is_the_formula_symmetric_and_blind_to_scale_and_shift(seed: int, weight: float) -> None:
    a, b = drawn(seed, 64, 5), drawn(seed + 1, 64, 5)
    za, zb = ((z - z.mean(0)) / z.std(0, correction=0) for z in (a, b))
    c = torch.stack([torch.stack([(za[:, i] * zb[:, j]).sum() / 64 for j in range(5)]) for i in range(5)])
    by_hand = sum((1 - c[i, i]) ** 2 if i == j else weight * c[i, j] ** 2 for i in range(5) for j in range(5))
    found = barlow_twins_loss(a, b, weight)
    torch.testing.assert_close(found, torch.as_tensor(by_hand), rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(barlow_twins_loss(b, a, weight), found)
    torch.testing.assert_close(barlow_twins_loss(5 * a + 3, b - 2, weight), found, rtol=1e-3, atol=1e-6)
    assert (cross_correlation(a, b).abs() <= 1 + 1e-9).all()


def test_its_limits() -> None:
    z = drawn(0, 4096, 3)
    assert float(barlow_twins_loss(z, z)) < 1e-4  # alike and independent: 0
    same = z[:, :1].expand(-1, 3)
    assert float(barlow_twins_loss(same, same, 0.5)) == pytest.approx(0.5 * 6, rel=1e-3)  # alike and redundant: all off-diagonal ones
    assert float(barlow_twins_loss(z, drawn(1, 4096, 3), 0.0)) == pytest.approx(3, rel=0.1)  # nothing in common


def test_views_differ_follow_from_the_seed_and_are_black_outside() -> None:
    method, ids = bound(views=AugmentSpec(crop=2)), torch.arange(64)
    x = data().prepare(data().fetch(ids)[0])
    batch = Batch(x, None, ids)
    first, second = (method.view(batch, number, Clock(epoch=2)) for number in (0, 1))
    assert first.shape == x.shape
    assert not torch.equal(first, second)
    assert torch.equal(first, method.view(batch, 0, Clock(epoch=2)))
    assert not torch.equal(first, method.view(batch, 0, Clock(epoch=3)))
    assert float(first.min()) == pytest.approx(-2.0)  # (0 − 0.5) / 0.25, which no real pixel here is
    part = Batch(x[10:20], None, ids[10:20])
    assert torch.equal(method.view(part, 0, Clock(epoch=2)), first[10:20])


def test_the_head_is_the_identity_and_stays_so() -> None:
    method = bound()
    head = method.student.get_submodule("head")
    x = data().prepare(data().fetch(torch.arange(4))[0])
    method.student.eval()
    torch.testing.assert_close(method.student(x), method.student.features(x))
    before = method.student.features(x).detach().clone()
    Trainer(method, method.train_data, TrainConfig(steps=3, batch_size=64)).fit()
    assert torch.equal(head.weight.detach(), torch.eye(16))
    assert not torch.allclose(method.student.features(x), before)
    assert method.inference() is method.student
    assert method.facts() == {"vector": 16}
    with pytest.raises(InputError, match="16 features and 5 outputs"):
        BarlowTwins().bind(student=small(5), train=data())
    assert BarlowTwins(representation="outputs").bind(student=small(5), train=data()).facts() == {"vector": 5}


@pytest.mark.parametrize("projector", [(12, 12), ()])
def test_it_learns_what_images_show_without_their_labels(projector: tuple[int, ...]) -> None:
    method = bound(projector=projector)
    rows = Trainer(
        method, method.train_data, TrainConfig(steps=80, batch_size=128, log_every=10, optimiser=OptimiserSpec(name="adam", lr=3e-3)), seed=3
    ).fit().rows  # fmt: skip
    assert rows[-1]["student/loss"] < 0.5 * rows[0]["student/loss"]
    assert rows[-1]["student/alike"] > 0.6
    x, kinds = data().prepare(data().fetch(torch.arange(256))[0]), data().targets
    z = method.student(x).detach()
    centres = torch.stack([z[:32][kinds[:32] == k].mean(0) for k in (0, 1)])
    assert float((torch.cdist(z[32:], centres).argmin(1) == kinds[32:]).float().mean()) > 0.9


def test_the_projector() -> None:
    one, again, other = (make_projector((4, 6, 3), seeds.generator(seed)) for seed in (0, 0, 1))
    assert [type(layer).__name__ for layer in one] == ["Linear", "BatchNorm1d", "ReLU", "Linear"]
    assert torch.equal(one[0].weight, again[0].weight)
    assert not torch.equal(one[0].weight, other[0].weight)
    assert one(torch.zeros(2, 4)).shape == (2, 3)
    assert len(make_projector((4,), seeds.generator(0))) == 0


def test_wrong_input() -> None:
    with pytest.raises(InputError, match="of neither"):
        bound(views=AugmentSpec(mixup=0.2))
    with pytest.raises(InputError, match="trained on images"):
        BarlowTwins().bind(student=small())
    with pytest.raises(InputError, match="not \\[batch, entries\\]"):
        BarlowTwins(representation="outputs").bind(student=nn.Sequential(nn.Conv2d(1, 1, 1)), train=data())
