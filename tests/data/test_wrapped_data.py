import random

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, TensorDataset

from limbeck.contract import Data
from limbeck.data import ArrayData, WrappedData, as_data
from limbeck.errors import InputError


class _Random(Dataset[tuple[Tensor, int]]):
    """Draws from all three global generators, as users' transforms do."""

    def __len__(self) -> int:
        return 20

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        return torch.tensor([float(i), float(torch.rand(())), random.random(), np.random.rand()]), i % 4


class _List(Dataset[object]):
    def __init__(self, *samples: object) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, i: int) -> object:
        return self.samples[i]


def test_a_random_transform_is_a_pure_function_of_seed_epoch_and_id() -> None:
    data = WrappedData(_Random())
    whole, targets = data.fetch(torch.arange(20), seed=1, epoch=3)
    assert targets is not None
    assert targets.tolist() == [i % 4 for i in range(20)]
    for ids in ([4], [19, 0, 4], [4, 4]):
        torch.rand(3), random.random(), np.random.rand()  # somebody else draws in between
        assert torch.equal(data.fetch(torch.tensor(ids), seed=1, epoch=3)[0], whole[ids])
    for column in (1, 2, 3):
        assert whole[:, column].unique().numel() == 20  # another draw for every sample,
        for seed, epoch in ((2, 3), (1, 4)):  # seed and epoch
            assert not (data.fetch(torch.arange(20), seed=seed, epoch=epoch)[0][:, column] == whole[:, column]).any()


def test_the_global_generators_are_put_back_even_after_an_error() -> None:
    def states() -> tuple[bytes, object, bytes]:
        return torch.get_rng_state().numpy().tobytes(), random.getstate(), np.random.get_state()[1].tobytes()  # type: ignore[index,union-attr]

    before = states()
    data = WrappedData(_Random())
    data.fetch(torch.arange(3))
    assert data.targets.tolist() == [i % 4 for i in range(20)]
    with pytest.raises(IndexError):
        WrappedData(_List((torch.zeros(1), 0))).fetch(torch.tensor([0, 5]))
    assert states() == before


def test_pil_images_arrays_and_floats_become_tensors() -> None:
    pixels = np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3)
    rgb, _ = WrappedData(_List((Image.fromarray(pixels), 0))).fetch(torch.tensor([0]))
    assert rgb.dtype == torch.uint8
    assert np.array_equal(rgb[0].numpy(), pixels.transpose(2, 0, 1))
    grey, _ = WrappedData(_List((Image.fromarray(pixels[:, :, 0]), 0))).fetch(torch.tensor([0]))
    assert grey.shape == (1, 1, 2, 3)
    assert np.array_equal(grey[0, 0].numpy(), pixels[:, :, 0])
    palette, _ = WrappedData(_List((Image.fromarray(pixels).convert("P"), 0))).fetch(torch.tensor([0]))
    assert palette.shape == (1, 3, 2, 3)
    for x in (np.array([1.5, 2.0]), [1.5, 2.0], torch.tensor([1.5, 2.0], dtype=torch.float64)):
        floats, _ = WrappedData(_List((x, np.int64(3)))).fetch(torch.tensor([0]))
        assert floats.dtype == torch.float32
        assert floats.tolist() == [[1.5, 2.0]]
    data = WrappedData(_List((Image.fromarray(pixels), torch.tensor(2))))
    torch.testing.assert_close(data.prepare(rgb), rgb.float() / 255)
    assert data.prepare(torch.tensor([[1.5]])).tolist() == [[1.5]]
    assert data.targets.tolist() == [2]


class _Counting(_List):
    classes = ("cat", "dog")
    touched = 0

    def __getitem__(self, i: int) -> object:
        type(self).touched += 1
        return super().__getitem__(i)


def test_listed_targets_are_used_without_touching_samples_and_through_subsets() -> None:
    dataset = _Counting(*[(torch.zeros(1), i % 2) for i in range(6)])
    dataset.targets = [0, 1, 0, 1, 0, 1]  # type: ignore[attr-defined]
    data = WrappedData(Subset(dataset, [5, 0, 3]))
    assert data.targets.tolist() == [1, 0, 1]
    assert data.classes == ("cat", "dog")
    assert _Counting.touched == 0
    dataset.target_transform = lambda y: 1 - y  # type: ignore[attr-defined]  # the list is no longer what samples carry
    assert WrappedData(dataset).targets.tolist() == [0, 1, 0, 1, 0, 1]
    assert _Counting.touched == 6
    dataset.targets = ["a"] * 6  # type: ignore[attr-defined]
    dataset.target_transform = None  # type: ignore[attr-defined]
    assert WrappedData(dataset).targets.tolist() == [0, 1, 0, 1, 0, 1]
    assert _Counting.touched == 12


@pytest.mark.parametrize(
    ("samples", "words"),
    [
        ([torch.zeros(3)], "sample 0 of _List is no"),
        ([{"image": 1, "label": 2}], "sample 0"),
        ([(torch.zeros(3), "cat")], "sample 0"),
        ([(torch.zeros(3), 0.5)], "sample 0"),
        ([("text", 0)], "sample 0"),
        ([(torch.zeros(3), 0), (torch.zeros(4), 0)], "[3] torch.float32 and [4]"),
        ([(torch.zeros(3), 0), (torch.zeros(3, dtype=torch.uint8), 0)], "uint8"),
    ],
)
def test_what_is_no_pair_or_cannot_be_stacked_is_refused(samples: list[object], words: str) -> None:
    with pytest.raises(InputError) as caught:
        WrappedData(_List(*samples)).fetch(torch.arange(len(samples)))
    assert words in str(caught.value)


class _Endless(IterableDataset[int]):
    def __iter__(self):  # type: ignore[no-untyped-def]
        yield 0


def test_as_data_takes_what_people_have() -> None:
    inputs, targets = torch.zeros(4, 2), torch.tensor([0, 1, 1, 0])
    array = ArrayData(inputs, targets)
    assert as_data(array) is array
    for source in (TensorDataset(inputs, targets), (inputs, targets), [inputs, targets]):
        made = as_data(source)
        assert isinstance(made, ArrayData)
        assert torch.equal(made.inputs, inputs)
        assert made.classes == ("0", "1")
    wrapped = as_data(_Random())
    assert isinstance(wrapped, WrappedData)
    assert isinstance(wrapped, Data)
    assert as_data(wrapped) is wrapped


@pytest.mark.parametrize("source", [None, "digits", 3, {"x": 1}, (torch.zeros(2), [0, 1]), TensorDataset(torch.zeros(2, 2)), _Endless()])
def test_as_data_refuses_the_rest(source: object) -> None:
    with pytest.raises(InputError):
        as_data(source)


def test_a_loader_is_refused_with_the_way_out() -> None:
    with pytest.raises(InputError, match=r"\.dataset"):
        as_data(DataLoader(_Random()))


def test_torchvision_transforms_work_as_they_are() -> None:
    transforms = pytest.importorskip("torchvision.transforms")
    flips = transforms.Compose([transforms.RandomHorizontalFlip(), transforms.ToTensor()])
    pixels = Image.fromarray(np.arange(48, dtype=np.uint8).reshape(4, 4, 3))

    class Transformed(_List):
        def __getitem__(self, i: int) -> object:
            return flips(pixels), 0

    data = WrappedData(Transformed(*range(30)))
    first = data.fetch(torch.arange(30), seed=0, epoch=0)[0]
    assert len({sample.numpy().tobytes() for sample in first}) == 2
    assert torch.equal(first[7:9], data.fetch(torch.tensor([7, 8]), seed=0, epoch=0)[0])
