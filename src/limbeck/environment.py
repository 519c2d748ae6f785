"""Facts about the machine and the software that a result depends on."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = ("limbeck", "torch", "torchvision", "numpy", "accelerate", "transformers", "timm", "scikit-learn")


def versions() -> dict[str, str]:
    """Python's version and those of the packages that results depend on; the ones not installed are left out."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


@cache
def machine() -> str:
    """Processor, cores and, where there is one, the accelerator, in words."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        cpu = next((line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")), cpu)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    gpu = ""
    if "torch" in sys.modules:
        import torch

        gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return f"{cpu}, {cores} cores{gpu}, {platform.system()}"


def available_memory() -> int | None:
    """Bytes of memory that are free to use here, the control group's limit included; None where the system does not say."""
    free: list[int] = []
    info = Path("/proc/meminfo")
    if info.exists():
        free += [int(line.split()[1]) * 1024 for line in info.read_text().splitlines() if line.startswith("MemAvailable:")]
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.exists() and used.exists() and (most := limit.read_text().strip()).isdigit():
        free.append(int(most) - int(used.read_text()))
    return min(free, default=None)


def commit(folder: Path | None = None) -> str:
    """The git commit of the folder (default: of this package), with "-dirty" where anything but the evidence differs; "" outside git."""
    place = folder or Path(__file__).parent
    try:
        head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=place, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
        changed = subprocess.run(
            ["git", "status", "--porcelain", "--untracked-files=normal", "--", ":/", ":(exclude,top)docs/evidence"],
            cwd=place, capture_output=True, text=True, check=True, timeout=10,
        ).stdout.strip()  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return ""
    return head + ("-dirty" if changed else "")


def describe() -> dict[str, Any]:
    """All of it, for environment.json."""
    facts: dict[str, Any] = {"versions": versions(), "machine": machine(), "commit": commit(), "command": sys.argv[:]}
    if "torch" in sys.modules:
        import torch

        facts["threads"] = torch.get_num_threads()
        facts["device"] = "cuda" if torch.cuda.is_available() else "cpu"
    return facts
