"""MiniMA: prune the chosen teacher to the student's size, then distil on raw text (arXiv 2311.07052; sheet `capacity_gap`).

Which teacher to choose is the law of the capacity gap, `limbeck.language.capacity_law`. The student starts as the most important heads, neurons and channels
of the teacher (eqs. 3 to 6, `limbeck.language.importance` and `pruning`) and learns by

(7)  L = hard · CE(y, q) + soft · KL(p‖q), ½ each, means over the positions that have a target; p teacher, q student, no temperature.

The paper's soft half is the cross-entropy −Σ p log q, which is the KL plus the teacher's entropy: same gradient. What is logged here is the KL, 0 being equal.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field

from limbeck.components import Component
from limbeck.contract import Artefact, Batch, Clock, Paper, Phase, Update, Workbench
from limbeck.errors import InputError
from limbeck.language.decoder import Decoder, DecoderShape, blank
from limbeck.language.divergences import CrossEntropy, ForwardKL, Mixed
from limbeck.language.models import LanguageModel
from limbeck.language.sources import ModelSource
from limbeck.methods.language._base import LanguageMethod, logged
from limbeck.methods.language.capacity_gap_part import PruningConfig, as_decoder, check_size, described, pruned, shape_of, size


class CapacityGapConfig(PruningConfig):
    """Knobs of `CapacityGap`: those of pruning, and:"""

    initialise: Literal["pruned", "student"] = Field("pruned", description="first weights: out of the teacher by pruning, or the recipe's student as it is")
    soft: float = Field(0.5, ge=0, description="weight of KL(p‖q)")
    hard: float = Field(0.5, ge=0, description="weight of the cross-entropy with the text")


class CapacityGap(LanguageMethod):
    """A student that starts as its pruned teacher (or as it is) learns the text and the teacher's distributions, half and half.

    With initialise: pruned the recipe's student gives the size that is aimed at, where the knobs give none, and is what is trained alone to be compared with;
    the distilled student is a `Decoder` of a shape of its own.
    """

    Config = CapacityGapConfig
    paper: ClassVar[Paper] = Paper("Towards the Law of Capacity Gap in Distilling Language Models", "2311.07052", "ACL", 2025, "GeneZC/MiniMA")
    config: CapacityGapConfig

    def setup(self) -> None:
        """Put the loss together and look whether the teacher can be pruned. Raises InputError."""
        config = self.config
        if config.soft == 0 and config.hard == 0:
            raise InputError("'soft' and 'hard' are both 0: there is nothing to learn.", where="method.soft")
        parts = ((config.hard, CrossEntropy()), (config.soft, ForwardKL()))
        self.divergence = Mixed(tuple((weight, part) for weight, part in parts if weight > 0))
        self.teacher_shape: DecoderShape | None = None
        self.shape: DecoderShape | None = None
        """Of the pruned student, once there is one."""
        if config.initialise == "pruned":
            self.teacher_shape = shape_of(self._live())
            self.wanted = size(self.student) if config.parameters is None else config.parameters
            if config.sparsity is None:
                check_size(self.teacher_shape, self.wanted)

    def _live(self) -> LanguageModel:
        """The one network that teaches. Raises InputError: it is a record, or several networks."""
        source: Any = self.teacher
        if not isinstance(source, ModelSource):
            raise InputError(
                "a recorded teacher has no weights to start from.", where="teacher", fix="Give 'teacher' a 'model', or set the method's initialise: student."
            )
        if len(source.models) != 1:
            raise InputError(f"{len(source.models)} teachers cannot be pruned to one student.", where="teacher", fix="Give one, or set initialise: student.")
        return source.models[0]

    def enter(self, phase: Phase, clock: Clock, bench: Workbench) -> None:
        """Prune the teacher: its pruned copy takes the place of the recipe's student."""
        if self.config.initialise == "student":
            return
        assert self.train_data is not None
        teacher = as_decoder(self._live().to(bench.device))
        self.student = pruned(teacher, self.train_data, self.config, self.wanted, self.seed)
        self.shape = self.student.shape

    def updates(self, batch: Batch, clock: Clock) -> Iterator[Update]:
        """One update of the student."""
        tokens = self.tokens(batch)
        signal = self.asked(tokens) if self.config.soft > 0 else None
        found = self.losses(tokens, self.divergence, signal)
        yield Update("student", found.loss, logged(found))

    def artefact(self) -> Artefact:
        """The student; a pruned one is built again by the decoder's builder, from its shape."""
        if self.shape is None:
            return super().artefact()
        args = {"shape": self.shape.model_dump(mode="json")}
        return Artefact(self.produces, self.student, facts=self.facts(), around=lambda component: Component(name="decoder", args=args))

    def facts(self) -> dict[str, Any]:
        """Real sizes, with embeddings and without."""
        if self.shape is None or self.teacher_shape is None or not isinstance(self.student, Decoder):
            return {}
        return described(self.student, self.teacher_shape)

    def state_dict(self) -> dict[str, Any]:
        """The pruned student's shape."""
        return {} if self.shape is None else {"shape": self.shape.model_dump(mode="json")}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """A student of that shape, whose weights are loaded afterwards."""
        if "shape" in state:
            self.shape = DecoderShape.model_validate(state["shape"])
            self.student = blank(self.shape, torch.float32, torch.device("cpu"))
