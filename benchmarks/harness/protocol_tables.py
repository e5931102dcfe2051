"""The tables of ``cures bench protocol``: accuracies, the family of tests, costs, beliefs, and the map."""

from __future__ import annotations

import numpy as np

from benchmarks.harness.deviations import DEVIATIONS
from benchmarks.harness.names import display
from benchmarks.harness.paired import Paired, holm, mean_accuracy, paired
from benchmarks.harness.protocol_cells import (
    BUDGET,
    DEFAULT,
    GRPO,
    MAP_LEVELS,
    MAP_PROMPTS,
    SPO,
    Runs,
    plain,
    with_size,
)
from benchmarks.harness.report import table
from benchmarks.harness.runs import Record, explain
from cures_ray.curriculum.experts import EXPERTS

MARGIN = 0.02  # of mean accuracy: a smaller loss does not count as worse


def report(part: str, records: list[Record], command: str, budget: int | None = None) -> str:
    """The tables of one part, for every task (and level mix) apart."""
    parts = [f"# Part {part}\n", f"`{command}`\n", what_ran(records)]
    if budget:
        parts.append(f"Shorter runs than the protocol's: {budget} rollouts. A trial of the machinery, no result.\n")
    groups: dict[str, list[Record]] = {}
    for record in records:
        spec = record["spec"]
        mix = f", levels {spec['levels']}" if spec.get("levels") else ""
        groups.setdefault(f"{spec['task']} {spec['variant']}{mix}", []).append(record)
    for name, own in groups.items():
        parts += [f"## {name}\n", *task_tables(own, budget or BUDGET[part])]
    if part == "map":
        parts += ["## When it pays\n", map_table(records, budget or BUDGET[part])]
    names = dict.fromkeys(record["spec"]["label"].split("@")[0] for record in records)
    if lines := [f"- {display(name)}: {DEVIATIONS[name]}" for name in names if name in DEVIATIONS]:
        parts += ["## Where arms are not what their papers have\n", *lines, ""]
    return "\n".join(parts)


def what_ran(records: list[Record]) -> str:
    """Finished and failed cells, and the commits that they ran."""
    done = [record for record in records if record["status"] == "done"]
    commits = sorted({record["commit"] for record in done})
    return f"{len(done)} finished cells, {len(records) - len(done)} failed; commits {', '.join(commits) or 'none'}.\n"


def runs_by_arm(records: list[Record]) -> Runs:
    """The finished records, without the learning rates in the labels."""
    runs: Runs = {}
    for record in records:
        if record["status"] == "done":
            runs.setdefault(plain(record["spec"]["label"]), {})[record["spec"]["seed"]] = record
    return runs


def task_tables(records: list[Record], budget: int) -> list[str]:
    runs = runs_by_arm(records)
    rows = [_row(arm, own, budget) for arm, own in runs.items()]
    head = ["arm", "seeds", "lr", "start", "mean accuracy, greedy", "sampled", "at the end, greedy", "sampled"]
    found = [table(head, rows)]
    constants = [r["best_constant"] for own in runs.values() for r in own.values() if "best_constant" in r]
    if constants:
        found.append(f"The best constant answer: {np.mean(constants):.3f} (mean over runs).\n")
    if DEFAULT in runs and (tests := primary(runs, budget)):
        adjusted = holm([test.p for _, test in tests])
        lines = []
        for (name, t), p in zip(tests, adjusted, strict=True):
            power = [f"{t.detectable:.3f}", str(t.seeds_for(0.02)), "" if t.detectable <= 0.04 else "underpowered"]
            lines.append([name, str(t.seeds), t.text(), f"{t.p:.3f}", f"{p:.3f}", *power])
        head = ["primary: difference of mean accuracy", "pairs", "mean [95 %]", "p", "Holm"]
        found += [table([*head, "detectable", "seeds for 0.02", ""], lines)]
    return [*found, safety(runs, budget), secondary(runs), beliefs(runs)]


def primary(runs: Runs, budget: int) -> list[tuple[str, Paired]]:
    """The family of tests: default against SPO and tuned GRPO, greedy and sampled."""
    found = []
    for rival in (SPO, GRPO):
        for kind in ("greedy", "sampled"):
            test = difference(runs, DEFAULT, rival, kind, budget)
            if test is not None:
                found.append((f"default − {display(rival)}, {kind}", test))
    return found


def difference(runs: Runs, one: str, two: str, kind: str, budget: int) -> Paired | None:
    """Paired by seed; None with fewer than two pairs."""
    seeds = sorted(set(runs.get(one, {})) & set(runs.get(two, {})))
    if len(seeds) < 2:
        return None
    values = [[mean_accuracy(runs[arm][seed]["curve"], kind, budget) for seed in seeds] for arm in (one, two)]
    return paired(np.array(values[0]), np.array(values[1]))


def safety(runs: Runs, budget: int) -> str:
    """A predictor that can be wrong: what it costs when it knows nothing, and what the mixture costs when it knows."""
    baseline = "ladder_baseline" if "ladder_baseline" in runs else "wide"
    pairs = [("default_permuted", baseline), ("default_permuted", "rpp_single"), (DEFAULT, "cures_wide")]
    pairs += [("default_permuted", "cures_wide_permuted"), (DEFAULT, "default_uniform"), (DEFAULT, baseline)]
    lines = []
    for one, two in pairs:
        tests = [t for kind in ("greedy", "sampled") if (t := difference(runs, one, two, kind, budget)) is not None]
        if len(tests) == 2:
            cells = [cell for t in tests for cell in (t.text(), not_worse(t))]
            lines.append([f"{display(one)} − {display(two)}", str(tests[0].seeds), *cells])
    head = ["difference of mean accuracy [95 %]", "pairs", "greedy", f"above −{MARGIN}", "sampled", f"above −{MARGIN}"]
    return table(head, lines) if lines else ""


def not_worse(test: Paired) -> str:
    """Non-inferiority at MARGIN: the whole interval lies above it, below it, or neither."""
    return "yes" if test.low > -MARGIN else "no" if test.high < -MARGIN else "open"


def secondary(runs: Runs) -> str:
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
            cells.append(speedup(curves[0], curves[1], 0.8, np.random.default_rng(0), at_end=True).text())
        lines.append([display(arm), *cells])
    return table(["tuned GRPO's cost to 80 % of its gain ÷ the arm's", *axes.values()], lines)


def beliefs(runs: Runs) -> str:
    """What the belief was worth at the end of the runs: losses in nats a rollout, calibration, the experts' weights."""
    names = ["logloss", "ece", *(f"{kind}_{e}" for kind in ("logloss", "weight") for e in EXPERTS["mixture"])]
    lines = []
    for arm, own in runs.items():
        found = [explain(record) for record in own.values()]
        if any("belief/logloss" in values for values in found):
            cells = [[v[f"belief/{name}"] for v in found if f"belief/{name}" in v] for name in names]
            lines.append([display(arm), *(f"{np.mean(values):.3f}" if values else "–" for values in cells)])
    head = ["log-loss of the belief", "calibration error"]
    head += [f"{kind} {e}" for kind in ("log-loss", "weight") for e in EXPERTS["mixture"]]
    return table(["belief at the end", *head], lines) if lines else ""


def map_table(records: list[Record], budget: int) -> str:
    """Difference to tuned GRPO by mix of prompts, rollouts a prompt and features; and how mixed the groups were."""
    head = ["prompts", "mixed groups of 4 at the start", "rollouts a prompt", "features", "pairs", "greedy", "sampled"]
    lines = []
    for levels, words in MAP_LEVELS.items():
        wanted = [int(level) for level in levels.split(",") if level]
        runs = runs_by_arm([r for r in records if (r["spec"].get("levels") or []) == wanted])
        mixed = [explain(r).get("mixed_share_at_start", float("nan")) for r in runs.get(GRPO, {}).values()]
        share = f"{np.mean(mixed):.2f}" if mixed else "–"
        shapes = [("informative", DEFAULT), ("permuted", "default_permuted")]
        arms = [(n, kind, with_size(arm, m)) for m, n in MAP_PROMPTS.items() for kind, arm in shapes]
        arms += [(1, "informative, uniform draws", "default_uniform"), (1, "none (REINFORCE++)", "rpp_single")]
        for n, kind, arm in arms:
            metrics = ("greedy", "sampled")
            tests = [t for metric in metrics if (t := difference(runs, arm, GRPO, metric, budget)) is not None]
            if len(tests) == 2:
                lines.append([words, share, str(n), kind, str(tests[0].seeds), *(t.text() for t in tests)])
    return table(head, lines) + "\nDifference of mean accuracy to tuned GRPO (64 × 4), paired by seed, 95 % interval.\n"


def _row(arm: str, own: dict[int, Record], budget: int) -> list[str]:
    records = list(own.values())
    means = [np.mean([mean_accuracy(r["curve"], kind, budget) for r in records]) for kind in ("greedy", "sampled")]
    ends = [np.mean([r["curve"][-1][kind] for r in records]) for kind in ("greedy", "sampled")]
    start = np.mean([r["curve"][0]["sampled"] for r in records])
    rate = records[0]["config"]["learner"]["lr"]
    return [display(arm), str(len(records)), f"{rate:g}", f"{start:.3f}", *(f"{v:.3f}" for v in (*means, *ends))]
