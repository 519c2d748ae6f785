"""Mixup of word embeddings, the same in teacher and student (Distiller, arXiv 2109.11105, section 4 of our sheet's loop; mixup: arXiv 1710.09412).

e'_b = λ e_b + (1 − λ) e_ρ(b), λ ~ Beta(0.4, 0.4) and the permutation ρ once a batch; the mixed rows stand behind the batch, which doubles. What the teacher
says of them is their target. A mixed row keeps its first row's mask: where that has no token, the other's is not seen (the sheet does not say; ours).

B samples, L tokens, d width.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from limbeck.data.augment import beta_quantile
from limbeck.errors import InputError


@dataclass(frozen=True)
class Mix:
    """One batch's draw: λ (a scalar tensor) and ρ ([B] int64)."""

    share: Tensor
    partner_B: Tensor


def draw_mix(batch: int, generator: torch.Generator, beta: float = 0.4) -> Mix:
    """λ ~ Beta(β, β) and a permutation, both on the CPU. generator: on the CPU.

    Raises:
        InputError: β is not above 0.
    """
    if not beta > 0:
        raise InputError(f"Beta({beta:g}, {beta:g}) is no distribution.", where="mixup_beta", fix="Give a number above 0; the paper's is 0.4.")
    uniform_1 = torch.rand(1, generator=generator, dtype=torch.float64)
    return Mix(beta_quantile(uniform_1, beta)[0].float(), torch.randperm(batch, generator=generator))


def mixed_embeddings(embeddings_BLd: Tensor, mix: Mix) -> Tensor:
    """[2B, L, d]: the rows, and behind them the mixed ones. λ = 1 gives the rows twice."""
    share = mix.share.to(embeddings_BLd)
    partners_BLd = embeddings_BLd.index_select(0, mix.partner_B.to(embeddings_BLd.device))
    return torch.cat((embeddings_BLd, share * embeddings_BLd + (1 - share) * partners_BLd))


def doubled(inputs_B: Tensor) -> Tensor:
    """[2B, ...]: the batch twice, which `mixing` then makes of."""
    return torch.cat((inputs_B, inputs_B))


@contextmanager
def mixing(module: nn.Module, mix: Mix) -> Iterator[None]:
    """Inside the block the module's word embeddings mix: given `doubled` ids, it sees the rows and behind them the mixed ones.

    Raises:
        InputError: the module has no word embeddings that can be found.
    """

    def mixed(_module: nn.Module, _args: Any, output: Tensor) -> Tensor:
        return mixed_embeddings(output[: len(mix.partner_B)], mix)

    handle = word_embeddings(module).register_forward_hook(mixed)
    try:
        yield
    finally:
        handle.remove()


def word_embeddings(module: nn.Module) -> nn.Module:
    """The layer that turns ids into vectors: what `get_input_embeddings()` says, here or in a part, or else the largest nn.Embedding.

    Raises:
        InputError: there is none.
    """
    for part in module.modules():
        if callable(getattr(part, "get_input_embeddings", None)):
            return part.get_input_embeddings()
    tables = [part for part in module.modules() if isinstance(part, nn.Embedding)]
    if not tables:
        raise InputError(f"{type(module).__name__} has no word embeddings to mix.", where="method.mixup", fix="Leave mixup out.")
    return max(tables, key=lambda table: table.num_embeddings)
