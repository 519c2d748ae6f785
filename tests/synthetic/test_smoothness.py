"""How smooth and flat a trajectory is."""

import pytest
import torch

from limbeck.errors import InputError
from limbeck.synthetic.smoothness import accumulated_error, error_parts, largest_step, roughness, sharpness, step_norms


def drawn(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_steps_of_a_known_path() -> None:
    path = torch.tensor([[0.0, 0.0], [3.0, 4.0], [3.0, 4.0], [3.0, 5.0]])
    assert step_norms(path).tolist() == [5.0, 0.0, 1.0]
    assert float(largest_step(path)) == 5.0
    assert float(roughness(path)) == 6.0  # (-3, -4) and (0, 1)


def test_an_even_way_along_a_line_is_not_rough() -> None:
    direction = drawn(0, 6)
    line = torch.arange(5.0, dtype=torch.float64)[:, None] * direction
    assert float(roughness(line)) == pytest.approx(0, abs=1e-12)
    assert float(largest_step(line)) == pytest.approx(float(direction.norm()))
    assert float(roughness(torch.arange(5.0, dtype=torch.float64)[:, None] ** 2 * direction)) == pytest.approx(3 * 2 * float(direction.norm()))


def test_the_error_is_measured_by_the_experts_way() -> None:
    start, expert = torch.zeros(2), torch.tensor([3.0, 4.0])
    assert float(accumulated_error(expert + torch.tensor([0.0, 1.0]), expert, start)) == pytest.approx(0.2)
    assert float(accumulated_error(start, expert, start)) == 1.0
    with pytest.raises(InputError, match="not moved"):
        accumulated_error(expert, start, start)


def test_the_parts_of_the_error_add_up() -> None:
    """(5): with a curved displacement, ε_{e+E} = ε_e + I + δ; from the expert itself only δ is left."""
    expert, target, reached = drawn(1, 5), drawn(2, 5), drawn(3, 5)

    def displacement(theta: torch.Tensor) -> torch.Tensor:
        return -0.1 * theta**3

    parts = error_parts(reached, expert, target, displacement)
    torch.testing.assert_close(parts.carried + parts.start + parts.matching, reached + displacement(reached) - target)
    torch.testing.assert_close(parts.carried, reached - expert)
    own = error_parts(expert, expert, target, displacement)
    assert not own.carried.any()
    assert not own.start.any()
    # where the displacement does not depend on the start (a flat landscape), the displaced start costs nothing
    assert not error_parts(reached, expert, target, lambda theta: torch.ones_like(theta)).start.any()


def test_sharpness_of_a_bowl() -> None:
    """Loss = k‖θ‖²/2: going ρ along the gradient costs k ρ ‖θ‖ + k ρ²/2."""
    theta = drawn(4, 6)
    for k in (0.5, 3.0):
        found = sharpness(lambda at, k=k: k * at.square().sum() / 2, theta, 0.1)
        assert float(found) == pytest.approx(k * 0.1 * float(theta.norm()) + k * 0.005)
        assert not found.requires_grad
    assert not theta.requires_grad


def test_too_short_a_path() -> None:
    for function, least in ((step_norms, 2), (largest_step, 2), (roughness, 3)):
        with pytest.raises(InputError, match=f"at least {least}"):
            function(torch.zeros(least - 1, 4))
    with pytest.raises(InputError):
        step_norms(torch.zeros(4))
