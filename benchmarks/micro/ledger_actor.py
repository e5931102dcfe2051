"""Leases through the ledger actor with 64 concurrent clients: the last part of ledger_scale.py.

Each client is a coroutine of one process that leases the next prompt and settles it, as the driver's slots do; the one
that is told of a finished batch commits it, and the next version follows. Windows of this alternate with windows in
which the same clients call a method that does nothing (``process``): what Ray itself allows on the machine.
"""

from __future__ import annotations

import asyncio
import tempfile
import time
import uuid
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import numpy as np
import ray

from actors.cluster.adapters import RayLedger
from actors.cluster.connect import own_ray
from actors.ledger import LedgerActor
from benchmarks.micro.ledger_cycle import CLIENTS, Row, config, settlement
from cures_ray.config import Config, RayConfig
from cures_ray.ledger.prompts import write_prompts
from cures_ray.messages import CommitReport


class Clients:
    """64 callers of one ledger actor."""

    def __init__(self, handle: Any) -> None:
        self.ledgers = [RayLedger(handle) for _ in range(CLIENTS)]
        self.rng = np.random.default_rng(0)
        self.version = 0
        self.lease_s: list[float] = []  # per call
        self.settle_s: list[float] = []
        self.leases = self.rollouts = self.pings = 0

    async def window(self, client: Callable[[int, float], Awaitable[None]], seconds: float) -> float:
        """Seconds that it took to run every client for ``seconds``."""
        began = time.perf_counter()
        await asyncio.gather(*(client(i, began + seconds) for i in range(CLIENTS)))
        return time.perf_counter() - began

    async def work(self, client: int, until: float) -> None:
        ledger = self.ledgers[client]
        while time.perf_counter() < until:
            began = time.perf_counter()
            leases = await ledger.lease(f"client-{client}", 1, self.version)
            self.lease_s.append(time.perf_counter() - began)
            if not len(leases):
                await asyncio.sleep(0.005)
                continue
            done = settlement(leases, self.rng, np.full(len(leases), 0.5))
            began = time.perf_counter()
            reply = await ledger.settle(done)
            self.settle_s.append(time.perf_counter() - began)
            self.leases += int(reply.accepted.sum())
            self.rollouts += int(leases.n.sum())
            for batch in reply.ready:
                await self._commit(ledger, batch)

    async def _commit(self, ledger: RayLedger, batch: int) -> None:
        plan = await ledger.plan(batch)
        if plan is None:  # another client committed it
            return
        trained = {e.lease.lease_id: int(e.keep.sum()) for e in plan.entries}
        await ledger.commit(CommitReport(batch=batch, trained=trained, discarded={}))
        self.version = max(self.version, batch + 1)

    async def idle(self, client: int, until: float) -> None:
        while time.perf_counter() < until:
            await self.ledgers[client]._retried(self.ledgers[client].handle.process)
            self.pings += 1


async def _measure(handle: Any, size: int, repeats: int, seconds: float) -> list[Row]:
    rows: list[Row] = []
    clients = Clients(handle)
    await clients.window(clients.work, seconds)  # warms up
    for repeat in range(repeats):
        clients.leases = clients.rollouts = clients.pings = 0
        clients.lease_s, clients.settle_s = [], []
        worked = await clients.window(clients.work, seconds)
        pinged = await clients.window(clients.idle, seconds / 2)
        calls = np.array(clients.lease_s + clients.settle_s)
        row: Row = {"section": "actor", "prompts": size, "repeat": repeat, "clients": CLIENTS}
        row |= {"leases_per_second": clients.leases / worked, "rollouts_per_second": clients.rollouts / worked}
        row |= {"calls_per_second": len(calls) / worked, "empty_calls_per_second": clients.pings / pinged}
        for name, values in (("call", calls), ("lease", clients.lease_s), ("settle", clients.settle_s)):
            for percent in (50, 99):
                row[f"{name}_p{percent}_latency_s"] = float(np.percentile(values, percent))
        rows.append(row | {"call_worst_latency_s": float(calls.max())})
    return rows


def measure_actor(sizes: list[int], repeats: int, seconds: float) -> list[Row]:
    """One row per (size, repeat), from a Ray that is started and ended here."""
    rows: list[Row] = []
    with own_ray(Config(ray=RayConfig(num_cpus=2))):
        for size in sizes:
            with tempfile.TemporaryDirectory() as folder:
                actor: Any = ray.remote(LedgerActor).options(num_cpus=0)
                write_prompts(Path(folder), np.arange(size, dtype=np.uint64))
                handle = actor.remote(folder, config("steered"), uuid.uuid4().hex)
                ray.get(handle.process.remote())
                rows += asyncio.run(_measure(handle, size, repeats, seconds))
                ray.kill(handle)
    return rows
