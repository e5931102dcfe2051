"""The gold of a row: what a verifier compares with, cut out of a worked solution where it is one."""

from __future__ import annotations

import json
import re
from typing import Any

from cures_ray.boxes import final_answer, last_box

THOUSANDS = re.compile(r"-?\d{1,3}(?:,\d{3})+(?:\.\d+)?")


def gold_of(value: Any) -> str | None:
    """A row's answer as text, or None where there is none.

    A worked solution is cut to its box, or to what follows ``####`` (GSM8K; ``1,234`` becomes ``1234``). A
    ``reward_model`` object gives its ``ground_truth``, a list its parts with commas between them, a float without a
    fraction an integer.
    """
    if isinstance(value, dict):
        value = value.get("ground_truth")
    if isinstance(value, (list, tuple)):
        parts = [gold_of(part) for part in value]
        return ", ".join(part for part in parts if part is not None) if value else None
    if value is None:
        return None
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    answer = final_answer(text).strip()
    if "####" in text and THOUSANDS.fullmatch(answer):
        return answer.replace(",", "")
    return answer


def has_box(value: Any) -> bool:
    """Whether a solution's answer stands in a box that is closed."""
    return isinstance(value, str) and last_box(value) is not None
