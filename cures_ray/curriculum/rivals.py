"""Rivals of the default, each after its paper: SPO (one rollout and a value tracker), GRESO (skip before rolling out).

BOTS and GPS choose the prompts whose sampled accuracy is nearest one half, as MoPPS does, from other beliefs: they are
the method ``mopps`` with a prior by predictor (benchmarks/harness/arms.py).
"""

from __future__ import annotations

import numpy as np

from cures_ray.config import GresoCurriculum, SpoCurriculum
from cures_ray.curriculum.batches import Batch, Round
from cures_ray.curriculum.planning import equal_shares, outcomes, pilot_round, planned, round_rng
from cures_ray.curriculum.pool import PromptPool
from cures_ray.curriculum.sampling import Draw, potential

SKIPPING_DRAWS = 16  # draws of m prompts within which GRESO looks for m that it does not skip


def spo(pool: PromptPool, batch: Batch) -> Round | None:
    """SPO (2509.13232): m prompts without replacement, with probability ~ sqrt(v (1 - v)) + ``exploration``, N/m
    rollouts each; v is the tracker's mean. ``pilot_rollouts`` offline samples of every prompt start the trackers at
    N_0 = 1 / (1 - rho_min) pseudo-counts; without them they start from Beta(1/2, 1/2). Forgetting: PromptPool."""
    c = pool.settings(SpoCurriculum)
    if any(tracked.role == "train" for tracked in batch.leases):
        return None
    if batch.number == 0 and c.pilot_rollouts:
        if batch.rounds == 0:
            return pilot_round(pool, pool.members)
        pool.belief.rescale(1.0 / (1.0 - c.rho_min))
    rng = round_rng(pool.config, batch)
    weight = potential(pool.belief.mean(pool.members)) + c.exploration
    m = min(c.prompts_per_step, pool.size)
    first = np.argsort(np.log(weight) + rng.gumbel(size=len(weight)), kind="stable")[::-1][:m]  # Gumbel top-m
    draw = Draw(
        index=pool.members[first],
        multiplicity=np.ones(m, np.int64),
        rho=weight[first] / weight.sum(),
        tau=np.inf,
        ess=float(weight.sum() ** 2 / np.square(weight).sum()),
    )
    return planned(pool, draw, equal_shares(pool, draw))


def greso(pool: PromptPool, batch: Batch) -> Round | None:
    """GRESO (2506.02177): as DAPO, but a prompt whose last z visits all had equal rewards is skipped before any rollout
    with probability 1 - p^z. p is kept for all-right and all-wrong streaks apart and follows the share of such groups
    among those that were rolled out (streaks.py)."""
    c = pool.settings(GresoCurriculum)
    m = c.prompts_per_step
    informative = sum(o.draws for o in outcomes(batch.leases).values() if o.informative)
    if batch.rounds:
        batch.metrics["greso_missing_groups"] = float(max(m - informative, 0))
    if batch.rounds >= c.greso_max_rounds or informative >= m:
        return None
    assert pool.streaks is not None
    rng = round_rng(pool.config, batch)
    seen = {tracked.lease.prompt_index for tracked in batch.leases}
    taken: list[int] = []
    passed: list[int] = []  # over
    for _ in range(SKIPPING_DRAWS):
        drawn = pool.draw_uniform(m, rng).index
        fresh = [i for i in drawn.tolist() if i not in seen]
        keep = rng.random(len(fresh)) < pool.streaks.roll(np.array(fresh, np.int64))
        taken += [i for i, one in zip(fresh, keep, strict=True) if one]
        passed += [i for i, one in zip(fresh, keep, strict=True) if not one]
        seen.update(fresh)
        if len(taken) >= m:
            break
    if not taken and batch.rounds == 0:
        taken = passed  # everything is settled: a batch has to have something
    if not taken:
        return None
    index = np.array(taken[:m], np.int64)
    draw = Draw(
        index=index,
        multiplicity=np.ones(len(index), np.int64),
        rho=np.full(len(index), 1.0 / pool.size),
        tau=np.inf,
        ess=float(pool.size),
    )
    n = np.full(len(index), c.rollouts_per_step // m)
    found = planned(pool, draw, n)
    found.weight[:] = 1.0 / m  # informative groups fill m, as in DAPO
    found.metrics["greso_skipped"] = float(len(passed))
    return found
