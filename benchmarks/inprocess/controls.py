"""Controls that are no configuration: coin-flip rewards, beliefs that are the truth, and features that tell nothing."""

from __future__ import annotations

import numpy as np

from cures_ray.curriculum.machine import Curriculum

COIN = 0.5  # probability of a reward in the random-reward control: the most variance there is
PERMUTATION = 5  # random stream of ``permuted``
CERTAINTY = 1000.0  # alpha + beta of an oracle's belief


def tell_truth(curriculum: Curriculum, accuracy: np.ndarray) -> None:
    """Replace every belief by ``accuracy`` [prompts], with a certainty that evidence does not move."""
    pool = curriculum.pool
    p = np.clip(accuracy, 1e-3, 1 - 1e-3)
    pool.belief.set_prior(None, CERTAINTY * p, CERTAINTY * (1 - p))
    pool.belief.reset()
    pool._samplers.clear()  # every prompt moved: building anew is cheaper than moving all
    pool._dirty.clear()


def permuted(
    seed: int, count: int, levels: np.ndarray | None, features: np.ndarray | None
) -> tuple[np.ndarray | None, np.ndarray | None]:
    """``levels`` [N] and ``features`` [N, d] in one random order: each prompt has those of another one."""
    order = np.random.default_rng([seed, PERMUTATION]).permutation(count)
    return (None if levels is None else levels[order]), (None if features is None else features[order])
