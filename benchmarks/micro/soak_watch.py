"""What a running ``cures train`` holds, seen from outside: memory and descriptors by role, object store, GCS."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

ROLES = {  # what a process' title holds -> its role
    "ray::LedgerActor": "ledger",
    "ray::GeneratorActor": "generator",
    "VLLM::EngineCore": "engine",
    "ray::VerifierActor": "verifier",
    "ray::LearnerRank": "learner",
}
PROGRAMS = {"gcs_server": "GCS", "raylet": "raylet"}  # process name -> its role
TAIL = 200_000  # bytes of a log in which the newest report is looked for


@dataclass(frozen=True, slots=True)
class Seen:
    """One process of the run."""

    role: str
    process: psutil.Process

    @property
    def key(self) -> str:
        return f"{self.process.pid}@{self.process.create_time():.0f}"


def processes(root: psutil.Process) -> list[Seen]:
    """The driver ``root`` and those below it that have a role."""
    found = [Seen("driver", root)]
    for process in root.children(recursive=True):
        with suppress(psutil.Error):
            title = " ".join(process.cmdline())
            role = PROGRAMS.get(process.name()) or next((r for pattern, r in ROLES.items() if pattern in title), None)
            if role is not None and process.status() != psutil.STATUS_ZOMBIE:
                found.append(Seen(role, process))
    return found


def memory(seen: list[Seen]) -> dict[str, dict[str, list[float]]]:
    """role -> process -> [MiB of its own, descriptors]."""
    held: dict[str, dict[str, list[float]]] = defaultdict(dict)
    for one in seen:
        with suppress(psutil.Error):
            own = one.process.memory_full_info().uss / 2**20
            held[one.role][one.key] = [round(own, 2), one.process.num_fds()]
    return dict(held)


def session_folder(seen: list[Seen]) -> Path | None:
    """Of the Ray that the run has started."""
    for one in seen:
        if one.role == "GCS":
            with suppress(psutil.Error):
                found = re.search(r"--log_dir=(\S+)", " ".join(one.process.cmdline()))
                return Path(found[1]).parent if found else None
    return None


def stored_bytes(session: Path) -> float | None:
    """Bytes in the object store, from the raylet's own report (every 10 s)."""
    text = _tail(session / "logs" / "debug_state.txt")
    found = re.search(
        r"Local resources:.*?object_store_memory: \[(\d+)\].*?\"available\":.*?object_store_memory: \[(\d+)\]", text
    )
    return (int(found[1]) - int(found[2])) / 10_000 if found else None


def task_events(session: Path) -> int | None:
    """Task events that the GCS keeps for `ray timeline` and the state API, from its own report (every minute)."""
    found = re.findall(r"Current num of task events stored: (\d+)", _tail(session / "logs" / "gcs_server.out"))
    return int(found[-1]) if found else None


def folder_bytes(folder: Path, *patterns: str) -> int:
    """Of the files in ``folder`` that fit one of ``patterns``."""
    total = 0
    for path in (path for pattern in patterns for path in folder.glob(pattern)):
        with suppress(OSError):  # written and removed meanwhile
            total += path.stat().st_size if path.is_file() else 0
    return total


def trained(run_dir: Path) -> list[dict[str, Any]]:
    """The step records of the run so far."""
    return [r for r in logged(run_dir) if "rollout/reward" in r]


def logged(run_dir: Path) -> list[dict[str, Any]]:
    path = run_dir / "metrics.jsonl"
    records = []
    for line in path.read_text().splitlines() if path.exists() else ():
        with suppress(json.JSONDecodeError):  # being written
            records.append(json.loads(line))
    return records


def _tail(path: Path) -> str:
    if not path.exists():
        return ""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - TAIL))
        return file.read().decode(errors="replace")
