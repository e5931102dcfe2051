"""User reward functions: ``verifier.fn = "module:function"`` or ``"file.py:function"``.

Two signatures, told apart by parameter names, both plain or ``async``:

    def verify(prompt, completion, answer, **row) -> float | bool | Verdict
    def compute_score(data_source, solution_str, ground_truth, extra_info) -> float | {"score": float, ...}

The first may leave out what it does not need (``completion`` it must take), and may name columns of the data
instead of ``**row``. Rewards are numbers in [0, 1]; above 0.5 counts as correct. Anything else, and an exception,
is a fault, not a zero.
"""

from __future__ import annotations

import asyncio
import importlib
import importlib.util
import inspect
import math
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from cures_ray.messages import ConfigError, Outcome, Verdict
from cures_ray.verify.mathematics import fault, printable

RewardFunction = Callable[[str, str, str, dict[str, Any]], Verdict]  # (prompt, completion, answer, row)

EXPECTED = (
    "expected verify(prompt, completion, answer, **row) or "
    "compute_score(data_source, solution_str, ground_truth, extra_info)"
)
SCORE_PARAMETERS = {"data_source", "solution_str", "ground_truth"}


def load_reward_function(spec: str) -> RewardFunction:
    """The function of ``spec`` behind one signature; it returns a Verdict for whatever happens.

    Raises:
        ConfigError: ``spec`` is malformed, its module cannot be imported, has no such function, or the
            function's parameters are neither signature.
    """
    where, separator, name = spec.rpartition(":")
    if not (where and separator and name):
        raise ConfigError(
            f"verifier.fn = {spec!r} is not known; write math, code, module:function or path/to/file.py:function"
        )
    module = _load_module(spec, where)
    function = getattr(module, name, None)
    if not callable(function):
        there = [n for n, f in vars(module).items() if inspect.isfunction(f) and f.__module__ == module.__name__]
        raise ConfigError(
            f"verifier.fn = {spec!r}: {where} has no function {name!r}; functions there: {', '.join(there) or 'none'}"
        )
    bind = _binder(spec, function)
    runner: list[asyncio.Runner] = []  # one event loop for all calls, so that clients may be kept

    def call(prompt: str, completion: str, answer: str, row: dict[str, Any]) -> Verdict:
        try:
            result = function(**bind(prompt, completion, answer, row))
            if inspect.isawaitable(result):
                if not runner:
                    runner.append(asyncio.Runner())
                result = runner[0].run(_wait(result))
        except Exception as error:
            return fault(f"{name} raised {type(error).__name__}: {error}")
        return to_verdict(result)

    return call


async def _wait(awaitable: Any) -> Any:
    return await awaitable


def _load_module(spec: str, where: str) -> ModuleType:
    try:
        if not where.endswith(".py"):
            return importlib.import_module(where)
        path = Path(where).expanduser().resolve()
        if not path.is_file():
            raise ConfigError(f"verifier.fn = {spec!r}: there is no file {path}")
        found = importlib.util.spec_from_file_location(path.stem, path)
        if found is None or found.loader is None:
            raise ConfigError(f"verifier.fn = {spec!r}: {path} is not a Python file")
        module = importlib.util.module_from_spec(found)
        found.loader.exec_module(module)
        return module
    except ConfigError:
        raise
    except BaseException as error:  # the user's module: SystemExit too
        raise ConfigError(
            f"verifier.fn = {spec!r}: {where} cannot be imported: {type(error).__name__}: {error}"
        ) from error


def _binder(spec: str, function: Callable[..., Any]) -> Callable[[str, str, str, dict[str, Any]], dict[str, Any]]:
    """How the four values become ``function``'s keyword arguments."""
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError) as error:
        raise ConfigError(f"verifier.fn = {spec!r}: its parameters cannot be read ({error}); {EXPECTED}") from error
    everything = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    named = {n for n, p in parameters.items() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    positional = [n for n, p in parameters.items() if p.kind is p.POSITIONAL_ONLY]
    is_score = named >= SCORE_PARAMETERS
    if positional or not (is_score or "completion" in named or everything):
        found = inspect.signature(function)
        raise ConfigError(f"verifier.fn = {spec!r}: wrong signature {function.__name__}{found}; {EXPECTED}")

    def bind(prompt: str, completion: str, answer: str, row: dict[str, Any]) -> dict[str, Any]:
        own: dict[str, Any] = {"prompt": prompt, "completion": completion, "answer": answer}
        if is_score:
            own = {"data_source": row.get("data_source", ""), "solution_str": completion, "ground_truth": answer}
            own["extra_info"] = row.get("extra_info")
        values = {**row, **own}
        return values if everything else {k: v for k, v in values.items() if k in named}

    return bind


def to_verdict(result: Any) -> Verdict:
    """A Verdict of what a user function returned; a fault for what is no reward."""
    if isinstance(result, Verdict):
        if result.is_fault:
            return result
        reward, detail, outcome = result.reward, result.detail, result.outcome
    else:
        detail, outcome = "", None
        if isinstance(result, dict):
            if "score" not in result:
                return fault(f"the reward function returned a dict without 'score': {sorted(map(str, result))}")
            detail = ", ".join(f"{k}={v}" for k, v in result.items() if k != "score")
            result = result["score"]
        reward = result
    try:
        if isinstance(reward, (str, bytes)):
            raise TypeError
        value = float(reward)
    except (TypeError, ValueError):
        return fault(f"the reward function returned {reward!r:.80}, not a number")
    if not (math.isfinite(value) and 0.0 <= value <= 1.0):
        return fault(f"the reward function returned {value:g}; rewards are numbers in [0, 1]: map it in the function")
    outcome = outcome or (Outcome.CORRECT if value > 0.5 else Outcome.INCORRECT)
    return Verdict(outcome=outcome, reward=value, detail=printable(detail))
