"""The result of ``cures bench soak``: does anything grow, what does a kill cost, is the accuracy the same?

Growth of a process is the slope of its own memory (or descriptors) over its life, without its first 90 s (see
STARTING_S) in which it starts; of a role the mean over its processes, weighted by the time that they were watched.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Sequence
from itertools import pairwise, zip_longest
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness.faults import record_fault, seconds_lost
from benchmarks.harness.results_file import ROOT, write_result
from benchmarks.micro.soak_watch import logged, trained

STARTING_S = {"GCS": 300.0, "engine": 240.0}  # in which task events, and the pool of the key-value cache, fill up
OTHERS_START_S = 90.0
WATCHED_S = 80.0  # a process that was watched for less says nothing about growth
LAST = 5  # evaluations that make the final accuracy
PIECE_S = 200.0  # between two kills: the soak was stopped meanwhile
SERIES = 120  # points a curve of the result file
PICTURE = ROOT / "docs" / "soak.png"
COUNTS = ("store", "journal_bytes", "lease_log_bytes", "task_events")
WHAT = {  # victim -> its row in the table of faults: order, fault, what happens
    "generator": (10, "a generator is killed", "a replacement loads the weights; its leases are generated again"),
    "engine": (11, "a generator's engine is killed", "its actor ends too and is replaced, as above"),
    "verifier": (20, "a verifier is killed", "Ray starts it again; its rollouts are verified again, elsewhere"),
    "learner": (30, "a learner rank is killed", "the group starts again from the newest checkpoint; generators stay"),
    "ledger": (40, "the ledger is killed", "it comes back from its journal with the same counts; calls are repeated"),
}
RUNS = {"killed": "with kills", "peace": "without"}


def report(folder: Path) -> None:
    """Write benchmarks/results/soak.json and docs/soak.png from what lies in ``folder``."""
    runs = {name: figures_of(folder, name) for name in RUNS if (folder / name / "metrics.jsonl").exists()}
    figures: dict[str, Any] = {}
    rows: list[dict[str, Any]] = []
    for name, (numbers, series) in runs.items():
        figures |= {f"{name}/{key}": value for key, value in numbers.items()}
        rows += [{"run": name, **point} for point in series]
    if len(runs) == len(RUNS):
        a, b = ({p["step"]: p["accuracy"] for p in series if "accuracy" in p} for _, series in runs.values())
        both = sorted(a.keys() & b.keys())[-LAST:]
        figures["accuracy_of_both/steps"] = both
        figures["accuracy_of_both/killed"], figures["accuracy_of_both/peace"] = (
            round(float(np.mean([accuracy[s] for s in both])), 4) for accuracy in (a, b)
        )
        figures["accuracy_of_both/difference_each"] = [round(a[s] - b[s], 4) for s in both]
    write_result("soak", figures, rows)
    starts = _starts(_lines(folder / "samples-killed.jsonl"))
    record_recovery(folder / "killed", _lines(folder / "kills-killed.jsonl"), starts)
    draw(rows, PICTURE)
    for key, value in figures.items():
        print(f"{key:<48} {value}")


def figures_of(folder: Path, name: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Figures of one run, and its series: points with a step and some of accuracy, memory by role, bytes."""
    run_dir = folder / name
    steps = trained(run_dir)
    samples = _lines(folder / f"samples-{name}.jsonl")
    kills = _lines(folder / f"kills-{name}.jsonl")
    pace = float(np.median([s["time/step_s"] for s in steps]))
    starts = _starts(samples)
    numbers: dict[str, Any] = {"steps": len(steps), "seconds_a_step": round(pace, 3), "starts": len(starts)}
    if len(kills) > 1:
        gaps = [b["time"] - a["time"] for a, b in pairwise(kills) if b["time"] - a["time"] < PIECE_S]
        numbers["seconds_between_kills"] = round(float(np.mean(gaps)), 1)
    numbers |= {f"kills/{role}": count for role, count in sorted(Counter(k["role"] for k in kills).items())}
    for role, seconds in sorted(recovery(run_dir, kills, starts).items()):
        numbers[f"seconds_lost/{role}"] = [round(float(q), 1) for q in np.quantile(seconds, [0.1, 0.5, 0.9])]
    last = steps[-1]
    numbers |= {key: last[f"accounting/{key}"] for key in ("planned", "trained", "discarded", "in_flight")}
    numbers["staleness_max"] = max(s["staleness/max"] for s in steps)
    numbers["steps_once_each"] = [s["step"] for s in steps] == list(range(1, len(steps) + 1))
    for role, (mib, descriptors, hours) in growth(samples, pace).items():
        numbers[f"growth/{role}/MiB_per_1000_steps"] = round(mib, 2)
        numbers[f"growth/{role}/descriptors_per_1000_steps"] = round(descriptors, 2)
        numbers[f"growth/{role}/hours_watched"] = round(hours, 2)
    for key in COUNTS:
        values = [s[key] for s in samples if s.get(key) is not None]
        if values:
            half = len(values) // 2
            numbers[f"{key}/most_in_first_half"], numbers[f"{key}/most_in_second_half"] = (
                max(values[: max(half, 1)]),
                max(values[half:]),
            )
    evaluations = [r for r in logged(run_dir) if "eval/greedy_accuracy" in r and "rollout/reward" not in r]
    final = [e["eval/greedy_accuracy"] for e in evaluations][-LAST:]
    numbers["accuracy_first"] = evaluations[0]["eval/greedy_accuracy"]
    numbers["accuracy_last"] = round(float(np.mean(final)), 4)
    series = [{"step": e["step"], "accuracy": e["eval/greedy_accuracy"]} for e in evaluations]
    return numbers, series + _thinned(samples)


def growth(samples: list[dict[str, Any]], pace: float) -> dict[str, tuple[float, float, float]]:
    """role -> MiB and descriptors that one of its processes grows by in 1000 steps, and hours watched."""
    seen: dict[tuple[str, str], list[list[float]]] = defaultdict(list)
    for sample in samples:
        for role, held in sample["held"].items():
            for process, (mib, descriptors) in held.items():
                seen[role, f"{process} {sample['piece']}"].append([sample["time"], mib, descriptors])
    slopes: dict[str, list[tuple[float, float, float]]] = defaultdict(list)
    for (role, _), points in seen.items():
        rows = np.array(points)
        rows = rows[rows[:, 0] > rows[0, 0] + STARTING_S.get(role, OTHERS_START_S)]
        if len(rows) > 3 and (life := rows[-1, 0] - rows[0, 0]) >= WATCHED_S:
            mib, descriptors = (np.polyfit(rows[:, 0], rows[:, i], 1)[0] for i in (1, 2))
            slopes[role].append((mib * pace * 1000, descriptors * pace * 1000, life))
    result = {}
    for role, found in slopes.items():
        values = np.array(found)
        mean = np.average(values[:, :2], axis=0, weights=values[:, 2])
        result[role] = (float(mean[0]), float(mean[1]), float(values[:, 2].sum() / 3600))
    return result


def recovery(run_dir: Path, kills: list[dict[str, Any]], starts: Sequence[float] = ()) -> dict[str, list[float]]:
    """role -> seconds that each kill cost. Those with another one, or one of the run's ``starts``, before the
    run was further are left out."""
    again = [r for r in _lines(run_dir / "metrics-lost.jsonl") if "rollout/reward" in r]
    steps = sorted([*trained(run_dir), *again], key=lambda r: r["time"])
    seconds: dict[str, list[float]] = defaultdict(list)
    for kill, following in zip_longest(kills, kills[1:]):
        lost = seconds_lost(steps, kill["time"])
        others = [*starts, following["time"]] if following else list(starts)
        if lost is not None and not any(kill["time"] < other < kill["time"] + lost for other in others):
            seconds[kill["role"]].append(lost)
    return dict(seconds)


def record_recovery(run_dir: Path, kills: list[dict[str, Any]], starts: Sequence[float] = ()) -> None:
    """The median cost of each victim into the table of faults (harness/faults.py), if the environment asks for it."""
    for role, seconds in recovery(run_dir, kills, starts).items():
        order, fault, what = WHAT[role]
        count = f"{len(seconds)} kills" if len(seconds) > 1 else "1 kill"
        record_fault(fault, f"{what} (median of {count})", float(np.median(seconds)), order=order)


def _starts(samples: list[dict[str, Any]]) -> list[float]:
    return sorted({s["piece"] for s in samples})


def _thinned(samples: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """At most SERIES points: step, MiB a role (all of its processes), store, journal, task events."""
    began = [s for s in samples if s["step"] is not None]
    points = []
    for s in began[:: max(1, -(-len(began) // SERIES))]:
        mib = {role: round(sum(m for m, _ in held.values()), 1) for role, held in s["held"].items()}
        points.append({"step": s["step"], "MiB": mib} | {k: s[k] for k in COUNTS if k in s})
    return points


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Accuracy of both runs, and the memory of the run with kills by role."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    for name, label in RUNS.items():
        points = [(r["step"], r["accuracy"]) for r in rows if r["run"] == name and "accuracy" in r]
        if points:
            left.plot(*zip(*points, strict=True), label=label, color="#1f77b4" if name == "peace" else "#d62728")
    left.set(xlabel="step", ylabel="held-out accuracy, greedy", ylim=(0, 1))
    left.legend(frameon=False)
    held = [r for r in rows if "MiB" in r and r["run"] == "killed"] or [r for r in rows if "MiB" in r]
    for role in ("engine", "learner", "driver", "ledger", "GCS"):
        points = [(r["step"], r["MiB"][role]) for r in held if role in r["MiB"]]
        if points:
            right.plot(*zip(*points, strict=True), linewidth=1, label=role)
    right.set(xlabel="step", ylabel="memory of its own, MiB", yscale="log")
    right.legend(frameon=False, ncols=2, fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=90)
    pyplot.close(figure)


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
