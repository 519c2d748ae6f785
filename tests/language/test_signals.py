"""Signals: cuts, temperatures, mixtures, heads, k largest, draws, refusals."""

import pytest
import torch

from limbeck.errors import InputError
from limbeck.language.signals import (
    ABSENT,
    DenseLike,
    DenseSignal,
    FeatureSignal,
    Head,
    HeadSignal,
    MergedSignal,
    MixedSignal,
    TakenSignal,
    TopKSignal,
    draw,
    top_k,
)

N, V, D = 7, 12, 4


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("scale", [1.0, 0.3])
@pytest.mark.parametrize("cap", [None, 2.0])
def test_a_head_is_its_formula_with_and_without_a_graph(bias: bool, scale: float, cap: float | None) -> None:
    h, W, b = numbers(N, D), numbers(V, D, seed=1), numbers(V, seed=2) if bias else None
    z = scale * (h @ W.T + (b if b is not None else 0))
    expected = z if cap is None else cap * torch.tanh(z / cap)
    head = Head(W, b, scale, cap)
    torch.testing.assert_close(head.logits(h), expected)
    room = torch.full((N, V), torch.nan, dtype=torch.float64)
    assert head.logits_into(h, room) is room
    torch.testing.assert_close(room, expected)
    assert head.vocabulary == V
    assert head.cast(torch.float32).weight_Vd.dtype == torch.float32
    assert not Head(W.clone().requires_grad_(), b).detach().weight_Vd.requires_grad


def test_dense_signals_agree_cut_or_whole() -> None:
    h, W = numbers(N, D), numbers(V, D, seed=1)
    dense, by_head = DenseSignal(h @ W.T), HeadSignal(h, Head(W))
    mixed = MixedSignal((dense, by_head), (0.5, 0.5))
    for signal in (dense, by_head, mixed):
        assert isinstance(signal, DenseLike)
        assert (len(signal), signal.vocabulary) == (N, V)
        for tau in (1.0, 2.5):
            expected = torch.log_softmax(h @ W.T / tau, -1)
            torch.testing.assert_close(signal.log_probs(0, N, tau), expected)
            torch.testing.assert_close(signal.log_probs(2, 5, tau), expected[2:5])
            torch.testing.assert_close(signal.cut(2, 5).log_probs(0, 3, tau), expected[2:5])
        torch.testing.assert_close(torch.softmax(signal.logits(1, 4), -1), torch.softmax(h @ W.T, -1)[1:4])
    assert dense.cut(1, 3).logits(0, 2).data_ptr() == dense.logits_NV[1:3].data_ptr()
    assert DenseSignal((h @ W.T).bfloat16()).log_probs(0, 2).dtype == torch.float32
    assert not isinstance(TopKSignal(torch.zeros(1, 1, dtype=torch.int64), torch.zeros(1, 1)), DenseLike)


def test_the_k_largest_and_the_target_whatever_the_chunk() -> None:
    signal, targets = DenseSignal(numbers(N, V)), torch.arange(N)
    logp = torch.log_softmax(signal.logits_NV / 2, -1)
    for chunk in (1, 3, 100):
        kept = top_k(signal, 4, targets_N=targets, temperature=2.0, chunk=chunk)
        torch.testing.assert_close(kept.logp_Nk, logp.topk(4).values)
        torch.testing.assert_close(kept.logp_Nk, logp.gather(1, kept.ids_Nk))
        torch.testing.assert_close(kept.target_logp_N, logp[range(N), targets])
        assert (kept.temperature, kept.policy, kept.kept, len(kept)) == (2.0, "tail", 4, N)
    empty = top_k(DenseSignal(numbers(0, V)), 4, targets_N=targets[:0])
    assert empty.ids_Nk.shape == (0, 4)
    with pytest.raises(InputError, match="k = 13"):
        top_k(signal, 13)


def test_every_field_of_a_sparse_signal_is_cut() -> None:
    signal = TopKSignal(torch.arange(N * 2).view(N, 2), numbers(N, 2), 3.0, "sampled", numbers(N), True, numbers(N, 2))
    part = signal.cut(2, 4)
    assert (part.temperature, part.policy, part.strict) == (3.0, "sampled", True)
    for name in ("ids_Nk", "logp_Nk", "target_logp_N", "draw_weight_Nk"):
        assert torch.equal(getattr(part, name), getattr(signal, name)[2:4])
    assert torch.equal(TakenSignal(numbers(N)).cut(1, 3).logp_N, numbers(N)[1:3])
    assert torch.equal(FeatureSignal({"hidden": numbers(N, 3)}).cut(1, 3).features["hidden"], numbers(N, 3)[1:3])
    merged = MergedSignal(numbers(N, V), torch.arange(N)).cut(1, 3)
    assert torch.equal(merged.groups, torch.tensor([1, 2]))
    assert (len(merged), len(FeatureSignal({"hidden": numbers(N, 3)})), len(TakenSignal(numbers(N)))) == (2, N, N)


def test_draws_repeat_with_their_generator_and_follow_the_teacher() -> None:
    signal = DenseSignal(numbers(N, V))
    a, b = (draw(signal, 5, torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(a.ids_Nk, b.ids_Nk)
    assert a.policy == "sampled"
    assert (a.draw_weight_Nk == 1 / 5).all()
    many = draw(signal, 20_000, torch.Generator().manual_seed(0), proposal=2.0)
    p = torch.softmax(signal.logits_NV, -1)
    torch.testing.assert_close(torch.zeros(N, V, dtype=torch.float64).scatter_add(1, many.ids_Nk, many.draw_weight_Nk), p, rtol=0, atol=0.05)
    assert draw(DenseSignal(numbers(0, V)), 5, torch.Generator()).ids_Nk.shape == (0, 5)


def test_what_cannot_be_a_signal_is_refused() -> None:
    ids, logp = torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2, 3)
    dense = DenseSignal(numbers(N, V))
    for make, said in (
        (lambda: TopKSignal(ids, logp[:, :2]), "kept entries"),
        (lambda: TopKSignal(ids[:, :0], logp[:, :0]), "k > 0"),
        (lambda: TopKSignal(ids, logp, policy="tial"), "unknown policy"),
        (lambda: TopKSignal(ids, logp, temperature=0.0), "τ_c"),
        (lambda: TopKSignal(ids, logp, draw_weight_Nk=logp), "draws"),
        (lambda: MixedSignal((dense,), (0.5, 0.5)), "weights"),
        (lambda: MixedSignal((dense, dense), (0.5, 0.6)), "sum to 1"),
        (lambda: MixedSignal((dense, dense), (1.5, -0.5)), "shares"),
        (lambda: MixedSignal((dense, dense.cut(0, 3)), (0.5, 0.5)), "differ"),
        (lambda: MixedSignal((TopKSignal(ids, logp),), (1.0,)), "whole vocabulary"),
        (lambda: Head(numbers(V, D), numbers(D)), "weight"),
        (lambda: Head(numbers(V, D), soft_cap=0.0), "soft_cap"),
        (lambda: draw(dense, 0, torch.Generator()), "above 0"),
    ):
        with pytest.raises(InputError, match=said):
            make()
    assert ABSENT == -1
