"""What stands around driver and ledger in `cures bench virtual-time`: a clock, and workers that take virtual seconds.

Each worker plays its Protocol (cures_ray/loop/ports.py). Messages are pickled and read again, as between processes;
what the driver does of that is charged to it.
"""

from __future__ import annotations

import asyncio
import heapq
import selectors
import sys
import time
from collections.abc import Coroutine, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
from ray import cloudpickle

from actors.generator import ENOUGH, LINGER_S, LINGER_SHARE, POLL_S
from cures_ray.ledger.ledger import Ledger
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

NETWORK_S = 0.001  # from one process to another
VERIFY_S = 0.05


class Clock:
    """Virtual seconds: the CPU seconds of this thread that belong to the driver, and jumps."""

    def __init__(self) -> None:
        began = time.thread_time()
        for _ in range(1000):
            time.thread_time()
        self._look_s = (time.thread_time() - began) / 1000  # what a look at the clock costs: a system call
        self._ahead = -time.thread_time()  # jumps and charges, less what others used
        self._jumped = 0.0

    def now(self) -> float:
        self._ahead -= self._look_s
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
        self._version, self._fresh = 0, True

    async def submit(self, leases: LeaseChunk) -> None:
        clock = self._wire.clock
        self._wire.send(leases)
        await asyncio.sleep(2 * NETWORK_S)
        with clock.elsewhere():
            now = clock.now()
            spread = self._rng.uniform(0.5, 1.5, len(leases)) * self._seconds
            if self._fresh:  # the first are in the middle of their generation
                self._fresh = False
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
        with clock.elsewhere():
            now = clock.now()
            ready = sum(end <= now for end, *_ in self._running)
        if 0 < ready < ENOUGH:
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


class Silent:
    """Observer."""

    steps = 0

    def step(self, step: int, metrics: dict[str, float], histograms: dict[str, np.ndarray]) -> None:
        self.steps = step

    def note(self, text: str) -> None:
        print(text, file=sys.stderr)
