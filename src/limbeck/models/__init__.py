"""Models by name: small reference networks and adapters to timm, torchvision and transformers.

`CATALOGUE` maps a short name to a builder. Builders take `num_classes` and `input_shape` (of one input, without the batch) from the run,
and return modules that map inputs [B, *input_shape] to logits [B, num_classes], denoisers and generators (`limbeck.diffusion`), or language models
(`limbeck.language`). The functions below are imported on first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from limbeck.components import import_object

if TYPE_CHECKING:
    from limbeck.models.fresh import build_model, reinitialise
    from limbeck.models.outputs import logits_of
    from limbeck.models.weights import fingerprint, load_weights

CATALOGUE = {
    "mlp": "limbeck.models.small:mlp",
    "cnn": "limbeck.models.small:cnn",
    "convnet3": "limbeck.models.small:convnet3",
    "feature_cnn": "limbeck.models.small:feature_cnn",
    "convnet": "limbeck.models.convnet:convnet",
    "alexnet_small": "limbeck.models.convnet:alexnet_small",
    "vgg11_small": "limbeck.models.convnet:vgg11_small",
    "resnet18_small": "limbeck.models.convnet:resnet18_small",
    "resnet20": "limbeck.models.resnet_cifar:resnet20",
    "resnet32": "limbeck.models.resnet_cifar:resnet32",
    "resnet44": "limbeck.models.resnet_cifar:resnet44",
    "resnet56": "limbeck.models.resnet_cifar:resnet56",
    "resnet110": "limbeck.models.resnet_cifar:resnet110",
    "resnet_cifar": "limbeck.models.resnet_cifar:resnet",
    "timm": "limbeck.models.adapters:timm",
    "torchvision": "limbeck.models.adapters:torchvision",
    "transformers": "limbeck.models.adapters:transformers",
    "mlp_denoiser": "limbeck.diffusion.build:mlp_denoiser",
    "unet_denoiser": "limbeck.diffusion.build:unet_denoiser",
    "mixture_denoiser": "limbeck.diffusion.build:mixture_denoiser",
    "mlp_generator": "limbeck.diffusion.build:mlp_generator",
    "generator": "limbeck.diffusion.build:generator",
    "direct_generator": "limbeck.diffusion.build:direct_generator",
    "consistency_generator": "limbeck.diffusion.consistency:consistency_generator",
    "signal_generator": "limbeck.diffusion.signal:signal_generator",
    "synthetic_set": "limbeck.synthetic.synthetic_set:synthetic_set",
    "diffusers_unet": "limbeck.diffusion.adapters:diffusers_unet",
    "diffusers_unet_condition": "limbeck.diffusion.adapters:diffusers_unet_condition",
    "diffusers_dit": "limbeck.diffusion.adapters:diffusers_dit",
    "diffusers_pipeline": "limbeck.diffusion.latents:diffusers_pipeline",
    "decoder": "limbeck.language.decoder:decoder",
    "causal_lm": "limbeck.language.build:causal_lm",
    "smollm2": "limbeck.language.build:smollm2",
    "columns_mlp": "limbeck.language.columns:columns_mlp",
    "gemma3": "limbeck.language.build:gemma3",
    "encoder": "limbeck.language.build:encoder",
    "minilm": "limbeck.language.build:minilm",
    "text_transformer": "limbeck.language.build:text_transformer",
}

_PUBLIC = {
    "build_model": "limbeck.models.fresh:build_model",
    "reinitialise": "limbeck.models.fresh:reinitialise",
    "logits_of": "limbeck.models.outputs:logits_of",
    "load_weights": "limbeck.models.weights:load_weights",
    "fingerprint": "limbeck.models.weights:fingerprint",
}

__all__ = ["CATALOGUE", "build_model", "fingerprint", "load_weights", "logits_of", "reinitialise"]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'limbeck.models' has no attribute '{name}'")
    return import_object(_PUBLIC[name])


def __dir__() -> list[str]:
    return sorted(__all__)
