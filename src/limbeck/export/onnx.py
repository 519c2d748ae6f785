"""ONNX export that is checked before it counts: onnxruntime must give the module's own outputs, or no file is left."""

from __future__ import annotations

import contextlib
import copy
import importlib
import io
import json
import logging
import os
import re
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from limbeck import seeds
from limbeck.errors import InputError, LimbeckError, MissingExtra
from limbeck.export.folder import Exported, must_be_a_network
from limbeck.files import sync_folder
from limbeck.language.encoders import EncoderClassifier
from limbeck.language.models import LanguageModel

BATCH_SIZES = (1, 3, 8)
TOLERANCE = 1e-4
"""Bound of the largest difference, relative to the largest output of the module."""


@dataclass(frozen=True)
class OnnxReport(Exported):
    """A written ONNX file: `max_abs_difference` between onnxruntime's outputs and the module's, over all checked batches."""

    max_abs_difference: float
    opset: int

    def __str__(self) -> str:
        batches = ", ".join(str(n) for n in BATCH_SIZES)
        return (
            f"{super().__str__()}, opset {self.opset}; largest difference from the module in onnxruntime {self.max_abs_difference:.2g} (batches of {batches})"
        )


def export_onnx(
    module: nn.Module,
    input_shape: Sequence[int],
    path: Path | str,
    *,
    classes: Sequence[str] = (),
    preprocess: Mapping[str, Any] | None = None,
) -> OnnxReport:
    """Write the module in eval mode as ONNX with a free batch axis, and compare onnxruntime with it on seeded inputs.

    Args:
        module: a network input → logits, or a generator of one call (`calls.OneCall`), noise (and labels) → samples: these are the graph's names.
        input_shape: of one float32 input, without the batch axis; of an `EncoderClassifier` (2, L), int64 ids and mask. L is fixed in the graph: pad texts.
        classes, preprocess: kept as JSON in the file's metadata.

    Raises:
        InputError: the module is a data set, a language model, or a text classifier of another kind than `EncoderClassifier`; the path is a folder.
        LimbeckError: the module cannot be exported, or the outputs differ by more than 1e-4 of their scale; no file is left.
        MissingExtra: onnx, onnxscript or onnxruntime is not installed.
    """
    must_be_a_network(module)
    _refuse_other_texts(module, preprocess or {})
    for package in ("onnx", "onnxscript", "onnxruntime"):
        _require(package)
    path = Path(path)
    if path.is_dir():
        raise InputError("this is a folder; ONNX is written to one file.", where=str(path), fix="Name a file such as model.onnx.")
    path.parent.mkdir(parents=True, exist_ok=True)
    ours = copy.deepcopy(module).cpu().float().eval()
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as scratch:
        temporary = Path(scratch) / "model.onnx"
        opset = _write(ours, input_shape, temporary, {"classes": json.dumps(list(classes)), "preprocess": json.dumps(dict(preprocess or {}))})
        difference, scale = _difference(ours, input_shape, temporary)
        if not difference <= TOLERANCE * scale:  # a NaN fails too
            raise LimbeckError(
                f"{path}: onnxruntime differs from the module by {difference:.3g} where outputs reach {scale:.3g} "
                f"(allowed: {TOLERANCE:g} of that); nothing was written."
            )
        with temporary.open("rb") as handle:
            os.fsync(handle.fileno())
        temporary.replace(path)
    sync_folder(path.parent)
    return OnnxReport(path, path.stat().st_size, difference, opset)


def _require(package: str) -> None:
    try:
        importlib.import_module(package)
    except ModuleNotFoundError as error:
        raise MissingExtra(package, "export", why="ONNX export") from error


def _refuse_other_texts(module: nn.Module, preprocess: Mapping[str, Any]) -> None:
    """Raise InputError where the module reads tokens and is no classifier whose inputs are known here. preprocess: of the data, with "tokenizer" for text."""
    if isinstance(module, LanguageModel):
        raise InputError(
            f"{type(module).__name__} is a language model, and one graph of fixed rows, without a cache, is of no use for generating text.",
            where="--to",
            fix="Use --to hf: transformers opens its models' folders, and limbeck.load the others.",
        )
    if "tokenizer" in preprocess and not isinstance(module, EncoderClassifier):
        raise InputError(f"{type(module).__name__} reads tokens, and which ids it takes is not known.", where="--to", fix="Use --to hf, for limbeck.load.")


def _inputs(module: nn.Module, batch_size: int, input_shape: Sequence[int]) -> Tensor:
    """Example inputs: noise; of a text encoder ids and the masks of texts of L, L − 1, … tokens in turn, int64 [B, 2, L]."""
    generator = seeds.generator("onnx parity", batch_size)
    if not isinstance(module, EncoderClassifier):
        return torch.randn(batch_size, *input_shape, generator=generator)
    length = input_shape[-1]
    ids_BL = torch.randint(int(module.config.vocab_size), (batch_size, length), generator=generator)
    mask_BL = torch.arange(length) < length - torch.arange(batch_size)[:, None] % length
    return torch.stack((ids_BL, mask_BL.long()), 1)


def _names(module: nn.Module) -> tuple[list[str], str]:
    """Of the graph's inputs and its output."""
    if not getattr(module, "generates", False):
        return ["input"], "logits"
    return ["noise", "labels"] if module.num_classes else ["noise"], "samples"


def _batch(module: nn.Module, batch_size: int, input_shape: Sequence[int]) -> tuple[Tensor, ...]:
    """As many tensors as the graph has inputs; labels are classes in turn."""
    inputs = (_inputs(module, batch_size, input_shape),)
    return (*inputs, torch.arange(batch_size) % int(module.num_classes)) if len(_names(module)[0]) == 2 else inputs  # type: ignore[arg-type]


def _write(module: nn.Module, input_shape: Sequence[int], path: Path, metadata: Mapping[str, str]) -> int:
    """Export, add the metadata, check the graph; returns the opset."""
    import onnx

    inputs, output = _names(module)
    with _quiet():
        try:
            program = torch.onnx.export(
                module,
                _batch(module, 2, input_shape),
                dynamo=True,
                input_names=inputs,
                output_names=[output],
                dynamic_shapes=({0: torch.export.Dim("batch", min=1)},) * len(inputs),
                verbose=False,
            )
        except (torch.onnx.errors.OnnxExporterError, RuntimeError) as error:
            raise LimbeckError(f"{type(module).__name__} cannot be exported to ONNX: {_reason(error)}") from error
        assert program is not None  # torch gives None only for the old exporter
        proto = program.model_proto
    onnx.helper.set_model_props(proto, dict(metadata))
    onnx.checker.check_model(proto)
    path.write_bytes(proto.SerializeToString())
    return int(next(entry.version for entry in proto.opset_import if entry.domain in ("", "ai.onnx")))


def _difference(module: nn.Module, input_shape: Sequence[int], path: Path) -> tuple[float, float]:
    """The largest |onnxruntime − module| and the largest |module|, over all batch sizes; NaN where there is one."""
    batches = [_batch(module, batch_size, input_shape) for batch_size in BATCH_SIZES]
    with torch.no_grad():
        expected = [module(*batch) for batch in batches]
    try:
        found = _answers(path, batches, *_names(module))
    except Exception as error:  # onnxruntime's own classes have no common base
        raise LimbeckError(f"onnxruntime cannot run the exported {type(module).__name__}: {_reason(error)}") from error
    for ours, theirs in zip(expected, found, strict=True):
        if ours.shape != theirs.shape:
            raise LimbeckError(f"onnxruntime gives outputs of shape {tuple(theirs.shape)} where the module gives {tuple(ours.shape)}; nothing was written.")
    expected_N, found_N = (torch.cat([logits.flatten() for logits in outputs]) for outputs in (expected, found))
    return float((found_N - expected_N).abs().max()), float(expected_N.abs().max())


def _answers(path: Path, batches: Sequence[tuple[Tensor, ...]], inputs: Sequence[str], output: str) -> list[Tensor]:
    """onnxruntime's outputs for each batch."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors only
    session = onnxruntime.InferenceSession(path.read_bytes(), options, providers=["CPUExecutionProvider"])
    given = [{name: tensor.numpy() for name, tensor in zip(inputs, batch, strict=True)} for batch in batches]
    return [torch.from_numpy(session.run([output], feed)[0]) for feed in given]


def _reason(error: BaseException) -> str:
    """The first line of the error at the bottom of a chain, without terminal colours."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = re.sub(r"\x1b\[[0-9;]*m", "", str(error)).strip().splitlines()
    return lines[0][:400] if lines else type(error).__name__


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter's prints, warnings and log lines away from the console."""
    level = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
