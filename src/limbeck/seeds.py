"""Stateless randomness: every random number is a pure function of named facts (DESIGN §4).

`derive` turns facts into a 63-bit seed; `uniform` gives each sample of a batch its own numbers, vectorised,
from (run seed, epoch, sample id, stream), so that neither workers, nor batches, nor restarts change them.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

_GOLDEN = -0x61C8864680B583EB  # 0x9E3779B97F4A7C15 as a signed 64-bit number
_MIX1 = -0x40A7B892E31B1A47  # 0xBF58476D1CE4E5B9
_MIX2 = -0x6B2FB644ECCEEE15  # 0x94D049BB133111EB


def derive(*facts: int | str) -> int:
    """A 63-bit seed from any number of facts; the same facts give the same seed on every machine."""
    text = "\x1f".join(f"{type(fact).__name__}:{fact}" for fact in facts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def generator(*facts: int | str, device: torch.device | str = "cpu") -> torch.Generator:
    """A fresh torch generator seeded with `derive(*facts)`."""
    return torch.Generator(device=device).manual_seed(derive(*facts))


def _shift(x: Tensor, bits: int) -> Tensor:
    return (x >> bits) & ((1 << (64 - bits)) - 1)  # logical shift of an int64


def hash64(x: Tensor) -> Tensor:
    """SplitMix64's finaliser (Steele et al. 2014) on int64, elementwise."""
    x = (x ^ _shift(x, 30)) * _MIX1
    x = (x ^ _shift(x, 27)) * _MIX2
    return x ^ _shift(x, 31)


def uniform(ids_B: Tensor, count: int, *facts: int | str) -> Tensor:
    """`count` uniform numbers in [0, 1) for each sample.

    Args:
        ids_B: sample ids, int64, shape [B].
        count: numbers a sample.
        facts: what else they depend on: run seed, epoch, the stream's name.

    Returns:
        float64 of shape [B, count] on the device of `ids_B`; row b depends on `ids_B[b]` and the facts alone.
    """
    base = hash64(hash64(ids_B.to(torch.int64) * _GOLDEN + derive(*facts)))
    steps = torch.arange(1, count + 1, device=ids_B.device, dtype=torch.int64) * _GOLDEN
    bits = hash64(base[:, None] + steps[None, :])
    return _shift(bits, 11).to(torch.float64) * 2.0**-53
