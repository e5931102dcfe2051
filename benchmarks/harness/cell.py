"""One run of a sweep, in its own process: ``python -m benchmarks.harness.cell SPEC.json RESULT.json``.

The result is the same for both engines: costs and accuracies at every evaluation, what the batches were made of, the
accounting. It is written at the end in one rename, so a killed run leaves nothing.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness.arms import BASES, arm_config, split_arm
from benchmarks.harness.real_task import REAL_MODEL, REAL_TASK, prepare_real
from benchmarks.harness.results_file import ROOT, commit
from cures_ray.config import Config
from cures_ray.messages import ConfigError
from cures_ray.synthetic.tasks import TASKS

BASES_FOLDER = Path("runs/bench/base")
COST_AXES = {  # axis of the figures -> its heading
    "rollouts": "rollouts (all planned ones)",
    "generated_tokens": "generated tokens",
    "learner_flops": "learner FLOPs",
    "optimizer_steps": "optimizer steps",
    "seconds": "seconds of work",  # CPU in process, wall in the full system
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Spec:
    """What identifies a cell; a finished cell with an equal spec is not run again."""

    label: str  # arm, with its further overrides
    seed: int
    engine: str  # "inprocess" | "full"
    task: str
    variant: str
    budget: int  # rollouts, everything charged
    extra: dict[str, Any]  # overrides for all arms of the sweep
    base: str  # folder of the base model; made on first use
    levels: list[int] = field(default_factory=list)  # difficulty mix of the prompts; []: every level of the task once

    @property
    def name(self) -> str:
        plain = "".join(c if c.isalnum() or c in "._=-" else "+" for c in self.label)
        return f"{self.task}-{self.variant}{mix_suffix(self.levels)}-{plain}-s{self.seed}"


def mix_suffix(levels: list[int]) -> str:
    """[5, 6] -> "-levels5.6", for names of cells and base models."""
    return "-levels" + ".".join(map(str, levels)) if levels else ""


def add_task_arguments(p: argparse.ArgumentParser) -> None:
    p.add_argument("--task", choices=[*BASES, REAL_TASK], default="chain")
    p.add_argument("--variant", choices=["N", "T", REAL_MODEL], default="T", help="N: little transfer; T: much")
    p.add_argument("--levels", default="", help="difficulty mix, such as 5,6 or 1,1,2; default: all levels once")
    p.add_argument("--bases", type=Path, default=BASES_FOLDER, help="where base models are made and kept")


def spec_of(args: argparse.Namespace, label: str, seed: int, engine: str, extra: dict[str, Any]) -> Spec:
    """The cell of ``add_task_arguments`` and ``--budget-rollouts``.

    Raises:
        ConfigError: unknown arm or level.
    """
    split_arm(label)
    levels = [int(level) for level in args.levels.split(",") if level]
    if (args.task == REAL_TASK) != (args.variant == REAL_MODEL):
        raise ConfigError(f"--task {REAL_TASK} goes with --variant {REAL_MODEL}, and no other does")
    if args.task == REAL_TASK and levels:
        raise ConfigError(f"--levels: task {REAL_TASK} has families, not levels (benchmarks/harness/real_task.py)")
    if unknown := sorted(set(levels) - set(TASKS[args.task].levels if levels else ())):
        raise ConfigError(f"--levels: task {args.task} has no levels {unknown}; it has {TASKS[args.task].levels}")
    base = f"{args.task}-{args.variant}{mix_suffix(levels)}-{seed}"
    return Spec(
        label=label,
        seed=seed,
        engine=engine,
        task=args.task,
        variant=args.variant,
        budget=args.budget_rollouts,
        extra=extra,
        base=str(args.bases / (REAL_MODEL if args.task == REAL_TASK else base)),
        levels=levels,
    )


@cache
def code_digest() -> str:
    """Identity of the code that decides a cell's result: library, actors, and the engine in process."""
    files = [p for folder in ("cures_ray", "actors", "benchmarks/inprocess") for p in (ROOT / folder).rglob("*.py")]
    digest = hashlib.sha256()
    for path in sorted(files):
        digest.update(path.relative_to(ROOT).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def ensure_base(spec: Spec) -> float:
    """Make the base model of (task, variant, seed) unless it is there; seconds spent."""
    from cures_ray.synthetic.base_model import BaseModelSpec, prepare

    folder = Path(spec.base)
    if spec.task == REAL_TASK:
        prepare_real(folder)
        return 0.0
    if (folder / "summary.json").exists():
        return 0.0
    began = time.monotonic()
    made = folder.with_name(f".{folder.name}-{os.getpid()}")
    arguments: dict[str, Any] = dict(BASES[spec.task])
    made_of = BaseModelSpec(
        task=spec.task, variant=spec.variant, seed=spec.seed, levels=tuple(spec.levels) or None, **arguments
    )
    prepare(made, made_of, log=_silent)
    with suppress(OSError):  # another process was first
        made.rename(folder)
    return time.monotonic() - began


def config_of(spec: Spec, run_dir: Path) -> Config:
    """The resolved configuration of a cell."""
    wide = spec.engine == "inprocess" and spec.task != REAL_TASK
    in_process: dict[str, Any] = {"rollout.max_concurrent_rollouts": 1024} if wide else {}
    return arm_config(
        spec.label,
        task=spec.task,
        variant=spec.variant,
        seed=spec.seed,
        budget=spec.budget,
        base=spec.base,
        run_dir=str(run_dir),
        extra=in_process | spec.extra,
    )


def run_cell(spec: Spec, run_dir: Path) -> dict[str, Any]:
    """Run ``spec`` and return its record.

    Raises:
        ConfigError, RunError: as training does.
    """
    seconds_base = ensure_base(spec)
    config = config_of(spec, run_dir)
    began = time.monotonic()
    record = _in_process(spec, config) if spec.engine == "inprocess" else _full(spec, config)
    return {
        "status": "done",
        "spec": asdict(spec),
        "config": config.model_dump(),
        "wall_seconds": round(time.monotonic() - began, 2),
        "base_seconds": round(seconds_base, 2),
        "commit": commit(),
        "code": code_digest(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "load_average": [round(v, 2) for v in os.getloadavg()],
        **record,
    }


def _in_process(spec: Spec, config: Config) -> dict[str, Any]:
    import torch

    torch.set_num_threads(1)
    from benchmarks.inprocess.controls import COIN, tell_truth
    from benchmarks.inprocess.engine import run_in_process
    from cures_ray.run.preflight import prepare_inputs

    control = split_arm(spec.label)[1]
    inputs = prepare_inputs(config, claim_run_dir=False, test_verifier=False)
    run = run_in_process(
        config,
        inputs,
        spec.task,
        coin=COIN if control == "coin" else None,
        oracle=tell_truth if control.startswith("oracle") else None,
        measure_sigma=control == "oracle_sigma",
        permute=control == "permuted",
        exact=spec.task in TASKS,
    )
    constants = inputs.eval.best_constant() if inputs.eval is not None else {}
    return {
        "curve": join_curve(run.costs.marks, run.evaluations),
        "best_constant": round(constants.get("best_constant_accuracy", 0.0), 5),
        "plans": _rounded(run.plans),
        "steps": _rounded([_chosen(step) for step in run.steps]),
        "seconds_by_component": {k: round(v, 3) for k, v in run.costs.seconds.items()},
        "accounting": _accounting(run.accounting),
        "histograms": {k: np.round(v, 4).tolist() for k, v in run.histograms.items()},
    }


def _full(spec: Spec, config: Config) -> dict[str, Any]:
    """The full system: Ray, vLLM, DeepSpeed, verifier processes; costs from the run's own logs."""
    from actors.cluster.launch import train

    if split_arm(spec.label)[1]:
        raise ConfigError(f"arm {spec.label}: controls outside the configuration run in process only")
    summary = train(config)
    lines = [json.loads(line) for line in (summary.run_dir / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "accounting/planned" in line]
    return {
        "curve": join_curve(full_marks(steps), summary.evaluations),
        "plans": [],
        "steps": _rounded([_chosen(step) for step in steps]),
        "seconds_by_component": {"start": summary.seconds_start, "training": summary.seconds_training},
        "accounting": _accounting(summary.accounting),
        "histograms": {},
    }


def full_marks(steps: list[dict[str, float]]) -> list[dict[str, float]]:
    """Costs per version from the lines of metrics.jsonl, in the form of ``Costs.marks``."""
    totals = dict.fromkeys(("generated_tokens", "trained_tokens", "computed_tokens", "learner_flops", "seconds"), 0.0)
    marks, updates = [], 0
    for line in steps:
        totals["generated_tokens"] += line["rollout/tokens_per_s"] * line["time/step_s"]
        totals["seconds"] += line["time/step_s"]
        for name, key in (("trained_tokens",) * 2, ("computed_tokens",) * 2, ("learner_flops", "flops")):
            totals[name] += line.get(f"learner/{key}", 0.0)
        updates += int(line.get("learner/updates", 0.0))
        marks.append(
            {
                "version": float(line["step"]),
                "rollouts": line["accounting/planned"],
                "in_flight": line["accounting/in_flight"],
                "trained_rollouts": line["accounting/trained"],
                "optimizer_steps": float(updates),
                **totals,
            }
        )
    return marks


def join_curve(marks: list[dict[str, float]], evaluations: list[tuple[int, dict[str, float]]]) -> list[dict[str, Any]]:
    """One point an evaluation: what its version had cost, and how good it is. Version 0 is free.

    ``sampled`` is the accuracy at the training temperature: exact where the engine can compute it, else the mean of
    k samples, else greedy.
    """
    at = {int(mark["version"]): mark for mark in marks}
    points = []
    for version, metrics in evaluations:
        cost = at[version] if version else dict.fromkeys(marks[0] if marks else COST_AXES, 0.0)
        greedy = metrics["eval/greedy_accuracy"]
        sampled = metrics.get("eval/expected_accuracy", metrics.get("eval/sampled_accuracy", greedy))
        levels = {
            k.removeprefix("eval/greedy_accuracy/"): round(v, 4)
            for k, v in metrics.items()
            if k.startswith("eval/greedy_accuracy/")
        }
        point = {**cost, "version": version, "greedy": round(greedy, 5), "sampled": round(sampled, 5)}
        points.append(point | {"by_level": levels})
    return points


STEP_KEYS: tuple[str, ...] = (
    "step",
    "rollout/reward",
    "rollout/completion_tokens",
    "staleness/mean",
    "learner/grad_norm",
)
STEP_KEYS += ("learner/entropy", "learner/clip_fraction", "learner/loss", "time/step_s", "accounting/planned")


def _chosen(step: dict[str, float]) -> dict[str, float]:
    return {k: v for k, v in step.items() if k in STEP_KEYS or k.startswith(("curriculum/", "belief/"))}


def _rounded(rows: list[dict[str, float]]) -> list[dict[str, float]]:
    return [{k: float(f"{v:.5g}") for k, v in row.items()} for row in rows]


def _accounting(accounting: Any) -> dict[str, Any]:
    return {
        "planned": accounting.planned,
        "trained": accounting.trained,
        "discarded": {k.value: v for k, v in accounting.discarded.items()},
        "in_flight": accounting.in_flight,
    }


def _silent(line: str) -> None:
    return None


def main(argv: list[str]) -> int:
    spec_path, result_path = Path(argv[0]), Path(argv[1])
    spec = Spec(**json.loads(spec_path.read_text()))
    record = run_cell(spec, result_path.with_suffix(".run"))
    partial = result_path.with_suffix(".part")
    partial.write_text(json.dumps(record) + "\n")
    partial.replace(result_path)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
