"""Models with fresh weights that depend on a seed alone."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import nn

from limbeck.components import Component, build
from limbeck.errors import InputError
from limbeck.models import CATALOGUE
from limbeck.seeds import derive

M = TypeVar("M", bound=nn.Module)


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """torch's global CPU generator, seeded within and put back after."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(derive(seed, "model"))
        yield


def build_model(component: Component, *, num_classes: int, input_shape: Sequence[int], seed: int) -> nn.Module:
    """Build a model by name (`limbeck.models.CATALOGUE`) or import path, on the CPU, with weights that depend on `seed` alone.

    `num_classes` and `input_shape` (of one input, without the batch) go to builders that take them, unless the component sets them itself.
    torch's global CPU generator is seeded while building and put back; nothing is run through the model.

    Raises:
        InputError: the name, import path or an argument is wrong, or the result is not an nn.Module.
    """
    with _seeded(seed):
        model = build(component, CATALOGUE, "model", num_classes=num_classes, input_shape=tuple(input_shape))
    if not isinstance(model, nn.Module):
        raise InputError(
            f"'{component}' returned {type(model).__name__}, not a torch.nn.Module.", where="target", fix="Name a function that builds a model, or its class."
        )
    return model


def reinitialise(module: M, seed: int) -> M:
    """A copy of a module with fresh weights, drawn by each submodule's `reset_parameters` from `seed` alone; the module itself is untouched.

    Called innermost first, so that a network's own `reset_parameters` has the last word.

    Raises:
        InputError: a submodule has parameters of its own but no `reset_parameters`.
    """
    stuck = [
        f"{name or 'the module itself'} ({type(part).__name__})"
        for name, part in module.named_modules()
        if any(True for _ in part.parameters(recurse=False)) and not callable(getattr(part, "reset_parameters", None))
    ]
    if stuck:
        shown = ", ".join(stuck[:4]) + (f" and {len(stuck) - 4} more" if len(stuck) > 4 else "")
        raise InputError(
            f"{type(module).__name__} cannot start afresh: no 'reset_parameters' in {shown}.",
            where="student",
            fix="Give that class a 'reset_parameters', or name the model by a builder (package.module:function).",
        )
    fresh = copy.deepcopy(module)
    with _seeded(seed):
        for part in reversed(list(fresh.modules())):
            if callable(reset := getattr(part, "reset_parameters", None)):
                reset()
    return fresh
