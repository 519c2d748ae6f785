"""What a network costs: parameters, multiply-accumulates, bytes, and seconds a batch, measured side by side."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from limbeck.evaluate.predict import device_of
from limbeck.evaluate.statistics import Latency
from limbeck.modes import evaluating


def parameters(module: nn.Module) -> int:
    """The number of parameters, shared ones counted once."""
    return sum(p.numel() for p in module.parameters())


def tensor_bytes(module: nn.Module) -> int:
    """Bytes of the tensors in the state dict (parameters and persistent buffers), shared ones counted once."""
    tensors = {id(t): t for t in module.state_dict(keep_vars=True).values() if isinstance(t, Tensor)}
    return sum(t.numel() * t.element_size() for t in tensors.values())


def macs(module: nn.Module, input_shape: Sequence[int], dtype: torch.dtype = torch.float32) -> int:
    """Multiply-accumulates of one forward pass of one input of shape `input_shape` (no batch dimension): zeros, or ones where `dtype` is of whole numbers.

    Matrix products, convolutions and attention count, as torch.utils.flop_counter has them (two operations each); elementwise work does not.
    """
    from torch.utils.flop_counter import FlopCounterMode

    example = torch.full((1, *input_shape), 0 if dtype.is_floating_point else 1, dtype=dtype, device=device_of(module))
    with torch.no_grad(), evaluating(module), _unfused(), FlopCounterMode(display=False) as counter:
        module(example)
    return int(counter.get_total_flops()) // 2


@contextmanager
def _unfused() -> Iterator[None]:
    """Attention, encoder layers and LSTMs as plain matrix products: the counter does not see into the fused kernels."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with warnings.catch_warnings(), sdpa_kernel(SDPBackend.MATH):
            warnings.filterwarnings("ignore", message="TF32 acceleration")  # which setting the flags sets off
            with torch.backends.mkldnn.flags(enabled=False):
                yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def latency(module: nn.Module, example: Tensor, *, repeats: int = 30, warmup: int = 5, threads: int | None = None) -> Latency:
    """Seconds of a forward pass of `example` [B, ...], in eval mode, without gradient; see `latencies`."""
    return latencies({"": module}, example, batch_sizes=(len(example),), repeats=repeats, warmup=warmup, threads=threads)[""][0]


def latencies(
    modules: Mapping[str, nn.Module],
    example: Tensor,
    *,
    batch_sizes: Sequence[int] = (1, 64),
    repeats: int = 30,
    warmup: int = 5,
    threads: int | None = None,
) -> dict[str, tuple[Latency, ...]]:
    """Seconds of a forward pass of several modules, measured in turns, so that a slow moment of the machine meets them all.

    Args:
        modules: by name; all take the same input, on their own device.
        example: [B, ...] prepared inputs, repeated or cut to each batch size.
        batch_sizes: what to measure. repeats: measurements of each. warmup: calls of each before the first measurement.
        threads: torch's threads while measuring (None: as they are); put back afterwards.

    Returns:
        name → one Latency a batch size, in the order of `batch_sizes`.
    """
    cells = [(name, size, module, _sized(example, size).to(device_of(module))) for name, module in modules.items() for size in batch_sizes]
    values: dict[tuple[str, int], list[float]] = {(name, size): [] for name, size, _, _ in cells}
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch_threads(threads))
        for module in modules.values():
            stack.enter_context(evaluating(module))
        for turn in range(warmup + repeats):
            for name, size, module, inputs in cells if turn % 2 == 0 else reversed(cells):
                seconds = _timed(module, inputs)
                if turn >= warmup:
                    values[name, size].append(seconds)
    return {name: tuple(Latency.of(values[name, size], size) for size in batch_sizes) for name in modules}


def _sized(example: Tensor, size: int) -> Tensor:
    """The first `size` rows of the example, which is repeated as often as needed; contiguous."""
    return example[torch.arange(size, device=example.device) % len(example)]


def _timed(module: nn.Module, inputs: Tensor) -> float:
    _synchronise(inputs.device)
    start = time.perf_counter()
    module(inputs)
    _synchronise(inputs.device)
    return time.perf_counter() - start


def _synchronise(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


@contextmanager
def torch_threads(count: int | None) -> Iterator[None]:
    """Torch's threads within the block (None: as they are)."""
    before = torch.get_num_threads()
    if count is not None:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
