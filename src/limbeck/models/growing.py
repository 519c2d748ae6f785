"""A linear classification head that can grow: find it in any network, add rows to it, read what goes into it."""

from __future__ import annotations

import copy
from typing import cast

import torch
from torch import Tensor, nn

from limbeck.errors import InputError

HEAD_NAMES = ("head", "linear", "fc", "classifier")
"""Where a head is looked for first, in this order; a container of that name gives its last `nn.Linear`."""
UNSEEN = -1e4
"""Logit of a class that has not come yet: so low that it is never chosen, and finite, so that likelihoods are."""


def find_head(model: nn.Module, path: str = "") -> str:
    """Dotted path of a network's linear head: `path` itself, or the first of `HEAD_NAMES`, or else the last `nn.Linear` in registration order.

    Raises:
        InputError: there is no `nn.Linear` to be found; names what was looked for.
    """
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    kind = type(model).__name__
    if path:
        if path not in linears:
            known = ", ".join(f"'{name}'" for name in linears[-12:] if name) or "none"
            raise InputError(f"'{path}' is not an nn.Linear of {kind}.", where="head", fix=f"Its linear layers: {known}.")
        return path
    for name in HEAD_NAMES:
        inside = [found for found in linears if found == name or found.startswith(f"{name}.")]
        if inside:
            return inside[-1]
    if not linears or not linears[-1]:
        looked_for = ", ".join(f"'{name}'" for name in HEAD_NAMES)
        raise InputError(
            f"{kind} has no linear head: looked for an nn.Linear at {looked_for}, then for any other inside it.",
            where="student",
            fix="Use a network that ends in an nn.Linear (a bare one: wrap it in nn.Sequential).",
        )
    return linears[-1]


def _blank(like: nn.Linear, classes: int, bias: bool) -> nn.Linear:
    """A head of `classes` rows with the width, dtype and device of another; not initialised, and no global random number is spent on it."""
    return nn.utils.skip_init(nn.Linear, like.in_features, classes, bias=bias, dtype=like.weight.dtype, device=like.weight.device)


def fresh_head(old: nn.Linear, classes: int, *, bias: bool, generator: torch.Generator) -> nn.Linear:
    """A new head of `classes` rows on the features of `old`: same width d, dtype and device, PyTorch's default initialisation.

    Args:
        old: the head it replaces. classes: rows. bias: whether it has one.
        generator: on the CPU; draws the weights [classes, d], then the biases [classes], from U(−1/√d, 1/√d).
    """
    head, bound = _blank(old, classes, bias), old.in_features**-0.5
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.copy_(torch.empty(parameter.shape).uniform_(-bound, bound, generator=generator))
    return head


def grown_head(old: nn.Linear, classes: int, *, generator: torch.Generator) -> nn.Linear:
    """The old head with `classes` more rows: old rows and biases are copied bit for bit, new ones drawn as in `fresh_head`."""
    biased = old.bias is not None
    added = fresh_head(old, classes, bias=biased, generator=generator)
    head = _blank(old, old.out_features + classes, biased)
    with torch.no_grad():
        for parameter, before, after in zip(head.parameters(), old.parameters(), added.parameters(), strict=True):
            parameter.copy_(torch.cat((before, after)))
    return head


def in_class_order(model: nn.Module, path: str, positions_C: Tensor, *, bias: bool) -> nn.Module:
    """A copy of a model whose classes were learnt in another order than they are numbered, with its outputs in the order of their numbers.

    Args:
        path: of its head, which has K rows. positions_C: [C] int64, the row of each class; UNSEEN is the logit where that is K or more.
        bias: whether the head gets a bias even where it could do without (0 then), as the network had at first.
    """
    copied, head = copy.deepcopy(model), cast(nn.Linear, model.get_submodule(path))
    seen_C = positions_C < head.out_features
    ordered = _blank(head, len(positions_C), bias or head.bias is not None or not bool(seen_C.all()))
    with torch.no_grad():
        ordered.weight.zero_()
        ordered.weight[seen_C] = head.weight[positions_C[seen_C]]
        if ordered.bias is not None:
            ordered.bias.fill_(UNSEEN)
            ordered.bias[seen_C] = 0.0 if head.bias is None else head.bias[positions_C[seen_C]]
    copied.set_submodule(path, ordered)
    return copied


def head_inputs(model: nn.Module, path: str, inputs: Tensor) -> Tensor:
    """The features φ(x) that go into the head at `path`, [B, d], by one forward pass of the model on `inputs` [B, ...]."""
    seen: list[Tensor] = []
    hook = model.get_submodule(path).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    try:
        model(inputs)
    finally:
        hook.remove()
    return seen[-1]
