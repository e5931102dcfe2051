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
import heapq
import json
import selectors
import sys
import tempfile
import time
from collections.abc import Coroutine, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import ray
from ray import cloudpickle

from actors.cluster.adapters import answer
from actors.cluster.launch import own_ray
from actors.generator import ENOUGH, LINGER_S, LINGER_SHARE, POLL_S
from benchmarks.harness.results_file import RESULTS, spread, write_result
from cures_ray.config import Config
from cures_ray.ledger.ledger import Ledger
from cures_ray.loop.driver import Driver
from cures_ray.loop.ports import GeneratorPort, Ports
from cures_ray.messages import (
    ChunkSummary,
    Key,
    LeaseChunk,
    RunError,
    Settlement,
    SettleReply,
    StepReport,
    SyncReport,
    TrainingBatch,
    VerdictChunk,
    WeightUpdate,
)

IN_FLIGHT, SECONDS = 256, 30.0  # of a generator; of a generation
PROMPTS = 262_144
GENERATORS = (1, 10, 100, 300, 1000, 2000, 4000)
LENGTHS = (3.0, 10.0, 100.0)  # seconds of a generation, beside SECONDS, with 1 000 generators
NETWORK_S = 0.001  # from one process to another
VERIFY_S = 0.05
CALLS = 2000  # that ``ray_cost`` measures
GOAL = 0.95


class Clock:
    """Virtual seconds: the CPU seconds of this thread that belong to the driver, and jumps."""

    def __init__(self) -> None:
        self._ahead = -time.thread_time()  # jumps and charges, less what others used
        self.used = 0.0  # of it: charged to the driver for calls
        self._jumped = 0.0

    def now(self) -> float:
        return self._ahead + time.thread_time()

    @property
    def busy(self) -> float:
        """Seconds in which the driver worked."""
        return self.now() - self._jumped

    def charge(self, seconds: float) -> None:
        self._ahead += seconds

    def jump(self, seconds: float) -> None:
        self._ahead += seconds
        self._jumped += seconds

    @contextmanager
    def elsewhere(self) -> Iterator[None]:
        """What runs in here is no work of the driver's."""
        began = time.thread_time()
        try:
            yield
        finally:
            self._ahead -= time.thread_time() - began


class Jumping(selectors.SelectSelector):
    """Where an event loop would sleep, the clock jumps."""

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self._clock = clock

    def select(self, timeout: float | None = None) -> list[Any]:
        if timeout is None:
            raise RunError("virtual time: nothing is left to happen")
        if timeout > 0:
            self._clock.jump(timeout)
        return []


def run_in_virtual_time(clock: Clock, main: Coroutine[Any, Any, Any]) -> Any:
    """``asyncio.run`` by ``clock``."""
    loop = asyncio.SelectorEventLoop(Jumping(clock))
    loop.time = clock.now  # type: ignore[method-assign]
    with asyncio.Runner(loop_factory=lambda: loop) as runner:
        return runner.run(main)


class Wire:
    """Messages between processes: pickled by one and read by the other, as with Ray."""

    def __init__(self, clock: Clock, call_s: float) -> None:
        self.clock, self.call_s = clock, call_s

    def send(self, message: Any) -> bytes:
        """By the driver: one call."""
        self.clock.charge(self.call_s)
        return cloudpickle.dumps(message)

    def receive(self, blob: bytes) -> Any:
        return cloudpickle.loads(blob)

    def answered(self, message: Any) -> bytes:
        """By a worker whose time is its own."""
        with self.clock.elsewhere():
            return cloudpickle.dumps(message)


class VirtualLedger:
    """LedgerPort over the real ledger: a server that answers one call after the other, in its own time."""

    def __init__(self, ledger: Ledger, wire: Wire, call_s: float) -> None:
        self.ledger, self.wire, self.call_s = ledger, wire, call_s
        self.free = 0.0  # when it has answered all calls
        self.busy = 0.0
        self.settled, self.chunks = 0, 0  # rollouts, settlements
        self.waits: list[float] = []  # of calls, for the answer

    async def _call(self, method: str, *arguments: Any) -> Any:
        clock = self.wire.clock
        blob, asked = self.wire.send(arguments), clock.now()
        with clock.elsewhere():
            began = time.thread_time()
            result = getattr(self.ledger, method)(*cloudpickle.loads(blob))
            reply = cloudpickle.dumps(LeaseChunk.of(result) if method == "lease" else result)
            service = time.thread_time() - began + self.call_s
        self.free = max(self.free, asked + NETWORK_S) + service
        self.busy += service
        await asyncio.sleep(self.free + NETWORK_S - clock.now())
        self.waits.append(clock.now() - asked)
        return self.wire.receive(reply)

    async def lease(self, worker: str, max_rollouts: int, version: int) -> LeaseChunk:
        return await self._call("lease", worker, max_rollouts, version)

    async def settle(self, settlement: Settlement) -> SettleReply:
        reply = await self._call("settle", settlement)
        self.settled += int(settlement.n.sum())
        self.chunks += 1
        return reply

    async def give_back(self, keys: list[Key], reason: Any) -> None:
        await self._call("give_back", keys, reason)

    async def plan(self, batch: int) -> Any:
        return await self._call("plan", batch)

    async def commit(self, report: Any) -> Any:
        return await self._call("commit", report)

    async def status(self) -> Any:
        return await self._call("status")

    async def save(self, folder: Path) -> None:
        await self._call("save", folder)


class VirtualGenerator:
    """GeneratorPort whose requests take so many virtual seconds. ``collect`` waits as GeneratorActor's does."""

    def __init__(self, name: str, wire: Wire, seconds: float, seed: int) -> None:
        self.name, self._wire, self._seconds = name, wire, seconds
        self._rng = np.random.default_rng(seed)
        self._running: list[tuple[float, int, int, int]] = []  # heap: ends at, lease, attempt, n
        self._came = asyncio.Event()
        self._version, self._fresh = 0, IN_FLIGHT

    async def submit(self, leases: LeaseChunk) -> None:
        clock = self._wire.clock
        self._wire.send(leases)
        await asyncio.sleep(2 * NETWORK_S)
        with clock.elsewhere():
            now = clock.now()
            spread = self._rng.uniform(0.5, 1.5, len(leases)) * self._seconds
            if self._fresh > 0:  # the first are in the middle of their generation
                self._fresh -= len(leases)
                spread *= self._rng.random(len(leases))
            columns = (leases.lease_id.tolist(), leases.attempt.tolist(), leases.n.tolist())
            for seconds, *lease in zip(spread.tolist(), *columns, strict=True):
                heapq.heappush(self._running, (now + seconds, *lease))
            self._came.set()

    async def collect(self) -> tuple[ChunkSummary, None]:
        clock = self._wire.clock
        self._wire.send(())
        until = clock.now() + POLL_S
        while not self._running and clock.now() < until:
            self._came.clear()
            with suppress(TimeoutError):
                async with asyncio.timeout_at(until):
                    await self._came.wait()
        first = self._running[0][0] if self._running else until
        await asyncio.sleep(max(min(first, until) - clock.now(), 0.0) + NETWORK_S)
        linger = min(max(LINGER_SHARE * self._seconds, LINGER_S[0]), LINGER_S[1])
        if self._running and self._running[0][0] <= clock.now() and len(self._running) > 0:
            with clock.elsewhere():
                ready = sum(end <= clock.now() for end, *_ in self._running)
            if ready < ENOUGH:
                await asyncio.sleep(linger)
        with clock.elsewhere():
            now, done = clock.now(), []
            while self._running and self._running[0][0] <= now:
                done.append(heapq.heappop(self._running)[1:])
            blob = cloudpickle.dumps(self._summary(done))
        await asyncio.sleep(NETWORK_S)
        return self._wire.receive(blob), None

    def _summary(self, done: Sequence[tuple[int, int, int]]) -> ChunkSummary:
        lease_id, attempt, n = np.array(done, np.int64).reshape(-1, 3).T
        rollouts = int(n.sum())
        return ChunkSummary(
            generator=self.name,
            lease_id=lease_id,
            attempt=attempt.astype(np.int32),
            n=n.astype(np.int32),
            failed=np.zeros(len(done), bool),
            prompt_tokens=np.full(len(done), 100, np.int32),
            seconds=np.full(len(done), self._seconds, np.float32),
            completion_tokens=np.full(rollouts, 1000, np.int32),
            truncated=np.zeros(rollouts, bool),
            min_version=np.full(rollouts, self._version, np.int32),
            max_version=np.full(rollouts, self._version, np.int32),
        )

    async def generate(self, leases: LeaseChunk) -> tuple[ChunkSummary, Any]:
        raise RunError("virtual time: no evaluation")

    async def update_weights(self, update: WeightUpdate) -> SyncReport:
        self._wire.send(update)
        await asyncio.sleep(2 * NETWORK_S)
        self._version = update.version
        return SyncReport(
            generator=self.name, version=update.version, canary_max_error=0.0, seconds_paused=0.0, seconds=0.0
        )


class VirtualVerifier:
    """VerifierPort: every second answer is right."""

    def __init__(self, wire: Wire) -> None:
        self._wire = wire

    async def verify(self, payload: Any, rollouts: int) -> VerdictChunk:
        self._wire.send(payload)
        with self._wire.clock.elsewhere():
            right = np.arange(rollouts) % 2 == 0
            blob = cloudpickle.dumps(
                VerdictChunk(
                    reward=right.astype(np.float32),
                    correct=right,
                    fault=np.zeros(rollouts, bool),
                    seconds=np.full(rollouts, VERIFY_S, np.float32),
                    details={},
                )
            )
        await asyncio.sleep(VERIFY_S + 2 * NETWORK_S)
        return self._wire.receive(blob)


class VirtualLearner:
    """LearnerPort that needs no time of its own."""

    def __init__(self, wire: Wire) -> None:
        self._wire = wire

    async def train(self, batch: TrainingBatch) -> StepReport:
        self._wire.send(batch)
        await asyncio.sleep(2 * NETWORK_S)
        return StepReport(step=batch.step, metrics={"seconds": 0.0})

    async def publish(self, version: int) -> WeightUpdate:
        self._wire.send(version)
        await asyncio.sleep(2 * NETWORK_S)
        return WeightUpdate(version=version, info={}, canary_token_ids=(), canary_logprobs=())

    async def save(self, folder: Path) -> None:
        raise RunError("virtual time: no checkpoint")

    async def export(self, folder: Path) -> None:
        raise RunError("virtual time: no export")


class VirtualFleet:
    def __init__(self, members: list[GeneratorPort]) -> None:
        self.members = members

    def generators(self) -> list[GeneratorPort]:
        return self.members

    async def replace(self, name: str, why: str) -> GeneratorPort:
        raise RunError(f"{name} was lost in virtual time: {why}")


class Silent:
    """Observer."""

    steps = 0

    def step(self, step: int, metrics: dict[str, float], histograms: dict[str, np.ndarray]) -> None:
        self.steps = step

    def note(self, text: str) -> None:
        print(text, file=sys.stderr)


def simulate(generators: int, seconds: float, costs: dict[str, float], prompts: int = PROMPTS) -> dict[str, float]:
    """``generators`` with IN_FLIGHT requests each, of ``seconds`` on average (half to one and a half times as long):
    one generation to warm up, two that count. ``costs``: of ``ray_cost``."""
    slots = generators * IN_FLIGHT
    config = Config.model_validate(
        {
            # nine batches of a quarter of all slots may be open: the bound on staleness holds nobody up
            "curriculum": {"prompts_per_step": max(slots // 4, 1), "rollouts_per_step": max(slots // 4, 1)},
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
        observer = Silent()
        ports = Ports(
            ledger=ledger, fleet=VirtualFleet(members), verifier=VirtualVerifier(wire), learner=VirtualLearner(wire)
        )
        return run_in_virtual_time(clock, _measured(Driver(config, ports, observer), clock, ledger, slots, seconds))


async def _measured(
    driver: Driver, clock: Clock, ledger: VirtualLedger, slots: int, seconds: float
) -> dict[str, float]:
    """Rates between the end of the warm-up and the end, and the driver's and the ledger's work."""
    run = asyncio.create_task(driver.run())
    await _pass(seconds * 1.5 + 5.0, run)
    before = (clock.now(), clock.busy, ledger.busy, ledger.settled, ledger.chunks, driver.version)
    ledger.waits.clear()
    await _pass(max(2 * seconds, 10.0), run)
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
    parser.add_argument("--generators", type=int, nargs="*", default=list(GENERATORS))
    parser.add_argument("--seconds", type=float, nargs="*", default=list(LENGTHS), help="with 1 000 generators")
    parser.add_argument("--repeats", type=int, default=3, help="of the measurement of Ray's cost")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the result")
    args = parser.parse_args(argv)
    measured = [ray_cost() for _ in range(args.repeats)]
    costs = {name: float(np.median([m[name] for m in measured])) for name in measured[0]}
    cells = [(count, SECONDS) for count in args.generators] + [(1000, seconds) for seconds in args.seconds]
    rows = []
    for count, seconds in cells:
        rows.append(simulate(count, seconds, costs))
        print(json.dumps({k: round(v, 4) for k, v in rows[-1].items()}), flush=True)
    figures: dict[str, Any] = {name: spread([m[name] for m in measured]) for name in costs}
    for row in rows:
        figures[f"share_{row['generators']}_generators_{row['generation_s']:g}_s"] = row["share"]
    path = write_result("virtual_time", figures, rows, folder=args.out)
    print(f"{path}: goal {GOAL:.0%}; missed by {[key for key, v in figures.items() if 'share' in key and v < GOAL]}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
