"""Image classifiers of timm, torchvision and transformers by name. Random weights unless pretrained ones are asked for; no remote code."""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from limbeck.errors import InputError, LimbeckError, MissingExtra, suggestion
from limbeck.models.arguments import image_shape, truth, whole_number
from limbeck.models.outputs import logits_of

IMAGENET = (3, 224, 224)
_AUXILIARY = ("AuxLogits", "aux1", "aux2")  # the heads of torchvision's Inception and GoogLeNet that answer only in training


class LogitsOnly(nn.Module):
    """A network whose output is an object with `logits`: x [B, C, H, W] -> logits [B, classes]. The network is `network`."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> logits [B, classes]."""
        return logits_of(self.network(x))


def timm(
    model: str,
    *,
    num_classes: int = 1000,
    input_shape: Sequence[int] = IMAGENET,
    pretrained: bool = False,
    options: Mapping[str, Any] | None = None,
) -> nn.Module:
    """A classifier of timm: [B, C, H, W] -> logits [B, num_classes]; any number of channels.

    Args:
        model: as in `timm.list_models()`, with a tag of weights if wanted (`resnet18.a1_in1k`).
        num_classes: width of the logits (a pretrained head of another width is dropped). input_shape: (channels, height, width).
        pretrained: fetch weights from the Hub. options: further arguments of `timm.create_model` (`drop_path_rate`, …).

    Raises:
        InputError: the name is unknown, an option is refused, or the weights could not be had.
        MissingExtra: timm is not installed.
    """
    library = _package("timm", "vision")
    channels, height, width = image_shape(input_shape)
    if not isinstance(model, str) or not library.is_model(model):
        raise _unknown("timm", model, library.list_models())
    arguments: dict[str, Any] = {"num_classes": whole_number(num_classes, "num_classes"), "in_chans": channels}
    truth(pretrained, "pretrained")
    with _refusals(model, "model"):
        known = library.get_pretrained_cfg(model)
    if known is not None and known.fixed_input_size:  # timm's own sign that the architecture takes `img_size`
        arguments["img_size"] = (height, width)
    with _refusals(model, "pretrained" if pretrained else "options"):
        return library.create_model(model, pretrained=pretrained, **arguments, **(options or {}))


def torchvision(
    model: str,
    *,
    num_classes: int = 1000,
    input_shape: Sequence[int] = IMAGENET,
    weights: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> nn.Module:
    """A classifier of torchvision: [B, 3, H, W] -> logits [B, num_classes]; auxiliary heads are left out.

    Args:
        model: as in `torchvision.models.list_models(torchvision.models)`.
        num_classes: width of the logits (a pretrained head of another width is drawn afresh). input_shape: (3, height, width).
        weights: fetch these weights, such as 'DEFAULT' or 'IMAGENET1K_V1'; None: random ones.
        options: further arguments of the model's builder (`width_mult`, `dropout`, …).

    Raises:
        InputError: a name is unknown, the images do not have 3 channels, an option is refused, or the weights could not be had.
        MissingExtra: torchvision is not installed.
    """
    library = _package("torchvision", "vision").models
    channels, height, _ = image_shape(input_shape)
    if channels != 3:
        raise InputError(f"torchvision's networks take 3 channels, not {channels}.", where="input_shape", fix="Use a model of timm, or one of limbeck's own.")
    if model not in (names := library.list_models(module=library)):
        raise _unknown("torchvision", model, names)
    num_classes = whole_number(num_classes, "num_classes")
    common = {"image_size": height} if model.startswith("vit_") else {}
    common |= options or {}
    fresh = ({"init_weights": True} if model in ("googlenet", "inception_v3") else {}) | common  # these two warn where it is not said
    if weights is None:
        with _refusals(model, "options"):
            return _without_auxiliaries(library.get_model(model, num_classes=num_classes, **fresh))
    offered = library.get_model_weights(model).__members__
    if weights not in offered:
        raise InputError(f"torchvision has no weights '{weights}' for '{model}'.", where="weights", fix=suggestion(weights, offered))
    with _refusals(model, "weights"):
        network = library.get_model(model, weights=offered[weights], progress=False, **common)
    if num_classes != len(offered[weights].meta["categories"]):
        _take_head(network, library.get_model(model, num_classes=num_classes, **fresh))
    return _without_auxiliaries(network)


def transformers(
    model: str | Mapping[str, Any],
    *,
    num_classes: int = 1000,
    input_shape: Sequence[int] = IMAGENET,
    pretrained: bool = False,
) -> LogitsOnly:
    """An image classifier of transformers: [B, C, H, W] -> logits [B, num_classes].

    Args:
        model: a folder with `config.json`, a configuration (`{model_type: vit, hidden_size: 64, …}`), or, if pretrained, a name on the Hub.
            A configuration takes the channels and the size of the images from `input_shape`, unless it sets them.
        num_classes: width of the logits (a pretrained head of another width is drawn afresh). input_shape: (channels, height, width).
        pretrained: take the weights of the folder, or fetch them from the Hub; False: random weights, and nothing is fetched.

    Raises:
        InputError: the model type, a field or the folder is unknown, the weights could not be had or do not fit, or the channels differ.
        MissingExtra: transformers is not installed.
    """
    library = _package("transformers", "language")
    auto = library.AutoModelForImageClassification
    channels, height, width = image_shape(input_shape)
    num_classes = whole_number(num_classes, "num_classes")
    if isinstance(model, Mapping):
        if truth(pretrained, "pretrained"):
            raise InputError("a configuration has no pretrained weights.", where="pretrained", fix="Give a folder or a name on the Hub, or leave it out.")
        config = _configuration(library, model, channels, height, width)
    elif truth(pretrained, "pretrained") or os.path.isdir(model):  # any other name would be looked up on the Hub, even with `local_files_only`
        with _refusals(model, "pretrained" if pretrained else "model"):
            config = library.AutoConfig.from_pretrained(model, trust_remote_code=False)
    else:
        raise InputError(
            f"there is no folder '{model}'.",
            where="model",
            fix="Give a folder with config.json or a configuration; a name on the Hub needs 'pretrained: true'.",
        )
    if getattr(config, "num_channels", channels) != channels:
        raise InputError(f"'{config.model_type}' takes {config.num_channels} channels, the inputs have {channels}.", where="model")
    if config.num_labels != num_classes:
        config.num_labels = num_classes
    if not pretrained:
        with _refusals(config.model_type, "model"):
            return LogitsOnly(auto.from_config(config, trust_remote_code=False))
    with _refusals(str(model), "pretrained"), silenced(library.utils.logging):
        network, report = auto.from_pretrained(model, config=config, ignore_mismatched_sizes=True, output_loading_info=True, trust_remote_code=False)
    state = network.state_dict()
    drawn = [*report["missing_keys"], *(key for key, *_ in report["mismatched_keys"])]
    body = sorted(key for key in drawn if state[key].shape[:1] != (num_classes,) and not key.endswith("num_batches_tracked"))
    if body:
        raise InputError(f"the weights of '{model}' leave out or misfit {len(body)} tensors beside the head ({', '.join(body[:3])}).", where="pretrained")
    return LogitsOnly(network.float())


def _configuration(library: Any, fields: Mapping[str, Any], channels: int, height: int, width: int) -> Any:
    """A configuration of transformers from the fields of a recipe; misspelt ones are refused, which transformers would keep and ignore."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES

    kind = str(fields.get("model_type"))
    if kind not in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES:
        raise _unknown("transformers", kind, MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES).at("model_type")
    known = library.AutoConfig.for_model(kind).to_dict()
    for name in fields:
        if name not in known:
            raise InputError(f"'{kind}' has no field '{name}'.", where=f"model.{name}", fix=suggestion(name, known))
    given = {"num_channels": channels, "image_size": height if height == width else (height, width)}
    own = {name: value for name, value in fields.items() if name != "model_type"}
    with _refusals(kind, "model"):
        return library.AutoConfig.for_model(kind, **({name: value for name, value in given.items() if name in known} | own))


def _take_head(network: nn.Module, fresh: nn.Module) -> None:
    """Put into `network` the modules of `fresh` whose own parameters have another shape: the head of another class count."""
    for name, module in list(fresh.named_modules()):
        shapes = [p.shape for p in module.parameters(recurse=False)]
        if shapes and shapes != [p.shape for p in network.get_submodule(name).parameters(recurse=False)]:
            network.set_submodule(name, module)


def _without_auxiliaries(network: Any) -> nn.Module:
    for name in _AUXILIARY:
        if hasattr(network, name):
            setattr(network, name, None)
            network.aux_logits = False
    return network


def _package(name: str, extra: str) -> Any:
    """An optional package, imported.

    Raises:
        MissingExtra: it, or a package it needs, is not installed.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise MissingExtra(error.name or name, extra, why=f"the model '{name}'") from error


def _unknown(library: str, model: str, names: Iterable[str]) -> InputError:
    return InputError(f"{library} has no image classifier '{model}'.", where="model", fix=suggestion(model, names))


@contextmanager
def _refusals(model: str, where: str) -> Iterator[None]:
    """Turn whatever a library raises while building `model` into an InputError at the argument that asked for it.

    Third parties raise anything: TypeError, RuntimeError, AssertionError, their own hub and validation errors.
    """
    try:
        yield
    except LimbeckError:
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        if where in ("pretrained", "weights"):
            if isinstance(error, TypeError):  # an argument that the constructor does not take: no download was tried
                raise InputError(f"cannot build '{model}' ({reason}).", where="options") from error
            raise InputError(
                f"cannot get the pretrained weights of '{model}' ({reason}).",
                where=where,
                fix="Is the name right and the network reachable? Without it the weights are random.",
            ) from error
        raise InputError(f"cannot build '{model}' ({reason}).", where=where) from error


@contextmanager
def silenced(logging: Any) -> Iterator[None]:
    """transformers without progress bars and loading reports, which are checked here instead."""
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
