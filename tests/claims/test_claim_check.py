"""The front door of the claims, with real training on digits."""

from __future__ import annotations

import json

import pytest

from limbeck.claims import check
from limbeck.errors import InputError

YAML = """\
slug: tiny
claim: A student that learns from a teacher is no worse than chance.
seeds: [0, 1]
base:
  method: {name: kd, temperature: 4.0}
  teacher: {model: {name: mlp, hidden: [16]}, train: {epochs: 1, batch_size: 64}}
  student: {model: {name: mlp, hidden: [4]}}
  data: {source: {name: digits}, train_size: 300, test_size: 100}
  train: {epochs: 4, batch_size: 64}
arms:
  distilled:
  hard: {method: {name: supervised}, teacher: null}
checks:
  - {kind: at_least, arm: distilled, metric: accuracy, by: 0.05}
  - {kind: within, arm: distilled, than: hard, metric: accuracy, by: 1.0, essential: false}
quick:
  set: {train.epochs: 1}
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipes" / "claims").mkdir(parents=True)
    (tmp_path / "recipes" / "claims" / "tiny.yaml").write_text(YAML)
    return tmp_path


def test_a_claim_runs_prints_and_writes_its_evidence(folder, capsys):
    [quick] = check(["tiny"], quick=True, style="quiet")
    assert not (folder / "docs").exists()
    assert "verdict: " + quick["verdict"] in capsys.readouterr().out
    [found] = check([], style="quiet")
    printed = capsys.readouterr()
    assert json.loads((folder / "docs" / "evidence" / "tiny.json").read_text()) == found
    assert set(found["arms"]) == {"distilled", "hard"}
    assert "kl_to_teacher" in found["arms"]["distilled"]
    assert "kl_to_teacher" not in found["arms"]["hard"]
    assert found["arms"]["distilled"]["accuracy"]["values"] != quick["arms"]["distilled"]["accuracy"]["values"]
    assert "accuracy of distilled: mean ≥ 0.05" in printed.out
    assert printed.err == ""
    [again] = check(["tiny"], style="quiet")
    assert again["arms"] == found["arms"]
    assert again["seconds"] == found["seconds"]  # nothing was measured anew


@pytest.mark.parametrize(("old", "new", "words"), [("temperature", "temprature", "temperature"), ("epochs: 4", "epochs: four", "arms.distilled.train.epochs")])
def test_a_wrong_arm_is_refused_before_anything_runs(folder, old, new, words):
    (folder / "recipes" / "claims" / "tiny.yaml").write_text(YAML.replace(old, new))
    with pytest.raises(InputError, match=words):
        check(["tiny"], style="quiet")
    assert not (folder / "runs").exists()
