"""A fleet whose generators neither come nor go: benchmarks in one process, and those that measure and not survive."""

from __future__ import annotations

from collections.abc import Sequence

from cures_ray.loop.ports import GeneratorPort, Survey
from cures_ray.messages import RunError


class FixedFleet:
    def __init__(self, members: Sequence[GeneratorPort]) -> None:
        self.members = members

    def generators(self) -> list[GeneratorPort]:
        return list(self.members)

    async def replace(self, name: str, why: str) -> GeneratorPort:
        raise RunError(f"{name} was lost in a benchmark: {why}")

    async def survey(self) -> Survey:
        return Survey(leaving={}, room=False)

    async def join(self) -> None:
        return None

    async def dismiss(self, name: str, *, for_good: bool = False) -> None:
        raise RunError(f"{name} does not leave a benchmark")
