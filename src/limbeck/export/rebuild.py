"""From config.json back to code: which model builds the module again, which function unpacks its weights, and what a stranger may name."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from pydantic import ValidationError
from torch import Tensor, nn

from limbeck import models
from limbeck.components import Component, import_object
from limbeck.errors import InputError

_FETCHES = {models.CATALOGUE[name]: key for name, key in (("timm", "pretrained"), ("torchvision", "weights"), ("transformers", "pretrained"))}
"""The argument by which an adapter fetches weights: never when a module is only built to take its saved ones."""
_OF_PACKAGES = tuple(models.CATALOGUE[name] for name in ("causal_lm", "smollm2", "gemma3", "encoder", "minilm"))
_OF_FOLDERS = ("limbeck.diffusion.adapters:", "limbeck.diffusion.latents:", *_OF_PACKAGES)
"""Builders whose modules know, as `arguments`, how to build them again without the folder that they came from."""


def deployed(module: nn.Module) -> nn.Module:
    """The module as it is saved: a model with adapters may say that they go into its weights (`deployed`); any other is itself."""
    found: Any = getattr(module, "deployed", None)
    return found() if callable(found) else module


def self_contained(component: Component, module: nn.Module) -> Component:
    """The component that builds the same network, and those that its arguments name, without the Hub or the folder its first weights came from."""
    component = _without_weights(component)
    args = dict(component.args)
    name = _NESTING.get(_path(component))
    part = getattr(module, name, None) if name is not None else None
    if name is not None and isinstance(part, nn.Module):
        given = _validated(args.get(name), name)
        if (found := self_contained(given, part)) != given:
            args[name] = found.model_dump(mode="json")
    known: Any = getattr(module, "arguments", None)
    if _path(component).startswith(_OF_FOLDERS) and isinstance(known, Mapping):
        args = {key: args[key] for key in ("num_classes", "input_shape") if key in args} | dict(known)
        builder = str(getattr(module, "builder", component.name))
        if models.CATALOGUE.get(builder) != _path(component):
            return Component(name=builder, args=args)
    source = args.get("model")
    network: Any = getattr(module, "network", None)
    if _path(component) == models.CATALOGUE["transformers"] and isinstance(source, str) and hasattr(network, "config"):
        args["model"] = _fields(network.config)
    return component if args == component.args else component.model_copy(update={"args": args})


_NESTING = {
    models.CATALOGUE[name]: argument
    for name, argument in (("generator", "denoiser"), ("direct_generator", "module"), ("consistency_generator", "denoiser"), ("signal_generator", "denoiser"))
}
"""Builders that take a component as an argument: a generator's denoiser. In any form that a component has: a mapping, a name, an import path."""


def within(component: Component) -> Iterator[Component]:
    """The component and those that its arguments name. Raises InputError where one of these is none."""
    yield component
    name = _NESTING.get(_path(component))
    if name is not None:
        yield from within(_validated(component.args.get(name), name))


def _plain(component: Component) -> Component:
    """The component with those that it names written out as what was checked, none of which fetches weights."""
    name = _NESTING.get(_path(component))
    if name is not None:
        inner = _plain(_validated(component.args.get(name), name))
        component = component.model_copy(update={"args": {**component.args, name: inner.model_dump(mode="json")}})
    return _without_weights(component)


def _validated(inner: Any, name: str) -> Component:
    try:
        return Component.model_validate(inner)
    except ValidationError as error:
        raise InputError("this is no component: give 'name' or 'target', with 'args'.", where=f"args.{name}") from error


def model(component: Component, num_classes: int, input_shape: Sequence[int], *, trust_imports: bool) -> nn.Module:
    """The module, with weights that do not matter.

    Raises:
        InputError: it is not one of limbeck's own models and not trusted, or cannot be built.
    """
    for part in within(component):
        if not trust_imports and part.target is not None and part.target not in models.CATALOGUE.values():
            raise _untrusted("model", part.target).at("target")
    return models.build_model(_plain(component), num_classes=num_classes, input_shape=input_shape, seed=0)


def decoder(path: str, *, trust_imports: bool) -> Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]:
    """The function that unpacks tensors into a state dict; without trust, one defined (not merely imported) in a module of limbeck.

    Raises:
        InputError: it is not such a function, or cannot be imported.
    """
    module_name, _, attribute = path.partition(":")
    if not trust_imports and (not module_name.startswith("limbeck.") or "." in attribute):
        raise _untrusted("decoder", path)
    found = import_object(path)
    if not trust_imports and getattr(found, "__module__", None) != module_name:
        raise _untrusted("decoder", path)
    return found


def _path(component: Component) -> str:
    return component.target or models.CATALOGUE.get(component.name or "", "")


def _without_weights(component: Component) -> Component:
    fetches = _FETCHES.get(_path(component))
    if fetches is None:
        return component
    args = {key: value for key, value in component.args.items() if key != fetches}
    options = args.get("options")
    if isinstance(options, Mapping):
        args["options"] = {key: value for key, value in options.items() if not ("pretrained" in key or "checkpoint" in key)}
    return component.model_copy(update={"args": args})


def _fields(config: Any) -> dict[str, Any]:
    """What a transformers configuration says beyond its type's defaults, as the 'transformers' adapter takes it."""
    known = type(config)().to_dict()
    own = {"_name_or_path", "architectures", "transformers_version", "id2label", "label2id", "dtype", "torch_dtype", "problem_type", "model_type"}
    changed = {key: value for key, value in config.to_diff_dict().items() if key in known and key not in own}
    return {"model_type": config.model_type, **changed}


def _untrusted(what: str, path: str) -> InputError:
    return InputError(
        f"the {what} is '{path}', code that is not one of limbeck's own {what}s; it is not imported because a config file may come from a stranger.",
        fix="If you trust this folder, call load(path, trust_imports=True).",
    )
