"""Teacher and student with different tokenizers: the teacher reads the student's text in its own tokens (sheet `_language_distillation_engine` §7).

Legend: B rows, N student positions with a target, M teacher positions with one, G token groups, V student vocabulary, W teacher vocabulary, d width;
q̂ [G, V], p̂ [G, W] the merged rows of `alignment` (first or last), sums at most 1.

    ULD   (2402.12030)  ℓ_g = Σ_i |sort(p̂_g)_i − sort(q̂_g)_i|, both sorted downwards, the shorter one padded with zeros
    GOLD  (TRL's code)  ℓ_g = w_m D_β(p̂_g[m], q̂_g[m]) + w_r Σ_i |sort(p̂_g[r])_i − sort(q̂_g[r])_i|: m the ids of both sides that spell the same
                        bytes, r the rest; w fixed, or w_m = |m|/W and w_r = 1 − w_m ("adaptive")
    D_β = Σ_v [β p log(p/m) + (1 − β) q log(q/m)], m = βp + (1 − β)q, entries of p, q at least 1e-8; never negative, though the parts sum to less than 1.
          At β = 0 Σ [p log(p/q) − p + q], at β = 1 the same of q and p: KL with the term that keeps it at 0 or above (ours; nothing where both sum to 1)

Losses are means over groups. The gradient goes to the student alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from limbeck.contract import IGNORE
from limbeck.errors import InputError
from limbeck.language.alignment import NONE, Groups, Side, Strategy, byte_groups, merged_rows
from limbeck.language.models import LanguageModel
from limbeck.language.signals import Head, MergedSignal
from limbeck.language.tokenizers import Tokenizer
from limbeck.language.tokens import PADDING, TokenBatch
from limbeck.modes import evaluating

Alignment = Literal["bytes", "positions"]
"""Which tokens are compared: groups that cover the same bytes, or the i-th of one side with the i-th of the other (ULD's paper), as far as both go."""

FLOOR = 1e-8
"""The least probability in GOLD's divergence (its code)."""

_PROBE = 'The  quick brown fox: naïve, 42 – "yes"!\n\tIt\'s so.\n'


# ---- losses of merged rows -------------------------------------------------------------------------------------------


def sorted_distance(p_GW: Tensor, q_GV: Tensor) -> Tensor:
    """ULD: Σ_i |sort(p)_i − sort(q)_i| after padding with zeros, [G]. It is 0 for permuted vocabularies, and at most the sum of both masses.

    Raises:
        InputError: the numbers of groups differ.
    """
    if len(p_GW) != len(q_GV):
        raise InputError(f"{len(p_GW)} rows are compared with {len(q_GV)}.", where="rows")
    p_GW, q_GV = p_GW.sort(1, descending=True).values, q_GV.sort(1, descending=True).values
    common = min(p_GW.shape[1], q_GV.shape[1])
    rest = p_GW[:, common:].sum(1) + q_GV[:, common:].sum(1)  # one of them is empty; probabilities are not negative
    return (p_GW[:, :common] - q_GV[:, :common]).abs().sum(1) + rest


def matched_divergence(p_Gm: Tensor, q_Gm: Tensor, beta: float) -> Tensor:
    """GOLD's D_β of matched sub-vectors (top of this file), [G].

    Raises:
        InputError: beta outside [0, 1].
    """
    if not 0 <= beta <= 1:
        raise InputError(f"beta must lie in [0, 1], this is {beta}.", where="beta")
    p_Gm, q_Gm = p_Gm.clamp(min=FLOOR), q_Gm.clamp(min=FLOOR)
    if beta in (0.0, 1.0):
        a_Gm, b_Gm = (p_Gm, q_Gm) if beta == 0 else (q_Gm, p_Gm)
        return (a_Gm * (a_Gm.log() - b_Gm.log()) - a_Gm + b_Gm).sum(1)
    middle_Gm = (beta * p_Gm + (1 - beta) * q_Gm).log()
    return (beta * p_Gm * (p_Gm.log() - middle_Gm) + (1 - beta) * q_Gm * (q_Gm.log() - middle_Gm)).sum(1)


class MergedLoss(Protocol):
    """A loss of merged rows."""

    def __call__(self, p_GW: Tensor, q_GV: Tensor) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Probabilities of teacher and student → ℓ [G], with a graph to q, and its parts [G] each."""
        ...


@dataclass(frozen=True)
class ULD:
    """Universal logit distillation: the sorted distance (2402.12030 eq. 5)."""

    def __call__(self, p_GW: Tensor, q_GV: Tensor) -> tuple[Tensor, Mapping[str, Tensor]]:
        """See `MergedLoss`."""
        return sorted_distance(p_GW, q_GV), {}


@dataclass(frozen=True)
class Matches:
    """Ids that spell the same bytes. student, teacher: [m] int64, pairs; student_rest [V − m], teacher_rest [W − m]: the others."""

    student: Tensor
    teacher: Tensor
    student_rest: Tensor
    teacher_rest: Tensor

    @property
    def share(self) -> float:
        """|m|/W: the matched fraction of the teacher's vocabulary."""
        return len(self.teacher) / max(len(self.teacher) + len(self.teacher_rest), 1)

    def to(self, device: torch.device) -> Matches:
        """The same on another device."""
        return Matches(*(ids.to(device) for ids in (self.student, self.teacher, self.student_rest, self.teacher_rest)))


def matching(student: Tokenizer, teacher: Tokenizer, vocabularies: tuple[int, int] | None = None) -> Matches:
    """The pairs of ids whose bytes are equal: the strings of the vocabularies with every mark for a space or a byte read as what it stands for.

    Of several ids with equal bytes the last one is taken (a byte-fallback id stands before the letter it spells); tokens without bytes match nothing, but
    the ends of text match each other, and equal tokenizers match id for id. vocabularies: V and W of the models, where their heads are longer than the
    tokenizers; ids beyond a tokenizer belong to the rest.
    """
    V, W = vocabularies or (student.vocabulary, teacher.vocabulary)
    if student.fingerprint == teacher.fingerprint:
        pairs = {i: i for i in range(min(student.vocabulary, V, W))}
    else:
        spelt = {piece: i for i, piece in enumerate(teacher.pieces(range(min(W, teacher.vocabulary)))) if piece}
        mine = {piece: i for i, piece in enumerate(student.pieces(range(min(V, student.vocabulary)))) if piece}
        pairs = {i: spelt[piece] for piece, i in mine.items() if piece in spelt}
        if student.eos is not None and teacher.eos is not None and teacher.eos not in pairs.values():
            pairs[student.eos] = teacher.eos
    student_m = torch.tensor(list(pairs.keys()), dtype=torch.int64)
    teacher_m = torch.tensor(list(pairs.values()), dtype=torch.int64)
    return Matches(student_m, teacher_m, _others(student_m, V), _others(teacher_m, W))


def _others(ids_m: Tensor, size: int) -> Tensor:
    free = torch.ones(size, dtype=torch.bool)
    free[ids_m] = False
    return free.nonzero()[:, 0]


@dataclass(frozen=True)
class GOLD:
    """TRL's hybrid: a divergence on matched ids, the sorted distance on the others. weights: (w_m, w_r), None: adaptive."""

    matches: Matches
    beta: float = 0.5
    weights: tuple[float, float] | None = None

    def __call__(self, p_GW: Tensor, q_GV: Tensor) -> tuple[Tensor, Mapping[str, Tensor]]:
        """See `MergedLoss`; parts "matched" and "rest", without their weights."""
        ids = self.matches
        matched_G = matched_divergence(p_GW[:, ids.teacher], q_GV[:, ids.student], self.beta)
        rest_G = sorted_distance(p_GW[:, ids.teacher_rest], q_GV[:, ids.student_rest])
        w_m, w_r = self.weights if self.weights is not None else (ids.share, 1 - ids.share)
        return w_m * matched_G + w_r * rest_G, {"matched": matched_G, "rest": rest_G}


def crop_vocabulary(first_NV: Tensor, second_NW: Tensor) -> tuple[Tensor, Tensor]:
    """Logits of two models of ONE tokenizer whose heads were padded to different sizes: both cut to the smaller one (before any softmax).

    The shorter one must not be padded with zeros instead: a logit of 0 has the weight e⁰.
    """
    common = min(first_NV.shape[1], second_NW.shape[1])
    return first_NV[:, :common], second_NW[:, :common]


# ---- the teacher's side ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CrossSignal:
    """What a teacher of another tokenizer says of a batch: hidden_Md [M, d] and head, targets_M [M] in its tokens, the groups, weight_G of each group."""

    hidden_Md: Tensor
    head: Head
    targets_M: Tensor
    groups: Groups
    weight_G: Tensor

    def merged(self, start: int, stop: int, strategy: Strategy) -> Tensor:
        """Log-probabilities [stop − start, W] of the groups start to stop − 1, float32."""
        side, begin, end = self.groups.teacher.cut(start, stop)
        return _merged(self.hidden_Md[begin:end], self.head, self.targets_M[begin:end], side, strategy)


def _merged(hidden_nd: Tensor, head: Head, targets_n: Tensor, side: Side, strategy: Strategy) -> Tensor:
    logits_nV = head.logits(hidden_nd)
    logp_nV = logits_nV.to(torch.promote_types(logits_nV.dtype, torch.float32)).log_softmax(1)
    return merged_rows(logp_nV, logp_nV.gather(1, targets_n[:, None])[:, 0], side, strategy)


@dataclass
class _Row:
    """One teacher row as it is written: its ids, which of them are targets, and each one's group."""

    ids: list[int]
    target: list[bool]
    group: list[int]


class CrossTokenizerSource:
    """A teacher with a tokenizer of its own, asked about the student's tokens through their text (a `SignalSource`).

    Of each segment the stretches of given and of predicted tokens are written as text and read by the teacher's tokenizer one by one, so that the border
    between prompt and answer is the same on both sides. Ends of text are paired where both have one; other special tokens
    are not shown to the teacher. Bytes that are no UTF-8 (a character cut in two) are shown
    to the teacher as "?", and the groups with such bytes are left out. Tokens travel over the host: it costs a wait for the device.

    Args:
        teacher: is put into eval mode while it answers. teacher_tokenizer, student_tokenizer: theirs. alignment: see `Alignment`.

    Raises:
        InputError: the student's tokens do not spell their text (a word-piece tokenizer).
    """

    def __init__(
        self,
        teacher: LanguageModel,
        teacher_tokenizer: Tokenizer,
        student_tokenizer: Tokenizer,
        *,
        alignment: Alignment = "bytes",
        strategy: Strategy = "first",
    ) -> None:
        self.teacher, self.teacher_tokenizer, self.student_tokenizer = teacher, teacher_tokenizer, student_tokenizer
        self.alignment, self.strategy = alignment, strategy
        self.pieces = student_tokenizer.pieces(range(student_tokenizer.vocabulary))
        _check_spelling(student_tokenizer)

    def get(self, tokens: TokenBatch) -> MergedSignal:
        """All merged rows of the teacher at once, [G, W] masses; `pair` gives them by parts.

        Its groups are [G, 4] int64: first row and the one after the last, of the student's and of the teacher's targets.
        """
        found = self.pair(tokens)
        mine, theirs = found.groups.student, found.groups.teacher
        bounds_G4 = torch.stack((mine.first, mine.last + 1, theirs.first, theirs.last + 1), 1)
        rows_GW = found.merged(0, len(found.groups), self.strategy).exp() if len(found.groups) else found.hidden_Md.new_zeros(0, self.teacher.vocabulary)
        return MergedSignal(rows_GW, bounds_G4.to(tokens.input_ids.device))

    @torch.no_grad()
    def pair(self, tokens: TokenBatch) -> CrossSignal:
        """The teacher's hidden states of the same text, and the groups. Student rows are those of `tokens.rows()`."""
        device = tokens.input_ids.device
        rows, group_N = self._rewritten(tokens)
        batch = _as_batch(rows, self.teacher_tokenizer.pad).to(device)
        told = batch.rows()
        with evaluating(self.teacher):
            hidden_Md = told.gather(self.teacher.hidden(batch))
        group_M = np.array([g for row in rows for g, target in zip(row.group, row.target, strict=True) if target], np.int64)
        group_N, group_M = _renumbered(group_N, group_M)
        groups = Groups(Side.of(group_N, device), Side.of(group_M, device))
        weight_N = tokens.rows().weight_N
        size_G = groups.student.totals(torch.ones_like(weight_N))
        return CrossSignal(hidden_Md, self.teacher.head(), told.targets_N, groups, groups.student.totals(weight_N) / size_G)

    def _rewritten(self, tokens: TokenBatch) -> tuple[list[_Row], np.ndarray]:
        """The teacher's rows, and the group of every student row."""
        ids, targets, segments = (tensor.cpu().numpy() for tensor in (tokens.input_ids, tokens.targets, tokens.segments))
        rows: list[_Row] = []
        group_N: list[int] = []
        count = 0
        for ids_L, targets_L, segments_L in zip(ids, targets, segments, strict=True):
            borders = np.flatnonzero(np.diff(segments_L)) + 1
            for begin, end in zip([0, *borders], [*borders, len(segments_L)], strict=True):
                if segments_L[begin] == PADDING:
                    continue
                row, found, count = self._segment(ids_L[begin:end], targets_L[begin:end], count)
                group_N.extend(found)
                rows.append(row)
        return rows, np.array(group_N, np.int64)

    def _segment(self, ids_l: np.ndarray, targets_l: np.ndarray, count: int) -> tuple[_Row, list[int], int]:
        """One segment: the teacher's row, the groups of its targets in order, and the number of groups so far."""
        told = targets_l != IGNORE
        sequence = [int(ids_l[0]), *(int(y if known else x) for x, y, known in zip(np.append(ids_l[1:], NONE), targets_l, told, strict=True))]
        flags = [False, *(bool(known) for known in told)]
        if not told[-1]:
            sequence, flags = sequence[:-1], flags[:-1]
        start = self.teacher_tokenizer.start
        row = _Row([], [], []) if start is None else _Row([start], [False], [NONE])
        groups: list[int] = []
        for at, stop in _stretches(sequence, flags, self.student_tokenizer.eos):
            part = sequence[at:stop]
            if part == [self.student_tokenizer.start] and at == 0 and start is not None:
                continue  # the teacher has a beginning of its own
            found, count = self._stretch(row, part, flags[at], count)
            if flags[at]:
                groups.extend(found)
        if row.ids and row.target[0]:  # nothing predicts a first token: its group would lack a factor
            row.target[0], lost = False, row.group[0]
            row.group = [NONE if group == lost else group for group in row.group]
        return row, groups, count

    def _stretch(self, row: _Row, part: list[int], target: bool, count: int) -> tuple[list[int], int]:
        """Append one stretch to the teacher's row; the groups of its student tokens, and the number of groups so far."""
        teacher = self.teacher_tokenizer
        if part == [self.student_tokenizer.eos]:
            if teacher.eos is None:
                return [NONE], count
            group, count = (count, count + 1) if target else (NONE, count)
            row.ids.append(teacher.eos)
            row.target.append(target)
            row.group.append(group)
            return [group], count
        pieces = [self.pieces[i] if i < len(self.pieces) else b"" for i in part]
        text, spoilt = _readable(b"".join(pieces))
        spans = teacher.byte_spans(text)
        sizes = np.array([len(piece) for piece in pieces], np.int64)
        theirs = spans.bounds_T2[:, 1] - spans.bounds_T2[:, 0]
        mine, other = self._aligned(sizes, theirs, count)
        if target and spoilt.any():
            _leave_out(mine, other, sizes, spoilt)
        row.ids.extend(int(i) for i in spans.ids_T)
        row.target.extend([target] * len(theirs))
        row.group.extend(int(g) if target else NONE for g in other)
        return [int(g) for g in mine], max(count, int(mine.max(initial=NONE)) + 1) if target else count

    def _aligned(self, sizes: np.ndarray, theirs: np.ndarray, start: int) -> tuple[np.ndarray, np.ndarray]:
        if self.alignment == "bytes":
            return byte_groups(sizes, theirs, start=start)
        common = min(len(sizes), len(theirs))
        places = np.arange(start, start + common)
        mine, other = (np.concatenate((places, np.full(n - common, NONE))) for n in (len(sizes), len(theirs)))
        return mine, other


def _check_spelling(tokenizer: Tokenizer) -> None:
    """Raise InputError where a tokenizer's tokens are not the bytes of their text."""
    try:
        ids = tokenizer.encode(_PROBE)
    except InputError:
        return  # an alphabet of a few characters: each spells itself
    if b"".join(tokenizer.pieces(ids)) != _PROBE.encode():
        what = f"the tokens of '{tokenizer.name}' do not spell the text that they are made from."
        raise InputError(what, where="tokenizer", fix="The student needs byte-level or SentencePiece tokens, bytes or characters.")


def _stretches(sequence: Sequence[int], flags: Sequence[bool], eos: int | None) -> list[tuple[int, int]]:
    """Runs of tokens that are all targets or all given; an end of text is a run of its own."""
    borders = [0]
    for i in range(1, len(sequence)):
        if flags[i] != flags[i - 1] or (eos is not None and eos in (sequence[i], sequence[i - 1])):
            borders.append(i)
    return list(zip(borders, [*borders[1:], len(sequence)], strict=True))


def _readable(raw: bytes) -> tuple[str, np.ndarray]:
    """Bytes as a text of as many bytes, and which of them were no UTF-8 ([bytes] bool; each a "?" in the text)."""
    spoilt = np.zeros(len(raw), bool)
    parts, at = [], 0
    while at < len(raw):
        try:
            parts.append(raw[at:].decode())
            break
        except UnicodeDecodeError as error:
            parts += [raw[at : at + error.start].decode(), "?" * (error.end - error.start)]
            spoilt[at + error.start : at + error.end] = True
            at += error.end
    return "".join(parts), spoilt


def _leave_out(mine: np.ndarray, other: np.ndarray, sizes: np.ndarray, spoilt: np.ndarray) -> None:
    """Take the groups out that hold a spoilt byte."""
    hit = [bool(spoilt[end - size : end].any()) for size, end in zip(sizes, sizes.cumsum(), strict=True)]
    gone = np.unique(mine[np.array(hit, bool)])
    for groups in (mine, other):
        groups[np.isin(groups, gone)] = NONE


def _as_batch(rows: Sequence[_Row], pad: int) -> TokenBatch:
    """Teacher rows as a batch, padded on the right; the last token of a row is only predicted."""
    width = max([len(row.ids) - 1 for row in rows] + [1])
    packed = np.stack([np.full((len(rows), width), fill, np.int64) for fill in (pad, IGNORE, 0, PADDING)], 1)
    for packed_4L, row in zip(packed, rows, strict=True):
        length = len(row.ids) - 1
        if length < 1:
            continue
        packed_4L[0, :length] = row.ids[:-1]
        packed_4L[1, :length] = np.where(row.target[1:], row.ids[1:], IGNORE)
        packed_4L[2, :length] = np.arange(length)
        packed_4L[3, :length] = 0
    return TokenBatch.from_inputs(torch.from_numpy(packed))


def _renumbered(group_N: np.ndarray, group_M: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Groups that both sides have, numbered from 0; the others become NONE."""
    both = np.intersect1d(group_N[group_N != NONE], group_M[group_M != NONE])

    def new(groups: np.ndarray) -> np.ndarray:
        places = np.searchsorted(both, groups).clip(max=max(len(both) - 1, 0))
        return np.where(np.isin(groups, both) & (groups != NONE), places, NONE)

    return new(group_N), new(group_M)


# ---- the loss of a batch ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CrossLosses:
    """A loss, the weighted mean over groups, with a graph to the student, and its parts (detached means)."""

    loss: Tensor
    parts: Mapping[str, Tensor]


def cross_tokenizer_loss(
    hidden_Nd: Tensor, head: Head, targets_N: Tensor, signal: CrossSignal, objective: MergedLoss, *, strategy: Strategy = "first", chunk: int = 128
) -> CrossLosses:
    """The student against a teacher of another tokenizer, by parts of `chunk` groups; their [·, V] rows are computed again in the backward pass.

    Args:
        hidden_Nd, targets_N: of `tokens.rows()`, the student's. signal: of the same tokens. objective: `ULD` or `GOLD`.

    Returns:
        0 with a graph where there is no group.

    Raises:
        InputError: chunk below 1, or rows of another number than the groups'.
    """
    if chunk < 1:
        raise InputError(f"a chunk of {chunk} groups is none.", where="chunk")
    if len(hidden_Nd) != len(signal.groups.student.group_N):
        raise InputError(f"{len(hidden_Nd)} rows, the groups are of {len(signal.groups.student.group_N)}.", where="hidden_Nd")

    def part(hidden_nd: Tensor, side: Side, targets_n: Tensor, start: int, stop: int) -> tuple[Tensor, Mapping[str, Tensor]]:
        with torch.no_grad():
            p_gW = signal.merged(start, stop, strategy).exp()
        return objective(p_gW, _merged(hidden_nd, head, targets_n, side, strategy).exp())

    losses: list[Tensor] = []
    parts: dict[str, list[Tensor]] = {}
    for start in range(0, len(signal.groups), chunk):
        stop = min(start + chunk, len(signal.groups))
        side, begin, end = signal.groups.student.cut(start, stop)
        ell_g, told = checkpoint(part, hidden_Nd[begin:end], side, targets_N[begin:end], start, stop, use_reentrant=False)
        losses.append(ell_g)
        for name, value_g in told.items():
            parts.setdefault(name, []).append(value_g.detach())
    weight_G = signal.weight_G
    total = weight_G.sum().clamp(min=1e-30)
    graph = head.logits(hidden_Nd[:0]).sum()  # 0, with a graph even where there is no group
    loss = graph + (torch.cat(losses) * weight_G).sum() / total if losses else graph
    return CrossLosses(loss, {name: (torch.cat(values) * weight_G).sum() / total for name, values in parts.items()})
