"""``cures bench protocol``: the comparison of PROTOCOL.md, part by part. Continues after any stop.

    tune-a, tune-b   the same learning rates for every arm, on seeds 100 and 101; writes OUT/rates.json
    a                SmolLM2 on reasoning-gym
    b                chain, program and chain_opaque: the arms, the ladder, the rivals
    c                the questions that had no power
    map              when it pays: features, mixed groups, rollouts a prompt

Cells are processes (sweep.py). OUT/runs/*.jsonl holds one compact line a finished run, OUT/PART.md the tables. Before
the first cell an estimate of the hours is printed; ``--estimate`` prints it and ends.
"""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import sys
import time
from collections import defaultdict
from pathlib import Path

import numpy as np

from benchmarks.harness.cell import BASES_FOLDER, Spec
from benchmarks.harness.mixture import surveyed
from benchmarks.harness.protocol_cells import PARTS, SYNTHETIC, default_out, make_specs
from benchmarks.harness.protocol_tables import report
from benchmarks.harness.real_task import REAL_TASK
from benchmarks.harness.runs import commit_runs, committed
from benchmarks.harness.sweep import Sweep
from benchmarks.inprocess.costs import DEVICE
from cures_ray.messages import ConfigError

# Seconds of a cell and its share of the base model on one core of an AMD EPYC, until there are cells of this call
SECONDS = {"chain": 35.0, "program": 60.0, "chain_opaque": 45.0, REAL_TASK: 1800.0}


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="cures bench protocol", description="Run a part of benchmarks/harness/PROTOCOL.md."
    )
    p.add_argument("part", choices=[*PARTS, "tune-a", "tune-b"])
    p.add_argument("--seeds", help="how many, or a list such as 60,61; default: 6 for a, 10 for b, 15 for c, 5 for map")
    p.add_argument("--arms", default="", help="a: 4 (default) or 6; else names of arms, comma-separated")
    p.add_argument("--tasks", default=",".join(SYNTHETIC), help="b, tune-b: which tasks")
    p.add_argument("--budget-rollouts", type=int, help="shorter runs to try the machinery; not the protocol")
    p.add_argument("--rates", type=Path, help="rates.json of a tuning; default: the rates of arms.py")
    p.add_argument("--out", type=Path, help="default: runs/bench/protocol/PART")
    p.add_argument("--bases", type=Path, default=BASES_FOLDER)
    p.add_argument("--jobs", type=int, default=2, help="cells side by side")
    p.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, ...")
    p.add_argument("--minutes", type=float, help="start no further cell after this time")
    p.add_argument("--cells", type=int, help="run at most so many cells in this call")
    p.add_argument("--tables", action="store_true", help="print the tables of the committed runs and end")
    p.add_argument("--estimate", action="store_true", help="print the hours that are left and end")
    p.add_argument("--retry-failed", action="store_true")
    p.add_argument("--other-code", action="store_true", help="keep finished cells that ran another version of the code")
    p.add_argument("--commit", action="store_true", help="also write the lines to benchmarks/results/runs")
    return p


def main(argv: list[str]) -> int:
    """Exit code 1 when a cell failed, 2 when cells are left for the next call."""
    args = parser().parse_args(argv)
    args.out = args.out or default_out(args.part)
    if args.part in ("a", "tune-a") and not args.budget_rollouts and not args.estimate and surveyed() is None:
        raise ConfigError(
            "the mixture of part a follows from a survey of the base model, which there is not yet: run "
            "cures bench survey --name survey_smollm2 (minutes of one core) and commit its result first"
        )
    os.environ[DEVICE] = args.device
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # ends the cells too
    if args.part.startswith("tune-"):
        from benchmarks.harness.protocol_tuning import tune

        return tune(args)
    if args.tables:
        _say(report(args.part, committed(f"protocol_{args.part}"), f"cures bench protocol {args.part} --commit"))
        return 0
    specs = make_specs(args)
    until = time.time() + 60 * args.minutes if args.minutes else None
    sweep = Sweep(args.out, args.jobs, 7200.0, args.retry_failed, args.other_code, until, log=_say)
    _say(estimate(specs, sweep, args.jobs))
    if args.estimate:
        return 0
    try:
        sweep.run(specs if args.cells is None else first_waiting(specs, sweep, args.cells))
    finally:
        records = [r for r in map(sweep.result, specs) if r is not None]
        if args.commit:
            commit_runs(f"protocol_{args.part}", records)
        commit_runs(f"protocol_{args.part}", records, args.out)
        text = report(args.part, records, f"cures bench protocol {shlex.join(argv)}", args.budget_rollouts)
        (args.out / f"{args.part}.md").write_text(text)
    _say(text)
    failed = sum(record["status"] != "done" for record in records)
    return 1 if failed else 2 if len(records) < len(specs) else 0


def estimate(specs: list[Spec], sweep: Sweep, jobs: int) -> str:
    """The cells that are left and their hours, by task: from this folder's finished cells, else from SECONDS."""
    left: dict[str, int] = defaultdict(int)
    spent: dict[str, list[float]] = defaultdict(list)
    for spec in specs:
        record = sweep.result(spec)
        if record is None:
            left[spec.task] += 1
        elif record["status"] == "done":
            spent[spec.task].append((record["wall_seconds"] + record["base_seconds"]) * spec.budget / budget_of(record))
    lines, hours = [], 0.0
    for task, cells in left.items():
        seconds = float(np.mean(spent[task])) if spent[task] else SECONDS[task] * share_of_budget(specs, task)
        hours += cells * seconds / jobs / 3600
        source = f"mean of {len(spent[task])} here" if spent[task] else "measured on one core of an AMD EPYC"
        lines.append(f"{task}: {cells} of {cells + len(spent[task])} cells to run, {seconds:.0f} s each ({source})")
    return "\n".join([*lines, f"about {hours:.1f} h, {jobs} side by side"])


def budget_of(record: dict[str, object]) -> float:
    return float(record["spec"]["budget"])  # type: ignore[index]


def share_of_budget(specs: list[Spec], task: str) -> float:
    """Budget of this call's cells over that of the protocol, for shorter trials."""
    full = PARTS["a"].budget if task == REAL_TASK else PARTS["b"].budget
    return next(spec.budget for spec in specs if spec.task == task) / full


def first_waiting(specs: list[Spec], sweep: Sweep, count: int) -> list[Spec]:
    """The first ``count`` cells that have no result."""
    return [spec for spec in specs if sweep.result(spec) is None][:count]


def _say(line: str) -> None:
    print(line, flush=True)
