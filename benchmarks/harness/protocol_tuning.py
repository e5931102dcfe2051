"""Equal tuning: the same learning rates for every arm, extended for all of them until every best is inside."""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

from benchmarks.harness import lr_sweep
from benchmarks.harness.protocol_cells import BUDGET, RATES, SYNTHETIC, TUNED, Rates, tasks_of
from benchmarks.harness.real_task import REAL_MODEL, REAL_TASK

MOST_EXTENSIONS = 3  # rates added to those of PROTOCOL.md


def tune(args: argparse.Namespace) -> int:
    """Sweep every task of a part; ``OUT/rates.json`` maps task -> arm -> best rate. Exit code 1 when a cell failed, 2
    when cells are left or a best rate is still at an end."""
    part = args.part[-1]
    tasks = [REAL_TASK] if part == "a" else tasks_of(args.tasks)
    until = time.time() + 60 * args.minutes if args.minutes else None
    path = args.out / "rates.json"
    worst = 0
    for task in tasks:
        code, best = tune_task(args, part, task, until)
        worst = max(worst, code)
        known: Rates = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps(known | {task: best}, indent=1) + "\n")
    return worst


def tune_task(args: argparse.Namespace, part: str, task: str, until: float | None) -> tuple[int, dict[str, float]]:
    """(exit code, arm -> best rate) of one task."""
    rates = sorted(map(float, RATES[part].split(",")))
    arms = args.arms or ",".join(TUNED)
    for _ in range(MOST_EXTENSIONS + 1):
        words = words_of(args, part, task, arms, rates, until)
        failed = lr_sweep.main(words)
        records = lr_sweep.finished(words)
        best = {row["arm"]: row["lr"] for row in lr_sweep.rate_rows(records) if row["best"]}
        if failed or len(records) < len(lr_sweep.make_specs(lr_sweep.parser().parse_args(words))):
            return (1 if failed else 2), best
        if inside(best, rates):
            return 0, best
        rates = extended(best, rates)
        print(f"{task}: a best rate is at an end; every arm also gets {rates}", flush=True)
    return 2, best


def inside(best: dict[str, float], rates: list[float]) -> bool:
    """Whether no arm's best rate is the lowest or the highest of ``rates`` (ascending)."""
    return not {rates[0], rates[-1]} & set(best.values())


def extended(best: dict[str, float], rates: list[float]) -> list[float]:
    """``rates`` (ascending) with half the lowest where an arm is best there, twice the highest likewise."""
    found = set(best.values())
    low = [rates[0] / 2] if rates[0] in found else []
    high = [rates[-1] * 2] if rates[-1] in found else []
    return [*low, *rates, *high]


def words_of(
    args: argparse.Namespace, part: str, task: str, arms: str, rates: list[float], until: float | None
) -> list[str]:
    """The command line of lr_sweep.py."""
    assert task == REAL_TASK or task in SYNTHETIC
    budget = str(args.budget_rollouts or BUDGET[part])
    words: list[Any] = ["--methods", arms, "--rates", ",".join(f"{rate:g}" for rate in rates)]
    words += ["--budget-rollouts", budget, "--task", task, "--out", args.out, "--bases", args.bases]
    words += ["--variant", REAL_MODEL] if task == REAL_TASK else []
    words += ["--jobs", args.jobs, "--name", f"protocol_tuning_{task.replace('-', '_')}"] if args.commit else [
        "--jobs", args.jobs,
    ]  # fmt: skip
    words += ["--other-code"] if args.other_code else []
    if until is not None:
        words += ["--minutes", max(0.0, (until - time.time()) / 60)]
    return [str(word) for word in words]
