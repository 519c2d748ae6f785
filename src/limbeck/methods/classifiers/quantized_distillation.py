"""Model compression via distillation and quantization (Polino, Pascanu, Alistarh; arXiv 1802.05668).

    qd     w ← optimiser(w, ∂L/∂Q(w))                 quantised forward, full-precision update (eq. 5)
    dq     p ← optimiser(p, ∂L/∂p), p sorted          w and its ranges fixed, the points move (eq. 7)
    mixed  qd and dq epochs in turn, ending on qd, all with the same points
    pm     Q(w) of a trained network                  no training

    L = w T² KL(σ(t/T)‖σ(z/T)) + (1 − w) CE(y, z)     (eq. 4) at the quantised network's logits z
Equation numbers are those of our sheet; the maths is in `limbeck.losses.quantisation`, the bytes in `limbeck.models.packed`.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.func import functional_call

from limbeck.contract import Artefact, Batch, Clock, Frozen, Method, OptimiserSpec, Paper, Phase, Player, Teacher, Update, Workbench
from limbeck.errors import InputError
from limbeck.losses import HintonReduction, cross_entropy, hinton_terms
from limbeck.losses import quantisation as q
from limbeck.methods.classifiers._base import require_labels
from limbeck.methods.classifiers.quantisation_part import Points, Which, choose, mean_gradient_norms
from limbeck.models.packed import Codes, PackedEncoder, measure


class QuantizedDistillationConfig(Frozen):
    """Knobs of `QuantizedDistillation`."""

    mode: Literal["qd", "dq", "mixed", "pm"] = Field("qd", description="what is learned: weights, points, both in turn, nothing")
    bits: int = Field(4, ge=1, le=16, description="2^bits levels, or points a tensor on average; code: 2, 4, 8")
    bucket: int | None = Field(256, ge=2, description="weights that share a range; null: the whole tensor; code: 256")
    weight: float = Field(0.7, ge=0, le=1, description="w, of the soft term; code: 0.7. 0: quantisation-aware training, no teacher needed")
    temperature: float = Field(2.0, gt=0, le=1000, description="T; code: 2")
    reduction: HintonReduction = Field("batchmean", description="of the soft term; 'code' divides it by the number of classes too, as the code does")
    stochastic: bool = Field(False, description="qd: round up or down by chance in training (eq. 2); what is shipped is rounded to nearest")
    gradient: Literal["straight_through", "truncated", "through_scale"] = Field("straight_through", description="qd, mixed: eq. 5 or an option of eq. 6")
    quantise: Which = Field("all", description="every parameter tensor (code), or the weights of convolutions and linear layers")
    keep_first_last: bool = Field(False, description="leave the first and last convolution or linear layer in full precision")
    allocation: Literal["automatic", "equal"] = Field("automatic", description="dq, mixed: share the points by gradient norms (eq. 9; code), or equally")
    init: q.PointInit = Field("quantile", description="dq, mixed: where points start (eq. 8); code: quantile")
    points_optimiser: OptimiserSpec = Field(
        OptimiserSpec.model_validate({"lr": 1e-5, "nesterov": True}),
        description="dq, mixed: code: SGD 1e-6 to 1e-4, as a point's gradient sums over all its weights; adam, at 2e-3 say, normalises it",
    )
    rounds: int = Field(2, ge=1, description="mixed: pairs of a qd and a dq epoch before the last qd epoch")

    @model_validator(mode="after")
    def _levels_only(self) -> QuantizedDistillationConfig:
        if self.stochastic and self.mode in ("dq", "mixed"):
            raise ValueError("stochastic rounding goes with uniform levels (mode qd), not with learned points.")
        return self


class QuantizedDistillation(Method):
    """A student whose shipped weights take few values: trained through the rounding, or with learned quantisation points."""

    Config = QuantizedDistillationConfig
    paper: ClassVar[Paper] = Paper(
        "Model compression via distillation and quantization", "1802.05668", "ICLR 2018", 2018, "https://github.com/antspy/quantized_distillation"
    )
    starts_trained = True
    needs_teacher = False  # qd and mixed with weight > 0 do, see setup; dq has its own
    teacher: Teacher

    def setup(self) -> None:
        """Choose the tensors; where points are learned keep a full-precision copy, dq's own teacher, and place equally many points."""
        c = self.config
        if c.mode in ("qd", "mixed") and c.weight > 0 and self.teacher is None:
            raise InputError(f"mode '{c.mode}' with weight {c.weight:g} needs a teacher.", where="teacher", fix="Add a 'teacher:' section, or set weight: 0.")
        if c.mode != "pm" and c.weight == 0:
            require_labels(self.train_data, "'quantized_distillation' with weight 0")
        bound = 1.0 if c.gradient == "truncated" else None
        self.chosen = choose(self.student, c.quantise, keep_first_last=c.keep_first_last, bucket=c.bucket, bound=bound)
        self.counts = [2**c.bits] * len(self.chosen.names)
        self.learns_points = c.mode in ("dq", "mixed")
        self._fixed: q.Scaled | None = None
        if self.learns_points:
            self.reference = copy.deepcopy(self.student).eval().requires_grad_(False)
            self.points = Points(self._initial_points())

    def players(self) -> Mapping[str, Player]:
        """The student (in dq for its batch-norm statistics alone), and the points where they are learned."""
        points = {"points": Player(self.points, self.config.points_optimiser)} if self.learns_points else {}
        return {"student": Player(self.student), **points}

    def frozen(self) -> Sequence[nn.Module]:
        """The teacher, and dq's own."""
        return [*super().frozen(), *([self.reference] if self.learns_points else [])]

    def phases(self) -> Sequence[Phase]:
        """None for pm; one for qd and for dq; qd0, dq0, qd1, … of one epoch each for mixed."""
        mode, rounds = self.config.mode, self.config.rounds
        if mode == "mixed":
            turns = [name for i in range(rounds) for name in (f"qd{i}", f"dq{i}")] + [f"qd{rounds}"]
            return [Phase(name, epochs=1, trains=(_player(name),)) for name in turns]
        return [] if mode == "pm" else [Phase(mode, trains=(_player(mode),))]

    def enter(self, phase: Phase, clock: Clock, bench: Workbench) -> None:
        """Where points are learned: keep the network as it is now; before the first phase share the points (eq. 9) and place them (eq. 8)."""
        if not self.learns_points:
            return
        self._fixed = None
        self.reference.load_state_dict(self.student.state_dict())
        if phase.name == self.phases()[0].name:
            if self.config.allocation == "automatic":
                self.counts = q.allocate_points(2**self.config.bits, mean_gradient_norms(self.reference, self.chosen.names, self.train_data, self.seed))
            self.points.values_S.data.copy_(self._initial_points())

    def leave(self, phase: Phase, clock: Clock, bench: Workbench) -> None:
        """dq put the student into training mode by itself."""
        self.student.eval()

    def updates(self, batch: Batch, clock: Clock) -> Iterator[Update]:
        """One update, of the weights through Q(w), or of the points."""
        c, player = self.config, _player(self.config.mode if self.config.mode == "dq" else clock.phase)
        weights = self._moved_points() if player == "points" else self._rounded_weights(clock)
        z = functional_call(self.student, weights, (batch.inputs,))
        if c.weight == 0:
            yield Update(player, cross_entropy(z, batch.targets))
            return
        with torch.no_grad():
            t = self.reference(batch.inputs) if player == "points" else self.teacher.logits(batch)
        soft, hard = hinton_terms(z, t, batch.targets, c.temperature, c.reduction)
        yield Update(player, c.weight * soft + (1 - c.weight) * hard, {"soft": soft, "hard": hard})

    def after_step(self, player: str, clock: Clock) -> None:
        """Sort each tensor's points (eq. 7)."""
        if player == "points":
            values_S = self.points.values_S.data
            values_S.copy_(torch.cat([points.sort().values for points in values_S.split(self.counts)]))

    def _rounded_weights(self, clock: Clock) -> dict[str, Tensor]:
        """Q(w) with a gradient to the full-precision w: eq. 1-3 forward, eq. 5-6 backward."""
        flat_N = self.chosen.flat(self.student)
        with torch.no_grad():
            scaled = self.chosen.scaled(flat_N)
            position_N = self._positions()[self._index(scaled, clock.generator("quantise") if self.config.stochastic else None)]
            rounded_N = q.place(position_N, scaled)
        if self.config.gradient == "through_scale":
            return self.chosen.tensors(q.through_scale(flat_N, rounded_N, position_N, scaled))
        return self.chosen.tensors(q.straight_through(flat_N, rounded_N))

    def _moved_points(self) -> dict[str, Tensor]:
        """Q(w; p) with a gradient to the points (eq. 7): the weights and their ranges are fixed in this phase, the assignments are not."""
        self.student.train()  # for its batch-norm statistics; the engine does so only for those that take part
        if self._fixed is None:
            self._fixed = self.chosen.scaled(self.chosen.flat(self.student).detach())
        return self.chosen.tensors(q.place(self._positions().index_select(0, self._index(self._fixed)), self._fixed))

    def _positions(self) -> Tensor:
        """All that an index can name: the points of all tensors, or the uniform levels."""
        return self.points.values_S if self.learns_points else q.uniform_points(2**self.config.bits, next(self.student.parameters()))

    def _index(self, scaled: q.Scaled, generator: torch.Generator | None = None) -> Tensor:
        """Index into `_positions` of each weight."""
        if self.learns_points:
            return q.nearest_index(scaled.u, self.points.values_S.detach(), self.chosen.sizes, self.counts)
        levels = 2**self.config.bits
        return q.uniform_index(scaled.u, levels) if generator is None else q.stochastic_index(scaled.u, levels, generator)

    @torch.no_grad()
    def _initial_points(self) -> Tensor:
        """Eq. 8 for the student as it is, [S]."""
        scaled = self.chosen.scaled(self.chosen.flat(self.student))
        return q.initial_points(scaled.u, self.chosen.sizes, self.counts, self.config.init)

    @torch.no_grad()
    def codes(self) -> Codes:
        """The weights as they are shipped: indices, ranges and, where they are learned, points."""
        scaled = self.chosen.scaled(self.chosen.flat(self.student))
        shapes = dict(zip(self.chosen.names, self.chosen.shapes, strict=True))
        counts = tuple(self.counts) if self.learns_points else ()
        return Codes(shapes, self._index(scaled), scaled.low, scaled.high, self.config.bucket, self._positions().detach().clone(), counts)

    def inference(self) -> nn.Module:
        """A copy of the student with the weights Q(w); never the unquantised ones."""
        module = copy.deepcopy(self.student).eval()
        module.load_state_dict(self.codes().tensors(), strict=False)
        return module

    def artefact(self) -> Artefact:
        """The quantised network, which goes to disk as packed bits."""
        return Artefact(self.produces, self.inference(), PackedEncoder(self.codes()), self.facts())

    def facts(self) -> dict[str, Any]:
        """What the shipped weights cost, in full and as metrics, and how many of them sit on each level or point, by tensor."""
        codes = self.codes()
        size = measure(codes, self.inference().state_dict(), parameters=sum(p.numel() for p in self.student.parameters()))
        return {"size": asdict(size), "occupancy": codes.occupancy(), "metrics": size.metrics()}

    def state_dict(self) -> dict[str, Any]:
        """The sharing of the points and the network that dq learns from; the points are a player's."""
        return {"counts": self.counts, "reference": self.reference.state_dict()} if self.learns_points else {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of `state_dict`."""
        if self.learns_points:
            self.counts, self._fixed = list(state["counts"]), None
            self.reference.load_state_dict(state["reference"])


def _player(phase: str) -> str:
    """Who is trained in a phase of this name."""
    return "points" if phase.startswith("dq") else "student"
