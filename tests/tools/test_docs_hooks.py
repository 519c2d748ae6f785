"""The documentation's hooks: evidence from files, formulas as MathML."""

from __future__ import annotations

import importlib.util
import json
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("mkdocs")
from mkdocs.exceptions import PluginError

ROOT = Path(__file__).resolve().parents[2]


def hook(name: str):
    specification = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


pages, math = hook("evidence_pages"), hook("math_pages")

ORIGIN = {
    "commit": "0123456789abcdef-dirty",
    "versions": {"limbeck": "0.1.0", "torch": "2.6"},
    "machine": "A processor, 2 cores, Linux, 2 threads",
    "date": "2025-01-02T03:04:05+00:00",
}
SUMMARY = {"mean": 0.875, "stderr": 0.0125, "values": [0.85, 0.9]}
EVIDENCE = {
    "slug": "kd",
    "claim": "Soft labels | beat hard ones.",
    "verdict": "holds in part",
    "checks": [
        {
            "text": "accuracy of soft − hard: mean − 2 s.e. > 0.",
            "holds": True,
            "value": {"mean": 0.021, "stderr": 0.004, "low": 0.01, "high": 0.03, "n": 2},
        },
        {"text": "accuracy of soft: mean ≥ 0.9. Not decided: soft: failed.", "holds": False, "value": None},
    ],
    "arms": {"soft": {"accuracy": SUMMARY, "ece": SUMMARY}, "hard": {"accuracy": {"mean": None, "stderr": None, "values": [None, None]}}},
    "seeds": [0, 1],
    "seconds": 61.0,
    **ORIGIN,
}
BENCH = {"checks": [{"text": "step against the bare loop", "value": 1.021, "bound": 1.03, "holds": True}], **ORIGIN}


@pytest.fixture
def docs(tmp_path):
    (tmp_path / "docs" / "evidence").mkdir(parents=True)
    (tmp_path / "recipes" / "claims").mkdir(parents=True)
    (tmp_path / "recipes" / "claims" / "kd.yaml").touch()
    (tmp_path / "recipes" / "claims" / "meal_v2.yaml").touch()
    (tmp_path / "docs" / "evidence" / "kd.json").write_text(json.dumps(EVIDENCE))
    (tmp_path / "docs" / "evidence" / "bench_engine.json").write_text(json.dumps(BENCH))
    return tmp_path / "docs"


def test_a_claim_is_rendered_with_its_numbers_and_origin(docs):
    text = pages.expand('# kd\n\n{{ evidence("kd") }}\n\nmore\n', docs, set(), "methods/kd.md")
    for words in (
        "**Soft labels | beat hard ones.**",
        "Verdict: **holds in part**",
        "| yes | accuracy of soft − hard: mean − 2 s.e. > 0. | 0.021 ± 0.004 | 0.01 … 0.03 |",
        "| **no** | accuracy of soft: mean ≥ 0.9. Not decided: soft: failed. | — | — |",
        "| arm | accuracy |",
        "| soft | 0.875 ± 0.013 |",
        "| hard | — |",
        "    | arm | accuracy | ece |",
        "seeds 0, 1 · 61 s · 2025-01-02T03:04:05+00:00 · commit 0123456789ab-dirty",
        "A processor, 2 cores",
    ):
        assert words in text
    assert text.startswith("# kd\n")
    assert text.endswith("\nmore\n")


def test_what_was_not_run_says_so(docs):
    assert "not run yet" in pages.expand('{{ evidence("meal_v2") }}', docs, set(), "x.md")
    (docs / "evidence" / "bench_engine.json").unlink()
    index = pages.expand("{{ evidence_index() }}", docs, set(), "evidence/index.md")
    assert "| `meal_v2` |  | not run yet |" in index
    assert "No benchmark was run yet" in index


def test_the_index_lists_claims_and_benchmarks(docs):
    index = pages.expand("{{ evidence_index() }}", docs, {"methods/kd.md"}, "evidence/index.md")
    assert "| [kd](../methods/kd.md) | Soft labels &#124; beat hard ones. | holds in part | 1 of 2 | 2025-01-02 | 0123456789ab-dirty |" in index
    assert "| yes | step against the bare loop | 1.021 | 1.03 |" in index
    assert "bench_engine" not in index.split("## Benchmarks")[0]


def test_the_methods_are_listed_with_paper_and_state(docs):
    table = pages.expand("{{ methods_table() }}", docs, {"methods/kd.md"}, "index.md")
    kd = next(line for line in table.splitlines() if line.startswith("| [kd](methods/kd.md)"))
    assert "[1503.02531](https://arxiv.org/abs/1503.02531)" in kd
    assert kd.endswith("| holds in part |")
    assert next(line for line in table.splitlines() if "`meal_v2`" in line).endswith("| not run yet |")
    assert next(line for line in table.splitlines() if "`supervised`" in line).endswith("| no claim of its own |")


def test_examples_in_code_blocks_stay_and_unknown_calls_fail(docs):
    example = '```\n{{ evidence("kd") }}\n```\n'
    assert pages.expand(example, docs, set(), "x.md") == example
    for call in ("{{ evidense() }}", "{{ evidence() }}", '{{ methods_table("kd") }}'):
        with pytest.raises(PluginError, match=r"x\.md"):
            pages.expand(call, docs, set(), "x.md")
    (docs / "evidence" / "kd.json").write_text("{")
    with pytest.raises(PluginError, match=r"kd\.json: not JSON"):
        pages.expand("{{ evidence_index() }}", docs, set(), "x.md")


# ---- formulas


def tree(latex: str, display: bool = False) -> ElementTree.Element:
    return ElementTree.fromstring(math.mathml(latex, display=display))


def shown(latex: str) -> str:
    return "".join(tree(latex).itertext())


@pytest.mark.parametrize(
    ("latex", "expected"),
    [
        (r"\frac1T \sum_k \sigma(t_k)", "1T∑kσ(tk)"),
        (r"t_k(x) \in \mathbb{R}^C", "tk(x)∈ℝC"),
        (r"\mathrm{KL}(p\,\|\,\sigma(s))", "KL(p‖σ(s))"),
        (r"\lfloor C/K \rfloor", "⌊C/K⌋"),
        (r"\big(x' - 0.5\big)^{2}", "(x′−0.5)2"),
        (r"\hat q \in \{0, 1\}, \mathcal H", "q^∈{0,1},ℋ"),
        (r"a_i^{10}", "ai10"),
    ],
)
def test_formulas_show_the_same_characters(latex, expected):
    assert shown(latex) == expected


def test_fractions_scripts_and_limits_have_their_places():
    fraction = tree(r"\frac{a+b}2").find(".//mfrac")
    assert ["".join(part.itertext()) for part in fraction] == ["a+b", "2"]
    assert [part.text for part in tree("x_i^2").iterfind(".//msubsup//mi")] == ["x", "i"]
    assert tree(r"\sum_{k=1}^K", display=True).find(".//munderover") is not None
    assert tree(r"\sum_{k=1}^K").find(".//msubsup") is not None
    assert [element.text for element in tree("x^12").iter("mn")] == ["1", "2"]


@pytest.mark.parametrize("latex", [r"\unknown x", r"\frac{1}{2", "x_", r"\mathbb{A}", "a}b", r"\begin{cases}", "a & b"])
def test_what_is_not_understood_is_an_error_that_names_it(latex):
    with pytest.raises(ValueError, match="not understood") as caught:
        math.convert(f"text ${latex}$ text")
    assert latex in str(caught.value)


@settings(max_examples=50)
@given(st.text(alphabet="abxy01+-=|*_^`[]\\~<>&.,()", max_size=20))
def test_any_formula_is_either_refused_or_well_formed_and_safe_for_markdown(latex):
    try:
        found = math.mathml(latex, display=False)
    except ValueError:
        return
    ElementTree.fromstring(found)
    assert not set("|*_`[]\\~") & set(re.sub(r"<[^>]*>", "", found))


def test_code_and_money_are_left_alone():
    for text in ("`$x$` and ``$`y$``", "```\n$x$ and $$y$$\n```\n", "    ```bash\n    echo $A $B\n    ```\n", "from $5 to $ 6"):
        assert math.convert(text) == text
    assert math.convert("so $x$.").startswith('so <span><math display="inline">')
    assert 'display="block"' in math.convert("$$\nx\n$$")
    assert "\n" not in math.convert("$$\nx\n+ y$$")


def test_a_formula_may_begin_a_line():
    import markdown

    found = markdown.markdown(math.convert("1. so\n   $x$ is\n2. and\n\n$y$ too\n"), extensions=["md_in_html", "tables"])
    assert re.sub(r"<span>.*?</span>", "M", found).split() == ["<ol>", "<li>so", "M", "is</li>", "<li>and</li>", "</ol>", "<p>M", "too</p>"]


def test_only_fences_that_are_asked_to_stretch():
    assert [fence.get("stretchy") for fence in tree(r"\left(\frac12\right) (x)").iter("mo")] == [None, None, "false", "false"]


def test_every_page_of_this_repository_is_understood():
    for file in (ROOT / "docs").rglob("*.md"):
        math.convert(file.read_text(encoding="utf-8"))
