"""Which cells PROTOCOL.md asks for: arms, tasks, seeds, budgets, and the learning rate of each arm."""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

from benchmarks.harness.cell import Spec, spec_of
from benchmarks.harness.real_task import REAL_MODEL, REAL_TASK
from benchmarks.harness.runs import Record
from cures_ray.messages import ConfigError

Runs = dict[str, dict[int, Record]]  # arm, without its learning rate -> seed -> finished record
Rates = dict[str, dict[str, float]]  # task -> arm -> learning rate

GRPO, SPO, DEFAULT = "grpo@prompts_per_step=64", "spo_nopilot", "default"
FOUR = (GRPO, SPO, "default_uniform", DEFAULT)
SIX = (GRPO, "rpp_single", SPO, "default_uniform", DEFAULT, "default_permuted")
LADDER = ("ladder_baseline", "ladder_predictor", "ladder_scale", "ladder_thinning")
CONTROLS = ("random_default", "oracle_default")
RIVALS = ("spo", "spo_tokens", "shrinkage_2", "shrinkage_4", "bots", "gps", "greso", "default_hidden")
RIVALS += ("grpo", "dapo", "mopps")
QUESTIONS = (
    *("default_uniform", DEFAULT, "cures_online_sampling", "cures_online_allocation"),
    *("default@tau=0.03", "default@tau=0.1", "default@tau=0.3"),
    *("default@target_ess_fraction=0.25", "default@target_ess_fraction=0.75"),
    *("cures_n1", "cures", "cures_n8", "cures_discount"),
)
COLLAPSE = ("default@tau=0.03@data.max_train_prompts=512", f"{GRPO}@data.max_train_prompts=512")
PREDICTOR_ALONE = "cures_wide"

SYNTHETIC = ("chain", "program", "chain_opaque")
RATES = {"a": "1e-5,2e-5,4e-5,8e-5", "b": "5e-4,1e-3,2e-3,4e-3"}
# an arm that is not tuned takes the rate of the tuned arm that it is most like
LENDER = dict.fromkeys(("default_permuted", PREDICTOR_ALONE, *CONTROLS, *LADDER, "default_hidden"), DEFAULT)
LENDER |= dict.fromkeys(("spo", "spo_tokens"), SPO)
LENDER |= dict.fromkeys(("grpo", "dapo", "mopps", "gps", "bots", "greso", "shrinkage_2", "shrinkage_4"), GRPO)
TUNED = tuple(arm for arm in SIX if arm not in LENDER)

# The map: how the prompts are mixed, and how many prompts share the 256 rollouts of a step.
MAP_LEVELS = {"1,1,2": "few mixed groups", "": "all levels", "5,6": "hard"}
MAP_PROMPTS = {256: 1, 64: 4, 32: 8}  # prompts a step -> rollouts a prompt


@dataclass(frozen=True, slots=True)
class Part:
    """One part of the protocol."""

    budget: int  # rollouts a run, everything charged
    first_seed: int
    seeds: int
    rival_seeds: int = 0  # of them, those on which the rivals run too


PARTS = {
    "a": Part(2048, 0, 6),
    "b": Part(20_480, 60, 10, rival_seeds=5),
    "c": Part(20_480, 80, 15),
    "map": Part(20_480, 120, 5),
}
BUDGET = {name: part.budget for name, part in PARTS.items()}


def with_size(arm: str, prompts: int) -> str:
    """``arm`` with ``prompts`` a step; 256, one rollout each, is its own shape."""
    return arm if prompts == 256 else f"{arm}@prompts_per_step={prompts}"


MAP_ARMS = (
    GRPO,
    "rpp_single",
    "default_uniform",
    *(with_size(arm, m) for m in MAP_PROMPTS for arm in (DEFAULT, "default_permuted")),
)


def make_specs(args: argparse.Namespace) -> list[Spec]:
    """The cells of a part, seed by seed, so that one that is cut short has complete pairs.

    Raises:
        ConfigError: unknown arm or task, or rates of a tuning that lack a task.
    """
    rates: Rates = json.loads(args.rates.read_text()) if args.rates else {}
    specs = []
    for place, seed in enumerate(seeds_of(args.seeds, args.part)):
        for task, variant, levels, arms in cells_of(args, place):
            common = argparse.Namespace(
                task=task,
                variant=variant,
                levels=levels,
                budget_rollouts=args.budget_rollouts or BUDGET[args.part],
                bases=args.bases,
            )
            specs += [spec_of(common, rated(arm, task, rates), seed, "inprocess", {}) for arm in arms]
    return specs


def seeds_of(text: str | None, part: str) -> list[int]:
    if text and "," in text:
        return [int(s) for s in text.split(",") if s]
    count = int(text) if text else PARTS[part].seeds
    return list(range(PARTS[part].first_seed, PARTS[part].first_seed + count))


def cells_of(args: argparse.Namespace, place: int) -> list[tuple[str, str, str, list[str]]]:
    """(task, variant, levels, arms) of the seed at ``place`` of the list."""
    named = [a for a in args.arms.split(",") if a and not a.isdecimal()]
    if args.part == "a":
        return [(REAL_TASK, REAL_MODEL, "", named or list(SIX if args.arms == "6" else FOUR))]
    if args.part == "b":
        rivals = RIVALS if place < PARTS["b"].rival_seeds else ()
        arms = named or [*SIX, *LADDER, PREDICTOR_ALONE, *CONTROLS, *rivals]
        return [(task, "T", "", arms) for task in tasks_of(args.tasks)]
    if args.part == "map":
        return [("chain", "T", levels, named or list(MAP_ARMS)) for levels in MAP_LEVELS]
    collapse: list[tuple[str, str, str, list[str]]] = [("chain", "T", level, list(COLLAPSE)) for level in ("1", "6")]
    return [("chain", "T", "", named or [GRPO, *QUESTIONS]), *([] if named else collapse)]


def tasks_of(text: str) -> list[str]:
    """Raises ConfigError for a task that part b has not."""
    tasks = [t for t in text.split(",") if t]
    if unknown := set(tasks) - set(SYNTHETIC):
        raise ConfigError(f"--tasks: {', '.join(sorted(unknown))} is none of {', '.join(SYNTHETIC)}")
    return tasks


def rated(label: str, task: str, rates: Rates) -> str:
    """``label`` at its tuned learning rate: its own, else that of the arm whose shape it has or that lends to it.

    Raises:
        ConfigError: there are rates, and none of ``task``.
    """
    if not rates:
        return label
    if task not in rates:
        raise ConfigError(f"--rates: no rates of task {task}; run tune-b --tasks {task} into the same file")
    own, name = rates[task], label.split("@")[0]
    rate = own.get(label, own.get(name, own.get(LENDER.get(name, ""))))
    return label if rate is None else f"{label}@learner.lr={rate:g}"


def plain(label: str) -> str:
    """The label without its learning rate."""
    return "@".join(part for part in label.split("@") if not part.startswith("learner.lr="))


def default_out(part: str) -> Path:
    return Path("runs/bench/protocol") / part
