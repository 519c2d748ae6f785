"""Distilling the Knowledge in Data Pruning (arXiv 2403.07854): a student learns from a fraction of the data and a teacher that has seen all of it.

Legend: N samples, S the kept ones, |S| = round(f·N), f the fraction that is KEPT; B samples of S, C classes; z_s, z_t logits, σ softmax, τ temperature.
    L = (1/|S|) Σ_{i∈S} [ (1 − α) CE(y_i, σ(z_s,i)) + α τ² KL(σ(z_t,i/τ) ‖ σ(z_s,i/τ)) ]           (1)
    S: the f·N samples with the highest scores; a score is random, or says how hard a sample is     (2)
    scores: times forgotten, E over networks ‖∂CE_i/∂θ‖ (GraNd), E over networks ‖σ(z_i) − e_{y_i}‖  (2b to 2d)
Numbers are those of our sheet. The rule α(f) behind `alpha: auto` is OURS.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, ClassVar, Literal, Self, cast

from pydantic import Field, model_validator
from torch import Tensor

from limbeck import seeds
from limbeck.contract import IGNORE, Batch, Clock, Data, Frozen, Method, OptimiserSpec, Paper, Phase, Player, Teacher, Update, Workbench
from limbeck.data.selection import Rule, select
from limbeck.errors import InputError
from limbeck.losses import cross_entropy, kl_divergence
from limbeck.methods.classifiers._base import require_labels
from limbeck.methods.classifiers.data_pruning_part import Scoring, auto_alpha, kept_shares, read_scores


class DataPruningConfig(Frozen):
    """Knobs of `DataPruning`."""

    fraction: float = Field(0.3, gt=0, le=1, description="f, the part of the samples that is KEPT; 1: no pruning, and nothing is scored")
    score: Literal["random", "el2n", "grand", "grand_last_layer", "forgetting", "file"] = Field(
        "random", description="2a to 2d; 'grand_last_layer': GraNd of the last layer alone; 'file': out of `file`. With a teacher random is no worse (paper)"
    )
    keep: Literal["hardest", "easiest"] = Field("hardest", description="the highest scores (paper) or the lowest; 'random' has neither")
    alpha: Annotated[float, Field(ge=0, le=1)] | Literal["auto"] = Field(
        "auto", description="α of eq. 1, weight of the teacher; 'auto': 1 for f ≤ 0.1, falling to 0.5 at f = 1 (OURS; the paper only says: more for small f)"
    )
    temperature: float = Field(4.0, gt=0, le=1000, description="τ (customary; not verified)")
    tau_squared: bool = Field(True, description="the factor τ² of eq. 1 (customary; not verified)")
    networks: int | None = Field(None, ge=1, le=1000, description="networks whose scores are averaged; null: 10 (original score paper), 1 for 'forgetting'")
    score_epochs: int | None = Field(
        None, ge=0, description="training of each of them; null: 10 (original score paper), for 'forgetting' a whole training; 0: as initialised"
    )
    score_optimiser: OptimiserSpec | None = Field(None, description="of those trainings; null: train.optimiser, its schedule over score_epochs")
    class_balanced: bool = Field(False, description="equal shares of the classes")
    min_per_class: int = Field(0, ge=0, description="samples that every class keeps at least (ours): hardest-first can drop whole classes")
    file: str | None = Field(None, description="'file': a .npy file of N scores, higher = harder")

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if (self.file is None) == (self.score == "file"):
            raise ValueError("'file' and 'score: file' belong together.")
        if self.score == "forgetting" and self.score_epochs is not None and self.score_epochs < 2:
            raise ValueError("'score_epochs' must be 2 or more for 'forgetting': what was seen once cannot be forgotten.")
        return self


def pruning_loss(
    logits_BC: Tensor, teacher_BC: Tensor | None, targets: Tensor | None, alpha: float, temperature: float = 4.0, tau_squared: bool = True
) -> tuple[Tensor, dict[str, Tensor]]:
    """Eq. 1 on a batch, and its terms: 'hard' unless α = 1, 'soft' unless α = 0. Unlabelled samples count in the soft term alone.

    Args:
        logits_BC: of the student. teacher_BC: of the teacher, not looked at for α = 0. targets: as in `cross_entropy`, not looked at for α = 1.
        alpha: weight of the teacher, in [0, 1]. temperature: τ > 0. tau_squared: whether the soft term has the factor τ².

    The soft term's gradient at the logits, with the factor: α τ (σ(z_s/τ) − σ(z_t/τ))/B. Source: 2403.07854 eq. 1 of our sheet.
    """
    terms: dict[str, Tensor] = {}
    if alpha > 0:
        assert teacher_BC is not None
        terms["soft"] = (temperature**2 if tau_squared else 1.0) * kl_divergence(teacher_BC.detach(), logits_BC, temperature)
    if alpha < 1:
        terms["hard"] = cross_entropy(logits_BC, targets)
    if len(terms) == 2:
        return alpha * terms["soft"] + (1 - alpha) * terms["hard"], terms
    return next(iter(terms.values())), terms


class DataPruning(Method):
    """Score the samples, keep a fraction of them, train on those with a teacher's help; `scores` [N], `kept` positions, `alpha` the weight."""

    Config = DataPruningConfig
    paper: ClassVar[Paper] = Paper(
        "Distilling the Knowledge in Data Pruning", "2403.07854", "ICML", 2025, "",
        "α as a function of f: the paper's direction, our formula; τ, τ² and the training's length are customary choices",
    )  # fmt: skip
    needs_teacher = False  # with α = 0
    teacher: Teacher

    def setup(self) -> None:
        """Choose what can be chosen without training, and refuse at once what could not be done after it.

        Raises:
            InputError: no teacher for α > 0; no labels for α < 1 where all is unlabelled, or for a score that needs those of all samples; no training
                data; a file that does not fit; more samples a class than the fraction holds; no factory of fresh students for a score.
        """
        c = self.config
        self.alpha: float = auto_alpha(c.fraction) if c.alpha == "auto" else c.alpha
        self.scoring: Scoring | None = None
        self.scores: Tensor | None = None
        self.kept: Tensor | None = None
        self.labels = None if self.train_data is None else self.train_data.targets
        if self.alpha > 0 and self.teacher is None:
            raise InputError("'data_pruning' with alpha > 0 needs a teacher.", where="teacher", fix="Add a 'teacher:' section, or set alpha: 0.")
        if self.alpha == 0:
            require_labels(self.train_data, "'data_pruning' with alpha 0")
        if c.fraction == 1:
            return
        if self.train_data is None:
            raise InputError("there are no training data to choose from.", where="train", fix="Give 'train' to bind().")
        self.total = len(self.train_data)
        if (c.class_balanced or c.min_per_class) and self.labels is None:
            raise InputError("the data have no labels, so no classes.", where="class_balanced" if c.class_balanced else "min_per_class", fix="Leave it out.")
        self._select("random", None)  # refuses a min_per_class that the fraction cannot give
        if c.score == "random":
            self._choose(None)
        elif c.score == "file":
            self._choose(read_scores(c.file, self.total))
        else:
            require_labels(self.train_data, f"the score '{c.score}'")
            if self.labels is None or (self.labels == IGNORE).any():
                fix = "Leave data.labelled and data.pool out, or use score: random, which needs no labels."
                raise InputError(f"the score '{c.score}' needs the label of every training sample.", where="score", fix=fix)
            if self.fresh_student is None:
                fix = "Give a model by name or by a factory, or scores from a file."
                raise InputError("a score is given by freshly trained networks, and there is only one module.", where="student", fix=fix)
            self.scoring = Scoring(c.score, self.total, self.fresh_student)

    @property
    def networks(self) -> int:
        """How many networks are trained for the scores."""
        return 0 if self.scoring is None else self.config.networks or (1 if self.config.score == "forgetting" else 10)

    def phases(self) -> list[Phase]:
        """One training on all samples for each scoring network, then the student's on what is kept."""
        c = self.config
        epochs = 10 if c.score_epochs is None and c.score != "forgetting" else c.score_epochs
        scoring = [Phase(f"score-{k + 1}", epochs=epochs, trains=("scorer",)) for k in range(self.networks)]
        return [*scoring, Phase(indices=self.kept)]

    def players(self) -> Mapping[str, Player]:
        """The student, and the network that is being trained for its scores."""
        scorer = None if self.scoring is None else self.scoring.network
        found = {"student": Player(self.student)}
        return found if scorer is None else found | {"scorer": Player(scorer, self.config.score_optimiser)}

    def enter(self, phase: Phase, clock: Clock, bench: Workbench) -> None:
        """A fresh network to score with."""
        if self.scoring is not None and phase.name.startswith("score-"):
            self.scoring.begin(seeds.derive(self.seed, "data_pruning", phase.name))

    def leave(self, phase: Phase, clock: Clock, bench: Workbench) -> None:
        """The network's scores; after the last network, the choice."""
        if self.scoring is not None and self.scoring.network is not None and self.scoring.end(cast(Data, self.train_data), bench) == self.networks:
            self._choose(self.scoring.scores)

    def _select(self, rule: Rule, scores_N: Tensor | None) -> Tensor:
        c, seed = self.config, seeds.derive(self.seed, "data_pruning")
        return select(
            rule, c.fraction, scores_N=scores_N, classes_N=self.labels, total=self.total, balanced=c.class_balanced, min_per_class=c.min_per_class, seed=seed
        )  # fmt: skip

    def _choose(self, scores_N: Tensor | None) -> None:
        """Keep the fraction, item 2; say so where a class is lost."""
        self.scores, self.kept = scores_N, self._select("random" if scores_N is None else self.config.keep, scores_N)
        if lost := [str(label) for label, share in kept_shares(self.labels, self.kept).items() if share == 0]:
            what = f"no sample of {len(lost)} class(es) is kept ({', '.join(lost[:5])}): set min_per_class or class_balanced."
            warnings.warn(what, stacklevel=2)

    def updates(self, batch: Batch, clock: Clock) -> Iterator[Update]:
        """One update: of the scoring network by cross-entropy, or of the student by eq. 1."""
        if self.scoring is not None and self.scoring.network is not None:
            logits_BC = self.scoring.network(batch.inputs)
            self.scoring.count(logits_BC, batch, clock)
            yield Update("scorer", cross_entropy(logits_BC, batch.targets))
            return
        c, logits_BC = self.config, self.student(batch.inputs)
        teacher_BC = self.teacher.logits(batch) if self.alpha > 0 else None
        yield Update("student", *pruning_loss(logits_BC, teacher_BC, batch.targets, self.alpha, c.temperature, c.tau_squared))

    def facts(self) -> dict[str, Any]:
        """What was kept, in all and as a part of each class, the weight, networks trained; samples never learnt, where forgetting was counted."""
        c, shares = self.config, kept_shares(self.labels, self.kept)
        found: dict[str, Any] = {"score": c.score, "fraction": c.fraction, "alpha": self.alpha, "alpha_is_our_rule": c.alpha == "auto"}
        metrics = {"alpha": self.alpha, "fraction": c.fraction, "networks_scored": float(self.networks)}
        if self.kept is not None:
            found |= {"kept": len(self.kept), "kept_by_class": {str(label): share for label, share in shares.items()}}
            metrics |= {"kept": float(len(self.kept))} | ({"least_kept_of_a_class": min(shares.values())} if shares else {})
        if self.scores is not None and c.score == "forgetting":
            metrics["never_learnt"] = float(self.scores.isinf().double().mean())
        return found | {"metrics": metrics}

    def state_dict(self) -> dict[str, Any]:
        """The scores, the choice, and how far the scoring is."""
        return {"scores": self.scores, "kept": self.kept, "scoring": None if self.scoring is None else self.scoring.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put them back."""
        self.scores, self.kept = state["scores"], state["kept"]
        if self.scoring is not None:
            self.scoring.load_state_dict(state["scoring"])
