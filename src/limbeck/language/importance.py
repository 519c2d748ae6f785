"""How much each head, neuron and channel of a decoder matters for the next token (sheet `capacity_gap` eqs. 3 and 4; arXiv 2311.07052).

First order: with a factor 1 on a unit, the loss's derivative by that factor is the sum of gradient times value over all that the unit gives, which is what a
Taylor expansion says would be lost without it. K groups of heads (a key-value head with its queries), F neurons a layer, d channels of the residual stream.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from limbeck.errors import InputError
from limbeck.language.decoder import Decoder, DecoderShape, Masks
from limbeck.language.divergences import CrossEntropy
from limbeck.language.linear_divergence import linear_divergence
from limbeck.language.tokens import TokenBatch
from limbeck.modes import evaluating

TINY = 1e-17
"""What (4) adds to a norm; the released code's."""


@dataclass(frozen=True)
class Importance:
    """Scores ≥ 0 of units, float64 on the CPU: the higher, the more the loss depends on it. heads: a layer's [K]. neurons: a layer's [F]. channels: [d]."""

    heads: tuple[Tensor, ...]
    neurons: tuple[Tensor, ...]
    channels: Tensor

    def normalised(self) -> Importance:
        """(4): every layer's heads, and its neurons, divided by their L2 norm; the channels by theirs. Layers can then be ranked together."""

        def unit(scores: Tensor) -> Tensor:
            return scores / (scores.norm() + TINY)

        return Importance(tuple(map(unit, self.heads)), tuple(map(unit, self.neurons)), unit(self.channels))


def mask_gradients(model: Decoder, tokens: TokenBatch) -> Masks:
    """∂𝓛/∂ξ, ∂𝓛/∂ν and ∂𝓛/∂μ at masks of 1, 𝓛 being the mean cross-entropy over the batch's targets (weighted, where the batch has weights)."""
    masks = ones(model)
    rows = tokens.rows()
    with evaluating(model), torch.enable_grad():
        loss = linear_divergence(rows.gather(model.hidden(tokens, masks)), model.head().detach(), None, CrossEntropy(), rows).loss
        found = torch.autograd.grad(loss, (*masks.heads, *masks.neurons, masks.channels), allow_unused=True)
    whole = [torch.zeros_like(mask) if g is None else g for mask, g in zip((*masks.heads, *masks.neurons, masks.channels), found, strict=True)]
    layers = len(masks.heads)
    return Masks(tuple(whole[:layers]), tuple(whole[layers:-1]), whole[-1])


def ones(model: Decoder) -> Masks:
    """Masks of a decoder's shape, all 1, that ask for gradients."""
    like, layers = model.embedding.weight, model.shape.layers

    def of(count: int) -> Tensor:
        return torch.ones(count, device=like.device, dtype=like.dtype, requires_grad=True)

    return Masks(tuple(of(layer.kv_heads) for layer in layers), tuple(of(layer.ffn) for layer in layers), of(model.shape.width))


def importance(model: Decoder, batches: Iterable[TokenBatch]) -> Importance:
    """(3): the mean over batches of the absolute gradients of their masks (absolute first, then the mean). Not normalised.

    Raises:
        InputError: there is no batch.
    """
    heads, neurons, channels = ([torch.zeros(len(mask), dtype=torch.float64) for mask in masks] for masks in _listed(ones(model)))
    count = 0
    for tokens in batches:
        for sums, found in zip((heads, neurons, channels), _listed(mask_gradients(model, tokens)), strict=True):
            for total, gradient in zip(sums, found, strict=True):
                total += gradient.abs().cpu().double()
        count += 1
    if count == 0:
        raise InputError("importance needs at least one batch of text.", where="method.calibration_batches", fix="Set it to 1 or more.")
    return Importance(tuple(total / count for total in heads), tuple(total / count for total in neurons), channels[0] / count)


def random_importance(shape: DecoderShape, generator: torch.Generator) -> Importance:
    """Uniform scores in [0, 1): cutting by them is random pruning, the baseline. generator: on the CPU."""

    def drawn(count: int) -> Tensor:
        return torch.rand(count, generator=generator, dtype=torch.float64)

    heads = tuple(drawn(layer.kv_heads) for layer in shape.layers)
    return Importance(heads, tuple(drawn(layer.ffn) for layer in shape.layers), drawn(shape.width))


def _listed(masks: Masks) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...], tuple[Tensor, ...]]:
    return masks.heads, masks.neurons, (masks.channels,)
