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

from collections import Counter
from dataclasses import dataclass

import numpy as np

from cures_ray.config import Config
from cures_ray.learning.advantages import compute_advantages, overlong_penalty, token_weights
from cures_ray.learning.thinning import thin
from cures_ray.loop.chunks import Place
from cures_ray.messages import BatchEntry, BatchPlan, CommitReport, Discard, RunError, TrainingBatch, TrainingGroup


@dataclass(frozen=True, slots=True)
class _Leased:
    """One lease of the plan with the fate of its n rollouts."""

    entry: BatchEntry
    lengths: np.ndarray  # int [n]
    trained: np.ndarray  # bool [n]
    baseline: np.ndarray  # bool [n]: enters the group's baseline; a superset of trained
    discarded: dict[Discard, int]


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
    oldest = version - config.async_rl.max_staleness
    leases = [_sort_out(entry, groups.get(entry.lease.lease_id), oldest) for entry in plan.entries]
    by_prompt: dict[str, list[_Leased]] = {}
    for leased in leases:
        by_prompt.setdefault(leased.entry.lease.prompt_id, []).append(leased)
    prompts = [prompt_leases for prompt_leases in by_prompt.values() if any(x.trained.any() for x in prompt_leases)]
    batch = TrainingBatch(step=version, groups=_training_groups(prompts, groups, config, version, train_cost))
    trained = {leased.entry.lease.lease_id: int(np.count_nonzero(leased.trained)) for leased in leases}
    discarded = {leased.entry.lease.lease_id: leased.discarded for leased in leases if leased.discarded}
    return batch, CommitReport(batch=plan.batch, trained=trained, discarded=discarded)


def _sort_out(entry: BatchEntry, group: Place | None, oldest: int) -> _Leased:
    """Which rollouts of one lease are trained, and why the others are not."""
    n = len(entry.rewards)
    if group is None:
        nothing = np.zeros(n, bool)
        return _Leased(entry, np.zeros(n, int), nothing, nothing, {Discard.LOST: n} if n else {})
    chunk, place = group
    summary, rows = chunk.summary, slice(chunk.starts[place], chunk.starts[place + 1])
    if int(summary.n[place]) != n:
        raise RunError(
            f"lease {entry.lease.lease_id}: the plan has {n} rollouts and its chunk {summary.n[place]}; ledger and "
            f"generator disagree"
        )
    failed = chunk.fault[rows] | summary.failed[place]
    keep = np.asarray(entry.keep, bool)
    stale = summary.min_version[rows] < oldest
    trained = ~failed & keep & ~stale
    in_group = keep if entry.drop_reason is not Discard.FILTERED else np.ones(n, bool)
    if trained.all():  # nearly always
        return _Leased(entry, summary.completion_tokens[rows], trained, trained, {})
    counts = Counter(
        {
            Discard.GENERATION_FAULT if summary.failed[place] else Discard.VERIFIER_FAULT: int(failed.sum()),
            Discard.STALE: int((~failed & keep & stale).sum()),
        }
    )
    counts[entry.drop_reason] += int((~failed & ~keep).sum())
    discarded = {reason: count for reason, count in counts.items() if count}
    return _Leased(entry, summary.completion_tokens[rows], trained, ~failed & in_group & ~stale, discarded)


def _training_groups(
    prompts: list[list[_Leased]],
    groups: dict[int, Place],
    config: Config,
    version: int,
    train_cost: float | None,
) -> tuple[TrainingGroup, ...]:
    """One TrainingGroup a lease with trained rollouts; baseline and n_i over all leases of its prompt."""
    algo, limit = config.algo, config.rollout.max_new_tokens
    shaped = [
        np.concatenate([_shaped_rewards(leased, limit, algo.overlong_penalty_tokens) for leased in prompt_leases])
        for prompt_leases in prompts
    ]
    beliefs = [_first_in_baseline(prompt_leases).entry.lease for prompt_leases in prompts]
    advantages = compute_advantages(
        algo.advantage,
        shaped,
        np.array([lease.alpha for lease in beliefs]),
        np.array([lease.beta for lease in beliefs]),
        algo.advantage_std_eps,
        whiten=not algo.kl_in_reward,
        lengths=[np.concatenate([one.lengths[one.baseline] for one in merged]) for merged in prompts],
    )
    advantages = thin(advantages, config, version, train_cost)
    weights = token_weights(
        algo.loss_length,
        # all leases of a prompt carry the prompt's weight; it counts once
        np.array([max(x.entry.lease.weight for x in prompt_leases) for prompt_leases in prompts]),
        [np.concatenate([x.lengths[x.trained] for x in prompt_leases]) for prompt_leases in prompts],
        limit,
    )
    result = []
    for prompt_leases, prompt_advantages, prompt_weights in zip(prompts, advantages, weights, strict=True):
        in_baseline, in_loss = 0, 0  # rollouts of the prompt's earlier leases
        for leased in prompt_leases:
            rows = np.flatnonzero(leased.trained)
            lease_advantages = prompt_advantages[in_baseline : in_baseline + int(np.count_nonzero(leased.baseline))]
            in_baseline += len(lease_advantages)
            lease_weights = prompt_weights[in_loss : in_loss + len(rows)]
            in_loss += len(rows)
            if len(rows):
                trained_advantages = lease_advantages[leased.trained[leased.baseline]]
                result.append(_group(leased, groups, rows, trained_advantages, lease_weights))
    return tuple(result)


def _first_in_baseline(prompt_leases: list[_Leased]) -> _Leased:
    """The lease whose belief is the prior of the baseline: from before any rollout that enters it. That of a later
    lease has counted pilots which are not trained, as evidence of their own."""
    return next(leased for leased in prompt_leases if leased.baseline.any())


def _group(
    leased: _Leased, groups: dict[int, Place], rows: np.ndarray, advantages: np.ndarray, weights: np.ndarray
) -> TrainingGroup:
    chunk, place = groups[leased.entry.lease.lease_id]
    return TrainingGroup(
        lease_id=leased.entry.lease.lease_id,
        payload=chunk.payload,
        place=place,
        rollout_index=(chunk.starts[place] + rows).astype(np.int32),
        rewards=np.asarray(leased.entry.rewards, np.float32)[rows],  # the verifier's: classes of the statistics
        advantages=advantages.astype(np.float32),
        weights=weights.astype(np.float32),
        prompt_tokens=int(chunk.summary.prompt_tokens[place]),
        completion_tokens=leased.lengths[rows].astype(np.int32),
    )


def _shaped_rewards(leased: _Leased, max_new_tokens: int, penalty_tokens: int) -> np.ndarray:
    """Rewards that enter the baseline, with the overlong penalty: float64 [number in the baseline]."""
    penalty = overlong_penalty(leased.lengths, max_new_tokens, penalty_tokens)
    return (np.asarray(leased.entry.rewards, np.float64) + penalty)[leased.baseline]
