"""The methods, by short name. `limbeck.methods.KD` and the like are imported on first use.

Third parties add a method through the entry-point group `limbeck.methods` (name = "package.module:Class").
"""

from __future__ import annotations

from importlib.metadata import entry_points
from typing import Any

from limbeck.components import import_object

BUILT_IN = {
    "kd": "limbeck.methods.classifiers.kd:KD",
    "supervised": "limbeck.methods.classifiers.supervised:Supervised",
    "meal_v2": "limbeck.methods.classifiers.meal_v2:MealV2",
    "self_distillation": "limbeck.methods.classifiers.self_distillation:SelfDistillation",
    "weight_align": "limbeck.methods.classifiers.weight_align:WeightAlign",
    "quantized_distillation": "limbeck.methods.classifiers.quantized_distillation:QuantizedDistillation",
    "ferkd": "limbeck.methods.classifiers.ferkd:FerKD",
    "ssld": "limbeck.methods.classifiers.ssld:SSLD",
    "data_pruning": "limbeck.methods.classifiers.data_pruning:DataPruning",
    "robust_active": "limbeck.methods.classifiers.robust_active:RobustActive",
    "denoising": "limbeck.methods.generators.denoising:Denoising",
    "dmd2": "limbeck.methods.generators.dmd2:DMD2",
    "f_distill": "limbeck.methods.generators.f_distill:FDistill",
    "disback": "limbeck.methods.generators.disback:DisBack",
    "ict": "limbeck.methods.generators.ict:ICT",
    "boot": "limbeck.methods.generators.boot:Boot",
    "real_images": "limbeck.methods.datasets.real_images:RealImages",
    "ftd": "limbeck.methods.datasets.ftd:FTD",
    "ast": "limbeck.methods.datasets.ast:AST",
    "krr_st": "limbeck.methods.datasets.krr_st:KRRST",
    "barlow_twins": "limbeck.methods.datasets.barlow_twins:BarlowTwins",
    "infer": "limbeck.methods.datasets.infer:INFER",
    "next_token": "limbeck.methods.language.next_token:NextToken",
    "token_kd": "limbeck.methods.language.token_kd:TokenKD",
    "gkd": "limbeck.methods.language.gkd:GKD",
    "cross_tokenizer": "limbeck.methods.language.cross_tokenizer:CrossTokenizer",
    "first": "limbeck.methods.language.first:FIRST",
    "distiller": "limbeck.methods.language.distiller:Distiller",
    "capacity_gap": "limbeck.methods.language.capacity_gap:CapacityGap",
}


def catalogue() -> dict[str, str]:
    """Short name → import path of every method, those of installed third parties included (built-in names win)."""
    found = {point.name: point.value for point in entry_points(group="limbeck.methods")}
    return found | BUILT_IN


def __getattr__(name: str) -> Any:
    for path in BUILT_IN.values():
        if path.endswith(f":{name}"):
            return import_object(path)
    raise AttributeError(f"module 'limbeck.methods' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted(["BUILT_IN", "catalogue", *(path.partition(":")[2] for path in BUILT_IN.values())])
