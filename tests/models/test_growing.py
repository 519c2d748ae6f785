"""The linear head that grows."""

import pytest
import torch
from torch import nn

from limbeck import seeds
from limbeck.errors import InputError
from limbeck.models.growing import UNSEEN, find_head, fresh_head, grown_head, head_inputs, in_class_order
from limbeck.models.resnet_cifar import resnet20
from limbeck.models.small import feature_cnn


class Named(nn.Module):
    """A network with a linear layer registered after its head."""

    def __init__(self, name: str, head: nn.Module) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(5, 4), nn.ReLU())
        self.add_module(name, head)
        self.projector = nn.Linear(4, 9)
        self.name = name

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.get_submodule(self.name)(self.body(x))


def generator(*facts: int | str) -> torch.Generator:
    return seeds.generator(0, "test", *facts)


@pytest.mark.parametrize("name", ["head", "linear", "fc", "classifier"])
def test_a_head_is_found_by_its_usual_names(name):
    assert find_head(Named(name, nn.Linear(4, 3))) == name


def test_a_container_of_a_usual_name_gives_its_last_linear_layer():
    model = Named("classifier", nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3), nn.Identity()))
    assert find_head(model) == "classifier.2"


def test_other_networks_give_their_last_linear_layer_or_the_one_that_is_named():
    model = nn.Sequential(nn.Flatten(), nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 3))
    assert find_head(model) == "3"
    assert find_head(Named("last", nn.Linear(4, 3)), "last") == "last"


def test_the_cifar_resnet_and_the_feature_cnn_have_heads():
    assert find_head(feature_cnn(10, (1, 8, 8))) == "head"
    assert find_head(resnet20(num_classes=10)) == "linear"


def test_a_network_without_a_linear_head_is_refused_with_what_was_looked_for():
    with pytest.raises(InputError, match=r"'head', 'linear', 'fc', 'classifier'") as refused:
        find_head(nn.Sequential(nn.Conv2d(1, 3, 3), nn.Flatten()))
    assert refused.value.where == "student"
    with pytest.raises(InputError, match=r"wrap it in nn\.Sequential"):
        find_head(nn.Linear(4, 3))


def test_a_wrong_path_is_refused_with_the_linear_layers_there_are():
    with pytest.raises(InputError, match=r"'body' is not an nn\.Linear of Named.*'body\.0', 'head', 'projector'"):
        find_head(Named("head", nn.Linear(4, 3)), "body")


@pytest.mark.parametrize("bias", [False, True])
def test_growing_copies_the_old_rows_bit_for_bit_and_draws_the_new_ones(bias):
    old = nn.Linear(64, 3, bias=bias, dtype=torch.float64)
    new = grown_head(old, 5, generator=generator("a"))
    assert (new.in_features, new.out_features, new.weight.shape) == (64, 8, (8, 64))
    assert new.weight.dtype == torch.float64
    assert torch.equal(new.weight[:3], old.weight)
    assert 0.11 < new.weight[3:].abs().max() <= 0.125  # U(−1/√64, 1/√64)
    assert (new.weight[3:] < 0).any()
    assert (new.bias is not None) == bias
    if bias:
        assert torch.equal(new.bias[:3], old.bias)
        assert new.bias[3:].abs().max() <= 0.125
    assert new.weight.requires_grad
    assert torch.equal(new.weight, grown_head(old, 5, generator=generator("a")).weight)
    assert not torch.equal(new.weight, grown_head(old, 5, generator=generator("b")).weight)


def test_making_heads_spends_no_global_random_number():
    old = nn.Linear(4, 3)
    model = Named("head", old)
    state = torch.get_rng_state()
    fresh_head(old, 2, bias=True, generator=generator())
    grown_head(old, 2, generator=generator())
    in_class_order(model, "head", torch.tensor([1, 0, 2]), bias=True)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("bias", [False, True])
def test_class_order_gathers_the_logits_and_leaves_the_model_alone(bias):
    model = Named("fc", nn.Linear(4, 4, bias=bias))
    x, positions = torch.randn(7, 5), torch.tensor([2, 0, 3, 1])
    before = model.fc
    ordered = in_class_order(model, "fc", positions, bias=False)
    torch.testing.assert_close(ordered(x), model(x)[:, positions])
    assert model.fc is before
    assert ordered.body[0].weight is not model.body[0].weight
    assert (ordered.fc.bias is not None) == bias


def test_a_class_that_has_not_come_is_never_chosen_and_a_lost_bias_comes_back_as_zero():
    model = Named("fc", nn.Linear(4, 2, bias=False))
    x = torch.randn(7, 5)
    ordered = in_class_order(model, "fc", torch.tensor([2, 1, 3, 0]), bias=False)
    torch.testing.assert_close(ordered(x)[:, [3, 1]], model(x))
    assert (ordered(x)[:, [0, 2]] == UNSEEN).all()
    assert torch.equal(in_class_order(model, "fc", torch.tensor([1, 0]), bias=True).fc.bias, torch.zeros(2))


def test_head_inputs_are_the_features_and_the_hook_goes_away():
    model = Named("head", nn.Linear(4, 3))
    x = torch.randn(7, 5)
    assert torch.equal(head_inputs(model, "head", x), model.body(x))
    with pytest.raises(RuntimeError):
        head_inputs(model, "head", torch.randn(7, 6))
    assert not model.head._forward_pre_hooks
