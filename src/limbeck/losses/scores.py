"""Scores of single samples, from a network's logits or gradients: how sure it is of each, how wrong, and how often it forgot it.

Legend: B samples, C classes, p = softmax(logits), e_y the one-hot vector of the label y. All scores are float64, [B], without gradient to be relied on.
Targets are [B] int64; a sample without a label (IGNORE = −100) has the score NaN wherever labels are needed. Nothing here waits for the device.
Scores of several networks (the E over initialisations of 2403.07854, items 2c and 2d of our sheet) are averaged by the caller.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.func import grad as gradient_of

from limbeck.contract import IGNORE
from limbeck.errors import InputError
from limbeck.modes import evaluating


def confidence(logits_BC: Tensor) -> Tensor:
    """Probability of the most probable class, max p, in [1/C, 1]. Raises InputError where the logits are not [B, C]."""
    return _log_probabilities(logits_BC).amax(-1).exp()


def margin(logits_BC: Tensor) -> Tensor:
    """p(1) − p(2), the gap between the two most probable classes, in [0, 1]. Source: 2210.01213 item 1 of our sheet (the gain is 1 − margin).

    Raises:
        InputError: the logits are not [B, C] with C ≥ 2.
    """
    log_p_BC = _log_probabilities(logits_BC)
    if log_p_BC.shape[1] < 2:
        raise InputError("a margin needs two classes, and there is one.", where="logits", fix="Give logits of shape [B, C], C ≥ 2.")
    first_B, second_B = log_p_BC.topk(2, dim=-1).values.exp().unbind(-1)
    return first_B - second_B


def entropy(logits_BC: Tensor, normalised: bool = False) -> Tensor:
    """−Σ_c p_c log p_c in nats, in [0, log C]; `normalised`: divided by log C, so in [0, 1] (0 where C = 1). Logits of −∞ count as p = 0.

    Raises:
        InputError: the logits are not [B, C].
    """
    log_p_BC = _log_probabilities(logits_BC)
    found_B = -(log_p_BC.exp() * log_p_BC.clamp(min=torch.finfo(torch.float64).min)).sum(-1)
    return found_B / math.log(max(log_p_BC.shape[1], 2)) if normalised else found_B


def loss(logits_BC: Tensor, targets_B: Tensor) -> Tensor:
    """Cross-entropy −log p_y in nats, NaN where unlabelled. Raises InputError where the shapes are not [B, C] and [B]."""
    return torch.where(targets_B == IGNORE, torch.nan, -_of_label(_log_probabilities(logits_BC), targets_B))


def el2n(logits_BC: Tensor, targets_B: Tensor) -> Tensor:
    """‖p − e_y‖₂, the norm of the loss's gradient at the logits: in [0, √2], 0 for a sure and right prediction, NaN where unlabelled.

    Args:
        logits_BC: [B, C]. targets_B: [B] int64.

    Raises:
        InputError: shapes that are not these.

    Source: 2403.07854 item 2d of our sheet. 1 − p_y is summed over the other classes, so that small scores keep their digits.
    """
    log_p_BC = _log_probabilities(logits_BC)
    _check_targets(log_p_BC, targets_B)
    others_BC = log_p_BC.exp().scatter(1, _clamped(targets_B)[:, None], 0.0)
    found_B = (others_BC.square().sum(-1) + others_BC.sum(-1).square()).sqrt().clamp(max=math.sqrt(2))
    return torch.where(targets_B == IGNORE, torch.nan, found_B)


def grand_last_layer(logits_BC: Tensor, targets_B: Tensor, features_BH: Tensor, bias: bool = True) -> Tensor:
    """Norm of the loss's gradient at a last linear layer, ‖p − e_y‖₂ √(‖h‖² + 1): exact, without a backward pass. NaN where unlabelled.

    Args:
        logits_BC: W h + b, [B, C]. targets_B: [B] int64. features_BH: h, the layer's input, [B, H] (more dimensions are flattened).
        bias: whether the layer has b; without it the 1 is left out.

    Raises:
        InputError: shapes that are not these.

    Source: 2403.07854 item 2c of our sheet.
    """
    if features_BH.dim() < 2 or len(features_BH) != len(logits_BC):
        what = f"features of shape {list(features_BH.shape)} do not go with {len(logits_BC)} rows of logits."
        raise InputError(what, where="features", fix="Give [B, H], the input of the last layer.")
    return el2n(logits_BC, targets_B) * (features_BH.double().flatten(1).square().sum(-1) + float(bias)).sqrt()


def grand(module: nn.Module, inputs: Tensor, targets_B: Tensor, chunk: int = 32) -> Tensor:
    """Norm of each sample's gradient of the cross-entropy at the whole parameter vector, ‖∂CE_i/∂θ‖₂: exact. NaN where unlabelled.

    The module answers in eval mode (batch norms by their running statistics, no dropout) and is left as it was; every parameter counts, frozen ones too.

    Args:
        module: from inputs [B, …] to logits [B, C], or to an object with `logits`; it must be one that `torch.func.vmap` can map.
        inputs: [B, …], prepared. targets_B: [B] int64, on the same device.
        chunk: samples at once; each holds a copy of the gradient in memory.

    Raises:
        InputError: lengths that differ, a chunk below 1, or answers that are not [B, C].

    Source: 2403.07854 item 2c of our sheet.
    """
    if targets_B.dim() != 1 or len(inputs) != len(targets_B):
        raise InputError(f"{len(inputs)} inputs and targets of shape {list(targets_B.shape)}.", where="targets", fix="Give one label for each input.")
    if chunk < 1:
        raise InputError(f"a chunk of {chunk} samples.", where="chunk", fix="Give 1 or more.")
    if not len(inputs):
        return torch.zeros(0, dtype=torch.float64, device=inputs.device)
    parameters = {name: p.detach() for name, p in module.named_parameters()}
    buffers = {name: b.detach() for name, b in module.named_buffers()}
    places = _places(module)

    def loss_of(parameters: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        placed = {place: parameters[name] for place, name in places.items()}
        answer = functional_call(module, placed | buffers, (x[None],), tie_weights=False)
        logits = getattr(answer, "logits", answer)
        if not isinstance(logits, Tensor) or logits.dim() != 2:
            found = f"logits of shape {list(logits.shape)}" if isinstance(logits, Tensor) else type(logits).__name__
            raise InputError(f"the network answers with {found}, not with [B, C].", where="module", fix="Give a classifier.")
        return -logits.log_softmax(-1)[0].gather(0, y.clamp(min=0)[None])[0]

    def norm_of(x: Tensor, y: Tensor) -> Tensor:
        parts = [g.double().square().sum() for g in gradient_of(loss_of)(parameters, x, y).values()]
        return torch.stack(parts).sum().sqrt()

    with evaluating(module):
        found_B = vmap(norm_of, chunk_size=chunk)(inputs, targets_B)
    return torch.where(targets_B == IGNORE, torch.nan, found_B)


def forgetting(correct_T: Tensor) -> Tensor:
    """How often a sample was classified rightly at one visit and wrongly at the next; +∞ where never rightly, so also without a visit.

    Args:
        correct_T: [T] or [T, N] booleans (or 0 and 1), one row a visit, in order.

    Returns:
        [] or [N] float64. Source: 2403.07854 item 2b of our sheet: 0,1,0,1,1,0 gives 2; 0,0,0 gives ∞; 1,1,1 gives 0.
    """
    right_T = correct_T.bool()
    found = (right_T[:-1] & ~right_T[1:]).sum(0).double()
    return torch.where(right_T.any(0), found, torch.inf)


class ForgettingCounter:
    """`forgetting` of N samples, counted while a network trains, with the predictions of the training batches (before the update).

    Args:
        total: N ≥ 1; samples are told apart by their ids, positions in [0, N).
        device: where the counts lie; they move to the device of the first ids that come from another one.

    Raises:
        InputError: N below 1.
    """

    def __init__(self, total: int, device: torch.device | str = "cpu") -> None:
        if total < 1:
            raise InputError(f"forgetting is counted for {total} samples.", where="total", fix="Give the number of training samples.")
        self.total = total
        # One place more than samples: what is not to be written goes there, so that no shape depends on a value.
        self._last = torch.zeros(total + 1, dtype=torch.bool, device=device)
        self._forgotten, self._right, self._visits = (torch.zeros(total + 1, dtype=torch.int64, device=device) for _ in range(3))

    @torch.no_grad()
    def update(self, ids_B: Tensor, correct_B: Tensor) -> None:
        """Count one batch of visits, without waiting for the device. Rows of the same sample are visits in the order of the batch.

        Args:
            ids_B: [B] int64 in [0, N), on the device of `correct_B`. correct_B: [B] booleans (or 0 and 1): whether the prediction was right.

        Raises:
            InputError: shapes that are not these.
        """
        if ids_B.dim() != 1 or correct_B.shape != ids_B.shape:
            raise InputError(f"ids of shape {list(ids_B.shape)}, answers of shape {list(correct_B.shape)}.", where="correct", fix="Give [B] and [B].")
        if not len(ids_B):
            return
        self._move(ids_B.device)
        order_B = ids_B.argsort(stable=True)
        id_B, right_B = ids_B[order_B], correct_B.bool()[order_B]
        repeated_B = torch.cat([id_B.new_zeros(1, dtype=torch.bool), id_B[1:] == id_B[:-1]])
        before_B = torch.where(repeated_B, right_B.roll(1), self._last[id_B])
        self._forgotten.index_add_(0, id_B, (before_B & ~right_B).long())
        self._right.index_add_(0, id_B, right_B.long())
        self._visits.index_add_(0, id_B, torch.ones_like(id_B))
        followed_B = torch.cat([repeated_B[1:], repeated_B.new_zeros(1)])
        self._last.index_copy_(0, torch.where(followed_B, self.total, id_B), right_B)

    def counts(self) -> Tensor:
        """[N] float64: times forgotten, +∞ where never classified rightly, which a sample that was never visited is too (`visits` tells)."""
        return torch.where(self._right > 0, self._forgotten.double(), torch.inf)[: self.total]

    def visits(self) -> Tensor:
        """[N] int64: times each sample was seen."""
        return self._visits[: self.total].clone()

    def state_dict(self) -> dict[str, Tensor]:
        """Everything counted, and each sample's last answer."""
        return {name: tensor[: self.total].clone() for name, tensor in self._tensors().items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put it back.

        Raises:
            InputError: it is of another number of samples.
        """
        for name, tensor in self._tensors().items():
            if state[name].shape != (self.total,):
                what = f"the counts are of {len(state[name])} samples, and there are {self.total}."
                raise InputError(what, where=name, fix="Go on with the data they were counted on.")
            tensor[: self.total] = state[name].to(tensor.device)

    def _tensors(self) -> dict[str, Tensor]:
        return {"last": self._last, "forgotten": self._forgotten, "right": self._right, "visits": self._visits}

    def _move(self, device: torch.device) -> None:
        if self._last.device != device:
            self._last, self._forgotten, self._right, self._visits = (t.to(device) for t in self._tensors().values())


@dataclass(frozen=True)
class RecordedScore:
    """A score that a record can hold beside the logits: called with logits [B, C] and targets ([B] int64, or None), it gives [B] float64."""

    function: Callable[..., Tensor]
    needs_labels: bool
    higher_is_harder: bool

    def __call__(self, logits_BC: Tensor, targets_B: Tensor | None = None) -> Tensor:
        """The scores. Raises InputError where labels are needed and there are none."""
        if not self.needs_labels:
            return self.function(logits_BC)
        if targets_B is None:
            what = f"the score '{self.function.__name__}' needs labels, and there are none."
            raise InputError(what, where="scores", fix=f"Without labels: {', '.join(name for name, s in RECORDED.items() if not s.needs_labels)}.")
        return self.function(logits_BC, targets_B)


RECORDED: Mapping[str, RecordedScore] = {
    "confidence": RecordedScore(confidence, needs_labels=False, higher_is_harder=False),
    "margin": RecordedScore(margin, needs_labels=False, higher_is_harder=False),
    "entropy": RecordedScore(entropy, needs_labels=False, higher_is_harder=True),
    "el2n": RecordedScore(el2n, needs_labels=True, higher_is_harder=True),
    "loss": RecordedScore(loss, needs_labels=True, higher_is_harder=True),
}
"""Name → score, for `limbeck record`."""


def _log_probabilities(logits_BC: Tensor) -> Tensor:
    """log p, [B, C] float64."""
    if logits_BC.dim() != 2 or not logits_BC.shape[1]:
        raise InputError(f"logits have the shape {list(logits_BC.shape)}.", where="logits", fix="Give [B, C], one row a sample.")
    return logits_BC.double().log_softmax(-1)


def _of_label(log_p_BC: Tensor, targets_B: Tensor) -> Tensor:
    """log p_y, [B]; of class 0 where unlabelled."""
    _check_targets(log_p_BC, targets_B)
    return log_p_BC.gather(1, _clamped(targets_B)[:, None])[:, 0]


def _check_targets(log_p_BC: Tensor, targets_B: Tensor) -> None:
    if targets_B.shape != log_p_BC.shape[:1] or targets_B.is_floating_point():
        what = f"targets are {targets_B.dtype} of shape {list(targets_B.shape)} for {len(log_p_BC)} samples."
        raise InputError(what, where="targets", fix="Give class numbers, [B] int64.")
    if len(targets_B) and int(targets_B.max()) >= log_p_BC.shape[-1]:
        what = f"a target is {int(targets_B.max())}, and the logits have {log_p_BC.shape[-1]} classes."
        raise InputError(what, where="targets", fix="Classes count from 0.")


def _clamped(targets_B: Tensor) -> Tensor:
    """The labels, 0 where there is none."""
    return targets_B.long().clamp(min=0)


def _places(module: nn.Module) -> dict[str, str]:
    """Every attribute that holds a parameter → that parameter's name in `named_parameters`, each attribute once.

    `functional_call` ties weights by itself, but a part that a module uses under two names is then not put back as it was (PyTorch 2.14).
    """
    names = {p: name for name, p in module.named_parameters()}
    parts = module.named_modules()  # a part under two names once
    return {f"{part}.{slot}" if part else slot: names[p] for part, m in parts for slot, p in m.named_parameters(recurse=False, remove_duplicate=False)}
