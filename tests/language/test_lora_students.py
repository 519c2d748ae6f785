import copy
import sys
from pathlib import Path

import pytest
import torch

from limbeck import export, models
from limbeck.components import Component
from limbeck.contract import Artefact
from limbeck.errors import InputError, MissingExtra
from limbeck.language import build, lora
from limbeck.language.divergences import CrossEntropy
from limbeck.language.encoders import EncoderClassifier
from limbeck.language.huggingface import CausalLM
from limbeck.language.linear_divergence import linear_divergence
from limbeck.language.tokens import TokenBatch
from limbeck.seeds import generator

pytest.importorskip("transformers")
pytest.importorskip("peft")

V, L = 61, 8
LLAMA = {
    "model_type": "llama", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 64, "tie_word_embeddings": True,
}  # fmt: skip
GPT2 = {"model_type": "gpt2", "n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 64, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
BERT = {"model_type": "bert", "vocab_size": V, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}


def student(given: object, fields: object = LLAMA, seed: int = 5) -> CausalLM:
    component = Component(name="causal_lm", args={"model": fields, "lora": given})
    model = models.build_model(component, num_classes=V, input_shape=(2, L), seed=seed)
    assert isinstance(model, CausalLM)
    return model


def rows() -> torch.Tensor:
    ids = torch.randint(0, V, (2, L), generator=generator("rows"))
    return torch.stack((ids, ids), 1)


def trained(model: CausalLM) -> CausalLM:
    """A few steps of plain training, so that B is no longer zero."""
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=5.0)
    for _ in range(3):
        optimiser.zero_grad()
        torch.nn.functional.cross_entropy(model(rows()).flatten(0, 1), rows()[:, 1].flatten()).backward()
        optimiser.step()
    return model


@pytest.mark.parametrize("fields", [LLAMA, GPT2])
def test_a_student_starts_as_the_network_and_only_adapters_learn(fields: object) -> None:
    model, plain = student({"rank": 3}, fields), student(None, fields)
    torch.testing.assert_close(model(rows()), plain(rows()), atol=0, rtol=0)
    learning = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert learning
    assert all("lora_" in name for name in learning)
    assert not model.head().weight_Vd.requires_grad
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trained(model)
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == set(learning)


def test_rank_targets_and_head_are_as_asked() -> None:
    model = student({"rank": 3, "targets": ["q_proj", "down_proj"], "head": True})
    learning = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    adapters = {name for name in learning if "lora_" in name}
    assert {name.split(".")[-4] for name in adapters} == {"q_proj", "down_proj"}
    assert {len(learning[name]) for name in adapters if "lora_A" in name} == {3}
    assert model.head().weight_Vd.requires_grad
    assert len(learning) == len(adapters) + 1  # the tied weight


@pytest.mark.parametrize("fields", [LLAMA, GPT2])
def test_merging_gives_the_plain_network_with_the_same_logits(fields: object) -> None:
    model = trained(student({"rank": 3, "alpha": 7.0}, fields)).eval()
    with torch.no_grad():
        own = model(rows())
        plain = lora.merged(model)
        torch.testing.assert_close(plain(rows()), own, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(model(rows()), own, atol=0, rtol=0)  # the student itself is as it was
    assert not torch.allclose(own, student(None, fields).eval()(rows()), atol=1e-2)
    assert plain.state_dict().keys() == student(None, fields).state_dict().keys()
    assert not lora.has_adapters(plain)
    assert lora.has_adapters(model)
    assert lora.merged(plain) is plain


def test_the_weight_of_a_map_with_an_adapter_is_w_plus_alpha_over_r_b_a() -> None:
    model = trained(student({"rank": 2, "alpha": 6.0, "targets": ["q_proj"]}))
    state, plain = model.state_dict(), lora.merged(model).state_dict()
    name = "network.model.layers.1.self_attn.q_proj"
    low_rank = state[f"{name}.lora_B.default.weight"] @ state[f"{name}.lora_A.default.weight"]
    torch.testing.assert_close(plain[f"{name}.weight"], state[f"{name}.base_layer.weight"] + 3.0 * low_rank)


@pytest.mark.parametrize("merge", [True, False])
def test_artefacts_are_loaded_without_and_with_peft(merge: bool, tmp_path: Path) -> None:
    model = trained(student({"rank": 2, "merge": merge})).eval()
    component = Component(name="causal_lm", args={"model": LLAMA, "lora": {"rank": 2, "merge": merge}})
    deployed = export.rebuild.deployed(model)
    artefact = Artefact("language_model", deployed)
    export.folder.save(artefact, tmp_path / "a", model=component, num_classes=V, input_shape=(2, L), preprocess={}, classes=[], extra={})
    again = export.folder.load(tmp_path / "a")
    assert lora.has_adapters(again) is not merge
    with torch.no_grad():
        torch.testing.assert_close(again(rows()), model(rows()), atol=1e-5, rtol=1e-5)


def test_a_student_with_adapters_takes_merged_weights_and_starts_anew_there() -> None:
    model = trained(student({"rank": 2}))
    plain, other = lora.merged(model), trained(student({"rank": 2}, seed=6))
    other = copy.deepcopy(other)  # as the engine does
    other.load_state_dict(plain.state_dict())
    torch.testing.assert_close(other(rows()), plain(rows()), atol=0, rtol=0)
    assert lora.has_adapters(other)
    other.load_state_dict(model.state_dict())  # and its own kind
    torch.testing.assert_close(other(rows()), model(rows()), atol=0, rtol=0)
    plain.load_state_dict(lora.merged(other).state_dict())


def test_classifiers_take_adapters_and_a_trained_head() -> None:
    model = build.encoder(4, (2, L), BERT, lora={"rank": 2})
    assert isinstance(model, EncoderClassifier)
    learning = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert {"head.weight", "head.bias"} <= set(learning)
    assert all("lora_" in name or name.startswith("head.") for name in learning)
    assert model.deployed().lora is None
    assert not lora.has_adapters(model.deployed())


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings")
@pytest.mark.parametrize(
    ("given", "where"),
    [
        ("yes", "lora"),
        ({"rnk": 2}, "lora.rnk"),
        ({"rank": 0}, "lora.rank"),
        ({"dropout": 1.0}, "lora.dropout"),
        ({"targets": ["q_prj"]}, "lora.targets"),
        ({"targets": ["q_proj", "lm_head"]}, "lora.targets"),
    ],
)
def test_wrong_specifications_are_named(given: object, where: str) -> None:
    with pytest.raises(InputError) as caught:
        build.causal_lm(V, (2, L), LLAMA, lora=given)  # type: ignore[arg-type]
    assert caught.value.where == where


def test_without_peft_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(MissingExtra, match=r"limbeck\[language\]"):
        build.causal_lm(V, (2, L), LLAMA, lora={"rank": 2})


@pytest.mark.parametrize("head", [False, True])
def test_losses_over_the_head_compute_its_gradient_only_where_it_is_trained(head: bool) -> None:
    model = student({"rank": 2, "head": head}).train()
    tokens = TokenBatch.from_inputs(rows())
    found = tokens.rows()
    linear_divergence(found.gather(model.hidden(tokens)), model.head(), None, CrossEntropy(), found).loss.backward()
    assert (model.head().weight_Vd.grad is not None) is head
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)
    by_hand = copy.deepcopy(model)
    by_hand.zero_grad()
    torch.nn.functional.cross_entropy(by_hand(rows()).flatten(0, 1), rows()[:, 1].flatten()).backward()
    for ours, theirs in zip(model.parameters(), by_hand.parameters(), strict=True):
        if ours.requires_grad:
            torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-6, rtol=1e-4)
