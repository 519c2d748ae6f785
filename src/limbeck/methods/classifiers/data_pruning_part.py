"""What pruning a training set needs beside the loss: our rule for α, and the scores, of freshly trained networks or out of a file."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from torch import Tensor, nn

from limbeck.contract import IGNORE, Batch, Clock, Data, Workbench
from limbeck.errors import InputError
from limbeck.losses.scores import ForgettingCounter, el2n, grand, grand_last_layer
from limbeck.models.outputs import logits_of

NetworkScore = Literal["el2n", "grand", "grand_last_layer", "forgetting"]
"""A score that a network gives: once it is trained, or 'forgetting', counted while it trains."""


def auto_alpha(fraction: float) -> float:
    """α(f): 1 for f ≤ 0.1, from there on a straight line to 0.5 at f = 1.

    OURS: the paper says that α should be large for small f and smaller near f = 1, and gives no formula.

    >>> auto_alpha(0.05), auto_alpha(0.55), auto_alpha(1.0)
    (1.0, 0.75, 0.5)
    """
    return 1.0 if fraction <= 0.1 else 1.0 - 0.5 * (fraction - 0.1) / 0.9


class Scoring:
    """The mean score over networks that are trained one after another: `scores` [N] float64, None before the first is done.

    Args:
        score: which. total: N samples, all labelled. fresh: builds a network from a seed.
    """

    def __init__(self, score: NetworkScore, total: int, fresh: Callable[[int], nn.Module]) -> None:
        self.score, self.total, self.fresh = score, total, fresh
        self.network: nn.Module | None = None  # the one in training
        self.counter: ForgettingCounter | None = None
        self.scores: Tensor | None = None
        self.done = 0

    def begin(self, seed: int) -> nn.Module:
        """A fresh network to score with."""
        self.network = self.fresh(seed)
        self.counter = ForgettingCounter(self.total) if self.score == "forgetting" else None
        return self.network

    def count(self, logits_BC: Tensor, batch: Batch, clock: Clock) -> None:
        """Item 2b of our sheet: whether the training batch is classified rightly, before the step.

        Raises:
            InputError: the batch mixes samples, or is seen by one process of several.
        """
        if self.counter is None:
            return
        assert batch.ids is not None
        assert batch.targets is not None
        if batch.targets.is_floating_point():
            raise InputError("forgetting is counted of samples, not of mixtures of two.", where="data.augment", fix="Leave out mixup and cutmix.")
        if clock.rank:
            raise InputError("forgetting is counted in one process: each sees a part of every batch.", where="score", fix="Run it on one, or use el2n.")
        self.counter.update(batch.ids, logits_BC.detach().argmax(-1) == batch.targets)

    def end(self, data: Data, bench: Workbench) -> int:
        """Average the trained network's scores with those before and forget it; returns how many networks there were. +∞ in one stays +∞."""
        assert self.network is not None
        found_N = network_scores(self.score, self.network, data, bench) if self.counter is None else self.counter.counts().cpu()
        sum_N = found_N if self.scores is None else self.scores * self.done + found_N
        self.done += 1
        self.scores, self.network, self.counter = sum_N / self.done, None, None
        return self.done

    def state_dict(self) -> dict[str, Any]:
        """Everything but the weights of the network in training."""
        counter = None if self.counter is None else self.counter.state_dict()
        return {"scores": self.scores, "done": self.done, "training": self.network is not None, "counter": counter}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put it back; a network in training is built anew, for its weights to be loaded into."""
        self.scores, self.done = state["scores"], state["done"]
        if state["training"]:
            self.begin(0)
        if self.counter is not None:
            self.counter.load_state_dict(state["counter"])


def kept_shares(labels_N: Tensor | None, kept_M: Tensor | None) -> dict[int, float]:
    """Class → the part of its samples that is kept, in [0, 1]; empty without labels or a choice."""
    if kept_M is None or labels_N is None or not (labels_N != IGNORE).any():
        return {}
    classes = 1 + int(labels_N.max())
    sizes, counts = (labels[labels != IGNORE].bincount(minlength=classes).tolist() for labels in (labels_N, labels_N[kept_M]))
    return {c: n / of for c, (n, of) in enumerate(zip(counts, sizes, strict=True)) if of}


def network_scores(score: NetworkScore, network: nn.Module, data: Data, bench: Workbench) -> Tensor:
    """The scores that one network gives every sample, without augmentation, [N] float64.

    Args:
        score: see `losses.scores`. network: inputs to logits, in eval mode. data: labelled. bench: passes the data through it.

    Raises:
        InputError: 'grand_last_layer' where the network does not end in a linear layer on vectors.

    Source: 2403.07854 items 2c and 2d of our sheet.
    """
    labels_N, seen = cast(Tensor, data.targets).to(bench.device), 0
    of_batch = _OF_BATCH[score]

    def forward(inputs: Tensor) -> Tensor:
        nonlocal seen
        labels_B, seen = labels_N[seen : seen + len(inputs)], seen + len(inputs)
        return of_batch(network, inputs, labels_B)

    return bench.outputs(forward, data).double()


def _el2n(network: nn.Module, inputs: Tensor, labels_B: Tensor) -> Tensor:
    return el2n(logits_of(network(inputs)), labels_B)


def _grand_last_layer(network: nn.Module, inputs: Tensor, labels_B: Tensor) -> Tensor:
    layers = [layer for layer in network.modules() if isinstance(layer, nn.Linear)]
    seen: list[tuple[Tensor, Tensor]] = []

    def keep(_layer: nn.Module, given: tuple[Any, ...], answer: Tensor) -> None:
        seen.append((given[0], answer))

    hooks = [layer.register_forward_hook(keep) for layer in layers[-1:]]
    try:
        logits_BC = logits_of(network(inputs))
    finally:
        for hook in hooks:
            hook.remove()
    if not seen or seen[-1][0].dim() != 2 or seen[-1][1].shape != logits_BC.shape or not torch.equal(seen[-1][1], logits_BC):
        what = f"{type(network).__name__} does not end in a linear layer on vectors."
        raise InputError(what, where="score", fix="Use 'grand', the exact norm of the whole gradient.")
    return grand_last_layer(logits_BC, labels_B, seen[-1][0], bias=layers[-1].bias is not None)


_OF_BATCH: dict[str, Callable[[nn.Module, Tensor, Tensor], Tensor]] = {"el2n": _el2n, "grand": grand, "grand_last_layer": _grand_last_layer}


def read_scores(path: str, total: int) -> Tensor:
    """Scores out of a NumPy file (.npy), [N] float64; infinite ones may be among them.

    Args:
        path: of the file, written by `numpy.save`. total: N, the number of training samples.

    Raises:
        InputError: there is no such file, it is no NumPy file, or holds something else than N numbers; `where` is 'file'.
    """
    fix = "Write it with numpy.save, one number for each training sample, in their order."
    try:
        found = np.load(Path(path), allow_pickle=False)
    except OSError as error:
        raise InputError(f"the scores cannot be read: {error.strerror or error}.", where="file", fix=fix) from error
    except (ValueError, EOFError) as error:
        raise InputError(f"'{path}' is not a NumPy file: {error}.", where="file", fix=fix) from error
    if not isinstance(found, np.ndarray) or found.shape != (total,) or found.dtype.kind not in "fiub":
        shape = f"{list(found.shape)} {found.dtype}" if isinstance(found, np.ndarray) else "several arrays"
        raise InputError(f"'{path}' holds {shape}, and there are {total} training samples.", where="file", fix=fix)
    scores_N = torch.from_numpy(found.astype(np.float64))
    if missing := int(scores_N.isnan().sum()):
        raise InputError(f"{missing} of {total} scores in '{path}' are NaN.", where="file", fix=fix)
    return scores_N
