"""Who computes what in one optimizer step: rollouts -> ranks -> micro-batches under a token budget.

A pure function of the lengths, so that every rank computes the same plan from the TrainingBatch alone and no
rank has to tell another. The loss is a sum of weighted tokens (losses.py): how rows are split changes nothing
but the speed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from cures_ray.config import Config
from cures_ray.learning.thinning import computed, takes_statistics
from cures_ray.messages import RolloutChunk, TrainingBatch, TrainingGroup


def pack(tokens: np.ndarray, ranks: int, max_tokens: int, together: np.ndarray | None = None) -> list[list[np.ndarray]]:
    """Plan N rows of ``tokens`` [N] (prompt + completion) for ``ranks`` ranks: [rank][i] -> row numbers, int [B_i].

    All ranks have the same number of micro-batches, because ZeRO 2 and 3 communicate in each backward pass: an empty
    one is computed as a dummy of weight 0.

    ``together`` [N]: rows with equal values go to the same rank (gradient statistics need whole groups).
    A micro-batch has at most ``max_tokens`` tokens after padding; a single row that is longer goes alone.
    """
    tokens = np.asarray(tokens, np.int64)
    assigned = _assign(tokens, ranks, together)
    micro = [_split(rows, tokens, max_tokens) for rows in assigned]
    most = max(1, max(len(batches) for batches in micro))
    for batches in micro:
        batches += [np.zeros(0, np.int64)] * (most - len(batches))
    return micro


def _assign(tokens: np.ndarray, ranks: int, together: np.ndarray | None) -> list[np.ndarray]:
    """Longest unit first to the rank with the fewest tokens; ties by order, so the same everywhere."""
    unit = np.arange(len(tokens)) if together is None else np.unique(together, return_inverse=True)[1]
    load_of_unit = np.bincount(unit, weights=tokens) if len(tokens) else np.zeros(0)
    rank_of_unit, load = np.zeros(len(load_of_unit), np.int64), np.zeros(ranks)
    for u in np.argsort(-load_of_unit, kind="stable"):
        rank_of_unit[u] = int(np.argmin(load))
        load[rank_of_unit[u]] += load_of_unit[u]
    rank_of_row = rank_of_unit[unit] if len(tokens) else np.zeros(0, np.int64)
    return [np.flatnonzero(rank_of_row == r) for r in range(ranks)]


def _split(rows: np.ndarray, tokens: np.ndarray, max_tokens: int) -> list[np.ndarray]:
    """Rows by falling length, cut where the padded rectangle would pass ``max_tokens``."""
    batches: list[np.ndarray] = []
    rows = rows[np.argsort(-tokens[rows], kind="stable")]
    while len(rows):
        fits = max(1, max_tokens // max(1, int(tokens[rows[0]])))
        batches.append(rows[:fits])
        rows = rows[fits:]
    return batches


def mini_batches(batch: TrainingBatch, count: int, seed: int) -> list[TrainingBatch]:
    """``batch`` cut at random into at most ``count`` parts of its leases, one optimizer step each (PPO's mini-batches).

    The loss of a part of k of K leases is scaled by K / k. A lease is equally likely to be in any part, so the
    expected gradient of each part is that of the batch. The same on all ranks.
    """
    leases = len(batch.groups)
    if min(count, leases) < 2:
        return [batch]
    order = np.random.default_rng([seed, batch.step]).permutation(leases)
    return [
        replace(
            batch,
            groups=tuple(replace(g, weights=g.weights * (leases / len(part))) for g in (batch.groups[i] for i in part)),
        )
        for part in (np.sort(part) for part in np.array_split(order, min(count, leases)))
    ]


def plan_step(batch: TrainingBatch, ranks: int, config: Config) -> list[list[list[tuple[int, int]]]]:
    """[rank][micro-batch] -> (group, slot within the group) of its rollouts; see ``pack``.

    What the learner may leave out (``thinning.computed``) is in no micro-batch. It counts as trained all the same.
    """
    rollouts = [(g, slot) for g, group in enumerate(batch.groups) for slot in range(len(group.rollout_index))]
    group_of = np.array([g for g, _ in rollouts], np.int64)
    nothing = np.zeros(0, np.int64)
    lengths = np.concatenate([g.completion_tokens for g in batch.groups] or [nothing]).astype(np.int64)
    tokens = lengths + np.array([batch.groups[g].prompt_tokens for g in group_of], np.int64)
    active = np.flatnonzero(np.concatenate([computed(g, config) for g in batch.groups] or [nothing]))
    together = group_of[active] if takes_statistics(config) else None
    plan = pack(tokens[active], ranks, config.learner.max_tokens_per_rank, together)
    return [[[rollouts[i] for i in active[rows]] for rows in micro_batches] for micro_batches in plan]


@dataclass(frozen=True, slots=True)
class Row:
    """One rollout as the learner needs it. P prompt tokens, L completion tokens."""

    lease_id: int
    prompt: np.ndarray  # int32 [P]
    completion: np.ndarray  # int32 [L]
    logprobs: np.ndarray  # float32 [L] under the sampling policy
    reward: float
    advantage: float
    weight: float


def make_row(group: TrainingGroup, payload: RolloutChunk, slot: int) -> Row:
    """Rollout ``slot`` of a training group, with its tokens from the payload of the group's chunk."""
    completion, logprobs = payload.tokens(int(group.rollout_index[slot]))
    return Row(
        lease_id=group.lease_id,
        prompt=payload.prompt(group.place),
        completion=completion,
        logprobs=logprobs,
        reward=float(group.rewards[slot]),
        advantage=float(group.advantages[slot]),
        weight=float(group.weights[slot]),
    )


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """B rows, right-padded to S tokens (a causal model needs no mask for that); N completion tokens, flat."""

    input_ids: np.ndarray  # int64 [B, S]
    row: np.ndarray  # int64 [N] row of each completion token
    position: np.ndarray  # int64 [N] position whose logits predict it
    target: np.ndarray  # int64 [N] the token
    behaviour: np.ndarray  # float32 [N]
    advantage: np.ndarray  # float32 [N]
    weight: np.ndarray  # float32 [N]
    tokens: int  # prompt + completion tokens without padding; 0 for a dummy
    squares: float  # sum over rows of their tokens squared
    lease_ids: list[int]  # of each row
    correct: list[bool]  # of each row: reward > 0.5, the classes of the gradient statistics


def collate(rows: Sequence[Row], pad_token_id: int = 0) -> MicroBatch:
    """Pad and flatten. No rows: a dummy of one token with weight 0."""
    if not rows:
        zero, one = np.zeros(1, np.int64), np.zeros(1, np.float32)
        return MicroBatch(np.full((1, 2), pad_token_id), zero, zero, zero + pad_token_id, one, one, one, 0, 0.0, [], [])
    sizes = np.array([len(r.prompt) + len(r.completion) for r in rows])
    input_ids = np.full((len(rows), max(2, int(sizes.max()))), pad_token_id, np.int64)
    for i, row in enumerate(rows):
        input_ids[i, : sizes[i]] = np.concatenate([row.prompt, row.completion])
    lengths = np.array([len(r.completion) for r in rows])
    return MicroBatch(
        input_ids=input_ids,
        row=np.repeat(np.arange(len(rows)), lengths),
        position=np.concatenate([len(r.prompt) - 1 + np.arange(len(r.completion)) for r in rows]),
        target=np.concatenate([r.completion for r in rows]).astype(np.int64),
        behaviour=np.concatenate([r.logprobs for r in rows]).astype(np.float32),
        advantage=np.repeat(np.array([r.advantage for r in rows], np.float32), lengths),
        weight=np.repeat(np.array([r.weight for r in rows], np.float32), lengths),
        tokens=int(sizes.sum()),
        squares=float((sizes**2).sum()),
        lease_ids=[r.lease_id for r in rows],
        correct=[r.reward > 0.5 for r in rows],
    )
