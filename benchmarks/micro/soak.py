"""A long run under fire, and the same run in peace: ``cures bench soak [--steps 2000] [--minutes 10]``.

Two runs of ``cures train`` on a small base model. In the first a process is killed every ``--interval`` seconds on
average: generator actor, its engine, verifier, learner rank, ledger, each equally often (decks of one each, shuffled),
at times that do not look at what the run is doing. In the second nothing is killed.

    supervisor --start--> cures train ... --> RUN/metrics.jsonl
        |--every 5 s: memory, descriptors, object store, journal, GCS--> samples-RUN.jsonl
        '--SIGKILL a role-----------------------------------------------> kills.jsonl

Results: benchmarks/results/soak.json and docs/soak.png. ``--minutes`` stops in order after that time; the same command
goes on from there.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import yaml

from benchmarks.micro.soak_report import report
from benchmarks.micro.soak_watch import (
    folder_bytes,
    memory,
    processes,
    session_folder,
    stored_bytes,
    task_events,
    trained,
)
from cures_ray.synthetic.base_model import main as prepare

VICTIMS = ("generator", "engine", "verifier", "learner", "ledger")
SAMPLE_S = 5.0
STOP_S = 180.0  # for the child's last step and checkpoint
BOUNDS = (0.3, 3.0)  # of an interval, in units of the mean


def configuration(folder: Path, name: str, steps: int) -> dict[str, Any]:
    base = folder / "base"
    return {
        "model": {"path": str(base / "model")},
        "data": {"train": str(base / "train.jsonl"), "eval": str(base / "eval.jsonl"), "max_prompt_tokens": 32},
        "curriculum": {"prompts_per_step": 64, "rollouts_per_step": 64},
        "rollout": {"num_generators": 2, "max_new_tokens": 12, "dtype": "float32", "max_restarts": 1000},
        "learner": {"lr": 5e-4, "lr_schedule": "linear", "warmup_steps": 10, "dtype": "float32", "cpus_per_rank": 0.5},
        "verifier": {"num_workers": 2},
        "placement": {"generator_cpus": 0.5, "verifier_cpus": 0.25, "use_gpu": "no"},
        "eval": {"interval": 100},
        "checkpoint": {"dir": str(folder / name), "interval": 20},
        "logging": {"progress": "lines", "tensorboard": False, "histogram_interval": 100},
        "trainer": {"steps": steps, "max_restarts": 1000},
        "ray": {"num_cpus": 4},
    }


class Killer:
    """Whom to kill, and when; the same choices for the same seed."""

    def __init__(self, mean_s: float, seed: int) -> None:
        self.mean_s, self._rng = mean_s, random.Random(seed)
        self._roles = self._decks()
        self._next = next(self._roles)
        self.due = time.monotonic() + self._interval()

    def _decks(self) -> Iterator[str]:
        while True:
            yield from self._rng.sample(VICTIMS, len(VICTIMS))

    def _interval(self) -> float:
        low, high = BOUNDS
        return min(max(self._rng.expovariate(1.0), low), high) * self.mean_s

    def strike(self, root: psutil.Process) -> dict[str, Any] | None:
        """Kill one process of the next role; None where none of it lives just now (it is tried again)."""
        self.due = time.monotonic() + self._interval()
        living = sorted((s for s in processes(root) if s.role == self._next), key=lambda s: s.process.create_time())
        if not living:
            return None
        victim = self._rng.choice(living)
        victim.process.send_signal(signal.SIGKILL)
        self._next = next(self._roles)
        return {"time": time.time(), "role": victim.role, "process": victim.key}


def run_until(folder: Path, name: str, steps: int, mean_s: float | None, deadline: float) -> bool:
    """Train run ``name`` until it has ended (True) or ``deadline`` has come; with kills where ``mean_s`` is given.

    Raises:
        RuntimeError: the run failed.
    """
    run_dir, path = folder / name, folder / f"{name}.yaml"
    if (run_dir / "summary.json").exists() and len(trained(run_dir)) >= steps:
        return True
    path.write_text(yaml.safe_dump(configuration(folder, name, steps)))
    began = time.time()
    with (folder / f"{name}.log").open("a") as log:
        command = [sys.executable, "-m", "actors.commands.cli", "train", str(path)]
        child = subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | {"RAY_ADDRESS": ""})
    try:
        watch(folder, name, child, mean_s, deadline, began)
    finally:
        if child.poll() is None:
            child.send_signal(signal.SIGTERM)
        try:
            code = child.wait(STOP_S)
        except subprocess.TimeoutExpired:
            child.kill()
            raise
    if code not in (0, 130):
        raise RuntimeError(f"cures train ended with code {code}; see {folder / name}.log")
    return code == 0


def watch(
    folder: Path, name: str, child: subprocess.Popen[Any], mean_s: float | None, deadline: float, began: float
) -> None:
    """Sample and kill until the child ends or it is time."""
    run_dir, root = folder / name, psutil.Process(child.pid)
    killer: Killer | None = None
    next_sample = time.monotonic()
    while child.poll() is None and time.monotonic() < deadline:
        time.sleep(0.25)
        now = time.monotonic()
        if killer is not None and now >= killer.due and (killed := killer.strike(root)):
            step = latest(run_dir)
            _append(folder / f"kills-{name}.jsonl", killed | {"step": step})
            print(f"{name}: step {step}, killed {killed['role']}", flush=True)
        if now < next_sample:
            continue
        next_sample = now + SAMPLE_S
        seen = processes(root)
        session = session_folder(seen)
        step = latest(run_dir)
        sample = {
            "time": time.time(),
            "piece": began,
            "step": step,
            "held": memory(seen),
            "store": stored_bytes(session) if session else None,
            "task_events": task_events(session) if session else None,
            "journal_bytes": folder_bytes(run_dir / "ledger", "journal-*", "snapshot-*/*"),
            "lease_log_bytes": folder_bytes(run_dir / "ledger", "leases-*"),
            "shm": folder_bytes(Path("/dev/shm"), "*", "*/*"),
        }
        _append(folder / f"samples-{name}.jsonl", sample)
        if (
            mean_s is not None
            and killer is None
            and step is not None
            and any(r["time"] > began for r in trained(run_dir))
        ):
            killer = Killer(mean_s, seed=int(began))  # everything has started


def latest(run_dir: Path) -> int | None:
    steps = [r["step"] for r in trained(run_dir)]
    return steps[-1] if steps else None


def _append(path: Path, record: dict[str, Any]) -> None:
    with path.open("a") as file:
        file.write(json.dumps(record) + "\n")


def main(argv: list[str]) -> int:
    """Exit code 0 when both runs have ended, 3 when time was up before."""
    parser = argparse.ArgumentParser(prog="cures bench soak", description=__doc__.splitlines()[0])
    parser.add_argument("--dir", type=Path, default=Path("runs/soak"))
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--interval", type=float, default=45.0, help="mean seconds between two kills")
    parser.add_argument("--minutes", type=float, default=1e6, help="stop in order after so long; repeat to go on")
    parser.add_argument("--run", choices=["killed", "peace"], help="only this one, without a report")
    parser.add_argument("--report", action="store_true", help="write the result of what has run so far")
    args = parser.parse_args(argv)
    deadline = time.monotonic() + 60 * args.minutes
    args.dir.mkdir(parents=True, exist_ok=True)
    if not (args.dir / "base" / "summary.json").exists():
        prepare(["--out", str(args.dir / "base"), "--task", "chain", "--seed", "0", "--eval-prompts", "400"])
    for name, mean_s in (("killed", args.interval), ("peace", None)):
        if args.report or args.run not in (None, name):
            continue
        print(f"{name}: from step {latest(args.dir / name) or 0} of {args.steps}", flush=True)
        if not run_until(args.dir, name, args.steps, mean_s, deadline):
            print(f"{name}: stopped at step {latest(args.dir / name)}; the same command goes on", flush=True)
            return 3
    if args.run is None:
        report(args.dir)
    return 0
