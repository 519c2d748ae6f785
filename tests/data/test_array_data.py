import pytest
import torch

from limbeck.contract import IGNORE, Data
from limbeck.data import ArrayData
from limbeck.errors import InputError


def _images(count: int = 7) -> torch.Tensor:
    return torch.randint(0, 256, (count, 3, 5, 5), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_uint8_images_stay_uint8_until_prepared_and_are_normalised_a_channel() -> None:
    mean, std = (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)
    data = ArrayData(_images(), torch.arange(7), mean=mean, std=std)
    raw, targets = data.fetch(torch.tensor([3, 1]))
    assert raw.dtype == torch.uint8
    assert torch.equal(raw, data.inputs[[3, 1]])
    assert targets is not None
    assert targets.tolist() == [3, 1]
    before = raw.clone()
    expected = (raw.double() / 255 - torch.tensor(mean, dtype=torch.float64)[:, None, None]) / torch.tensor(std, dtype=torch.float64)[:, None, None]
    prepared = data.prepare(raw)
    assert prepared.dtype == torch.float32
    torch.testing.assert_close(prepared.double(), expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(raw, before)


@pytest.mark.parametrize(("mean", "std"), [((), ()), ((0.5,), ()), ((), (2.0,)), ((0.5, -1.0, 3.0, 0.0), (1.0, 2.0, 3.0, 4.0))])
def test_float_features_are_normalised_where_asked_and_never_changed_in_place(mean: tuple[float, ...], std: tuple[float, ...]) -> None:
    inputs = torch.randn(6, 4, dtype=torch.float64)
    data = ArrayData(inputs, mean=mean, std=std)
    raw, targets = data.fetch(torch.arange(6))
    assert targets is None
    assert data.targets is None
    assert data.classes == ()
    before = raw.clone()
    expected = (inputs - torch.tensor(mean or (0.0,))) / torch.tensor(std or (1.0,))
    torch.testing.assert_close(data.prepare(raw), expected.float(), rtol=1e-6, atol=1e-6)
    assert torch.equal(raw, before)


def test_a_sample_is_prepared_to_the_same_bits_whatever_its_place_in_the_batch() -> None:
    data = ArrayData(torch.randint(0, 256, (33, 1, 5, 7), dtype=torch.uint8), mean=(0.31,), std=(0.27,))
    floats = ArrayData(torch.randn(33, 1, 5, 7), mean=(0.31,), std=(0.27,))
    for one in (data, floats):
        whole = one.prepare(one.fetch(torch.arange(33))[0])
        for i in range(33):
            assert torch.equal(whole[i], one.prepare(one.fetch(torch.tensor([i]))[0])[0])


def test_it_keeps_the_data_contract() -> None:
    data = ArrayData(_images(), torch.tensor([0, 1, 2, IGNORE, 0, 1, 2]))
    assert isinstance(data, Data)
    assert len(data) == 7
    assert data.classes == ("0", "1", "2")


def test_subset_and_with_targets_keep_classes_and_normalisation() -> None:
    data = ArrayData(_images(), torch.tensor([0, 1, 2, 0, 1, 2, 0]), ["a", "b", "c", "d"], mean=(0.5,), std=(0.5,))
    part = data.subset(torch.tensor([5, 0]))
    assert part.targets is not None
    assert part.targets.tolist() == [2, 0]
    assert torch.equal(part.inputs, data.inputs[[5, 0]])
    assert part.classes == ("a", "b", "c", "d")
    assert part.mean == (0.5,)
    assert part.std == (0.5,)
    other = data.with_targets(torch.full((7,), 3))
    assert other.inputs is data.inputs
    assert other.targets is not None
    assert other.targets.tolist() == [3] * 7
    assert data.with_targets(None).targets is None


def test_the_fingerprint_is_the_contents() -> None:
    images, targets = _images(), torch.tensor([0, 1, 2, 0, 1, 2, 0])
    data = ArrayData(images, targets, mean=(0.5,))
    assert data.fingerprint == ArrayData(images.clone(), targets.to(torch.int32), mean=(0.5,)).fingerprint
    assert data.fingerprint == ArrayData(images.transpose(2, 3).contiguous().transpose(2, 3), targets, mean=(0.5,)).fingerprint  # memory layout is no content
    pixel, label = images.clone(), targets.clone()
    pixel[6, 2, 4, 4] ^= 1
    label[6] = IGNORE
    others = [
        ArrayData(pixel, targets, mean=(0.5,)),
        ArrayData(images, label, mean=(0.5,)),
        ArrayData(images, None, ("0", "1", "2"), mean=(0.5,)),
        ArrayData(images, targets, ("x", "y", "z"), mean=(0.5,)),
        ArrayData(images, targets, mean=(0.25,)),
        ArrayData(images.view(7, 3, 1, 25), targets, mean=(0.5,)),
        ArrayData(images[:0], targets[:0], ("0", "1", "2"), mean=(0.5,)),
    ]
    assert len({data.fingerprint, *(other.fingerprint for other in others)}) == 8


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: ArrayData(torch.zeros(3)), "shape [3]"),
        (lambda: ArrayData(torch.zeros(3, 2, dtype=torch.int64)), "int64"),
        (lambda: ArrayData(torch.zeros(3, 2), torch.zeros(2, dtype=torch.int64)), "[2] for 3 inputs"),
        (lambda: ArrayData(torch.zeros(3, 2), torch.zeros(3)), "not integers"),
        (lambda: ArrayData(torch.zeros(3, 2), torch.tensor([0, -1, 0])), "negative"),
        (lambda: ArrayData(torch.zeros(3, 2), torch.tensor([0, 1, 2]), ["a", "b"]), "2 classes"),
        (lambda: ArrayData(torch.zeros(3, 2), mean=(0.0, 0.0, 0.0)), "3 numbers for 2 channels"),
        (lambda: ArrayData(torch.zeros(3, 2), std=(1.0, 0.0)), "positive"),
        (lambda: ArrayData(torch.zeros(3, 2), mean=(float("nan"),)), "finite"),
    ],
)
def test_what_does_not_fit_is_refused(build: object, words: str) -> None:
    with pytest.raises(InputError) as caught:
        build()  # type: ignore[operator]
    assert words in str(caught.value)
