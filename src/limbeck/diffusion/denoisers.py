"""Denoisers: E[x0 | x_t] out of a network (any prediction, any preconditioning) or in closed form, and guidance.

Everything that a method calls is a `Denoiser`: `denoiser(x_t, t, cond, out="eps")`. Shapes: x_t [B, ...], t [B] float64, cond [B] int64 labels (the value
`num_classes` is the null class), [B, ...] embeddings, or None for none.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from limbeck.diffusion.schedules import Kind, NoiseSchedule, divisor, expand
from limbeck.errors import InputError, suggestion

Precondition = Literal["none", "edm", "consistency"]
PRECONDITIONS: tuple[Precondition, ...] = ("none", "edm", "consistency")


@runtime_checkable
class TappedNetwork(Protocol):
    """A network whose inner features can be read: see `networks.DenoisingNetwork`."""

    taps: Mapping[str, int]

    def features(self, x: Tensor, time: Tensor, cond: Tensor | None, taps: Sequence[str]) -> dict[str, Tensor]:
        """Features at the taps, and nothing deeper."""
        ...

    def forward_with(self, x: Tensor, time: Tensor, cond: Tensor | None, taps: Sequence[str]) -> tuple[Tensor, dict[str, Tensor]]:
        """Output and features of one pass."""
        ...


@runtime_checkable
class CutNetwork(TappedNetwork, Protocol):
    """A network that can also stop its graph at the deepest tap."""

    def forward_to_taps(self, x: Tensor, time: Tensor, cond: Tensor | None, taps: Sequence[str]) -> tuple[Tensor, dict[str, Tensor]]:
        """Output without and features with gradient, of one pass."""
        ...


class Denoiser(nn.Module, ABC):
    """E[x0 | x_t], and the same in any other form. Attributes: schedule, shape (of one sample), num_classes (0: unconditional)."""

    def __init__(self, schedule: NoiseSchedule, shape: Sequence[int], num_classes: int = 0) -> None:
        super().__init__()
        self.schedule, self.shape, self.num_classes = schedule, tuple(shape), num_classes

    @abstractmethod
    def x0(self, x_t: Tensor, t: Tensor, cond: Tensor | None = None) -> Tensor:
        """The denoised sample [B, ...]."""

    def forward(self, x_t: Tensor, t: Tensor, cond: Tensor | None = None, *, out: Kind = "x0") -> Tensor:
        """The prediction [B, ...] of this kind: x0, eps, v, velocity or score."""
        return self.schedule.convert(x_t, self.x0(x_t, t, cond), t, "x0", out)

    def null(self, count: int, device: torch.device) -> Tensor | None:
        """`count` null conditions: the label that stands for none; None where there are no classes."""
        return torch.full((count,), self.num_classes, dtype=torch.long, device=device) if self.num_classes else None


class NetworkDenoiser(Denoiser):
    """A network as a denoiser.

    network: called as network(x, time, cond). prediction: what it puts out ('x0', 'eps', 'v', 'velocity').
    precondition: 'none' (the network sees x_t and `schedule.network_time(t)`), 'edm' (Karras et al. 2022, arXiv 2206.00364, table 1: it sees
    c_in x_t/α and ln(level)/4, and D = c_skip x_t/α + c_out F), or 'consistency' (the same with c_skip, c_out shifted so that D(x, t_min) = x:
    Song et al. 2023, arXiv 2303.01469, app. C).
    With the last two the prediction is x0's and `prediction` stays 'x0'. sigma_data: the standard deviation of the data in network units.

    Raises:
        InputError: a name is unknown, or the combination makes no sense.
    """

    def __init__(
        self,
        network: nn.Module,
        schedule: NoiseSchedule,
        *,
        prediction: Kind = "x0",
        precondition: Precondition = "none",
        sigma_data: float = 0.5,
        shape: Sequence[int] | None = None,
        num_classes: int | None = None,
    ) -> None:
        own: Any = network
        if (shape is None and not hasattr(own, "shape")) or (num_classes is None and not hasattr(own, "num_classes")):
            raise InputError(f"{type(network).__name__} does not say its 'shape' and 'num_classes'.", where="network", fix="Pass them.")
        super().__init__(schedule, own.shape if shape is None else shape, own.num_classes if num_classes is None else num_classes)
        schedule.check(prediction)
        if precondition not in PRECONDITIONS:
            raise InputError(f"unknown preconditioning '{precondition}'.", where="precondition", fix=suggestion(precondition, PRECONDITIONS))
        if precondition != "none" and prediction != "x0":
            raise InputError(f"with preconditioning '{precondition}' the network predicts a mixture that gives x0.", where="prediction", fix="Leave it out.")
        if not (math.isfinite(sigma_data) and sigma_data > 0):
            raise InputError(f"sigma_data must be positive, not {sigma_data}.", where="sigma_data")
        self.network, self.prediction, self.precondition, self.sigma_data = network, prediction, precondition, float(sigma_data)

    # ---- what goes in and what comes out --------------------------------------------------------------------------

    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """c_skip, c_out, c_in of x_t/α at the level σ_t/α_t, float64 [B] ('edm' and 'consistency')."""
        (skip, c_out, into), alpha = self._coefficients_of_x(t), self.schedule.alpha(t)
        return skip * alpha, c_out, into * alpha

    def _coefficients_of_x(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """c_skip/α, c_out and c_in/α, what x_t itself is multiplied by: finite also where α is 0."""
        alpha, sigma, data = self.schedule.alpha(t), self.schedule.sigma(t), self.sigma_data
        size = torch.hypot(sigma, data * alpha)
        if self.precondition == "consistency":
            from_end = sigma - alpha * self.schedule.level(torch.full_like(t, self.schedule.t_min))
            return data**2 * alpha / (from_end**2 + (data * alpha) ** 2), data * from_end / size, size.reciprocal()
        return data**2 * alpha / size**2, data * sigma / size, size.reciprocal()

    def inputs(self, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """What the network is given: its x and its time."""
        if self.precondition == "none":
            return x_t, self.schedule.network_time(t)
        into = self._coefficients_of_x(t)[2]
        return expand(into.to(x_t.dtype), x_t) * x_t, (self.schedule.level(t).clamp(1e-12, 1e12).log() / 4).to(x_t.dtype)

    def outputs(self, x_t: Tensor, t: Tensor, raw: Tensor, out: Kind) -> Tensor:
        """The network's output as a prediction of a kind, in x_t's type (an autocast network answers in half precision, too coarse for differences)."""
        raw = raw.to(x_t.dtype)
        if self.precondition == "none":
            return self.schedule.convert(x_t, raw, t, self.prediction, out)
        skip, c_out, _ = self._coefficients_of_x(t)
        x0 = expand(skip.to(x_t.dtype), x_t) * x_t + expand(c_out.to(x_t.dtype), x_t) * raw
        return self.schedule.convert(x_t, x0, t, "x0", out)

    def x0(self, x_t: Tensor, t: Tensor, cond: Tensor | None = None) -> Tensor:
        """The denoised sample [B, ...]."""
        return self(x_t, t, cond)

    def forward(self, x_t: Tensor, t: Tensor, cond: Tensor | None = None, *, out: Kind = "x0") -> Tensor:
        """The prediction [B, ...] of this kind."""
        x, time = self.inputs(x_t, t)
        return self.outputs(x_t, t, self.network(x, time, cond), out)

    # ---- features -------------------------------------------------------------------------------------------------

    @property
    def taps(self) -> Mapping[str, int]:
        """Names of the places whose features can be read → channels."""
        return self._tapped().taps

    def features(self, x_t: Tensor, t: Tensor, cond: Tensor | None, taps: Sequence[str]) -> dict[str, Tensor]:
        """Features at the taps; nothing deeper is computed. Raises InputError for an unknown tap."""
        x, time = self.inputs(x_t, t)
        return self._tapped().features(x, time, cond, taps)

    def forward_with(
        self, x_t: Tensor, t: Tensor, cond: Tensor | None, taps: Sequence[str], *, out: Kind = "x0", graph: Literal["all", "taps"] = "all"
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Prediction and features of one pass. graph: 'taps' gives gradient to the features alone, and where the network can makes no graph behind them."""
        (x, time), network = self.inputs(x_t, t), self._tapped()
        passed = network.forward_to_taps if graph == "taps" and isinstance(network, CutNetwork) else network.forward_with
        raw, found = passed(x, time, cond, taps)
        if graph == "all":
            return self.outputs(x_t, t, raw, out), found
        with torch.no_grad():
            return self.outputs(x_t, t, raw.detach(), out), found

    def _tapped(self) -> TappedNetwork:
        if not isinstance(self.network, TappedNetwork):
            raise InputError(
                f"the network {type(self.network).__name__} shows no inner features.", where="student.model", fix="Use the discriminator's own network."
            )
        return self.network

    # ---- training -------------------------------------------------------------------------------------------------

    def output_weight(self, t: Tensor) -> Tensor:
        """[B] float64: what ‖x̂0 − x0‖² is multiplied by to become the squared error of the network's own output (our sheet, §2)."""
        if self.precondition != "none":
            return self.coefficients(t)[1].square().clamp_min(1e-24).reciprocal()
        alpha, sigma = self.schedule.alpha(t), self.schedule.sigma(t)
        if self.prediction == "x0":
            return torch.ones_like(alpha)
        ratio = alpha / divisor(sigma)
        if self.prediction == "eps":
            return ratio**2
        if self.prediction == "score":
            return (ratio / divisor(sigma)) ** 2
        if self.prediction == "v":
            return divisor(sigma) ** -2
        return ((alpha * self.schedule.d_sigma(t) - sigma * self.schedule.d_alpha(t)) / divisor(sigma)) ** 2

    def loss_weight(self, t: Tensor) -> Tensor:
        """[B] float64: what `denoising_errors` multiplies ‖x̂0 − x0‖² by: EDM's 1/level² + 1/σ_d² with a preconditioning, else `output_weight`.

        'consistency' takes EDM's too (ours): its own 1/c_out² grows without bound towards t_min, where the output is fixed whatever the network says.
        """
        if self.precondition == "none":
            return self.output_weight(t)
        alpha, sigma = self.schedule.alpha(t), divisor(self.schedule.sigma(t))
        return (alpha / sigma) ** 2 + self.sigma_data**-2


def denoising_loss(denoiser: NetworkDenoiser, x0: Tensor, t: Tensor, noise: Tensor, cond: Tensor | None = None) -> Tensor:
    """Mean squared error of the network's own output at x_t = α x0 + σ ε (scalar): the loss of teachers and of critics.

    'edm': mean (1/σ² + 1/σ_d²)(D − x0)² (arXiv 2206.00364, eq. 8 with λ = 1/c_out²), at the level σ/α; 'consistency': with the same weight (see
    `loss_weight`); else mean (prediction − its target)².
    x0 [B, ...] gets no gradient if it is detached; the caller says.
    """
    return denoising_errors(denoiser, x0, t, noise, cond).mean()


def denoising_errors(denoiser: NetworkDenoiser, x0: Tensor, t: Tensor, noise: Tensor, cond: Tensor | None = None) -> Tensor:
    """[B]: the mean squared error of each sample in the network's own output; see `denoising_loss`."""
    x_t = denoiser.schedule.add_noise(x0, noise, t)
    if denoiser.precondition == "none":
        kind = denoiser.prediction
        error = denoiser(x_t, t, cond, out=kind) - denoiser.schedule.target(x0, noise, t, kind)
        return error.square().flatten(1).mean(1)
    error = denoiser(x_t, t, cond) - x0
    return error.square().flatten(1).mean(1) * denoiser.loss_weight(t).to(error.dtype)


class Guided(Denoiser):
    """Classifier-free guidance (Ho and Salimans 2022, arXiv 2207.12598): P = P_∅ + κ (P_c − P_∅), in one batched pass.

    scale: κ; 1 is the conditional prediction (no null pass is made), 0 the null one.

    Raises:
        InputError: κ is no finite number.
    """

    def __init__(self, denoiser: Denoiser, scale: float = 1.0) -> None:
        if not math.isfinite(scale):
            raise InputError(f"the guidance scale must be finite, not {scale}.", where="guidance_scale")
        super().__init__(denoiser.schedule, denoiser.shape, denoiser.num_classes)
        self.denoiser, self.scale = denoiser, float(scale)

    def x0(self, x_t: Tensor, t: Tensor, cond: Tensor | None = None) -> Tensor:
        """The guided denoised sample."""
        return self(x_t, t, cond)

    def forward(
        self,
        x_t: Tensor,
        t: Tensor,
        cond: Tensor | None = None,
        *,
        out: Kind = "x0",
        scale: Tensor | float | None = None,
        negative: Tensor | None = None,
    ) -> Tensor:
        """The guided prediction. scale: [B] or one number in place of the module's own; negative: conditions in place of the null ones,
        [B, ...] or one for all.

        Raises:
            InputError: guidance of a denoiser without conditions, or negative conditions of another shape.
        """
        kappa = self.scale if scale is None else scale
        if isinstance(kappa, float | int) and kappa == 1:
            return self.denoiser(x_t, t, cond, out=out)
        null = self.null_like(cond, len(x_t), x_t.device) if negative is None else negative
        if cond is None or null is None:
            raise InputError("guidance needs conditions, and there are none.", where="guidance_scale", fix="Set it to 1, or give a conditional teacher.")
        if null.shape != cond.shape:
            try:
                null = null.expand(cond.shape)
            except RuntimeError as error:
                raise InputError(f"negative conditions {list(null.shape)} do not go with {list(cond.shape)}.", where="negative") from error
        if isinstance(kappa, float | int) and kappa == 0:
            return self.denoiser(x_t, t, null, out=out)
        both = self.denoiser(torch.cat([x_t, x_t]), torch.cat([t, t]), torch.cat([cond, null]), out=out)
        conditional, free = both.chunk(2)
        factor = expand(kappa.to(x_t.dtype), x_t) if isinstance(kappa, Tensor) else kappa
        return free + factor * (conditional - free)

    def null_like(self, cond: Tensor | None, count: int, device: torch.device) -> Tensor | None:
        """The inner denoiser's null condition, for as many samples."""
        return self.denoiser.null(count, device)

    def null(self, count: int, device: torch.device) -> Tensor | None:
        """The inner denoiser's."""
        return self.denoiser.null(count, device)


class MixtureDenoiser(Denoiser):
    """The exact denoiser of a Gaussian mixture Σ π_i N(m_i, s_i² I), for tests and studies (our sheet, §8).

    Components share a class where `classes` says so: a condition takes the components of its class, none or the null label takes all.

    Args:
        means: [K, *shape]. stds: [K]. weights: [K], positive; None: equal. classes: [K] int64; None: no classes.

    Raises:
        InputError: shapes or values that do not fit.
    """

    means: Tensor
    stds: Tensor
    log_weights: Tensor
    classes: Tensor

    def __init__(self, schedule: NoiseSchedule, means: Tensor, stds: Tensor, weights: Tensor | None = None, classes: Tensor | None = None) -> None:
        count = len(means)
        if means.dim() < 2 or stds.shape != (count,) or not bool((stds >= 0).all()):
            raise InputError(f"means must be [K, ...] and stds [K] ≥ 0, these are {list(means.shape)} and {list(stds.shape)}.", where="means")
        weights = torch.full((count,), 1 / count) if weights is None else weights
        if weights.shape != (count,) or not bool(((weights > 0) & weights.isfinite()).all()):
            raise InputError(f"weights must be [{count}], positive and finite.", where="weights")
        if classes is not None and (classes.shape != (count,) or sorted(set(classes.tolist())) != list(range(int(classes.max()) + 1))):
            raise InputError(f"classes must be [{count}], numbered from 0 without a gap.", where="classes")
        super().__init__(schedule, means.shape[1:], 0 if classes is None else int(classes.max()) + 1)
        self.register_buffer("means", means.double())
        self.register_buffer("stds", stds.double())
        self.register_buffer("log_weights", (weights.double() / weights.double().sum()).log())
        self.register_buffer("classes", torch.zeros(count, dtype=torch.long) if classes is None else classes.long())

    def responsibilities(self, x_t: Tensor, sigma: Tensor, cond: Tensor | None = None, alpha: Tensor | float = 1.0) -> Tensor:
        """[B, K] float64: how likely each component is at x_t = α x0 + σ ε; sigma and alpha [B], or α = 1 (then x_t is y, σ its level)."""
        alpha_B1 = torch.as_tensor(alpha, dtype=torch.float64, device=self.means.device).reshape(-1, 1)
        flat, means = x_t.flatten(1).double(), alpha_B1.unsqueeze(-1) * self.means.flatten(1)
        variance = (alpha_B1 * self.stds) ** 2 + sigma.reshape(-1, 1) ** 2
        distance = (flat.unsqueeze(1) - means).square().sum(-1)
        logits = self.log_weights - distance / (2 * variance) - flat.shape[1] / 2 * variance.log()
        if cond is not None and self.num_classes:
            allowed = (self.classes == cond.reshape(-1, 1)) | (cond.reshape(-1, 1) == self.num_classes)
            logits = logits.masked_fill(~allowed, -torch.inf)
        return logits.softmax(-1)

    def x0(self, x_t: Tensor, t: Tensor, cond: Tensor | None = None) -> Tensor:
        """Σ γ_i (α s_i² x_t + σ² m_i)/(α² s_i² + σ²): the sheet's VE form times α²/α², so that α may be 0."""
        alpha, sigma = self.schedule.alpha(t).reshape(-1, 1), self.schedule.sigma(t).reshape(-1, 1)
        gamma, variance = self.responsibilities(x_t, sigma, cond, alpha), (alpha * self.stds) ** 2 + sigma**2
        signal = (gamma * alpha * self.stds**2 / variance).sum(-1, keepdim=True) * x_t.flatten(1).double()
        prior = (gamma * sigma**2 / variance) @ self.means.flatten(1)
        return (signal + prior).view_as(x_t).to(x_t.dtype)

    def sample(self, count: int, generator: torch.Generator, cond: Tensor | None = None) -> Tensor:
        """[count, *shape] float32 samples of the mixture (or of each condition's part of it)."""
        logits = self.log_weights.expand(count, -1)
        if cond is not None and self.num_classes:
            allowed = (self.classes == cond.reshape(-1, 1)) | (cond.reshape(-1, 1) == self.num_classes)
            logits = logits.masked_fill(~allowed, -torch.inf)
        which = torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]
        noise = torch.randn(count, *self.shape, dtype=torch.float64, generator=generator, device=self.means.device)
        return (self.means[which] + expand(self.stds[which], noise) * noise).float()
