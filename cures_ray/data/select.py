"""Which rows of a source become prompts: ``data.filter``, and no n-gram shared with an evaluation set."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from cures_ray.messages import ConfigError

WORD = re.compile(r"\w+")
NUMBER = re.compile(r"-?\d+(?:\.\d+)?")
BOUNDS = {"min", "max"}


def column(row: Mapping[str, Any], name: str) -> Any:
    """The value under ``name``; dots reach into objects. None where there is none."""
    value: Any = row
    for part in name.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


class Filter:
    """``data.filter``: column -> a value, a list of values, or ``{min, max}``. All must hold.

    A bound reads the last number of a text, so that ``level: {min: 3}`` keeps "Level 3" and above.

    Raises:
        ConfigError: a bound is neither min nor max, or no number.
    """

    def __init__(self, wanted: Mapping[str, Any]) -> None:
        self._wanted = dict(wanted)
        for name, rule in wanted.items():
            if isinstance(rule, Mapping) and (
                not rule or set(rule) - BOUNDS or not all(isinstance(v, int | float) for v in rule.values())
            ):
                raise ConfigError(
                    f"data.filter.{name} = {dict(rule)}: a value, a list of values, or {{min: 3, max: 5}}"
                )

    def __call__(self, row: Mapping[str, Any]) -> bool:
        return all(_holds(column(row, name), rule) for name, rule in self._wanted.items())


def _holds(value: Any, rule: Any) -> bool:
    if isinstance(rule, Mapping):
        number = value if isinstance(value, int | float) else _last_number(value)
        return number is not None and rule.get("min", number) <= number <= rule.get("max", number)
    return value in rule if isinstance(rule, list) else value == rule


def _last_number(value: Any) -> float | None:
    found = NUMBER.findall(value) if isinstance(value, str) else []
    return float(found[-1]) if found else None


class Decontaminator:
    """Finds texts that share a run of ``n`` words with an evaluation prompt (case and punctuation aside).

    Prompts of fewer than ``n`` words are compared whole. A run is a 64-bit hash within the process, so the sets may be
    large; the chance of a false hit is about runs x texts / 2^64.
    """

    def __init__(self, n: int) -> None:
        self._n = n
        self._runs: dict[int, str] = {}  # hash of a run -> the evaluation set that has it

    def add(self, name: str, texts: Iterable[str]) -> None:
        for text in texts:
            for run in self._hashes(text):
                self._runs.setdefault(run, name)

    def source(self, text: str) -> str | None:
        """The evaluation set that ``text`` overlaps with, or None."""
        return next((self._runs[run] for run in self._hashes(text) if run in self._runs), None)

    def _hashes(self, text: str) -> list[int]:
        words = WORD.findall(text.lower())
        if len(words) <= self._n:
            return [hash((len(words), *words))] if words else []
        return [hash((self._n, *words[i : i + self._n])) for i in range(len(words) - self._n + 1)]
