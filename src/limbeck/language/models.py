"""What a language model is to everything else: hidden states, and a head that turns them into logits (sheet `_language_distillation_engine` §9).

B rows of L tokens, T new tokens, S tokens so far, V vocabulary, d width. Losses take hidden states and head apart, so that [B, L, V] need never exist.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from limbeck.contract import IGNORE
from limbeck.errors import InputError, suggestion
from limbeck.language.signals import Head
from limbeck.language.tokens import PADDING, TokenBatch
from limbeck.models.arguments import whole_number

RULES = ("even", "first", "last", "middle")
"""How layers are chosen by name; see `keep_layers`."""


class LanguageModel(nn.Module, ABC):
    """A causal language model: position i sees positions up to i of its own segment and predicts the target at i.

    Attributes: vocabulary (V, the number of logits).
    """

    vocabulary: int

    @abstractmethod
    def hidden(self, tokens: TokenBatch) -> Tensor:
        """[B, L, d]: what the head is applied to (after the final norm), with a graph to the weights."""

    @abstractmethod
    def head(self) -> Head:
        """The head, whose tensors are the model's own parameters. A tied weight gets both gradients; one that is frozen gets none."""

    def forward(self, inputs: Tensor) -> Tensor:
        """Token rows [B, 2|4, L] int64 (see `TokenBatch.from_inputs`) → logits [B, L, V]."""
        hidden = self.hidden(TokenBatch.from_inputs(inputs))
        return self.head().logits(hidden.flatten(0, 1)).unflatten(0, hidden.shape[:2])

    def step(self, input_ids_BT: Tensor, positions_BT: Tensor, attention_BS: Tensor, cache: Any = None) -> tuple[Tensor, Any]:
        """Hidden states of T new tokens, and what the next call needs of those so far. Here that is the prefix itself, all of it computed again.

        Args:
            input_ids_BT, positions_BT: [B, T] int64, the new tokens and their positions (from 0 at a row's first real token).
            attention_BS: [B, S] bool, all tokens so far and the new ones, S ≥ T; False: padding. Prompts are padded on the left.
            cache: what the last call returned; None: the first.

        Returns:
            [B, T, d], and the next cache.
        """
        before = cache if isinstance(cache, Prefix) else Prefix(input_ids_BT[:, :0], positions_BT[:, :0])
        so_far = Prefix(torch.cat((before.input_ids, input_ids_BT), 1), torch.cat((before.positions, positions_BT), 1))
        segments = torch.where(attention_BS, 0, PADDING)
        tokens = TokenBatch(so_far.input_ids, so_far.positions, segments, torch.full_like(so_far.input_ids, IGNORE))
        return self.hidden(tokens)[:, -input_ids_BT.shape[1] :], so_far


@dataclass(frozen=True)
class Prefix:
    """The cache of a model that has none: all tokens so far. input_ids, positions: [B, S] int64."""

    input_ids: Tensor
    positions: Tensor


class Adapted(LanguageModel):
    """A person's own module with hidden states and a head, as a language model. The module is `module`; `as_language_model` says what it must have."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self.vocabulary = len(self.head().weight_Vd)

    def hidden(self, tokens: TokenBatch) -> Tensor:
        """The module's own."""
        given: Any = self.module
        return given.hidden(tokens)

    def head(self) -> Head:
        """The module's own."""
        given: Any = self.module
        if isinstance(given.head, nn.Linear):
            return Head(given.head.weight, given.head.bias)
        found = given.head()
        if not isinstance(found, Head):
            raise InputError(f"{type(given).__name__}.head() returned {type(found).__name__}, no Head.", where="model", fix="Return Head(weight, bias).")
        return found


def as_language_model(module: nn.Module) -> LanguageModel:
    """Any module that gives hidden states and a head as a language model; one that is a language model is returned as it is.

    Taken are: a causal language model of transformers; a module with `hidden(tokens: TokenBatch)` → [B, L, d], after the final norm, and `head`, which is
    a method that returns a `Head` or an `nn.Linear`.

    Raises:
        InputError: something is missing, named; a module that only gives logits has to be compared by the dense fallback.
    """
    if isinstance(module, LanguageModel):
        return module
    given: Any = module
    if callable(getattr(given, "get_output_embeddings", None)) and hasattr(given, "config"):
        from limbeck.language.huggingface import CausalLM

        return CausalLM(module)
    missing = [name for name in ("hidden", "head") if not callable(getattr(given, name, None))]
    if missing:
        asked = {"hidden": "hidden(tokens) -> [B, L, d]", "head": "head() -> limbeck.language.signals.Head, or an nn.Linear named head"}
        raise InputError(
            f"{type(module).__name__} is no language model: it has no {' and no '.join(asked[name] for name in missing)}.",
            where="model",
            fix="Add them, or compare its logits [N, V] by limbeck.language.linear_divergence.dense_divergence, which holds them all in memory.",
        )
    return Adapted(module)


def keep_layers(rule: str | Sequence[int], *, of: int, count: int | None = None) -> tuple[int, ...]:
    """Which layers of `of` a student of `count` keeps, rising, from 0.

    Args:
        rule: "even": equal distances, the first and the last kept (12 → 6 keeps 0, 2, 4, 7, 9, 11); one layer: the first. "first", "last": of the stack.
            "middle": as many dropped below as above (MiniMA, arXiv 2311.07052). Or the layers themselves, as a list.
        count: how many; None: all of them, or as many as the list has.

    Raises:
        InputError: the rule is unknown, there are not so many layers, or the list does not rise within them.
    """
    if not isinstance(rule, str):
        chosen = _chosen(rule, of)
        if count is not None and count != len(chosen):
            raise InputError(f"'keep' lists {len(chosen)} layers, 'layers' says {count}.", where="layers", fix="Leave one of them out.")
        return chosen
    if rule not in RULES:
        raise InputError(f"unknown rule '{rule}'.", where="keep", fix=suggestion(rule, RULES))
    count = of if count is None else whole_number(count, "layers")
    if count > of:
        raise InputError(f"the model has {of} layers, not {count}.", where="layers", fix=f"Ask for {of} at most.")
    if rule == "even":
        gaps = max(count - 1, 1)
        return tuple((2 * i * (of - 1) + gaps) // (2 * gaps) for i in range(count))  # i (of − 1) / gaps, rounded to the nearest, halves up
    start = {"first": 0, "last": of - count, "middle": (of - count) // 2}[rule]
    return tuple(range(start, start + count))


def _chosen(layers: Sequence[int], of: int) -> tuple[int, ...]:
    """Layers that a person lists, checked."""
    chosen = tuple(whole_number(layer, "keep", least=0) for layer in layers) if isinstance(layers, Sequence) else ()
    if not chosen or list(chosen) != sorted(set(chosen)) or chosen[-1] >= of:
        raise InputError(
            f"'keep' must list layers of {of} in rising order.", where="keep", fix=f"Name layers from 0 to {of - 1}, or one of {', '.join(RULES)}."
        )
    return chosen
