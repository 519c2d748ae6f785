"""The benchmark of trajectory gradients runs and writes evidence of the agreed shape. Its times and memory are not looked at: tests do not time."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_trajectories_benchmark_runs_and_writes_its_evidence(tmp_path):
    output = tmp_path / "bench.json"
    command = [sys.executable, str(ROOT / "benchmarks" / "trajectories.py"), "--smoke", "--output", str(output)]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(ROOT / "src")}, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    found = json.loads(output.read_text())
    assert {"title", "checks", "commit", "versions", "machine", "date"} <= found.keys()
    assert [set(check) for check in found["checks"]] == [{"text", "value", "bound", "holds"}] * 4
    assert [(row["steps"], row["mode"]) for row in found["ways"]] == [(2, "unroll"), (2, "adjoint")]
    assert all(check["holds"] for check in found["checks"][-2:])  # the gradients: no clock and no memory in them
