"""Augmentation against a slow reference, one sample at a time, and its purity in (seed, epoch, id)."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor

from limbeck import seeds
from limbeck.contract import IGNORE
from limbeck.data import AugmentSpec, augment, crop, cutmix, cutout, flip, mixup
from limbeck.data.augment import beta_quantile, blend, mates, noise, soft_targets, transform
from limbeck.errors import InputError

DTYPES = st.sampled_from([torch.uint8, torch.float32])
SHAPES = st.tuples(st.integers(1, 6), st.integers(1, 3), st.integers(1, 9), st.integers(1, 9))
SEEDS = st.integers(0, 2**32)


def _images(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    values = torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(seed))
    return values.to(dtype) if dtype == torch.uint8 else values / 97 - 1


def _draw(seed: int, high: int, count: int) -> Tensor:
    return torch.randint(0, high, (count,), generator=torch.Generator().manual_seed(seed))


# the slow reference


def _crop(image_CHW: Tensor, top: int, left: int, padding: int) -> Tensor:
    out = torch.zeros_like(image_CHW)
    for h in range(out.shape[1]):
        for w in range(out.shape[2]):
            y, x = top + h - padding, left + w - padding
            if 0 <= y < out.shape[1] and 0 <= x < out.shape[2]:
                out[:, h, w] = image_CHW[:, y, x]
    return out


def _box_pixels(shape: tuple[int, ...], row: int, column: int, height: int, width: int) -> list[tuple[int, int]]:
    top, left = row - height // 2, column - width // 2
    return [(h, w) for h in range(top, top + height) for w in range(left, left + width) if 0 <= h < shape[1] and 0 <= w < shape[2]]


def _cutout(image_CHW: Tensor, row: int, column: int, size: int) -> Tensor:
    out = image_CHW.clone()
    for h, w in _box_pixels(image_CHW.shape, row, column, size, size):
        out[:, h, w] = 0
    return out


def _cutmix(image_CHW: Tensor, mate_CHW: Tensor, lam: float, row: int, column: int) -> tuple[Tensor, float]:
    out, side = image_CHW.clone(), math.sqrt(1 - lam)
    H, W = image_CHW.shape[1:]
    pixels = _box_pixels(image_CHW.shape, row, column, int(H * side), int(W * side))
    for h, w in pixels:
        out[:, h, w] = mate_CHW[:, h, w]
    return out, 1 - len(pixels) / (H * W)


@given(SHAPES, DTYPES, st.integers(0, 5), SEEDS)
def test_crop(shape: tuple[int, ...], dtype: torch.dtype, padding: int, seed: int) -> None:
    images = _images(shape, dtype, seed)
    top, left = _draw(seed, 2 * padding + 1, len(images)), _draw(seed + 1, 2 * padding + 1, len(images))
    expected = torch.stack([_crop(image, int(t), int(w), padding) for image, t, w in zip(images, top, left, strict=True)])
    assert torch.equal(crop(images, top, left, padding), expected)
    middle = torch.full_like(top, padding)
    assert torch.equal(crop(images, middle, middle, padding), images)
    assert torch.equal(crop(images.transpose(2, 3), middle, middle, padding), images.transpose(2, 3))  # a view is as good


@given(SHAPES, DTYPES, SEEDS)
def test_flip(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> None:
    images, flipped = _images(shape, dtype, seed), _draw(seed, 2, shape[0]).bool()
    before = images.clone()
    expected = torch.stack([torch.from_numpy(x.numpy()[:, :, ::-1].copy()) if f else x for x, f in zip(images, flipped, strict=True)])
    assert torch.equal(flip(images, flipped), expected)
    assert torch.equal(images, before)


@given(SHAPES, DTYPES, st.integers(1, 12), SEEDS)
def test_cutout(shape: tuple[int, ...], dtype: torch.dtype, size: int, seed: int) -> None:
    images, row, column = _images(shape, dtype, seed), _draw(seed, shape[2], shape[0]), _draw(seed + 1, shape[3], shape[0])
    expected = torch.stack([_cutout(x, int(r), int(c), size) for x, r, c in zip(images, row, column, strict=True)])
    assert torch.equal(cutout(images, row, column, size), expected)


@given(SHAPES, DTYPES, SEEDS)
def test_mixup(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> None:
    images, other = _images(shape, dtype, seed), _images(shape, dtype, seed + 1)
    lam = seeds.uniform(torch.arange(shape[0]), 1, seed)[:, 0]
    mixed = mixup(images, other, lam)
    assert mixed.dtype == dtype
    expected = torch.stack([x.double() * w + y.double() * (1 - w) for x, y, w in zip(images, other, lam.tolist(), strict=True)])
    torch.testing.assert_close(mixed.double(), expected, rtol=1e-5, atol=0.5001 if dtype == torch.uint8 else 1e-5)
    assert torch.equal(mixup(images, other, torch.ones(shape[0])), images)
    assert torch.equal(mixup(images, other, torch.zeros(shape[0])), other)


@given(SHAPES, DTYPES, SEEDS)
def test_cutmix(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> None:
    images, other = _images(shape, dtype, seed), _images(shape, dtype, seed + 1)
    row, column = _draw(seed, shape[2], shape[0]), _draw(seed + 1, shape[3], shape[0])
    lam = seeds.uniform(torch.arange(shape[0]), 1, seed)[:, 0]
    mixed, kept = cutmix(images, other, lam, row, column)
    expected = [_cutmix(*parts) for parts in zip(images, other, lam.tolist(), row.tolist(), column.tolist(), strict=True)]
    assert torch.equal(mixed, torch.stack([image for image, _ in expected]))
    torch.testing.assert_close(kept, torch.tensor([share for _, share in expected], dtype=torch.float64))
    unchanged, kept = cutmix(images, other, torch.ones(shape[0]), row, column)
    assert torch.equal(unchanged, images)
    assert (kept == 1).all()


SPECS = [
    AugmentSpec(crop=2, flip=True, cutout=3, noise=0.1),
    AugmentSpec(flip=True, mixup=0.4),
    AugmentSpec(crop=1, cutmix=1.0),
    AugmentSpec(crop=1, flip=True, cutout=2, noise=0.02, mixup=0.8, cutmix=1.0),
]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
@pytest.mark.parametrize("spec", SPECS)
def test_the_whole_against_a_loop_over_samples(spec: AugmentSpec, dtype: torch.dtype) -> None:
    """Odd sizes (5 x 7, 11 samples), so that nothing aligns with vector registers; equality is of bits."""
    images, targets = _images((11, 3, 5, 7), dtype, 0), torch.tensor([0, 1, 2, 3, IGNORE, 0, 1, 2, 3, IGNORE, 1])
    ids = torch.tensor([907, 3, 0, 44, 5, 61, 7, 80, 9, 10**12, 11])
    key = {"seed": 5, "epoch": 2}
    moved = []
    for image, sample in zip(images, ids, strict=True):
        u = seeds.uniform(sample[None], 5, 5, 2, "geometry")[0].tolist()
        if spec.crop:
            image = _crop(image, int(u[0] * (2 * spec.crop + 1)), int(u[1] * (2 * spec.crop + 1)), spec.crop)
        if spec.flip and u[2] < 0.5:
            image = image.flip(2)
        if spec.noise:
            image = noise(image[None], sample[None], sd=spec.noise, **key)[0]
        if spec.cutout:
            image = _cutout(image, int(u[3] * 5), int(u[4] * 7), spec.cutout)
        moved.append(image)
    expected, labels = torch.stack(moved), targets
    if spec.mixes:
        order = seeds.uniform(ids, 1, 5, 2, "mates")[:, 0].argsort().tolist()
        mate = {order[k]: order[(k + 1) % 11] for k in range(11)}
        hot = torch.stack([torch.zeros(4) if t == IGNORE else torch.eye(4)[t] for t in targets.tolist()])
        pairs = []
        for b in range(11):
            one = {"ids_B": ids[b, None], "spec": spec, **key}
            pairs.append(blend(moved[b][None], moved[mate[b]][None], hot[b, None], hot[mate[b], None], **one))
        expected, labels = torch.cat([x for x, _ in pairs]), torch.cat([y for _, y in pairs])
    found, found_targets = augment(images, targets, ids, spec=spec, num_classes=4, **key)
    assert found.dtype == dtype
    assert torch.equal(found, expected)
    assert torch.equal(found_targets, labels)
    assert not torch.equal(found, images)


@given(st.sampled_from(SPECS), st.permutations(range(9)), st.integers(1, 9), SEEDS)
def test_a_sample_looks_the_same_in_any_batch(spec: AugmentSpec, order: list[int], count: int, seed: int) -> None:
    images, ids = _images((9, 3, 6, 6), torch.uint8, 1), torch.arange(9) * 1001
    whole = transform(images, ids, spec=spec, seed=seed, epoch=1)
    some = order[:count]
    assert torch.equal(transform(images[some], ids[some], spec=spec, seed=seed, epoch=1), whole[some])


def test_seed_and_epoch_change_everything() -> None:
    images, ids = _images((64, 3, 8, 8), torch.uint8, 1), torch.arange(64)
    spec = AugmentSpec(crop=4, flip=True)
    base = transform(images, ids, spec=spec, seed=0, epoch=0)
    for seed, epoch in ((1, 0), (0, 1)):
        other = transform(images, ids, spec=spec, seed=seed, epoch=epoch)
        assert (other == base).flatten(1).all(1).sum() <= 5  # 1 in 162 by chance
    # turning one thing on leaves the others' choices
    both = AugmentSpec(crop=4, flip=True, cutout=1)
    assert ((transform(images, ids, spec=both, seed=0, epoch=0) != base).flatten(1).sum(1) <= 3).all()


def test_mixing_depends_on_who_is_in_the_batch_not_on_the_order() -> None:
    images, targets, ids = _images((9, 1, 4, 4), torch.uint8, 1), torch.arange(9) % 3, torch.arange(9) * 17
    order = torch.tensor([4, 2, 8, 0, 1, 3, 5, 7, 6])
    spec, key = AugmentSpec(mixup=1.0, cutmix=1.0), {"seed": 0, "epoch": 4, "num_classes": 3}
    whole, soft = augment(images, targets, ids, spec=spec, **key)
    turned, turned_soft = augment(images[order], targets[order], ids[order], spec=spec, **key)
    assert torch.equal(turned, whole[order])
    assert torch.equal(turned_soft, soft[order])


@given(st.sets(st.integers(0, 10**6), min_size=2, max_size=40), SEEDS)
def test_mates_are_a_single_ring(ids: set[int], seed: int) -> None:
    ring = mates(torch.tensor(list(ids)), seed=seed, epoch=0)
    here, steps = 0, 0
    while steps == 0 or here != 0:
        here, steps = int(ring[here]), steps + 1
    assert steps == len(ids)


def test_the_choices_are_uniform() -> None:
    ids, image = torch.arange(8000), torch.zeros(1, 1, 5, 5, dtype=torch.uint8)
    image[0, 0, 2, 0] = 1
    spots = transform(image.expand(8000, 1, 5, 5).contiguous(), ids, spec=AugmentSpec(crop=2, flip=True), seed=0, epoch=0)[:, 0].float().mean(0)
    # column of the marked pixel: (0 + 2 - left), mirrored half of the time; row: 2 + 2 - top
    row = spots.sum(1)
    assert (row - row.mean()).abs().max() < 0.02
    expected = torch.tensor([0.1, 0.1, 0.2, 0.1, 0.1])  # of the windows 2/5 lose it
    assert (spots.sum(0) - expected).abs().max() < 0.02


@pytest.mark.parametrize("alpha", [1e-3, 0.2, 1.0, 4.0, 100.0])
def test_lambda_is_beta_distributed(alpha: float) -> None:
    from scipy.stats import beta, kstest

    lam = beta_quantile(seeds.uniform(torch.arange(5000), 1, 0, "lam")[:, 0], alpha)
    assert ((lam >= 0) & (lam <= 1)).all()
    if alpha > 0.1:  # below, the mass sits closer to 0 and 1 than floats tell apart
        assert kstest(lam.numpy(), beta(alpha, alpha).cdf).pvalue > 1e-3
    assert abs(float(lam.mean()) - 0.5) < 0.03


def test_noise_is_gaussian_of_the_size_asked_for() -> None:
    from scipy.stats import kstest

    ids = torch.arange(60)
    drawn = noise(torch.zeros(60, 1, 17, 10), ids, sd=0.5, seed=0, epoch=0)
    assert kstest(drawn.flatten().numpy() / 0.5, "norm").pvalue > 1e-3
    assert np.unique(drawn.numpy()).size > 8000  # no repeats beyond the 65,536 levels' own
    grey = noise(torch.full((60, 1, 17, 10), 128, dtype=torch.uint8), ids, sd=0.1, seed=0, epoch=0)
    assert abs(float(grey.float().std()) - 25.5) < 0.6
    ends = noise(torch.tensor([0, 255], dtype=torch.uint8).expand(60, 2), ids, sd=0.1, seed=0, epoch=0)
    assert (ends[:, 0] < 128).all()  # clamped, not wrapped around
    assert (ends[:, 1] > 128).all()


def test_flat_features_take_noise_and_mixup_only() -> None:
    features, targets, ids = torch.randn(6, 5), torch.arange(6) % 2, torch.arange(6)
    key = {"seed": 0, "epoch": 0, "num_classes": 2}
    mixed, soft = augment(features, targets, ids, spec=AugmentSpec(noise=0.1, mixup=0.5), **key)
    assert mixed.shape == (6, 5)
    assert soft.shape == (6, 2)
    for spec in (AugmentSpec(crop=1), AugmentSpec(flip=True), AugmentSpec(cutout=1), AugmentSpec(cutmix=1.0)):
        with pytest.raises(InputError, match="needs images"):
            augment(features, targets, ids, spec=spec, **key)


def test_nothing_asked_for_changes_nothing() -> None:
    images, targets = _images((3, 1, 4, 4), torch.uint8, 0), torch.tensor([0, IGNORE, 1])
    same, same_targets = augment(images, targets, torch.arange(3), spec=AugmentSpec(), seed=0, epoch=0, num_classes=2)
    assert same is images
    assert same_targets is targets
    _, none = augment(images, None, torch.arange(3), spec=AugmentSpec(mixup=1.0), seed=0, epoch=0, num_classes=0)
    assert none is None


def test_unlabelled_samples_carry_no_weight() -> None:
    soft = soft_targets(torch.tensor([1, IGNORE, 0]), 3)
    assert soft.tolist() == [[0, 1, 0], [0, 0, 0], [1, 0, 0]]
    assert soft_targets(soft, 3) is soft
    logits = torch.randn(3, 3)
    per_sample = torch.nn.functional.cross_entropy(logits, soft, reduction="none")
    assert per_sample[1] == 0
    targets, ids = torch.tensor([0, IGNORE, 2, IGNORE]), torch.arange(4)
    images = _images((4, 1, 4, 4), torch.uint8, 0)
    _, mixed = augment(images, targets, ids, spec=AugmentSpec(mixup=1.0), seed=0, epoch=0, num_classes=3)
    lam = beta_quantile(seeds.uniform(ids, 5, 0, 0, "mix")[:, 0], 1.0).float()
    mate = mates(ids, seed=0, epoch=0)
    labelled = (targets != IGNORE).float()
    torch.testing.assert_close(mixed.sum(1), lam * labelled + (1 - lam) * labelled[mate])
    with pytest.raises(InputError, match="there are 2 classes"):
        soft_targets(torch.tensor([0, 2]), 2)


def test_with_both_mixes_each_sample_takes_one_of_them() -> None:
    images = torch.zeros(200, 1, 8, 8)
    images[1::2] = 1
    ids = torch.arange(200)
    mixed, soft = augment(images, ids % 2, ids, spec=AugmentSpec(mixup=1.0, cutmix=1.0), seed=0, epoch=0, num_classes=2)
    two_valued = torch.tensor([set(x.unique().tolist()) <= {0.0, 1.0} for x in mixed])
    unlike = (ids % 2) != (ids % 2)[mates(ids, seed=0, epoch=0)]
    assert 0.35 < two_valued[unlike].float().mean() < 0.65
    torch.testing.assert_close(mixed.mean((1, 2, 3)), soft[:, 1])  # the label is the share of the area, or of the intensity


@pytest.mark.parametrize("wrong", [{"crop": -1}, {"crop": 1.5}, {"crop": 10**9}, {"cutout": -2}, {"noise": -0.1}, {"mixup": float("nan")}, {"rotate": 3}])
def test_bounds(wrong: dict[str, float]) -> None:
    with pytest.raises(ValidationError):
        AugmentSpec(**wrong)
