"""Held-out accuracy of one policy version: greedy, and the mean of k samples, overall and by level."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from cures_ray.evaluation.scores import JudgedAnswer, score
from cures_ray.loop.ports import GeneratorPort, VerifierPort, WorkerLost
from cures_ray.loop.sample_log import SampleLog
from cures_ray.messages import ChunkSummary, LeaseChunk, PromptRow, RunError, VerdictChunk

Metrics = dict[str, float]
RETRIES = 5
CHUNK = 64  # prompts
CHUNKS_IN_WORK = 16


class EvalPrompts(Protocol):
    @property
    def levels(self) -> np.ndarray | None: ...

    def __len__(self) -> int: ...

    def row(self, index: int) -> PromptRow: ...


@dataclass(slots=True)
class Answered:
    """What came back for some prompts."""

    answers: list[list[JudgedAnswer]]  # of each prompt
    versions: list[int] = field(default_factory=list)  # of the weights that answered: oldest and newest of each rollout


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
        versions: list[int] = []
        for kind in kinds:
            chunks = np.array_split(np.arange(len(self.prompts)), -(-len(self.prompts) // CHUNK))
            tasks = [
                self._judged(version, i, index, kind == "greedy", generators, progress, limit)
                for i, index in enumerate(chunks)
            ]
            answered = await asyncio.gather(*tasks)
            answers = [answers for chunk in answered for answers in chunk.answers]
            versions += [v for chunk in answered for v in chunk.versions]
            metrics |= {f"eval/{name}": value for name, value in self._summaries(kind, answers).items()}
        metrics |= {"eval/version_min": float(min(versions)), "eval/version_max": float(max(versions))}
        # a resumed run measures its start again
        self.history = [entry for entry in self.history if entry[0] != version]
        self.history.append((version, metrics))
        return metrics

    def _summaries(self, kind: str, answers: list[list[JudgedAnswer]]) -> Metrics:
        """``answers``: of each prompt. A fault is not solved, and counted."""
        scores = score(answers, levels=None if self.prompts.levels is None else list(self.prompts.levels))
        result = {
            f"{kind}_accuracy": scores.accuracy.mean,
            f"{kind}_low": scores.accuracy.low,
            f"{kind}_high": scores.accuracy.high,
            f"{kind}_faults": float(scores.faults),
        }
        if kind == "greedy":
            result |= {"truncated": scores.truncated_share, "completion_tokens": scores.tokens_mean}
        return result | {f"{kind}_accuracy/level_{level}": mean for level, mean in scores.by_level.items()}

    async def _judged(
        self,
        version: int,
        number: int,
        index: np.ndarray,
        greedy: bool,
        generators: Callable[[], list[GeneratorPort]],
        progress: Callable[[str], None],
        limit: asyncio.Semaphore,
    ) -> Answered:
        """The answers to each prompt ``index`` [k]; a lost generator's go to another, as do those that failed."""
        answered, todo = Answered(answers=[[] for _ in index]), np.arange(len(index))
        async with limit:
            for attempt in range(RETRIES):
                live = generators()
                if live:
                    generator = live[(number + attempt) % len(live)]
                    with suppress(WorkerLost):
                        todo = await self._answers(version, index, todo, greedy, generator, answered)
                        progress(f"evaluation: {len(index)} prompts answered")
                if not len(todo):
                    return answered
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
        answered: Answered,
    ) -> np.ndarray:
        """Generate and judge the places ``todo`` of ``index``, write what was ``answered``; the places that failed."""
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
        for place, answers in zip(todo.tolist(), _by_prompt(summary, verdicts), strict=True):
            answered.answers[place] = answers
        rollouts = ~np.repeat(summary.failed, summary.n)
        answered.versions += [*summary.min_version[rollouts].tolist(), *summary.max_version[rollouts].tolist()]
        if greedy and self.samples is not None:
            shown = np.flatnonzero((asked < self.samples.count) & ~summary.failed)
            if len(shown):
                rows = [self.prompts.row(int(i)) for i in asked[shown]]
                await self.samples.write(version, rows, payload, shown.tolist(), verdicts)
        return todo[summary.failed]


def _by_prompt(summary: ChunkSummary, verdicts: VerdictChunk) -> list[list[JudgedAnswer]]:
    """The answers of each lease of a chunk; with graded rewards ``correct`` is the verdict's."""
    flat = [
        JudgedAnswer(reward=reward, correct=correct, fault=fault, tokens=tokens, truncated=truncated)
        for reward, correct, fault, tokens, truncated in zip(
            verdicts.reward.tolist(),
            verdicts.correct.tolist(),
            verdicts.fault.tolist(),
            summary.completion_tokens.tolist(),
            summary.truncated.tolist(),
            strict=True,
        )
    ]
    ends = np.cumsum(summary.n).tolist()
    return [flat[end - n : end] for n, end in zip(summary.n.tolist(), ends, strict=True)]
