"""A teacher that changes on a schedule: recorded states of one denoiser, and which of them is the target at an iteration.

For every score-distillation method, not for DisBack (arXiv 2408.15991) alone: ask `ScheduledTeacher.at(iteration)` where the teacher would be asked.
Legend: θ'_0 the teacher, θ'_1, …, θ'_N the states it went through, node i = θ'_i.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

from limbeck.diffusion.denoisers import Denoiser
from limbeck.errors import InputError

Storage = Literal["cpu", "device"]


class TeacherSchedule(Protocol):
    """Which node is the target at an iteration (from 0): a pure function, so that a run which is taken up again goes on with the same one."""

    def node(self, iteration: int) -> int:
        """Number of the node."""
        ...


@dataclass(frozen=True)
class Backtracking:
    """The recorded path in reverse: N−1, N−2, …, 0, each for `iterations`, and node 0 for good (our sheet, eq. 5).

    nodes: N, the states recorded beyond the teacher; 0 and 1 leave the teacher alone. iterations: m2.

    Raises:
        InputError: a number is out of range.
    """

    nodes: int
    iterations: int

    def __post_init__(self) -> None:
        if self.nodes < 0 or self.iterations < 1:
            raise InputError(f"{self.nodes} nodes of {self.iterations} iterations cannot be gone through.", where="iterations_per_node")

    def node(self, iteration: int) -> int:
        """The target at this iteration."""
        return max(self.nodes - 1 - iteration // self.iterations, 0)

    def switched(self, iteration: int) -> bool:
        """Whether this iteration is the first with another target than the one before."""
        return iteration > 0 and self.node(iteration) != self.node(iteration - 1)

    @property
    def switches(self) -> tuple[int, ...]:
        """The iterations at which the target changes, N − 1 of them."""
        return tuple(k * self.iterations for k in range(1, self.nodes))


class TeacherPath:
    """States of one denoiser in the order of recording, deep copies all.

    storage: 'cpu' keeps them in main memory, 'device' where the module was (faster switches, N + 1 networks of its memory).
    """

    def __init__(self, storage: Storage = "cpu") -> None:
        self.storage = storage
        self.states: list[dict[str, Tensor]] = []

    def __len__(self) -> int:
        return len(self.states)

    def record(self, module: nn.Module) -> None:
        """Append a copy of the module's state."""
        self.states.append({name: _copied(value, self.storage) for name, value in module.state_dict().items()})

    def load(self, node: int, into: nn.Module) -> None:
        """Put a node's weights into a module of the same build. Every tensor must find its place: a node that is loaded in part would be the teacher still.

        Raises:
            InputError: there is no such node, or the module is built in another way.
        """
        if not 0 <= node < len(self.states):
            raise InputError(f"there is no node {node}: {len(self.states)} were recorded.", where="node")
        try:
            into.load_state_dict(self.states[node], strict=True)
        except RuntimeError as error:
            raise InputError(f"node {node} does not fit the teacher: {' '.join(str(error).split())[:200]}", where="node") from error

    def state_dict(self) -> list[dict[str, Tensor]]:
        """Every node, for a checkpoint."""
        return [dict(state) for state in self.states]

    def load_state_dict(self, states: Sequence[Mapping[str, Tensor]]) -> None:
        """Put them back, as copies (in main memory, where checkpoints are read to)."""
        self.states = [{name: _copied(value, "device") for name, value in state.items()} for state in states]


class ScheduledTeacher:
    """One frozen denoiser that holds the weights of the active node; `denoiser` is always the same module, so that it may be wrapped (guided) once.

    Args:
        teacher: what the path begins with; its own weights are never touched.
    """

    def __init__(self, teacher: Denoiser, path: TeacherPath, schedule: TeacherSchedule) -> None:
        self.denoiser: Denoiser = copy.deepcopy(teacher).requires_grad_(False).eval()
        self.path, self.schedule = path, schedule
        self.loaded: int | None = None

    def at(self, iteration: int) -> Denoiser:
        """The target at this iteration; its weights are copied only where the node changes.

        Raises:
            InputError: the schedule asks for a node that was not recorded.
        """
        node = self.schedule.node(iteration)
        if node != self.loaded:
            self.path.load(node, self.denoiser)
            self.loaded = node
        return self.denoiser


@torch.no_grad()
def score_mismatch(target_x0: Tensor, teacher_x0: Tensor, critic_x0: Tensor) -> Tensor:
    """M = E‖D_i − D_φ‖² / E‖D_θ − D_φ‖² (a scalar): how far the active target is from the critic, in units of the teacher's distance.

    All [B, ...], answers to the same student samples, noised alike. 1 where the target is the teacher; well below 1 on a path that helps. 0/0 is NaN.

    Source: our sheet, eq. 6, after the idea of arXiv 2408.15991.
    """
    return (target_x0 - critic_x0).square().mean() / (teacher_x0 - critic_x0).square().mean()


def _copied(value: Tensor, storage: Storage) -> Tensor:
    return value.detach().to("cpu" if storage == "cpu" else value.device, copy=True)
