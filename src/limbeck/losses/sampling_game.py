"""Which items to have labelled when some labels will be wrong: a zero-sum game, its closed form, and drawing from its solution (2210.01213).

A sampler picks how probable each of n items is; an adversary then says which m of them are labelled wrongly. A right label of item i is worth its gain
g_i, a wrong one costs w g_i. Equation numbers are those of our sheet. Gains are positive and finite; everything is float64 inside, without gradient.

Legend: N items, D draws, g gains, m how many labels are wrong, w loss of a wrong one, p probabilities of one draw (Σp = 1), q of a batch (Σq = b, q ≤ 1).
    max_p min_{|M| ≤ m} Σ_{i∉M} p_i g_i − w Σ_{i∈M} p_i g_i       (3, 5)
    p_i = 1/(g_i H_k) for the k largest gains, else 0; H_k = Σ_{i≤k} 1/g_i; k = argmax (k − (1+w)m)/H_k, the game's value      (4, 5)
The paper's part, as our sheet recollects it: the game, its closed form, dependent rounding. Ours: the batch's exact solution, ties, the fallback.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from limbeck.errors import InputError


@dataclass(frozen=True)
class Sampling:
    """A solution of the game.

    probabilities: [N] float64, in [0, 1], in the order of the gains. value: the payoff that it guarantees, whatever the adversary does.
    support: how many items have a positive probability. hopeless: (1+w)m ≥ n, nothing guarantees a gain, and the probabilities are uniform.
    """

    probabilities: Tensor
    value: float
    support: int
    hopeless: bool = False


def worst_labels(probabilities_N: Tensor, gains_N: Tensor, wrong: int) -> Tensor:
    """The adversary's best answer: positions of the m largest products p_i g_i, [min(m, N)] int64. Source: 2210.01213 eq. 3 of our sheet."""
    return (probabilities_N.double() * gains_N.double()).topk(min(wrong, len(gains_N))).indices


def guaranteed_payoff(probabilities_N: Tensor, gains_N: Tensor, wrong: int, wrong_loss: float = 0.0) -> float:
    """Expected payoff of a draw, or of a batch, against the worst m wrong labels.

    Args:
        probabilities_N: [N], p or q. gains_N: [N]. wrong: m ≥ 0. wrong_loss: w ≥ 0. Source: 2210.01213 eq. 3 and 5 of our sheet.
    """
    products_N = probabilities_N.double() * gains_N.double()
    lost = products_N[worst_labels(probabilities_N, gains_N, wrong)].sum()
    return float(products_N.sum() - (1 + wrong_loss) * lost)


def robust_sampling(gains_N: Tensor, wrong: int, wrong_loss: float = 0.0) -> Sampling:
    """The best probabilities of one draw against m wrong labels, in closed form: one sort. Equal gains get equal probabilities.

    Args:
        gains_N: [N], positive and finite. wrong: m ≥ 0. wrong_loss: w ≥ 0.

    m = 0 puts everything on the largest gain. Source: 2210.01213 eq. 4 and 5 of our sheet.

    >>> robust_sampling(torch.tensor([1.0, 0.8, 0.5, 0.2, 0.05]), wrong=1).probabilities
    tensor([0.2353, 0.2941, 0.4706, 0.0000, 0.0000], dtype=torch.float64)

    Raises:
        InputError: there are no gains, one is not positive and finite, or m or w is negative.
    """
    gains_N = _checked(gains_N, wrong, wrong_loss)
    count = len(gains_N)
    if (1 + wrong_loss) * wrong >= count:
        uniform_N = torch.full_like(gains_N, 1 / count)
        return Sampling(uniform_N, guaranteed_payoff(uniform_N, gains_N, wrong, wrong_loss), count, hopeless=True)
    sorted_N, order_N = gains_N.sort(descending=True)
    H_N = sorted_N.reciprocal().cumsum(0)
    value_N = (torch.arange(1, count + 1, dtype=torch.float64) - (1 + wrong_loss) * wrong) / H_N
    best = value_N.max()
    k = int((value_N >= best * (1 - 1e-12)).nonzero()[-1]) + 1  # the largest of equally good ones: so ties stay together
    p_N = torch.zeros_like(gains_N)
    p_N[order_N[:k]] = 1 / (sorted_N[:k] * H_N[k - 1])
    return Sampling(p_N, float(value_N[k - 1]), k)


def robust_batch(gains_N: Tensor, budget: int, wrong: int, wrong_loss: float = 0.0) -> Sampling:
    """The best inclusion probabilities q of a batch of b different items: q ∈ [0, 1], Σq = b, the payoff with q in place of p.

    Args:
        gains_N: [N], positive and finite. budget: b, 1 to N. wrong: m ≥ 0. wrong_loss: w ≥ 0.

    Where b·max p ≤ 1, q = b p. Else q is capped. With a level t, the payoff is the maximum over t of
        F(t) = max_q Σ_i φ_i(q_i) − (1+w) m t,    φ_i: slope g_i up to q = min(t/g_i, 1), slope −w g_i from there to 1,
    (the m largest products cost min_t m t + Σ (q_i g_i − t)₊), and the inner maximum is filled greedily, steepest slopes first: min(t/g_i, 1) in decreasing
    order of g until b is used up, and, should anything be left, up to 1 in increasing order. F is concave; its slope is bisected.
    m = 0 gives the b largest gains. Source: 2210.01213 eq. 6 of our sheet; the loss in it, and bisection where it has golden section, are ours.

    Raises:
        InputError: as `robust_sampling`, or b is not between 1 and N.
    """
    gains_N = _checked(gains_N, wrong, wrong_loss)
    _check_budget(budget, len(gains_N))
    one = robust_sampling(gains_N, wrong, wrong_loss)
    q_N = budget * one.probabilities
    if float(q_N.max()) > 1:
        q_N = _capped(gains_N, budget, wrong, wrong_loss)
    value = guaranteed_payoff(q_N, gains_N, wrong, wrong_loss)
    return Sampling(q_N, value, int((q_N > 0).sum()), one.hopeless)


def _capped(gains_N: Tensor, budget: int, wrong: int, wrong_loss: float) -> Tensor:
    """q of `robust_batch` where the cap at 1 binds."""
    sorted_N, order_N = gains_N.sort(descending=True)
    low, high = 0.0, float(sorted_N[0])
    for _ in range(200):
        level = (low + high) / 2
        if level in (low, high):
            break
        price = _filled(sorted_N, level, budget, wrong_loss)[1]
        slope = float((1 - price / sorted_N[sorted_N > level]).clamp(0, 1 + wrong_loss).sum()) - (1 + wrong_loss) * wrong
        low, high = (level, high) if slope > 0 else (low, level)
    nearest = float(sorted_N[(sorted_N - high).abs().argmin()])
    level = nearest if math.isclose(nearest, high, rel_tol=1e-12) else high  # a level at a gain makes its q exactly 1
    q_N = torch.empty_like(gains_N)
    q_N[order_N] = _filled(sorted_N, level, budget, wrong_loss)[0]
    _, group_N, size_K = gains_N.unique(return_inverse=True, return_counts=True)  # equal gains share: the payoff is concave and symmetric in them
    sum_K = torch.zeros(len(size_K), dtype=torch.float64).index_add_(0, group_N, q_N)
    return (sum_K / size_K)[group_N].clamp(max=1.0)


def _filled(sorted_N: Tensor, level: float, budget: int, wrong_loss: float) -> tuple[Tensor, float]:
    """The greedy fill at a level t, and the price of budget: the slope at which the next bit of it would be spent."""
    first_N = (level / sorted_N).clamp(max=1.0)
    before_N = first_N.cumsum(0) - first_N
    left = budget - float(first_N.sum())
    if left <= 0:
        q_N = (budget - before_N).clamp(min=0).minimum(first_N)
        return q_N, float(sorted_N[int((before_N < budget).sum()) - 1])
    room_N = 1 - first_N
    after_N = room_N.flip(0).cumsum(0).flip(0) - room_N
    beyond_N = (left - after_N).clamp(min=0).minimum(room_N)
    last = len(sorted_N) - int(((after_N < left) & (room_N > 0)).sum() + (room_N == 0).sum())
    return first_N + beyond_N, -wrong_loss * float(sorted_N[last])


def proportional_batch(weights_N: Tensor, budget: int) -> Tensor:
    """Inclusion probabilities proportional to the weights, capped at 1 and what is left redistributed: q_i = min(c w_i, 1), Σq = b, [N] float64.

    Args:
        weights_N: [N], positive and finite. budget: b, 1 to N.

    Raises:
        InputError: a weight is not positive and finite, or b is not between 1 and N.
    """
    weights_N = _checked(weights_N, 0, 0.0)
    _check_budget(budget, len(weights_N))
    sorted_N, order_N = weights_N.sort(descending=True)
    rest_N = sorted_N.flip(0).cumsum(0).flip(0)
    scale_N = (budget - torch.arange(len(sorted_N), dtype=torch.float64)) / rest_N  # c where the k largest are at 1
    fits_N = (scale_N * sorted_N <= 1) | (scale_N <= 0)
    capped = int(fits_N.nonzero()[0]) if bool(fits_N.any()) else len(sorted_N)
    q_N = torch.ones_like(weights_N)
    q_N[order_N[capped:]] = scale_N[capped].clamp(min=0) * sorted_N[capped:] if capped < len(sorted_N) else 1.0
    return q_N.clamp(max=1.0)


def dependent_rounding(probabilities_N: Tensor, generator: torch.Generator, draws: int = 1) -> Tensor:
    """Sets of exactly b = Σq different items with P(i in the set) = q_i, whose memberships are negatively correlated: [D, b] int64, sorted.

    Pairs of undecided items play each other, in the order of a random permutation drawn for every set: mass moves within a pair at random, keeping its sum
    and both expectations, until one is 0 or 1; the other goes on. As a tournament it takes log N vectorised rounds.

    Args:
        probabilities_N: [N] in [0, 1], with a whole sum. generator: on the CPU; the same state gives the same sets. draws: D, how many sets.

    Raises:
        InputError: a probability is outside [0, 1] or the sum is not whole (within 1e-6). Source: 2210.01213 item 7 of our sheet; the tournament is ours.
    """
    q_N = probabilities_N.detach().cpu().double()
    total = float(q_N.sum())
    if not bool(((q_N >= 0) & (q_N <= 1)).all()) or abs(total - round(total)) > 1e-6:
        raise InputError(f"inclusion probabilities must be in [0, 1] with a whole sum, theirs is {total:.6g}.", where="probabilities")
    certain_K, open_M = (q_N == 1).nonzero()[:, 0], ((q_N > 0) & (q_N < 1)).nonzero()[:, 0]
    chosen_DN = torch.zeros(draws, len(q_N), dtype=torch.bool)
    chosen_DN[:, certain_K] = True
    if len(open_M):
        item_DM = open_M[torch.rand(draws, len(open_M), generator=generator, dtype=torch.float64).argsort(1)]
        mass_DM = q_N[item_DM]
        while item_DM.shape[1] > 1:
            item_DM, mass_DM = _play(item_DM, mass_DM, chosen_DN, generator)
        chosen_DN.scatter_(1, item_DM, mass_DM > 0.5)  # the last one's mass is whole, up to rounding
    return chosen_DN.nonzero()[:, 1].view(draws, round(total))


def _play(item_DM: Tensor, mass_DM: Tensor, chosen_DN: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """One round of the tournament: the decided half is noted in `chosen_DN`; those that go on, and their mass, are returned."""
    pairs = item_DM.shape[1] // 2
    (a_DP, b_DP), (i_DP, j_DP) = ((x[:, : 2 * pairs : 2], x[:, 1 : 2 * pairs : 2]) for x in (mass_DM, item_DM))
    sum_DP = a_DP + b_DP
    over_DP = sum_DP > 1
    # sum ≤ 1: i keeps it all with probability a/sum, the other is out; sum > 1: i is in for sure with probability (1 − b)/(2 − sum), the other keeps sum − 1
    first_DP = torch.where(over_DP, (1 - b_DP) / (2 - sum_DP).clamp(min=1e-300), a_DP / sum_DP.clamp(min=1e-300))
    heads_DP = torch.rand(sum_DP.shape, generator=generator, dtype=torch.float64) < first_DP
    decided_DP = torch.where(heads_DP == over_DP, i_DP, j_DP)
    chosen_DN.scatter_(1, decided_DP, over_DP)
    on_DP, left_DP = torch.where(heads_DP == over_DP, j_DP, i_DP), torch.where(over_DP, sum_DP - 1, sum_DP)
    return torch.cat([on_DP, item_DM[:, 2 * pairs :]], 1), torch.cat([left_DP, mass_DM[:, 2 * pairs :]], 1)


def _checked(gains_N: Tensor, wrong: int, wrong_loss: float) -> Tensor:
    gains_N = gains_N.detach().double()
    if gains_N.ndim != 1 or not len(gains_N) or not bool((gains_N.isfinite() & (gains_N > 0)).all()):
        raise InputError("gains must be [N] positive finite numbers, N ≥ 1.", where="gains", fix="Put a floor under them, say 1e-6.")
    if wrong < 0 or not wrong_loss >= 0:
        raise InputError(f"{wrong} wrong labels at a loss of {wrong_loss}: neither may be negative.", where="wrong")
    return gains_N


def _check_budget(budget: int, count: int) -> None:
    if not 1 <= budget <= count:
        raise InputError(f"a batch of {budget} cannot be drawn from {count} items.", where="budget", fix=f"Between 1 and {count} are possible.")
