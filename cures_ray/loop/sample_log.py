"""RUN/samples.jsonl: greedy answers to the first held-out prompts at every evaluation, for people to read."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path

from cures_ray.loop.ports import WorkerLost
from cures_ray.messages import PayloadHandle, PromptRow, RolloutChunk, VerdictChunk


class SampleLog:
    """Appends one line a prompt and evaluation, so that a resumed run continues the file.

    Args:
        path: the file.
        count: that many prompts, from the first on.
        fetch: gets a payload to this process.
    """

    def __init__(self, path: Path, count: int, fetch: Callable[[PayloadHandle], Awaitable[RolloutChunk]]) -> None:
        self.path, self.count, self._fetch = path, count, fetch
        lines = map(json.loads, path.read_text().splitlines()) if path.exists() else ()
        self._written = {(line["version"], line["prompt_id"]) for line in lines}

    async def write(
        self,
        version: int,
        prompts: list[PromptRow],
        payload: PayloadHandle,
        rollouts: list[int],
        verdicts: VerdictChunk,
    ) -> None:
        """The rows ``rollouts`` of ``payload``, one a prompt; nothing when its worker is gone, or of prompts that a run
        that was resumed has already."""
        pairs = zip(prompts, rollouts, strict=True)
        asked = [pair for pair in pairs if (version, pair[0].prompt_id) not in self._written]
        if not asked:
            return
        with suppress(WorkerLost):
            chunk = await self._fetch(payload)
            with self.path.open("a") as file:
                for prompt, row in asked:
                    outcome = "fault" if verdicts.fault[row] else "correct" if verdicts.correct[row] else "incorrect"
                    line = {
                        "version": version,
                        "prompt_id": prompt.prompt_id,
                        "prompt": prompt.text,
                        "completion": chunk.texts[row],
                        "finish_reason": "length" if chunk.summary.truncated[row] else "stop",
                        "outcome": outcome,
                        "reward": float(verdicts.reward[row]),
                        "answer": prompt.answer,
                    }
                    file.write(json.dumps(line, ensure_ascii=False) + "\n")
