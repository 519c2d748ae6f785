"""Networks of Hugging Face diffusers as denoisers: a U-Net with or without classes, one with text, a DiT. Random weights, or a folder's; never the network.

Catalogue builders: `diffusers_unet`, `diffusers_unet_condition`, `diffusers_dit`. Inputs are [B, C, H, W] (images or latents); `time` goes in as it is,
which for the schedule 'vp' is the step n = 1000 t that these networks were trained with. Where a network puts out variances beside its prediction (twice
the channels), they are left out.
"""

from __future__ import annotations

import importlib
import inspect
import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from limbeck.diffusion.build import Schedule, schedule_of
from limbeck.diffusion.denoisers import NetworkDenoiser, Precondition
from limbeck.diffusion.schedules import Kind
from limbeck.errors import InputError, LimbeckError, MissingExtra, suggestion
from limbeck.models.arguments import image_shape, truth, whole_number

MODEL_CONFIG, PIPELINE_CONFIG, SCHEDULER_CONFIG = "config.json", "model_index.json", "scheduler_config.json"
SCHEDULERS = ("DDPM", "DDIM", "PNDM", "LMSDiscrete", "EulerDiscrete", "EulerAncestralDiscrete", "HeunDiscrete", "DPMSolverMultistep", "UniPCMultistep", "LCM")
"""Schedulers of diffusers that say with β's how their network was trained."""
PREDICTIONS: Mapping[str, Kind] = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}


def library() -> Any:
    """diffusers, imported. Raises MissingExtra."""
    try:
        return importlib.import_module("diffusers")
    except ModuleNotFoundError as error:
        raise MissingExtra(error.name or "diffusers", "diffusion", why="a network of diffusers") from error


# ---- networks -------------------------------------------------------------------------------------------------------------


class _Enough(Exception):
    """The deepest tap has been reached."""


class AdaptedNetwork(nn.Module, ABC):
    """A model of diffusers as network(x, time, cond), with features read by hooks.

    Attributes: model (of diffusers), shape (of one sample), num_classes (labels 0..num_classes−1, num_classes the null class; 0: none).
    The batch is read as x.shape[0], never len(x), which an ONNX export would take for a constant.
    """

    def __init__(self, model: nn.Module, shape: Sequence[int], num_classes: int) -> None:
        super().__init__()
        self.model, self.shape, self.num_classes = model, tuple(shape), num_classes

    @property
    @abstractmethod
    def places(self) -> Mapping[str, tuple[str, int]]:
        """Tap → (the submodule of `model` whose output it is, channels), in the order of computation."""

    @abstractmethod
    def call(self, x: Tensor, time: Tensor, cond: Tensor | None) -> Tensor:
        """What the model puts out, [B, C or 2C, H, W]; time [B]."""

    def feature(self, output: Tensor) -> Tensor:
        """The output of a tap's submodule as a map [B, channels, height, width]."""
        return output

    @property
    def taps(self) -> Mapping[str, int]:
        """Names of the places whose features can be read → channels."""
        return {name: channels for name, (_, channels) in self.places.items()}

    def forward(self, x: Tensor, time: Tensor, cond: Tensor | None = None) -> Tensor:
        """The prediction [B, *shape]. x: [B, *shape]; time: [B], [1] or []; cond: [B] int64 labels, embeddings where the model takes them, None: null.

        Raises:
            InputError: x has another shape, or a condition goes to a network without.
        """
        self._check(x, cond, ())
        return self.call(x, time.reshape(-1).expand(x.shape[0]), cond)[:, : x.shape[1]]

    def features(self, x: Tensor, time: Tensor, cond: Tensor | None, taps: Sequence[str]) -> dict[str, Tensor]:
        """The features at the taps, [B, channels, height, width] each; nothing behind the deepest of them runs.

        Raises:
            InputError: as `forward`; or there is no such tap.
        """
        wanted = self._check(x, cond, taps)
        if not wanted:
            return {}
        with self._listening(wanted, stop=True) as found, suppress(_Enough):
            self.call(x, time.reshape(-1).expand(x.shape[0]), cond)
        return found

    def forward_with(self, x: Tensor, time: Tensor, cond: Tensor | None, taps: Sequence[str]) -> tuple[Tensor, dict[str, Tensor]]:
        """The prediction and the features of one pass; see `forward` and `features`."""
        with self._listening(self._check(x, cond, taps), stop=False) as found:
            return self(x, time, cond), found

    @contextmanager
    def _listening(self, taps: Sequence[str], *, stop: bool) -> Iterator[dict[str, Tensor]]:
        found: dict[str, Tensor] = {}

        def listen(name: str) -> Any:
            def hook(module: nn.Module, inputs: Any, output: Any) -> None:
                found[name] = self.feature(output[0] if isinstance(output, tuple) else output)
                if stop and len(found) == len(taps):
                    raise _Enough

            return self.model.get_submodule(self.places[name][0]).register_forward_hook(hook)

        handles = [listen(name) for name in taps]
        try:
            yield found
        finally:
            for handle in handles:
                handle.remove()

    def _check(self, x: Tensor, cond: Tensor | None, taps: Sequence[str]) -> list[str]:
        if x.shape[1:] != self.shape:
            raise InputError(f"inputs of shape {tuple(x.shape[1:])}, but this network is built for {self.shape}.", where="x")
        if cond is not None and not self.conditional:
            raise InputError("this network has no classes, but got labels.", where="cond", fix="Pass cond=None.")
        wanted = [taps] if isinstance(taps, str) else list(dict.fromkeys(taps))
        for name in wanted:
            if name not in self.places:
                raise InputError(f"{type(self.model).__name__} has no tap '{name}'.", where="taps", fix=suggestion(name, self.places))
        return wanted

    @property
    def conditional(self) -> bool:
        """Whether it takes conditions."""
        return bool(self.num_classes)

    def labels(self, cond: Tensor | None, x: Tensor) -> Tensor:
        """[B] labels; the null class for None."""
        return torch.full((x.shape[0],), self.num_classes, dtype=torch.long, device=x.device) if cond is None else cond


def _blocks(model: Any) -> Mapping[str, tuple[str, int]]:
    """The places of a U-Net of diffusers: `down1`, … (after halving), `bottleneck` where there is a middle, `up1`, … (after doubling)."""
    channels = list(model.config.block_out_channels)
    found = {f"down{i}": (f"down_blocks.{i - 1}", c) for i, c in enumerate(channels, 1)}
    if model.mid_block is not None:
        found["bottleneck"] = ("mid_block", channels[-1])
    return found | {f"up{i}": (f"up_blocks.{i - 1}", c) for i, c in enumerate(reversed(channels), 1)}


class UNet(AdaptedNetwork):
    """diffusers' UNet2DModel; class labels where it has a class embedding, whose last row is the null class's.

    A model with a row a class and none for null gets one more, of zeros: what it does without a label has to be trained.

    Raises:
        InputError: the model has another number of classes, or knows classes or time in a way that does not fit.
    """

    def __init__(self, model: nn.Module, shape: Sequence[int], num_classes: int) -> None:
        given: Any = model
        if given.config.time_embedding_type != "positional":
            raise InputError(f"the time embedding '{given.config.time_embedding_type}' is not supported.", where="model", fix="Only 'positional' is.")
        table = given.class_embedding
        if table is not None and not isinstance(table, nn.Embedding):
            raise InputError(f"classes of the type '{given.config.class_embed_type}' are not supported.", where="model", fix="Use num_class_embeds alone.")
        if table is not None and num_classes and table.num_embeddings == num_classes:
            with torch.no_grad():
                longer = nn.Embedding(num_classes + 1, table.embedding_dim)
                longer.weight.zero_()
                longer.weight[:-1] = table.weight
            given.class_embedding = table = longer
            given.register_to_config(num_class_embeds=num_classes + 1)
        if table is not None and table.num_embeddings != num_classes + 1:
            raise InputError(f"the model has {table.num_embeddings} class embeddings, the data {num_classes} classes and the null class.", where="model")
        super().__init__(model, shape, num_classes if table is not None else 0)
        self.has_table = table is not None

    @property
    def places(self) -> Mapping[str, tuple[str, int]]:
        """See `_blocks`."""
        return _blocks(self.model)

    def call(self, x: Tensor, time: Tensor, cond: Tensor | None) -> Tensor:
        """See `AdaptedNetwork`."""
        return self.model(x, time, class_labels=self.labels(cond, x) if self.has_table else None, return_dict=False)[0]


class DiT(AdaptedNetwork):
    """diffusers' DiTTransformer2DModel: labels with a null class. Its own dropping of labels while training is off: the method drops them.

    Taps `block1`, … and `bottleneck`, another name for the middle one: tokens as maps [B, width, height/patch, width/patch].
    """

    def __init__(self, model: nn.Module, shape: Sequence[int], num_classes: int) -> None:
        given: Any = model
        known = given.config.num_embeds_ada_norm
        if known != max(num_classes, 1):
            raise InputError(f"the model has {known} classes, the data have {num_classes}.", where="model")
        super().__init__(model, shape, num_classes)
        self.side = given.config.sample_size // given.config.patch_size
        for part in model.modules():
            if hasattr(part, "dropout_prob") and hasattr(part, "embedding_table"):
                part.dropout_prob = 0.0  # type: ignore[assignment]

    @property
    def places(self) -> Mapping[str, tuple[str, int]]:
        """The transformer's blocks."""
        model: Any = self.model
        count, width = len(model.transformer_blocks), model.inner_dim
        blocks = {f"block{i}": (f"transformer_blocks.{i - 1}", width) for i in range(1, count + 1)}
        return blocks | {"bottleneck": (f"transformer_blocks.{(count - 1) // 2}", width)}

    def feature(self, output: Tensor) -> Tensor:
        """Tokens [B, N, D] → [B, D, side, side]."""
        return output.transpose(1, 2).unflatten(2, (self.side, self.side))

    def call(self, x: Tensor, time: Tensor, cond: Tensor | None) -> Tensor:
        """See `AdaptedNetwork`. A model for data without classes has one class that nothing uses, and the null class 1."""
        labels = self.labels(cond, x) if self.num_classes else torch.ones(x.shape[0], dtype=torch.long, device=x.device)
        return self.model(x, timestep=time, class_labels=labels, return_dict=False)[0]


class TextUNet(AdaptedNetwork):
    """diffusers' UNet2DConditionModel over a table of prompts: [K + 1, L, E] text embeddings, the last one of the empty prompt (null).

    cond: [B] int64 numbers of prompts (K: null), or [B, L, E] embeddings themselves, or None: null for all. The table belongs to the weights (a buffer).

    Raises:
        InputError: the embeddings do not fit the model, or it wants more than text.
    """

    prompts: Tensor

    def __init__(self, model: nn.Module, shape: Sequence[int], prompts: Tensor) -> None:
        config: Any = model.config
        wants = [name for name in ("class_embed_type", "addition_embed_type", "encoder_hid_dim_type", "num_class_embeds") if config.get(name) is not None]
        if wants or config.get("time_cond_proj_dim") is not None:
            raise InputError(f"a text U-Net that also wants '{(wants or ['time_cond_proj_dim'])[0]}' is not supported.", where="model")
        width = config.cross_attention_dim
        widths = {width} if isinstance(width, int) else set(width)
        if prompts.dim() != 3 or widths != {prompts.shape[-1]}:
            raise InputError(f"the model takes text of width {sorted(widths)}, the embeddings are {list(prompts.shape)}.", where="embeddings")
        super().__init__(model, shape, len(prompts) - 1)
        self.register_buffer("prompts", prompts.float().clone())

    @property
    def places(self) -> Mapping[str, tuple[str, int]]:
        """See `_blocks`."""
        return _blocks(self.model)

    @property
    def conditional(self) -> bool:
        """Always: embeddings can be given where there is no table."""
        return True

    def embeddings(self, cond: Tensor | None, count: int) -> Tensor:
        """[count, L, E] of prompt numbers, embeddings, or None."""
        if cond is None:
            return self.prompts[-1:].expand(count, -1, -1)
        return cond if cond.is_floating_point() else self.prompts[cond]

    def call(self, x: Tensor, time: Tensor, cond: Tensor | None) -> Tensor:
        """See `AdaptedNetwork`."""
        return self.model(x, time, encoder_hidden_states=self.embeddings(cond, x.shape[0]).to(x.dtype), return_dict=False)[0]


# ---- denoisers ------------------------------------------------------------------------------------------------------------


class DiffusersDenoiser(NetworkDenoiser):
    """A `NetworkDenoiser` around an adapted network that knows what builds it again without a folder: a builder's name and its arguments (JSON values)."""

    builder: str
    arguments: Mapping[str, Any]

    def null(self, count: int, device: torch.device) -> Tensor | None:
        """`count` null conditions: labels, or [count, L, E] embeddings of the empty prompt where there is no table of prompts."""
        network: Any = self.network
        return network.embeddings(None, count).to(device) if isinstance(network, TextUNet) and not self.num_classes else super().null(count, device)


@dataclass(frozen=True)
class Trained:
    """How a folder's network was trained: what its scheduler says."""

    schedule: dict[str, Any]
    prediction: Kind


def diffusers_unet(
    input_shape: Sequence[int],
    num_classes: int,
    model: str | Mapping[str, Any],
    schedule: Schedule | None = None,
    prediction: Kind | None = None,
    precondition: Precondition = "none",
    sigma_data: float = 0.5,
    conditional: bool = True,
) -> DiffusersDenoiser:
    """diffusers' UNet2DModel as a denoiser.

    Args:
        model: its configuration (`{block_out_channels: [32, 64], …}`; channels, size and classes follow the data unless set; random weights), a folder with
            config.json and weights, or a pipeline's folder.
        schedule, prediction: null: what the pipeline's scheduler says, else vp, and eps ('velocity' for flow).
        precondition, sigma_data: see `NetworkDenoiser`. conditional: classes as conditions; a folder's model has them or not, whatever this says.

    Raises:
        InputError: a field, folder or scheduler is unknown or does not fit. MissingExtra: diffusers is not installed.
    """
    channels, height, width = image_shape(input_shape)
    classes = num_classes if truth(conditional, "conditional") else 0
    own = {"num_class_embeds": classes + 1} if classes else {}
    network, trained = _Source("UNet2DModel", "unet", model).read(_sides(channels, height, width) | own)
    made = UNet(network, input_shape, classes if network.class_embedding is not None else 0)
    return _denoiser(made, trained, schedule, prediction, precondition, sigma_data, {"conditional": conditional})


def diffusers_dit(
    input_shape: Sequence[int],
    num_classes: int,
    model: str | Mapping[str, Any],
    schedule: Schedule | None = None,
    prediction: Kind | None = None,
    precondition: Precondition = "none",
    sigma_data: float = 0.5,
    conditional: bool = True,
) -> DiffusersDenoiser:
    """diffusers' DiTTransformer2DModel as a denoiser of square images or latents.

    Arguments and errors as `diffusers_unet`; a folder's model has the data's classes.
    """
    channels, height, width = image_shape(input_shape)
    if height != width:
        raise InputError(f"a DiT takes square images, not {height}×{width}.", where="input_shape")
    classes = num_classes if truth(conditional, "conditional") else 0
    own = {"in_channels": channels, "sample_size": height, "num_embeds_ada_norm": max(classes, 1)}
    network, trained = _Source("DiTTransformer2DModel", "transformer", model, also=("Transformer2DModel",)).read(own)
    if (size := int(network.config.sample_size)) != height:
        raise InputError(f"the model is built for {size}×{size}, the data are {height}×{width}.", where="model")
    return _denoiser(DiT(network, input_shape, classes), trained, schedule, prediction, precondition, sigma_data, {"conditional": conditional})


def diffusers_unet_condition(
    input_shape: Sequence[int],
    num_classes: int,
    model: str | Mapping[str, Any],
    embeddings: str | None = None,
    tokens: int = 77,
    schedule: Schedule | None = None,
    prediction: Kind | None = None,
    precondition: Precondition = "none",
    sigma_data: float = 0.5,
) -> DiffusersDenoiser:
    """diffusers' UNet2DConditionModel as a denoiser; labels are numbers of prompts in a table of text embeddings (see `TextUNet`).

    Args:
        model, schedule, prediction, precondition, sigma_data: as for `diffusers_unet`.
        embeddings: a safetensors file with `prompts` [K, L, E], K the data's number of classes, and `null` [L, E] (`latents.write_embeddings` makes one).
            None: random ones of `tokens` rows each, for a network without text and for tests.

    Raises:
        InputError: as `diffusers_unet`, or the file holds something else.
    """
    table = None if embeddings is None else read_embeddings(embeddings)
    return text_denoiser(input_shape, num_classes, model, table, tokens, schedule, prediction, precondition, sigma_data)


def text_denoiser(
    input_shape: Sequence[int],
    num_classes: int,
    model: str | Mapping[str, Any],
    table: Tensor | None,
    tokens: int = 77,
    schedule: Schedule | None = None,
    prediction: Kind | None = None,
    precondition: Precondition = "none",
    sigma_data: float = 0.5,
) -> DiffusersDenoiser:
    """As `diffusers_unet_condition`, of a table [K + 1, L, E] itself; None: random. Raises what it raises."""
    channels, height, width = image_shape(input_shape)
    network, trained = _Source("UNet2DConditionModel", "unet", model).read(_sides(channels, height, width))
    if table is None:
        table = torch.randn(num_classes + 1, whole_number(tokens, "tokens"), _text_width(network))
    if len(table) != num_classes + 1:
        raise InputError(f"there are {len(table) - 1} prompts, the data have {num_classes} classes.", where="embeddings")
    made = TextUNet(network, input_shape, table)
    return _denoiser(made, trained, schedule, prediction, precondition, sigma_data, {"tokens": table.shape[1]})


def read_embeddings(file: str | Path) -> Tensor:
    """[K + 1, L, E] float32: the prompts of a safetensors file, and last the empty prompt. Raises InputError."""
    if not Path(file).is_file():
        raise InputError("there is no such file.", where=str(file), fix="Make it with limbeck.diffusion.latents.write_embeddings.")
    try:
        held = safetensors.torch.load_file(file)
    except SafetensorError as error:
        raise InputError(f"not a safetensors file: {error}.", where=str(file)) from error
    if {"prompts", "null"} - held.keys() or held["prompts"].dim() != 3 or held["null"].shape != held["prompts"].shape[1:]:
        raise InputError("it must hold 'prompts' [K, L, E] and 'null' [L, E].", where=str(file))
    return torch.cat([held["prompts"], held["null"][None]]).float()


BUILDERS: Mapping[type[AdaptedNetwork], str] = {UNet: "diffusers_unet", DiT: "diffusers_dit", TextUNet: "diffusers_unet_condition"}
"""Names in `limbeck.models.CATALOGUE`."""


def _text_width(network: Any) -> int:
    width = network.config.cross_attention_dim
    return int(width if isinstance(width, int) else width[0])


def _sides(channels: int, height: int, width: int) -> dict[str, Any]:
    return {"in_channels": channels, "out_channels": channels, "sample_size": height if height == width else [height, width]}


def _denoiser(
    network: AdaptedNetwork,
    trained: Trained | None,
    schedule: Schedule | None,
    prediction: Kind | None,
    precondition: Precondition,
    sigma_data: float,
    more: Mapping[str, Any],
) -> DiffusersDenoiser:
    """The denoiser, and how to build it again: the model's configuration in place of a folder."""
    config: Any = network.model.config
    channels = network.shape[0]
    if config.in_channels != channels:
        raise InputError(f"the model takes {config.in_channels} channels, the data have {channels}.", where="model")
    if (config.get("out_channels") or channels) not in (channels, 2 * channels):
        raise InputError(f"the model puts out {config.out_channels} channels for {channels}.", where="model")
    chosen: Schedule = schedule if schedule is not None else trained.schedule if trained is not None else "vp"
    made = schedule_of(chosen)
    if prediction is None:
        usual: Kind = "velocity" if made.name == "flow" else "eps"
        prediction = "x0" if precondition != "none" else trained.prediction if trained is not None else usual
    denoiser = DiffusersDenoiser(network, made, prediction=prediction, precondition=precondition, sigma_data=sigma_data)
    fields = {key: value for key, value in json.loads(network.model.to_json_string()).items() if not key.startswith("_")}  # type: ignore[operator]
    denoiser.builder = BUILDERS[type(network)]
    denoiser.arguments = {
        "model": fields, "schedule": chosen if isinstance(chosen, str) else dict(chosen), "prediction": prediction, "precondition": precondition,
        "sigma_data": float(sigma_data), **more,
    }  # fmt: skip
    return denoiser


# ---- configurations and folders -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Source:
    """Where a model comes from: the class in diffusers, its folder's name within a pipeline, and the configuration or folder that was given."""

    kind: str
    part: str
    given: str | Mapping[str, Any]
    also: tuple[str, ...] = ()
    """Names of the class in older folders."""
    where: ClassVar[str] = "model"

    def read(self, own: Mapping[str, Any]) -> tuple[Any, Trained | None]:
        """The model (`own`: fields that a configuration does not have to set), and how it was trained where a folder says so. Raises InputError."""
        cls = getattr(library(), self.kind)
        if isinstance(self.given, Mapping):
            return self._of_config(cls, own), None
        folder = Path(str(self.given))
        if not folder.is_dir():
            raise InputError(f"there is no folder '{folder}'.", where=self.where, fix="Give a configuration or a folder on disk; nothing is fetched.")
        trained = None
        if (folder / PIPELINE_CONFIG).is_file():
            scheduler = folder / "scheduler"
            trained = trained_with(scheduler) if scheduler.is_dir() else None
            folder = folder / self.part
        if not (folder / MODEL_CONFIG).is_file():
            raise InputError(f"there is no {MODEL_CONFIG} in it.", where=str(folder), fix=f"Give the folder of a {self.kind}, or of a pipeline that has one.")
        self._check_kind(_json(folder / MODEL_CONFIG), str(folder))
        with _refusals(str(folder)):
            return cls.from_pretrained(folder, local_files_only=True, torch_dtype=torch.float32), trained

    def _of_config(self, cls: Any, own: Mapping[str, Any]) -> Any:
        assert isinstance(self.given, Mapping)
        self._check_kind(self.given, self.where)
        fields = {key: value for key, value in self.given.items() if not str(key).startswith("_")}
        known = [name for name in inspect.signature(cls.__init__).parameters if name != "self"]
        for name in fields:
            if name not in known:
                raise InputError(f"{self.kind} has no field '{name}'.", where=f"{self.where}.{name}", fix=suggestion(name, known))
        with _refusals(self.where):
            return cls(**{**own, **fields})

    def _check_kind(self, config: Mapping[str, Any], where: str) -> None:
        said = config.get("_class_name")
        if said is not None and said not in (self.kind, *self.also):
            raise InputError(f"this is a {said}, not a {self.kind}.", where=where)


def trained_with(folder: Path) -> Trained:
    """Schedule and prediction of a scheduler's folder.

    Raises:
        InputError: the scheduler is none that says so, or its β's are none of the schedule 'vp'.
    """
    file = folder / SCHEDULER_CONFIG
    said = _json(file)
    name, where = str(said.get("_class_name")), str(file)
    if name == "FlowMatchEulerDiscreteScheduler":
        return Trained({"name": "flow"}, "velocity")
    if name.removesuffix("Scheduler") not in SCHEDULERS:
        raise InputError(f"the scheduler '{name}' is not known.", where=where, fix=f"Known: {', '.join(SCHEDULERS)}, or set 'schedule' and 'prediction'.")
    betas, count = said.get("beta_schedule", "linear"), said.get("num_train_timesteps", 1000)
    if betas not in ("linear", "scaled_linear") or said.get("trained_betas") is not None or said.get("rescale_betas_zero_snr"):
        what = "'trained_betas'" if said.get("trained_betas") is not None else f"'{betas}'" if betas not in ("linear", "scaled_linear") else "rescaled β's"
        raise InputError(f"{what} make no schedule of limbeck's.", where=where, fix="linear and scaled_linear do.")
    if count != 1000:
        raise InputError(f"the network counts {count} steps; limbeck tells it 1000 t.", where=where)
    kind = said.get("prediction_type", "epsilon")
    if kind not in PREDICTIONS:
        raise InputError(f"unknown prediction_type '{kind}'.", where=where, fix=suggestion(str(kind), PREDICTIONS))
    schedule = {"name": "vp", "beta_start": said.get("beta_start", 0.0001), "beta_end": said.get("beta_end", 0.02), "kind": betas}
    return Trained(schedule, PREDICTIONS[kind])


def _json(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError("there is no such file.", where=str(file)) from error
    except ValueError as error:
        raise InputError("not a JSON file.", where=str(file)) from error
    if not isinstance(found, dict):
        raise InputError("not a JSON object.", where=str(file))
    return found


@contextmanager
def _refusals(where: str) -> Iterator[None]:
    """Whatever diffusers raises while building becomes an InputError."""
    try:
        yield
    except LimbeckError:
        raise
    except Exception as error:
        raise InputError(f"diffusers refuses it ({type(error).__name__}: {' '.join(str(error).split())[:300]}).", where=where) from error
