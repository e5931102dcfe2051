"""How many generators one driver and one ledger carry: the real code of both, everything around them in virtual time.

    driver (real) --pickled message--> ledger (real, with its journal)   each a server with one thread
         |  ^---- generators and verifiers: answer after so many virtual seconds, cost nothing
         '------- learner: answers at once

Time passes in two ways. CPU seconds that driver and ledger really use are charged to the clock, each to its own
process; what Ray costs a call is measured before (``ray_cost``) and charged too. When both have nothing to do the
clock jumps to the next event. Share of the ideal: settled rollouts a second over (requests in flight / seconds of a
generation).

Kept out: engines, networks, the learner's own time. A machine's real clock plays no part, but its CPU does.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import ray

from actors.cluster.adapters import answer
from actors.cluster.launch import own_ray
from benchmarks.harness.results_file import RESULTS, spread, write_result
from benchmarks.micro.control_plane import Fleet
from benchmarks.micro.virtual_world import (
    Clock,
    Silent,
    VirtualGenerator,
    VirtualLearner,
    VirtualLedger,
    VirtualVerifier,
    Wire,
    run_in_virtual_time,
)
from cures_ray.config import Config
from cures_ray.ledger.ledger import Ledger
from cures_ray.loop.driver import Driver
from cures_ray.loop.ports import Ports
from cures_ray.messages import RunError

IN_FLIGHT = 256  # rollouts of a generator
CELLS = (  # generators, seconds of a generation, rollouts a prompt
    *((count, 30.0, 1) for count in (1, 10, 100, 300, 1000)),
    (1000, 100.0, 1),
    *((count, 30.0, 8) for count in (1000, 4000)),
)
PROMPTS = 262_144
WARMUP_STEPS = 2
CALLS = 2000  # that ``ray_cost`` measures
GOAL = 0.95


def simulate(
    generators: int, seconds: float, costs: dict[str, float], group: int = 1, prompts: int = PROMPTS
) -> dict[str, float]:
    """One cell: two optimizer steps to warm up, then as long as a generation (at least 10 s) that counts.

    Args:
        generators: with IN_FLIGHT rollouts each.
        seconds: of a generation, on average: half to one and a half times as long. A group's rollouts end together.
        costs: of ``ray_cost``.
        group: rollouts a prompt. 1: the default method; more: GRPO.
    """
    slots = generators * IN_FLIGHT
    method = {} if group == 1 else {"method": "uniform"}
    config = Config.model_validate(
        {
            # nine batches of a quarter of all slots may be open: the bound on staleness holds nobody up
            "curriculum": {"prompts_per_step": slots // 4 // group, "rollouts_per_step": slots // 4, **method},
            "algo": {} if group == 1 else {"advantage": "grpo"},
            "async_rl": {"max_staleness": 8},
            "trainer": {"steps": 10**6, "no_progress_timeout_s": 1e6},
            "eval": {"interval": 0},
            "checkpoint": {"interval": 0},
            "rollout": {"num_generators": generators, "max_concurrent_rollouts": IN_FLIGHT, "timeout_s": 1e6},
        }
    )
    clock = Clock()
    wire = Wire(clock, costs["driver_call_s"])
    with tempfile.TemporaryDirectory() as folder:
        with clock.elsewhere():
            ids = np.random.default_rng(0).integers(0, 2**63, prompts).astype(np.uint64)
            levels = np.arange(prompts) % 6.0
            ledger = VirtualLedger(Ledger(Path(folder), config, ids, levels), wire, costs["actor_call_s"])
        members = [VirtualGenerator(f"generator-{i}", wire, seconds, i) for i in range(generators)]
        ports = Ports(
            ledger=ledger, fleet=Fleet(list(members)), verifier=VirtualVerifier(wire), learner=VirtualLearner(wire)
        )
        measured = _measured(Driver(config, ports, Silent()), clock, ledger, slots, seconds)
        return run_in_virtual_time(clock, measured) | {"rollouts_a_prompt": group}


async def _measured(
    driver: Driver, clock: Clock, ledger: VirtualLedger, slots: int, seconds: float
) -> dict[str, float]:
    """Rates between the end of the warm-up and the end, and the driver's and the ledger's work."""
    run = asyncio.create_task(driver.run())
    while driver.version < WARMUP_STEPS:  # its batches are full, and their training is part of the driver's work
        await _pass(1.0, run)
    before = (clock.now(), clock.busy, ledger.busy, ledger.settled, ledger.chunks, driver.version)
    ledger.waits.clear()
    await _pass(max(seconds, 10.0), run)
    after = (clock.now(), clock.busy, ledger.busy, ledger.settled, ledger.chunks, driver.version)
    passed, driver_s, ledger_s, settled, chunks, steps = (b - a for a, b in zip(before, after, strict=True))
    run.cancel()
    with suppress(asyncio.CancelledError):
        await run
    ideal = slots / seconds
    return {
        "generators": slots // IN_FLIGHT,
        "generation_s": seconds,
        "rollouts_per_s": settled / passed,
        "ideal_rollouts_per_s": ideal,
        "share": settled / passed / ideal,
        "driver_busy": driver_s / passed,
        "ledger_busy": ledger_s / passed,
        "driver_us_per_rollout": driver_s / max(settled, 1) * 1e6,
        "ledger_us_per_rollout": ledger_s / max(settled, 1) * 1e6,
        "rollouts_per_chunk": settled / max(chunks, 1),
        "ledger_wait_p99_s": float(np.quantile(ledger.waits, 0.99)),
        "steps": steps,
    }


async def _pass(seconds: float, run: asyncio.Task[Any]) -> None:
    """``seconds`` go by, unless ``run`` fails first."""
    done, _ = await asyncio.wait({run}, timeout=seconds)
    if done:
        run.result()
        raise RunError("virtual time: the run ended before its time")


class Echo:
    """An actor that gives back what it is given."""

    def echo(self, message: bytes) -> bytes:
        return message

    def cpu(self) -> float:
        return cpu_seconds()


def cpu_seconds() -> float:
    times = psutil.Process().cpu_times()
    return times.user + times.system


async def _calls(actor: Any, calls: int) -> None:
    gate = asyncio.Semaphore(64)

    async def call() -> None:
        async with gate:
            await answer(actor.echo.remote(b"x" * 1000), "echo", 60.0)

    await asyncio.gather(*(call() for _ in range(calls)))


def ray_cost(calls: int = CALLS) -> dict[str, float]:
    """CPU seconds that one actor call costs its caller and its actor, all threads of Ray's in both processes. An upper
    bound for one thread: some of Ray's threads work beside the driver's."""
    config = Config.model_validate({"ray": {"num_cpus": 4}})
    with own_ray(config):
        actor = ray.remote(Echo).options(num_cpus=0).remote()
        asyncio.run(_calls(actor, calls // 4))
        before = cpu_seconds(), ray.get(actor.cpu.remote())
        asyncio.run(_calls(actor, calls))
        after = cpu_seconds(), ray.get(actor.cpu.remote())
    return {"driver_call_s": (after[0] - before[0]) / calls, "actor_call_s": (after[1] - before[1]) / calls}


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="cures bench virtual-time", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--cell",
        action="append",
        metavar="GENERATORS,SECONDS,ROLLOUTS",
        help="generators, seconds of a generation and rollouts a prompt; several are several cells (default: a sweep)",
    )
    parser.add_argument("--repeats", type=int, default=3, help="of the measurement of Ray's cost")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the result")
    args = parser.parse_args(argv)
    measured = [ray_cost() for _ in range(args.repeats)]
    costs = {name: float(np.median([m[name] for m in measured])) for name in measured[0]}
    cells = [(int(g), float(s), int(n)) for g, s, n in (cell.split(",") for cell in args.cell or ())] or CELLS
    rows = []
    for count, seconds, group in cells:
        rows.append(simulate(count, seconds, costs, group))
        print(json.dumps({k: round(v, 4) for k, v in rows[-1].items()}), flush=True)
    figures: dict[str, Any] = {name: spread([m[name] for m in measured]) for name in costs}
    for row in rows:
        cell = f"{row['generators']:.0f}_generators_{row['generation_s']:g}_s_n{row['rollouts_a_prompt']:.0f}"
        figures[f"share_{cell}"] = row["share"]
    path = write_result("virtual_time", figures, rows, folder=args.out)
    print(f"{path}: goal {GOAL:.0%}; missed by {[key for key, v in figures.items() if 'share' in key and v < GOAL]}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
