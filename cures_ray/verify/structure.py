r"""The parts of an answer: lists, tuples, intervals, sets, matrices, assignments, chains of inequalities."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

Kind = Literal["unordered", "ordered", "matrix", "assignment", "chain"]
MATRIX = re.compile(
    r"[(\[]?\s*\\begin\s*\{\s*(p|b|B|small)?(matrix|array)\s*\}\s*(?:\{[^{}]*\}\s*)?(.*)"
    r"\\end\s*\{\s*(?:p|b|B|small)?(?:matrix|array)\s*\}\s*[)\]]?",
    re.DOTALL,
)
SUBSCRIPT = r"(?:_(?:\{[^{}]*\}|\w))?"
NAME = rf"(?:\\?[A-Za-z]+{SUBSCRIPT}'*)"
ASSIGNED = re.compile(rf"{NAME}(?:\(\s*{NAME}(?:\s*,\s*{NAME})*\s*\))?|\(\s*{NAME}(?:\s*,\s*{NAME})+\s*\)")
MAX_NAME = 24  # characters left of "="; longer is an expression
BUILDER = re.compile(rf"\\\{{\s*({NAME})\s*(?:\\in\s*\\mathbb\s*\{{?\s*[RC]\s*\}}?\s*)?(?:\||:)(.*)\\\}}", re.DOTALL)
RELATION = re.compile(r"\\leq(?![a-zA-Z])|\\geq(?![a-zA-Z])|<|>")
OPENING, CLOSING = "([{", ")]}"


@dataclass(frozen=True, slots=True)
class Parts:
    """``items`` as LaTeX; ``frame`` is what else must agree: brackets, a matrix's shape, a name, relation signs."""

    kind: Kind
    items: tuple[str, ...]
    frame: object = None


def read_parts(text: str) -> Parts | None:
    """The parts of a cleaned answer, None when it is one expression. A chain of inequalities is made to ascend."""
    if match := MATRIX.fullmatch(text):
        return _matrix(match[3])
    inner, brackets = _unwrap(text)
    items = split_top(inner)
    if len(items) > 1:
        if brackets in (("\\{", "\\}"), ("", "")):
            return Parts("unordered", items)
        return Parts("ordered", items, brackets)
    if brackets == ("\\{", "\\}") and items and "|" not in inner and ":" not in inner:
        return Parts("unordered", items)
    return _assignment(text) or _chain(text)


def without_builder(text: str) -> str:
    r"""``\{x | x > 3\}`` is its condition, ``x > 3``."""
    match = BUILDER.fullmatch(text)
    if match and len(split_top(match[2])) == 1 and RELATION.search(match[2]):
        return match[2].strip()
    return text


def split_top(text: str, separators: str = ",;") -> tuple[str, ...]:
    """``text`` at the separators outside all brackets; () when the brackets do not match or a part is empty."""
    parts, depth, begin, i = [], 0, 0, 0
    while i < len(text):
        character = text[i]
        if character == "\\" and text[i + 1 : i + 2] not in ("{", "}"):
            i += 2
            continue
        if character == "\\":
            i += 1
            character = text[i]
        if character in OPENING:
            depth += 1
        elif character in CLOSING:
            depth -= 1
            if depth < 0:
                return ()
        elif character in separators and depth == 0:
            parts.append(text[begin:i].strip())
            begin = i + 1
        i += 1
    parts.append(text[begin:].strip())
    return tuple(parts) if depth == 0 and all(parts) else ()


def _unwrap(text: str) -> tuple[str, tuple[str, str]]:
    """(what is inside, its brackets); the brackets are "" when they do not enclose the whole."""
    opener = "\\{" if text.startswith("\\{") else text[:1]
    closer = "\\}" if text.endswith("\\}") else text[-1:]
    if opener in ("(", "[", "\\{") and closer in (")", "]", "\\}") and (opener == "\\{") == (closer == "\\}"):
        inner = text[len(opener) : len(text) - len(closer)].strip()
        if split_top(inner):
            return inner, (opener, closer)
    return text, ("", "")


def _matrix(inner: str) -> Parts | None:
    if "\\begin" in inner:
        return None
    rows = [[cell.strip() for cell in row.split("&")] for row in inner.split("\\\\")]
    shape = (len(rows), len(rows[0]))
    if any(len(row) != shape[1] for row in rows):
        return None
    return Parts("matrix", tuple(cell for row in rows for cell in row), shape)


def _assignment(text: str) -> Parts | None:
    sides = re.split(r"(?<![<>!:\\])=", text)
    name = sides[0].strip()
    if len(sides) < 2 or len(name) > MAX_NAME or not ASSIGNED.fullmatch(name) or RELATION.search(text):
        return None
    if any(not side.strip() for side in sides):
        return None
    return Parts("assignment", (sides[-1].strip(),), re.sub(r"\s", "", name))


def _chain(text: str) -> Parts | None:
    signs = tuple(RELATION.findall(text))
    terms = tuple(term.strip() for term in RELATION.split(text))
    if not signs or not all(terms) or "," in text:
        return None
    falling = {">": "<", "\\geq": "\\leq"}
    if all(sign in falling for sign in signs):
        signs, terms = tuple(falling[sign] for sign in reversed(signs)), terms[::-1]
    return Parts("chain", terms, signs)
