"""How close a set of generated samples is to a set of real ones: Fréchet and kernel distances, manifolds, transport, modes.

Legend: N real and M fake samples of F features (or F coordinates), real_NF and fake_MF; K modes. A feature has the unit of what it was computed from:
`features.Extractor` gives features of inputs in network units; points may come in network or in data units, real and fake in the same.

Everything is computed in float64 on the device of `real`, without gradient, and returned as Python floats. Memory is bounded: pairs are looked at in blocks
of at most 32 MiB. Nothing depends on the order of the samples, but for what is drawn (`SUBSET`, `precision_recall`, `density_coverage`, `block_bootstrap`).
Every function raises InputError for a wrong shape, too few samples (the least number is in its docstring) or a value that is not finite.
Compare arms at equal N, and beside "real against real" (two halves of real data): most of these have a floor above 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from limbeck import seeds
from limbeck.errors import InputError

BLOCK = 2**22
"""Pairs looked at at once: 32 MiB of float64."""
MANIFOLD = 5000
"""The most samples of each side that a k-nearest-neighbour manifold is made of."""
SUBSET = 2000
"""The most real samples that the median distance is taken over."""
DIRECT = 16
"""Up to this many features distances are summed directly; above, they come from inner products (fast, relative error about 1e-8 near 0)."""
BANDWIDTHS = (0.5, 1.0, 2.0)
"""The factors of the median distance whose RBF kernels `mmd2` sums."""


@dataclass(frozen=True)
class PrecisionRecall:
    """precision: share of the fake samples in the real manifold (quality); recall: share of the real ones in the fake manifold (variety). In [0, 1]."""

    precision: float
    recall: float


@dataclass(frozen=True)
class DensityCoverage:
    """density: how crowded real neighbourhoods are with fake samples, ≥ 0, expected 1 at equality; coverage: share of them with one, in [0, 1]."""

    density: float
    coverage: float


@dataclass(frozen=True)
class ModeCoverage:
    """covered: modes that are found, of `modes`; outliers: share of the points far from every mode; total_variation: of the mode frequencies, in [0, 1]."""

    covered: int
    modes: int
    outliers: float
    total_variation: float


@dataclass(frozen=True)
class Interval:
    """The mean over blocks and its bootstrap interval, in the unit of the statistic."""

    value: float
    low: float
    high: float


def _matrix(values: Tensor, name: str, least: int) -> Tensor:
    """[N, F] float64 without gradient; raises InputError where it is no such thing, or holds too few rows."""
    if values.dim() != 2 or values.shape[1] < 1 or values.is_complex():
        raise InputError(f"'{name}' must be [samples, features], not {list(values.shape)}.", where=name, fix="Flatten images, or extract features first.")
    if len(values) < least:
        raise InputError(f"'{name}' has {len(values)} samples, at least {least} are needed.", where=name, fix="Generate more samples.")
    found = values.detach().double()
    wrong = int((~torch.isfinite(found)).any(1).sum())
    if wrong:
        raise InputError(f"{wrong} of the {len(found)} samples in '{name}' hold NaN or infinity.", where=name, fix="Look at the generator: did it diverge?")
    return found


def _pair(real_NF: Tensor, fake_MF: Tensor, least: int, names: tuple[str, str] = ("real", "fake")) -> tuple[Tensor, Tensor]:
    real, fake = _matrix(real_NF, names[0], least), _matrix(fake_MF, names[1], least)
    if real.shape[1] != fake.shape[1]:
        what = f"'{names[0]}' has {real.shape[1]} features and '{names[1]}' {fake.shape[1]}."
        raise InputError(what, where=names[1], fix="Make both with the same extractor, in the same units.")
    return real, fake.to(real.device)


def _at_least(value: int, least: int, name: str) -> None:
    if value < least:
        raise InputError(f"'{name}' is {value}, at least {least} is needed.", where=name)


# ---- pairs of samples, in blocks ------------------------------------------------------------------------------------------


def _rows(count: int, columns: int) -> Iterator[slice]:
    step = max(1, BLOCK // columns)
    return (slice(start, min(start + step, count)) for start in range(0, count, step))


def _squared_distances(a_NF: Tensor, b_MF: Tensor) -> Tensor:
    """|a_i − b_j|², [N, M]."""
    if a_NF.shape[1] <= DIRECT:
        return torch.cdist(a_NF, b_MF, compute_mode="donot_use_mm_for_euclid_dist").square_()
    squares = a_NF.square().sum(1)[:, None] + b_MF.square().sum(1)
    return squares.addmm_(a_NF, b_MF.T, alpha=-2).clamp_min_(0)


def _distances(a_NF: Tensor, b_MF: Tensor) -> Tensor:
    """|a_i − b_j|, [N, M]."""
    return _squared_distances(a_NF, b_MF).sqrt_()


def _within(kernel: Callable[[Tensor, Tensor], Tensor], x_NF: Tensor) -> float:
    """Σ_{i≠j} k(x_i, x_j) of a symmetric kernel."""
    total = 0.0
    for rows in _rows(len(x_NF), len(x_NF)):
        k = kernel(x_NF[rows], x_NF[rows.start :])
        square = k[:, : len(k)]
        total += float(square.sum() - square.diagonal().sum() + 2 * k[:, len(k) :].sum())
    return total


def _between(kernel: Callable[[Tensor, Tensor], Tensor], x_NF: Tensor, y_MF: Tensor) -> float:
    """Σ_{i,j} k(x_i, y_j)."""
    return math.fsum(float(kernel(x_NF[rows], y_MF).sum()) for rows in _rows(len(x_NF), len(y_MF)))


def _unbiased_mmd2(kernel: Callable[[Tensor, Tensor], Tensor], x_NF: Tensor, y_MF: Tensor) -> float:
    """The U-statistic of MMD² (Gretton et al. 2012, eq. 3)."""
    n, m = len(x_NF), len(y_MF)
    return _within(kernel, x_NF) / (n * (n - 1)) + _within(kernel, y_MF) / (m * (m - 1)) - 2 * _between(kernel, x_NF, y_MF) / (n * m)


# ---- Fréchet distance -----------------------------------------------------------------------------------------------------


def frechet_distance(mean_F: Tensor, covariance_FF: Tensor, other_mean_F: Tensor, other_covariance_FF: Tensor) -> float:
    """Squared 2-Wasserstein distance of two Gaussians: |μ1 − μ2|² + Tr(C1 + C2 − 2 (C1^½ C2 C1^½)^½), by two symmetric eigendecompositions.

    Args:
        mean_F, other_mean_F: [F]. covariance_FF, other_covariance_FF: [F, F], symmetric, ≥ 0; what rounding puts below 0 counts as 0.

    Returns:
        In the squared unit of a feature, ≥ 0; good to about F · 1e-8 · (largest variance) where covariances are singular.

    Source: Dowson & Landau 1982; our sheet §9.
    """
    c1, c2 = covariance_FF.double(), other_covariance_FF.double()
    eigenvalues, vectors = torch.linalg.eigh(c1)
    root = (vectors * eigenvalues.clamp_min(0).sqrt()) @ vectors.T
    inner = root @ c2 @ root
    cross = torch.linalg.eigvalsh((inner + inner.T) / 2).clamp_min(0).sqrt().sum()
    squared = (mean_F.double() - other_mean_F.double()).square().sum() + c1.trace() + c2.trace() - 2 * cross
    return max(float(squared), 0.0)


def fid(real_NF: Tensor, fake_MF: Tensor) -> float:
    """Fréchet distance of the Gaussians fitted to both sets (covariances with N − 1), as FID is reported: squared, not its root.

    Args:
        real_NF: [N, F]. fake_MF: [M, F]. N, M ≥ 2; use N ≥ 50 F and the same N for all arms, for the bias is about c/N.

    Returns:
        In the squared unit of a feature, ≥ 0. Only comparable between the same features (`Extractor.fingerprint`).

    Source: 1706.08500 eq. 6.
    """
    for name, values in (("real", real_NF), ("fake", fake_MF)):
        if values.dim() == 2 and len(values) < 2:
            raise InputError(
                f"FID needs a covariance, and so 2 samples or more; '{name}' has {len(values)}.", where=name, fix="Use 50 samples a feature, or mmd2."
            )
    real, fake = _pair(real_NF, fake_MF, 2)
    # torch.cov gives a number, no matrix, for one feature
    covariances = [torch.atleast_2d(torch.cov(values.T)) for values in (real, fake)]
    return frechet_distance(real.mean(0), covariances[0], fake.mean(0), covariances[1])


# ---- kernel distances -----------------------------------------------------------------------------------------------------


def _cubic(a_NF: Tensor, b_MF: Tensor) -> Tensor:
    base = (a_NF @ b_MF.T).div_(a_NF.shape[1]).add_(1)
    return base * base * base


def kid(real_NF: Tensor, fake_MF: Tensor) -> float:
    """Kernel inception distance: the unbiased estimate of MMD² with k(a, b) = (a·b/F + 1)³, over all pairs at once.

    Args:
        real_NF: [N, F]. fake_MF: [M, F]. N, M ≥ 2, which may differ.

    Returns:
        As it is, not the usual × 1000; below 0 by chance where the sets are alike. The kernel is neither bounded nor free of units: it moves with the
        features' scale and origin.

    Source: 1801.01401 section 4.
    """
    return _unbiased_mmd2(_cubic, *_pair(real_NF, fake_MF, 2))


def median_bandwidth(real_NF: Tensor) -> float:
    """The median of |x_i − x_j|, i < j, in the unit of a feature; of `SUBSET` samples drawn by a fixed seed where there are more. N ≥ 2.

    Raises:
        InputError: the median is 0.
    """
    real = _drawn(_matrix(real_NF, "real", 2), SUBSET, 0, "bandwidth")
    found = float(torch.nn.functional.pdist(real).median()) if real.shape[1] <= DIRECT else _median_by_products(real)
    if found == 0:
        raise InputError("half of the real samples coincide: their median distance is 0.", where="real", fix="Give 'bandwidth'.")
    return found


def _median_by_products(x_NF: Tensor) -> float:
    centred = x_NF - x_NF.mean(0)
    upper = torch.ones(len(x_NF), len(x_NF), dtype=torch.bool, device=x_NF.device).triu_(1)
    return float(_distances(centred, centred)[upper].median())


def mmd2(real_NF: Tensor, fake_MF: Tensor, *, bandwidth: float | None = None) -> float:
    """The unbiased estimate of MMD² with the kernel Σ_s exp(−|a − b|² / (2 (s h)²)), s = 0.5, 1, 2.

    Args:
        real_NF: [N, F]. fake_MF: [M, F]. N, M ≥ 2, which may differ. bandwidth: h, in the unit of a feature; None: `median_bandwidth(real)`, so that
            arms measured against the same real set share it.

    Returns:
        Without unit, at most 6; below 0 by chance where the sets are alike.

    Raises:
        InputError: h is not positive, or the real set's median distance is 0.

    Source: Gretton et al. 2012 (0805.2368) eq. 3; the sum of bandwidths is ours (sheet §9).
    """
    real, fake = _pair(real_NF, fake_MF, 2)
    h = median_bandwidth(real) if bandwidth is None else bandwidth
    if not (h > 0 and math.isfinite(h)):
        raise InputError(f"the bandwidth is {h}.", where="bandwidth", fix="Give a positive number, or None.")
    centre = real.mean(0)

    def kernel(a_NF: Tensor, b_MF: Tensor) -> Tensor:
        wide = _squared_distances(a_NF, b_MF).mul_(-0.125 / h**2).exp_()  # s = 2; its 4th power is s = 1, its 16th s = 0.5
        middle = wide.square().square_()
        return wide.add_(middle).add_(middle.square_().square_())

    return _unbiased_mmd2(kernel, real - centre, fake - centre)


def block_bootstrap(
    real_NF: Tensor,
    fake_MF: Tensor,
    metric: Literal["kid", "mmd2"] = "mmd2",
    *,
    blocks: int = 20,
    resamples: int = 2000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Interval:
    """A bootstrap interval of `kid` or `mmd2`: both sets are shuffled and cut into blocks, and the statistics of the blocks are resampled.

    The statistic is unbiased in every block, so their mean estimates the same thing as the whole sets do, with a spread that is about the same where the
    sets differ and larger where they do not (the interval is then too wide rather than too narrow). FID is biased by its sample size: no block says what
    the whole set would. The percentiles are moved outward for the small number of blocks (Hesterberg 2015, "expanded percentile").

    Args:
        real_NF: [N, F]. fake_MF: [M, F]. N, M ≥ 2 · blocks. blocks: at least 2. resamples: bootstrap draws. confidence: in (0, 1).
        seed: of the shuffle and of the draws. The bandwidth of `mmd2` is that of the whole real set.

    Raises:
        InputError: there are fewer than 2 samples a block, or the metric is another one.

    Source: the block statistic 1307.1954; the interval ours.
    """
    from scipy.special import ndtr, stdtrit

    if metric not in ("kid", "mmd2"):
        raise InputError(f"'{metric}' has no block interval.", where="metric", fix="Known: kid, mmd2, whose estimates are unbiased at any number of samples.")
    _at_least(blocks, 2, "blocks")
    _at_least(resamples, 1, "resamples")
    if not 0 < confidence < 1:
        raise InputError(f"'confidence' is {confidence}, not between 0 and 1.", where="confidence")
    real, fake = _pair(real_NF, fake_MF, 2 * blocks)
    h = median_bandwidth(real) if metric == "mmd2" else None
    generator = seeds.generator(seed, "block bootstrap")
    parts = [values[torch.randperm(len(values), generator=generator).to(values.device)].tensor_split(blocks) for values in (real, fake)]
    found = [kid(r, f) if h is None else mmd2(r, f, bandwidth=h) for r, f in zip(*parts, strict=True)]
    values_B = torch.tensor(found, dtype=torch.float64)
    means = values_B[torch.randint(blocks, (resamples, blocks), generator=generator)].mean(1)
    tail = float(ndtr(math.sqrt(blocks / (blocks - 1)) * stdtrit(blocks - 1, (1 - confidence) / 2)))
    low, high = means.quantile(torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return Interval(float(values_B.mean()), low, high)


# ---- k-nearest-neighbour manifolds ------------------------------------------------------------------------------------------


def _drawn(values_NF: Tensor, count: int, seed: int, purpose: str) -> Tensor:
    """`count` rows, the same for the same number of rows; all of them, in order, where there are no more."""
    if len(values_NF) <= count:
        return values_NF
    return values_NF[torch.randperm(len(values_NF), generator=seeds.generator(seed, purpose))[:count].to(values_NF.device)]


def _equal_sets(real_NF: Tensor, fake_MF: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """As many real as fake samples, at most `MANIFOLD`, centred on the real mean."""
    _at_least(k, 1, "k")
    real, fake = _pair(real_NF, fake_MF, k + 1)
    count = min(len(real), len(fake), MANIFOLD)
    centre = real.mean(0) if real.shape[1] > DIRECT else 0  # for the accuracy of inner products; sums of differences need no centre
    return _drawn(real, count, 0, "real manifold") - centre, _drawn(fake, count, 0, "fake manifold") - centre


def _radii(x_NF: Tensor, k: int) -> Tensor:
    """The distance of each sample to its k-th nearest other sample, [N]."""
    found = []
    for rows in _rows(len(x_NF), len(x_NF)):
        distances = _distances(x_NF[rows], x_NF)
        distances[torch.arange(len(distances)), torch.arange(rows.start, rows.stop)] = math.inf
        found.append(distances.kthvalue(k, dim=1).values)
    return torch.cat(found)


def precision_recall(real_NF: Tensor, fake_MF: Tensor, k: int = 3) -> PrecisionRecall:
    """Improved precision and recall: a manifold is the union of closed balls around its samples that reach to the k-th nearest of the others.

    Args:
        real_NF: [N, F]. fake_MF: [M, F]. N, M > k; both sides are cut to the smaller N, at most `MANIFOLD`, drawn by a fixed seed. k: neighbours.

    Two sets of one distribution do not give 1: two of 5000 normal samples give 0.98 in the plane and 0.6 in 64 dimensions (measured). Recall is noisy:
    read `density_coverage` too.
    Source: 1904.06991 eqs. 1 and 2.
    """
    real, fake = _equal_sets(real_NF, fake_MF, k)
    real_radii, fake_radii = _radii(real, k), _radii(fake, k)
    inside, reached = 0, torch.zeros(len(real), dtype=torch.bool, device=real.device)
    for rows in _rows(len(fake), len(real)):
        distances = _distances(fake[rows], real)
        inside += int((distances <= real_radii).any(1).sum())
        reached |= (distances <= fake_radii[rows, None]).any(0)
    return PrecisionRecall(inside / len(fake), float(reached.double().mean()))


def density_coverage(real_NF: Tensor, fake_MF: Tensor, k: int = 5) -> DensityCoverage:
    """Density and coverage: real balls alone, open, up to the k-th nearest other real sample; density counts how many hold each fake sample, over k.

    Args:
        real_NF: [N, F]. fake_MF: [M, F]. N, M > k; both sides are cut to the smaller N, at most `MANIFOLD`, drawn by a fixed seed. k: neighbours.

    For two sets of one distribution the expectations are 1 and 1 − 2^{−k} nearly (0.97 at k = 5). One outlier of the real set cannot raise them as it
    raises precision.
    Source: 2002.09797 eqs. 3 and 5; the strict inequality is its code's.
    """
    real, fake = _equal_sets(real_NF, fake_MF, k)
    radii = _radii(real, k)
    hits, covered = 0, torch.zeros(len(real), dtype=torch.bool, device=real.device)
    for rows in _rows(len(fake), len(real)):
        within = _distances(fake[rows], real) < radii
        hits += int(within.sum())
        covered |= within.any(0)
    return DensityCoverage(hits / (k * len(fake)), float(covered.double().mean()))


# ---- transport, energy, histograms ------------------------------------------------------------------------------------------


def sliced_wasserstein(real_NF: Tensor, fake_MF: Tensor, projections: int = 256, seed: int = 0) -> float:
    """The mean over random unit directions θ of the 1-Wasserstein distance between θ·real and θ·fake.

    Args:
        real_NF: [N, F]. fake_MF: [M, F]. N, M ≥ 1, which may differ: each 1-D distance is the exact ∫ |F⁻¹(u) − G⁻¹(u)| du of the step quantiles.
        projections: directions. seed: of the directions, which are the same for all arms.

    Returns:
        In the unit of a feature. A shift by δ gives |δ| E|θ_1|: 2/π |δ| in the plane. The floor of equal distributions falls as 1/√N.

    Source: order 1 of Rabin et al. 2011; Bonneel et al. 2015.
    """
    real, fake = _pair(real_NF, fake_MF, 1)
    _at_least(projections, 1, "projections")
    directions_PF = torch.randn(projections, real.shape[1], dtype=torch.float64, generator=seeds.generator(seed, "directions"))
    directions_PF = (directions_PF / directions_PF.norm(dim=1, keepdim=True)).to(real.device)
    n, m = len(real), len(fake)
    steps = torch.cat((torch.arange(1, n + 1) * (math.lcm(n, m) // n), torch.arange(1, m + 1) * (math.lcm(n, m) // m))).unique().to(real.device)
    width_U = steps.diff(prepend=steps.new_zeros(1)).double() / math.lcm(n, m)  # between neighbouring jumps of either quantile function
    total = 0.0
    for rows in _rows(projections, 2 * (n + m)):
        x, y = ((values @ directions_PF[rows].T).T.sort(dim=1).values for values in (real, fake))
        if n != m:
            x, y = x[:, (steps - 1) // (math.lcm(n, m) // n)], y[:, (steps - 1) // (math.lcm(n, m) // m)]
        total += float(((x - y).abs_() @ width_U).sum())
    return total / projections


def energy_distance(real_NF: Tensor, fake_MF: Tensor) -> float:
    """2 E|X − Y| − E|X − X'| − E|Y − Y'| of the two empirical distributions (the V-statistic, without a root).

    Args:
        real_NF: [N, F]. fake_MF: [M, F]. N, M ≥ 1, which may differ.

    Returns:
        In the unit of a feature, ≥ 0, and 0 exactly where the two sets hold the same points in the same shares. Its floor for equal distributions is
        (1/N + 1/M) E|X − X'|: compare at equal N.

    Source: Székely & Rizzo 2013 (scipy.stats.energy_distance is its root, in one dimension).
    """
    real, fake = _pair(real_NF, fake_MF, 1)
    centre = real.mean(0) if real.shape[1] > DIRECT else 0
    x, y = real - centre, fake - centre
    found = 2 * _between(_distances, x, y) / (len(x) * len(y)) - _within(_distances, x) / len(x) ** 2 - _within(_distances, y) / len(y) ** 2
    return max(found, 0.0)


def histogram_l1(real_N2: Tensor, fake_N2: Tensor, bins: int = 40) -> float:
    """Σ |p − q| over the cells of a bins × bins grid on the real set's bounding box; what lies outside of it shares one more cell.

    Args:
        real_N2: [N, 2]. fake_N2: [M, 2]. N, M ≥ 1, which may differ. bins: a side.

    Returns:
        In [0, 2], twice the total variation; not symmetric, for the box is the real set's. With few points a cell the floor is high: about
        √(2/π) Σ √(p (1/N + 1/M)).
    """
    real, fake = _pair(real_N2, fake_N2, 1)
    _at_least(bins, 1, "bins")
    if real.shape[1] != 2:
        raise InputError(f"the histogram is of points in the plane, these have {real.shape[1]} coordinates.", where="real", fix="Use sliced_wasserstein.")
    low, high = real.min(0).values, real.max(0).values
    extent = torch.where(high > low, high - low, 1.0)

    def shares(points_N2: Tensor) -> Tensor:
        cells_N2 = ((points_N2 - low) / extent * bins).floor().clamp(0, bins - 1).long()  # the upper edge belongs to the last cell
        outside_N = ((points_N2 < low) | (points_N2 > high)).any(1)
        cells_N = (cells_N2[:, 0] * bins + cells_N2[:, 1]).masked_fill(outside_N, bins * bins)
        return torch.bincount(cells_N, minlength=bins * bins + 1).double() / len(points_N2)

    return float((shares(real) - shares(fake)).abs().sum())


# ---- known modes, paired samples --------------------------------------------------------------------------------------------


def mode_coverage(points_N2: Tensor, means_K2: Tensor, std: float | Tensor, weights_K: Tensor | None = None) -> ModeCoverage:
    """What became of the modes of a known mixture Σ_k π_k N(m_k, s_k² I). Each point belongs to its nearest mode, in units of s_k.

    Args:
        points_N2: [N, F] generated points, in the units of the means. means_K2: [K, F]. std: s, one number or [K]. weights_K: π, [K] positive, need not
            sum to 1; None: equal.

    Returns:
        covered: modes with at least 0.2 of their expected N π_k points within 3 s. outliers: share of the points more than 4 s from every mode (in the
        plane a perfect sampler has 0.03 %). total_variation: ½ Σ |n_k/N − π_k|, n_k over all points, outliers too.

    Raises:
        InputError: also where s or π is not positive, or their number is not K.

    Source: our sheet §9.
    """
    points, means = _pair(points_N2, means_K2, 1, ("points", "means"))
    modes = len(means)
    spread_K = torch.as_tensor(std, dtype=torch.float64, device=points.device)
    spread_K = spread_K.expand(modes) if spread_K.dim() == 0 else spread_K
    share_K = torch.ones(modes, dtype=torch.float64, device=points.device) if weights_K is None else weights_K.to(points)
    for name, values in (("std", spread_K), ("weights", share_K)):
        if values.shape != (modes,) or not bool((values > 0).all() & torch.isfinite(values).all()):
            raise InputError(f"'{name}' must be positive, one for each of the {modes} modes.", where=name)
    share_K = share_K / share_K.sum()
    reach_N, nearest_N = (torch.cdist(points, means, compute_mode="donot_use_mm_for_euclid_dist") / spread_K).min(1)
    close_K = torch.bincount(nearest_N[reach_N <= 3], minlength=modes)
    frequency_K = torch.bincount(nearest_N, minlength=modes).double() / len(points)
    return ModeCoverage(
        covered=int((close_K >= 0.2 * len(points) * share_K).sum()),
        modes=modes,
        outliers=float((reach_N > 4).double().mean()),
        total_variation=float((frequency_K - share_K).abs().sum() / 2),
    )


def paired_rmse(a: Tensor, b: Tensor) -> float:
    """Root mean squared difference over all entries of two sets of outputs for the same noise, in their unit.

    Args:
        a, b: [N, ...] of one shape, N ≥ 1; row i of both comes from the same start noise (and condition).
    """
    if a.shape != b.shape or a.dim() < 1 or not a.numel():
        raise InputError(f"paired outputs must have one shape, not {list(a.shape)} and {list(b.shape)}.", where="b", fix="Use the same noise for both.")
    x, y = (_matrix(values.reshape(len(values), -1), name, 1) for name, values in (("a", a), ("b", b)))
    return float((x - y.to(x.device)).square().mean().sqrt())
