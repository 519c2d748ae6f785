"""Expert trajectories: many networks trained on the real images, their weights kept after every epoch (arXiv 2203.11932; our sheets `ftd` and `ast`).

What FTD (arXiv 2211.11004) and AST (arXiv 2310.10541) change about the experts are fields of `ExpertSpec`; which fields make a paper's expert is a recipe's
business. Expert i is a function of (seed, i) alone: its first weights, the order of its images and its augmentations are drawn from them, so that neither
the number of experts nor a kill changes it. Experts that go together (`together`) differ from those that go one by one by rounding alone.

Legend: G experts that go together, P parameters, B images of a batch, C classes; images [B, channels, height, width] as a network takes them.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol

import safetensors.torch
import torch
from pydantic import Field
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.func import grad, grad_and_value, vmap

from limbeck.contract import Frozen
from limbeck.errors import InputError
from limbeck.files import sync_folder, write_atomic
from limbeck.lock import locked
from limbeck.records.manifest import check_identity, plain
from limbeck.seeds import derive, generator
from limbeck.synthetic.augment import DSASpec, dsa
from limbeck.synthetic.flat import FlatNetwork
from limbeck.synthetic.sharpness import SharpnessSpec, descent_direction
from limbeck.synthetic.trajectories import (
    MANIFEST,
    Trajectories,
    check_lengths,
    check_sums,
    checksum,
    expert_file,
    read_manifest,
    read_snapshot,
    write_manifest,
)

STATE = "group.safetensors"
"""The file that holds what the experts in training need beside their snapshots."""
JUDGED = 2000
"""At most so many training images are looked at for an expert's accuracy."""
TOGETHER = 8
"""How many experts go together on an accelerator where a recipe does not say (a guess: measured on a CPU alone, `benchmarks/experts.py`)."""

_AGAIN = "The experts in training then begin again; those that are whole stay."

Norm = Literal["per_pixel", "per_image"]


class RateDrop(Frozen):
    """The learning rate falls once, and the momentum buffer starts afresh (AST's released code, as MTT's before it)."""

    factor: float = Field(0.6, gt=0, le=1, description="what the rate is multiplied by (AST's released code)")
    after: int | None = Field(None, ge=0, description="last epoch, counted from 0, at the full rate; none: ⌊epochs/2⌋ + 1 (released code)")


class LossRamp(Frozen):
    """c_e = min(1, start + step · e), epochs counted from 0: a scale on the cross-entropy (AST's "clipping loss"; our sheet `ast`, eq. 1)."""

    start: float = Field(0.5, gt=0, le=1, description="c_0 (AST's released code)")
    step: float = Field(0.05, ge=0, description="what c grows by each epoch until it is 1 (AST's released code)")

    def at(self, epoch: int) -> float:
        """c_e."""
        return min(1.0, self.start + self.step * epoch)


class GradientPenalty(Frozen):
    """λ · mean (‖∂ Σ_k f(x)_k / ∂x‖ − 1)² on the images before augmentation (our sheet `ast`, eq. 2)."""

    weight: float = Field(2.0, ge=0, description="λ (AST's released code)")
    norm: Norm = Field("per_pixel", description="'per_pixel': the norm runs over channels (AST's released code); 'per_image': over the whole image")


class ExpertSpec(Frozen):
    """How the experts are trained: SGD on the cross-entropy. The defaults are MTT's (arXiv 2203.11932)."""

    count: int = Field(100, ge=1, description="experts (MTT, FTD, AST's readme)")
    epochs: int = Field(50, ge=1, description="E, epochs, after each of which the weights are kept (MTT, FTD, AST)")
    batch_size: int = Field(256, ge=1, description="images a step; the last batch of an epoch may be smaller (MTT, FTD, AST)")
    lr: float = Field(0.01, gt=0, description="learning rate (MTT, FTD; AST's released code 0.003)")
    momentum: float = Field(0.0, ge=0, lt=1, description="heavy-ball momentum μ, v ← μ v + g (MTT, FTD 0; AST's released code 0.9)")
    weight_decay: float = Field(0.0, ge=0, description="added to the gradient as weight_decay · θ (MTT, FTD 0; AST's released code 0.001)")
    rate_drop: RateDrop | None = Field(None, description="one drop of the rate (MTT, FTD none; AST's released code 0.6)")
    augment: DSASpec | None = Field(DSASpec(), description="differentiable augmentation of every batch (MTT, FTD, AST); none: off")
    sharpness: SharpnessSpec | None = Field(None, description="flat minima (FTD); none: plain SGD")
    loss_scale: LossRamp | None = Field(None, description="ramp on the cross-entropy (AST, eq. 1); none: 1")
    gradient_penalty: GradientPenalty | None = Field(None, description="penalty on the inputs' gradient (AST, eq. 2); none: off")
    together: int | None = Field(
        None,
        ge=1,
        description="experts that one pass trains; none: 1 on a CPU (where it was the fastest for convolutions), 8 elsewhere. Changes rounding alone",
    )

    def rate(self, epoch: int) -> float:
        """The learning rate in an epoch, counted from 0."""
        return self.lr * self.rate_drop.factor if self.rate_drop and epoch > self._last_full() else self.lr

    def starts_afresh(self, epoch: int) -> bool:
        """Whether the momentum buffer is emptied before an epoch, counted from 0."""
        return self.rate_drop is not None and epoch == self._last_full() + 1

    def _last_full(self) -> int:
        after = self.rate_drop.after if self.rate_drop else None
        return self.epochs // 2 + 1 if after is None else after

    def at_once(self, device: torch.device) -> int:
        """How many experts go together on a device."""
        return self.together or (1 if device.type == "cpu" else TOGETHER)


class Watch(Protocol):
    """Who is told about the progress: `limbeck.train.progress` fits."""

    def start(self, label: str, steps: int, done: int, unit: str = ...) -> None:
        """A stretch of `steps` units begins, `done` of them already behind."""

    def advance(self, step: int, note: str = ...) -> None:
        """Units done so far."""

    def stop(self) -> None:
        """The stretch is over."""


# ---- the objective ---------------------------------------------------------------------------------------------------


def input_gradient_penalty(net: Callable[[Tensor, Tensor], Tensor], theta_P: Tensor, x_B: Tensor, norm: Norm = "per_pixel") -> Tensor:
    """Mean of (n − 1)² with n the norm of h(x) = ∂ Σ_k f_θ(x)_k / ∂x, a scalar, differentiable in θ (arXiv 2310.10541's released code; our sheet `ast`, eq. 2).

    Args:
        net: weights [P] and images -> logits [B, C]. theta_P: [P]. x_B: images [B, channels, height, width].
        norm: 'per_pixel': over channels, the mean runs over images and pixels; 'per_image': over the whole image (ours).
    """
    h_B = grad(lambda x: net(theta_P, x).sum())(x_B)
    n = torch.linalg.vector_norm(h_B, dim=1 if norm == "per_pixel" else (1, 2, 3))
    return (n - 1).square().mean()


def expert_loss(
    net: Callable[[Tensor, Tensor], Tensor],
    theta_P: Tensor,
    augmented_B: Tensor,
    clean_B: Tensor,
    labels_B: Tensor,
    *,
    scale: float = 1.0,
    penalty: GradientPenalty | None = None,
) -> Tensor:
    """c_e · CE(f_θ(A(x)), y) + λ · penalty(x), a scalar (our sheet `ast`, eq. 3; without scale and penalty MTT's).

    Args:
        net: weights [P] and images -> logits [B, C]. theta_P: [P]. augmented_B, clean_B: A(x) and x, [B, channels, height, width]. labels_B: [B] int64.
        scale: c_e. penalty: None: none.
    """
    value = scale * nn.functional.cross_entropy(net(theta_P, augmented_B), labels_B)
    return value if penalty is None else value + penalty.weight * input_gradient_penalty(net, theta_P, clean_B, penalty.norm)


Loss = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def gradients(loss: Loss, theta_GP: Tensor, augmented_GB: Tensor, clean_GB: Tensor, labels_GB: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient [G, P] and the loss [G] of every expert on its own batch: one batched pass, or for G = 1 an ordinary one. Detached.

    loss: weights [P], augmented and clean images, labels -> scalar. theta_GP: [G, P]. The rest: [G, B, ...].
    """
    if len(theta_GP) > 1:
        found_GP, value_G = vmap(grad_and_value(loss))(theta_GP, augmented_GB, clean_GB, labels_GB)
        return found_GP.detach(), value_G.detach()
    theta_P = theta_GP[0].detach().requires_grad_()
    value = loss(theta_P, augmented_GB[0], clean_GB[0], labels_GB[0])
    (found_P,) = torch.autograd.grad(value, theta_P)
    return found_P.unsqueeze(0), value.detach().unsqueeze(0)


# ---- training --------------------------------------------------------------------------------------------------------


@dataclass
class _Group:
    """Experts that go together: their numbers, epochs behind them, weights and momentum buffers [G, P], and the mean loss of each epoch [G][epoch]."""

    experts: tuple[int, ...]
    epoch: int
    weights: Tensor
    momentum: Tensor
    losses: list[list[float]] = field(default_factory=list)


def train_experts(
    spec: ExpertSpec,
    network: Callable[[int], nn.Module],
    inputs_NCHW: Tensor,
    labels_N: Tensor,
    num_classes: int,
    folder: Path | str,
    *,
    seed: int,
    identity: Mapping[str, Any],
    progress: Watch | None = None,
) -> Trajectories:
    """Train the experts that a folder does not hold yet, and open it (arXiv 2203.11932, stage 1).

    It may be killed at any moment: a second call goes on after the last epoch that was written and ends with the same bytes. A larger `count` trains only
    the experts that are missing. One process at a time writes to a folder, and others are refused meanwhile unless nothing is left to train. Experts that
    the folder holds already are read once and compared with their checksums.

    Args:
        network: seed -> a fresh network [B, channels, height, width] -> logits [B, C], without running statistics.
        inputs_NCHW: float32 images as the network takes them; training goes on on their device. labels_N: [N] int64.
        num_classes: C. folder: made if it is not there. seed: of everything random. progress: who is told.
        identity: what the images and the network come from, as JSON; a folder with another one is refused.

    Raises:
        InputError: shapes, labels or the network's outputs do not fit; the folder was made otherwise (it names the first field that differs) or is damaged;
            weights became infinite or NaN (it names expert and epoch); another process trains experts there (it names the process).
    """
    folder = Path(folder)
    _check_data(inputs_NCHW, labels_N, num_classes)
    net = FlatNetwork(network(derive(seed, "experts", "weights", 0)).to(inputs_NCHW.device))
    _check_network(net, inputs_NCHW, num_classes)
    wanted = _identity(spec, net, inputs_NCHW, labels_N, num_classes, seed, identity)
    if _nothing_to_do(folder, spec.count):
        _whole_experts(folder, wanted, spec.count)
    else:
        with locked(folder, "the folder of experts", fix="Wait for it, stop it, or name another folder for these experts."):
            _train_missing(_Training(spec, network, net, inputs_NCHW, labels_N, folder, seed), wanted, progress)
    return Trajectories.open(folder, spec.count)


def _train_missing(training: _Training, wanted: Mapping[str, Any], progress: Watch | None) -> None:
    """Train what a folder does not hold. Nobody else may write to it meanwhile."""
    spec, folder, size = training.spec, training.folder, training.net.size
    if not (folder / MANIFEST).exists():
        if any(not path.name.startswith(".") for path in folder.iterdir()):
            raise InputError("is not empty and holds no expert trajectories.", where=str(folder), fix="Name a new folder.")
        write_manifest(folder, wanted, size, spec.epochs, {})
    experts = _whole_experts(folder, wanted, spec.count)
    total = max(spec.count, len(experts)) * spec.epochs
    if progress:
        progress.start("experts", total, len(experts) * spec.epochs, "epochs")
    while (group := training.unfinished() or training.next_group(experts)) is not None:
        done = len(experts) * spec.epochs
        for _ in range(group.epoch, spec.epochs):
            training.epoch(group)
            if progress:
                progress.advance(min(total, done + len(group.experts) * group.epoch), f"loss {sum(row[-1] for row in group.losses) / len(group.losses):.3f}")
        experts |= training.finish(group)
        write_manifest(folder, wanted, size, spec.epochs, experts)
        (folder / STATE).unlink()
    if progress:
        progress.stop()


class _Training:
    """The experts' training in one folder."""

    def __init__(
        self, spec: ExpertSpec, network: Callable[[int], nn.Module], net: FlatNetwork, inputs_NCHW: Tensor, labels_N: Tensor, folder: Path, seed: int
    ) -> None:
        self.spec, self.network, self.net, self.folder, self.seed = spec, network, net, folder, seed
        self.inputs_NCHW, self.labels_N, self.device = inputs_NCHW, labels_N.to(inputs_NCHW.device), inputs_NCHW.device

    # -- groups

    def next_group(self, whole: Mapping[int, Any]) -> _Group | None:
        """The first experts that are missing, with their initial weights written; None where none is."""
        experts = tuple(number for number in range(self.spec.count) if number not in whole)[: self.spec.at_once(self.device)]
        if not experts:
            return None
        rows = [self.net.vector(self.network(derive(self.seed, "experts", "weights", number)).to(self.device)) for number in experts]
        group = _Group(experts, 0, torch.stack(rows), torch.zeros(len(experts), self.net.size, device=self.device), [[] for _ in experts])
        self._keep(group)
        return group

    def unfinished(self) -> _Group | None:
        """The group that was in training when a call ended early, as it was after its last whole epoch; None where there is none."""
        path = self.folder / STATE
        if not path.is_file():
            return None
        content = path.read_bytes()
        try:
            facts = json.loads(json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])["__metadata__"]["facts"])
            experts, epoch, losses = tuple(map(int, facts["experts"])), int(facts["epoch"]), [list(map(float, row)) for row in facts["losses"]]
            momentum_GP = safetensors.torch.load(content)["momentum"]
        except (ValueError, KeyError, TypeError, SafetensorError) as error:
            raise InputError("the state of the experts in training is damaged.", where=str(path), fix=f"Remove this file. {_AGAIN}") from error
        if momentum_GP.shape != (len(experts), self.net.size) or [len(row) for row in losses] != [epoch] * len(experts):
            raise InputError("the state of the experts in training does not fit the network.", where=str(path), fix=f"Remove this file. {_AGAIN}")
        rows = [read_snapshot(self._snapshots(number, epoch + 1), self.net.size, epoch) for number in experts]
        return _Group(experts, epoch, torch.stack(rows).to(self.device), momentum_GP.to(self.device), losses)

    def _part(self, expert: int) -> Path:
        """The file of an expert in training."""
        return expert_file(self.folder, expert).with_suffix(".part")

    def _snapshots(self, expert: int, count: int) -> Path:
        """The file of an expert in training, under its last name if it has it already. Raises InputError: it does not hold `count` snapshots."""
        last, part = expert_file(self.folder, expert), self._part(expert)
        return self._holding(last if last.is_file() and not part.is_file() else part, expert, count)

    def _holding(self, path: Path, expert: int, count: int) -> Path:
        """The path. Raises InputError: there are no `count` snapshots."""
        held = path.stat().st_size if path.is_file() else 0
        if held < count * self.net.size * 4:
            what = f"the weights of expert {expert} after epoch {count - 1} are gone: {held:,} bytes of {count * self.net.size * 4:,} are there."
            raise InputError(what, where=str(path), fix=f"Remove {self.folder / STATE}. {_AGAIN}")
        return path

    def _keep(self, group: _Group) -> None:
        """Write the snapshots of an epoch, and then what training needs to go on from there; it counts from the moment the second is written."""
        for number, theta_P in zip(group.experts, group.weights.cpu(), strict=True):
            path = self._holding(self._part(number), number, group.epoch)
            with path.open("r+b" if group.epoch else "wb") as handle:
                handle.seek(group.epoch * self.net.size * 4)
                handle.write(theta_P.numpy().astype("<f4").tobytes())
                handle.flush()
                os.fsync(handle.fileno())
        facts = json.dumps({"experts": group.experts, "epoch": group.epoch, "losses": group.losses})
        write_atomic(self.folder / STATE, safetensors.torch.save({"momentum": group.momentum.cpu()}, {"facts": facts}))

    def finish(self, group: _Group) -> dict[int, dict[str, Any]]:
        """Give the files of a group their last names: number -> what the manifest says about an expert."""
        found: dict[int, dict[str, Any]] = {}
        for row, number in enumerate(group.experts):
            path, found_at = expert_file(self.folder, number), self._snapshots(number, self.spec.epochs + 1)
            if found_at != path:
                found_at.replace(path)
            found[number] = {"sha256": checksum(path), "losses": group.losses[row], "accuracy": self._accuracy(group.weights[row])}
        sync_folder(self.folder)
        return found

    # -- steps

    def epoch(self, group: _Group) -> None:
        """One epoch of a group: θ and momentum move, the snapshot and the state are written."""
        spec, epoch, count = self.spec, group.epoch, len(self.inputs_NCHW)
        scale = spec.loss_scale.at(epoch) if spec.loss_scale else 1.0
        if spec.starts_afresh(epoch):
            group.momentum = torch.zeros_like(group.momentum)
        loss = partial(expert_loss, self.net, scale=scale, penalty=spec.gradient_penalty)
        orders = [torch.randperm(count, generator=generator(self.seed, "experts", "order", number, epoch)) for number in group.experts]
        order_GN = torch.stack(orders).to(self.device)
        summed_G = torch.zeros(len(group.experts), device=self.device)
        for step, rows_GB in enumerate(order_GN.split(spec.batch_size, dim=1)):
            clean_GB, labels_GB = self.inputs_NCHW[rows_GB], self.labels_N[rows_GB]
            augmented_GB = self._augmented(clean_GB, group.experts, epoch, step)
            gradient = partial(gradients, loss, augmented_GB=augmented_GB, clean_GB=clean_GB, labels_GB=labels_GB)
            d_GP, value_G = descent_direction(spec.sharpness, gradient, group.weights)
            if spec.weight_decay:
                d_GP = d_GP + spec.weight_decay * group.weights
            group.momentum = spec.momentum * group.momentum + d_GP if spec.momentum else group.momentum
            group.weights = group.weights - spec.rate(epoch) * (group.momentum if spec.momentum else d_GP)
            summed_G += value_G * rows_GB.shape[1]
        self._must_be_finite(group, summed_G)
        for losses, total in zip(group.losses, summed_G.tolist(), strict=True):
            losses.append(total / count)
        group.epoch += 1
        self._keep(group)

    def _augmented(self, clean_GB: Tensor, experts: Sequence[int], epoch: int, step: int) -> Tensor:
        """Every expert's batch with the augmentation that is drawn for it."""
        if self.spec.augment is None:
            return clean_GB
        draws = (generator(self.seed, "experts", "augment", number, epoch, step) for number in experts)
        return torch.stack([dsa(clean_B, self.spec.augment, draw) for clean_B, draw in zip(clean_GB, draws, strict=True)])

    def _must_be_finite(self, group: _Group, summed_G: Tensor) -> None:
        for number, fine in zip(group.experts, (group.weights.isfinite().all(1) & summed_G.isfinite()).tolist(), strict=True):
            if not fine:
                fix = "Take a lower learning rate, and another folder."
                raise InputError(f"the weights or the loss of expert {number} became infinite or NaN in epoch {group.epoch}.", where="experts.lr", fix=fix)

    def _accuracy(self, theta_P: Tensor) -> float:
        """The share of at most 2,000 training images, the same for all experts, that an expert gets right."""
        rows = torch.randperm(len(self.inputs_NCHW), generator=generator(self.seed, "experts", "accuracy"))[:JUDGED].to(self.device)
        right = torch.zeros((), dtype=torch.int64, device=self.device)
        with torch.no_grad():
            for part in rows.split(self.spec.batch_size):
                right += (self.net(theta_P, self.inputs_NCHW[part]).argmax(1) == self.labels_N[part]).sum()
        return int(right) / len(rows)


# ---- checks ----------------------------------------------------------------------------------------------------------


def _check_data(inputs_NCHW: Tensor, labels_N: Tensor, num_classes: int) -> None:
    if inputs_NCHW.dim() != 4 or inputs_NCHW.dtype != torch.float32 or not len(inputs_NCHW):
        found = f"{list(inputs_NCHW.shape)} {inputs_NCHW.dtype}"
        raise InputError(f"experts learn from images [N, channels, height, width] in float32, these are {found}.", where="inputs_NCHW")
    if labels_N.shape != (len(inputs_NCHW),) or labels_N.dtype != torch.int64:
        raise InputError(f"the labels are {list(labels_N.shape)} {labels_N.dtype} for {len(inputs_NCHW)} images.", where="labels_N", fix="Give [N] int64.")
    low, high = int(labels_N.min()), int(labels_N.max())
    if low < 0 or high >= num_classes:
        raise InputError(f"the labels go from {low} to {high}, the classes from 0 to {num_classes - 1}.", where="labels_N", fix="Leave out unlabelled images.")


def _check_network(net: FlatNetwork, inputs_NCHW: Tensor, num_classes: int) -> None:
    net.check(inputs_NCHW[:2])
    with torch.no_grad():
        theta_P = net.vector()
        shape = list(net(theta_P, inputs_NCHW[:2]).shape)
    if shape != [len(inputs_NCHW[:2]), num_classes] or theta_P.dtype != torch.float32:
        raise InputError(f"the network gives {shape} in {theta_P.dtype} for two images, not logits [2, {num_classes}] in float32.", where="network")


def _identity(
    spec: ExpertSpec, net: FlatNetwork, inputs_NCHW: Tensor, labels_N: Tensor, num_classes: int, seed: int, identity: Mapping[str, Any]
) -> dict[str, Any]:
    """Everything that decides an expert, as JSON; the number of experts and how many go together are not among it."""
    digest = hashlib.sha256()
    for tensor in (inputs_NCHW, labels_N):
        digest.update(tensor.detach().cpu().contiguous().numpy().data)
    experts = spec.model_dump(mode="json", exclude={"count", "together"})
    data = {"shape": list(inputs_NCHW.shape), "classes": num_classes, "sha256": digest.hexdigest()}
    theta_P = net.vector()  # of expert 0: what a network begins with is part of what an expert is
    network = {
        "parameters": net.size,
        "shapes": {name: list(piece.shape) for name, piece in net.split(theta_P).items()},
        "first_weights": hashlib.sha256(theta_P.cpu().numpy().data).hexdigest(),
    }
    return plain({"experts": experts, "seed": seed, "network": network, "data": data, "recipe": dict(identity)})


def _nothing_to_do(folder: Path, count: int) -> bool:
    """Whether the first `count` experts are whole and none is in training, so that nothing is written."""
    if not (folder / MANIFEST).exists() or (folder / STATE).exists():
        return False
    return {str(number) for number in range(count)} <= read_manifest(folder)["experts"].keys()


def _whole_experts(folder: Path, wanted: Mapping[str, Any], count: int) -> dict[int, dict[str, Any]]:
    """The experts that a folder holds, by number. Raises InputError: they were made otherwise, or one of the first `count` is damaged."""
    body = read_manifest(folder)
    fix = "Name another folder for these experts, or go back to what the others were trained from."
    check_identity(body["identity"], wanted, where=str(folder), fix=fix, subject="the experts were")
    experts = {int(number): found for number, found in body["experts"].items()}
    needed = {number: found for number, found in experts.items() if number < count}
    check_lengths(folder, needed, int(body["parameters"]), int(body["epochs"]))
    check_sums(folder, needed)
    return experts
