"""ONNX files that agree with the module, or are not there."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from torch import Tensor, nn

from limbeck.components import Component
from limbeck.contract import Artefact
from limbeck.errors import InputError, LimbeckError, MissingExtra
from limbeck.export import export, save
from limbeck.export import onnx as onnx_module
from limbeck.export.onnx import export_onnx
from limbeck.models import build_model

onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

CNN = Component(name="cnn", args={"widths": [4]})


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """One export of a network with batch norm, used by several tests: (report, module)."""
    folder = tmp_path_factory.mktemp("onnx")
    module = build_model(CNN, num_classes=3, input_shape=(1, 8, 8), seed=0)
    module(torch.randn(16, 1, 8, 8))  # running statistics that are not 0 and 1
    save(Artefact("classifier", module), folder / "run" / "artefact", model=CNN, num_classes=3, input_shape=(1, 8, 8),
         preprocess={"mean": [0.5]}, classes=["a", "b", "c"], extra={})  # fmt: skip
    return export(folder / "run", "onnx"), module.eval()


def test_the_file_gives_the_modules_logits_at_any_batch_size(exported):
    report, module = exported
    session = onnxruntime.InferenceSession(report.path)
    for batch_size in (1, 2, 17):
        inputs = torch.randn(batch_size, 1, 8, 8)
        [found] = session.run(None, {"input": inputs.numpy()})
        assert (torch.from_numpy(found) - module(inputs)).abs().max() < 1e-5


def test_the_report_and_the_metadata_say_what_it_is(exported):
    report, _ = exported
    assert report.path.name == "artefact.onnx"
    assert report.bytes == report.path.stat().st_size
    assert 0 <= report.max_abs_difference < 1e-5
    assert report.opset >= 18
    assert f"{report.max_abs_difference:.2g}" in str(report)
    metadata = onnxruntime.InferenceSession(report.path).get_modelmeta().custom_metadata_map
    assert json.loads(metadata["classes"]) == ["a", "b", "c"]
    assert json.loads(metadata["preprocess"]) == {"mean": [0.5]}
    assert [path.name for path in report.path.parent.iterdir() if path.is_file()] == ["artefact.onnx"]


class Doubling(nn.Module):
    """Gives other numbers when it runs than when it is exported."""

    def forward(self, x: Tensor) -> Tensor:
        return x * (2.0 if torch.compiler.is_exporting() else 2.001)


def test_a_difference_is_an_error_and_leaves_the_earlier_file(tmp_path):
    (tmp_path / "m.onnx").write_bytes(b"earlier")
    with pytest.raises(LimbeckError, match=r"onnxruntime differs .* nothing was written"):
        export_onnx(Doubling(), (3,), tmp_path / "m.onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["m.onnx"]
    assert (tmp_path / "m.onnx").read_bytes() == b"earlier"


class NaN(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * float("nan")


class Branching(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


class Eigenvalues(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.linalg.eigvalsh(x.mT @ x) + x


@pytest.mark.parametrize(("module", "words"), [(NaN(), "differs"), (Branching(), "Branching cannot be exported"), (Eigenvalues(), "cannot be exported.*eig")])
def test_what_cannot_be_exported_or_compared_leaves_nothing(tmp_path, module, words, capfd):
    with pytest.raises(LimbeckError, match=words) as caught:
        export_onnx(module, (3,), tmp_path / "m.onnx")
    assert list(tmp_path.iterdir()) == []
    assert capfd.readouterr() == ("", "")
    assert "\n" not in str(caught.value)
    assert "\x1b" not in str(caught.value)


def test_a_file_that_onnxruntime_cannot_run_is_not_left(tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_module, "_write", lambda module, shape, path, metadata: path.write_bytes(b"junk"))
    with pytest.raises(LimbeckError, match="onnxruntime cannot run the exported Linear"):
        export_onnx(nn.Linear(2, 2), (2,), tmp_path / "m.onnx")
    assert list(tmp_path.iterdir()) == []


def test_the_module_is_left_as_it_was_and_nothing_is_printed(tmp_path, capfd):
    module = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.9), nn.Linear(4, 2)).train()
    module[1].eval()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    export_onnx(module, (3,), tmp_path / "m.onnx")
    assert [part.training for part in module] == [True, False, True]
    assert all(torch.equal(module.state_dict()[name], value) for name, value in before.items())
    assert capfd.readouterr() == ("", "")


def test_a_missing_package_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(MissingExtra, match=r"'onnxscript'.*limbeck\[export\]"):
        export_onnx(nn.Linear(2, 2), (2,), tmp_path / "m.onnx")


def test_a_folder_is_not_overwritten_by_a_file(tmp_path):
    with pytest.raises(InputError, match="folder"):
        export_onnx(nn.Linear(2, 2), (2,), tmp_path)


def texts_artefact(folder, component, kind, num_classes):
    """An artefact of rows of 6 tokens."""
    module = build_model(component, num_classes=num_classes, input_shape=(2, 6), seed=0)
    save(Artefact(kind, module), folder, model=component, num_classes=num_classes, input_shape=(2, 6), preprocess={"tokenizer": "minilm", "length": 6},
         classes=(), extra={})  # fmt: skip
    return module.eval()


def test_a_text_encoder_takes_ids_and_mask(tmp_path):
    pytest.importorskip("transformers")
    module = texts_artefact(tmp_path / "a", Component(name="text_transformer", args={"vocabulary": 31, "width": 4, "layers": 1}), "classifier", 3)
    report = export(tmp_path / "a", "onnx")
    session = onnxruntime.InferenceSession(report.path)
    [given] = session.get_inputs()
    assert (given.name, given.type, given.shape[1:]) == ("input", "tensor(int64)", [2, 6])
    ids = torch.arange(5 * 6).view(5, 6)
    mask = (torch.arange(6)[None] < torch.tensor([6, 1, 3, 6, 2])[:, None]).long()  # padding is heeded, too
    inputs = torch.stack((ids, mask), 1)
    [found] = session.run(None, {"input": inputs.numpy()})
    assert (torch.from_numpy(found) - module(inputs)).abs().max() < 1e-5
    whole = torch.stack((ids, torch.ones_like(mask)), 1)
    assert (module(whole) - module(inputs)).abs().max() > 1e-4
    assert (torch.from_numpy(session.run(None, {"input": whole.numpy()})[0]) - module(whole)).abs().max() < 1e-5


def test_language_models_and_unknown_readers_of_text_are_refused_in_words(tmp_path):
    pytest.importorskip("transformers")
    texts_artefact(tmp_path / "lm", Component(name="decoder", args={"layers": 1, "width": 8, "heads": 2}), "language_model", 31)
    with pytest.raises(InputError, match="Decoder is a language model") as caught:
        export(tmp_path / "lm", "onnx")
    assert "--to hf" in str(caught.value.fix)
    with pytest.raises(InputError, match="Linear reads tokens"):
        export_onnx(nn.Linear(6, 2), (2, 6), tmp_path / "m.onnx", preprocess={"tokenizer": "bytes"})
    assert [path.name for path in tmp_path.iterdir()] == ["lm"]


def test_importing_limbecks_export_does_not_import_onnx():
    code = "import limbeck.export.onnx, sys; sys.exit(any(m.split('.')[0] in ('onnx', 'onnxruntime', 'onnxscript', 'transformers') for m in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_every_checked_batch_counts(monkeypatch, tmp_path):
    """The bound looks at the largest difference over all batch sizes, not at the last."""
    seen = []
    real = onnx_module._inputs
    monkeypatch.setattr(onnx_module, "_inputs", lambda module, size, shape: seen.append(size) or real(module, size, shape))
    export_onnx(nn.Linear(2, 2), (2,), tmp_path / "m.onnx")
    assert seen == [2, 1, 3, 8]  # the example, then the checks
