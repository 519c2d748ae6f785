"""The artefact: shapes, pairs, pixels, bytes, pictures, and its way to disk and back."""

import copy
import math
from pathlib import Path

import numpy
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from limbeck import export, load, models
from limbeck.components import Component
from limbeck.contract import Artefact, OptimiserSpec
from limbeck.data import ArrayData, subset, whiten
from limbeck.errors import InputError
from limbeck.evaluate.synthetic_sets import SetTraining, chosen_rate
from limbeck.export.hub import export_hf
from limbeck.export.onnx import export_onnx
from limbeck.synthetic.synthetic_set import SyntheticSet, synthetic_set


def drawn(seed: int, *shape: int) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def data(channels: int = 1) -> ArrayData:
    mean, std = (0.5, 0.4, 0.3)[:channels], (0.25, 0.3, 0.2)[:channels]
    return ArrayData(drawn(9, 12, channels, 4, 4), torch.arange(12) % 3, mean=mean, std=std)


def prepared(source: ArrayData, count: int = 6) -> torch.Tensor:
    return source.prepare(source.fetch(torch.arange(count))[0])


def compensated() -> tuple[SyntheticSet, torch.Tensor]:
    source = data()
    patterns = 4 * drawn(1, 2, 1, 4, 4) - 2
    pair_image, pair_pattern = torch.arange(6).repeat(2), torch.arange(2).repeat_interleave(6)
    return SyntheticSet.compensated(prepared(source), torch.arange(6) % 3, 3, patterns, pair_image, pair_pattern, data=source), patterns


# ---- shapes and values -------------------------------------------------------------------------------------------------------


def test_a_hard_set_copies_what_it_is_made_of() -> None:
    images, labels = drawn(0, 6, 1, 4, 4), torch.arange(6) % 3
    found = SyntheticSet.hard(images, labels, 3, step_size=0.05)
    images.zero_()
    labels.zero_()
    x, y = found.expanded()
    torch.testing.assert_close(x, drawn(0, 6, 1, 4, 4))
    assert y.tolist() == [0, 1, 2, 0, 1, 2]
    assert float(found.step_size.detach()) == pytest.approx(0.05)
    assert found.learned_step_size == pytest.approx(0.05)
    assert {name for name, p in found.named_parameters() if p.requires_grad} == {"images", "patterns", "step_size"}


def test_soft_targets_are_kept_and_vectors_are_learned() -> None:
    soft = SyntheticSet.soft(drawn(0, 6, 1, 4, 4), drawn(1, 6, 5))
    assert (soft.num_classes, soft.labels, soft.targets.requires_grad) == (5, "soft", False)
    vectors = SyntheticSet.vectors(drawn(0, 6, 1, 4, 4), drawn(1, 6, 7))
    assert (vectors.targets.shape, vectors.labels, vectors.targets.requires_grad) == ((6, 7), "vectors", True)
    assert vectors.arguments["dim"] == 7


def test_pairs_are_sums_clipped_to_pixels() -> None:
    found, patterns = compensated()
    x, y = found.expanded()
    assert len(x) == len(y) == len(found) == 18
    torch.testing.assert_close(x[:6], found.images)
    source = data()
    raw = source.fetch(torch.arange(6))[0]
    for k in range(2):
        pixels = (raw + 0.25 * patterns[k]).clamp(0, 1)  # in pixels, by hand
        torch.testing.assert_close(x[6 + 6 * k : 12 + 6 * k].detach(), (pixels - 0.5) / 0.25)
    assert (x.detach()[6:] - found.images[found.pair_image] - found.patterns[found.pair_pattern]).abs().max() > 0.1  # something was clipped
    assert y.tolist() == [0, 1, 2, 0, 1, 2] * 3


def test_no_pattern_no_change_and_gradients_reach_every_part() -> None:
    found, _ = compensated()
    with torch.no_grad():
        found.patterns.zero_()
    x, _ = found.expanded()
    torch.testing.assert_close(x[6:12], x[:6])
    torch.testing.assert_close(x[12:], x[:6])
    x.sum().backward()
    inside = (found.images > (0 - 0.5) / 0.25) & (found.images < (1 - 0.5) / 0.25)
    assert torch.equal(found.images.grad[inside], torch.full_like(found.images.grad[inside], 3.0))  # itself and two pairs
    assert found.patterns.grad.shape == found.patterns.shape
    assert torch.equal(found.patterns.grad[0], inside.sum(0).float())


def test_relabelled_sets_have_a_label_a_sample() -> None:
    found, _ = compensated()
    targets = drawn(4, 18, 3)
    soft = found.relabelled(targets)
    assert soft.labels == "soft"
    torch.testing.assert_close(soft.expanded()[0], found.expanded()[0])
    torch.testing.assert_close(soft.expanded()[1], targets)
    assert soft.images.data_ptr() != found.images.data_ptr()
    with pytest.raises(InputError, match="18 samples"):
        found.relabelled(targets[:6])


def test_a_set_without_a_step_size_says_so() -> None:
    images, labels = drawn(0, 6, 1, 4, 4), torch.arange(6) % 3
    without = [SyntheticSet.hard(images, labels, 3), SyntheticSet.soft(images, drawn(1, 6, 3)), SyntheticSet.vectors(images, drawn(1, 6, 7)), compensated()[0]]
    for found in (*without, compensated()[0].relabelled(drawn(4, 18, 3))):
        assert found.learned_step_size is None
        assert not found.arguments["learns_step_size"]
        assert synthetic_set(**found.arguments).learned_step_size is None
    found = SyntheticSet.hard(images, labels, 3, step_size=0.01)  # as large as what others hold without meaning it
    for made in (found, found.relabelled(drawn(4, 6, 3)), synthetic_set(**found.arguments)):
        assert made.learned_step_size == pytest.approx(0.01)
    assert chosen_rate(SetTraining(optimiser=OptimiserSpec(lr=0.3)), without[0].learned_step_size) == 0.3


# ---- a data set -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("soft", [False, True])
def test_loaders_see_what_is_trained_on(soft: bool) -> None:
    found, _ = compensated()
    found = found.relabelled(drawn(4, 18, 3)) if soft else found
    x, y = (tensor.detach() for tensor in found.expanded())
    for source in (found, found.dataset()):
        batches = list(DataLoader(source, batch_size=5))
        torch.testing.assert_close(torch.cat([b[0] for b in batches]), x)
        torch.testing.assert_close(torch.cat([b[1] for b in batches]), y)
        assert not batches[0][0].requires_grad
    torch.testing.assert_close(found[-1][0], x[-1])
    with pytest.raises(IndexError):
        found[18]
    assert len(list(found)) == 18  # plain iteration ends


def test_a_set_is_no_network() -> None:
    with pytest.raises(InputError, match="not a network"):
        SyntheticSet.hard(drawn(0, 2, 1, 4, 4), torch.tensor([0, 1]), 2)(drawn(0, 1, 1, 4, 4))


# ---- units -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 3])
def test_pixels_and_back_of_standardised_images(channels: int) -> None:
    source = data(channels)
    found = SyntheticSet.hard(prepared(source), torch.arange(6) % 3, 3, data=source)
    raw = source.fetch(torch.arange(6))[0]
    torch.testing.assert_close(found.to_pixels(prepared(source)), raw)
    torch.testing.assert_close(found.prepare(raw), prepared(source))
    assert found.to_pixels(100 * prepared(source)).max() == 1


def test_pixels_and_back_of_whitened_images() -> None:
    (white,) = whiten(data(3))
    part = subset(white, torch.arange(6))
    raw = part.fetch(torch.arange(6))[0]
    found = SyntheticSet.hard(part.prepare(raw), torch.arange(6) % 3, 3, data=part)
    assert found.whitened
    torch.testing.assert_close(found.to_pixels(part.prepare(raw)), raw, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found.prepare(raw), part.prepare(raw), atol=1e-5, rtol=1e-4)
    again = synthetic_set(**found.arguments)
    again.load_state_dict(found.state_dict())
    torch.testing.assert_close(again.to_pixels(again.images.detach()), raw, atol=1e-5, rtol=1e-4)
    with pytest.raises(InputError, match="whitened"):
        SyntheticSet.compensated(found.images.detach(), torch.arange(6) % 3, 3, drawn(0, 1, 3, 4, 4), torch.arange(6), torch.zeros(6).long(), data=part)


# ---- disk --------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["hard", "soft", "vectors", "compensated"])
def test_to_disk_and_back_bit_for_bit(kind: str, tmp_path: Path) -> None:
    images = drawn(0, 6, 1, 4, 4)
    made = {
        "hard": lambda: SyntheticSet.hard(images, torch.arange(6) % 3, 3, step_size=0.03),
        "soft": lambda: SyntheticSet.soft(images, drawn(1, 6, 3)),
        "vectors": lambda: SyntheticSet.vectors(images, drawn(1, 6, 7)),
        "compensated": lambda: compensated()[0],
    }[kind]()
    component = Component(name="synthetic_set", args=made.arguments)
    assert models.CATALOGUE["synthetic_set"].endswith(":synthetic_set")
    folder = export.save(
        Artefact("dataset", made), tmp_path / "set", model=component, num_classes=3, input_shape=(1, 4, 4), preprocess={}, classes=(), extra={}
    )  # fmt: skip
    again = load(folder)
    assert isinstance(again, SyntheticSet)
    assert again.arguments == made.arguments
    assert again.learned_step_size == made.learned_step_size
    state = again.state_dict()
    assert state.keys() == made.state_dict().keys()
    for name, tensor in made.state_dict().items():
        assert torch.equal(state[name], tensor)
        assert state[name].dtype == tensor.dtype
    for a, b in zip(again.expanded(), made.expanded(), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(copy.deepcopy(made).images, made.images)


def saved(folder: Path, made: SyntheticSet) -> Path:
    return export.save(
        Artefact("dataset", made), folder, model=Component(name="synthetic_set", args=made.arguments), num_classes=made.num_classes,
        input_shape=made.input_shape, preprocess={}, classes=(), extra={},
    )  # fmt: skip


@pytest.mark.parametrize("shape", [(1, 4, 4), (3, 4, 4), (2, 4, 4), (5,)])
def test_a_set_of_pictures_is_saved_with_a_picture(tmp_path: Path, shape: tuple[int, ...]) -> None:
    made = SyntheticSet.hard(drawn(0, 6, *shape), torch.arange(6) % 3, 3)
    for _ in range(2):  # an earlier one is replaced
        folder = saved(tmp_path / "set", made)
    pictures = ["images.png"] if shape[0] in (1, 3) else []
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", *pictures, "model.safetensors"]
    assert torch.equal(load(folder).images, made.images)
    copied = export.export(folder, "safetensors", tmp_path / "copy")
    assert sorted(path.name for path in copied.path.iterdir()) == ["config.json", *pictures, "model.safetensors"]
    if pictures:
        with Image.open(copied.path / "images.png") as opened:
            assert torch.equal(torch.from_numpy(numpy.array(opened)), made.grid())
        (folder / "images.png").unlink()  # nobody needs it
        assert torch.equal(load(folder).images, made.images)
        export.export(folder, "safetensors", tmp_path / "copy")
    with torch.no_grad():
        made.images.fill_(math.nan)
    assert load(saved(tmp_path / "set", made)).images.isnan().all()


@pytest.mark.parametrize("to", ["onnx", "hf", "diffusers"])
def test_a_set_is_exported_to_no_networks_format(tmp_path: Path, to: str) -> None:
    folder = saved(tmp_path / "run" / "artefact", SyntheticSet.hard(drawn(0, 6, 1, 4, 4), torch.arange(6) % 3, 3))
    with pytest.raises(InputError, match=r"a data set is no network.*limbeck\.load"):
        export.export(tmp_path / "run", to)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["artefact"]
    for direct in (lambda: export_hf(load(folder), tmp_path / "x"), lambda: export_onnx(load(folder), (1, 4, 4), tmp_path / "x.onnx")):
        with pytest.raises(InputError, match="no network"):
            direct()


# ---- bytes and pictures ------------------------------------------------------------------------------------------------------------


def test_bytes_of_every_part() -> None:
    plain = SyntheticSet.hard(drawn(0, 6, 1, 4, 4), torch.arange(6) % 3, 3)
    assert plain.bytes() == {"images": 6 * 16 * 4, "labels": 6, "step_size": 4, "preprocessing": 8}
    found, _ = compensated()
    assert found.bytes() == {"images": 384, "labels": 6, "patterns": 2 * 64, "pairs": 12 * 2, "step_size": 4, "preprocessing": 8}
    assert found.relabelled(drawn(0, 18, 3)).bytes()["labels"] == 18 * 3 * 4
    white = synthetic_set(6, 3, (1, 4, 4), whitened=True).bytes()
    assert white["whitening"] == 4 * (16 + 256)
    assert sum(plain.bytes().values()) < sum(t.numel() * 8 for t in plain.state_dict().values())


def test_a_picture_shows_a_row_a_class(tmp_path: Path) -> None:
    levels = torch.tensor([0.2, 0.4, 0.6, 0.8, 1.0])
    images = levels.view(5, 1, 1, 1).expand(5, 1, 4, 4).contiguous()
    found = SyntheticSet.hard(images, torch.tensor([1, 0, 1, 0, 1]), 2)
    picture = found.grid(border=1)
    assert picture.shape == (2 * 5 + 1, 3 * 5 + 1, 3)
    assert [int(picture[3, 3 + 5 * k, 0]) for k in range(3)] == [102, 204, 255]  # class 0; the third place is empty
    assert [int(picture[8, 3 + 5 * k, 1]) for k in range(3)] == [51, 153, 255]
    assert found.grid(per_class=2).shape == (11, 11, 3)
    path = found.save_png(tmp_path / "set.png", magnify=2)
    with Image.open(path) as opened:
        assert opened.size == (32, 22)
        assert opened.getpixel((6, 6)) == (102, 102, 102)
    assert [file.name for file in tmp_path.iterdir()] == ["set.png"]


def test_pictures_of_colours_vectors_and_pairs() -> None:
    images = torch.zeros(3, 3, 4, 4)
    images[:, 0] = 1
    picture = SyntheticSet.vectors(images, drawn(0, 3, 5)).grid(per_class=2)
    assert picture.shape == (11, 11, 3)
    assert picture[2, 2].tolist() == [255, 0, 0]
    assert compensated()[0].grid(per_class=10).shape == (3 * 5 + 1, 6 * 5 + 1, 3)
    with pytest.raises(InputError, match="pictures"):
        synthetic_set(2, 2, (5,)).grid()


# ---- what is refused ---------------------------------------------------------------------------------------------------------------


def test_wrong_input_is_told() -> None:
    images, labels = drawn(0, 6, 1, 4, 4), torch.arange(6) % 3
    patterns, pairs, firsts = drawn(0, 1, 1, 4, 4), torch.arange(6), torch.zeros(6, dtype=torch.int64)
    for call, said in (
        (lambda: SyntheticSet.hard(images, labels, 2), "2 classes"),
        (lambda: SyntheticSet.hard(images, labels[:5], 3), "5 targets"),
        (lambda: SyntheticSet.hard(images, labels.float(), 3), "whole numbers"),
        (lambda: SyntheticSet.hard(images.to(torch.uint8), labels, 3), "floats"),
        (lambda: SyntheticSet.hard(images, labels, 3, step_size=0.0), "step size"),
        (lambda: SyntheticSet.hard(images, labels, 3, step_size=math.nan), "step size"),
        (lambda: SyntheticSet.soft(images, labels), "targets"),
        (lambda: SyntheticSet.compensated(images, labels, 3, patterns[:, :, :2], pairs, firsts), "do not fit"),
        (lambda: SyntheticSet.compensated(images, labels, 3, patterns, pairs, firsts + 1), "pair_pattern"),
        (lambda: SyntheticSet.compensated(images, labels, 3, patterns, pairs, firsts[:3]), "pair_pattern"),
        (lambda: SyntheticSet.compensated(2 * images, labels, 3, patterns, pairs, firsts), "no pixels"),
        (lambda: synthetic_set(0, 3, (1, 4, 4)), "0 images"),
        (lambda: synthetic_set(6, 3, (1, 4, 4), labels="firm"), "firm"),
        (lambda: synthetic_set(6, 3, (1, 4, 4), labels="vectors"), "dim"),
        (lambda: synthetic_set(6, 3, (1, 4, 4), patterns=2), "pairs"),
    ):
        with pytest.raises(InputError, match=said):
            call()
