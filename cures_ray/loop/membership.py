"""Generators that join and leave while the run goes on.

    the cluster has room        --> a further one starts, proves the published weights, gets leases
    a node is drained (or gets  --> its generator gets no more leases; it leaves when it has finished those it has, or
    notice that it is taken)        gives them back shortly before the node goes

The ledger hands leases to whoever asks, so nothing is divided anew.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine
from contextlib import suppress
from typing import Any

from cures_ray.config import Config
from cures_ray.loop.generation import GRACE_S, Generation
from cures_ray.loop.ports import FleetPort
from cures_ray.loop.slots import Slot

SURVEY_S = 3.0  # between two looks at the cluster
NOTICE_S = 5.0  # before its node goes a generator gives back what it has in work
LOOK_S = 0.5  # between two looks at a generator that leaves


class Membership:
    """``await watch()`` for as long as generators may come and go.

    Args:
        start: starts a task of the run.
        note: lines for people.
        progress: told of a generator that joined.
    """

    def __init__(
        self,
        config: Config,
        fleet: FleetPort,
        generation: Generation,
        *,
        start: Callable[[Coroutine[Any, Any, None]], Any],
        note: Callable[[str], None],
        progress: Callable[[str], None],
    ) -> None:
        self.config, self.fleet, self.generation = config, fleet, generation
        self._start, self._note, self._progress = start, note, progress
        self._asked: set[str] = set()  # to leave

    async def watch(self) -> None:
        while True:
            survey = await self.fleet.survey()
            for name, seconds in survey.leaving.items():
                slot = self.generation.slots.get(name)
                if slot is not None and not slot.lost and name not in self._asked:
                    self._asked.add(name)
                    self._start(self._leave(name, slot, seconds))
            if survey.room:
                self._start(self._join())
            await asyncio.sleep(SURVEY_S)

    async def _join(self) -> None:
        began = time.monotonic()
        generator = await self.fleet.join()
        if generator is not None:
            self.generation.admit()
            count, seconds = self.generation.staying, time.monotonic() - began
            self._note(f"generator {generator.name} joined after {seconds:.0f} s: {count} generators")
            self._progress(f"generator {generator.name} joined")

    async def _leave(self, name: str, slot: Slot, seconds: float) -> None:
        left = "without a deadline" if seconds == float("inf") else f"{max(seconds, 0):.0f} s left"
        self._note(f"generator {name}: its node is drained, {left}")
        node_ends = time.monotonic() + seconds - NOTICE_S
        try:
            if await self._spared(slot):
                await self._finish(name, slot, node_ends)
        finally:
            self._asked.discard(name)

    async def _spared(self, slot: Slot) -> bool:
        """Wait until the run has enough generators without this one; False: it worked until its node was gone."""
        while not slot.lost:
            if self.generation.staying > self.config.rollout.min_generators:
                return True
            await asyncio.sleep(LOOK_S)
        return False

    async def _finish(self, name: str, slot: Slot, node_ends: float) -> None:
        deadline = min(node_ends, time.monotonic() + self.config.rollout.timeout_s + GRACE_S)
        slot.leaving = True
        slot.wake.set()
        while slot.in_flight and not slot.lost and time.monotonic() < deadline:
            with suppress(TimeoutError):
                async with asyncio.timeout(LOOK_S):
                    await slot.wake.wait()
            slot.wake.clear()
        how = f" early ({slot.lost})" if slot.lost else ""
        given_back = await self.generation.let_go(slot)
        await self.fleet.dismiss(name)
        how += f"; {given_back} rollouts that it had in work are generated again" if given_back else ""
        self._note(f"generator {name} left{how}. The run goes on with {self.generation.staying} generators")
