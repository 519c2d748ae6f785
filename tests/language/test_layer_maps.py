"""Layer tables as the sheet has them, and exact transport plans."""

import pytest
import torch

from limbeck.errors import InputError
from limbeck.language.layer_maps import attention_map, every_pair, hidden_map, transport_plan


@pytest.mark.parametrize(
    ("K_S", "K_T", "skip", "last"),
    [
        (4, 12, (0, 3, 6, 9, 12), (8, 9, 10, 11, 12)),
        (6, 12, (0, 2, 4, 6, 8, 10, 12), (6, 7, 8, 9, 10, 11, 12)),
        (12, 24, (0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24), tuple(range(12, 25))),
        (2, 6, (0, 3, 6), (4, 5, 6)),
        (4, 6, (0, 1, 3, 4, 6), (2, 3, 4, 5, 6)),
        (3, 3, (0, 1, 2, 3), (0, 1, 2, 3)),
    ],
)
def test_hidden_states(K_S: int, K_T: int, skip: tuple[int, ...], last: tuple[int, ...]) -> None:
    assert hidden_map(K_S, K_T, "skip") == tuple(enumerate(skip))
    assert hidden_map(K_S, K_T, "last") == tuple(enumerate(last))


@pytest.mark.parametrize(
    ("K_S", "K_T", "skip", "last"),
    [
        (4, 12, (2, 5, 8, 11), (8, 9, 10, 11)),
        (6, 12, (1, 3, 5, 7, 9, 11), (6, 7, 8, 9, 10, 11)),
        (12, 24, tuple(range(1, 24, 2)), tuple(range(12, 24))),
        (4, 6, (0, 2, 3, 5), (2, 3, 4, 5)),
    ],
)
def test_attention_maps(K_S: int, K_T: int, skip: tuple[int, ...], last: tuple[int, ...]) -> None:
    assert attention_map(K_S, K_T, "skip") == tuple(enumerate(skip))
    assert attention_map(K_S, K_T, "last") == tuple(enumerate(last))


def test_a_deeper_student_has_no_table() -> None:
    for table in (hidden_map, attention_map):
        for sizes in ((7, 6), (0, 6)):
            with pytest.raises(InputError, match="layers"):
                table(*sizes, "skip")


def test_every_pair_is_student_major() -> None:
    assert every_pair(2, 3) == ((1, 1), (1, 2), (1, 3), (2, 1), (2, 2), (2, 3))
    assert every_pair(1, 2, 0) == ((0, 0), (0, 1))


def test_zeros_on_the_diagonal_give_the_identity_plan() -> None:
    distances = torch.rand(5, 5, generator=torch.Generator().manual_seed(0)) + 0.1
    distances.fill_diagonal_(0)
    torch.testing.assert_close(transport_plan(distances), torch.eye(5) / 5)


@pytest.mark.parametrize("seed", range(4))
def test_plans_have_their_masses_and_no_other_plan_is_cheaper(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    distances = torch.randn(3, 6, generator=generator, dtype=torch.float64)
    plan = transport_plan(distances)
    assert (plan >= 0).all()
    torch.testing.assert_close(plan.sum(1), torch.full((3,), 1 / 3, dtype=torch.float64))
    torch.testing.assert_close(plan.sum(0), torch.full((6,), 1 / 6, dtype=torch.float64))
    # optimal: there are prices u, v with u_n + v_m <= D_nm, and equality where mass flows (complementary slackness); found by Bellman-Ford on the residual
    flows = plan > 1e-9
    price = torch.zeros(9, dtype=torch.float64)
    for _ in range(12):
        for n in range(3):
            for m in range(6):
                price[3 + m] = min(price[3 + m], price[n] + distances[n, m])
                if flows[n, m]:
                    price[n] = min(price[n], price[3 + m] - distances[n, m])
    reduced = distances + price[:3, None] - price[None, 3:]
    assert (reduced > -1e-9).all()
    assert reduced[flows].abs().max() < 1e-9


def test_masses_may_be_given_and_the_plan_is_a_constant() -> None:
    distances = torch.tensor([[0.0, 1.0], [1.0, 0.0]], requires_grad=True)
    plan = transport_plan(distances, (0.25, 0.75), (0.5, 0.5))
    torch.testing.assert_close(plan, torch.tensor([[0.25, 0.0], [0.25, 0.5]]))
    assert not plan.requires_grad
    (slope,) = torch.autograd.grad((plan * distances).sum(), distances)
    torch.testing.assert_close(slope, plan)


@pytest.mark.parametrize(
    ("distances", "masses", "told"),
    [
        (torch.zeros(3), (None, None), "no matrix"),
        (torch.full((2, 2), torch.nan), (None, None), "not finite"),
        (torch.zeros(2, 2), ((0.5, 0.6), (0.5, 0.5)), "sum to the same"),
        (torch.zeros(2, 2), ((1.5, -0.5), (0.5, 0.5)), "negative"),
        (torch.zeros(2, 2), ((1.0,), (0.5, 0.5)), "as many"),
    ],
)
def test_what_has_no_plan_is_refused(distances: torch.Tensor, masses: tuple, told: str) -> None:
    with pytest.raises(InputError, match=told):
        transport_plan(distances, *masses)
