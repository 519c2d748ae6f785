"""Lower bounds on mutual information from scores of pairs in a batch, and the nets that score them (MI-α of Distiller, arXiv 2109.11105).

Legend: B pairs (x_i, y_i) of a batch, s_ij = f(x_i, y_j) [B, B], a_i a log-baseline [B], k the width in which critics meet. Eqs. are those of our sheet:

    m_ij = log (1/(B−1)) Σ_{k≠j} e^{s_ik}          leave-one-out log-mean: column j is held out, the pair's own column i is not (unless j = i)
    b_ij = log(α e^{m_ij} + (1 − α) e^{a_i})        (9)
    I_α  = 1 + mean_{i≠j} (s_ii − b_ij) − mean_{i≠j} e^{s_ij − b_ii}     (10), means over all B(B−1) pairs i ≠ j

α = 0 is TUBA (low bias, high variance), with a ≡ 1 NWJ, α = 1 InfoNCE with B − 1 samples (at most log(B − 1), low variance); interpolated as in Poole et al.,
arXiv 1905.06922. α multiplies the leave-one-out mean: the released code's docstring says it the other way round, its arithmetic does not.

What the rows are matters for the baseline alone, which is a function of the teacher's vector y. Rows of scores that belong to y (the cleaner choice, `rows`
"teacher") make I_α the bound of Poole et al. at every α. The released code attaches a(y_i) to rows that belong to the student's x_i ("student"). At α = 0 that
is a bound too, because log Z(x) ≤ Z(x)/a + log a − 1 for every a > 0, and at α = 1 there is no baseline; in between we know of no proof (ours: a search for a
counterexample on small discrete X and Y found none).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from limbeck.errors import InputError

Bound = Literal["mi", "tuba", "nwj", "infonce", "jsd"]
"""mi: I_α; tuba: α = 0; nwj: α = 0, a ≡ 1; infonce: all B columns, at most log B; jsd: a divergence, not nats of mutual information."""
Rows = Literal["teacher", "student"]
BOUNDS: tuple[Bound, ...] = ("mi", "tuba", "nwj", "infonce", "jsd")


def separable_scores(x_Bk: Tensor, y_Bk: Tensor) -> Tensor:
    """s_ij = ⟨x_i, y_j⟩, [B, B]: what two separate nets make of both sides."""
    return x_Bk @ y_Bk.T


def leave_one_out(scores_BB: Tensor) -> Tensor:
    """m_ij = log (1/(B−1)) Σ_{k≠j} e^{s_ik}, [B, B], stable for scores of any size. Raises InputError: fewer than 2 pairs, or not square.

    Where j is not the row's maximum, the rest holds it and the difference of sums is at least 1; where it is, the rest is summed by itself.
    """
    B = _pairs(scores_BB, 2)
    top_B1, where_B1 = scores_BB.max(1, keepdim=True)
    shift_B1 = top_B1.detach()
    is_top_BB = torch.zeros_like(scores_BB, dtype=torch.bool).scatter(1, where_B1, True)
    scaled_BB = (scores_BB - shift_B1).exp()
    rest_BB = (scaled_BB.sum(1, keepdim=True) - scaled_BB).masked_fill(is_top_BB, 1.0)
    others_B1 = scores_BB.masked_fill(is_top_BB, -torch.inf).logsumexp(1, keepdim=True)
    return torch.where(is_top_BB, others_B1, rest_BB.log() + shift_B1) - math.log(B - 1)


def mixed_baseline(means: Tensor, baselines: Tensor, alpha: float) -> Tensor:
    """b = log(α e^m + (1 − α) e^a), (9); the term whose share is 0 is left out, so that α of 0 and 1 have finite values and gradients."""
    if not 0 <= alpha <= 1:
        raise InputError(f"alpha is {alpha:g}.", where="alpha", fix="Give a share in [0, 1]; 1 is InfoNCE, 0 is TUBA.")
    if alpha == 1:
        return means
    if alpha == 0:
        return baselines.expand_as(means)
    return torch.logaddexp(means + math.log(alpha), baselines + math.log1p(-alpha))


def mi_alpha(scores_BB: Tensor, baseline_B: Tensor | None, alpha: float) -> Tensor:
    """I_α in nats, (10), a scalar.

    Args:
        scores_BB: s_ij of row i and column j; pairs are on the diagonal. baseline_B: a_i of the rows (log-space); None: 0.

    Raises:
        InputError: α outside [0, 1], scores that are not square, or fewer than 3 pairs (2 leave InfoNCE nothing to choose among).
    """
    B = _pairs(scores_BB, 3)
    baseline_B1 = scores_BB.new_zeros(B, 1) if baseline_B is None else baseline_B[:, None]
    b_BB = mixed_baseline(leave_one_out(scores_BB) if alpha > 0 else torch.zeros_like(scores_BB), baseline_B1, alpha)
    joint = scores_BB.diagonal()[:, None] - b_BB
    itself_BB = torch.eye(B, dtype=torch.bool, device=scores_BB.device)
    marginal = (scores_BB - b_BB.diagonal()[:, None]).masked_fill(itself_BB, -torch.inf).exp()  # before exp: a pair's own score may overflow there
    return 1 + off_diagonal_mean(joint) - off_diagonal_mean(marginal)


def tuba(scores_BB: Tensor, baseline_B: Tensor | None) -> Tensor:
    """1 + mean_i (s_ii − a_i) − mean_{i≠j} e^{s_ij − a_i}: I_0. Raises InputError: as `mi_alpha`."""
    return mi_alpha(scores_BB, baseline_B, 0.0)


def nwj(scores_BB: Tensor) -> Tensor:
    """mean_i s_ii − e^{−1} mean_{i≠j} e^{s_ij}: I_0 with a ≡ 1. Raises InputError: as `mi_alpha`."""
    return mi_alpha(scores_BB, scores_BB.new_ones(len(scores_BB)), 0.0)


def infonce(scores_BB: Tensor) -> Tensor:
    """log B + mean_i (s_ii − log Σ_j e^{s_ij}), at most log B: the usual form, all B columns in the sum. Raises InputError: fewer than 2 pairs."""
    return math.log(_pairs(scores_BB, 2)) + (scores_BB.diagonal() - scores_BB.logsumexp(1)).mean()


def jsd(scores_BB: Tensor) -> Tensor:
    """mean_i −softplus(−s_ii) − mean_{i≠j} softplus(s_ij), at most 0: with 2 log 2 more it bounds twice the Jensen-Shannon divergence of joint and
    product, not I (f-GAN, arXiv 1606.00709). Raises InputError: fewer than 2 pairs."""
    _pairs(scores_BB, 2)
    return -F.softplus(-scores_BB.diagonal()).mean() - off_diagonal_mean(F.softplus(scores_BB))


def bound(name: Bound, scores_BB: Tensor, baseline_B: Tensor | None = None, alpha: float = 0.9, rows: Rows = "teacher") -> Tensor:
    """One of the bounds by name.

    Args:
        scores_BB: rows are students' vectors, columns teachers'. baseline_B: log a(y_i) of the teachers' vectors; "mi" and "tuba" alone use it.
        alpha: of "mi". rows: which side's vectors the bound's rows are; "teacher" transposes the scores. For "jsd" it is the same.

    Raises:
        InputError: as the bound's own function; an unknown name.
    """
    scores_BB = scores_BB.T if rows == "teacher" else scores_BB
    match name:
        case "mi":
            return mi_alpha(scores_BB, baseline_B, alpha)
        case "tuba":
            return tuba(scores_BB, baseline_B)
        case "nwj":
            return nwj(scores_BB)
        case "infonce":
            return infonce(scores_BB)
        case "jsd":
            return jsd(scores_BB)
    raise InputError(f"there is no bound '{name}'.", where="intermediate", fix=f"Known: {', '.join(BOUNDS)}.")


def off_diagonal_mean(values_BB: Tensor) -> Tensor:
    """The mean over i ≠ j; what is on the diagonal counts for nothing, even where it is not finite."""
    B = len(values_BB)
    diagonal_BB = torch.eye(B, dtype=torch.bool, device=values_BB.device)
    return values_BB.masked_fill(diagonal_BB, 0.0).sum() / (B * (B - 1))


def _pairs(scores_BB: Tensor, least: int) -> int:
    if scores_BB.dim() != 2 or scores_BB.shape[0] != scores_BB.shape[1] or len(scores_BB) < least:
        raise InputError(
            f"scores of shape {list(scores_BB.shape)}: a bound needs a square of at least {least} pairs.",
            where="train.batch_size",
            fix="Raise the batch size (micro-batches count by themselves), and set train.drop_last.",
        )
    return len(scores_BB)


class Critic(nn.Module):
    """Separate nets for both sides, whose outputs' dot products are the scores: x [B, d_x], y [B, d_y] → [B, B]. The paper's: 2 × 128, out 64.

    hidden: widths of the hidden layers (ReLU). out: k.
    """

    def __init__(self, x_width: int, y_width: int, hidden: Sequence[int] = (128, 128), out: int = 64) -> None:
        super().__init__()
        self.of_x, self.of_y = perceptron(x_width, hidden, out), perceptron(y_width, hidden, out)

    def forward(self, x_Bd: Tensor, y_Bd: Tensor) -> Tensor:
        """s_ij, [B, B]: rows x, columns y."""
        return separable_scores(self.of_x(x_Bd), self.of_y(y_Bd))


class Baseline(nn.Module):
    """The log-baseline log a(y): y [B, d] → [B]. The paper's: 2 × 128."""

    def __init__(self, width: int, hidden: Sequence[int] = (128, 128)) -> None:
        super().__init__()
        self.net = perceptron(width, hidden, 1)

    def forward(self, y_Bd: Tensor) -> Tensor:
        """log a(y), [B]."""
        return self.net(y_Bd)[:, 0]


def perceptron(width: int, hidden: Sequence[int], out: int) -> nn.Sequential:
    """Linear layers with ReLU between them."""
    widths = [width, *hidden, out]
    layers: list[nn.Module] = []
    for before, after in pairwise(widths):
        layers += [nn.Linear(before, after), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def redraw(modules: Iterable[nn.Module], generator: torch.Generator) -> None:
    """Draw the linear layers of these nets anew as PyTorch does, uniform within ±1/√(inputs), from a generator of their own."""
    with torch.no_grad():
        for layer in (layer for module in modules for layer in module.modules() if isinstance(layer, nn.Linear)):
            for values in (layer.weight, layer.bias):
                values.uniform_(-(layer.in_features**-0.5), layer.in_features**-0.5, generator=generator)
