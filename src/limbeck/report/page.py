"""Filling the page templates: escaping is on, nothing is fetched from anywhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from limbeck.report.plots import Plot
from limbeck.report.wording import MINUS, NA

if TYPE_CHECKING:
    from jinja2 import Environment

MOST_ITEMS = 60


def fill(template: str, content: Mapping[str, Any]) -> str:
    """The template of this folder with its names filled in, every text escaped."""
    return _environment().get_template(template).render(content)


def present(plots: Sequence[Plot | None]) -> list[Plot]:
    """The plots there was something to draw for."""
    return [plot for plot in plots if plot is not None]


@cache
def _environment() -> Environment:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    folder = FileSystemLoader(Path(__file__).parent)
    environment = Environment(loader=folder, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["scalar"] = scalar
    environment.tests["scalars"] = _all_scalars
    environment.tests["records"] = _all_mappings
    environment.globals["most_items"] = MOST_ITEMS
    return environment


def scalar(value: Any) -> str:
    """A JSON value that holds no others, as text."""
    if value is None:
        return NA
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.6g}".replace("-", MINUS)
    return str(value)


def _is_nested(value: Any) -> bool:
    return isinstance(value, Mapping) or (isinstance(value, Sequence) and not isinstance(value, str))


def _all_scalars(values: Sequence[Any]) -> bool:
    return not any(_is_nested(v) for v in values)


def _all_mappings(values: Sequence[Any]) -> bool:
    """Whether the values are mappings with the same keys, which make the rows of one table."""
    return all(isinstance(v, Mapping) for v in values) and len({tuple(v) for v in values}) == 1
