"""Overlays, quick values, and the verdict that follows from the checks."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from limbeck.claims import find, read
from limbeck.claims.spec import Check, ClaimSpec, assign, judge, merge
from limbeck.contract import validated
from limbeck.errors import InputError

numbers = st.floats(-10, 10, allow_nan=False).map(lambda x: round(x, 6))
columns = st.integers(2, 6).flatmap(lambda n: st.tuples(st.lists(numbers, min_size=n, max_size=n), st.lists(numbers, min_size=n, max_size=n)))


def outcome(check: Check, a, b=None, failures=None):
    table = {"a": {"accuracy": a}, "b": {"accuracy": b if b is not None else a}}
    [result], verdict = judge([check], table, failures or {})
    assert verdict == ("holds" if result["holds"] else "does not hold")
    return result


def check(kind: str, **rest) -> Check:
    sides = {"than": "b"} if kind in ("above", "not_below", "within", "every") else {}
    return validated(Check, {"kind": kind, "arm": "a", "metric": "accuracy", **sides, **rest})


# ---- overlays


def test_overlay_merges_deep_and_leaves_the_base_alone():
    base = {"train": {"epochs": 6, "optimiser": {"name": "sgd", "lr": 0.1}}, "teacher": {"seed": 0}}
    merged = merge(base, {"train": {"optimiser": {"lr": 0.5}}, "seeds": [1]})
    assert merged == {"train": {"epochs": 6, "optimiser": {"name": "sgd", "lr": 0.5}}, "teacher": {"seed": 0}, "seeds": [1]}
    assert base["train"]["optimiser"]["lr"] == 0.1
    merged["teacher"]["seed"] = 9
    assert base["teacher"]["seed"] == 0


def test_overlay_with_another_name_keeps_no_knob_of_the_old_component():
    base = {"method": {"name": "kd", "temperature": 4.0}}
    assert merge(base, {"method": {"name": "supervised"}}) == {"method": {"name": "supervised"}}
    assert merge(base, {"method": {"target": "pkg.mod:M", "args": {}}}) == {"method": {"target": "pkg.mod:M", "args": {}}}
    assert merge(base, {"method": {"name": "kd", "alpha": 0.5}}) == {"method": {"name": "kd", "temperature": 4.0, "alpha": 0.5}}
    assert merge({"method": "kd"}, {"method": {"name": "meal_v2"}}) == {"method": {"name": "meal_v2"}}


def test_null_takes_a_field_out_at_any_depth():
    base = {"teacher": {"model": "mlp"}, "data": {"augment": {"crop": 2, "flip": True}}}
    assert merge(base, {"teacher": None, "data": {"augment": {"crop": None}}}) == {"data": {"augment": {"flip": True}}}
    assert merge({}, {"data": {"augment": {"crop": None}}}) == {"data": {"augment": {}}}


trees = st.recursive(numbers, lambda inner: st.dictionaries(st.sampled_from(["x", "y", "z"]), inner, max_size=3), max_leaves=8)
mappings = st.dictionaries(st.sampled_from(["x", "y", "z"]), trees, max_size=3)


@settings(deadline=None, max_examples=50)
@given(mappings, mappings)
def test_merging_nothing_changes_nothing_and_the_overlay_wins(base, overlay):
    assert merge(base, {}) == base
    assert merge({}, overlay) == overlay
    once = merge(base, overlay)
    assert merge(once, overlay) == once


def test_dotted_paths_are_set_through_mappings_and_lists():
    values = {"train": {"epochs": 6}, "teacher": [{"train": {"epochs": 3}}]}
    assert assign(values, "train.epochs", 1)["train"] == {"epochs": 1}
    assert assign(values, "teacher.0.train.epochs", 1)["teacher"] == [{"train": {"epochs": 1}}]
    assert assign(values, "data.test_size", 50)["data"] == {"test_size": 50}
    assert values == {"train": {"epochs": 6}, "teacher": [{"train": {"epochs": 3}}]}
    with pytest.raises(InputError, match=r"train\.epochs"):
        assign(values, "train.epochs.deeper", 1)


# ---- checks


@settings(deadline=None, max_examples=50)
@given(columns, st.floats(0, 3), numbers)
def test_paired_checks_agree_with_scipy(pair, k, by):
    a, b = pair
    differences = [x - y for x, y in zip(a, b, strict=True)]
    mean, stderr = float(stats.tmean(differences)), float(stats.sem(differences))
    low, high = stats.t.interval(0.95, len(a) - 1, loc=mean, scale=stderr) if stderr else (mean, mean)
    slack = 1e-9

    above = outcome(check("above", standard_errors=k, by=by), a, b)
    if abs(mean - k * stderr - by) > slack:
        assert above["holds"] == (mean - k * stderr > by)
    if abs(mean + abs(by)) > slack:
        assert outcome(check("not_below", by=abs(by)), a, b)["holds"] == (mean >= -abs(by))
    if min(abs(low + abs(by)), abs(high - abs(by))) > slack:
        assert outcome(check("within", by=abs(by)), a, b)["holds"] == (-abs(by) < low and high < abs(by))
    assert outcome(check("every", by=by), a, b)["holds"] == all(d > by for d in differences)
    value = above["value"]
    assert value["n"] == len(a)
    assert value["mean"] == pytest.approx(mean, abs=1e-9)
    assert value["stderr"] == pytest.approx(stderr, abs=1e-9)
    assert (value["low"], value["high"]) == pytest.approx((low, high), abs=1e-6)


@settings(deadline=None, max_examples=50)
@given(st.lists(numbers, min_size=1, max_size=5), numbers, st.floats(0, 1))
def test_checks_of_one_arm_look_at_its_mean(a, by, tolerance):
    mean = sum(a) / len(a)
    if abs(mean - by) > 1e-9:
        assert outcome(check("at_least", by=by), a)["holds"] == (mean > by)
        assert outcome(check("at_most", by=by), a)["holds"] == (mean < by)
    if abs(abs(mean - by) - tolerance) > 1e-9:
        assert outcome(check("equals", by=by, tolerance=tolerance), a)["holds"] == (abs(mean - by) < tolerance)


def test_one_seed_cannot_decide_what_needs_a_standard_error():
    for kind in ("above", "within"):
        result = outcome(check(kind, by=0.5), [5.0], [5.0 if kind == "within" else 0.0])
        assert not result["holds"]
        assert "one seed" in result["text"]
    assert outcome(check("every"), [1.0], [0.0])["holds"]


@pytest.mark.parametrize(
    ("a", "b", "failures", "words"),
    [
        ([1.0, None], [0.0, 0.0], {}, "a: no finite 'accuracy' for some seed"),
        ([1.0, math.nan], [0.0, 0.0], {}, "a: no finite 'accuracy' for some seed"),
        ([], [0.0], {}, "a: no finite 'accuracy'"),
        ([1.0, 1.1], [0.0, 0.0], {"b": "failed for seed 3: the loss became NaN"}, "b: failed for seed 3: the loss became NaN"),
        ([1.0, 1.1], [0.0], {}, "do not have the same seeds"),
    ],
)
def test_an_arm_without_a_value_fails_its_checks_and_says_why(a, b, failures, words):
    result = outcome(check("above"), a, b, failures)
    assert result["holds"] is False
    assert result["value"] is None
    assert words in result["text"]


def test_texts_name_the_metric_the_arms_and_the_bound():
    text = outcome(check("above", by=0.01, text="Soft labels win"), [1.0, 1.1], [0.0, 0.2])["text"]
    assert text == "Soft labels win (accuracy of a − b: mean − 2 s.e. > 0.01)."
    assert outcome(check("at_most", by=3, essential=True), [1.0, 1.1])["text"] == "accuracy of a: mean ≤ 3."


@settings(deadline=None, max_examples=50)
@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=6).filter(lambda rows: any(essential for _, essential in rows)))
def test_verdict_follows_from_the_checks_alone(rows):
    """rows: (holds, essential)."""
    checks = [check("at_least", by=0.0 if holds else 2.0, essential=essential) for holds, essential in rows]
    outcomes, verdict = judge(checks, {"a": {"accuracy": [1.0, 1.0]}}, {})
    assert [o["holds"] for o in outcomes] == [holds for holds, _ in rows]
    assert all(("[secondary]" in o["text"]) != essential for o, (_, essential) in zip(outcomes, rows, strict=True))
    if all(holds for holds, _ in rows):
        assert verdict == "holds"
    elif any(holds for holds, essential in rows if essential):
        assert verdict == "holds in part"
    else:
        assert verdict == "does not hold"


# ---- files

YAML = """\
slug: soft_wins
claim: Soft labels beat hard ones.
seeds: [0, 1, 2]
base:
  method: {name: kd, temperature: 4.0}
  train: {epochs: 6}
arms:
  soft:
  hard: {method: {name: supervised}}
studies:
  exact: {target: "limbeck.evaluate.statistics:quantile", args: {q: 0.5}}
checks:
  - {kind: above, arm: soft, than: hard, metric: accuracy}
quick:
  seeds: [0, 1]
  set: {train.epochs: 1, arms.soft.method.temperature: 1.0, studies.exact.values: [1.0]}
"""


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "soft_wins.yaml").write_text(YAML)
    (tmp_path / "another.yaml").write_text(YAML.replace("soft_wins", "another"))
    return tmp_path


def test_a_file_becomes_recipes_and_quick_ones(folder):
    spec = read(folder / "soft_wins.yaml")
    assert spec.recipes(quick=False) == {
        "soft": {"method": {"name": "kd", "temperature": 4.0}, "train": {"epochs": 6}},
        "hard": {"method": {"name": "supervised"}, "train": {"epochs": 6}},
    }
    assert spec.recipes(quick=True) == {
        "soft": {"method": {"name": "kd", "temperature": 1.0}, "train": {"epochs": 1}},
        "hard": {"method": {"name": "supervised"}, "train": {"epochs": 1}},
    }
    assert spec.components(quick=False)["exact"].args == {"q": 0.5}
    assert spec.components(quick=True)["exact"].args == {"q": 0.5, "values": [1.0]}


def test_claims_are_found_by_name(folder):
    assert list(find([], folder)) == ["another", "soft_wins"]
    assert find(["soft_wins"], folder) == {"soft_wins": folder / "soft_wins.yaml"}
    with pytest.raises(InputError, match="Did you mean 'soft_wins'"):
        find(["soft_win"], folder)
    with pytest.raises(InputError, match="no claims here"):
        find([], folder / "nowhere")


@pytest.mark.parametrize(
    ("old", "new", "line", "words"),
    [
        ("seeds: [0, 1, 2]", "seeds: [0, 1", 4, "not YAML"),
        ("base:", "bse:", 4, "Did you mean 'base'"),
        ("kind: above", "kind: over", 13, "kind"),
        ("kind: above", "kind: at_least", 13, "leave 'than' out"),
        (", than: hard", "", 13, "give 'than'"),
        ("arm: soft", "arm: softest", 1, "'softest'"),
        ("slug: soft_wins", "slug: other", 1, "the slug is 'other'"),
        ("[0, 1, 2]", "[0, 1, 1]", 1, "twice"),
        ("metric: accuracy}", "metric: accuracy, essential: false}", 1, "essential"),
    ],
)
def test_a_wrong_file_is_named_with_its_line(folder, old, new, line, words):
    file = folder / "soft_wins.yaml"
    file.write_text(YAML.replace(old, new, 1))
    with pytest.raises(InputError) as caught:
        read(file)
    assert f"{file}:{line}" in str(caught.value)
    assert words in str(caught.value)


def test_a_quick_path_to_an_arm_that_is_not_there_is_refused(folder):
    values = read(folder / "soft_wins.yaml").model_dump()
    for path in ("arms.sofd.train.epochs", "studies.exakt.q"):
        spec = ClaimSpec.model_validate({**values, "quick": {"set": {path: 1}}})
        with pytest.raises(InputError, match="which is not there"):
            spec.recipes(quick=True)
            spec.components(quick=True)
