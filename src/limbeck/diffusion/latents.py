"""Stable Diffusion folders: images as latents, prompts as embeddings, and the whole pipeline as a denoiser of latents given prompts. Nothing is fetched.

limbeck's conditions are class labels. Here a label is the number of a prompt: the denoiser holds the table of their embeddings, and the label `num_classes`,
elsewhere the null class, is the empty prompt (`adapters.TextUNet`). So every method, guidance and the evaluation work on text as they do on classes; the
price is that the prompts are a list that is known beforehand.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from limbeck.data.arrays import ArrayData
from limbeck.data.splits import Splits, hold_out
from limbeck.diffusion.adapters import PIPELINE_CONFIG, DiffusersDenoiser, library, text_denoiser
from limbeck.diffusion.build import Schedule
from limbeck.diffusion.schedules import Kind
from limbeck.errors import InputError, MissingExtra
from limbeck.files import write_atomic

PARTS = {"vae": ("AutoencoderKL",), "text_encoder": ("CLIPTextModel",), "tokenizer": ("CLIPTokenizer", "CLIPTokenizerFast")}
"""What a folder must hold beside the U-Net."""


@dataclass(frozen=True)
class TextPipeline:
    """VAE, text encoder and tokenizer of a StableDiffusionPipeline's folder, in eval mode; see `open_pipeline`."""

    vae: Any
    text_encoder: Any
    tokenizer: Any

    @torch.no_grad()
    def encode(self, images: Tensor, batch_size: int = 8) -> Tensor:
        """Images [N, 3, H, W] in [0, 1] → latents [N, C, H/8, W/8]: the mode of the VAE's posterior times its scaling factor, as the U-Net saw them."""
        found = [self.vae.encode(2 * part.to(self._device()) - 1).latent_dist.mode() for part in images.float().split(batch_size)]
        return torch.cat(found).cpu() * self.vae.config.scaling_factor

    @torch.no_grad()
    def decode(self, latents: Tensor, batch_size: int = 8) -> Tensor:
        """Latents → images [N, 3, H, W] in [0, 1]."""
        parts = (latents.float() / self.vae.config.scaling_factor).split(batch_size)
        return torch.cat([self.vae.decode(part.to(self._device())).sample.cpu() for part in parts]).add(1).div(2).clamp(0, 1)

    @torch.no_grad()
    def embed(self, prompts: Sequence[str], batch_size: int = 64) -> Tensor:
        """Prompts → [K, L, E] float32, padded and cut to the tokenizer's length, as the pipeline does; "" is the null prompt."""
        found = []
        for first in range(0, len(prompts), batch_size):
            texts, length = list(prompts[first : first + batch_size]), self.tokenizer.model_max_length
            tokens = self.tokenizer(texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
            found.append(self.text_encoder(tokens.input_ids.to(self.text_encoder.device))[0].float().cpu())
        return torch.cat(found)

    def table(self, prompts: Sequence[str]) -> Tensor:
        """[K + 1, L, E]: the prompts, and last the empty one."""
        return self.embed([*prompts, ""])

    def _device(self) -> torch.device:
        return self.vae.device


def open_pipeline(path: str | Path, device: str | torch.device = "cpu", parts: Sequence[str] = tuple(PARTS)) -> TextPipeline:
    """The parts of a pipeline's folder beside the U-Net.

    parts: which of vae, text_encoder and tokenizer; the others are None.

    Raises:
        InputError: there is no such folder, or it is no Stable Diffusion pipeline. MissingExtra: diffusers or transformers is not installed.
    """
    folder = Path(path)
    if not (folder / PIPELINE_CONFIG).is_file():
        raise InputError(f"there is no {PIPELINE_CONFIG} in it.", where=str(folder), fix="Give the folder of a pipeline on disk; nothing is fetched.")
    try:
        said = json.loads((folder / PIPELINE_CONFIG).read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError("not a JSON file.", where=str(folder / PIPELINE_CONFIG)) from error
    found: dict[str, Any] = {}
    for part in PARTS:
        if part not in parts:
            continue
        kind = (said.get(part) or [None, None])[1]
        if kind not in PARTS[part]:
            raise InputError(f"its {part} is {kind}, not {PARTS[part][0]}.", where=str(folder), fix="Give a Stable Diffusion 1 or 2 pipeline.")
        source = library() if part == "vae" else _transformers()
        try:
            made = getattr(source, kind).from_pretrained(folder / part, local_files_only=True)
        except Exception as error:  # of two libraries, of any class
            raise InputError(f"cannot be opened ({type(error).__name__}: {' '.join(str(error).split())[:300]}).", where=str(folder / part)) from error
        found[part] = made if part == "tokenizer" else made.float().to(device).eval().requires_grad_(False)
    return TextPipeline(*(found.get(part) for part in PARTS))


def _transformers() -> Any:
    try:
        return importlib.import_module("transformers")
    except ModuleNotFoundError as error:
        raise MissingExtra("transformers", "language", why="a text encoder") from error


# ---- the denoiser ---------------------------------------------------------------------------------------------------------


def diffusers_pipeline(
    input_shape: Sequence[int],
    num_classes: int,
    path: str,
    prompts: str | Sequence[str],
    schedule: Schedule | None = None,
    prediction: Kind | None = None,
) -> DiffusersDenoiser:
    """A StableDiffusionPipeline's U-Net and scheduler as a denoiser of latents, conditioned on a list of prompts.

    What is saved of it is a `diffusers_unet_condition` with the table of embeddings among its weights; neither folder nor text encoder is needed again.

    Args:
        path: the pipeline's folder. prompts: K of them, or a text file with one a line; K is the data's number of classes.
        schedule, prediction: null: what the pipeline's scheduler says.

    Raises:
        InputError: the folder is no such pipeline, or the prompts are not as many as classes. MissingExtra: a package is not installed.
    """
    listed = read_prompts(prompts) if isinstance(prompts, str) else [str(prompt) for prompt in prompts]
    if len(listed) != num_classes:
        raise InputError(f"there are {len(listed)} prompts, the data have {num_classes} classes.", where="prompts")
    table = open_pipeline(path, parts=("text_encoder", "tokenizer")).table(listed)
    return text_denoiser(input_shape, num_classes, path, table, schedule=schedule, prediction=prediction)


def read_prompts(file: str | Path) -> list[str]:
    """The lines of a text file that are not empty. Raises InputError."""
    try:
        lines = Path(file).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot be read ({type(error).__name__}).", where=str(file), fix="Give a UTF-8 text file with one prompt a line.") from error
    return [line.strip() for line in lines if line.strip()]


# ---- data -----------------------------------------------------------------------------------------------------------------


def write_embeddings(pipeline: TextPipeline, prompts: Sequence[str], file: str | Path) -> Path:
    """`prompts` [K, L, E] and `null` [L, E] as a safetensors file, for `diffusers_unet_condition`. The file is whole or absent."""
    return _write(file, _embedded(pipeline, prompts), {"classes": json.dumps(list(prompts))})


def write_latents(pipeline: TextPipeline, images: Tensor, numbers: Tensor, prompts: Sequence[str], file: str | Path) -> Path:
    """Latents of images, the number of each one's prompt, and the prompts' embeddings as one safetensors file: data for `latents`, and `embeddings`.

    images: [N, 3, H, W] in [0, 1]. numbers: [N] int64 in 0..K−1. The file is whole or absent.

    Raises:
        InputError: numbers do not fit images or prompts.
    """
    if numbers.shape != (len(images),) or (len(numbers) and not 0 <= int(numbers.min()) <= int(numbers.max()) < len(prompts)):
        raise InputError(f"each of {len(images)} images needs the number of one of {len(prompts)} prompts.", where="numbers")
    held = {"latents": pipeline.encode(images), "targets": numbers.long().cpu(), **_embedded(pipeline, prompts)}
    return _write(file, held, {"classes": json.dumps(list(prompts))})


def latents(file: str, test_size: int = 1000, seed: int = 0) -> Splits:
    """A data source: latents [N, C, h, w] and prompt numbers of `write_latents`'s file, in the U-Net's units as they are.

    Args:
        test_size: how many are held out, a share of each prompt, chosen by `seed`.

    Raises:
        InputError: the file is missing or holds something else, or the size is not possible.
    """
    if not Path(file).is_file():
        raise InputError("there is no such file.", where=str(file), fix="Make it with limbeck.diffusion.latents.write_latents.")
    try:
        with safetensors.safe_open(file, framework="pt") as held:
            if not {"latents", "targets"} <= set(held.keys()):
                raise InputError("it must hold 'latents' and 'targets'.", where=str(file), fix="Make it with limbeck.diffusion.latents.write_latents.")
            images, numbers, said = held.get_tensor("latents"), held.get_tensor("targets"), held.metadata() or {}
    except SafetensorError as error:
        raise InputError(f"not a safetensors file: {error}.", where=str(file)) from error
    classes = json.loads(said["classes"]) if "classes" in said else None
    try:
        return Splits(*hold_out(ArrayData(images, numbers, classes), test_size, seed))
    except InputError as error:
        raise InputError(error.what, where="test_size") from error


def _embedded(pipeline: TextPipeline, prompts: Sequence[str]) -> dict[str, Tensor]:
    table = pipeline.table(prompts)
    return {"prompts": table[:-1].contiguous(), "null": table[-1].contiguous()}


def _write(file: str | Path, held: Mapping[str, Tensor], said: Mapping[str, str]) -> Path:
    write_atomic(file, safetensors.torch.save({name: value.contiguous() for name, value in held.items()}, metadata=dict(said)))
    return Path(file)
