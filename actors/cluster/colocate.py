"""Generators and learner on the same GPUs: while the learner trains, the engines sleep.

    engines generate | all engines sleep: weights to host memory, cache given up | learner trains | engines wake

Requests in flight keep their place. They compute their cache again when the engine wakes.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from typing import Protocol

from cures_ray.loop.ports import WorkerLost


class Sleeper(Protocol):
    async def sleep(self) -> None: ...

    async def wake(self) -> None: ...


@asynccontextmanager
async def asleep(generators: Callable[[], Iterable[Sleeper]]) -> AsyncIterator[None]:
    """All ``generators`` sleep for the length of a block. One that is lost has no memory to give: its own calls will
    find out."""
    sleeping = list(generators())
    _raise_others(await asyncio.gather(*(g.sleep() for g in sleeping), return_exceptions=True))
    try:
        yield
    finally:
        _raise_others(await asyncio.gather(*(g.wake() for g in sleeping), return_exceptions=True))


def _raise_others(results: list[BaseException | None]) -> None:
    for result in results:
        if isinstance(result, BaseException) and not isinstance(result, WorkerLost):
            raise result
