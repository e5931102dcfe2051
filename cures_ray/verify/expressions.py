r"""What the rules of this room leave open goes to math-verify and SymPy, with guards against answers that are only
expensive: towers of powers, factorials of large numbers, deep nesting. Such an expression is equal to nothing but
its own spelling."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

from cures_ray.verify.values import TOLERANCE, Number

MAX_NESTING = 40  # brackets within brackets
MAX_DIGITS = 20_000  # decimal digits of a number that an answer may ask SymPy to write out
MAX_TERMS = 10_000  # of a sum or product with numeric limits
MAX_FACTORIAL = 3_000
MAX_POLYNOMIAL = 200  # degree: (x+1)^n is multiplied out
DIGITS_COMPARED = 50
PROBES = (0.414213562, 1.732050808)  # where expressions with variables are tried
PROBE_STEP = 0.271828183
MAX_SYMBOLS = 12


class TooLarge(ValueError):
    """The expression would take time and memory without end."""


def parse_expressions(text: str) -> list[Any]:
    """SymPy objects, at most one; empty when ``text`` is no mathematics or too large. May raise TimeoutException."""
    if not text or _nesting(text) > MAX_NESTING or re.search(r"\d{401}", text):
        return []
    try:
        return _parse(text)
    except MemoryError:
        raise
    except Exception:  # math-verify's parser gives up in many ways
        return []


@lru_cache(maxsize=4096)
def _parse(text: str) -> list[Any]:
    found = _math_verify().parse(text)[:1]
    try:
        for expression in found:
            check_size(expression)
    except (TooLarge, OverflowError, TypeError):
        return []
    return found


def equal_expressions(gold: Any, answer: Any, gold_number: Number | None, answer_number: Number | None) -> bool:
    """Equality of two SymPy objects. ``*_number``: the side as a plain number, where it is one."""
    from sympy import Expr, MatrixBase, MatrixExpr, nan, zoo
    from sympy.core.relational import Relational

    if answer in (nan, zoo) or isinstance(gold, MatrixBase | MatrixExpr) != isinstance(answer, MatrixBase | MatrixExpr):
        return False
    if isinstance(gold, Relational) and isinstance(answer, Relational) and gold.free_symbols != answer.free_symbols:
        return False
    if isinstance(gold, Expr) and isinstance(answer, Expr) and gold.is_number and answer.is_number:
        known = _equal_numbers(gold, answer, gold_number, answer_number)
        if known is not None:
            return known
    elif isinstance(gold, Expr) and isinstance(answer, Expr) and _differ_somewhere(gold, answer):
        return False
    return _math_verify().equal(gold, answer)


def _equal_numbers(gold: Any, answer: Any, gold_number: Number | None, answer_number: Number | None) -> bool | None:
    from sympy import Float, N, Rational

    a, b = (
        (Rational(n.value.numerator, n.value.denominator) if n is not None else e)
        for e, n in ((gold, gold_number), (answer, answer_number))
    )
    a, b = N(a, DIGITS_COMPARED), N(b, DIGITS_COMPARED)
    if not (a.is_Number or a.as_real_imag()[1].is_Number) or not (b.is_Number or b.as_real_imag()[1].is_Number):
        return None
    difference, size = abs(a - b), max(abs(a), abs(b))
    places = [n.place for n in (gold_number, answer_number) if n is not None and n.place is not None]
    if places:
        whole = any(n is not None and n.value.denominator == 1 for n in (gold_number, answer_number))
        place = max(places)
        near = difference < Rational(place.numerator, place.denominator) and difference <= float(TOLERANCE) * size
        return bool(near and not whole)
    if any(e.has(Float) for e, n in ((gold, gold_number), (answer, answer_number)) if n is None):
        return bool(difference <= 1e-6 * size)
    if difference > size * Float("1e-40", DIGITS_COMPARED):
        return False
    return True if size != 0 or difference == 0 else None


def _differ_somewhere(gold: Any, answer: Any) -> bool:
    """Whether the two have different values at a point: then they need no proof. Positive points only, since answers
    are often meant for these (``\\sqrt{x^2}`` as x)."""
    from sympy import Derivative, Float, Integral, Limit, Product, Sum

    slow = (Derivative, Integral, Limit, Product, Sum)
    symbols = sorted(gold.free_symbols | answer.free_symbols, key=str)
    if gold.has(*slow) or answer.has(*slow) or len(symbols) > MAX_SYMBOLS:
        return False
    tolerance = 1e-5 if gold.has(Float) or answer.has(Float) else 1e-9
    for start in PROBES:
        point = {symbol: Float(start + k * PROBE_STEP, 30) for k, symbol in enumerate(symbols)}
        a, b = gold.evalf(20, subs=point), answer.evalf(20, subs=point)
        if not (a.is_Number and b.is_Number and a.is_finite and b.is_finite):
            continue
        if abs(a - b) > tolerance * max(abs(a), abs(b)):
            return True
    return False


def check_size(expression: Any) -> None:
    """Raise TooLarge for what cannot be evaluated in reasonable time. Looks at numbers, does no arithmetic on them."""
    from sympy import Basic

    if isinstance(expression, Basic):
        _digits(expression, 0)


def _digits(e: Any, depth: int) -> float:
    """An upper guess of log10 of the size of ``e``; variables count as 1."""
    from sympy import E

    if depth > 4 * MAX_NESTING:
        raise TooLarge
    name = type(e).__name__
    if getattr(e, "is_Rational", False):
        return max(_log10(int(e.p)), _log10(int(e.q)))
    if getattr(e, "is_Float", False):
        return abs(math.log10(abs(float(e)))) if float(e) else 0.0
    sizes = [_digits(arg, depth + 1) for arg in getattr(e, "args", ())]
    if name == "Pow":
        return _power(e.args[0], e.args[1], sizes[0], sizes[1])
    if name in ("exp", "sinh", "cosh"):
        return _power(E, e.args[0], 0.44, sizes[0])
    if name in ("factorial", "gamma", "factorial2", "subfactorial", "binomial", "RisingFactorial", "FallingFactorial"):
        if max(sizes, default=0.0) > math.log10(MAX_FACTORIAL) and getattr(e.args[0], "is_number", True):
            raise TooLarge
        return 4.0 * MAX_FACTORIAL
    if name in ("Sum", "Product"):
        if any(size > math.log10(MAX_TERMS) for size in sizes[1:]):
            raise TooLarge
        return sizes[0] + 4
    if name == "Mul":
        return sum(sizes)
    return max(sizes, default=0.0) + (1 if sizes else 0)


def _power(base: Any, exponent: Any, base_digits: float, exponent_digits: float) -> float:
    if not exponent.is_number:
        return base_digits + exponent_digits
    if exponent_digits > 100:  # a tower
        raise TooLarge
    times = abs(complex(exponent.evalf(6)))  # cheap: it has at most a hundred digits
    if base.is_number:
        digits = max(base_digits, 0.3) * times
        if digits > MAX_DIGITS:
            raise TooLarge
        return digits
    if times > (MAX_POLYNOMIAL if base.is_Add else 10**6):
        raise TooLarge
    return base_digits


def _log10(value: int) -> float:
    return value.bit_length() * 0.30103 if value else 0.0


def _nesting(text: str) -> int:
    depth = deepest = 0
    for character in text:
        if character in "([{":
            depth += 1
            deepest = max(deepest, depth)
        elif character in ")]}":
            depth -= 1
    return deepest


class _MathVerify(NamedTuple):
    parse: Callable[[str], list[Any]]
    equal: Callable[[Any, Any], bool]


@lru_cache(maxsize=1)
def _math_verify() -> _MathVerify:
    """math-verify, imported late and without its own alarms: one alarm around the whole item replaces them."""
    from latex2sympy2_extended.latex2sympy2 import NormalizationConfig
    from math_verify import LatexExtractionConfig, parse, verify

    normal = NormalizationConfig(
        basic_latex=True, units=True, malformed_operators=True, nits=True, boxed="none", equations=False
    )
    config = [LatexExtractionConfig(boxed_match_priority=-1, normalization_config=normal)]

    def parse_one(latex: str) -> list[Any]:
        return parse(f"${latex}$", config, "no_fallback", parsing_timeout=None, raise_on_error=True)  # type: ignore

    def equal(gold: Any, answer: Any) -> bool:
        return bool(verify([gold], [answer], timeout_seconds=None, raise_on_error=True))  # type: ignore[arg-type]

    return _MathVerify(parse_one, equal)
