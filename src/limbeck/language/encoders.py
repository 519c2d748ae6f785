"""Text encoders as classifiers: a transformer that reads both ways, pooling, and a linear head, with every hidden state open to distillation.

B texts of L tokens, d width, C classes, K layers, H heads. Inputs are int64 [B, 2, L] = (ids, attention mask); a text's first token is never padding.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from limbeck.errors import InputError
from limbeck.language.huggingface import config_fields
from limbeck.language.lora import LoraSpec, add_lora, merged

Pooling = Literal["mean", "cls"]
POOLINGS = ("mean", "cls")


@dataclass(frozen=True)
class Encoded:
    """What an encoder makes of a batch.

    hidden: K + 1 tensors [B, L, d], the embeddings first. attention: K tensors [B, H, L, L], rows sum to 1; None where not asked for.
    mask_BL: bool, True at tokens. logits_BC.
    """

    hidden: tuple[Tensor, ...]
    attention: tuple[Tensor, ...] | None
    mask_BL: Tensor
    logits_BC: Tensor


class EncoderClassifier(nn.Module):
    """An encoder of transformers, pooling and a linear head: inputs [B, 2, L] int64 → logits [B, C].

    Attributes: body (of transformers, without a pooler), head, pooling, width (d), layers (K), lora, builder and arguments (how to build it again).

    Args:
        pooling: mean of the last hidden states over tokens, or that of the first token.
        head_only: the body gives answers only: no gradient, no dropout. lora: adapters in the body, everything but the head frozen (`lora.head` is not asked).

    Raises:
        InputError: the pooling is unknown, or both `head_only` and `lora` are asked for.
    """

    builder = "encoder"

    def __init__(self, body: nn.Module, num_classes: int, *, pooling: Pooling = "mean", head_only: bool = False, lora: LoraSpec | None = None) -> None:
        super().__init__()
        if pooling not in POOLINGS:
            raise InputError(f"unknown pooling '{pooling}'.", where="pooling", fix="Use mean or cls.")
        if head_only and lora is not None:
            raise InputError("a body that is not trained takes no adapters.", where="lora", fix="Leave out 'lora' or 'head_only'.")
        given: Any = body
        if getattr(given, "pooler", None) is not None:
            given.pooler = None
        self.body, self.pooling, self.head_only, self.lora = body, pooling, head_only, lora
        self.config = given.config
        self.width, self.layers = int(self.config.hidden_size), int(self.config.num_hidden_layers)
        self.head = nn.Linear(self.width, num_classes)
        if lora is not None:
            add_lora(body, lora, self.head)
            self.head.requires_grad_(True)
        if head_only:
            body.requires_grad_(False)
            body.eval()

    @property
    def arguments(self) -> Mapping[str, Any]:
        """What the builder needs to build the same architecture: JSON values."""
        own = {"model": config_fields(self.config), "pooling": self.pooling, "head_only": self.head_only}
        return own if self.lora is None else own | {"lora": self.lora.model_dump(mode="json")}

    def train(self, mode: bool = True) -> Self:
        """A body that only gives answers stays in eval mode."""
        super().train(mode)
        if self.head_only:
            self.body.eval()
        return self

    def forward(self, inputs: Tensor) -> Tensor:
        """Inputs [B, 2, L] int64 → logits [B, C]."""
        ids, mask = split(inputs)
        return self.head(self.pooled(self._run(ids, mask).last_hidden_state, mask))

    def encode(self, inputs: Tensor, *, attention: bool = False) -> Encoded:
        """All hidden states, and attention weights where asked for (by the slower attention that has them). inputs: [B, 2, L] int64."""
        ids, mask = split(inputs)
        before = self.config._attn_implementation
        if attention:
            self.config._attn_implementation = "eager"  # the library's other ways never form the weights
        try:
            out = self._run(ids, mask, output_hidden_states=True, output_attentions=attention)
        finally:
            self.config._attn_implementation = before
        maps = tuple(out.attentions) if attention else None
        return Encoded(tuple(out.hidden_states), maps, mask, self.head(self.pooled(out.last_hidden_state, mask)))

    def embed(self, inputs: Tensor) -> Tensor:
        """Sentence vectors [B, d] of length 1: the mean of the last hidden states over tokens, divided by its norm (Sentence-BERT, arXiv 1908.10084)."""
        ids, mask = split(inputs)
        return nn.functional.normalize(masked_mean(self._run(ids, mask).last_hidden_state, mask), dim=-1)

    def pooled(self, hidden_BLd: Tensor, mask_BL: Tensor) -> Tensor:
        """[B, d]: what the head reads."""
        return hidden_BLd[:, 0] if self.pooling == "cls" else masked_mean(hidden_BLd, mask_BL)

    def deployed(self) -> EncoderClassifier:
        """The classifier as it is saved: with adapters in its weights, where it has some that are to be merged; else itself."""
        if self.lora is None or not self.lora.merge:
            return self
        plain = merged(self)
        plain.lora = None
        return plain

    def _run(self, ids_BL: Tensor, mask_BL: Tensor, *, output_hidden_states: bool = False, output_attentions: bool = False) -> Any:
        """The body's answer as transformers gives it."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.head_only):
            return self.body(input_ids=ids_BL, attention_mask=mask_BL.long(), output_hidden_states=output_hidden_states, output_attentions=output_attentions)


def split(inputs: Tensor) -> tuple[Tensor, Tensor]:
    """ids [B, L] int64 and mask [B, L] bool of inputs [B, 2, L].

    Raises:
        InputError: another shape or type.
    """
    if inputs.dtype != torch.int64 or inputs.dim() != 3 or inputs.shape[1] != 2:
        raise InputError(
            f"an encoder takes int64 [B, 2, L] (ids, mask), these inputs are {inputs.dtype} of shape {list(inputs.shape)}.",
            where="inputs",
            fix="Use data of the source text_classification.",
        )
    ids, mask = inputs.unbind(1)
    return ids, mask.bool()


def masked_mean(hidden_BLd: Tensor, mask_BL: Tensor) -> Tensor:
    """[B, d]: the mean over tokens; zero for a text without any."""
    weight = mask_BL.to(hidden_BLd.dtype)[:, :, None]
    return (hidden_BLd * weight).sum(1) / weight.sum(1).clamp_min(1e-9)
