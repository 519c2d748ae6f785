"""Policy gradients against enumeration of every text, advantages by their definition, preferences by their formulas."""

import itertools
import math

import pytest
import torch
from torch.nn.functional import one_hot

from limbeck.contract import IGNORE
from limbeck.errors import InputError
from limbeck.language.models import LanguageModel
from limbeck.language.policy import advantages, dpo_loss, ipo_loss, policy_loss, preference_margin, rewards, sequence_logprob, token_logprob, whitened
from limbeck.language.signals import Head
from limbeck.language.tokens import TokenBatch

V, T = 3, 3


class Bigram(LanguageModel):
    """q(y | x) from a table [V, V] of logits."""

    def __init__(self, table_VV: torch.Tensor) -> None:
        super().__init__()
        self.table = torch.nn.Parameter(table_VV)
        self.vocabulary = len(table_VV)

    def hidden(self, tokens: TokenBatch) -> torch.Tensor:
        return one_hot(tokens.input_ids, self.vocabulary).to(self.table.dtype)

    def head(self) -> Head:
        return Head(self.table.t())


def models(seed: int = 0) -> tuple[Bigram, Bigram]:
    student, teacher = torch.randn(2, V, V, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return Bigram(student), Bigram(teacher)


def every_text() -> TokenBatch:
    """All V^T continuations of the token 0."""
    rows = torch.tensor([(0, *text) for text in itertools.product(range(V), repeat=T)])
    return TokenBatch.from_text(rows)


def gradient(loss: torch.Tensor, model: Bigram) -> torch.Tensor:
    return torch.autograd.grad(loss, model.table, retain_graph=True)[0]


def test_log_probabilities_of_tokens_and_texts_in_any_chunks_with_their_gradient() -> None:
    student, _ = models()
    tokens = every_text()
    targets = tokens.targets.clone()
    targets[::2, 0] = IGNORE
    tokens = TokenBatch(tokens.input_ids, tokens.positions, tokens.segments, targets, whole=True)
    direct = student(tokens.packed()).log_softmax(-1).gather(2, targets.clamp(min=0)[..., None])[..., 0]
    direct = torch.where(tokens.valid, direct, 0)
    for chunk in (1, 7, 1000):
        torch.testing.assert_close(token_logprob(student, tokens, chunk=chunk), direct)
    found = sequence_logprob(student, tokens, chunk=10)
    torch.testing.assert_close(found, direct.sum(1))
    pull = torch.randn(len(tokens), dtype=torch.float64)
    torch.testing.assert_close(gradient((found * pull).sum(), student), gradient((direct.sum(1) * pull).sum(), student))
    hot = token_logprob(student, tokens, temperature=2.0)
    torch.testing.assert_close(hot[1, 0], (student(tokens.packed()) / 2).log_softmax(-1)[1, 0, targets[1, 0]])
    torch.testing.assert_close(sequence_logprob(student, every_text()).exp().sum(), torch.tensor(1.0, dtype=torch.float64))
    nothing = TokenBatch.from_inputs(torch.stack((torch.zeros(2, 3, dtype=torch.int64), torch.full((2, 3), IGNORE)), 1))
    empty = sequence_logprob(student, nothing)
    assert empty.tolist() == [0, 0]
    empty.sum().backward()


def test_the_expected_policy_gradient_is_minus_the_gradient_of_reverse_kl_over_all_texts() -> None:
    """Invariant (xi), exactly: E_q[Σ_t A_t ∇log q] = −∇KL(q‖p) of texts, and what the two readings need beside it."""
    student, teacher = models()
    tokens = every_text()
    logq, logp = token_logprob(student, tokens), token_logprob(teacher, tokens).detach()
    weight = logq.sum(1).exp()  # q(y)
    exact = gradient((weight * (logq - logp).sum(1)).sum(), student)
    r = rewards(logp, logq, tokens.valid)
    torch.testing.assert_close(r, (logp - logq).detach())

    def expected(start: str) -> torch.Tensor:
        A = advantages(r, tokens.valid, gamma=1.0, start=start, normalise="none")  # type: ignore[arg-type]
        loss = policy_loss(logq, logq, A, tokens.valid, weight_BL=weight[:, None].expand_as(A), clip=0.2) * tokens.valid.sum()
        return gradient(loss, student)

    torch.testing.assert_close(expected("own"), exact)
    # the one next token, exact over V, at every position of every text
    p, q = teacher.table.log_softmax(1).detach(), student.table.log_softmax(1)
    next_kl = (q.exp() * (q - p)).sum(1)[tokens.input_ids]
    single = gradient((weight.detach()[:, None] * next_kl).sum(), student)
    torch.testing.assert_close(single + expected("next"), exact)
    assert not torch.allclose(single + expected("own"), exact)  # the released code's sum counts r_t twice


def test_one_step_gradient_of_the_reverse_kl_with_drawn_tokens_and_importance_weights() -> None:
    """Invariant (xi) with tokens of another distribution: E_μ[w r ∇log q] = −∇KL for w = q/μ."""
    student, teacher = models(2)
    logq, logp = student.table.log_softmax(1)[0], teacher.table.log_softmax(1)[0].detach()
    mixture = 0.7 * logq.exp() + 0.3 * logp.exp()
    w = (logq.exp() / mixture).detach()
    r = (logp - logq).detach()
    tokens = TokenBatch.from_text(torch.stack((torch.zeros(V, dtype=torch.int64), torch.arange(V)), 1))
    loss = policy_loss(token_logprob(student, tokens), logq.detach()[:, None], r[:, None], tokens.valid, weight_BL=(w * mixture.detach())[:, None], clip=None)
    torch.testing.assert_close(gradient(loss * V, student), gradient((logq.exp() * (logq - logp)).sum(), student))


def test_advantages_are_discounted_sums_ahead_and_gamma_zero_leaves_the_reward() -> None:
    """Invariant (x)."""
    generator = torch.Generator().manual_seed(0)
    r = torch.randn(2, 6, generator=generator, dtype=torch.float64)
    mask = torch.tensor([[False, True, True, True, True, False], [True] * 6])
    r = torch.where(mask, r, 0)
    for start, normalise, gamma in itertools.product(("own", "next"), ("none", "count", "discounted"), (0.0, 0.7, 1.0)):
        A = advantages(r, mask, gamma=gamma, start=start, normalise=normalise)  # type: ignore[arg-type]
        for b, (begin, end) in enumerate(((1, 5), (0, 6))):
            for t in range(begin, end):
                first = t if start == "own" else t + 1
                terms = [(gamma ** (i - first), float(r[b, i])) for i in range(first, end)]
                total = sum(d * x for d, x in terms)
                below = {"none": 1, "count": len(terms), "discounted": sum(d for d, _ in terms)}[normalise]
                assert float(A[b, t]) == pytest.approx(total / below if terms else 0.0)
        assert (A[~mask] == 0).all()
    for normalise in ("none", "discounted"):
        torch.testing.assert_close(advantages(r, mask, gamma=0.0, normalise=normalise), r)  # type: ignore[arg-type]
    logp = torch.randn(2, 6)
    assert (advantages(rewards(logp, logp, mask), mask) == 0).all()


def test_rewards_are_scaled_and_clipped_and_whitening_standardises() -> None:
    mask = torch.tensor([[True, True, False, True]])
    p, q = torch.tensor([[-1.0, -300.0, -5.0, -2.0]]), torch.tensor([[-2.0, -1.0, -1.0, -2.0]])
    assert rewards(p, q, mask, scale=0.5, largest=100).tolist() == [[2.0, -100.0, 0.0, 0.0]]
    white = whitened(rewards(p, q, mask), mask)
    assert float(white[mask].mean()) == pytest.approx(0, abs=1e-6)
    assert float(white[mask].square().mean()) == pytest.approx(1, abs=1e-4)
    assert white[0, 2] == 0


def test_clipping_stops_the_gradient_where_the_ratio_has_gone_far_enough() -> None:
    old = torch.zeros(1, 4)
    new = torch.tensor([[0.5, 0.5, -0.5, 0.1]], requires_grad=True)
    A = torch.tensor([[1.0, -1.0, 1.0, 1.0]])
    mask = torch.tensor([[True, True, True, True]])
    loss = policy_loss(new, old, A, mask, clip=0.2)
    expected = -(1.2 - math.exp(0.5) + math.exp(-0.5) + math.exp(0.1)) / 4
    assert float(loss.detach()) == pytest.approx(expected)
    (slope,) = torch.autograd.grad(loss, new)
    assert (slope == 0).tolist() == [[True, False, False, False]]
    free = policy_loss(new, old, A, mask, clip=None)
    assert float(free.detach()) == pytest.approx(-(math.exp(0.5) - math.exp(0.5) + math.exp(-0.5) + math.exp(0.1)) / 4)
    none = policy_loss(new, old, A, torch.zeros_like(mask))
    assert none.item() == 0
    none.backward()


def test_preferences() -> None:
    chosen, rejected = (torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in ([-3.0, -9.0], [-4.0, -5.0]))
    reference = torch.tensor([-3.5, -8.0], dtype=torch.float64), torch.tensor([-3.5, -6.0], dtype=torch.float64)
    h = preference_margin(chosen, rejected, *reference)
    torch.testing.assert_close(h, torch.tensor([1.0, -2.0], dtype=torch.float64))
    loss = dpo_loss(h, beta=0.3)
    torch.testing.assert_close(loss, -torch.sigmoid(0.3 * h).log())
    (slope,) = torch.autograd.grad(loss.sum(), chosen, retain_graph=True)
    torch.testing.assert_close(slope, -0.3 * torch.sigmoid(-0.3 * h).detach())
    assert dpo_loss(torch.zeros(1)).item() == pytest.approx(math.log(2))
    smooth = dpo_loss(h, beta=0.3, label_smoothing=0.1)
    torch.testing.assert_close(smooth, 0.9 * loss + 0.1 * dpo_loss(-h, beta=0.3))
    torch.testing.assert_close(ipo_loss(torch.tensor([5.0, 4.0]), beta=0.1), torch.tensor([0.0, 1.0]))
    # DPO's optimum on one pair with smoothing has σ(βh) = 1 − ε
    best = math.log(0.9 / 0.1) / 0.3
    point = torch.tensor([best], requires_grad=True)
    (flat,) = torch.autograd.grad(dpo_loss(point, beta=0.3, label_smoothing=0.1).sum(), point)
    assert abs(float(flat)) < 1e-6


def test_wrong_input_is_refused() -> None:
    ones = torch.ones(1, 2)
    with pytest.raises(InputError, match="discount"):
        advantages(ones, ones.bool(), gamma=1.5)
    with pytest.raises(InputError, match="unknown start"):
        advantages(ones, ones.bool(), start="both")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="clip"):
        policy_loss(ones, ones, ones, ones.bool(), clip=0)
    for wrong in (lambda: dpo_loss(ones, beta=0), lambda: dpo_loss(ones, label_smoothing=0.5), lambda: ipo_loss(ones, beta=-1)):
        with pytest.raises(InputError, match="beta"):
            wrong()
    with pytest.raises(InputError, match="positive"):
        token_logprob(models()[0], every_text(), temperature=0)
