"""Networks that look at some columns of a feature vector, so that two models can see one data set differently (an embedding; hashed words)."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor, nn

from limbeck.errors import InputError
from limbeck.models.arguments import whole_number, whole_numbers
from limbeck.models.small import Network, mlp


class Columns(nn.Module):
    """x [B, D] -> x[:, first:stop]."""

    def __init__(self, first: int, stop: int) -> None:
        super().__init__()
        self.first, self.stop = first, stop

    def forward(self, x: Tensor) -> Tensor:
        """[B, ...], flattened to [B, D] -> [B, stop − first]."""
        return x.flatten(1)[:, self.first : self.stop]

    def extra_repr(self) -> str:
        """Which columns."""
        return f"{self.first}, {self.stop}"


def columns_mlp(hidden: Sequence[int], num_classes: int, input_shape: Sequence[int], first: int = 0, stop: int | None = None) -> Network:
    """A perceptron (ReLU) over columns first to stop − 1 of its inputs: [B, *input_shape] -> logits [B, num_classes].

    Args:
        hidden: widths of the hidden layers; [] makes a linear classifier. num_classes: width of the logits. input_shape: shape of one input; it is flattened.
        first, stop: columns, 0 ≤ first < stop; None: to the last.

    Raises:
        InputError: there are no such columns, or a width is not a positive whole number.
    """
    width = math.prod(whole_numbers(input_shape, "input_shape"))
    first = whole_number(first, "first", least=0)
    stop = width if stop is None else whole_number(stop, "stop")
    if not first < stop <= width:
        raise InputError(f"columns {first} to {stop} of {width}: there are none.", where="first", fix=f"Take 0 ≤ first < stop ≤ {width}.")
    network = mlp(hidden, num_classes, [stop - first])
    network.features.insert(0, Columns(first, stop))
    return network
