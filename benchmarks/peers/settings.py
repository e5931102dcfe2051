"""What the trainers are compared on: the demo, and SmolLM2 on the mixture of ``make real``."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from benchmarks.harness.results_file import ROOT
from cures_ray.config import Config
from cures_ray.config_load import load_config
from cures_ray.data.reasoning_gym import generated_rows

Call = Callable[[list[str]], object]


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """One comparison. Prompts x generations is a step's batch, for all trainers."""

    config: Path  # of this project's default
    steps: int
    every: int  # steps between evaluations
    prompts: int
    generations: int
    task: str | None  # synthetic task; None: reasoning-gym by the configuration
    trl: tuple[str, ...]  # further arguments of trl_grpo.py

    def grpo(self) -> list[str]:
        """This project's GRPO at TRL's settings, as overrides of ``config``."""
        return [
            "curriculum.method=uniform", "curriculum.draw=epoch", f"curriculum.prompts_per_step={self.prompts}",
            f"curriculum.rollouts_per_step={self.prompts * self.generations}", "algo.advantage=grpo", "algo.loss=clip",
        ]  # fmt: skip

    def prepare(self, folder: Path, seed: int, call: Call) -> tuple[Path, Path, Path, list[str]]:
        """(model, training prompts and held-out prompts for TRL, overrides of ``config``). Made on the first call.

        Args:
            call: runs a command to its end.
        """
        base = folder / "base"
        train, held_out = base / "train.jsonl", base / "eval.jsonl"
        cures = [sys.executable, "-m", "actors.commands.cli"]
        if self.task is not None:
            if not (base / "summary.json").exists():
                call([*cures, "prepare", "--out", str(base), "--task", self.task, "--seed", str(seed)])
            return base / "model", train, held_out, [f"data.train={train}", f"data.eval={held_out}"]
        call([*cures, "prepare", "smollm2", "--out", str(base / "model")])
        overrides = [f"data.reasoning_gym.seed={seed}"]
        config = load_config(self.config, overrides)
        for path, which in ((train, "train"), (held_out, "eval")):
            path.write_text("".join(json.dumps(row) + "\n" for row in messages(config, which)))
        return base / "model", train, held_out, overrides


def messages(config: Config, which: str) -> list[dict[str, object]]:
    """The prompts of ``data.reasoning_gym`` with the system prompt as chat messages, and what scores an answer."""
    system = [{"role": "system", "content": config.data.system_prompt}] if config.data.system_prompt else []
    rows = [row for part in generated_rows(config.data, which) for row in part]
    return [row | {"prompt": [*system, {"role": "user", "content": row["prompt"]}]} for row in rows]


SETTINGS: dict[str, Setting] = {
    "demo": Setting(
        config=ROOT / "configs/demo.yaml", steps=40, every=5, prompts=32, generations=8, task="chain", trl=()
    ),
    "smollm2": Setting(
        config=ROOT / "configs/smollm2-reasoning-gym.yaml",
        steps=16,
        every=8,
        prompts=8,
        generations=8,
        task=None,
        trl=("--lr", "2e-5", "--temperature", "0.7", "--max-new-tokens", "16", "--bf16", "--reward", "reasoning_gym"),
    ),
}
