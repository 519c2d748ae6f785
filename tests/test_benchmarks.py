"""The engine's benchmark runs and writes evidence of the agreed shape. Its figures are not looked at: tests do not time."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def test_the_engine_benchmark_runs_and_writes_its_evidence(tmp_path):
    output = tmp_path / "bench.json"
    environment = {k: v for k, v in os.environ.items() if k != "LIMBECK_DATA"} | {"PYTHONPATH": str(ROOT / "src")}
    command = [sys.executable, str(ROOT / "benchmarks" / "engine.py"), "--smoke", "--output", str(output)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    found = json.loads(output.read_text())
    assert {"checks", "commit", "versions", "machine", "date"} <= found.keys()
    assert [set(check) for check in found["checks"]] == [{"text", "value", "bound", "holds"}] * 2
    assert all(check["holds"] == (check["value"] <= check["bound"]) for check in found["checks"])
    assert found["seconds_a_step"].keys() == {"bare", "limbeck"}


def test_the_records_benchmark_runs_and_writes_its_evidence(tmp_path):
    output = tmp_path / "bench.json"
    environment = {k: v for k, v in os.environ.items() if k != "LIMBECK_DATA"} | {"PYTHONPATH": str(ROOT / "src")}
    command = [sys.executable, str(ROOT / "benchmarks" / "records.py"), "--smoke", "--output", str(output)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    found = json.loads(output.read_text())
    assert {"checks", "codecs", "pieces_us", "commit", "versions", "machine", "date"} <= found.keys()
    assert [set(check) for check in found["checks"]] == [{"text", "value", "bound", "holds"}] * 3
    assert all(check["holds"] == (check["value"] <= check["bound"]) for check in found["checks"])
    assert found["seconds_a_step"].keys() == {"labels", "full", "topk"}
    assert found["seconds_a_recording"].keys() == {"forward", "recording"}
    assert {(row["classes"], row["codec"]) for row in found["codecs"]} == {(c, n) for c in (10, 100) for n in ("full", "half", "log8", "topk", "topk8")}
    assert all(row["kl_mean"] == 0 for row in found["codecs"] if row["codec"] == "full")


def test_the_generators_benchmark_runs_and_writes_its_evidence(tmp_path):
    output = tmp_path / "bench.json"
    command = [sys.executable, str(ROOT / "benchmarks" / "generators.py"), "--smoke", "--output", str(output)]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(ROOT / "src")}, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    found = json.loads(output.read_text())
    assert {"checks", "commit", "versions", "machine", "date"} <= found.keys()
    assert [set(check) for check in found["checks"]] == [{"text", "value", "bound", "holds"}]
    assert found["seconds_an_iteration"].keys() == {"bare", "limbeck"}


@pytest.mark.parametrize(
    ("script", "more", "keys"),
    [
        ("token_records", [], {"frontier", "cited"}),
        ("token_training", ["--threads", "1"], {"tokens_per_second", "seconds"}),
        ("linear_divergence", ["--no-peer"], {"ways", "floor"}),
    ],
)
def test_the_benchmarks_of_language_models_run_and_write_their_evidence(script, more, keys, tmp_path):
    output = tmp_path / "bench.json"
    environment = {k: v for k, v in os.environ.items() if k != "LIMBECK_DATA"} | {"PYTHONPATH": str(ROOT / "src")}
    command = [sys.executable, str(ROOT / "benchmarks" / f"{script}.py"), "--smoke", "--output", str(output), *more]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    found = json.loads(output.read_text())
    assert {"checks", "commit", "versions", "machine", "date"} | keys <= found.keys()
    assert all(set(check) == {"text", "value", "bound", "holds"} for check in found["checks"])
