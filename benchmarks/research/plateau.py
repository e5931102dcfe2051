"""``cures bench plateau``: a base model that has been trained already, for the question what a curriculum does then.

The folder is like that of a base model (model, train.jsonl, eval.jsonl, summary.json): pass its parent as ``--bases``.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

from benchmarks.harness.cell import Spec, add_task_arguments, config_of, ensure_base, spec_of


def main(argv: list[str]) -> int:
    p = argparse.ArgumentParser(prog="cures bench plateau", description="Train base models to a plateau, in process.")
    p.add_argument("--arm", default="cures_wide", help="how they are trained")
    p.add_argument("--seeds", default="0,1,2")
    p.add_argument("--budget-rollouts", type=int, default=51_200)
    add_task_arguments(p)
    p.add_argument("--out", type=Path, default=Path("runs/bench/plateau"))
    args = p.parse_args(argv)
    for seed in map(int, args.seeds.split(",")):
        spec = spec_of(args, args.arm, seed, "inprocess", {})
        out = args.out / Path(spec.base).name
        if not (out / "summary.json").exists():
            train(spec, out)
    return 0


def train(spec: Spec, out: Path) -> None:
    """Train the base model of ``spec`` (made where it lacks) and leave the result in ``out``."""
    import torch

    from benchmarks.inprocess.engine import run_in_process
    from cures_ray.run.preflight import prepare_inputs

    torch.set_num_threads(1)
    ensure_base(spec)
    config = config_of(spec, out)
    base = Path(spec.base)
    run = run_in_process(config, prepare_inputs(config, claim_run_dir=False, test_verifier=False), spec.task)
    out.mkdir(parents=True, exist_ok=True)
    shutil.copytree(base / "model", out / "model", dirs_exist_ok=True)  # the tokenizer's files
    run.learner.policy.lm.save_pretrained(out / "model")
    for name in ("train.jsonl", "eval.jsonl"):
        shutil.copy(base / name, out / name)
    curve = [round(m.get("eval/expected_accuracy", m["eval/greedy_accuracy"]), 4) for _, m in run.evaluations]
    (out / "summary.json").write_text(
        json.dumps({"arm": spec.label, "budget": spec.budget, "base": str(base), "curve": curve}) + "\n"
    )
    print(f"{out}: accuracy {curve[0]:.3f} -> {curve[-1]:.3f}", flush=True)
