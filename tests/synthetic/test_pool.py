"""The pool: ages, resets, what is random, features without gradient to the weights."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from limbeck import seeds
from limbeck.components import Component
from limbeck.errors import InputError
from limbeck.models import build_model
from limbeck.synthetic.pool import NetworkPool, frozen_features, with_outputs


def small(seed: int) -> nn.Module:
    return build_model(Component(name="cnn", args={"widths": [3]}), num_classes=10, input_shape=(1, 4, 4), seed=seed)


def pool(reset="paper", *, size: int = 3, life: int = 4, seed: int = 0) -> NetworkPool:
    return NetworkPool(small, size=size, life=life, outputs=5, seed=seed, reset=reset)


def weights(module: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in module.parameters()])


def test_members_differ_have_the_asked_outputs_and_follow_from_the_seed() -> None:
    one, again, other = pool(), pool(), pool(seed=1)
    assert all(member(torch.zeros(2, 1, 4, 4)).shape == (2, 5) for member in one.members)
    assert not torch.equal(weights(one.members[0]), weights(one.members[1]))
    assert torch.equal(weights(one.members[2]), weights(again.members[2]))
    assert not torch.equal(weights(one.members[0]), weights(other.members[0]))
    assert one.starts == again.starts


@given(st.integers(1, 6), st.integers(1, 30), st.integers(0, 1000))
def test_first_ages_are_within_a_life(size: int, life: int, seed: int) -> None:
    made = NetworkPool(lambda _: nn.Sequential(nn.Linear(2, 2)), size=size, life=life, outputs=2, seed=seed)
    assert all(1 <= start <= max(life - 1, 1) for start in made.starts)
    assert all(0 <= made.drawn("main", step) < size for step in range(5))
    assert made.drawn("main", 3) == made.drawn("main", 3)


def test_all_members_are_drawn_alike() -> None:
    made = pool(size=3)
    counts = torch.tensor([made.drawn("main", step) for step in range(3000)]).bincount(minlength=3)
    assert ((counts / 3000 - 1 / 3).abs() < 0.03).all()


@pytest.mark.parametrize("reset", ["paper", "released"])
def test_a_life(reset) -> None:
    made = pool(reset)
    member = made.members[1]
    first, norm = weights(member), next(part for part in member.modules() if isinstance(part, nn.BatchNorm2d))
    member.train()(torch.randn(4, 1, 4, 4, generator=seeds.generator(0)))  # statistics move
    assert norm.running_mean is not None
    assert norm.running_mean.abs().sum() > 0
    for step in range(4):
        assert not made.old(1)
        made.aged(1)
        assert made.ages == [0, step + 1, 0]
    assert made.old(1)
    with pytest.raises(InputError, match="has taken its 4 steps"):
        made.aged(1)
    made.reset(1)
    assert made.members[1] is member
    assert not torch.equal(weights(member), first)
    assert norm.running_mean.abs().sum() == 0
    assert made.resets == [0, 1, 0]
    if reset == "paper":
        assert made.ages[1] == 0
        assert not made.old(1)
    else:  # the released code's: from now on new weights at every visit
        assert made.ages[1] == 4
        assert made.old(1)
        second = weights(member)
        made.reset(1)
        assert not torch.equal(weights(member), second)


@given(st.lists(st.integers(0, 2), max_size=60), st.sampled_from(["paper", "released"]))
def test_ages_stay_within_a_life(visits: list[int], reset) -> None:
    made = NetworkPool(lambda _: nn.Sequential(nn.Linear(2, 2)), size=3, life=4, outputs=2, seed=0, reset=reset)
    for i in visits:
        if made.old(i):
            made.reset(i)
        else:
            made.aged(i)
        assert all(0 <= age <= 4 for age in made.ages)
    for i in range(3):
        if reset == "paper":  # a life and its reset are 5 visits
            assert made.resets[i] == visits.count(i) // 5
            assert made.ages[i] == visits.count(i) % 5
        else:
            assert made.resets[i] == max(visits.count(i) - 4, 0)


def test_a_restart_goes_on_exactly() -> None:
    made, other = pool(), pool()
    for _ in range(4):
        made.aged(2)
    made.reset(2)
    made.aged(0)
    other.load_state_dict(made.state_dict())
    assert other.state_dict() == made.state_dict() == {"ages": [1, 0, 0], "resets": [0, 0, 1]}
    for one in (made, other):
        one.reset(2)
    assert torch.equal(weights(made.members[2]), weights(other.members[2]))
    with pytest.raises(InputError, match="of 3 networks"):
        pool(size=2).load_state_dict(made.state_dict())


def test_features_are_what_the_head_is_given_and_no_gradient_reaches_the_weights() -> None:
    network = with_outputs(small(0), 7, seeds.generator(0)).eval()
    x = torch.randn(3, 1, 4, 4, generator=seeds.generator(1), requires_grad=True)
    features = frozen_features(network, x)
    torch.testing.assert_close(network.get_submodule("head")(features), network(x))
    features.sum().backward()
    assert x.grad is not None
    assert x.grad.abs().sum() > 0
    assert all(p.grad is None for p in network.parameters())


def test_wrong_input() -> None:
    with pytest.raises(InputError, match="0 networks"):
        pool(size=0)
    with pytest.raises(InputError, match="no linear head"):
        with_outputs(nn.Sequential(nn.Flatten()), 3, seeds.generator(0))
    with pytest.raises(InputError, match="features of shape"):
        frozen_features(nn.Sequential(nn.Linear(4, 4)), torch.zeros(2, 3, 4))
