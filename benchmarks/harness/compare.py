"""``cures bench compare OLD.json NEW.json``: fails when a figure got worse beyond the recorded spread.

A figure is a number or [low, value, high]. Two figures with spreads differ when their intervals do not overlap; a
number without a spread may move by ``--tolerance``. Whether more is better is read off the name.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cures_ray.messages import ConfigError

LESS_IS_BETTER = ("second", "latency", "_ms", "_s/", "time", "overhead", "memory", "bytes", "mib", "cost", "error")
NEVER_COMPARED = ("/censored", "/seeds")
MORE_IS_BETTER = ("per_second", "per_s", "speedup", "cost_trained", "cost_computed", "accuracy", "difference")


@dataclass(frozen=True, slots=True)
class Change:
    name: str
    old: Any
    new: Any
    verdict: str  # "same" | "better" | "worse" | "gone" | "new"


def compare(old: dict[str, Any], new: dict[str, Any], tolerance: float) -> list[Change]:
    """One entry a figure of either result (the dicts under "figures")."""
    changes = []
    for name in sorted(set(old) | set(new)):
        if any(word in name for word in NEVER_COMPARED):
            continue
        if name not in new or name not in old:
            changes.append(Change(name, old.get(name), new.get(name), "gone" if name not in new else "new"))
            continue
        before, after = _spread(old[name], tolerance), _spread(new[name], tolerance)
        if before is None or after is None:
            continue
        up, down = after[0] > before[1], after[1] < before[0]
        good = down if less_is_better(name) else up
        verdict = "same" if not (up or down) else "better" if good else "worse"
        changes.append(Change(name, old[name], new[name], verdict))
    return changes


def less_is_better(name: str) -> bool:
    lower = name.lower()
    if any(word in lower for word in MORE_IS_BETTER):
        return False
    return any(word in lower for word in LESS_IS_BETTER) or lower.endswith("_s")


def _spread(value: Any, tolerance: float) -> tuple[float, float] | None:
    """(low, high) of a figure; None when it is no figure."""
    if isinstance(value, list) and len(value) == 3:
        low, mid, high = map(float, value)
        return min(low, mid), max(mid, high)
    if isinstance(value, int | float) and not isinstance(value, bool):
        room = abs(float(value)) * tolerance
        return float(value) - room, float(value) + room
    return None


def main(argv: list[str]) -> int:
    """Exit code 1 on a regression.

    Raises:
        ConfigError: a file cannot be read or is no result file.
    """
    parser = argparse.ArgumentParser(prog="cures bench compare", description=__doc__.splitlines()[0])
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--tolerance", type=float, default=0.1, help="for figures without a recorded spread")
    args = parser.parse_args(argv)
    changes = compare(_figures(args.old), _figures(args.new), args.tolerance)
    for change in changes:
        if change.verdict != "same":
            print(f"{change.verdict:6} {change.name}: {change.old} -> {change.new}")
    worse = sum(c.verdict in ("worse", "gone") for c in changes)
    print(f"{len(changes)} figures compared, {worse} worse or gone")
    return 1 if worse else 0


def _figures(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text())["figures"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path} is no result file: {error!r}") from None
