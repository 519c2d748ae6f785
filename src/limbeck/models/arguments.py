"""Checks of the arguments that recipes hand to model builders: numbers, switches and input shapes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from limbeck.errors import InputError

LARGEST = 65_536
"""The largest width, class count or image side that a builder takes: beyond it the weights alone are a slip of the pen."""


def whole_number(value: Any, name: str, least: int = 1) -> int:
    """`value` if it is an integer in [least, LARGEST].

    Raises:
        InputError: it is not; `where` is the argument's name.
    """
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= LARGEST:
        raise InputError(f"{value!r} is not a whole number from {least} to {LARGEST}.", where=name)
    return value


def truth(value: Any, name: str) -> bool:
    """`value` if it is true or false: a text such as "false" would count as true.

    Raises:
        InputError: it is neither; `where` is the argument's name.
    """
    if not isinstance(value, bool):
        raise InputError(f"{value!r} is neither true nor false.", where=name)
    return value


def whole_numbers(values: Any, name: str) -> list[int]:
    """`values` as a list of positive integers.

    Raises:
        InputError: it is not a list of them; `where` is the argument's name.
    """
    if isinstance(values, str) or not isinstance(values, Sequence):
        raise InputError(f"{values!r} is not a list of whole numbers.", where=name, fix=f"Write it as {name}: [64, 64].")
    return [whole_number(value, name) for value in values]


def image_shape(input_shape: Any) -> tuple[int, int, int]:
    """An input shape as (channels, height, width).

    Raises:
        InputError: it does not have three positive whole sides.
    """
    sides = whole_numbers(input_shape, "input_shape")
    if len(sides) != 3:
        raise InputError(
            f"the inputs have shape {tuple(sides)}, but this network takes images (channels, height, width).",
            where="input_shape",
            fix="Use 'mlp', which flattens its inputs, or give images.",
        )
    channels, height, width = sides
    return channels, height, width
