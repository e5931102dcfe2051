"""Leases in a generator's engine, and what comes out of it as a chunk."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from cures_ray.loop.chunks import nothing_generated, pack
from cures_ray.messages import ChunkSummary, LeaseChunk, Rollout, RolloutChunk

if TYPE_CHECKING:
    from vllm import SamplingParams
    from vllm.outputs import CompletionOutput, RequestOutput


@dataclass(slots=True)
class Work:
    """One lease in the engine."""

    lease_id: int
    attempt: int
    prompt_index: int
    prompt: list[int]
    samplings: list[SamplingParams]
    began: float = field(default_factory=time.monotonic)
    seconds: float = 0.0
    outputs: list[RequestOutput] | None = None  # None: not finished, or missed its deadline


def pack_finished(
    source: str, done: list[Work], generator: str, version: int, batch_decode: Callable[..., list[str]] | None
) -> tuple[ChunkSummary, RolloutChunk]:
    """The chunk of ``done``. ``batch_decode`` of the tokenizer, once for all; None: the engine has decoded."""
    outputs = [o.outputs[0] for w in done for o in w.outputs or ()]
    if batch_decode is None:
        texts = [output.text for output in outputs]
    else:
        texts = batch_decode([list(o.token_ids) for o in outputs], skip_special_tokens=True)
    ready = (_rollout(output, text, version) for output, text in zip(outputs, texts, strict=True))
    leases = LeaseChunk(
        lease_id=np.array([w.lease_id for w in done], np.int64),
        attempt=np.array([w.attempt for w in done], np.int32),
        prompt_index=np.array([w.prompt_index for w in done], np.int64),
        n=np.array([len(w.samplings) for w in done], np.int32),
        seed=np.zeros(len(done), np.int64),
        source=source,
    )
    rollouts = [
        nothing_generated(len(w.samplings), version) if w.outputs is None else [next(ready) for _ in w.outputs]
        for w in done
    ]
    return pack(
        leases,
        [np.array(w.prompt, np.int32) for w in done],
        rollouts,
        generator,
        [w.seconds for w in done],
        [w.outputs is None for w in done],
    )


def _rollout(output: CompletionOutput, text: str, version: int) -> Rollout:
    ids: Any = output.token_ids
    flat: Any = output.logprobs
    versions = [int(span.version) for span in output.weight_versions or ()] or [version]
    return Rollout(
        token_ids=np.asarray(ids, np.int32),
        logprobs=np.asarray(flat.logprobs, np.float32),
        finish_reason=str(output.finish_reason),
        min_version=min(versions),
        max_version=max(versions),
        text=text,
    )
