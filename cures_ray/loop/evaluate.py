"""Held-out accuracy of one policy version: greedy, and the mean of k samples, overall and by level."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Callable
from contextlib import suppress
from typing import Protocol

import numpy as np

from cures_ray.loop.ports import GeneratorPort, VerifierPort, WorkerLost
from cures_ray.loop.sample_log import SampleLog
from cures_ray.messages import LeaseChunk, PromptRow, RunError

Metrics = dict[str, float]
RETRIES = 5
CHUNK = 64  # prompts
CHUNKS_IN_WORK = 16


class EvalPrompts(Protocol):
    @property
    def levels(self) -> np.ndarray | None: ...

    def __len__(self) -> int: ...

    def row(self, index: int) -> PromptRow: ...


class Evaluator:
    """Callable as ``evaluate(version, generators, progress)``; remembers every result in ``history``.

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

    async def __call__(
        self,
        version: int,
        generators: Callable[[], list[GeneratorPort]],
        progress: Callable[[str], None] = lambda _: None,
    ) -> Metrics:
        """``progress`` is told of every chunk of answers."""
        limit = asyncio.Semaphore(CHUNKS_IN_WORK)
        kinds = ["greedy", "sampled"] if self.samples_per_prompt else ["greedy"]
        metrics: Metrics = {"eval/version": float(version), **self._constants}
        for kind in kinds:
            chunks = np.array_split(np.arange(len(self.prompts)), -(-len(self.prompts) // CHUNK))
            tasks = [
                self._score(version, i, index, kind == "greedy", generators, progress, limit)
                for i, index in enumerate(chunks)
            ]
            scores = np.concatenate(await asyncio.gather(*tasks))
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
        number: int,
        index: np.ndarray,
        greedy: bool,
        generators: Callable[[], list[GeneratorPort]],
        progress: Callable[[str], None],
        limit: asyncio.Semaphore,
    ) -> np.ndarray:
        """Mean reward of each prompt ``index`` [k]; a lost generator's go to another, as do those that failed."""
        scores, todo = np.full(len(index), np.nan), np.arange(len(index))
        async with limit:
            for attempt in range(RETRIES):
                live = generators()
                if live:
                    generator = live[(number + attempt) % len(live)]
                    with suppress(WorkerLost):
                        todo = await self._answers(version, index, todo, greedy, generator, scores)
                        progress(f"evaluation: {len(index)} prompts answered")
                if not len(todo):
                    return scores
                await asyncio.sleep(2.0**attempt)
        raise RunError(
            f"evaluation: prompt {self.prompts.row(int(index[todo[0]])).prompt_id} could not be generated in {RETRIES} "
            f"attempts"
        )

    async def _answers(
        self,
        version: int,
        index: np.ndarray,
        todo: np.ndarray,
        greedy: bool,
        generator: GeneratorPort,
        scores: np.ndarray,
    ) -> np.ndarray:
        """Generate and judge the places ``todo`` of ``index``, write their ``scores``; the places that failed."""
        asked = index[todo]
        leases = LeaseChunk(
            lease_id=np.full(len(asked), -1, np.int64),
            attempt=np.zeros(len(asked), np.int32),
            prompt_index=asked,
            n=np.full(len(asked), 1 if greedy else self.samples_per_prompt, np.int32),
            seed=self.seed * 1_000_003 + asked,
            source="eval",
            greedy=greedy,
        )
        summary, payload = await generator.generate(leases)
        verdicts = await self.verifier.verify(payload, len(summary.completion_tokens))
        owner = np.repeat(np.arange(len(asked)), summary.n)
        valid = ~verdicts.fault & ~summary.failed[owner]
        total = np.bincount(owner[valid], minlength=len(asked))
        sums = np.bincount(owner[valid], verdicts.reward[valid], len(asked))
        scores[todo] = np.where(total > 0, sums / np.maximum(total, 1), np.nan)
        if greedy and self.samples is not None:
            shown = np.flatnonzero((asked < self.samples.count) & ~summary.failed)
            if len(shown):
                rows = [self.prompts.row(int(i)) for i in asked[shown]]
                await self.samples.write(version, rows, payload, shown.tolist(), verdicts)
        return todo[summary.failed]
