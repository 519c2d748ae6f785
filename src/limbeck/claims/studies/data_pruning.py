"""The bias of a distilled ridge regression on pruned data, counted over noise draws and against its formula (2403.07854 item 3 of our sheet)."""

from __future__ import annotations

import torch

from limbeck import seeds
from limbeck.losses.ridge_distillation import distillation_bias, distilled_ridge, isotropic_bias_factor, ridge_fit

ALPHAS = (0.0, 0.5, 1.0)


def ridge_bias(
    seed: int, features: int = 10, samples: int = 200, draws: int = 2000, fraction: float = 0.1, ridge: float = 5.0, noise: float = 2.0
) -> dict[str, float]:
    """Students on a fraction f of N samples with teachers on f_t = f (the same samples), 0.5 and 1, for α of 0, 0.5 and 1, over draws of the labels' noise.

    Args:
        seed: of samples, truth and noise. features: D. samples: N. draws: of the noise. fraction: f. ridge: λ. noise: standard deviation of the labels' noise.

    Returns:
        largest_deviation: of the mean estimate from the bias formula, in standard errors, over 7 students × D coordinates (of Gaussian numbers: above 4 in
        one of 200 studies). largest_exact_deviation: of the estimate without noise from the formula, and of the isotropic factor from it.
        bias_A_T, error_A_T: ‖E[θ_s] − θ*‖ and E‖θ_s − θ*‖², for α = A and teachers T of 'pruned', 'half' and 'full' ('labels' for α = 0).
        error_ratio_pruned, error_ratio_labels: the error with the full teacher and α = 1 divided by that with the pruned teacher, and by that of the labels.
    """
    noise_of = seeds.generator(seed, "ridge_bias")
    X_DN = torch.randn(features, samples, generator=noise_of, dtype=torch.float64)
    truth_D = torch.randn(features, generator=noise_of, dtype=torch.float64)
    clean_N = truth_D @ X_DN
    noisy_RN = clean_N + noise * torch.randn(draws, samples, generator=noise_of, dtype=torch.float64)
    kept = round(fraction * samples)
    found: dict[str, float] = {}
    largest, exact = 0.0, _isotropic_deviation(features, ridge)
    X_DM = X_DN[:, :kept]
    for alpha in ALPHAS:
        for name, taught in (("pruned", kept), ("half", samples // 2), ("full", samples)) if alpha else (("labels", samples),):
            X_DT = X_DN[:, :taught]
            bias_D = distillation_bias(X_DM, X_DT, truth_D, ridge, alpha)
            without_D = distilled_ridge(X_DM, clean_N[:kept], ridge_fit(X_DT, clean_N[:taught], ridge), ridge, alpha) - truth_D
            error_RD = distilled_ridge(X_DM, noisy_RN[:, :kept], ridge_fit(X_DT, noisy_RN[:, :taught], ridge), ridge, alpha) - truth_D
            stderr_D = error_RD.std(0) / draws**0.5
            largest = max(largest, float(((error_RD.mean(0) - bias_D).abs() / stderr_D).max()))
            exact = max(exact, float((without_D - bias_D).abs().max()))
            found[f"bias_{alpha:g}_{name}"] = float(bias_D.norm())
            found[f"error_{alpha:g}_{name}"] = float(error_RD.square().sum(1).mean())
    ratios = {f"error_ratio_{name}": found["error_1_full"] / found[other] for name, other in (("pruned", "error_1_pruned"), ("labels", "error_0_labels"))}
    return {"largest_deviation": largest, "largest_exact_deviation": exact} | ratios | found


def _isotropic_deviation(features: int, ridge: float) -> float:
    """Largest difference between factor and formula where X Xᵀ is a multiple of I: 4 D samples, the student on a quarter, teachers on a quarter and on all."""
    total = 4 * features
    block_DD = (total / 4) ** 0.5 * torch.eye(features, dtype=torch.float64)  # X_f X_fᵀ = fN·I for every f of quarters
    X_DN, truth_D = block_DD.repeat(1, 4), torch.linspace(-1, 1, features, dtype=torch.float64)
    worst = 0.0
    for alpha in ALPHAS:
        for quarters in (1, 4):
            bias_D = distillation_bias(X_DN[:, :features], X_DN[:, : quarters * features], truth_D, ridge, alpha)
            worst = max(worst, float((bias_D + isotropic_bias_factor(0.25, quarters / 4, total, ridge, alpha) * truth_D).abs().max()))
    return worst
