"""Pairs of digits: which digits they are made of, their classes, their constants."""

import pytest
import torch

from limbeck.data.composites import digit_pairs, pairs
from limbeck.data.sources import digits
from limbeck.errors import InputError


def rows(images: torch.Tensor) -> set[bytes]:
    return {image.numpy().tobytes() for image in images}


def halves(data) -> torch.Tensor:
    return torch.cat([data.inputs[..., :8], data.inputs[..., 8:]]).contiguous()


def test_composites_are_pairs_of_digits_of_their_own_side_alone():
    found, single = digit_pairs(count=400, test=300, test_digits=360, seed=3), digits(test_size=360, seed=3)
    assert (len(single.train), len(single.test)) == (1437, 360)
    assert (len(found.train), len(found.test), found.input_shape, found.num_classes) == (400, 300, (1, 8, 16), 100)
    train, test = (rows(part.fetch(torch.arange(len(part)))[0].contiguous()) for part in (single.train, single.test))
    assert rows(halves(found.train)) <= train
    assert rows(halves(found.test)) <= test
    assert not rows(halves(found.test)) & train


def test_the_class_is_the_ordered_pair():
    single, found = digits(test_size=360, seed=0), digit_pairs(count=250, test=100, seed=0)
    whole, labels = single.train.fetch(torch.arange(len(single.train)))
    label_of = {image.numpy().tobytes(): int(label) for image, label in zip(whole.contiguous(), labels, strict=True)}
    for image, target in zip(found.train.inputs, found.train.targets, strict=True):
        left, right = (label_of[half.contiguous().numpy().tobytes()] for half in (image[..., :8], image[..., 8:]))
        assert int(target) == 10 * left + right
        assert found.train.classes[int(target)] == f"{left}{right}"


def test_classes_are_equally_frequent_and_images_differ_within_a_class():
    found = digit_pairs(count=1050, test=100)
    assert found.train.targets.bincount().tolist() == [11] * 50 + [10] * 50
    assert found.test.targets.tolist() == list(range(100))
    of_class = found.train.inputs[found.train.targets == 37]
    assert len(rows(of_class)) > 5


def test_the_draw_is_uniform_over_a_digits_images():
    images, labels = torch.arange(20.0).view(20, 1, 1, 1), torch.arange(20) % 10
    made, targets = pairs(images, labels, 40_000, torch.Generator().manual_seed(0))
    assert torch.equal(made[:, 0, 0].long() % 10, torch.stack((targets // 10, targets % 10), 1))
    high = (made[:, 0, 0] >= 10).double()
    assert high.mean(0).tolist() == pytest.approx([0.5, 0.5], abs=0.01)
    assert float((high[:, 0] * high[:, 1]).mean()) == pytest.approx(0.25, abs=0.01)  # the halves are independent


def test_the_seed_decides_and_both_sides_have_the_training_constants():
    first, again, other = (digit_pairs(count=500, test=100, seed=seed) for seed in (1, 1, 2))
    assert first.train.fingerprint == again.train.fingerprint
    assert first.train.fingerprint != other.train.fingerprint
    prepared = first.train.prepare(first.train.inputs)
    assert float(prepared.mean()) == pytest.approx(0, abs=1e-5)
    assert float(prepared.std()) == pytest.approx(1, abs=1e-5)
    assert (first.test.mean, first.test.std) == (first.train.mean, first.train.std)
    symmetric = digit_pairs(count=100, test=100, scale="symmetric").train
    assert (float(symmetric.prepare(symmetric.inputs).min()), float(symmetric.prepare(symmetric.inputs).max())) == (-1.0, 1.0)


@pytest.mark.parametrize(
    ("knobs", "where"), [({"count": 0}, "count"), ({"test": True}, "test"), ({"test_digits": 1797}, "test_digits"), ({"test_digits": 3}, "test_digits")]
)
def test_what_cannot_be_is_said(knobs, where):
    with pytest.raises(InputError) as caught:
        digit_pairs(**({"count": 100, "test": 100} | knobs))
    assert caught.value.where == where


def test_an_unknown_scale_is_said():
    with pytest.raises(InputError, match="scale"):
        digit_pairs(count=100, test=100, scale="standart")
