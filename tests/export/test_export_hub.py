"""Hub folders: transformers opens what was transformers', limbeck the rest, and the card says what is known."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from torch import nn

from limbeck.components import Component
from limbeck.contract import Artefact
from limbeck.export import export, load, save
from limbeck.export.hub import export_hf
from limbeck.models import build_model

MLP = Component(name="mlp", args={"hidden": [5]})
VIT = {"model_type": "vit", "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8, "patch_size": 4}


def run_folder(folder: Path, component: Component, input_shape: tuple[int, ...]) -> nn.Module:
    module = build_model(component, num_classes=3, input_shape=input_shape, seed=0)
    save(Artefact("classifier", module, facts={"bits": 4}), folder / "artefact", model=component, num_classes=3, input_shape=input_shape,
         preprocess={"mean": [0.5], "std": [0.25]}, classes=["cat", "dog", "eel"], extra={"metrics": {"accuracy": 0.87654}, "method": "KD"})  # fmt: skip
    return module.eval()


def card_of(folder: Path) -> tuple[dict, str]:
    _, front, body = (folder / "README.md").read_text().split("---\n", 2)
    return yaml.safe_load(front), body


def test_a_model_of_limbeck_becomes_a_folder_that_limbeck_opens(tmp_path):
    module = run_folder(tmp_path / "run", MLP, (1, 2, 2))
    written = export(tmp_path / "run", "hf", tmp_path / "student")
    assert sorted(path.name for path in written.path.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    inputs = torch.randn(2, 1, 2, 2)
    assert torch.equal(load(written.path)(inputs), module(inputs))
    front, body = card_of(written.path)
    assert front == {"library_name": "limbeck", "pipeline_tag": "image-classification", "tags": ["distillation", "limbeck"]}
    for words in ("# student", "| accuracy | 0.8765 |", "[B, 1, 2, 2]", "cat, dog, eel", "mean [0.5]", "- bits: 4", "- method: KD", "limbeck.load("):
        assert words in body


@pytest.fixture(scope="module")
def transformers():
    return pytest.importorskip("transformers")


def test_a_transformers_model_becomes_a_folder_that_transformers_opens(tmp_path, transformers, capfd):
    module = run_folder(tmp_path / "run", Component(name="transformers", args={"model": VIT}), (1, 8, 8))
    written = export(tmp_path / "run", "hf")
    assert written.path == (tmp_path / "run" / "artefact-hf")
    assert capfd.readouterr() == ("", "")
    opened = transformers.AutoModelForImageClassification.from_pretrained(written.path).eval()
    inputs = torch.randn(2, 1, 8, 8)
    assert torch.allclose(opened(inputs).logits, module(inputs), atol=1e-6)
    assert opened.config.id2label == {0: "cat", 1: "dog", 2: "eel"}
    assert opened.config.label2id == {"cat": 0, "dog": 1, "eel": 2}
    front, body = card_of(written.path)
    assert front["library_name"] == "transformers"
    assert "AutoModelForImageClassification.from_pretrained(" in body
    assert "| accuracy | 0.8765 |" in body
    again = export(tmp_path / "run", "hf")  # an earlier export is replaced
    assert again.bytes == written.bytes


def test_a_transformers_model_from_a_folder_is_saved_without_that_folder(tmp_path, transformers):
    config = transformers.AutoConfig.for_model(**VIT, num_channels=1, image_size=8, num_labels=5, hidden_act="relu")
    config.save_pretrained(tmp_path / "origin")
    component = Component(name="transformers", args={"model": str(tmp_path / "origin")})
    module = run_folder(tmp_path / "run", component, (1, 8, 8))
    (tmp_path / "origin").rename(tmp_path / "gone")
    inputs = torch.randn(2, 1, 8, 8)
    assert torch.equal(load(tmp_path / "run")(inputs), module(inputs))
    model = json.loads((tmp_path / "run" / "artefact" / "config.json").read_text())["model"]["args"]["model"]
    assert model["hidden_act"] == "relu"


def test_a_wrapped_transformers_model_with_weights_of_its_own_stays_limbecks(tmp_path, transformers):
    inner = build_model(Component(name="transformers", args={"model": VIT}), num_classes=3, input_shape=(1, 8, 8), seed=0)
    wrapped = nn.Sequential(inner, nn.Linear(3, 3))
    written = export_hf(wrapped, tmp_path / "wrapped")
    assert card_of(written.path)[0]["library_name"] == "limbeck"
    fresh = nn.Sequential(build_model(Component(name="transformers", args={"model": VIT}), num_classes=3, input_shape=(1, 8, 8), seed=1), nn.Linear(3, 3))
    found = load(written.path, model=fresh)
    inputs = torch.randn(2, 1, 8, 8)
    assert torch.equal(found(inputs), wrapped.eval()(inputs))


def test_modules_and_artefacts_are_written_with_what_is_known_of_them(tmp_path):
    run_folder(tmp_path / "run", MLP, (1, 2, 2))
    loaded = load(tmp_path / "run")
    written = export_hf(loaded, tmp_path / "again")
    assert load(written.path).limbeck_config == loaded.limbeck_config
    bare = export_hf(Artefact("encoder", nn.Linear(2, 3), facts={"dim": 3}), tmp_path / "bare")
    front, body = card_of(bare.path)
    assert "pipeline_tag" not in front
    assert "An encoder" in body
    assert "- dim: 3" in body
    assert load(bare.path, model=nn.Linear(2, 3)).limbeck_config["kind"] == "encoder"
