"""TRL's contestant in linear_divergence.py: GKD's generalised JSD loss on the same tensors, run by its own interpreter."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import no_grad

from linear_divergence import BETAS, Size, contest, sizes, tensors


def trl_loss() -> Any:
    """`GKDTrainer.generalized_jsd_loss`, wherever this release keeps it."""
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    try:
        from trl.experimental.gkd import GKDTrainer
    except ModuleNotFoundError as error:
        if not str(error.name).startswith("trl"):
            raise
        from trl import GKDTrainer
    return GKDTrainer.generalized_jsd_loss


def trl_iteration(size: Size, name: str) -> Callable[[], Any]:
    """Both logits by one product each, TRL's loss on them, backward."""
    h, W, h_t, W_t = tensors(size)
    loss_of = trl_loss()

    def iterate() -> Any:
        h.grad = W.grad = None
        with no_grad():
            teacher = F.linear(h_t, W_t)
        loss = loss_of(student_logits=F.linear(h, W), teacher_logits=teacher, beta=BETAS[name], reduction="batchmean")
        loss.backward()
        return loss.detach(), h.grad, W.grad

    return iterate


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    sizes(parser)
    args = parser.parse_args()
    contest(Size(args.positions, args.width, args.vocabulary, args.threads), args.contestant, trl_iteration)


if __name__ == "__main__":
    main()
