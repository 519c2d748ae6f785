"""A network as a function of one flat vector of weights: what trajectory matching differentiates through, saves and measures distances in.

Legend: P parameters of the network, B samples, C classes. The vector holds the parameters one after the other, in the order of `module.named_parameters()`,
each in its own memory order. No gradient flows into the module's own parameters, and nothing is written to them but by `write`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from limbeck.errors import InputError
from limbeck.models import logits_of

_RATES = ("p", "dropout", "drop_prob", "drop_rate", "drop_path_rate")
"""Attributes under which modules of torch, timm and transformers keep the probability of dropping something."""

SAME = 1e-4
"""How far two answers may differ by rounding, relative to the largest output."""


class FlatNetwork:
    """The module's function θ [P] -> logits, differentiable twice in θ and in the inputs (the θ of arXiv 2203.11932; our sheet `ftd`, notation).

    The module is kept as the structure and put into train mode; there is no second copy of it, and no new one is made for new weights.

    Args:
        module: a network whose outputs are a deterministic function of weights and inputs alone.

    Attributes:
        module: the module as it was given. size: P.

    Raises:
        InputError: the module keeps running statistics or another state that calls change (spectral norm), draws random numbers in train mode (dropout and
            the like), has no parameters, or has them in several precisions or on several devices. What its modules do not tell, `check` finds.
    """

    def __init__(self, module: nn.Module) -> None:
        _must_be_a_function(module)
        parameters = dict(module.named_parameters())
        if len({(p.dtype, p.device) for p in parameters.values()}) != 1:
            fix = "Move it with module.to(...) first."
            raise InputError("the network has no parameters, or has them in several precisions or on several devices.", where="network", fix=fix)
        self.module = module.train()
        self._shapes = {name: p.shape for name, p in parameters.items()}
        self._sizes = [shape.numel() for shape in self._shapes.values()]
        self.size = sum(self._sizes)

    def __call__(self, theta_P: Tensor, *inputs: Any) -> Any:
        """What the module gives for the weights `theta_P`: logits [B, C] of x [B, ...] for a classifier.

        Raises:
            InputError: theta_P is not a vector of P numbers.
        """
        return functional_call(self.module, self.split(theta_P), inputs)

    def check(self, *example: Any) -> None:
        """Call the module twice on an example: what a module does in its own `forward` (`F.dropout`, counting calls) shows in no other way.

        example: inputs as in a call. Nothing is left changed, torch's own random numbers included.

        Raises:
            InputError: the two outputs differ by more than rounding, or a buffer changes.
        """
        theta_P, buffers = self.vector(), {name: b.detach().clone() for name, b in self.module.named_buffers()}
        devices = [theta_P.device] if theta_P.device.type == "cuda" else []
        with torch.no_grad(), torch.random.fork_rng(devices=devices):
            first, second = (logits_of(self(theta_P, *example)).clone() for _ in range(2))
            changed = [name for name, b in self.module.named_buffers() if not torch.equal(b, buffers[name])]
            for name, b in self.module.named_buffers():
                b.copy_(buffers[name])
        if changed:
            fix = "Use layers without state: a vector of weights does not hold it."
            raise InputError(f"the network changes its buffer '{changed[0]}' when it is called.", where="network", fix=fix)
        if not torch.allclose(first, second, rtol=SAME, atol=SAME * float(first.abs().nan_to_num().max()), equal_nan=True):
            fix = "Leave out dropout and noise: an inner step must give the same gradient each time it is taken."
            raise InputError("the network gives two answers to one input in train mode.", where="network", fix=fix)

    def split(self, theta_P: Tensor) -> dict[str, Tensor]:
        """Parameter name -> view of `theta_P` in the parameter's shape; the views' gradients come together in one pass.

        Raises:
            InputError: theta_P is not a vector of P numbers.
        """
        if theta_P.shape != (self.size,):
            raise InputError(f"the weights have the shape {list(theta_P.shape)}, the network needs [{self.size}].", where="theta_P")
        pieces = theta_P.split(self._sizes)
        return {name: piece.view(shape) for (name, shape), piece in zip(self._shapes.items(), pieces, strict=True)}

    def vector(self, module: nn.Module | None = None) -> Tensor:
        """A copy of the parameters as θ [P], detached: later steps on the module do not change it (the snapshots of arXiv 2203.11932's code do, on a CPU).

        module: one of the same structure (None: the own one).

        Raises:
            InputError: the module's parameters have other names or shapes.
        """
        return torch.cat([p.detach().reshape(-1) for p in self._parameters(module).values()])

    def write(self, theta_P: Tensor, module: nn.Module | None = None) -> None:
        """Copy the weights θ [P] into a module's parameters, in place.

        module: one of the same structure (None: the own one).

        Raises:
            InputError: theta_P is not a vector of P numbers, or the module's parameters have other names or shapes.
        """
        parameters, pieces = self._parameters(module), self.split(theta_P)
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(pieces[name])

    def _parameters(self, module: nn.Module | None) -> dict[str, nn.Parameter]:
        parameters = dict((self.module if module is None else module).named_parameters())
        if module is not None and [(n, p.shape) for n, p in parameters.items()] != list(self._shapes.items()):
            raise InputError("the module has parameters of other names or shapes than the flat network.", where="module")
        return parameters


def _must_be_a_function(module: nn.Module) -> None:
    """Raise InputError for state that training changes, and for random numbers."""
    for name, part in module.named_modules():
        kind, where = type(part).__name__, f"network.{name}" if name else "network"
        if getattr(part, "running_mean", None) is not None:
            fix = "Use instance or group norm (ConvNet-D's), or a norm without running statistics."
            raise InputError(f"{kind} keeps running statistics, which a vector of weights does not hold.", where=where, fix=fix)
        rates = [getattr(part, attribute, 0.0) for attribute in _RATES] if _drops(part) else []
        if isinstance(part, nn.RReLU) or any(isinstance(rate, float | int) and rate > 0 for rate in rates):
            fix = "Set its probability to 0: an inner step must give the same gradient each time it is taken."
            raise InputError(f"{kind} draws random numbers in train mode.", where=where, fix=fix)
        if "spectralnorm" in kind.lower().replace("_", "") or any("SpectralNorm" in type(hook).__name__ for hook in part._forward_pre_hooks.values()):
            fix = "Leave it out."
            raise InputError("spectral norm keeps vectors that every call changes, which a vector of weights does not hold.", where=where, fix=fix)


def _drops(part: nn.Module) -> bool:
    """Whether the module's attributes named in `_RATES` are probabilities of dropping (a `p` alone may be the order of a norm)."""
    return "drop" in type(part).__name__.lower() or isinstance(part, nn.MultiheadAttention | nn.RNNBase)
