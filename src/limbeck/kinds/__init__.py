"""Kinds of artefacts: how runs of each kind check their networks, measure what came out, and show it (DESIGN §2)."""

from __future__ import annotations

from limbeck.contract import Method
from limbeck.errors import InputError
from limbeck.kinds.base import Kind, Measured
from limbeck.kinds.classifier import ClassifierKind
from limbeck.kinds.dataset import DatasetKind
from limbeck.kinds.generator import GeneratorKind
from limbeck.kinds.language_model import LanguageModelKind
from limbeck.recipe import EvaluateSpec

KINDS: dict[str, type[Kind]] = {
    "classifier": ClassifierKind,
    "generator": GeneratorKind,
    "dataset": DatasetKind,
    "language_model": LanguageModelKind,
}

__all__ = ["KINDS", "Kind", "Measured", "kind_of"]


def kind_of(method: Method, evaluate: EvaluateSpec) -> Kind:
    """The kind of what a method makes, set up to measure as the recipe says.

    Raises:
        InputError: runs of that kind are not built yet.
    """
    if method.produces not in KINDS:
        raise InputError(f"'{type(method).__name__}' makes a {method.produces}, and runs of that kind are not built yet.", where="method")
    return KINDS[method.produces](method, evaluate)
