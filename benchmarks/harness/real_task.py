"""A real pretrained model on real tasks: SmolLM2-135M-Instruct on reasoning-gym, part (a) of PROTOCOL.md."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.harness.mixture import CANDIDATES, surveyed

REAL_TASK, REAL_MODEL = "reasoning-gym", "smollm2"
BATCH_DIVISOR = 4  # every arm's prompts and rollouts a step, against those of arms.py: 64 rollouts a step

# For trials until there is a survey; part (a) itself does not start without one.
PROVISIONAL = {"sum_of_2_to_3": 0.4, "sum_of_2_longer": 0.4, "product_of_2_longer": 0.2}


def tasks_of_mixture() -> list[dict[str, Any]]:
    """By the committed survey, else the provisional ones."""
    provisional = [
        {"name": CANDIDATES[family][0], "params": CANDIDATES[family][1], "weight": share, "label": family}
        for family, share in PROVISIONAL.items()
    ]
    return surveyed() or provisional


def real_settings(base: str, seed: int) -> dict[str, Any]:
    """Overrides of the task: data, model, lengths and evaluation; the same for every arm."""
    return {
        "model.path": base,
        "data.train": REAL_TASK,
        "data.eval": REAL_TASK,
        "data.reasoning_gym": {"train_size": 512, "eval_size": 128, "seed": seed, "tasks": tasks_of_mixture()},
        "data.system_prompt": "Give only the answer.",
        "data.max_prompt_tokens": 160,
        "data.max_eval_prompts": None,
        "verifier.fn": "reasoning_gym",
        "rollout.max_new_tokens": 16,
        "rollout.temperature": 0.7,
        "rollout.max_concurrent_rollouts": 128,
        "algo.overlong_penalty_tokens": 0,
        "learner.dtype": "bfloat16",
        "learner.max_tokens_per_rank": 2048,
        "eval.samples_per_prompt": 2,
        "eval.interval": 8,
    }


def quartered(values: dict[str, Any]) -> dict[str, Any]:
    """``values`` with the sizes of a batch divided by BATCH_DIVISOR."""
    sizes = ("curriculum.prompts_per_step", "curriculum.rollouts_per_step")
    return {key: value // BATCH_DIVISOR if key in sizes else value for key, value in values.items()}


def prepare_real(folder: Path) -> None:
    """The model's folder, made on first use."""
    from actors.commands.smollm2 import main

    if not (folder / "config.json").exists():
        main(["--out", str(folder)])
