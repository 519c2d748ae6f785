"""The layers of DESIGN §2, and the habits of a method file."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "src" / "limbeck"
METHOD_FILES = sorted((SOURCE / "methods").rglob("*.py"))
LONGEST = 220
NOT_A_METHODS_WORK = {"item", "backward", "step", "zero_grad", "cuda"}  # the engine does these; .item() waits for the device


def test_import_linter_holds_the_layers():
    pytest.importorskip("importlinter")
    script = "import sys; from importlinter.cli import lint_imports_command; sys.argv = ['lint-imports', '--no-cache']; lint_imports_command()"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"Contracts: \d+ kept, 0 broken\.", done.stdout), done.stdout


def called_attributes(path: Path) -> set[str]:
    """Names of the methods that a file calls: `x.backward(…)` gives 'backward'."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {node.func.attr for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)}


def test_there_are_method_files_to_look_at():
    assert {"kd.py", "meal_v2.py", "supervised.py"} <= {path.name for path in METHOD_FILES}


@pytest.mark.parametrize("path", METHOD_FILES, ids=lambda path: path.name)
def test_a_method_file_holds_mathematics_and_nothing_else(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= LONGEST
    assert not called_attributes(path) & NOT_A_METHODS_WORK


@pytest.mark.parametrize("path", METHOD_FILES, ids=lambda path: path.name)
def test_a_method_file_imports_no_other_method_file(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        module = getattr(node, "module", None) or ""
        if isinstance(node, ast.ImportFrom) and re.match(r"limbeck\.methods\.\w+\.", module):
            last = module.rpartition(".")[2]
            assert last == "_base" or last.endswith("_part"), f"{path.name} imports {module}"


def test_only_the_engine_touches_accelerate():
    for path in SOURCE.rglob("*.py"):
        if path.is_relative_to(SOURCE / "train"):
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not any(name.partition(".")[0] == "accelerate" for name in names), path


def test_the_independence_contract_names_every_method():
    from limbeck.methods import BUILT_IN

    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    for path in BUILT_IN.values():
        assert f'"{path.partition(":")[0]}"' in text, f"pyproject's independence contract does not name {path}"
