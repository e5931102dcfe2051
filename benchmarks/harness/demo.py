"""What `make demo` gives on several seeds: ``cures bench demo [--seeds 0,1,2]``.

Each seed runs in its own process, as a user would: base model, training on all real actors, export. Then the exported
folder is measured without the trainer: by ``cures eval`` (plain ``vllm.LLM``) and by transformers' ``generate``.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.harness.results_file import spread, write_result

BAR_GAIN, BAR_SECONDS = 0.15, 360.0  # of issue and README: accuracy gained, seconds of one demo


def main(argv: list[str]) -> int:
    """Exit code 1 when a seed misses a bar."""
    p = argparse.ArgumentParser(prog="cures bench demo", description=__doc__.splitlines()[0])
    p.add_argument("--seeds", default="0,1,2")
    p.add_argument("--out", type=Path, default=Path("runs/bench/demo"))
    p.add_argument("--name", default="demo", help="of the result file")
    p.add_argument("overrides", nargs="*", metavar="section.key=value")
    args = p.parse_intermixed_args(argv)
    rows = []
    for seed in args.seeds.split(","):
        rows.append(measure(int(seed), args.out / f"seed-{seed}", args.overrides))
        print(json.dumps(rows[-1]), flush=True)
    figures = {
        "accuracy_before": spread([r["before"] for r in rows]),
        "accuracy_after": spread([r["after"] for r in rows]),
        "accuracy_gain": spread([r["gain"] for r in rows]),
        "seconds": spread([r["seconds"] for r in rows]),
        "seconds_base_model": spread([r["seconds_base_model"] for r in rows]),
        "seconds_start": spread([r["seconds_start"] for r in rows]),
        "seconds_training": spread([r["seconds_training"] for r in rows]),
        "exported_vllm_minus_reported": spread([r["exported_vllm"] - r["after"] for r in rows]),
        "exported_transformers_minus_reported": spread([r["exported_transformers"] - r["after"] for r in rows]),
    }
    write_result(args.name, figures, rows)
    return int(any(r["gain"] < BAR_GAIN or r["seconds"] > BAR_SECONDS for r in rows))


def measure(seed: int, folder: Path, overrides: list[str]) -> dict[str, Any]:
    """One demo and two independent measurements of what it exported."""
    began = time.monotonic()
    _run([sys.executable, "-m", "actors.commands.demo", "--seed", str(seed), "--dir", str(folder), *overrides])
    seconds = time.monotonic() - began
    summary = json.loads((folder / "summary.json").read_text())
    data, model, report = folder / "base" / "eval.jsonl", folder / "model", folder / "eval.json"
    limits = ["rollout.max_new_tokens=16", "--out", str(folder / "eval")]
    _run(
        [
            sys.executable,
            "-m",
            "actors.commands.cli",
            "eval",
            str(model),
            "--data",
            str(data),
            *limits,
            "--json",
            str(report),
        ]
    )
    return {
        "seed": seed,
        "before": summary["held_out_accuracy_before"],
        "after": summary["held_out_accuracy_after"],
        "gain": round(summary["held_out_accuracy_after"] - summary["held_out_accuracy_before"], 4),
        "by_level": summary["by_level"],
        "seconds": round(seconds, 1),
        "seconds_base_model": summary["seconds_setup"],
        "seconds_start": summary["seconds_start"],
        "seconds_training": summary["seconds_training"],
        "planned": summary["planned"],
        "trained": summary["trained"],
        "discarded": summary["discarded"],
        "exported_vllm": json.loads(report.read_text())["scores"][str(model)]["eval"]["accuracy"]["mean"],
        "exported_transformers": transformers_accuracy(model, data),
    }


def transformers_accuracy(model_path: Path, data: Path) -> float:
    """Greedy accuracy by ``AutoModelForCausalLM.generate``, answers compared as integers."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_path)
    model = AutoModelForCausalLM.from_pretrained(model_path).eval()
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    texts = [tokenizer.apply_chat_template(r["prompt"], tokenize=False, add_generation_prompt=True) for r in rows]
    batch = tokenizer(texts, add_special_tokens=False, return_tensors="pt", padding=True)
    with torch.inference_mode():
        out = model.generate(**batch, max_new_tokens=16, do_sample=False)
    completions = tokenizer.batch_decode(out[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    boxed = [c.rpartition("\\boxed{")[2].partition("}")[0] for c in completions]
    right = [b.isdecimal() and int(b) == int(r["answer"]) for b, r in zip(boxed, rows, strict=True)]
    return sum(right) / len(right)


def _run(command: list[str]) -> None:
    subprocess.run(command, check=True)
