"""Mixup of word embeddings: the draw, the doubled batch, and where the embeddings are."""

import pytest
import torch
from torch import Tensor, nn

from limbeck import seeds
from limbeck.errors import InputError
from limbeck.language.mixup import Mix, doubled, draw_mix, mixed_embeddings, mixing, word_embeddings


class Tiny(nn.Module):
    """Mean of word and position embeddings, [B, d]."""

    def __init__(self) -> None:
        super().__init__()
        self.positions = nn.Embedding(8, 4)
        self.words = nn.Embedding(50, 4)

    def forward(self, ids_BL: Tensor) -> Tensor:
        return (self.words(ids_BL) + self.positions.weight[: ids_BL.shape[1]]).mean(1)


def test_a_mix_of_1_gives_the_batch_twice() -> None:
    e = torch.randn(3, 5, 4)
    mixed = mixed_embeddings(e, Mix(torch.ones(()), torch.tensor([1, 2, 0])))
    torch.testing.assert_close(mixed, torch.cat((e, e)), rtol=0, atol=0)
    network, ids = Tiny(), torch.randint(0, 50, (3, 5))
    with mixing(network, Mix(torch.ones(()), torch.tensor([1, 2, 0]))):
        torch.testing.assert_close(network(doubled(ids)), torch.cat((network.forward(doubled(ids))[:3],) * 2))
    with mixing(network, Mix(torch.tensor(0.3), torch.tensor([1, 2, 0]))):
        mixed = network(doubled(ids))
    plain = network(ids)
    torch.testing.assert_close(mixed[:3], plain)
    torch.testing.assert_close(mixed[3:], 0.3 * plain + 0.7 * plain[[1, 2, 0]])
    torch.testing.assert_close(network(ids), plain)  # the hook is gone


def test_hooks_go_when_the_block_is_left_by_an_error() -> None:
    network, ids = Tiny(), torch.randint(0, 50, (2, 3))
    before = network(ids)
    with pytest.raises(RuntimeError), mixing(network, Mix(torch.tensor(0.5), torch.tensor([1, 0]))):
        raise RuntimeError
    torch.testing.assert_close(network(ids), before)


def test_draws_follow_their_generator_and_beta() -> None:
    first, second = (draw_mix(6, seeds.generator(1, "mix")) for _ in range(2))
    assert first.share == second.share
    assert sorted(first.partner_B.tolist()) == list(range(6))
    torch.testing.assert_close(first.partner_B, second.partner_B)
    generator = seeds.generator(2, "mix")
    shares = torch.stack([draw_mix(2, generator, 0.4).share for _ in range(2000)])
    assert abs(float(shares.mean()) - 0.5) < 0.03
    assert abs(float(shares.var()) - 1 / (4 * (2 * 0.4 + 1))) < 0.012  # Beta(b, b): 1/(4(2b + 1))
    with pytest.raises(InputError, match="Beta"):
        draw_mix(2, generator, 0.0)


def test_gradients_reach_both_rows() -> None:
    network, ids = Tiny(), torch.tensor([[1, 2], [3, 4]])
    with mixing(network, Mix(torch.tensor(0.25), torch.tensor([1, 0]))):
        network(doubled(ids))[2].sum().backward()
    slopes = network.words.weight.grad
    torch.testing.assert_close(slopes[[1, 2]], torch.full((2, 4), 0.25 / 2))
    torch.testing.assert_close(slopes[[3, 4]], torch.full((2, 4), 0.75 / 2))


def test_word_embeddings_are_found() -> None:
    network = Tiny()
    assert word_embeddings(network) is network.words  # the larger table
    assert word_embeddings(nn.Sequential(network)) is network.words

    class Named(Tiny):
        def get_input_embeddings(self) -> nn.Module:
            return self.positions

    named = Named()
    assert word_embeddings(nn.Sequential(named)) is named.positions
    with pytest.raises(InputError, match="no word embeddings"):
        word_embeddings(nn.Linear(2, 2))
