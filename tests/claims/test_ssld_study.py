"""What the claim of SSLD trains on: parts of Fashion-MNIST that do not overlap, foreign images in its form, the share of them that is kept."""

from pathlib import Path

import pytest
import torch
from torch import nn

from limbeck.claims.studies.ssld import TracedSSLD, fashion_part, foreign_images
from limbeck.components import Component
from limbeck.data import ArrayData
from limbeck.data.sources import FASHION_MNIST_FOLDER, fashion_mnist
from limbeck.errors import InputError
from limbeck.ingredients import prepare
from limbeck.methods.classifiers.ssld import SSLD
from limbeck.recipe import DataSpec
from limbeck.teachers import ModuleTeacher
from limbeck.train import TrainConfig, Trainer

needs_fashion = pytest.mark.skipif(not FASHION_MNIST_FOLDER.exists(), reason=f"no {FASHION_MNIST_FOLDER} (Debian: dataset-fashion-mnist)")


@needs_fashion
def test_parts_are_the_files_images_in_order_and_do_not_overlap() -> None:
    whole, first, second = fashion_mnist(), fashion_part(100, 50), fashion_part(150, 30)
    assert torch.equal(first.train.inputs, whole.train.inputs[100:150])
    assert torch.equal(second.train.targets, whole.train.targets[150:180])
    assert len(first.test) == 10_000
    assert torch.equal(fashion_part(59_990, 10).train.inputs, whole.train.inputs[-10:])
    for wrong in ((59_990, 11), (-1, 5), (0, 0)):
        with pytest.raises(InputError, match="cannot be had"):
            fashion_part(*wrong)


@needs_fashion
def test_foreign_images_look_like_fashion_mnist_and_have_no_labels() -> None:
    found = foreign_images(cifar=0, scaled_digits=20).train
    clothes = fashion_mnist().train
    assert found.inputs.shape == (20, 1, 28, 28)
    assert found.inputs.dtype == torch.uint8
    assert found.targets is None
    assert (found.mean, found.std, found.classes) == (clothes.mean, clothes.std, clothes.classes)
    assert found.inputs.amax() > 200  # bright strokes
    assert found.inputs[:, :, 0].float().mean() < found.inputs.float().mean()  # on black
    with pytest.raises(InputError, match="no images are asked for"):
        foreign_images(cifar=0, scaled_digits=0)
    with pytest.raises(InputError, match="1348 images are asked for"):
        foreign_images(cifar=0, scaled_digits=1348)


@needs_fashion
def test_cifar_comes_first_in_grey(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rgb = torch.zeros(3, 3, 32, 32, dtype=torch.uint8)
    for channel in range(3):
        rgb[channel, channel] = 200
    monkeypatch.setattr("limbeck.claims.studies.ssld.cifar10", lambda folder, train_limit: Given(ArrayData(rgb[:train_limit])))
    found = foreign_images(cifar=3, scaled_digits=2).train
    assert len(found) == 5
    assert found.inputs[:3].flatten(1).unique(dim=1).flatten().tolist() == [60, 117, 23]  # 0.299, 0.587, 0.114 of 200
    monkeypatch.undo()
    with pytest.raises(InputError):
        foreign_images(cifar=1, folder=str(tmp_path))


class Given:
    """Splits of which only the training part is there."""

    def __init__(self, train: ArrayData) -> None:
        self.train = train


@needs_fashion
def test_the_recipes_pool_comes_behind_the_students_images_unlabelled() -> None:
    def source(function: str, **args: int) -> Component:
        return Component(target=f"limbeck.claims.studies.ssld:{function}", args=args)

    pool = (source("fashion_part", first=30, count=8), source("foreign_images", cifar=0, scaled_digits=4))
    prepared = prepare(DataSpec(source=source("fashion_part", first=20, count=10), pool=pool), seed=0)
    assert len(prepared.train) == 22
    assert prepared.pool.tolist() == list(range(10, 22))
    assert torch.equal(prepared.train.fetch(torch.tensor([10]))[0][0], fashion_mnist().train.inputs[30])
    assert prepared.labelled.tolist() == list(range(10))


class Affine(nn.Module):
    """The first two numbers are the logits."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.scale * x[:, :2]


def test_the_shares_are_those_of_the_kept_and_it_trains_as_ssld_does() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, 4, generator=generator)
    x[:10, 2], x[30:, 0] = 0, 9.0  # the pool's last ten are foreign, and the teacher is sure that they are of class 0
    found = {}
    for kind, knobs in ((SSLD, {}), (TracedSSLD, {"domestic": 20})):
        torch.manual_seed(1)
        data = ArrayData(x, classes=["a", "b"])
        method = kind(per_class=12, stage2_steps=0, **knobs).bind(
            student=nn.Linear(4, 2), teacher=ModuleTeacher(Affine()), train=data, num_classes=2, pool=torch.arange(10, 40)
        )
        assert kind is SSLD or method.facts() == {}
        Trainer(method, data, TrainConfig(steps=3, batch_size=8), cpu=True, num_classes=2).fit()
        found[kind] = method
    assert torch.equal(found[SSLD].student.weight, found[TracedSSLD].student.weight)
    metrics = found[TracedSSLD].facts()["metrics"]
    kept = found[TracedSSLD].kept
    assert metrics["foreign_pool"] == pytest.approx(1 / 3)
    assert metrics["foreign_kept"] == pytest.approx(10 / len(kept))
    assert metrics["kept"] == len(kept) == found[SSLD].facts()["metrics"]["kept"]
    with pytest.raises(InputError, match="domestic"):
        TracedSSLD()
