"""The driver's ports over Ray actors: deadlines, retries, and Ray's errors as `WorkerLost`."""

from __future__ import annotations

import asyncio
import math
import time
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import ObjectLostError, RayError, RayTaskError

from cures_ray.config import Config
from cures_ray.loop.ports import PayloadLost, WorkerLost
from cures_ray.messages import (
    Accounting,
    BatchPlan,
    CommitReport,
    Discard,
    Key,
    LeaseChunk,
    LedgerStatus,
    PayloadHandle,
    RunError,
    Settlement,
    SettleReply,
    VerdictChunk,
)
from cures_ray.verify.pool import hard_deadline

MARGIN_S = 30.0  # beyond a worker's own deadline
CHUNKS_EACH = 8  # in work at one verifier
REST_S = 30.0  # in which a verifier that failed is asked last


async def answer(ref: Any, who: str, timeout_s: float) -> Any:
    """Await an object ref; raise WorkerLost when its worker is gone or silent past ``timeout_s``."""
    scope = asyncio.timeout(timeout_s)
    try:
        async with scope:
            return await asyncio.wrap_future(ref.future())
    except ObjectLostError as error:
        raise PayloadLost(f"{who}: {type(error).__name__}") from error
    except RayTaskError:  # what the worker itself raised
        raise
    except RayError as error:  # anything else that Ray says: dead process or node, out of memory, unreachable
        raise WorkerLost(f"{who}: {_told(error)}") from error
    except TimeoutError as error:
        if not scope.expired():  # raised inside the worker: its own deadline
            raise
        ray.cancel(ref)  # nobody waits for it any more
        raise WorkerLost(f"{who}: no answer within {timeout_s:.0f} s") from error


def _told(error: BaseException) -> str:
    """Ray's own message on one line; of an actor that failed to start, what it raised."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[-1:] if getattr(error, "actor_init_failed", False) else lines
    return f"{type(error).__name__}: {'; '.join(text)[:800]}"


class RayLedger:
    """LedgerPort. The actor recovers from its journal, so calls are repeated until it is back; lease calls are
    numbered, so that one whose answer was lost gets the same leases again."""

    def __init__(self, handle: Any, patience_s: float = 120.0) -> None:
        self.handle, self.patience_s = handle, patience_s
        self._lease_calls = 0

    async def _retried(self, method: Any, *args: Any) -> Any:
        deadline = asyncio.get_running_loop().time() + self.patience_s
        delay = 0.2
        while True:
            try:
                return await answer(method.remote(*args), "ledger", self.patience_s)
            except WorkerLost as error:
                if getattr(error.__cause__, "actor_init_failed", False):  # it would fail again: a damaged journal
                    raise RunError(f"the ledger cannot come back: {error}") from error
                if asyncio.get_running_loop().time() + delay > deadline:
                    raise RunError(f"the ledger did not come back within {self.patience_s:.0f} s: {error}") from error
                await asyncio.sleep(delay)
                delay = min(delay * 2, 5.0)

    async def lease(self, worker: str, max_rollouts: int, version: int) -> LeaseChunk:
        self._lease_calls += 1
        return await self._retried(self.handle.lease, worker, max_rollouts, version, self._lease_calls)

    async def settle(self, settlement: Settlement) -> SettleReply:
        return await self._retried(self.handle.call, "settle", settlement)

    async def give_back(self, keys: list[Key], reason: Discard) -> None:
        await self._retried(self.handle.call, "give_back", keys, reason)

    async def plan(self, batch: int) -> BatchPlan | None:
        return await self._retried(self.handle.call, "plan", batch)

    async def commit(self, report: CommitReport) -> Accounting:
        return await self._retried(self.handle.call, "commit", report)

    async def status(self) -> LedgerStatus:
        return await self._retried(self.handle.call, "status")

    async def save(self, folder: Path) -> None:
        await self._retried(self.handle.call, "save", folder)


class RayVerifiers:
    """VerifierPort over V actors. A chunk goes to the one with the least work, in turn where that is equal; one that
    failed lately comes last. No verifier has more than CHUNKS_EACH at once, so the deadline of a chunk is that of its
    own items and of those before it."""

    def __init__(self, handles: list[Any], config: Config) -> None:
        self.handles = handles
        self._item_s = hard_deadline(config.verifier.timeout_s) / config.verifier.processes_per_worker
        self._load = [0] * len(handles)  # chunks in work
        self._queued = [0] * len(handles)  # rollouts in work
        self._failed = [-math.inf] * len(handles)  # when each failed last
        self._places = asyncio.Semaphore(CHUNKS_EACH * len(handles))
        self._turn = 0

    async def verify(self, payload: PayloadHandle, rollouts: int) -> VerdictChunk:
        async with self._places:
            index = self._choose()
            self._load[index] += 1
            self._queued[index] += rollouts
            try:
                ref = self.handles[index].verify.remote(payload)
                return await answer(ref, f"verifier-{index}", MARGIN_S + self._queued[index] * self._item_s)
            except WorkerLost as error:
                if not isinstance(error, PayloadLost):
                    self._failed[index] = time.monotonic()
                raise
            finally:
                self._load[index] -= 1
                self._queued[index] -= rollouts

    def _choose(self) -> int:
        self._turn += 1
        count, now = len(self.handles), time.monotonic()
        return min(
            range(count), key=lambda i: (now - self._failed[i] < REST_S, self._load[i], (i - self._turn) % count)
        )
