"""``cures bench peers``: this project beside TRL's GRPOTrainer, alternating, on an otherwise idle machine.

    python -m venv trl
    trl/bin/pip install torch==2.13.0 trl==1.16.0 transformers==5.19.0 "math-verify[antlr4_13_2]" pydantic pylatexenc \\
        reasoning-gym==0.1.25
    cures bench peers --python trl/bin/python --seeds 0,1,2
    cures bench peers --python trl/bin/python --seeds 0,1,2 --setting smollm2 --name peers_smollm2

Same model, prompts, reward, learning rate and rollouts a step (settings.py): TRL and this project's GRPO with the same
groups, this project's default with one rollout a prompt. Seconds start at the first step: starting and loading are
reported beside them. TRL's evaluations are not in its seconds; this project's are, as they run beside the training.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import threading
import time
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from benchmarks.harness.results_file import ROOT, spread, write_result
from benchmarks.peers.settings import SETTINGS, Setting


def main(argv: list[str]) -> int:
    p = argparse.ArgumentParser(prog="cures bench peers", description=__doc__.splitlines()[0])
    p.add_argument("--python", required=True, help="interpreter of TRL's environment")
    p.add_argument("--seeds", default="0,1,2")
    p.add_argument("--setting", choices=list(SETTINGS), default="demo")
    p.add_argument("--steps", type=int, help="default: the setting's")
    p.add_argument("--out", type=Path, help="default: runs/bench/peers_SETTING")
    p.add_argument("--name", help="of the result file; default: peers_SETTING")
    args = p.parse_args(argv)
    setting = SETTINGS[args.setting]
    setting = replace(setting, steps=args.steps or setting.steps)
    out, name = args.out or Path("runs/bench") / f"peers_{args.setting}", args.name or f"peers_{args.setting}"
    runs = []
    for seed in map(int, args.seeds.split(",")):
        folder = (out / f"seed{seed}").resolve()
        folder.mkdir(parents=True, exist_ok=True)
        model, train, held_out, data = setting.prepare(folder, seed, _run)
        data = [f"model.path={model}", *data]
        measures = {
            "trl": partial(trl, args.python, setting, folder, seed, model, train, held_out),
            "grpo": partial(ours, "grpo", setting, folder, seed, [*data, *setting.grpo()]),
            "default": partial(ours, "default", setting, folder, seed, data),
        }
        for who, measure in measures.items():
            runs.append({"who": who, "seed": seed, **measure()})
            print(f"{who}, seed {seed}: {json.dumps({k: v for k, v in runs[-1].items() if k != 'curve'})}", flush=True)
            write_result(name, figures(runs), runs)  # a run that is cut short leaves what it has
    return 0


def figures(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """[low, median, high] over seeds: rollouts/s, final accuracy, and seconds to TRL's last accuracy over TRL's own."""
    found: dict[str, Any] = {}
    by = {(r["who"], r["seed"]): r for r in runs}
    for who in dict.fromkeys(r["who"] for r in runs):
        own = [r for r in runs if r["who"] == who]
        found[f"{who}/rollouts_per_s"] = spread([r["rollouts_per_s"] for r in own])
        found[f"{who}/final_accuracy"] = spread([r["curve"][-1]["accuracy"] for r in own])
        found[f"{who}/peak_gib"] = spread([r["peak_gib"] for r in own])
        ratios = []
        for r in own:
            theirs = by["trl", r["seed"]]["curve"]
            seconds = seconds_to(r["curve"], theirs[-1]["accuracy"])
            ratios.append(seconds / theirs[-1]["seconds"] if seconds is not None else float("inf"))
        found[f"{who}/seconds_to_trl_accuracy_ratio"] = spread(ratios) if np.isfinite(ratios).all() else "not reached"
    return found


def seconds_to(curve: list[dict[str, float]], accuracy: float) -> float | None:
    """When the curve first reaches ``accuracy``, interpolated; None if never."""
    for before, after in pairwise(curve):
        if after["accuracy"] >= accuracy:
            share = (accuracy - before["accuracy"]) / max(after["accuracy"] - before["accuracy"], 1e-9)
            return before["seconds"] + max(share, 0.0) * (after["seconds"] - before["seconds"])
    return None


def trl(
    python: str, setting: Setting, folder: Path, seed: int, model: Path, train: Path, held_out: Path
) -> dict[str, Any]:
    out = folder / "trl.json"
    command = [
        python, "-m", "benchmarks.peers.trl_grpo", "--model", str(model), "--train", str(train),
        "--eval", str(held_out), "--steps", str(setting.steps), "--eval-every", str(setting.every),
        "--prompts", str(setting.prompts), "--generations", str(setting.generations), "--seed", str(seed),
        "--out", str(out), *setting.trl,
    ]  # fmt: skip
    wall, peak = _run(command)
    result = json.loads(out.read_text())
    return result | {"wall_seconds": wall, "peak_gib": peak}


def ours(name: str, setting: Setting, folder: Path, seed: int, overrides: list[str]) -> dict[str, Any]:
    run = folder / name
    command = [
        sys.executable, "-m", "actors.commands.cli", "train", str(setting.config), f"checkpoint.dir={run}",
        "checkpoint.resume=none", f"trainer.seed={seed}", f"trainer.steps={setting.steps}",
        f"eval.interval={setting.every}", f"checkpoint.interval={setting.steps}", "logging.progress=off", *overrides,
    ]  # fmt: skip
    wall, peak = _run(command)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    marks = [line for line in lines if "eval/greedy_accuracy" in line]
    began = marks[0]["time"]
    curve = [{"step": m["step"], "seconds": m["time"] - began, "accuracy": m["eval/greedy_accuracy"]} for m in marks]
    planned = json.loads((run / "summary.json").read_text())["planned"]
    return {
        "curve": curve,
        "seconds": curve[-1]["seconds"],
        "rollouts_per_s": planned / curve[-1]["seconds"],
        "wall_seconds": wall,
        "peak_gib": peak,
    }


def _run(command: list[str]) -> tuple[float, float]:
    """Run to the end: wall seconds, and the most memory (GiB, proportional set size) of it and its children."""
    began = time.monotonic()
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "OMP_WAIT_POLICY": "PASSIVE",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONHASHSEED": "0",  # some tasks of reasoning-gym walk over sets
    }
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    peak = [0.0]
    watch = threading.Thread(target=_watch, args=(process.pid, peak), daemon=True)
    watch.start()
    output, _ = process.communicate()
    if process.returncode:
        raise RuntimeError(f"{' '.join(command[:4])} failed:\n{output[-3000:]}")
    return round(time.monotonic() - began, 2), round(peak[0], 2)


def _watch(pid: int, peak: list[float]) -> None:
    try:
        root = psutil.Process(pid)
        while root.is_running():
            total = 0
            for process in [root, *root.children(recursive=True)]:
                try:
                    total += process.memory_full_info().pss
                except psutil.Error:
                    continue
            peak[0] = max(peak[0], total / 2**30)
            time.sleep(2.0)
    except psutil.Error:
        return
