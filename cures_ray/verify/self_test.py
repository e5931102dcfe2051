"""The proof of a verifier before a run trusts it."""

from __future__ import annotations

import numpy as np

from cures_ray.config import Config
from cures_ray.messages import ConfigError, Outcome, PromptRow
from cures_ray.verify.mathematics import printable
from cures_ray.verify.pool import BUILT_IN, VerifyItem, VerifyPool

CODE_GOLD = '{"entry": "f", "tests": [[[2], 4], [[5], 25]]}'
KNOWN: dict[str, list[tuple[str, str, Outcome]]] = {  # (gold, completion, outcome)
    "math": [
        ("42", r"so \boxed{42}", Outcome.CORRECT),
        (r"\frac{x+1}{2}", r"\boxed{0.5x + \frac{1}{2}}", Outcome.CORRECT),
        ("42", r"\boxed{41}", Outcome.INCORRECT),
        ("42", "42", Outcome.INCORRECT),
        (r"\sqrt{2}", r"\boxed{\sqrt{3}}", Outcome.INCORRECT),
        ("", r"\boxed{1}", Outcome.FAULT),
    ],
    "code": [
        (CODE_GOLD, r"\boxed{x * x}", Outcome.CORRECT),
        (CODE_GOLD, "```python\ndef f(x):\n    return x ** 2\n```", Outcome.CORRECT),
        (CODE_GOLD, r"\boxed{x + 2}", Outcome.INCORRECT),
        (CODE_GOLD, "```python\nimport os\nos.fork()\n```", Outcome.INCORRECT),
        ("no tests", r"\boxed{x}", Outcome.FAULT),
    ],
}
HOSTILE = {"math": ("3", r"\boxed{9^{9^{9^{9}}}}"), "code": (CODE_GOLD, "```python\nwhile True: pass\n```")}


def self_test(config: Config, row: PromptRow | None = None) -> None:
    """Prove the verifier before a run trusts it.

    Built-in ones must judge known answers rightly and cut a hostile one off; a gold of the data (``row``), boxed, must
    not be a fault. A user function must load, and return valid rewards for ``row`` with its gold and with nothing.

    Raises:
        ConfigError: it does not.
    """
    verifier = config.verifier
    with VerifyPool(verifier.model_copy(update={"processes_per_worker": 1})) as pool:
        pool.prewarm()
        if verifier.fn in BUILT_IN:
            _test_built_in(pool, verifier.fn)
        if row is not None:
            _test_row(pool, verifier.fn, row)


def _test_built_in(pool: VerifyPool, fn: str) -> None:
    items = [VerifyItem(prompt=_probe(gold), completion=completion) for gold, completion, _ in KNOWN[fn]]
    wrong = [
        f"{completion!r} against {gold!r}: {verdict.outcome.value} instead of {expected.value} ({verdict.detail})"
        for (gold, completion, expected), verdict in zip(KNOWN[fn], pool.verify(items), strict=True)
        if verdict.outcome is not expected
    ]
    gold, completion = HOSTILE[fn]
    (hostile,) = pool.verify([VerifyItem(prompt=_probe(gold), completion=completion)], timeout_s=0.5)
    if hostile.outcome is Outcome.CORRECT:
        wrong.append(f"{completion!r} against {gold!r}: correct")
    if wrong:
        raise ConfigError(f"the {fn} verifier fails its self-test; do not train on it: " + "; ".join(wrong))


def _test_row(pool: VerifyPool, fn: str, row: PromptRow) -> None:
    completions = ["\\boxed{" + row.answer + "}", ""]
    for completion, verdict in zip(
        completions, pool.verify([VerifyItem(prompt=row, completion=c) for c in completions]), strict=True
    ):
        if verdict.is_fault:
            columns = ", ".join(row.row) or "none"
            raise ConfigError(
                f"verifier.fn = {fn!r} gives no reward for the first prompt of the data: {verdict.detail}. "
                f"Its answer is {printable(row.answer, 80)!r}, its other columns: {columns}; the completion was "
                f"{printable(completion, 80)!r}. Check verifier.fn and data.answer_key"
            )


def _probe(gold: str) -> PromptRow:
    return PromptRow(prompt_id="0" * 16, text="", token_ids=np.zeros(0, np.int32), answer=gold)
