"""Pictures of a comparison as PNG bytes: curves with bands, speed-up bars, cost map, allocation and beliefs."""

from __future__ import annotations

import io
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from benchmarks.harness.analysis import GEN_TO_TRAIN, ArmFigures, Record, by_arm, curves
from benchmarks.harness.cell import COST_AXES
from benchmarks.harness.names import display
from benchmarks.harness.statistics import band

DPI = 110


def accuracy_curves(records: list[Record], labels: list[str], axis: str, metric: str = "sampled") -> bytes:
    """Mean smoothed held-out accuracy over seeds against one cost axis; the band is the range over seeds."""
    figure, ax = plt.subplots(figsize=(7.5, 4.5))
    arms = by_arm(records)
    for i, label in enumerate(labels):
        if label not in arms:
            continue
        cost, mean, low, high = band(list(curves(arms[label], axis, metric).values()))
        color = _color(i)
        ax.plot(cost, mean, color=color, label=display(label), linewidth=1.8)
        ax.fill_between(cost, low, high, color=color, alpha=0.1, linewidth=0)
    ax.set_xlabel(COST_AXES[axis])
    ax.set_ylabel(f"held-out accuracy ({metric})")
    ax.legend(fontsize=7, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.13), frameon=False)
    ax.grid(alpha=0.3)
    return _png(figure)


def speedup_bars(figures: list[ArmFigures], axis: str, fractions: tuple[str, ...] = ("50 %", "80 %", "best")) -> bytes:
    """Ratio to the baseline with 95 % intervals; hatched: an upper bound, because runs never got there."""
    shown = [f for f in figures if f.seeds]
    figure, ax = plt.subplots(figsize=(7.5, 0.9 + 0.34 * len(shown) * len(fractions) / 2))
    height = 0.8 / len(fractions)
    named: set[str] = set()
    for j, fraction in enumerate(fractions):
        for i, f in enumerate(shown):
            result = f.speedups[axis][fraction]
            if result.ratio is None:
                continue
            ratio, where = result.ratio, i + (j - (len(fractions) - 1) / 2) * height
            ax.barh(
                where,
                ratio.mid,
                height * 0.92,
                color=_color(j),
                hatch="///" if result.censored else None,
                edgecolor="white",
                label=None if fraction in named else fraction,
            )
            named.add(fraction)
            ax.plot([ratio.low, ratio.high], [where, where], color="black", linewidth=1)
    ax.axvline(1.0, color="black", linewidth=0.8)
    ax.set_yticks(range(len(shown)), [display(f.label) for f in shown], fontsize=8)
    ax.invert_yaxis()
    ax.set_xlabel(f"speed-up by {COST_AXES[axis]} (hatched: upper bound)")
    if named:
        ax.legend(title="of the baseline's gain", fontsize=7, title_fontsize=7, loc="lower right")
    return _png(figure)


def cost_map_lines(figures: list[ArmFigures], kind: str) -> bytes:
    """Speed-up against the ratio of generation to training cost."""
    figure, ax = plt.subplots(figsize=(7.5, 4))
    ratios = list(GEN_TO_TRAIN.values())
    for i, f in enumerate(figures):
        if not f.seeds:
            continue
        shown = [f.cost_map[kind][name] for name in GEN_TO_TRAIN]
        values = [s.ratio.mid if s.ratio else np.nan for s in shown]
        ax.plot(ratios, values, marker="o", color=_color(i), label=display(f.label))
        bounds = [(x, y) for x, y, s in zip(ratios, values, shown, strict=True) if s.censored]
        if bounds:  # runs that never got there: an upper bound
            x, y = zip(*bounds, strict=True)
            ax.plot(x, y, "v", color="white", markeredgecolor=_color(i), markersize=9, zorder=3)
    ax.set_xscale("log")
    ax.set_xticks(ratios, list(GEN_TO_TRAIN))
    ax.axhline(1.0, color="black", linewidth=0.8)
    ax.set_xlabel("cost of generating a rollout : cost of training on one")
    ax.set_ylabel("speed-up at 80 % of the gain (hollow: upper bound)")
    ax.legend(fontsize=7, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.13), frameon=False)
    ax.grid(alpha=0.3)
    return _png(figure)


def curriculum_pictures(record: Record) -> bytes:
    """Of one run: beliefs at the end, rollouts per lease, and what the batches were made of over time."""
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(11, 3.2))
    histograms: dict[str, Any] = record["histograms"]
    if "belief_mean" in histograms:
        left.hist(histograms["belief_mean"], bins=np.linspace(0, 1, 26), color=_color(0))
    left.set_xlabel("posterior mean accuracy, at the end")
    left.set_ylabel("prompts")
    if "n_by_lease" in histograms:
        n, p = np.array(histograms["n_by_lease"]), np.array(histograms.get("p_by_lease", []))
        if len(n) == len(p) and len(n):
            middle.scatter(p, n, s=8, alpha=0.5, color=_color(1))
            middle.set_xlabel("belief of the prompt")
            middle.set_ylabel("rollouts of its lease")
        else:
            middle.hist(n, color=_color(1))
            middle.set_xlabel("rollouts of a lease")
    plans = record["plans"]
    for i, (key, name) in enumerate({"reward": "mean reward", "mixed_share": "share in mixed groups"}.items()):
        right.plot([p["batch"] for p in plans], [p[key] for p in plans], color=_color(i), label=name, linewidth=1)
    right.set_xlabel("optimizer step")
    right.legend(fontsize=7)
    figure.suptitle(f"{record['spec']['label']}, seed {record['spec']['seed']}", fontsize=9)
    return _png(figure)


def _color(i: int) -> Any:
    return plt.get_cmap("tab10" if i < 10 else "Dark2")(i % 10 if i < 10 else i % 8)


def _png(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.tight_layout()
    figure.savefig(buffer, format="png", dpi=DPI, bbox_inches="tight")
    plt.close(figure)
    return buffer.getvalue()
