"""User reward functions: ``verifier.fn = "module:function"`` or ``"file.py:function"``.

Three signatures, told apart by parameter names; each plain or ``async``:

    def verify(prompt, completion, answer, **row) -> reward
    def verify_batch(prompts, completions, answers, rows) -> [reward, ...]      one call for up to 64 completions
    def compute_score(data_source, solution_str, ground_truth, extra_info) -> reward

A reward is a number (or bool), a ``Verdict``, or a dict with "score". A function may leave out what it does not need
(``completion`` or ``completions`` it must take), and may name columns of the data instead of ``**row``; a batch
function gets them as lists. ``answer`` is the final answer: what a worked solution has in its last box, or after
"####". Completions of one message are awaited together where the function is ``async``.

Rewards lie in ``verifier.reward_range`` (0 to 1 unless set) and are mapped to [0, 1]: that is what the learner trains
on and what beliefs count; advantages that are divided by a standard deviation do not change by it. Above the middle
counts as correct. Anything else, and an exception, is a fault, not a zero.
"""

from __future__ import annotations

import asyncio
import importlib
import importlib.util
import inspect
import math
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from cures_ray.messages import ConfigError, Outcome, Verdict
from cures_ray.verify.mathematics import fault, printable

Item = dict[str, Any]  # prompt, completion, answer, row, timeout_s
UNIT = (0.0, 1.0)
DETAIL_CHARS = 400
EXPECTED = (
    "expected verify(prompt, completion, answer, **row), verify_batch(prompts, completions, answers, rows) or "
    "compute_score(data_source, solution_str, ground_truth, extra_info)"
)
SCORE_PARAMETERS = {"data_source", "solution_str", "ground_truth"}


@dataclass(slots=True, kw_only=True)
class RewardFunction:
    """A user's function behind one interface; whatever happens in it becomes a verdict."""

    name: str
    function: Callable[..., Any]
    named: set[str]  # its parameters
    everything: bool  # takes **row
    limits: tuple[float, float]
    _runner: list[asyncio.Runner] = field(default_factory=list)  # one event loop for all calls: clients may be kept

    @property
    def style(self) -> str:
        """How its verdicts come: "item" by item in order; "batch" or "async": all may be under way at once."""
        if "completions" in self.named:
            return "batch"
        return "async" if inspect.iscoroutinefunction(self.function) else "item"

    def judge(self, items: list[Item]) -> Iterator[tuple[int, Verdict]]:
        """Each item's place and verdict, as they come."""
        if self.style == "batch":
            yield from enumerate(self._batch(items))
        elif self.style == "async":
            verdicts = self._together(items)
            while (found := self._run(anext(verdicts, None))) is not None:
                yield found
        else:
            yield from ((place, self._one(item)) for place, item in enumerate(items))

    def __call__(self, prompt: str, completion: str, answer: str, row: dict[str, Any]) -> Verdict:
        item = {"prompt": prompt, "completion": completion, "answer": answer, "row": row, "timeout_s": None}
        return next(iter(self.judge([item])))[1]

    def _run(self, awaitable: Awaitable[Any]) -> Any:
        if not self._runner:
            self._runner.append(asyncio.Runner())
        return self._runner[0].run(_wait(awaitable))

    def _one(self, item: Item) -> Verdict:
        try:
            result = self.function(**self._arguments(item))
            if inspect.isawaitable(result):
                result = self._run(result)
        except Exception as error:
            return self._raised(error)
        return to_verdict(result, self.limits)

    async def _together(self, items: list[Item]) -> AsyncIterator[tuple[int, Verdict]]:
        async def one(place: int, item: Item) -> tuple[int, Verdict]:
            try:
                result = await asyncio.wait_for(self.function(**self._arguments(item)), item["timeout_s"])
            except TimeoutError as error:
                late = item["timeout_s"] is not None and not str(error)
                why = f"no verdict within {item['timeout_s']:g} s (verifier.timeout_s)" if late else ""
                return place, fault(why) if late else self._raised(error)
            except Exception as error:
                return place, self._raised(error)
            return place, to_verdict(result, self.limits)

        for done in asyncio.as_completed([one(place, item) for place, item in enumerate(items)]):
            yield await done

    def _batch(self, items: list[Item]) -> list[Verdict]:
        columns = {name for item in items for name in item["row"]}
        values: dict[str, Any] = {name: [item["row"].get(name) for item in items] for name in columns}
        for name in ("prompt", "completion", "answer", "row"):
            values[f"{name}s"] = [item[name] for item in items]
        try:
            results = self.function(**self._taken(values))
            if inspect.isawaitable(results):
                results = self._run(results)
            results = list(results.tolist() if hasattr(results, "tolist") else results)
        except Exception as error:
            return [self._raised(error)] * len(items)
        if len(results) != len(items):
            return [fault(f"{self.name} returned {len(results)} rewards for {len(items)} completions")] * len(items)
        return [to_verdict(result, self.limits) for result in results]

    def _arguments(self, item: Item) -> dict[str, Any]:
        own: dict[str, Any] = {name: item[name] for name in ("prompt", "completion", "answer")}
        if self.named >= SCORE_PARAMETERS:
            own = {
                "data_source": item["row"].get("data_source", ""),
                "solution_str": item["completion"],
                "ground_truth": item["answer"],
                "extra_info": item["row"].get("extra_info"),
            }
        return self._taken({**item["row"], **own})

    def _taken(self, values: dict[str, Any]) -> dict[str, Any]:
        return values if self.everything else {k: v for k, v in values.items() if k in self.named}

    def _raised(self, error: Exception) -> Verdict:
        """A fault with the exception and the last lines of its traceback that are the user's."""
        frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename != __file__][-2:]
        where = ", ".join(f"{Path(f.filename).name}:{f.lineno} in {f.name}" for f in frames)
        reason = f"{self.name} raised {type(error).__name__}: {error}"
        return Verdict(
            outcome=Outcome.FAULT,
            detail=printable(f"{reason} [{where}]" if where else reason, DETAIL_CHARS),
        )


async def _wait(awaitable: Awaitable[Any]) -> Any:
    return await awaitable


def load_reward_function(spec: str, limits: tuple[float, float] = UNIT) -> RewardFunction:
    """The function of ``spec``; ``limits`` is ``verifier.reward_range``.

    Raises:
        ConfigError: ``spec`` is malformed, its module cannot be imported, has no such function, or the function's
            parameters are none of the signatures. The message says what to write instead.
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
            f"verifier.fn = {spec!r}: {where} has no function {name!r}; write {where}:NAME with one of "
            f"the functions there: {', '.join(there) or 'none'}"
        )
    return _with_parameters(spec, name, function, limits)


def _load_module(spec: str, where: str) -> ModuleType:
    try:
        if not where.endswith(".py"):
            return importlib.import_module(where)
        path = Path(where).expanduser().resolve()
        if not path.is_file():
            raise ConfigError(
                f"verifier.fn = {spec!r}: there is no file {path}; give its path from {Path.cwd()}, or from /"
            )
        found = importlib.util.spec_from_file_location(path.stem, path)
        if found is None or found.loader is None:
            raise ConfigError(f"verifier.fn = {spec!r}: {path} is not a Python file")
        module = importlib.util.module_from_spec(found)
        found.loader.exec_module(module)
        return module
    except ConfigError:
        raise
    except BaseException as error:  # the user's module: SystemExit too
        frames = [f for f in traceback.extract_tb(error.__traceback__) if "importlib" not in f.filename]
        line = f" (line {frames[-1].lineno} of {frames[-1].filename})" if frames[1:] else ""
        advice = "; install it, or set PYTHONPATH" if isinstance(error, ModuleNotFoundError) else "; mend it there"
        raise ConfigError(
            f"verifier.fn = {spec!r}: {where} cannot be imported: {type(error).__name__}: {error}{line}{advice}"
        ) from error


def _with_parameters(spec: str, name: str, function: Callable[..., Any], limits: tuple[float, float]) -> RewardFunction:
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"verifier.fn = {spec!r}: its parameters cannot be read ({error}); {EXPECTED}") from error
    parameters = signature.parameters
    everything = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    named = {n for n, p in parameters.items() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    positional = any(p.kind is p.POSITIONAL_ONLY for p in parameters.values())
    known = named >= SCORE_PARAMETERS or named & {"completion", "completions"} or everything
    if positional or not known:
        raise ConfigError(f"verifier.fn = {spec!r}: wrong signature {name}{signature}; {EXPECTED}")
    return RewardFunction(name=name, function=function, named=named, everything=everything, limits=limits)


def to_verdict(result: Any, limits: tuple[float, float] = UNIT) -> Verdict:
    """A Verdict of what a user function returned, its reward mapped from ``limits`` to [0, 1]; else a fault."""
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
    low, high = limits
    if not (math.isfinite(value) and low <= value <= high):
        return fault(
            f"the reward function returned {value:g}, outside verifier.reward_range = [{low:g}, {high:g}]; "
            "set the key to the range of your rewards"
        )
    mapped = (value - low) / (high - low)
    outcome = outcome or (Outcome.CORRECT if mapped > 0.5 else Outcome.INCORRECT)
    return Verdict(outcome=outcome, reward=mapped, detail=printable(detail))
