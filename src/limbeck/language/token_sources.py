"""Where the tokens of a step come from: the data, the teacher, the student, or earlier student texts (sheet `_language_distillation_engine` §6).

    GKD (2306.13649)       student with probability λ; else the teacher (`rest` "teacher", sequence-level KD), else the data
    DistiLLM (2402.03898)  r ~ U(0,1), ψ = φ (1 − step/steps): r < ψ a new student text, kept for replay; ψ ≤ r < φ replay; else data.
                           φ starts at 0 and rises by 0.1, to 1 at most, on a validation whose loss is at least the reference + 0.1
    MiniLLM (2306.08543)   tokens of (1 − a) q + a p: `rollout.Mixture`, with `rollout.importance_weights`

A choice is made for a batch or for each of its rows. Legend: B rows, L positions, n choices; r uniform numbers on the CPU, since Python follows them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import pad

from limbeck import seeds
from limbeck.contract import IGNORE, Clock, Data, Frozen
from limbeck.data.splits import root
from limbeck.errors import InputError
from limbeck.language.models import LanguageModel
from limbeck.language.rollout import Prompts, Rollout, Sampler
from limbeck.language.sources import ModelSource
from limbeck.language.tokenizers import Tokenizer
from limbeck.language.tokens import DATA, PADDING, REPLAY, STUDENT, TEACHER, TokenBatch

Each = Literal["batch", "row"]
"""What one choice is made for."""


class PromptSpec(Frozen):
    """Which part of a row is given, where the rest is drawn."""

    kind: Literal["part", "prefix"] = Field("part", description="'part': what stands before the first target; 'prefix': the first `length` tokens")
    length: int = Field(32, ge=1, le=1_000_000, description="'prefix': tokens that are given")

    def of(self, tokens: TokenBatch) -> Prompts:
        """The prompts of a batch's rows."""
        return Prompts.parts(tokens) if self.kind == "part" else Prompts.prefixes(tokens, self.length)


@dataclass(frozen=True)
class Draws:
    """What is random in one step. choice: on the CPU, for where tokens come from; replay: on the CPU, for which kept rows; tokens: on the models' device.

    progress: step/steps, in [0, 1).
    """

    choice: torch.Generator
    replay: torch.Generator
    tokens: torch.Generator
    progress: float = 0.0

    @classmethod
    def at(cls, clock: Clock, each: Each) -> Draws:
        """Of an engine's step. With one choice a batch, all micro-batches and processes of a step choose alike."""
        step = (clock.seed, clock.phase_index, clock.step)
        own = (*step, clock.rank, clock.micro)
        choice = seeds.generator(*(step if each == "batch" else own), "where tokens come from")
        return cls(choice, seeds.generator(*own, "replay"), clock.generator("tokens"), clock.progress)


class TokenSource(Protocol):
    """What gives the rows that a step learns from (sheet §9)."""

    each: Each

    def choose(self, r_n: Tensor, progress: float) -> Tensor:
        """Uniform numbers [n] in [0, 1) on the CPU → where the tokens come from, [n] int64 (DATA, TEACHER, STUDENT, REPLAY). progress: step/steps."""
        ...

    def next(self, tokens: TokenBatch, draws: Draws) -> TokenBatch:
        """The rows of one step. tokens: of the data."""
        ...


# ---- rules -----------------------------------------------------------------------------------------------------------


def gkd_origins(r_n: Tensor, student_share: float, rest: Literal["data", "teacher"]) -> Tensor:
    """GKD's rule (2306.13649, Algorithm 1): [n] uniform numbers → [n] int64, STUDENT with probability λ, else what `rest` says."""
    return torch.where(r_n < student_share, STUDENT, TEACHER if rest == "teacher" else DATA)


def distillm_origins(r_n: Tensor, threshold: float, progress: float) -> Tensor:
    """DistiLLM's rule (2402.03898): [n] uniform numbers → [n] int64; STUDENT below ψ = φ (1 − progress), REPLAY from there to φ, DATA from there on."""
    fresh = threshold * (1 - progress)
    return torch.where(r_n < fresh, STUDENT, torch.where(r_n < threshold, REPLAY, DATA))


class AdaptiveThreshold:
    """DistiLLM's φ, the probability of student texts (2402.03898; sheet §6).

    Args:
        rise: what φ rises by, to 1 at most. tolerance: how much above the reference a validation loss must be, in nats.
        reference: "previous": the validation before this one, as our sheet has it; "last_rise": the one at which φ rose last (the first one until then),
            as the released code has it.
    """

    def __init__(self, rise: float = 0.1, tolerance: float = 0.1, reference: Literal["previous", "last_rise"] = "previous") -> None:
        self.rise, self.tolerance, self.reference = rise, tolerance, reference
        self.value = 0.0
        self.compared: float | None = None
        """The loss that the next one is compared with; None: there was no validation yet."""

    def observe(self, loss: float) -> None:
        """One validation loss. The first one only serves for comparison."""
        first = self.compared is None
        risen = self.compared is not None and loss >= self.compared + self.tolerance
        if risen:
            self.value = min(self.value + self.rise, 1.0)
        if first or risen or self.reference == "previous":
            self.compared = loss

    def state_dict(self) -> dict[str, Any]:
        """φ and the loss that it is compared with."""
        return {"value": self.value, "compared": self.compared}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put them back."""
        self.value, self.compared = float(state["value"]), state["compared"]


class ReplayBuffer:
    """The last `capacity` drawn rows, on the device on which they were drawn; the oldest go first.

    Raises:
        InputError: capacity below 1.
    """

    def __init__(self, capacity: int = 1000) -> None:
        if capacity < 1:
            raise InputError(f"a replay buffer of {capacity} rows holds nothing.", where="capacity", fix="Take 1 or more.")
        self.capacity, self.count, self._next = capacity, 0, 0
        self._rows: Tensor | None = None  # [capacity, 4, L], the channels of `TokenBatch.packed`

    def __len__(self) -> int:
        return self.count

    def push(self, tokens: TokenBatch) -> None:
        """Keep rows (ids, targets, positions, segments; no annotations). Of more than `capacity` rows the last ones stay."""
        rows = replace(tokens, whole=False).packed()[-self.capacity :]
        if self._rows is None:
            self._rows = _blank(self.capacity, rows.shape[2], rows)
        width = max(self._rows.shape[2], rows.shape[2])
        self._rows = _widened(self._rows.to(rows.device), width)
        places = (torch.arange(len(rows), device=rows.device) + self._next) % self.capacity
        self._rows[places] = _widened(rows, width)
        self._next = (self._next + len(rows)) % self.capacity
        self.count = min(self.count + len(rows), self.capacity)

    def draw(self, n: int, choice: torch.Generator) -> TokenBatch:
        """n kept rows, none twice while there are enough. choice: on the CPU.

        Raises:
            InputError: nothing is kept.
        """
        if self._rows is None or not self.count:
            raise InputError("nothing is kept for replay.", where="replay", fix="Draw and push rows first.")
        rounds = [torch.randperm(self.count, generator=choice) for _ in range(-(-n // self.count))]
        rows = self._rows[torch.cat(rounds)[:n].to(self._rows.device)]
        return replace(TokenBatch.from_inputs(rows), source=rows.new_full((n,), REPLAY))

    def state_dict(self) -> dict[str, Any]:
        """The rows and where the next one goes."""
        return {"rows": None if self._rows is None else self._rows[: self.count].clone().cpu(), "next": self._next, "count": self.count}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put them back, on the CPU; the next push moves them to where it draws.

        Raises:
            InputError: more rows than this buffer holds.
        """
        if state["count"] > self.capacity:
            raise InputError(f"{state['count']} rows were kept, this buffer holds {self.capacity}.", where="capacity", fix="Take the same capacity.")
        rows, self._next, self.count = state["rows"], int(state["next"]), int(state["count"])
        self._rows = None if rows is None else torch.cat((rows, _blank(self.capacity - len(rows), rows.shape[2], rows)))


# ---- sources ---------------------------------------------------------------------------------------------------------


class GKDSource:
    """GKD's mixture of data, student and teacher texts.

    Args:
        student, teacher: what draws; teacher None where `rest` is "data". student_share: λ. rest: what the other steps (or rows) learn from.
        each: one choice a batch (the paper) or a row.

    Raises:
        InputError: rest is "teacher" without one.
    """

    def __init__(
        self, student: LanguageModel, teacher: LanguageModel | None, sampler: Sampler, prompts: PromptSpec,
        student_share: float = 0.5, rest: Literal["data", "teacher"] = "data", each: Each = "batch",
    ) -> None:  # fmt: skip
        if rest == "teacher" and teacher is None:
            raise InputError("texts of the teacher need a teacher that can draw.", where="teacher", fix="Give it a 'model', or take the data's texts.")
        self.student, self.teacher, self.sampler, self.prompts = student, teacher, sampler, prompts
        self.student_share, self.rest, self.each = student_share, rest, each

    def choose(self, r_n: Tensor, progress: float) -> Tensor:
        """See `gkd_origins`."""
        return gkd_origins(r_n, self.student_share, self.rest)

    def next(self, tokens: TokenBatch, draws: Draws) -> TokenBatch:
        """The rows of one step; see `TokenSource`."""
        origins = self.choose(_uniform(tokens, self.each, draws.choice), draws.progress)

        def drawn(origin: int, rows: TokenBatch) -> TokenBatch:
            model = self.teacher if origin == TEACHER else self.student
            assert model is not None
            return Rollout.generate(model, self.prompts.of(rows), self.sampler, 1, draws.tokens, source=origin)

        return _gathered(tokens, origins, drawn)


class DistiLLMSource:
    """DistiLLM's adaptive mixture of data, new student texts and replayed ones.

    Args:
        threshold, buffer: φ and the kept texts; `threshold.observe` is told of validations by who makes them.
        filling: what happens from ψ to φ while the buffer is not full: "replay" of what there is, as our sheet has it, or "generate", as the released code has
            it. With nothing kept a new text is drawn.
        each: one choice a batch (the released code) or a row.
    """

    def __init__(
        self, student: LanguageModel, sampler: Sampler, prompts: PromptSpec, threshold: AdaptiveThreshold, buffer: ReplayBuffer,
        filling: Literal["replay", "generate"] = "replay", each: Each = "batch",
    ) -> None:  # fmt: skip
        self.student, self.sampler, self.prompts = student, sampler, prompts
        self.threshold, self.buffer, self.filling, self.each = threshold, buffer, filling, each

    def choose(self, r_n: Tensor, progress: float) -> Tensor:
        """See `distillm_origins`; what cannot be replayed yet is drawn."""
        origins = distillm_origins(r_n, self.threshold.value, progress)
        wanted = self.buffer.capacity if self.filling == "generate" else 1
        return origins if len(self.buffer) >= wanted else torch.where(origins == REPLAY, STUDENT, origins)

    def next(self, tokens: TokenBatch, draws: Draws) -> TokenBatch:
        """The rows of one step; new texts go into the buffer. See `TokenSource`."""
        origins = self.choose(_uniform(tokens, self.each, draws.choice), draws.progress)

        def drawn(origin: int, rows: TokenBatch) -> TokenBatch:
            if origin == REPLAY:
                return self.buffer.draw(len(rows), draws.replay).to(rows.input_ids.device)
            found = Rollout.generate(self.student, self.prompts.of(rows), self.sampler, 1, draws.tokens)
            self.buffer.push(found)
            return found

        return _gathered(tokens, origins, drawn)


class _Drawn(Protocol):
    def __call__(self, origin: int, rows: TokenBatch) -> TokenBatch: ...


def _uniform(tokens: TokenBatch, each: Each, choice: torch.Generator) -> Tensor:
    return torch.rand(1 if each == "batch" else len(tokens), generator=choice, dtype=torch.float64)


def _gathered(tokens: TokenBatch, origins_n: Tensor, drawn: _Drawn) -> TokenBatch:
    """The data's rows where the origin is DATA, drawn ones elsewhere, by origin and within it in order."""
    kinds = origins_n.unique().tolist()
    if len(kinds) == 1:
        return _from_data(tokens) if kinds[0] == DATA else drawn(kinds[0], tokens)
    parts = []
    for kind in kinds:
        rows = rows_of(tokens, (origins_n == kind).nonzero()[:, 0].to(tokens.input_ids.device))
        parts.append(_from_data(rows) if kind == DATA else drawn(kind, rows))
    return joined(parts)


def _from_data(tokens: TokenBatch) -> TokenBatch:
    return replace(tokens, source=tokens.input_ids.new_full((len(tokens),), DATA))


# ---- what a method asks for ------------------------------------------------------------------------------------------


def live_model(source: object, why: str) -> LanguageModel:
    """The one language model behind a teacher. why: the start of the sentence that says what it is needed for.

    Raises:
        InputError: the teacher is a record, an ensemble, or nothing that draws.
    """
    if isinstance(source, LanguageModel):
        return source
    members = list(source.members) if isinstance(source, ModelSource) else []
    if len(members) == 1 and isinstance(members[0], LanguageModel):
        return members[0]
    what = "an ensemble" if members else "no language model (a record, say)"
    raise InputError(f"{why} needs one teacher in this process, and this one is {what}.", where="teacher", fix="Give 'teacher' one 'model'.")


def tokenizer_of(data: Data | None) -> Tokenizer | None:
    """The tokenizer of a text source, beneath any views of it; None: the data have none."""
    return None if data is None else getattr(root(data), "tokenizer", None)


def stopping(sampler: Sampler, data: Data | None) -> Sampler:
    """The sampler; where it names no stop ids, with the end of text of the data's tokenizer, if it has one."""
    tokenizer = tokenizer_of(data)
    return sampler if sampler.stop or tokenizer is None or tokenizer.eos is None else sampler.model_copy(update={"stop": (tokenizer.eos,)})


# ---- rows ------------------------------------------------------------------------------------------------------------


def rows_of(tokens: TokenBatch, places_M: Tensor) -> TokenBatch:
    """Some rows of a batch, with all that belongs to them. places_M: [M] int64 on the batch's device."""

    def picked(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.index_select(0, places_M)

    return replace(
        tokens,
        input_ids=tokens.input_ids.index_select(0, places_M),
        positions=tokens.positions.index_select(0, places_M),
        segments=tokens.segments.index_select(0, places_M),
        targets=tokens.targets.index_select(0, places_M),
        weight=picked(tokens.weight),
        source=picked(tokens.source),
        annotations={name: told.index_select(0, places_M) for name, told in tokens.annotations.items()},
        extras={name: told.index_select(0, places_M) for name, told in tokens.extras.items()},
    )


def joined(parts: Sequence[TokenBatch]) -> TokenBatch:
    """Batches one below the other, padded on the right to the longest. Annotations and extras that not all of them have, or in other shapes, are left out.

    Raises:
        InputError: there is none.
    """
    if not parts:
        raise InputError("no rows to join.", where="parts")
    width = max(part.input_ids.shape[1] for part in parts)
    alike = all(part.input_ids.shape[1] == width for part in parts)

    def stacked(name: str, value: float) -> Tensor:
        return torch.cat([pad(getattr(part, name), (0, width - part.input_ids.shape[1]), value=value) for part in parts])

    weight = None
    if any(part.weight is not None for part in parts):
        weights = [torch.ones_like(part.targets, dtype=torch.float32) if part.weight is None else part.weight for part in parts]
        weight = torch.cat([pad(w_BL, (0, width - w_BL.shape[1])) for w_BL in weights])
    sources = [part.source for part in parts if part.source is not None]
    return TokenBatch(
        input_ids=stacked("input_ids", 0),
        positions=stacked("positions", 0),
        segments=stacked("segments", PADDING),
        targets=stacked("targets", IGNORE),
        weight=weight,
        source=torch.cat(sources) if len(sources) == len(parts) else None,
        annotations=_joined_told([(part, part.annotations) for part in parts], width),
        extras=_joined_told([(part, part.extras) for part in parts], width),
        whole=alike and all(part.whole for part in parts),
    )


def _joined_told(parts: Sequence[tuple[TokenBatch, Mapping[str, Tensor]]], width: int) -> dict[str, Tensor]:
    """What all of them have: [B, L, ...] padded with 0, [B, ...] as it is."""
    found = {}
    for name in parts[0][1]:
        if not all(name in told for _, told in parts):
            continue
        tensors = []
        for part, told in parts:
            tensor, (B, L) = told[name], part.input_ids.shape
            if tensor.shape[:2] == (B, L) and width > L:
                tensor = torch.cat((tensor, tensor.new_zeros((B, width - L, *tensor.shape[2:]))), 1)
            tensors.append(tensor)
        if len({tensor.shape[1:] for tensor in tensors}) == 1:
            found[name] = torch.cat(tensors)
    return found


def _blank(rows: int, width: int, like: Tensor) -> Tensor:
    """[rows, 4, width] of padding."""
    return _widened(like.new_zeros((rows, 4, 0)), width)


def _widened(rows_R4L: Tensor, width: int) -> Tensor:
    """The same rows with padding on the right."""
    short = width - rows_R4L.shape[2]
    if not short:
        return rows_R4L
    fill = rows_R4L.new_tensor([0, IGNORE, 0, PADDING])[:, None].expand(len(rows_R4L), 4, short)
    return torch.cat((rows_R4L, fill), 2)
