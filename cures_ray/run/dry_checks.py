"""What `cures train --dry-run` looks at beyond what every start checks: it may take a minute, and reads many golds."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from cures_ray.config import Config
from cures_ray.messages import ConfigError, Outcome, PromptRow
from cures_ray.run.preflight import Inputs
from cures_ray.verify.mathematics import GoldError, printable, read_gold
from cures_ray.verify.pool import VerifyItem, VerifyPool

GOLDS = 256  # that are looked at, spread over the data
# How a completion may state its answer: a reward that knows none of these gives 0 to every gold.
FORMS = ("\\boxed{{{0}}}", "{0}", "#### {0}", "<answer>{0}</answer>", "<answer>\\boxed{{{0}}}</answer>", "Answer: {0}")


def check_writable(folder: Path) -> None:
    """Raises ConfigError when ``folder`` cannot be made or written; leaves nothing behind."""
    ancestor = folder.absolute()
    while not ancestor.exists():
        ancestor = ancestor.parent
    try:
        with tempfile.TemporaryFile(dir=ancestor):
            pass
    except OSError as error:
        raise ConfigError(
            f"checkpoint.dir = {folder} cannot be written ({ancestor}: {error.strerror}); choose another folder"
        ) from None


def check_inputs(inputs: Inputs) -> list[str]:
    """Remarks on model and data.

    Raises:
        ConfigError: prompts and completions do not fit the model's context; golds cannot be read; the reward gives
            0 to every gold.
    """
    remarks = [check_context(inputs.config, context_of(inputs.config))]
    rows = spread_rows(inputs, GOLDS)
    if inputs.config.verifier.fn == "math":
        remarks.append(check_golds([row.answer for row in rows]))
    if inputs.config.verifier.fn != "code":  # its golds are tests, no answers
        remarks.append(check_reward(inputs.config, rows[:32]))
    return remarks


def context_of(config: Config) -> int | None:
    """Positions of the model; None where it states none."""
    from transformers import AutoConfig

    model = config.model
    found: Any = AutoConfig.from_pretrained(
        model.path, revision=model.revision, trust_remote_code=model.trust_remote_code
    )
    return getattr(found.get_text_config(), "max_position_embeddings", None)


def check_context(config: Config, context: int | None) -> str:
    prompt, completion = config.data.max_prompt_tokens, config.rollout.max_new_tokens
    if context is not None and prompt + completion > context:
        raise ConfigError(
            f"data.max_prompt_tokens + rollout.max_new_tokens = {prompt} + {completion} = {prompt + completion} tokens "
            f"do not fit the context of {config.model.path}, {context} tokens: long answers would be cut off; lower "
            f"one of them"
        )
    return f"context: {prompt} + {completion} tokens of {context or 'unlimited'}"


def spread_rows(inputs: Inputs, most: int) -> list[PromptRow]:
    """At most ``most`` training prompts, evenly spread."""
    count = len(inputs.train)
    return [inputs.train.row(int(i)) for i in np.unique(np.linspace(0, count - 1, min(count, most)).astype(int))]


def check_golds(golds: list[str]) -> str:
    """Whether a mathematical gold can be compared with; one that cannot makes every rollout of its prompt a fault."""
    errors = {gold: error for gold in golds if isinstance(error := read_gold(gold), GoldError)}
    if len(errors) > len(golds) // 10:
        shown = "; ".join(f"{printable(gold[-60:])!r}: {error}" for gold, error in list(errors.items())[:3])
        raise ConfigError(
            f"{len(errors)} of {len(golds)} golds cannot be read as an answer: {shown}. Check data.answer_key: "
            f"verifier.fn = math wants the final answer, not a worked solution"
        )
    return f"golds: {len(golds) - len(errors)} of {len(golds)} that were looked at can be read" + (
        "; the others would be faults" if errors else ""
    )


def check_reward(config: Config, rows: list[PromptRow]) -> str:
    """Whether the reward ever pays for the gold itself, in one of the usual forms of an answer."""
    with VerifyPool(config.verifier) as pool:
        pool.prewarm()
        for form in FORMS:
            items = [VerifyItem(prompt=row, completion=form.format(row.answer)) for row in rows]
            verdicts = pool.verify(items)
            paid = sum(v.reward > 0 or v.outcome is Outcome.CORRECT for v in verdicts)
            if paid:
                return f"reward: {paid} of {len(rows)} golds are paid for when written as {form.format('...')}"
    first = rows[0]
    raise ConfigError(
        f"verifier.fn = {config.verifier.fn} gives 0 to every one of {len(rows)} golds, in {len(FORMS)} forms of an "
        f"answer: nothing could be learned. The first gold is {printable(first.answer, 80)!r} and got "
        f"{printable(verdicts[0].detail, 80)!r}. Check verifier.fn and data.answer_key"
    )
