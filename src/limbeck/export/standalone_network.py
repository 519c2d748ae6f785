# mypy: ignore-errors
# (diffusers' mix-ins tell type checkers nothing)
"""limbeck's networks as a model of diffusers: written into exported folders behind the networks' own code, never imported by limbeck."""

from typing import Any

from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor

from limbeck.diffusion.networks import MLPNetwork, UNetNetwork


class Network(ModelMixin, ConfigMixin):
    """A perceptron ('mlp') or a U-Net ('unet'), called with (x [B, *shape], time [B], labels [B] or None)."""

    @register_to_config
    def __init__(self, kind: str, arguments: dict[str, Any]) -> None:
        super().__init__()
        self.network = {"mlp": MLPNetwork, "unet": UNetNetwork}[kind](**arguments)

    def forward(self, x: Tensor, time: Tensor, labels: Tensor | None = None) -> Tensor:
        """The network's output [B, *shape]."""
        return self.network(x, time, labels)
