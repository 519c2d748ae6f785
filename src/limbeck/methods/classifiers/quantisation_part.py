"""What weight quantisation needs to know about a network: which of its tensors are quantised, and a player that holds points."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.conv import _ConvNd

from limbeck import seeds
from limbeck.contract import IGNORE, Data
from limbeck.errors import InputError
from limbeck.losses import cross_entropy
from limbeck.losses.quantisation import Scaled, buckets, scale

BATCHES, BATCH = 5, 64
"""Minibatches behind `mean_gradient_norms` (code: 5) and their size (ours)."""
Which = Literal["all", "weights"]
"""Every floating-point parameter tensor (the code's choice), or only the weights of convolutions and linear layers."""


class Points(nn.Module):
    """Quantisation points of all tensors end to end, [S]: the player of differentiable quantisation."""

    def __init__(self, values_S: Tensor) -> None:
        super().__init__()
        self.values_S = nn.Parameter(values_S)


def chosen_parameters(module: nn.Module, which: Which, *, keep_first_last: bool) -> tuple[str, ...]:
    """Names of the parameters to quantise, in the module's order.

    Args:
        keep_first_last: leave the first and the last convolution or linear layer, weight and bias, in full precision. First and last are
            by registration. (The official code leaves out the first and the last parameter tensor, the last being a bias.)

    Raises:
        InputError: nothing is left to quantise.
    """
    layers = [name for name, m in module.named_modules() if isinstance(m, nn.Linear | _ConvNd)]
    kept = {layers[0], layers[-1]} if keep_first_last and layers else set()
    names = tuple(
        name
        for name, p in module.named_parameters()
        if p.is_floating_point() and p.numel() and (layer := name.rpartition(".")[0]) not in kept
        and (which == "all" or (layer in layers and name.endswith("weight")))
    )  # fmt: skip
    if not names:
        raise InputError("the student has no tensor that these knobs would quantise.", where="quantise", fix="Use quantise: all, keep_first_last: false.")
    return names


@dataclass(frozen=True)
class Chosen:
    """The tensors of a network that are quantised, and how: names and shapes in order, entries a bucket, and the bound they are clamped to."""

    names: tuple[str, ...]
    shapes: tuple[torch.Size, ...]
    bucket: int | None
    bound: float | None

    @property
    def sizes(self) -> tuple[int, ...]:
        """Entries of each tensor."""
        return tuple(shape.numel() for shape in self.shapes)

    def flat(self, module: nn.Module) -> Tensor:
        """The tensors of `module` end to end, row-major, [N]; differentiable, with gradient 0 beyond the bound (eq. 6, "truncated")."""
        parameters = dict(module.named_parameters())
        flat_N = torch.cat([parameters[name].reshape(-1) for name in self.names])
        return flat_N if self.bound is None else flat_N.clamp(-self.bound, self.bound)

    def scaled(self, flat_N: Tensor) -> Scaled:
        """Each entry's place in its bucket."""
        return scale(flat_N, buckets(self.sizes, self.bucket, flat_N.device))

    def tensors(self, flat_N: Tensor) -> dict[str, Tensor]:
        """The inverse of `flat`: by name, in shape."""
        return {name: part.view(shape) for name, shape, part in zip(self.names, self.shapes, flat_N.split(self.sizes), strict=True)}


def choose(module: nn.Module, which: Which, *, keep_first_last: bool, bucket: int | None, bound: float | None) -> Chosen:
    """The `chosen_parameters` of a network, with what is done to them."""
    names = chosen_parameters(module, which, keep_first_last=keep_first_last)
    parameters = dict(module.named_parameters())
    return Chosen(names, tuple(parameters[name].shape for name in names), bucket, bound)


def mean_gradient_norms(module: nn.Module, names: tuple[str, ...], train: Data | None, seed: int) -> list[float]:
    """‖mean gradient of the plain cross-entropy over five labelled minibatches‖₂ of each named tensor. Source: 1802.05668 eq. 9.

    The batches are drawn by `seed`, without augmentation; batch norm is as the module has it (in eval mode nothing of it changes).

    Raises:
        InputError: there are no labelled training data.
    """
    if train is None or train.targets is None or not (train.targets != IGNORE).any():
        raise InputError("automatic allocation needs labelled training data.", where="allocation", fix="Give labels, or set allocation: equal.")
    ids = (train.targets != IGNORE).nonzero().squeeze(1)
    ids = ids[torch.randperm(len(ids), generator=seeds.generator(seed, "allocation"))][: BATCHES * BATCH]
    parameters = {name: p.detach().requires_grad_() for name, p in module.named_parameters() if name in names}
    sums = [torch.zeros_like(p) for p in parameters.values()]
    for ids_B in ids.split(BATCH):
        raw, targets = train.fetch(ids_B)
        assert targets is not None
        device = sums[0].device
        loss = cross_entropy(functional_call(module, parameters, (train.prepare(raw).to(device),)), targets.to(device))
        for total, gradient in zip(sums, torch.autograd.grad(loss, list(parameters.values()), allow_unused=True, materialize_grads=True), strict=True):
            total += gradient
    return [float(total.norm()) for total in sums]
