"""``cures bench survey``: what a base model does on candidate tasks before any method ran, and the mixture from it.

    candidates --48 prompts, 4 samples and a greedy answer--> accuracy, mixed share, best constant --rule--> mixture

The mixture of part (a) and of ``configs/smollm2-reasoning-gym.yaml`` is what ``mixture`` makes of the committed rows
(a test holds them together). The survey's prompts have a seed of their own.
"""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness.cell import BASES_FOLDER
from benchmarks.harness.real_task import REAL_MODEL, REAL_TASK, prepare_real, real_settings
from benchmarks.harness.report import table
from cures_ray.messages import ConfigError

Row = dict[str, Any]

SEED = 900
PROMPTS, SAMPLES = 48, 4
DISTINCT = 150  # prompts that a family must have
LEAST_MIXED = 0.10  # share of prompts whose samples are neither all right nor all wrong
MOST_CONSTANT = 0.15  # accuracy of the best constant answer
MOST_OF_A_TASK = 2  # families of one task: those with the largest mixed share
MIXTURE_MIXED = 0.30  # mixed share of the whole mixture

CANDIDATES: dict[str, tuple[str, dict[str, Any]]] = {  # label -> (task of reasoning-gym, parameters)
    "sum_of_2": ("chain_sum", {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}),
    "sum_of_2_to_3": ("chain_sum", {"min_terms": 2, "max_terms": 3, "min_digits": 1, "max_digits": 1}),
    "sum_of_2_to_4": ("chain_sum", {"min_terms": 2, "max_terms": 4, "min_digits": 1, "max_digits": 1}),
    "sum_of_2_longer": ("chain_sum", {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 2}),
    "product_of_2": ("products", {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}),
    "product_of_2_longer": ("products", {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 2}),
    "basic_of_2": ("basic_arithmetic", {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}),
    "basic_of_2_to_3": ("basic_arithmetic", {"min_terms": 2, "max_terms": 3, "min_digits": 1, "max_digits": 1}),
    "gcd": ("gcd", {"min_value": 1, "max_value": 30}),
    "lcm": ("lcm", {"min_value": 1, "max_value": 20}),
    "equation": ("simple_equations", {"min_terms": 2, "max_terms": 2, "min_value": 1, "max_value": 12}),
    "sequence": ("number_sequences", {"min_value": 0, "max_value": 20, "max_complexity": 1}),
    "sort_3": ("number_sorting", {"min_numbers": 3, "max_numbers": 3, "max_decimals": 0, "min_value": 0}),
    "spell_backward": ("spell_backward", {"min_word_len": 3, "max_word_len": 4}),
    "bits": ("count_bits", {"max_n": 255}),
    "letters": ("letter_counting", {"min_words": 3, "max_words": 6}),
    "weekday": ("calendar_arithmetic", {"tasks": ["weekday_of_date"]}),
    "leap_year": ("calendar_arithmetic", {"tasks": ["is_leap_year"], "leap_year_range": 800}),
    "isomorphic_strings": ("isomorphic_strings", {"max_string_length": 6}),
}


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


def mixture(rows: list[Row]) -> dict[str, float]:
    """family -> its share of the prompts, by the rule of PROTOCOL.md: of the families with enough distinct prompts, a
    low best constant and mixed prompts, at most two of a task; shares as their mixed shares, in steps of 5 %; the
    least mixed family leaves until the mixture has MIXTURE_MIXED."""
    fit = [
        row
        for row in rows
        if "refused" not in row and row["mixed"] >= LEAST_MIXED and row["best_constant"] <= MOST_CONSTANT
    ]
    fit.sort(key=lambda row: -row["mixed"])
    of_task: dict[str, int] = {}
    kept = []
    for row in fit:
        of_task[row["task"]] = of_task.get(row["task"], 0) + 1
        if of_task[row["task"]] <= MOST_OF_A_TASK:
            kept.append(row)
    while kept:
        shares = _shares(kept)
        if mixed_share(rows, shares) >= MIXTURE_MIXED or len(kept) == 1:
            return shares
        kept.pop()
    return {}


def _shares(kept: list[Row]) -> dict[str, float]:
    """In steps of 5 %, at least one each; the first takes what rounding leaves."""
    total = sum(row["mixed"] for row in kept)
    steps = {row["family"]: max(1, round(20 * row["mixed"] / total)) for row in kept}
    first = kept[0]["family"]
    steps[first] += 20 - sum(steps.values())
    return {family: n / 20 for family, n in steps.items()}


def mixed_share(rows: list[Row], shares: dict[str, float]) -> float:
    """Of a mixture's prompts, those whose samples disagree."""
    mixed = {row["family"]: row.get("mixed", 0.0) for row in rows}
    return float(sum(share * mixed[family] for family, share in shares.items()))


def markdown(rows: list[Row], shares: dict[str, float]) -> str:
    head = ["family", "task", "sampled", "greedy", "mixed", "best constant", "share"]
    lines = []
    for row in rows:
        keys = ("accuracy", "greedy", "mixed", "best_constant")
        figures = ["–"] * 4 if "refused" in row else [f"{row[key]:.2f}" for key in keys]
        share = f"{shares[row['family']]:.0%}" if row["family"] in shares else "refused" if "refused" in row else ""
        lines.append([row["family"], row["task"], *figures, share])
    return table(head, lines) + f"\nMixed prompts of the mixture: {mixed_share(rows, shares):.2f}\n"
