"""A claim as a file: arms × seeds over one recipe, studies, and the checks that decide the verdict."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from limbeck.components import Component
from limbeck.contract import Frozen
from limbeck.errors import InputError
from limbeck.evaluate.statistics import Paired, paired
from limbeck.recipe import put

Verdict = Literal["holds", "holds in part", "does not hold"]
Table = Mapping[str, Mapping[str, Sequence[float | None]]]
"""arm → metric → one value a seed, None where the arm gave none."""

_TWO_ARMS = ("above", "not_below", "within", "every")


class Check(Frozen):
    """One comparison that a claim stands on. Differences are paired by seed: arm − than.

    above: mean − standard_errors · s.e. > by. not_below: mean ≥ −by. within: the 95 % interval lies inside ±by.
    every: arm − than > by for every seed. at_least, at_most: the arm's mean against by. equals: |mean − by| ≤ tolerance.
    """

    kind: Literal["above", "not_below", "within", "every", "at_least", "at_most", "equals"]
    arm: str
    metric: str
    than: str | None = None
    by: float = 0.0
    standard_errors: float = Field(2.0, ge=0, description="'above': how many standard errors are taken off the mean")
    tolerance: float = Field(0.0, ge=0, description="'equals': the largest difference allowed")
    essential: bool = True
    text: str = Field("", description="the check in words, put in front of the formula")

    @model_validator(mode="after")
    def _sides(self) -> Check:
        if (self.than is None) == (self.kind in _TWO_ARMS):
            raise ValueError(f"a check '{self.kind}' " + ("compares two arms: give 'than'." if self.than is None else "looks at one arm: leave 'than' out."))
        if self.kind in ("not_below", "within") and self.by < 0:
            raise ValueError(f"'by' of a check '{self.kind}' is a width and cannot be negative.")
        return self

    @property
    def formula(self) -> str:
        """The check as one line."""
        pair = f"{self.metric} of {self.arm} − {self.than}"
        single = f"{self.metric} of {self.arm}: mean"
        return {
            "above": f"{pair}: mean − {self.standard_errors:g} s.e. > {self.by:g}",
            "not_below": f"{pair}: mean ≥ {0.0 - self.by:g}",
            "within": f"{pair}: 95 % interval inside ±{self.by:g}",
            "every": f"{pair}: > {self.by:g} for every seed",
            "at_least": f"{single} ≥ {self.by:g}",
            "at_most": f"{single} ≤ {self.by:g}",
            "equals": f"{single} = {self.by:g} ± {self.tolerance:g}",
        }[self.kind]


class Quick(Frozen):
    """The reduced version for tests: fewer seeds, smaller values at dotted paths.

    A path names a field of every arm's recipe (`train.epochs`), of one arm's (`arms.ARM.train.epochs`) or an argument of a study (`studies.NAME.problems`).
    """

    seeds: tuple[int, ...] = Field(default=(0, 1), min_length=1)
    set: dict[str, Any] = Field(default_factory=dict)


class ClaimSpec(Frozen):
    """A claim: the sentence, the recipe with its arms (overlays), studies (functions that return numbers), and the checks."""

    slug: str = Field(pattern=r"^[a-z0-9_]+$")
    claim: str
    seeds: tuple[int, ...] = Field(min_length=1)
    base: dict[str, Any] = Field(default_factory=dict)
    arms: dict[str, dict[str, Any]] = Field(default_factory=dict)
    studies: dict[str, Component] = Field(default_factory=dict)
    checks: tuple[Check, ...] = Field(min_length=1)
    quick: Quick = Field(default_factory=Quick)

    @field_validator("arms", mode="before")
    @classmethod
    def _empty_overlays(cls, value: Any) -> Any:
        return {k: {} if v is None else v for k, v in value.items()} if isinstance(value, Mapping) else value

    @model_validator(mode="after")
    def _consistent(self) -> ClaimSpec:
        names = [*self.arms, *self.studies]
        twice = set(self.arms) & set(self.studies)
        if twice:
            raise ValueError(f"'{twice.pop()}' is both an arm and a study.")
        for check in self.checks:
            for side in (check.arm, check.than):
                if side is not None and side not in names:
                    raise ValueError(f"a check names the arm '{side}', which is not there; arms and studies: {', '.join(names)}.")
        if not any(check.essential for check in self.checks):
            raise ValueError("at least one check must be essential.")
        if len(set(self.seeds)) < len(self.seeds) or len(set(self.quick.seeds)) < len(self.quick.seeds):
            raise ValueError("a seed is there twice.")
        return self

    def recipes(self, *, quick: bool) -> dict[str, dict[str, Any]]:
        """Arm → its recipe: the base with the arm's overlay and, if quick, the reduced values."""
        found = {arm: merge(self.base, overlay) for arm, overlay in self.arms.items()}
        for path, value in self.quick.set.items() if quick else ():
            first, _, rest = path.partition(".")
            if first == "arms":
                arm, _, rest = rest.partition(".")
                self._known(arm, self.arms, path)
                found[arm] = assign(found[arm], rest, value)
            elif first != "studies":
                found = {arm: assign(recipe, path, value) for arm, recipe in found.items()}
        return found

    def components(self, *, quick: bool) -> dict[str, Component]:
        """Study → its component, with the reduced arguments if quick."""
        found = dict(self.studies)
        for path, value in self.quick.set.items() if quick else ():
            first, _, rest = path.partition(".")
            if first == "studies":
                name, _, argument = rest.partition(".")
                self._known(name, self.studies, path)
                found[name] = found[name].model_copy(update={"args": assign(found[name].args, argument, value)})
        return found

    @staticmethod
    def _known(name: str, names: Mapping[str, Any], path: str) -> None:
        if name not in names:
            raise InputError(f"'{path}' names '{name}', which is not there.", where="quick.set", fix=f"Known: {', '.join(names)}.")


def merge(base: Mapping[str, Any], overlay: Mapping[str, Any]) -> dict[str, Any]:
    """The base with the overlay's values on top, deep; neither is changed.

    A mapping is merged into a mapping, except where it names another component (its `name` or `target` differs): that replaces it,
    so that no knob of the old one stays. A null takes the field out, back to the recipe's default.
    """
    merged = copy.deepcopy(dict(base))
    for key, value in overlay.items():
        below = merged.get(key)
        if value is None:
            merged.pop(key, None)
        elif isinstance(value, Mapping) and isinstance(below, Mapping) and not _names_another(below, value):
            merged[key] = merge(below, value)
        elif isinstance(value, Mapping):
            merged[key] = merge({}, value)
        else:
            merged[key] = copy.deepcopy(value)
    return merged


def _names_another(below: Mapping[str, Any], above: Mapping[str, Any]) -> bool:
    named = {key: above[key] for key in ("name", "target") if key in above}
    return any(below.get(key) != value for key, value in named.items())


def assign(values: Mapping[str, Any], path: str, value: Any) -> dict[str, Any]:
    """A copy of `values` with the field at a dotted path set; mappings on the way are made where there are none.

    Raises:
        InputError: the path runs through something that is neither a mapping nor a list with that entry.
    """
    changed = copy.deepcopy(dict(values))
    try:
        put(changed, path, copy.deepcopy(value))
    except InputError as error:
        raise InputError(error.what, where="quick.set") from error
    return changed


def judge(checks: Sequence[Check], table: Table, failures: Mapping[str, str]) -> tuple[list[dict[str, Any]], Verdict]:
    """The checks' outcomes ({"text", "holds", "value"}) and the verdict that follows from them.

    'holds' where all hold, 'does not hold' where no essential one does, else 'holds in part'.
    A check on an arm that failed, or gave no value for some seed, does not hold.

    Args:
        failures: arm → what went wrong, for arms that failed for some seed.
    """
    outcomes = [_outcome(check, table, failures) for check in checks]
    essential = [outcome["holds"] for check, outcome in zip(checks, outcomes, strict=True) if check.essential]
    if all(outcome["holds"] for outcome in outcomes):
        return outcomes, "holds"
    return outcomes, "holds in part" if any(essential) else "does not hold"


def _outcome(check: Check, table: Table, failures: Mapping[str, str]) -> dict[str, Any]:
    text = f"{check.text} ({check.formula})" if check.text else check.formula
    text += "" if check.essential else " [secondary]"
    sides = [check.arm] if check.than is None else [check.arm, check.than]
    values: list[list[float]] = []
    for side in sides:
        found = list(table.get(side, {}).get(check.metric, ()))
        whole = [v for v in found if v is not None and math.isfinite(v)]
        if not whole or len(whole) < len(found) or side in failures:
            why = failures.get(side) or f"no finite '{check.metric}'" + (" for some seed" if whole else "")
            return {"text": f"{text}. Not decided: {side}: {why}.", "holds": False, "value": None}
        values.append(whole)
    if len({len(v) for v in values}) > 1:
        return {"text": f"{text}. Not decided: {sides[0]} and {sides[1]} do not have the same seeds.", "holds": False, "value": None}
    a, b = values[0], values[1] if len(values) > 1 else [0.0] * len(values[0])
    result = paired(a, b)
    if check.kind in ("above", "within") and result.stderr is None:
        text += ". Not decided: one seed has no standard error"
    value = {"mean": result.mean, "stderr": result.stderr, "low": result.low, "high": result.high, "n": result.n}
    return {"text": text + ".", "holds": _holds(check, result, [x - y for x, y in zip(a, b, strict=True)]), "value": value}


def _holds(check: Check, result: Paired, differences: Sequence[float]) -> bool:
    by = check.by
    match check.kind:
        case "above":
            return result.stderr is not None and result.mean - check.standard_errors * result.stderr > by
        case "within":
            return result.low is not None and result.high is not None and -by < result.low and result.high < by
        case "not_below":
            return result.mean >= -by
        case "every":
            return all(difference > by for difference in differences)
        case "at_least":
            return result.mean >= by
        case "at_most":
            return result.mean <= by
        case "equals":
            return abs(result.mean - by) <= check.tolerance
