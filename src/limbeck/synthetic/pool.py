"""An online pool of networks at different stages of training, which synthetic images are judged by; when one is old enough it starts again.

Source: KRR-ST, 2310.06511, eqs. 2 and 7 of our sheet `krr_st` (FRePo, 2206.00719, has the same pool). The paper's: members of random age, one drawn a step,
reset after Z steps. The released code's: `reset="released"`. Ours: everything random follows from the run's seed, so that a restart goes on exactly.

Legend: B images, P features (what goes into the head), D outputs; L members, Z steps of a life.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call

from limbeck import seeds
from limbeck.errors import InputError
from limbeck.models.growing import find_head, fresh_head

Reset = Literal["paper", "released"]
N = TypeVar("N", bound=nn.Module)


def with_outputs(network: N, outputs: int, generator: torch.Generator) -> N:
    """The network, its linear head replaced by a fresh one with `outputs` rows and a bias (PyTorch's initialisation); changed in place and returned.

    Raises:
        InputError: it has no linear head.
    """
    path = find_head(network)
    network.set_submodule(path, fresh_head(cast(nn.Linear, network.get_submodule(path)), outputs, bias=True, generator=generator))
    return network


def frozen_features(network: nn.Module, images_BX: Tensor) -> Tensor:
    """φ(x) [B, P], what goes into the network's head, differentiable in the images alone: the weights are constants, no gradient reaches them.

    The network is in whatever mode it is in; of batch norm in train mode the running statistics move.

    Raises:
        InputError: it has no linear head, or the head is given something else than [B, P].
    """
    seen: list[Tensor] = []
    hook = network.get_submodule(find_head(network)).register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    try:
        functional_call(network, {name: weight.detach() for name, weight in network.named_parameters()}, (images_BX,))
    finally:
        hook.remove()
    if seen[-1].ndim != 2:
        raise InputError(f"the network's head is given features of shape {list(seen[-1].shape)}.", where="student.model", fix="Use one that flattens them.")
    return seen[-1]


class NetworkPool:
    """L networks with D outputs, their ages and their resets. It trains nothing: whoever steps a member says so by `aged`.

    Attributes:
        members: the networks; they stay the same objects, a reset writes new weights and buffers into them.
        ages: [L] steps since the last reset, in [0, Z]. resets: [L].
        starts: [L] how many steps each is to be trained before the first outer step, random in 1 … Z − 1.

    Args:
        build: a fresh network from a seed (any number of outputs). size: L. life: Z. outputs: D. seed: of the run.
        reset: "paper" sets a member's age to 0 when it is reset; "released" does not, as the authors' code: from then on it is reset at every visit and
            never trained again.

    Raises:
        InputError: size or life is below 1; the network has no linear head.
    """

    def __init__(self, build: Callable[[int], nn.Module], *, size: int, life: int, outputs: int, seed: int, reset: Reset = "paper") -> None:
        if size < 1 or life < 1:
            raise InputError(f"a pool of {size} networks that live {life} steps.", where="pool", fix="Both are at least 1.")
        self._build, self.life, self.outputs, self.seed, self.reset_mode = build, life, outputs, seed, reset
        self.ages, self.resets = [0] * size, [0] * size
        self.members = [self._fresh(i) for i in range(size)]
        drawn = torch.randint(1, max(life, 2), (size,), generator=seeds.generator(seed, "pool ages"))
        self.starts: list[int] = [min(int(age), life) for age in drawn]

    def __len__(self) -> int:
        return len(self.members)

    def _fresh(self, i: int) -> nn.Module:
        """Member i as it is after its latest reset; a function of the seed, i and the number of its resets."""
        seed = seeds.derive(self.seed, "pool", i, self.resets[i])
        return with_outputs(self._build(seed), self.outputs, seeds.generator(seed, "head"))

    def drawn(self, *facts: int | str) -> int:
        """The member of an outer step, uniform; a function of the seed and the facts (phase and step)."""
        return int(torch.randint(len(self), (1,), generator=seeds.generator(self.seed, "pool member", *facts)))

    def old(self, i: int) -> bool:
        """Whether member i has taken its Z steps, and is to be reset instead of trained."""
        return self.ages[i] >= self.life

    def aged(self, i: int) -> None:
        """Member i took a step. Raises InputError: it had taken all that it may."""
        if self.old(i):
            raise InputError(f"member {i} of the pool has taken its {self.life} steps.", where="pool", fix="Reset it.")
        self.ages[i] += 1

    def reset(self, i: int) -> None:
        """New weights and buffers for member i, in place."""
        self.resets[i] += 1
        self.members[i].load_state_dict(self._fresh(i).state_dict())
        if self.reset_mode == "paper":
            self.ages[i] = 0

    def state_dict(self) -> dict[str, Any]:
        """Ages and resets; the members' weights are kept by whoever trains them."""
        return {"ages": list(self.ages), "resets": list(self.resets)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put `state_dict` back. Raises InputError: it is of another number of members."""
        if len(state["ages"]) != len(self):
            raise InputError(f"the state is of {len(state['ages'])} networks, the pool has {len(self)}.", where="pool")
        self.ages, self.resets = [int(age) for age in state["ages"]], [int(number) for number in state["resets"]]
