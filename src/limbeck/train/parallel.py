"""Devices and processes, by way of Hugging Face Accelerate. Nothing outside `train` knows of them (DESIGN §3).

Gradients are averaged over the processes here, after each update's backward, rather than by DDP's wrapper: a method calls its
modules by their own names, several of them, several times a step, which DDP's forward bookkeeping does not allow.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from limbeck.errors import InputError

_BUCKET = 25 * 2**20  # bytes reduced at once


def accelerator(precision: Literal["no", "bf16", "fp16"], *, cpu: bool = False) -> Any:
    """An Accelerate accelerator for this precision; one after another in a process may differ in it.

    Raises:
        InputError: the hardware cannot do the precision.
    """
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state()
    try:
        made = Accelerator(mixed_precision=precision, cpu=cpu or not torch.accelerator.is_available())  # launched without a GPU, Accelerate must be told
    except ValueError as error:
        raise InputError(f"this machine cannot train in {precision}: {error}", where="train.precision", fix="Use 'no' or 'bf16'.") from error
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if made.num_processes != launched:
        raise RuntimeError(f"{launched} processes were launched, but this one has joined a group of {made.num_processes}")
    return made


def keep_freed_memory() -> None:
    """Let the C library keep freed blocks instead of giving them back to the system after every step, to be faulted in again in the next (glibc only)."""
    import ctypes

    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        trim_threshold, mmap_threshold = -1, -3  # names of malloc.h
        mallopt(mmap_threshold, 1 << 28)
        mallopt(trim_threshold, 1 << 30)


def shard(module: nn.Module, device: torch.device, precision: str) -> None:
    """Shard a module's parameters over all processes, in place (FSDP2): its larger children one by one, then the rest."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32) if precision == "bf16" else MixedPrecisionPolicy()
    for child in module.children():
        blocks = list(child) if isinstance(child, nn.ModuleList | nn.Sequential) else [child]
        for block in blocks:
            if sum(p.numel() for p in block.parameters()) >= 100_000:
                fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(module, mesh=mesh, mp_policy=policy)


def whole_state(module: nn.Module) -> dict[str, Any]:
    """The state dict of a sharded module, gathered on every process."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    return get_model_state_dict(module, options=StateDictOptions(full_state_dict=True))


def average_gradients(parameters: Sequence[nn.Parameter], world: int) -> None:
    """Replace each gradient by its mean over the processes; one that no process has stays None."""
    if world == 1:
        return
    import torch.distributed as dist

    present = torch.tensor([p.grad is not None for p in parameters], dtype=torch.uint8, device=parameters[0].device)
    dist.all_reduce(present, op=dist.ReduceOp.MAX)
    shared = [p for p, there in zip(parameters, present.tolist(), strict=True) if there]
    for p in shared:
        if p.grad is None:
            p.grad = torch.zeros_like(p)
    bucket: list[Tensor] = []
    size = 0
    for p in shared:
        assert p.grad is not None
        if bucket and (size > _BUCKET or p.grad.dtype != bucket[0].dtype):
            _reduce(bucket, world)
            bucket, size = [], 0
        bucket.append(p.grad)
        size += p.grad.numel() * p.grad.element_size()
    if bucket:
        _reduce(bucket, world)


def _reduce(gradients: list[Tensor], world: int) -> None:
    import torch.distributed as dist

    flat = torch.cat([g.reshape(-1) for g in gradients])
    dist.all_reduce(flat)
    flat /= world
    for gradient, mean in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(mean.view_as(gradient))


def broadcast(module: nn.Module, world: int, *, parameters: bool) -> None:
    """Give every process the first one's buffers (and parameters)."""
    if world == 1:
        return
    import torch.distributed as dist

    tensors = [*module.buffers(), *(module.parameters() if parameters else ())]
    for tensor in tensors:
        dist.broadcast(tensor.data, src=0)


def total(sums: Tensor) -> Tensor:
    """The sum of a tensor over all processes; its own memory is left alone."""
    found = sums.clone()
    torch.distributed.all_reduce(found)
    return found


def agree(flags: Sequence[int], device: torch.device, world: int) -> list[int]:
    """The largest of each flag over the processes."""
    if world == 1:
        return list(flags)
    import torch.distributed as dist

    value = torch.tensor(list(flags), device=device)
    dist.all_reduce(value, op=dist.ReduceOp.MAX)
    return [int(v) for v in value.tolist()]


def tell(value: Any, world: int) -> Any:
    """The first process's small host object, on every process; returns once it is there."""
    if world == 1:
        return value
    import torch.distributed as dist

    held = [value]
    dist.broadcast_object_list(held, src=0)
    return held[0]


def gather(value: Any, world: int) -> list[Any]:
    """A small host object from every process."""
    if world == 1:
        return [value]
    import torch.distributed as dist

    found: list[Any] = [None] * world
    dist.all_gather_object(found, value)
    return found
