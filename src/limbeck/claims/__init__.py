"""Papers' claims at a size two CPU cores can check: recipes/claims/NAME.yaml in, a verdict and docs/evidence/NAME.json out (DESIGN §9).

for name, file in find(names, folder).items():
    evidence = run_claim(read(file), folder=work, quick=False, on_progress=show)
    write(evidence, Path("docs/evidence"))
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from limbeck.claims.evidence import plain, table, write
from limbeck.claims.run import run_claim
from limbeck.claims.spec import ClaimSpec
from limbeck.contract import validated
from limbeck.errors import InputError, suggestion
from limbeck.recipe import line_of, parse_yaml, read_text
from limbeck.train.progress import choose

__all__ = ["ClaimSpec", "check", "find", "plain", "read", "run_claim", "table", "write"]


def check(
    names: Sequence[str],
    *,
    folder: Path | str = "recipes/claims",
    evidence: Path | str = "docs/evidence",
    work: Path | str = "runs/claims",
    quick: bool = False,
    style: Literal["auto", "plain", "quiet"] = "auto",
) -> list[dict[str, Any]]:
    """Run the claims asked for (none: all), print each table, and write the evidence, unless quick.

    Args:
        folder: of the claim files. evidence: where NAME.json goes. work: for results and caches, by claim; an interrupted claim goes on from it.
        style: of the progress display.

    Returns:
        The evidence of each claim.

    Raises:
        InputError: a name, file, recipe or study is wrong; all files are read before the first claim runs.
    """
    specs = [read(file) for file in find(names, folder).values()]
    found = []
    for spec in specs:
        result = run_claim(spec, folder=Path(work) / spec.slug, quick=quick, progress=choose(style))
        if not quick:
            write(result, evidence)
        _show(result)
        found.append(result)
    return found


def _show(evidence: dict[str, Any]) -> None:
    """A table on a terminal, plain lines elsewhere."""
    if sys.stdout.isatty():
        from rich.console import Console

        Console().print(table(evidence))
    else:
        print(plain(evidence))


def find(names: Sequence[str], folder: Path | str) -> dict[str, Path]:
    """Name → file of the claims asked for, in that order; of all in the folder, sorted, where no names are given.

    Raises:
        InputError: the folder has no claims, or none of that name (with a suggestion).
    """
    folder = Path(folder)
    known = {file.stem: file for file in sorted(folder.glob("*.yaml"))}
    if not known:
        raise InputError("there are no claims here (NAME.yaml).", where=str(folder), fix="Run in the repository's root, or name the folder.")
    for name in names:
        if name not in known:
            raise InputError(f"there is no claim '{name}'.", where=str(folder), fix=suggestion(name, known))
    return {name: known[name] for name in names or known}


def read(file: Path | str) -> ClaimSpec:
    """A claim from its file.

    Raises:
        InputError: missing, not YAML, or a field is wrong; names file and line. The slug must be the file's name.
    """
    file = Path(file)
    values, lines = parse_yaml(read_text(file), str(file))
    try:
        spec = validated(ClaimSpec, values)
    except InputError as error:
        raise InputError(error.what, where=f"{file}:{line_of(lines, error.where) or 1}: {error.where}".rstrip(": "), fix=error.fix) from error
    if spec.slug != file.stem:
        raise InputError(f"the slug is '{spec.slug}' in a file named {file.name}.", where=f"{file}:{lines['slug']}", fix="Make them equal.")
    return spec
