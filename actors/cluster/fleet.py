"""The generators as the driver sees them (GeneratorPort, FleetPort): started, replaced, retired, joining, leaving.

    room in the cluster --join--> serving --lost (dead, silent, wrong weights)--> restarting --> serving
                                   |  | its node is drained                        |      | budget used up
                                   |  v                                            |      v
                                   | dismissed <-----------------------------------'   retired: never again
                                   |                       no room: joins again when there is

A generator is lost when Ray says so, when it is silent for rollout.health_timeout_s, or when its engine is: the actor
asks its engine all the time, also while idle, and ends its process when there is no answer.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Callable
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from actors.cluster.adapters import MARGIN_S, answer
from actors.cluster.places import Options, Places
from cures_ray.config import Config, RolloutConfig
from cures_ray.loop.ports import GeneratorPort, Retired, Survey, WorkerLost
from cures_ray.messages import (
    ChunkSummary,
    ConfigError,
    LeaseChunk,
    PayloadHandle,
    RunError,
    SyncReport,
    WeightUpdate,
)

FORGIVEN_S = 600.0  # after that long a restart does not count any more
BACKOFF_S = 1.0  # before the second attempt to start; doubles, up to 30 s
LOOK_S = 2.0  # between two looks at the node of a generator that starts, or for room


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
        start: makes the actor of that name with these options and returns its handle; the actor has a ``start`` method
            to await.
        places: where generators live; those of the first ``rollout.num_generators`` are taken.
        note: lines for people.
    """

    def __init__(
        self, start: Callable[[str, Options], Any], places: Places, config: Config, note: Callable[[str], None]
    ) -> None:
        self._start, self._places, self._note = start, places, note
        self.rollout, self._patience_s = config.rollout, config.placement.timeout_s
        self.members: dict[str, RayGenerator] = {}
        self._starting: set[str] = set()
        self._retired: set[str] = set()
        self._restarts: dict[str, list[float]] = {}  # name -> when

    async def launch(self) -> None:
        """Start rollout.num_generators; those that cannot start are left out.

        Raises:
            ConfigError: the settings do not fit the model.
            RunError: fewer than rollout.min_generators started.
        """
        names = [f"generator-{index}" for index in range(self.rollout.num_generators)]
        results = await asyncio.gather(*(self._add(name, 0.0) for name in names), return_exceptions=True)
        failures = [result for result in results if isinstance(result, BaseException)]
        for failure in failures:
            if not isinstance(failure, WorkerLost):
                raise failure
            self._note(f"a generator did not start: {failure}")
        for name in set(names) - set(self.members):
            self._failed(name)
            self._settle(name)
        if len(self.members) < self.rollout.min_generators:
            raise RunError(
                f"{len(self.members)} of {len(names)} generators started, rollout.min_generators is "
                f"{self.rollout.min_generators}: {failures[0]}; their logs are in Ray's session folder. A model that "
                f"is still being downloaded needs a longer rollout.start_timeout_s"
            ) from failures[0]

    def generators(self) -> list[GeneratorPort]:
        return list(self.members.values())

    async def replace(self, name: str, why: str) -> GeneratorPort:
        ray.kill(self.members.pop(name).handle)
        delay = BACKOFF_S
        self._starting.add(name)
        try:
            while True:
                if self._used_up(name):
                    self._retired.add(name)
                    raise Retired(
                        f"{name} was lost ({why}) and is retired: its rollout.max_restarts = "
                        f"{self.rollout.max_restarts} starts within {FORGIVEN_S / 60:.0f} minutes are used up"
                    )
                self._restarts.setdefault(name, []).append(time.monotonic())
                try:
                    return await self._add(name, self._patience_s)
                except NoRoom as error:
                    raise Retired(f"{name} was lost ({why}): {error}; one joins when there is room") from error
                except (WorkerLost, RayTaskError) as error:  # also what its start raised: it had started once
                    why = str(error)
                    self._note(f"{name} did not start again ({why}); next attempt in {delay:.0f} s")
                    await asyncio.sleep(delay)
                    delay = min(2 * delay, 30.0)
        finally:
            self._settle(name)

    async def survey(self) -> Survey:
        """What Ray says of the nodes; nothing while it cannot be asked."""
        try:
            left, room = await asyncio.to_thread(self._places.survey)
        except RayError:
            return Survey(leaving={}, room=False)
        leaving = {name: seconds for name, seconds in left.items() if name in self.members}
        most = (self.rollout.max_generators or self.rollout.num_generators) - len(self._retired)
        wanted = len(self.members) - len(leaving) + len(self._starting) < most
        return Survey(leaving=leaving, room=room and wanted)

    async def join(self) -> GeneratorPort | None:
        name = self._new_name()
        self._starting.add(name)
        try:
            return await self._add(name, 0.0)
        except NoRoom:
            return None
        except (WorkerLost, RayTaskError) as error:  # the run goes on as it was
            self._note(f"{name} did not start: {error}")
            self._failed(name)
            await asyncio.sleep(BACKOFF_S)
            return None
        finally:
            self._settle(name)

    async def dismiss(self, name: str, *, for_good: bool = False) -> None:
        if for_good:
            self._retired.add(name)
        if name in self.members:
            ray.kill(self.members.pop(name).handle)
            self._places.free(name)

    async def reset(self) -> None:
        """Nobody works on anything any more. Who does not answer is found lost later."""
        await asyncio.gather(*(g.reset() for g in self.members.values()), return_exceptions=True)

    async def _add(self, name: str, patience_s: float) -> RayGenerator:
        """Start ``name`` in a place for which it waits ``patience_s``.

        Raises:
            WorkerLost: it did not start; nothing of it is left but its place.
            NoRoom: there is none.
        """
        handle = self._start(name, await self._place(name, patience_s))
        try:
            await self._started(name, handle)
        except BaseException:
            ray.kill(handle)
            raise
        self.members[name] = RayGenerator(name, handle, self.rollout)
        return self.members[name]

    async def _place(self, name: str, patience_s: float) -> Options:
        deadline = time.monotonic() + patience_s
        while True:
            try:
                options = await asyncio.to_thread(self._places.take, name)
            except ConfigError as error:  # a node without the run's files
                self._note(f"{name} cannot live there: {error}")
                continue
            if options is not None:
                return options
            if time.monotonic() >= deadline:
                raise NoRoom(f"no node had room for it within {patience_s:.0f} s")
            await asyncio.sleep(LOOK_S)

    async def _started(self, name: str, handle: Any) -> None:
        """Ray keeps an actor waiting whose node went away before it began: its node is watched."""
        starting = asyncio.ensure_future(answer(handle.start.remote(), name, self.rollout.start_timeout_s))
        try:
            while not (await asyncio.wait([starting], timeout=LOOK_S))[0]:
                if not await asyncio.to_thread(self._places.stays, name):
                    raise WorkerLost(f"{name}: its node went away while it started")
            await starting
        finally:
            starting.cancel()

    def _new_name(self) -> str:
        taken = self.members.keys() | self._starting | self._retired
        return next(name for i in itertools.count() if (name := f"generator-{i}") not in taken)

    def _used_up(self, name: str) -> bool:
        now, restarts = time.monotonic(), self._restarts.setdefault(name, [])
        restarts[:] = [at for at in restarts if now - at < FORGIVEN_S]
        return len(restarts) >= self.rollout.max_restarts

    def _failed(self, name: str) -> None:
        """It did not start; so often, and it is never tried again."""
        self._restarts.setdefault(name, []).append(time.monotonic())
        if self._used_up(name):
            self._retired.add(name)

    def _settle(self, name: str) -> None:
        """It has started, or leaves its place to others: also when whoever waited for it was cancelled."""
        self._starting.discard(name)
        if name not in self.members:
            self._places.free(name)


class NoRoom(WorkerLost):
    """The cluster has no place for a generator."""
