"""``cures bench survey``: what a base model does on candidate tasks before any method ran, and the mixture from it.

    candidates --48 prompts, 4 samples and a greedy answer--> accuracy, mixed share, best constant --rule--> mixture

The rule and the candidates are in mixture.py. The survey's prompts have a seed of their own. Part (a) of the protocol
takes its mixture from ``benchmarks/results/survey_smollm2.json`` (``--name survey_smollm2``).
"""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness.cell import BASES_FOLDER
from benchmarks.harness.mixture import CANDIDATES, DISTINCT, PROMPTS, SAMPLES, SEED, Row, mixed_share, mixture
from benchmarks.harness.real_task import REAL_MODEL, REAL_TASK, prepare_real, real_settings
from benchmarks.harness.report import table
from cures_ray.messages import ConfigError


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="cures bench survey", description=__doc__.splitlines()[0])
    p.add_argument("--families", default=",".join(CANDIDATES), help="of the candidates")
    p.add_argument("--model", type=Path, default=BASES_FOLDER / REAL_MODEL, help="folder; made when it is missing")
    p.add_argument("--device", default="cpu")
    p.add_argument("--name", help="also write benchmarks/results/NAME.json")
    return p


def main(argv: list[str]) -> int:
    args = parser().parse_args(argv)
    families = [f for f in args.families.split(",") if f]
    if unknown := set(families) - set(CANDIDATES):
        raise ConfigError(f"--families: {', '.join(sorted(unknown))} is none of {', '.join(CANDIDATES)}")
    prepare_real(args.model)
    rows = survey(families, args.model, args.device)
    chosen = mixture(rows)
    print(markdown(rows, chosen))
    if args.name:
        from benchmarks.harness.results_file import write_result

        figures = {"mixed_share_of_mixture": mixed_share(rows, chosen)}
        write_result(args.name, figures, rows, command="cures bench survey " + shlex.join(argv))
    return 0


def survey(families: list[str], model: Path, device: str) -> list[Row]:
    """A row a family: figures, or why it is refused."""
    import torch
    from transformers import AutoModelForCausalLM

    from benchmarks.inprocess.sampler import Sampler
    from cures_ray.data.table import load_tokenizer

    settings = real_settings(str(model), SEED)
    config = survey_config(model, families[0])
    lm = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).to(device)
    sampler = Sampler(
        lm, load_tokenizer(config.model), settings["rollout.temperature"], settings["rollout.max_new_tokens"]
    )
    rows = []
    for family in families:
        rows.append(family_row(family, survey_config(model, family), sampler))
        print(rows[-1], flush=True)
    return rows


def survey_config(model: Path, family: str) -> Any:
    """The settings of part (a) with ``family`` alone."""
    from benchmarks.harness.arms import arm_config

    name, params = CANDIDATES[family]
    task = {"name": name, "params": params, "label": family}
    gym = {"train_size": DISTINCT, "eval_size": 1, "seed": SEED, "tasks": [task]}
    return arm_config(
        "default", task=REAL_TASK, variant=REAL_MODEL, seed=SEED, budget=64, base=str(model), run_dir="unused",
        extra={"data.reasoning_gym": gym},
    )  # fmt: skip


def family_row(family: str, config: Any, sampler: Any) -> Row:
    from benchmarks.inprocess.judges import JUDGES
    from benchmarks.inprocess.sampler import Request
    from cures_ray.data.table import load_prompts

    name, params = CANDIDATES[family]
    row: Row = {"family": family, "task": name, "params": params}
    try:
        prompts = load_prompts(config.data, sampler.tokenizer, "train")
    except ConfigError as error:
        return row | {"refused": str(error)[:200]}
    asked, judge = prompts.rows(np.arange(PROMPTS)), JUDGES[REAL_TASK]
    right = {}
    for kind, n in (("sampled", SAMPLES), ("greedy", 1)):
        requests = [Request(p.token_ids, n, SEED + i, kind == "greedy") for i, p in enumerate(asked)]
        answers = sampler.sample(requests)
        right[kind] = np.array([[judge(a[3], p) for a in group] for p, group in zip(asked, answers, strict=True)])
    sampled = right["sampled"].mean(1)
    return row | {
        "accuracy": round(float(sampled.mean()), 4),
        "greedy": round(float(right["greedy"].mean()), 4),
        "mixed": round(float(((sampled > 0) & (sampled < 1)).mean()), 4),
        "best_constant": round(prompts.best_constant()["best_constant_accuracy"], 4),
        "prompt_tokens": round(float(np.mean([len(p.token_ids) for p in asked])), 1),
        "example": asked[0].text[-160:],
    }


def markdown(rows: list[Row], shares: dict[str, float]) -> str:
    head = ["family", "task", "sampled", "greedy", "mixed", "best constant", "share"]
    lines = []
    for row in rows:
        keys = ("accuracy", "greedy", "mixed", "best_constant")
        figures = ["–"] * 4 if "refused" in row else [f"{row[key]:.2f}" for key in keys]
        share = f"{shares[row['family']]:.0%}" if row["family"] in shares else "refused" if "refused" in row else ""
        lines.append([row["family"], row["task"], *figures, share])
    return table(head, lines) + f"\nMixed prompts of the mixture: {mixed_share(rows, shares):.2f}\n"
