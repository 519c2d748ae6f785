"""Structured pruning of a decoder to a smaller one: sort its units by importance once, then cut to any size (sheet `capacity_gap` eqs. 5 and 6).

Units are groups of heads (a key-value head with its queries), neurons and channels of the residual stream. A shape says how many of each stay; since units
are sorted, the first ones. `global_shape` ranks heads, and neurons, over all layers together; `uniform_shape` keeps the same numbers in every layer and takes
whole layers from the bottom and the top (arXiv 2311.07052, where this is called heuristic).

What is cut is no function-preserving change: once channels go, norms measure what is left.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from limbeck.errors import InputError
from limbeck.language.decoder import Decoder, DecoderShape, LayerShape, with_weights
from limbeck.language.importance import Importance
from limbeck.language.models import keep_layers

MOST_HEADS = 0.9
"""Above this share of removed heads, neurons go in their place; the released code's."""


def component_sparsity(sparsity: float) -> float:
    """(5): p' = 1 − √(1 − p). A matrix that loses p' of its rows and p' of its columns loses p of its entries. p in [0, 1].

    Raises:
        InputError: p is outside [0, 1].
    """
    if not 0 <= sparsity <= 1:
        raise InputError(f"a sparsity of {sparsity:g} is not between 0 and 1.", where="sparsity")
    return 1 - math.sqrt(1 - sparsity)


def whole_percent(share: float) -> float:
    """A share rounded to whole per cent, as the released code rounds p' (60 % of the weights → 37 % of the units)."""
    return round(100 * share) / 100


def global_shape(shape: DecoderShape, scores: Importance, removed: float, *, multiple: int = 8) -> DecoderShape:
    """(6): what is left when the lowest share `removed` (p') of the groups of heads of all layers goes, of the neurons of all layers, and of the channels.

    Above 90 % the heads stop at 90 %, and as many weights go with neurons: (queries a group + 1) · 2/3 · head_dim of them for a group that stays, which is
    4/3 · head_dim where every query has a key of its own.

    Args:
        scores: of a decoder of `shape`; normalised here (4). multiple: a layer's neurons and the width are rounded to the nearest multiple of it, where any of
            them are cut; the width is at least that. Heads are not rounded.

    Raises:
        InputError: `removed` is outside [0, 1), or `multiple` below 1.
    """
    _check(removed, multiple)
    scores = scores.normalised()
    groups, neurons = sum(layer.kv_heads for layer in shape.layers), sum(layer.ffn for layer in shape.layers)
    fewer = max(removed - MOST_HEADS, 0.0)
    queries = sum(layer.query_heads for layer in shape.layers)
    instead = fewer * (queries + groups) * shape.head_dim * 2 / 3
    kept_heads = _kept(scores.heads, round(min(removed, MOST_HEADS) * groups))
    kept_neurons = _kept(scores.neurons, min(round(removed * neurons + instead), neurons))
    layers = tuple(
        LayerShape(heads * (own.query_heads // own.kv_heads) if own.kv_heads else 0, heads, _rounded(ffn, own.ffn, multiple))
        for own, heads, ffn in zip(shape.layers, kept_heads, kept_neurons, strict=True)
    )
    return shape.model_copy(update={"layers": layers, "width": _width(shape.width, removed, multiple)})


def uniform_shape(shape: DecoderShape, removed: float, *, layers: int | None = None, multiple: int = 8) -> tuple[DecoderShape, tuple[int, ...]]:
    """Every layer keeps the share 1 − `removed` of its heads (one group at least) and neurons (one `multiple`), as does the width; and which layers stay.

    layers: how many stay, the middle ones; as many go at the bottom as at the top, and of an odd number one more at the top (ours; the released code takes
    even numbers). None: all. multiple: as in `global_shape`. LLaMA2-7B → MiniMA-3B is removed = ¼ and 24 of 32 layers.

    Raises:
        InputError: `removed` is outside [0, 1), `multiple` below 1, or there are not so many layers.
    """
    _check(removed, multiple)
    stay = keep_layers("middle", of=len(shape.layers), count=layers)

    def cut(own: LayerShape) -> LayerShape:
        heads = min(max(round((1 - removed) * own.kv_heads), 1), own.kv_heads)
        ffn = max(_rounded(round((1 - removed) * own.ffn), own.ffn, multiple), min(multiple, own.ffn))
        return LayerShape(heads * (own.query_heads // own.kv_heads) if own.kv_heads else 0, heads, ffn)

    kept = tuple(cut(shape.layers[index]) for index in stay)
    return shape.model_copy(update={"layers": kept, "width": _width(shape.width, removed, multiple)}), stay


def nearest_shape(shape_at: Callable[[float], DecoderShape], parameters: int) -> DecoderShape:
    """The shape whose weights, embeddings left out, come nearest to a number, out of those that `shape_at` gives for a share p' of removed units in [0, 1).

    Shapes must not grow with p'; the smallest and largest possible ones are given where none comes near.
    """
    low, high = 0.0, 1 - 1e-6
    for _ in range(40):
        middle = (low + high) / 2
        if shape_at(middle).layer_parameters >= parameters:
            low = middle
        else:
            high = middle
    return min((shape_at(low), shape_at(high)), key=lambda found: abs(found.layer_parameters - parameters))


def reordered(model: Decoder, scores: Importance) -> Decoder:
    """A copy with the same logits whose units stand in falling order of importance: groups and neurons in each layer, channels everywhere.

    Queries follow their key-value head; the head's columns follow the channels. Equal scores keep their order.
    """
    order = _falling(scores.channels)
    state = {name: value.detach() for name, value in model.state_dict().items()}
    for name in ("embedding.weight", "output.weight", "norm.weight"):
        if name in state:
            state[name] = state[name][..., order.to(state[name].device)]
    for index, layer in enumerate(model.stack):
        at = f"layers.{index}."
        if layer.attention is not None:
            heads = _falling(scores.heads[index])
            _take_attention(state, at, model.shape.layers[index], model.shape.head_dim, heads, order)
        if layer.ffn is not None:
            _take_neurons(state, at, layer.ffn.neurons, _falling(scores.neurons[index]), order)
    return with_weights(model.shape, state)


def cut(model: Decoder, shape: DecoderShape, layers: Sequence[int] | None = None) -> Decoder:
    """The first units of a decoder that is in order: a smaller one of the given shape, its weights copied.

    Args:
        shape: with no more units than the model has, in any place. layers: which of the model's layers are the shape's; None: all.

    Raises:
        InputError: the shape is larger, or differs in what cannot be cut (vocabulary, head_dim, queries a group).
    """
    stay = tuple(range(len(model.shape.layers))) if layers is None else tuple(layers)
    _check_smaller(model.shape, shape, stay)
    given = {name: value.detach() for name, value in model.state_dict().items()}
    channels = torch.arange(shape.width)
    state: dict[str, Tensor] = {name: given[name][..., : shape.width] for name in ("embedding.weight", "output.weight", "norm.weight") if name in given}
    for index, source in enumerate(stay):
        own, before, place = shape.layers[index], model.shape.layers[source], f"layers.{source}."
        part = {name.removeprefix(place): value for name, value in given.items() if name.startswith(place)}
        if own.kv_heads:
            _take_attention(part, "", before, shape.head_dim, torch.arange(own.kv_heads), channels)
            state |= {f"layers.{index}.{name}": value for name, value in part.items() if name.startswith("attention.")}
        if own.ffn:
            _take_neurons(part, "", before.ffn, torch.arange(own.ffn), channels)
            state |= {f"layers.{index}.{name}": value for name, value in part.items() if name.startswith("ffn.")}
    return with_weights(shape, state)


# ---- which units ------------------------------------------------------------------------------------------------------


def _check(removed: float, multiple: int) -> None:
    if not 0 <= removed < 1:
        raise InputError(f"a share of {removed:g} units cannot be removed.", where="sparsity", fix="Take a number from 0 to below 1.")
    if multiple < 1:
        raise InputError(f"sizes cannot be rounded to multiples of {multiple}.", where="multiple", fix="Take 1 or more.")


def _kept(scores: Sequence[Tensor], count: int) -> list[int]:
    """How many units each layer keeps when the `count` lowest of all layers go."""
    sizes = [len(own) for own in scores]
    layer = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    gone = torch.bincount(layer[torch.cat(tuple(scores)).argsort(stable=True)[:count]], minlength=len(sizes)).tolist()
    return [size - int(lost) for size, lost in zip(sizes, gone, strict=True)]


def _rounded(count: int, of: int, multiple: int) -> int:
    """The multiple nearest to a count (halves up), at most `of`; a layer that loses nothing stays as it is."""
    return of if count >= of else min(int(count / multiple + 0.5) * multiple, of)


def _width(width: int, removed: float, multiple: int) -> int:
    return max(_rounded(width - round(removed * width), width, multiple), min(multiple, width))


def _falling(scores: Tensor) -> Tensor:
    return scores.argsort(descending=True, stable=True)


# ---- the weights ------------------------------------------------------------------------------------------------------


def _take_attention(state: dict[str, Tensor], at: str, own: LayerShape, head_dim: int, groups: Tensor, channels: Tensor) -> None:
    """Keep these groups and channels of one layer's attention, in this order; `state` is changed, its tensors are not."""
    qkv, out, norm = (f"{at}attention.{name}.weight" for name in ("qkv", "out", "norm"))
    device, each = state[qkv].device, own.query_heads // own.kv_heads
    queries = (groups[:, None] * each + torch.arange(each)).flatten()
    heads = torch.cat((queries, own.query_heads + groups, own.query_heads + own.kv_heads + groups))
    columns = channels.to(device)
    state[qkv] = state[qkv][_within(heads, head_dim).to(device)][:, columns]
    state[out] = state[out][columns][:, _within(queries, head_dim).to(device)]
    state[norm] = state[norm][columns]


def _take_neurons(state: dict[str, Tensor], at: str, total: int, neurons: Tensor, channels: Tensor) -> None:
    """The same of one layer's feed-forward."""
    gate_up, down, norm = (f"{at}ffn.{name}.weight" for name in ("gate_up", "down", "norm"))
    rows, columns = neurons.to(state[down].device), channels.to(state[down].device)
    state[gate_up] = state[gate_up][torch.cat((rows, total + rows))][:, columns]
    state[down] = state[down][columns][:, rows]
    state[norm] = state[norm][columns]


def _within(heads: Tensor, head_dim: int) -> Tensor:
    """Rows of these heads, head_dim each."""
    return (heads[:, None] * head_dim + torch.arange(head_dim)).flatten()


def _check_smaller(large: DecoderShape, small: DecoderShape, stay: Sequence[int]) -> None:
    same = ("vocabulary", "head_dim", "tied", "rope_theta", "norm_eps")
    what = next((name for name in same if getattr(large, name) != getattr(small, name)), None)
    if what is None and small.width > large.width:
        what = "width"
    if what is None and (len(stay) != len(small.layers) or any(not 0 <= index < len(large.layers) for index in stay)):
        what = "layers"
    for index, source in enumerate(stay if what is None else ()):
        own, before = small.layers[index], large.layers[source]
        if own.kv_heads > before.kv_heads or own.ffn > before.ffn or own.query_heads * max(before.kv_heads, 1) != before.query_heads * own.kv_heads:
            what = f"layers.{index}"
    if what is not None:
        raise InputError("this shape is no part of the model's.", where=f"shape.{what}", fix="Take one from global_shape or uniform_shape.")
