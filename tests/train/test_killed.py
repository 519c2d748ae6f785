"""SIGKILL at 20 random moments, during the writing of checkpoints too: the run ends as one that was never killed, bit for bit."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from toys import same_folders

HERE = Path(__file__).parent


def nurse(folder, workers, kills, seed):
    environment = os.environ | {"PYTHONPATH": str(HERE), "OMP_NUM_THREADS": "1"}
    arguments = [sys.executable, str(HERE / "killed.py"), str(folder), str(workers), str(kills), str(seed)]
    done = subprocess.run(arguments, env=environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.split()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    nurse(folder, 0, 0, 0)
    return folder


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_twenty_kills_change_nothing(tmp_path, whole, workers):
    kills, _in_writing = nurse(tmp_path, workers, 20, 100 + workers)
    assert kills == "20"
    same_folders(whole, tmp_path)
