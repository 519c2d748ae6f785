"""What importing costs is decided by what is imported: these tests look at sys.modules, not at a clock (DESIGN §10)."""

import json
import os
import subprocess
import sys

import pytest

OPTIONAL = ("torchvision", "timm", "transformers", "diffusers", "onnx", "onnxruntime", "onnxscript", "peft", "datasets", "tokenizers")
SLOW = ("torchmetrics", "matplotlib", "sklearn", "scipy", "pandas", "pyarrow", "PIL", "jinja2")
ANSWERS_AT_ONCE = ("torch", "numpy", "accelerate", "yaml", *OPTIONAL, *SLOW)  # typer itself may import pydantic


def imported_by(code: str) -> set[str]:
    """Top-level packages in sys.modules after running some code in a fresh process."""
    script = f"{code}\nimport json, sys; print(json.dumps(sorted({{name.partition('.')[0] for name in sys.modules}})), file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    return set(json.loads(done.stderr.strip().splitlines()[-1]))


@pytest.mark.parametrize("arguments", [["--help"], ["distill", "--help"], ["claims", "--help"], ["no_such_command"]])
def test_the_command_line_answers_without_torch(arguments):
    code = f"import sys; sys.argv = ['limbeck', *{arguments!r}]\nfrom limbeck.cli import main\ntry: main()\nexcept SystemExit: pass"
    found = imported_by(code)
    assert "typer" in found
    assert found.isdisjoint(ANSWERS_AT_ONCE), found & set(ANSWERS_AT_ONCE)


def test_importing_limbeck_imports_nothing_heavy():
    found = imported_by("import limbeck")
    assert "limbeck" in found
    assert found.isdisjoint(("typer", "rich", "pydantic", *ANSWERS_AT_ONCE)), found & set(ANSWERS_AT_ONCE)


def test_the_public_names_need_torch_but_nothing_optional_or_slow():
    found = imported_by("import limbeck; [getattr(limbeck, name) for name in limbeck.__all__]; limbeck.methods.KD")
    assert "torch" in found
    assert found.isdisjoint((*OPTIONAL, *SLOW)), found & {*OPTIONAL, *SLOW}


def test_every_public_name_is_there():
    import limbeck

    assert set(dir(limbeck)) == set(limbeck.__all__)
    for name in limbeck.__all__:
        assert getattr(limbeck, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'distil'"):
        _ = limbeck.distil
