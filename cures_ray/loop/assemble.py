"""From a finished batch plan to what the learner trains on, and to the account of every rollout.

Each rollout of the plan ends here as *trained* or *discarded(reason)*, in this order:

    chunk missing -> LOST; fault -> VERIFIER_FAULT (generation failed: GENERATION_FAULT);
    not kept by the method -> its drop_reason; too old -> STALE; else trained (zero advantage included).

A prompt's rollouts may come from several leases (pilot, screen, continuation): they share one baseline and
one n_i. Rollouts that the method FILTERED out of a group in which others are trained (Reinforce-Ada's
balanced subset) stay in that group's baseline, because A = r - mean over all that were drawn; pilots and
screens that are not trained do not.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cures_ray.config import Config
from cures_ray.learning.advantages import compute_advantages, overlong_penalty, split, token_weights
from cures_ray.learning.thinning import thin
from cures_ray.loop.chunks import Place, VerifiedChunk
from cures_ray.messages import BatchEntry, BatchPlan, CommitReport, Discard, RunError, TrainingBatch, TrainingGroup


@dataclass(frozen=True, slots=True)
class _Rollouts:
    """All r rollouts of a plan's k leases, in plan order. Arrays over the whole batch: a batch may have many leases of
    one rollout each."""

    owner: np.ndarray  # int [r], the lease's place in the plan
    row: np.ndarray  # int [r], in the chunk that the lease came in
    rewards: np.ndarray  # float64 [r]
    lengths: np.ndarray  # int [r]
    trained: np.ndarray  # bool [r]
    baseline: np.ndarray  # bool [r]: enters the prompt's baseline; a superset of trained
    discarded: dict[int, dict[Discard, int]]  # by lease_id


def assemble(
    plan: BatchPlan,
    groups: dict[int, Place],
    config: Config,
    version: int,
    train_cost: float | None = None,
) -> tuple[TrainingBatch, CommitReport]:
    """The training batch of ``plan`` and its commit report.

    ``groups``: lease_id -> its place in the chunk that it came in. ``version`` is the policy version before the
    step: a rollout whose oldest token is more than ``max_staleness`` versions behind is discarded as STALE.
    The objective's m is inside Lease.weight, so filtered and zero-variance prompts stay in the denominator.
    ``train_cost``: of a rollout, in units of generating one; when given, advantages are thinned by it and not by
    ``algo.min_advantage``.

    Raises:
        RunError: a summary does not have as many rollouts as its plan entry.
    """
    rollouts = _sort_out(plan.entries, groups, version - config.async_rl.max_staleness)
    batch = TrainingBatch(step=version, groups=_groups(plan.entries, groups, rollouts, config, version, train_cost))
    counts = np.bincount(rollouts.owner[rollouts.trained], minlength=len(plan.entries)).tolist()
    trained = {entry.lease.lease_id: count for entry, count in zip(plan.entries, counts, strict=True)}
    return batch, CommitReport(batch=plan.batch, trained=trained, discarded=rollouts.discarded)


def _sort_out(entries: Sequence[BatchEntry], groups: dict[int, Place], oldest: int) -> _Rollouts:
    """Which rollouts are trained, and why the others are not."""
    sizes = np.array([len(entry.rewards) for entry in entries], np.int64)
    owner = np.repeat(np.arange(len(entries)), sizes)
    chunks: dict[int, tuple[int, VerifiedChunk]] = {}  # id -> where its rollouts begin in ``joined``
    end = 0
    start, place_in_joined, failed = (np.zeros(len(entries), np.int64) for _ in range(3))
    there = np.zeros(len(entries), bool)
    for i, entry in enumerate(entries):
        if (found := groups.get(entry.lease.lease_id)) is None:
            continue
        chunk, place = found
        if int(chunk.summary.n[place]) != len(entry.rewards):
            raise RunError(
                f"lease {entry.lease.lease_id}: the plan has {len(entry.rewards)} rollouts and its chunk "
                f"{chunk.summary.n[place]}; ledger and generator disagree"
            )
        if id(chunk) not in chunks:
            chunks[id(chunk)] = (end, chunk)
            end += len(chunk.fault)
        there[i], failed[i], start[i] = True, chunk.summary.failed[place], chunk.starts[place]
        place_in_joined[i] = chunks[id(chunk)][0] + start[i]
    within = np.arange(len(owner)) - (np.cumsum(sizes) - sizes)[owner]
    present = there[owner]
    row = (place_in_joined[owner] + within)[present]

    def gathered(parts: list[np.ndarray], dtype: type) -> np.ndarray:
        """Values of the chunks' rollouts [r]; 0 where the chunk is missing."""
        values: np.ndarray = np.zeros(len(owner), dtype)
        values[present] = np.concatenate([*parts, np.zeros(0, dtype)])[row]
        return values

    lengths = gathered([chunk.summary.completion_tokens for _, chunk in chunks.values()], np.int64)
    fault = gathered([chunk.fault for _, chunk in chunks.values()], bool) | failed[owner].astype(bool)
    stale = gathered([chunk.summary.min_version for _, chunk in chunks.values()], np.int64) < oldest
    keep = np.concatenate([*(np.asarray(entry.keep, bool) for entry in entries), np.zeros(0, bool)])
    rewards = np.concatenate([*(entry.rewards for entry in entries), np.zeros(0, np.float32)]).astype(np.float64)
    filtered = np.array([entry.drop_reason is Discard.FILTERED for entry in entries], bool)[owner]
    usable = present & ~fault & ~stale
    trained = usable & keep
    discarded: defaultdict[int, defaultdict[Discard, int]] = defaultdict(lambda: defaultdict(int))
    for r in np.flatnonzero(~trained).tolist():
        entry = entries[owner[r]]
        if not present[r]:
            reason = Discard.LOST
        elif fault[r]:
            reason = Discard.GENERATION_FAULT if failed[owner[r]] else Discard.VERIFIER_FAULT
        else:
            reason = Discard.STALE if keep[r] else entry.drop_reason
        discarded[entry.lease.lease_id][reason] += 1
    return _Rollouts(
        owner=owner,
        row=start[owner] + within,
        rewards=rewards,
        lengths=lengths,
        trained=trained,
        baseline=usable & (keep | filtered),
        discarded={lease_id: dict(counts) for lease_id, counts in discarded.items()},
    )


def _groups(
    entries: Sequence[BatchEntry],
    groups: dict[int, Place],
    rollouts: _Rollouts,
    config: Config,
    version: int,
    train_cost: float | None,
) -> tuple[TrainingGroup, ...]:
    """One TrainingGroup a lease with trained rollouts; baseline and n_i over all leases of its prompt."""
    algo, limit, owner = config.algo, config.rollout.max_new_tokens, rollouts.owner
    codes: dict[str, int] = {}
    prompt_of = np.array([codes.setdefault(entry.lease.prompt_id, len(codes)) for entry in entries], np.int64)
    prompt = prompt_of[owner]  # [r], numbered in the order in which they were drawn
    learned = np.zeros(len(codes), bool)
    learned[prompt[rollouts.trained]] = True  # prompts with a trained rollout
    weight = np.zeros(len(codes))  # all leases of a prompt carry the prompt's weight; it counts once
    np.maximum.at(weight, prompt_of, np.array([entry.lease.weight for entry in entries], np.float64))

    def by_prompt(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The rollouts ``rows`` [r] of prompts that are learned, sorted by prompt, and how many each prompt has."""
        order = np.flatnonzero(rows & learned[prompt])
        order = order[np.argsort(prompt[order], kind="stable")]
        return order, np.bincount(prompt[order], minlength=len(codes))[learned]

    order, sizes = by_prompt(rollouts.baseline)
    shaped = rollouts.rewards + overlong_penalty(rollouts.lengths, limit, algo.overlong_penalty_tokens)
    # The belief of the first lease in the baseline is its prior: from before any rollout that enters it. That of a
    # later lease has counted pilots which are not trained, as evidence of their own.
    beliefs = [entries[i].lease for i in owner[order[np.cumsum(sizes) - sizes]].tolist()]
    advantages = compute_advantages(
        algo.advantage,
        split(shaped[order], sizes),
        np.array([lease.alpha for lease in beliefs]),
        np.array([lease.beta for lease in beliefs]),
        algo.advantage_std_eps,
        whiten=not algo.kl_in_reward,
        lengths=split(rollouts.lengths[order], sizes),
    )
    advantages = thin(advantages, config, version, train_cost)
    values = np.zeros((2, len(owner)), np.float32)  # advantage, weight of each rollout
    values[0, order] = np.concatenate([*advantages, np.zeros(0)])
    order, sizes = by_prompt(rollouts.trained)
    weights = token_weights(algo.loss_length, weight[learned], split(rollouts.lengths[order], sizes), limit)
    values[1, order] = np.concatenate([*weights, np.zeros(0)])
    # a lease's rollouts are neighbours in ``order``
    ends = np.flatnonzero(np.diff(owner[order], append=-1)) + 1
    counts = np.diff(ends, prepend=0)
    integers = (rollouts.row.astype(np.int32), rollouts.lengths.astype(np.int32))
    columns = (*integers, rollouts.rewards.astype(np.float32), *values)
    leases = owner[order[ends - 1]].tolist()
    result = []
    for i, *parts in zip(leases, *(split(column[order], counts) for column in columns), strict=True):
        rows, lengths, rewards, lease_advantages, lease_weights = parts
        lease = entries[i].lease
        chunk, place = groups[lease.lease_id]
        result.append(
            TrainingGroup(
                lease_id=lease.lease_id,
                payload=chunk.payload,
                place=place,
                rollout_index=rows,
                rewards=rewards,  # the verifier's: classes of the statistics
                advantages=lease_advantages,
                weights=lease_weights,
                prompt_tokens=int(chunk.summary.prompt_tokens[place]),
                completion_tokens=lengths,
            )
        )
    return tuple(result)
