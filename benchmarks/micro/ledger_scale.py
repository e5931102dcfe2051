"""What the curriculum costs at 10^4 to 10^7 prompts: ``cures bench ledger-scale``.

Each cycle draws m = 1024 prompts, allocates N = 8192 rollouts and counts the outcomes of the 1024. Measured, in turn
(A B A B ...) and pinned to one core:

- cycle: through PromptPool, against a plain NumPy recomputation of rho* over all prompts (the same beliefs, the same
  quantities: tau, ESS, normaliser, draws, rho, allocation, update), with tau fixed and with tau steered to an ESS
  (ledger_cycle.py). Ratios are of CPU seconds, which other load on a shared machine disturbs less than wall seconds;
  those are in the rows.
- ledger: the same through Ledger, with 1024 leases, one settlement of all, plan, commit and journal. These cost
  Python objects, tens of microseconds a lease whatever the number of prompts: reported beside the bars, not under them.
- snapshot: save, load, and reading the bytes of its files into memory, all with a warm page cache.
- actor: leases through Ray with 64 concurrent clients (ledger_actor.py).

Writes benchmarks/results/ledger_scale.json, whose rows of section "bars" say what is met.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import resource
import shutil
import statistics
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness.results_file import RESULTS, spread, write_result
from benchmarks.micro.ledger_cycle import (
    CLIENTS,
    MODES,
    M,
    N,
    Row,
    believe,
    config,
    measure_cycles,
    measure_parts,
    settlement,
    timed,
)
from cures_ray.curriculum.machine import Curriculum
from cures_ray.ledger.ledger import Ledger
from cures_ray.messages import CommitReport, LeaseChunk

# -- ledger --------------------------------------------------------------------------------------------


RESIDENT_FROM = 10**7  # prompts: smaller arrays reuse memory that the process already has


def measure_ledger(sizes: list[int], repeats: int) -> list[Row]:
    """Whole batches through a journalled Ledger, one row each; sizes alternate."""
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        open_ = {}
        for size in sizes:
            ledger = Ledger(Path(folder) / str(size), config("steered"), np.arange(size, dtype=np.uint64))
            open_[size] = ledger, believe(ledger.curriculum.pool.belief)
        for repeat in range(repeats + 1):
            for size, (ledger, truth) in open_.items():
                row = _ledger_batch(ledger, truth, repeat)
                if repeat:
                    rows.append({"section": "ledger", "prompts": size, "repeat": repeat, **row})
        for ledger, _ in open_.values():
            ledger.close()
    return rows


def _ledger_batch(ledger: Ledger, truth: np.ndarray, step: int) -> Row:
    """CPU seconds of each part of one batch."""
    rng, before = np.random.default_rng(step), ledger.journal_bytes
    leases, lease_s, _ = timed(lambda: LeaseChunk.of(ledger.lease("worker", N, step)))
    done = settlement(leases, rng, truth[leases.prompt_index])
    _, settle_s, _ = timed(lambda: ledger.settle(done))
    _, plan_s, _ = timed(lambda: ledger.plan(step))
    trained = dict(zip(leases.lease_id.tolist(), leases.n.tolist(), strict=True))
    report = CommitReport(batch=step, trained=trained, discarded={})
    _, commit_s, _ = timed(lambda: ledger.commit(report))
    rollouts = int(leases.n.sum())
    parts = {"lease_s": lease_s, "settle_s": settle_s, "plan_s": plan_s, "commit_s": commit_s}
    total = {"cpu_s": sum(parts.values()), "leases": len(leases), "rollouts": rollouts}
    return parts | total | {"journal_bytes_per_rollout": (ledger.journal_bytes - before) / rollouts}


# -- snapshot ------------------------------------------------------------------------------------------


def measure_snapshot(size: int, repeats: int) -> list[Row]:
    """Save once a repeat; then read its bytes and load it, in turn."""
    ids = np.random.default_rng(0).integers(0, 2**63, size, dtype=np.uint64)
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "snapshot"
        held, saves = _save(folder, ids, repeats)
        gc.collect()
        on_disk = sum(p.stat().st_size for p in folder.iterdir())
        for repeat in range(repeats + 1):
            _, read_cpu, read_wall = timed(lambda: [np.fromfile(p, np.uint8) for p in sorted(folder.iterdir())])
            resident = _resident_bytes()
            loaded, load_cpu, load_wall = timed(lambda: Curriculum.load(folder, config("steered"), ids))
            resident = _resident_bytes() - resident + ids.nbytes
            del loaded
            if repeat:
                row = {"section": "snapshot", "prompts": size, "repeat": repeat, "bytes_on_disk": on_disk}
                row |= dict(zip(("save_cpu_s", "save_wall_s"), saves[repeat - 1], strict=True))
                row |= {"read_cpu_s": read_cpu, "read_wall_s": read_wall, "load_cpu_s": load_cpu}
                row |= {"load_wall_s": load_wall, "load_over_read_cpu": load_cpu / read_cpu}
                row |= {"load_over_read_wall": load_wall / read_wall, "bytes_per_prompt": held / size}
                rows.append(row | {"resident_bytes_per_prompt": resident / size})
    return rows


def _save(folder: Path, ids: np.ndarray, repeats: int) -> tuple[int, list[tuple[float, float]]]:
    """Bytes of a curriculum's beliefs, sampler and ids, and (CPU, wall) seconds of each save into ``folder``."""
    curriculum = Curriculum(config("steered"), ids)
    believe(curriculum.pool.belief)
    curriculum.lease("worker", N, 0)
    saves = []
    for _ in range(repeats):
        shutil.rmtree(folder, ignore_errors=True)
        _, cpu, wall = timed(lambda: curriculum.save(folder))
        saves.append((cpu, wall))
    pool = curriculum.pool
    return pool.belief.nbytes + pool._samplers["mean"].nbytes + ids.nbytes, saves


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


# -- figures -------------------------------------------------------------------------------------------


def figures(rows: list[Row]) -> dict[str, Any]:
    """[low, median, high] over the repeats, named by size."""
    found: dict[str, list[float]] = {}

    def add(name: str, value: float) -> None:
        found.setdefault(name, []).append(float(value))

    cycles = [r for r in rows if r["section"] == "cycle"]
    smallest = min(r["prompts"] for r in cycles)
    small = {(r["tau"], r["repeat"]): r["cycle_cpu_s"] for r in cycles if r["prompts"] == smallest}
    few = {r["repeat"]: r["cpu_s"] for r in rows if r["section"] == "ledger" and r["prompts"] == smallest}
    for r in rows:
        size = power(r.get("prompts", 0))
        if r["section"] == "cycle":
            add(f"cycle_speedup_{r['tau']}_{size}", r["speedup_cpu"])
            add(f"cycle_seconds_{r['tau']}_{size}", r["cycle_cpu_s"])
            add(f"cycle_cost_growth_{r['tau']}_{size}", r["cycle_cpu_s"] / small[r["tau"], r["repeat"]])
        elif r["section"] == "parts":
            for part in ("update_sampler", "draw", "allocate", "observe"):
                add(f"cycle_part_seconds_{part}_{size}", r[f"{part}_cpu_s"])
        elif r["section"] == "ledger":
            add(f"ledger_batch_seconds_{size}", r["cpu_s"])
            seconds = r["lease_s"] + r["settle_s"]
            plain = [c["plain_cpu_s"] for c in cycles if (c["prompts"], c["tau"]) == (r["prompts"], "steered")]
            add(f"ledger_lease_and_settle_seconds_{size}", seconds)
            add(f"ledger_speedup_steered_{size}", statistics.median(plain) / seconds)
            add(f"ledger_batch_cost_growth_{size}", r["cpu_s"] / few[r["repeat"]])
            add(f"journal_bytes_per_rollout_{size}", r["journal_bytes_per_rollout"])
        elif r["section"] == "snapshot":
            add(f"snapshot_load_time_over_read_{size}", r["load_over_read_wall"])
            add(f"snapshot_load_seconds_{size}", r["load_wall_s"])
            add(f"snapshot_save_seconds_{size}", r["save_wall_s"])
            add(f"bytes_per_prompt_{size}", r["bytes_per_prompt"])
            if r["prompts"] >= RESIDENT_FROM:
                add(f"resident_bytes_per_prompt_{size}", r["resident_bytes_per_prompt"])
        elif r["section"] == "actor":
            for key in ("leases_per_second", "call_p99_latency_s", "call_p50_latency_s", "empty_calls_per_second"):
                add(f"actor_{key}_{size}", r[key])
    return {name: spread(values) for name, values in found.items()}


def bars(figures: dict[str, Any], largest: int) -> list[Row]:
    """The bars of the issue against the medians, at the largest size."""
    n = power(largest)
    limits = [(f"cycle_speedup_{mode}_{n}", "at least", 100.0) for mode in MODES]
    limits += [(f"cycle_cost_growth_{mode}_{n}", "at most", 3.0) for mode in MODES]
    limits += [(f"bytes_per_prompt_{n}", "at most", 64.0), (f"snapshot_load_time_over_read_{n}", "at most", 3.0)]
    rows = []
    for name, side, limit in limits:
        median = figures[name][1]
        met = median >= limit if side == "at least" else median <= limit
        rows.append({"section": "bars", "figure": name, "bar": f"{side} {limit:g}", "median": median, "met": met})
    return rows


def beside(figures: dict[str, Any], largest: int) -> list[Row]:
    """What no bar covers, with the measurement that shows its limit."""
    n, rows = power(largest), []
    parts = {k.split("seconds_")[1]: v[1] for k, v in figures.items() if k.startswith("cycle_part_seconds_")}
    note = "microseconds of its parts: " + ", ".join(f"{k} {v * 1e6:.0f}" for k, v in parts.items())
    rows.append({"figure": f"cycle_speedup_fixed_{n}", "limit": note})
    per_lease = figures[f"ledger_lease_and_settle_seconds_{n}"][1] / M
    growth = figures[f"ledger_batch_cost_growth_{n}"][1]
    note = (
        f"Python and journal, {per_lease * 1e6:.0f} microseconds a lease; {growth:.2f} x that with the fewest prompts"
    )
    rows.append({"figure": f"ledger_speedup_steered_{n}", "limit": note})
    if f"actor_leases_per_second_{n}" in figures:
        empty = figures[f"actor_empty_calls_per_second_{n}"][1]
        note = f"two calls a lease; the same {CLIENTS} clients make {empty:.0f} calls a second that do nothing"
        rows.append({"figure": f"actor_leases_per_second_{n}", "limit": note})
    return [{"section": "beside", "median": figures[row["figure"]][1], **row} for row in rows]


def power(size: int) -> str:
    """10000 -> 1e4."""
    exponent = round(math.log10(size)) if size else 0
    return f"1e{exponent}" if size == 10**exponent else str(size)


def main(argv: list[str] | None = None) -> int:
    """Exit code 1 when a bar is missed (not with --quick, which proves nothing)."""
    parser = argparse.ArgumentParser(prog="cures bench ledger-scale", description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="+", type=int, default=[10**4, 10**5, 10**6, 10**7], help="numbers of prompts")
    parser.add_argument("--repeats", type=int, default=7, help="of each measurement, at least 5")
    parser.add_argument("--inner", type=int, default=25, help="cycles through the pool per plain one")
    parser.add_argument("--actor-seconds", type=float, default=4.0, help="of each repeat through Ray; 0: no Ray")
    parser.add_argument("--quick", action="store_true", help="small and once, to see that it works")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the result file")
    args = parser.parse_args(argv)
    if args.quick:
        args.sizes, args.repeats, args.inner, args.actor_seconds = [2000, 20_000], 1, 2, 0.0
    sizes, cores = sorted(args.sizes), os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(cores)})
    try:
        rows = measure_cycles(sizes, args.repeats, args.inner)
        rows += measure_parts(sizes[-1], args.repeats, args.inner)
        gc.collect()
        rows += [row for size in sizes for row in measure_snapshot(size, args.repeats)]
        rows += measure_ledger([sizes[0], sizes[-1]], args.repeats)
    finally:
        os.sched_setaffinity(0, cores)
    if args.actor_seconds > 0:
        from benchmarks.micro.ledger_actor import measure_actor

        rows += measure_actor([sizes[0], sizes[-1]], args.repeats, args.actor_seconds)
    found = figures(rows)
    verdicts = bars(found, sizes[-1])
    rows.append({"section": "load", "load_average": os.getloadavg(), "clock": "process CPU for ratios of cycles"})
    notes = beside(found, sizes[-1])
    path = write_result("ledger_scale", found, rows + verdicts + notes, folder=args.out)
    print(json.dumps({name: [float(f"{v:.4g}") for v in values] for name, values in found.items()}, indent=1))
    for verdict in verdicts:
        met = "met" if verdict["met"] else "MISSED"
        print(f"{met:6} {verdict['figure']}: {verdict['median']:.3g}, bar {verdict['bar']}")
    for note in notes:
        print(f"       {note['figure']}: {note['median']:.3g}; {note['limit']}")
    print(f"written to {path}")
    return 0 if args.quick or all(v["met"] for v in verdicts) else 1


if __name__ == "__main__":
    raise SystemExit(main())
