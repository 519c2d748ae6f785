"""limbeck: distillation on one engine, from one kind of recipe. Public names are imported on first use."""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_PUBLIC = {
    "distill": "limbeck.run:distill",
    "Result": "limbeck.run:Result",
    "record": "limbeck.recording:record",
    "Record": "limbeck.records:Record",
    "RecordRecipe": "limbeck.recipe:RecordRecipe",
    "Recipe": "limbeck.recipe:Recipe",
    "load": "limbeck.export:load",
    "methods": "limbeck.methods",
    "losses": "limbeck.losses",
    "taps": "limbeck.models.taps",
    "Batch": "limbeck.contract:Batch",
    "Clock": "limbeck.contract:Clock",
    "Method": "limbeck.contract:Method",
    "Update": "limbeck.contract:Update",
}

__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'limbeck' has no attribute '{name}'")
    module, _, attribute = _PUBLIC[name].partition(":")
    found = importlib.import_module(module)
    return getattr(found, attribute) if attribute else found


def __dir__() -> list[str]:
    return sorted(__all__)
