"""What the claim of KRR-ST compares it with: the arms, the digits, the bias of views."""

import pytest
import torch
from torch import Tensor, nn

from limbeck import seeds
from limbeck.claims.studies.krr_st import AllPairs, KMeansPairs, RandomPairs, large_digits, view_bias
from limbeck.components import Component
from limbeck.data import ArrayData
from limbeck.methods.datasets.krr_st import KRRST
from limbeck.models import build_model
from limbeck.teachers import as_teacher
from limbeck.train import TrainConfig, Trainer


def small(seed: int) -> nn.Module:
    return build_model(Component(name="cnn", args={"widths": [3]}), num_classes=4, input_shape=(1, 4, 4), seed=seed)


def data() -> ArrayData:
    return ArrayData(torch.randn(40, 1, 4, 4, generator=seeds.generator(0)))


def bound(kind: type[KRRST], seed: int = 0) -> KRRST:
    return kind(images=6, networks=1).bind(student=small(0), teacher=as_teacher(small(9)), fresh_student=small, train=data(), seed=seed)


def g(x: Tensor) -> Tensor:
    return small(9).eval()(x).detach()


@pytest.mark.parametrize("kind", [RandomPairs, KMeansPairs, AllPairs])
def test_arms_are_real_images_with_their_vectors_and_nothing_is_learned(kind: type[KRRST]) -> None:
    method = bound(kind)
    chosen = method.chosen_images()
    Trainer(method, method.data, TrainConfig(steps=5, batch_size=8)).fit()
    images, vectors = method.synthetic.images.detach(), method.synthetic.targets.detach()
    assert len(images) == len(chosen.unique()) == (40 if kind is AllPairs else 6)
    assert torch.equal(images, method.prepared(chosen))
    torch.testing.assert_close(vectors, g(images))


def test_random_pairs_are_what_the_method_starts_from() -> None:
    assert torch.equal(bound(RandomPairs, 3).synthetic.images, bound(KRRST, 3).synthetic.images)
    assert torch.equal(bound(KMeansPairs).chosen_images(), bound(KMeansPairs).chosen_images())


def test_large_digits() -> None:
    splits = large_digits()
    assert (len(splits.train), len(splits.test)) == (1347, 450)
    x = splits.train.prepare(splits.train.fetch(torch.arange(50))[0])
    assert x.shape == (50, 1, 14, 14)
    assert float(x.min()) == pytest.approx(-0.28604059 / 0.35302424, rel=1e-4)  # black is Fashion-MNIST's black


def test_views_are_biased_and_regression_is_not() -> None:
    found = view_bias(100)
    assert found["regression"] < 1e-12
    assert found["views"] > 0.1
    assert found["views_in_errors"] > 1.3
    assert view_bias(100) == found
