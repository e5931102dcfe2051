r"""The mathematical verifier: a completion's boxed answer against a gold answer.

What counts as correct (every rule holds for gold and answer alike, none looks at the completion's length or style):

* The answer is the last box (``boxes.last_box``: boxes that stand together at the end are one answer of several
  parts; earlier ones do not count). No box, or a last box that is never closed, is incorrect. The gold is a final
  answer, or a worked solution with a box or ``####``.
* Equal as strings, spaces, ``$``, ``\left``, ``\,`` and the like aside. Spaces between digits count: ``1 2`` is not 12.
* Equal in value: ``1+2`` and ``\frac{6}{2}`` are 3 (where a prompt already states its value as an expression, use a
  reward function that wants the evaluated form). Order counts in tuples and matrices, not in sets and lists; the ends
  of intervals count; ``x = 5`` is 5. Parts are compared by these rules, what remains by math-verify.
* A decimal stands for a number that is not an integer when they differ by less than one unit of its last place and
  agree to six significant digits: 0.333333 is 1/3, 0.333 is not. An integer is met exactly. Exact forms are compared
  exactly.
* ``p%`` is p/100, or p where the other side leaves the sign out.
* A unit (text after a number, degrees, currency, the base of a numeral) may be left out; two different ones are
  unequal. "4 million" is 4000000; text that can be no unit ("4 or 3", "4 is wrong") is not left out.
* Text answers (``\text{no solution}``, names, choices) are equal as text: case, accents' spelling, brackets aside.

A gold that is empty, too long or has unbalanced braces is a FAULT for every completion. One that math-verify cannot
read is compared as a string and by parts only. A comparison that fails is a fault; so is, one level up
(``verify.child``), one that exceeds its time or memory.
"""

from __future__ import annotations

from fractions import Fraction
from functools import cached_property, lru_cache
from typing import Any

from cures_ray.boxes import final_answer, has_box, last_box
from cures_ray.messages import Outcome, Verdict
from cures_ray.verify import latex
from cures_ray.verify.expressions import equal_expressions, parse_expressions
from cures_ray.verify.structure import Parts, read_parts, without_builder
from cures_ray.verify.values import Number, read_number, same_number

MAX_ANSWER_CHARS = 1000  # longer contents of a box are no final answer
MAX_DEPTH = 6  # of parts within parts
MAX_UNORDERED = 12  # parts of a list that are tried against each other


class GoldError(ValueError):
    """The gold answer cannot be read."""


class Answer:
    """One side of the comparison, read as far as the cheap rules go; ``expressions`` asks math-verify."""

    def __init__(self, raw: str) -> None:
        self.clean = latex.clean(raw)
        self.compact = latex.compact(self.clean)
        body, self.unit, self.percent, scale = latex.split_unit(self.clean)
        self.words = latex.as_words(body)
        if self.words is not None:  # \text{6 apples}
            inner, unit, percent, factor = latex.split_unit(self.words.strip("() "))
            if read_number(inner) is not None:
                body, self.words, self.unit = inner, None, unit or self.unit
                self.percent, scale = self.percent or percent, scale * factor
        self.body = without_builder(body)
        self.number: Number | None = None
        if (number := read_number(body)) is not None:
            self.number = number if scale == 1 else number.scaled(scale)
        elif scale != 1:
            self.body, self.unit = self.clean, ""

    @cached_property
    def parts(self) -> Parts | None:
        return None if self.number is not None else read_parts(self.body)

    @cached_property
    def expressions(self) -> list[Any]:
        """What math-verify reads: SymPy objects, empty if nothing. May raise math-verify's TimeoutException."""
        return parse_expressions(self.body)

    @cached_property
    def text(self) -> str:
        return latex.plain_text(self.words if self.words is not None else self.clean)


def same(gold: Answer, answer: Answer, depth: int = 0) -> bool:
    """The rules at the top of this file. May raise what SymPy raises, and math-verify's TimeoutException."""
    if gold.compact == answer.compact:
        return True
    if gold.words is not None or answer.words is not None:
        return gold.text != "" and gold.text == answer.text
    if gold.unit and answer.unit and gold.unit != answer.unit:
        return False
    if gold.number is not None and answer.number is not None:
        return _same_numbers(gold, answer)
    if depth < MAX_DEPTH and (known := _same_parts(gold, answer, depth + 1)) is not None:
        return known
    if not gold.expressions or not answer.expressions:
        return False
    return equal_expressions(gold.expressions[0], answer.expressions[0], gold.number, answer.number)


def _same_numbers(gold: Answer, answer: Answer) -> bool:
    assert gold.number is not None and answer.number is not None
    if same_number(gold.number, answer.number):
        return True
    if gold.percent == answer.percent:
        return False
    hundredth = Fraction(1, 100)
    if gold.percent:
        return same_number(gold.number.scaled(hundredth), answer.number)
    return same_number(gold.number, answer.number.scaled(hundredth))


def _same_parts(gold: Answer, answer: Answer, depth: int) -> bool | None:
    """Whether the parts agree; None: this says nothing, ask math-verify."""
    g, a = gold.parts, answer.parts
    if g is not None and g.kind == "assignment" and "=" not in answer.body:
        return same(_part(g.items[-1]), answer, depth)
    if a is not None and a.kind == "assignment" and "=" not in gold.body:
        return same(gold, _part(a.items[-1]), depth)
    if g is None or a is None or g.kind != a.kind:
        return None
    if g.kind == "assignment":
        return True if g.frame == a.frame and _all_same(g.items, a.items, depth) else None
    if g.kind == "matrix":
        return g.frame == a.frame and _all_same(g.items, a.items, depth)
    if len(g.items) != len(a.items):
        return None
    if g.kind == "unordered":
        return _same_unordered(g.items, a.items, depth)
    if g.kind == "chain":
        return True if g.frame == a.frame and _all_same(g.items, a.items, depth) else None
    return g.frame == a.frame and _all_same(g.items, a.items, depth)


def _all_same(golds: tuple[str, ...], answers: tuple[str, ...], depth: int) -> bool:
    return all(same(_part(g), _part(a), depth) for g, a in zip(golds, answers, strict=True))


def _same_unordered(golds: tuple[str, ...], answers: tuple[str, ...], depth: int) -> bool | None:
    left = [_part(text) for text in answers]
    rest = []
    for gold in map(_part, golds):
        twin = next((a for a in left if a.compact == gold.compact), None)
        rest += [] if twin is not None else [gold]
        left = [a for a in left if a is not twin]
    if len(rest) > MAX_UNORDERED:
        return None
    for gold in rest:
        twin = next((a for a in left if same(gold, a, depth)), None)
        if twin is None:
            return False
        left = [a for a in left if a is not twin]
    return True


@lru_cache(maxsize=4096)
def _part(text: str) -> Answer:
    return Answer(text)


@lru_cache(maxsize=4096)
def read_gold(text: str) -> Answer | GoldError:
    """The gold of a prompt, parsed once; an unreadable one comes back as the error, which is cached too."""
    if has_box(text) and last_box(text) is None:
        return GoldError("its last box is not closed")
    final = final_answer(text)
    if len(final) > MAX_ANSWER_CHARS and not final.strip().isdigit():
        return GoldError(f"{len(final)} characters and no box: a worked solution instead of a final answer?")
    if "####" in final:
        return GoldError("nothing, or more than a line, follows its ####")
    if not latex.balanced(final):
        return GoldError("its braces do not match")
    try:
        gold = Answer(final)
    except MemoryError:
        raise  # says nothing about the gold
    except Exception as error:
        return GoldError(f"{type(error).__name__}: {error}")
    return gold if gold.compact else GoldError("it is empty")


def verify_math(completion: str, gold_text: str, format_reward: float = 0.0) -> Verdict:
    """Judge ``completion`` against ``gold_text``; ``format_reward`` goes to a closed box with a wrong answer.

    MemoryError and math-verify's TimeoutException (a BaseException) pass through: only who set the limits knows.
    """
    gold = read_gold(gold_text)
    if isinstance(gold, GoldError):
        return fault(f"unparsable gold ...{gold_text[-80:]!r}: {gold}")
    content = last_box(completion)
    if content is None:
        return incorrect("no closed \\boxed{}")
    if len(content) > max(MAX_ANSWER_CHARS, 2 * len(gold.clean)):
        return incorrect(f"the box holds {len(content)} characters", format_reward)
    try:
        right = _judge(gold_text, content)
    except MemoryError:
        raise
    except Exception as error:
        return fault(f"comparison failed: {type(error).__name__}: {error}")
    return correct(content) if right else incorrect(content, format_reward)


@lru_cache(maxsize=4096)
def _judge(gold_text: str, content: str) -> bool:
    """Cached: the completions of a prompt often repeat an answer."""
    gold = read_gold(gold_text)
    assert isinstance(gold, Answer)
    return same(gold, Answer(content))


def correct(detail: str = "") -> Verdict:
    return Verdict(outcome=Outcome.CORRECT, reward=1.0, detail=printable(detail))


def incorrect(detail: str = "", reward: float = 0.0) -> Verdict:
    return Verdict(outcome=Outcome.INCORRECT, reward=reward, detail=printable(detail))


def fault(reason: str) -> Verdict:
    return Verdict(outcome=Outcome.FAULT, detail=printable(reason))


def printable(text: str, limit: int = 200) -> str:
    """At most ``limit`` characters that any log or JSON file takes: no control characters, no lone surrogates."""
    return "".join(c if c.isprintable() else "\ufffd" for c in text[:limit])
