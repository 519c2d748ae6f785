"""The run table: rows that survive a kill, rows of run folders, features, and a recommender that is judged by regret on planted tables."""

import itertools
import json
import math
import subprocess
import sys

import pytest
import torch

from limbeck import seeds
from limbeck.errors import InputError
from limbeck.language.run_table import (
    Recommender, Regret, Run, RunTable, candidates, dataset_facts, expected_best, leave_one_task_out, runs_of_folder, saving,
)  # fmt: skip

SPACE = {"intermediate": ["none", "mse", "mi"], "alpha": [0.0, 0.9], "mapping": ["skip", "last"], "mixup": [False, True]}


def planted(tasks: int = 6, noise: float = 0.01, signal: float = 1.0) -> list[Run]:
    """The intermediate loss matters, mapping a little, and mixup helps where texts are few; with signal 0 nothing but noise does."""
    rows = []
    for task in range(tasks):
        few = task % 2 == 0
        facts = {"ln_examples": 6.0 if few else 10.0, "other": float(task)}
        generator = seeds.generator("planted", task)
        for pipeline in candidates(SPACE, lambda p: p["intermediate"] == "mi" or p["alpha"] == 0.0):
            gain = {"none": 0.0, "mse": 0.03, "mi": 0.02 + 0.06 * float(pipeline["alpha"])}[str(pipeline["intermediate"])]
            gain += 0.01 * (pipeline["mapping"] == "skip") + (0.05 if few else -0.05) * bool(pipeline["mixup"])
            ratio = 0.85 + signal * gain + noise * float(torch.randn((), generator=generator))
            rows.append(Run(f"task {task}", pipeline, ratio * 0.9, 0.9, facts))
    return rows


def test_rows_come_back_as_they_went(tmp_path) -> None:
    table = RunTable(tmp_path / "new" / "table.jsonl")
    assert table.rows() == []
    rows = planted(2)
    table.append(rows[:5])
    table.append(rows[5:])
    assert table.rows() == rows
    assert rows[0].ratio == pytest.approx(rows[0].score / 0.9)


def test_a_half_written_row_is_dropped_and_a_wrong_one_is_named(tmp_path) -> None:
    table, rows = RunTable(tmp_path / "table.jsonl"), planted(1)
    table.append(rows[:2])
    with table.path.open("ab") as file:
        file.write(b'{"task": "kil')
    assert table.rows() == rows[:2]
    table.append(rows[2:3])
    assert table.rows() == rows[:3]
    with table.path.open("ab") as file:
        file.write(b'{"task": 3}\n')
    with pytest.raises(InputError, match=r"table\.jsonl:4"):
        table.rows()


def test_processes_append_whole_rows(tmp_path) -> None:
    script = (
        "import sys; from limbeck.language.run_table import Run, RunTable; table = RunTable(sys.argv[1])\n"
        "for i in range(40): table.append([Run('t', {'who': sys.argv[2], 'i': i, 'long': 'x' * 5000}, 0.5, 0.9)])"
    )
    writers = [subprocess.Popen([sys.executable, "-c", script, str(tmp_path / "table.jsonl"), who]) for who in "ab"]
    assert [writer.wait() for writer in writers] == [0, 0]
    rows = RunTable(tmp_path / "table.jsonl").rows()
    for who in "ab":
        assert [row.pipeline["i"] for row in rows if row.pipeline["who"] == who] == list(range(40))


@pytest.mark.parametrize(("score", "teacher"), [(float("nan"), 0.9), (0.5, 0.0), (0.5, -1.0), (0.5, float("inf"))])
def test_scores_without_a_ratio_are_refused(score: float, teacher: float) -> None:
    with pytest.raises(InputError, match="no ratio"):
        Run("t", {}, score, teacher)


def test_a_run_folder_becomes_rows(tmp_path) -> None:
    def outcomes(*values: float | None) -> list[dict]:
        return [{"seed": seed, "accuracy": value, "measures": {"f1": 0.5}} for seed, value in enumerate(values)]

    recipe = "method:\n  name: distiller\n  target: null\n  args: {alpha: 0.5, critic_hidden: [128, 128]}\n"
    arms = [
        {"role": "teacher", "outcomes": outcomes(0.9)},
        {"role": "alone", "outcomes": outcomes(0.7)},
        {"role": "distilled", "outcomes": outcomes(0.8, 0.85)},
    ]
    told = {"recipe": recipe, "arms": arms}
    (tmp_path / "result.json").write_text(json.dumps(told))
    first, second = runs_of_folder(tmp_path, "banking77", {"ln_examples": 9.0}, {"alpha": 0.9, "intermediate": "mi"})
    assert first.pipeline == {"alpha": 0.5, "intermediate": "mi", "critic_hidden": "[128, 128]", "method": "distiller"}
    assert (first.seed, second.seed, second.score, second.teacher_score) == (0, 1, 0.85, 0.9)
    assert runs_of_folder(tmp_path, "t", {}, measure="f1")[0].score == 0.5
    RunTable(tmp_path / "table.jsonl").append([first, second])
    assert RunTable(tmp_path / "table.jsonl").rows() == [first, second]
    told["arms"] = arms[1:]
    (tmp_path / "result.json").write_text(json.dumps(told))
    with pytest.raises(InputError, match="teacher has no 'accuracy'"):
        runs_of_folder(tmp_path, "t", {})
    with pytest.raises(InputError, match="no result"):
        runs_of_folder(tmp_path / "elsewhere", "t", {})
    (tmp_path / "result.json").write_text("{")
    with pytest.raises(InputError, match="no result of a run"):
        runs_of_folder(tmp_path, "t", {})


def test_features_describe_the_texts_and_are_always_the_same() -> None:
    texts = [("where is my card",), ("my card was lost",), ("top up failed",)]
    facts = dataset_facts(texts, 3)
    assert len(facts) == 104
    assert facts == dataset_facts(texts, 3)
    assert facts["ln_examples"] == math.log(3)
    assert facts["ln_words"] == pytest.approx(math.log(11 / 3))
    assert facts["pair"] == 0.0
    assert dataset_facts([("a", "b")], 2)["pair"] == 1.0
    other = dataset_facts([("stocks fell on monday",)] * 3, 3)
    near = dataset_facts([*texts[:2], ("top up did not work",)], 3)

    def distance(a: dict[str, float], b: dict[str, float]) -> float:
        return sum((a[name] - b[name]) ** 2 for name in a if name.startswith("text_mean"))

    assert distance(facts, near) < distance(facts, other)
    own = dataset_facts(texts, 3, lambda given: torch.eye(3)[:, :2], width=4)
    assert len([name for name in own if name.startswith("text_")]) == 8
    assert own["text_sd_00"] != 0
    with pytest.raises(InputError, match="no texts"):
        dataset_facts([], 2)


def test_candidates_are_the_sensible_part_of_a_space() -> None:
    assert len(candidates(SPACE)) == 24
    some = candidates(SPACE, lambda pipeline: pipeline["intermediate"] == "mi")
    assert len(some) == 8
    assert some[0] == {"intermediate": "mi", "alpha": 0.0, "mapping": "skip", "mixup": False}


def test_the_expected_best_of_a_draw_is_exact() -> None:
    values = [0.3, 0.9, 0.1, 0.5, 0.5]
    for count in range(1, 6):
        draws = list(itertools.combinations(values, count))
        assert expected_best(values, count) == pytest.approx(sum(map(max, draws)) / len(draws))
    with pytest.raises(InputError):
        expected_best(values, 6)


def test_a_planted_table_is_recommended_from_with_less_regret_than_chance() -> None:
    regrets = leave_one_task_out(planted(), 3, lambda: Recommender(60))
    assert [regret.task for regret in regrets] == [f"task {i}" for i in range(6)]
    assert all(regret.recommended >= 0 and regret.pipelines == 16 for regret in regrets)
    found = saving(regrets)
    assert found.low > 0.01
    assert sum(r.recommended for r in regrets) < 0.5 * sum(r.random for r in regrets)
    # mixup helps small sets alone, so that the same advice for all is worse than advice by features
    assert sum(r.recommended for r in regrets) <= sum(r.mean for r in regrets)


def test_from_noise_nothing_is_learned() -> None:
    found = saving(leave_one_task_out(planted(signal=0.0, noise=0.03), 3, lambda: Recommender(40)))
    assert found.low < 0.0 < found.high or abs(found.mean) < 0.01


def test_an_unbalanced_table_does_not_hide_the_best_pipeline() -> None:
    """Many poor MI rows (sheet: 875 of 1,238 are MI, many with poor settings): their mean is low, their best is the best."""
    rows = []
    for task in range(4):
        for step in range(12):
            rows.append(Run(f"t{task}", {"intermediate": "mi", "alpha": step / 11}, 0.6 + 0.35 * (step == 11), 1.0))
        rows.append(Run(f"t{task}", {"intermediate": "mse", "alpha": 0.0}, 0.8, 1.0))
    regrets = leave_one_task_out(rows, 2, lambda: Recommender(40))
    assert all(regret.recommended == pytest.approx(0.0) for regret in regrets)


def test_recommendations_depend_on_their_seed_alone_and_take_new_knobs() -> None:
    rows = planted(3)
    pipelines = candidates(SPACE)
    first, second = (Recommender(20, seed=4).fit(rows).predict({"ln_examples": 6.0}, pipelines) for _ in range(2))
    assert (first == second).all()
    assert len(Recommender(20).fit(rows).top({"ln_examples": 6.0}, [{"intermediate": "new", "unheard": 3.0, "none": None}, *pipelines], 5)) == 5


def test_what_cannot_be_left_out_is_refused() -> None:
    rows = planted(1)
    with pytest.raises(InputError, match="1 task"):
        leave_one_task_out(rows)
    with pytest.raises(InputError, match="16 pipelines"):
        leave_one_task_out(planted(2), 17)
    with pytest.raises(InputError, match="teach nothing"):
        Recommender().fit(rows[:1])
    with pytest.raises(InputError, match="no regrets"):
        saving([])
    assert saving([Regret("t", 0.1, 0.3, 0.2, 5)]).mean == pytest.approx(0.2)
