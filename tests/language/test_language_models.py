from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from limbeck.contract import IGNORE
from limbeck.errors import InputError
from limbeck.language.models import LanguageModel, as_language_model, keep_layers
from limbeck.language.signals import Head
from limbeck.language.tokens import PADDING, TokenBatch
from limbeck.seeds import generator

V, D = 11, 6


class Sums(nn.Module):
    """Hidden states are sums of a row's embeddings over what a position may attend to."""

    def __init__(self) -> None:
        super().__init__()
        drawn = generator("sums")
        self.table = nn.Parameter(torch.randn(V, D, generator=drawn))
        self.out = nn.Parameter(torch.randn(V, D, generator=drawn))

    def hidden(self, tokens: TokenBatch) -> Tensor:
        allowed = tokens.attention()
        L = tokens.input_ids.shape[1]
        mask = torch.ones(L, L).tril() if allowed is None else allowed[:, 0].float()
        return mask @ (self.table[tokens.input_ids] * (1 + tokens.positions[..., None]))

    def head(self) -> Head:
        return Head(self.out, None, scale=0.5, soft_cap=3.0)


class WithLinear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = Sums(), nn.Linear(D, V)

    def hidden(self, tokens: TokenBatch) -> Tensor:
        return self.body.hidden(tokens)


class LogitsOnly(nn.Module):
    def forward(self, inputs: Tensor) -> Tensor:
        return torch.zeros(len(inputs), inputs.shape[-1], V)


def rows() -> Tensor:
    ids = torch.randint(0, V, (2, 5), generator=generator("rows"))
    return torch.stack((ids, torch.full_like(ids, IGNORE)), 1)


def test_a_module_with_hidden_states_and_a_head_is_a_language_model() -> None:
    module = Sums()
    model = as_language_model(module)
    assert model.vocabulary == V
    hidden = module.hidden(TokenBatch.from_inputs(rows()))
    torch.testing.assert_close(model(rows()), 3 * torch.tanh(0.5 * (hidden @ module.out.T) / 3))
    assert as_language_model(model) is model
    assert {id(parameter) for parameter in model.parameters()} == {id(parameter) for parameter in module.parameters()}


def test_the_head_may_be_a_linear_map() -> None:
    module = WithLinear()
    hidden = module.hidden(TokenBatch.from_inputs(rows()))
    torch.testing.assert_close(as_language_model(module)(rows()), module.head(hidden))


def test_what_is_missing_is_named_and_the_way_round_it() -> None:
    with pytest.raises(InputError, match=r"no hidden\(tokens\).* and no head\(\)") as caught:
        as_language_model(LogitsOnly())
    assert "dense_divergence" in caught.value.fix
    half = LogitsOnly()
    half.head = nn.Linear(D, V)
    with pytest.raises(InputError, match=r"it has no hidden\(tokens\) -> \[B, L, d\]\.$|it has no hidden\(tokens\)"):
        as_language_model(half)
    wrong = Sums()
    wrong.head = lambda: 3  # type: ignore[method-assign]
    with pytest.raises(InputError, match="no Head"):
        as_language_model(wrong)


def test_steps_without_a_cache_of_its_own_equal_the_whole_row() -> None:
    model: LanguageModel = as_language_model(Sums())
    ids = torch.tensor([[0, 0, 4, 7, 1, 9], [3, 5, 4, 7, 1, 9]])
    seen = torch.tensor([[False, False, True, True, True, True], [True] * 6])
    positions = (seen.cumsum(1) - 1).clamp_min(0)
    first, cache = model.step(ids[:, :4], positions[:, :4], seen[:, :4])
    second, cache = model.step(ids[:, 4:], positions[:, 4:], seen, cache)
    assert first.shape == (2, 4, D)
    assert second.shape == (2, 2, D)
    segments = torch.where(seen, 0, PADDING)
    whole = model.hidden(TokenBatch(ids, positions, segments, torch.full_like(ids, IGNORE)))
    torch.testing.assert_close(torch.cat((first, second), 1), whole)
    alone = model.hidden(TokenBatch.from_inputs(torch.stack((ids[:1, 2:], ids[:1, 2:]), 1)))
    torch.testing.assert_close(whole[:1, 2:], alone)


@pytest.mark.parametrize(
    ("rule", "of", "count", "kept"),
    [
        ("even", 12, 6, (0, 2, 4, 7, 9, 11)),
        ("even", 30, 15, (0, 2, 4, 6, 8, 10, 12, 15, 17, 19, 21, 23, 25, 27, 29)),
        ("even", 6, 3, (0, 3, 5)),
        ("even", 5, 1, (0,)),
        ("even", 5, 2, (0, 4)),
        ("even", 4, 4, (0, 1, 2, 3)),
        ("even", 4, None, (0, 1, 2, 3)),
        ("first", 12, 3, (0, 1, 2)),
        ("last", 12, 3, (9, 10, 11)),
        ("middle", 32, 24, tuple(range(4, 28))),
        ("middle", 5, 2, (1, 2)),
        ([0, 3], 5, None, (0, 3)),
        ((0, 3), 5, 2, (0, 3)),
    ],
)
def test_layers_are_kept_by_rule(rule: object, of: int, count: int | None, kept: tuple[int, ...]) -> None:
    assert keep_layers(rule, of=of, count=count) == kept  # type: ignore[arg-type]


def test_even_distances_keep_both_ends_and_never_a_layer_twice() -> None:
    for of in range(2, 40):
        for count in range(2, of + 1):
            kept = keep_layers("even", of=of, count=count)
            assert kept[0] == 0
            assert kept[-1] == of - 1
            assert len(set(kept)) == count
            gaps = {b - a for a, b in pairwise(kept)}
            assert max(gaps) - min(gaps) <= 1


@pytest.mark.parametrize(
    ("rule", "count", "where"),
    [("evn", 2, "keep"), ("even", 6, "layers"), ("even", 0, "layers"),
     ([0, 5], None, "keep"), ([2, 1], None, "keep"), ([1, 1], None, "keep"), ([], None, "keep"), ([-1, 2], None, "keep"), ([0, 1], 3, "layers"),
     (3, 1, "keep")],
)  # fmt: skip
def test_layers_that_are_not_there_are_refused(rule: object, count: int | None, where: str) -> None:
    with pytest.raises(InputError) as caught:
        keep_layers(rule, of=5, count=count)  # type: ignore[arg-type]
    assert caught.value.where == where
