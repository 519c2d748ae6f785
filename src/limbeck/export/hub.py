"""A folder in the shape of the Hugging Face Hub: weights, config.json, and a model card made from what the artefact knows.

A transformers classifier or language model is written by its own `save_pretrained`, so that `AutoModelFor….from_pretrained` opens it;
anything else keeps limbeck's config.json and opens with `limbeck.load`.
"""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

import limbeck
from limbeck.components import Component
from limbeck.contract import Artefact
from limbeck.export.folder import CONFIG, WEIGHTS, Exported, must_be_a_network, read_config, replace_folder, save
from limbeck.files import write_atomic

CARD = "README.md"


def export_folder(module: nn.Module, source: Path, output: Path | str) -> Exported:
    """An artefact folder, and the module loaded from it, as a Hub folder; packed weights stay packed. Raises what `replace_folder` raises."""
    if _transformers_model(module) is not None:
        return export_hf(module, output)
    config: dict[str, Any] = module.limbeck_config  # type: ignore[assignment]

    def write(target: Path) -> None:
        shutil.copyfile(source / WEIGHTS, target / WEIGHTS)
        shutil.copyfile(source / CONFIG, target / CONFIG)
        (target / CARD).write_text(card(config, Path(output).name, library="limbeck"), encoding="utf-8")

    return Exported.of(replace_folder(output, write))


def export_hf(item: nn.Module | Artefact, folder: Path | str) -> Exported:
    """Write a module (or artefact) as a Hub folder with a model card.

    What `limbeck.load` or the run knows about it is read from the module's `limbeck_config`, where it has one.

    Raises:
        InputError: the folder holds something other than a saved model, or the module is a data set.
    """
    module = item.module if isinstance(item, Artefact) else item
    must_be_a_network(module)
    known: dict[str, Any] = getattr(module, "limbeck_config", {})
    inner = _transformers_model(module)
    if inner is not None:
        classes: Sequence[str] = known.get("classes") or ()

        def write(target: Path) -> None:
            with contextlib.redirect_stderr(io.StringIO()):  # its progress bar
                inner.save_pretrained(target)
            if known.get("kind") != "language_model":
                _name_classes(target / CONFIG, classes)
            (target / CARD).write_text(card(known, Path(folder).name, library="transformers"), encoding="utf-8")

        return Exported.of(replace_folder(folder, write))
    written = save(
        item if isinstance(item, Artefact) else Artefact(known.get("kind", "classifier"), module, facts=known.get("facts", {})),
        folder,
        model=Component.model_validate(known["model"]) if known.get("model") else None,
        num_classes=known.get("num_classes"),
        input_shape=known.get("input_shape"),
        preprocess=known.get("preprocess", {}),
        classes=known.get("classes", ()),
        extra=known.get("extra", {}),
    )
    write_atomic(written / CARD, card(read_config(written).model_dump(mode="json"), written.name, library="limbeck"))
    return Exported.of(written)


def card(config: Mapping[str, Any], name: str, *, library: str) -> str:
    """The model card (README.md with the Hub's front matter) from the content of config.json; facts it lacks are left out."""
    kind = str(config.get("kind", "model"))
    shape, classes, preprocess = config.get("input_shape"), config.get("classes") or (), config.get("preprocess") or {}
    images = kind == "classifier" and shape is not None and len(shape) == 3
    lines = ["---", f"library_name: {library}"]
    lines += ["pipeline_tag: image-classification"] if images else ["pipeline_tag: text-generation"] if kind == "language_model" else []
    lines += ["tags:", "- distillation", "- limbeck", "---", "", f"# {name}", ""]
    article = "An" if kind[0] in "aeiou" else "A"
    lines += [
        f"{article} {kind.replace('_', ' ')} distilled with [limbeck](https://pypi.org/project/limbeck/) {config.get('limbeck', limbeck.__version__)}.",
        "",
    ]
    extra = dict(config.get("extra") or {})
    metrics = extra.pop("metrics", {})
    if metrics:
        lines += ["## Results", "", "| metric | value |", "|---|---|", *(f"| {key} | {_shown(value)} |" for key, value in metrics.items()), ""]
    opener = "load" if library != "transformers" else "language_model" if kind == "language_model" else "classifier"
    lines += ["## Use", "", "```python", *_USE[opener], "```", ""]
    if kind == "language_model":
        lines += ["Inputs are token ids of the tokenizer below (limbeck's own rows: int64 [B, 2, L], ids and shifted targets).", ""]
    elif shape is not None:
        lines += [f"Inputs are float32 of shape [B, {', '.join(str(n) for n in shape)}].", ""]
    if preprocess:
        lines += ["Preprocessing: " + ", ".join(f"{key} {_shown(value)}" for key, value in preprocess.items()) + ".", ""]
    if classes:
        lines += [f"{len(classes)} classes: {', '.join(classes)}.", ""]
    details = {**(config.get("facts") or {}), **extra}
    if details:
        lines += ["## Details", "", *(f"- {key}: {_shown(value)}" for key, value in details.items()), ""]
    return "\n".join(lines)


_USE = {
    "load": ("import limbeck", "", 'model = limbeck.load("FOLDER")  # a torch module in eval mode'),
    "language_model": ("from transformers import AutoModelForCausalLM", "", 'model = AutoModelForCausalLM.from_pretrained("FOLDER")'),
    "classifier": (
        "from transformers import AutoModelForImageClassification",
        "",
        'model = AutoModelForImageClassification.from_pretrained("FOLDER")',
    ),
}


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return value if isinstance(value, str) else json.dumps(value)


def _name_classes(config_file: Path, classes: Sequence[str]) -> None:
    """Put the data set's class names where transformers looks for them."""
    values = json.loads(config_file.read_text(encoding="utf-8"))
    if classes:
        values["id2label"] = {str(i): name for i, name in enumerate(classes)}
        values["label2id"] = {name: i for i, name in enumerate(classes)}
        config_file.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def _transformers_model(module: nn.Module) -> Any:
    """The transformers model inside the module, if it holds every parameter of it; else None."""
    modelling = sys.modules.get("transformers.modeling_utils")
    if modelling is None:  # never imported, so nothing of it can be in the module
        return None
    count = sum(p.numel() for p in module.parameters())
    for inner in module.modules():
        if isinstance(inner, modelling.PreTrainedModel) and sum(p.numel() for p in inner.parameters()) == count:
            return inner
    return None
