"""Running arms and studies: each once, kept on disk, and what fails is in the evidence."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from limbeck.claims import plain, run_claim, table, write
from limbeck.claims.evidence import short
from limbeck.claims.spec import ClaimSpec
from limbeck.errors import InputError, Interrupted, TrainingError


def by_seed(seed: int, offset: float = 0.0) -> dict[str, float]:
    return {"error": 0.1 * seed + offset}


def constant() -> dict[str, float]:
    return {"error": 0.15225}


def spec(**changes) -> ClaimSpec:
    return ClaimSpec.model_validate(
        {
            "slug": "soft_wins",
            "claim": "Soft labels [beat] hard ones.",
            "seeds": [0, 1, 2],
            "base": {"method": {"name": "kd"}, "train": {"epochs": 6}},
            "arms": {"soft": {}, "hard": {"method": {"name": "supervised"}}},
            "studies": {"toy": f"{__name__}:by_seed", "exact": f"{__name__}:constant"},
            "checks": [
                {"kind": "above", "arm": "soft", "than": "hard", "metric": "accuracy"},
                {"kind": "equals", "arm": "exact", "metric": "error", "by": 0.1522, "tolerance": 1e-4},
            ],
            "quick": {"seeds": [7, 8], "set": {"train.epochs": 1, "studies.toy.offset": 1.0}},
            **changes,
        }
    )


class Fake:
    """Measures by formula and remembers what it was asked."""

    def __init__(self, stop_at: int | None = None) -> None:
        self.calls: list[tuple[str, int]] = []
        self.recipes: dict[str, dict] = {}
        self.stop_at = stop_at

    def __call__(self, recipe, *, seed, cache: Path, arm):
        if len(self.calls) == self.stop_at:
            raise KeyboardInterrupt
        self.calls.append((arm, seed))
        self.recipes[arm] = recipe
        return {"accuracy": 0.9 + 0.01 * seed + (0.02 + 0.001 * seed if arm == "soft" else 0.0), "bytes": 100}


class Watcher:
    """A progress display that remembers."""

    def __init__(self) -> None:
        self.seen: list[tuple] = []

    def start(self, label, steps, done, unit):
        self.seen.append((label, steps, done))

    def advance(self, step, note=""):
        self.seen.append((step, note))

    def stop(self):
        self.seen.append(("stopped",))


def test_evidence_has_the_documented_shape(tmp_path):
    fake, watcher = Fake(), Watcher()
    found = run_claim(spec(), folder=tmp_path, execute=fake, progress=watcher, version="1")
    assert list(found) == ["slug", "claim", "verdict", "checks", "arms", "seeds", "seconds", "commit", "versions", "machine", "date"]
    assert fake.calls == [(arm, seed) for seed in (0, 1, 2) for arm in ("soft", "hard")]
    assert fake.recipes["hard"] == {"method": {"name": "supervised"}, "train": {"epochs": 6}}
    assert found["verdict"] == "holds"
    assert found["arms"]["hard"]["accuracy"]["values"] == pytest.approx([0.9, 0.91, 0.92])
    assert found["arms"]["hard"]["accuracy"]["mean"] == pytest.approx(0.91)
    assert found["arms"]["hard"]["accuracy"]["stderr"] == pytest.approx(0.01 / math.sqrt(3))
    assert found["arms"]["toy"]["error"]["values"] == pytest.approx([0.0, 0.1, 0.2])
    assert found["arms"]["exact"]["error"] == {"mean": 0.15225, "stderr": None, "values": [0.15225]}
    assert found["checks"][0]["value"]["mean"] == pytest.approx(0.021)
    assert found["seeds"] == [0, 1, 2]
    assert watcher.seen[:2] == [("claim soft_wins", 10, 0), (0, "soft, seed 0")]
    assert [done for done, *_ in watcher.seen[1:-1]] == list(range(11))
    assert watcher.seen[-1] == ("stopped",)
    assert {"limbeck", "python", "torch", "numpy"} <= set(found["versions"])
    assert "cores" in found["machine"]
    assert "threads" in found["machine"]

    file = write(found, tmp_path / "evidence")
    assert file == tmp_path / "evidence" / "soft_wins.json"
    assert json.loads(file.read_text()) == found


def test_quick_uses_its_own_seeds_and_values(tmp_path):
    fake = Fake()
    found = run_claim(spec(), folder=tmp_path, quick=True, execute=fake, version="1")
    assert found["seeds"] == [7, 8]
    assert fake.recipes["soft"]["train"] == {"epochs": 1}
    assert found["arms"]["toy"]["error"]["values"] == pytest.approx([1.7, 1.8])


def test_an_interrupted_claim_goes_on_and_ends_with_the_same_evidence(tmp_path):
    whole = run_claim(spec(), folder=tmp_path / "whole", execute=Fake(), version="1")
    for stop_at in (0, 2, 2, 1):
        with pytest.raises(KeyboardInterrupt):
            run_claim(spec(), folder=tmp_path / "cut", execute=Fake(stop_at), version="1")
    last = Fake()
    found = run_claim(spec(), folder=tmp_path / "cut", execute=last, version="1")
    assert last.calls == [("hard", 2)]  # 0 + 2 + 2 + 1 of 6 were done
    for key in ("verdict", "checks", "arms", "seeds"):
        assert found[key] == whole[key]


def test_results_are_used_again_only_for_the_same_recipe_and_code(tmp_path):
    run_claim(spec(), folder=tmp_path, execute=Fake(), version="1")
    again, other_code, other_recipe = Fake(), Fake(), Fake()
    run_claim(spec(), folder=tmp_path, execute=again, version="1")
    run_claim(spec(), folder=tmp_path, execute=other_code, version="2")
    run_claim(spec(arms={"soft": {"train": {"epochs": 7}}, "hard": {"method": {"name": "supervised"}}}), folder=tmp_path, execute=other_recipe, version="1")
    assert again.calls == []
    assert len(other_code.calls) == 6
    assert other_recipe.calls == [("soft", 0), ("soft", 1), ("soft", 2)]


def test_a_torn_result_is_measured_again(tmp_path):
    run_claim(spec(), folder=tmp_path, execute=Fake(), version="1")
    for file in (tmp_path / "results").iterdir():
        file.write_text(file.read_text()[:20])
    again = Fake()
    run_claim(spec(), folder=tmp_path, execute=again, version="1")
    assert len(again.calls) == 6


def test_a_failing_arm_fails_its_checks_and_the_others_go_on(tmp_path):
    class Failing(Fake):
        def __call__(self, recipe, *, seed, cache, arm):
            if arm == "hard" and seed == 1:
                raise TrainingError("the loss became NaN in phase 'train', step 3")
            return {**super().__call__(recipe, seed=seed, cache=cache, arm=arm), "ece": math.nan}

    fake = Failing()
    found = run_claim(spec(), folder=tmp_path, execute=fake, version="1")
    assert found["verdict"] == "holds in part"
    assert "hard: failed for seed 1: the loss became NaN" in found["checks"][0]["text"]
    assert found["arms"]["hard"]["accuracy"]["values"] == pytest.approx([0.9, None, 0.92])
    assert found["arms"]["soft"]["ece"] == {"mean": None, "stderr": None, "values": [None, None, None]}
    json.dumps(found, allow_nan=False)
    assert "—" in plain(found)
    retry = Fake()
    assert run_claim(spec(), folder=tmp_path, execute=retry, version="1")["verdict"] == "holds"
    assert retry.calls == [("hard", 1)]


@pytest.mark.parametrize("error", [InputError("the field 'epochs' is missing.", where="train.epochs"), Interrupted("stopped", 15), RuntimeError("a bug")])
def test_wrong_input_interruptions_and_bugs_are_not_results(tmp_path, error):
    def broken(recipe, *, seed, cache, arm):
        raise error

    with pytest.raises(type(error)):
        run_claim(spec(), folder=tmp_path, execute=broken, version="1")


def test_a_study_that_takes_no_such_argument_is_refused(tmp_path):
    wrong = spec(studies={"toy": {"target": f"{__name__}:by_seed", "args": {"ofset": 1}}, "exact": f"{__name__}:constant"})
    with pytest.raises(InputError, match="Did you mean 'offset'"):
        run_claim(wrong, folder=tmp_path, execute=Fake(), version="1")


def test_terminal_and_plain_texts_show_verdict_checks_and_arms(tmp_path):
    from rich.console import Console

    found = run_claim(spec(), folder=tmp_path, execute=Fake(), version="1")
    console = Console(record=True, width=200, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(table(found))
    for text in (console.export_text(), plain(found)):
        for words in ("Soft labels [beat] hard ones.", "0.021 ± 0.00058", "0.91 ± 0.0058", "accuracy of soft − hard", "seeds 0, 1, 2", "verdict: holds"):
            assert words in text
        assert "bytes" not in text  # no check looks at it


def test_short_commits_keep_their_mark():
    assert short("0123456789abcdef-dirty") == "0123456789ab-dirty"
    assert short("unknown") == "unknown"
