"""mkdocs hook: evidence in the documentation comes from docs/evidence/*.json and nowhere else.

A line of its own, outside code blocks, is replaced:
    {{ evidence("meal_v2") }}    one claim: sentence, verdict, checks, arms, where it was measured
    {{ evidence_index() }}       all claims and benchmarks
    {{ methods_table() }}        the methods with paper and state
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError

from limbeck.claims.evidence import arm_rows, interval_text, mean_text, origin_text, read_all, short
from limbeck.components import import_object
from limbeck.errors import LimbeckError
from limbeck.methods import catalogue

CALL = re.compile(r"^\{\{\s*(\w+)\((?:\"([\w-]*)\")?\)\s*\}\}$")
FENCE = re.compile(r"^\s*(```|~~~)")


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Called by mkdocs with each page's text. Raises PluginError for a call that is not known, so that the build fails."""
    pages = {file.src_uri for file in files if file.is_documentation_page()}
    return expand(markdown, Path(config["docs_dir"]), pages, page.file.src_uri)


def expand(markdown: str, docs: Path, pages: set[str], here: str) -> str:
    """The page with every call replaced. pages: paths of all pages below `docs`; here: of this one."""
    lines: list[str] = []
    fenced = False
    for line in markdown.splitlines():
        fenced ^= bool(FENCE.match(line))
        call = None if fenced else CALL.match(line)
        lines.append(line if call is None else _answer(call[1], call[2], docs, pages, here))
    return "\n".join(lines) + "\n"


def _answer(name: str, argument: str | None, docs: Path, pages: set[str], here: str) -> str:
    try:
        found = read_all(docs / "evidence")
        if name == "evidence" and argument:
            return claim_section(found.get(argument), argument)
        if name == "evidence_index" and argument is None:
            return index_section(found, _claims(docs), pages, here)
        if name == "methods_table" and argument is None:
            return methods_section(found, _claims(docs), pages, here)
    except LimbeckError as error:
        raise PluginError(f"{here}: {error}") from error
    raise PluginError(f"{here}: '{name}' with the argument {argument!r} is not known to tools/evidence_pages.py")


def _claims(docs: Path) -> list[str]:
    """Names of the claims that there are recipes for."""
    return sorted(file.stem for file in (docs.parent / "recipes" / "claims").glob("*.yaml"))


def claim_section(evidence: Mapping[str, Any] | None, slug: str) -> str:
    """One claim in full."""
    if evidence is None:
        return f"*The claim `{slug}` was not run yet: `limbeck claims {slug}`.*"
    checks = [[_mark(check["holds"]), check["text"], mean_text(check["value"]), interval_text(check["value"])] for check in evidence["checks"]]
    header, rows = arm_rows(evidence, every_metric=False)
    parts = [
        f"**{evidence['claim'].strip()}**",
        f"Verdict: **{evidence['verdict']}**",
        table(["holds", "check", "mean ± s.e.", "95 % interval"], checks),
        table(header, rows),
    ]
    every, all_rows = arm_rows(evidence, every_metric=True)
    if len(every) > len(header):
        parts.append(f'??? note "All metrics"\n\n{_indented(table(every, all_rows))}')
    parts.append(f"<small>{origin_text(evidence)}. Measured by `limbeck claims {slug}`; all values in `docs/evidence/{slug}.json`.</small>")
    return "\n\n".join(parts)


def benchmark_section(benchmark: Mapping[str, Any]) -> str:
    """One benchmark in full."""
    rows = [[_mark(check["holds"]), check["text"], _number(check["value"]), _number(check["bound"])] for check in benchmark["checks"]]
    origin = f"{benchmark['date']} · commit {short(benchmark['commit'])} · torch {benchmark['versions'].get('torch', '?')} · {benchmark['machine']}"
    return f"{table(['holds', 'check', 'value', 'bound'], rows)}\n\n<small>{origin}</small>"


def index_section(found: Mapping[str, Mapping[str, Any]], claims: Sequence[str], pages: set[str], here: str) -> str:
    """The overview of all claims, then each in full, then the benchmarks."""
    measured = [name for name in found if not name.startswith("bench_")]
    names = sorted({*claims, *measured})
    rows = []
    for name in names:
        evidence = found.get(name)
        if evidence is None:
            rows.append([_linked(name, pages, here), "", "not run yet", "", "", ""])
            continue
        held = sum(check["holds"] for check in evidence["checks"])
        counts = f"{held} of {len(evidence['checks'])}"
        rows.append([_linked(name, pages, here), evidence["claim"], evidence["verdict"], counts, evidence["date"][:10], short(evidence["commit"])])
    parts = ["## Claims", table(["claim", "sentence", "verdict", "checks that hold", "date", "commit"], rows) if rows else "*There are no claims yet.*"]
    for name in measured:
        parts += [f"### {name}", claim_section(found[name], name)]
    benchmarks = [name for name in found if name.startswith("bench_")]
    parts += ["## Benchmarks", *([] if benchmarks else ["*No benchmark was run yet: `make bench`.*"])]
    for name in benchmarks:
        parts += [f"### {name.removeprefix('bench_')}", benchmark_section(found[name])]
    return "\n\n".join(parts)


def methods_section(found: Mapping[str, Mapping[str, Any]], claims: Sequence[str], pages: set[str], here: str) -> str:
    """Name, paper, source, what comes out, and the state of the claim."""
    rows = []
    for name, path in sorted(catalogue().items()):
        method = import_object(path)
        paper = method.paper
        arxiv = f"[{paper.arxiv}](https://arxiv.org/abs/{paper.arxiv})" if paper.arxiv else ""
        state = found[name]["verdict"] if name in found else "not run yet" if name in claims else "no claim of its own"
        rows.append([_linked(name, pages, here), paper.title, arxiv, paper.published, method.produces, state])
    return table(["method", "paper", "arXiv", "venue", "makes", "claim"], rows)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(" ".join(cell.split()).replace("|", "&#124;") for cell in line) + " |" for line in lines)


def _linked(name: str, pages: set[str], here: str) -> str:
    """The name, linked to the method's page where there is one."""
    target = f"methods/{name}.md"
    return f"[{name}]({posixpath.relpath(target, posixpath.dirname(here) or '.')})" if target in pages else f"`{name}`"


def _indented(text: str) -> str:
    return "\n".join(f"    {line}" for line in text.splitlines())


def _mark(holds: bool) -> str:
    return "yes" if holds else "**no**"


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float | int) else str(value)
