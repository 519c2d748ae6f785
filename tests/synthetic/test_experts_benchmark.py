"""The benchmark of experts runs and writes evidence of the agreed shape. Its times are not looked at: tests do not time."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_experts_benchmark_runs_and_writes_its_evidence(tmp_path):
    output = tmp_path / "bench.json"
    command = [sys.executable, str(ROOT / "benchmarks" / "experts.py"), "--smoke", "--output", str(output)]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(ROOT / "src")}, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    found = json.loads(output.read_text())
    assert {"title", "checks", "commit", "versions", "machine", "date"} <= found.keys()
    assert [set(check) for check in found["checks"]] == [{"text", "value", "bound", "holds"}] * 3
    assert [row["objective"] for row in found["steps"]] == ["plain", "gsam", "gradient penalty"]
    assert all(set(row["milliseconds"]) == {"1", "2"} and min(row["median_milliseconds"].values()) > 0 for row in found["steps"])
