"""Artefacts of language models and text encoders are built again from their own configuration: no folder, no package, no download."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from limbeck.components import Component
from limbeck.contract import Artefact
from limbeck.export import load, rebuild, save
from limbeck.language import build, huggingface
from limbeck.models import build_model
from limbeck.seeds import generator

pytest.importorskip("transformers")

V, L, C = 61, 8, 4
LLAMA = {
    "model_type": "llama", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 64, "tie_word_embeddings": True, "vocab_size": V, "rms_norm_eps": 3e-5,
    "rope_parameters": {"rope_theta": 500.0, "rope_type": "default"},
}  # fmt: skip
GEMMA = LLAMA | {"model_type": "gemma3_text", "head_dim": 4, "sliding_window": 3, "layer_types": ["sliding_attention", "full_attention"] * 2}
GEMMA = {name: value for name, value in GEMMA.items() if name != "rope_parameters"} | {"final_logit_softcapping": 2.0}
BERT = {"model_type": "bert", "vocab_size": V, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2}


def rows() -> Tensor:
    ids = torch.randint(0, V, (2, L), generator=generator("rows"))
    return torch.stack((ids, torch.ones_like(ids)), 1)


def written(component: Component, num_classes: int, folder: Path) -> nn.Module:
    module = build_model(component, num_classes=num_classes, input_shape=(2, L), seed=3).eval()
    kind = "classifier" if component.name in ("encoder", "minilm", "text_transformer") else "language_model"
    save(Artefact(kind, module), folder, model=component, num_classes=num_classes, input_shape=(2, L), preprocess={}, classes=(), extra={})
    return module


@pytest.mark.parametrize("fields", [LLAMA, GEMMA])
def test_a_student_out_of_a_folder_needs_the_folder_no_more(fields: dict[str, object], tmp_path: Path) -> None:
    source = tmp_path / "source"
    network: object = build.causal_lm(V, (2, L), fields).network
    network.save_pretrained(source)  # type: ignore[attr-defined]
    module = written(Component(name="causal_lm", args={"model": str(source), "layers": 3, "keep": "last"}), V, tmp_path / "artefact")
    for file in source.iterdir():
        file.unlink()
    again = load(tmp_path / "artefact")
    torch.testing.assert_close(again(rows()), module(rows()), atol=0, rtol=0)
    args = json.loads((tmp_path / "artefact" / "config.json").read_text())["model"]["args"]
    assert set(args) == {"model"}
    assert args["model"]["num_hidden_layers"] == 3
    assert str(source) not in json.dumps(args)


def test_a_student_out_of_a_package_needs_the_package_no_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With small networks in the place of the packages' own."""
    monkeypatch.setattr(build, "gguf_parts", lambda name: [Path(name)])
    monkeypatch.setattr(huggingface, "from_gguf", lambda parts: build.causal_lm(V, (2, L), LLAMA).network)
    student = written(Component(name="smollm2", args={"layers": 2}), V, tmp_path / "lm")
    monkeypatch.setattr(build, "installed", lambda package, module: tmp_path)
    monkeypatch.setattr(huggingface, "from_folder", lambda folder, auto: build.encoder(C, (2, L), BERT).body)
    encoder = written(Component(name="minilm", args={"layers": 2, "keep": "first", "pooling": "cls"}), C, tmp_path / "encoder")
    monkeypatch.undo()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for folder, module, name in (("lm", student, "causal_lm"), ("encoder", encoder, "encoder")):
        assert json.loads((tmp_path / folder / "config.json").read_text())["model"]["name"] == name
        torch.testing.assert_close(load(tmp_path / folder)(rows()), module(rows()), atol=0, rtol=0)


def test_a_transformer_from_scratch_comes_back(tmp_path: Path) -> None:
    module = written(Component(name="text_transformer", args={"vocabulary": V, "width": 8}), C, tmp_path / "a")
    torch.testing.assert_close(load(tmp_path / "a")(rows()), module(rows()), atol=0, rtol=0)


def test_a_tied_weight_is_stored_once(tmp_path: Path) -> None:
    written(Component(name="causal_lm", args={"model": LLAMA}), V, tmp_path / "a")
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    assert config["weights"]["tied"] == {"network.lm_head.weight": "network.model.embed_tokens.weight"}
    again: object = load(tmp_path / "a")
    assert again.network.lm_head.weight is again.network.model.embed_tokens.weight  # type: ignore[attr-defined]


def test_modules_without_adapters_are_saved_as_they_are() -> None:
    module = nn.Linear(2, 2)
    assert rebuild.deployed(module) is module
    model = build.causal_lm(V, (2, L), LLAMA)
    assert rebuild.deployed(model) is model
