"""``cures bench convergence``: methods at equal cost, with confidence intervals. See docs/benchmarks.md.

cells (sweep.py: one process a run) -> records (cell.py) -> figures (analysis.py) -> tables, plots, HTML (report.py)
"""

from __future__ import annotations

import argparse
import shlex
import time
from pathlib import Path
from typing import Any

import yaml

from benchmarks.harness.analysis import ArmFigures, analyse
from benchmarks.harness.arms import HEADLINE
from benchmarks.harness.cell import Spec, add_task_arguments, spec_of
from benchmarks.harness.results_file import RESULTS
from benchmarks.harness.runs import Comparison, Record, commit_comparison, commit_runs, comparison_of, runs_of
from benchmarks.harness.sweep import Sweep
from cures_ray.config_load import known_keys
from cures_ray.messages import ConfigError


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="cures bench convergence", description="Methods at equal cost.")
    p.add_argument(
        "--methods", default=",".join(HEADLINE), help="arms of benchmarks/harness/arms.py, NAME[@key=value...],..."
    )
    p.add_argument("--baseline", default="grpo", help="the arm that the others are held against")
    p.add_argument("--seeds", default="5", help="how many, or a list such as 10,11,12")
    p.add_argument("--budget-rollouts", type=int, default=25_600, help="per run, everything charged")
    p.add_argument("--engine", choices=["inprocess", "full"], default="inprocess")
    add_task_arguments(p)
    p.add_argument("--out", type=Path, default=Path("runs/bench/convergence"))
    p.add_argument("--set", action="append", default=[], metavar="section.key=value", help="for all arms")
    p.add_argument("--jobs", type=int, default=1, help="cells at a time")
    p.add_argument("--cell-timeout-s", type=float, default=3600.0)
    p.add_argument("--minutes", type=float, help="start no further cell after this time")
    p.add_argument("--retry-failed", action="store_true")
    p.add_argument("--other-code", action="store_true", help="keep finished cells that ran another version of the code")
    p.add_argument("--name", help="also commit the runs to benchmarks/results and list NAME in its comparisons.json")
    p.add_argument("--no-report", action="store_true", help="cells only: no tables and plots")
    return p


def main(argv: list[str]) -> int:
    """Run what is missing, then write the report. Exit code 1 when cells failed."""
    args = parser().parse_args(argv)
    labels = [m for m in args.methods.split(",") if m]
    specs = make_specs(args, labels)
    until = time.time() + 60 * args.minutes if args.minutes else None
    sweep = Sweep(args.out, args.jobs, args.cell_timeout_s, args.retry_failed, args.other_code, until, log=_say)
    sweep.run(specs)
    records = [r for r in map(sweep.result, specs) if r is not None]
    failed = [r for r in records if r["status"] != "done"]
    for record in failed:
        _say(f"failed: {record['spec']['label']} seed {record['spec']['seed']}: {record['why']}")
    if not args.no_report and len(records) > len(failed):
        write_report(args, labels, records, command="cures bench convergence " + shlex.join(argv))
    return 1 if failed else 0


def make_specs(args: argparse.Namespace, labels: list[str]) -> list[Spec]:
    """All cells, seed by seed, so that a sweep that is cut short has complete pairs.

    Raises:
        ConfigError: unknown arm, key or level, or the baseline is not among the methods.
    """
    if args.baseline not in labels:
        raise ConfigError(f"--methods must hold the baseline {args.baseline!r}")
    seeds = [int(s) for s in args.seeds.split(",") if s] if "," in args.seeds else list(range(int(args.seeds)))
    extra = parse_set(args.set)
    return [spec_of(args, label, seed, args.engine, extra) for seed in seeds for label in labels]


def parse_set(changes: list[str]) -> dict[str, Any]:
    """["section.key=value"] -> {"section.key": value}. Raises ConfigError for an unknown key."""
    known, extra = set(known_keys()), {}
    for change in changes:
        key, equals, value = change.partition("=")
        if not equals or key not in known:
            raise ConfigError(f"--set {change}: it is not section.key=value with a key of the configuration")
        extra[key] = yaml.safe_load(value)
    return extra


def write_report(args: argparse.Namespace, labels: list[str], records: list[dict[str, Any]], command: str) -> None:
    """Tables, plots and HTML into ``args.out``; with ``--name`` the runs into the committed results too."""
    figures: list[ArmFigures] = analyse(records, labels, args.baseline)
    mix = f", levels {args.levels}" if args.levels else ""
    title = f"{args.task} {args.variant}{mix}, {args.engine} engine, {args.budget_rollouts} rollouts a run"
    _write(args.out, figures, records, args.baseline, title, command)
    if args.name:
        seeds = sorted({record["spec"]["seed"] for record in records})
        commit_runs(args.out.name, records)
        commit_comparison(
            args.name,
            Comparison(sweep=args.out.name, baseline=args.baseline, arms=labels, seeds=seeds, command=command),
        )


def _write(
    folder: Path, figures: list[ArmFigures], records: list[Record], baseline: str, title: str, command: str
) -> None:
    from benchmarks.harness.report import write_tables
    from benchmarks.harness.report_html import write_html

    write_tables(folder, figures, baseline, title, command)
    write_html(folder, figures, records, baseline, title, command)
    _say((folder / "table.md").read_text())


def show(argv: list[str]) -> int:
    """``cures bench show NAME``: tables, plots and HTML of a committed comparison, from its runs."""
    p = argparse.ArgumentParser(prog="cures bench show", description=show.__doc__)
    p.add_argument("name", help="of benchmarks/results/comparisons.json")
    p.add_argument("--out", type=Path, help="default: runs/bench/NAME")
    args = p.parse_args(argv)
    comparison = comparison_of(args.name)
    if comparison is None:
        raise ConfigError(f"there is no comparison {args.name!r} in {RESULTS / 'comparisons.json'}")
    records = runs_of(comparison)
    figures = analyse(records, comparison.arms, comparison.baseline)
    folder = args.out or Path("runs/bench") / args.name
    _write(folder, figures, records, comparison.baseline, args.name, comparison.command)
    return 0


def _say(line: str) -> None:
    print(line, flush=True)
