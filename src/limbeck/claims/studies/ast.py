"""What the claim of AST (2310.10541) says about experts alone: how good they are at the end, how far they go in an epoch, how evenly."""

from __future__ import annotations

import tempfile
from typing import Any

import torch
from torch import nn

from limbeck import models
from limbeck.components import Component
from limbeck.contract import validated
from limbeck.ingredients import all_inputs, prepare
from limbeck.recipe import DataSpec
from limbeck.synthetic.experts import ExpertSpec, train_experts
from limbeck.synthetic.flat import FlatNetwork
from limbeck.synthetic.smoothness import largest_step, roughness


def expert_quality(data: dict[str, Any], model: dict[str, Any], experts: dict[str, Any], *, seed: int) -> dict[str, float]:
    """Train `experts.count` experts and measure them; the same seed gives the same first weights and order of images whatever the other knobs are.

    Args:
        data, model, experts: sections of a recipe (`data`, `student.model`, `teacher.experts`).

    Returns:
        Means over the experts: expert_accuracy on the test images in [0, 1] after the last epoch, ln_largest_step, the natural logarithm of
        max_e ‖θ_{e+1} − θ_e‖, and ln_roughness, that of Σ_e ‖θ_{e+1} − 2 θ_e + θ_{e−1}‖.

    Raises:
        InputError: a section is wrong.
    """
    spec, component = validated(ExpertSpec, experts), validated(Component, model)
    prepared = prepare(validated(DataSpec, data), seed)
    labels, test_labels = prepared.train.targets, prepared.test.targets
    assert labels is not None
    assert test_labels is not None

    def network(of: int) -> nn.Module:
        return models.build_model(component, num_classes=prepared.num_classes, input_shape=prepared.input_shape, seed=of)

    with tempfile.TemporaryDirectory(prefix="limbeck-experts-") as folder:
        found = train_experts(spec, network, all_inputs(prepared.train), labels, prepared.num_classes, folder, seed=seed, identity={})
        paths = [found.path(expert) for expert in range(found.count)]
    flat, test = FlatNetwork(network(seed)), all_inputs(prepared.test)
    with torch.no_grad():
        right = torch.stack([(flat(path_EP[-1], test).argmax(1) == test_labels).double().mean() for path_EP in paths])
    steps, bends = (torch.stack([measure(path_EP) for path_EP in paths]).log().mean() for measure in (largest_step, roughness))
    return {"expert_accuracy": float(right.mean()), "ln_largest_step": float(steps), "ln_roughness": float(bends)}
