"""From leases to settlements: what the generators and verifiers do between two optimizer steps.

    pull loop (one a generator):     prove the current weights -> lease a chunk -> submit it -> until there is no room
    collect loop (one a generator):  collect what is finished -> a judge task for it
    judge task (one a chunk):        verify, again if the verifier is lost -> settle the whole chunk in one call

A pull loop brings its own generator up to date and replaces it when it is lost, so no generator waits for another,
and nobody waits for a replacement. Generated is not settled: only settlements count as progress.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Coroutine, Sequence
from contextlib import suppress
from itertools import repeat
from typing import Any

import numpy as np

from cures_ray.config import Config
from cures_ray.loop.chunks import Place, VerifiedChunk, all_faults, settlement
from cures_ray.loop.faults import FaultLog
from cures_ray.loop.ports import CanaryFailed, GeneratorPort, PayloadLost, Ports, Retired, WorkerLost
from cures_ray.loop.slots import Metrics, Slot
from cures_ray.messages import (
    BatchPlan,
    ChunkSummary,
    Discard,
    Key,
    PayloadHandle,
    RunError,
    SyncReport,
    VerdictChunk,
    WeightUpdate,
)

VERIFY_ATTEMPTS = 5  # on changing verifiers, with growing pauses: a verifier that restarts is back by then
RETRY_S = 0.5  # pause after the first failed verification; doubles, up to 5 s
SYNC_ATTEMPTS = 2  # the generator and one replacement; then it is retired
CAUSES = ("leases", "weights", "replacement")  # what an idle generator waits for, see Slot.take_idle
RATE_S = 10.0  # over which tokens a second are counted: steps may be shorter than a generator's chunk
GRACE_S = 60.0  # beyond rollout.timeout_s, after which a lease that never came back counts as lost


class Generation:
    """The generators' slots and the verified chunks.

    Args:
        tasks: where every loop lives; a failure in one fails the run.
        progress: told of settlements, proven weights and replacements.
        note: lines for people.
        ready: called when a batch has all its rounds settled.
    """

    def __init__(
        self,
        config: Config,
        ports: Ports,
        tasks: asyncio.TaskGroup,
        *,
        progress: Callable[[str], None],
        note: Callable[[str], None],
        ready: Callable[[], None],
    ) -> None:
        self.config, self.ports, self._tasks = config, ports, tasks
        self._progress, self._note, self._ready = progress, note, ready
        self.slots: dict[str, Slot] = {}
        self.verified: dict[Key, Place] = {}  # settled, not yet trained
        self.synced: SyncReport | None = None  # the newest
        self.faults = FaultLog(config.verifier.max_fault_share)
        self.leasing = True  # False: weights are proven, and no leases are asked for
        self._update: WeightUpdate | None = None
        self._changed = asyncio.Event()  # a slot has proven weights
        self._loops: set[asyncio.Task[None]] = set()
        self._judging = 0  # rollouts at the verifiers
        self._tokens, self._verdict_seconds = 0, [np.zeros(0, np.float32)]
        self._tokens_at = deque([(time.monotonic(), 0)])  # (when, tokens until then) at the last steps

    # -- members ---------------------------------------------------------------------------------

    @property
    def staying(self) -> int:
        """Generators that are not about to leave."""
        return sum(not slot.leaving for slot in self.slots.values())

    def admit(self) -> None:
        """New members of the fleet prove the published weights and get leases."""
        for generator in self.ports.fleet.generators():
            if generator.name not in self.slots:
                slot = self.slots[generator.name] = Slot(generator)
                self.start(self._collect(slot, generator))
                self.start(self._pull(slot))

    async def let_go(self, slot: Slot) -> int:
        """``slot`` is no member any more; the rollouts that it still had in work, which are generated again."""
        rollouts = slot.rollouts
        await self._lose(slot, slot.generator, "it left")
        self.slots = {name: other for name, other in self.slots.items() if other is not slot}
        self._changed.set()
        return rollouts

    # -- weights ---------------------------------------------------------------------------------

    def publish(self, update: WeightUpdate) -> None:
        """From now on a generator gets leases only once it has proven ``update``."""
        self._update = update
        self.admit()
        self.wake()

    async def proven(self, *, all_of_them: bool = False) -> None:
        """Return when a generator (or all) holds the published weights. The watchdog ends a wait in vain."""
        while True:
            self._changed.clear()
            current = [self._is_open(slot) for slot in self.slots.values() if not slot.leaving]
            if all(current) if all_of_them else any(current):
                return
            await self._changed.wait()

    async def loaded(self) -> None:
        """Before the next version is published: nobody is loading the last one, unless the learner keeps it."""
        while self._update is not None and not self._update.kept and any(s.loading for s in self.slots.values()):
            self._changed.clear()
            await self._changed.wait()

    def open_generators(self) -> list[GeneratorPort]:
        """Those that hold the published weights."""
        return [slot.generator for slot in self.slots.values() if self._is_open(slot)]

    def _is_open(self, slot: Slot) -> bool:
        usable = not slot.lost and not slot.leaving
        return usable and self._update is not None and slot.version == self._update.version

    async def _sync(self, slot: Slot) -> bool:
        """Bring one generator to the published version; False when it leaves or was retired instead. One that is lost,
        or fails its canary by chance, is replaced; where the replacement fails too it is retired. A canary that fails
        alike twice ends the run."""
        failures = 0
        while not self._is_open(slot):
            if slot.leaving or (slot.lost and not await self._replace(slot)):
                return False
            generator, update = slot.generator, self._update
            assert update is not None, "weights are published before generators start"
            slot.loading = True
            slot.track_idle()
            try:
                report = await generator.update_weights(update)
            except (WorkerLost, CanaryFailed) as error:
                if isinstance(error, CanaryFailed) and error.reproducible:
                    raise RunError(str(error)) from error
                failures += 1
                if failures == SYNC_ATTEMPTS:
                    self._retire(
                        slot,
                        f"generator {generator.name} could not be brought to version {update.version}, nor could its "
                        f"replacement: {error}",
                    )
                    await self.ports.fleet.dismiss(generator.name, for_good=True)
                    return False
                await self._lose(slot, generator, str(error) or type(error).__name__)
                continue
            finally:
                slot.loading = False
                slot.track_idle()
                self._changed.set()
            slot.version, self.synced = report.version, report
            self._progress(f"generator {generator.name} holds version {report.version}")
        return True

    async def _lose(self, slot: Slot, generator: GeneratorPort, why: str) -> None:
        """``generator`` is not to be used any more; what it had in work is generated again elsewhere."""
        if slot.generator is not generator or slot.lost:
            return
        slot.lost = why
        keys = list(slot.in_flight)
        slot.end(keys)
        if keys:
            await self.ports.ledger.give_back(keys, Discard.LOST)
        self.wake()

    async def _replace(self, slot: Slot) -> bool:
        """Put a fresh generator, which holds the original weights, in the slot; False when there is none to be had."""
        name, began = slot.generator.name, time.monotonic()
        self._note(f"generator {name} lost ({slot.lost}); starting a replacement")
        try:
            slot.generator = await self.ports.fleet.replace(name, slot.lost)
        except Retired as error:
            self._retire(slot, str(error))
            return False
        slot.lost, slot.version = "", -1
        slot.track_idle()
        self.start(self._collect(slot, slot.generator))
        self._note(f"generator {name} is back after {time.monotonic() - began:.0f} s")
        self._progress(f"generator {name} replaced")
        return True

    def _retire(self, slot: Slot, why: str) -> None:
        """Go on without this generator.

        Raises:
            RunError: fewer than rollout.min_generators are left.
        """
        self.slots = {name: other for name, other in self.slots.items() if other is not slot}
        left, least = self.staying, self.config.rollout.min_generators
        if left < least:
            raise RunError(f"{why}. {left} generators are left, rollout.min_generators is {least}")
        self._note(f"{why}. The run goes on with {left} generators")
        self._changed.set()

    # -- leases ----------------------------------------------------------------------------------

    async def _pull(self, slot: Slot) -> None:
        limit = self.config.rollout.max_concurrent_rollouts
        while True:
            slot.wake.clear()
            if not await self._sync(slot):
                return
            room = limit - slot.rollouts
            if room > 0 and self.leasing:
                leases = await self.ports.ledger.lease(slot.generator.name, room, slot.version)
                if len(leases):
                    if not await self._sync(slot):  # lost, or new weights, while the ledger answered
                        await self.ports.ledger.give_back(leases.keys, Discard.LOST)
                        return self.wake()
                    generator = slot.generator
                    slot.begin(leases)
                    try:
                        await generator.submit(leases)
                    except WorkerLost as error:
                        await self._lose(slot, generator, str(error))
                    continue
            with suppress(TimeoutError):
                async with asyncio.timeout(1.0):  # not wait_for: Python 3.11's can swallow a cancellation
                    await slot.wake.wait()

    async def _collect(self, slot: Slot, generator: GeneratorPort) -> None:
        """Until ``generator`` is lost."""
        overdue = self.config.rollout.timeout_s + GRACE_S
        while True:
            try:
                summary, payload = await generator.collect()
            except WorkerLost as error:
                return await self._lose(slot, generator, str(error))
            if slot.lost or slot.generator is not generator:
                return None
            if len(summary):
                slot.end(summary.keys)
                slot.wake.set()
                self._tokens += int(summary.completion_tokens.sum())
                self._tasks.create_task(self._judge(summary, payload))
            oldest = next(iter(slot.in_flight.values()), None)
            if oldest is not None and time.monotonic() - oldest[1] > overdue:
                return await self._lose(slot, generator, f"a lease did not come back within {overdue:.0f} s")

    async def _judge(self, summary: ChunkSummary, payload: PayloadHandle) -> None:
        """Rollouts -> verdicts -> one settlement, or the leases back to the ledger."""
        rollouts = len(summary.completion_tokens)
        self._judging += rollouts
        try:
            verdicts = await self._verdicts(summary, payload)
        except PayloadLost:
            await self.ports.ledger.give_back(summary.keys, Discard.LOST)
            return self.wake()
        finally:
            self._judging -= rollouts
        for line in self.faults.add(verdicts.details.get(row) for row in range(len(verdicts.fault))):
            self._note(line)
        if problem := self.faults.problem():
            raise RunError(problem)
        self._verdict_seconds.append(verdicts.seconds)
        settled = settlement(summary, verdicts)
        chunk = VerifiedChunk.of(summary, payload, settled.fault)
        # before the call: its answer may make the batch ready
        self.verified.update(zip(summary.keys, zip(repeat(chunk), range(len(summary))), strict=False))
        reply = await self.ports.ledger.settle(settled)
        if reply.accepted.any():
            self._progress(f"{int(reply.accepted.sum())} leases of {summary.generator} settled")
        if reply.ready:
            self._ready()
        return self.wake()  # the next round of a batch may be open

    async def _verdicts(self, summary: ChunkSummary, payload: PayloadHandle) -> VerdictChunk:
        """Rollouts whose verification failed are verified again and not generated again. When no verifier can judge
        them they are faults: they may be what ends the verifiers."""
        why = ""
        for attempt in range(VERIFY_ATTEMPTS):
            try:
                return await self.ports.verifier.verify(payload, len(summary.completion_tokens))
            except PayloadLost:
                raise
            except WorkerLost as error:
                why = str(error)
                if attempt == 0:
                    self._note(f"verification of {len(summary)} leases failed ({why}); trying again")
                await asyncio.sleep(min(RETRY_S * 2**attempt, max(5.0, RETRY_S)))
        return all_faults(summary, f"no verifier could judge it: {why}")

    # -- for the train loop ----------------------------------------------------------------------

    def take(self, plan: BatchPlan) -> dict[int, Place]:
        """Where the plan's rollouts are, by lease id; forgets them and the attempts that the ledger refused."""
        groups = {}
        for entry in plan.entries:
            lease_id, attempt = entry.lease.lease_id, entry.lease.attempt
            if (place := self.verified.pop((lease_id, attempt), None)) is not None:
                groups[lease_id] = place
            for earlier in range(attempt):
                self.verified.pop((lease_id, earlier), None)
        return groups

    async def generate_again(self, plan: BatchPlan, groups: dict[int, Place], lost: Sequence[int]) -> None:
        """The payloads of the leases ``lost`` are gone: back to the ledger with them; the others wait for the batch."""
        keys = {e.lease.lease_id: (e.lease.lease_id, e.lease.attempt) for e in plan.entries}
        self.verified |= {keys[lease_id]: place for lease_id, place in groups.items() if lease_id not in lost}
        await self.ports.ledger.give_back([keys[lease_id] for lease_id in lost], Discard.LOST)
        self.wake()

    def measured(self, seconds: float) -> Metrics:
        """Rates over the last ``seconds``; resets the counters."""
        slots = list(self.slots.values())
        idle = [slot.take_idle() for slot in slots]
        now = time.monotonic()
        self._tokens_at.append((now, self._tokens))
        while len(self._tokens_at) > 2 and self._tokens_at[1][0] <= now - RATE_S:
            self._tokens_at.popleft()
        since, before = self._tokens_at[0]
        spent = np.concatenate(self._verdict_seconds)
        self._verdict_seconds = [np.zeros(0, np.float32)]
        metrics = {
            "rollout/tokens_per_s": (self._tokens - before) / max(now - since, 1e-9),
            "time/generator_idle_s": sum(sum(causes.values()) for causes in idle) / max(len(idle), 1),
            **{f"time/generator_wait_{c}_s": sum(i.get(c, 0.0) for i in idle) / max(len(idle), 1) for c in CAUSES},
            "queue/generating": float(sum(slot.rollouts for slot in slots)),
            "queue/judging": float(self._judging),
            "queue/judged": float(sum(int(chunk.summary.n[place]) for chunk, place in self.verified.values())),
            "verifier/busy": float(spent.sum()) / seconds,  # verifier processes at work, on average
            "verifier/verdict_s": float(spent.mean()) if len(spent) else 0.0,
            "verifier/verdict_p99_s": float(np.quantile(spent, 0.99)) if len(spent) else 0.0,
        }
        if self.synced is not None:
            metrics["weights/canary_max_error"] = self.synced.canary_max_error
            metrics["weights/canary_mean_error"] = self.synced.canary_mean_error
            metrics["weights/paused_s"] = self.synced.seconds_paused
            metrics["time/weight_sync_s"] = self.synced.seconds
            metrics |= {f"weights/{phase}_s": s for phase, s in self.synced.seconds_by_phase.items()}
        if self._update is not None:
            metrics |= {f"weights/{phase}_s": s for phase, s in self._update.seconds.items()}
        reasons = {f"verifier/faults/{reason}": float(count) for reason, count in self.faults.reasons.items()}
        return metrics | self.faults.metrics() | reasons

    def wake(self) -> None:
        for slot in self.slots.values():
            slot.wake.set()

    def close(self) -> None:
        for task in self._loops:
            task.cancel()

    def start(self, loop: Coroutine[Any, Any, None]) -> None:
        """Run ``loop`` until ``close``."""
        task = self._tasks.create_task(loop)
        self._loops.add(task)
        task.add_done_callback(self._loops.discard)
