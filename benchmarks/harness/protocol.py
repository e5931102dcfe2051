"""``cures bench protocol``: the comparison of PROTOCOL.md, part by part. Continues after any stop.

    tune-a, tune-b   the same learning rates for every arm, on seeds 100 and 101; writes OUT/rates.json
    a                SmolLM2 on reasoning-gym
    b                chain, program and chain_opaque: the arms, the ladder, the rivals
    c                the questions that had no power

Cells are processes (sweep.py). OUT/runs/*.jsonl holds one compact line a finished run, OUT/PART.md the tables.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import sys
import time
from pathlib import Path

import numpy as np

from benchmarks.harness import lr_sweep
from benchmarks.harness.cell import BASES_FOLDER, Spec, spec_of
from benchmarks.harness.deviations import deviations_of
from benchmarks.harness.paired import Paired, holm, mean_accuracy, paired
from benchmarks.harness.real_task import REAL_MODEL, REAL_TASK
from benchmarks.harness.report import table
from benchmarks.harness.runs import Record, commit_runs
from benchmarks.harness.sweep import Sweep
from benchmarks.inprocess.costs import DEVICE
from cures_ray.messages import ConfigError

GRPO, SPO, DEFAULT = "grpo@prompts_per_step=64", "spo_nopilot", "default"
FOUR = (GRPO, SPO, "default_uniform", DEFAULT)
SIX = (GRPO, "rpp_single", SPO, "default_uniform", DEFAULT, "default_permuted")
LADDER = ("ladder_baseline", "ladder_predictor", "ladder_scale", "ladder_thinning")
CONTROLS = ("random_default", "oracle_default")
RIVALS = ("spo", "spo_tokens", "shrinkage_2", "shrinkage_4", "bots", "gps", "greso", "default_hidden")
RIVALS += ("grpo", "dapo", "mopps")
RIVAL_SEEDS = 5
QUESTIONS = (
    *("default_uniform", DEFAULT, "cures_online_sampling", "cures_online_allocation"),
    *("default@tau=0.03", "default@tau=0.1", "default@tau=0.3"),
    *("default@target_ess_fraction=0.25", "default@target_ess_fraction=0.75"),
    *("cures_n1", "cures", "cures_n8", "cures_discount"),
)
COLLAPSE = ("default@tau=0.03@data.max_train_prompts=512", f"{GRPO}@data.max_train_prompts=512")
RATES = {"a": "1e-5,2e-5,4e-5,8e-5", "b": "5e-4,1e-3,2e-3,4e-3"}
BUDGET = {"a": 2048, "b": 20_480, "c": 20_480}
FIRST_SEED = {"a": 0, "b": 60, "c": 80}
SYNTHETIC = ("chain", "program", "chain_opaque")
FOLLOWS_DEFAULT = ("default_permuted", *CONTROLS)  # take the learning rate of ``default``


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="cures bench protocol", description="Run a part of benchmarks/harness/PROTOCOL.md."
    )
    p.add_argument("part", choices=["a", "b", "c", "tune-a", "tune-b"])
    p.add_argument("--seeds", help="how many, or a list such as 60,61; default: 6 for a, 10 for b, 15 for c")
    p.add_argument("--arms", default="", help="a: 4 (default) or 6; else names of arms, comma-separated")
    p.add_argument("--tasks", default=",".join(SYNTHETIC), help="b: which tasks")
    p.add_argument("--budget-rollouts", type=int, help="shorter runs to try the machinery; not the protocol")
    p.add_argument("--rates", type=Path, help="rates.json of a tuning; default: the rates of arms.py")
    p.add_argument("--out", type=Path, required=True)
    p.add_argument("--bases", type=Path, default=BASES_FOLDER)
    p.add_argument("--jobs", type=int, default=2, help="cells side by side")
    p.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, ...")
    p.add_argument("--minutes", type=float, help="start no further cell after this time")
    p.add_argument("--retry-failed", action="store_true")
    p.add_argument("--other-code", action="store_true", help="keep finished cells that ran another version of the code")
    p.add_argument("--commit", action="store_true", help="also write the lines to benchmarks/results/runs")
    return p


def main(argv: list[str]) -> int:
    """Exit code 1 when a cell failed, 2 when cells are left for the next call."""
    args = parser().parse_args(argv)
    os.environ[DEVICE] = args.device
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # ends the cells too
    if args.part.startswith("tune-"):
        return tune(args)
    specs = make_specs(args)
    until = time.time() + 60 * args.minutes if args.minutes else None
    sweep = Sweep(args.out, args.jobs, 7200.0, args.retry_failed, args.other_code, until, log=_say)
    try:
        sweep.run(specs)
    finally:
        records = [r for r in map(sweep.result, specs) if r is not None]
        for folder in [args.out, None] if args.commit else [args.out]:
            commit_runs(f"protocol_{args.part}", records, **({"folder": folder} if folder else {}))
        text = report(args.part, records, f"cures bench protocol {shlex.join(argv)}", args.budget_rollouts)
        (args.out / f"{args.part}.md").write_text(text)
    _say(text)
    failed = sum(record["status"] != "done" for record in records)
    return 1 if failed else 2 if len(records) < len(specs) else 0


# -- cells ---------------------------------------------------------------------------------


def make_specs(args: argparse.Namespace) -> list[Spec]:
    """The cells of a part, seed by seed, so that one that is cut short has complete pairs.

    Raises:
        ConfigError: unknown arm or task.
    """
    part, rates = args.part, json.loads(args.rates.read_text()) if args.rates else {}
    seeds = seeds_of(args.seeds, part)
    specs = []
    for place, seed in enumerate(seeds):
        for task, variant, levels, arms in cells_of(args, place):
            common = argparse.Namespace(
                task=task,
                variant=variant,
                levels=levels,
                budget_rollouts=args.budget_rollouts or BUDGET[part],
                bases=args.bases,
            )
            specs += [spec_of(common, rated(arm, rates), seed, "inprocess", {}) for arm in arms]
    return specs


def seeds_of(text: str | None, part: str) -> list[int]:
    if text and "," in text:
        return [int(s) for s in text.split(",") if s]
    count = int(text) if text else {"a": 6, "b": 10, "c": 15}[part]
    return list(range(FIRST_SEED[part], FIRST_SEED[part] + count))


def cells_of(args: argparse.Namespace, place: int) -> list[tuple[str, str, str, list[str]]]:
    """(task, variant, levels, arms) of the seed at ``place`` of the list."""
    named = [a for a in args.arms.split(",") if a and not a.isdecimal()]
    if args.part == "a":
        return [(REAL_TASK, REAL_MODEL, "", named or list(SIX if args.arms == "6" else FOUR))]
    if args.part == "b":
        tasks = [t for t in args.tasks.split(",") if t]
        if unknown := set(tasks) - set(SYNTHETIC):
            raise ConfigError(f"--tasks: {', '.join(sorted(unknown))} is none of {', '.join(SYNTHETIC)}")
        rivals = RIVALS if place < RIVAL_SEEDS else ()
        return [(task, "T", "", named or [*SIX, *LADDER, *CONTROLS, *rivals]) for task in tasks]
    collapse: list[tuple[str, str, str, list[str]]] = [("chain", "T", level, list(COLLAPSE)) for level in ("1", "6")]
    return [("chain", "T", "", named or [GRPO, *QUESTIONS]), *([] if named else collapse)]


def rated(label: str, rates: dict[str, float]) -> str:
    """``label`` at its tuned learning rate."""
    rate = rates.get(label, rates.get(DEFAULT) if label in FOLLOWS_DEFAULT else None)
    return label if rate is None else f"{label}@learner.lr={rate:g}"


def tune(args: argparse.Namespace) -> int:
    """One sweep for all arms of a part; ``OUT/rates.json`` maps arms to their best rates."""
    part = args.part[-1]
    arms = args.arms or ",".join(a for a in SIX if a not in FOLLOWS_DEFAULT)
    task = ["--task", REAL_TASK, "--variant", REAL_MODEL] if part == "a" else ["--task", args.tasks.split(",")[0]]
    budget = str(args.budget_rollouts or BUDGET[part])
    words = ["--methods", arms, "--rates", RATES[part], "--budget-rollouts", budget, *task, "--out", str(args.out)]
    words += ["--bases", str(args.bases), "--jobs", str(args.jobs)]
    words += ["--minutes", str(args.minutes)] if args.minutes else []
    code = lr_sweep.main(words)
    rows = lr_sweep.rate_rows(lr_sweep.finished(words))
    best = {row["arm"]: row["lr"] for row in rows if row["best"]}
    (args.out / "rates.json").write_text(json.dumps(best, indent=1) + "\n")
    tried = sorted({row["lr"] for row in rows if row["lr"]})
    for arm, rate in best.items():
        if rate in (tried[0], tried[-1]):
            _say(f"{arm}: its best rate {rate:g} is at an end; add a rate there for every arm (PROTOCOL.md)")
    return code


# -- tables --------------------------------------------------------------------------------


def report(part: str, records: list[Record], command: str, budget: int | None = None) -> str:
    """The tables of one part, for every task (and level mix) apart."""
    parts = [f"# Part {part}\n", f"`{command}`\n"]
    if budget:
        parts.append(f"Shorter runs than the protocol's: {budget} rollouts. A trial of the machinery, no result.\n")
    groups: dict[str, list[Record]] = {}
    for record in records:
        spec = record["spec"]
        mix = f", levels {spec['levels']}" if spec.get("levels") else ""
        groups.setdefault(f"{spec['task']} {spec['variant']}{mix}", []).append(record)
    for name, own in groups.items():
        parts += [f"## {name}\n", *task_tables(own, budget or BUDGET[part])]
    labels = [record["spec"]["label"] for record in records]
    if lines := deviations_of(labels):
        parts += ["## Where arms are not what their papers have\n", *(f"- {line}" for line in lines), ""]
    return "\n".join(parts)


def task_tables(records: list[Record], budget: int) -> list[str]:
    runs: dict[str, dict[int, Record]] = {}
    for record in records:
        if record["status"] == "done":
            runs.setdefault(_plain(record["spec"]["label"]), {})[record["spec"]["seed"]] = record
    rows = [_row(arm, own, budget) for arm, own in runs.items()]
    head = ["arm", "seeds", "lr", "start", "mean accuracy, greedy", "sampled", "at the end, greedy", "sampled"]
    found = [table(head, rows)]
    if DEFAULT in runs and (tests := primary(runs, budget)):
        adjusted = holm([test.p for _, test in tests])
        lines = []
        for (name, t), p in zip(tests, adjusted, strict=True):
            power = [f"{t.detectable:.3f}", str(t.seeds_for(0.02)), "" if t.detectable <= 0.04 else "underpowered"]
            lines.append([name, str(t.seeds), t.text(), f"{t.p:.3f}", f"{p:.3f}", *power])
        head = ["primary: difference of mean accuracy", "pairs", "mean [95 %]", "p", "Holm"]
        found += [table([*head, "detectable", "seeds for 0.02", ""], lines)]
    return [*found, safety(runs, budget), secondary(runs)]


def primary(runs: dict[str, dict[int, Record]], budget: int) -> list[tuple[str, Paired]]:
    """The family of tests: default against SPO and tuned GRPO, greedy and sampled."""
    found = []
    for rival in (SPO, GRPO):
        for kind in ("greedy", "sampled"):
            test = difference(runs, DEFAULT, rival, kind, budget)
            if test is not None:
                found.append((f"default − {rival}, {kind}", test))
    return found


def difference(runs: dict[str, dict[int, Record]], one: str, two: str, kind: str, budget: int) -> Paired | None:
    """Paired by seed; None with fewer than two pairs."""
    seeds = sorted(set(runs.get(one, {})) & set(runs.get(two, {})))
    if len(seeds) < 2:
        return None
    values = [[mean_accuracy(runs[arm][seed]["curve"], kind, budget) for seed in seeds] for arm in (one, two)]
    return paired(np.array(values[0]), np.array(values[1]))


def safety(runs: dict[str, dict[int, Record]], budget: int) -> str:
    """A predictor that can be wrong: what it costs when it knows nothing, and what the mixture costs when it knows."""
    baseline = "ladder_baseline" if "ladder_baseline" in runs else "wide"
    pairs = [("default_permuted", baseline), ("default_permuted", "rpp_single"), ("default", "cures_wide")]
    pairs += [("default_permuted", "cures_wide_permuted"), ("default", "default_uniform"), ("default", baseline)]
    lines = []
    for one, two in pairs:
        tests = [difference(runs, one, two, kind, budget) for kind in ("greedy", "sampled")]
        if all(tests):
            lines.append([f"{one} − {two}", str(tests[0].seeds), *(t.text() for t in tests if t)])  # type: ignore[union-attr]
    return table(["difference of mean accuracy [95 %]", "pairs", "greedy", "sampled"], lines) if lines else ""


def secondary(runs: dict[str, dict[int, Record]]) -> str:
    """Cost of tuned GRPO to 80 % of its gain over that of each arm."""
    from benchmarks.harness.analysis import curve_of
    from benchmarks.harness.statistics import speedup

    if GRPO not in runs:
        return ""
    axes = {"rollouts": "rollouts", "tokens": "tokens", "learner_flops": "learner FLOPs", "seconds": "seconds"}
    lines = []
    for arm, own in runs.items():
        cells = []
        for axis in axes:
            curves = [{seed: curve_of(r, axis) for seed, r in each.items()} for each in (runs[GRPO], own)]
            cells.append(speedup(curves[0], curves[1], 0.8, np.random.default_rng(0)).text())
        lines.append([arm, *cells])
    return table(["tuned GRPO's cost to 80 % of its gain ÷ the arm's", *axes.values()], lines)


def _row(arm: str, own: dict[int, Record], budget: int) -> list[str]:
    records = list(own.values())
    means = [np.mean([mean_accuracy(r["curve"], kind, budget) for r in records]) for kind in ("greedy", "sampled")]
    ends = [np.mean([r["curve"][-1][kind] for r in records]) for kind in ("greedy", "sampled")]
    start = np.mean([r["curve"][0]["sampled"] for r in records])
    rate = records[0]["config"]["learner"]["lr"]
    return [arm, str(len(records)), f"{rate:g}", f"{start:.3f}", *(f"{v:.3f}" for v in (*means, *ends))]


def _plain(label: str) -> str:
    """The label without its learning rate."""
    return "@".join(part for part in label.split("@") if not part.startswith("learner.lr="))


def _say(line: str) -> None:
    print(line, flush=True)
