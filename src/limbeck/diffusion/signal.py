"""The signal of a probability-flow path, and the network that learns it from the noise (BOOT, arXiv 2306.05544). Numbers in brackets are our sheet's.

One noise ε [B, ...] belongs to a whole path x_t. Its signal y_t = (x_t − σ_t ε)/α_t holds no noise (1); with λ = log(σ/α) it obeys
dy/dt = −λ' (f(x_t, t) − y_t) (2), f the denoiser, and a DDIM step from t down to s is y_s = (1 − k) y_t + k f, k = 1 − e^{λ_s − λ_t} (3).
Everything here is for any schedule. *Places* p in [0, 1] are the fraction of the way from t_min to t_max in the schedule's own list of times.

The paper's method section was not available to us: (1) to (3) are derived, and agree with the sources we read; what is ours alone says so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from limbeck.diffusion import samplers
from limbeck.diffusion.build import artefact_scale, inner_module
from limbeck.diffusion.denoisers import NetworkDenoiser
from limbeck.diffusion.generator import DataScale, Sampling
from limbeck.diffusion.networks import TimeFeatures
from limbeck.diffusion.schedules import NoiseSchedule, divisor, expand
from limbeck.errors import InputError

Space = Literal["signal", "noisy"]
"""What the student puts out along the path: y_t (BOOT), or x_t itself (what the claim compares it with)."""
Solver = Literal["euler", "heun"]
Weight = Literal["unit", "inverse_delta", "inverse_k"]
Predict = Callable[[Tensor, Tensor], Tensor]
"""(x_t [B, ...], t [B]) → x̂0 [B, ...]: a teacher with its conditions and its guidance."""
_LIST = 1001  # times between which `time_at` interpolates
_FREQUENCIES = 8  # of a guidance scale's features


# ---- the path -------------------------------------------------------------------------------------------------------------


def log_level(schedule: NoiseSchedule, t_B: Tensor) -> Tensor:
    """λ_t = log(σ_t/α_t), float64, rising in t; the negative of `log_snr`."""
    return -schedule.log_snr(t_B)


def signal_rate(schedule: NoiseSchedule, t_B: Tensor, s_B: Tensor) -> Tensor:
    """k = 1 − e^{λ_s − λ_t}, float64 [B]: 0 for s = t, below 1 for every s > 0 (3). Not (t − s)·λ', which exceeds 1 at both ends."""
    return -torch.expm1(log_level(schedule, s_B) - log_level(schedule, t_B))


def signal_of(schedule: NoiseSchedule, x_t: Tensor, noise: Tensor, t_B: Tensor) -> Tensor:
    """y_t = (x_t − σ_t ε)/α_t (1). For looking at paths: near t_max the division by α_t is worth nothing, and training never does it."""
    alpha, sigma = (expand(c.to(x_t.dtype), x_t) for c in (schedule.alpha(t_B), schedule.sigma(t_B)))
    return (x_t - sigma * noise) / divisor(alpha)


def signal_step(y: Tensor, f: Tensor, k_B: Tensor) -> Tensor:
    """y_s = (1 − k) y_t + k f (3): DDIM from t to s, in terms of the signal."""
    return torch.lerp(y, f, expand(k_B.to(y.dtype), y))


def path_step(schedule: NoiseSchedule, value: Tensor, f: Tensor, t_B: Tensor, s_B: Tensor, space: Space = "signal") -> Tensor:
    """One DDIM step of a path, given as its signal or as the noisy sample: x_s = (σ_s/σ_t) x_t + α_s k f, which is (3) times α_s plus σ_s ε."""
    k = signal_rate(schedule, t_B, s_B)
    if space == "signal":
        return signal_step(value, f, k)
    shrink = schedule.sigma(s_B) / divisor(schedule.sigma(t_B))
    return expand(shrink.to(value.dtype), value) * value + expand((schedule.alpha(s_B) * k).to(value.dtype), value) * f


def noisy(schedule: NoiseSchedule, value: Tensor, noise: Tensor, t_B: Tensor, space: Space = "signal") -> Tensor:
    """x_t of a value of the path: α_t y + σ_t ε, or the value itself where it is the noisy sample."""
    return schedule.add_noise(value, noise, t_B) if space == "signal" else value


def of_signal(schedule: NoiseSchedule, y: Tensor, noise: Tensor, t_B: Tensor, space: Space = "signal") -> Tensor:
    """The value of the path whose signal is y: y itself, or x_t where the path is given as the noisy sample."""
    return y if space == "signal" else schedule.add_noise(y, noise, t_B)


@torch.no_grad()
def bootstrap_target(
    predict: Predict,
    schedule: NoiseSchedule,
    value: Tensor,
    f: Tensor,
    noise: Tensor,
    t_B: Tensor,
    s_B: Tensor,
    solver: Solver = "euler",
    space: Space = "signal",
) -> Tensor:
    """Where the teacher carries a value of the path at t, [B, ...], to by time s (4); no gradient.

    f: the teacher's x̂0 at `noisy(value)` and t. heun: f is asked again at the point reached and the mean of both is used (8), the trapezoidal rule in α/σ.
    """
    ahead = path_step(schedule, value, f, t_B, s_B, space)
    if solver == "euler":
        return ahead
    again = predict(noisy(schedule, ahead, noise, s_B, space), s_B)
    return path_step(schedule, value, (f + again) / 2, t_B, s_B, space)


# ---- the loss -------------------------------------------------------------------------------------------------------------


def loss_weight(k_B: Tensor, delta: float, kind: Weight = "unit", cap: float = 0.05) -> Tensor:
    """[B] float64, what a squared residual is multiplied by: 1, 1/δ² (4), or 1/max(k, cap)².

    With 1/k² the residual is that of the denoiser, (g_s − ŷ_t)/k − (f − ŷ_t), at every t alike; the cap, ours, bounds it where k is small.
    """
    if kind == "inverse_k":
        return k_B.clamp_min(cap) ** -2
    return torch.full_like(k_B, delta**-2 if kind == "inverse_delta" else 1.0)


def bootstrap_loss(g_s: Tensor, target: Tensor, weight_B: Tensor) -> Tensor:
    """L_BS = mean w ‖g(ε, s) − target‖² over entries and batch (4); scalar, gradient in g_s alone."""
    return ((g_s - target.detach()).square().flatten(1).mean(1) * weight_B.to(g_s.dtype)).mean()


def boundary_loss(g_top: Tensor, f_top: Tensor) -> Tensor:
    """L_BC = mean ‖g(ε, t_max) − f(x_T, t_max)‖² (5); scalar, gradient in g alone."""
    return (g_top - f_top.detach()).square().mean()


# ---- times ----------------------------------------------------------------------------------------------------------------


def time_at(schedule: NoiseSchedule, place_B: Tensor) -> Tensor:
    """Times, float64, at places in [0, 1], by the schedule's own list: t_min + p (t_max − t_min) for all but EDM, whose list is Karras'."""
    grid = schedule.kept_grid(_LIST, place_B.device)
    at = place_B.double().clamp(0, 1) * (_LIST - 1)
    low = at.floor().clamp(max=_LIST - 2).long()
    return torch.lerp(grid[low], grid[low + 1], at - low)


def draw_places(count: int, delta: float, at_end: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """[count] places of t ~ U[δ, 1] and of s = t − δ, float64; for the first `at_end` samples s = 0, the one time that sampling uses (ours)."""
    t = delta + (1 - delta) * torch.rand(count, dtype=torch.float64, generator=generator, device=generator.device)
    t[:at_end] = delta
    return t, (t - delta).clamp_min(0)


def annealed(first: float, last: float | None, progress: float) -> float:
    """δ on the geometric way from `first` to `last` (None: it stays); progress in [0, 1]."""
    return first if last is None else first * (last / first) ** progress


# ---- the student ----------------------------------------------------------------------------------------------------------


class ScaleEmbedding(nn.Module):
    """Guidance scales κ [B] → [B, width], zero at first: smooth sines and cosines of κ's place in [low, high], a linear layer that starts at zero.

    Without hidden layers of its own, so nothing is drawn at random; the network's own layers come after it (ours).
    """

    def __init__(self, width: int, low: float, high: float) -> None:
        super().__init__()
        self.low, self.high = float(low), float(high)
        self.features = TimeFeatures(_FREQUENCIES, "smooth")
        self.project = nn.Linear(2 * _FREQUENCIES, width)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """All zero."""
        nn.init.zeros_(self.project.weight)
        nn.init.zeros_(self.project.bias)

    def forward(self, scale_B: Tensor) -> Tensor:
        """[B, width]."""
        return self.project(self.features((scale_B - self.low) / (self.high - self.low)))


@contextmanager
def shifted(layer: nn.Module, by: Tensor | None) -> Iterator[None]:
    """What `layer` puts out is moved by `by` within; None: nothing is done."""
    if by is None:
        yield
        return
    handle = layer.register_forward_hook(lambda _module, _inputs, output: output + by)
    try:
        yield
    finally:
        handle.remove()


def time_layer(network: nn.Module) -> tuple[nn.Module, int]:
    """The layer `embed`, which makes a network's time embedding, and its width. Raises InputError: there is none."""
    layer = getattr(network, "embed", None)
    linear = [part for part in layer.modules() if isinstance(part, nn.Linear)] if isinstance(layer, nn.Module) else []
    if not isinstance(layer, nn.Module) or not linear:
        raise InputError(
            f"{type(network).__name__} has no time embedding 'embed' that a guidance scale could be added to.",
            where="method.guidance_range",
            fix="Give one guidance_scale instead, or use an MLP or U-Net of limbeck.",
        )
    return layer, linear[-1].out_features


class SignalGenerator(Sampling):
    """g(ε, t): a denoiser's network that is given the noise in place of x_t, and answers with the signal y_t of the path that starts there (4).

    One call at t_min makes a sample. `signal` gives any other time, the blurred way there, to look at.

    What a copy of the teacher puts out at t_max is the teacher's x̂0 exactly (L_BC = 0), whatever it predicts and however it is preconditioned (ours): let a
    denoiser be D(x, t) = a_t x + b_t F(c_t x, τ_t). Then g(ε, t) = a_T x_T + b_T F(c_T x_T, τ_t), T = t_max, x_T the start made of ε. Of all that depends on
    time only τ, the network's own time, moves. At t = T this is D(x_T, T); and the rest must not move, since a_t, b_t, c_t were made for an input whose noise
    falls with t, and the input stays x_T. For x0 predictions without preconditioning a = 0, b = c = 1: the plain call F(ε, τ_t).
    The price: |b_T| = σ_T/α_T magnifies what an eps network puts out (see `magnification`).

    Args:
        guidance_range: of the scales κ that the student is told of, by an embedding added to that of time (6); None: it knows of none.
        guidance_scale: κ of samples, where there is a range. space: 'noisy' where the network was trained to put out x_t.

    Raises:
        InputError: the network has no time embedding to add to, or the scale or the range make no sense.
    """

    builder = "signal_generator"

    def __init__(
        self,
        denoiser: NetworkDenoiser,
        *,
        guidance_range: Sequence[float] | None = None,
        guidance_scale: float = 1.0,
        space: Space = "signal",
        scale: DataScale | None = None,
    ) -> None:
        super().__init__()
        if space not in ("signal", "noisy"):
            raise InputError(f"unknown space '{space}'.", where="space", fix="Use signal or noisy.")
        self.denoiser, self.guidance_scale, self.space = denoiser, float(guidance_scale), space
        self.shape, self.num_classes, self.scale = denoiser.shape, denoiser.num_classes, scale or DataScale()
        self.guidance: ScaleEmbedding | None = None
        if guidance_range is not None:
            if len(guidance_range) != 2 or not guidance_range[0] < guidance_range[1]:
                raise InputError(f"a range is two numbers that rise, not {list(guidance_range)}.", where="guidance_range")
            self.guidance = ScaleEmbedding(time_layer(denoiser.network)[1], *guidance_range)
            self._within(self.guidance_scale)

    def _within(self, scale: float) -> None:
        if self.guidance is None:
            raise InputError("this generator was trained for one guidance scale.", where="scale", fix="Leave it out.")
        if not self.guidance.low <= scale <= self.guidance.high:
            what = f"the guidance scale {scale:g} is not within {self.guidance.low:g} and {self.guidance.high:g}, which the student learns."
            raise InputError(what, where="guidance_scale")

    @property
    def calls(self) -> int:
        """One."""
        return 1

    @property
    def magnification(self) -> float:
        """|b_T|: how much an error of the network's own output counts in the sample. About 1, but for eps predictions σ_T/α_T (637 for cosine at 0.999)."""
        top = torch.full((1,), self.denoiser.schedule.t_max, dtype=torch.float64)
        zero, one = torch.zeros(1, 1, dtype=torch.float64), torch.ones(1, 1, dtype=torch.float64)
        return abs(float(self.denoiser.outputs(zero, top, one, "x0")))

    def start(self, noise: Tensor) -> Tensor:
        """x_T [B, ...], what sampling of the teacher starts from."""
        return self.denoiser.schedule.start(noise, samplers.at(self.denoiser.schedule.t_max, noise))

    def signal(self, noise: Tensor, t_B: Tensor, cond: Tensor | None = None, guidance_B: Tensor | None = None) -> Tensor:
        """g(ε, t): y_t [B, *shape] (x_t in the space 'noisy'). guidance: κ [B]; None: the generator's own. Gradient flows."""
        denoiser, x = self.denoiser, self.start(noise)
        top = samplers.at(denoiser.schedule.t_max, noise)
        given, time = denoiser.inputs(x, top)[0], denoiser.inputs(x, t_B)[1]
        shift = None
        if self.guidance is not None:
            shift = self.guidance(torch.full_like(t_B, self.guidance_scale) if guidance_B is None else guidance_B)
        with shifted(time_layer(denoiser.network)[0] if shift is not None else denoiser, shift):
            raw = denoiser.network(given, time, cond)
        return denoiser.outputs(x, top, raw, "x0")

    def forward(self, noise: Tensor, cond: Tensor | None = None, generator: torch.Generator | None = None) -> Tensor:
        """Noise [B, *shape] → samples g(ε, t_min) [B, *shape] in network units."""
        return self.signal(noise, samplers.at(self.denoiser.schedule.t_min, noise), cond)

    def with_guidance(self, scale: float) -> SignalGenerator:
        """The same weights, sampling at another guidance scale. Raises InputError: the student learnt none, or not this one."""
        self._within(scale)
        assert self.guidance is not None
        found = SignalGenerator(
            self.denoiser, guidance_range=(self.guidance.low, self.guidance.high), guidance_scale=scale, space=self.space, scale=self.scale
        )  # fmt: skip
        found.guidance = self.guidance
        return found

    @property
    def arguments(self) -> Mapping[str, Any]:
        """What, beside the denoiser, builds this generator again (JSON values)."""
        known = None if self.guidance is None else [self.guidance.low, self.guidance.high]
        return {"guidance_range": known, "guidance_scale": self.guidance_scale, "space": self.space, "scale": self.scale.arguments}


def signal_generator(
    denoiser: Mapping[str, Any],
    num_classes: int,
    input_shape: Sequence[int],
    guidance_range: Sequence[float] | None = None,
    guidance_scale: float = 1.0,
    space: Space = "signal",
    scale: Mapping[str, Any] | None = None,
) -> SignalGenerator:
    """A signal generator around a denoiser, as artefacts name it; see `SignalGenerator`.

    Raises:
        InputError: the denoiser cannot be built or is no network that denoises.
    """
    inner = inner_module(denoiser, num_classes, input_shape, "denoiser")
    if not isinstance(inner, NetworkDenoiser):
        raise InputError(f"{type(inner).__name__} is no network that denoises.", where="denoiser")
    return SignalGenerator(inner, guidance_range=guidance_range, guidance_scale=guidance_scale, space=space, scale=artefact_scale(scale))
