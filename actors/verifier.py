"""A verifier: judges rollout groups in killable processes, away from the driver and the GPUs.

driver --(payload handle, PromptRow)--> VerifierActor --items--> VerifyPool: N processes
                                        <--------- one Verdict a rollout, in order ---------
"""

from __future__ import annotations

import asyncio
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from cures_ray.config import Config
from cures_ray.messages import Outcome, PromptRow, RolloutGroup, Verdict
from cures_ray.verify.pool import VerifyItem, VerifyPool
from cures_ray.verify.self_test import self_test

MAX_GROUPS = 64  # in work at once; the threads only wait


class VerifierActor:
    """Launch with ``ray.remote(VerifierActor).options(max_concurrency=64, max_restarts=-1, ...)``.

    The processes start with it and die with it; ``ping`` waits for them.
    """

    def __init__(self, config: Config) -> None:
        self._config = config
        self._pool = VerifyPool(config.verifier)
        self._threads = ThreadPoolExecutor(MAX_GROUPS, thread_name_prefix="group")
        self._outcomes: Counter[str] = Counter()
        self._faults: Counter[str] = Counter()
        self._seconds = 0.0
        self._threads.submit(self._pool.prewarm)  # a failure comes up again with the first call

    async def verify(self, group: RolloutGroup, prompt: PromptRow) -> list[Verdict]:
        """One verdict a rollout of ``group`` (Ray resolves the handle), in order. Ends within
        len(group.rollouts) hard deadlines (``verifier.timeout_s`` and a little) after its turn has come."""
        items = [VerifyItem(prompt=prompt, completion=rollout.text) for rollout in group.rollouts]
        verdicts = await self._aside(self._pool.verify, items)
        for verdict in verdicts:
            self._outcomes[verdict.outcome.value] += 1
            self._seconds += verdict.seconds
            if verdict.outcome is Outcome.FAULT:
                self._faults[fault_reason(verdict.detail)] += 1
        return verdicts

    async def self_test(self) -> None:
        """Raises ConfigError when the verifier does not judge known answers rightly on this node."""
        await self._aside(self_test, self._config)

    async def ping(self) -> str:
        """Start the processes and say that they stand; raises ConfigError when they do not."""
        await self._aside(self._pool.prewarm)
        return "ready"

    async def report(self) -> dict[str, Any]:
        """Counts since the start: verdicts by outcome, faults by reason, process seconds spent."""
        return {"outcomes": dict(self._outcomes), "faults": dict(self._faults), "seconds": self._seconds}

    async def close(self) -> None:
        """End the processes; what is in work ends as faults."""
        self._pool.close()

    async def _aside(self, call: Any, *arguments: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._threads, call, *arguments)


def fault_reason(detail: str) -> str:
    """A fault's kind, without the numbers and texts of its item, so that kinds can be counted."""
    return detail.split(":")[0].split(" (")[0].split(" ...")[0][:60]
