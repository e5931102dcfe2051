"""Curriculum methods: which prompts, how many rollouts, in which rounds, and which rollouts are trained.

A method is two functions over one batch. ``next_round`` plans round 0 from the beliefs and every later round
from the settled outcomes of the batch, None when there is nothing more to generate; ``select`` says which
rollouts are trained. Neither keeps state: what happened is in the batch, what is believed in the pool. Random
numbers come from (seed, batch, round) alone, so a plan can be recomputed.

Methods whose rounds depend on the rewards of the same batch are in methods_rounds.py.
"""

from __future__ import annotations

import numpy as np

from cures_ray.config import CuresCurriculum, GvmCurriculum, KnapsackCurriculum, MoppsCurriculum
from cures_ray.curriculum.allocation import (
    apportion,
    cost_aware,
    gvm_weights,
    impute,
    knapsack,
    rloo_gain,
    sigma_bernoulli,
    sigma_for,
)
from cures_ray.curriculum.batches import Batch, Round
from cures_ray.curriculum.planning import (
    Method,
    equal_shares,
    keep_all,
    objective_weights,
    outcomes,
    pilot_round,
    planned,
    round_rng,
    upper_bound,
)
from cures_ray.curriculum.pool import PromptPool
from cures_ray.curriculum.rivals import greso, spo
from cures_ray.curriculum.rounds import dapo, dapo_select, reinforce_ada, reinforce_ada_select, speed, speed_select
from cures_ray.curriculum.sampling import Draw


def uniform(pool: PromptPool, batch: Batch) -> Round | None:
    """m uniform prompts, N/m rollouts each: GRPO, Dr.GRPO, RLOO and REINFORCE++ differ in the advantage."""
    if batch.rounds:
        return None
    draw = pool.draw_uniform(pool.config.curriculum.prompts_per_step, round_rng(pool.config, batch))
    return planned(pool, draw, equal_shares(pool, draw))


# -- CurES ------------------------------------------------------------------------------------------


def cures(pool: PromptPool, batch: Batch) -> Round | None:
    """Algorithm 1. A subset (belief = reset) starts with N' pilots of all its prompts, in its first batch; then
    m draws ~ rho* (eq. 14) share N rollouts by sigma (eq. 20). Other beliefs have pilots, if any, once."""
    c = pool.settings(CuresCurriculum)
    if any(tracked.role == "train" for tracked in batch.leases):
        return None
    if batch.rounds == 0:
        switch = c.belief == "reset" and batch.number % c.subset_steps == 0
        if switch:
            pool.enter_subset(batch.number // c.subset_steps)
        if c.pilot_rollouts and (switch or (c.belief != "reset" and batch.number == 0)):
            return pilot_round(pool, pool.members)
    rng = round_rng(pool.config, batch)
    draw = (pool.draw if c.sampling == "potential" else pool.draw_uniform)(c.prompts_per_step, rng)
    return planned(pool, draw, allocate(pool, draw))


def allocate(pool: PromptPool, draw: Draw) -> np.ndarray:
    """n_i of the drawn prompts, int [k]: sum N exactly, within n_min .. n_max, n_i ~ W_i c_i sigma_i (eq. 20).

    ``sigma: bernoulli`` is the paper's sqrt(p(1-p)) for every advantage; ``last_layer`` follows the advantage
    in use, with the cached moments at the current posterior mean.
    """
    c = pool.settings(CuresCurriculum)
    if c.allocation == "uniform":
        return equal_shares(pool, draw)
    p, total = pool.belief.mean(draw.index), c.rollouts_per_step
    high = upper_bound(c.n_max, total, draw.multiplicity)
    weight, _ = objective_weights(pool, draw)
    measured = pool.belief.moments(draw.index) if c.sigma == "last_layer" else None
    if c.allocation == "rloo_gain" and 2 * len(p) <= total:
        return rloo_gain(p, measured, weight * c.prompts_per_step, total, max(c.n_min, 2), np.maximum(high, 2))
    if measured is None:
        sigma = sigma_bernoulli(p)
    else:
        sigma = sigma_for(pool.config.algo.advantage, p, measured, pool.belief.pooled_moments())
    if c.allocation == "cost_aware":
        sigma = cost_aware(sigma, pool.costs(draw.index))
    return apportion(weight * sigma, total, c.n_min, high)


# -- relatives that plan from beliefs or pilots -------------------------------------------------------


def gvm(pool: PromptPool, batch: Batch) -> Round | None:
    """GVM (2505.02391): N' pilots of m uniform prompts, then n_i ~ c_i G_i / sqrt(p + alpha / p^(beta-1)), p the
    pilots' raw accuracy. G_i is sqrt(M+) of the prompt's cached last-layer statistics (the paper measures it on the
    pilots) with ``sigma: last_layer``, imputed where it has none, else 1. p = 0 or G = 0 gets nothing; when no prompt
    qualifies all get the same."""
    c = pool.settings(GvmCurriculum)
    if batch.rounds == 0:
        draw = pool.draw_uniform(c.prompts_per_step, round_rng(pool.config, batch))
        weight, _ = objective_weights(pool, draw)
        return pilot_round(pool, draw.index, weight, draw.multiplicity)
    if batch.rounds > 1:
        return None
    found = outcomes(batch.leases)
    index = np.array(list(found), np.int64)
    draws = np.array([o.draws for o in found.values()])
    norm = np.ones(len(index))
    if c.sigma == "last_layer":
        norm = np.sqrt(impute(pool.belief.moments(index), pool.belief.pooled_moments()).m_plus)
    shares = draws * gvm_weights(np.array([o.mean for o in found.values()]), norm, c.gvm_alpha, c.gvm_beta)
    live = shares > 0
    high = np.where(live, c.n_max * draws, 0) if live.any() else c.n_max * draws
    n = apportion(shares, min(c.rollouts_per_step, int(high.sum())), 0, high)
    weight = np.array([o.weight for o in found.values()])
    figures = {"distinct_prompts": float(len(index)), "max_n": float(n.max()), "min_n": float(n.min())}
    return Round(index=index, n=n, weight=weight, metrics=figures | {"gvm_without_success": float((~live).mean())})


def knapsack_rl(pool: PromptPool, batch: Batch) -> Round | None:
    """Knapsack RL (2509.25849): uniform prompts; n_i maximise sum (1 - p^n - (1-p)^n) p (1-p)^2, same total."""
    if batch.rounds:
        return None
    c = pool.settings(KnapsackCurriculum)
    draw = pool.draw_uniform(c.prompts_per_step, round_rng(pool.config, batch))
    high = upper_bound(c.n_max, c.rollouts_per_step, draw.multiplicity)
    p = pool.belief.mean(draw.index)
    return planned(pool, draw, knapsack(p, draw.multiplicity.astype(float), c.rollouts_per_step, max(c.n_min, 1), high))


def mopps(pool: PromptPool, batch: Batch) -> Round | None:
    """MoPPS (2507.04632): one Thompson draw of the accuracy for each of ``mopps_pool_factor`` m candidates; the m
    nearest ``mopps_target`` get N/m rollouts each. No pilots; beliefs discounted (``belief: discount``)."""
    if batch.rounds:
        return None
    c = pool.settings(MoppsCurriculum)
    rng = round_rng(pool.config, batch)
    size = min(c.mopps_pool_factor * c.prompts_per_step, pool.size)
    candidates = rng.choice(pool.size, size, replace=False)
    sampled = pool.belief.sample(rng, candidates)
    index = candidates[np.argsort(np.abs(sampled - c.mopps_target), kind="stable")[: c.prompts_per_step]]
    n = apportion(np.ones(len(index)), c.rollouts_per_step, 0, c.rollouts_per_step)
    figures = {"distinct_prompts": float(len(index)), "max_n": float(n.max()), "min_n": float(n.min())}
    return Round(index=index, n=n, weight=np.full(len(index), 1.0 / len(index)), metrics=figures)


METHODS: dict[str, Method] = {
    "uniform": Method(uniform, keep_all),
    "cures": Method(cures, keep_all),
    "gvm": Method(gvm, keep_all),
    "dapo": Method(dapo, dapo_select),
    "speed": Method(speed, speed_select),
    "mopps": Method(mopps, keep_all),
    "reinforce_ada": Method(reinforce_ada, reinforce_ada_select),
    "knapsack": Method(knapsack_rl, keep_all),
    "spo": Method(spo, keep_all),
    "greso": Method(greso, dapo_select),
}
