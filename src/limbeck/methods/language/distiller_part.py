"""What `Distiller` is put together from: what encoders say of a batch, and the matching of a student's layers with a teacher's, with its trained nets.

B samples, L tokens, d width, C classes, H heads; K layers, hidden states 0 (embeddings) to K. Eqs. are those of our sheet `distiller`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Annotated, Any, Literal, NamedTuple, cast

import torch
from pydantic import Field
from torch import Tensor, nn

from limbeck.contract import Batch, Frozen
from limbeck.errors import InputError
from limbeck.language.feature_losses import attention_mse, masked_cosine, masked_cross_entropy, masked_mse, pkd, token_vectors
from limbeck.language.layer_maps import Mapping, Pairs, attention_map, every_pair, hidden_map, transport_plan
from limbeck.language.mixup import Mix, mixing
from limbeck.language.mutual_information import BOUNDS, Baseline, Bound, Critic, Rows, bound, redraw
from limbeck.models.outputs import logits_of
from limbeck.modes import evaluating

Intermediate = Literal["none", "mse", "ce", "cosine", "pkd", "attention", "mi", "infonce", "nwj", "tuba", "jsd"]
Width = Annotated[int, Field(ge=1, le=65_536)]


class Shape(NamedTuple):
    """K layers of width d."""

    layers: int
    width: int


@dataclass(frozen=True)
class Said:
    """What an encoder says of a batch. hidden: K + 1 of [B, L, d]. attention: K of [B, H, L, L], or None. mask_BL: 1 at tokens. logits_BC."""

    hidden: Sequence[Tensor]
    attention: Sequence[Tensor] | None
    mask_BL: Tensor
    logits_BC: Tensor

    @property
    def shape(self) -> Shape:
        """Layers and width."""
        return Shape(len(self.hidden) - 1, self.hidden[0].shape[-1])


def said(module: nn.Module, inputs: Tensor, where: str, *, attention: bool) -> Said:
    """What an encoder says of inputs [B, 2, L].

    Raises:
        InputError: it cannot encode; attention maps are wanted and it gives none.
    """
    if not callable(getattr(module, "encode", None)):
        raise InputError(f"{type(module).__name__} does not show its hidden states.", where=where, fix="Use encoder, minilm or text_transformer, say.")
    encoder: Any = module
    found = encoder.encode(inputs, attention=True) if attention else encoder.encode(inputs)
    if attention and found.attention is None:
        raise InputError(f"{type(module).__name__} does not show its attention maps.", where=where, fix="Use another 'intermediate'.")
    return Said(found.hidden, found.attention if attention else None, found.mask_BL, logits_of(found.logits_BC))


def probe(device: torch.device | str = "cpu") -> Tensor:
    """Inputs that any encoder of this family takes, [3, 2, 4]: ids 0, all tokens there."""
    return torch.stack((torch.zeros(3, 4, dtype=torch.int64), torch.ones(3, 4, dtype=torch.int64)), 1).to(device)


class LiveTeacher:
    """A frozen network of this process, or several where only their logits count.

    Raises:
        InputError: hidden states are wanted of an ensemble, or of a network that does not show them.
    """

    def __init__(self, teacher: Any, *, hidden: bool, attention: bool) -> None:
        self.teacher, self.hidden, self.attention = teacher, hidden, attention
        self.members: list[nn.Module] = list(teacher.members)
        self.shape: Shape | None = None
        if hidden:
            if len(self.members) > 1:
                raise InputError("layers are matched with one teacher's.", where="teacher", fix="Give one teacher, or 'intermediate: none'.")
            parameter = next(self.members[0].parameters(), torch.empty(0))
            with torch.no_grad(), evaluating(self.members[0]):
                self.shape = said(self.members[0], probe(parameter.device), "teacher", attention=attention).shape

    @torch.no_grad()
    def of(self, batch: Batch, inputs: Tensor, mix: Mix | None) -> Said:
        """Its answers for `inputs`, mixed as the student's."""
        with ExitStack() as stack:
            for member in self.members:
                stack.enter_context(evaluating(member))
                if mix is not None:
                    stack.enter_context(mixing(member, mix))
            if self.hidden:
                return said(self.members[0], inputs, "teacher", attention=self.attention)
            return Said((), None, inputs[:, 1], self.teacher(inputs))


class RecordedTeacher:
    """A record's answers: "logits", and hidden states among its features.

    taps: names of the recorded features that are the hidden states 0..K in order, "" where one is not recorded.

    Raises:
        InputError: attention maps or mixed embeddings are wanted, which no record holds; a tap is not recorded.
    """

    def __init__(self, teacher: Any, taps: Sequence[str], *, hidden: bool, attention: bool, mixup: bool) -> None:
        self.teacher, self.taps = teacher, tuple(taps) if hidden else ()
        self.shape: Shape | None = None
        if attention or mixup:
            what = "attention maps" if attention else "mixed embeddings"
            raise InputError(f"a record cannot answer for {what}.", where="teacher", fix="Give 'teacher' a 'model'.")
        if hidden:
            present = [tap for tap in self.taps if tap]
            found = teacher.lookup(torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)) if present else {}
            missing = [tap for tap in present if f"features/{tap}" not in found]
            if not present or missing:
                what = f"the record has no features '{missing[0]}'." if missing else "'taps' names no recorded hidden states."
                raise InputError(what, where="method.taps", fix="Name the record's features that are the hidden states 0 to K, '' where one is left out.")
            self.shape = Shape(len(self.taps) - 1, found[f"features/{present[0]}"].shape[-1])

    def of(self, batch: Batch, inputs: Tensor, mix: Mix | None) -> Said:
        """What came with the batch."""
        hidden = [batch.recorded[f"features/{tap}"].float() if tap else torch.empty(0) for tap in self.taps]
        return Said(hidden, None, inputs[:, 1], self.teacher.logits(batch))


class MatchingConfig(Frozen):
    """Which states are matched and how: the part of `DistillerConfig` that needs nets."""

    intermediate: Intermediate = Field("mi", description="L_int; mi is I_α, jsd is no bound on mutual information; none: L_pred alone")
    alpha: float = Field(0.9, ge=0, le=1, description="'mi': share of the leave-one-out mean; 1 InfoNCE, 0 TUBA (scripts 0.9, searched 0 to 1)")
    rows: Rows = Field("teacher", description="rows of scores: 'teacher' as the baseline (a bound at every α), 'student' as the code")
    vector: Literal["first", "mean"] = Field("first", description="a sample's vector for bounds: the first token's state (paper), the tokens' mean (ours)")
    mapping: Mapping = Field("skip", description="which layers are matched: evenly spread, the teacher's last, or all by a transport plan (11)")
    heads: Literal["each", "mean"] = Field("each", description="'attention': compare head by head (as many on both sides), or the heads' mean (ours)")
    nets: Literal["mapping", "shared", "each"] = Field(
        "mapping", description="critics, baselines: one for all matches, one each; mapping: each under emd alone"
    )
    critic_hidden: tuple[Width, ...] = Field((128, 128), description="hidden layers of the critic's two nets (script: 2 × 128)")
    critic_out: Width = Field(64, description="width in which both sides meet (script: 64)")
    baseline_hidden: tuple[Width, ...] = Field((128, 128), description="hidden layers of the log-baseline of the teacher's vector (script: 2 × 128)")


class Matching(nn.Module):
    """Σ L_int over matched layers, (1) and (11), with the nets that are trained for it: projections, critics, log-baselines.

    student, teacher: their shapes. Projections (one a match, only where widths differ, none for the bounds) start at N(0, 0.02), biases at 0.
    """

    def __init__(self, config: MatchingConfig, student: Shape, teacher: Shape, generator: torch.Generator) -> None:
        super().__init__()
        self.config, self.kind, self.mean = config, config.intermediate, config.vector == "mean"
        self.maps, self.emd = self.kind == "attention", config.mapping == "emd"
        self.layers, self.pairs = student.layers, self._pairs(student.layers, teacher.layers)
        needed, S, T = len(self.pairs), student.width, teacher.width
        self.projections, self.critics, self.baselines = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        if self.kind in BOUNDS:
            count = needed if config.nets == "each" or (config.nets == "mapping" and self.emd) else 1
            self.critics.extend(Critic(S, T, config.critic_hidden, config.critic_out) for _ in range(count))
            if self.kind in ("mi", "tuba"):
                self.baselines.extend(Baseline(T, config.baseline_hidden) for _ in range(count))
            redraw([*self.critics, *self.baselines], generator)
        elif not self.maps and S != T:
            self.projections.extend(nn.Linear(S, T) for _ in range(needed))
            with torch.no_grad():
                for projection in self.projections:
                    projection.weight.normal_(0, 0.02, generator=generator)
                    projection.bias.zero_()

    def _pairs(self, K_S: int, K_T: int) -> Pairs:
        """The matches in order. emd: every layer with every layer; behind them, for hidden states, the embeddings."""
        if self.config.mapping != "emd":
            return (attention_map if self.maps else hidden_map)(K_S, K_T, self.config.mapping)
        return every_pair(K_S, K_T, 0) if self.maps else (*every_pair(K_S, K_T), (0, 0))

    def forward(self, student: Said, teacher: Said) -> Tensor:
        """Σ L_int, a scalar. Raises InputError: shapes that do not fit, a batch too small for a bound."""
        losses = torch.stack([self._loss(i, n, m, student, teacher) for i, (n, m) in enumerate(self.pairs)])
        if not self.emd:
            return losses.sum()
        body, embeddings = (losses, losses.new_zeros(())) if self.maps else (losses[:-1], losses[-1])
        distances_NM = body.view(self.layers, -1)
        return (transport_plan(distances_NM) * distances_NM).sum() + embeddings

    def _loss(self, i: int, n: int, m: int, student: Said, teacher: Said) -> Tensor:
        mask_BL = student.mask_BL
        if self.maps:
            assert student.attention is not None
            assert teacher.attention is not None
            s, t = student.attention[n], teacher.attention[m]
            return attention_mse(*((s.mean(1, keepdim=True), t.mean(1, keepdim=True)) if self.config.heads == "mean" else (s, t)), mask_BL)
        s, t = student.hidden[n], teacher.hidden[m].detach()
        if not t.numel():
            raise InputError(f"the teacher's hidden state {m} is matched and not recorded.", where="method.taps", fix="Record it and name it.")
        if self.kind in BOUNDS:
            return -self._bound(i, token_vectors(s, mask_BL, mean=self.mean), token_vectors(t.to(s.dtype), mask_BL, mean=self.mean))
        s = self.projections[i](s) if self.projections else s
        if self.kind == "pkd":
            return pkd(s, t)
        losses: dict[str, Callable[..., Tensor]] = {"mse": masked_mse, "ce": masked_cross_entropy, "cosine": masked_cosine}
        return losses[self.kind](s, t, mask_BL)

    def _bound(self, i: int, x_Bd: Tensor, y_Bd: Tensor) -> Tensor:
        which = min(i, len(self.critics) - 1)
        baseline_B = self.baselines[which](y_Bd).float() if self.baselines else None
        return bound(cast(Bound, self.kind), self.critics[which](x_Bd, y_Bd).float(), baseline_B, self.config.alpha, self.config.rows)


class Bundle(nn.Module):
    """What one optimiser trains: the student and the nets of the matching. The student alone is what comes out."""

    def __init__(self, student: nn.Module, matching: Matching | None) -> None:
        super().__init__()
        self.student, self.matching = student, matching
