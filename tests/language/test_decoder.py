"""The decoder: Llama's logits, packed rows, the cache, masks, shapes and what builds it."""

import copy
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from limbeck import seeds
from limbeck.components import Component
from limbeck.contract import IGNORE
from limbeck.errors import InputError
from limbeck.language.decoder import Decoder, DecoderShape, Masks, decoder, from_llama
from limbeck.language.tokens import TokenBatch
from limbeck.models import reinitialise
from limbeck.models.fresh import build_model

MIXED = {"vocabulary": 23, "width": 16, "head_dim": 6, "layers": [[4, 2, 24], [0, 0, 8], [3, 3, 0], [2, 1, 5]], "tied": False, "norm_eps": 1e-6}
"""Layers that differ, as a pruning leaves them: one without heads, one without neurons."""


def small(seed: int = 0, **args: Any) -> Decoder:
    component = Component(name=None, target="limbeck.language.decoder:decoder", args={"width": 16, "layers": 2, **args})
    made = build_model(component, num_classes=23, input_shape=(2, 12), seed=seed)
    assert isinstance(made, Decoder)
    return made


def mixed() -> Decoder:
    return small(shape=MIXED)


def text(rows: int = 3, length: int = 12, vocabulary: int = 23) -> TokenBatch:
    return TokenBatch.from_text(torch.randint(0, vocabulary, (rows, length + 1), generator=seeds.generator(1, rows, length)))


@pytest.mark.parametrize(("heads", "groups", "tied"), [(4, 4, True), (4, 2, False), (6, 1, True)])
def test_from_llama_gives_the_same_logits(heads: int, groups: int, tied: bool) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=53, hidden_size=24, intermediate_size=40, num_hidden_layers=3, num_attention_heads=heads, num_key_value_heads=groups,
        max_position_embeddings=32, tie_word_embeddings=tied, rms_norm_eps=1e-4, rope_theta=500.0, head_dim=8, initializer_range=0.2,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        theirs = transformers.LlamaForCausalLM(config).eval()
        for name, parameter in theirs.named_parameters():
            if "norm" in name:
                torch.nn.init.uniform_(parameter, 0.5, 1.5)
    ours, tokens = from_llama(theirs), text(2, 20, 53)
    assert (ours.output is None) == tied
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens.packed()), theirs(tokens.input_ids).logits, rtol=1e-4, atol=1e-5)
    assert ours.shape.parameters == sum(p.numel() for p in theirs.parameters()) == sum(p.numel() for p in ours.parameters())
    before = theirs.model.embed_tokens.weight.clone()
    with torch.no_grad():
        ours.embedding.weight.zero_()
    assert torch.equal(theirs.model.embed_tokens.weight, before)


SCALED = {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}


@pytest.mark.parametrize(
    ("changed", "said"), [({"attention_bias": True}, "attention_bias"), ({"hidden_act": "gelu"}, "gelu"), ({"rope_parameters": SCALED}, "rope linear")]
)
def test_from_llama_refuses_what_the_decoder_has_not(changed: dict[str, Any], said: str) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(vocab_size=11, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, **changed)
    with pytest.raises(InputError, match=said):
        from_llama(transformers.LlamaForCausalLM(config))
    with pytest.raises(InputError, match="no LlamaForCausalLM"):
        from_llama(torch.nn.Linear(2, 2))


@pytest.mark.slow
def test_from_llama_on_smollm2() -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("gguf")
    huggingface = pytest.importorskip("limbeck.language.huggingface")
    place = Path(os.environ.get("LIMBECK_DATA", "/nowhere"))
    if not any(place.glob("**/*.gguf")):
        pytest.skip("no SmolLM2 here")
    theirs = huggingface.smollm2(num_classes=49152, input_shape=(2, 16), layers=2)
    ours, tokens = from_llama(theirs.network), text(1, 16, 49152)
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens.packed()), theirs(tokens.packed()), rtol=1e-3, atol=1e-3)


def test_a_position_sees_none_after_it() -> None:
    model, tokens = mixed(), text()
    changed = TokenBatch.from_inputs(tokens.packed().clone())
    changed.input_ids[:, 7] = (changed.input_ids[:, 7] + 1) % 23
    a, b = model.hidden(tokens), model.hidden(changed)
    torch.testing.assert_close(a[:, :7], b[:, :7], rtol=0, atol=0)
    assert (a[:, 7:] - b[:, 7:]).abs().amax(-1).min() > 1e-4


def test_packed_rows_give_what_their_texts_give_alone() -> None:
    model = mixed()
    first, second = text(1, 5), text(1, 7)
    ids = torch.cat((first.input_ids, second.input_ids, torch.zeros(1, 2, dtype=torch.int64)), 1)
    targets = torch.cat((first.targets, second.targets, torch.full((1, 2), IGNORE)), 1)
    positions = torch.cat((torch.arange(5), torch.arange(7), torch.arange(2)))[None]
    segments = torch.tensor([[0] * 5 + [1] * 7 + [-1] * 2])
    found = model.hidden(TokenBatch(ids, positions, segments, targets))
    torch.testing.assert_close(found[:, :5], model.hidden(first), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found[:, 5:12], model.hidden(second), rtol=1e-5, atol=1e-6)
    assert bool(found.isfinite().all())


def test_steps_with_a_cache_give_what_one_pass_gives() -> None:
    model, tokens = mixed().eval(), text(2, 9)
    whole = model.hidden(tokens)
    cache, parts = None, []
    for start, stop in ((0, 4), (4, 5), (5, 9)):
        attention = torch.ones(2, stop, dtype=torch.bool)
        found, cache = model.step(tokens.input_ids[:, start:stop], tokens.positions[:, start:stop], attention, cache)
        parts.append(found)
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-5, atol=1e-6)


def test_prompts_padded_on_the_left_give_what_they_give_alone() -> None:
    model = mixed().eval()
    short, long = text(1, 4), text(1, 6)
    ids = torch.cat((torch.cat((torch.zeros(1, 2, dtype=torch.int64), short.input_ids), 1), long.input_ids))
    attention = torch.tensor([[False] * 2 + [True] * 4, [True] * 6])
    positions = (attention.long().cumsum(1) - 1).clamp(min=0)
    found, cache = model.step(ids, positions, attention)
    torch.testing.assert_close(found[:1, 2:], model.hidden(short), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found[1:], model.hidden(long), rtol=1e-5, atol=1e-6)
    assert bool(found.isfinite().all())
    new = torch.tensor([[5], [9]])
    found, _ = model.step(new, positions[:, -1:] + 1, torch.cat((attention, torch.ones(2, 1, dtype=torch.bool)), 1), cache)
    alone = TokenBatch.from_text(torch.cat((short.input_ids, new[:1], new[:1]), 1))
    torch.testing.assert_close(found[:1, 0], model.hidden(alone)[:, -1], rtol=1e-5, atol=1e-6)


def test_masks_of_ones_change_nothing_and_zeros_switch_units_off() -> None:
    model, tokens = mixed(), text()

    def ones() -> Masks:
        layers = model.shape.layers
        return Masks(tuple(torch.ones(o.kv_heads) for o in layers), tuple(torch.ones(o.ffn) for o in layers), torch.ones(16))

    torch.testing.assert_close(model.hidden(tokens, ones()), model.hidden(tokens), rtol=0, atol=0)
    masks = ones()
    masks.heads[0][1] = 0
    without = copy.deepcopy(model)
    with torch.no_grad():
        without.stack[0].attention.out.weight[:, 2 * 6 : 4 * 6] = 0  # type: ignore[union-attr]  # the second group's two query heads
    torch.testing.assert_close(model.hidden(tokens, masks), without.hidden(tokens), rtol=1e-5, atol=1e-6)
    masks = ones()
    masks.neurons[3][2] = 0
    without = copy.deepcopy(model)
    with torch.no_grad():
        without.stack[3].ffn.down.weight[:, 2] = 0  # type: ignore[union-attr]
    torch.testing.assert_close(model.hidden(tokens, masks), without.hidden(tokens), rtol=1e-5, atol=1e-6)
    masks = ones()
    masks.channels[5] = 0
    assert bool((model.hidden(tokens, masks)[..., 5] == 0).all())


def test_gradients_reach_every_weight_and_agree_with_finite_differences() -> None:
    model, tokens = mixed().double(), text(2, 5)

    def loss() -> Tensor:
        return torch.nn.functional.cross_entropy(model(tokens.packed()).flatten(0, 1), tokens.targets.flatten())

    loss().backward()
    generator = seeds.generator(4)
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        direction = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        with torch.no_grad():
            parameter.add_(direction, alpha=1e-5)
            above = loss()
            parameter.sub_(direction, alpha=2e-5)
            below = loss()
            parameter.add_(direction, alpha=1e-5)
        assert float((above - below) / 2e-5) == pytest.approx(float((parameter.grad * direction).sum()), rel=1e-4, abs=1e-8), name


def test_a_shape_counts_its_weights_and_survives_json() -> None:
    for model in (mixed(), small(), small(tied=False, kv_heads=2, ffn=8)):
        shape = model.shape
        assert shape.parameters == sum(p.numel() for p in model.parameters())
        assert shape.layer_parameters == sum(p.numel() for name, p in model.named_parameters() if not name.startswith(("embedding", "output")))
        again = small(shape=shape.model_dump(mode="json"))
        assert again.shape == shape
        again.load_state_dict(model.state_dict())
        torch.testing.assert_close(again.hidden(text()), model.hidden(text()), rtol=0, atol=0)


def test_what_the_builder_makes_by_default() -> None:
    made = small()
    assert (made.shape.layers, made.shape.head_dim, made.shape.tied) == (((4, 4, 48),) * 2, 4, True)
    logits = made(text(20).packed())
    assert logits.shape == (20, 12, 23)
    assert 0.2 < float(logits.detach().std()) < 1.2  # the first guess is nearly uniform, whatever the width
    assert torch.equal(small(3).embedding.weight, small(3).embedding.weight)
    assert not torch.equal(small(3).embedding.weight, small(4).embedding.weight)
    assert float(made.embedding.weight.detach().std()) == pytest.approx((2 / 80) ** 0.5, rel=0.15)
    assert torch.equal(reinitialise(made, 3).embedding.weight, reinitialise(small(5), 3).embedding.weight)


@pytest.mark.parametrize(
    ("args", "where"),
    [
        ({"heads": 3}, "heads"),
        ({"heads": 4, "kv_heads": 3}, ""),
        ({"head_dim": 5}, ""),
        ({"layers": 0}, "layers"),
        ({"tied": "no"}, "tied"),
        ({"max_length": 8}, "max_length"),
        ({"shape": {**MIXED, "vocabulary": 22}}, "shape.vocabulary"),
        ({"shape": {**MIXED, "layers": [[4, 2]]}}, "shape.layers"),
        ({"shape": {"width": 3}}, "shape"),
        ({"rope_theta": 0.0}, "rope_theta"),
    ],
)
def test_wrong_numbers_are_refused(args: dict[str, Any], where: str) -> None:
    with pytest.raises(InputError) as error:
        decoder(23, (2, 12), **{"width": 16, **args})
    assert error.value.where.startswith(where)


def test_rows_that_are_too_long_are_refused() -> None:
    with pytest.raises(InputError, match="8 at most"):
        Decoder(DecoderShape.model_validate({**MIXED, "max_length": 8})).hidden(text())
