"""Taking the artefact elsewhere: a safetensors folder, a Hub folder, a folder for diffusers, ONNX; and getting it back with `load`."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from limbeck.errors import InputError, suggestion
from limbeck.export import hub
from limbeck.export.folder import Exported, artefact_folder, copy_folder, load, must_be_a_network, read_config, save
from limbeck.export.onnx import export_onnx

FORMATS = {
    "safetensors": "a folder with model.safetensors and config.json, for limbeck.load",
    "hf": "a folder as on the Hugging Face Hub, with a model card; transformers models open with from_pretrained",
    "onnx": "one ONNX file, compared with the module in onnxruntime",
    "diffusers": "a folder that diffusers opens and samples from without limbeck (generators)",
}

__all__ = ["FORMATS", "Exported", "export", "load", "save"]


def export(path: Path | str, to: str, output: Path | str | None = None, *, model: nn.Module | None = None, trust_imports: bool = False) -> Exported:
    """Write the artefact of a run folder or artefact folder in another format (a key of FORMATS).

    Args:
        output: the file (onnx) or folder to write, replaced where it is an earlier export; None: beside the artefact (artefact.onnx, artefact-hf, …).
        model, trust_imports: as for `load`.

    Returns:
        Path and bytes; for 'onnx' an `OnnxReport`, with the largest difference between onnxruntime and the module.

    Raises:
        InputError: the format is unknown, the artefact cannot be loaded or is a data set (which 'safetensors' alone takes), or `output` holds something else.
        LimbeckError: the module cannot be exported. MissingExtra: the format's packages are not installed.
    """
    if to not in FORMATS:
        raise InputError(f"unknown format '{to}'.", where="--to", fix=suggestion(to, FORMATS))
    source = artefact_folder(path).resolve()
    if output is None:
        output = source.with_name(source.name + (".onnx" if to == "onnx" else f"-{to}"))
    if to == "safetensors":
        return copy_folder(source, output)
    module = load(source, model=model, trust_imports=trust_imports)
    must_be_a_network(module)
    if to == "hf":
        return hub.export_folder(module, source, output)
    if to == "diffusers":
        from limbeck.export.diffusers import export_diffusers

        return export_diffusers(module, output)
    config = read_config(source)
    if config.input_shape is None:
        raise InputError("the artefact does not say what shape its inputs have.", where=str(source), fix="Call export_onnx(module, input_shape, path).")
    if config.kind == "denoiser":
        raise InputError("a denoiser is no graph of its own: sampling takes many calls.", where=str(source), fix="Distil it into a generator of one step.")
    if config.kind != "generator":
        return export_onnx(module, config.input_shape, output, classes=config.classes, preprocess=config.preprocess)
    from limbeck.export.calls import one_call

    made = one_call(module)
    return export_onnx(made, config.input_shape, output, classes=config.classes if made.num_classes else ())  # samples leave in data units
