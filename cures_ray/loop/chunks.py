"""Finished leases packed into one payload and its summary, and what the driver keeps of a verified chunk."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cures_ray.messages import (
    ChunkSummary,
    LeaseChunk,
    PayloadHandle,
    Rollout,
    RolloutChunk,
    Settlement,
    VerdictChunk,
)


def pack(
    leases: LeaseChunk,
    prompts: Sequence[np.ndarray],
    rollouts: Sequence[Sequence[Rollout]],
    generator: str,
    seconds: Sequence[float],
    failed: Sequence[bool] | None = None,
) -> tuple[ChunkSummary, RolloutChunk]:
    """The k finished ``leases``, with the token ids of each prompt [k] and ``n`` rollouts each."""
    flat = [r for group in rollouts for r in group]
    lengths = np.array([len(r.token_ids) for r in flat], np.int32)
    prompt_tokens = np.array([len(p) for p in prompts], np.int32)
    summary = ChunkSummary(
        generator=generator,
        lease_id=leases.lease_id,
        attempt=leases.attempt,
        n=np.array([len(group) for group in rollouts], np.int32),
        failed=np.zeros(len(leases), bool) if failed is None else np.array(failed, bool),
        prompt_tokens=prompt_tokens,
        seconds=np.array(seconds, np.float32),
        completion_tokens=lengths,
        truncated=np.array([r.finish_reason == "length" for r in flat], bool),
        min_version=np.array([r.min_version for r in flat], np.int32),
        max_version=np.array([r.max_version for r in flat], np.int32),
    )
    payload = RolloutChunk(
        summary=summary,
        source=leases.source,
        prompt_index=leases.prompt_index,
        prompt_ids=_joined([np.asarray(p, np.int32) for p in prompts], np.int32),
        prompt_ends=np.cumsum(prompt_tokens, dtype=np.int64),
        token_ids=_joined([r.token_ids for r in flat], np.int32),
        logprobs=_joined([r.logprobs for r in flat], np.float32),
        ends=np.cumsum(lengths, dtype=np.int64),
        texts=tuple(r.text for r in flat),
    )
    return summary, payload


def picked(leases: Sequence[tuple[LeaseChunk, int]]) -> LeaseChunk:
    """The chunk of lease ``i`` of each (chunk, i), which are of one table."""
    names = ("lease_id", "attempt", "prompt_index", "n", "seed")
    columns = {name: np.array([getattr(chunk, name)[i] for chunk, i in leases]) for name in names}
    return LeaseChunk(source=leases[0][0].source, greedy=leases[0][0].greedy, **columns)


def unpacked(chunk: RolloutChunk, row: int) -> Rollout:
    """Rollout ``row`` of ``chunk``, by itself."""
    s, (ids, logprobs) = chunk.summary, chunk.tokens(row)
    return Rollout(
        token_ids=ids,
        logprobs=logprobs,
        finish_reason="length" if s.truncated[row] else "stop",
        min_version=int(s.min_version[row]),
        max_version=int(s.max_version[row]),
        text=chunk.texts[row],
    )


def nothing_generated(n: int, version: int) -> list[Rollout]:
    """The ``n`` rollouts of a lease that missed its deadline: empty."""
    empty = Rollout(
        token_ids=np.zeros(0, np.int32),
        logprobs=np.zeros(0, np.float32),
        finish_reason="length",
        min_version=version,
        max_version=version,
        text="",
    )
    return [empty] * n


def settlement(summary: ChunkSummary, verdicts: VerdictChunk) -> Settlement:
    """What the ledger is told of a verified chunk. A lease whose generation failed is all faults."""
    owner = np.repeat(np.arange(len(summary)), summary.n)
    return Settlement(
        lease_id=summary.lease_id,
        attempt=summary.attempt,
        n=summary.n,
        failed=summary.failed,
        generate_seconds=summary.seconds,
        verify_seconds=np.bincount(owner, verdicts.seconds, len(summary)).astype(np.float32),
        rewards=verdicts.reward,
        fault=verdicts.fault | summary.failed[owner],
        completion_tokens=summary.completion_tokens,
        min_version=summary.min_version,
    )


def all_faults(summary: ChunkSummary, why: str) -> VerdictChunk:
    """The verdicts where no verifier could give any."""
    r = len(summary.completion_tokens)
    return VerdictChunk(
        reward=np.zeros(r, np.float32),
        correct=np.zeros(r, bool),
        fault=np.ones(r, bool),
        seconds=np.zeros(r, np.float32),
        details=dict.fromkeys(range(r), why),
    )


@dataclass(frozen=True, slots=True)
class VerifiedChunk:
    """A chunk that was settled and not yet trained, as the driver keeps it."""

    summary: ChunkSummary
    payload: PayloadHandle
    fault: np.ndarray  # bool [r]
    starts: np.ndarray  # int64 [k + 1]: lease i has the rollouts starts[i] .. starts[i + 1]

    @classmethod
    def of(cls, summary: ChunkSummary, payload: PayloadHandle, fault: np.ndarray) -> VerifiedChunk:
        return cls(summary, payload, fault, np.concatenate([[0], np.cumsum(summary.n, dtype=np.int64)]))


Place = tuple[VerifiedChunk, int]  # a lease within its chunk


def _joined(parts: list[np.ndarray], dtype: type) -> np.ndarray:
    return np.concatenate(parts) if parts else np.zeros(0, dtype)
