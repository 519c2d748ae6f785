"""Teachers that live in this process: a module, an ensemble of modules, a function. All are frozen and answer without gradient."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Self

import torch
from torch import Tensor, nn

from limbeck.contract import Batch, Teacher
from limbeck.errors import InputError
from limbeck.losses import log_mean_probabilities
from limbeck.models.outputs import logits_of


class FrozenTeacher(nn.Module):
    """What the teachers below share: `members`, frozen and always in eval mode, and their answers.

    The modules are taken over, not copied: their parameters stop requiring gradients, they go to eval mode, and they move to another device with
    the teacher. Give `copy.deepcopy(module)` to go on training one. Their weights and buffers are never written to: whatever calls `.train()` on
    them, on the teacher or on a module around it, they answer in eval mode.

    Args:
        members: networks from inputs [B, ...] to logits [B, C], or to an object with `logits`; all with the same C.

    Raises:
        InputError: there is no member, or one is not a module; when asked: the answers are not [B, C], or the members differ in C.
    """

    def __init__(self, members: Sequence[nn.Module]) -> None:
        super().__init__()
        if not members:
            raise InputError("an ensemble needs at least one teacher.", where="teacher", fix="Add one.")
        for member in members:
            if not isinstance(member, nn.Module):
                raise InputError(f"{type(member).__name__} is not a torch.nn.Module.", where="teacher", fix="Wrap a function in FunctionTeacher.")
        self.members = nn.ModuleList(members)
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> Self:
        """Stays in eval mode, whatever is asked."""
        return super().train(False)

    def logits(self, batch: Batch) -> Tensor:
        """[B, C] without gradient: `forward` of the batch's inputs."""
        return self(batch.inputs)

    @torch.no_grad()
    def all_logits(self, batch: Batch) -> Tensor:
        """[T, B, C] without gradient: one slice a member, as they gave them."""
        return self._answers(batch.inputs)

    def _answers(self, inputs: Tensor) -> Tensor:
        with _at_rest(self):
            answers = [_checked(logits_of(member(inputs)), inputs) for member in self.members]
        if len({answer.shape[1] for answer in answers}) > 1:
            counts = ", ".join(str(answer.shape[1]) for answer in answers)
            raise InputError(f"the teachers do not have the same classes: {counts}.", where="teacher", fix="Teach with networks of one label set.")
        return torch.stack(answers)


class ModuleTeacher(FrozenTeacher):
    """One frozen network that teaches; `logits` is what it returns. The module is taken over, not copied (`FrozenTeacher`).

    Raises:
        InputError: it is not a module; when asked: it does not return logits [B, C].
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__([module])

    @torch.no_grad()
    def forward(self, inputs: Tensor) -> Tensor:
        """Inputs [B, ...] -> the network's logits [B, C]."""
        return self._answers(inputs)[0]


class EnsembleTeacher(FrozenTeacher):
    """Frozen networks that teach together; `logits` is the log of their mean probability. They are taken over, not copied (`FrozenTeacher`).

    Raises:
        InputError: there is no member, or one is not a module; when asked: the members differ in the number of classes.
    """

    @torch.no_grad()
    def forward(self, inputs: Tensor) -> Tensor:
        """Inputs [B, ...] -> log mean_t softmax(logits_t) [B, C], in float32 or wider."""
        return log_mean_probabilities(self._answers(inputs))


class FunctionTeacher(ModuleTeacher):
    """A function from inputs [B, ...] to logits [B, C] that teaches; what it closes over is its own affair (put networks in eval mode).

    Raises:
        InputError: it cannot be called; when asked: it does not return logits [B, C].
    """

    def __init__(self, function: Callable[[Tensor], Any]) -> None:
        super().__init__(_Function(function))


class _Function(nn.Module):
    """A function as a module without parameters."""

    def __init__(self, function: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, inputs: Tensor) -> Any:
        return self.function(inputs)


def as_teacher(source: Any) -> Teacher:
    """A teacher from a teacher (itself), a module, a list of modules (an ensemble), or a function from inputs to logits.

    Raises:
        InputError: it is none of these.
    """
    if callable(getattr(source, "logits", None)) and callable(getattr(source, "all_logits", None)):
        return source
    if isinstance(source, (list, tuple, nn.ModuleList)):
        return EnsembleTeacher(list(source))
    if isinstance(source, nn.Module):
        return ModuleTeacher(source)
    if callable(source) and not isinstance(source, type):
        return FunctionTeacher(source)
    raise InputError(
        f"a {type(source).__name__} cannot teach.",
        where="teacher",
        fix="Give a module, a list of modules, a function from inputs to logits, or an object with logits(batch) and all_logits(batch).",
    )


@contextmanager
def _at_rest(module: nn.Module) -> Iterator[None]:
    """Eval mode within, for all parts, and each part's own mode after: a part may be shared with a student that is training."""
    busy = [part for part in module.modules() if part.training]
    for part in busy:
        part.training = False
    try:
        yield
    finally:
        for part in busy:
            part.training = True


def _checked(logits: Tensor, inputs: Tensor) -> Tensor:
    if logits.ndim != 2 or len(logits) != len(inputs):
        raise InputError(f"a teacher returned logits of shape {tuple(logits.shape)} for {len(inputs)} inputs.", where="teacher", fix="Return [batch, classes].")
    return logits
