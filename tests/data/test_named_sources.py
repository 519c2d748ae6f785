import gzip
import os
import struct
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from limbeck.contract import IGNORE
from limbeck.data.sources import FASHION_MNIST_FOLDER, digits, fashion_mnist, huggingface, image_folder, read_idx, tensors
from limbeck.errors import InputError, MissingExtra

# digits


def test_digits_are_scaled_split_by_class_and_normalised() -> None:
    found = digits()
    assert (len(found.train), len(found.test), found.num_classes, found.input_shape) == (1347, 450, 10, (1, 8, 8))
    counts = torch.bincount(found.test.targets)
    assert counts.max() - counts.min() <= 2
    pixels = torch.cat((found.train.inputs, found.test.inputs))
    assert set(pixels.unique().tolist()) == {k / 16 for k in range(17)}
    from sklearn.datasets import load_digits

    assert sorted(x.numpy().tobytes() for x in pixels) == sorted(x.tobytes() for x in (load_digits().images / 16).astype(np.float32))
    prepared = found.train.prepare(found.train.inputs)
    assert abs(float(prepared.mean())) < 1e-4
    assert abs(float(prepared.std()) - 1) < 1e-4
    assert found.test.mean == found.train.mean


def test_the_seed_chooses_the_digits_held_out() -> None:
    assert digits(seed=0).test.fingerprint == digits(seed=0).test.fingerprint != digits(seed=1).test.fingerprint
    assert len(digits(test_size=100).test) == 100
    for size in (0, 1797, -4):
        with pytest.raises(InputError, match="test_size"):
            digits(test_size=size)


# Fashion-MNIST and its IDX files


def _idx(array: np.ndarray) -> bytes:
    return b"\0\0\x08" + bytes([array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def _write_idx(folder: Path, packed: bool) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    arrays = {
        "train-images-idx3-ubyte": rng.integers(0, 256, (20, 28, 28), dtype=np.uint8),
        "train-labels-idx1-ubyte": (np.arange(20) % 10).astype(np.uint8),
        "t10k-images-idx3-ubyte": rng.integers(0, 256, (10, 28, 28), dtype=np.uint8),
        "t10k-labels-idx1-ubyte": np.arange(10, dtype=np.uint8),
    }
    for name, array in arrays.items():
        (folder / (f"{name}.gz" if packed else name)).write_bytes(gzip.compress(_idx(array)) if packed else _idx(array))
    return arrays


@pytest.mark.parametrize("packed", [True, False])
def test_fashion_mnist_reads_plain_and_gzipped_files(packed: bool, tmp_path: Path) -> None:
    arrays = _write_idx(tmp_path, packed)
    found = fashion_mnist(str(tmp_path))
    assert np.array_equal(found.train.inputs[:, 0].numpy(), arrays["train-images-idx3-ubyte"])
    assert found.train.targets.tolist() == arrays["train-labels-idx1-ubyte"].tolist()
    assert np.array_equal(found.test.inputs[:, 0].numpy(), arrays["t10k-images-idx3-ubyte"])
    assert found.input_shape == (1, 28, 28)
    assert found.num_classes == 10


@pytest.mark.skipif(not FASHION_MNIST_FOLDER.is_dir(), reason="the Debian package dataset-fashion-mnist is not installed")
def test_the_debian_packages_fashion_mnist() -> None:
    found = fashion_mnist()
    assert torch.bincount(found.train.targets).tolist() == [6000] * 10
    assert torch.bincount(found.test.targets).tolist() == [1000] * 10
    pixels = found.train.inputs.double() / 255
    assert abs(float(pixels.mean()) - found.train.mean[0]) < 1e-7
    assert abs(float(pixels.std(correction=0)) - found.train.std[0]) < 1e-7


def test_without_a_folder_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("limbeck.data.sources.FASHION_MNIST_FOLDER", tmp_path / "not installed")
    with pytest.raises(InputError, match="apt-get install dataset-fashion-mnist"):
        fashion_mnist()
    with pytest.raises(InputError, match="train-images-idx3-ubyte"):
        fashion_mnist(str(tmp_path))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("cut short.gz", gzip.compress(_idx(np.zeros((9, 28, 28), np.uint8)))[:-9]),
        ("no gzip.gz", b"plain text"),
        ("flipped.gz", gzip.compress(_idx(np.arange(100, dtype=np.uint8)))[:40] + b"\xff\xff" + gzip.compress(_idx(np.arange(100, dtype=np.uint8)))[42:]),
        ("cut short", _idx(np.zeros((9, 28, 28), np.uint8))[:-1]),
        ("too long", _idx(np.zeros(9, np.uint8)) + b"!"),
        ("cut in the header", _idx(np.zeros((9, 28, 28), np.uint8))[:9]),
        ("floats", b"\0\0\x0d\x01\0\0\0\x01\0\0\0\0"),
        ("empty", b""),
        ("html", b"<html>404</html>"),
        ("huge", b"\0\0\x08\x03" + b"\xff" * 12),
        ("gone", None),
    ],
)
def test_a_damaged_idx_file_is_named(name: str, content: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError) as caught:
        read_idx(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_images_and_labels_must_belong_together(tmp_path: Path) -> None:
    _write_idx(tmp_path, packed=False)
    (tmp_path / "t10k-labels-idx1-ubyte").write_bytes(_idx(np.arange(9, dtype=np.uint8)))
    with pytest.raises(InputError, match="t10k-images"):
        fashion_mnist(str(tmp_path))
    (tmp_path / "t10k-labels-idx1-ubyte").write_bytes(_idx(np.arange(1, 11, dtype=np.uint8)))
    with pytest.raises(InputError, match=r"t10k-labels.*10 classes"):
        fashion_mnist(str(tmp_path))


# a folder of images


def _save(path: Path, colour: tuple[int, int, int], size: tuple[int, int] = (20, 12)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)


def test_image_folder_takes_class_names_from_folders(tmp_path: Path) -> None:
    _save(tmp_path / "train" / "cat" / "1.png", (255, 0, 0))
    _save(tmp_path / "train" / "cat" / "2.JPG", (254, 0, 0))
    _save(tmp_path / "train" / "ant" / "x.webp", (0, 255, 0))
    _save(tmp_path / "val" / "cat" / "9.bmp", (0, 0, 255))
    (tmp_path / "train" / "cat" / "notes.txt").write_text("no image")
    (tmp_path / "train" / ".hidden").mkdir()
    found = image_folder(str(tmp_path), size=8)
    assert found.train.classes == ("ant", "cat")
    assert found.train.targets.tolist() == [0, 1, 1]
    assert found.test.targets.tolist() == [1]
    assert found.train.inputs.dtype == torch.uint8
    assert found.input_shape == (3, 8, 8)
    assert (found.train.inputs[1] == torch.tensor([255, 0, 0])[:, None, None]).all()
    assert found.train.mean == (0.485, 0.456, 0.406)


def test_the_centred_square_is_scaled(tmp_path: Path) -> None:
    """As if the short side were scaled and the centre cropped."""
    pixels = np.random.default_rng(0).integers(0, 256, (10, 30, 3), dtype=np.uint8)
    for split in ("train", "test"):
        (tmp_path / split / "a").mkdir(parents=True)
        Image.fromarray(pixels).save(tmp_path / split / "a" / "1.png")
    same = image_folder(str(tmp_path), size=10).train.inputs[0].numpy()
    assert np.array_equal(same, pixels[:, 10:20].transpose(2, 0, 1))
    half = image_folder(str(tmp_path), size=5).train.inputs[0].numpy()
    scaled = np.asarray(Image.fromarray(pixels).resize((15, 5), Image.Resampling.BILINEAR))
    assert np.array_equal(half, scaled[:, 5:10].transpose(2, 0, 1))


def test_what_is_wrong_with_an_image_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"train.*no such folder"):
        image_folder(str(tmp_path), size=8)
    (tmp_path / "train").mkdir()
    with pytest.raises(InputError, match="no class folders"):
        image_folder(str(tmp_path), size=8)
    (tmp_path / "train" / "a").mkdir()
    with pytest.raises(InputError, match=r"test.*no such folder"):
        image_folder(str(tmp_path), size=8)
    (tmp_path / "test" / "b").mkdir(parents=True)
    with pytest.raises(InputError, match="class 'b' is not in train"):
        image_folder(str(tmp_path), size=8)
    (tmp_path / "test" / "b").rmdir()
    _save(tmp_path / "test" / "a" / "1.png", (1, 2, 3))
    with pytest.raises(InputError, match="no images"):
        image_folder(str(tmp_path), size=8)
    _save(tmp_path / "train" / "a" / "good.png", (1, 2, 3))
    bad = tmp_path / "train" / "a" / "bad.png"
    whole = (tmp_path / "train" / "a" / "good.png").read_bytes()
    for content in (b"", b"text", whole[: len(whole) // 2], whole[:16] + b"\xff" * 8 + whole[24:]):
        bad.write_bytes(content)
        with pytest.raises(InputError, match=r"bad\.png"):
            image_folder(str(tmp_path), size=8)
    with pytest.raises(InputError, match="size"):
        image_folder(str(tmp_path), size=0)


def test_a_file_name_that_is_no_utf8_can_still_be_named(tmp_path: Path) -> None:
    for split in ("train", "test"):
        _save(tmp_path / split / "a" / "1.png", (1, 2, 3))
    Path(os.fsdecode(os.fsencode(tmp_path / "train" / "a") + b"/\xff\xfe.png")).write_bytes(b"text")
    with pytest.raises(InputError) as caught:
        image_folder(str(tmp_path), size=8)
    assert str(caught.value).encode()
    assert "??.png" in str(caught.value)


# files of tensors


@pytest.mark.parametrize("kind", ["npz", "safetensors", "pt", "pth"])
def test_tensors_from_files(kind: str, tmp_path: Path) -> None:
    contents = {
        "train": {"inputs": torch.randn(6, 4), "targets": torch.tensor([0, 1, 2, IGNORE, 1, 0])},
        "test": {"inputs": torch.randn(3, 4), "targets": torch.tensor([3, 1, 0])},
    }
    paths = {}
    for split, content in contents.items():
        path = paths[split] = tmp_path / f"{split}.{kind}"
        if kind == "npz":
            np.savez(path, **{name: tensor.numpy() for name, tensor in content.items()}, extra=np.zeros(2))
        elif kind == "safetensors":
            save_file(content, path)
        else:
            torch.save(content, path)
    found = tensors(str(paths["train"]), str(paths["test"]), mean=[1.0], std=[2.0])
    assert torch.equal(found.train.inputs, contents["train"]["inputs"])
    assert torch.equal(found.train.targets, contents["train"]["targets"])
    assert torch.equal(found.test.targets, contents["test"]["targets"])
    assert found.num_classes == 4
    torch.testing.assert_close(found.train.prepare(found.train.inputs), (found.train.inputs - 1) / 2)


class _NotATensor:
    pass


def test_what_is_wrong_with_a_file_of_tensors_is_named(tmp_path: Path) -> None:
    good = tmp_path / "good.npz"
    np.savez(good, inputs=np.zeros((2, 3), np.float32), targets=np.array([0, 1]))
    bad = {
        "pickled.npz": lambda p: np.savez(p, inputs=np.array([None, {}], dtype=object), targets=np.array([0, 1])),
        "nameless.npz": lambda p: np.savez(p, x=np.zeros(2)),
        "half.npz": lambda p: p.write_bytes(good.read_bytes()[:100]),
        "text.npz": lambda p: p.write_text("inputs"),
        "lengths.npz": lambda p: np.savez(p, inputs=np.zeros((2, 3), np.float32), targets=np.array([0])),
        "floats.npz": lambda p: np.savez(p, inputs=np.zeros((2, 3), np.float32), targets=np.array([0.0, 1.0])),
        "words.npz": lambda p: np.savez(p, inputs=np.array(["a", "b"]), targets=np.array([0, 1])),
        "shape.npz": lambda p: np.savez(p, inputs=np.zeros((2, 4), np.float32), targets=np.array([0, 1])),
        "text.safetensors": lambda p: p.write_bytes(b"\xff" * 30),
        "code.pt": lambda p: torch.save({"inputs": _NotATensor(), "targets": torch.zeros(1)}, p),
        "list.pt": lambda p: torch.save([torch.zeros(2), torch.zeros(2)], p),
        "text.pt": lambda p: p.write_text("x"),
        "table.csv": lambda p: p.write_text("x"),
        "gone.npz": lambda p: None,
    }
    for name, write in bad.items():
        path = tmp_path / name
        write(path)
        for pair in ((good, path), (path, good)):
            with pytest.raises(InputError) as caught:
                tensors(str(pair[0]), str(pair[1]))
            assert "\n" not in str(caught.value)
            assert str(path) in str(caught.value) or name == "shape.npz"


# the Hub


class _Rows:
    """As much of `datasets.Dataset` as the source uses."""

    def __init__(self, sizes: list[tuple[int, int]]) -> None:
        self.images = [Image.new("L" if i % 2 else "RGB", size, 10 + i) for i, size in enumerate(sizes)]
        self.column_names = ["image", "label"]
        self.features = {"label": types.SimpleNamespace(names=["no", "yes"])}

    def __iter__(self):  # type: ignore[no-untyped-def]
        return iter([{"image": image, "label": i % 2} for i, image in enumerate(self.images)])

    def __getitem__(self, column: str) -> list[int]:
        assert column == "label"
        return [i % 2 for i in range(len(self.images))]


def _fake_datasets(monkeypatch: pytest.MonkeyPatch, sizes: list[tuple[int, int]]) -> list[tuple[object, ...]]:
    calls: list[tuple[object, ...]] = []

    def load_dataset(name: str, config: str | None, *, split: str) -> _Rows:
        calls.append((name, config, split))
        if split == "validation":
            raise ValueError('Unknown split "validation".\nShould be one of ["train"].')
        return _Rows(sizes)

    module = types.ModuleType("datasets")
    module.load_dataset = load_dataset  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", module)
    return calls


def test_huggingface_reads_images_and_class_names(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = _fake_datasets(monkeypatch, [(9, 9), (9, 9), (9, 9)])
    found = huggingface("somebody/something", config="small", test_split="test[:50]")
    assert calls == [("somebody/something", "small", "train"), ("somebody/something", "small", "test[:50]")]
    assert found.train.classes == ("no", "yes")
    assert found.train.targets.tolist() == [0, 1, 0]
    assert found.input_shape == (3, 9, 9)
    assert found.train.inputs[1].unique().tolist() == [11]


def test_huggingface_scales_where_sizes_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    _fake_datasets(monkeypatch, [(9, 9), (12, 6)])
    assert huggingface("a/b", size=6).input_shape == (3, 6, 6)
    with pytest.raises(InputError, match=r"a/b.*differ in size"):
        huggingface("a/b")
    with pytest.raises(InputError, match="no column 'picture'"):
        huggingface("a/b", image_column="picture")
    with pytest.raises(InputError, match=r"a/b \(validation\).*Unknown split") as caught:
        huggingface("a/b", test_split="validation", size=6)
    assert "\n" not in str(caught.value)


def test_huggingface_without_the_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingExtra, match=r"limbeck\[language\]"):
        huggingface("a/b")


def test_importing_the_sources_imports_nothing_heavy() -> None:
    code = (
        "import sys, limbeck.data, limbeck.data.sources, limbeck.data.cifar\n"
        "print([m for m in ('torchvision', 'PIL', 'pyarrow', 'sklearn', 'scipy', 'datasets', 'safetensors') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
