"""The configuration's sections about prompts."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from cures_ray.config_sections import Section


class ReasoningGymTask(Section):
    name: str
    """Name of the task in the package: chain_sum, gcd, calendar_arithmetic and so on. Always set it."""
    params: dict[str, Any] = Field({})
    """Settings of the task, such as {min_terms: 2, max_digits: 1}."""
    weight: float = Field(1.0, gt=0)
    """Share of the prompts, against the other tasks."""
    label: str | None = None
    """The level in reports. None: the name. Set it when a task occurs twice with other params."""
    balance_answers: bool = False
    """Every answer equally often. For tasks with few answers, such as Yes and No."""


class ReasoningGymConfig(Section):
    train_size: int = Field(2048, ge=1)
    """Training prompts to make."""
    eval_size: int = Field(256, ge=1)
    """Held-out prompts to make."""
    seed: int = 0
    """Of the generated problems."""
    tasks: list[ReasoningGymTask] = Field([])
    """The tasks to mix."""
    partial_credit: bool = False
    """True: the scorer's value is the reward. False: the reward is 1 where it is at least 0.99, else 0."""


class DataConfig(Section):
    train: str = ""
    """Training prompts: a .jsonl, .parquet or .csv file, a Hub dataset as `name` or `name@subset:split`, or
    `reasoning-gym`. Always set it."""
    eval: str | None = None
    """Held-out prompts in the same form. Without it there is no evaluation."""
    prompt_key: str = "prompt"
    """Column of the question. Dots reach into objects."""
    answer_key: str = "answer"
    """Column of the expected answer, as the reward function takes it."""
    preset: str | None = None
    """Columns and answer format of a public data set: gsm8k, math, numina_math, dapo_math and others. Set it instead of
    the three keys of columns."""
    eval_preset: str | None = None
    """The same for `data.eval`: math500, gsm8k, aime24 and others. None: as `data.preset`."""
    level_key: str | None = "level"
    """Column of a known difficulty, numbers or text. Reports are grouped by it and beliefs start from it; a missing
    column is no error."""
    template: str = "auto"
    """`chat`, `plain`, or a text with {prompt} in it. `auto`: chat where the tokenizer has a chat template."""
    system_prompt: str | None = None
    """Message before every question. None: the chat template's own; empty: none at all."""
    prompt_suffix: str = ""
    """Text after every question. Use it to ask for the answer format that the reward looks for."""
    filter: dict[str, Any] = Field({})
    """Training rows to keep: column to value, list of values, or {min, max}."""
    max_prompt_tokens: int = Field(1024, ge=1)
    """Longer prompts are dropped, and counted in the log."""
    max_train_prompts: int | None = Field(None, ge=1)
    """Train on a random subset of this size, drawn with `data.seed`. For a first try."""
    max_eval_prompts: int | None = Field(None, ge=1)
    """Evaluate on at most this many held-out prompts. Lower it when evaluation takes too long."""
    decontaminate_against: list[str] = Field([])
    """Evaluation sets or files. Training prompts that share words in a row with them are dropped."""
    decontaminate_ngram: int = Field(8, ge=2)
    """How many words in a row count as an overlap."""
    reasoning_gym: ReasoningGymConfig = ReasoningGymConfig()
    """What `data.train: reasoning-gym` generates."""
    seed: int = 0
    """Chooses the prompts that `max_train_prompts` and `max_eval_prompts` keep."""
