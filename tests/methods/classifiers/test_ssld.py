"""SSLD: no label is read, the pool is selected as the sheet says, two stages on the right images at the right rate, the teacher's batch norms."""

import copy
from collections.abc import Iterator
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from limbeck import losses
from limbeck.contract import IGNORE, Batch, Clock, OptimiserSpec, Phase, Update, Workbench
from limbeck.data import ArrayData
from limbeck.errors import InputError
from limbeck.losses.symmetric import symmetric_kl
from limbeck.methods.classifiers.ssld import SSLD, batch_statistics
from limbeck.teachers import EnsembleTeacher, FunctionTeacher, ModuleTeacher
from limbeck.train import TrainConfig, Trainer

C = 3
SETTINGS = settings(deadline=None, max_examples=25)
OWN, POOL = 20, 40


def network(seed: int, norm: bool = True) -> nn.Sequential:
    """[B, 1, 4, 4] → [B, C]; its running statistics are far from any batch's."""
    torch.manual_seed(seed)
    module = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4) if norm else nn.Identity(), nn.ReLU(), nn.Flatten(), nn.Dropout(0.5), nn.Linear(64, C)
    )
    if norm:
        nn.init.normal_(module[1].running_mean)
        module[1].running_var.mul_(2.5)
    return module


def images(count: int = OWN + POOL, seed: int = 5) -> ArrayData:
    generator = torch.Generator().manual_seed(seed)
    return ArrayData(torch.randn(count, 1, 4, 4, generator=generator), torch.randint(C, (count,), generator=generator), ["a", "b", "c"])


def pool_of(data: ArrayData) -> Tensor:
    """Every position but the first `OWN`."""
    return torch.arange(OWN, len(data))


def bound(data: ArrayData | None = None, *, pool: Tensor | None = None, teacher=None, test: ArrayData | None = None, seed: int = 0, kind=SSLD, **knobs) -> SSLD:
    data = images() if data is None else data
    return kind(**knobs).bind(
        student=network(1), teacher=teacher or ModuleTeacher(network(2)), train=data, test=test, num_classes=C, seed=seed, pool=pool
    )  # fmt: skip


def config(**changes) -> TrainConfig:
    return TrainConfig(**{"steps": 6, "batch_size": 8, "log_every": 1, "optimiser": OptimiserSpec(lr=0.1)} | changes)


class Noting(SSLD):
    """Notes which samples each phase showed, and the student after it; stops where it is told to."""

    stop_at = ("", -1)

    def setup(self) -> None:
        super().setup()
        self.shown: dict[str, list[int]] = {}
        self.after: dict[str, dict[str, Tensor]] = {}

    def updates(self, batch: Batch, clock: Clock) -> Iterator[Update]:
        if (clock.phase, clock.step) == self.stop_at:
            raise RuntimeError("stopped")
        self.shown.setdefault(clock.phase, []).extend(batch.ids.tolist())
        yield from super().updates(batch, clock)

    def leave(self, phase: Phase, clock: Clock, bench: Workbench) -> None:
        super().leave(phase, clock, bench)
        self.after[phase.name] = copy.deepcopy(self.student.state_dict())


def fitted(method: SSLD, folder=None, **changes) -> list[dict]:
    return Trainer(method, method.train_data, config(**changes), seed=method.seed, folder=folder, cpu=True, num_classes=C).fit().rows


@dataclass
class Bench:
    """A workbench for a selection without training."""

    device = torch.device("cpu")

    def outputs(self, forward, data, indices=None) -> Tensor:
        ids = torch.arange(len(data)) if indices is None else indices
        return torch.cat([forward(data.prepare(data.fetch(part)[0])) for part in ids.split(7)])


def mined(method: SSLD) -> Tensor:
    method.mine(Bench())
    return method.kept


class Given:
    """A teacher whose answer to an image is its first three pixels."""

    def logits(self, batch: Batch) -> Tensor:
        return batch.inputs.flatten(1)[:, :C]


# ---- the loss ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("knobs", "expected"),
    [
        ({}, symmetric_kl),
        ({"eps": 0.1}, lambda t, s: symmetric_kl(t, s, eps=0.1)),
        ({"loss": "kl"}, losses.kl_divergence),
        ({"loss": "js"}, losses.jensen_shannon),
        ({"loss": "soft_ce"}, lambda t, s: losses.soft_cross_entropy(s, t.softmax(-1))),
    ],
)
def test_the_loss_is_the_one_asked_for_of_teacher_and_student_on_the_same_images(knobs, expected) -> None:
    method = bound(teacher_bn="eval", **knobs)
    batch = Batch(torch.randn(8, 1, 4, 4))
    method.student.eval()
    (update,) = method.updates(batch, Clock())
    t_BC, s_BC = method.teacher.logits(batch), method.student(batch.inputs)
    torch.testing.assert_close(update.loss, expected(t_BC, s_BC))
    assert not torch.isclose(expected(t_BC, s_BC), expected(s_BC, t_BC)) or knobs.get("loss") not in ("kl", "soft_ce")
    assert update.metrics["agreement"] == (t_BC.argmax(-1) == s_BC.argmax(-1)).float().mean()
    update.loss.backward()
    assert all(p.grad is not None for p in method.student.parameters())
    assert all(p.grad is None for p in method.teacher.parameters())


def test_labels_have_no_effect_on_any_number() -> None:
    data, found = images(), []
    for targets in (data.targets, data.targets.flip(0), torch.full((len(data),), IGNORE), None):
        method = bound(data.with_targets(targets), pool=pool_of(data), per_class=6, stage2_steps=3)
        rows = fitted(method)
        found.append((rows, method.facts(), method.kept, method.student.state_dict()))
    for rows, facts, kept, weights in found[1:]:
        assert rows == found[0][0]
        assert facts == found[0][1]
        assert torch.equal(kept, found[0][2])
        assert all(torch.equal(value, found[0][3][name]) for name, value in weights.items())
    method, batch = bound(), Batch(torch.randn(8, 1, 4, 4), ids=torch.arange(8))
    method.student.eval()
    seen = [next(method.updates(replace(batch, targets=targets), Clock())).loss.item() for targets in (torch.arange(8) % C, torch.full((8,), -1), None)]
    assert len(set(seen)) == 1


# ---- the teacher's batch norms -------------------------------------------------------------------------------------------


def test_batch_norms_use_the_batch_without_dropout_and_their_statistics_do_not_drift() -> None:
    method = bound(teacher_bn="batch")
    module = method.teacher.members[0]
    before = copy.deepcopy(module.state_dict())
    x = torch.randn(8, 1, 4, 4)
    expected = copy.deepcopy(module)
    expected[1].train()  # the norm alone: dropout stays off
    torch.testing.assert_close(method.taught(Batch(x)), expected(x))
    assert not torch.allclose(method.taught(Batch(x)), module(x), atol=1e-2)
    method.pool = None
    fitted(method)
    assert {name: value.tolist() for name, value in module.state_dict().items()} == {name: value.tolist() for name, value in before.items()}
    assert not module[1].training
    torch.testing.assert_close(bound(teacher_bn="eval", teacher=method.teacher).taught(Batch(x)), module(x))


def test_an_ensembles_members_each_use_the_batch() -> None:
    members = [network(3), network(4)]
    method = bound(teacher=EnsembleTeacher(members))
    x = torch.randn(8, 1, 4, 4)
    alone = [copy.deepcopy(member) for member in members]
    for member in alone:
        member[1].train()
    torch.testing.assert_close(method.taught(Batch(x)).exp(), torch.stack([member(x).softmax(-1) for member in alone]).mean(0))


def test_a_single_sample_has_no_statistics_of_its_own() -> None:
    norm = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(16), nn.Linear(16, C))
    method = bound(teacher=ModuleTeacher(norm))
    x = torch.randn(1, 1, 4, 4)
    torch.testing.assert_close(method.taught(Batch(x)), norm.eval()(x))


def test_statistics_come_back_after_an_error() -> None:
    module = network(0).eval()
    kept = module[1].running_mean
    with pytest.raises(RuntimeError), batch_statistics(module):
        assert module[1].running_mean is None
        module(torch.zeros(2, 9, 4, 4))
    assert module[1].running_mean is kept
    assert list(module.state_dict()) == list(network(0).state_dict())


class Recorded:
    """A record of what a network said of every image in two views; the second is nonsense."""

    is_record = True

    def __init__(self, logits_NC: Tensor) -> None:
        self.logits_VNC, self.asked = torch.stack([logits_NC, -logits_NC]), []

    def lookup(self, ids_B: Tensor, views_B: Tensor) -> dict[str, Tensor]:
        self.asked.append((ids_B, views_B))
        return {"logits": self.logits_VNC[views_B, ids_B][:, None]}

    def logits(self, batch: Batch) -> Tensor:
        recorded = batch.recorded or self.lookup(batch.ids, batch.views)
        return recorded["logits"].softmax(-1).mean(1).log()


@pytest.mark.parametrize("teacher", [Recorded(torch.zeros(1, C)), FunctionTeacher(lambda x: x), Given()], ids=["record", "function", "object"])
def test_a_teacher_whose_norms_cannot_be_reached_refuses_the_batchs_statistics(teacher) -> None:
    with pytest.raises(InputError, match="batch norms cannot use the batch at hand") as error:
        bound(teacher=teacher)
    assert error.value.where == "teacher_bn"
    assert "teacher_bn: eval" in error.value.fix
    bound(teacher=teacher, teacher_bn="eval")


def test_a_record_selects_by_its_first_view_and_teaches_what_it_holds(monkeypatch) -> None:
    monkeypatch.setattr("limbeck.methods.classifiers.ssld._ROWS", 7)
    data, module = images(), ModuleTeacher(network(2))
    record = Recorded(module(data.inputs))
    method = bound(data, pool=pool_of(data), teacher=record, teacher_bn="eval", per_class=4)
    live = bound(data, pool=pool_of(data), teacher=module, teacher_bn="eval", per_class=4)
    assert torch.equal(mined(method), mined(live))
    assert max(len(ids) for ids, _ in record.asked) == 7
    assert not any(views.any() for _, views in record.asked)
    ids = torch.arange(6)
    batch = Batch(data.inputs[ids], ids=ids, recorded=record.lookup(ids, torch.zeros(6, dtype=torch.int64)))
    method.student.eval()
    (update,) = method.updates(batch, Clock())
    torch.testing.assert_close(update.loss, symmetric_kl(module(batch.inputs), method.student(batch.inputs)))


# ---- the selection -------------------------------------------------------------------------------------------------------


@given(st.integers(0, 2**31), st.integers(1, 20))
@SETTINGS
def test_at_most_k_of_a_class_the_surest_first(seed: int, k: int) -> None:
    data = images(seed=seed)
    method = bound(data, pool=pool_of(data), teacher=Given(), teacher_bn="eval", per_class=k)
    kept = mined(method)
    score, label = data.inputs.flatten(1)[OWN:, :C].softmax(-1).max(-1)
    expected = []
    for c in range(C):
        members = (label == c).nonzero()[:, 0].tolist()
        expected += sorted(members, key=lambda i: (-float(score[i]), i))[:k]
    assert kept.tolist() == [OWN + i for i in sorted(expected)]
    assert method.facts()["kept_by_class"] == [min(k, int((label == c).sum())) for c in range(C)]
    assert method.facts()["kept"] == len(kept) == method.facts()["metrics"]["kept"]
    assert method.facts()["confidence_of_kept"] >= method.facts()["confidence_of_pool"] - 1e-6


def with_pixels(data: ArrayData, positions: Tensor, logits_MC: Tensor) -> ArrayData:
    inputs = data.inputs.clone()
    inputs.flatten(1)[positions, :C] = logits_MC
    return ArrayData(inputs, data.targets, data.classes)


def test_ties_go_to_the_lower_position_and_less_sure_images_change_nothing() -> None:
    data = images()
    same = torch.tensor([2.0, 0.0, 0.0]).expand(POOL, C)
    tied = with_pixels(data, pool_of(data), same)
    knobs = {"teacher": Given(), "teacher_bn": "eval", "per_class": 5}
    assert mined(bound(tied, pool=pool_of(data), **knobs)).tolist() == list(range(OWN, OWN + 5))
    more = images(OWN + POOL + 30)
    more = with_pixels(more, torch.arange(OWN, OWN + POOL + 30), torch.tensor([2.0, 0.0, 0.0]) * torch.cat([torch.ones(POOL), torch.rand(30) * 0.9])[:, None])
    assert mined(bound(more, pool=torch.arange(OWN, OWN + POOL + 30), **knobs)).tolist() == list(range(OWN, OWN + 5))


@pytest.mark.parametrize("knobs", [{}, {"per_class": POOL}, {"per_class": 1, "selection": "all"}, {"selection": "random"}])
def test_the_whole_pool_is_kept_where_nothing_limits_it(knobs) -> None:
    data = images()
    assert torch.equal(mined(bound(data, pool=pool_of(data), **knobs)), pool_of(data))


def test_random_keeps_as_many_as_top_and_depends_on_the_seed_alone() -> None:
    data = images()
    chosen = {seed: mined(bound(data, pool=pool_of(data), per_class=4, selection="random", seed=seed)) for seed in (0, 1)}
    top = mined(bound(data, pool=pool_of(data), per_class=4))
    torch.manual_seed(99)
    assert torch.equal(chosen[0], mined(bound(data, pool=pool_of(data), per_class=4, selection="random", seed=0)))
    assert {len(top)} == {len(kept) for kept in chosen.values()}
    assert not torch.equal(chosen[0], chosen[1])
    assert all(len(kept.unique()) == len(kept) and torch.isin(kept, pool_of(data)).all() for kept in chosen.values())


def test_selection_asks_the_teacher_at_rest() -> None:
    """By its running statistics: an image's score does not depend on which others are asked with it."""
    data = images()
    assert torch.equal(mined(bound(data, pool=pool_of(data), per_class=3)), mined(bound(data, pool=pool_of(data), per_class=3, teacher_bn="eval")))


def test_near_duplicates_of_the_test_images_are_dropped_first() -> None:
    data, test = images(), images(6, seed=6)
    inputs = data.inputs.clone()
    inputs[[OWN + 3, OWN + 11]] = test.inputs[[0, 5]]
    data = ArrayData(inputs, data.targets, data.classes)
    kept = mined(bound(data, pool=pool_of(data), test=test, duplicate_threshold=0.999))
    assert sorted(set(pool_of(data).tolist()) - set(kept.tolist())) == [OWN + 3, OWN + 11]
    method = bound(data, pool=pool_of(data), test=test)
    assert torch.equal(mined(method), pool_of(data))  # not looked for
    assert method.facts()["duplicates"] == 0
    with pytest.raises(InputError, match="duplicate_threshold"):
        mined(bound(data, pool=pool_of(data), duplicate_threshold=0.999))
    with pytest.raises(InputError, match="every pool image is a near-duplicate"):
        mined(bound(data, pool=pool_of(data), test=data, duplicate_threshold=1.0))


# ---- the stages ----------------------------------------------------------------------------------------------------------


def test_stage_1_shows_own_and_selected_images_and_stage_2_own_ones_at_a_hundredth_of_the_rate() -> None:
    data = images()
    method = bound(data, pool=pool_of(data), per_class=5, stage2_epochs=2, kind=Noting)
    rows = fitted(method, steps=None, epochs=3, optimiser=OptimiserSpec(lr=0.2, schedule={"name": "linear"}))
    own = set(range(OWN))
    assert set(method.shown) == {"stage-1", "stage-2"}
    assert set(method.shown["stage-1"]) == own | set(method.kept.tolist())
    assert set(method.shown["stage-2"]) == own
    assert len(method.shown["stage-2"]) == 2 * OWN
    rates = {name: [row["student/lr"] for row in rows if row["phase"] == name] for name in method.shown}
    assert rates["stage-1"][0] == pytest.approx(0.2)
    assert rates["stage-2"][0] == pytest.approx(0.002)
    assert rates["stage-2"] == sorted(rates["stage-2"], reverse=True)  # the schedule anew


def test_without_a_pool_both_stages_show_all_images() -> None:
    for pool in (None, torch.zeros(0, dtype=torch.int64)):
        method = bound(pool=pool, stage2_steps=8, kind=Noting)
        fitted(method, steps=8)
        assert list(method.after) == ["stage-1", "stage-2"]
        assert all(len(set(shown)) == OWN + POOL for shown in method.shown.values())
        assert method.facts() == {}


@pytest.mark.parametrize("none", [{"stage2_steps": 0}, {"stage2_epochs": 0}])
def test_no_stage_2_returns_stage_1_bit_for_bit(none) -> None:
    data = images()
    with_it = bound(data, pool=pool_of(data), per_class=5, stage2_steps=4, kind=Noting)
    fitted(with_it)
    without = bound(data, pool=pool_of(data), per_class=5, **none)
    fitted(without)
    assert [phase.name for phase in without.phases()] == ["mine", "stage-1"]
    stage_1, end = with_it.after["stage-1"], without.student.state_dict()
    assert all(torch.equal(value, end[name]) for name, value in stage_1.items())
    assert not torch.equal(with_it.student.state_dict()["0.weight"], end["0.weight"])


@pytest.mark.parametrize("stop", [("stage-1", 3), ("stage-2", 2)])
def test_a_killed_run_goes_on_with_its_selection_bit_for_bit(tmp_path, stop) -> None:
    data = images()
    made = lambda: bound(data, pool=pool_of(data), per_class=5, selection="random", stage2_steps=4, kind=Noting)  # noqa: E731
    whole = made()
    fitted(whole)
    cut = made()
    cut.stop_at = stop
    with pytest.raises(RuntimeError, match="stopped"):
        fitted(cut, folder=tmp_path, checkpoint_steps=1)
    again = made()
    fitted(again, folder=tmp_path, checkpoint_steps=1)
    assert "mine" not in again.after
    assert torch.equal(again.kept, whole.kept)
    assert again.facts() == whole.facts()
    end = whole.student.state_dict()
    assert all(torch.equal(value, end[name]) for name, value in again.student.state_dict().items())


def test_phases_are_cheap_and_repeatable() -> None:
    data = images()
    method = bound(data, pool=pool_of(data), per_class=5, teacher=Given(), teacher_bn="eval")
    assert [phase.name for phase in method.phases()] == ["mine", "stage-1", "stage-2"]
    mine, _, last = method.phases()
    assert (mine.steps, last.epochs, last.rate) == (0, 30, 0.01)
    mined(method)
    first, second = (list(method.phases()) for _ in range(2))
    assert all(a.indices is b.indices is None or torch.equal(a.indices, b.indices) for a, b in zip(first, second, strict=True))


# ---- the contract --------------------------------------------------------------------------------------------------------


def test_nothing_is_read_on_the_host_in_a_step() -> None:
    """On the meta device any `.item()`, `bool()` or `float()` of a tensor raises."""
    teacher = ModuleTeacher(network(2)).to("meta")
    for knobs in ({}, {"loss": "soft_ce"}, {"teacher_bn": "eval", "eps": 1e-12}):
        method = SSLD(**knobs).bind(student=network(1).to("meta"), teacher=teacher, num_classes=C)
        (update,) = method.updates(Batch(torch.empty(8, 1, 4, 4, device="meta")), Clock())
        assert update.loss.device.type == "meta"


def test_wrong_input_is_named() -> None:
    data = images()
    with pytest.raises(InputError, match="every training image is of the pool"):
        bound(data, pool=torch.arange(len(data)))
    with pytest.raises(InputError, match="there are none"):
        SSLD().bind(student=network(1), teacher=ModuleTeacher(network(2)), pool=torch.arange(3))
    with pytest.raises(InputError, match="'eps' belongs to the loss 'symmetric_kl'"):
        SSLD(loss="kl", eps=1e-12)
    for knobs in ({"loss": "ce"}, {"eps": 0.0}, {"teacher_bn": "train"}, {"per_class": 0}, {"selection": "best"}, {"stage2_rate": 0.0}, {"stage2_steps": -1}):
        with pytest.raises(InputError, match=next(iter(knobs))):
            SSLD(**knobs)
