"""Exact self-distillation of kernel ridge regression, checked against published figures (2102.13088, part A of our sheet)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from limbeck import seeds
from limbeck.losses.kernel_ridge import factorise, greedy_schedule, rbf, self_distil
from limbeck.methods.classifiers.self_distillation import SelfDistilledRidge

TOY_TARGETS = (
    0.38476636465198066, 1.2333967683416893, 1.33232242218057, 0.69201594888895180, -0.29756145531871736, -0.24189291901377769,
    -0.7964485769175675, -0.9616480167034174, -0.49672509509916934, -0.3469066003991437, 0.5589512650600734,
)  # fmt: skip
"""The eleven noisy values of a sine at 0, 0.1, …, 1 of Mobahi et al. 2020 (2002.05715), as the notebook of 2102.13088 lists them."""

PUBLISHED = {
    0.0: (0.16477, 0.15076, 0.14915, 0.15561, 0.16735, 0.18251, 0.49505),
    0.25: (0.16477, 0.15309, 0.14958, 0.14903, 0.14946, 0.15011, 0.15250),
    0.35: (0.16477, 0.15424, 0.15089, 0.14983, 0.14954, 0.14948, 0.14959),
}
"""α → MSE to the noiseless sine after rounds 1 to 6 and in the limit: README and notebook of 2102.13088."""

RIDGES = (0.02, 0.2, 1.0, 4.0)


def _sine(x_N: Tensor) -> Tensor:
    return torch.sin(2 * math.pi * x_N)


def toy() -> dict[str, float]:
    """The notebook's eleven points: RBF γ = 80, λ = 0.2, α of 0, 0.25, 0.35.

    Returns:
        alpha_A_round_T and alpha_A_limit: MSE to the noiseless sine on 101 grid points; largest_deviation: from the published figures.
    """
    x_N, grid_M = torch.linspace(0, 1, 11, dtype=torch.float64), torch.linspace(0, 1, 101, dtype=torch.float64)
    Y_N = torch.tensor(TOY_TARGETS, dtype=torch.float64)
    found: dict[str, float] = {}
    deviation = 0.0
    for alpha, published in PUBLISHED.items():
        model = SelfDistilledRidge(rbf(80.0), ridge=0.2, alpha=alpha).fit(x_N, Y_N)
        for t, figure in zip((1, 2, 3, 4, 5, 6, math.inf), published, strict=True):
            error = float((model.predict(grid_M, rounds=t) - _sine(grid_M)).square().mean())
            found[f"alpha_{alpha:g}_" + ("limit" if math.isinf(t) else f"round_{t}")] = error
            deviation = max(deviation, abs(error - figure))
    return found | {"largest_deviation": deviation}


def ridge_table(seed: int, problems: int = 200, rounds: int = 10) -> dict[str, float]:
    """Random problems: 30 points uniform on [0, 1], sine + N(0, 0.5²), as many validation points, RBF γ = 20.

    Returns:
        ridge_L_COLUMN: mean MSE to the noiseless sine on 101 grid points after `rounds` rounds, for the ridges 0.02 to 4 and the columns plain (f_1),
        alpha_0, alpha_0.3, greedy (eq. 7, clipped) and greedy_unclipped. worst_ratio_COLUMN: the largest, over the ridges, of its error divided by
        the best of the four columns with weights in [0, 1]; worst_ratio_best_fixed: the smallest of those of plain, alpha_0 and alpha_0.3.
    """
    kernel, grid_M = rbf(20.0), torch.linspace(0, 1, 101, dtype=torch.float64)
    sums: dict[tuple[float, str], float] = {}
    for problem in range(problems):
        noise = seeds.generator(seed, "ridge_table", problem)
        x_2N = torch.rand(2, 30, generator=noise, dtype=torch.float64)
        (x_N1, held_out_N1), (Y_N1, held_out_Y_N1) = x_2N[..., None], (_sine(x_2N) + 0.5 * torch.randn(2, 30, generator=noise, dtype=torch.float64))[..., None]
        factor, k_MN, k_VN = factorise(kernel(x_N1, x_N1)), kernel(grid_M[:, None], x_N1), kernel(held_out_N1, x_N1)
        for ridge in RIDGES:
            schedules: dict[str, torch.Tensor | list[float]] = {
                "plain": [1.0] * (rounds - 1),
                "alpha_0": [0.0] * (rounds - 1),
                "alpha_0.3": [0.3] * (rounds - 1),
                "greedy": greedy_schedule(factor, Y_N1, k_VN, held_out_Y_N1, ridge, rounds).alphas,
                "greedy_unclipped": greedy_schedule(factor, Y_N1, k_VN, held_out_Y_N1, ridge, rounds, clip=False).alphas,
            }
            for column, alphas in schedules.items():
                predicted_M = (k_MN @ self_distil(factor, Y_N1, alphas, ridge).duals[-1])[:, 0]
                error = float((predicted_M - _sine(grid_M)).square().mean())
                sums[ridge, column] = sums.get((ridge, column), 0.0) + error / problems
    bounded = ("plain", "alpha_0", "alpha_0.3", "greedy")
    best = {ridge: min(sums[ridge, column] for column in bounded) for ridge in RIDGES}
    worst = {f"worst_ratio_{column}": max(sums[ridge, column] / best[ridge] for ridge in RIDGES) for column in bounded}
    fixed = min(worst[f"worst_ratio_{column}"] for column in bounded if column != "greedy")
    return {f"ridge_{ridge:g}_{column}": value for (ridge, column), value in sums.items()} | worst | {"worst_ratio_best_fixed": fixed}
