"""The teacher that changes on a schedule: order, copies, one loaded at a time, refusals."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from limbeck.diffusion.build import mlp_denoiser
from limbeck.diffusion.denoisers import NetworkDenoiser
from limbeck.diffusion.teacher_path import Backtracking, ScheduledTeacher, TeacherPath, score_mismatch
from limbeck.errors import InputError


def denoiser(seed: int = 0, width: int = 4) -> NetworkDenoiser:
    torch.manual_seed(seed)
    made = mlp_denoiser((2,), 0, widths=(width,))
    nn.init.normal_(made.network.head.weight)
    return made


def same(a, b) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def path_of(*modules: nn.Module, storage="cpu") -> TeacherPath:
    path = TeacherPath(storage)
    for module in modules:
        path.record(module)
    return path


# ---- the schedule --------------------------------------------------------------------------------------------------------


def test_backtracking_goes_from_the_last_but_one_to_the_teacher_and_stays_there() -> None:
    schedule = Backtracking(nodes=3, iterations=2)
    assert [schedule.node(k) for k in range(8)] == [2, 2, 1, 1, 0, 0, 0, 0]
    assert schedule.switches == (2, 4)
    assert [k for k in range(20) if schedule.switched(k)] == [2, 4]


@given(st.integers(0, 12), st.integers(1, 9))
def test_there_are_n_targets_and_one_switch_less(nodes: int, iterations: int) -> None:
    schedule = Backtracking(nodes, iterations)
    seen = [schedule.node(k) for k in range(nodes * iterations + 3)]
    assert seen == sorted(seen, reverse=True)
    assert seen[-1] == 0
    assert len(set(seen)) == max(nodes, 1)
    assert len(schedule.switches) == max(nodes - 1, 0)
    assert [k for k in range(len(seen)) if schedule.switched(k)] == list(schedule.switches)


@pytest.mark.parametrize(("nodes", "iterations"), [(-1, 5), (2, 0)])
def test_a_schedule_that_is_none_is_refused(nodes, iterations) -> None:
    with pytest.raises(InputError, match="cannot be gone through"):
        Backtracking(nodes, iterations)


# ---- the path ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("storage", ["cpu", "device"])
def test_nodes_are_copies_and_not_references(storage) -> None:
    module = denoiser()
    path = path_of(module, storage=storage)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    with torch.no_grad():
        module.network.head.weight += 1
    path.record(module)
    assert same(path.states[0], before)
    assert same(path.states[1], module.state_dict())
    kept = path.state_dict()
    again = TeacherPath()
    again.load_state_dict(kept)
    path.states[0]["network.head.weight"].zero_()
    assert same(again.states[0], before)
    assert len(again) == 2


def test_a_node_that_does_not_fit_is_refused_and_never_loaded_in_part() -> None:
    path = path_of(denoiser(1))
    # what the official code does: keys with a foreign prefix and a lenient load, so that nothing is replaced
    path.states[0] = {f"fake_unet.{name}": value for name, value in path.states[0].items()}
    with pytest.raises(InputError, match="does not fit"):
        path.load(0, denoiser(0))
    with pytest.raises(InputError, match="does not fit"):
        path_of(denoiser(0, width=5)).load(0, denoiser(0))
    with pytest.raises(InputError, match="no node 1"):
        path_of(denoiser(0)).load(1, denoiser(0))


# ---- the target ----------------------------------------------------------------------------------------------------------


def test_the_target_has_the_active_nodes_weights_bitwise_and_the_teacher_keeps_its_own() -> None:
    teacher, first, second, last = (denoiser(seed) for seed in range(4))
    teacher_state = {name: value.clone() for name, value in teacher.state_dict().items()}
    scheduled = ScheduledTeacher(teacher, path_of(teacher, first, second, last), Backtracking(3, 2))
    expected = [second, second, first, first, teacher, teacher, teacher]
    module = scheduled.denoiser
    for iteration, node in enumerate(expected):
        assert scheduled.at(iteration) is module
        assert same(module.state_dict(), node.state_dict())
    assert same(teacher.state_dict(), teacher_state)
    assert not any(parameter.requires_grad for parameter in module.parameters())
    assert not module.training


def test_weights_are_copied_only_where_the_node_changes_and_any_iteration_may_be_asked_for_first(monkeypatch) -> None:
    teacher, first, second = denoiser(0), denoiser(1), denoiser(2)
    scheduled = ScheduledTeacher(teacher, path_of(teacher, first, second), Backtracking(2, 3))
    loads = []
    load = TeacherPath.load
    monkeypatch.setattr(TeacherPath, "load", lambda self, node, into: (loads.append(node), load(self, node, into)))
    for iteration in (1, 2, 3, 4, 5, 6):
        scheduled.at(iteration)
    assert loads == [1, 0]
    again = ScheduledTeacher(teacher, scheduled.path, scheduled.schedule)  # as after a restart
    assert same(again.at(2).state_dict(), first.state_dict())


def test_mismatch_is_one_at_the_teacher_zero_at_the_critic() -> None:
    a, b = torch.randn(5, 2), torch.randn(5, 2)
    assert float(score_mismatch(a, a, b)) == 1
    assert float(score_mismatch(b, a, b)) == 0
    torch.testing.assert_close(score_mismatch((a + b) / 2, a, b), torch.tensor(0.25))
