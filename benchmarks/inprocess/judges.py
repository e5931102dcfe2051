"""Verification in this process, fast, with the verdicts of the real verifier on the synthetic tasks (tested).

The real verifiers parse arbitrary text in killable processes; a model of the synthetic tasks can only write short
strings over a small vocabulary, so its answers are compared here without a parser or an interpreter.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

import numpy as np

from cures_ray.boxes import last_box
from cures_ray.loop.ports import PromptSource
from cures_ray.messages import Outcome, PromptRow, RolloutChunk, RunError, Verdict, VerdictChunk

Judge = Callable[[str, PromptRow], float]  # (completion, prompt) -> reward

RIGHT = Verdict(outcome=Outcome.CORRECT, reward=1.0)
WRONG = Verdict(outcome=Outcome.INCORRECT, reward=0.0)
FUNCTION = re.compile(r"def f\(x\): return (\[[-+*%()x0-9, ]*\])")


def chain(completion: str, prompt: PromptRow) -> float:
    """The last box holds the integer of the answer, leading zeros aside."""
    boxed = last_box(completion)
    if boxed is None or not boxed.isdecimal():
        return 0.0
    return float(boxed == prompt.answer or int(boxed) == int(prompt.answer))


def program(completion: str, prompt: PromptRow) -> float:
    """The one-line function gives the hidden tests' outputs."""
    start = completion.rfind("```python")
    body = completion[start:] if start >= 0 else completion
    found = FUNCTION.search(body)
    if found is None:
        return 0.0
    tests = _tests(prompt.answer)
    return float(_passes(found.group(1), tests))


def reasoning_gym(completion: str, prompt: PromptRow) -> float:
    """The task's own scorer, in this process: the tasks of the benchmark have scorers that only compare numbers.

    Raises:
        RunError: the entry cannot be made again; that is no wrong answer.
    """
    verdict = _gym()({"completion": completion, "answer": prompt.answer, "row": prompt.row})
    if verdict.is_fault:
        raise RunError(f"prompt {prompt.prompt_id}: {verdict.detail}")
    return verdict.reward


JUDGES: dict[str, Judge] = {
    "chain": chain,
    "chain_opaque": chain,
    "program": program,
    "reasoning-gym": reasoning_gym,
}


@lru_cache(maxsize=1)
def _gym() -> Any:
    from cures_ray.verify.reasoning_gym import ReasoningGymJudge

    return ReasoningGymJudge()


@lru_cache(maxsize=8192)
def _tests(answer: str) -> tuple[tuple[int, tuple[int, ...]], ...]:
    tests = json.loads(answer)
    return tuple((case[0], tuple(wanted)) for case, wanted in zip(tests["inputs"], tests["outputs"], strict=True))


@lru_cache(maxsize=65536)
def _passes(source: str, tests: tuple[tuple[int, tuple[int, ...]], ...]) -> bool:
    try:
        tree = ast.parse(source, mode="eval").body
        return all(tuple(_values(tree, x)) == wanted for x, wanted in tests)
    except (SyntaxError, ValueError, ZeroDivisionError, RecursionError, MemoryError):
        return False


def _values(tree: ast.expr, x: int) -> list[int]:
    if not isinstance(tree, ast.List):
        raise ValueError("not a list")
    return [_number(item, x, 0) for item in tree.elts]


def _number(node: ast.expr, x: int, depth: int) -> int:
    """Integer arithmetic with + - * % over the variable x."""
    if depth > 64:
        raise ValueError("too deep")
    if isinstance(node, ast.Constant) and type(node.value) is int:
        return node.value
    if isinstance(node, ast.Name) and node.id == "x":
        return x
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.UAdd):
        value = _number(node.operand, x, depth + 1)
        return -value if isinstance(node.op, ast.USub) else value
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add | ast.Sub | ast.Mult | ast.Mod):
        a, b = _number(node.left, x, depth + 1), _number(node.right, x, depth + 1)
        if isinstance(node.op, ast.Add):
            return a + b
        if isinstance(node.op, ast.Sub):
            return a - b
        return a * b if isinstance(node.op, ast.Mult) else a % b
    raise ValueError(f"not in the task's language: {ast.dump(node)[:60]}")


class LocalVerifier:
    """VerifierPort over a ``Judge``.

    ``prompts``: the tables by name ("train", "eval"). ``coin``: the random-reward control. Rollouts of leases are
    rewarded with that probability whatever they say; evaluation stays honest.
    """

    def __init__(
        self, judge: Judge, prompts: Mapping[str, PromptSource], seed: int = 0, coin: float | None = None
    ) -> None:
        self.judge, self.prompts, self.seed, self.coin = judge, prompts, seed, coin

    async def verify(self, payload: RolloutChunk, rollouts: int) -> VerdictChunk:
        rows, texts = self.prompts[payload.source].rows(payload.prompt_index, tokenize=False), iter(payload.texts)
        verdicts = []
        for key, row, n in zip(payload.summary.keys, rows, payload.summary.n.tolist(), strict=True):
            answers = [next(texts) for _ in range(n)]
            if self.coin is not None and key[0] >= 0:
                right = np.random.default_rng([self.seed, *key]).random(n) < self.coin
            else:
                right = np.array([self.judge(text, row) > 0.5 for text in answers])
            verdicts += [RIGHT if ok else WRONG for ok in right]
        return VerdictChunk.of(verdicts)
