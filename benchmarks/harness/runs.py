"""Runs as they are committed: one line a run, and every table, figure and picture is computed from these lines.

benchmarks/results/runs/SWEEP.jsonl    a line a run: arm, seed, costs and accuracies, commit and date of its cell
benchmarks/results/comparisons.json    NAME -> sweep, arms, seeds, baseline, and the command that makes it again
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness.cell import COST_AXES
from benchmarks.harness.results_file import RESULTS
from cures_ray.messages import ConfigError

Record = dict[str, Any]
POINT_KEYS = ("version", *COST_AXES, "trained_tokens", "computed_tokens", "trained_rollouts", "greedy", "sampled")
POINT_KEYS += ("tokens",)  # prefill charged; older runs have it not
START_BATCHES = 5  # whose share of mixed groups says how informative the prompts are for the base model
KEPT_SPEC = ("engine", "task", "variant", "budget", "levels", "extra")


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Some arms of a sweep, held against one of them."""

    sweep: str
    baseline: str
    arms: list[str]
    seeds: list[int]
    command: str


def compact(record: Record) -> Record:
    """The line of one cell's record."""
    spec = record["spec"]
    line: Record = {"arm": spec["label"], "seed": spec["seed"], "status": record["status"]}
    line |= {"commit": record.get("commit", "unknown"), "date": record.get("date", "unknown")}
    line["spec"] = {key: spec[key] for key in KEPT_SPEC if spec.get(key)}
    if record["status"] != "done":
        return line | {"why": record["why"], "log": record["log"][-3:]}
    points = record["curve"]
    constant = {"best_constant": record["best_constant"]} if "best_constant" in record else {}
    return (
        line
        | constant
        | {
            "lr": record["config"]["learner"]["lr"],
            "accounting": record["accounting"],
            "seconds_by_component": record["seconds_by_component"],
            "explain": {key: short(value) for key, value in explain(record).items()},
            "by_level": [points[0]["by_level"], points[-1]["by_level"]],
            "curve": {key: [short(p[key]) for p in points] for key in POINT_KEYS if key in points[0]},
        }
    )


def expand(line: Record) -> Record:
    """A line as the record that the analysis reads: the curve as one dict a point."""
    record = {key: line[key] for key in ("status", "commit", "date")}
    record["spec"] = {"label": line["arm"], "seed": line["seed"], **line["spec"]}
    if line["status"] != "done":
        return record | {"why": line["why"], "log": line["log"]}
    curve = [dict(zip(line["curve"], values, strict=True)) for values in zip(*line["curve"].values(), strict=True)]
    for point, levels in zip((curve[0], curve[-1]), line["by_level"], strict=True):
        point["by_level"] = levels
    kept = {key: line[key] for key in ("accounting", "seconds_by_component", "explain", "best_constant") if key in line}
    return record | kept | {"curve": curve, "config": {"learner": {"lr": line["lr"]}}, "plans": [], "steps": []}


def explain(record: Record) -> dict[str, float]:
    """What explains a run's curve: rollouts an update, useful share, distinct prompts, overheads; and the belief's
    skill and weights at the end."""
    if "explain" in record:
        return record["explain"]
    end, account = record["curve"][-1], record["accounting"]
    planned, seconds = max(account["planned"], 1), record["seconds_by_component"]
    found = {
        "rollouts_per_update": planned / max(end["optimizer_steps"], 1.0),
        "trained_share": account["trained"] / planned,
        "pilot_share": account["discarded"].get("pilot", 0) / planned,
        "learning_rate": record["config"]["learner"]["lr"],
    }
    if "curriculum" in seconds:
        work = sum(value for part, value in seconds.items() if part != "evaluation")
        found["curriculum_share_of_seconds"] = seconds["curriculum"] / work
    series = {
        "staleness": [s["staleness/mean"] for s in record["steps"] if "staleness/mean" in s],
        "step_seconds": [s["time/step_s"] for s in record["steps"] if "time/step_s" in s],
        "mixed_share_at_start": [p["mixed_share"] for p in record["plans"][:START_BATCHES] if "mixed_share" in p],
    }
    for key in ("distinct_prompts", "largest_n", "mixed_share", "ess_fraction", "tau"):
        series[key] = [p[key] for p in record["plans"] if key in p]
    found |= {key: value for key, value in (record["steps"] or [{}])[-1].items() if key.startswith("belief/")}
    return found | {key: float(np.mean(values)) for key, values in series.items() if values}


def commit_runs(sweep: str, records: Sequence[Record], folder: Path = RESULTS) -> Path:
    """Add ``records`` to the sweep's file; a run of the same arm, seed, task and mix is replaced."""
    path = folder / "runs" / f"{sweep}.jsonl"
    lines = {_key(line): line for line in _lines(path)} if path.exists() else {}
    lines |= {_key(line): line for line in map(compact, records)}
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(line, separators=(",", ":")) + "\n" for line in lines.values())
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text)
    temporary.replace(path)
    return path


def committed(sweep: str, folder: Path = RESULTS) -> list[Record]:
    """All runs of a sweep's file. Raises ConfigError when it is missing."""
    path = folder / "runs" / f"{sweep}.jsonl"
    if not path.exists():
        raise ConfigError(f"{path} is missing: there are no committed runs of {sweep}")
    return [expand(line) for line in _lines(path)]


def commit_comparison(name: str, comparison: Comparison, folder: Path = RESULTS) -> None:
    path = folder / "comparisons.json"
    known = json.loads(path.read_text()) if path.exists() else {}
    known[name] = {key: getattr(comparison, key) for key in Comparison.__slots__}
    path.write_text(json.dumps(dict(sorted(known.items())), indent=1) + "\n")


def comparison_of(name: str, folder: Path = RESULTS) -> Comparison | None:
    """The comparison ``name``; None when there is none."""
    path = folder / "comparisons.json"
    known = json.loads(path.read_text()) if path.exists() else {}
    return Comparison(**known[name]) if name in known else None


def runs_of(comparison: Comparison, folder: Path = RESULTS) -> list[Record]:
    """The records of a comparison's arms and seeds.

    Raises:
        ConfigError: the sweep's file is missing, or lacks a run.
    """
    path = folder / "runs" / f"{comparison.sweep}.jsonl"
    if not path.exists():
        raise ConfigError(f"{path} is missing; make it with: {comparison.command}")
    lines = {(line["arm"], line["seed"]): line for line in _lines(path)}
    wanted = [(arm, seed) for arm in comparison.arms for seed in comparison.seeds]
    found = [expand(lines[key]) for key in wanted if key in lines]
    if missing := [arm for arm in comparison.arms if not any(key[0] == arm for key in lines)]:
        raise ConfigError(f"{path} has no run of {', '.join(missing)}; make it with: {comparison.command}")
    return found


def short(value: Any) -> Any:
    """Five significant digits; whole numbers without a fraction."""
    if not isinstance(value, float | np.floating):
        return value
    rounded = float(f"{value:.5g}")
    return int(rounded) if rounded.is_integer() and abs(rounded) < 1e15 else rounded


def _key(line: Record) -> tuple[str, int, str]:
    """What makes a run another one within a sweep."""
    spec = line["spec"]
    return line["arm"], line["seed"], json.dumps([spec.get(key) for key in ("task", "variant", "levels")])


def _lines(path: Path) -> list[Record]:
    return [json.loads(text) for text in path.read_text().splitlines()]
