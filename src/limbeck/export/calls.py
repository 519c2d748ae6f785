"""A generator as a list of network calls and the numbers between them: what exports need of limbeck's samplers.

All that a sampler of ours does between two calls is linear in x, x̂0 and fresh noise, with factors that depend on the time alone.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from limbeck.diffusion import samplers
from limbeck.diffusion.build import NoiseMap
from limbeck.diffusion.consistency import ConsistencyGenerator
from limbeck.diffusion.denoisers import NetworkDenoiser
from limbeck.diffusion.generator import DataScale, DirectGenerator, Generator, Sampling
from limbeck.diffusion.schedules import NoiseSchedule
from limbeck.diffusion.signal import SignalGenerator, time_layer
from limbeck.errors import InputError

Row = dict[str, float]


def sampling_table(generator: Sampling) -> tuple[list[Row], float]:
    """One row a network call, and what the start noise is multiplied by.

    input, time: what the network is given, input·x and time. skip, out: x̂0 = skip·x + out·network. keep, signal, noise: the next x.

    Raises:
        InputError: the generator samples in another way, or its denoiser is no network.
    """
    if isinstance(generator, DirectGenerator):
        return [_row({"input": 1.0, "time": 0.0}, (0.0, 1.0))], 1.0
    denoiser: Any = getattr(generator, "denoiser", None)
    if type(generator) not in (Generator, ConsistencyGenerator, SignalGenerator):
        raise InputError(f"how {type(generator).__name__} samples is not known to this export.", where="--to")
    if not isinstance(denoiser, NetworkDenoiser):
        raise InputError(f"{type(denoiser).__name__} is no network: it cannot be taken out of limbeck.", where="--to")
    schedule = denoiser.schedule
    if isinstance(generator, SignalGenerator):
        top, end = _at(schedule.t_max), _at(schedule.t_min)
        return [_row({"input": _given(denoiser, top)[0], "time": _given(denoiser, end)[1]}, _answer(denoiser, top))], _start(schedule, top)
    assert isinstance(generator, Generator)
    rows = []
    for now, after in zip(generator.times, (*generator.times[1:], None), strict=True):
        t = _at(now)
        size, time = _given(denoiser, t)
        rows.append(_row({"input": size, "time": time}, _answer(denoiser, t), None if after is None else _step(generator, t, _at(after))))
    return rows, _start(schedule, _at(generator.times[0]))


_ZERO, _ONE = torch.zeros(1, 1, dtype=torch.float64), torch.ones(1, 1, dtype=torch.float64)


def _at(time: float) -> Tensor:
    return torch.tensor([time], dtype=torch.float64)


def _row(given: Row, answer: tuple[float, float], step: tuple[float, float, float] | None = None) -> Row:
    keep, signal, noise = step or (0.0, 1.0, 0.0)
    return {**given, "skip": answer[0], "out": answer[1], "keep": keep, "signal": signal, "noise": noise}


def _start(schedule: NoiseSchedule, t: Tensor) -> float:
    return float(schedule.start(_ONE, t))


def _given(denoiser: NetworkDenoiser, t: Tensor) -> tuple[float, float]:
    """The factor of x, and the network's time in float32."""
    return float(denoiser.inputs(_ONE, t)[0]), float(denoiser.inputs(_ONE.float(), t)[1])


def _answer(denoiser: NetworkDenoiser, t: Tensor) -> tuple[float, float]:
    """x̂0 = skip·x + out·network."""
    return float(denoiser.outputs(_ONE, t, _ZERO, "x0")), float(denoiser.outputs(_ZERO, t, _ONE, "x0"))


def _step(generator: Generator, t: Tensor, s: Tensor) -> tuple[float, float, float]:
    """Factors of x, x̂0 and fresh noise in the x at the next time: what the samplers make of ones."""
    schedule = generator.denoiser.schedule

    def after(x: Tensor, x0: Tensor, noise: Tensor) -> float:
        if isinstance(generator, ConsistencyGenerator):
            return float(samplers.lift(schedule, x0, _at(schedule.t_min), s, noise))
        if generator.mode == "ode":
            return float(samplers.ddim_step(schedule, x, x0, t, s))
        if generator.mode == "renoise" or generator.share == 1:
            return float(schedule.add_noise(x0, noise, s))
        below = (1 - generator.share) * s
        return float(samplers.lift(schedule, samplers.ddim_step(schedule, x, x0, t, below), below, s, noise))

    return after(_ONE, _ZERO, _ZERO), after(_ZERO, _ONE, _ZERO), after(_ZERO, _ZERO, _ONE)


# ---- the network ----------------------------------------------------------------------------------------------------------


def plain_network(generator: Sampling) -> tuple[nn.Module, list[float]]:
    """The network that the rows call as network(x, time, cond), and the data's mean: a guidance scale goes into a bias, a map's offset into the mean.

    Raises:
        InputError: a direct generator around something else than a `NoiseMap`.
    """
    scale, inner = generator.scale, generator.get_submodule(type(generator).inner)
    if isinstance(generator, DirectGenerator):
        if type(inner) is not NoiseMap:
            raise InputError(f"{type(inner).__name__} is no network of limbeck.", where="--to")
        mean = scale.mean.cpu() + inner.offset.detach().cpu().flatten() * scale.std.cpu()
        return inner.network, mean.tolist()
    network: Any = inner.network
    if isinstance(generator, SignalGenerator) and generator.guidance is not None:
        network = copy.deepcopy(network)
        last = [part for part in time_layer(network)[0].modules() if isinstance(part, nn.Linear)][-1]
        with torch.no_grad():
            last.bias.add_(generator.guidance(torch.tensor([generator.guidance_scale], device=last.bias.device))[0])
    return network, scale.mean.tolist()


class OneCall(nn.Module):
    """A generator of one call as noise [B, *shape] (and labels [B] int64 where it has classes) → samples [B, *shape] in data units, in float32.

    Raises:
        InputError: it makes several calls, or samples in a way that is not known here.
    """

    generates = True

    def __init__(self, generator: Sampling) -> None:
        super().__init__()
        rows, start = sampling_table(generator)
        if len(rows) > 1:
            raise InputError(
                f"the generator makes {len(rows)} calls with {'fresh noise' if rows[0]['noise'] else 'steps'} between them; ONNX is written for one.",
                where="--to",
                fix="Distil with steps: 1, or export --to diffusers.",
            )
        self.network, mean = plain_network(generator)
        self.row, self.start, self.num_classes = rows[0], start, generator.num_classes
        self.scale = DataScale(mean, generator.scale.std.tolist(), bounded=generator.scale.bounded)
        self.register_buffer("time", torch.tensor([rows[0]["time"]]), persistent=False)

    def forward(self, noise: Tensor, labels: Tensor | None = None) -> Tensor:
        """See the class."""
        x = self.start * noise
        raw = self.network(self.row["input"] * x, self.time, labels)
        return self.scale(self.row["skip"] * x + self.row["out"] * raw)


def one_call(module: nn.Module) -> OneCall:
    """A loaded generator as `OneCall`. Raises InputError as it does, and for what makes no samples."""
    if not isinstance(module, Sampling):
        raise InputError(f"{type(module).__name__} makes no samples.", where="--to")
    return OneCall(module)
