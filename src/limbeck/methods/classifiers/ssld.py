"""SSLD: Beyond Self-Supervision, A Simple Yet Effective Network Distillation Alternative to Improve Backbones (Cui et al.; arXiv 2103.05959).

A student learns from a teacher's probabilities alone, on its own images and on those of a big pool that the teacher is surest of. No label is read.

Legend: B samples, C classes; z_s, z_t logits, p = σ(z_s), q = σ(z_t), σ softmax; A the training images, U the pool.
    L = (1/B) Σ_b ½ [KL(q_b‖p_b) + KL(p_b‖q_b)]                                (1)
    c(u) = argmax q(u), s(u) = max q(u); of every class the k largest s(u)     (6)
    stage 1: (1) on A ∪ selected;  stage 2: (1) on A, the rate divided by 100
Numbers are those of our sheet.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar, Literal, Self, cast

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from limbeck import seeds
from limbeck.contract import Batch, Clock, Data, Frozen, Method, Paper, Phase, Teacher, Update, Workbench
from limbeck.data.selection import near_duplicates, top_per_class
from limbeck.errors import InputError
from limbeck.losses import jensen_shannon, kl_divergence, soft_cross_entropy
from limbeck.losses.divergences import log_probabilities
from limbeck.losses.symmetric import symmetric_kl
from limbeck.teachers import FunctionTeacher

_ROWS = 8192  # of a record, looked up at a time


class SSLDConfig(Frozen):
    """Knobs of `SSLD`."""

    loss: Literal["symmetric_kl", "soft_ce", "kl", "js"] = Field(
        "symmetric_kl",
        description="'symmetric_kl': eq. 1, the authors' \"JS\"; 'soft_ce': −Σ q log p; 'kl': KL(q‖p), same gradient; 'js': the bounded mixture form",
    )
    eps: float | None = Field(None, gt=0, le=1, description="of 'symmetric_kl', inside its logarithms (code: 1e-12, in 2020 1e-10); null: none needed")
    teacher_bn: Literal["batch", "eval"] = Field(
        "batch", description="'batch': the teacher's batch norms use the batch at hand (code); 'eval': their running statistics"
    )
    per_class: int | None = Field(None, ge=1, description="k of eq. 6, pool images kept of a predicted class; null: the whole pool")
    selection: Literal["top", "random", "all"] = Field("top", description="'random': as many as 'top' would keep, drawn blindly; 'all': the whole pool")
    duplicate_threshold: float | None = Field(
        None, gt=0, le=1, description="pool images at least this similar to a test image are dropped first, as `near_duplicates` measures; null: not looked for"
    )
    stage2_steps: int | None = Field(None, ge=0, description="length of stage 2 in batches; null: stage2_epochs; 0: no stage 2")
    stage2_epochs: int = Field(30, ge=0, description="length of stage 2 in passes over A (tutorial: 30, 60 for large students); 0: no stage 2")
    stage2_rate: float = Field(0.01, gt=0, le=1, description="what the learning rate is multiplied by in stage 2 (tutorial: 1/100)")

    @model_validator(mode="after")
    def _eps_has_a_use(self) -> Self:
        if self.eps is not None and self.loss != "symmetric_kl":
            raise ValueError(f"'eps' belongs to the loss 'symmetric_kl'; '{self.loss}' has none.")
        return self


@contextmanager
def batch_statistics(module: nn.Module) -> Iterator[None]:
    """Within, batch norms in eval mode normalise by the batch at hand; their running statistics are out of reach, so they cannot drift."""
    norms = [part for part in module.modules() if isinstance(part, _BatchNorm)]
    kept = [(norm.running_mean, norm.running_var) for norm in norms]
    for norm in norms:
        norm.running_mean = norm.running_var = None
    try:
        yield
    finally:
        for norm, (mean, variance) in zip(norms, kept, strict=True):
            norm.running_mean, norm.running_var = mean, variance


class SSLD(Method):
    """Distillation without labels in two stages: on the images and a mined pool, then on the images alone at a low rate."""

    Config = SSLDConfig
    paper: ClassVar[Paper] = Paper(
        "Beyond Self-Supervision: A Simple Yet Effective Network Distillation Alternative to Improve Backbones",
        "2103.05959",
        "arXiv",
        2021,
        "https://github.com/PaddlePaddle/PaddleClas",
        "the selection and the search for duplicates, whose scripts were not published; that stage 2 has the same loss (2024 configs)",
    )
    teacher: Teacher

    def setup(self) -> None:
        """Find A, and see that the teacher can do what is asked of it.

        Raises:
            InputError: its batch norms cannot be reached ('batch' with a record, a function, an object), or there is a pool without data, or no A.
        """
        if self.config.teacher_bn == "batch" and (why := self._out_of_reach()):
            fix = "Set 'teacher_bn: eval': its answers are taken as they are."
            raise InputError(f"{why}, so its batch norms cannot use the batch at hand.", where="teacher_bn", fix=fix)
        self.own: Tensor | None = None
        self.kept: Tensor | None = None
        self.found: dict[str, Any] = {}
        if not self.mines:
            return
        if self.train_data is None:
            raise InputError("a pool is positions in the training data, and there are none.", where="train", fix="Give them to bind().")
        in_pool_N = torch.zeros(len(self.train_data), dtype=torch.bool)
        in_pool_N[self.pool] = True
        self.own = (~in_pool_N).nonzero()[:, 0]
        if not len(self.own):
            raise InputError("every training image is of the pool.", where="pool", fix="Give images of the target domain in data.source.")

    def _out_of_reach(self) -> str:
        """Why the teacher's batch norms cannot be reached; "" where they can."""
        if getattr(self.teacher, "is_record", False):
            return "the teacher is a record"
        if isinstance(self.teacher, FunctionTeacher):
            return "the teacher is a function"
        return "" if isinstance(self.teacher, nn.Module) else "the teacher is no module"

    @property
    def mines(self) -> bool:
        """Whether there is a pool."""
        return self.pool is not None and len(self.pool) > 0

    def phases(self) -> Iterable[Phase]:
        """With a pool 'mine', which trains nothing and ends with the selection; 'stage-1'; 'stage-2' unless its length is 0."""
        c = self.config
        length = {"epochs": c.stage2_epochs} if c.stage2_steps is None else {"steps": c.stage2_steps}
        stage_1 = None if self.own is None or self.kept is None else torch.cat([self.own, self.kept])
        return [
            *([Phase("mine", steps=0, trains=())] if self.mines else []),
            Phase("stage-1", indices=stage_1),
            *([Phase("stage-2", indices=self.own, rate=c.stage2_rate, **length)] if any(length.values()) else []),
        ]

    def leave(self, phase: Phase, clock: Clock, bench: Workbench) -> None:
        """After 'mine': choose from the pool."""
        if phase.name == "mine":
            self.mine(bench)

    def mine(self, bench: Workbench) -> None:
        """Drop near-duplicates of the test images, then select, eq. 6: `kept` [K] int64, positions in the training data, in order.

        The test images serve here only to keep the pool clear of them; nothing else looks at them.

        Raises:
            InputError: duplicates are to be looked for, and there is no test set, or nothing else in the pool.
        """
        c, data, pool_M = self.config, cast(Data, self.train_data), cast(Tensor, self.pool)
        if c.duplicate_threshold is not None:
            if self.test is None:
                raise InputError("near-duplicates of the test images are to be dropped, and there are none.", where="duplicate_threshold", fix="Give 'test'.")
            pool_M = pool_M[~near_duplicates(data, pool_M, self.test, threshold=c.duplicate_threshold)]
            if not len(pool_M):
                raise InputError("every pool image is a near-duplicate of a test image.", where="duplicate_threshold", fix="Raise it.")
        class_M, score_M = self.judged(data, pool_M, bench)
        chosen_K = top_per_class(score_M, class_M, None if c.selection == "all" else c.per_class)
        if c.selection == "random":
            chosen_K = torch.randperm(len(pool_M), generator=seeds.generator(self.seed, "ssld", "random"))[: len(chosen_K)].sort().values
        self.kept, whole = pool_M[chosen_K], len(cast(Tensor, self.pool))
        by_class = class_M[chosen_K].bincount(minlength=self.num_classes or 0).tolist()
        self.found = {"pool": whole, "duplicates": whole - len(pool_M), "kept": len(chosen_K), "kept_by_class": by_class}
        self.found |= {"confidence_of_pool": float(score_M.mean()), "confidence_of_kept": float(score_M[chosen_K].mean())}

    @torch.no_grad()
    def judged(self, data: Data, ids_M: Tensor, bench: Workbench) -> tuple[Tensor, Tensor]:
        """c(u) [M] int64 and s(u) [M] of eq. 6, the teacher at rest; a record is asked for its first view."""
        if getattr(self.teacher, "is_record", False):
            batches = (Batch(torch.empty(len(ids_B), 0), None, ids_B, torch.zeros_like(ids_B)) for ids_B in ids_M.split(_ROWS))
            judged_M2 = torch.cat([_judge(self.teacher, batch) for batch in batches])
        else:
            judged_M2 = bench.outputs(lambda inputs: _judge(self.teacher, Batch(inputs)), data, ids_M)
        return judged_M2[:, 0].to(torch.int64), judged_M2[:, 1]

    def updates(self, batch: Batch, clock: Clock) -> Iterator[Update]:
        """One update of the student, eq. 1, in both stages. The targets are not looked at."""
        t_BC, s_BC = self.taught(batch), self.student(batch.inputs)
        yield Update("student", self.distance(t_BC, s_BC), {"agreement": (t_BC.argmax(-1) == s_BC.argmax(-1)).float().mean()})

    @torch.no_grad()
    def taught(self, batch: Batch) -> Tensor:
        """z_t [B, C]; with 'batch' normalised by this batch (one sample has no statistics of its own: then by the running ones)."""
        if self.config.teacher_bn == "eval" or len(batch) < 2:
            return self.teacher.logits(batch)
        with batch_statistics(cast(nn.Module, self.teacher)):
            return self.teacher.logits(batch)

    def distance(self, t_BC: Tensor, s_BC: Tensor) -> Tensor:
        """The training loss of teacher and student logits, eq. 1 or one of its rivals."""
        match self.config.loss:
            case "symmetric_kl":
                return symmetric_kl(t_BC, s_BC, eps=self.config.eps)
            case "soft_ce":
                return soft_cross_entropy(s_BC, log_probabilities(t_BC).exp())
            case "kl":
                return kl_divergence(t_BC, s_BC)
            case _:
                return jensen_shannon(t_BC, s_BC)

    def facts(self) -> dict[str, Any]:
        """What was found in the pool: its size, duplicates, images kept, in all and by the teacher's class, mean confidence of pool and kept."""
        return {**self.found, "metrics": {"kept": self.found["kept"]}} if self.found else {}

    def state_dict(self) -> dict[str, Any]:
        """The selection, and what was found."""
        return {"kept": self.kept, "found": dict(self.found)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put them back."""
        self.kept, self.found = state["kept"], dict(state["found"])


def _judge(teacher: Teacher, batch: Batch) -> Tensor:
    """Class and confidence of each sample, [B, 2] float32 (a class number below 2^24 is exact)."""
    top = teacher.logits(batch).softmax(-1, dtype=torch.float32).max(-1)
    return torch.stack([top.indices.to(torch.float32), top.values], -1)
