"""RUN/ledger.png: beliefs by step (the paper's Fig. 3), n against accuracy (Fig. 4), ESS and tau, beliefs now."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

MOST_POINTS = 20_000


def draw_ledger(
    history: Sequence[dict[str, Any]],
    target: Path,
    title: str,
    now: tuple[np.ndarray, np.ndarray] | None = None,
) -> Path:
    """Write the picture. ``now``: accuracy believed [k] and visits [k] of prompts; None: the last histogram.

    Raises:
        OSError: ``target`` cannot be written.
    """
    figure = Figure(figsize=(12.5, 8), layout="tight")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=11)
    (beliefs, allocation), (ess, current) = figure.subplots(2, 2)
    _beliefs_by_step(beliefs, history)
    _allocation(allocation, history)
    _ess_and_tau(ess, history)
    _beliefs_now(current, history, now)
    figure.savefig(target, dpi=110)
    return target


def _beliefs_by_step(axes: Axes, history: Sequence[dict[str, Any]]) -> None:
    axes.set(title="beliefs by step", xlabel="step", ylabel="believed accuracy", ylim=(0, 1))
    if not history:
        return
    counts = np.array([line["belief_histogram"] for line in history], float)
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    steps = np.array([line["batch"] + 1 for line in history], float)
    middles = (steps[1:] + steps[:-1]) / 2
    edges = np.concatenate([[steps[0] - 0.5], middles, [steps[-1] + 0.5]])
    bins = np.linspace(0, 1, counts.shape[1] + 1)
    norm = LogNorm(vmin=1e-3, vmax=1.0)
    axes.set_facecolor("#f4f4f4")
    mesh = axes.pcolormesh(edges, bins, np.ma.masked_less_equal(shares.T, 0), norm=norm, cmap="viridis")
    mean = [line["metrics"].get("belief_mean", np.nan) for line in history]
    axes.plot(steps, mean, color="white", linewidth=2.6)
    axes.plot(steps, mean, color="#d62728", linewidth=1.4, label="mean")
    axes.legend(fontsize=8, frameon=True, loc="upper left")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.figure.colorbar(mesh, ax=axes, label="share of prompts", pad=0.01)


def _allocation(axes: Axes, history: Sequence[dict[str, Any]]) -> None:
    axes.set(title="rollouts against believed accuracy", xlabel="believed accuracy", ylabel="rollouts of the group, n")
    axes.set_xlim(0, 1)
    axes.grid(alpha=0.3)
    p = np.array([v for line in history for v in line["p"]], float)
    n = np.array([v for line in history for v in line["n"]], float)
    step = np.array([line["batch"] + 1 for line in history for _ in line["n"]], float)
    if not len(n):
        return
    every = max(1, -(-len(n) // MOST_POINTS))
    shift = np.random.default_rng(0).uniform(-1, 1, (2, len(n)))  # equal points would lie on each other
    norm = Normalize(step.min(), max(step.max(), step.min() + 1))
    x, y = (p + 0.006 * shift[0])[::every], (n + 0.3 * shift[1])[::every]
    axes.scatter(x, y, s=9, c=step[::every], norm=norm, cmap="plasma", alpha=0.45, linewidths=0)
    place = np.minimum((p * 20).astype(int), 19)
    found = [i for i in range(20) if (place == i).sum() >= 3]
    axes.plot([(i + 0.5) / 20 for i in found], [n[place == i].mean() for i in found], color="black", label="mean n")
    axes.set_ylim(0, None)
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(fontsize=8, frameon=True, loc="upper right")
    axes.figure.colorbar(ScalarMappable(norm, "plasma"), ax=axes, label="step", pad=0.01)


def _ess_and_tau(axes: Axes, history: Sequence[dict[str, Any]]) -> None:
    axes.set(title="effective sample size and τ", xlabel="step", ylabel="ESS / prompts")
    axes.grid(alpha=0.3)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    ess, tau = (
        [(line["batch"] + 1, line["metrics"][key]) for line in history if key in line["metrics"]]
        for key in ("ess_fraction", "tau")
    )
    useful = [(line["batch"] + 1, line["metrics"]["useful"]) for line in history if "useful" in line["metrics"]]
    if useful:
        axes.plot(
            *zip(*useful, strict=True), color="#2ca02c", linewidth=1, alpha=0.7, label="unexpected outcomes (share)"
        )
    if ess:
        axes.plot(*zip(*ess, strict=True), color="#1f77b4", label="ESS fraction")
    axes.set_ylim(0, 1.25)  # the legend is above the curves
    axes.set_yticks(np.linspace(0, 1, 6))
    lines = list(axes.get_lines())
    if tau:
        right = axes.twinx()
        lines = [*lines, *right.plot(*zip(*tau, strict=True), color="#ff7f0e", label="τ (right)")]
        right.set_ylabel("τ", color="#ff7f0e")
        right.tick_params(axis="y", colors="#ff7f0e")
        values = [v for _, v in tau]
        if max(values) > 30 * min(values):
            right.set_yscale("log")
            right.set_ylim(min(values) / 2, max(values) * (max(values) / min(values)) ** 0.25)
        else:
            right.set_ylim(0, 1.35 * max(values))
    if lines:
        labels = [str(line.get_label()) for line in lines]
        axes.legend(lines, labels, fontsize=8, frameon=True, loc="upper center", ncols=3)


def _beliefs_now(axes: Axes, history: Sequence[dict[str, Any]], now: tuple[np.ndarray, np.ndarray] | None) -> None:
    axes.set(title="beliefs now", xlabel="believed accuracy", ylabel="prompts", xlim=(0, 1))
    axes.grid(alpha=0.3, axis="y")
    bins = np.linspace(0, 1, 41).tolist()
    if now is not None:
        accuracy, visits = now
        seen = visits > 0
        parts = [accuracy[seen], accuracy[~seen]]
        labels = [f"seen ({int(seen.sum()):,})", f"never seen: the prior ({int((~seen).sum()):,})"]
        axes.hist(parts, bins, stacked=True, color=["#1f77b4", "#c7c7c7"], label=labels)
        axes.legend(fontsize=8, frameon=True)
    elif history:
        counts = history[-1]["belief_histogram"]
        edges = np.linspace(0, 1, len(counts) + 1)
        axes.bar(edges[:-1], counts, np.diff(edges), align="edge", color="#1f77b4")
        axes.set_title(f"beliefs after step {history[-1]['batch'] + 1}")
