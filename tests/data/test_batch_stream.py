"""Batches as a function of the step: order, partition, and the same bits for any start, workers, processes and micro-batches."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.data import Dataset

from limbeck.contract import IGNORE, Batch
from limbeck.data import ArrayData, AugmentSpec, BatchPlan, WrappedData, evaluation_batches, stream
from limbeck.errors import InputError

MIXED = AugmentSpec(crop=1, flip=True, cutout=2, mixup=0.7, cutmix=1.0)
PLAIN = AugmentSpec(crop=2, flip=True, noise=0.1)


def _data(count: int = 23) -> ArrayData:
    images = torch.randint(0, 256, (count, 3, 5, 5), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    targets = torch.arange(count) % 4
    targets[::7] = IGNORE
    return ArrayData(images, targets, ["a", "b", "c", "d"], mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.4))


class _Random(Dataset[tuple[Tensor, int]]):
    def __len__(self) -> int:
        return 23

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        return torch.randint(0, 256, (3, 5, 5), dtype=torch.uint8) + i, i % 4


def _same(ours: list[list[Batch]], theirs: list[list[Batch]]) -> bool:
    pairs = [(a, b) for x, y in zip(ours, theirs, strict=True) for a, b in zip(x, y, strict=True)]
    return all(torch.equal(a.inputs, b.inputs) and torch.equal(a.targets, b.targets) and torch.equal(a.ids, b.ids) for a, b in pairs)


@given(st.integers(1, 40), st.integers(1, 12), st.booleans(), st.booleans(), st.integers(0, 2**40))
def test_an_epoch_visits_every_sample_once(count: int, batch_size: int, shuffle: bool, drop_last: bool, seed: int) -> None:
    if drop_last and batch_size > count:
        return
    plan = BatchPlan(torch.arange(count) * 3 + 1, batch_size, seed, shuffle=shuffle, drop_last=drop_last)
    epochs = []
    for e in range(2):
        steps = [plan.ids(e * plan.steps_per_epoch + k) for k in range(plan.steps_per_epoch)]
        assert all(epoch == e for epoch, _ in steps)
        sizes = [len(ids) for _, ids in steps]
        assert sizes[:-1] == [batch_size] * (len(sizes) - 1)
        assert min(sizes) == plan.smallest
        epochs.append(torch.cat([ids for _, ids in steps]).tolist())
        kept = count - count % batch_size if drop_last else count
        assert len(epochs[e]) == len(set(epochs[e])) == kept
        assert set(epochs[e]) <= set((torch.arange(count) * 3 + 1).tolist())
    if not shuffle:
        assert epochs[0] == epochs[1] == sorted(epochs[0])
    elif len(epochs[0]) > 12:
        assert epochs[0] != epochs[1]


def test_the_ids_of_a_step_do_not_depend_on_what_was_asked_before() -> None:
    plan = BatchPlan(50, 8, seed=3)
    forward = [plan.ids(step)[1].tolist() for step in range(20)]
    backward = [BatchPlan(50, 8, seed=3).ids(step)[1].tolist() for step in reversed(range(20))]
    assert forward == backward[::-1]
    assert forward != [BatchPlan(50, 8, seed=4).ids(step)[1].tolist() for step in range(20)]


@pytest.mark.parametrize(("samples", "batch_size", "drop_last"), [(0, 4, False), (5, 0, False), (5, -3, False), (5, 6, True)])
def test_impossible_plans_are_refused(samples: int, batch_size: int, drop_last: bool) -> None:
    with pytest.raises(InputError, match="batch_size"):
        BatchPlan(samples, batch_size, 0, drop_last=drop_last)


def test_a_batch_is_the_prepared_samples_and_what_was_asked_for() -> None:
    data, plan = _data(), BatchPlan(torch.tensor([1, 7, 3, 9, 20]), 2, seed=0)
    steps = list(stream(data, plan, augment=None, start=0, stop=6, num_classes=4))
    assert [[len(batch) for batch in step] for step in steps] == [[2], [2], [1], [2], [2], [1]]
    for step, [batch] in enumerate(steps):
        assert torch.equal(batch.ids, plan.ids(step)[1])
        assert torch.equal(batch.inputs, data.prepare(data.inputs[batch.ids]))
        assert torch.equal(batch.targets, data.targets[batch.ids])


@pytest.mark.parametrize("spec", [PLAIN, MIXED])
@pytest.mark.parametrize("source", ["array", "wrapped"])
def test_the_same_bits_for_any_start_and_number_of_workers(source: str, spec: AugmentSpec) -> None:
    data = _data() if source == "array" else WrappedData(_Random())

    def run(start: int, workers: int) -> list[list[Batch]]:
        return list(stream(data, BatchPlan(23, 6, seed=9), augment=spec, start=start, stop=11, micro=2, workers=workers, num_classes=4))

    torch.set_num_threads(2)  # workers have one
    try:
        whole = run(0, 0)
    finally:
        torch.set_num_threads(1)
    assert len(whole) == 11
    assert not torch.equal(whole[0][0].inputs, whole[4][0].inputs)
    assert _same(run(5, 0), whole[5:])
    torch.manual_seed(0)
    before = torch.get_rng_state()
    assert _same(run(0, 1), whole)
    assert _same(run(5, 2), whole[5:])
    assert torch.equal(torch.get_rng_state(), before)  # no one else's randomness is touched


@pytest.mark.parametrize("spec", [None, PLAIN, MIXED])
@pytest.mark.parametrize("labelled", [True, False])
def test_processes_and_micro_batches_share_out_the_global_batch(spec: AugmentSpec | None, labelled: bool) -> None:
    data, plan = _data(), BatchPlan(23, 9, seed=2, drop_last=True)
    data = data if labelled else data.with_targets(None)
    whole = [batch for [batch] in stream(data, plan, augment=spec, start=0, stop=4, num_classes=4)]
    for world, micro in ((1, 4), (2, 1), (3, 3), (4, 2)):
        ranks = [list(stream(data, plan, augment=spec, start=0, stop=4, rank=r, world=world, micro=micro, num_classes=4)) for r in range(world)]
        for step, batch in enumerate(whole):
            for r in range(world):
                parts = ranks[r][step]
                sizes = [len(part) for part in parts]
                assert len(parts) == micro
                assert max(sizes) - min(sizes) <= 1
                mine = slice(r, None, world)
                assert torch.equal(torch.cat([part.ids for part in parts]), batch.ids[mine])
                assert torch.equal(torch.cat([part.inputs for part in parts]), batch.inputs[mine])
                if labelled:
                    assert torch.equal(torch.cat([part.targets for part in parts]), batch.targets[mine])
                else:
                    assert all(part.targets is None for part in parts)


def test_a_short_batch_gives_fewer_micro_batches_but_never_an_empty_share() -> None:
    data, plan = _data(), BatchPlan(23, 11, seed=0)  # 11, 11, 1
    sizes = [[len(part) for part in step] for step in stream(data, plan, augment=None, start=0, stop=3, micro=4, num_classes=4)]
    assert sizes == [[3, 3, 3, 2], [3, 3, 3, 2], [1]]
    with pytest.raises(InputError, match="too few for 2 processes"):
        stream(data, plan, augment=None, start=0, stop=3, world=2, num_classes=4)
    with pytest.raises(InputError, match="impossible"):
        stream(data, plan, augment=None, start=3, stop=2, num_classes=4)
    assert list(stream(data, plan, augment=None, start=3, stop=3, workers=2, num_classes=4)) == []


class _Broken(Dataset[tuple[Tensor, int]]):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        return torch.zeros(2 + (i == 5)), 0


class _Threads(_Broken):
    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        return torch.tensor([float(torch.get_num_threads()), float(os.getpid())]), 0


@pytest.mark.parametrize("workers", [0, 1])
def test_what_a_sample_gets_wrong_is_said_in_one_line_from_a_worker_too(workers: int) -> None:
    batches = stream(WrappedData(_Broken()), BatchPlan(8, 2, 0, shuffle=False), augment=None, start=0, stop=4, workers=workers, num_classes=1)
    assert len(next(batches)[0]) == 2
    with pytest.raises(InputError) as caught:
        list(batches)
    assert caught.value.what.startswith("samples differ")
    assert caught.value.fix
    assert "\n" not in str(caught.value)


def test_workers_have_one_thread_and_leave_when_the_stream_is_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    torch.set_num_threads(2)
    try:
        batches = stream(WrappedData(_Threads()), BatchPlan(8, 2, 0), augment=None, start=0, stop=400, workers=2, num_classes=1)
        seen = torch.cat([next(batches)[0].inputs for _ in range(4)])
    finally:
        torch.set_num_threads(1)
    assert (seen[:, 0] == 1).all()
    pids = {int(pid) for pid in seen[:, 1]}
    assert len(pids) == 2
    assert os.getpid() not in pids
    batches.close()
    assert _gone(pids, within=5)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("indices", [None, torch.tensor([4, 0, 22, 3, 3])])
def test_evaluation_goes_through_the_data_in_order(indices: Tensor | None) -> None:
    data = _data()
    inputs, targets, ids = (torch.cat(parts) for parts in zip(*evaluation_batches(data, 4, indices), strict=True))
    expected = torch.arange(23) if indices is None else indices
    assert torch.equal(ids, expected)
    assert torch.equal(inputs, data.prepare(data.inputs[expected]))
    assert torch.equal(targets, data.targets[expected])
    assert [t for _, t, _ in evaluation_batches(data.with_targets(None), 12)] == [None, None]


def _gone(pids: set[int], within: float) -> bool:
    """Whether all these processes end within so many seconds (a zombie counts as ended)."""

    def runs(pid: int) -> bool:
        try:
            return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
        except (FileNotFoundError, ProcessLookupError):
            return False

    until = time.monotonic() + within
    while any(map(runs, pids)):
        if time.monotonic() > until:
            return False
        time.sleep(0.05)
    return True


_SCRIPT = """
import os, signal, sys, time, torch
from torch.utils.data import Dataset
from limbeck.data import BatchPlan, WrappedData, stream

class Pids(Dataset):
    def __len__(self): return 64
    def __getitem__(self, i): return torch.tensor([os.getpid()]), 0

caught = []
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, lambda s, frame: caught.append(s))
batches = stream(WrappedData(Pids()), BatchPlan(64, 2, 0), augment=None, start=0, stop=10**6, workers=2, num_classes=1)
print(*{int(next(batches)[0].inputs[0]) for _ in range(4)}, flush=True)
while len(caught) < 2:
    next(batches)
    time.sleep(0.01)
for _ in range(8):  # both workers still serve
    next(batches)
print("served", flush=True)
time.sleep(60)
"""


@pytest.mark.skipif(not hasattr(signal, "sigtimedwait"), reason="needs Linux signals")
def test_workers_outlive_signals_to_the_group_and_die_with_their_parent(tmp_path: Path) -> None:
    command, environment = [sys.executable, "-c", _SCRIPT], os.environ | {"TMPDIR": str(tmp_path)}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True) as parent:
        try:
            pids = {int(pid) for pid in parent.stdout.readline().split()}
            assert len(pids) == 2
            for number in (signal.SIGINT, signal.SIGTERM):  # what a terminal, or `timeout`, sends to the whole group
                os.killpg(parent.pid, number)
                time.sleep(0.2)
            assert parent.stdout.readline() == "served\n"
            parent.kill()
            assert _gone(pids, within=5)
            assert list(tmp_path.iterdir()) == []  # no sockets stay behind
        finally:
            parent.kill()
