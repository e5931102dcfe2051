"""``cures top RUN``: a run as it goes: progress, accuracy, where the time goes, and what is wrong."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.table import Table

from cures_ray.messages import ConfigError
from cures_ray.run.health import Records, diagnose, lately, read_notes, read_records, series, verdict

ROWS = {  # label -> (metric, format)
    "training reward": ("rollout/reward", "{:.3f}"),
    "entropy (nats a token)": ("learner/entropy", "{:.3f}"),
    "rollouts cut off": ("rollout/truncated", "{:.1%}"),
    "rollouts without a verdict": ("curriculum/fault_fraction", "{:.1%}"),
    "staleness (versions)": ("staleness/mean", "{:.2f}"),
    "seconds a step": ("time/step_s", "{:.1f}"),
    "  learner waits for rollouts": ("time/learner_idle_s", "{:.1f}"),
    "  and for an evaluation": ("time/evaluation_s", "{:.1f}"),
    "  generators wait for leases": ("time/generator_wait_leases_s", "{:.1f}"),
    "  and for weights": ("time/generator_wait_weights_s", "{:.1f}"),
    "  weight sync": ("time/weight_sync_s", "{:.2f}"),
    "tokens a second": ("rollout/tokens_per_s", "{:.0f}"),
    "temperature of the sampling": ("curriculum/tau", "{:.3g}"),
    "outcomes held less likely": ("curriculum/useful", "{:.1%}"),
}
BARS = "▁▂▃▄▅▆▇█"


def view(run_dir: Path, now: float) -> Group:
    """The screen. Raises ConfigError when there is no run in ``run_dir``."""
    if not run_dir.is_dir():
        raise ConfigError(f"{run_dir} is not a folder; name a run's folder (checkpoint.dir)")
    records = read_records(run_dir)
    if not records:
        notes = read_notes(run_dir)
        return Group(f"{run_dir}: no step yet.", *(f"  {note}" for note in notes[-8:]))
    findings = diagnose(records)
    last = records[-1]
    head = f"{run_dir}   step {last['step']:.0f}   {verdict(findings)}"
    if "time" in last:
        head += f"   last written {now - last['time']:.0f} s ago"
    table = Table("", "lately", "course of the run", box=None, pad_edge=False)
    for label, (metric, text) in {"held-out accuracy": ("eval/greedy_accuracy", "{:.3f}"), **ROWS}.items():
        value = series(records, metric)[-1:].mean() if metric.startswith("eval/") else lately(records, metric)
        if value is not None and len(series(records, metric)):
            table.add_row(label, text.format(value), sparkline(records, metric))
    troubles = [f"[bold]{f.what}[/bold]\n  {f.do}" for f in findings]
    notes = [f"  {note}" for note in read_notes(run_dir)[-4:]]
    return Group(head, table, *([Panel("\n".join(troubles), title="findings")] if troubles else []), *notes)


def sparkline(records: Records, metric: str, width: int = 40) -> str:
    """The metric's course as small bars between its least and its greatest value."""
    values = series(records, metric)
    if len(values) < 2:
        return ""
    step = max(1, len(values) // width)
    means = [float(values[i : i + step].mean()) for i in range(0, len(values), step)]
    low, span = min(means), max(means) - min(means)
    return "".join(BARS[round((m - low) / span * (len(BARS) - 1)) if span else 0] for m in means)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="cures top", description=__doc__)
    parser.add_argument("run", type=Path, help="a run's folder (checkpoint.dir)")
    parser.add_argument("--once", action="store_true", help="print and end")
    parser.add_argument("--every", type=float, default=2.0, metavar="SECONDS")
    args = parser.parse_args(argv)
    console = Console()
    if args.once or not console.is_terminal:
        console.print(view(args.run, time.time()))
        return 0
    with Live(view(args.run, time.time()), console=console, screen=True) as live:
        while True:
            time.sleep(args.every)
            live.update(view(args.run, time.time()))
