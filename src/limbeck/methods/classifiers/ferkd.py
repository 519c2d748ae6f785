"""FerKD: Surgical Label Adaptation for Efficient Distillation (Shen; arXiv 2312.17473), and FKD underneath (Shen, Xing; arXiv 2112.01528).

The teacher has labelled many crops of each image once (`limbeck record`); students train on these crops and labels and never meet the teacher.

Legend: B crops a batch, n of each image; C classes; N images with V stored crops each; q a stored soft label, s its score, z student logits.
    ŷ = q, or the smoothed truth, or the crop is left out, by s and T_L < T_M < T_T    (4)
    x, ŷ mixed with another crop of the same image (SelfMix, off by default)            (5)
    L = −(1/B) Σ_b Σ_k ŷ_bk log softmax(z_b/τ_s)_k                                      (3)
Equation numbers are those of our sheet. FKD is (3) with ŷ = q for every crop: `low: 0, middle: 0, top: 1`, to the bit.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor

from limbeck.contract import IGNORE, Batch, Clock, Data, Frozen, Method, Paper, Phase, Update
from limbeck.data.augment import beta_quantile
from limbeck.errors import InputError
from limbeck.losses import mean_probabilities, soft_cross_entropy
from limbeck.methods.classifiers import ferkd_part as part
from limbeck.methods.classifiers._base import require_labels

_ROWS = 8192  # of a record, looked up at a time


def _soft_labels(recorded: Mapping[str, Tensor]) -> Tensor:
    """q, [B, C]: the mean of the members' probabilities out of recorded logits [B, T, C]."""
    return mean_probabilities(recorded["logits"].transpose(0, 1))


class FerKDConfig(Frozen):
    """Knobs of `FerKD`. The defaults of the thresholds and of ε are ours: the paper's are not known."""

    low: float = Field(0.05, ge=0, le=1, description="T_L, below it a crop is left out as noise; 0: none")
    middle: float = Field(0.2, ge=0, le=2, description="T_M, below it a crop's label is the smoothed truth; at most `low`: none, above 1: all")
    top: float = Field(0.99, ge=0, le=1, description="T_T, above it a crop is left out as too easy; 1: none")
    thresholds: Literal["quantile", "score"] = Field("quantile", description="whether the three are quantiles of the scores, or scores")
    score: Literal["max", "label"] = Field("max", description="s of a crop: the largest probability (our reading), or that of the true class")
    smoothing: float = Field(0.1, ge=0, lt=1, description="ε of the smoothed truth")
    crops: int = Field(4, ge=1, le=4096, description="n, crops of an image side by side in a batch (FKD's code: 4)")
    single_last: bool = Field(True, description="the last n passes of one crop an image show single crops, as FKD's code does")
    label_type: Literal["as_recorded", "hard", "smoothing", "marginal_smoothing", "marginal_renorm"] = Field(
        "as_recorded", description="quantise the recorded label further, to compare FKD's types from one full record"
    )
    k: int = Field(5, ge=1, description="classes kept by the two marginal types (FKD's code: 5)")
    temperature: float = Field(1.0, gt=0, le=1000, description="τ_s, divides the student's logits (FKD: 1)")
    mix: Literal["off", "mixup", "cutmix", "both"] = Field("off", description="SelfMix; 'both' takes one of them a batch")
    mixup_alpha: float = Field(0.8, gt=0, le=100, description="λ ~ Beta(α, α) of mixup (FKD's code: 0.8)")
    cutmix_alpha: float = Field(1.0, gt=0, le=100, description="λ ~ Beta(α, α) of cutmix (FKD's code: 1.0)")
    switch: float = Field(0.5, ge=0, le=1, description="chance of cutmix, in 'both' (FKD's code: 0.5)")
    mates: Literal["same_image", "other_images"] = Field("same_image", description="'other_images': ordinary mixing, too strong for stored labels; a baseline")

    @field_validator("mix", mode="before")
    @classmethod
    def _off_in_yaml(cls, value: Any) -> Any:
        return "off" if value is False else value  # YAML 1.1 reads a bare `off` as false

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.low > self.top:
            raise ValueError(f"'low' ({self.low:g}) is above 'top' ({self.top:g}): no crop would be left.")
        return self


class FerKD(Method):
    """A student on stored crops and soft labels: crops without content are left out, doubtful ones get the true label, the rest keep the teacher's."""

    Config = FerKDConfig
    needs_record = True
    paper: ClassVar[Paper] = Paper(
        "FerKD: Surgical Label Adaptation for Efficient Distillation",
        "2312.17473",
        "ICCV 2023",
        2023,
        "https://github.com/szq0214/FKD",
        "the score, the thresholds, ε, and SelfMix's pairing: the relabelling code was never published; FKD (2112.01528) underneath is complete",
    )

    def setup(self) -> None:
        """One pass over the record: the region of every crop.

        Raises:
            InputError: the teacher is live, or its record has fewer views than `crops`; labels are needed and there are none; k is above C.
        """
        c, teacher, data = self.config, self.teacher, self.train_data
        if not getattr(teacher, "is_record", False):
            raise InputError(
                "'ferkd' learns from a record of labelled crops, and this teacher is live.",
                where="teacher",
                fix="Record it first: `limbeck record RECIPE` with 'data.views: {kind: boxes, count: 12}', then give 'teacher: {record: PATH}'.",
            )
        views = int(getattr(teacher, "num_views", None) or 0)
        if views < c.crops:
            fix = f"Use 'crops: {max(views, 1)}', or record with 'data.views: {{kind: boxes, count: {max(12, c.crops)}}}'."
            raise InputError(f"a batch shows {c.crops} crops of each image, and the record has {views} views.", where="method.crops", fix=fix)
        if data is None:
            raise InputError("the crops are chosen before training, which takes the training data.", where="train", fix="Give them to bind().")
        if c.middle > c.low or c.score == "label":
            require_labels(data, "'ferkd' with crops that get the true label, or are judged by it,")
        if c.label_type != "as_recorded" and self.num_classes is not None:
            part.kept_classes(c.label_type, c.k, self.num_classes)
        s_NV = self._scores(data, views)
        self.low, self.middle, self.top = (part.quantile(s_NV, t) if c.thresholds == "quantile" else t for t in (c.low, c.middle, c.top))
        labelled_N = torch.zeros(len(data), dtype=torch.bool) if data.targets is None else data.targets != IGNORE
        region_NV = part.crop_regions(s_NV, self.low, self.middle, self.top)
        self.region_NV, bare = part.keep_a_crop(region_NV, s_NV, labelled_N)
        self.usable_NV = self.region_NV != part.DISCARD
        truth_NV, soft_NV = (self.region_NV == region for region in (part.HARD, part.SOFT))
        chosen = {"discarded_hard": s_NV < self.low, "discarded_easy": s_NV > self.top, "truth": truth_NV, "soft": soft_NV}
        shares = {name: int(rows_NV.sum()) / rows_NV.numel() for name, rows_NV in chosen.items()}
        self._facts = {"views": views, "mean_score": float(s_NV.mean(dtype=torch.float64)), "shares": shares, "images_without_usable_crop": bare}

    def _scores(self, data: Data, views: int) -> Tensor:
        """s of every row of the record, [N, V] float32; a few thousand rows are in memory at a time."""
        s_NV, targets_N = torch.empty(len(data), views), data.targets
        for ids_M in torch.arange(len(data)).split(max(1, _ROWS // views)):
            ids_B, views_B = ids_M.repeat_interleave(views), torch.arange(views).repeat(len(ids_M))
            q_BC = _soft_labels(self.teacher.lookup(ids_B, views_B))  # type: ignore[union-attr]
            s_NV[ids_M] = part.crop_scores(q_BC, None if targets_N is None else targets_N[ids_B], self.config.score).view(-1, views)
        return s_NV

    def phases(self) -> Iterable[Phase]:
        """One phase over the usable crops, n of an image side by side, single ones at the end."""
        n = self.config.crops
        return [Phase(views_per_sample=n, single_last=n if self.config.single_last and n > 1 else 0, usable=self.usable_NV)]

    def updates(self, batch: Batch, clock: Clock) -> Iterator[Update]:
        """One update of the student on adapted labels, eq. 3."""
        labels_BC, region_B = self.labels(batch)
        inputs, labels_BC = self.mixed(batch, labels_BC, clock)
        loss = soft_cross_entropy(self.student(inputs) / self.config.temperature, labels_BC)
        yield Update("student", loss, {"truth_share": (region_B == part.HARD).float().mean()})

    def labels(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """ŷ [B, C] of eq. 4 out of what the record holds for these crops, and the crops' regions [B].

        Raises:
            InputError: the batch does not say which crops these are, or what was recorded.
        """
        if "logits" not in batch.recorded or batch.ids is None or batch.views is None:
            raise InputError("the batch carries no recorded labels.", where="data.views", fix="Give the recipe the record's 'data.views'.")
        self.region_NV = self.region_NV.to(batch.inputs.device)
        q_BC, region_B = _soft_labels(batch.recorded), self.region_NV[batch.ids, batch.views]
        if self.config.label_type != "as_recorded":
            q_BC = part.recover(part.quantise(q_BC, self.config.label_type, self.config.k), self.config.label_type, q_BC.shape[-1])
        return (q_BC if batch.targets is None else part.adapted_labels(q_BC, batch.targets, region_B, self.config.smoothing)), region_B

    def mixed(self, batch: Batch, labels_BC: Tensor, clock: Clock) -> tuple[Tensor, Tensor]:
        """Inputs and labels after SelfMix, eq. 5: one kind, one λ and one box a batch, drawn from the clock (on the CPU: nothing waits for a device)."""
        c = self.config
        if c.mix == "off" or batch.ids is None:
            return batch.inputs, labels_BC
        u_4 = torch.rand(4, generator=replace(clock, device=torch.device("cpu")).generator("selfmix"), dtype=torch.float64)
        mates_B = (part.same_image_mates if c.mates == "same_image" else part.other_image_mates)(batch.ids)
        cuts = c.mix == "cutmix" or (c.mix == "both" and float(u_4[0]) < c.switch)
        keep = float(beta_quantile(u_4[1:2], c.cutmix_alpha if cuts else c.mixup_alpha))
        if cuts:
            return part.cutmix(batch.inputs, labels_BC, mates_B, keep, float(u_4[2]), float(u_4[3]))
        return part.mixup(batch.inputs, labels_BC, mates_B, keep)

    def facts(self) -> dict[str, Any]:
        """The thresholds as scores, the mean score, the regions' shares of all crops, and how many images had no usable crop."""
        bounds = {"low": self.low, "middle": min(self.middle, 2.0), "top": self.top}  # JSON has no infinity
        return {"thresholds": bounds, **self._facts}
