"""An artefact on disk: a folder with `model.safetensors` and `config.json`, whole or absent, checked before it is believed.

config.json says how to build the module again (a component of `limbeck.models`, or null for a person's own module), what goes in
(shape, preprocessing), what comes out (classes), and the weights' length and SHA-256. Loading never runs code that the file
names unless the caller trusts it: built-in models by name, decoders defined inside limbeck, nothing else.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import safetensors.torch
from pydantic import Field
from safetensors import SafetensorError
from torch import Tensor, nn

import limbeck
from limbeck import files
from limbeck.components import Component
from limbeck.contract import Artefact, Frozen, validated
from limbeck.errors import InputError
from limbeck.export import rebuild
from limbeck.synthetic.synthetic_set import SyntheticSet

WEIGHTS, CONFIG, PICTURES = "model.safetensors", "config.json", "images.png"
FORMAT, VERSION = "limbeck-artefact", 1


@dataclass(frozen=True)
class Exported:
    """What was written: a file or folder, and its size."""

    path: Path
    bytes: int

    def __str__(self) -> str:
        return f"{self.path}: {self.bytes:,} bytes"

    @classmethod
    def of(cls, folder: Path) -> Exported:
        """A written folder, measured."""
        return cls(folder, sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()))


class WeightsFile(Frozen):
    """The tensors on disk: their length and hash, and which names share one tensor."""

    file: Literal["model.safetensors"] = "model.safetensors"
    bytes: int
    sha256: str
    tied: dict[str, str] = Field(default_factory=dict)
    """Names left out of the file → the name that holds the same tensor."""


class ArtefactConfig(Frozen):
    """The content of config.json."""

    format: str = FORMAT
    format_version: int = VERSION
    limbeck: str
    kind: str
    model: Component | None
    num_classes: int | None
    input_shape: tuple[int, ...] | None
    preprocess: dict[str, Any] = Field(default_factory=dict)
    classes: tuple[str, ...] = ()
    encoder: str | None = None
    """Import path of the decoder that turns the file's tensors back into a state dict; None: they are the state dict."""
    weights: WeightsFile
    facts: dict[str, Any] = Field(default_factory=dict)
    extra: dict[str, Any] = Field(default_factory=dict)


def save(
    artefact: Artefact,
    folder: Path | str,
    *,
    model: Component | None,
    num_classes: int | None,
    input_shape: Sequence[int] | None,
    preprocess: Mapping[str, Any],
    classes: Sequence[str],
    extra: Mapping[str, Any],
) -> Path:
    """Write an artefact as a folder; a kill at any moment leaves the old folder or the new one. A data set of pictures gets images.png too, to be looked at.

    Args:
        model: how `limbeck.models.build_model` builds the module again; None for a person's own module.
        num_classes, input_shape: what the run filled in; input_shape without the batch axis.
        preprocess: JSON values that turn a raw input into the network's (mean, std, scale).
        extra: JSON values worth keeping beside the facts ('metrics' goes into the model card).

    Raises:
        InputError: the folder holds something other than a saved model. ValueError, TypeError: a value is not JSON.
    """
    module = rebuild.deployed(artefact.module)
    state: Mapping[str, Tensor] = module.state_dict()
    tensors, tied = _untied(state if artefact.encoder is None else artefact.encoder.encode(state))
    content = safetensors.torch.save(tensors, metadata={"format": "pt"})
    config = ArtefactConfig(
        limbeck=limbeck.__version__,
        kind=artefact.kind,
        model=None if model is None else rebuild.self_contained(model, module),
        num_classes=num_classes,
        input_shape=None if input_shape is None else tuple(input_shape),
        preprocess=dict(preprocess),
        classes=tuple(classes),
        encoder=None if artefact.encoder is None else artefact.encoder.decoder,
        weights=WeightsFile(bytes=len(content), sha256=hashlib.sha256(content).hexdigest(), tied=tied),
        facts=dict(artefact.facts),
        extra=dict(extra),
    )

    def write(target: Path) -> None:
        (target / WEIGHTS).write_bytes(content)
        (target / CONFIG).write_text(json.dumps(config.model_dump(), indent=2, allow_nan=False) + "\n", encoding="utf-8")
        if isinstance(module, SyntheticSet) and module.shows:
            module.save_png(target / PICTURES)

    return replace_folder(folder, write)


def load(path: Path | str, *, model: nn.Module | None = None, trust_imports: bool = False) -> nn.Module:
    """The module saved in an artefact folder or a run folder, in eval mode, with its config as the attribute `limbeck_config`.

    Args:
        model: a module to put the weights into, for artefacts that do not say how to build theirs.
        trust_imports: import the model or decoder that the config names even where it is not part of limbeck.

    Raises:
        InputError: a file is missing, truncated, damaged, of another format, names code that is not trusted, or does not fit `model`.
    """
    folder = artefact_folder(path)
    config = read_config(folder)
    state = _read_state(folder, config, trust_imports=trust_imports)
    module = model if model is not None else _build(folder / CONFIG, config, trust_imports=trust_imports)
    try:
        module.load_state_dict(state)
    except RuntimeError as error:
        lines = " ".join(str(error).split())
        raise InputError(
            f"the weights do not fit the model: {lines[:400]}",
            where=str(folder / config.weights.file),
            fix="Pass the module they belong to: load(path, model=module).",
        ) from error
    module.limbeck_config = config.model_dump(mode="json")  # type: ignore[assignment]
    return module.eval()


def must_be_a_network(module: nn.Module) -> None:
    """Raises InputError: it is a data set, which other formats have no place for."""
    if isinstance(module, SyntheticSet):
        what = f"a data set is no network: its folder holds safetensors, and {PICTURES} where its samples are pictures."
        raise InputError(what, where="--to", fix="Load it with limbeck.load, or copy the folder with --to safetensors.")


def copy_folder(source: Path, output: Path | str) -> Exported:
    """A checked copy of an artefact folder. Raises InputError as `load` and `replace_folder` do."""
    _check_weights(source, read_config(source))

    def write(target: Path) -> None:
        for name in (WEIGHTS, CONFIG, PICTURES):
            if name != PICTURES or (source / name).is_file():
                shutil.copyfile(source / name, target / name)

    return Exported.of(replace_folder(output, write))


def artefact_folder(path: Path | str) -> Path:
    """The folder that holds config.json: `path` itself, or `artefact/` of a run folder. Raises InputError where there is none."""
    path = Path(path)
    for folder in (path, path / "artefact", _retired(path), _retired(path / "artefact")):
        if (folder / CONFIG).is_file():
            return folder
    if not path.exists():
        raise InputError("there is no such folder.", where=str(path))
    raise InputError(
        f"no saved model here: neither '{CONFIG}' nor 'artefact/{CONFIG}' is in it.",
        where=str(path),
        fix="Name an artefact folder, or the folder of a finished run.",
    )


def read_config(folder: Path) -> ArtefactConfig:
    """config.json of an artefact folder, checked. Raises InputError naming the file."""
    file = folder / CONFIG
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise InputError(f"not JSON: {error.msg}.", where=f"{file}:{error.lineno}") from error
    except UnicodeDecodeError as error:
        raise InputError("not a UTF-8 text file.", where=str(file)) from error
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        raise InputError("this config.json was not written by limbeck.", where=str(file), fix="A transformers folder opens with its from_pretrained.")
    if values.get("format_version") != VERSION:
        raise InputError(
            f"the format version is {values.get('format_version')!r}; this limbeck ({limbeck.__version__}) reads version {VERSION}.",
            where=str(file),
            fix=f"It was written by limbeck {values.get('limbeck')}.",
        )
    try:
        return validated(ArtefactConfig, values)
    except InputError as error:
        raise error.at(str(file)) from error


def replace_folder(folder: Path | str, write: Callable[[Path], None], *, marks: frozenset[str] = frozenset({CONFIG, WEIGHTS})) -> Path:
    """Let `write` fill a new folder, make it durable, and put it in the place of an old one.

    marks: names by which an earlier folder of the same kind is known, which alone is replaced; it holds no subfolders but those among them.

    Between the two renames the old folder lies under the name `.NAME.old`, where `artefact_folder` finds it after a kill.

    Raises:
        InputError: `folder` is a file, or holds something other than a saved model.
    """
    folder = Path(folder).resolve()
    _refuse_to_replace_other_things(folder, marks)
    folder.parent.mkdir(parents=True, exist_ok=True)
    fresh, retired = folder.parent / f".{folder.name}.new", _retired(folder)
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir()
    try:
        write(fresh)
        for place in (*fresh.rglob("*"), fresh):
            if place.is_dir():
                files.sync_folder(place)
                continue
            with place.open("rb") as handle:
                os.fsync(handle.fileno())
    except BaseException:
        shutil.rmtree(fresh, ignore_errors=True)
        raise
    if folder.exists():
        shutil.rmtree(retired, ignore_errors=True)
        folder.rename(retired)
    fresh.rename(folder)
    files.sync_folder(folder.parent)
    shutil.rmtree(retired, ignore_errors=True)
    return folder


def _refuse_to_replace_other_things(folder: Path, marks: frozenset[str]) -> None:
    if not folder.exists():
        return
    if not folder.is_dir():
        raise InputError("this is a file, not a folder.", where=str(folder), fix="Choose another name.")
    entries = list(folder.iterdir())
    if entries and (any(e.is_dir() and e.name not in marks for e in entries) or not marks <= {e.name for e in entries}):
        raise InputError("the folder exists and is not a saved model; it is left alone.", where=str(folder), fix="Choose a new folder.")


def _retired(folder: Path) -> Path:
    folder = folder.absolute()
    return folder.parent / f".{folder.name}.old"


def _untied(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """CPU tensors that share no memory, and for each name that held the same tensor as an earlier one, that one's name."""
    kept: dict[str, Tensor] = {}
    tied: dict[str, str] = {}
    first: dict[tuple[Any, ...], str] = {}
    for name, tensor in state.items():
        key = (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        if tensor.numel() and key in first:
            tied[name] = first[key]
            continue
        first[key] = name
        kept[name] = tensor.detach().cpu().contiguous()
    shared = Counter(t.untyped_storage().data_ptr() for t in kept.values())
    return {name: t.clone() if shared[t.untyped_storage().data_ptr()] > 1 else t for name, t in kept.items()}, tied


def _check_weights(folder: Path, config: ArtefactConfig) -> Path:
    """The weights' file, whole and unchanged. Raises InputError naming it."""
    file, expected = folder / config.weights.file, config.weights
    if not file.is_file():
        raise InputError("the weights are missing.", where=str(file), fix="Copy the whole folder.")
    size = file.stat().st_size
    if size != expected.bytes:
        raise InputError(f"the file has {size} bytes instead of {expected.bytes}.", where=str(file), fix="Copy it again.")
    with file.open("rb") as handle:
        digest = hashlib.file_digest(handle, "sha256").hexdigest()
    if digest != expected.sha256:
        raise InputError("the file is damaged: its SHA-256 differs from the one in config.json.", where=str(file), fix="Copy it again.")
    return file


def _read_state(folder: Path, config: ArtefactConfig, *, trust_imports: bool) -> Mapping[str, Tensor]:
    file, tied = _check_weights(folder, config), config.weights.tied
    try:
        tensors = safetensors.torch.load_file(file)
    except SafetensorError as error:
        raise InputError(f"not a safetensors file: {error}.", where=str(file)) from error
    missing = [kept for kept in tied.values() if kept not in tensors]
    if missing:
        raise InputError(f"the tensor '{missing[0]}' is not in the weights.", where=str(folder / CONFIG))
    tensors |= {name: tensors[kept] for name, kept in tied.items()}
    if config.encoder is None:
        return tensors
    try:
        return rebuild.decoder(config.encoder, trust_imports=trust_imports)(tensors)
    except InputError as error:
        raise error.at(f"{folder / CONFIG}: encoder") from error


def _build(file: Path, config: ArtefactConfig, *, trust_imports: bool) -> nn.Module:
    if config.model is None or config.num_classes is None or config.input_shape is None:
        raise InputError(
            "the artefact does not say how to build its model (it was trained from a module of your own).",
            where=str(file),
            fix="Pass that module: load(path, model=module).",
        )
    try:
        return rebuild.model(config.model, config.num_classes, config.input_shape, trust_imports=trust_imports)
    except InputError as error:
        raise error.at(f"{file}: model") from error
