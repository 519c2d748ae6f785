import warnings

import pytest
import torch
from torch import nn

from limbeck.evaluate import cost


class Recorder(nn.Module):
    """Says in a shared list that it was called, with how many rows and in which mode."""

    def __init__(self, name, calls):
        super().__init__()
        self.name, self.calls = name, calls

    def forward(self, x):
        self.calls.append((self.name, len(x), self.training, torch.is_grad_enabled(), torch.get_num_threads()))
        return x


def test_parameters_and_bytes_count_shared_tensors_once():
    layer = nn.Linear(3, 3)
    net = nn.Sequential(layer, nn.BatchNorm1d(3), layer)
    assert cost.parameters(net) == 12 + 6
    # two running statistics of three floats and the int64 counter of batches are saved, too
    assert cost.tensor_bytes(net) == (12 + 6 + 6) * 4 + 8


def test_bytes_follow_the_type_and_leave_out_what_is_not_saved():
    net = nn.Linear(8, 2).to(torch.bfloat16)
    net.register_buffer("scratch", torch.zeros(1000), persistent=False)
    net.register_buffer("codes", torch.zeros(10, dtype=torch.uint8))
    assert cost.tensor_bytes(net) == (16 + 2) * 2 + 10


@pytest.mark.parametrize(
    ("module", "shape", "expected"),
    [
        (nn.Linear(7, 5), (7,), 35),
        (nn.Conv2d(3, 8, 3, padding=1), (3, 8, 8), 3 * 8 * 9 * 64),
        (nn.Conv2d(4, 8, 3, stride=2, groups=4), (4, 9, 9), 8 * 9 * 16),
        (nn.Sequential(nn.Flatten(), nn.Linear(12, 6), nn.ReLU(), nn.Linear(6, 2)), (3, 2, 2), 84),
        (nn.ReLU(), (5,), 0),
        (nn.TransformerEncoderLayer(32, 4, 64, batch_first=True), (10, 32), 10 * 32 * 128 + 2 * 10 * 10 * 32 + 2 * 10 * 32 * 64),
        (nn.LSTM(8, 6, batch_first=True), (5, 8), 5 * 24 * (8 + 6)),
    ],
    ids=["linear", "conv", "grouped conv", "mlp", "relu", "encoder layer", "lstm"],
)
def test_macs_by_hand(module, shape, expected):
    fast = torch.backends.mha.get_fastpath_enabled(), torch.backends.mkldnn.enabled
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert cost.macs(module, shape) == expected
    assert module.training
    assert (torch.backends.mha.get_fastpath_enabled(), torch.backends.mkldnn.enabled) == fast


def test_latencies_are_measured_in_turns_in_eval_mode_at_each_batch_size():
    calls = []
    modules = {name: Recorder(name, calls).train() for name in ("teacher", "student")}
    threads = torch.get_num_threads()
    found = cost.latencies(modules, torch.zeros(3, 2), batch_sizes=(1, 7), repeats=4, warmup=2, threads=1)
    assert torch.get_num_threads() == threads
    assert all(m.training for m in modules.values())
    assert not any(training or grad for _, _, training, grad, _ in calls)
    assert {used for *_, used in calls} == {1}
    cells = [("teacher", 1), ("teacher", 7), ("student", 1), ("student", 7)]
    turns = [[(name, rows) for name, rows, *_ in calls[i : i + 4]] for i in range(0, len(calls), 4)]
    assert turns == [cells, cells[::-1]] * 3
    for name in modules:
        assert [x.batch_size for x in found[name]] == [1, 7]
        for timed in found[name]:
            assert len(timed.values) == 4
            assert 0 < timed.p10 <= timed.median_s <= timed.p90


def test_latency_sees_a_slow_module():
    class Slow(nn.Module):
        def forward(self, x):
            import time

            time.sleep(0.003)
            return x

    found = cost.latencies({"slow": Slow(), "fast": nn.Identity()}, torch.zeros(1, 2), batch_sizes=(1,), repeats=5, warmup=1)
    assert found["slow"][0].median_s >= 0.003 > found["fast"][0].median_s
    alone = cost.latency(nn.Identity(), torch.zeros(9, 2), repeats=3, warmup=0)
    assert (alone.batch_size, len(alone.values)) == (9, 3)


def test_threads_and_modes_come_back_after_a_failure():
    class Broken(nn.Module):
        def forward(self, x):
            raise RuntimeError("no")

    module, threads = Broken(), torch.get_num_threads()
    with pytest.raises(RuntimeError, match="no"):
        cost.latency(module, torch.zeros(1, 1), threads=threads + 1)
    assert torch.get_num_threads() == threads
    assert module.training
