"""How a teacher becomes the student's first weights (sheet `capacity_gap`, loop B 2 to 5), and how sizes are counted."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import nn

from limbeck import seeds
from limbeck.contract import Data, Frozen
from limbeck.errors import InputError
from limbeck.language.decoder import Decoder, DecoderShape, LayerShape, from_llama, llama_shape
from limbeck.language.huggingface import CausalLM
from limbeck.language.importance import Importance, importance, random_importance
from limbeck.language.models import LanguageModel
from limbeck.language.pruning import component_sparsity, cut, global_shape, nearest_shape, reordered, uniform_shape, whole_percent
from limbeck.language.tokens import TokenBatch


class PruningConfig(Frozen):
    """Knobs that say what of the teacher stays."""

    sparsity: float | None = Field(None, ge=0, lt=1, description="p, share of the teacher's weights to remove, embeddings aside; p' is rounded to whole %")
    parameters: int | None = Field(None, ge=1, description="in place of sparsity: the student's weights, embeddings aside; both null: as many as the student's")
    cut: Literal["global", "uniform"] = Field("global", description="units ranked over all layers together, or as many in every layer")
    layers: int | None = Field(None, ge=1, description="'uniform': how many layers stay, the middle ones; null: all")
    scores: Literal["importance", "random"] = Field("importance", description="'random' removes units by lot, the baseline")
    multiple: int = Field(8, ge=1, le=1024, description="width and neurons are rounded to multiples of it")
    calibration_batches: int = Field(16, ge=1, le=10_000, description="batches of training text over which importance is averaged")
    calibration_rows: int = Field(8, ge=1, le=4096, description="rows of a calibration batch")

    @model_validator(mode="after")
    def _one_size(self) -> PruningConfig:
        if self.sparsity is not None and self.parameters is not None:
            raise ValueError("'sparsity' and 'parameters' both say how much stays: leave one out.")
        if self.layers is not None and self.cut != "uniform":
            raise ValueError("'layers' belongs to the cut 'uniform'.")
        return self


def shape_of(model: nn.Module) -> DecoderShape:
    """The shape of a teacher that can be pruned: a `Decoder`, or a Llama of transformers.

    Raises:
        InputError: it is neither.
    """
    return model.shape if isinstance(model, Decoder) else llama_shape(model.network if isinstance(model, CausalLM) else model)


def as_decoder(model: nn.Module) -> Decoder:
    """The teacher as something that can be pruned: a `Decoder` itself, a Llama converted (its weights copied). Raises as `shape_of`."""
    if isinstance(model, Decoder):
        return model
    return from_llama(model.deployed().network if isinstance(model, CausalLM) else model)


def size(model: LanguageModel) -> int:
    """Weights of a language model, embeddings and head left out."""
    outside = {id(model.head().weight_Vd), *(id(part.weight) for part in model.modules() if isinstance(part, nn.Embedding))}
    return sum(p.numel() for p in model.parameters() if id(p) not in outside)


def calibration(data: Data, config: PruningConfig, seed: int, device: torch.device) -> Iterator[TokenBatch]:
    """Batches of training rows drawn without replacement, as long as they last; for importance."""
    rows = torch.randperm(len(data), generator=seeds.generator(seed, "calibration"))[: config.calibration_batches * config.calibration_rows]
    for ids in rows.split(config.calibration_rows):
        yield TokenBatch.from_inputs(data.prepare(data.fetch(ids)[0])).to(device)


def target_shape(shape: DecoderShape, scores: Importance, config: PruningConfig, parameters: int) -> tuple[DecoderShape, tuple[int, ...]]:
    """The student's shape and which layers of the teacher are its own. parameters: the size wanted where the configuration gives no sparsity."""
    uniform = partial(uniform_shape, shape, layers=config.layers, multiple=config.multiple)
    everything = tuple(range(len(shape.layers)))
    if config.sparsity is not None:
        removed = whole_percent(component_sparsity(config.sparsity))
        return uniform(removed) if config.cut == "uniform" else (global_shape(shape, scores, removed, multiple=config.multiple), everything)
    if config.cut == "uniform":
        return nearest_shape(lambda removed: uniform(removed)[0], parameters), uniform(0.0)[1]
    return nearest_shape(lambda removed: global_shape(shape, scores, removed, multiple=config.multiple), parameters), everything


def check_size(teacher: DecoderShape, parameters: int) -> None:
    """Raise InputError where a student of so many weights (embeddings aside) cannot be cut out of the teacher."""
    if parameters > teacher.layer_parameters:
        raise InputError(
            f"a student of {parameters:,} weights cannot be cut out of a teacher of {teacher.layer_parameters:,} (embeddings aside).",
            where="method.parameters",
            fix="Ask for fewer, take a smaller student, or choose a larger teacher.",
        )


def pruned(teacher: Decoder, data: Data, config: PruningConfig, parameters: int, seed: int) -> Decoder:
    """The pruned teacher in float32, on the teacher's device, ready to be trained. parameters: the size wanted where the configuration gives no sparsity."""
    if config.scores == "random":
        scores = random_importance(teacher.shape, seeds.generator(seed, "random pruning"))
    else:
        scores = importance(teacher, calibration(data, config, seed, teacher.embedding.weight.device))
    shape, layers = target_shape(teacher.shape, scores, config, parameters)
    return cut(reordered(teacher, scores), shape, layers).float().requires_grad_(True)


def described(student: Decoder, teacher: DecoderShape) -> dict[str, Any]:
    """Sizes for the report, embeddings counted and not, and the units of every layer."""
    own = student.shape
    return {
        "student_parameters": own.parameters,
        "student_parameters_without_embeddings": own.layer_parameters,
        "teacher_parameters": teacher.parameters,
        "teacher_parameters_without_embeddings": teacher.layer_parameters,
        "teacher_to_student": round(teacher.layer_parameters / own.layer_parameters, 3),
        "sparsity": round(1 - own.layer_parameters / teacher.layer_parameters, 4),
        "width": own.width,
        "heads": [LayerShape(*layer).query_heads for layer in own.layers],
        "neurons": [LayerShape(*layer).ffn for layer in own.layers],
    }
