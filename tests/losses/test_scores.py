"""Scores of single samples: definitions, ranges, gradients row by row, and what is counted while a network trains."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from limbeck.contract import IGNORE
from limbeck.errors import InputError
from limbeck.losses.scores import RECORDED, ForgettingCounter, confidence, el2n, entropy, forgetting, grand, grand_last_layer, loss, margin

SETTINGS = settings(deadline=None, max_examples=40)
SEEDS = st.integers(0, 2**31)
SCALES = st.floats(0.01, 60.0)


def case(seed: int, scale: float = 3.0, batch: int = 6, classes: int = 5) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, classes, generator=generator, dtype=torch.float64) * scale, torch.randint(classes, (batch,), generator=generator)


def norms_by_autograd(module: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    found = []
    for x, y in zip(inputs, targets, strict=True):
        grads = torch.autograd.grad(F.cross_entropy(module(x[None]), y[None]), list(module.parameters()))
        found.append(torch.cat([g.flatten() for g in grads]).double().norm())
    return torch.stack(found)


@given(SEEDS, SCALES)
@SETTINGS
def test_scores_are_their_definitions(seed: int, scale: float) -> None:
    logits, y = case(seed, scale)
    p = logits.softmax(-1)
    top = p.sort(-1, descending=True).values
    torch.testing.assert_close(el2n(logits, y), (p - F.one_hot(y, 5)).norm(dim=-1), atol=1e-12, rtol=1e-9)
    torch.testing.assert_close(margin(logits), top[:, 0] - top[:, 1])
    torch.testing.assert_close(confidence(logits), top[:, 0])
    torch.testing.assert_close(entropy(logits), -torch.special.xlogy(p, p).sum(-1), atol=1e-12, rtol=1e-9)
    torch.testing.assert_close(entropy(logits, normalised=True), entropy(logits) / math.log(5))
    torch.testing.assert_close(loss(logits, y), F.cross_entropy(logits, y, reduction="none"))
    assert bool(((el2n(logits, y) >= 0) & (el2n(logits, y) <= math.sqrt(2))).all())


@given(SEEDS)
@SETTINGS
def test_el2n_is_the_norm_of_the_gradient_at_the_logits(seed: int) -> None:
    logits, y = case(seed)
    logits.requires_grad_()
    (gradient,) = torch.autograd.grad(F.cross_entropy(logits, y, reduction="sum"), logits)
    torch.testing.assert_close(el2n(logits.detach(), y), gradient.norm(dim=-1))


def test_ends_of_the_ranges() -> None:
    sure = torch.tensor([[1e4, 0.0, 0.0]])
    assert el2n(sure, torch.tensor([0])).item() == 0
    assert el2n(sure, torch.tensor([1])).item() == math.sqrt(2)
    even = torch.zeros(1, 4)
    assert entropy(even, normalised=True).item() == pytest.approx(1)
    assert (margin(even).item(), margin(sure).item(), confidence(even).item()) == (0, 1, 0.25)
    assert el2n(torch.tensor([[50.0, 0.0]]), torch.tensor([0])).item() == pytest.approx(math.sqrt(2) * math.exp(-50), rel=1e-6, abs=0)  # not rounded to 0
    masked = torch.tensor([[0.0, 0.0, -torch.inf]])
    assert entropy(masked).item() == pytest.approx(math.log(2))
    assert loss(masked, torch.tensor([2])).item() == math.inf
    for score in (confidence, margin, entropy):
        assert score(torch.randn(3, 4).half()).dtype == torch.float64


def test_unlabelled_samples_have_no_score_where_labels_are_needed() -> None:
    logits, y = case(1)
    y[2] = IGNORE
    module = nn.Linear(3, 5)
    x = torch.randn(6, 3)
    for found in (el2n(logits, y), loss(logits, y), grand_last_layer(logits, y, x), grand(module, x, y)):
        assert found.isnan().tolist() == [False, False, True, False, False, False]


@given(SEEDS, st.booleans())
@SETTINGS
def test_the_last_layer_form_is_exact(seed: int, bias: bool) -> None:
    _, y = case(seed)
    torch.manual_seed(seed % 1000)
    layer, h = nn.Linear(4, 5, bias=bias).double(), torch.randn(6, 4, dtype=torch.float64)
    logits = layer(h).detach()
    torch.testing.assert_close(grand_last_layer(logits, y, h, bias=bias), norms_by_autograd(layer, h, y))
    torch.testing.assert_close(grand(layer, h, y), norms_by_autograd(layer, h, y))
    if not bias:  # GraNd of a bias-free linear softmax model
        torch.testing.assert_close(grand(layer, h, y), el2n(logits, y) * h.norm(dim=-1), rtol=1e-12, atol=1e-14)


class Boxed(nn.Module):
    """Convolution, batch norm, dropout, tied layers; answers with an object that holds the logits."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Dropout(0.5), nn.Flatten(), nn.Linear(12, 4))
        self.square = nn.Linear(4, 4)
        self.again = self.square  # one part under two names
        self.other = nn.Linear(4, 4)
        self.other.weight = self.square.weight  # one parameter of two parts

    def forward(self, x: Tensor) -> object:
        z = self.other(self.again(self.square(self.body(x)).tanh()))
        return type("Output", (), {"logits": z})


@pytest.mark.parametrize("chunk", [1, 3, 100])
def test_grand_is_autograd_row_by_row_and_leaves_the_module_as_it_was(chunk: int) -> None:
    torch.manual_seed(0)
    module = Boxed().double()
    module.body[1].running_mean.normal_()
    module.body[5].requires_grad_(False)  # frozen parameters count
    module.body[3].eval()
    module.square.weight.grad = torch.ones(4, 4, dtype=torch.float64)
    x, y = torch.randn(7, 1, 4, 4, dtype=torch.float64), torch.randint(4, (7,))
    before = {name: value.clone() for name, value in module.state_dict().items()}
    modes, parameters = [part.training for part in module.modules()], list(module.parameters())
    with torch.no_grad():
        found = grand(module, x, y, chunk=chunk)
    assert [part.training for part in module.modules()] == modes
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert all(p is q for p, q in zip(module.parameters(), parameters, strict=True))
    assert torch.equal(module.square.weight.grad, torch.ones(4, 4, dtype=torch.float64))
    assert not found.requires_grad
    module.eval().requires_grad_(True)
    torch.testing.assert_close(found, norms_by_autograd(plain(module), x, y))


def plain(module: nn.Module) -> nn.Module:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = module

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x).logits

    return Plain().eval()


def test_grand_of_nothing_and_of_what_is_no_classifier() -> None:
    module = nn.Linear(3, 2)
    assert grand(module, torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64)).shape == (0,)
    with pytest.raises(InputError, match="targets"):
        grand(module, torch.zeros(2, 3), torch.zeros(3, dtype=torch.int64))
    with pytest.raises(InputError, match="chunk"):
        grand(module, torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64), chunk=0)
    with pytest.raises(InputError, match="module"):
        grand(nn.Flatten(0), torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64))


@pytest.mark.parametrize(("sequence", "expected"), [((0, 1, 0, 1, 1, 0), 2), ((0, 0, 0), math.inf), ((1, 1, 1), 0), ((), math.inf), ((1, 0), 1), ((0, 1), 0)])
def test_forgetting_of_a_sequence(sequence, expected) -> None:
    assert forgetting(torch.tensor(sequence, dtype=torch.int64)).item() == expected
    counter = ForgettingCounter(3)
    for right in sequence:
        counter.update(torch.tensor([1]), torch.tensor([right]))
    assert counter.counts().tolist() == [math.inf, expected, math.inf]  # never visited: never learnt
    assert counter.visits().tolist() == [0, len(sequence), 0]


@given(SEEDS, st.integers(1, 5), st.integers(0, 40), st.integers(1, 7))
@SETTINGS
def test_the_counter_counts_as_the_sequences_do_however_they_are_cut_into_batches(seed: int, total: int, visits: int, size: int) -> None:
    """Also with a sample several times in a batch, and across a restart."""
    generator = torch.Generator().manual_seed(seed)
    ids, right = torch.randint(total, (visits,), generator=generator), torch.rand(visits, generator=generator) < 0.5
    counter = ForgettingCounter(total)
    for ids_B, right_B in zip(ids.split(size), right.split(size), strict=True):
        state, counter = counter.state_dict(), ForgettingCounter(total)
        counter.load_state_dict(state)
        counter.update(ids_B, right_B)
    expected = torch.stack([forgetting(right[ids == i]) for i in range(total)])
    assert torch.equal(counter.counts(), expected)
    assert torch.equal(counter.visits(), ids.bincount(minlength=total))
    assert counter.counts().dtype == torch.float64


def test_the_counter_reads_nothing_on_the_host() -> None:
    """Meta tensors have shapes and no values: whatever reads one fails."""
    counter = ForgettingCounter(5, device="meta")
    for size in (4, 0, 1):
        counter.update(torch.zeros(size, dtype=torch.int64, device="meta"), torch.zeros(size, dtype=torch.bool, device="meta"))
    assert counter.counts().shape == (5,)


def test_wrong_input_is_told() -> None:
    logits, y = case(0)
    wrong = [
        lambda: el2n(logits, y[:3]), lambda: el2n(logits[0], y), lambda: loss(logits, y.float()), lambda: margin(logits[:, :1]), lambda: entropy(logits[None]),
        lambda: grand_last_layer(logits, y, torch.zeros(5, 2)), lambda: ForgettingCounter(0), lambda: ForgettingCounter(2).update(y[:2], y[:1]),
        lambda: ForgettingCounter(2).load_state_dict(ForgettingCounter(3).state_dict()),
    ]  # fmt: skip
    for call in wrong:
        with pytest.raises(InputError):
            call()


def test_the_catalogue_tells_what_needs_labels_and_which_way_is_harder() -> None:
    assert sorted(RECORDED) == ["confidence", "el2n", "entropy", "loss", "margin"]
    assert {name for name, score in RECORDED.items() if score.needs_labels} == {"el2n", "loss"}
    logits, y = torch.tensor([[8.0, 0.0, 0.0], [0.3, 0.2, 0.1]]), torch.tensor([0, 0])
    for score, targets in itertools.product(RECORDED.values(), (y, None)):
        if score.needs_labels and targets is None:
            with pytest.raises(InputError, match="needs labels"):
                score(logits, targets)
            continue
        easy, hard = score(logits, targets).tolist()
        assert (hard > easy) == score.higher_is_harder


def test_a_label_above_the_classes_is_told() -> None:
    for score in (el2n, loss):
        with pytest.raises(InputError, match="classes"):
            score(torch.randn(2, 3), torch.tensor([0, 3]))
