"""Invariants of the sheet quantized_distillation (1802.05668), equations 1-9."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from limbeck.losses import quantisation as q

SETTINGS = settings(deadline=None, max_examples=40)
seeds, sizes, bucket_sizes, bits = st.integers(0, 10**6), st.integers(1, 700), st.sampled_from([None, 2, 7, 64, 256]), st.integers(1, 8)


def normal(seed, *shape, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def bucketed(flat, bucket):
    """The vector's buckets, one by one."""
    k = bucket or len(flat)
    return [flat[start : start + k] for start in range(0, len(flat), k)]


def eq1(v, levels, bucket):
    """Eq. 1 as the paper has it: a matrix of buckets, the last one padded with the last element."""
    v = v.numpy()
    k = bucket if bucket and len(v) >= bucket else len(v)
    padded = np.concatenate([v, np.full(-len(v) % k, v[-1])]).reshape(-1, k)
    beta = padded.min(1, keepdims=True)
    alpha = padded.max(1, keepdims=True) - beta
    alpha[alpha < 1e-10] = 1
    return (alpha * (np.round((padded - beta) / alpha * (levels - 1)) / (levels - 1)) + beta).reshape(-1)[: len(v)]


@SETTINGS
@given(seeds, sizes, bucket_sizes, bits)
def test_uniform_quantiser_is_equation_1(seed, n, bucket, b):
    v = normal(seed, n)
    np.testing.assert_allclose(q.quantise_uniform(v, bits=b, bucket=bucket).numpy(), eq1(v, 2**b, bucket), rtol=1e-12, atol=1e-12)


def test_halves_are_rounded_to_even():
    v = torch.tensor([0.0, 0.5, 1.5, 2.5, 3.0])
    assert q.quantise_uniform(v, bits=2, bucket=None).tolist() == [0.0, 0.0, 2.0, 2.0, 3.0]


@SETTINGS
@given(seeds, sizes, bucket_sizes, bits, st.sampled_from([torch.float32, torch.float64]), st.floats(-3, 3), st.floats(0.01, 100))
def test_uniform_quantiser_bounds_levels_ends_and_idempotence(seed, n, bucket, b, dtype, shift, width):
    v = normal(seed, n, dtype=dtype) * width + shift
    quantised = q.quantise_uniform(v, bits=b, bucket=bucket)
    assert quantised.shape == v.shape
    assert quantised.dtype == dtype
    assert torch.equal(q.quantise_uniform(quantised, bits=b, bucket=bucket), quantised)
    for raw, rounded in zip(bucketed(v, bucket), bucketed(quantised, bucket), strict=True):
        assert rounded.min() == raw.min()
        assert rounded.max() == raw.max()
        assert len(rounded.unique()) <= 2**b
        step = (raw.max() - raw.min()) / (2**b - 1)
        assert (rounded - raw).abs().max() <= step / 2 + 1e-5 * raw.abs().max()


@SETTINGS
@given(seeds, st.integers(2, 300), bucket_sizes, bits, st.floats(0.01, 50), st.floats(-20, 20))
def test_affine_equivariance(seed, n, bucket, b, c, d):
    v = normal(seed, n)
    moved = q.quantise_uniform(c * v + d, bits=b, bucket=bucket)
    torch.testing.assert_close(moved, c * q.quantise_uniform(v, bits=b, bucket=bucket) + d, rtol=1e-9, atol=1e-9)


@SETTINGS
@given(st.floats(-10, 10, width=32), sizes, bits)
def test_constant_bucket_is_unchanged_with_levels_and_with_points(value, n, b):
    v = torch.full((n,), value)
    assert torch.equal(q.quantise_uniform(v, bits=b), v)
    points = torch.tensor([-0.02, 0.4, 1.1])
    assert torch.equal(q.quantise_to_points(v, points), v)


@SETTINGS
@given(seeds, st.lists(st.integers(1, 300), min_size=1, max_size=5), bucket_sizes, bits)
def test_tensors_end_to_end_are_quantised_as_one_by_one(seed, lengths, bucket, b):
    tensors = [normal(seed + i, n) for i, n in enumerate(lengths)]
    flat = torch.cat(tensors)
    scaled = q.scale(flat, q.buckets(tuple(lengths), bucket, flat.device))
    together = q.place(q.uniform_points(2**b, flat)[q.uniform_index(scaled.u, 2**b)], scaled)
    assert torch.equal(together, torch.cat([q.quantise_uniform(t, bits=b, bucket=bucket) for t in tensors]))


def test_error_shrinks_like_one_over_the_intervals():
    v = normal(0, 4096)
    errors = [float((q.quantise_uniform(v, bits=b) - v).abs().mean()) * (2**b - 1) for b in (4, 6, 8, 12)]
    assert max(errors) / min(errors) < 1.1


def test_stochastic_rounding_is_unbiased_with_the_variance_of_equation_2():
    v = normal(3, 24)
    generator = torch.Generator().manual_seed(0)
    draws = torch.stack([q.quantise_uniform(v, bits=2, bucket=12, generator=generator) for _ in range(4000)])
    span = torch.cat([(part.max() - part.min()).expand(12) for part in v.split(12)])
    low = torch.cat([part.min().expand(12) for part in v.split(12)])
    f = ((v - low) / span * 3).frac()
    variance = span**2 * f * (1 - f) / 9
    assert ((draws.mean(0) - v).abs() <= 5 * (variance / 4000).sqrt() + 1e-12).all()
    torch.testing.assert_close(draws.var(0), variance, rtol=0.15, atol=1e-6)
    for part, rounded in zip(v.split(12), draws.split(12, dim=1), strict=True):
        assert rounded.min() == part.min()
        assert rounded.max() == part.max()


@SETTINGS
@given(seeds, sizes, bucket_sizes, bits)
def test_evenly_spaced_points_are_the_uniform_quantiser(seed, n, bucket, b):
    v = normal(seed, n)
    points = q.uniform_points(2**b, v)
    torch.testing.assert_close(q.quantise_to_points(v, points, bucket=bucket), q.quantise_uniform(v, bits=b, bucket=bucket), rtol=0, atol=1e-12)


@SETTINGS
@given(seeds, st.integers(2, 200), st.integers(1, 9))
def test_every_entry_goes_to_its_nearest_point_ties_to_the_upper(seed, n, s):
    u = torch.rand(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    points = torch.rand(s, generator=torch.Generator().manual_seed(seed + 1), dtype=torch.float64).sort().values
    index = q.nearest_index(u, points, (n,), (s,))
    assert torch.equal((u - points[index]).abs(), (u[:, None] - points).abs().min(1).values)
    assert q.nearest_index(torch.tensor([0.5]), torch.tensor([0.0, 1.0]), (1,), (2,)).tolist() == [1]


def test_points_of_several_tensors_do_not_mix():
    u, points = torch.tensor([0.1, 0.9, 0.1, 0.9]), torch.tensor([0.0, 0.2, 0.4, 0.6, 0.8])
    assert q.nearest_index(u, points, (2, 2), (2, 3)).tolist() == [1, 1, 2, 4]


@SETTINGS
@given(seeds, st.integers(3, 120), st.sampled_from([None, 16]), st.integers(1, 6))
def test_point_gradient_is_equation_7_and_central_differences(seed, n, bucket, s):
    v, weights = normal(seed, n), normal(seed + 1, n)
    points = torch.linspace(0.05, 0.97, s, dtype=torch.float64).requires_grad_()
    (weights * q.quantise_to_points(v, points, bucket=bucket)).sum().backward()
    scaled = q.scale(v, q.buckets((n,), bucket, v.device))
    index = q.nearest_index(scaled.u, points.detach(), (n,), (s,))
    span = (scaled.high - scaled.low)[scaled.buckets.of_entry]
    expected = torch.stack([(span * weights)[index == j].sum() for j in range(s)])
    torch.testing.assert_close(points.grad, expected)
    torch.testing.assert_close(points.grad.sum(), (span * weights).sum())
    for j in range(s):
        move = torch.zeros(s, dtype=torch.float64)
        move[j] = 1e-6
        values = [(weights * q.place((points.detach() + side * move)[index], scaled)).sum() for side in (1, -1)]
        torch.testing.assert_close((values[0] - values[1]) / 2e-6, points.grad[j], rtol=1e-5, atol=1e-6)


def test_a_point_at_the_end_of_the_range_has_a_gradient():
    v = torch.tensor([0.0, 0.1, 1.9, 2.0])
    points = torch.tensor([0.0, 1.0], requires_grad=True)
    q.quantise_to_points(v, points).sum().backward()
    assert points.grad.tolist() == [4.0, 4.0]


@SETTINGS
@given(seeds, st.integers(1, 200), bucket_sizes, bits)
def test_straight_through_gives_the_quantised_values_and_the_gradient_as_it_is(seed, n, bucket, b):
    v, g = normal(seed, n).requires_grad_(), normal(seed + 1, n)
    quantised = q.quantise_uniform(v, bits=b, bucket=bucket)
    passed = q.straight_through(v, quantised)
    assert torch.equal(passed, quantised)
    (g * passed).sum().backward()
    assert torch.equal(v.grad, g)


@SETTINGS
@given(seeds, st.integers(2, 150), st.sampled_from([None, 16, 50]), bits)
def test_gradient_through_the_scale_is_equation_6_and_sums_to_that_of_the_bucket(seed, n, bucket, b):
    v, g = normal(seed, n).requires_grad_(), normal(seed + 1, n)
    scaled = q.scale(v.detach(), q.buckets((n,), bucket, v.device))
    position = q.uniform_points(2**b, v)[q.uniform_index(scaled.u, 2**b)]
    out = q.through_scale(v, q.place(position, scaled), position, scaled)
    assert torch.equal(out, q.place(position, scaled))
    (g * out).sum().backward()
    expected = g.clone()
    for raw, part, far, into in zip(*(bucketed(t, bucket) for t in (v.detach(), g, position - scaled.u, expected)), strict=True):
        into[raw.argmax()] += (part * far).sum()
        into[raw.argmin()] -= (part * far).sum()
    torch.testing.assert_close(v.grad, expected)
    for part, mine in zip(bucketed(g, bucket), bucketed(v.grad, bucket), strict=True):
        torch.testing.assert_close(mine.sum(), part.sum())


def test_gradient_through_the_scale_goes_to_the_true_extrema_not_to_the_first_quantised_one():
    v = torch.tensor([0.1, 0.0, 2.9, 3.0, 1.4], requires_grad=True)  # 2 bits: 0.1 and 0.0 share a level, and so do 2.9 and 3.0
    scaled = q.scale(v.detach(), q.buckets((5,), None, v.device))
    position = q.uniform_points(4, v)[q.uniform_index(scaled.u, 4)]
    assert position.tolist() == pytest.approx([0, 0, 1, 1, 1 / 3])
    q.through_scale(v, q.place(position, scaled), position, scaled).sum().backward()
    change = float((position - scaled.u).sum())
    assert v.grad.tolist() == pytest.approx([1, 1 - change, 1, 1 + change, 1])


@SETTINGS
@given(seeds, st.integers(2, 200), st.integers(2, 20))
def test_quantile_points_are_percentiles_from_0_to_1(seed, n, s):
    v = normal(seed, n)
    u = (v - v.min()) / (v.max() - v.min())
    points = q.initial_points(u, (n,), (s,), "quantile")
    np.testing.assert_allclose(points, np.percentile(u.numpy(), np.linspace(0, 100, s)), atol=1e-12)
    assert points[0] == 0
    assert points[-1] == 1


def test_initial_points_of_several_tensors_even_and_alone():
    u = torch.tensor([0.0, 0.2, 1.0, 0.3, 0.5])
    assert q.initial_points(u, (3, 2), (1, 3), "quantile").tolist() == pytest.approx([0.2, 0.3, 0.4, 0.5])
    assert q.initial_points(u, (3, 2), (1, 3), "uniform").tolist() == pytest.approx([0.5, 0.0, 0.5, 1.0])


def test_points_of_a_constant_tensor_are_spread_so_that_it_can_change():
    assert q.initial_points(torch.zeros(9), (4, 5), (2, 3), "quantile").tolist() == [0, 1, 0, 0.5, 1]


@SETTINGS
@given(st.lists(st.floats(0, 1e3), min_size=1, max_size=40), bits)
def test_allocation_keeps_the_total_and_the_half_and_the_order(norms, b):
    counts = q.allocate_points(2**b, norms)
    assert sum(counts) == len(norms) * 2**b
    assert min(counts) >= 2**b // 2
    for norm, count in zip(norms, counts, strict=True):
        assert all(count >= other - 1 for less, other in zip(norms, counts, strict=True) if less < norm)  # 1: the correction


@SETTINGS
@given(st.integers(1, 40), bits, st.floats(0, 100))
def test_equal_gradients_get_equal_points(tensors, b, norm):
    assert q.allocate_points(2**b, [norm] * tensors) == [2**b] * tensors


def test_allocation_by_hand_and_where_rounding_would_empty_a_tensor():
    assert q.allocate_points(4, [3.0, 1.0]) == [5, 3]
    assert q.allocate_points(4, [5.0, 0.0, 0.0]) == [8, 2, 2]
    many = q.allocate_points(4, [8.0] * 8 + [0.51] * 32)  # each of 32 rounds up: the surplus of 16 is more than one tensor has
    assert sum(many) == 160
    assert min(many) >= 2
