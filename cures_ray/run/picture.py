"""One picture of a run from its ``metrics.jsonl``: accuracy, reward, staleness, idle time, ESS, accounting."""

from __future__ import annotations

import json
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

# title -> {label: metric}
PANELS: dict[str, dict[str, str]] = {
    "accuracy": {"held-out, greedy": "eval/greedy_accuracy", "training reward": "rollout/reward"},
    "staleness (versions)": {"mean": "staleness/mean", "max": "staleness/max"},
    "idle (seconds a step)": {"learner": "time/learner_idle_s", "generators": "time/generator_idle_s"},
    "effective sample size / prompts": {"ESS": "curriculum/ess_fraction"},
    "tokens per second": {"generated": "rollout/tokens_per_s"},
    "rollouts": {
        "planned": "accounting/planned",
        "trained": "accounting/trained",
        "discarded": "accounting/discarded",
        "in flight": "accounting/in_flight",
    },
}


def read_metrics(run_dir: Path) -> list[dict[str, float]]:
    """The records of ``metrics.jsonl`` that belong to a step."""
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if "step" in record]


def draw_run(run_dir: Path, target: Path | None = None) -> Path:
    """Write the picture to ``target`` (default: RUN/run.png) and return its path."""
    records = read_metrics(run_dir)
    figure = Figure(figsize=(12, 6), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (title, curves) in zip(figure.subplots(2, 3).flat, PANELS.items(), strict=True):
        for label, metric in curves.items():
            points = [(r["step"], r[metric]) for r in records if metric in r]
            if points:
                marker = "o" if metric.startswith("eval/") else ""
                axes.plot(*zip(*points, strict=True), label=label, marker=marker, markersize=4)
        axes.set_title(title, fontsize=10)
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=8, frameon=False)
    for axes in figure.axes[3:]:
        axes.set_xlabel("optimizer step")
    target = target or run_dir / "run.png"
    figure.savefig(target, dpi=110)
    return target
