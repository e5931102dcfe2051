"""Methods that decide from rewards of the same batch: DAPO, SPEED-RL, Reinforce-Ada.

Such a rule biases the group mean (ALGORITHMS.md 3.6); these methods are defined so. Their cost is everything
they generate: what is not trained is charged as SCREENED, FILTERED or SURPLUS.
"""

from __future__ import annotations

import numpy as np

from cures_ray.config import AdaCurriculum, DapoCurriculum, SpeedCurriculum
from cures_ray.curriculum.batches import Batch, Round, TrackedLease
from cures_ray.curriculum.planning import Selection, continued, equal_shares, outcomes, planned, round_rng
from cures_ray.curriculum.pool import PromptPool
from cures_ray.messages import Discard


def dapo(pool: PromptPool, batch: Batch) -> Round | None:
    """DAPO's dynamic sampling (2503.14476): draws of m prompts x N/m rollouts until m groups are informative
    (0 < mean reward < 1), at most ``dapo_max_rounds`` draws. Prompts already in the batch are not drawn again.
    With too few informative groups the batch is trained as it is (weight still 1/m a group) and the metric
    ``dapo_missing_groups`` counts what lacks."""
    c = pool.settings(DapoCurriculum)
    informative = _informative(batch)
    if batch.rounds:
        batch.metrics["dapo_missing_groups"] = float(max(c.prompts_per_step - informative, 0))
    if batch.rounds >= c.dapo_max_rounds or informative >= c.prompts_per_step:
        return None
    draw = pool.draw_uniform(c.prompts_per_step, round_rng(pool.config, batch))
    seen = {tracked.lease.prompt_index for tracked in batch.leases}
    fresh = np.array([i not in seen for i in draw.index.tolist()], bool)
    if not fresh.any():
        return None
    return planned(pool, draw, np.where(fresh, equal_shares(pool, draw), 0))


def _informative(batch: Batch) -> int:
    return sum(o.draws for o in outcomes(batch.leases).values() if o.informative)


def dapo_select(pool: PromptPool, batch: Batch) -> list[Selection]:
    """The first informative groups that fill m; groups of equal rewards are FILTERED, the rest SURPLUS."""
    left = pool.config.curriculum.prompts_per_step
    fate: dict[int, tuple[bool, Discard]] = {}
    for index, o in outcomes(batch.leases).items():
        if not o.informative:
            fate[index] = (False, Discard.FILTERED)
        elif o.draws <= left:
            fate[index] = (True, Discard.FILTERED)
            left -= o.draws
        else:
            fate[index] = (False, Discard.SURPLUS)
    return [_all_or_none(tracked, *fate[tracked.lease.prompt_index]) for tracked in batch.leases]


def speed(pool: PromptPool, batch: Batch) -> Round | None:
    """SPEED-RL (2506.09016, withdrawn by its authors): screen m uniform prompts with ``speed_screen_rollouts``
    each, continue with ``speed_continue_rollouts`` where 0 < pass rate < 1. Screens of continued prompts are
    trained too. The batch therefore has its own number of rollouts, not N."""
    c = pool.settings(SpeedCurriculum)
    if batch.rounds == 0:
        draw = pool.draw_uniform(c.prompts_per_step, round_rng(pool.config, batch))
        return planned(pool, draw, draw.multiplicity * c.speed_screen_rollouts, role="screen")
    if batch.rounds > 1:
        return None
    found = {i: o for i, o in outcomes(batch.leases).items() if o.informative}
    batch.metrics["speed_qualified"] = float(sum(o.draws for o in found.values()) / c.prompts_per_step)
    if not found:
        return None
    return continued(found, c.speed_continue_rollouts)


def speed_select(pool: PromptPool, batch: Batch) -> list[Selection]:
    screened = outcomes([tracked for tracked in batch.leases if tracked.role == "screen"])
    return [_all_or_none(h, screened[h.lease.prompt_index].informative, Discard.SCREENED) for h in batch.leases]


def reinforce_ada(pool: PromptPool, batch: Batch) -> Round | None:
    """Reinforce-Ada (2510.04996): up to ``ada_max_rounds`` rounds of ``ada_round_rollouts`` a prompt; a prompt
    stops once it has half of ``ada_keep_rollouts`` of both outcomes."""
    c = pool.settings(AdaCurriculum)
    if batch.rounds == 0:
        draw = pool.draw_uniform(c.prompts_per_step, round_rng(pool.config, batch))
        return planned(pool, draw, draw.multiplicity * c.ada_round_rollouts)
    if batch.rounds >= c.ada_max_rounds:
        return None
    enough = c.ada_keep_rollouts // 2
    active = {
        i: o for i, o in outcomes(batch.leases).items() if min(o.correct, o.trials - o.correct) < enough * o.draws
    }
    return continued(active, c.ada_round_rollouts) if active else None


def reinforce_ada_select(pool: PromptPool, batch: Batch) -> list[Selection]:
    """A balanced ``ada_keep_rollouts`` a draw: half of each outcome, filled from the other where one is short.
    The rest is FILTERED, with its rewards in the entry, so that the baseline is the mean over all that were
    drawn (assemble.py). Prompts with one outcome only are filtered whole: their advantages are 0."""
    quota: dict[int, list[int]] = {}  # prompt -> how many [wrong, correct] are still to be kept
    for index, o in outcomes(batch.leases).items():
        keep = pool.settings(AdaCurriculum).ada_keep_rollouts * o.draws if o.informative else 0
        wrong = o.trials - o.correct
        correct = min(o.correct, max(keep // 2, keep - wrong))
        quota[index] = [min(wrong, keep - correct), correct]
    selections: list[Selection] = []
    for tracked in batch.leases:
        left = quota[tracked.lease.prompt_index]
        keep_mask = np.zeros(tracked.lease.n, bool)
        for outcome, right in enumerate((tracked.rewards <= 0.5, tracked.rewards > 0.5)):
            rows = np.flatnonzero(tracked.valid & right)[: left[outcome]]
            keep_mask[rows] = True
            left[outcome] -= len(rows)
        selections.append((keep_mask, Discard.FILTERED))
    return selections


def _all_or_none(tracked: TrackedLease, train: bool, reason: Discard) -> Selection:
    return tracked.valid & train, reason
