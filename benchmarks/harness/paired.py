"""Paired comparisons over seeds, with their power (PROTOCOL.md)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

LEVEL, POWER = 0.05, 0.8
MOST_SEEDS = 10_000


@dataclass(frozen=True, slots=True)
class Paired:
    """Differences over seeds: their mean with Student's 95 % interval, two-sided p, and what could have been found."""

    seeds: int
    mean: float
    low: float
    high: float
    sd: float  # of the differences
    p: float

    @property
    def detectable(self) -> float:
        """The difference that this many seeds find with probability POWER."""
        return _detectable(self.sd, self.seeds)

    def seeds_for(self, difference: float) -> int:
        """The least number of seeds that finds ``difference`` with probability POWER."""
        for n in range(2, MOST_SEEDS):
            if _detectable(self.sd, n) <= difference:
                return n
        return MOST_SEEDS

    def text(self) -> str:
        return f"{self.mean:+.3f} [{self.low:+.3f}, {self.high:+.3f}]"


def paired(one: np.ndarray, two: np.ndarray) -> Paired:
    """``one`` - ``two``, [seeds] each, in the same order. Raises ValueError for fewer than two pairs."""
    difference = np.asarray(one, float) - np.asarray(two, float)
    n = len(difference)
    if n < 2:
        raise ValueError(f"a paired comparison needs two seeds, not {n}")
    mean, sd = float(difference.mean()), float(difference.std(ddof=1))
    half = float(stats.t.ppf(1 - LEVEL / 2, n - 1)) * sd / np.sqrt(n)
    p = float(stats.ttest_1samp(difference, 0.0).pvalue) if sd > 0 else float(mean == 0)
    return Paired(seeds=n, mean=mean, low=mean - half, high=mean + half, sd=sd, p=p)


def holm(p: Sequence[float]) -> list[float]:
    """Holm's step-down adjusted p-values, in the order given."""
    order = np.argsort(p, kind="stable")
    adjusted, largest = np.empty(len(p)), 0.0
    for place, i in enumerate(order):
        largest = max(largest, min(1.0, (len(p) - place) * p[i]))
        adjusted[i] = largest
    return adjusted.tolist()


def mean_accuracy(curve: Sequence[dict[str, Any]], kind: str, budget: float) -> float:
    """Area under ``kind`` (greedy or sampled) over rollouts up to ``budget``, divided by it: trapezoids between the
    evaluations, the last one held to the end."""
    cost = np.array([point["rollouts"] for point in curve], float)
    accuracy = np.array([point[kind] for point in curve], float)
    inside = cost < budget
    x = np.r_[cost[inside], budget]
    y = np.r_[accuracy[inside], np.interp(budget, cost, accuracy)]
    return float(np.trapezoid(y, x) / (budget - x[0])) if budget > x[0] else float(y[-1])


def _detectable(sd: float, n: int) -> float:
    quantiles = stats.t.ppf(1 - LEVEL / 2, n - 1) + stats.t.ppf(POWER, n - 1)
    return float(quantiles * sd / np.sqrt(n))
