"""A Llama-like decoder whose layers may differ in heads and neurons, as a pruning over all layers leaves them (sheet `capacity_gap`).

Pre-norm RMSNorm (arXiv 1910.07467), rotary positions (2104.09864), grouped queries (2305.13245), gated SiLU feed-forward (2002.05202), no biases: Llama's
(2302.13971), so that `from_llama` gives the same logits. The first weights are ours (see `Decoder.reset_parameters`).

B rows of L positions, T new ones, S so far; V vocabulary, d width (hidden channels), D head_dim; a layer has H query heads in K groups, each with a key and
a value head of its own, and F neurons. A group with its queries is one unit of pruning, as are a neuron and a channel.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple

import torch
from pydantic import Field, ValidationError, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from limbeck.contract import Frozen, input_error
from limbeck.errors import InputError
from limbeck.language.models import LanguageModel
from limbeck.language.signals import Head
from limbeck.language.tokens import TokenBatch
from limbeck.models.arguments import truth, whole_number

Size = Annotated[int, Field(ge=1, le=2**24)]
Count = Annotated[int, Field(ge=0, le=2**24)]


class LayerShape(NamedTuple):
    """Units of one layer: query heads H, key-value heads (groups) K, neurons F. K or F may be 0: the layer has no such branch."""

    query_heads: Count
    kv_heads: Count
    ffn: Count


class DecoderShape(Frozen):
    """All that builds a `Decoder` again, as JSON values.

    Raises:
        pydantic's ValidationError: a layer's query heads are no multiple of its key-value heads, or head_dim is odd.
    """

    vocabulary: Size
    width: Size
    head_dim: Size
    layers: tuple[LayerShape, ...]
    tied: bool = True
    rope_theta: float = Field(10_000.0, gt=0)
    norm_eps: float = Field(1e-5, ge=0)
    max_length: Size | None = Field(None, description="the longest row; None: any")

    @model_validator(mode="after")
    def _fits(self) -> DecoderShape:
        if self.head_dim % 2:
            raise ValueError("head_dim must be even, rotary positions turn pairs.")
        for layer in self.layers:
            if (layer.query_heads % layer.kv_heads if layer.kv_heads else layer.query_heads) != 0:
                raise ValueError(f"{layer.query_heads} query heads cannot be shared out among {layer.kv_heads} key-value heads.")
        return self

    @property
    def embedding_parameters(self) -> int:
        """Weights of the embedding, and of the head where it is not the same: V·d or 2·V·d."""
        return self.vocabulary * self.width * (1 if self.tied else 2)

    @property
    def layer_parameters(self) -> int:
        """All other weights: what "sparsity" and the law of the capacity gap count here."""
        d, total = self.width, self.width  # the final norm
        for layer in self.layers:
            if layer.kv_heads:
                total += d + 2 * d * self.head_dim * (layer.query_heads + layer.kv_heads)
            if layer.ffn:
                total += d + 3 * d * layer.ffn
        return total

    @property
    def parameters(self) -> int:
        """All weights."""
        return self.embedding_parameters + self.layer_parameters


@dataclass(frozen=True)
class Masks:
    """Factors on units, all 1 in the network itself (sheet `capacity_gap`, before eq. 3).

    heads: a layer's ξ [K] on its groups' attention. neurons: a layer's ν [F] on its gated activations. channels: μ [d], one vector on the embedding's output,
    on every norm's output and on every branch that is added to the residual stream.
    """

    heads: tuple[Tensor, ...]
    neurons: tuple[Tensor, ...]
    channels: Tensor


class Turn(NamedTuple):
    """cos and signed sin of every position's angles, [1 or B, 1, L, D] each: x · cos + roll(x, D/2) · sin."""

    cos: Tensor
    sin: Tensor

    def __call__(self, x_BHLD: Tensor) -> Tensor:
        """Queries or keys, turned."""
        dtype = x_BHLD.dtype
        return torch.addcmul(x_BHLD * self.cos.to(dtype), x_BHLD.roll(x_BHLD.shape[-1] // 2, -1), self.sin.to(dtype))


class KeysValues(NamedTuple):
    """What one layer keeps of the tokens so far: keys (turned) and values, [B, K, S, D] each."""

    keys: Tensor
    values: Tensor


class Attention(nn.Module):
    """Causal attention of H query heads in K groups. `qkv`: [(H + 2K)·D, d], queries, then keys, then values. `out`: [d, H·D]."""

    def __init__(self, width: int, head_dim: int, query_heads: int, kv_heads: int, eps: float) -> None:
        super().__init__()
        self.head_dim, self.query_heads, self.kv_heads = head_dim, query_heads, kv_heads
        self.norm = nn.RMSNorm(width, eps)
        self.qkv = nn.Linear(width, (query_heads + 2 * kv_heads) * head_dim, bias=False)
        self.out = nn.Linear(query_heads * head_dim, width, bias=False)

    def forward(
        self, x_BLd: Tensor, turn: Turn, attend: Tensor | None, past: KeysValues | None, heads_K: Tensor | None
    ) -> tuple[Tensor, KeysValues]:  # fmt: skip
        """The branch [B, L, d] of normed states, and keys and values so far. attend: [B, 1, L, S] bool, None: causal."""
        B, L, _ = x_BLd.shape
        H, K = self.query_heads, self.kv_heads
        qkv = self.qkv(x_BLd).view(B, L, H + 2 * K, self.head_dim).transpose(1, 2)
        q, k = turn(qkv[:, : H + K]).split((H, K), 1)
        v = qkv[:, H + K :]
        if past is not None:
            k, v = torch.cat((past.keys, k), 2), torch.cat((past.values, v), 2)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=attend, is_causal=attend is None, enable_gqa=H != K)
        if heads_K is not None:
            mixed = mixed * heads_K.repeat_interleave(H // K)[:, None, None]
        return self.out(mixed.transpose(1, 2).reshape(B, L, H * self.head_dim)), KeysValues(k, v)


class FeedForward(nn.Module):
    """down(silu(gate x) · up x). `gate_up`: [2F, d], gates first. `down`: [d, F]."""

    def __init__(self, width: int, neurons: int, eps: float) -> None:
        super().__init__()
        self.neurons = neurons
        self.norm = nn.RMSNorm(width, eps)
        self.gate_up = nn.Linear(width, 2 * neurons, bias=False)
        self.down = nn.Linear(neurons, width, bias=False)

    def forward(self, x_BLd: Tensor, neurons_F: Tensor | None) -> Tensor:
        """The branch [B, L, d] of normed states."""
        gate, up = self.gate_up(x_BLd).split(self.neurons, -1)
        active = F.silu(gate) * up
        return self.down(active if neurons_F is None else active * neurons_F)


class Layer(nn.Module):
    """Attention, then the feed-forward, each added to the residual stream; None where the shape leaves it without units."""

    def __init__(self, shape: DecoderShape, index: int) -> None:
        super().__init__()
        own = shape.layers[index]
        self.attention = Attention(shape.width, shape.head_dim, own.query_heads, own.kv_heads, shape.norm_eps) if own.kv_heads else None
        self.ffn = FeedForward(shape.width, own.ffn, shape.norm_eps) if own.ffn else None


class Decoder(LanguageModel):
    """The network of a `DecoderShape`: token rows → hidden states → logits.

    Attributes: shape; embedding; layers; norm (the last one); output, the head's own weight, None where it is the embedding's.
    """

    def __init__(self, shape: DecoderShape) -> None:
        super().__init__()
        self.shape, self.vocabulary = shape, shape.vocabulary
        self.embedding = nn.Embedding(shape.vocabulary, shape.width)
        self.layers = nn.ModuleList([Layer(shape, index) for index in range(len(shape.layers))])
        self.norm = nn.RMSNorm(shape.width, shape.norm_eps)
        self.output = None if shape.tied else nn.Linear(shape.width, shape.vocabulary, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Fresh weights from torch's CPU generator (as `models.build_model` seeds it): norms 1, all others normal with variance 2/(5d).

        The weights of branches' outputs are divided by √(2·layers) besides (GPT-2's rule), so that the residual stream keeps its size with depth. Ours.
        """
        std = (2 / (5 * self.shape.width)) ** 0.5
        for part in self.modules():
            if isinstance(part, nn.RMSNorm):
                nn.init.ones_(part.weight)
            elif isinstance(part, nn.Linear | nn.Embedding):
                nn.init.normal_(part.weight, std=std)
        with torch.no_grad():
            for layer in self.stack:
                for last in (None if layer.attention is None else layer.attention.out, None if layer.ffn is None else layer.ffn.down):
                    if last is not None:
                        last.weight.div_((2 * len(self.layers)) ** 0.5)

    @property
    def stack(self) -> list[Layer]:
        """The layers, in order."""
        return [layer for layer in self.layers if isinstance(layer, Layer)]

    def head(self) -> Head:
        """The embedding where tied, the head's own weight otherwise; no bias."""
        return Head(self.embedding.weight if self.output is None else self.output.weight, None)

    def hidden(self, tokens: TokenBatch, masks: Masks | None = None) -> Tensor:
        """[B, L, d], after the final norm. masks: factors on units, see `Masks`.

        Raises:
            InputError: the rows are longer than the shape's max_length.
        """
        length, most = tokens.input_ids.shape[1], self.shape.max_length
        if most is not None and length > most:
            raise InputError(f"rows of {length} tokens, the model was made for {most} at most.", where="data.source.length", fix="Use shorter rows.")
        attend = tokens.attention()
        positions = tokens.positions[:1] if attend is None else tokens.positions
        return self._run(tokens.input_ids, positions, attend, None, masks)[0]

    def step(self, input_ids_BT: Tensor, positions_BT: Tensor, attention_BS: Tensor, cache: Any = None) -> tuple[Tensor, Any]:
        """Hidden states [B, T, d] of T new tokens, and the keys and values of all so far; see `LanguageModel.step`."""
        T, S = input_ids_BT.shape[1], attention_BS.shape[1]
        causal_TS = torch.ones(T, S, dtype=torch.bool, device=attention_BS.device).tril(S - T)
        attend = ((attention_BS[:, None] & causal_TS) | causal_TS.triu(S - T))[:, None]  # padding sees itself, so that its softmax is defined
        return self._run(input_ids_BT, positions_BT, attend, cache, None)

    def _run(
        self, ids_BL: Tensor, positions_BL: Tensor, attend: Tensor | None, cache: tuple[KeysValues | None, ...] | None, masks: Masks | None
    ) -> tuple[Tensor, tuple[KeysValues | None, ...]]:  # fmt: skip
        turn = self._turn(positions_BL)
        h, kept = self.embedding(ids_BL), []
        channels = None if masks is None else masks.channels
        if channels is not None:
            h = h * channels
        for index, layer in enumerate(self.stack):
            after: KeysValues | None = None
            if layer.attention is not None:
                x = layer.attention.norm(h)
                heads = None if masks is None else masks.heads[index]
                branch, after = layer.attention(x if channels is None else x * channels, turn, attend, None if cache is None else cache[index], heads)
                h = h + (branch if channels is None else branch * channels)
            if layer.ffn is not None:
                x = layer.ffn.norm(h)
                branch = layer.ffn(x if channels is None else x * channels, None if masks is None else masks.neurons[index])
                h = h + (branch if channels is None else branch * channels)
            kept.append(after)
        h = self.norm(h)
        return h if channels is None else h * channels, tuple(kept)

    def _turn(self, positions_BL: Tensor) -> Turn:
        """Angles position · θ^(−2i/D), i < D/2, repeated for both halves of a head (Llama's pairing)."""
        D, device = self.shape.head_dim, positions_BL.device
        speed = self.shape.rope_theta ** (-torch.arange(0, D, 2, device=device, dtype=torch.float32) / D)
        angles = positions_BL[:, None, :, None] * speed
        cos, sin = angles.cos(), angles.sin()
        return Turn(torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1))


def decoder(
    num_classes: int,
    input_shape: Sequence[int],
    layers: int = 4,
    width: int = 64,
    heads: int = 4,
    kv_heads: int | None = None,
    ffn: int | None = None,
    head_dim: int | None = None,
    tied: bool = True,
    max_length: int | None = None,
    rope_theta: float = 10_000.0,
    norm_eps: float = 1e-5,
    shape: Mapping[str, Any] | None = None,
) -> Decoder:
    """A decoder with fresh weights: token rows [B, 2|4, L] int64 → logits [B, L, num_classes].

    Args:
        num_classes: V, the tokenizer's vocabulary. input_shape: [2 or 4, L], of one row.
        layers, width, heads: their numbers; kv_heads: groups, `heads` where None. ffn: neurons a layer; None: 8/3 · width, rounded up to a multiple of 8.
        head_dim: D; None: width / heads. tied: whether the head is the embedding. max_length: the longest row; None: any.
        rope_theta, norm_eps: of rotary positions and norms.
        shape: all of that, but V's check, as the JSON values of a `DecoderShape`: how a pruned model is built again.

    Raises:
        InputError: a number is out of range, or they do not fit each other.
    """
    if shape is not None:
        built = _shape(dict(shape), "shape")
        if built.vocabulary < num_classes:
            raise InputError(f"the shape has {built.vocabulary:,} tokens, the tokenizer {num_classes:,}.", where="shape.vocabulary")
    else:
        wide, many = whole_number(width, "width"), whole_number(heads, "heads")
        if head_dim is None and wide % many:
            raise InputError(f"{wide} channels cannot be shared out among {many} heads.", where="heads", fix="Give head_dim, or another width.")
        own = (
            many,
            many if kv_heads is None else whole_number(kv_heads, "kv_heads"),
            -(-wide * 8 // 24) * 8 if ffn is None else whole_number(ffn, "ffn"),
        )
        values = {
            "vocabulary": num_classes, "width": wide, "head_dim": wide // many if head_dim is None else whole_number(head_dim, "head_dim"),
            "layers": [own] * whole_number(layers, "layers"), "tied": truth(tied, "tied"), "rope_theta": rope_theta, "norm_eps": norm_eps,
            "max_length": max_length,
        }  # fmt: skip
        built = _shape(values, "")
    if built.max_length is not None and len(input_shape) > 1 and input_shape[-1] > built.max_length:
        raise InputError(f"rows of {input_shape[-1]} tokens, and max_length is {built.max_length}.", where="max_length", fix="Use shorter rows.")
    return Decoder(built)


def _shape(values: Mapping[str, Any], where: str) -> DecoderShape:
    try:
        return DecoderShape.model_validate(values)
    except ValidationError as error:
        found = input_error(error, DecoderShape)
        raise found.at(where) if where else found from error


def llama_shape(model: nn.Module) -> DecoderShape:
    """The shape of a transformers `LlamaForCausalLM`.

    Raises:
        InputError: it is of another architecture, has biases, another activation or scaled rotary positions.
    """
    config: Any = getattr(model, "config", None)
    if getattr(config, "model_type", None) != "llama" or not hasattr(model, "lm_head"):
        raise InputError(
            f"{type(model).__name__} is no LlamaForCausalLM.", where="teacher.model", fix="Pruning takes limbeck's decoder and models of the Llama family."
        )
    rope = dict(getattr(config, "rope_parameters", None) or {})
    odd = {
        "attention_bias": bool(config.attention_bias), "mlp_bias": bool(config.mlp_bias), f"hidden_act {config.hidden_act}": config.hidden_act != "silu",
        f"rope {rope.get('rope_type')}": rope.get("rope_type", "default") != "default",
    }  # fmt: skip
    if any(odd.values()):
        what = ", ".join(name for name, is_odd in odd.items() if is_odd)
        raise InputError(f"this Llama has {what}, which the decoder has not.", where="teacher.model", fix="Use another model of the family.")
    d, H = config.hidden_size, config.num_attention_heads
    return DecoderShape(
        vocabulary=config.vocab_size, width=d, head_dim=getattr(config, "head_dim", None) or d // H, tied=bool(config.tie_word_embeddings),
        layers=(LayerShape(H, config.num_key_value_heads, config.intermediate_size),) * config.num_hidden_layers,
        rope_theta=float(rope.get("rope_theta", getattr(config, "rope_theta", None) or 10_000.0)), norm_eps=config.rms_norm_eps,
        max_length=config.max_position_embeddings,
    )  # fmt: skip


def from_llama(model: nn.Module) -> Decoder:
    """A `Decoder` with the logits of a transformers `LlamaForCausalLM`, whose weights are copied (same dtype and device). Raises as `llama_shape`."""
    shape = llama_shape(model)
    given = {name: value.detach() for name, value in model.state_dict().items()}
    state = {"embedding.weight": given["model.embed_tokens.weight"], "norm.weight": given["model.norm.weight"]}
    if not shape.tied:
        state["output.weight"] = given["lm_head.weight"]
    for i in range(len(shape.layers)):
        theirs, ours = f"model.layers.{i}.", f"layers.{i}."
        qkv = [given[f"{theirs}self_attn.{name}_proj.weight"] for name in "qkv"]
        state[f"{ours}attention.norm.weight"] = given[f"{theirs}input_layernorm.weight"]
        state[f"{ours}attention.qkv.weight"] = torch.cat(qkv)
        state[f"{ours}attention.out.weight"] = given[f"{theirs}self_attn.o_proj.weight"]
        state[f"{ours}ffn.norm.weight"] = given[f"{theirs}post_attention_layernorm.weight"]
        state[f"{ours}ffn.gate_up.weight"] = torch.cat([given[f"{theirs}mlp.{name}_proj.weight"] for name in ("gate", "up")])
        state[f"{ours}ffn.down.weight"] = given[f"{theirs}mlp.down_proj.weight"]
    return with_weights(shape, state)


def blank(shape: DecoderShape, dtype: torch.dtype, device: torch.device) -> Decoder:
    """A decoder whose weights are still to be loaded: 0, no random number is spent on them."""
    with torch.device("meta"):
        built = Decoder(shape)
    built = built.to(dtype).to_empty(device=device)
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.zero_()
    return built


def with_weights(shape: DecoderShape, state: Mapping[str, Tensor]) -> Decoder:
    """A decoder of a shape with copies of the given weights, in their dtype and on their device."""
    first = next(iter(state.values()))
    built = blank(shape, first.dtype, first.device)
    built.load_state_dict(state)
    return built
