"""Metrics of generated samples: against other libraries, brute force, closed forms and sets whose answer is known."""

import math

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from limbeck.errors import InputError
from limbeck.evaluate import samples
from limbeck.evaluate.samples import (
    block_bootstrap,
    density_coverage,
    energy_distance,
    fid,
    frechet_distance,
    histogram_l1,
    kid,
    median_bandwidth,
    mmd2,
    mode_coverage,
    paired_rmse,
    precision_recall,
    sliced_wasserstein,
)

SETTINGS = settings(deadline=None, max_examples=20)
SEEDS = st.integers(0, 2**31)
SIZES = st.integers(2, 40)
FEATURES = st.sampled_from([1, 2, 5, 20])  # both sides of samples.DIRECT

SETS = {  # every metric of two sets of features
    "fid": fid,
    "kid": kid,
    "mmd2": mmd2,
    "energy": energy_distance,
    "sliced": sliced_wasserstein,
    "precision_recall": lambda a, b: precision_recall(a, b, k=1),
    "density_coverage": lambda a, b: density_coverage(a, b, k=1),
}
SYMMETRIC = ("fid", "kid", "energy", "sliced")


def drawn(seed: int, *shape: int, scale: float = 1.0, shift: float = 0.0) -> Tensor:
    return shift + scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def shuffled(values: Tensor, seed: int) -> Tensor:
    return values[torch.randperm(len(values), generator=torch.Generator().manual_seed(seed))]


def standardised(seed: int, count: int, mean: Tensor, covariance: Tensor) -> Tensor:
    """Points whose sample mean and covariance are these exactly."""
    x = drawn(seed, count, len(mean))
    x = x - x.mean(0)
    whitened = torch.linalg.solve_triangular(torch.linalg.cholesky(torch.atleast_2d(torch.cov(x.T))), x.T, upper=False)
    return (torch.linalg.cholesky(covariance) @ whitened).T + mean


def spd(seed: int, size: int) -> Tensor:
    a = drawn(seed, size, size)
    return a @ a.T + 0.1 * torch.eye(size, dtype=torch.float64)


# ---- FID -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "other", "features"), [(300, 300, 8), (200, 90, 64), (40, 30, 50)])
def test_fid_is_torchmetrics(count, other, features) -> None:
    compute = pytest.importorskip("torchmetrics.image.fid")._compute_fid
    x, y = drawn(0, count, features) @ drawn(1, features, features), drawn(2, other, features, scale=2.0, shift=0.3)
    expected = compute(x.mean(0), torch.cov(x.T), y.mean(0), torch.cov(y.T))
    assert fid(x, y) == pytest.approx(float(expected), rel=1e-6)


@pytest.mark.parametrize(("count", "other", "features"), [(300, 300, 8), (200, 90, 64), (40, 30, 50)])
def test_fid_is_torch_fidelitys(count, other, features) -> None:
    metric = pytest.importorskip("torch_fidelity.metric_fid")
    x, y = drawn(0, count, features) @ drawn(1, features, features), drawn(2, other, features, scale=2.0, shift=0.3)
    expected = metric.fid_statistics_to_metric(metric.fid_features_to_statistics(x), metric.fid_features_to_statistics(y), verbose=False)
    assert fid(x, y) == pytest.approx(expected["frechet_inception_distance"], rel=1e-6)


@given(SEEDS, st.sampled_from([1, 2, 6]))
@SETTINGS
def test_fid_of_gaussians_of_commuting_covariances_is_the_closed_form(seed: int, size: int) -> None:
    """|m − n|² + Σ (a_i − b_i)², for covariances with the same eigenvectors and the standard deviations a and b along them."""
    vectors, _ = torch.linalg.qr(drawn(seed, size, size))
    a, b = drawn(seed + 1, size).abs() + 0.1, drawn(seed + 2, size).abs() + 0.1
    m, n = drawn(seed + 3, size), drawn(seed + 4, size)
    first, second = ((vectors * v.square()) @ vectors.T for v in (a, b))
    expected = float((m - n).square().sum() + (a - b).square().sum())
    assert frechet_distance(m, first, n, second) == pytest.approx(expected, rel=1e-9, abs=1e-9)
    x, y = standardised(seed, 50, m, first), standardised(seed + 5, 30, n, second)
    assert fid(x, y) == pytest.approx(expected, rel=1e-7, abs=1e-8)


def test_fid_of_covariances_that_do_not_commute_is_bures() -> None:
    """For 2×2: Tr (C1^½ C2 C1^½)^½ = √(Tr(C1 C2) + 2 √(det C1 det C2))."""
    c1, c2 = torch.tensor([[2.0, 0.9], [0.9, 1.0]]).double(), torch.tensor([[1.0, -0.4], [-0.4, 3.0]]).double()
    assert not torch.allclose(c1 @ c2, c2 @ c1)
    cross = math.sqrt(float((c1 @ c2).trace()) + 2 * math.sqrt(float(torch.det(c1) * torch.det(c2))))
    expected = float(c1.trace() + c2.trace()) - 2 * cross
    assert frechet_distance(torch.zeros(2), c1, torch.zeros(2), c2) == pytest.approx(expected, rel=1e-12)
    assert fid(standardised(0, 20, torch.zeros(2).double(), c1), standardised(1, 9, torch.zeros(2).double(), c2)) == pytest.approx(expected, rel=1e-9)


def test_fid_of_singular_covariances_and_of_a_constant_is_defined() -> None:
    x = drawn(0, 6, 30)  # rank 5
    assert fid(x, x + 2.0) == pytest.approx(4 * 30, rel=1e-6)
    assert fid(torch.ones(5, 3), torch.zeros(7, 3)) == pytest.approx(3.0)


def test_fid_says_why_it_needs_two_samples() -> None:
    with pytest.raises(InputError, match=r"covariance.*2 samples.*'fake' has 1"):
        fid(drawn(0, 5, 2), drawn(1, 1, 2))


# ---- kernels ---------------------------------------------------------------------------------------------------------------


def u_statistic(kernel, x: Tensor, y: Tensor) -> float:
    """By a double loop over every pair."""
    n, m = len(x), len(y)
    xx = sum(kernel(x[i], x[j]) for i in range(n) for j in range(n) if i != j)
    yy = sum(kernel(y[i], y[j]) for i in range(m) for j in range(m) if i != j)
    xy = sum(kernel(x[i], y[j]) for i in range(n) for j in range(m))
    return float(xx / (n * (n - 1)) + yy / (m * (m - 1)) - 2 * xy / (n * m))


@pytest.mark.parametrize("block", [samples.BLOCK, 40])
@pytest.mark.parametrize("features", [1, 3, 20])
def test_kid_and_mmd_are_brute_force(features, block, monkeypatch) -> None:
    monkeypatch.setattr(samples, "BLOCK", block)
    x, y = drawn(0, 11, features), drawn(1, 8, features, scale=1.5, shift=0.4)
    assert kid(x, y) == pytest.approx(u_statistic(lambda a, b: ((a @ b) / features + 1) ** 3, x, y), rel=1e-10)
    h = np.median([float((x[i] - x[j]).norm()) for i in range(11) for j in range(i)])  # 55 pairs: an odd number
    assert median_bandwidth(x) == pytest.approx(h, rel=1e-12)
    rbf = lambda a, b: sum(math.exp(-float((a - b).square().sum()) / (2 * (s * h) ** 2)) for s in (0.5, 1.0, 2.0))  # noqa: E731
    assert mmd2(x, y) == pytest.approx(u_statistic(rbf, x, y), rel=1e-10)
    assert mmd2(x, y, bandwidth=float(h)) == pytest.approx(mmd2(x, y), rel=1e-12)


def test_kid_is_torchmetrics() -> None:
    poly_mmd = pytest.importorskip("torchmetrics.image.kid").poly_mmd
    x, y = drawn(0, 60, 9), drawn(1, 60, 9, shift=0.2)
    assert kid(x, y) == pytest.approx(float(poly_mmd(x, y)), rel=1e-9)


def test_mmd_of_gaussians_is_unbiased() -> None:
    """E k of two normal points is known: N(0, s²) and a kernel of width w give w/√(w² + 2 s²) exp(−δ²/(2 (w² + 2 s²)))."""
    h, shift = 1.3, 0.5
    closed = 0.0
    for width in (0.5 * h, h, 2 * h):
        v = width**2 + 2
        closed += 2 * width / math.sqrt(v) * (1 - math.exp(-(shift**2) / (2 * v)))
    found = [mmd2(drawn(i, 12, 1), drawn(1000 + i, 7, 1, shift=shift), bandwidth=h) for i in range(600)]
    assert np.mean(found) == pytest.approx(closed, abs=4 * np.std(found) / math.sqrt(600))
    assert closed > 8 * np.std(found) / math.sqrt(600)  # a wrong constant would show
    equal = [mmd2(drawn(i, 12, 1), drawn(1000 + i, 7, 1), bandwidth=h) for i in range(600)]
    assert abs(np.mean(equal)) < 4 * np.std(equal) / math.sqrt(600)
    assert min(equal) < 0


def test_the_bandwidth_is_the_real_sets_alone() -> None:
    x = drawn(0, 50, 2)
    assert mmd2(x, 100 * drawn(1, 50, 2)) == mmd2(x, 100 * drawn(1, 50, 2), bandwidth=median_bandwidth(x))
    many = drawn(2, samples.SUBSET + 100, 2)
    assert median_bandwidth(many) == median_bandwidth(many)
    assert median_bandwidth(many) == pytest.approx(2 * math.sqrt(math.log(2)), rel=0.05)  # |x − y| of the plane: Rayleigh of scale √2


def test_a_bandwidth_of_zero_is_told() -> None:
    with pytest.raises(InputError, match="coincide"):
        mmd2(torch.zeros(5, 2), drawn(0, 5, 2))
    for h in (0.0, -1.0, math.nan):
        with pytest.raises(InputError, match="bandwidth"):
            mmd2(drawn(0, 5, 2), drawn(1, 5, 2), bandwidth=h)


@pytest.mark.parametrize("metric", ["kid", "mmd2"])
def test_the_interval_is_about_the_blocks_mean_and_covers_the_truth(metric) -> None:
    function = {"kid": kid, "mmd2": mmd2}[metric]
    truth = np.mean([function(drawn(i, 1500, 2), drawn(50 + i, 1500, 2, shift=0.3)) for i in range(4)])
    hits = 0
    for i in range(20):
        x, y = drawn(100 + i, 200, 2), drawn(200 + i, 240, 2, shift=0.3)
        found = block_bootstrap(x, y, metric, blocks=10, resamples=500)
        assert found.low < found.value < found.high
        hits += found.low <= truth <= found.high
    assert hits >= 16  # of 20 at 95 %
    assert found == block_bootstrap(x, y, metric, blocks=10, resamples=500)
    assert found != block_bootstrap(x, y, metric, blocks=10, resamples=500, seed=1)
    wider = block_bootstrap(x, y, metric, blocks=10, resamples=500, confidence=0.999)
    assert wider.low < found.low
    assert wider.high > found.high


def test_sorted_samples_do_not_fool_the_blocks() -> None:
    x, y = (drawn(i, 400, 1).sort(dim=0).values for i in (0, 1))
    y = y.flip(0)  # cut as they are, low blocks would meet high ones
    assert np.mean([mmd2(a, b, bandwidth=1.0) for a, b in zip(x.tensor_split(20), y.tensor_split(20), strict=True)]) > 1
    assert abs(block_bootstrap(x, y).value) < 0.1


def test_the_interval_refuses_what_it_cannot_do() -> None:
    x = drawn(0, 30, 2)
    for arguments, word in (({"blocks": 16}, "32"), ({"blocks": 1}, "blocks"), ({"metric": "fid"}, "fid"), ({"confidence": 1.0}, "confidence")):
        with pytest.raises(InputError, match=word):
            block_bootstrap(x, x, **arguments)


# ---- manifolds -------------------------------------------------------------------------------------------------------------


def line(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)[:, None]


def test_precision_and_recall_of_points_on_a_line() -> None:
    real = line(0, 1, 2, 10)  # k = 1: radii 1, 1, 1, 8
    fake = line(-0.5, 2.5, 18.5, 30)  # k = 1: radii 3, 3, 11.5, 16
    found = precision_recall(real, fake, k=1)
    assert found.precision == 0.5  # −0.5 and 2.5, not 18.5 (8.5 from 10)
    assert found.recall == 1.0  # −0.5 ± 3 holds 0, 1, 2; 18.5 − 11.5 holds 10
    assert precision_recall(fake, real, k=1).precision == found.recall
    assert precision_recall(real, line(18.0, 100, 200, 300), k=1).precision == 0.25  # a closed ball


def test_density_and_coverage_of_points_on_a_line() -> None:
    real = line(0, 1, 2, 10)
    fake = line(0.5, 1.5, 1.5, 30)
    found = density_coverage(real, fake, k=1)  # 0.5 is in the balls of 0 and 1; each 1.5 in those of 1 and 2, and all three in (2, 18)? no: 1.5 < 2
    assert found.density == 6 / 4
    assert found.coverage == 0.75
    assert density_coverage(real, line(18.0, 100, 200, 300), k=1).coverage == 0  # an open ball


@pytest.mark.parametrize("block", [samples.BLOCK, 50])
@pytest.mark.parametrize("features", [2, 20])
def test_manifolds_are_brute_force(features, block, monkeypatch) -> None:
    monkeypatch.setattr(samples, "BLOCK", block)
    n, k = 23, 3
    x, y = drawn(0, n, features), drawn(1, n, features, scale=0.7, shift=0.3)

    def radius(points: Tensor, i: int) -> float:
        return sorted(float((points[i] - points[j]).norm()) for j in range(n) if j != i)[k - 1]

    between = [[float((x[i] - y[j]).norm()) for j in range(n)] for i in range(n)]
    real, fake = [radius(x, i) for i in range(n)], [radius(y, i) for i in range(n)]
    found = precision_recall(x, y, k)
    assert found.precision == pytest.approx(sum(any(between[i][j] <= real[i] for i in range(n)) for j in range(n)) / n)
    assert found.recall == pytest.approx(sum(any(between[i][j] <= fake[j] for j in range(n)) for i in range(n)) / n)
    crowd = density_coverage(x, y, k)
    assert crowd.density == pytest.approx(sum(between[i][j] < real[i] for i in range(n) for j in range(n)) / (k * n))
    assert crowd.coverage == pytest.approx(sum(min(between[i]) < real[i] for i in range(n)) / n)


@pytest.mark.parametrize("features", [2, 20])
def test_manifolds_of_the_same_set_and_of_one_far_away(features) -> None:
    x = drawn(0, 100, features)
    assert precision_recall(x, x) == samples.PrecisionRecall(1.0, 1.0)
    assert density_coverage(x, x).coverage == 1.0
    assert precision_recall(x, x + 1e6) == samples.PrecisionRecall(0.0, 0.0)
    assert density_coverage(x, x + 1e6) == samples.DensityCoverage(0.0, 0.0)
    if features <= samples.DIRECT:
        assert density_coverage(x, x).density == 1.0  # a ball holds its centre and k − 1 others


def test_dropping_modes_costs_recall_and_coverage_and_blur_costs_precision_and_density() -> None:
    centres = torch.tensor([[0.0, 0], [20, 0], [0, 20], [20, 20]]).double()
    real = centres.repeat(100, 1) + drawn(0, 400, 2)
    dropped = centres[:2].repeat(200, 1) + drawn(1, 400, 2)
    blurred = centres.repeat(100, 1) + drawn(2, 400, 2, scale=4.0)
    narrow, wide = precision_recall(real, dropped), precision_recall(real, blurred)
    assert (narrow.precision > 0.9, narrow.recall < 0.6, wide.precision < 0.6, wide.recall > 0.9) == (True,) * 4
    narrow, wide = density_coverage(real, dropped), density_coverage(real, blurred)
    assert (narrow.density > 0.8, narrow.coverage < 0.6, wide.density < 0.5) == (True,) * 3


def test_equal_distributions_give_the_expected_density_and_coverage() -> None:
    found = density_coverage(drawn(0, 2000, 2), drawn(1, 2000, 2))
    assert found.density == pytest.approx(1.0, abs=0.06)
    assert found.coverage == pytest.approx(1 - 2**-5, abs=0.02)


def test_unequal_sets_are_cut_to_the_smaller_by_a_fixed_draw(monkeypatch) -> None:
    x, y = drawn(0, 300, 2), drawn(1, 80, 2)
    assert precision_recall(x, y) == precision_recall(x, y)
    assert precision_recall(x, y) == precision_recall(x, shuffled(y, 5))  # the smaller one is used whole
    assert 0.7 < density_coverage(x, y).density < 1.3  # of 80 and 80; the balls of 300 would be smaller, of 80 in 300 larger
    monkeypatch.setattr(samples, "MANIFOLD", 40)
    assert (precision_recall(x, y).precision * 40).is_integer()


def test_manifolds_need_more_samples_than_neighbours() -> None:
    with pytest.raises(InputError, match="3 samples, at least 4"):
        precision_recall(drawn(0, 3, 2), drawn(1, 9, 2))
    with pytest.raises(InputError, match="'k' is 0"):
        density_coverage(drawn(0, 9, 2), drawn(1, 9, 2), k=0)


# ---- transport, energy, histograms -----------------------------------------------------------------------------------------


@given(SEEDS, st.integers(1, 30), st.integers(1, 30))
@SETTINGS
def test_sliced_wasserstein_in_one_dimension_is_scipys(seed: int, n: int, m: int) -> None:
    x, y = drawn(seed, n, 1), drawn(seed + 1, m, 1, scale=2.0)
    assert sliced_wasserstein(x, y, projections=3) == pytest.approx(scipy.stats.wasserstein_distance(x[:, 0], y[:, 0]), rel=1e-9)


@given(SEEDS, st.integers(1, 20), st.integers(1, 20))
@SETTINGS
def test_energy_distance_in_one_dimension_is_scipys_squared(seed: int, n: int, m: int) -> None:
    x, y = drawn(seed, n, 1), drawn(seed + 1, m, 1, scale=2.0)
    assert energy_distance(x, y) == pytest.approx(scipy.stats.energy_distance(x[:, 0], y[:, 0]) ** 2, rel=1e-9, abs=1e-12)


def test_sliced_wasserstein_of_a_shift_is_its_mean_projection() -> None:
    x = drawn(0, 200, 2)
    shift = torch.tensor([3.0, -4.0])
    assert sliced_wasserstein(x, x + shift, projections=20_000) == pytest.approx(5 * 2 / math.pi, rel=0.01)
    x = drawn(0, 20, 3)
    assert sliced_wasserstein(x, x + torch.tensor([0.0, 0, 2]), projections=20_000) == pytest.approx(2 / 2, rel=0.01)  # E|θ_1| = 1/2 in space


def test_sliced_wasserstein_of_shifted_gaussians_of_unequal_number() -> None:
    shift = torch.tensor([3.0, 4.0])
    assert sliced_wasserstein(drawn(0, 4000, 2), drawn(1, 3000, 2) + shift, projections=1000) == pytest.approx(5 * 2 / math.pi, rel=0.03)


@given(SEEDS, st.integers(2, 9), st.integers(1, 9))
@SETTINGS
def test_repeating_samples_changes_no_empirical_distance(seed: int, repeats: int, n: int) -> None:
    """Unequal numbers, the same distributions."""
    x, y = drawn(seed, n, 2), drawn(seed + 1, 7, 2)
    for metric in (sliced_wasserstein, energy_distance, histogram_l1):
        assert metric(x, y.repeat(repeats, 1)) == pytest.approx(metric(x, y), rel=1e-9, abs=1e-12)
        assert metric(x, x.repeat(repeats, 1)) == pytest.approx(0, abs=1e-12)


def test_the_directions_depend_on_the_seed_alone() -> None:
    x, y = drawn(0, 20, 5), drawn(1, 20, 5)
    torch.manual_seed(0)
    first, state = sliced_wasserstein(x, y), torch.get_rng_state()
    torch.manual_seed(1)
    assert sliced_wasserstein(x, y) == first != sliced_wasserstein(x, y, seed=1)
    torch.manual_seed(0)
    assert torch.equal(torch.get_rng_state(), state)


def test_energy_distance_of_shifted_gaussians_is_the_closed_form() -> None:
    """On the line, X − Y is N(δ, 2): 2 E|X − Y| − 2 E|X − X'| with E|N(μ, s²)| = s √(2/π) e^{−μ²/(2 s²)} + μ erf(μ/(s √2)); the floor added."""
    n, m, shift = 3000, 2000, 1.5
    apart = math.sqrt(2) * math.sqrt(2 / math.pi) * math.exp(-(shift**2) / 4) + shift * math.erf(shift / 2)
    same = 2 / math.sqrt(math.pi)
    expected = 2 * apart - 2 * same + same * (1 / n + 1 / m)
    assert energy_distance(drawn(0, n, 1), drawn(1, m, 1, shift=shift)) == pytest.approx(expected, rel=0.06)


def test_energy_distance_through_inner_products_is_the_direct_one(monkeypatch) -> None:
    x, y = drawn(0, 40, 20, shift=1000.0), drawn(1, 30, 20, shift=1000.5)
    found = energy_distance(x, y)
    monkeypatch.setattr(samples, "DIRECT", 20)
    assert found == pytest.approx(energy_distance(x, y), rel=1e-8)


def test_histogram_of_known_cells() -> None:
    real = torch.tensor([[0.0, 0], [1, 1], [0, 1], [1, 0]])
    assert histogram_l1(real, real, bins=2) == 0
    assert histogram_l1(real, real[:1], bins=2) == pytest.approx(1.5)  # 3/4 too much in one cell, 1/4 too little in three
    assert histogram_l1(real, real + 5, bins=2) == pytest.approx(2.0)
    half_outside = torch.cat([real, real + 5])
    assert histogram_l1(real, half_outside, bins=2) == pytest.approx(1.0)
    assert histogram_l1(torch.cat([real, real * 0 + 0.6]), real, bins=1) == 0  # all in the one cell
    assert histogram_l1(torch.zeros(3, 2), torch.zeros(2, 2)) == 0  # no extent
    with pytest.raises(InputError, match="plane"):
        histogram_l1(drawn(0, 4, 3), drawn(1, 4, 3))
    with pytest.raises(InputError, match="bins"):
        histogram_l1(real, real, bins=0)


def test_histogram_floor_is_what_the_docstring_says() -> None:
    x, y = drawn(0, 20_000, 2), drawn(1, 10_000, 2)
    edges = [np.linspace(float(x[:, i].min()), float(x[:, i].max()), 9) for i in (0, 1)]
    p = np.outer(*[np.diff(scipy.stats.norm.cdf(e)) for e in edges])
    assert histogram_l1(x, y, bins=8) == pytest.approx(math.sqrt(2 / math.pi) * np.sqrt(p * (1 / 20_000 + 1 / 10_000)).sum(), rel=0.25)


# ---- modes, pairs ----------------------------------------------------------------------------------------------------------

SQUARE = torch.tensor([[0.0, 0], [10, 0], [0, 10], [10, 10]])


def test_a_perfect_sampler_covers_all_modes_in_their_shares() -> None:
    weights = torch.tensor([4.0, 3, 2, 1])
    points = torch.cat([SQUARE[k] + 0.5 * drawn(k, 1000 * int(weights[k]), 2) for k in range(4)])
    found = mode_coverage(points, SQUARE, 0.5, weights)
    assert (found.covered, found.modes, found.total_variation) == (4, 4, pytest.approx(0, abs=1e-12))
    assert found.outliers == pytest.approx(math.exp(-8), abs=5e-4)
    assert mode_coverage(points, SQUARE, 0.5).total_variation == pytest.approx(0.2)  # against equal weights: (0.15 + 0.05)


def test_dropped_and_thin_modes_are_not_covered() -> None:
    def points(*counts: int) -> Tensor:
        return SQUARE.repeat_interleave(torch.tensor(counts), 0)

    assert mode_coverage(points(100, 100, 0, 0), SQUARE, 1.0) == samples.ModeCoverage(2, 4, 0.0, 0.5)
    assert mode_coverage(points(95, 95, 5, 5), SQUARE, 1.0).covered == 2
    assert mode_coverage(points(90, 90, 10, 10), SQUARE, 1.0).covered == 4  # 10 of 50 expected: 0.2
    assert mode_coverage(points(90, 91, 10, 9), SQUARE, 1.0).covered == 3


def test_points_far_from_their_mode_do_not_cover_it_and_beyond_4_sigma_are_outliers() -> None:
    around = SQUARE.repeat(25, 1)
    offset = torch.tensor([1.0, 0])
    assert mode_coverage(around + 2.9 * offset, SQUARE, 1.0) == samples.ModeCoverage(4, 4, 0.0, 0.0)
    assert mode_coverage(around + 3.1 * offset, SQUARE, 1.0) == samples.ModeCoverage(0, 4, 0.0, 0.0)
    assert mode_coverage(around - 4.1 * offset, SQUARE, 1.0) == samples.ModeCoverage(0, 4, 1.0, 0.0)


def test_nearest_is_in_units_of_each_modes_own_spread() -> None:
    means, spread = torch.tensor([[0.0, 0], [10, 0]]), torch.tensor([1.0, 4.0])
    found = mode_coverage(torch.tensor([[4.0, 0]]), means, spread, torch.tensor([0.9, 0.1]))  # 4 from the first, 1.5 from the second
    assert (found.covered, found.outliers, found.total_variation) == (1, 0.0, pytest.approx(0.9))


def test_wrong_modes_are_named() -> None:
    points = drawn(0, 5, 2)
    for std, weights, word in ((0.0, None, "std"), (torch.ones(3), None, "std"), (1.0, torch.ones(2), "weights"), (1.0, torch.zeros(4), "weights")):
        with pytest.raises(InputError, match=word):
            mode_coverage(points, SQUARE, std, weights)
    with pytest.raises(InputError, match=r"'points' has 3 features and 'means' 2"):
        mode_coverage(drawn(0, 5, 3), SQUARE, 1.0)


def test_paired_rmse() -> None:
    a = drawn(0, 10, 1, 4, 4)
    assert paired_rmse(a, a) == 0
    assert paired_rmse(a, a + 0.5) == pytest.approx(0.5)
    assert paired_rmse(torch.zeros(2, 2), torch.tensor([[3.0, 0], [0, 4]])) == pytest.approx(2.5)
    assert paired_rmse(a, shuffled(a, 1)) > 0.5  # pairs matter
    assert paired_rmse(torch.zeros(3), torch.ones(3)) == 1
    for other in (drawn(0, 10, 1, 4, 5), drawn(0, 9, 1, 4, 4)):
        with pytest.raises(InputError, match="one shape"):
            paired_rmse(a, other)
    with pytest.raises(InputError, match="NaN"):
        paired_rmse(a, a * math.nan)


# ---- all of them -----------------------------------------------------------------------------------------------------------


@given(SEEDS, SIZES, SIZES, FEATURES)
@SETTINGS
def test_symmetric_metrics_are_symmetric(seed: int, n: int, m: int, features: int) -> None:
    x, y = drawn(seed, n, features), drawn(seed + 1, m, features, shift=0.5)
    for name in SYMMETRIC:
        assert SETS[name](x, y) == pytest.approx(SETS[name](y, x), rel=1e-6, abs=1e-6), name
    assert mmd2(x, y, bandwidth=1.0) == pytest.approx(mmd2(y, x, bandwidth=1.0), rel=1e-9, abs=1e-12)


@given(SEEDS, SIZES, FEATURES)
@SETTINGS
def test_the_order_of_the_samples_does_not_matter(seed: int, n: int, features: int) -> None:
    x, y = drawn(seed, n, features), drawn(seed + 1, n, features, shift=0.5)
    for name, metric in SETS.items():
        first, second = metric(x, y), metric(shuffled(x, 1), shuffled(y, 2))
        if isinstance(first, float):
            assert second == pytest.approx(first, rel=1e-6, abs=1e-7), name
        else:
            assert second == first, name


@given(SEEDS, SIZES, FEATURES)
@SETTINGS
def test_equal_sets_are_at_no_distance(seed: int, n: int, features: int) -> None:
    x = drawn(seed, n, features)
    assert fid(x, x) == pytest.approx(0, abs=1e-6)
    assert sliced_wasserstein(x, shuffled(x, 1)) == pytest.approx(0, abs=1e-12)
    assert energy_distance(x, shuffled(x, 1)) == pytest.approx(0, abs=1e-7)
    assert paired_rmse(x, x) == 0


@given(SEEDS, FEATURES)
@SETTINGS
def test_a_common_shift_and_rotation_change_no_distance_of_points(seed: int, features: int) -> None:
    x, y = drawn(seed, 30, features), drawn(seed + 1, 20, features, shift=0.5)
    rotation, _ = torch.linalg.qr(drawn(seed + 2, features, features))
    moved = (x @ rotation + 3.0, y @ rotation + 3.0)
    for name in ("fid", "mmd2", "energy"):
        assert SETS[name](*moved) == pytest.approx(SETS[name](x, y), rel=1e-6, abs=1e-6), name


@pytest.mark.parametrize("name", SETS)
def test_distances_grow_with_the_shift(name) -> None:
    x, y = drawn(0, 200, 3), drawn(1, 200, 3)
    found = [SETS[name](x, y + shift) for shift in (0.0, 0.5, 1.0, 2.0)]
    quality = [-v if isinstance(v, float) else v.precision if hasattr(v, "precision") else v.coverage for v in found]
    assert quality == sorted(quality, reverse=True)
    assert quality[0] > quality[-1]


@pytest.mark.parametrize("name", [*SETS, "histogram", "block"])
def test_wrong_sets_are_named(name) -> None:
    metric = {**SETS, "histogram": histogram_l1, "block": lambda a, b: block_bootstrap(a, b, "kid", blocks=2)}[name]
    x = drawn(0, 6, 2)
    for value in (math.nan, math.inf, -math.inf):
        bad = x.clone()
        bad[3, 1] = value
        with pytest.raises(InputError, match=r"1 of the 6 samples in 'fake'"):
            metric(x, bad)
        with pytest.raises(InputError, match=r"1 of the 6 samples in 'real'"):
            metric(bad, x)
    for wrong in (drawn(0, 6), drawn(0, 6, 1, 2), drawn(0, 6, 0)):
        with pytest.raises(InputError, match="features"):
            metric(x, wrong)
    with pytest.raises(InputError, match=r"2 features and 'fake' 3"):
        metric(x, drawn(0, 6, 3))
    with pytest.raises(InputError, match="samples"):
        metric(x, x[:0])


@pytest.mark.parametrize("name", SETS)
def test_half_precision_and_gradients_go_in_and_plain_numbers_come_out(name) -> None:
    x, y = drawn(0, 12, 3).float(), drawn(1, 12, 3).half().requires_grad_()
    found, exact = SETS[name](x, y), SETS[name](x.double(), y.detach().double())
    assert found == exact
    assert all(type(v) is float for v in ([found] if isinstance(found, float) else vars(found).values()))


def test_float64_is_used_inside() -> None:
    """Features far from 0: the squares of float32 would drown the distances."""
    x, y = drawn(0, 100, 20), drawn(1, 100, 20, shift=0.3)
    for metric in (fid, mmd2, energy_distance, sliced_wasserstein):
        assert metric(x + 1e5, y + 1e5) == pytest.approx(metric(x, y), rel=1e-5)


def test_blocks_are_small_whatever_the_number_of_samples(monkeypatch) -> None:
    """No kernel call is given more than BLOCK pairs (or one row)."""
    monkeypatch.setattr(samples, "BLOCK", 1000)
    seen = []
    original = samples._squared_distances
    monkeypatch.setattr(samples, "_squared_distances", lambda a, b: seen.append(len(a) * len(b)) or original(a, b))
    x, y = drawn(0, 150, 20), drawn(1, 140, 20)
    mmd2(x, y, bandwidth=1.0)
    energy_distance(x, y)
    precision_recall(x, y)
    density_coverage(x, y)
    assert max(seen) <= 1000
    assert sum(seen) > 150 * 140 * 4
