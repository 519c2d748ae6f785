"""Low-rank adapters on frozen weights, through peft (LoRA, arXiv 2106.09685): W x becomes W x + (α/r) B A x; only A [r, d_in] and B [d_out, r] are trained.

B starts at zero, so that a student starts as the network it adapts. Everything else is frozen, the head too unless asked for: losses over head and hidden
states then compute no gradient of the head. What is saved is the plain network with W + (α/r) B A in it, unless `merge` is false.
"""

from __future__ import annotations

import copy
import importlib
from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from pydantic import Field
from torch import Tensor, nn

from limbeck.contract import Frozen, validated
from limbeck.errors import InputError, MissingExtra

M = TypeVar("M", bound=nn.Module)

ADAPTER = "default"
"""The name of the one adapter, as peft calls it."""


class LoraSpec(Frozen):
    """Adapters of a student, as a model's argument `lora`: {rank: 8, alpha: 16}."""

    rank: int = Field(8, ge=1, description="r, columns of B and rows of A")
    alpha: float = Field(16.0, gt=0, description="α; the adapter's output is multiplied by α / r")
    dropout: float = Field(0.0, ge=0, lt=1, description="of the adapter's input, in training")
    targets: str | tuple[str, ...] = Field("all-linear", description="ends of the names of the linear maps, [q_proj, v_proj] say; or all of them but the head")
    head: bool = Field(False, description="train the head as well, whole; where it is tied, the token embeddings with it")
    merge: bool = Field(True, description="save the plain network with the adapters added to its weights; false: save both, and need peft to load them")


def lora_spec(given: Mapping[str, Any] | None) -> LoraSpec | None:
    """The argument `lora` of a builder, checked. Raises InputError naming the field."""
    if given is None:
        return None
    if not isinstance(given, Mapping):
        raise InputError(f"{given!r} is no mapping.", where="lora", fix="Write it as lora: {rank: 8, alpha: 16}.")
    try:
        return validated(LoraSpec, given)
    except InputError as error:
        raise error.at("lora") from error


def add_lora(network: nn.Module, spec: LoraSpec, head: nn.Module) -> None:
    """Put adapters into a network of transformers, in place, and freeze everything else; `head`, a part of it or beside it, is trained where the spec says so.

    A's first values come from torch's global generator, as all weights of a model that is being built do.

    Raises:
        InputError: the network has no such targets, or one of them is the head. MissingExtra: peft is not installed.
    """
    peft = _peft()
    config = peft.LoraConfig(
        r=spec.rank,
        lora_alpha=spec.alpha,
        lora_dropout=spec.dropout,
        target_modules=spec.targets if isinstance(spec.targets, str) else list(spec.targets),
        fan_in_fan_out=any(type(part).__name__ == "Conv1D" for part in network.modules()),  # GPT-2 keeps its weights the other way round
    )
    try:
        peft.inject_adapter_in_model(config, network, adapter_name=ADAPTER)
    except Exception as error:  # peft raises ValueError, TypeError and its own
        reason = " ".join(str(error).split())[:300]
        raise InputError(f"peft cannot put adapters into this network: {reason}", where="lora.targets", fix="Name linear maps, or all-linear.") from error
    if any(_is_adapter(part) and part.base_layer is head for part in network.modules()):
        raise InputError("the head takes no adapter.", where="lora.targets", fix="Leave it out of the targets; 'head: true' trains it whole.")
    for part in (network, head):
        for name, parameter in part.named_parameters():
            parameter.requires_grad_("lora_" in name)
    head.requires_grad_(spec.head)
    network.register_load_state_dict_pre_hook(_take_merged)


def merged(module: M) -> M:
    """A copy of a module with the adapters within added to the weights they adapt, and gone; the module itself where it has none.

    All its weights can be trained again. It gives the same outputs but for rounding.
    """
    if not has_adapters(module):
        return module
    plain = copy.deepcopy(module)
    for name, part in list(plain.named_modules()):
        if _is_adapter(part):
            layer: Any = part
            layer.merge()
            plain.set_submodule(name, layer.get_base_layer())
    for part in plain.modules():
        part._load_state_dict_pre_hooks = type(part._load_state_dict_pre_hooks)(
            (key, hook) for key, hook in part._load_state_dict_pre_hooks.items() if getattr(hook, "hook", None) is not _take_merged
        )
    return plain.requires_grad_(True)


def has_adapters(module: nn.Module) -> bool:
    """Whether any part of a module is a linear map with an adapter."""
    return any(_is_adapter(part) for part in module.modules())


def _is_adapter(part: nn.Module) -> bool:
    """peft's layers are known by what they hold, so that peft is not imported where there are none."""
    return hasattr(part, "lora_A") and hasattr(part, "base_layer")


def _take_merged(network: nn.Module, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """Let a network with adapters load the weights of a merged one: they become the frozen weights, and the adapters start at zero again."""
    for name, part in network.named_modules():
        if not _is_adapter(part):
            continue
        place = f"{prefix}{name}."
        if f"{place}base_layer.weight" in state or f"{place}weight" not in state:
            continue
        for own in ("weight", "bias"):
            if f"{place}{own}" in state:
                state[f"{place}base_layer.{own}"] = state.pop(f"{place}{own}")
        for own, tensor in part.state_dict().items():
            if own.startswith("lora_"):
                state[f"{place}{own}"] = torch.zeros_like(tensor) if own.startswith("lora_B") else tensor.detach().clone()


def _peft() -> Any:
    try:
        return importlib.import_module("peft")
    except ModuleNotFoundError as error:
        raise MissingExtra(error.name or "peft", "language", why="a student with adapters") from error
