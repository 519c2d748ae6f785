"""SAM and GSAM directions on flat vectors."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from limbeck.synthetic.sharpness import SharpnessSpec, descent_direction, gsam_direction, perturbation, sam_mix

SEEDS = st.integers(0, 2**31)


def drawn(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def quartic(theta: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Σ θ⁴/4 + Σ θ_i θ_{i+1}, its gradient by hand."""
    g = theta**3 + torch.nn.functional.pad(theta[..., 1:], (0, 1)) + torch.nn.functional.pad(theta[..., :-1], (1, 0))
    return g, (theta**4 / 4).sum(-1) + (theta[..., 1:] * theta[..., :-1]).sum(-1)


@given(SEEDS, st.floats(0.0, 2.0))
def test_the_plain_ascent_has_the_length_rho_along_g(seed: int, rho: float) -> None:
    theta, g = drawn(seed, 7), drawn(seed + 1, 7)
    e = perturbation(theta, g, rho, adaptive=False)
    torch.testing.assert_close(e, rho * g / g.norm())
    assert float(e.norm()) == pytest.approx(rho)


@given(SEEDS)
def test_the_adaptive_ascent_has_the_length_rho_measured_by_the_weights(seed: int) -> None:
    """‖e / |θ|‖ = ρ, and e is the plain ascent where all weights are as large; by loops it is the same."""
    theta, g = drawn(seed, 9), drawn(seed + 1, 9)
    e = perturbation(theta, g, 0.3, adaptive=True)
    assert float((e / theta.abs()).norm()) == pytest.approx(0.3)
    norm = sum((abs(float(t)) * float(h)) ** 2 for t, h in zip(theta, g, strict=True)) ** 0.5
    torch.testing.assert_close(e, torch.tensor([0.3 * float(t) ** 2 * float(h) / norm for t, h in zip(theta, g, strict=True)], dtype=torch.float64))
    ones = torch.ones_like(theta)
    torch.testing.assert_close(perturbation(ones, g, 0.3, adaptive=True), perturbation(ones, g, 0.3, adaptive=False))


@given(SEEDS, st.floats(0.0, 3.0))
def test_gsam_takes_off_what_is_orthogonal(seed: int, alpha: float) -> None:
    g, g_p = drawn(seed, 11), drawn(seed + 1, 11)
    d = gsam_direction(g, g_p, alpha)
    assert float(d @ g_p) == pytest.approx(float(g_p @ g_p), rel=1e-9)
    torch.testing.assert_close(gsam_direction(g, g_p, 0.0), g_p)  # SAM
    torch.testing.assert_close(d, g_p - alpha * (g - (g @ g_p) / (g_p @ g_p) * g_p))
    torch.testing.assert_close(gsam_direction(g, g, alpha), g, atol=1e-9, rtol=1e-9)


def test_the_papers_mixture() -> None:
    g, g_p = drawn(0, 5), drawn(1, 5)
    torch.testing.assert_close(sam_mix(g, g_p, 0.0), g)
    torch.testing.assert_close(sam_mix(g, g_p, 1.0), g_p)
    torch.testing.assert_close(sam_mix(g, g_p, 0.3), 0.7 * g + 0.3 * g_p)


@pytest.mark.parametrize("mode", ["gsam", "sam_mix"])
@pytest.mark.parametrize("adaptive", [True, False])
def test_without_an_ascent_it_is_the_gradient_for_every_alpha(mode, adaptive: bool) -> None:
    theta = drawn(2, 3, 8)
    for alpha in (0.0, 0.4, 1.0):
        d, _ = descent_direction(SharpnessSpec(mode=mode, rho=0.0, alpha=alpha, adaptive=adaptive), quartic, theta)
        torch.testing.assert_close(d, quartic(theta)[0], atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("spec", [None, SharpnessSpec(), SharpnessSpec(mode="sam_mix", rho=0.1)])
def test_two_passes_and_the_weights_stay_what_they_were(spec: SharpnessSpec | None) -> None:
    theta, seen = drawn(3, 2, 6), []

    def gradient(at: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        seen.append(at.clone())
        return quartic(at)

    kept = theta.clone()
    d, value = descent_direction(spec, gradient, theta)
    assert torch.equal(theta, kept)
    assert torch.equal(value, quartic(theta)[1])
    assert len(seen) == (1 if spec is None else 2)
    if spec is not None:
        g, g_p = quartic(seen[0])[0], quartic(seen[1])[0]
        torch.testing.assert_close(seen[1] - theta, perturbation(theta, g, spec.rho, spec.mode == "gsam"))
        expected = gsam_direction(g, g_p, 0.4) if spec.mode == "gsam" else sam_mix(g, g_p, 0.3)
        torch.testing.assert_close(d, expected)


def test_networks_that_go_at_once_do_not_meet() -> None:
    theta = drawn(4, 5, 6)
    for spec in (SharpnessSpec(), SharpnessSpec(mode="sam_mix", adaptive=True)):
        together, _ = descent_direction(spec, quartic, theta)
        alone = torch.stack([descent_direction(spec, quartic, row)[0] for row in theta])
        torch.testing.assert_close(together, alone)


def test_a_gradient_of_zero_gives_no_nan() -> None:
    zero = torch.zeros(4)
    for adaptive in (True, False):
        assert not perturbation(zero, zero, 0.1, adaptive).isnan().any()
    assert torch.equal(gsam_direction(zero, zero, 0.4), zero)


def test_wrong_fields() -> None:
    for wrong in ({"rho": -1.0}, {"alpha": -0.1}, {"mode": "asam"}, {"beta": 1}):
        with pytest.raises(ValidationError):
            SharpnessSpec(**wrong)
