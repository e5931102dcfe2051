"""Held-out accuracy of one policy version: greedy, and the mean of k samples, overall and by level."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Callable
from typing import Protocol

import numpy as np

from cures_ray.loop.ports import GeneratorPort, VerifierPort, WorkerLost
from cures_ray.loop.sample_log import SampleLog
from cures_ray.messages import GenerationRequest, PromptRow, RunError

Metrics = dict[str, float]
RETRIES = 5


class EvalPrompts(Protocol):
    @property
    def levels(self) -> np.ndarray | None: ...

    def __len__(self) -> int: ...

    def row(self, index: int) -> PromptRow: ...


class Evaluator:
    """Callable as ``evaluate(version, generators)``; remembers every result in ``history``.

    Args:
        samples_per_prompt: draws at the training temperature besides the greedy answer; 0 for none.
        seed: the draws' seed; the same at every version, so that curves are paired.
        samples: where the greedy answers to the first prompts are written.
        constants: what needs no model and is reported beside it: the best constant answer's accuracy.
    """

    def __init__(
        self,
        prompts: EvalPrompts,
        verifier: VerifierPort,
        samples_per_prompt: int = 0,
        seed: int = 0,
        samples: SampleLog | None = None,
        constants: Metrics | None = None,
    ) -> None:
        self.prompts, self.verifier, self.samples = prompts, verifier, samples
        self._constants = {f"eval/{name}": value for name, value in (constants or {}).items()}
        self.samples_per_prompt, self.seed = samples_per_prompt, seed
        self.history: list[tuple[int, Metrics]] = []

    async def __call__(self, version: int, generators: Callable[[], list[GeneratorPort]]) -> Metrics:
        limit = asyncio.Semaphore(1024)
        kinds = ["greedy", "sampled"] if self.samples_per_prompt else ["greedy"]
        metrics: Metrics = {"eval/version": float(version), **self._constants}
        for kind in kinds:
            tasks = [self._score(version, i, kind == "greedy", generators, limit) for i in range(len(self.prompts))]
            scores = np.array(await asyncio.gather(*tasks))
            metrics |= {f"eval/{kind}_{name}": value for name, value in self._summaries(scores).items()}
        # a resumed run measures its start again
        self.history = [entry for entry in self.history if entry[0] != version]
        self.history.append((version, metrics))
        return metrics

    def _summaries(self, scores: np.ndarray) -> Metrics:
        """``scores``: mean reward per prompt, NaN where every verdict was a fault."""
        result = {"accuracy": float(np.nanmean(scores)) if np.isfinite(scores).any() else 0.0}
        result["faults"] = float(np.isnan(scores).sum())
        if self.prompts.levels is not None:
            by_level: dict[str, list[float]] = defaultdict(list)
            for level, score in zip(self.prompts.levels, scores, strict=True):
                by_level[f"{level:g}" if isinstance(level, float | np.floating) else str(level)].append(float(score))
            result |= {f"accuracy/level_{k}": float(np.nanmean(v)) for k, v in by_level.items() if np.isfinite(v).any()}
        return result

    async def _score(
        self,
        version: int,
        index: int,
        greedy: bool,
        generators: Callable[[], list[GeneratorPort]],
        limit: asyncio.Semaphore,
    ) -> float:
        """Mean reward of one prompt; a lost generator's prompt goes to another."""
        row = self.prompts.row(index)
        request = GenerationRequest(
            prompt=row, n=1 if greedy else self.samples_per_prompt, seed=self.seed * 1_000_003 + index, greedy=greedy
        )
        async with limit:
            for attempt in range(RETRIES):
                live = generators()
                if not live:
                    await asyncio.sleep(2.0**attempt)
                    continue
                try:
                    _, payload = await live[(index + attempt) % len(live)].generate(request)
                    verdicts = await self.verifier.verify(payload, row)
                except (WorkerLost, TimeoutError):
                    await asyncio.sleep(2.0**attempt)
                    continue
                if greedy and self.samples is not None and index < self.samples.count:
                    await self.samples.write(version, row, payload, verdicts[0])
                rewards = [v.reward for v in verdicts if not v.is_fault]
                return float(np.mean(rewards)) if rewards else float("nan")
        raise RunError(f"evaluation: prompt {row.prompt_id} could not be generated in {RETRIES} attempts")
