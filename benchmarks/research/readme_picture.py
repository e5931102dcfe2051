"""``cures bench picture``: docs/result.png, the README's picture, drawn from the committed runs."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from benchmarks.harness.doc_tables import load

TARGET = Path("docs/result.png")
PANELS = {  # title -> (comparison, label of the tuned GRPO)
    "Arithmetic chains": ("convergence_chain_T", "grpo@prompts_per_step=64@learner.lr=1.4e-3"),
    "Small programs": ("convergence_program_T", "grpo@prompts_per_step=64@learner.lr=1e-3"),
}
CURVES = {  # arm -> (name in the picture, colour); "" is the tuned GRPO
    "cures_wide": ("CurES-Ray, 256 × 1", "#b5541c"),
    "": ("GRPO, 64 × 4, tuned", "#22447a"),
    "rpp_single": ("REINFORCE++, 256 × 1", "#3c7a45"),
    "cures": ("CurES as published", "#888888"),
}
GRID = 60  # points of a curve


def main(argv: list[str]) -> int:
    """Draws the picture."""
    parser = argparse.ArgumentParser(prog="cures bench picture", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=TARGET)
    args = parser.parse_args(argv)
    draw(args.out)
    print(args.out)
    return 0


def draw(target: Path) -> None:
    """Mean over seeds of each arm's held-out accuracy, with the range from the lowest seed to the highest."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.9), layout="constrained")
    axes = figure.subplots(1, len(PANELS))
    for panel, (title, (comparison, grpo)) in zip(axes, PANELS.items(), strict=True):
        curves, ends = load(comparison).curves, {}
        for arm, (name, colour) in CURVES.items():
            rollouts, accuracy = on_one_grid(curves[arm or grpo])
            panel.plot(rollouts / 1000, accuracy.mean(0), color=colour, lw=2)
            panel.fill_between(rollouts / 1000, accuracy.min(0), accuracy.max(0), color=colour, alpha=0.12, lw=0)
            ends[name] = (float(accuracy.mean(0)[-1]), colour, float(rollouts[-1]) / 1000)
        label_ends(panel, ends)
        panel.set(title=title, xlabel="answers generated, thousands", ylim=(0, None))
        panel.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("accuracy on held-out prompts")
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, dpi=110)


def on_one_grid(runs: list[list[dict[str, float]]]) -> tuple[np.ndarray, np.ndarray]:
    """Rollouts [GRID] up to the shortest run's end, and the accuracy of each run there [runs, GRID]."""
    grid = np.linspace(0, min(points[-1]["rollouts"] for points in runs), GRID)
    values = [np.interp(grid, [p["rollouts"] for p in points], [p["sampled"] for p in points]) for points in runs]
    return grid, np.array(values)


def label_ends(panel: object, ends: dict[str, tuple[float, str, float]]) -> None:
    """The name of each curve at its end, moved apart where two would overlap."""
    lowest = 0.0
    for name, (value, colour, end) in sorted(ends.items(), key=lambda item: item[1][0]):
        lowest = max(value, lowest)
        panel.text(end * 1.02, lowest, name, color=colour, va="center", fontsize=9)  # type: ignore[attr-defined]
        lowest += 0.055
    panel.set_xlim(0, end * 1.55)  # type: ignore[attr-defined]
    panel.set_xticks(np.arange(0, end, 5))  # type: ignore[attr-defined]
