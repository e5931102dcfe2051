"""`cures ledger RUN`: what the curriculum of a run did and believes; with --replay, what it would have drawn."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from rich.table import Table

from cures_ray.curriculum.machine import Curriculum
from cures_ray.ledger.read import Run, current, lease_life, open_run
from cures_ray.ledger.replay import replay
from cures_ray.ledger.tables import bars, quantiles, show, some, table, write_csv, write_json
from cures_ray.messages import ConfigError

PICTURED = 200_000  # prompts in the picture's histogram
STEPS = {"step": "step", "beliefs": "beliefs 0 to 1", "p10": "p10", "p50": "p50", "p90": "p90", "tau": "tau"}
STEPS |= {"ess": "ESS", "ess_fraction": "of pool", "distinct_prompts": "prompts", "max_n": "max n", "useful": "useful"}
STEPS |= {"prompt_reward": "reward", "trained": "trained", "discarded": "discarded"}
GROUPS = {"accuracy": "accuracy", "size": "groups", "mean": "mean n", "min": "min n", "max": "max n", "bar": ""}
PROMPTS = {"prompt": "prompt", "level": "level", "accuracy": "accuracy", "alpha": "alpha", "beta": "beta"}
PROMPTS |= {"visits": "visits", "text": "text"}
DRAWS = {"batch": "batch", "who": "", "rollouts": "rollouts", "tau": "tau", "ess": "ESS"}
DRAWS |= {"distinct_prompts": "prompts", "max_n": "max n", "mean_accuracy": "accuracy", "mixed": "mixed"}
DRAWS |= {"mixed_posterior": "(Beta)", "hard": "p<0.1", "easy": "p>0.9", "overlap": "same prompts"}
SHARES = ("ess_fraction", "useful", "mixed", "mixed_posterior", "hard", "easy", "overlap")


def main(argv: list[str]) -> int:
    """Raises ConfigError: no run, wrong overrides, files that cannot be written, or a damaged ledger; what can be
    read of a damaged one is printed and written before."""
    parser = argparse.ArgumentParser(prog="cures ledger", description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="the run's folder (checkpoint.dir); it may be running")
    parser.add_argument("--top", type=int, default=10, help="prompts in each list (default 10)")
    parser.add_argument("--prompt", metavar="TEXT", help="only the prompts whose id begins with TEXT or that hold it")
    parser.add_argument("--lease", type=int, metavar="NUMBER", help="the whole life of one lease, as a line of JSON")
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
        if args.lease is not None:
            return _lease(open_run(args.run), args.lease)
        problems = (_replay if args.replay else _report)(args)
    except OSError as error:
        raise ConfigError(f"{error.filename or args.run}: {error.strerror or error}") from None
    if problems:
        raise ConfigError("\n".join(problems))
    return 0


def _lease(run: Run, number: int) -> int:
    life = lease_life(run, number)
    row = life.pop("row")
    names = {"prompt": f"{int(run.prompts.ids[row]):016x}", "text": run.prompts.shown["text"][row].as_py()}
    life["attempts"] = [a and dict(zip(("worker", "version", "ended"), a, strict=True)) for a in life["attempts"]]
    print(json.dumps(life | names, ensure_ascii=False))
    return 0


def _report(args: argparse.Namespace) -> list[str]:
    run = open_run(args.run)
    curriculum: Curriculum | None = None
    try:
        curriculum, problem = current(run)
    except ConfigError as error:
        problem = str(error)
    prompts = pd.DataFrame() if curriculum is None else prompt_rows(run, curriculum)
    seen = prompts[prompts.visits > 0] if len(prompts) else prompts
    if args.prompt is not None and curriculum is not None:
        found = prompts.iloc[run.prompts.find(args.prompt)]
        show(table(f"{len(found)} prompts with {args.prompt!r}", found.head(args.top), PROMPTS))
        return [problem] if problem else []
    steps, groups = step_rows(run.history), group_rows(run.history)
    lists = (
        {"hardest": seen.nsmallest(args.top, "accuracy"), "most_visited": seen.nlargest(args.top, "visits")}
        if (len(seen))
        else {}
    )
    if args.json:
        facts = {"run": str(run.folder), "method": run.config.curriculum.method, "problem": problem or None}
        write_json(args.json, facts | _counts(curriculum, prompts) | {"steps": steps, "groups": groups} | lists)
    if args.csv:
        for name, rows in (("steps", steps), ("groups", groups), ("prompts", seen)):
            write_csv(args.csv / f"{name}.csv", rows)
    parts: list[str | Table] = [f"{heading(run)}\n{accounting_line(run, curriculum)}"]
    if run.history:
        few = pd.DataFrame(some(steps.to_dict("records")))
        few["beliefs"] = [f"[{bars(counts)}]" for counts in few.belief_histogram]
        shown = "" if len(few) == len(steps) else f" ({len(few)} of {len(steps)} steps; --csv has all)"
        parts += [table(f"Beliefs and draws by step{shown}", few, STEPS, SHARES), allocation(groups)]
    else:
        parts.append("no batch is committed yet")
    titles = {"hardest": "Hardest prompts (seen at least once)", "most_visited": "Most visited prompts"}
    short = {name: rows.assign(text=rows.text.str.slice(0, 64)) for name, rows in lists.items()}
    parts += [table(titles[name], rows, PROMPTS) for name, rows in short.items()]
    if curriculum is not None:
        parts.append(f"{len(seen)} of {len(prompts)} prompts seen, {len(prompts) - len(seen)} never")
    if not args.no_plot:
        parts.append(_plot(run, prompts))
    show(*parts)
    return [problem] if problem else []


def _plot(run: Run, prompts: pd.DataFrame) -> str:
    from cures_ray.ledger.picture import draw_ledger

    few = prompts.iloc[:: max(1, -(-len(prompts) // PICTURED))]
    now = (few.accuracy.to_numpy(), few.visits.to_numpy()) if len(few) else None
    title = f"{run.folder}: {run.config.curriculum.method}, {len(run.history)} steps, {len(run.prompts.ids):,} prompts"
    try:
        return f"picture: {draw_ledger(run.history, run.folder / 'ledger.png', title, now)}"
    except OSError as error:
        return f"no picture: {error}"


def heading(run: Run) -> str:
    c = run.config.curriculum
    text = f"{run.folder}: method {c.method}, m = {c.prompts_per_step} prompts and N = {c.rollouts_per_step} rollouts"
    if c.method == "cures" and c.sampling == "potential":
        text += f" a step, tau {'steered to its ESS' if c.tau is None else f'= {c.tau:g}'}"
    return f"{text}; {len(run.history)} of {run.config.trainer.steps} steps committed"


def step_rows(history: list[dict[str, Any]]) -> pd.DataFrame:
    """A row a committed batch: its metrics, its counts, and quantiles of the beliefs."""
    rows = []
    for line in history:
        low, middle, high = quantiles(line["belief_histogram"])
        counts = {name: line[name] for name in ("planned", "trained", "discarded", "belief_histogram")}
        rows.append({"step": line["batch"] + 1, "p10": low, "p50": middle, "p90": high} | counts | line["metrics"])
    return pd.DataFrame(rows)


def group_rows(history: list[dict[str, Any]]) -> pd.DataFrame:
    """Rollouts and believed accuracy of the groups as they were planned, at most 512 a step."""
    rows = [(h["batch"] + 1, n, p) for h in history for n, p in zip(h["n"], h["p"], strict=True)]
    return pd.DataFrame(rows, columns=["step", "n", "accuracy"])


def allocation(groups: pd.DataFrame) -> Table:
    """Rollouts against believed accuracy (the paper's Fig. 4), all steps together."""
    tenth = (groups.accuracy * 10).astype(int).clip(upper=9)
    rows = groups.groupby(tenth).n.agg(["size", "mean", "min", "max"]).reset_index()
    rows["bar"] = ["█" * max(1, round(24 * mean / rows["mean"].max())) for mean in rows["mean"]]
    rows["accuracy"] = [f"{i / 10:.1f} - {(i + 1) / 10:.1f}" for i in rows.accuracy]
    return table("Rollouts against believed accuracy (groups as they were planned, at most 512 a step)", rows, GROUPS)


def prompt_rows(run: Run, curriculum: Curriculum) -> pd.DataFrame:
    """What is believed of every prompt."""
    alpha, beta = curriculum.pool.belief.counts(np.arange(len(run.prompts.ids)))
    visits, shown = curriculum.pool.belief.visits, run.prompts.shown.to_pandas()
    names = [f"{int(i):016x}" for i in run.prompts.ids]
    rows = {"prompt": names, "level": shown.level, "accuracy": alpha / (alpha + beta), "alpha": alpha, "beta": beta}
    return pd.DataFrame(rows | {"visits": visits.astype(np.int64), "text": shown.text})


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


def _counts(curriculum: Curriculum | None, prompts: pd.DataFrame) -> dict[str, Any]:
    if curriculum is None:
        return {}
    a = curriculum.accounting
    counts: dict[str, Any] = {"planned": a.planned, "trained": a.trained, "in_flight": a.in_flight}
    counts["discarded"] = {reason.value: count for reason, count in a.discarded.items()}
    return {"accounting": counts, "prompts": {"count": len(prompts), "seen": int((prompts.visits > 0).sum())}}


def _replay(args: argparse.Namespace) -> list[str]:
    run = open_run(args.run)
    result = replay(run, args.replay)
    if not result.actual:
        show(f"{run.folder}: no batch was drawn in the journals still kept; nothing to replay", *result.problems)
        return result.problems
    sides = result.sides()
    rows = pd.DataFrame(
        {"configuration": name, **d.figures(a)}
        for name, drawn in sides.items()
        for d, a in zip(drawn, result.actual, strict=True)
    )
    totals = pd.DataFrame({"who": name, **result.totals(drawn)} for name, drawn in sides.items())
    if args.json:
        facts: dict[str, Any] = {"run": str(run.folder), "alternatives": result.overrides, "notes": result.notes}
        facts |= {"problems": result.problems, "agrees_with_history": [result.agrees, result.compared]}
        write_json(args.json, facts | {"totals": totals.rename(columns={"who": "configuration"}), "batches": rows})
    if args.csv:
        write_csv(args.csv / "replay.csv", rows)
        draws = [
            pd.DataFrame({"configuration": name, "batch": d.batch, "row": d.index, "n": d.n, "accuracy": d.p})
            for name, drawn in sides.items()
            for d in drawn
        ]
        every = pd.concat(draws)
        every["prompt"] = [f"{int(i):016x}" for i in run.prompts.ids[every["row"]]]
        write_csv(args.csv / "draws.csv", every)
    first, last = result.actual[0].batch, result.actual[-1].batch
    parts: list[str | Table] = [
        f"{run.folder}: batches {first} to {last} replayed from the journal"
        + (" (older ones are not kept: curriculum.snapshot_every)" if first else "")
        + f"; {result.agrees} of {result.compared} committed ones agree with the history\n"
        "Every batch is drawn from the beliefs that the run had then, with its random numbers. Shares of rollouts "
        "under those beliefs:\nmixed: in groups with both outcomes, at the posterior mean, and averaged over the "
        "posterior (Beta); p<0.1, p>0.9: on hard and easy prompts."
    ]
    parts += ["\n".join(f"note: {note}" for note in result.notes)] if result.notes else []
    parts.append(table("All batches", totals, DRAWS, SHARES))
    rows["who"] = rows.configuration + rows.role.map(lambda role: "" if role == "train" else f" ({role}s)")
    shown = rows[rows.batch.isin(some([d.batch for d in result.actual]))].sort_values("batch", kind="stable")
    parts.append(table("By batch (at most 24; --csv has all)", shown, DRAWS, SHARES))
    show(*parts, *result.problems)
    return result.problems
