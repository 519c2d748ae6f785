import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from limbeck.components import Component, import_object
from limbeck.errors import InputError
from limbeck.models import CATALOGUE, build_model, fingerprint, logits_of, reinitialise
from limbeck.models.resnet_cifar import resnet
from limbeck.models.small import cnn


def built(value: object, seed: int = 0) -> nn.Module:
    return build_model(Component.model_validate(value), num_classes=4, input_shape=(1, 8, 8), seed=seed)


def test_listing_the_catalogue_imports_no_torch() -> None:
    code = "import sys, limbeck.models as m; assert len(m.CATALOGUE) >= 21; assert 'torch' not in sys.modules, 'torch was imported'"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_every_name_of_the_catalogue_leads_to_a_builder() -> None:
    for path in CATALOGUE.values():
        assert callable(import_object(path))


@pytest.mark.parametrize(
    "value",
    [
        {"name": "mlp", "hidden": [6]},
        {"name": "cnn", "widths": [4]},
        {"name": "convnet3", "width": 4},
        "feature_cnn",
        "resnet20",
        {"name": "resnet_cifar", "depth": 8, "width": 4},
        {"target": "limbeck.models.small:mlp", "args": {"hidden": [3]}},
    ],
)
def test_models_take_classes_and_shape_from_the_run(value: object) -> None:
    assert built(value).eval()(torch.zeros(2, 1, 8, 8)).shape == (2, 4)


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 2**40), st.integers(0, 2**40))
def test_weights_depend_on_the_seed_alone_and_the_global_generator_is_untouched(seed: int, noise: int) -> None:
    value = {"name": "mlp", "hidden": [3]}
    torch.manual_seed(noise)
    before = torch.get_rng_state()
    first = fingerprint(built(value, seed))
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(7)
    assert fingerprint(built(value, seed)) == first
    assert fingerprint(built(value, seed + 1)) != first


def test_the_generator_is_put_back_after_a_failure() -> None:
    before = torch.get_rng_state()
    with pytest.raises(InputError):
        built({"name": "mlp", "hidden": [3, -1]})
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ({"name": "feature_net"}, "Did you mean 'feature_cnn'"),
        ({"name": "mlp", "hiden": [3]}, "Did you mean 'hidden'"),
        ({"name": "mlp"}, "needs the argument 'hidden'"),
        ({"target": "fractions:Fraction"}, "returned Fraction, not a torch.nn.Module"),
        ({"name": "cnn", "widths": [4] * 9}, "cannot be halved 9 times"),
    ],
)
def test_wrong_components_are_explained(value: object, says: str) -> None:
    with pytest.raises(InputError, match=says):
        built(value)


def test_reinitialise_draws_anew_from_the_seed_and_leaves_the_original_alone() -> None:
    original = cnn([3], 4, (1, 8, 8), hidden=5)
    original(torch.randn(6, 1, 8, 8))  # moves the running statistics
    before, state = fingerprint(original), torch.get_rng_state()
    first, again, other = (reinitialise(original, seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert fingerprint(original) == before
    assert fingerprint(first) == fingerprint(again) != fingerprint(other)
    assert torch.equal(first.features[1].running_mean, torch.zeros(3))
    for name, parameter in first.named_parameters():
        is_norm = name.startswith("features.1.")
        assert torch.equal(parameter, original.get_parameter(name)) == is_norm, name


def test_a_networks_own_reset_has_the_last_word() -> None:
    fresh = reinitialise(resnet(8, width=16), 0)
    assert abs(fresh.layer3[0].conv2.weight.std().item() - (2 / (64 * 9)) ** 0.5) < 0.002  # He-normal; torch's own start has (1 / (3·64·9))^½


def test_modules_that_cannot_start_afresh_are_named() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(1))

    with pytest.raises(InputError, match=r"1 \(Scaled\)"):
        reinitialise(nn.Sequential(nn.Linear(2, 2), Scaled()), 0)
    with pytest.raises(InputError, match="the module itself"):
        reinitialise(Scaled(), 0)


class Answer:
    def __init__(self, logits: torch.Tensor) -> None:
        self.logits = logits


def test_logits_are_found_in_tensors_objects_and_mappings() -> None:
    x = torch.randn(2, 3)
    assert logits_of(x) is x
    assert logits_of(Answer(x)) is x
    assert logits_of({"loss": 1, "logits": x}) is x
    for wrong in ((x,), None, {"scores": x}, Answer(None)):
        with pytest.raises(InputError, match=type(wrong).__name__):
            logits_of(wrong)
