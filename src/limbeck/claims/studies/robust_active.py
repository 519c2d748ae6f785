"""What the claim of Robust Active Distillation (2210.01213) needs beside trainings: the game without a network, teachers that err, data apart, the truth."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor, nn

from limbeck import seeds
from limbeck.contract import Data
from limbeck.data.sources import fashion_mnist
from limbeck.data.splits import Splits, stratified_order, subset
from limbeck.errors import InputError
from limbeck.losses.sampling_game import guaranteed_payoff, proportional_batch, robust_batch, robust_sampling
from limbeck.models.small import cnn

SHAPES = ("uniform", "saturated", "peaked")


def game(seed: int, items: int = 120, budget: int = 12) -> dict[str, float]:
    """The game for every m from 0 to n − 1 and three shapes of gains: what each way to sample guarantees, relative to the robust one.

    Returns:
        worst_ratio_RIVAL and mean_ratio_RIVAL: the largest and the mean ratio of the rival's guaranteed payoff to the robust one's, over m and shapes, for the
        rivals uniform, proportional (to the gain) and top (the b largest gains). solver_deviation: largest difference of the robust payoff, of one draw and
        of a batch, from a linear-programme solver's, over games of 10 items.
    """
    ratios: dict[str, list[float]] = {"uniform": [], "proportional": [], "top": []}
    for shape in SHAPES:
        g_N = _gains(shape, items, seed)
        rivals = {"uniform": torch.full_like(g_N, budget / items), "proportional": proportional_batch(g_N, budget), "top": _top(g_N, budget)}
        for wrong in range(items):
            best = robust_batch(g_N, budget, wrong).value
            for name, q_N in rivals.items():
                ratios[name].append(guaranteed_payoff(q_N, g_N, wrong) / best)
    found = {f"worst_ratio_{name}": max(values) for name, values in ratios.items()}
    found |= {f"mean_ratio_{name}": sum(values) / len(values) for name, values in ratios.items()}
    deviation = 0.0
    for shape in SHAPES:
        g_N = _gains(shape, 10, seed).clamp(min=1e-3)  # a solver's tolerance is 1e-7
        for wrong in range(10):
            deviation = max(deviation, abs(robust_sampling(g_N, wrong).value - _solved(g_N, wrong, None)))
            for of in (1, 3, 6, 10):
                deviation = max(deviation, abs(robust_batch(g_N, of, wrong).value - _solved(g_N, wrong, of)))
    return found | {"solver_deviation": deviation}


def _gains(shape: str, count: int, seed: int) -> Tensor:
    """[count] gains: uniform; saturated: 60 % at the floor of 1e-6; peaked: the sixth power of uniform."""
    u_N2 = seeds.uniform(torch.arange(count), 2, seed, "sampling game", shape)
    g_N = torch.where(u_N2[:, 1] < 0.6, 0.0, u_N2[:, 0]) if shape == "saturated" else u_N2[:, 0] ** (6 if shape == "peaked" else 1)
    return g_N.clamp(min=1e-6)


def _top(g_N: Tensor, budget: int) -> Tensor:
    q_N = torch.zeros_like(g_N)
    q_N[g_N.topk(budget).indices] = 1
    return q_N


def _solved(g_N: Tensor, wrong: int, budget: int | None) -> float:
    """The game's value by a linear programme: max Σ q g − m t − Σ u with u ≥ q g − t, u ≥ 0; a batch where `budget` is given."""
    from scipy.optimize import linprog

    count, g = len(g_N), g_N.numpy()
    objective = np.concatenate([-g, [wrong], np.ones(count)])
    above = np.concatenate([np.diag(g), -np.ones((count, 1)), -np.eye(count)], axis=1)
    total = np.concatenate([np.ones(count), np.zeros(count + 1)])[None]
    bounds = [(0, None if budget is None else 1)] * count + [(0, None)] * (count + 1)
    return -float(linprog(objective, A_ub=above, b_ub=np.zeros(count), A_eq=total, b_eq=[budget or 1], bounds=bounds, method="highs").fun)


class Degraded(nn.Module):
    """A network that is plain while it trains, and in eval mode gives a random wrong soft label on a fixed share of all inputs.

    Which inputs, and which wrong class, is a hash of the input's content: the same whenever and in whatever batch it is asked.
    The logits of the top class and of the wrong one change places, so the answer is as sure as before.

    Args:
        network: inputs [B, ...] to logits [B, C]. share: of the inputs, in [0, 1]. seed: of the subset.
    """

    def __init__(self, network: nn.Module, share: float, seed: int) -> None:
        super().__init__()
        self.network, self.share, self.seed = network, share, seed

    def forward(self, inputs: Tensor) -> Tensor:
        """Inputs [B, ...] -> logits [B, C]."""
        logits_BC = self.network(inputs)
        if self.training:
            return logits_BC
        hit_B, shift_B = seeds.uniform(content_keys(inputs), 2, self.seed, "degraded").unbind(1)
        return _mistaken(logits_BC, hit_B < self.share, 1 + (shift_B * (logits_BC.shape[1] - 1)).long())


class MistakenWhenUnsure(nn.Module):
    """A network that is plain while it trains, and in eval mode takes one class for the next wherever it is not sure: errors that do not average out.

    Args:
        network: inputs [B, ...] to logits [B, C]. below: the top probability under which it errs; the logits of the top class and of the next, class
            number + 1 modulo C, change places.
    """

    def __init__(self, network: nn.Module, below: float) -> None:
        super().__init__()
        self.network, self.below = network, below

    def forward(self, inputs: Tensor) -> Tensor:
        """Inputs [B, ...] -> logits [B, C]."""
        logits_BC = self.network(inputs)
        if self.training:
            return logits_BC
        unsure_B = logits_BC.softmax(1).amax(1) < self.below
        return _mistaken(logits_BC, unsure_B, torch.ones_like(unsure_B, dtype=torch.int64))


def _mistaken(logits_BC: Tensor, hit_B: Tensor, shift_B: Tensor) -> Tensor:
    """Where `hit_B`, the logits of the top class and of the one `shift_B` further on change places."""
    rows_B, top_B = torch.arange(len(logits_BC), device=logits_BC.device), logits_BC.argmax(1)
    other_B = (top_B + shift_B) % logits_BC.shape[1]
    wrong_BC = logits_BC.clone()
    wrong_BC[rows_B, top_B], wrong_BC[rows_B, other_B] = logits_BC[rows_B, other_B], logits_BC[rows_B, top_B]
    return torch.where(hit_B[:, None], wrong_BC, logits_BC)


def cnn_mistaken_when_unsure(widths: Sequence[int], num_classes: int, input_shape: Sequence[int], hidden: int = 0, below: float = 0.8) -> MistakenWhenUnsure:
    """`limbeck.models.small.cnn` as a `MistakenWhenUnsure` teacher."""
    return MistakenWhenUnsure(cnn(widths, num_classes, input_shape, hidden), below)


def degraded_cnn(widths: Sequence[int], num_classes: int, input_shape: Sequence[int], hidden: int = 0, share: float = 0.2, seed: int = 0) -> Degraded:
    """`limbeck.models.small.cnn` as a `Degraded` teacher."""
    return Degraded(cnn(widths, num_classes, input_shape, hidden), share, seed)


def content_keys(inputs: Tensor) -> Tensor:
    """A 64-bit number for each input that depends on its content alone: [B, ...] uint8 or float32 -> [B] int64."""
    flat_BD = inputs.flatten(1).contiguous()
    bits_BD = (flat_BD if flat_BD.dtype == torch.uint8 else flat_BD.float().view(torch.int32)).to(torch.int64)
    weights_D = seeds.hash64(torch.arange(1, bits_BD.shape[1] + 1, device=inputs.device)) | 1
    return seeds.hash64((bits_BD * weights_D).sum(1))


def apart(skip: int, count: int) -> Splits:
    """Fashion-MNIST with another training set: the `count` samples behind the `skip` that `data.train_size: skip` takes. Both are stratified.

    Raises:
        InputError: there are not that many samples.
    """
    splits = fashion_mnist()
    assert splits.train.targets is not None
    if skip < 0 or count < 1 or skip + count > len(splits.train):
        raise InputError(f"{skip} + {count} samples are more than there are.", where="count", fix=f"There are {len(splits.train)}.")
    return Splits(subset(splits.train, stratified_order(splits.train.targets, 0, "subset")[skip : skip + count]), splits.test)


def fashion_mnist_truth(train: Data) -> Tensor:
    """The labels that a partly labelled part of Fashion-MNIST's training set hides, [N] int64, found by the images' content. For reports only.

    Raises:
        InputError: an image is not in Fashion-MNIST.
    """
    keys_M, labels_M = _known()
    keys_N = torch.cat([content_keys(train.fetch(ids)[0]) for ids in torch.arange(len(train)).split(4096)])
    place_N = torch.searchsorted(keys_M, keys_N).clamp(max=len(keys_M) - 1)
    if not torch.equal(keys_M[place_N], keys_N):
        raise InputError("the training data are not Fashion-MNIST's.", where="truth", fix="Name a function that knows the truth about yours.")
    return labels_M[place_N]


@lru_cache(maxsize=1)
def _known() -> tuple[Tensor, Tensor]:
    """(sorted keys, labels) of Fashion-MNIST's training set."""
    train = fashion_mnist().train
    assert train.targets is not None
    keys_M, order_M = torch.cat([content_keys(train.fetch(ids)[0]) for ids in torch.arange(len(train)).split(4096)]).sort()
    return keys_M, train.targets[order_M]
