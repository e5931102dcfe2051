"""`cures ledger RUN`: what the curriculum of a run did and believes; with --replay, what it would have drawn."""

from __future__ import annotations

import argparse
import csv
import json
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cures_ray.curriculum.machine import Curriculum
from cures_ray.ledger.read import Prompts, Run, current, open_run
from cures_ray.ledger.replay import Replay, replay
from cures_ray.ledger.text import allocation_table, heading, prompts_table, quantiles, replay_text, steps_table
from cures_ray.messages import ConfigError

PICTURED = 200_000  # prompts in the picture's histogram


def main(argv: list[str]) -> int:
    """Raises ConfigError: no run, wrong overrides, files that cannot be written, or a damaged ledger; what can be
    read of a damaged one is printed and written before."""
    parser = argparse.ArgumentParser(prog="cures ledger", description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="the run's folder (checkpoint.dir); it may be running")
    parser.add_argument("--top", type=int, default=10, help="prompts in each list (default 10)")
    parser.add_argument("--csv", type=Path, metavar="FOLDER", help="also write tables as CSV files")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write everything as JSON")
    parser.add_argument("--no-plot", action="store_true", help="do not write RUN/ledger.png")
    parser.add_argument(
        "--replay",
        nargs="+",
        action="append",
        metavar="key=value",
        help="what the run would have drawn with other curriculum keys: tau=0.05, or method=mopps "
        "rollouts_per_step=512; several --replay are several alternatives",
    )
    args = parser.parse_args(argv)
    if args.top < 0:
        raise ConfigError(f"--top {args.top}: a number of prompts, 0 or more")
    try:
        problems = (_replay if args.replay else _report)(args)
    except OSError as error:
        raise ConfigError(f"{error.filename or args.run}: {error.strerror or error}") from None
    if problems:
        raise ConfigError("\n".join(problems))
    return 0


# -- the report ----------------------------------------------------------------------------------------


def _report(args: argparse.Namespace) -> list[str]:
    run = open_run(args.run)
    curriculum: Curriculum | None = None
    try:
        curriculum, problem = current(run)
    except ConfigError as error:
        problem = str(error)
    steps = [step_row(line) for line in run.history]
    parts = [f"{heading(run.config, run.folder, len(steps))}\n{accounting_line(run, curriculum)}"]
    if run.prompts.note:
        parts.append(f"note: {run.prompts.note}")
    parts += [steps_table(steps), allocation_table(run.history)] if steps else ["no batch is committed yet"]
    lists: dict[str, list[dict[str, Any]]] = {}
    now = None
    if curriculum is not None:
        belief = curriculum.pool.belief
        lists = top_prompts(run.prompts, curriculum, args.top)
        parts.append(prompts_table("Hardest prompts (seen at least once)", lists["hardest"]))
        parts.append(prompts_table("Most visited prompts", lists["most_visited"]))
        unseen = int((belief.visits == 0).sum())
        parts.append(f"{run.prompts.count - unseen} of {run.prompts.count} prompts seen, {unseen} never")
        every = max(1, -(-run.prompts.count // PICTURED))
        now = (belief.mean()[::every], belief.visits[::every])
    if args.json:
        _write_json(args.json, _as_json(run, curriculum, steps, lists, problem))
    if args.csv:
        _write_csv(args.csv / "steps.csv", steps)
        pairs = ((h["batch"], *pair) for h in run.history for pair in zip(h["n"], h["p"], strict=True))
        _write_csv(args.csv / "groups.csv", ({"step": step, "n": n, "accuracy": p} for step, n, p in pairs))
        if curriculum is not None:
            seen = np.flatnonzero(curriculum.pool.belief.visits)
            _write_csv(args.csv / "prompts.csv", (prompt_row(run.prompts, curriculum, int(i)) for i in seen))
    if not args.no_plot:
        parts.append(_plot(run, now))
    _print("\n\n".join(parts))
    return [problem] if problem else []


def _plot(run: Run, now: tuple[np.ndarray, np.ndarray] | None) -> str:
    from cures_ray.ledger.picture import draw_ledger

    title = f"{run.folder}: {run.config.curriculum.method}, {len(run.history)} steps, {run.prompts.count:,} prompts"
    try:
        return f"picture: {draw_ledger(run.history, run.folder / 'ledger.png', title, now)}"
    except OSError as error:
        return f"no picture: {error}"


def step_row(line: dict[str, Any]) -> dict[str, Any]:
    """One line of the history as flat figures; NaN for what its method does not have."""
    metrics = line["metrics"]
    low, middle, high = quantiles(line["belief_histogram"])
    row: dict[str, Any] = {"step": line["batch"] + 1, "p10": low, "p50": middle, "p90": high}
    for name in ("tau", "ess", "ess_fraction", "useful", "prompt_reward", "belief_mean", "belief_std"):
        row[name] = float(metrics.get(name, np.nan))
    for name in ("distinct_prompts", "max_n", "min_n", "rounds"):
        row[name] = int(metrics[name]) if name in metrics else None
    names = ("planned", "trained", "discarded", "belief_histogram")
    return row | {name: line[name] for name in names}


def accounting_line(run: Run, curriculum: Curriculum | None) -> str:
    """Of now; of the last committed batch when the curriculum cannot be read."""
    if curriculum is not None:
        out = curriculum.accounting.line()
        opened = ", ".join(str(b) for b in sorted(curriculum.batches))
        return out + (f"; batches in progress: {opened}" if opened else "") + f"; policy version {curriculum.version}"
    if not run.history:
        return "accounting unknown: the ledger cannot be read"
    last = run.history[-1]
    flying = last["planned"] - last["trained"] - last["discarded"]
    figures = f"planned {last['planned']} = trained {last['trained']} + discarded {last['discarded']}"
    return f"after step {last['batch'] + 1}: {figures} + in flight {flying}"


def prompt_row(prompts: Prompts, curriculum: Curriculum, row: int) -> dict[str, Any]:
    belief = curriculum.pool.belief
    alpha, beta = float(belief.alpha[row]), float(belief.beta[row])
    return {
        "prompt": prompts.name(row),
        "row": row,
        "level": prompts.level(row),
        "accuracy": alpha / (alpha + beta),
        "alpha": alpha,
        "beta": beta,
        "visits": int(belief.visits[row]),
        "text": prompts.text(row),
    }


def top_prompts(prompts: Prompts, curriculum: Curriculum, top: int) -> dict[str, list[dict[str, Any]]]:
    """The lowest posterior means among the prompts that were seen, and the most visited prompts."""
    belief = curriculum.pool.belief
    seen = np.flatnonzero(belief.visits)
    hardest = seen[np.argsort(belief.mean(seen), kind="stable")[:top]]
    visited = seen[np.argsort(-belief.visits[seen].astype(np.int64), kind="stable")[:top]]
    rows = {"hardest": hardest, "most_visited": visited}
    return {name: [prompt_row(prompts, curriculum, int(i)) for i in chosen] for name, chosen in rows.items()}


def _as_json(
    run: Run,
    curriculum: Curriculum | None,
    steps: list[dict[str, Any]],
    lists: dict[str, list[dict[str, Any]]],
    problem: str,
) -> dict[str, Any]:
    out: dict[str, Any] = {"run": str(run.folder), "method": run.config.curriculum.method, "problem": problem or None}
    out |= {"note": run.prompts.note or None, "steps": steps}
    out["groups"] = [{"step": h["batch"] + 1, "n": h["n"], "accuracy": h["p"]} for h in run.history]
    if curriculum is not None:
        a, visits = curriculum.accounting, curriculum.pool.belief.visits
        discarded = {reason.value: count for reason, count in a.discarded.items()}
        out["accounting"] = {"planned": a.planned, "trained": a.trained, "in_flight": a.in_flight}
        out["accounting"]["discarded"] = discarded
        out["prompts"] = {"count": run.prompts.count, "seen": int((visits > 0).sum())}
    return out | lists


# -- the replay ----------------------------------------------------------------------------------------


def _replay(args: argparse.Namespace) -> list[str]:
    run = open_run(args.run, names=args.csv is not None)
    result = replay(run, args.replay)
    sides = [("the run", result.actual), *zip(result.names(), result.others, strict=True)]
    rows = [
        {"configuration": name, **d.figures(a)}
        for name, drawn in sides
        for d, a in zip(drawn, result.actual, strict=True)
    ]
    if args.json:
        _write_json(args.json, _replay_json(run, result, rows))
    if args.csv:
        _write_csv(args.csv / "replay.csv", rows)
        draws = (
            {"configuration": name, "batch": d.batch, "prompt": run.prompts.name(int(i)), "n": int(n), "accuracy": p}
            for name, drawn in sides
            for d in drawn
            for i, n, p in zip(d.index, d.n, d.p.tolist(), strict=True)
        )
        _write_csv(args.csv / "draws.csv", draws)
    _print(replay_text(result, run.folder))
    return result.problems


def _replay_json(run: Run, result: Replay, rows: list[dict[str, Any]]) -> dict[str, Any]:
    sides = {"the run": result.actual, **dict(zip(result.names(), result.others, strict=True))}
    return {
        "run": str(run.folder),
        "alternatives": result.overrides,
        "notes": result.notes,
        "problems": result.problems,
        "agrees_with_history": [result.agrees, result.compared],
        "totals": [{"configuration": name, **result.totals(drawn)} for name, drawn in sides.items()],
        "batches": rows,
    }


def _print(text: str) -> None:
    """To a reader that may have seen enough (`| head`)."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


# -- files ---------------------------------------------------------------------------------------------


def _write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(_plain(value), indent=1, allow_nan=False) + "\n")


def _plain(value: Any) -> Any:
    """Numbers that are none as null."""
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return None if isinstance(value, float) and not np.isfinite(value) else value


def _write_csv(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """A list in a cell is written with spaces between, a number that is none as nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer: csv.DictWriter[str] | None = None
        for row in rows:
            if writer is None:
                writer = csv.DictWriter(file, list(row))
                writer.writeheader()
            writer.writerow({k: _csv_cell(v) for k, v in row.items()})


def _csv_cell(value: Any) -> Any:
    if isinstance(value, Sequence) and not isinstance(value, str):
        return " ".join(map(str, value))
    return "" if _plain(value) is None else value
