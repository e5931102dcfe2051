r"""The mathematical verifier: a completion's last box against a gold answer.

What counts as correct (every rule holds for gold and answer alike, none looks at the completion's length,
style or number of boxes):

* The answer is the content of the *last* ``\boxed{}`` or ``\fbox{}``; earlier boxes do not count. No box, or a last
  box that is never closed, is incorrect. The gold is a final answer, or a worked solution with a box or ``####``.
* Equal as strings, spaces and ``$``, ``\left``, ``\,`` and the like aside.
* Equal in value: ``1+2`` and ``\frac{6}{2}`` are 3 (where a prompt already states its value as an expression, use a
  reward function that wants the evaluated form). Expressions, equations (``x = 5`` for 5), sets, tuples, intervals
  and matrices are compared by math-verify: order counts in tuples, not in sets; the ends of intervals count.
* A decimal stands for a number that is not an integer when they agree to six significant digits (relative
  difference at most 5e-6): 0.333333 is 1/3, 0.333 is not. An integer is met exactly. Exact forms are compared exactly.
* ``p%`` is p/100, or p where the other side leaves the sign out.
* A unit (``\text{...}``, words after a number, degrees, currency) may be left out; two different units are unequal.
* Text answers (``\text{no solution}``, names, choices) are equal as text: case, accents' spelling, brackets aside.

A gold that cannot be read is a FAULT for every completion, also for one that repeats it. So are a comparison that
fails and, one level up (``verify_child``), one that exceeds its time or memory.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable
from fractions import Fraction
from functools import cached_property, lru_cache
from typing import Any, NamedTuple

from cures_ray.messages import Outcome, Verdict

MAX_ANSWER_CHARS = 1000  # longer contents of a box are no final answer
TOLERANCE = Fraction(5, 1_000_000)  # relative; six significant digits
MAX_DIGITS = 400  # longer numbers go to math-verify

TEXT_MACRO = r"\\(?:text|textbf|textit|textrm|textsf|mbox|hbox|mathrm|mathbf|mathit|mathsf|mathtt|boldsymbol|bm|rm)"
DELIMITERS = re.compile(r"\\left(?![a-zA-Z])|\\right(?![a-zA-Z])|\\[()\[\]]|(?<!\\)\$|\\(?:displaystyle|limits)\b")
SPACES = re.compile(r"\\[,!;: ]|\\(?:quad|qquad|thinspace)(?![a-zA-Z])|~|\s+")
JOINED = re.compile(TEXT_MACRO + r"\s*\{\s*(?:,|or|and|, and|, or)\s*\}")
UNITS_AT_END = re.compile(rf"(?:{TEXT_MACRO}\s*\{{[^{{}}]*\}}(?:\s*\^\s*\{{?-?\d+\}}?)?(?:\s|/|\\cdot|\.)*)+$")
DEGREES = re.compile(r"\s*(?:\^\s*\{?\s*\\circ\s*\}?|\\degree|\\degrees)$")
ROMAN = re.compile(r"\\(?:mathrm|rm)\s*\{\s*([ied])\s*\}")  # imaginary unit, Euler's number, differential
SHORT_FRACTION = re.compile(r"\\[dtc]?frac\s*(?:(\d)\s*(\d)|(?=\s*\{))")
WORDS = re.compile(r"(?:[^\W\d_]|[ '\-]|\\['`^\"=.]\s*\{?\\?[A-Za-z]\}?)+")
NUMBER = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d*)?|\.\d+"
DECIMAL = re.compile(rf"([+-]?)\s*({NUMBER})")
REPEATING = re.compile(r"([+-]?)(\d*)\.(\d*)\\overline\{(\d+)\}")
POWER_OF_TEN = r"(?:[eE]|(?:\\times|\\cdot|\*)\s*10\s*\^\s*)\{?\s*([+-]?\d{1,3})\s*\}?"
SCIENTIFIC = re.compile(rf"([+-]?)\s*({NUMBER})\s*{POWER_OF_TEN}")
FRACTION = re.compile(r"([+-]?)\s*(?:\\frac\s*\{\s*([+-]?\d+)\s*\}\s*\{\s*(\d+)\s*\}|(\d+)\s*/\s*(\d+))")
MIXED = re.compile(r"([+-]?)(\d+)\s*(?:\\frac\s*\{\s*(\d+)\s*\}\s*\{\s*(\d+)\s*\}|\s(\d+)\s*/\s*(\d+))")
NUMBER_AND_WORDS = re.compile(rf"([+-]?\s*(?:{NUMBER}))\s+([A-Za-z][A-Za-z .]*[A-Za-z.])")
NOT_UNITS = {"pi", "sin", "cos", "tan", "log", "ln", "exp", "sqrt", "or", "and", "mod", "to", "plus", "minus", "times"}
UNICODE = str.maketrans(
    {"−": "-", "–": "-", "×": r"\times ", "÷": "/", "π": r"\pi ", "∞": r"\infty ", "°": r"^\circ", "\u00a0": " "}
)


def extract_boxed(text: str) -> str | None:
    r"""Content of the last ``\boxed{}`` or ``\fbox{}`` of ``text``; None without one, or when it is not closed.

    A scan for the matching brace; an escaped brace does not count. Linear in the length of ``text``.
    """
    start = max(text.rfind("\\boxed"), text.rfind("\\fbox"))
    if start < 0:
        return None
    opening = start + (6 if text.startswith("\\boxed", start) else 5)
    while opening < len(text) and text[opening] == " ":
        opening += 1
    if opening == len(text) or text[opening] != "{":
        return None
    depth, i = 0, opening
    while i < len(text):
        character = text[i]
        if character == "\\":
            i += 1
        elif character == "{":
            depth += 1
        elif character == "}":
            depth -= 1
            if depth == 0:
                return text[opening + 1 : i]
        i += 1
    return None


class GoldError(ValueError):
    """The gold answer cannot be read."""


class Answer:
    """One side of the comparison, read as far as the cheap rules go; ``expressions`` asks math-verify."""

    def __init__(self, raw: str) -> None:
        self.clean = clean(raw)
        self.compact = self.clean.replace(" ", "")
        body, self.unit, self.percent = _split_unit(self.clean)
        self.words = _words(body)
        if self.words is not None and (match := NUMBER_AND_WORDS.fullmatch(self.words)):
            body, self.unit, self.words = match[1], _plain_unit(match[2]), None
        elif self.words is not None and read_number(self.words.strip("() ")) is not None:
            body, self.words = self.words.strip("() "), None
        self.body = body
        self.number: Fraction | None = None
        self.decimal = False
        if (number := read_number(body)) is not None:
            self.number, self.decimal = number

    @cached_property
    def expressions(self) -> list[Any]:
        """What math-verify reads: SymPy objects, empty if nothing. May raise math-verify's TimeoutException."""
        if self.number is not None:
            return [_math_verify().number(self.number, self.decimal)]
        return _math_verify().parse(self.body)

    @cached_property
    def text(self) -> str:
        return plain_text(self.words if self.words is not None else self.clean)


def clean(raw: str) -> str:
    """Without dollar signs, sizing and spacing macros and a final full stop; thousands joined."""
    text = DELIMITERS.sub("", raw.translate(UNICODE).replace("\\$", "").replace("{,}", ",").replace("\\%", "%"))
    text = text.replace("\\varnothing", "\\emptyset")
    text = re.sub(r"(?<=\d)\\[,!:;](?=\d{3}(?!\d))", "", text)  # 1\,234
    text = SHORT_FRACTION.sub(lambda m: f"\\frac{{{m[1]}}}{{{m[2]}}}" if m[1] else "\\frac", ROMAN.sub(r"\1", text))
    text = SPACES.sub(" ", JOINED.sub(",", text)).strip()
    return text.rstrip(".,;").strip() if not text.endswith("\\.") else text


def _split_unit(text: str) -> tuple[str, str, bool]:
    """(what is left, unit, is a percentage)."""
    for sign in ("%", "\\text{ percent}", "\\text{percent}", " percent"):
        if text.endswith(sign):
            return text.removesuffix(sign).strip(), "", True
    if match := DEGREES.search(text):
        return text[: match.start()].strip(), "degree", False
    if match := UNITS_AT_END.search(text):
        if head := text[: match.start()].strip():
            return head, _plain_unit(plain_text(match[0])), False
        return text, "", False
    if (match := NUMBER_AND_WORDS.fullmatch(text)) and not set(match[2].lower().split()) & NOT_UNITS:
        return match[1], _plain_unit(match[2]), False
    return text, "", False


def _plain_unit(text: str) -> str:
    """``Apples.`` and ``apple`` are one unit; so are ``degrees`` and the sign."""
    unit = re.sub(r"[\s.]+", "", text)
    return unit.lower().rstrip("s") if len(unit) > 3 else unit


def _words(text: str) -> str | None:
    """The text of an answer that is words rather than mathematics, else None."""
    if (match := UNITS_AT_END.match(text)) and match.end() == len(text):
        return latex_to_text(text)
    letters = sum(c.isalpha() for c in text)
    return text if letters >= 4 and WORDS.fullmatch(text) and text.lower() not in NOT_UNITS else None


def latex_to_text(latex: str) -> str:
    r"""Text macros, other macros and accents as plain text, by pylatexenc: ``\text{6 apples}`` is ``6 apples``."""
    if "\\" not in latex and "{" not in latex:
        return latex.strip()
    return " ".join(_latex_reader()(latex).split())


@lru_cache(maxsize=1)
def _latex_reader() -> Callable[[str], str]:
    from pylatexenc.latex2text import LatexNodes2Text

    return LatexNodes2Text(math_mode="text", keep_comments=True, strict_latex_spaces=False).latex_to_text


def plain_text(latex: str) -> str:
    """For comparing text: case, composition of accents, spaces and enclosing brackets do not count."""
    text = unicodedata.normalize("NFKC", latex_to_text(latex)).casefold()
    return " ".join(text.strip(" .,;:!?\"'()[]").split())


def read_number(text: str) -> tuple[Fraction, bool] | None:
    """(value, written as a decimal) of an integer, decimal, fraction, mixed number or power of ten, else None."""
    if len(text) > MAX_DIGITS:
        return None
    if match := DECIMAL.fullmatch(text):
        value = _fraction(match[2])
        return _signed(match[1], value), "." in match[2]
    if match := FRACTION.fullmatch(text):
        over, under = int(match[2] or match[4]), int(match[3] or match[5])
        return (_signed(match[1], Fraction(over, under)), False) if under else None
    if match := SCIENTIFIC.fullmatch(text):
        return _signed(match[1], _fraction(match[2]) * Fraction(10) ** int(match[3])), True
    if match := MIXED.fullmatch(text):
        over, under = int(match[3] or match[5]), int(match[4] or match[6])
        return (_signed(match[1], int(match[2]) + Fraction(over, under)), False) if under else None
    if match := REPEATING.fullmatch(text):
        head, tail, period = match[2] or "0", match[3], match[4]
        repeated = Fraction(int(period), (10 ** len(period) - 1) * 10 ** len(tail))
        return _signed(match[1], Fraction(int(head + tail), 10 ** len(tail)) + repeated), False
    return None


def _fraction(digits: str) -> Fraction:
    return Fraction(digits.replace(",", "").removesuffix("."))


def _signed(sign: str, value: Fraction) -> Fraction:
    return -value if sign == "-" else value


def same_number(a: Fraction, b: Fraction, decimal: bool) -> bool:
    """Equality, to ``TOLERANCE`` when one is a decimal (``decimal``) and neither an integer."""
    if a == b or not decimal or a.denominator == 1 or b.denominator == 1:
        return a == b
    return abs(a - b) <= TOLERANCE * max(abs(a), abs(b))


def same(gold: Answer, answer: Answer) -> bool:
    """The rules at the top of this file. May raise what SymPy raises, and math-verify's TimeoutException."""
    if gold.compact == answer.compact:
        return True
    if gold.words is not None or answer.words is not None:
        return gold.text != "" and gold.text == answer.text
    if gold.unit and answer.unit and gold.unit != answer.unit:
        return False
    if gold.number is not None and answer.number is not None:
        decimal = gold.decimal or answer.decimal
        a, b = gold.number, answer.number
        if gold.percent == answer.percent:
            return same_number(a, b, decimal)
        part = (a / 100, b) if gold.percent else (a, b / 100)
        return same_number(a, b, decimal) or same_number(*part, decimal)
    return bool(answer.expressions) and _math_verify().equal(gold.expressions, answer.expressions)


@lru_cache(maxsize=4096)
def read_gold(text: str) -> Answer | GoldError:
    """The gold of a prompt, parsed once; an unreadable one comes back as the error, which is cached too."""
    boxed = extract_boxed(text)
    if boxed is None and ("\\boxed" in text or "\\fbox" in text):
        return GoldError("its last box is not closed")
    final = boxed if boxed is not None else text.rsplit("####", 1)[-1].strip()
    if len(final) > MAX_ANSWER_CHARS and not final.strip().isdigit():
        return GoldError(f"{len(final)} characters and no box: a worked solution instead of a final answer?")
    try:
        gold = Answer(final)
        if not gold.compact:
            return GoldError("it is empty")
        if gold.words is None and gold.number is None and not gold.expressions:
            return GoldError("math-verify cannot parse it")
        return gold
    except MemoryError:
        raise  # says nothing about the gold
    except Exception as error:
        return GoldError(f"{type(error).__name__}: {error}")


def verify_math(completion: str, gold_text: str, format_reward: float = 0.0) -> Verdict:
    """Judge ``completion`` against ``gold_text``; ``format_reward`` goes to a closed box with a wrong answer.

    MemoryError and math-verify's TimeoutException (a BaseException) pass through: only who set the limits knows.
    """
    gold = read_gold(gold_text)
    if isinstance(gold, GoldError):
        return fault(f"unparsable gold ...{gold_text[-80:]!r}: {gold}")
    content = extract_boxed(completion)
    if content is None:
        return incorrect("no closed \\boxed{}")
    if len(content) > max(MAX_ANSWER_CHARS, 2 * len(gold.clean)):
        return incorrect(f"the box holds {len(content)} characters", format_reward)
    try:
        answer = Answer(content)
        right = same(gold, answer)
    except MemoryError:
        raise
    except Exception as error:
        return fault(f"comparison failed: {type(error).__name__}: {error}")
    return correct(answer.clean) if right else incorrect(answer.clean, format_reward)


def correct(detail: str = "") -> Verdict:
    return Verdict(outcome=Outcome.CORRECT, reward=1.0, detail=printable(detail))


def incorrect(detail: str = "", reward: float = 0.0) -> Verdict:
    return Verdict(outcome=Outcome.INCORRECT, reward=reward, detail=printable(detail))


def fault(reason: str) -> Verdict:
    return Verdict(outcome=Outcome.FAULT, detail=printable(reason))


def printable(text: str, limit: int = 200) -> str:
    """At most ``limit`` characters that any log or JSON file takes: no control characters, no lone surrogates."""
    return "".join(c if c.isprintable() else "\ufffd" for c in text[:limit])


class _MathVerify(NamedTuple):
    parse: Callable[[str], list[Any]]
    equal: Callable[[list[Any], list[Any]], bool]
    number: Callable[[Fraction, bool], Any]


@lru_cache(maxsize=1)
def _math_verify() -> _MathVerify:
    """math-verify, imported late and without its own alarms: one alarm around the whole item replaces them."""
    from latex2sympy2_extended.latex2sympy2 import NormalizationConfig
    from math_verify import LatexExtractionConfig, parse, verify
    from sympy import Float, N, Rational, nan, zoo

    normal = NormalizationConfig(
        basic_latex=True, units=True, malformed_operators=True, nits=True, boxed="none", equations=False
    )
    config = [LatexExtractionConfig(boxed_match_priority=-1, normalization_config=normal)]

    def parse_one(latex: str) -> list[Any]:
        return parse(f"${latex}$", config, "no_fallback", parsing_timeout=None, raise_on_error=True)  # type: ignore

    def number(value: Fraction, decimal: bool) -> Any:
        exact = Rational(value.numerator, value.denominator)
        return Float(exact, 30) if decimal and value.denominator != 1 else exact

    def equal(gold: list[Any], answer: list[Any]) -> bool:
        a, b = gold[0], answer[0]
        if b in (nan, zoo):
            return False
        numbers = all(getattr(x, "is_number", False) and not x.is_integer for x in (a, b))
        if numbers and (a.has(Float) or b.has(Float)):
            a, b = N(a.doit(), 20), N(b.doit(), 20)
            return bool(abs(a - b) <= float(TOLERANCE) * max(abs(a), abs(b)))
        return bool(verify(gold, answer, timeout_seconds=None, raise_on_error=True))  # type: ignore[arg-type]

    return _MathVerify(parse_one, equal, number)
