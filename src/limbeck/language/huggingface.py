"""Causal language models of transformers as limbeck's: hidden states and head apart, packed rows, generation step by step. Nothing is ever fetched.

B rows of L tokens, T new tokens, S tokens so far, V vocabulary, d width. Weights come from a folder on disk, from a GGUF file (whose numbers are unpacked once
and kept in a cache folder, with their SHA-256), or are drawn from a configuration.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import importlib
import importlib.util
import inspect
import io
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from limbeck.contract import IGNORE
from limbeck.errors import InputError, LimbeckError, MissingExtra, suggestion
from limbeck.files import sync_folder, write_atomic, write_json
from limbeck.language.lora import LoraSpec, add_lora, merged
from limbeck.language.models import LanguageModel
from limbeck.language.signals import Head
from limbeck.language.tokenizers import cache_folder, joined_digest
from limbeck.language.tokens import TokenBatch
from limbeck.modes import evaluating

FULL, SLIDING = "full_attention", "sliding_attention"
"""Kinds of layers of transformers whose masks are known here."""
WEIGHTS, CONFIG, SUMS, CACHE_FORMAT = "model.safetensors", "config.json", "sums.json", 1


class CausalLM(LanguageModel):
    """A causal language model of transformers. The network is `network`; it is taken over, not copied.

    Attributes: vocabulary, network, lora (its adapters' spec or None), builder and arguments (how `limbeck.models` builds it again, without folders).

    Args:
        network: as `AutoModelForCausalLM` gives it. lora: adapters to put in, everything else frozen.
        gradient_checkpointing: in training, keep the inputs of each layer and compute the rest again in the backward pass.

    Raises:
        InputError: it has no output embedding, or its logits are not those of a `Head` (a scale and a soft-cap known from its configuration).
    """

    builder = "causal_lm"

    def __init__(self, network: nn.Module, *, lora: LoraSpec | None = None, gradient_checkpointing: bool = False) -> None:
        super().__init__()
        given: Any = network
        if not isinstance(given.get_output_embeddings(), nn.Linear):
            raise InputError(f"{type(network).__name__} has no linear map to logits.", where="model", fix="Use a model for causal language modelling.")
        self.network, self.lora = network, lora
        self.config = given.config
        self.vocabulary = len(given.get_output_embeddings().weight)
        accepted = inspect.signature(self._base.forward).parameters
        self._takes_positions = "position_ids" in accepted
        self._check_head()
        if lora is not None:
            add_lora(network, lora, given.get_output_embeddings())
        if gradient_checkpointing:
            given.gradient_checkpointing_enable({"use_reentrant": False})

    @property
    def arguments(self) -> Mapping[str, Any]:
        """What the builder needs to build the same architecture: JSON values."""
        own = {"model": config_fields(self.config)}
        return own if self.lora is None else own | {"lora": self.lora.model_dump(mode="json")}

    @property
    def _base(self) -> Any:
        given: Any = self.network
        return given.base_model

    def hidden(self, tokens: TokenBatch) -> Tensor:
        """See `LanguageModel`. Whole rows go through the library's fast causal path; packed rows get a block-diagonal mask and their own positions.

        Raises:
            InputError: packed rows, of a model whose positions or masks cannot be given (linear or chunked attention).
        """
        if tokens.whole:
            return self._base(input_ids=tokens.input_ids, use_cache=False).last_hidden_state
        if not self._takes_positions:
            raise InputError(f"{type(self.network).__name__} takes no positions, so rows cannot be packed.", where="data", fix="Use whole rows.")
        mask = self._masks(tokens)
        return self._base(input_ids=tokens.input_ids, attention_mask=mask, position_ids=tokens.positions, use_cache=False).last_hidden_state

    def head(self) -> Head:
        """The output embedding, with the configuration's scale and soft-cap."""
        given: Any = self.network
        linear = given.get_output_embeddings()
        return Head(linear.weight, linear.bias, _scale(self.config), getattr(self.config, "final_logit_softcapping", None))

    def step(self, input_ids_BT: Tensor, positions_BT: Tensor, attention_BS: Tensor, cache: Any = None) -> tuple[Tensor, Any]:
        """See `LanguageModel.step`; the cache is the library's, of keys and values, and is changed in place."""
        more = {"position_ids": positions_BT} if self._takes_positions else {}
        out = self._base(input_ids=input_ids_BT, attention_mask=attention_BS.long(), past_key_values=cache, use_cache=True, **more)
        return out.last_hidden_state, out.past_key_values

    def deployed(self) -> CausalLM:
        """The model as it is saved: with adapters in its weights, where it has some that are to be merged; else itself."""
        if self.lora is None or not self.lora.merge:
            return self
        plain = merged(self)
        plain.lora = None
        return plain

    def _masks(self, tokens: TokenBatch) -> Tensor | dict[str, Tensor] | None:
        """Masks of packed rows [B, 1, L, L] as the network's attention takes them, one a kind of layer where it has several."""
        allowed = tokens.attention()
        if allowed is None:
            return None
        kinds = set(getattr(self.config, "layer_types", None) or ())
        window: int | None = getattr(self.config, "sliding_window", None)
        if not kinds:
            kinds = {SLIDING if window is not None else FULL}
        if kinds - {FULL, SLIDING}:
            odd = ", ".join(sorted(kinds - {FULL, SLIDING}))
            raise InputError(f"rows cannot be packed for layers of the kind {odd}.", where="data", fix="Use whole rows.")
        made = {FULL: self._as_mask(allowed)}
        if SLIDING in kinds and window is not None:
            row = torch.arange(tokens.input_ids.shape[1], device=allowed.device)
            made[SLIDING] = self._as_mask(allowed & (row[None, :] > row[:, None] - window))
        return made if len(kinds) > 1 else made[kinds.pop()]

    def _as_mask(self, allowed: Tensor) -> Tensor:
        """bool, or what is added to the attention scores where the network adds it."""
        if self.config._attn_implementation != "eager":
            return allowed
        given: Any = self.network
        return torch.zeros(allowed.shape, dtype=given.dtype, device=allowed.device).masked_fill(~allowed, torch.finfo(given.dtype).min)

    @torch.no_grad()
    def _check_head(self) -> None:
        """Raise InputError unless hidden states and head give the network's own logits (a few tokens; not on the meta device)."""
        head = self.head()
        if head.weight_Vd.is_meta:
            return
        given: Any = self.network
        ids = torch.arange(min(self.vocabulary, 6), device=head.weight_Vd.device)[None]
        with evaluating(self):
            own = given(input_ids=ids, use_cache=False).logits.float()
            ours = head.logits(self.hidden(TokenBatch.from_inputs(torch.stack((ids, torch.full_like(ids, IGNORE)), 1)))[0])
        tolerance = 1e-5 if head.weight_Vd.dtype == torch.float32 else 5e-2
        if not torch.allclose(own[0], ours.float(), rtol=tolerance, atol=tolerance * float(own.abs().max())):
            raise InputError(
                f"{type(self.network).__name__} does something to its logits that limbeck does not know.",
                where="model",
                fix="Subclass limbeck.language.models.LanguageModel, or compare its logits by the dense fallback.",
            )


def _scale(config: Any) -> float:
    """What the head's logits are multiplied by: Cohere's `logit_scale`, one over Granite's `logits_scaling`, Falcon-H1's `lm_head_multiplier`."""
    for name in ("logit_scale", "lm_head_multiplier"):
        if isinstance(found := getattr(config, name, None), int | float):
            return float(found)
    return 1.0 / float(getattr(config, "logits_scaling", None) or 1.0)


# ---- networks of transformers: from configurations, folders, GGUF files -----------------------------------------------------


def library() -> Any:
    """transformers, imported. Raises MissingExtra."""
    try:
        return importlib.import_module("transformers")
    except ModuleNotFoundError as error:
        raise MissingExtra(error.name or "transformers", "language", why="a network of transformers") from error


def configuration(fields: Mapping[str, Any], given: Mapping[str, Any], where: str = "model") -> Any:
    """A configuration out of a recipe's fields, `model_type` among them.

    Args:
        given: values of fields that the recipe may leave out, where the type has such fields.

    Raises:
        InputError: there is no type, or it or a field is unknown (transformers would keep a misspelt field and ignore it), or a value is refused.
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES  # type: ignore[attr-defined]

    transformers = library()
    kind = str(fields.get("model_type"))
    if kind not in CONFIG_MAPPING_NAMES:
        raise InputError(f"transformers has no model type '{kind}'.", where=f"{where}.model_type", fix=suggestion(kind, CONFIG_MAPPING_NAMES))
    with refusals(where):
        known = transformers.AutoConfig.for_model(kind)
    names = {*known.to_dict(), *known.attribute_map}
    for name in fields:
        if name not in names:
            raise InputError(f"'{kind}' has no field '{name}'.", where=f"{where}.{name}", fix=suggestion(name, names))
    own = {name: value for name, value in fields.items() if name != "model_type"}
    filled = {name: value for name, value in given.items() if name in names and known.attribute_map.get(name) not in own}
    with refusals(where), quiet():
        return transformers.AutoConfig.for_model(kind, **(filled | own))


def config_fields(config: Any) -> dict[str, Any]:
    """What a configuration says beyond its type's defaults, as `configuration` takes it: JSON values."""
    ignored = {"_name_or_path", "architectures", "transformers_version", "id2label", "label2id", "dtype", "torch_dtype", "problem_type", "quantization_config"}
    known = type(config)().to_dict()
    own = json.loads(config.to_json_string(use_diff=False))
    changed = {key: value for key, value in own.items() if key in known and key not in ignored and value != known[key]}
    return {"model_type": config.model_type, **changed}


def fresh(config: Any, auto: str, **options: Any) -> Any:
    """A network with random float32 weights. auto: the name of transformers' class that picks the architecture. Raises InputError."""
    with refusals("model"), quiet():
        return getattr(library(), auto).from_config(config, trust_remote_code=False, dtype=torch.float32, **options)


def from_folder(folder: Path | str, auto: str) -> Any:
    """The network of a folder with config.json and weights, in float32; on the meta device only its shape.

    Raises:
        InputError: there is no such folder, it cannot be read, or weights are missing in it.
    """
    path = Path(folder)
    if not (path / CONFIG).is_file():
        raise InputError(f"there is no {CONFIG} in '{path}'.", where="model", fix="Give a folder on disk or a configuration; nothing is fetched.")
    transformers = library()
    with refusals(str(path)), quiet():
        if on_meta():
            config = transformers.AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
            return getattr(transformers, auto).from_config(config, trust_remote_code=False)
        network, report = getattr(transformers, auto).from_pretrained(
            path, local_files_only=True, trust_remote_code=False, dtype=torch.float32, output_loading_info=True
        )
    missing = sorted(key for key in report["missing_keys"] if "pooler" not in key)
    if missing:
        raise InputError(
            f"the weights leave out {len(missing)} tensors ({', '.join(missing[:3])}).", where=str(path), fix="Is it the folder of this kind of model?"
        )
    return network


def with_layers(network: Any, kept: Sequence[int]) -> Any:
    """The same network with these of its layers alone (new modules; weights may be shared with `network`, which is not to be used again).

    Raises:
        InputError: its stack of layers is not found.
    """
    of = int(network.config.num_hidden_layers)
    if list(kept) == list(range(of)):
        return network
    stack = stack_of(network)
    config = copy.deepcopy(network.config)
    config.num_hidden_layers = len(kept)
    for name, value in config.to_dict().items():
        if "layer" in name and isinstance(value, list) and len(value) == of:
            setattr(config, name, [value[layer] for layer in kept])
    with refusals("layers"), quiet():
        if on_meta():
            return type(network)(config)
        return type(network).from_pretrained(None, config=config, state_dict=picked(untied(network), stack, kept), dtype=torch.float32)


def stack_of(network: Any) -> str:
    """The path of the list of layers within a network. Raises InputError where there is none of the configured length."""
    for name, part in network.named_modules():
        if isinstance(part, nn.ModuleList) and len(part) == network.config.num_hidden_layers:
            return name
    raise InputError(f"the layers of {type(network).__name__} are not found.", where="layers", fix="Leave 'layers' out, or build it from a configuration.")


def picked(state: Mapping[str, Tensor], stack: str, kept: Sequence[int]) -> dict[str, Tensor]:
    """A state dict with these layers of the list at `stack`, numbered anew; everything outside it as it was."""
    place = {old: new for new, old in enumerate(kept)}
    found: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if not name.startswith(f"{stack}."):
            found[name] = tensor
            continue
        number, _, rest = name[len(stack) + 1 :].partition(".")
        if int(number) in place:
            found[f"{stack}.{place[int(number)]}.{rest}"] = tensor
    return found


def untied(network: nn.Module) -> dict[str, Tensor]:
    """A network's state dict without the names that hold the tensor of an earlier one."""
    seen: set[tuple[int, torch.Size]] = set()
    found = {}
    for name, tensor in network.state_dict().items():
        key = (tensor.data_ptr(), tensor.shape)
        if key not in seen or not tensor.numel():
            found[name] = tensor.detach()
        seen.add(key)
    return found


def from_gguf(parts: Sequence[Path]) -> Any:
    """The network of a GGUF file (or of the parts of one) with its numbers unpacked to float32; the first call leaves them in a cache, later ones read that.

    Raises:
        InputError: there is no such file, or it cannot be read. MissingExtra: transformers or gguf is not installed.
    """
    for path in parts:
        if not path.is_file():
            raise InputError("there is no such file.", where=str(path))
    place = cache_folder("weights", f"{joined_digest(parts)[:32]}-v{CACHE_FORMAT}")
    return _cached(place) or _unpacked(parts, place)


def _cached(place: Path) -> Any | None:
    """The network in a cache folder; None where there is none, or a file of it is not as it was written."""
    transformers = library()
    try:
        sums = json.loads((place / SUMS).read_text(encoding="utf-8"))
        if {name: _sum(place / name) for name in (WEIGHTS, CONFIG)} != sums:
            return None
        fields = json.loads((place / CONFIG).read_text(encoding="utf-8"))
        state = safetensors.torch.load_file(place / WEIGHTS)
    except (OSError, ValueError, SafetensorError):
        return None
    with refusals(str(place)), quiet():
        config = transformers.AutoConfig.for_model(**fields)
        network = transformers.MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
        return network.from_pretrained(None, config=config, state_dict=state, dtype=torch.float32)


def _unpacked(parts: Sequence[Path], place: Path) -> Any:
    """The network of a GGUF file, left in the cache as well where that can be written."""
    transformers = library()
    if importlib.util.find_spec("gguf") is None:
        raise MissingExtra("gguf", "language", why="reading a GGUF file")
    with tempfile.TemporaryDirectory() as work:
        file = parts[0]
        if len(parts) > 1:
            file = Path(work) / "joined.gguf"
            with file.open("wb") as joined:
                for part in parts:
                    with part.open("rb") as source:
                        shutil.copyfileobj(source, joined, 1 << 20)
        with refusals(str(parts[0])), quiet(), contextlib.redirect_stderr(io.StringIO()):
            network = transformers.AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    if hasattr(network.config, "quantization_config"):
        del network.config.quantization_config  # the weights are plain numbers now
    with contextlib.suppress(OSError):
        _keep(network, place)
    return network


def _keep(network: Any, place: Path) -> None:
    """Weights, configuration and their sums as a folder, which appears whole or not at all, and on the disk before it has its name.

    (transformers' own `save_pretrained` refuses what came out of a GGUF file.)
    """
    place.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".new-", dir=place.parent) as work:
        fresh = Path(work) / "whole"
        fresh.mkdir()
        safetensors.torch.save_file(untied(network), fresh / WEIGHTS)  # not as bytes in memory first: it may be a gigabyte
        with (fresh / WEIGHTS).open("rb") as written:
            os.fsync(written.fileno())
        write_atomic(fresh / CONFIG, network.config.to_json_string(use_diff=False))
        write_json(fresh / SUMS, {name: _sum(fresh / name) for name in (WEIGHTS, CONFIG)})
        shutil.rmtree(place, ignore_errors=True)  # one that could not be read
        fresh.rename(place)
    sync_folder(place.parent)


def _sum(file: Path) -> dict[str, Any]:
    """Length and SHA-256 (hex) of a file. It is read once a process, and again if it has changed: a second for 0.7 GB. Raises OSError."""
    found = file.stat()
    return {"bytes": found.st_size, "sha256": _digest(file, found.st_size, found.st_mtime_ns, found.st_ino)}


@lru_cache(maxsize=8)
def _digest(file: Path, *_known_by: int) -> str:
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def on_meta() -> bool:
    """Whether modules are being built without memory, to see how large they would be."""
    return torch.get_default_device().type == "meta"


@contextmanager
def refusals(where: str) -> Iterator[None]:
    """Whatever transformers raises while building becomes an InputError."""
    try:
        yield
    except LimbeckError:
        raise
    except Exception as error:
        raise InputError(f"transformers refuses it ({type(error).__name__}: {' '.join(str(error).split())[:300]}).", where=where) from error


@contextmanager
def quiet() -> Iterator[None]:
    """transformers without progress bars and loading reports, which are checked here instead."""
    from limbeck.models.adapters import silenced

    with silenced(library().utils.logging):
        yield
