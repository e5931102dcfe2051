"""A verifier: judges chunks of rollouts in killable processes, away from the driver and the GPUs.

driver --payload handle--> VerifierActor --golds from its prompt tables--> VerifyPool: N processes
       <--VerdictChunk: one verdict a rollout, in order---
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from actors.telemetry import ProcessGauges
from cures_ray.config import Config
from cures_ray.loop.ports import PromptSource
from cures_ray.messages import RolloutChunk, Verdict, VerdictChunk
from cures_ray.verify.mathematics import fault
from cures_ray.verify.pool import VerifyItem, VerifyPool
from cures_ray.verify.self_test import self_test

MAX_CHUNKS = 64  # in work at once; the threads only wait


class VerifierActor:
    """Launch with ``ray.remote(VerifierActor).options(max_concurrency=64, max_restarts=-1, max_task_retries=0)``: the
    driver gives a chunk whose verifier died to another.

    Args:
        prompts: the tables by name ("train", "eval"), for the golds.
        name: unique among the verifiers of the run.
    """

    def __init__(self, config: Config, prompts: Mapping[str, PromptSource], name: str = "verifier-0") -> None:
        self._config, self._prompts, self.name = config, prompts, name
        self._pool = VerifyPool(config.verifier)
        self._threads = ThreadPoolExecutor(MAX_CHUNKS, thread_name_prefix="chunk")
        self._threads.submit(self._pool.prewarm)  # a failure comes up again with the first call
        self._rollouts = 0  # in hand
        self._gauges = ProcessGauges(config, "verifier", name, self._numbers)
        self._reports: asyncio.Task[None] | None = None  # begins with the first call: there is no event loop yet

    def __repr__(self) -> str:
        return self.name

    def _numbers(self) -> dict[str, float]:
        at_once = self._config.verifier.processes_per_worker
        return {"in_flight": min(self._rollouts, at_once), "queue": max(self._rollouts - at_once, 0)}

    async def verify(self, chunk: RolloutChunk) -> VerdictChunk:
        """One verdict a rollout of ``chunk`` (Ray resolves the handle), in order. Ends within
        len(chunk) hard deadlines (``verifier.timeout_s`` and a little) after its turn has come."""
        self._reports = self._reports or asyncio.create_task(self._gauges.watch())
        self._rollouts += len(chunk)
        try:
            return await self._aside(self._verify, chunk)
        finally:
            self._rollouts -= len(chunk)

    def _verify(self, chunk: RolloutChunk) -> VerdictChunk:
        prompts = self._prompts[chunk.source].rows(chunk.prompt_index, tokenize=False)
        owner = np.repeat(np.arange(len(prompts)), chunk.summary.n)
        judged = np.flatnonzero(~chunk.summary.failed[owner]).tolist()
        verdicts: list[Verdict] = [fault("nothing was generated before the deadline")] * len(chunk)
        items = [VerifyItem(prompt=prompts[owner[row]], completion=chunk.texts[row]) for row in judged]
        for row, verdict in zip(judged, self._pool.verify(items), strict=True):
            verdicts[row] = verdict
        return VerdictChunk.of(verdicts)

    async def self_test(self) -> None:
        """Raises ConfigError when the verifier does not judge known answers rightly on this node."""
        await self._aside(self_test, self._config)

    async def close(self) -> None:
        """End the processes; what is in work ends as faults."""
        self._pool.close()

    async def _aside(self, call: Any, *arguments: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._threads, call, *arguments)
