"""``cures bench sweep``: the same learning-rate sweep for every method, on seeds that are in no table.

Chooses by the area under the held-out accuracy over rollouts, mean over the sweep's seeds: it rewards both speed and
height and is less noisy than an end point. Losing rates are kept in the result.
"""

from __future__ import annotations

import argparse
import shlex
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness.analysis import by_arm, curve_of
from benchmarks.harness.arms import HEADLINE
from benchmarks.harness.cell import Spec, add_task_arguments, spec_of
from benchmarks.harness.convergence import parse_set
from benchmarks.harness.report import table
from benchmarks.harness.statistics import area, final_accuracy
from benchmarks.harness.sweep import Sweep

SEEDS = "100,101"
RATES = "3e-4,6e-4,1e-3,2e-3"


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="cures bench sweep", description=__doc__.splitlines()[0])
    p.add_argument("--methods", default=",".join(HEADLINE), help="ARM[:RATE:RATE...],...; without rates: --rates")
    p.add_argument("--rates", default=RATES)
    p.add_argument("--seeds", default=SEEDS, help="never those of a table")
    p.add_argument("--budget-rollouts", type=int, default=25_600)
    p.add_argument("--engine", choices=["inprocess", "full"], default="inprocess")
    add_task_arguments(p)
    p.add_argument("--out", type=Path, default=Path("runs/bench/lr_sweep"))
    p.add_argument("--set", action="append", default=[], metavar="section.key=value")
    p.add_argument("--jobs", type=int, default=1)
    p.add_argument("--minutes", type=float)
    p.add_argument("--other-code", action="store_true", help="keep finished cells that ran another version of the code")
    p.add_argument("--name", help="also write benchmarks/results/NAME.json")
    return p


def main(argv: list[str]) -> int:
    args = parser().parse_args(argv)
    specs = make_specs(args)
    until = time.time() + 60 * args.minutes if args.minutes else None
    sweep = Sweep(args.out, args.jobs, other_code=args.other_code, until=until, log=_say)
    sweep.run(specs)
    records = [r for r in map(sweep.result, specs) if r is not None]
    rows = rate_rows(records)
    text = markdown(rows)
    (args.out / "table.md").write_text(text)
    _say(text)
    if args.name:
        from benchmarks.harness.results_file import write_result

        figures = {f"{row['arm']}/best_lr": row["lr"] for row in rows if row["best"]}
        write_result(args.name, figures, rows, command="cures bench sweep " + shlex.join(argv))
    return 1 if any(r["status"] != "done" for r in records) else 0


def finished(argv: list[str]) -> list[dict[str, Any]]:
    """The records that a call with ``argv`` has left so far."""
    args = parser().parse_args(argv)
    sweep = Sweep(args.out, other_code=args.other_code)
    return [r for r in map(sweep.result, make_specs(args)) if r is not None]


def make_specs(args: argparse.Namespace) -> list[Spec]:
    extra = parse_set(args.set)
    arms = []
    for item in filter(None, args.methods.split(",")):
        method, *own_rates = item.split(":")
        arms += [f"{method}@learner.lr={rate}" for rate in own_rates or args.rates.split(",")]
    return [spec_of(args, arm, int(seed), args.engine, extra) for seed in args.seeds.split(",") for arm in arms]


def rate_rows(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row an arm and rate: areas and final accuracies by seed, failed runs, and whether it is the arm's best."""
    rows: list[dict[str, Any]] = []
    for label, runs in by_arm(records).items():
        arm, _, rate = label.rpartition("@learner.lr=")
        curves = {seed: curve_of(record, "rollouts") for seed, record in sorted(runs.items())}
        areas = {seed: area(c, float(runs[seed]["spec"]["budget"])) for seed, c in curves.items()}
        rows.append(
            {
                "arm": arm,
                "lr": float(rate),
                "area": round(float(np.mean(list(areas.values()))), 5),
                "area_by_seed": {s: round(v, 5) for s, v in areas.items()},
                "final_by_seed": {s: round(final_accuracy(c), 5) for s, c in curves.items()},
                "best": False,
            }
        )
    most = max((len(row["area_by_seed"]) for row in rows), default=0)
    for arm in {row["arm"] for row in rows}:
        complete = [row for row in rows if row["arm"] == arm and len(row["area_by_seed"]) == most]
        if complete:
            max(complete, key=lambda row: row["area"])["best"] = True
    for record in records:
        if record["status"] != "done":
            rows.append({"arm": record["spec"]["label"], "lr": None, "failed": record["why"], "best": False})
    return rows


def markdown(rows: list[dict[str, Any]]) -> str:
    done = [row for row in rows if "failed" not in row]
    rates = sorted({row["lr"] for row in done})
    lines = []
    for arm in dict.fromkeys(row["arm"] for row in done):
        cells = {row["lr"]: row for row in done if row["arm"] == arm}
        lines.append([arm, *(_cell(cells.get(rate)) for rate in rates)])
    return "Area under the accuracy over rollouts; the best rate of an arm in bold.\n\n" + table(
        ["arm", *(f"{rate:g}" for rate in rates)], lines
    )


def _cell(row: dict[str, Any] | None) -> str:
    if row is None:
        return "–"
    text = f"{row['area']:.4f}"
    return f"**{text}**" if row["best"] else text


def _say(line: str) -> None:
    print(line, flush=True)
