"""Which tasks part (a) mixes: the candidates, and the rule that chooses among them by a survey of the base model.

candidates --cures bench survey--> benchmarks/results/survey_smollm2.json --mixture--> tasks and shares of part (a)
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.harness.results_file import RESULTS

Row = dict[str, Any]

SURVEY = RESULTS / "survey_smollm2.json"
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


def surveyed(path: Path = SURVEY) -> list[dict[str, Any]] | None:
    """The tasks of the mixture as ``data.reasoning_gym.tasks`` has them, by the committed survey; None without one."""
    if not path.exists():
        return None
    shares = mixture(json.loads(path.read_text())["rows"])
    return [
        {"name": CANDIDATES[family][0], "params": CANDIDATES[family][1], "weight": share, "label": family}
        for family, share in shares.items()
    ]
