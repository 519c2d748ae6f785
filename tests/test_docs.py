"""What README and docs show works: code runs, recipes parse, links lead somewhere, every method has a page."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from pydantic import BaseModel

from limbeck import methods
from limbeck.contract import OptimiserSpec, ScheduleSpec
from limbeck.data import AugmentSpec
from limbeck.recipe import CompareSpec, DataSpec, EvaluateSpec, ModelSpec, Recipe, RecordRecipe, TeacherSpec
from limbeck.train import TrainConfig

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def blocks(page, mark, language):
    return re.findall(rf"<!-- {mark} -->\n```{language}\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p, "test", "python")], ids=lambda p: p.name)
def test_code_runs(page, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "docs"}
    for block in blocks(page, "test", "python"):
        exec(compile(block, str(page), "exec"), namespace)


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p, "recipe", "yaml")], ids=lambda p: p.name)
def test_recipes_parse(page):
    for block in blocks(page, "recipe", "yaml"):
        Recipe.parse(yaml.safe_load(block))


def test_ready_recipes_parse(monkeypatch):
    monkeypatch.setenv("LIMBECK_DATA", "/data")
    found = sorted((ROOT / "recipes").glob("*.yaml"))
    assert found
    for path in found:
        kind = RecordRecipe if path.stem.startswith("record_") else Recipe
        assert kind.read(path).name == path.stem.removeprefix("record_")


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        if not link.startswith(("http://", "https://", "mailto:")):
            assert (page.parent / link).exists(), f"{page.name}: {link}"


def test_every_method_has_a_page_a_place_in_the_menu_and_a_row_in_the_readme():
    menu, readme = (ROOT / "mkdocs.yml").read_text(), (ROOT / "README.md").read_text()
    for name in methods.BUILT_IN:
        assert (ROOT / "docs" / "methods" / f"{name}.md").exists()
        assert f"methods/{name}.md" in menu
        assert f"[{name}]" in readme


def test_the_readmes_tables_are_those_of_the_evidence():
    done = subprocess.run([sys.executable, str(ROOT / "tools" / "readme_tables.py"), "--check"], cwd=ROOT, check=False)
    assert done.returncode == 0, "run tools/readme_tables.py"


@pytest.mark.parametrize("model", [Recipe, ModelSpec, TeacherSpec, DataSpec, AugmentSpec, TrainConfig, OptimiserSpec, ScheduleSpec, EvaluateSpec, CompareSpec])
def test_every_field_of_a_recipe_is_explained(model: type[BaseModel]):
    page = (ROOT / "docs" / "guide" / "recipes.md").read_text()
    missing = [name for name in model.model_fields if f"`{name}`" not in page]
    assert not missing
