"""The generators as the driver sees them (GeneratorPort, FleetPort): started, replaced, retired.

    start --> serving --lost (dead, silent, wrong weights)--> restarting --> serving
                                                                 | budget used up
                                                                 v
                                                              retired: the run goes on with the others

A generator is lost when Ray says so, when it is silent for rollout.health_timeout_s, or when its engine is: the actor
asks its engine all the time, also while idle, and ends its process when there is no answer.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

import ray

from actors.cluster.adapters import MARGIN_S, answer
from cures_ray.config import RolloutConfig
from cures_ray.loop.ports import GeneratorPort, Retired, WorkerLost
from cures_ray.messages import ChunkSummary, LeaseChunk, PayloadHandle, RunError, SyncReport, WeightUpdate

FORGIVEN_S = 600.0  # after that long a restart does not count any more
BACKOFF_S = 1.0  # before the second attempt to start; doubles, up to 30 s


class RayGenerator:
    """GeneratorPort over one GeneratorActor."""

    def __init__(self, name: str, handle: Any, rollout: RolloutConfig) -> None:
        self.name, self.handle, self.rollout = name, handle, rollout

    async def submit(self, leases: LeaseChunk) -> None:
        await self._answer(self.handle.submit.remote(leases), self.rollout.health_timeout_s)

    async def collect(self) -> tuple[ChunkSummary, PayloadHandle]:
        summary, payload = self.handle.collect.options(num_returns=2).remote()
        return await self._answer(summary, self.rollout.health_timeout_s), payload

    async def generate(self, leases: LeaseChunk) -> tuple[ChunkSummary, PayloadHandle]:
        summary, payload = self.handle.generate.options(num_returns=2).remote(leases)
        return await self._answer(summary, self.rollout.timeout_s + MARGIN_S), payload

    async def update_weights(self, update: WeightUpdate) -> SyncReport:
        return await self._answer(self.handle.update_weights.remote(update), self.rollout.timeout_s + MARGIN_S)

    async def sleep(self) -> None:
        await self._answer(self.handle.sleep.remote(), self.rollout.timeout_s + MARGIN_S)

    async def wake(self) -> None:
        await self._answer(self.handle.wake.remote(), self.rollout.timeout_s + MARGIN_S)

    async def reset(self) -> None:
        """Forget everything that is in work."""
        await self._answer(self.handle.reset.remote(), self.rollout.health_timeout_s)

    async def _answer(self, ref: Any, timeout_s: float) -> Any:
        return await answer(ref, f"generator {self.name}", timeout_s)


class RayFleet:
    """FleetPort over Ray actors.

    Args:
        start: makes the actor of index i and returns its handle; the actor has a ``start`` method to await.
        note: lines for people.
    """

    def __init__(self, start: Callable[[int], Any], rollout: RolloutConfig, note: Callable[[str], None]) -> None:
        self._start, self.rollout, self._note = start, rollout, note
        self.members: dict[str, RayGenerator] = {}
        self._restarts: dict[str, list[float]] = {}  # name -> when

    async def launch(self) -> None:
        """Start rollout.num_generators; those that cannot start are left out.

        Raises:
            ConfigError: the settings do not fit the model.
            RunError: fewer than rollout.min_generators started.
        """
        names = [f"generator-{index}" for index in range(self.rollout.num_generators)]
        results = await asyncio.gather(*(self._add(name) for name in names), return_exceptions=True)
        failures = [result for result in results if isinstance(result, BaseException)]
        for failure in failures:
            if not isinstance(failure, WorkerLost):
                raise failure
            self._note(f"a generator did not start: {failure}")
        if len(self.members) < self.rollout.min_generators:
            raise RunError(
                f"{len(self.members)} of {len(names)} generators started, rollout.min_generators is "
                f"{self.rollout.min_generators}: {failures[0]}; their logs are in Ray's session folder. A model that "
                f"is still being downloaded needs a longer rollout.start_timeout_s"
            ) from failures[0]

    async def _add(self, name: str) -> RayGenerator:
        handle = self._start(int(name.rsplit("-", 1)[1]))
        try:
            await answer(handle.start.remote(), name, self.rollout.start_timeout_s)
        except WorkerLost:
            ray.kill(handle)
            raise
        self.members[name] = RayGenerator(name, handle, self.rollout)
        return self.members[name]

    def generators(self) -> list[GeneratorPort]:
        return list(self.members.values())

    async def replace(self, name: str, why: str) -> GeneratorPort:
        ray.kill(self.members.pop(name).handle)
        restarts = self._restarts.setdefault(name, [])
        delay = BACKOFF_S
        while True:
            now = time.monotonic()
            restarts[:] = [at for at in restarts if now - at < FORGIVEN_S]
            if len(restarts) >= self.rollout.max_restarts:
                raise Retired(
                    f"{name} was lost ({why}) and is retired: its rollout.max_restarts = "
                    f"{self.rollout.max_restarts} starts within {FORGIVEN_S / 60:.0f} minutes are used up"
                )
            restarts.append(now)
            try:
                return await self._add(name)
            except WorkerLost as error:
                why = str(error)
                self._note(f"{name} did not start again ({why}); next attempt in {delay:.0f} s")
                await asyncio.sleep(delay)
                delay = min(2 * delay, 30.0)

    async def reset(self) -> None:
        """Nobody works on anything any more. Who does not answer is found lost later."""
        await asyncio.gather(*(g.reset() for g in self.members.values()), return_exceptions=True)
