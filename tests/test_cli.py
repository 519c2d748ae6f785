"""The command line on a small run of the digits: what it writes, prints, refuses, and how it stops and goes on."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import yaml

import limbeck as library
from limbeck import cli
from limbeck.data.sources import digits
from limbeck.errors import LimbeckError
from limbeck.evaluate.predict import predict
from limbeck.ingredients import prepare
from limbeck.kinds import KINDS
from limbeck.listing import find
from limbeck.methods import BUILT_IN
from limbeck.recipe import Recipe
from limbeck.train import Trainer, checkpoint, locked
from recipe_parts import everything_in, fast, limbeck, quickstart, write

MEASURES = ("seed", "accuracy", "nll", "ece", "brier", "agreement", "kl_to_teacher", "per_class", "bins", "examples_seen", "curves")


def numbers(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """What result.json says, without what depends on the clock."""
    result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    return {arm["role"]: [{name: outcome[name] for name in MEASURES} for outcome in arm["outcomes"]] for arm in result["arms"]}


def one_paragraph(text: str) -> bool:
    return text.startswith("limbeck: ") and text.count("\n") == 1 and text.endswith("\n") and "Traceback" not in text


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run that was made once; tests that change it copy it first."""
    folder = tmp_path_factory.mktemp("finished")
    path = write(folder, {**quickstart(), "train": {**quickstart()["train"], "epochs": 2, "evaluate_every": 1}})
    called = limbeck("distill", path, "--run", folder / "run", "--quiet")
    assert called.code == 0, called
    return path, folder / "run", called


@pytest.fixture
def copied(finished, tmp_path):
    path, run, _ = finished
    return Path(shutil.copy(path, tmp_path)), Path(shutil.copytree(run, tmp_path / "run"))


# ---- the folder -----------------------------------------------------------------------------------------------------


def test_a_run_leaves_what_the_design_says(finished):
    path, run, called = finished
    assert Recipe.read(run / "recipe.yaml") == Recipe.read(path)
    environment = json.loads((run / "environment.json").read_text())
    assert environment["versions"]["torch"] == version("torch")
    assert environment["machine"]
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert any("student/loss" in row for row in rows)
    assert [row["epoch"] for row in rows if "eval/accuracy" in row] == [0, 1]
    assert re.fullmatch(r"step-\d+", max((run / "checkpoints").iterdir()).name)
    for place in (run, run / "teacher", run / "alone"):
        assert {p.name for p in (place / "artefact").iterdir()} == {"config.json", "model.safetensors"}
        assert (place / "metrics.jsonl").stat().st_size > 0
    assert (run / "report.html").read_text().startswith("<!doctype html>") or "<html" in (run / "report.html").read_text()[:300]
    assert set(numbers(run)) == {"teacher", "alone", "distilled"}
    assert not [name for name in everything_in(run) if ".tmp" in name or name.endswith((".new", ".old"))]
    assert "student distilled" in called.out
    assert f"report: {run / 'report.html'}" in called.out
    assert not called.err


def test_the_default_folder_is_runs_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = write(tmp_path, quickstart())
    assert limbeck("distill", path, "-q", "--set", "compare.alone=false", "--set", "evaluate.latency=false", "--set", "name=other").code == 0
    assert (tmp_path / "runs" / "other" / "result.json").exists()
    assert "alone" not in numbers(tmp_path / "runs" / "other")


def test_a_finished_run_is_not_trained_again(finished):
    path, run, called = finished
    before = {p: p.stat().st_mtime_ns for p in run.rglob("*") if p.name != ".lock"}
    with mock.patch.object(Trainer, "fit", side_effect=AssertionError("trained again")):
        again = limbeck("distill", path, "--run", run)
    assert (again.code, again.out, again.err) == (0, called.out, "")
    assert {p: p.stat().st_mtime_ns for p in run.rglob("*") if p.name != ".lock"} == before


def test_another_recipe_is_refused_with_the_line_that_differs(finished):
    path, run, _ = finished
    called = limbeck("distill", path, "--run", run, "--set", "method.temperature=2")
    assert called.code == 2
    assert one_paragraph(called.err)
    number = next(i for i, line in enumerate((run / "recipe.yaml").read_text().splitlines(), 1) if "temperature" in line)
    assert f"(line {number} of its recipe.yaml is 'temperature: 4.0', now 'temperature: 2')" in called.err
    assert "--fresh" in called.err


def test_fresh_starts_anew(copied):
    path, run = copied
    (run / "stray.txt").write_text("of the old run")
    called = limbeck("distill", path, "--run", run, "--fresh", "-q", "--set", "method.temperature=2")
    assert called.code == 0
    assert not (run / "stray.txt").exists()
    assert Recipe.read(run / "recipe.yaml").method.args["temperature"] == 2


def test_fresh_with_a_wrong_recipe_keeps_the_old_run(copied):
    path, run = copied
    before = everything_in(run)
    assert limbeck("distill", path, "--run", run, "--fresh", "-q", "--set", "student.model.widths=[0]").code == 2
    assert everything_in(run) == before


def test_folders_that_are_no_run_are_refused(finished, tmp_path):
    path, _, _ = finished
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter.txt").write_text("dear")
    (tmp_path / "file").write_text("x")
    for folder, words in [("full", "not empty and no run ('letter.txt' is in it)"), ("file", "cannot be made"), ("file/below", "cannot be made")]:
        called = limbeck("distill", path, "--run", tmp_path / folder)
        assert called.code == 2
        assert one_paragraph(called.err)
        assert words in called.err
    assert everything_in(tmp_path) <= {"full", "full/letter.txt", "full/.lock", "file"}


def test_a_locked_folder_is_refused_with_the_owner(copied):
    path, run = copied
    (run / "result.json").unlink()
    with locked(run):
        called = limbeck("distill", path, "--run", run)
    assert called.code == 2
    assert one_paragraph(called.err)
    assert f"in use by process {os.getpid()} on host {socket.gethostname()}" in called.err


def test_two_seeds(tmp_path):
    path = write(tmp_path, {**quickstart(), "seeds": [5, 1]})
    called = limbeck("distill", path, "--run", tmp_path / "run", "-q")
    assert called.code == 0
    run = tmp_path / "run"
    found = numbers(run)
    assert [[o["seed"] for o in found[role]] for role in ("teacher", "alone", "distilled")] == [[5, 1]] * 3
    assert found["teacher"][0]["accuracy"] == found["teacher"][1]["accuracy"]  # one teacher for both
    assert found["distilled"][0]["nll"] != found["distilled"][1]["nll"]
    assert (run / "seed-1" / "artefact" / "config.json").exists()
    assert (run / "seed-1" / "alone" / "artefact" / "config.json").exists()
    assert not (run / "seed-1" / "teacher").exists()
    assert not (run / "seed-5").exists()


# ---- cut short ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def long_recipe(tmp_path_factory):
    """A recipe whose training is long enough to be stopped in the middle, and its uninterrupted result."""
    folder = tmp_path_factory.mktemp("long")
    recipe = quickstart()
    recipe["train"] = {"steps": 60, "batch_size": 16, "checkpoint_steps": 4, "log_every": 7, "optimiser": {"lr": 0.05}}
    recipe["evaluate"] = {"latency": False}
    recipe["threads"] = 1  # sums depend on the number of threads: the processes that are compared must have the same
    path = write(folder, recipe)
    assert limbeck("distill", path, "--run", folder / "whole", "-q").code == 0
    return path, folder / "whole"


def started(path: Path, run: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "limbeck", "distill", str(path), "--run", str(run), "--quiet"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


def wait_for(what: str, folder: Path, process: subprocess.Popen[str]) -> None:
    """Until a file or folder matching `what` is there."""
    deadline = time.monotonic() + 60
    while not list(folder.glob(what)):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.002)


def test_a_killed_run_goes_on_to_the_same_numbers(long_recipe, tmp_path):
    path, whole = long_recipe
    run = tmp_path / "run"
    for what in ("alone/checkpoints/step-*", "checkpoints/step-*"):  # in the comparison, then in the distillation
        process = started(path, run)
        wait_for(what, run, process)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not (run / "result.json").exists()
    assert limbeck("distill", path, "--run", run, "-q").code == 0
    assert numbers(run) == numbers(whole)
    for place in (".", "alone", "teacher"):
        assert (run / place / "artefact" / "model.safetensors").read_bytes() == (whole / place / "artefact" / "model.safetensors").read_bytes()
        assert (run / place / "metrics.jsonl").read_bytes() == (whole / place / "metrics.jsonl").read_bytes()


def test_no_temporary_files_stay(long_recipe):
    _, whole = long_recipe
    assert not [name for name in everything_in(whole) if ".tmp" in name or name.endswith((".new", ".old"))]


def test_sigterm_writes_a_checkpoint_and_a_second_process_is_refused_meanwhile(long_recipe, tmp_path):
    path, whole = long_recipe
    run = tmp_path / "run"
    process = started(path, run)
    wait_for("checkpoints/step-*", run, process)
    process.send_signal(signal.SIGSTOP)
    second = limbeck("distill", path, "--run", run)
    assert (second.code, f"process {process.pid} on host {socket.gethostname()}" in second.err) == (2, True)
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGCONT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 143
    assert one_paragraph(err)
    step = re.search(r"stopped by SIGTERM: a checkpoint at step (\d+) was written", err)
    assert step is not None
    assert (run / "checkpoints" / f"step-{step[1]}" / "manifest.json").exists()
    assert not out
    assert limbeck("distill", path, "--run", run, "-q").code == 0
    assert numbers(run) == numbers(whole)


def test_going_on_from_a_named_checkpoint(long_recipe, tmp_path):
    path, whole = long_recipe
    run = Path(shutil.copytree(whole, tmp_path / "run"))
    shutil.rmtree(run / "outcomes")
    (run / "result.json").unlink()
    called = limbeck("distill", path, "--run", run, "-q", "--from", "step-3")
    assert called.code == 2
    assert one_paragraph(called.err)
    assert "step-3" in called.err
    newest = checkpoint.steps(run / "checkpoints")[-1]
    weights = run / "checkpoints" / f"step-{newest}" / "weights.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    called = limbeck("distill", path, "--run", run, "-q")
    assert called.code == 2
    assert "weights.safetensors does not match its checksum" in called.err
    before = f"step-{checkpoint.steps(run / 'checkpoints')[0]}"
    assert before != f"step-{newest}"
    assert before in called.err
    assert limbeck("distill", path, "--run", run, "-q", "--from", before).code == 0
    assert numbers(run) == numbers(whole)


# ---- commands on a finished run -------------------------------------------------------------------------------------


def test_load_gives_the_module_with_the_reported_accuracy(finished):
    path, run, _ = finished
    test = prepare(Recipe.read(path).data, 0).test
    for place, role in [(run, "distilled"), (run / "alone", "alone"), (run / "teacher", "teacher")]:
        module = library.load(place)
        assert not module.training
        accuracy = float((predict(module, test, batch_size=64).argmax(1) == test.targets).double().mean())
        assert accuracy == pytest.approx(numbers(run)[role][0]["accuracy"], abs=1e-12)


def test_evaluate(finished):
    _, run, _ = finished
    called = limbeck("evaluate", run, "--json")
    assert called.code == 0
    values = json.loads(called.out)
    reported = numbers(run)["distilled"][0]
    for name in ("accuracy", "nll", "ece", "brier"):
        assert values[name] == pytest.approx(reported[name], abs=1e-6)
    assert values["samples"] == 100
    plain = limbeck("evaluate", run).out
    assert re.search(rf"^accuracy +{values['accuracy']:.6g}$", plain, re.MULTILINE)
    other = json.loads(limbeck("evaluate", run, "--json", "--set", "data.test_size=200").out)
    assert other["samples"] == 200
    called = limbeck("evaluate", run, "--set", "data.source={name: fashion_mnist, folder: nowhere}")
    assert (called.code, one_paragraph(called.err)) == (2, True)


def test_report_and_compare(copied, finished, tmp_path):
    _, run = copied
    page = (run / "report.html").read_bytes()
    (run / "report.html").unlink()
    called = limbeck("report", run)
    assert called.code == 0
    assert (run / "report.html").read_bytes() == page
    called = limbeck("compare", run, finished[1], "-o", tmp_path / "two.html")
    assert called.code == 0
    assert called.out.count("student distilled") == 2
    assert (tmp_path / "two.html").stat().st_size > 1000
    called = limbeck("compare", run)
    assert (called.code, one_paragraph(called.err)) == (2, True)


@pytest.mark.parametrize(
    ("form", "made"), [("safetensors", "artefact-safetensors/model.safetensors"), ("hf", "artefact-hf/README.md"), ("onnx", "artefact.onnx")]
)
def test_export(copied, form, made):
    if form == "onnx":
        pytest.importorskip("onnxruntime")
    _, run = copied
    called = limbeck("export", run, "--to", form)
    assert (called.code, called.err) == (0, "")
    assert (run / made).stat().st_size > 100
    assert made.split("/")[0] in called.out
    if form == "onnx":
        assert "largest difference" in called.out
    else:
        same = library.load(run / made.split("/")[0]).state_dict()
        assert all(torch.equal(value, same[name]) for name, value in library.load(run).state_dict().items())


@pytest.mark.parametrize("command", [["evaluate"], ["report"], ["compare", "."], ["export", "--to", "onnx"], ["export", "--to", "hf"]])
@pytest.mark.parametrize("folder", ["nowhere", "empty", "unfinished", "broken", "file"])
def test_folders_without_a_result_are_refused(command, folder, tmp_path, copied, monkeypatch):
    monkeypatch.chdir(tmp_path)
    _, run = copied
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    shutil.copytree(run, tmp_path / "unfinished", ignore=shutil.ignore_patterns("result.json", "artefact"))
    shutil.copytree(run, tmp_path / "broken")
    (tmp_path / "broken" / "result.json").write_bytes(b"\xff{")
    (tmp_path / "broken" / "artefact" / "config.json").write_text("{")
    before = everything_in(tmp_path)
    called = limbeck(command[0], folder, *command[1:])
    assert called.code == 2, called
    assert one_paragraph(called.err), called.err
    assert folder in called.err
    assert everything_in(tmp_path) == before


def test_a_report_of_the_result_but_no_artefact_is_possible(copied):
    _, run = copied
    shutil.rmtree(run / "artefact")
    assert limbeck("report", run).code == 0
    assert limbeck("evaluate", run).code == 2


# ---- new ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in BUILT_IN if find(name).produces in KINDS])
def test_the_recipe_of_new_runs(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert limbeck("new", name).code == 0
    called = limbeck("distill", f"{name}.yaml", "-q", *fast(name, tmp_path))
    assert called.code == 0, called
    outcome = json.loads((tmp_path / "runs" / name / "result.json").read_text())["arms"][-1]["outcomes"][0]
    measures = outcome["measures"] or {"accuracy": outcome["accuracy"]}
    assert any(measures.get(name) is not None for name in ("accuracy", "mmd2", "perplexity"))
    assert library.load(tmp_path / "runs" / name) is not None


# ---- the entry point ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        ["distil"], ["distill"], ["distill", "a", "b"], ["distill", "a", "--sett", "x=1"], ["distill", "a", "--run"], ["export", "x"],
        ["export", "x", "--to", "tflite"], ["compare"], ["new"], ["--nonsense"], ["methods", "a", "b"], ["claims", "no_such_claim"],
        ["new", "no_such_method"], ["methods", "no_such_method"],
    ],
)  # fmt: skip
def test_wrong_usage(arguments, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    called = limbeck(*arguments)
    assert called.code == 2
    assert called.err
    assert "Traceback" not in called.err
    assert not list(tmp_path.iterdir())


def test_help_names_every_command():
    called = limbeck("--help")
    assert called.code == 0
    for command in ("distill", "evaluate", "compare", "report", "export", "methods", "new", "claims"):
        assert re.search(rf"\b{command}\b", called.out)


@pytest.mark.parametrize(("error", "code"), [(LimbeckError("two\nlines"), 1), (KeyboardInterrupt(), 130)])
def test_exit_codes(error, code):
    with mock.patch.object(cli, "app", side_effect=error):
        called = limbeck("methods")
    assert called.code == code
    assert one_paragraph(called.err)


def test_a_fault_of_our_own_keeps_its_traceback():
    with mock.patch.object(cli, "app", side_effect=ZeroDivisionError("a fault")), pytest.raises(ZeroDivisionError):
        limbeck("methods")


def test_python_m_limbeck():
    done = subprocess.run([sys.executable, "-m", "limbeck", "methods", "kdd"], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", "limbeck: unknown method 'kdd'. Did you mean 'kd'?\n")


def test_digits_and_yaml_of_the_helper_are_what_they_seem(tmp_path):
    assert len(digits().test) == 450
    assert yaml.safe_load(write(tmp_path, quickstart()).read_text()) == quickstart()
