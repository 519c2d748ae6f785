"""Packing: a plan by hand, nothing lost or doubled, packed losses equal to those one by one, cached signals moved along."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from limbeck import seeds
from limbeck.contract import IGNORE
from limbeck.errors import InputError
from limbeck.language.packing import Example, one_per_row, pack, place, plan, unpack
from limbeck.language.tokens import PADDING, TokenBatch


class TinyAttention(nn.Module):
    """A causal language model of two layers of attention with learnt positions: enough to see what leaks from one text into another."""

    def __init__(self, vocabulary: int = 17, width: int = 12, longest: int = 32) -> None:
        super().__init__()
        random = seeds.generator(0, "tiny")

        def made(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(*shape, generator=random) * 0.3)

        self.embedding, self.places, self.out = made(vocabulary, width), made(longest, width), made(vocabulary, width)
        self.layers = nn.ParameterList([made(4, width, width) for _ in range(2)])

    def forward(self, tokens: TokenBatch) -> Tensor:
        """[B, L, V] logits."""
        x = self.embedding[tokens.input_ids] + self.places[tokens.positions]
        for q, k, v, o in self.layers:
            mask = tokens.attention()
            x = x + F.scaled_dot_product_attention((x @ q)[:, None], (x @ k)[:, None], (x @ v)[:, None], mask, is_causal=mask is None)[:, 0] @ o
        return x @ self.out.T


def examples(count: int = 9, longest: int = 11) -> list[Example]:
    """Prompts and answers, texts, weights, of several lengths."""
    random = seeds.generator(1, "examples")
    found = []
    for number in range(count):
        n = int(torch.randint(2, longest + 1, (1,), generator=random))
        ids = torch.randint(0, 17, (n,), generator=random)
        learn = torch.ones(n, dtype=torch.bool) if number % 3 else torch.arange(n) >= n // 2
        found.append(Example(ids, learn, torch.rand(n, generator=random) if number % 2 else None))
    return found


def alone(model: TinyAttention, example: Example) -> Tensor:
    """Σ w·CE of one example without any packing: written out anew, by shifting by hand."""
    n = len(example.ids_n)
    logits = model(TokenBatch(example.ids_n[None], torch.arange(n)[None], torch.zeros(1, n, dtype=torch.int64), torch.zeros(1, n), whole=True))[0]
    losses = F.cross_entropy(logits[:-1], example.ids_n[1:], reduction="none")
    weight = torch.ones(n) if example.weight_n is None else example.weight_n
    return (losses * example.learn_n[1:] * weight[1:]).sum()


def together(model: TinyAttention, tokens: TokenBatch) -> Tensor:
    rows = tokens.rows()
    return (F.cross_entropy(rows.gather(model(tokens)), rows.targets_N, reduction="none") * rows.weight_N).sum()


@pytest.mark.parametrize("how", ["packed", "in the order given", "one a row"])
def test_packed_equals_unpacked(how: str) -> None:
    """Losses and gradients (sheet §12 vii)."""
    model, texts = TinyAttention(), examples()
    sizes = [len(text.ids_n) for text in texts]
    packing = {"packed": lambda: plan(sizes, 16), "in the order given": lambda: plan(sizes, 16, order="given"), "one a row": lambda: one_per_row(sizes, 16)}[
        how
    ]()
    tokens = pack(texts, packing, pad=3)
    assert packing.rows < len(texts) or how == "one a row"
    denominator = tokens.rows().weight_N.sum()
    one, many = sum(alone(model, text) for text in texts) / denominator, together(model, tokens) / denominator
    assert torch.allclose(one, many, atol=1e-5)
    wanted, found = (torch.autograd.grad(loss, list(model.parameters())) for loss in (one, many))
    for a, b in zip(wanted, found, strict=True):
        assert torch.allclose(a, b, atol=1e-5)


def test_through_the_engine_it_is_the_same() -> None:
    model, tokens = TinyAttention(), pack([Example(t.ids_n, t.learn_n) for t in examples()], plan([len(t.ids_n) for t in examples()], 16))
    assert torch.equal(together(model, TokenBatch.from_inputs(tokens.packed())), together(model, tokens))


def test_a_plan_by_hand() -> None:
    packing = plan([3, 5, 2, 4], 6, order="given")
    assert packing.row_E.tolist() == [0, 1, 0, 2]
    assert packing.start_E.tolist() == [0, 0, 3, 0]
    assert packing.rows == 3
    packing = plan([2, 4, 1, 3, 3, 2], 5)  # longest first: 4 | 3 | 3, then 2 and 2 behind the threes, 1 behind the four
    assert packing.row_E.tolist() == [1, 0, 0, 1, 2, 2]
    assert packing.start_E.tolist() == [3, 0, 4, 0, 0, 3]
    assert packing.filled == 1.0
    assert plan([], 4).rows == 0
    assert plan([], 4).filled == 0


def test_rows_by_hand() -> None:
    texts = [
        Example.answering([1, 2], [3, 4]),
        Example.text([5, 6]),
        Example(torch.tensor([7, 8, 9]), torch.tensor([True, False, True]), torch.tensor([1.0, 2.0, 3.0])),
    ]
    tokens = pack(texts, plan([4, 2, 3], 7, order="given"), pad=11)
    assert tokens.input_ids.tolist() == [[1, 2, 3, 4, 5, 6, 11], [7, 8, 9, 11, 11, 11, 11]]
    assert tokens.targets.tolist() == [[IGNORE, 3, 4, IGNORE, 6, IGNORE, IGNORE], [IGNORE, 9, *[IGNORE] * 5]]
    assert tokens.positions.tolist() == [[0, 1, 2, 3, 0, 1, 0], [0, 1, 2, 0, 0, 0, 0]]
    assert tokens.segments.tolist() == [[0, 0, 0, 0, 1, 1, PADDING], [0, 0, 0, *[PADDING] * 4]]
    assert tokens.weight.tolist() == [[0, 1, 1, 0, 1, 0, 0], [0, 3, 0, 0, 0, 0, 0]]
    assert not tokens.whole
    assert pack(texts[:2], plan([4, 2], 7)).weight is None


def test_long_examples_are_cut_or_left_out_and_counted() -> None:
    texts = [Example.text(range(9)), Example.text(range(4)), Example.text(range(6))]
    cut, left = (plan([9, 4, 6], 6, longer=how) for how in ("cut", "leave_out"))
    assert (cut.cut, cut.left_out, cut.lost) == (1, 0, 3)
    assert (left.cut, left.left_out, left.lost) == (0, 1, 9)
    assert left.row_E.tolist()[0] == -1
    tokens = pack(texts, cut)
    assert tokens.input_ids[cut.row_E[0]].tolist() == [0, 1, 2, 3, 4, 5]
    assert tokens.targets[cut.row_E[0]].tolist() == [1, 2, 3, 4, 5, IGNORE]  # what was cut off is no target
    assert pack(texts, left).input_ids.sum() == 6 + 15
    assert set(pack(texts, left).segments.flatten().tolist()) == {0, PADDING}
    alone = one_per_row([9, 4, 6], 6, longer="leave_out")
    assert alone.row_E.tolist() == [-1, 0, 1]
    assert (alone.rows, alone.left_out) == (2, 1)


@given(st.lists(st.integers(1, 12), max_size=30), st.integers(2, 9), st.sampled_from(["cut", "leave_out"]), st.sampled_from(["given", "longest_first"]))
def test_every_token_has_one_place(sizes: list[int], length: int, longer: str, order: str) -> None:
    packing = plan(sizes, length, longer=longer, order=order)
    example_M, where_M = packing.where
    assert len(set(where_M.tolist())) == len(where_M)
    assert torch.equal(example_M.bincount(minlength=len(sizes)), packing.size_E)
    assert ((packing.start_E + packing.size_E)[packing.size_E > 0] <= length).all()
    assert packing.size_E.tolist() == [min(n, length) if longer == "cut" or n <= length else 0 for n in sizes]
    assert packing.lost == sum(sizes) - int(packing.size_E.sum())
    assert set(packing.row_E[packing.size_E > 0].tolist()) == set(range(packing.rows))
    fullness = torch.zeros(packing.rows, dtype=torch.int64).index_add_(0, packing.row_E[packing.size_E > 0], packing.size_E[packing.size_E > 0])
    halves = int((fullness * 2 <= length).sum())
    assert halves <= 1  # no two rows that would fit into one were opened
    again = plan(sizes, length, longer=longer, order=order)
    assert torch.equal(again.row_E, packing.row_E)
    assert torch.equal(again.start_E, packing.start_E)


def test_cached_signals_move_with_their_tokens() -> None:
    """Top-k rows stored an example stand where their tokens stand, and come back."""
    texts = examples()
    sizes = [len(text.ids_n) for text in texts]
    packing = plan(sizes, 8, longer="cut")
    assert packing.cut
    stored = [1000 * e + torch.arange(3 * n).view(n, 3) for e, n in enumerate(sizes)]
    rows = place(stored, packing, -1)
    tokens = pack(texts, packing)
    assert rows.shape == (packing.rows, 8, 3)
    for e, size in enumerate(packing.size_E.tolist()):
        for i in range(size):
            assert rows[packing.row_E[e], packing.start_E[e] + i].tolist() == stored[e][i].tolist()
            assert tokens.positions[packing.row_E[e], packing.start_E[e] + i] == i
    assert (rows[tokens.segments == PADDING] == -1).all()
    for back, whole in zip(unpack(rows, packing), stored, strict=True):
        assert torch.equal(back, whole[: len(back)])
    assert [len(back) for back in unpack(rows, packing)] == packing.size_E.tolist()


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(InputError, match="hold nothing to predict"):
        plan([3], 1)
    with pytest.raises(InputError, match="example 1 has no tokens"):
        plan([3, 0], 4)
    with pytest.raises(InputError, match="Did you mean 'cut'"):
        plan([3], 4, longer="cutt")
    with pytest.raises(InputError, match="unknown order"):
        plan([3], 4, order="alphabetic")
    with pytest.raises(InputError, match="2 arrays for 1 examples"):
        place([torch.zeros(3), torch.zeros(3)], plan([3], 4), 0)
    with pytest.raises(InputError, match="example 0 has 2 entries"):
        place([torch.zeros(2)], plan([3], 4), 0)


def test_a_thousand_examples_are_planned_at_once() -> None:
    random = seeds.generator(2, "sizes")
    sizes = torch.randint(1, 300, (2000,), generator=random).tolist()
    packing = plan(sizes, 512)
    assert packing.filled > 0.99
