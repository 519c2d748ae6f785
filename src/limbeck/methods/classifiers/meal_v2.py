"""MEAL V2: Boosting Vanilla ResNet-50 to 80%+ Top-1 Accuracy on ImageNet without Tricks (Shen, Savvides; arXiv 2009.08453).

A trained student is fine-tuned on the mean probabilities of an ensemble, with a discriminator that tells its logits from the ensemble's.

Legend: T teachers, B samples, C classes; t_k teacher logits, s student logits, t̄ = (1/T) Σ_k t_k, σ softmax, D the discriminator.
    p    = (1/T) Σ_k σ(t_k)                                  (1)
    L_KL = −(1/B) Σ_b Σ_c p_bc log σ(s)_bc                   (2)
    D: C → ⌊C/K⌋ → ⌊⌊C/K⌋/K⌋ → 2                             (3)
    L_D  = BCE(D(s), [1, 0]) ∪ BCE(D(t̄), [0, 1])             (4)
    L    = L_KL + L_D                                        (5)
Equation numbers are those of our sheet. The paper's CutMix is the recipe's `data.augment.cutmix`: student and teachers see the mixed image, no label is mixed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn

from limbeck import seeds
from limbeck.contract import Batch, Clock, Frozen, Method, OptimiserSpec, Paper, Player, Teacher, Update
from limbeck.errors import InputError
from limbeck.losses import cross_entropy, discriminator_loss, gradient_reversal, mean_probabilities, soft_cross_entropy
from limbeck.methods.classifiers._base import require_labels


class MealV2Config(Frozen):
    """Knobs of `MealV2`."""

    mode: Literal["adversarial", "official", "off"] = Field(
        "adversarial",
        description="'adversarial': D is stepped on detached logits, then the student with L_D's gradient reversed (the text); "
        "'official': both minimise L_D (the released script); 'off': L_KL alone",
    )
    shrink: int = Field(8, ge=2, description="K of eq. 3, divides the width at each hidden layer of D (code: 8)")
    min_width: int = Field(8, ge=1, description="least width of D's hidden layers; ours, changes nothing at 1000 classes (1: the bare eq. 3, never 0)")
    last_relu: bool = Field(False, description="ReLU on D's two outputs too, as the code has it (True there); D can then die at ln 2 for good")
    discriminator_optimiser: OptimiserSpec | None = Field(None, description="of D; None: the recipe's train.optimiser, as the code's schedule does")
    hard_weight: float = Field(0.0, ge=0, le=1000, description="weight of CE with the labels, added to L (paper: 0, labels are not used)")

    @field_validator("mode", mode="before")
    @classmethod
    def _off_in_yaml(cls, value: Any) -> Any:
        return "off" if value is False else value  # YAML 1.1 reads a bare `off` as false


def discriminator_widths(classes: int, shrink: int = 8, min_width: int = 8) -> tuple[int, int, int, int]:
    """Widths of D, eq. 3: C → ⌊C/K⌋ → ⌊⌊C/K⌋/K⌋ → 2, the hidden ones at least `min_width` (ours).

    >>> discriminator_widths(1000)
    (1000, 125, 15, 2)
    """
    return classes, max(classes // shrink, min_width), max(classes // shrink // shrink, min_width), 2


def build_discriminator(widths: tuple[int, ...], last_relu: bool, seed: int) -> nn.Sequential:
    """D, eq. 3: linear layers with ReLU between them, and after the last where `last_relu`. [N, C] → [N, 2]."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seeds.derive(seed, "meal_v2", "discriminator"))
        layers = [layer for wide, narrow in pairwise(widths) for layer in (nn.Linear(wide, narrow), nn.ReLU())]
    return nn.Sequential(*layers if last_relu else layers[:-1])


class MealV2(Method):
    """Soft labels of an ensemble and a discriminator on the logits, for a student that is already trained; labels are not used."""

    Config = MealV2Config
    paper: ClassVar[Paper] = Paper(
        "MEAL V2: Boosting Vanilla ResNet-50 to 80%+ Top-1 Accuracy on ImageNet without Tricks",
        "2009.08453",
        "NeurIPS 2020 workshop Beyond BackPropagation",
        2020,
        "https://github.com/szq0214/MEAL-V2",
        "the adversarial mode: the text asks for it, the released script minimises L_D in the student as well",
    )
    starts_trained = True
    teacher: Teacher

    def setup(self) -> None:
        """Build the discriminator.

        Raises:
            InputError: the number of classes is not known, or labels are asked for and there are none.
        """
        if self.config.hard_weight > 0:
            require_labels(self.train_data, "'meal_v2' with hard_weight > 0")
        self.judged, self.dead = 0, torch.zeros((), dtype=torch.int64)  # batches that D saw, and those of them on which it was dead
        if self.config.mode == "off":
            return
        if self.num_classes is None:
            raise InputError("the discriminator's width is the number of classes, which is not known.", where="num_classes", fix="Give it to bind().")
        widths = discriminator_widths(self.num_classes, self.config.shrink, self.config.min_width)
        self.discriminator = build_discriminator(widths, self.config.last_relu, self.seed)

    def players(self) -> Mapping[str, Player]:
        """The student, and the discriminator unless it is off."""
        student = {"student": Player(self.student)}
        return student if self.config.mode == "off" else student | {"discriminator": Player(self.discriminator, self.config.discriminator_optimiser)}

    def updates(self, batch: Batch, clock: Clock) -> Iterator[Update]:
        """'official': student, then D, both from the same weights (one joint step). 'adversarial': D, then the student against the new D."""
        t_TBC, s_BC = self.teacher.all_logits(batch), self.student(batch.inputs)
        soft = soft_cross_entropy(s_BC, mean_probabilities(t_TBC))
        loss, metrics = soft, {"soft": soft}
        if self.config.hard_weight > 0:
            metrics["hard"] = cross_entropy(s_BC, batch.targets)
            loss = loss + self.config.hard_weight * metrics["hard"]
        if self.config.mode == "off":
            yield Update("student", loss, metrics)
            return
        t_mean_BC = t_TBC.mean(0)
        if self.config.mode == "official":
            yield Update("student", loss + self.judge(s_BC, t_mean_BC), metrics)
            yield self.discriminator_update(s_BC.detach(), t_mean_BC)
        else:
            yield self.discriminator_update(s_BC.detach(), t_mean_BC)
            yield Update("student", loss + self.judge(gradient_reversal(s_BC), t_mean_BC), metrics)

    def judge(self, s_BC: Tensor, t_mean_BC: Tensor) -> Tensor:
        """L_D, eq. 4."""
        return discriminator_loss(self.discriminator(s_BC), self.discriminator(t_mean_BC))

    def discriminator_update(self, s_BC: Tensor, t_mean_BC: Tensor) -> Update:
        """D's own step. D is dead on a batch where it answers every row alike: then no gradient reaches any logit."""
        on_student_B2, on_teacher_B2 = self.discriminator(s_BC), self.discriminator(t_mean_BC)
        dead = (torch.cat([on_student_B2, on_teacher_B2]) == on_student_B2[0]).all()
        self.judged, self.dead = self.judged + 1, self.dead + dead
        return Update("discriminator", discriminator_loss(on_student_B2, on_teacher_B2), {"dead": dead})

    def facts(self) -> dict[str, Any]:
        """The direction of the discriminator, its widths, and the share of batches on which it was dead."""
        if self.config.mode == "off":
            return {"mode": "off"}
        widths = [layer.in_features for layer in self.discriminator if isinstance(layer, nn.Linear)]
        return {"mode": self.config.mode, "discriminator_widths": [*widths, 2], "discriminator_dead": int(self.dead) / max(self.judged, 1)}

    def state_dict(self) -> dict[str, Any]:
        """The counts behind `facts`."""
        return {"judged": self.judged, "dead": self.dead}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put the counts back."""
        self.judged, self.dead = state["judged"], state["dead"]
