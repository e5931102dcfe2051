r"""Where an answer stands in a text: the rule for the golds of the data and for completions alike.

* The answer is the content of the last ``\boxed{}``, ``\fbox{}`` or ``\framebox{}``. Of nested ones the inner counts.
* Boxes that stand next to each other at the end, with only spaces, commas, dollar signs, "and", "or" or the
  next part's name between them, are one answer of several parts: ``x = \boxed{2} and y = \boxed{3}`` is ``2, 3``.
  Equal parts count once.
* ``\boxed 7`` without braces holds an integer and nothing else.
* A last box that is never closed is no answer; an earlier one does not stand in for it.
"""

from __future__ import annotations

import re

BOX = re.compile(r"\\(?:boxed|fbox|framebox)(?![a-zA-Z])\s*")
BARE = re.compile(r"-?\d+(?!\d)")
BETWEEN = re.compile(
    r"(?:[\s$,;]|\\[()\[\],;!\\]|\\q?quad(?![a-zA-Z])|\\(?:text|mbox|textrm|mathrm)\s*\{[^{}]{0,60}?(?:and|or)\s*\}"
    r"|\*\*|(?<![a-zA-Z])(?:and|or)(?![a-zA-Z]))*"
    r"(?:(?<![a-zA-Z\\])[A-Za-z](?:_\{?\w{1,3}\}?)?\s*=\s*)?"
)
MAX_PARTS = 64


def last_box(text: str) -> str | None:
    """The boxed answer of ``text``; None without a box, or when the last one is not closed. Linear in its length."""
    parts: list[str] = []
    end = len(text)
    while len(parts) < MAX_PARTS:
        start = max(text.rfind(opener, 0, end) for opener in ("\\boxed", "\\fbox", "\\framebox"))
        found = _content(text, start, end) if start >= 0 else None
        if found is None:
            break
        content, after = found
        if parts and (after > end or not BETWEEN.fullmatch(text, after, end)):
            break
        parts.append(content)
        end = start
    return ", ".join(dict.fromkeys(reversed(parts))) if parts else None


def final_answer(solution: str) -> str:
    """The gold of a worked solution: its box, else what follows its last ``####`` (GSM8K), else the whole text."""
    boxed = last_box(solution)
    if boxed is not None:
        return boxed
    _, mark, after = solution.rpartition("####")
    return after.strip() if mark and after.strip() and "\n" not in after.strip() else solution


def has_box(text: str) -> bool:
    return BOX.search(text) is not None


def _content(text: str, start: int, end: int) -> tuple[str, int] | None:
    """(content, where it ends) of the box at ``start``. ``end``: the next box; this one ends before it or not at all
    as far as the answer is concerned."""
    box = BOX.match(text, start)
    if box is None:
        return None
    opening = box.end()
    if not text.startswith("{", opening):
        bare = BARE.match(text, opening)
        return (bare[0], bare.end()) if bare else None
    depth, i = 0, opening
    while i < min(len(text), end):
        character = text[i]
        if character == "\\":
            i += 1
        elif character == "{":
            depth += 1
        elif character == "}":
            depth -= 1
            if depth == 0:
                return text[opening + 1 : i], i + 1
        i += 1
    return None
