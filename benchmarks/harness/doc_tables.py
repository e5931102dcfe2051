"""``cures bench tables``: the tables of the documents, filled from the committed runs.

A table in a document is a comment that says what it shows, the table, and an end mark:

    <!-- table convergence_chain_T
    columns: seeds, final_sampled, speedup/rollouts/best
    GRPO = grpo
    cures_wide
    -->
    | ... |
    <!-- end table -->

and the command that made a result, between ``<!-- command NAME -->`` and ``<!-- end command -->``. The table of faults
(harness/faults.py) stands between ``<!-- faults -->`` and ``<!-- end faults -->``.

A line after ``columns`` is an arm of the result file, or ``TITLE = ARM``, or ``TITLE = OTHER_RESULT:ARM``. A column is
the name of a figure without its arm, ``seeds``, or ``mean/NAME`` for the mean of an arm's explanation.
``greedy@ROLLOUTS`` is the mean greedy accuracy of the arm's runs at that cost, with its range over seeds.
``COLUMN as HEADING`` gives it a heading.
"""

from __future__ import annotations

import argparse
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness.analysis import analyse, by_arm
from benchmarks.harness.faults import fault_table
from benchmarks.harness.names import display
from benchmarks.harness.report import result_figures, table
from benchmarks.harness.results_file import RESULTS
from benchmarks.harness.runs import comparison_of, runs_of
from cures_ray.messages import ConfigError

BLOCK = re.compile(r"<!-- table (?P<name>\S+)\n(?P<spec>.*?)-->\n(?P<body>.*?)<!-- end table -->", re.DOTALL)
COMMAND = re.compile(r"<!-- command (?P<name>\S+) -->\n.*?<!-- end command -->", re.DOTALL)
FAULTS = re.compile(r"<!-- faults -->\n.*?<!-- end faults -->", re.DOTALL)
DOCUMENTS = [Path("docs/benchmarks.md"), Path("docs/questions.md"), Path("docs/faults.md"), Path("README.md")]
SIGNED = ("difference/", "auc_difference/")
RATIOS = ("speedup/", "cost_")


@dataclass(frozen=True, slots=True)
class ResultFile:
    """What tables show of a comparison."""

    command: str
    figures: dict[str, Any]
    seeds: dict[str, int]  # finished runs by arm
    explain: dict[str, dict[str, float]]  # arm -> means
    curves: dict[str, list[list[dict[str, float]]]]  # arm -> points of each finished run


@cache
def load(name: str, folder: Path = RESULTS) -> ResultFile:
    """A comparison, computed from its committed runs. Raises ConfigError when there is no such comparison."""
    comparison = comparison_of(name, folder)
    if comparison is None:
        raise ConfigError(f"table {name}: {folder / 'comparisons.json'} has no such comparison")
    records = runs_of(comparison, folder)
    figures = analyse(records, comparison.arms, comparison.baseline)
    return ResultFile(
        command=comparison.command,
        figures=result_figures(figures),
        seeds={f.label: f.seeds for f in figures if f.seeds},
        explain={f.label: f.explain for f in figures},
        curves={label: [record["curve"] for record in runs.values()] for label, runs in by_arm(records).items()},
    )


def render(name: str, spec: str, folder: Path = RESULTS) -> str:
    """The Markdown table of one block.

    Raises:
        ConfigError: no such result, arm or figure.
    """
    result = load(name, folder)
    lines = [line.strip() for line in spec.splitlines() if line.strip()]
    if not lines or not lines[0].startswith("columns:"):
        raise ConfigError(f"table {name}: its first line must be 'columns: ...'")
    columns = [part.strip() for part in lines[0].removeprefix("columns:").split(",")]
    keys = [column.split(" as ")[0] for column in columns]
    heads = [column.split(" as ")[-1] for column in columns]
    rows = []
    for line in lines[1:]:
        title, _, place = line.rpartition(" = ")
        other, _, arm = place.rpartition(":")
        source = load(other, folder) if other else result
        if arm not in source.seeds:
            known = ", ".join(source.seeds)
            raise ConfigError(f"table {name}: {other or name} has no finished run of {arm!r}; it has {known}")
        rows.append([title or display(arm), *(cell(source, arm, key) for key in keys)])
    return table(["arm", *heads], rows)


def cell(result: ResultFile, arm: str, key: str) -> str:
    """One figure as text; a dash where the result has none."""
    if key == "seeds":
        return str(result.seeds[arm])
    if key.startswith("mean/"):
        value = result.explain.get(arm, {}).get(key.removeprefix("mean/"))
        return "–" if value is None else f"{value:.3g}"
    if key.startswith("greedy@"):
        cost = float(key.removeprefix("greedy@"))
        columns = [[[p[key] for p in points] for key in ("rollouts", "greedy")] for points in result.curves[arm]]
        if any(cost > rollouts[-1] for rollouts, _ in columns):
            return "–"
        values = [float(np.interp(cost, rollouts, greedy)) for rollouts, greedy in columns]
        return f"{np.mean(values):.3f} ({min(values):.3f} to {max(values):.3f})"
    value = result.figures.get(f"{arm}/{key}")
    if value is None:
        return "–"
    low, mid, high = value
    if key.startswith(RATIOS):
        never = result.figures.get(f"{arm}/{key}/censored", 0)
        seeds = result.figures.get(f"{arm}/{key}/seeds", result.seeds[arm])
        if never == seeds:
            return f"never (< {mid:.2f})"
        if never:  # a bound has no interval
            text = f"≤ {mid:.2f} ({never}/{seeds} never)"
        else:
            text = f"{mid:.2f}" if seeds == 1 else f"{mid:.2f} [{low:.2f}, {high:.2f}]"
        return text if seeds == result.seeds[arm] else f"{text} ({seeds} seeds)"
    sign = "+" if key.startswith(SIGNED) else ""
    return f"{mid:{sign}.3f}" if result.seeds[arm] == 1 else f"{mid:{sign}.3f} [{low:{sign}.3f}, {high:{sign}.3f}]"


def fill(text: str, folder: Path = RESULTS) -> str:
    """``text`` with every table and command made anew."""

    def replace(match: re.Match[str]) -> str:
        name, spec = match["name"], match["spec"]
        return f"<!-- table {name}\n{spec}-->\n{render(name, spec, folder)}<!-- end table -->"

    def command(match: re.Match[str]) -> str:
        name = match["name"]
        return f"<!-- command {name} -->\n`{load(name, folder).command}`\n<!-- end command -->"

    text = FAULTS.sub(lambda _: f"<!-- faults -->\n{fault_table(folder)}<!-- end faults -->", text)
    return COMMAND.sub(command, BLOCK.sub(replace, text))


def main(argv: list[str]) -> int:
    """Rewrites the documents; with ``--check`` exit code 1 when one is out of date."""
    parser = argparse.ArgumentParser(prog="cures bench tables", description=__doc__.splitlines()[0])
    parser.add_argument("documents", nargs="*", type=Path, default=DOCUMENTS)
    parser.add_argument("--check", action="store_true", help="change nothing")
    args = parser.parse_args(argv)
    stale = []
    for path in args.documents:
        old = path.read_text()
        new = fill(old)
        if old != new:
            stale.append(path)
            if not args.check:
                path.write_text(new)
        print(f"{path}: {len(BLOCK.findall(old))} tables, {'changed' if old != new else 'up to date'}", flush=True)
    return 1 if args.check and stale else 0
