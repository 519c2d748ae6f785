"""Signals, locks, and several processes."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from limbeck.errors import InputError
from limbeck.train import checkpoint as checkpoints
from limbeck.train import locked

HERE = Path(__file__).parent
ENVIRONMENT = os.environ | {"PYTHONPATH": str(HERE), "OMP_NUM_THREADS": "1"}


def worker(*arguments, **options):
    return subprocess.Popen([sys.executable, str(HERE / "worker.py"), *map(str, arguments)], env=ENVIRONMENT, stdout=subprocess.PIPE, text=True, **options)


def launch(processes, *arguments):
    command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", str(processes), "--num_machines", "1"]
    command += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", str(free_port()), str(HERE / "worker.py"), *map(str, arguments)]
    done = subprocess.run(command, env=ENVIRONMENT | {"ACCELERATE_USE_CPU": "true"}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def test_processes_launched_without_a_gpu_are_one_group():
    """Accelerate joins them only where it is told that it is to use the CPU; each alone would do the whole work, into the same folder."""
    script = "import sys; from limbeck.train import parallel; n = parallel.accelerator('no').num_processes; sys.stdout.write(f'of {n}\\n')"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--no-python", sys.executable, "-c", script]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("of 2") == 2


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_writes_a_checkpoint_and_leaves(tmp_path, number, code):
    process = worker("slow", tmp_path)
    deadline = time.monotonic() + 120
    while not (tmp_path / "metrics.jsonl").exists() or not (tmp_path / "metrics.jsonl").read_text():
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(number)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == code
    assert signal.Signals(number).name in out
    path = checkpoints.latest(tmp_path / "checkpoints")
    assert path is not None
    assert path.name in f"step-{checkpoints.read(path).progress['total']}"
    assert f"at step {checkpoints.read(path).progress['total']}" in out


def test_a_second_process_on_a_run_folder_is_refused_with_the_owner(tmp_path):
    process = worker("hold", tmp_path)
    try:
        assert process.stdout.readline() == "held\n"
        with pytest.raises(InputError) as caught, locked(tmp_path):
            pytest.fail("both hold it")
        assert f"process {process.pid} on host {socket.gethostname()}" in str(caught.value)
    finally:
        process.kill()
        process.communicate()
    with locked(tmp_path):  # the kernel has dropped the dead owner's lock
        pass


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("one")
    process = worker("run", folder)
    process.communicate(timeout=120)
    assert process.returncode == 0
    return folder


@pytest.mark.parametrize("sharding", ["none", "fsdp2"])
def test_two_processes_train_the_student_of_one(tmp_path, alone, sharding):
    launch(2, "run", tmp_path, sharding)
    one, two = (checkpoints.read(checkpoints.latest(folder / "checkpoints")) for folder in (alone, tmp_path))
    assert one.weights.keys() == two.weights.keys()
    for name, value in one.weights.items():
        torch.testing.assert_close(two.weights[name], value, rtol=0, atol=1e-5)
    step = checkpoints.steps(alone / "checkpoints")[0]
    one, two = (checkpoints.read(folder / "checkpoints" / f"step-{step}") for folder in (alone, tmp_path))
    assert one.state["optimisers"].keys() == two.state["optimisers"].keys() == {"student", "critic"}
