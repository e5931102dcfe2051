"""Curriculum methods: which prompts, how many rollouts, in which rounds, and which rollouts are trained.

A method is two functions over one batch. ``next_round`` plans round 0 from the beliefs and every later round
from the settled outcomes of the batch, None when there is nothing more to generate; ``select`` says which
rollouts are trained. Neither keeps state: what happened is in the batch, what is believed in the pool. Random
numbers come from (seed, batch, round) alone, so a plan can be recomputed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from cures_ray.allocation import apportion, sigma_bernoulli
from cures_ray.batches import Batch, Held, Round
from cures_ray.config import Config
from cures_ray.messages import Discard
from cures_ray.pool import PromptPool, generator
from cures_ray.sampling import Draw, importance_weights, weight_ess

Selection = tuple[np.ndarray, Discard]  # bool [n], and why the others are dropped
NextRound = Callable[[PromptPool, Batch], Round | None]
Select = Callable[[PromptPool, Batch], list[Selection]]


@dataclass(frozen=True, slots=True)
class Method:
    next_round: NextRound
    select: Select = field(default_factory=lambda: keep_all)


def round_rng(config: Config, batch: Batch) -> np.random.Generator:
    return generator(config.trainer.seed, batch.number, batch.rounds)


def keep_all(pool: PromptPool, batch: Batch) -> list[Selection]:
    """Everything that was verified; pilots only with ``train_on_pilots``."""
    all_train = pool.config.curriculum.train_on_pilots
    return [
        (held.valid & (all_train or held.role != "pilot"), Discard.PILOT if held.role == "pilot" else Discard.FILTERED)
        for held in batch.leases
    ]


def draw_metrics(pool: PromptPool, draw: Draw, n: np.ndarray) -> dict[str, float]:
    return {
        "tau": draw.tau,
        "ess": draw.ess,
        "ess_fraction": draw.ess / pool.size,
        "distinct_prompts": float(len(draw.index)),
        "max_multiplicity": float(draw.multiplicity.max()),
        "max_n": float(n.max()),
        "min_n": float(n.min()),
    }


def objective_weights(pool: PromptPool, draw: Draw) -> tuple[np.ndarray, dict[str, float]]:
    """W_i c_i / m with W_i = (1 / (|D| rho_i))^kappa (ALGORITHMS.md 3.5), [k], and the ESS of W."""
    kappa = pool.config.curriculum.importance_weight_power
    importance = importance_weights(draw.rho, pool.size, kappa)
    m = int(draw.multiplicity.sum())
    metrics = {"importance_ess_fraction": weight_ess(importance, draw.multiplicity) / m} if kappa else {}
    return importance * draw.multiplicity / m, metrics


def equal_shares(pool: PromptPool, draw: Draw) -> np.ndarray:
    """N rollouts over the draws, N/m a draw."""
    return apportion(draw.multiplicity.astype(float), pool.config.curriculum.rollouts_per_step, 1)


def upper_bound(config: Config, multiplicity: np.ndarray) -> np.ndarray:
    """n_max a prompt; n_max a *draw* when duplicates leave too few prompts to hold N."""
    c = config.curriculum
    bound = np.full(len(multiplicity), c.n_max)
    return bound if bound.sum() >= c.rollouts_per_step else c.n_max * multiplicity


# -- uniform (GRPO, REINFORCE++ and their kin) -------------------------------------------------------


def uniform(pool: PromptPool, batch: Batch) -> Round | None:
    if batch.rounds:
        return None
    draw = pool.draw_uniform(pool.config.curriculum.prompts_per_step, round_rng(pool.config, batch))
    n = equal_shares(pool, draw)
    weight, _ = objective_weights(pool, draw)
    return Round(index=draw.index, n=n, weight=weight, metrics=draw_metrics(pool, draw, n))


# -- CurES ------------------------------------------------------------------------------------------


def cures(pool: PromptPool, batch: Batch) -> Round | None:
    """Algorithm 1. A subset (belief = reset) starts with pilots of all its prompts, in its first batch; then
    m draws ~ rho* (eq. 14) share N rollouts by sigma (eq. 20)."""
    c = pool.config.curriculum
    drawn = any(held.role == "train" for held in batch.leases)
    if drawn:
        return None
    if batch.rounds == 0:
        switch = c.belief == "reset" and batch.number % c.subset_steps == 0
        if switch:
            pool.enter_subset(batch.number // c.subset_steps)
        if c.pilot_rollouts and (switch or (c.belief != "reset" and batch.number == 0)):
            return pilot_round(pool, pool.members)
    rng = round_rng(pool.config, batch)
    draw = (pool.draw if c.sampling == "potential" else pool.draw_uniform)(c.prompts_per_step, rng)
    weight, metrics = objective_weights(pool, draw)
    n = allocate(pool, draw, weight)
    return Round(index=draw.index, n=n, weight=weight, metrics=draw_metrics(pool, draw, n) | metrics)


def pilot_round(pool: PromptPool, index: np.ndarray, weight: np.ndarray | None = None) -> Round:
    """N' rollouts of every prompt. Weight 0: a trained pilot joins the group of its prompt, whose weight counts."""
    n = np.full(len(index), pool.config.curriculum.pilot_rollouts)
    zeros = np.zeros(len(index)) if weight is None else weight
    return Round(index=index, n=n, weight=zeros, role="pilot", metrics={"pilot_rollouts": float(n.sum())})


def allocate(pool: PromptPool, draw: Draw, weight: np.ndarray) -> np.ndarray:
    """n_i of the drawn prompts: sum N exactly, within n_min .. n_max. int [k]."""
    c = pool.config.curriculum
    if c.allocation == "uniform":
        return equal_shares(pool, draw)
    high = upper_bound(pool.config, draw.multiplicity)
    return apportion(weight * sigma_bernoulli(pool.mean(draw.index)), c.rollouts_per_step, c.n_min, high)


# -- MoPPS (2507.04632) -----------------------------------------------------------------------------


def mopps(pool: PromptPool, batch: Batch) -> Round | None:
    """Thompson draw of the accuracy of a candidate pool; the m nearest the target. No pilots."""
    if batch.rounds:
        return None
    c = pool.config.curriculum
    rng = round_rng(pool.config, batch)
    members = pool.members
    size = min(c.mopps_pool_factor * c.prompts_per_step, len(members))
    candidates = members[rng.choice(len(members), size, replace=False)]
    sampled = pool.belief.sample(rng, candidates)
    index = candidates[np.argsort(np.abs(sampled - c.mopps_target), kind="stable")[: c.prompts_per_step]]
    n = apportion(np.ones(len(index)), c.rollouts_per_step, 1)
    metrics = {"distinct_prompts": float(len(index)), "max_n": float(n.max()), "min_n": float(n.min())}
    return Round(index=index, n=n, weight=np.full(len(index), 1.0 / len(index)), metrics=metrics)


def settled_means(leases: list[Held]) -> np.ndarray:
    """Mean reward of each lease's valid rollouts, NaN where there are none. float [k]."""
    return np.array([h.rewards[h.valid].mean() if h.valid.any() else np.nan for h in leases])


METHODS: dict[str, Method] = {
    "uniform": Method(uniform),
    "cures": Method(cures),
    "mopps": Method(mopps),
}
