"""Running a claim: every arm and study for every seed, each result kept on disk, so that an interrupted claim goes on where it was."""

from __future__ import annotations

import hashlib
import inspect
import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import limbeck
from limbeck.claims.evidence import provenance
from limbeck.claims.spec import ClaimSpec, judge
from limbeck.components import Component, build, resolve
from limbeck.errors import InputError, Interrupted, LimbeckError
from limbeck.evaluate.statistics import mean_stderr
from limbeck.files import write_json
from limbeck.ingredients import make_method
from limbeck.recipe import Recipe
from limbeck.run import measure
from limbeck.train.progress import Progress, Silent

NOT_RESULTS = ("advise", "report", "cli.py")
"""Parts of the package that cannot change a measured number."""


class Execute(Protocol):
    """Trains and measures one arm for one seed; `cache` is a folder in which it may keep teachers between calls."""

    def __call__(self, recipe: dict[str, Any], *, seed: int, cache: Path, arm: str) -> dict[str, float]:
        """Metric → value."""
        ...


def run_claim(
    spec: ClaimSpec,
    *,
    folder: Path | str,
    quick: bool = False,
    execute: Execute | None = None,
    progress: Progress | None = None,
    version: str | None = None,
) -> dict[str, Any]:
    """Run what is not yet on disk and return the evidence: numbers, checks, verdict, provenance (the shape of docs/evidence/SLUG.json).

    Args:
        folder: for results and caches; a result is used again only for the same recipe, seed and code version.
        execute: measures an arm; by default `limbeck.run.measure`, after a look at every arm's recipe.
        progress: told of each arm and seed as it comes; None: nobody is.
        version: of the code; by default a hash of limbeck's source.

    Raises:
        InputError: an arm's recipe or a study's arguments are wrong. An arm that fails while it runs is reported in the checks instead.
    """
    recipes = spec.recipes(quick=quick)
    studies = spec.components(quick=quick)
    if execute is None:
        for arm, recipe in recipes.items():
            _check_recipe({**recipe, "name": arm}, f"{spec.slug}.yaml: arms.{arm}")
        execute = measure
    seeds = spec.quick.seeds if quick else spec.seeds
    version = code_version() if version is None else version
    folder = Path(folder)

    jobs: list[tuple[str, int | None]] = [(arm, seed) for seed in seeds for arm in recipes]
    for name, study in studies.items():
        jobs += [(name, seed) for seed in (seeds if _takes_seed(study) else (None,))]
    results: dict[str, dict[int | None, dict[str, float | None]]] = {name: {} for name in (*recipes, *studies)}
    failures: dict[str, str] = {}
    seconds = 0.0
    watched = Silent() if progress is None else progress
    watched.start(f"claim {spec.slug}", len(jobs), 0, "arms × seeds")
    try:
        for done, (name, seed) in enumerate(jobs):
            label = name if seed is None else f"{name}, seed {seed}"
            watched.advance(done, label)
            what = recipes[name] if name in recipes else studies[name].model_dump(mode="json")
            file = folder / "results" / f"{_key(what, seed, version)}.json"
            result = _stored(file)
            if result is None:
                begun = time.perf_counter()
                try:
                    if name in recipes:
                        assert seed is not None  # only studies go without
                        metrics = execute(recipes[name], seed=seed, cache=folder / "cache" / version[:16], arm=name)
                    else:
                        metrics = build(studies[name], {}, "study", **({} if seed is None else {"seed": seed}))
                except (InputError, Interrupted):
                    raise
                except LimbeckError as error:
                    failures.setdefault(name, f"failed{'' if seed is None else f' for seed {seed}'}: {error}")
                    seconds += time.perf_counter() - begun
                    continue
                result = {"name": name, "seed": seed, "seconds": time.perf_counter() - begun, "metrics": _finite(metrics)}
                write_json(file, result)
            results[name][seed] = result["metrics"]
            seconds += result["seconds"]
        watched.advance(len(jobs))
    finally:
        watched.stop()

    table = {name: _columns(results[name], [s for n, s in jobs if n == name]) for name in results}
    checks, verdict = judge(spec.checks, table, failures)
    return {
        "slug": spec.slug,
        "claim": spec.claim,
        "verdict": verdict,
        "checks": checks,
        "arms": {name: {metric: _summary(values) for metric, values in columns.items()} for name, columns in table.items()},
        "seeds": list(seeds),
        "seconds": round(seconds, 1),
        **provenance(),
    }


def code_version() -> str:
    """A hash of limbeck's source, without the parts that cannot change a result."""
    root = Path(limbeck.__file__).parent
    digest = hashlib.sha256()
    for file in sorted(root.rglob("*.py")):
        name = file.relative_to(root)
        if name.parts[0] not in NOT_RESULTS:
            digest.update(f"{name.as_posix()}\0".encode() + file.read_bytes())
    return digest.hexdigest()


def _check_recipe(recipe: Mapping[str, Any], where: str) -> None:
    """Fail before anything is trained: a wrong field or knob. Models and data are found wrong when the first seed comes to them."""
    try:
        make_method(Recipe.parse(recipe).method)
    except InputError as error:
        raise error.at(where) from error


def _takes_seed(study: Component) -> bool:
    return "seed" in inspect.signature(resolve(study, {}, "study")).parameters and "seed" not in study.args


def _key(what: Mapping[str, Any], seed: int | None, version: str) -> str:
    return hashlib.sha256(json.dumps([what, seed, version], sort_keys=True, default=str).encode()).hexdigest()[:24]


def _stored(file: Path) -> dict[str, Any] | None:
    """An earlier result; None if there is none, or not a whole one."""
    try:
        result: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    return result


def _finite(metrics: Mapping[str, float]) -> dict[str, float | None]:
    """Plain floats, None for what is not finite: JSON has no NaN."""
    return {key: float(value) if math.isfinite(value) else None for key, value in metrics.items()}


def _columns(by_seed: Mapping[int | None, Mapping[str, float | None]], seeds: list[int | None]) -> dict[str, list[float | None]]:
    """metric → one value a seed, in the order of the seeds; None where a seed gave none."""
    metrics = dict.fromkeys(metric for row in by_seed.values() for metric in row)
    return {metric: [by_seed.get(seed, {}).get(metric) for seed in seeds] for metric in metrics}


def _summary(values: list[float | None]) -> dict[str, Any]:
    known = [v for v in values if v is not None]
    mean, stderr = mean_stderr(known) if known else (None, None)
    return {"mean": mean, "stderr": stderr, "values": values}
