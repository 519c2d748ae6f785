"""Keeps what a long run gave: `python tools/keep_run.py runs/fashion_dmd2` writes docs/evidence/long/NAME.json and its pictures beside it.

The numbers of every arm, the facts, environment and recipe, as the run's result.json has them; learning curves are left out.
"""

from __future__ import annotations

import base64
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def keep(run: Path, folder: Path) -> Path:
    """Write the evidence of a finished run; returns its path."""
    found = json.loads((run / "result.json").read_text(encoding="utf-8"))
    environment = json.loads((run / "environment.json").read_text(encoding="utf-8"))
    folder.mkdir(parents=True, exist_ok=True)
    pictures = []
    for number, picture in enumerate(found.pop("pictures"), 1):
        name = f"{found['title']}_{number}.png"
        (folder / name).write_bytes(base64.b64decode(picture["png_base64"]))
        pictures.append({"file": name, "caption": picture["caption"] or picture["alt"]})
    for arm in found["arms"]:
        for outcome in arm["outcomes"]:
            outcome.pop("curves", None)
    path = folder / f"{found['title']}.json"
    path.write_text(json.dumps({**found, "started_in": environment, "pictures": pictures}, indent=1) + "\n", encoding="utf-8")
    return path


if __name__ == "__main__":
    print(keep(Path(sys.argv[1]), ROOT / "docs" / "evidence" / "long"))
