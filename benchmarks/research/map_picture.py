"""``cures bench map``: when the curriculum pays, as one picture over several committed results.

cures bench map "much transfer=convergence_chain_T:cures_wide" "little=convergence_chain_N:cures_wide" --out map.png
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from benchmarks.harness.doc_tables import load
from benchmarks.harness.results_file import RESULTS
from cures_ray.messages import ConfigError

FRACTIONS = {"50": "50 %", "80": "80 %", "best": "all of it"}


def draw(conditions: dict[str, str], axis: str, out: Path, folder: Path = RESULTS) -> None:
    """Speed-up over the results' baseline with its interval, one row a condition.

    Args:
        conditions: title -> "RESULT:ARM".
        axis: a cost axis of the results.

    Raises:
        ConfigError: a result, or an arm in it, is missing.
    """
    figure, ax = plt.subplots(figsize=(7.5, 1.2 + 0.55 * len(conditions)))
    colors = plt.get_cmap("tab10")
    for j, (fraction, name) in enumerate(FRACTIONS.items()):
        for i, (title, place) in enumerate(conditions.items()):
            result_name, _, arm = place.partition(":")
            figures = load(result_name, folder).figures
            key = f"{arm}/speedup/{axis}/{fraction}"
            if key not in figures:
                raise ConfigError(f"{title}: {result_name} has no figure {key}")
            low, mid, high = figures[key]
            where = i + (j - 1) * 0.22
            ax.plot([low, high], [where, where], color=colors(j), linewidth=2)
            open_end = f"{key}/censored" in figures
            ax.plot(
                mid,
                where,
                "<" if open_end else "o",
                color=colors(j),
                label=f"to {name}" if i == 0 else None,
                markersize=6,
            )
    ax.axvline(1.0, color="black", linewidth=0.8)
    ax.set_yticks(range(len(conditions)), list(conditions), fontsize=8)
    ax.invert_yaxis()
    ax.set_xlim(left=0)
    ax.set_xlabel(f"baseline's {axis.replace('_', ' ')} ÷ the arm's ( < : upper bound, some runs never got there)")
    ax.legend(title="of the baseline's gain", fontsize=7, title_fontsize=7)
    ax.grid(axis="x", alpha=0.3)
    figure.tight_layout()
    figure.savefig(out, dpi=110)
    plt.close(figure)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="cures bench map", description=__doc__.splitlines()[0])
    parser.add_argument("conditions", nargs="+", metavar="TITLE=RESULT:ARM")
    parser.add_argument("--axis", default="rollouts")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(argv)
    conditions = dict(c.split("=", 1) for c in args.conditions if "=" in c)
    if len(conditions) < len(args.conditions):
        raise ConfigError("every condition is TITLE=RESULT:ARM")
    draw(conditions, args.axis, args.out)
    print(args.out)
    return 0
