"""The divergence over a head in one pass: against the dense path, whatever the chunk; weights, splits, tied heads, autocast, refusals, and its memory."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from limbeck.errors import InputError
from limbeck.language import divergences as dv
from limbeck.language import linear_divergence as ld
from limbeck.language.linear_divergence import block_rows, chunk_rows, dense_divergence, linear_divergence
from limbeck.language.signals import DenseSignal, Head, HeadSignal, MixedSignal, Recast, TakenSignal, draw, top_k
from limbeck.language.tokens import TokenRows

N, D, V, K = 23, 6, 40, 5
SETTINGS = settings(deadline=None, max_examples=15)
EVERY = [
    dv.ForwardKL(temperature=2.0),
    dv.ReverseKL(),
    dv.GeneralisedJSD(beta=0.3),
    dv.SkewForwardKL(),
    dv.SkewReverseKL(temperature=1.5, teacher_temperature=1.0),
    dv.TotalVariation(),
    dv.LogitMSE(centred=True),
    dv.CrossEntropy(),
    dv.Mixed(((0.5, dv.CrossEntropy()), (0.5, dv.ForwardKL()))),
]


def tensors(seed: int = 0, dtype: torch.dtype = torch.float64, n: int = N) -> tuple[Tensor, Head, HeadSignal, TokenRows]:
    """(h and a head with a graph, a teacher of another width, rows with weights)."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    h, W, b = (normal(*shape).requires_grad_() for shape in ((n, D), (V, D), (V,)))
    teacher = HeadSignal(normal(n, 9), Head(0.7 * normal(V, 9), normal(V), soft_cap=6.0))
    weight = torch.rand(n, generator=generator) * (torch.rand(n, generator=generator) > 0.2)
    return h, Head(W, b), teacher, TokenRows(torch.arange(n), torch.randint(0, V, (n,), generator=generator), weight)


def gradients(loss: Tensor, h: Tensor, head: Head) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss, (h, head.weight_Vd, head.bias_V))


def signals_of(teacher: HeadSignal, rows: TokenRows) -> dict[str, object]:
    dense = DenseSignal(teacher.logits(0, len(teacher)))
    kept = top_k(teacher, K, targets_N=rows.targets_N)
    return {
        "head": teacher,
        "dense": dense,
        "mixed": MixedSignal((teacher, dense.cut(0, len(dense))), (0.4, 0.6)),
        "recast": Recast(teacher, lambda u_nV, cut: u_nV * (1 + cut.targets_N[:, None] / 50), rows, V),
        "tail": kept,
        "target": kept.with_target(rows.targets_N),
        "renorm_teacher": replace(kept, policy="renorm_teacher"),
        "renorm_both": replace(kept, policy="renorm_both"),
        "sampled": draw(teacher, 6, torch.Generator().manual_seed(1)),
        "taken": TakenSignal(kept.target_logp_N),
    }


@pytest.mark.parametrize("name", ["head", "dense", "mixed", "recast", "tail", "target", "renorm_teacher", "renorm_both", "sampled", "taken"])
def test_it_is_the_dense_path_for_every_divergence_and_signal(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ld, "CACHED_FLOATS", 3 * V)  # several blocks a chunk
    h, plain, teacher, rows = tensors()
    signal, compared = signals_of(teacher, rows)[name], 0
    for head in (plain, replace(plain, scale=0.6, soft_cap=3.0)):
        for divergence in EVERY:
            try:
                expected = dense_divergence(head.logits(h), signal, divergence, rows)
            except InputError:
                with pytest.raises(InputError):
                    linear_divergence(h, head, signal, divergence, rows)
                continue
            found = linear_divergence(h, head, signal, divergence, rows, chunk=7)
            torch.testing.assert_close(found, expected)
            torch.testing.assert_close(gradients(found.loss, h, head), gradients(expected.loss, h, head))
            compared += 1
    assert compared >= (4 if name == "sampled" else 10)


@given(st.integers(1, 40), st.integers(1, 40))
@SETTINGS
def test_the_chunk_changes_nothing(chunk: int, block: int) -> None:
    h, head, teacher, rows = tensors(1)
    for divergence, signal in ((dv.GeneralisedJSD(), teacher), (EVERY[-1], top_k(teacher, K))):
        whole = linear_divergence(h, head, signal, divergence, rows)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ld, "CACHED_FLOATS", block * V)
            parts = linear_divergence(h, head, signal, divergence, rows, chunk=chunk)
        torch.testing.assert_close(parts, whole)
        torch.testing.assert_close(gradients(parts.loss, h, head), gradients(whole.loss, h, head))


def test_the_loss_is_the_weighted_mean_of_equation_1_and_its_parts_are_reported() -> None:
    h, head, teacher, rows = tensors(2)
    mixed = dv.Mixed(((2.0, dv.CrossEntropy()), (0.5, dv.ForwardKL()), (0.0, dv.LogitMSE())))
    z, u = head.logits(h), teacher.logits(0, N)
    logq, logp = torch.log_softmax(z, -1), torch.log_softmax(u, -1)
    ce, kl = -logq[range(N), rows.targets_N], (logp.exp() * (logp - logq)).sum(-1)
    w = rows.weight_N.double()
    for denominator, D_ in ((None, w.sum()), (3.5, 3.5), (torch.tensor(7), 7.0)):
        found = linear_divergence(h, head, teacher, mixed, rows, denominator=denominator)
        torch.testing.assert_close(found.loss, (w * (2 * ce + 0.5 * kl)).sum() / D_)
        torch.testing.assert_close(found.parts, {"cross_entropy": (w * ce).sum() / D_, "forward_kl": (w * kl).sum() / D_}, check_stride=False)
        torch.testing.assert_close(found.values_N, (2 * ce + 0.5 * kl).detach())
        assert not any(part.requires_grad for part in found.parts.values())
        assert not found.values_N.requires_grad
    torch.testing.assert_close(dense_divergence(z, teacher, mixed, rows, 3.5).parts, linear_divergence(h, head, teacher, mixed, rows, denominator=3.5).parts)


@given(st.lists(st.integers(0, N), max_size=4))
@SETTINGS
def test_accumulation_over_any_split_is_one_batch(cuts: list[int]) -> None:
    h, head, teacher, rows = tensors(3)
    total = rows.weight_N.sum()
    whole = linear_divergence(h, head, teacher, dv.ReverseKL(), rows)
    edges = [0, *sorted(cuts), N]
    parts = [linear_divergence(h[a:b], head, teacher.cut(a, b), dv.ReverseKL(), rows.cut(a, b), denominator=total).loss for a, b in pairwise(edges)]
    loss = torch.stack(parts).sum()
    torch.testing.assert_close(loss, whole.loss)
    torch.testing.assert_close(gradients(loss, h, head), gradients(whole.loss, h, head))


@pytest.mark.parametrize("signal", ["head", "dense", "tail", "none"])
def test_no_positions_and_no_weight_give_zero_with_a_graph(signal: str) -> None:
    h, head, teacher, rows = tensors(4)
    empty = {"head": teacher.cut(0, 0), "dense": DenseSignal(torch.zeros(0, V)), "tail": top_k(teacher.cut(0, 0), K), "none": None}[signal]
    divergence = dv.CrossEntropy() if signal == "none" else dv.ForwardKL()
    for found in (linear_divergence(h[:0], head, empty, divergence, rows.cut(0, 0)), dense_divergence(head.logits(h[:0]), empty, divergence, rows.cut(0, 0))):
        assert found.loss.item() == 0
        assert all(part.item() == 0 for part in found.parts.values())
        assert all((grad == 0).all() for grad in gradients(found.loss, h, head))
    light = replace(rows, weight_N=torch.zeros(N))
    found = linear_divergence(h, head, teacher, dv.ForwardKL(), light)
    assert found.loss.item() == 0
    assert all((grad == 0).all() for grad in gradients(found.loss, h, head))


def test_products_are_made_for_what_is_trained_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    h, head, teacher, rows = tensors(5)
    made: list[torch.Size] = []
    plain = ld._add_product
    monkeypatch.setattr(ld, "_add_product", lambda total, a, b: (made.append(total.shape), plain(total, a, b)))
    expected = gradients(linear_divergence(h, head, teacher, dv.ForwardKL(), rows).loss, h, head)
    assert made == [torch.Size([V, D])]
    frozen = head.detach()
    torch.testing.assert_close(torch.autograd.grad(linear_divergence(h, frozen, teacher, dv.ForwardKL(), rows).loss, h)[0], expected[0])
    fixed = linear_divergence(h.detach(), replace(head, bias_V=None if head.bias_V is None else head.bias_V.detach()), teacher, dv.ForwardKL(), rows)
    torch.testing.assert_close(torch.autograd.grad(fixed.loss, head.weight_Vd)[0], expected[1])
    assert len(made) == 2
    with torch.no_grad():
        value = linear_divergence(h, head, teacher, dv.ForwardKL(), rows)
    assert len(made) == 2
    assert not value.loss.requires_grad
    torch.testing.assert_close(value.loss, fixed.loss.detach())
    asked = HeadSignal(teacher.hidden_Nd, replace(teacher.head, weight_Vd=torch.full_like(teacher.head.weight_Vd, torch.nan)))
    assert linear_divergence(h, head, asked, dv.CrossEntropy(), rows).loss.isfinite()  # a teacher that nobody asks is not worked out
    no_bias = replace(head, bias_V=None)
    found, dense = linear_divergence(h, no_bias, teacher, dv.ForwardKL(), rows), dense_divergence(no_bias.logits(h), teacher, dv.ForwardKL(), rows)
    torch.testing.assert_close(torch.autograd.grad(found.loss, no_bias.weight_Vd), torch.autograd.grad(dense.loss, no_bias.weight_Vd))


def test_a_tied_weight_gets_both_gradients_and_the_upstream_factor_is_kept() -> None:
    h, head, teacher, rows = tensors(6)
    E = head.weight_Vd

    def loss(pass_) -> Tensor:
        hidden = E[rows.targets_N] * 0.5 + h
        return 3 * pass_(hidden) ** 2

    found = loss(lambda x: linear_divergence(x, head, teacher, dv.GeneralisedJSD(), rows).loss)
    expected = loss(lambda x: dense_divergence(head.logits(x), teacher, dv.GeneralisedJSD(), rows).loss)
    torch.testing.assert_close(gradients(found, h, head), gradients(expected, h, head))


def test_the_teacher_gets_no_gradient_and_gradients_of_gradients_are_refused() -> None:
    h, head, teacher, rows = tensors(7)
    live = HeadSignal(teacher.hidden_Nd.clone().requires_grad_(), replace(teacher.head, weight_Vd=teacher.head.weight_Vd.clone().requires_grad_()))
    loss = linear_divergence(h, head, live, dv.ForwardKL(), rows).loss
    assert torch.autograd.grad(loss, live.hidden_Nd, allow_unused=True)[0] is None
    loss = linear_divergence(h, head, live, dv.ForwardKL(), rows).loss
    with pytest.raises(InputError, match="gradients of gradients"):
        torch.autograd.grad(loss, h, create_graph=True)
    exact = dense_divergence(head.logits(h), teacher, dv.ForwardKL(), rows).loss
    (slope,) = torch.autograd.grad(exact, h, create_graph=True)
    assert torch.autograd.grad(slope.sum(), h)[0].isfinite().all()


def test_a_backward_pass_may_be_taken_twice() -> None:
    h, head, teacher, rows = tensors(8)
    loss = linear_divergence(h, head, teacher, dv.ForwardKL(), rows).loss
    first = torch.autograd.grad(loss, (h, head.weight_Vd), retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(loss, (h, head.weight_Vd)), first)


# ---- precision -----------------------------------------------------------------------------------------------------------


def test_autocast_makes_the_products_in_bfloat16_and_everything_else_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    h, head, teacher, rows = tensors(9, torch.float32)
    seen: dict[str, set[torch.dtype]] = {"slopes": set(), "total": set(), "products": set()}
    slopes, add = ld.slopes, ld._add_product
    monkeypatch.setattr(ld, "slopes", lambda d, student, *rest: (seen["slopes"].add(student.z_nV.dtype), slopes(d, student, *rest))[1])
    monkeypatch.setattr(ld, "_add_product", lambda total, a, b: (seen["total"].add(total.dtype), seen["products"].update((a.dtype, b.dtype)), add(total, a, b)))
    exact = linear_divergence(h, head, teacher, dv.ForwardKL(), rows, chunk=7)
    expected = gradients(exact.loss, h, head)
    assert seen == {"slopes": {torch.float32}, "total": {torch.float32}, "products": {torch.float32}}
    for states in (h, h.detach().bfloat16().requires_grad_()):
        seen["products"].clear()
        with torch.autocast("cpu", torch.bfloat16):
            found = linear_divergence(states, head, teacher, dv.ForwardKL(), rows, chunk=7)
        assert seen == {"slopes": {torch.float32}, "total": {torch.float32}, "products": {torch.bfloat16}}
        assert found.loss.dtype == torch.float32
        torch.testing.assert_close(found.loss, exact.loss, rtol=0.05, atol=0.02)
        given_back = gradients(found.loss, states, head)
        assert [grad.dtype for grad in given_back] == [states.dtype, torch.float32, torch.float32]
        for grad, wanted in zip(given_back, expected, strict=True):
            assert (grad.float() - wanted).norm() < 0.05 * wanted.norm()


@pytest.mark.parametrize("by", ["autocast", "tensors"])
@pytest.mark.parametrize("divergence", [dv.ForwardKL(), dv.ReverseKL(), dv.LogitMSE(), dv.CrossEntropy()], ids=str)
def test_float16_loses_no_gradient_to_a_large_denominator(divergence: dv.Divergence, by: str) -> None:
    """w/D = 1/16384 and less: G itself would fall beneath float16, and a loss scaler's factor only comes in the backward pass."""
    generator = torch.Generator().manual_seed(0)
    n, d, v, factor = 192, 24, 2000, 2.0**16
    h, W, b = (torch.randn(*shape, generator=generator).half() for shape in ((n, d), (v, d), (v,)))
    h[:, 0] += 50  # as trained models have
    W, b = 0.3 * W, 0.1 * b
    teacher = HeadSignal(torch.randn(n, d, generator=generator), Head(0.3 * torch.randn(v, d, generator=generator)))
    rows = TokenRows(torch.arange(n), torch.randint(0, v, (n,), generator=generator), torch.rand(n, generator=generator))

    def found(dtype: torch.dtype, autocast: bool = False) -> tuple[Tensor, ...]:
        states, head = h.to(dtype).requires_grad_(), Head(W.to(dtype).requires_grad_(), b.to(dtype).requires_grad_(), scale=0.5, soft_cap=30.0)
        with torch.autocast("cpu", torch.float16, enabled=autocast):
            loss = linear_divergence(states, head, teacher, divergence, rows, denominator=16_384.0, chunk=80).loss
        return gradients(factor * loss, states, head)

    exact = found(torch.float64)
    half = found(torch.float32, autocast=True) if by == "autocast" else found(torch.float16)
    for ours, wanted in zip(half, exact, strict=True):
        assert (ours.double() - wanted).norm() < 0.01 * wanted.norm()


def test_float16_products_stay_in_range_whatever_the_rows_are() -> None:
    """1,024 rows of one target, large hidden states and weights: every sum would leave float16's range without its norms."""
    n = 1024
    h, W = torch.full((n, 4), 200.0, dtype=torch.float16).requires_grad_(), torch.zeros(6, 4, dtype=torch.float32).requires_grad_()
    rows = TokenRows(torch.arange(n), torch.zeros(n, dtype=torch.int64), torch.cat((torch.zeros(8), torch.full((n - 8,), 1e4))))
    with torch.autocast("cpu", torch.float16):
        loss = linear_divergence(h, Head(W), None, dv.CrossEntropy(), rows).loss
    dh, dW = torch.autograd.grad(loss, (h, W))
    assert dh.isfinite().all()
    torch.testing.assert_close(dW[:, 0], 200 * (torch.full((6,), 1 / 6) - torch.eye(6)[0]), rtol=1e-3, atol=1e-3)


def test_a_teachers_head_is_float32_under_autocast() -> None:
    h, head, teacher, rows = tensors(14, torch.float32)
    rounded = HeadSignal(teacher.hidden_Nd.bfloat16(), teacher.head)  # its body ran under autocast
    dense = DenseSignal(teacher.head.logits(rounded.hidden_Nd.float()))
    for signal in (rounded, MixedSignal((rounded, rounded), (0.5, 0.5)), Recast(rounded, lambda u_nV, cut: u_nV, rows, V)):
        with torch.autocast("cpu", torch.bfloat16):
            assert signal.logits(0, N).dtype == torch.float32
            torch.testing.assert_close(signal.log_probs(0, N), dense.log_probs(0, N))
            found = linear_divergence(h, head, signal, dv.ForwardKL(), rows, chunk=7)
            expected = linear_divergence(h, head, dense, dv.ForwardKL(), rows, chunk=7)
        torch.testing.assert_close(found.values_N, expected.values_N, rtol=1e-5, atol=1e-5)
    stored = HeadSignal(rounded.hidden_Nd, rounded.head.cast(torch.bfloat16))
    assert stored.logits(0, N).dtype == torch.float32


def test_many_small_chunks_of_bfloat16_add_up_in_float32() -> None:
    """A sum of 512 equal rows: bfloat16 would stop growing at 256 times a row."""
    h = torch.ones(512, 1, dtype=torch.bfloat16)
    head = Head(torch.zeros(2, 1, dtype=torch.bfloat16, requires_grad=True))
    rows = TokenRows(torch.arange(512), torch.zeros(512, dtype=torch.int64), torch.ones(512))
    loss = linear_divergence(h, head, None, dv.CrossEntropy(), rows, chunk=1, denominator=1.0).loss
    torch.testing.assert_close(torch.autograd.grad(loss, head.weight_Vd)[0].float(), torch.tensor([[-256.0], [256.0]]))


@pytest.mark.parametrize(("hidden", "weight"), [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16), (torch.bfloat16, torch.bfloat16)])
def test_other_dtypes_than_the_heads_are_promoted(hidden: torch.dtype, weight: torch.dtype) -> None:
    h, head, teacher, rows = tensors(10, torch.float32)
    states = h.detach().to(hidden).requires_grad_()
    cast = Head(head.weight_Vd.detach().to(weight).requires_grad_(), head.bias_V)
    found = linear_divergence(states, cast, teacher, dv.ReverseKL(), rows)
    given_back = torch.autograd.grad(found.loss, (states, cast.weight_Vd))
    assert [grad.dtype for grad in given_back] == [hidden, weight]
    expected = linear_divergence(h, head, teacher, dv.ReverseKL(), rows)
    torch.testing.assert_close(found.loss, expected.loss, rtol=0.05, atol=0.02)


def test_float32_is_within_1e_5_of_the_dense_path() -> None:
    generator = torch.Generator().manual_seed(0)
    n, d, v = 96, 32, 3000
    h, W = torch.randn(n, d, generator=generator).requires_grad_(), (0.3 * torch.randn(v, d, generator=generator)).requires_grad_()
    teacher = HeadSignal(torch.randn(n, d, generator=generator), Head(0.3 * torch.randn(v, d, generator=generator)))
    rows = TokenRows(torch.arange(n), torch.zeros(n, dtype=torch.int64), torch.ones(n))
    for divergence in (dv.ForwardKL(), dv.ReverseKL(), dv.GeneralisedJSD()):
        found = linear_divergence(h, Head(W), teacher, divergence, rows, chunk=32)
        expected = dense_divergence(h @ W.T, teacher, divergence, rows)
        torch.testing.assert_close(found.loss, expected.loss, rtol=1e-5, atol=1e-6)
        for ours, theirs in zip(torch.autograd.grad(found.loss, (h, W)), torch.autograd.grad(expected.loss, (h, W)), strict=True):
            assert (ours - theirs).norm() <= 1e-5 * theirs.norm()


# ---- memory, chunks, refusals ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["head", "dense", "mixed", "recast", "tail", "renorm_both"])
def test_no_tensor_is_as_large_as_all_logits(name: str) -> None:
    class Largest(torch.utils._python_dispatch.TorchDispatchMode):
        numbers = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            made = [x for x in (out if isinstance(out, tuple | list) else (out,)) if isinstance(x, Tensor) and not func.is_view]
            type(self).numbers = max([type(self).numbers, *(x.numel() for x in made)])
            return out

    h, head, teacher, rows = tensors(11, n=64)
    signal = signals_of(teacher, rows)[name]
    with Largest():
        loss = linear_divergence(h, head, signal, dv.ForwardKL(), rows, chunk=8).loss
        gradients(loss, h, head)
    assert 0 < Largest.numbers <= max(8 * V, 64 * 9, V * 9)
    assert max(8 * V, 64 * 9, V * 9) < 64 * V / 3


def test_chunks_are_about_as_large_as_the_hidden_states() -> None:
    assert chunk_rows(4096, 32_000, 256) == 512  # 32.8: the least
    assert chunk_rows(4096, 4096, 900) == 1024  # 900
    assert chunk_rows(4096, 4096, 600) == 512  # 600
    assert chunk_rows(10**6, 256, 64) == 1024
    assert chunk_rows(0, 256, 64) == 512
    assert chunk_rows(512, 262_144, 2304) == 256  # no more than 2^26 logits at a time: Gemma's 512 rows are not held at once
    assert chunk_rows(4096, 151_936, 896) == 384
    assert chunk_rows(4096, 10**7, 896) == 64
    for v in (49_152, 128_256, 151_936, 262_144):
        assert chunk_rows(4096, v, 2048) * v <= 2**26
        assert 1 <= block_rows(v, torch.device("cuda")) * v <= 2**24  # temporaries of a block are small beside the chunk's logits
        assert block_rows(v, torch.device("cpu")) * v <= 2**18


def test_a_backward_pass_that_is_the_last_copies_no_gradient_of_the_head(monkeypatch: pytest.MonkeyPatch) -> None:
    h, head, teacher, rows = tensors(13)
    made: list[int] = []
    plain = ld._pass

    def watched(*args):
        found = plain(*args)
        made.append(found[2][1].data_ptr())
        return found

    monkeypatch.setattr(ld, "_pass", watched)
    (3.0 * linear_divergence(h, head, teacher, dv.ForwardKL(), rows).loss).backward()
    assert head.weight_Vd.grad.data_ptr() == made[0]
    expected = torch.autograd.grad(3.0 * dense_divergence(head.logits(h), teacher, dv.ForwardKL(), rows).loss, head.weight_Vd)[0]
    torch.testing.assert_close(head.weight_Vd.grad, expected)
    loss = 3.0 * linear_divergence(h, head, teacher, dv.ForwardKL(), rows).loss
    loss.backward(retain_graph=True)  # comes again: what was saved must stay
    loss.backward()
    torch.testing.assert_close(head.weight_Vd.grad, 3 * expected)


def test_what_does_not_fit_is_refused() -> None:
    h, head, teacher, rows = tensors(12)
    learned = replace(rows, weight_N=rows.weight_N.clone().requires_grad_())
    for call, said in (
        (lambda: linear_divergence(h[:3], head, teacher, dv.ForwardKL(), rows), "hidden states"),
        (lambda: linear_divergence(h, Head(head.weight_Vd[:, :2]), teacher, dv.ForwardKL(), rows), "hidden states"),
        (lambda: linear_divergence(h, head, teacher, dv.ForwardKL(), rows, chunk=0), "chunk"),
        (lambda: linear_divergence(h, head, None, dv.ForwardKL(), rows), "no signal"),
        (lambda: linear_divergence(h, head, teacher.cut(0, 3), dv.ForwardKL(), rows), "positions"),
        (lambda: linear_divergence(h, head, DenseSignal(torch.zeros(N, V + 1)), dv.ForwardKL(), rows), "vocabulary"),
        (lambda: linear_divergence(h, head, teacher, dv.ForwardKL(), learned), "weights"),
    ):
        with pytest.raises(InputError, match=said):
            call()
    loss = dense_divergence(head.logits(h), teacher, dv.ForwardKL(), learned).loss
    assert torch.autograd.grad(loss, learned.weight_N)[0].isfinite().all()
