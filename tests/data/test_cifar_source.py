"""CIFAR from its three layouts: the real packed files where LIMBECK_DATA is set, small hand-made ones otherwise."""

import io
import os
import pickle
from pathlib import Path
from typing import ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from limbeck.data import CATALOGUE, ArrayData
from limbeck.data.cifar import CIFAR10_CLASSES, CIFAR100_CLASSES, cifar10, cifar100
from limbeck.errors import InputError

real = pytest.mark.skipif(not os.environ.get("LIMBECK_DATA"), reason="LIMBECK_DATA is not set: the real CIFAR files are not at hand")


def _images(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """[N, 3, 32, 32] uint8 and [N] labels."""
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (count, 3, 32, 32), dtype=np.uint8), rng.integers(0, 10, count)


TRAIN, TEST = _images(40, 0), _images(9, 1)


def _png(image_CHW: np.ndarray, kind: str = "PNG") -> bytes:
    out = io.BytesIO()
    Image.fromarray(image_CHW.transpose(1, 2, 0)).save(out, kind, lossless=True)
    return out.getvalue()


def _write_hub(folder: Path, column: str = "image", label: str = "label", plain: bool = False) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    parts = {"train-00000-of-00002": (0, 25, TRAIN), "train-00001-of-00002": (25, 40, TRAIN), "test-00000-of-00001": (0, 9, TEST)}
    for name, (start, stop, (images, labels)) in parts.items():
        cells = [_png(x) if plain else {"bytes": _png(x), "path": f"{i}.png"} for i, x in enumerate(images[start:stop])]
        pq.write_table(pa.table({column: cells, label: labels[start:stop]}), folder / f"{name}.parquet")
    return folder


def _write_packed(folder: Path, name: str = "cifar10", step: int = 1) -> Path:
    for split, (images, labels) in (("train", TRAIN), ("test", TEST)):
        strips = [images[k : k + 10].transpose(0, 2, 3, 1).reshape(-1, 32, 3) // step for k in range(0, len(images), 10)]
        table = {
            "strip": [_png(strip.transpose(2, 0, 1), "WEBP") for strip in strips],
            "labels": [labels[k : k + 10].astype(np.uint8).tobytes() for k in range(0, len(images), 10)],
            "step": pa.array([step] * len(strips), pa.uint8()),
        }
        pq.write_table(pa.table(table), folder / f"{name}_{split}.parquet")
    return folder


def _write_torchvision(folder: Path) -> Path:
    home = folder / "cifar-10-batches-py"
    home.mkdir()
    for k in range(5):
        part = slice(k * 8, (k + 1) * 8)
        content = {b"data": TRAIN[0][part].reshape(-1, 3072), b"labels": TRAIN[1][part].tolist(), b"filenames": [b"x.png"] * 8}
        (home / f"data_batch_{k + 1}").write_bytes(pickle.dumps(content, protocol=4))
    (home / "test_batch").write_bytes(pickle.dumps({b"data": TEST[0].reshape(-1, 3072), b"labels": TEST[1].tolist()}, protocol=4))
    return folder


class _Python2(pickle._Pickler):
    """Writes text and bytes as Python 2 wrote its strings, as in the files that one downloads."""

    dispatch: ClassVar = dict(pickle._Pickler.dispatch)

    def _string(self, text: bytes | str) -> None:
        content = text.encode("latin-1") if isinstance(text, str) else text
        self.write(b"T" + len(content).to_bytes(4, "little") + content)
        self.memoize(text)

    dispatch[bytes] = dispatch[str] = _string


def test_the_pickles_of_python_2_are_read(tmp_path: Path) -> None:
    for path in (_write_torchvision(tmp_path) / "cifar-10-batches-py").iterdir():
        out = io.BytesIO()
        _Python2(out, protocol=2).dump(pickle.loads(path.read_bytes()))
        path.write_bytes(out.getvalue().replace(b"cnumpy._core.multiarray", b"cnumpy.core.multiarray"))
        assert b"cnumpy.core.multiarray\n_reconstruct" in path.read_bytes()
    found = cifar10(str(tmp_path))
    assert _is(found.train, *TRAIN)
    assert _is(found.test, *TEST)


def _is(data: ArrayData, images: np.ndarray, labels: np.ndarray) -> bool:
    return np.array_equal(data.inputs.numpy(), images) and data.targets.tolist() == labels.tolist()


@pytest.mark.parametrize("layout", ["torchvision", "torchvision inside", "hub", "hub in plain_text", "hub img", "hub bytes", "packed"])
def test_every_layout_gives_the_same_data(layout: str, tmp_path: Path) -> None:
    folder = {
        "torchvision": lambda: _write_torchvision(tmp_path),
        "torchvision inside": lambda: _write_torchvision(tmp_path) / "cifar-10-batches-py",
        "hub": lambda: _write_hub(tmp_path),
        "hub in plain_text": lambda: _write_hub(tmp_path / "plain_text").parent,
        "hub img": lambda: _write_hub(tmp_path, column="img"),
        "hub bytes": lambda: _write_hub(tmp_path, plain=True),
        "packed": lambda: _write_packed(tmp_path),
    }[layout]()
    found = cifar10(str(folder))
    assert _is(found.train, *TRAIN)
    assert _is(found.test, *TEST)
    assert found.train.classes == CIFAR10_CLASSES
    assert found.input_shape == (3, 32, 32)
    for limit in (3, 8, 27, 1000):
        few = cifar10(str(folder), train_limit=limit)
        assert _is(few.train, TRAIN[0][:limit], TRAIN[1][:limit])
        assert len(few.test) == 9


def test_cifar100_reads_fine_labels_in_every_layout(tmp_path: Path) -> None:
    hub = cifar100(str(_write_hub(tmp_path / "hub", column="img", label="fine_label")))
    (tmp_path / "packed").mkdir()
    packed = cifar100(str(_write_packed(tmp_path / "packed", "cifar100")))
    home = tmp_path / "cifar-100-python"
    home.mkdir()
    for split, (images, labels) in (("train", TRAIN), ("test", TEST)):
        content = {b"data": images.reshape(-1, 3072), b"fine_labels": labels.tolist(), b"coarse_labels": [0] * len(labels)}
        (home / split).write_bytes(pickle.dumps(content, protocol=4))
    pickled = cifar100(str(tmp_path))
    for found in (hub, packed, pickled):
        assert _is(found.train, *TRAIN)
        assert _is(found.test, *TEST)
        assert len(found.train.classes) == 100
    assert list(CIFAR100_CLASSES) == sorted(CIFAR100_CLASSES)


def test_quantised_strips_are_scaled_back(tmp_path: Path) -> None:
    found = cifar10(str(_write_packed(tmp_path, step=6)))
    assert np.array_equal(found.train.inputs.numpy(), np.minimum(TRAIN[0] // 6 * 6, 255))


def test_the_normalisation_can_be_chosen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIMBECK_DATA", str(_write_packed(tmp_path)))
    own, imagenet = cifar10(), cifar10(normalise="imagenet")
    assert own.train.mean == own.test.mean == (0.49139968, 0.48215841, 0.44653091)
    assert imagenet.train.mean == (0.485, 0.456, 0.406)
    assert imagenet.test.std == (0.229, 0.224, 0.225)
    with pytest.raises(InputError, match="Did you mean 'imagenet'"):
        cifar10(normalise="imagnet")


@real
def test_the_packed_files_are_what_their_readme_says() -> None:
    """Shapes, classes, balance; the exact test set's statistics; the hub's layout written from a part of it agrees."""
    found = cifar10(train_limit=500)
    assert found.test.inputs.shape == (10000, 3, 32, 32)
    assert found.train.inputs.shape == (500, 3, 32, 32)
    assert torch.bincount(found.test.targets).tolist() == [1000] * 10
    assert found.num_classes == 10
    assert list(found.test.classes) == pq.read_schema(Path(os.environ["LIMBECK_DATA"]) / "cifar10_test.parquet").metadata[b"classes"].decode().split(",")
    normalised = found.test.prepare(found.test.inputs)
    assert normalised.mean((0, 2, 3)).abs().max() < 0.03  # the test set's own mean is near the training set's
    assert (normalised.std((0, 2, 3)) - 1).abs().max() < 0.03
    fine = cifar100(train_limit=1)
    assert torch.bincount(fine.test.targets).tolist() == [100] * 100
    assert list(CIFAR100_CLASSES) == pq.read_schema(Path(os.environ["LIMBECK_DATA"]) / "cifar100_test.parquet").metadata[b"classes"].decode().split(",")


@real
def test_packed_and_hub_layouts_agree_on_real_images(tmp_path: Path) -> None:
    packed = cifar10(train_limit=60)
    for split, data in (("train", packed.train), ("test", packed.test.subset(torch.arange(30)))):
        cells = [{"bytes": _png(image.numpy()), "path": None} for image in data.inputs]
        pq.write_table(pa.table({"image": cells, "label": data.targets.numpy()}), tmp_path / f"{split}-00000-of-00001.parquet")
    hub = cifar10(str(tmp_path))
    assert torch.equal(hub.train.inputs, packed.train.inputs)
    assert torch.equal(hub.train.targets, packed.train.targets)
    assert torch.equal(hub.test.inputs, packed.test.inputs[:30])
    assert hub.train.fingerprint == packed.train.fingerprint


class _Evil:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {self.mark}",)


def test_a_pickle_that_is_no_data_is_not_run(tmp_path: Path) -> None:
    path = _write_torchvision(tmp_path) / "cifar-10-batches-py" / "data_batch_2"
    evil = _Evil(tmp_path / "run")
    for content in ({b"data": evil}, evil, {b"data": np.array([evil], dtype=object), b"labels": [0]}):
        path.write_bytes(pickle.dumps(content))
        with pytest.raises(InputError) as caught:
            cifar10(str(tmp_path))
        assert str(path) in str(caught.value)
        assert "system" in str(caught.value)
    assert not evil.mark.exists()


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


DAMAGE = {
    "torchvision: half a file": (_write_torchvision, "cifar-10-batches-py/data_batch_3", _truncate),
    "torchvision: no pickle": (_write_torchvision, "cifar-10-batches-py/data_batch_3", lambda p: p.write_bytes(b"\xff\xfe text")),
    "torchvision: a file missing": (_write_torchvision, "cifar-10-batches-py/data_batch_3", lambda p: p.unlink()),
    "torchvision: other keys": (_write_torchvision, "cifar-10-batches-py/test_batch", lambda p: p.write_bytes(pickle.dumps({"data": 1}))),
    "torchvision: a list": (_write_torchvision, "cifar-10-batches-py/test_batch", lambda p: p.write_bytes(pickle.dumps([1, 2]))),
    "torchvision: other shapes": (
        _write_torchvision,
        "cifar-10-batches-py/test_batch",
        lambda p: p.write_bytes(pickle.dumps({b"data": np.zeros((2, 7), np.uint8), b"labels": [0, 1]})),
    ),
    "torchvision: label 10": (
        _write_torchvision,
        "cifar-10-batches-py/test_batch",
        lambda p: p.write_bytes(pickle.dumps({b"data": np.zeros((1, 3072), np.uint8), b"labels": [10]})),
    ),
    "hub: half a file": (_write_hub, "train-00001-of-00002.parquet", _truncate),
    "hub: empty": (_write_hub, "train-00001-of-00002.parquet", lambda p: p.write_bytes(b"")),
    "hub: no labels": (_write_hub, "test-00000-of-00001.parquet", lambda p: pq.write_table(pa.table({"image": [_png(TEST[0][0])]}), p)),
    "hub: no images": (_write_hub, "test-00000-of-00001.parquet", lambda p: pq.write_table(pa.table({"label": [0]}), p)),
    "hub: null label": (
        _write_hub,
        "test-00000-of-00001.parquet",
        lambda p: pq.write_table(pa.table({"image": [_png(TEST[0][0])], "label": pa.array([None], pa.int64())}), p),
    ),
    "hub: no image in it": (_write_hub, "test-00000-of-00001.parquet", lambda p: pq.write_table(pa.table({"image": [b"none"], "label": [0]}), p)),
    "hub: another size": (_write_hub, "test-00000-of-00001.parquet", lambda p: pq.write_table(pa.table({"image": [_png(TEST[0][0][:, :9])], "label": [0]}), p)),
    "packed: half a file": (_write_packed, "cifar10_train.parquet", _truncate),
    "packed: other columns": (_write_packed, "cifar10_test.parquet", lambda p: pq.write_table(pa.table({"strip": [b""], "step": [1]}), p)),
    "packed: no image": (
        _write_packed,
        "cifar10_test.parquet",
        lambda p: pq.write_table(pa.table({"strip": [b"RIFF"], "labels": [b"\0"], "step": [1]}), p),
    ),
    "packed: too short a strip": (
        _write_packed,
        "cifar10_test.parquet",
        lambda p: pq.write_table(pa.table({"strip": [_png(TEST[0][0])], "labels": [b"\0\0"], "step": [1]}), p),
    ),
    "packed: empty": (
        _write_packed,
        "cifar10_test.parquet",
        lambda p: pq.write_table(pa.table({"strip": pa.array([], pa.binary()), "labels": pa.array([], pa.binary()), "step": pa.array([], pa.uint8())}), p),
    ),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_file_is_named(case: str, tmp_path: Path) -> None:
    write, name, damage = DAMAGE[case]
    write(tmp_path)
    damage(tmp_path / name)
    with pytest.raises(InputError) as caught:
        cifar10(str(tmp_path))
    assert str(tmp_path / name) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_where_nothing_is_there_it_says_what_was_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LIMBECK_DATA", raising=False)
    with pytest.raises(InputError, match="LIMBECK_DATA"):
        cifar10()
    with pytest.raises(InputError, match="no such folder"):
        cifar10(str(tmp_path / "nowhere"))
    with pytest.raises(InputError, match="cifar-10-batches-py"):
        cifar10(str(tmp_path))
    _write_packed(tmp_path)
    with pytest.raises(InputError, match="train_limit"):
        cifar10(str(tmp_path), train_limit=0)
    (tmp_path / "cifar10_test.parquet").unlink()
    with pytest.raises(InputError, match="its test part is not"):
        cifar10(str(tmp_path))


def test_the_catalogue_names_importable_functions() -> None:
    from limbeck.components import import_object

    images = {"digits", "digit_pairs", "fashion_mnist", "cifar10", "cifar100", "image_folder", "huggingface", "tensors"}
    texts = {"python_manual", "novels", "text_file", "prompts", "text_classification", "text_features"}
    assert set(CATALOGUE) == images | texts | {"two_moons", "gaussian_grid", "gaussian_ring", "checkerboard"}
    assert all(callable(import_object(path)) for path in CATALOGUE.values())
