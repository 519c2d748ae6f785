"""Components by name: a short name, or an import path `package.module:function` (DESIGN §7).

A catalogue maps short names to import paths as text, so that it can be listed without importing anything.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, model_validator

from limbeck.errors import InputError, suggestion


class Component(BaseModel):
    """A part of a recipe that is built by a call: `mlp`, `{name: mlp, widths: [64, 10]}` or `{target: pkg.mod:fn, args: {…}}`.

    Exactly one of `name` (looked up in a catalogue) and `target` (imported) is set; `args` go to the call as keywords.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    name: str | None = None
    target: str | None = None
    args: dict[str, Any] = {}

    @model_validator(mode="before")
    @classmethod
    def _short_forms(cls, value: Any) -> Any:
        if isinstance(value, str):
            return {"target": value} if ":" in value else {"name": value}
        if isinstance(value, Mapping) and "name" in value and "target" not in value:
            args = value.get("args", {})
            if not isinstance(args, Mapping):
                raise ValueError("'args' must be a mapping of argument names to values.")
            extra = {str(k): v for k, v in value.items() if k not in ("name", "args")}
            return {"name": value["name"], "args": {**args, **extra}}
        return value

    @model_validator(mode="after")
    def _one_of(self) -> Component:
        if (self.name is None) == (self.target is None):
            raise ValueError("give either 'name' (a short name) or 'target' (package.module:function), with 'args'.")
        return self

    def __str__(self) -> str:
        return self.name or self.target or ""


def import_object(path: str) -> Any:
    """The object at `package.module:attribute`. Raises InputError where there is none."""
    module_name, colon, attribute = path.partition(":")
    if not colon or not module_name or not attribute:
        raise InputError(f"'{path}' is not an import path.", fix="Write it as package.module:function.")
    try:
        found: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise InputError(
            f"cannot import '{module_name}': {error}.",
            fix="Is the package installed in this environment, and its folder on PYTHONPATH?",
        ) from error
    except (ValueError, TypeError) as error:
        raise InputError(f"'{path}' is not an import path: {error}.", fix="Write it as package.module:function.") from error
    for part in attribute.split("."):
        if not hasattr(found, part):
            raise InputError(f"'{module_name}' has no '{attribute}'.", fix=suggestion(part, [n for n in dir(found) if not n.startswith("_")]))
        found = getattr(found, part)
    return found


def resolve(component: Component, catalogue: Mapping[str, str], kind: str) -> Callable[..., Any]:
    """The callable behind a component: from the catalogue by name, or imported by target.

    Raises:
        InputError: the name is unknown (with a suggestion) or the target cannot be imported or called.
    """
    if component.name is not None:
        if component.name not in catalogue:
            raise InputError(f"unknown {kind} '{component.name}'.", where="name", fix=suggestion(component.name, catalogue))
        path = catalogue[component.name]
    else:
        path = component.target or ""
    try:
        found = import_object(path)
    except InputError as error:
        if component.target is not None:
            raise error.at("target") from error
        raise
    if not callable(found):
        raise InputError(f"'{path}' is not callable.", where="target", fix="Name a function or a class.")
    return found


def build(component: Component, catalogue: Mapping[str, str], kind: str, **given: Any) -> Any:
    """Call the component with its args and those of `given` that its signature takes and the recipe leaves out.

    Raises:
        InputError: an argument is unknown, missing or refused; `where` is `args.NAME`.
    """
    function = resolve(component, catalogue, kind)
    try:
        parameters = inspect.signature(function).parameters
    except (ValueError, TypeError) as error:
        raise InputError(f"the arguments of {kind} '{component}' are not known.", where="target", fix="Name a function or class written in Python.") from error
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    names = [n for n, p in parameters.items() if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)]
    for key in component.args:
        if key not in names and not takes_any:
            raise InputError(f"{kind} '{component}' takes no argument '{key}'.", where=f"args.{key}", fix=suggestion(key, names))
    arguments = {k: v for k, v in given.items() if k in names} | component.args
    missing = [n for n in names if parameters[n].default is inspect.Parameter.empty and n not in arguments]
    if missing:
        raise InputError(f"{kind} '{component}' needs the argument '{missing[0]}'.", where="args", fix=f"Add '{missing[0]}: …'.")
    try:
        return function(**arguments)
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"{kind} '{component}' refused its arguments: {_said(error)}", where="args") from error


def _said(error: Exception) -> str:
    """What an exception says and where it was raised, in a line."""
    import traceback

    text = " ".join(str(error).split()) or type(error).__name__
    frames = traceback.extract_tb(error.__traceback__)
    if len(frames) < 2:  # the call itself did not fit
        return f"{text}."
    return f"{text} ({type(error).__name__} at {frames[-1].filename}:{frames[-1].lineno})."
