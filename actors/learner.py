"""The learner as the driver sees it (LearnerPort): R ranks that act as one."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import ray
from ray.exceptions import RayError, RayTaskError

from actors.learner_rank import LearnerRank
from cures_ray.config import Config
from cures_ray.loop.ports import LearnerLost
from cures_ray.messages import RunError, StepReport, TrainingBatch, WeightUpdate


class LearnerGroup:
    """Starts ``learner.num_ranks`` ranks and gives every call to all of them.

    Each call has a deadline (``trainer.no_progress_timeout_s``). A rank that dies ends the call at once with a
    RunError that names it: its optimizer shard is gone, so the way on is ``restart`` from the last checkpoint.
    """

    def __init__(
        self,
        config: Config,
        options: list[dict[str, Any]],
        alone: Callable[[], AbstractAsyncContextManager[None]] = nullcontext,
        name: str = "",
    ) -> None:
        """``options``: Ray actor options of each rank, see actors.cluster.placement. ``alone``: entered while the ranks
        train, for those who share their GPUs (actors.cluster.colocate). ``name``: what the ranks' names in Ray begin
        with, unique in the cluster; empty: they have none."""
        self.config, self._options, self._alone, self._name = config, options, alone, name
        self._starts = 0
        self.parameters = 0
        self.ranks: list[Any] = []
        self._start_ranks()

    def _start_ranks(self) -> None:
        actor: Any = ray.remote(LearnerRank)
        again = f"-again-{self._starts}" if self._starts else ""  # a killed rank gives its name back some time later
        self._starts += 1
        self.ranks = []
        for rank, options in enumerate(self._options):
            name = {"name": f"{self._name}-{rank}{again}"} if self._name else {}
            self.ranks.append(actor.options(**options, **name).remote(self.config, rank, len(self._options)))

    async def start(self, shm: Path, backend: str, canary: list[np.ndarray], resume: Path | None = None) -> None:
        """Bring all ranks up; ``resume`` is a folder that ``save`` wrote.

        Raises:
            RunError: a rank failed or was not up within rollout.start_timeout_s.
            ConfigError: ``resume`` belongs to another learner.
        """
        self._publication = (shm, backend, canary)
        addresses = await self._gather("address", seconds=self.config.rollout.start_timeout_s)
        ranks_on_node = Counter(address for address, _ in addresses)
        joins = [(*addresses[0], ranks_on_node[address]) for address, _ in addresses]
        await self._gather("join", of_rank=joins, seconds=self.config.rollout.start_timeout_s)
        await self.build(self.config, shm, backend, canary, resume)

    async def restart(self, resume: Path | None) -> None:
        """End all ranks, dead ones included, and start fresh ones in their places from the checkpoint ``resume`` (None:
        from the model). Calls that are in flight fail. What was trained since the checkpoint is lost.

        Raises:
            RunError, ConfigError: as ``start``.
        """
        self.stop()
        self._start_ranks()
        await self.start(*self._publication, resume)

    async def build(
        self, config: Config, shm: Path, backend: str, canary: list[np.ndarray], resume: Path | None = None
    ) -> None:
        """Model and engine; again for other settings on the same ranks, as ``start`` for the first time."""
        self.config, self._publication = config, (shm, backend, canary)
        counts = await self._gather(
            "build", config, shm, backend, canary, resume, seconds=self.config.rollout.start_timeout_s
        )
        self.parameters = counts[0]

    async def train(self, batch: TrainingBatch) -> StepReport:
        async with self._alone():
            reports: list[StepReport] = await self._gather("train", batch)
        statistics = sorted((s for r in reports for s in r.gradient_statistics), key=lambda s: s.lease_id)
        drift = {lease: nats for r in reports for lease, nats in r.drift.items()}
        return replace(reports[0], gradient_statistics=tuple(statistics), drift=drift)

    async def logprobs(self, sequences: list[np.ndarray]) -> list[np.ndarray]:
        return (await self._gather("logprobs", sequences))[0]

    async def publish(self, version: int) -> WeightUpdate:
        return (await self._gather("publish", version))[0]

    async def save(self, folder: Path) -> None:
        await self._gather("save", _absolute(folder))

    async def export(self, folder: Path) -> None:
        await self._gather("export", _absolute(folder))

    def stop(self) -> None:
        for rank in self.ranks:
            ray.kill(rank)

    async def _gather(
        self, method: str, *arguments: Any, of_rank: list[Any] | None = None, seconds: float | None = None
    ) -> list[Any]:
        """Call ``method`` on all ranks, with the same ``arguments`` or those ``of_rank``; the first failure ends the
        wait, for the others wait for the failed one."""
        seconds = seconds or self.config.trainer.no_progress_timeout_s
        each = of_rank or [arguments] * len(self.ranks)
        calls = [
            asyncio.ensure_future(_await(getattr(rank, method).remote(*values)))
            for rank, values in zip(self.ranks, each, strict=True)
        ]
        done, pending = await asyncio.wait(calls, timeout=seconds, return_when=asyncio.FIRST_EXCEPTION)
        if any(call.exception() for call in done) and pending:  # a death shows in the others first: look for it
            done, pending = await asyncio.wait(calls, timeout=5.0)
        failures = [(rank, call.exception()) for rank, call in enumerate(calls) if call in done and call.exception()]
        for call in pending:
            call.cancel()
        if failures:
            raise _blame(method, failures)
        if pending:
            late = [rank for rank, call in enumerate(calls) if call in pending]
            raise LearnerLost(f"learner rank {late} did not finish {method} within {seconds:.0f} s; it may hang")
        return [call.result() for call in calls]


def _absolute(folder: Path) -> Path:
    return folder.absolute()  # the ranks may have another working directory


async def _await(reference: Any) -> Any:
    return await reference


def _blame(method: str, failures: list[tuple[int, BaseException | None]]) -> Exception:
    """The failure to report: a dead rank, else a RunError, else the first."""
    for rank, error in failures:
        if isinstance(error, RayError) and not isinstance(error, RayTaskError):  # dead, out of memory, node gone
            return LearnerLost(
                f"learner rank {rank} died during {method} ({' '.join(str(error).split())[-800:]}); start again with "
                f"checkpoint.resume = auto"
            )
    causes = [(rank, error.cause if isinstance(error, RayTaskError) else error) for rank, error in failures]
    known = [cause for _, cause in causes if isinstance(cause, RunError)]
    if known:
        return max(known, key=lambda cause: len(str(cause)))  # the rank that saw the reason says more
    rank, cause = causes[0]
    return RunError(f"learner rank {rank} failed in {method}: {type(cause).__name__}: {cause}")
