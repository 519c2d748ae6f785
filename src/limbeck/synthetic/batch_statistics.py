"""Batch-norm statistics as a prior on images: what a network saw in training, its running means and variances tell (arXiv 2408.06927, eqs. 2 and 3 of our
sheet `infer`; SRe2L, arXiv 2306.13092; first DeepInversion, arXiv 1912.08795).

with tapped(network, groups=K) as fired:
    logits = network(images)                # K groups of B images in one pass; fired: one `Layer` for each batch norm that ran, in order
loss_K = matching_loss(fired)

Legend: K groups, B images a group, N = K B images, C channels (or features), L layers. Layers that are built and never called are never tapped.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from limbeck.errors import InputError
from limbeck.losses.divergences import full_precision


class Layer(NamedTuple):
    """One run of one batch norm: the statistics of its input, a group each, and its own running ones.

    mean_KC, variance_KC: [K, C], with gradient. running_mean_C, running_variance_C: [C], copies without gradient. path: where it is in the network.
    """

    path: str
    mean_KC: Tensor
    variance_KC: Tensor
    running_mean_C: Tensor
    running_variance_C: Tensor


def moments(x: Tensor, groups: int = 1) -> tuple[Tensor, Tensor]:
    """Mean and BIASED variance of every channel, [K, C] each, over the images of a group and all positions, in float32 or wider.

    Args:
        x: [N, C, ...], the groups one after another. groups: K.

    Raises:
        InputError: N is no multiple of K.
    """
    if groups < 1 or len(x) % groups:
        raise InputError(f"{len(x)} images are not {groups} groups of equal size.", where="groups")
    grouped_KBCP = full_precision(x).reshape(groups, len(x) // groups, x.shape[1], -1)
    mean_KC = grouped_KBCP.mean((1, 3))
    return mean_KC, (grouped_KBCP - mean_KC[:, None, :, None]).square().mean((1, 3))


def distance(x_KC: Tensor, target_C: Tensor) -> Tensor:
    """‖x_k − target‖₂ over the channels, [K]: the norm, not its square. At 0, where the norm has a kink, its gradient is 0, not NaN (ours)."""
    square_K = (x_KC - target_C).square().sum(-1)
    away_K = square_K > 0
    return torch.where(away_K, torch.where(away_K, square_K, 1.0).sqrt(), 0.0)


def layer_distances(fired: Sequence[Layer]) -> Tensor:
    """R_l = ‖variance_l − V_l‖₂ + ‖mean_l − M_l‖₂ of every layer and group, [L, K]: equation 3.

    Raises:
        InputError: no layer ran.
    """
    if not fired:
        raise InputError("no batch norm with running statistics ran.", where="teacher", fix="Give networks with batch norm.")
    return torch.stack([distance(x.variance_KC, x.running_variance_C) + distance(x.mean_KC, x.running_mean_C) for x in fired])


def matching_loss(fired: Sequence[Layer], first: float = 10.0) -> Tensor:
    """Σ_l a_l R_l of every group, [K]: the statistics term of equation 2, without its weight r_bn.

    Args:
        fired: as `tapped` gives them. first: a_1, the multiplier of the layer that ran first; all others have 1 (the released code's).

    Raises:
        InputError: no layer ran.
    """
    distances_LK = layer_distances(fired)
    return first * distances_LK[0] + distances_LK[1:].sum(0)


@contextmanager
def tapped(network: nn.Module, groups: int = 1) -> Iterator[list[Layer]]:
    """Collect the statistics of what comes into every batch norm that runs in the block, in the order of running.

    A layer that runs twice is there twice. Statistics are taken when the layer is entered, so that in-place operations after it change nothing; the network
    itself answers as it always does, and its running statistics move only if it is in training mode. The hooks go at the block's end, whatever happens.

    Args:
        network: its batch norms with running statistics are tapped. groups: K, see `moments`.

    Raises:
        InputError: on a pass: the batch is not K groups of equal size.
    """
    fired: list[Layer] = []
    with ExitStack() as hooks:
        for path, module in network.named_modules():
            if not isinstance(module, _BatchNorm) or module.running_mean is None or module.running_var is None:
                continue

            def keep(layer: _BatchNorm, inputs: tuple[Any, ...], path: str = path) -> None:
                assert layer.running_mean is not None
                assert layer.running_var is not None
                running = (full_precision(statistic.detach()).clone() for statistic in (layer.running_mean, layer.running_var))
                fired.append(Layer(path, *moments(inputs[0], groups), *running))

            hooks.callback(module.register_forward_pre_hook(keep).remove)
        yield fired
