"""Synthetic tasks whose answers can be verified and whose prompts differ widely in difficulty.

``chain``    left-to-right arithmetic modulo 13: ``07*03-05+02=...`` -> ``\\boxed{07080305}``: the start and every
             intermediate value, two digits each. Judged by the mathematical verifier as one integer, which is fast
             and makes guessing hopeless (13^-k). The start is never 00: as an integer, 0005 would equal 05.
             Dots make all prompts equally long, so that each step looks back by one fixed distance: with that the
             warm start takes a fifth of the samples.
``program``  small program synthesis: the values of an unknown function at x = 0, 1, 2, component by component
             (``f(0,1,2)=+03+05+07;+01+09+33``) -> ``def f(x): return [2*x+3,8*x*x+1]``. Judged by running it on other
             x. Values have two digits, and dots make all prompts equally long here too.

``chain_opaque``  chains whose text does not show how hard they are. A prompt begins with a key, a, b or c, which
             says what + - * stand for in it: the three are rotated. Over all keys every written operation is each
             operation equally often, so a linear model of the text learns next to nothing; who reads the key can.
             All prompts have equally many operations.

All are made of *facts* (one look-up in an operation table). A ``Skill`` is a partly wrong set of tables: a base
model supervised on its derivations starts bimodal, many prompts near 0 and many near 1, with room to repair
(docs/benchmarks.md, "How it is measured"). Variant N: a wrong entry per fact, little transfer between
prompts. Variant T: one misconception per (operation, operand), so that skills transfer.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

Variant = Literal["N", "T"]

MODULUS = 13
CHAIN_LEVELS = (1, 2, 3, 4, 5, 6)
OPAQUE_LEVELS = (3,)  # one number of steps: the length of a prompt would tell its difficulty
OPERATIONS = ("+", "-", "*")
KEYS = "abc"
PROGRAM_LEVELS = (1, 2, 3, 4)
MIX_CONCENTRATION = 0.4  # Dirichlet over the operations of one prompt: small = prompts of mostly one operation
BOX = "\\boxed{"
EXAMPLES = "f(0,1,2)="
CODE_OPEN = "```python\ndef f(x): return ["
CODE_CLOSE = "]\n```"
TERMS = {"x": "*x+", "x*x": "*x*x+", "(x%2)": "*(x%2)+"}  # family -> what stands between coefficient and constant
HIDDEN_X = (3, 4, 5, 7, 10, -1, -2)

# Probability that an entry is taught wrong ~ Beta(a, b), by operation: from mastered to hardly known.
CHAIN_ERROR = {"+": (0.3, 3.0), "-": (0.8, 1.2), "*": (2.0, 0.7)}
PROGRAM_ERROR = {"x": (0.3, 3.0), "x*x": (0.8, 1.0), "(x%2)": (3.0, 0.6)}
COEFFICIENTS = tuple(a for a in range(-9, 10) if a)


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """One prompt. ``facts`` is what a derivation needs: task specific, hashable."""

    text: str  # the user's message
    answer: str  # the gold, for the verifier
    level: int  # number of operations or components: 1 is easiest
    facts: tuple[Any, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Skill:
    """Partly wrong tables: fact -> (probability of the wrong entry, wrong entry)."""

    entries: dict[tuple[Any, ...], tuple[float, int]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """A task as four functions, and the longest completion in tokens of the tokenizer in base_model.py."""

    draw: Callable[[np.random.Generator, int, float], Problem]  # (rng, level, mix concentration)
    skill: Callable[[np.random.Generator, Variant], Skill]
    solve: Callable[[Problem, Skill | None, np.random.Generator], str]  # None: without mistakes
    levels: tuple[int, ...]
    max_new_tokens: int
    sft_steps: int  # supervised steps after which a base model starts at an accuracy of about a quarter
    verifier: str  # verifier.fn
    gold: Callable[[str, str], str]  # (rendered prompt, answer) -> the mistake-free completion, up to what closes it


def generate(
    task: str,
    *,
    seed: int,
    count: int,
    levels: tuple[int, ...] | None = None,
    mix: float = MIX_CONCENTRATION,
    exclude: frozenset[str] | set[str] = frozenset(),
) -> list[Problem]:
    """``count`` distinct problems, levels in equal shares as far as a level has that many, in random order.

    Args:
        levels: difficulty mix; repeat a level to draw it more often. None: all levels of the task once.
        mix: Dirichlet concentration of the operations within one prompt.
        exclude: texts that must not occur (the training prompts, when held-out prompts are made).

    Raises:
        ValueError: unknown task or level, or the levels do not hold ``count`` distinct problems.
    """
    spec = TASKS.get(task)
    if spec is None:
        raise ValueError(f"unknown task {task!r}; there are {', '.join(TASKS)}")
    wanted = levels or spec.levels
    if bad := sorted(set(wanted) - set(spec.levels)):
        raise ValueError(f"task {task} has levels {spec.levels[0]} to {spec.levels[-1]}, not {bad}")
    rng = np.random.default_rng([seed, 11])
    problems: list[Problem] = []
    seen = set(exclude)
    misses = 0
    while len(problems) < count:
        problem = spec.draw(rng, int(wanted[(len(problems) + misses) % len(wanted)]), mix)
        if problem.text in seen:
            misses += 1
            if misses > 20 * count + 10_000:
                raise ValueError(f"levels {wanted} of task {task} do not hold {count} more distinct problems")
            continue
        seen.add(problem.text)
        problems.append(problem)
    return [problems[i] for i in rng.permutation(count)]


def to_row(problem: Problem, task: str) -> dict[str, Any]:
    """A line of the JSONL files, in the columns of the common trainers."""
    return {
        "prompt": [{"role": "user", "content": problem.text}],
        "answer": problem.answer,
        "level": problem.level,
        "data_source": f"cures/{task}",
    }


# chain: facts are (start, (op, operand), (op, operand), ...)


def draw_chain(rng: np.random.Generator, level: int, mix: float) -> Problem:
    start = int(rng.integers(1, MODULUS))
    weights = rng.dirichlet([mix] * len(CHAIN_ERROR))
    ops = rng.choice(list(CHAIN_ERROR), size=level, p=weights)
    steps = tuple((str(op), int(b)) for op, b in zip(ops, rng.integers(MODULUS, size=level), strict=True))
    text = _written(start, steps) + "." * (CHAIN_LEVELS[-1] - level)
    return Problem(text=text, answer=_chain_answer(start, steps), level=level, facts=(start, *steps))


def draw_opaque_chain(rng: np.random.Generator, level: int, mix: float) -> Problem:
    clear = draw_chain(rng, level, mix)
    start, *steps = clear.facts
    key = int(rng.integers(len(KEYS)))
    return Problem(
        text=KEYS[key] + _written(start, [(rotate(op, key), b) for op, b in steps]),
        answer=clear.answer,
        level=level,
        facts=clear.facts,
    )


def rotate(op: str, key: int) -> str:
    """An operation as ``chain_opaque`` writes it under ``key``; the key -key gives it back."""
    return OPERATIONS[(OPERATIONS.index(op) + key) % len(OPERATIONS)]


def _written(start: int, steps: Iterable[tuple[str, int]]) -> str:
    return f"{start:02d}" + "".join(f"{op}{b:02d}" for op, b in steps) + "="


def _chain_answer(start: int, steps: Iterable[tuple[str, int]]) -> str:
    values = [start]
    for op, b in steps:
        values.append(apply(op, values[-1], b))
    return _joined(values)


def apply(op: str, a: int, b: int) -> int:
    return (a + b if op == "+" else a - b if op == "-" else a * b) % MODULUS


def _spread_beta(rng: np.random.Generator, alpha: float, beta: float, count: int) -> list[float]:
    """``count`` draws, one from each quantile band, shuffled: seeds differ in which are large, not in how many."""
    bands = np.sort(rng.beta(alpha, beta, size=64 * count)).reshape(count, 64)
    return rng.permutation(bands[np.arange(count), rng.integers(64, size=count)]).tolist()


def chain_skill(rng: np.random.Generator, variant: Variant) -> Skill:
    entries: dict[tuple[Any, ...], tuple[float, int]] = {}
    for op, (alpha, beta) in CHAIN_ERROR.items():
        for b, shared in enumerate(_spread_beta(rng, alpha, beta, MODULUS)):
            shift = int(rng.integers(1, MODULUS))
            for a in range(MODULUS):
                right = apply(op, a, b)
                if variant == "T":  # the misconception: the result is off by the same amount for this operand
                    entries[op, a, b] = (shared, (right + shift) % MODULUS)
                else:
                    wrong = (right + int(rng.integers(1, MODULUS))) % MODULUS
                    entries[op, a, b] = (float(rng.beta(alpha, beta)), wrong)
    return Skill(entries=entries)


def solve_chain(problem: Problem, skill: Skill | None, rng: np.random.Generator) -> str:
    """The completion; a wrong value is carried on, as a real derivation would."""
    value = problem.facts[0]
    values = [value]
    for op, b in problem.facts[1:]:
        right = apply(op, value, b)
        if skill is not None:
            probability, wrong = skill.entries[op, value, b]
            right = wrong if rng.random() < probability else right
        value = right
        values.append(value)
    return BOX + _joined(values) + "}"


def _joined(values: list[int]) -> str:
    return "".join(f"{v:02d}" for v in values)


# program: facts are ((family, coefficient, constant), ...), one per component: coefficient * family + constant


def draw_program(rng: np.random.Generator, level: int, mix: float) -> Problem:
    families = list(PROGRAM_ERROR)
    drawn = rng.choice(families, size=level, p=rng.dirichlet([mix] * len(families)))
    facts = tuple((str(f), int(rng.choice(COEFFICIENTS)), int(rng.integers(10))) for f in drawn)
    shown = ";".join("".join(f"{evaluate(fact, x):+03d}" for x in (0, 1, 2)) for fact in facts)
    shown += "...." * (PROGRAM_LEVELS[-1] - level)  # a component is three tokens and a semicolon
    tests = {
        "fn_name": "f",
        "inputs": [[x] for x in HIDDEN_X],
        "outputs": [[evaluate(fact, x) for fact in facts] for x in HIDDEN_X],
    }
    return Problem(text=EXAMPLES + shown, answer=json.dumps(tests), level=level, facts=facts)


def read_off(values: tuple[int, int, int]) -> tuple[str, int, int]:
    """The fact with these values at x = 0, 1, 2."""
    b, a = values[0], values[1] - values[0]
    family = next(f for f in TERMS if evaluate((f, a, b), 2) == values[2])
    return family, a, b


def gold_program(text: str, answer: str) -> str:
    shown = text.split(EXAMPLES)[1].split(".")[0].split("<")[0]
    values = [tuple(int(v) for v in re.findall(r"[+-]\d\d", part)) for part in shown.split(";")]
    parts = [f"{a}{TERMS[family]}{b}" for family, a, b in map(read_off, values)]  # type: ignore[arg-type]
    return CODE_OPEN + ",".join(parts) + CODE_CLOSE


def evaluate(fact: tuple[str, int, int], x: int) -> int:
    family, a, b = fact
    return a * {"x": x, "x*x": x * x, "(x%2)": x % 2}[family] + b


def program_skill(rng: np.random.Generator, variant: Variant) -> Skill:
    """A wrong entry is a wrong coefficient, read off the examples; constants are always right."""
    entries: dict[tuple[Any, ...], tuple[float, int]] = {}
    for family, (alpha, beta) in PROGRAM_ERROR.items():
        for a, shared in zip(COEFFICIENTS, _spread_beta(rng, alpha, beta, len(COEFFICIENTS)), strict=True):
            shared_wrong = _other_coefficient(rng, a)
            for b in range(10):
                if variant == "T":
                    entries[family, a, b] = (shared, shared_wrong)
                else:
                    entries[family, a, b] = (float(rng.beta(alpha, beta)), _other_coefficient(rng, a))
    return Skill(entries=entries)


def _other_coefficient(rng: np.random.Generator, a: int) -> int:
    return int(rng.choice([c for c in COEFFICIENTS if c != a]))


def solve_program(problem: Problem, skill: Skill | None, rng: np.random.Generator) -> str:
    parts = []
    for family, a, b in problem.facts:
        if skill is not None:
            probability, wrong = skill.entries[family, a, b]
            a = wrong if rng.random() < probability else a
        parts.append(f"{a}{TERMS[family]}{b}")
    return CODE_OPEN + ",".join(parts) + CODE_CLOSE


CHAIN = Task(
    draw=draw_chain,
    skill=chain_skill,
    solve=solve_chain,
    levels=CHAIN_LEVELS,
    max_new_tokens=12,
    sft_steps=240,
    verifier="math",
    gold=lambda _, answer: BOX + answer + "}",
)
TASKS: dict[str, Task] = {
    "chain": CHAIN,
    "chain_opaque": replace(CHAIN, draw=draw_opaque_chain, levels=OPAQUE_LEVELS, sft_steps=1200),
    "program": Task(
        draw=draw_program,
        skill=program_skill,
        solve=solve_program,
        levels=PROGRAM_LEVELS,
        max_new_tokens=24,
        sft_steps=240,
        verifier="code",
        gold=gold_program,
    ),
}
