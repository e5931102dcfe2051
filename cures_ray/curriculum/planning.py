"""What the curriculum methods share: equal shares, bounds, objective weights and the figures of a draw."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from cures_ray.config import Config, CuresCurriculum
from cures_ray.curriculum.allocation import apportion
from cures_ray.curriculum.batches import Batch, Round, TrackedLease
from cures_ray.curriculum.pool import PromptPool, rng_for
from cures_ray.curriculum.sampling import Draw, importance_weights, weight_ess
from cures_ray.messages import Discard

Selection = tuple[np.ndarray, Discard]  # bool [n] to train, and why the others are dropped


@dataclass(frozen=True, slots=True)
class Method:
    """``next_round`` is asked when nothing of the batch is open; None ends the batch. ``select`` answers for
    every lease of the finished batch, in order."""

    next_round: Callable[[PromptPool, Batch], Round | None]
    select: Callable[[PromptPool, Batch], list[Selection]]


def round_rng(config: Config, batch: Batch) -> np.random.Generator:
    return rng_for(config.trainer.seed, batch.number, batch.rounds)


def keep_all(pool: PromptPool, batch: Batch) -> list[Selection]:
    """Everything that was verified; pilots only with ``train_on_pilots``, and only of prompts with a weight in the
    objective: those of a whole subset are mostly not drawn."""
    weighted = {h.lease.prompt_index for h in batch.leases if h.lease.weight > 0}
    if not pool.config.curriculum.trains_pilots:
        weighted.clear()
    return [
        (
            tracked.valid & (tracked.role != "pilot" or tracked.lease.prompt_index in weighted),
            Discard.PILOT if tracked.role == "pilot" else Discard.FILTERED,
        )
        for tracked in batch.leases
    ]


def equal_shares(pool: PromptPool, draw: Draw) -> np.ndarray:
    """N rollouts over the m draws: N/m a draw, and the remainder one each to the first."""
    total = pool.config.curriculum.rollouts_per_step
    return apportion(draw.multiplicity.astype(float), total, 0, total)


def upper_bound(n_max: int, total: int, multiplicity: np.ndarray) -> np.ndarray:
    """n_max a prompt; n_max a *draw* when duplicates leave too few prompts to hold ``total`` rollouts."""
    bound = np.full(len(multiplicity), n_max)
    return bound if bound.sum() >= total else n_max * multiplicity


def objective_weights(pool: PromptPool, draw: Draw) -> tuple[np.ndarray, dict[str, float]]:
    """W_i c_i / m with W_i = (1 / (|D| rho_i))^kappa (ALGORITHMS.md 3.5), [k], and the ESS of W."""
    c = pool.config.curriculum
    kappa = c.importance_weight_power if isinstance(c, CuresCurriculum) else 0.0  # uniform draws need no weights
    importance = importance_weights(draw.rho, pool.size, kappa)
    m = int(draw.multiplicity.sum())
    metrics = {"importance_ess_fraction": weight_ess(importance, draw.multiplicity) / m} if kappa else {}
    return importance * draw.multiplicity / m, metrics


def planned(pool: PromptPool, draw: Draw, n: np.ndarray, role: str = "train") -> Round:
    """The round that gives ``n`` rollouts to the prompts of ``draw``, with the draw's figures."""
    own, metrics = objective_weights(pool, draw)
    metrics |= {
        "ess": draw.ess,
        "ess_fraction": draw.ess / pool.size,
        "distinct_prompts": float(len(draw.index)),
        "max_multiplicity": float(draw.multiplicity.max()),
        "max_n": float(n.max()),
        "min_n": float(n.min()),
    }
    if np.isfinite(draw.tau):
        metrics["tau"] = draw.tau
    return Round(index=draw.index, n=n, weight=own, draws=draw.multiplicity, role=role, metrics=metrics)


def pilot_round(
    pool: PromptPool, index: np.ndarray, weight: np.ndarray | None = None, draws: np.ndarray | None = None
) -> Round:
    """N' rollouts of every prompt. Weight 0 leaves the weight to the lease that the prompt is trained with."""
    n = np.full(len(index), pool.config.curriculum.pilots)
    weight = np.zeros(len(index)) if weight is None else weight
    return Round(index=index, n=n, weight=weight, draws=draws, role="pilot", metrics={"pilot_rollouts": float(n.sum())})


@dataclass(slots=True)
class Outcomes:
    """The valid rollouts of one prompt so far in the batch."""

    weight: float
    draws: int  # multiplicity
    successes: float = 0.0  # sum of rewards
    trials: int = 0
    correct: int = 0  # reward > 0.5
    lowest: float = 1.0
    highest: float = 0.0

    @property
    def mean(self) -> float:
        return self.successes / self.trials if self.trials else 0.0

    @property
    def informative(self) -> bool:
        """Not all rewards are equal: with 0/1 rewards, 0 < mean < 1."""
        return self.highest > self.lowest


def outcomes(leases: list[TrackedLease]) -> dict[int, Outcomes]:
    """By prompt, in order of first appearance."""
    found: dict[int, Outcomes] = {}
    for tracked in leases:
        one = found.setdefault(tracked.lease.prompt_index, Outcomes(tracked.lease.weight, tracked.draws))
        rewards = tracked.rewards[tracked.valid]
        if len(rewards):
            one.successes += float(rewards.sum())
            one.trials += len(rewards)
            one.correct += int((rewards > 0.5).sum())
            one.lowest, one.highest = min(one.lowest, float(rewards.min())), max(one.highest, float(rewards.max()))
    return found


def continued(found: dict[int, Outcomes], each: int) -> Round:
    """``each`` more rollouts a draw of the prompts ``found``."""
    n = np.array([o.draws * each for o in found.values()])
    return Round(
        index=np.array(list(found), np.int64),
        n=n,
        weight=np.array([o.weight for o in found.values()]),
        draws=np.array([o.draws for o in found.values()]),
        metrics={"max_n": float(n.max())},
    )
