"""Learning curves to figures: smoothing, cost to reach an accuracy, paired bootstrap over seeds (BENCHMARKS.md).

A curve is accuracy [K] over a cost axis [K]. Seeds are paired: the methods of one seed share initial weights,
prompts and evaluation draws, so they are resampled together.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.stats import t

SMOOTHING = 3  # evaluations, centred
RESAMPLES = 4000
LEAST_GAIN = 1e-6  # of accuracy; a baseline that gains less has nothing to be reached


@dataclass(frozen=True, slots=True)
class Curve:
    """One run on one cost axis. ``cost`` is non-decreasing; ``accuracy`` is as measured."""

    cost: np.ndarray  # float [K]
    accuracy: np.ndarray  # float [K]

    @property
    def smoothed(self) -> np.ndarray:
        return smooth(self.accuracy)

    def at(self, cost: float | np.ndarray) -> np.ndarray:
        """Smoothed accuracy at ``cost``, linear between evaluations, the last one beyond the end."""
        return np.interp(cost, self.cost, self.smoothed)


@dataclass(frozen=True, slots=True)
class Interval:
    """A figure over seeds with its 95 % interval."""

    low: float
    mid: float
    high: float

    def as_list(self) -> list[float]:
        return [round(self.low, 4), round(self.mid, 4), round(self.high, 4)]


@dataclass(frozen=True, slots=True)
class Speedup:
    """Cost of the baseline to the target / cost of the method to it: ratio of geometric means over paired seeds.

    ``censored`` runs never got there within their budget. They count with the cost at which they ended, so with
    any of them ``ratio`` is an upper bound. ``unreached`` seeds have a baseline that never got to the target.
    """

    ratio: Interval | None  # None: no seed could be used
    seeds: int
    censored: int
    per_seed: tuple[float | None, ...]  # None: censored
    unreached: int = 0
    bootstrap: Interval | None = None  # the same ratio with the percentile bootstrap's interval

    def text(self) -> str:
        if self.ratio is None:
            return "–"
        if self.censored == self.seeds:
            return f"never (< {self.ratio.mid:.2f})"
        if self.censored:  # a bound has no interval
            return f"≤ {self.ratio.mid:.2f} ({self.censored}/{self.seeds} never)"
        spread = f" [{self.ratio.low:.2f}, {self.ratio.high:.2f}]" if self.seeds > 1 else ""
        return f"{self.ratio.mid:.2f}{spread}"


def smooth(values: np.ndarray, window: int = SMOOTHING) -> np.ndarray:
    """Centred moving average; at the ends over as many points as there are on the shorter side."""
    values = np.asarray(values, float)
    half = window // 2
    result = np.empty(len(values))
    for i in range(len(values)):
        reach = min(half, i, len(values) - 1 - i)
        result[i] = values[i - reach : i + reach + 1].mean()
    return result


def cost_to_reach(curve: Curve, target: float) -> float | None:
    """The cost at which the smoothed curve first reaches ``target``, linear between evaluations; None: never."""
    values = curve.smoothed
    hits = np.flatnonzero(values >= target)
    if not len(hits):
        return None
    i = int(hits[0])
    if i == 0:
        return float(curve.cost[0])
    share = (target - values[i - 1]) / (values[i] - values[i - 1])
    return float(curve.cost[i - 1] + share * (curve.cost[i] - curve.cost[i - 1]))


def target_of(baseline: Curve, fraction: float, at_end: bool = False) -> float:
    """The start plus ``fraction`` of the baseline's gain: to its best smoothed accuracy, or to that at its end."""
    values = baseline.smoothed
    best = float(values[-1] if at_end else values.max())
    # the best itself, not a sum that rounding may put above it
    return best if fraction == 1 else float(values[0] + fraction * (best - values[0]))


def speedup(
    baseline: dict[int, Curve],
    method: dict[int, Curve],
    fraction: float,
    rng: np.random.Generator,
    at_end: bool = False,
) -> Speedup:
    """``method`` against ``baseline``, by seed, over the seeds that both have; targets as in ``target_of``."""
    seeds = sorted(set(baseline) & set(method))
    logs: list[float] = []
    per_seed: list[float | None] = []
    censored = unreached = 0
    for seed in seeds:
        target = target_of(baseline[seed], fraction, at_end)
        own = cost_to_reach(baseline[seed], target)
        gain = target - float(baseline[seed].smoothed[0])
        if own is None or gain < LEAST_GAIN:
            unreached += 1
            continue
        reached = cost_to_reach(method[seed], target)
        censored += reached is None
        cost = max(float(method[seed].cost[-1]) if reached is None else reached, 1e-12)
        per_seed.append(None if reached is None else own / cost)
        logs.append(float(np.log(own / cost)))
    used = len(logs)
    if not used:
        return Speedup(None, 0, 0, (), unreached)
    ratio, bootstrap = (
        Interval(*(float(np.exp(v)) for v in (x.low, x.mid, x.high)))
        for x in (mean_interval(np.array(logs)), bootstrap_mean(np.array(logs), rng))
    )
    return Speedup(ratio, used, censored, tuple(per_seed), unreached, bootstrap)


def mean_interval(values: np.ndarray) -> Interval:
    """Mean over seeds with Student's 95 % interval; one seed has no spread. The mean of log ratios is the log of the
    ratio of geometric means. (A percentile bootstrap of five values covers about 83 %, see ``bootstrap_mean``.)"""
    values = np.asarray(values, float)
    n, mid = len(values), float(values.mean())
    half = float(t.ppf(0.975, n - 1) * values.std(ddof=1) / np.sqrt(n)) if n > 1 else 0.0
    return Interval(mid - half, mid, mid + half)


def bootstrap_mean(values: np.ndarray, rng: np.random.Generator) -> Interval:
    """Mean over seeds with the percentile bootstrap's 95 % interval, kept beside Student's: too narrow with few seeds,
    because resampling divides by n where the variance needs n - 1 and knows no Student t."""
    values = np.asarray(values, float)
    means = values[rng.integers(len(values), size=(RESAMPLES, len(values)))].mean(1)
    low, high = np.percentile(means, [2.5, 97.5])
    return Interval(float(low), float(values.mean()), float(high))


def accuracy_difference(baseline: dict[int, Curve], method: dict[int, Curve], share: float) -> Interval | None:
    """Method minus baseline at equal cost: ``share`` of the smaller of the two runs' total cost."""
    values = []
    for seed in sorted(set(baseline) & set(method)):
        cost = share * min(baseline[seed].cost[-1], method[seed].cost[-1])
        values.append(float(method[seed].at(cost) - baseline[seed].at(cost)))
    return mean_interval(np.array(values)) if values else None


def area(curve: Curve, budget: float) -> float:
    """Mean smoothed accuracy over costs 0 .. ``budget``; beyond its end a curve stays where it was."""
    grid = np.linspace(0.0, budget, 201)
    return float(np.trapezoid(curve.at(grid), grid) / budget)


def area_difference(baseline: dict[int, Curve], method: dict[int, Curve]) -> Interval | None:
    """Difference of ``area`` up to the smaller total cost of each pair."""
    values = []
    for seed in sorted(set(baseline) & set(method)):
        budget = float(min(baseline[seed].cost[-1], method[seed].cost[-1]))
        if budget > 0:
            values.append(area(method[seed], budget) - area(baseline[seed], budget))
    return mean_interval(np.array(values)) if values else None


def final_accuracy(curve: Curve) -> float:
    """The mean of the last ``SMOOTHING`` evaluations: an end point alone is noisy."""
    return float(curve.accuracy[-SMOOTHING:].mean())


def band(curves: list[Curve], points: int = 60) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(cost [P], mean, lowest, highest smoothed accuracy [P]) over seeds, up to the smallest total cost."""
    grid = np.linspace(0.0, min(float(c.cost[-1]) for c in curves), points)
    values = np.array([c.at(grid) for c in curves])
    return grid, values.mean(0), values.min(0), values.max(0)
