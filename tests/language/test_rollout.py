"""Drawing texts: left padding and caches change nothing, what was drawn is what the log-probabilities say, and the sampler's cuts."""

import math

import pytest
import torch
from torch.nn.functional import one_hot

from limbeck.contract import IGNORE
from limbeck.errors import InputError
from limbeck.language.decoder import Decoder, decoder
from limbeck.language.models import LanguageModel
from limbeck.language.rollout import MODEL_LOGP, PROMPT, SAMPLER, SAMPLER_LOGP, Mixture, Prompts, Rollout, Sampler, importance_weights, truncated
from limbeck.language.signals import Head
from limbeck.language.tokens import PADDING, STUDENT, TEACHER, TokenBatch

V = 11


def model(seed: int = 0) -> Decoder:
    torch.manual_seed(seed)
    found = decoder(V, (2, 8), layers=2, width=16, heads=2)
    with torch.no_grad():
        for parameter in found.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return found.double()


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Bigram(LanguageModel):
    """q(y | x) from a table [V, V] of logits; no cache."""

    def __init__(self, table_VV: torch.Tensor) -> None:
        super().__init__()
        self.table = torch.nn.Parameter(table_VV)
        self.vocabulary = len(table_VV)
        self.was_training: list[bool] = []

    def hidden(self, tokens: TokenBatch) -> torch.Tensor:
        self.was_training.append(self.training)
        return one_hot(tokens.input_ids, self.vocabulary).to(self.table.dtype)

    def head(self) -> Head:
        return Head(self.table.t())


PROMPTS = Prompts.of([[1, 2, 3], [4], [5, 6]])


def test_log_probabilities_are_those_of_one_pass_over_the_rows_left_padding_and_cache_notwithstanding() -> None:
    student = model()
    sampler = Sampler(temperature=0.7, max_new=6, stop=(0,))
    drawn = Rollout.generate(student, PROMPTS, sampler, 2, generator())
    assert drawn.input_ids.shape == (6, 3 + 6 - 1)
    logits = student(drawn.packed()) / 0.7
    own = logits.log_softmax(-1).gather(2, drawn.targets.clamp(min=0)[..., None])[..., 0]
    expected = torch.where(drawn.valid, own, 0)
    torch.testing.assert_close(drawn.annotations[MODEL_LOGP], expected)
    torch.testing.assert_close(drawn.annotations[SAMPLER_LOGP], expected)  # nothing is cut
    # and without padding: each row alone
    for row in range(6):
        keep = drawn.segments[row] != PADDING
        alone = TokenBatch.from_inputs(torch.stack((drawn.input_ids[row, keep], drawn.targets[row, keep]))[None])
        torch.testing.assert_close(student(alone.packed())[0] / 0.7, logits[row, keep])


def test_the_same_state_of_the_generator_gives_the_same_tokens_with_and_without_a_cache() -> None:
    student = model()
    sampler = Sampler(max_new=5)
    first = Rollout.generate(student, PROMPTS, sampler, 1, generator(3))
    torch.manual_seed(77)
    second = Rollout.generate(student, PROMPTS, sampler, 1, generator(3))
    assert torch.equal(first.targets, second.targets)

    class Slow(Decoder):
        step = LanguageModel.step

    slow = model()
    slow.__class__ = Slow
    assert torch.equal(Rollout.generate(slow, PROMPTS, sampler, 1, generator(3)).targets, first.targets)
    assert not torch.equal(Rollout.generate(student, PROMPTS, sampler, 1, generator(4)).targets, first.targets)


def test_the_first_stop_id_is_kept_as_a_target_and_nothing_after_it() -> None:
    certain = torch.full((V, V), -60.0)
    certain[1, 2] = certain[2, 3] = certain[3, 0] = certain[0, 5] = certain[5, 5] = 60.0  # 1 → 2 → 3 → 0 (stop) → 5 …
    drawn = Rollout.generate(Bigram(certain), Prompts.of([[1], [5, 2]]), Sampler(max_new=20, stop=(0, 9)), 1, generator())
    assert drawn.input_ids.shape[1] == 2 + 8 - 1  # looked at after eight tokens
    assert drawn.targets[0].tolist() == [IGNORE, 2, 3, 0] + [IGNORE] * 5
    assert drawn.input_ids[0].tolist() == [0, 1, 2, 3] + [0] * 5
    assert drawn.segments[0].tolist() == [PADDING, 0, 0, 0] + [PADDING] * 5
    assert drawn.positions[0, 1:4].tolist() == [0, 1, 2]
    assert drawn.targets[1].tolist() == [IGNORE, 3, 0] + [IGNORE] * 6
    assert drawn.annotations[PROMPT][0].tolist() == [False, True] + [False] * 7
    assert (drawn.annotations[MODEL_LOGP][~drawn.valid] == 0).all()
    assert drawn.source is not None
    assert drawn.source.tolist() == [STUDENT, STUDENT]
    assert not drawn.whole


def test_frequencies_are_those_of_the_sampler_and_log_probabilities_tell_model_and_sampler_apart() -> None:
    table = torch.randn(V, V, generator=generator(1))
    sampler = Sampler(temperature=1.3, top_p=0.8, top_k=6, max_new=1)
    n = 40_000
    drawn = Rollout.generate(Bigram(table), Prompts.of([[4]]), sampler, n, generator())
    y = drawn.targets[:, 0]
    pi = (table[4] / 1.3).log_softmax(0)
    mu = truncated(pi[None], sampler)[0]
    seen = torch.bincount(y, minlength=V) / n
    assert (seen - mu.exp()).abs().max() < 4 * math.sqrt(0.25 / n)
    assert (seen[mu == -math.inf] == 0).all()
    torch.testing.assert_close(drawn.annotations[MODEL_LOGP][:, 0], pi[y])
    torch.testing.assert_close(drawn.annotations[SAMPLER_LOGP][:, 0], mu[y])
    assert (drawn.annotations[SAMPLER] == sampler.identity).all()
    assert sampler.identity != Sampler(temperature=1.3, top_p=0.8, top_k=5, max_new=1).identity


def test_truncation_keeps_the_fewest_tokens_that_reach_top_p_and_the_k_largest() -> None:
    logp = torch.tensor([[0.5, 0.2, 0.15, 0.1, 0.05], [0.05, 0.1, 0.15, 0.2, 0.5]]).log()
    kept = truncated(logp, Sampler(top_p=0.7))
    torch.testing.assert_close(kept.exp()[0], torch.tensor([5 / 7, 2 / 7, 0, 0, 0]))
    assert (truncated(logp, Sampler(top_p=0.71)) > -math.inf).sum(1).tolist() == [3, 3]
    torch.testing.assert_close(truncated(logp, Sampler(top_k=2)).exp()[1], torch.tensor([0, 0, 0, 2 / 7, 5 / 7]))
    assert (truncated(logp, Sampler(top_p=1e-6)) > -math.inf).sum(1).tolist() == [1, 1]
    both = truncated(logp, Sampler(top_k=3, top_p=0.8))  # of 0.85: .588, .235, .176: two reach 0.8
    assert (both > -math.inf).sum(1).tolist() == [2, 2]
    assert torch.equal(truncated(logp, Sampler()), logp)
    greedy = Rollout.generate(model(), PROMPTS, Sampler(top_k=1, max_new=3), 2, generator())
    assert torch.equal(greedy.targets[0], greedy.targets[1])


def test_a_mixture_is_drawn_from_and_importance_weights_bring_expectations_back() -> None:
    table, other = torch.randn(2, V, V, generator=generator(2))
    n = 40_000
    mixed = Rollout.generate(Bigram(table), Prompts.of([[3]]), Sampler(temperature=1.0, max_new=1), n, generator(), mixed_with=Mixture(Bigram(other), 0.3))
    q, p = table[3].softmax(0), other[3].softmax(0)
    y = mixed.targets[:, 0]
    assert (torch.bincount(y, minlength=V) / n - (0.7 * q + 0.3 * p)).abs().max() < 4 * math.sqrt(0.25 / n)
    weight = importance_weights(mixed)[:, 0]
    torch.testing.assert_close(weight, (q / (0.7 * q + 0.3 * p))[y])
    assert weight.max() <= 1 / 0.7 + 1e-5
    value = torch.arange(V).float()
    assert abs(float((weight * value[y]).mean() - (q * value).sum())) < 0.1
    cut = importance_weights(mixed, largest=0.5)
    assert cut.max() <= 0.5


def test_models_are_in_eval_mode_while_drawing_and_as_they_were_afterwards_and_nothing_has_a_graph() -> None:
    student = Bigram(torch.randn(V, V)).train()
    drawn = Rollout.generate(student, PROMPTS, Sampler(max_new=2), 1, generator(), source=TEACHER)
    assert student.training
    assert not any(student.was_training)
    assert not any(tensor.requires_grad for tensor in drawn.annotations.values())
    assert drawn.source is not None
    assert drawn.source.unique().tolist() == [TEACHER]


def test_prompts_out_of_rows() -> None:
    ids = torch.arange(1, 7)[None].repeat(3, 1)
    targets = torch.stack((torch.arange(2, 8), torch.tensor([IGNORE, IGNORE, 4, 5, IGNORE, IGNORE]), torch.full((6,), IGNORE)))
    whole = TokenBatch.from_inputs(torch.stack((ids, targets), 1))
    parts = Prompts.parts(whole)
    assert parts.mask_BP.sum(1).tolist() == [1, 3, 6]
    assert parts.ids_BP[1].tolist() == [0, 0, 0, 1, 2, 3]
    assert Prompts.prefixes(whole, 4).ids_BP.tolist() == [[1, 2, 3, 4]] * 3
    packed = TokenBatch(
        input_ids=torch.tensor([[7, 8, 9, 1, 2, 0]]),
        positions=torch.tensor([[0, 1, 2, 0, 1, 0]]),
        segments=torch.tensor([[0, 0, 0, 1, 1, PADDING]]),
        targets=torch.tensor([[IGNORE, 9, IGNORE, 2, IGNORE, IGNORE]]),
    )
    assert Prompts.parts(packed).ids_BP[0, -2:].tolist() == [7, 8]
    assert Prompts.prefixes(packed, 5).mask_BP.tolist() == [[False, False, True, True, True]]
    # rows that were drawn (padded on the left) are prompts like any other
    drawn = Rollout.generate(model(), PROMPTS, Sampler(max_new=3), 1, generator())
    again = Prompts.parts(drawn)
    assert torch.equal(again.ids_BP[:, -3:], PROMPTS.ids_BP)
    assert torch.equal(again.mask_BP[:, -3:], PROMPTS.mask_BP)


def test_a_row_of_padding_draws_nothing_and_wrong_input_is_refused() -> None:
    empty = Prompts(torch.tensor([[0, 0], [1, 2]]), torch.tensor([[False, False], [True, True]]))
    drawn = Rollout.generate(model(), empty, Sampler(max_new=3), 1, generator())
    assert drawn.valid.sum(1).tolist() == [0, 3]
    with pytest.raises(InputError, match="at least one token"):
        Prompts.of([[1], []])
    with pytest.raises(InputError, match="continuations"):
        Rollout.generate(model(), PROMPTS, Sampler(), 0, generator())
    with pytest.raises(InputError, match="vocabularies of 11 and 3"):
        Rollout.generate(model(), PROMPTS, Sampler(), 1, generator(), mixed_with=Mixture(Bigram(torch.zeros(3, 3))))
    with pytest.raises(InputError, match="behaviour"):
        importance_weights(TokenBatch.from_text(torch.ones(1, 3, dtype=torch.int64)))
    with pytest.raises(InputError, match="prompt of 0"):
        Prompts.prefixes(drawn, 0)
