"""Running a module over a data set, in order, and leaving it as it was."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from limbeck.contract import Data
from limbeck.data import evaluation_batches
from limbeck.errors import InputError
from limbeck.modes import evaluating


def device_of(module: nn.Module) -> torch.device:
    """Where the first parameter or buffer lives; the CPU for a module without any."""
    for tensor in (*module.parameters(), *module.buffers()):
        return tensor.device
    return torch.device("cpu")


def predict(
    module: nn.Module,
    data: Data,
    *,
    batch_size: int = 512,
    device: torch.device | None = None,
    indices: Tensor | None = None,
    forward: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """The logits of a module over a data set, in order, in eval mode, without gradient.

    Args:
        module: what is put into eval mode (and afterwards back to how it was) and, without `forward`, called.
        data: the data set. batch_size: samples a call. indices: [M] which samples, in this order; None: all.
        device: where the inputs go; None: where the module is.
        forward: called in place of the module, where its logits come from another function.

    Returns:
        [N, C] float32 on the CPU. Values that are not finite are kept: `classifier.nonfinite` counts them, and so do the metrics.

    Raises:
        InputError: there is no sample.
    """
    if len(data if indices is None else indices) == 0:
        raise InputError("there is no sample to predict on: the data set is empty.")
    call = module if forward is None else forward
    place = device_of(module) if device is None else device
    with torch.no_grad(), evaluating(module):
        parts = [call(inputs.to(place)).float().cpu() for inputs, _, _ in evaluation_batches(data, batch_size, indices)]
    return torch.cat(parts)
