"""Thinning: the learner leaves out rollouts that would hardly move the policy; the expected gradient stays the same.

A rollout with a small advantage is no surprise. It is trained with a probability q < 1 at its advantage over q, else
its advantage becomes 0 and the learner computes nothing for it. This file holds all of it:

- which rollouts can move the policy, and which the learner must compute (``moving``, ``computed``); packing, thinning
  and the optimizer ask here and nowhere else,
- the rule (``thinned``) and its level (``thinning_level``),
- what training on a rollout costs, measured on the run itself (``Bottleneck``).

Where the learner may leave nothing out (``may_skip``), thinning would only add variance, so it does nothing.
"""

from __future__ import annotations

import math

import numpy as np

from cures_ray.config import AlgoConfig, Config
from cures_ray.learning.advantages import Groups, split
from cures_ray.messages import TrainingGroup

LEVELS = 64  # thinning levels that are tried
RNG_STREAM = 7  # of the draws of ``thin``
SMOOTHING = 0.3  # share of the newest step in the averages of ``Bottleneck``
WARMUP_STEPS = 2  # engines compile and caches fill


# -- who may leave out what ----------------------------------------------------------------------------


def moving(group: TrainingGroup, algo: AlgoConfig) -> np.ndarray:
    """bool [k]: rollouts whose tokens have a gradient. A KL term gives one to every token."""
    if algo.kl_coef > 0:
        return group.completion_tokens > 0
    return (group.completion_tokens > 0) & (group.advantages != 0)


def takes_statistics(config: Config) -> bool:
    """Whether the learner measures the last layer's gradient of every rollout, those without an advantage included."""
    return config.curriculum.measures_gradients


def may_skip(config: Config) -> bool:
    """Whether the learner computes nothing for a rollout of advantage 0."""
    return config.algo.kl_coef == 0 and not takes_statistics(config)


def computed(group: TrainingGroup, config: Config) -> np.ndarray:
    """bool [k]: rollouts that the learner computes. The others count as trained all the same."""
    return group.completion_tokens > 0 if takes_statistics(config) else moving(group, config.algo)


# -- the rule and its level ----------------------------------------------------------------------------


def thin(advantages: Groups, config: Config, version: int, train_cost: float | None = None) -> Groups:
    """The advantages of a batch, thinned where that saves work. ``train_cost`` (of a rollout, generating one = 1)
    chooses the level if it is known, else ``algo.min_advantage`` is the level. ``version`` seeds the draws."""
    if not may_skip(config):
        return advantages
    level = smallest_advantage(config.algo)
    if train_cost is not None:
        level = thinning_level(advantages, train_cost, overlap=config.async_rl.max_staleness > 0)
    return thinned(advantages, level, np.random.default_rng([config.trainer.seed, version, RNG_STREAM]))


def smallest_advantage(algo: AlgoConfig) -> float:
    """The level without a train cost: ``min_advantage``, by default 0.3 for posterior_std and 0 for the others."""
    if algo.min_advantage is not None:
        return algo.min_advantage
    return 0.3 if algo.advantage == "posterior_std" else 0.0


def thinned(advantages: Groups, level: float, rng: np.random.Generator) -> Groups:
    """Advantages below ``level`` in size become +-level with probability |A| / level, else 0: the same expectation."""
    if not level:
        return advantages
    a = np.concatenate([*advantages, np.zeros(0)])
    keep = rng.random(len(a)) * level < np.abs(a)
    result = np.where(np.abs(a) >= level, a, np.where(keep, np.sign(a) * level, 0.0))
    return split(result, [len(group) for group in advantages])


def thinning_level(advantages: Groups, train_cost: float, *, overlap: bool) -> float:
    """The level of ``thinned`` that buys the least gradient noise for the cost of a batch.

    A rollout trained with probability q = min(1, |A| / level) at A / q adds A^2 / q = max(A^2, level |A|) to the
    gradient's second moment. It costs 1 to generate and q ``train_cost`` to train on. Noise falls with the number of
    rollouts, and these with their cost: for equal money the product of both counts. Levels between 0 and the largest
    |A| are tried.

    Args:
        train_cost: of one rollout, generating one = 1.
        overlap: generation goes on while the learner trains, so that a step takes the longer of the two.
    """
    size = np.abs(np.concatenate([np.asarray(a, float) for a in advantages])) if advantages else np.zeros(0)
    if not len(size) or size.max() == 0:
        return 0.0
    levels = size.max() * np.arange(1, LEVELS + 1)[:, None] / LEVELS
    noise = np.maximum(size**2, levels * size).mean(1)
    trained = np.minimum(1.0, size / levels).mean(1)
    cost = np.maximum(1.0, train_cost * trained) if overlap else 1.0 + train_cost * trained
    return float(levels[np.argmin(noise * cost), 0])


# -- what training costs -------------------------------------------------------------------------------


class Bottleneck:
    """Averages of wall seconds a rollout. Where the learner is the bottleneck fewer, larger advantages are trained;
    where generation is, nearly all of them.

    Args:
        setting: ``algo.train_cost``: None (never known), a number (given) or "measured".
    """

    def __init__(self, setting: float | str | None) -> None:
        self.setting, self._steps = setting, 0
        self._generate = self._train = math.nan  # seconds a rollout

    def observe(self, *, generate_seconds: float, generated: int, train_seconds: float, computed: int) -> None:
        """One step: seconds in which generators were busy (mean over them) and the learner computed, and the
        rollouts that came of it."""
        self._steps += 1
        if self._steps <= WARMUP_STEPS or not generated or not computed:
            return
        self._generate = _average(self._generate, generate_seconds / generated)
        self._train = _average(self._train, train_seconds / computed)

    @property
    def train_cost(self) -> float | None:
        """Of one rollout, generating one = 1. None while it is not known."""
        if self.setting is None or isinstance(self.setting, int | float):
            return self.setting
        if math.isnan(self._generate):
            return None
        return self._train / max(self._generate, 1e-9)


def _average(old: float, new: float) -> float:
    return new if math.isnan(old) else old + SMOOTHING * (new - old)
