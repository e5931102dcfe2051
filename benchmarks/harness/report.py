"""Figures as tables (Markdown and CSV), and as the flat numbers that documents quote."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness.analysis import FRACTIONS, GEN_TO_TRAIN, ArmFigures
from benchmarks.harness.cell import COST_AXES
from benchmarks.harness.deviations import deviations_of
from benchmarks.harness.statistics import Interval, Speedup

Row = dict[str, Any]


def write_tables(folder: Path, figures: list[ArmFigures], baseline: str, title: str, command: str) -> None:
    """``table.md`` and ``table.csv`` in ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "table.md").write_text(markdown(figures, baseline, title, command))
    rows = [flat_row(f) for f in figures]
    names = list(dict.fromkeys(key for row in rows for key in row))
    with (folder / "table.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, names, restval="")
        writer.writeheader()
        writer.writerows(rows)


def markdown(figures: list[ArmFigures], baseline: str, title: str, command: str) -> str:
    parts = [f"# {title}\n", f"`{command}`\n", accuracy_table(figures)]
    for axis, heading in COST_AXES.items():
        parts += [f"## Speed-up over {baseline} by {heading}\n", speedup_table(figures, axis)]
    parts += [cost_map(figures, kind, baseline) for kind in ("trained", "computed")]
    parts += ["## What the batches were made of\n", explanation_table(figures)]
    parts.append(
        f"Speed-up: cost of {baseline} to the accuracy ÷ cost of the arm to the same, ratio of geometric means over "
        "paired seeds with Student's 95 % interval of the log ratios. A run that never gets there counts with the cost "
        "at which it ended, so that ≤ marks an upper bound.\n"
    )
    if lines := deviations_of([f.label for f in figures]):
        parts += ["## Where arms are not what their papers have\n", *(f"- {line}" for line in lines), ""]
    return "\n".join(parts)


def accuracy_table(figures: list[ArmFigures]) -> str:
    header = ["arm", "seeds", "failed", "lr", "start", "final sampled", "final greedy", "Δ at equal rollouts", "Δ AUC"]
    rows = []
    for f in figures:
        if not f.seeds:
            rows.append([f.label, "0", str(f.failed)] + ["–"] * 6)
            continue
        rows.append(
            [
                f.label,
                str(f.seeds),
                str(f.failed) if f.failed else "",
                f"{f.explain['learning_rate']:g}",
                f"{f.start:.3f}",
                interval(f.final, seeds=f.seeds),
                f"{f.greedy:.3f}",
                interval(f.difference["rollouts"], seeds=f.seeds, signed=True),
                interval(f.area["rollouts"], seeds=f.seeds, signed=True),
            ]
        )
    return table(header, rows)


def speedup_table(figures: list[ArmFigures], axis: str) -> str:
    rows = []
    for f in figures:
        if f.seeds:
            cells = [f.speedups[axis][name].text() for name in FRACTIONS]
            rows.append([f.label, *cells, f"{f.totals[axis]:.4g}"])
    goals = [f"to {name} of the gain" if "%" in name else "to its accuracy at the end" for name in FRACTIONS]
    return table(["arm", *goals, "run total"], rows)


def cost_map(figures: list[ArmFigures], kind: str, baseline: str) -> str:
    what = "tokens of trained rollouts" if kind == "trained" else "tokens that the learner computed"
    rows = [[f.label, *(f.cost_map[kind][r].text() for r in GEN_TO_TRAIN)] for f in figures if f.seeds]
    head = f"## Total cost = rollouts × c_gen + {what} × c_train: speed-up over {baseline} to 80 % of its gain\n"
    return head + "\n" + table(["arm", *(f"c_gen : c_train = {r}" for r in GEN_TO_TRAIN)], rows)


def explanation_table(figures: list[ArmFigures]) -> str:
    names = {
        "rollouts_per_update": "rollouts per update",
        "trained_share": "trained share",
        "pilot_share": "pilot share",
        "mixed_share_at_start": "share in mixed groups at the start",
        "mixed_share": "share in mixed groups",
        "distinct_prompts": "distinct prompts a step",
        "largest_n": "largest n",
        "ess_fraction": "ESS fraction",
        "tau": "τ",
        "curriculum_share_of_seconds": "curriculum's share of seconds",
    }
    rows = [[f.label, *(f"{f.explain[k]:.3g}" if k in f.explain else "–" for k in names)] for f in figures if f.seeds]
    return table(["arm", *names.values()], rows)


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows]) + "\n"


def interval(value: Interval | None, *, seeds: int, signed: bool = False) -> str:
    if value is None:
        return "–"
    sign = "+" if signed else ""
    if seeds == 1:  # one run has no spread to show
        return f"{value.mid:{sign}.3f}"
    return f"{value.mid:{sign}.3f} [{value.low:{sign}.3f}, {value.high:{sign}.3f}]"


def flat_row(f: ArmFigures) -> Row:
    """One line of the CSV: every figure of an arm under a plain name."""
    row: Row = {"arm": f.label, "seeds": f.seeds, "failed": f.failed}
    if not f.seeds:
        return row
    row |= {"start": f.start, "final_greedy": f.greedy, **_spread("final_sampled", f.final)}
    for axis in COST_AXES:
        row[f"total_{axis}"] = f.totals[axis]
        for name, figure in f.speedups[axis].items():
            row |= _speedup(f"speedup_{axis}_{_plain(name)}", figure)
        row |= _spread(f"difference_{axis}", f.difference[axis])
        row |= _spread(f"half_difference_{axis}", f.half_difference[axis])
        row |= _spread(f"auc_difference_{axis}", f.area[axis])
    for kind, ratios in f.cost_map.items():
        for name, figure in ratios.items():
            row |= _speedup(f"cost_{kind}_{name.replace(':', '_')}", figure)
    return {k: _number(v) for k, v in (row | f.explain).items()}


def result_figures(figures: list[ArmFigures]) -> dict[str, Any]:
    """The numbers that documents quote, [low, value, high]."""
    out: dict[str, Any] = {}
    for f in figures:
        if not f.seeds or f.final is None:
            continue
        out[f"{f.label}/final_sampled"] = f.final.as_list()
        for axis in COST_AXES:
            for name, figure in f.speedups[axis].items():
                if figure.ratio is not None:
                    out[f"{f.label}/speedup/{axis}/{_plain(name)}"] = figure.ratio.as_list()
                    out |= _seeds_of(f"{f.label}/speedup/{axis}/{_plain(name)}", f.seeds, figure)
                    if figure.bootstrap is not None:
                        out[f"{f.label}/speedup/{axis}/{_plain(name)}/bootstrap"] = figure.bootstrap.as_list()
        for axis in ("rollouts", "optimizer_steps"):
            for key, values in (("difference", f.difference), ("auc_difference", f.area)):
                value = values[axis]
                if value is not None:
                    out[f"{f.label}/{key}/{axis}"] = value.as_list()
        for kind, ratios in f.cost_map.items():
            for name, figure in ratios.items():
                if figure.ratio is not None:
                    out[f"{f.label}/cost_{kind}/{name}"] = figure.ratio.as_list()
                    out |= _seeds_of(f"{f.label}/cost_{kind}/{name}", f.seeds, figure)
    return out


def _seeds_of(key: str, runs: int, figure: Speedup) -> dict[str, int]:
    """How many runs never got there, and how many seeds count where that is not all of them."""
    out = {f"{key}/censored": figure.censored} if figure.censored else {}
    return out | ({f"{key}/seeds": figure.seeds} if figure.seeds != runs else {})


def _speedup(name: str, figure: Speedup) -> Row:
    if figure.ratio is None:
        return {name: "", f"{name}_low": "", f"{name}_high": "", f"{name}_censored": ""}
    return {**_spread(name, figure.ratio), f"{name}_censored": figure.censored}


def _spread(name: str, value: Interval | None) -> Row:
    if value is None:
        return {name: "", f"{name}_low": "", f"{name}_high": ""}
    return {name: value.mid, f"{name}_low": value.low, f"{name}_high": value.high}


def _plain(fraction: str) -> str:
    return fraction.replace(" %", "")


def _number(value: Any) -> Any:
    return float(f"{value:.5g}") if isinstance(value, float | np.floating) else value
