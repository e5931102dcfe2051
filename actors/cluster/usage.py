"""CPU seconds by role, so that every run shows what its parts cost."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import psutil

from actors.cluster.adapters import answer
from cures_ray.loop.ports import WorkerLost

PATIENCE_S = 10.0  # an actor that starts its engine does not answer meanwhile


class CpuMeter:
    """Adds up the CPU time of the driver and of every actor with its child processes.

    Args:
        actors: the living actors by role, asked at each reading.
    """

    def __init__(self, actors: Callable[[], Mapping[str, Sequence[Any]]]) -> None:
        self._actors = actors
        self._seen: dict[Any, float] = {}  # actor -> its CPU seconds at the last reading
        self.totals: defaultdict[str, float] = defaultdict(float)  # seconds by role since the first reading
        self._taken: defaultdict[str, float] = defaultdict(float)
        self._reading: asyncio.Task[None] | None = None

    def take(self) -> dict[str, float]:
        """Seconds by role since the last call, as far as actors have answered; the next reading begins."""
        if self._reading is None or self._reading.done():
            self._reading = asyncio.create_task(self.read())
        taken, self._taken = self._taken, self.totals.copy()
        return {f"cpu/{role}_s": seconds - taken[role] for role, seconds in self.totals.items()}

    async def read(self) -> None:
        """Ask all; who does not answer is counted at the next reading."""
        self._count("driver", self, _used(psutil.Process(), children=False))
        asked = [(role, actor) for role, actors in self._actors().items() for actor in actors]
        await asyncio.gather(*(self._ask(role, actor) for role, actor in asked))

    async def _ask(self, role: str, actor: Any) -> None:
        with suppress(WorkerLost):
            self._count(role, actor, await answer(actor.__ray_call__.remote(cpu_seconds), role, PATIENCE_S))

    def _count(self, role: str, who: Any, seconds: float) -> None:
        self.totals[role] += seconds - min(self._seen.get(who, seconds), seconds)  # less: it was restarted
        self._seen[who] = seconds


def cpu_seconds(actor: Any) -> float:
    """Of the process that runs ``actor`` and its children."""
    return _used(psutil.Process(), children=True)


def _used(process: psutil.Process, *, children: bool) -> float:
    total = 0.0
    for one in [process, *(process.children(recursive=True) if children else [])]:
        with suppress(psutil.NoSuchProcess):
            times = one.cpu_times()
            total += times.user + times.system
    return total
