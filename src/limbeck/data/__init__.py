"""Data: named sources, data sets in memory, stateless augmentation, batches as a pure function of the step."""

from __future__ import annotations

from limbeck.data.arrays import ArrayData
from limbeck.data.augment import AugmentSpec, augment, crop, cutmix, cutout, flip, mixup
from limbeck.data.loader import BatchPlan, ahead, blank, evaluation_batches, stream
from limbeck.data.splits import (
    Joined,
    Splits,
    View,
    corrupt_labels,
    hide_labels,
    hold_out,
    inputs_fingerprint,
    origins,
    preprocessing,
    root,
    stratified_subset,
    subset,
    with_targets,
)
from limbeck.data.views import Views, ViewSpec, draw_boxes, resized_crop
from limbeck.data.whitening import ZCA, Whitened, whiten
from limbeck.data.wrapped import WrappedData, as_data

CATALOGUE = {
    "cifar10": "limbeck.data.cifar:cifar10",
    "cifar100": "limbeck.data.cifar:cifar100",
    "digit_pairs": "limbeck.data.composites:digit_pairs",
    "digits": "limbeck.data.sources:digits",
    "fashion_mnist": "limbeck.data.sources:fashion_mnist",
    "huggingface": "limbeck.data.sources:huggingface",
    "image_folder": "limbeck.data.sources:image_folder",
    "tensors": "limbeck.data.sources:tensors",
    "two_moons": "limbeck.data.points:two_moons",
    "gaussian_grid": "limbeck.data.points:gaussian_grid",
    "gaussian_ring": "limbeck.data.points:gaussian_ring",
    "checkerboard": "limbeck.data.points:checkerboard",
    "python_manual": "limbeck.language.manual:python_manual",
    "novels": "limbeck.language.texts:novels",
    "text_file": "limbeck.language.texts:text_file",
    "prompts": "limbeck.language.texts:prompts",
    "text_classification": "limbeck.language.classification:text_classification",
    "text_features": "limbeck.language.classification:text_features",
}
"""Short name → import path of every data source: a function that returns `Splits`."""

__all__ = [
    "CATALOGUE",
    "ZCA",
    "ArrayData",
    "AugmentSpec",
    "BatchPlan",
    "Joined",
    "Splits",
    "View",
    "ViewSpec",
    "Views",
    "Whitened",
    "WrappedData",
    "ahead",
    "as_data",
    "augment",
    "blank",
    "corrupt_labels",
    "crop",
    "cutmix",
    "cutout",
    "draw_boxes",
    "evaluation_batches",
    "flip",
    "hide_labels",
    "hold_out",
    "inputs_fingerprint",
    "mixup",
    "origins",
    "preprocessing",
    "resized_crop",
    "root",
    "stratified_subset",
    "stream",
    "subset",
    "whiten",
    "with_targets",
]
