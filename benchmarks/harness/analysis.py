"""Records of cells -> the figures of the comparison: speed-ups, differences, areas, cost-model map, explanations."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field

import numpy as np

from benchmarks.harness.cell import COST_AXES
from benchmarks.harness.runs import Record, explain
from benchmarks.harness.statistics import (
    Curve,
    Interval,
    Speedup,
    accuracy_difference,
    area_difference,
    final_accuracy,
    mean_interval,
    speedup,
)

FRACTIONS = {"50 %": 0.5, "80 %": 0.8, "95 %": 0.95, "best": 1.0}  # of the baseline's gain
GEN_TO_TRAIN = {"1:10": 0.1, "1:3": 1 / 3, "1:1": 1.0, "3:1": 3.0, "10:1": 10.0}  # c_gen : c_train
BOOTSTRAP_SEED = 20251001


@dataclass(slots=True, kw_only=True)
class ArmFigures:
    """One arm against the baseline. Axis names are those of ``COST_AXES``."""

    label: str
    seeds: int
    failed: int
    start: float = float("nan")
    final: Interval | None = None  # mean of the last evaluations
    greedy: float = float("nan")
    speedups: dict[str, dict[str, Speedup]] = field(default_factory=dict)  # axis -> fraction -> figure
    difference: dict[str, Interval | None] = field(default_factory=dict)  # axis -> at equal cost
    half_difference: dict[str, Interval | None] = field(default_factory=dict)  # at half of it
    area: dict[str, Interval | None] = field(default_factory=dict)  # axis -> area under the curve, method - baseline
    cost_map: dict[str, dict[str, Speedup]] = field(default_factory=dict)  # "trained" | "computed" -> ratio -> figure
    explain: dict[str, float] = field(default_factory=dict)
    totals: dict[str, float] = field(default_factory=dict)  # mean cost of a run by axis


def by_arm(records: list[Record]) -> dict[str, dict[int, Record]]:
    """label -> seed -> finished record."""
    arms: dict[str, dict[int, Record]] = defaultdict(dict)
    for record in records:
        if record["status"] == "done":
            arms[record["spec"]["label"]][record["spec"]["seed"]] = record
    return dict(arms)


def curves(runs: dict[int, Record], axis: str, metric: str = "sampled") -> dict[int, Curve]:
    return {seed: curve_of(record, axis, metric) for seed, record in runs.items()}


def curve_of(record: Record, axis: str, metric: str = "sampled") -> Curve:
    points = record["curve"]
    return Curve(np.array([p[axis] for p in points], float), np.array([p[metric] for p in points], float))


def analyse(records: list[Record], labels: list[str], baseline: str, metric: str = "sampled") -> list[ArmFigures]:
    """One entry a label, in the order given; arms without a finished run keep empty figures."""
    arms = by_arm(records)
    failed: dict[str, int] = defaultdict(int)
    for record in records:
        failed[record["spec"]["label"]] += record["status"] != "done"
    base = arms.get(baseline, {})
    return [_figures(label, arms.get(label, {}), base, failed[label], metric) for label in labels]


def _figures(label: str, runs: dict[int, Record], base: dict[int, Record], failed: int, metric: str) -> ArmFigures:
    figures = ArmFigures(label=label, seeds=len(runs), failed=failed)
    if not runs:
        return figures
    rng = np.random.default_rng(BOOTSTRAP_SEED)
    own = curves(runs, "rollouts", metric)
    figures.start = float(np.mean([c.accuracy[0] for c in own.values()]))
    figures.final = mean_interval(np.array([final_accuracy(c) for c in own.values()]))
    figures.greedy = float(np.mean([final_accuracy(curve_of(r, "rollouts", "greedy")) for r in runs.values()]))
    for axis in COST_AXES:
        theirs, mine = curves(base, axis, metric), curves(runs, axis, metric)
        figures.totals[axis] = float(np.mean([c.cost[-1] for c in mine.values()]))
        figures.speedups[axis] = {name: speedup(theirs, mine, f, rng) for name, f in FRACTIONS.items()}
        figures.difference[axis] = accuracy_difference(theirs, mine, 1.0)
        figures.half_difference[axis] = accuracy_difference(theirs, mine, 0.5)
        figures.area[axis] = area_difference(theirs, mine)
    for kind in ("trained", "computed"):
        figures.cost_map[kind] = {
            name: speedup(_priced(base, base, kind, ratio, metric), _priced(runs, base, kind, ratio, metric), 0.8, rng)
            for name, ratio in GEN_TO_TRAIN.items()
        }
    figures.explain = _explanation(list(runs.values()))
    return figures


def _priced(runs: dict[int, Record], base: dict[int, Record], kind: str, ratio: float, metric: str) -> dict[int, Curve]:
    """Curves over total cost = rollouts * c_gen + trained tokens * c_train with c_gen : c_train = ``ratio``.

    The unit of training is one rollout of the baseline: its tokens, so that 1:1 means that generating a rollout costs
    as much as training on one. ``kind``: tokens of trained rollouts, or tokens that the learner really computed
    (rollouts without an advantage are not computed, prompts are).
    """
    priced = {}
    for seed in sorted(set(runs) & set(base)):
        end = base[seed]["curve"][-1]
        unit = max(end[f"{kind}_tokens"], 1.0) / max(end["trained_rollouts"], 1.0)
        points = runs[seed]["curve"]
        cost = [p["rollouts"] * ratio + p[f"{kind}_tokens"] / unit for p in points]
        priced[seed] = Curve(np.array(cost, float), np.array([p[metric] for p in points], float))
    return priced


def _explanation(runs: list[Record]) -> dict[str, float]:
    """Means over seeds of what explains a curve."""
    rows: dict[str, list[float]] = defaultdict(list)
    for record in runs:
        for key, value in explain(record).items():
            rows[key].append(value)
    return {key: float(np.mean(values)) for key, values in rows.items()}
