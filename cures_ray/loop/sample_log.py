"""RUN/samples.jsonl: greedy answers to the first held-out prompts at every evaluation, for people to read."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path

from cures_ray.loop.ports import WorkerLost
from cures_ray.messages import PayloadHandle, PromptRow, RolloutGroup, Verdict


class SampleLog:
    """Appends one line a prompt and evaluation, so that a resumed run continues the file.

    Args:
        path: the file.
        count: that many prompts, from the first on.
        fetch: gets a payload to this process.
    """

    def __init__(self, path: Path, count: int, fetch: Callable[[PayloadHandle], Awaitable[RolloutGroup]]) -> None:
        self.path, self.count, self._fetch = path, count, fetch
        lines = map(json.loads, path.read_text().splitlines()) if path.exists() else ()
        self._written = {(line["version"], line["prompt_id"]) for line in lines}

    async def write(self, version: int, row: PromptRow, payload: PayloadHandle, verdict: Verdict) -> None:
        """The first rollout of ``payload``; nothing when its worker is gone, or when a run that was resumed has it
        already."""
        if (version, row.prompt_id) in self._written:
            return
        with suppress(WorkerLost):
            rollout = (await self._fetch(payload)).rollouts[0]
            line = {
                "version": version,
                "prompt_id": row.prompt_id,
                "prompt": row.text,
                "completion": rollout.text,
                "finish_reason": rollout.finish_reason,
                "outcome": verdict.outcome.value,
                "reward": verdict.reward,
                "answer": row.answer,
            }
            with self.path.open("a") as file:
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
