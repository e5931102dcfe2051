"""What each fault cost, as the fault tests measured it: results/faults.json, and the table of docs/faults.md.

    FAULTS=benchmarks/results/faults.json python -m pytest -m "integration or chaos" tests/integration
    FAULTS=benchmarks/results/faults.json cures bench soak
    cures bench tables

A test that measures a fault calls ``record_fault``; without FAULTS in the environment nothing is written. A row is
replaced when its test runs again, and says when and by what code it was measured.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness.results_file import RESULTS, commit, machine, running_command

FILE = "faults.json"


def seconds_lost(steps: Sequence[dict[str, Any]], at: float) -> float | None:
    """From the fault ``at`` (seconds since 1970) until the run had trained further than before, beyond what a step
    takes anyway; None: it never was. ``steps``: records of metrics.jsonl, also of steps that were made again."""
    before = max((r["step"] for r in steps if r["time"] <= at), default=0)
    pace = float(np.median([r["time/step_s"] for r in steps])) if steps else 0.0
    further = min((r["time"] for r in steps if r["time"] > at and r["step"] > before), default=None)
    return None if further is None else max(further - at - pace, 0.0)


def record_fault(fault: str, what: str, seconds: float | None, *, rollouts: int | None = None, order: int = 50) -> None:
    """Note what ``fault`` did to a run in the file of the environment's FAULTS, if it is set.

    Args:
        what: happens then, for people.
        seconds: that training stood still longer than a step takes; None: it never did.
        rollouts: that were made again.
        order: of the row in the table.
    """
    place = os.environ.get("FAULTS")
    if not place:
        return
    path = Path(place)
    result = json.loads(path.read_text()) if path.exists() else {"name": "faults", "machine": machine(), "rows": {}}
    row = {
        "order": order,
        "what": what,
        "seconds": None if seconds is None else round(seconds, 1),
        "rollouts": rollouts,
    }
    row |= {"commit": commit(), "date": datetime.now(UTC).isoformat(timespec="minutes")}
    row["source"] = os.environ.get("PYTEST_CURRENT_TEST", running_command()).split(" (")[0]
    result["rows"][fault] = row
    path.write_text(json.dumps(result, indent=1) + "\n")


def fault_table(folder: Path = RESULTS) -> str:
    """Markdown: fault, what happens, seconds lost, rollouts made again."""
    rows = json.loads((folder / FILE).read_text())["rows"]
    lines = ["| fault | what happens | seconds lost | rollouts made again |", "|---|---|---|---|"]
    for fault, row in sorted(rows.items(), key=lambda item: (item[1]["order"], item[0])):
        lines.append(f"| {fault} | {row['what']} | {_plain(row['seconds'])} | {_plain(row['rollouts'])} |")
    return "\n".join(lines) + "\n"


def _plain(value: float | None) -> str:
    return "–" if value is None else f"{value:.0f}" if value >= 10 or isinstance(value, int) else f"{value:.1f}"
