"""Rewrites the tables in README.md from docs/evidence: methods with verdicts, benchmarks. `--check` only compares."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def methods_table() -> str:
    """A row a method: page, paper, what comes out, verdict."""
    from limbeck.listing import find, state
    from limbeck.methods import BUILT_IN

    rows = ["| method | paper | makes | claim |", "|---|---|---|---|"]
    for name in BUILT_IN:
        method = find(name)
        paper = method.paper
        source = f"{paper.title} ([{paper.arxiv}](https://arxiv.org/abs/{paper.arxiv}), {paper.published})" if paper.arxiv else paper.title
        has_claim = (ROOT / "recipes" / "claims" / f"{name}.yaml").exists()
        rows.append(f"| [{name}](docs/methods/{name}.md) | {source} | {method.produces} | {state(name) if has_claim else 'baseline, none made'} |")
    return "\n".join(rows)


def bench_table(name: str) -> str:
    """A row a check of a benchmark; the values of token_records are no ratios."""
    path = ROOT / "docs" / "evidence" / f"bench_{name}.json"
    if not path.exists():
        return "not measured yet"
    found = json.loads(path.read_text(encoding="utf-8"))
    rows = ["| " + found["title"] + f" | {'value' if name == 'token_records' else 'ratio'} | bound | holds |", "|---|---|---|---|"]
    for check in found["checks"]:
        value, bound = (f"{number:.{digits}f}" if check["bound"] >= 0.01 else f"{number:.1e}" for number, digits in ((check["value"], 3), (check["bound"], 2)))
        rows.append(f"| {check['text']} | {value} | {bound} | {'yes' if check['holds'] else 'no'} |")
    return "\n".join(rows) + f"\n\nMeasured {found['date']} on {found['machine']}, commit {found['commit'][:10]}."


def filled(text: str) -> str:
    """The README with its marked blocks filled in."""
    benches = {"bench": "engine", **{name: name for name in ("records", "generators", "trajectories", "linear_divergence", "token_records", "token_training")}}
    tables = {"claims": methods_table(), **{mark: bench_table(name) for mark, name in benches.items()}}
    for mark, table in tables.items():
        text = re.sub(rf"(<!-- {mark} -->\n).*?(<!-- /{mark} -->)", lambda m, t=table: f"{m.group(1)}{t}\n{m.group(2)}", text, flags=re.DOTALL)
    return text


def main() -> int:
    """0: done or up to date; 1: `--check` found an old table."""
    path = ROOT / "README.md"
    text = path.read_text(encoding="utf-8")
    new = filled(text)
    if "--check" in sys.argv:
        return int(new != text)
    path.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
