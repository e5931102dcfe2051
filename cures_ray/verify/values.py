r"""Numbers as answers write them: integers, decimals, fractions, mixed numbers, powers of ten, repeating decimals."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

TOLERANCE = Fraction(5, 1_000_000)  # relative; six significant digits
MAX_DIGITS = 400  # longer numbers are compared as text, or by math-verify

PLAIN = r"(?:\d{1,3}(?:[, ]\d{3})+(?!\d)|\d+)(?:\.\d*)?|\.\d+"
DECIMAL = re.compile(rf"([+-]?)\s*({PLAIN})")
REPEATING = re.compile(r"([+-]?)(\d*)\.(\d*)\\overline\{(\d+)\}")
POWER_OF_TEN = r"(?:[eE]|(?:\\times|\\cdot|\*)\s*10\s*\^\s*)\{?\s*([+-]?\d{1,3})\s*\}?"
SCIENTIFIC = re.compile(rf"([+-]?)\s*({PLAIN})\s*{POWER_OF_TEN}")
WHOLE = r"(\d{1,3}(?:,\d{3})+|\d+)\.?"
FRACTION = re.compile(
    rf"([+-]?)\s*(?:\\frac\s*\{{\s*([+-]?)\s*{WHOLE}\s*\}}\s*\{{\s*{WHOLE}\s*\}}|{WHOLE}\s*/\s*{WHOLE})"
)
MIXED = re.compile(r"([+-]?)\s*(\d+)\s*(?:\\frac\s*\{\s*(\d+)\s*\}\s*\{\s*(\d+)\s*\}|\s(\d+)\s*/\s*(\d+))")


@dataclass(frozen=True, slots=True)
class Number:
    """``value`` exactly as written; ``place`` is the value of a decimal's last digit, None for exact forms."""

    value: Fraction
    place: Fraction | None = None

    def scaled(self, factor: Fraction) -> Number:
        return Number(self.value * factor, None if self.place is None else self.place * factor)


def read_number(text: str) -> Number | None:
    """The number that ``text`` is as a whole, else None."""
    if len(text) > MAX_DIGITS:
        return None
    if match := DECIMAL.fullmatch(text):
        return _decimal(match[1], match[2])
    if match := FRACTION.fullmatch(text):
        over, under = _integer(match[3] or match[5]), _integer(match[4] or match[6])
        return Number(_signed(match[2] or "", _signed(match[1], Fraction(over, under)))) if under else None
    if match := SCIENTIFIC.fullmatch(text):
        return _decimal(match[1], match[2]).scaled(Fraction(10) ** int(match[3]))
    if match := MIXED.fullmatch(text):
        over, under = int(match[3] or match[5]), int(match[4] or match[6])
        return Number(_signed(match[1], int(match[2]) + Fraction(over, under))) if under else None
    if match := REPEATING.fullmatch(text):
        head, tail, period = match[2] or "0", match[3], match[4]
        repeated = Fraction(int(period), (10 ** len(period) - 1) * 10 ** len(tail))
        return Number(_signed(match[1], Fraction(int(head + tail), 10 ** len(tail)) + repeated))
    return None


def _decimal(sign: str, digits: str) -> Number:
    digits = digits.replace(",", "").replace(" ", "").removesuffix(".")
    places = len(digits.partition(".")[2])
    return Number(_signed(sign, Fraction(digits)), Fraction(1, 10**places) if places else None)


def _integer(digits: str) -> int:
    return int(digits.replace(",", ""))


def _signed(sign: str, value: Fraction) -> Fraction:
    return -value if sign == "-" else value


def same_number(a: Number, b: Number) -> bool:
    """Exact, except that a decimal stands for a number that is not an integer when they differ by less than one unit
    of the decimal's last place and agree to six significant digits."""
    if a.value == b.value:
        return True
    places = [n.place for n in (a, b) if n.place is not None]
    if not places or a.value.denominator == 1 or b.value.denominator == 1:
        return False
    difference = abs(a.value - b.value)
    return difference < max(places) and difference <= TOLERANCE * max(abs(a.value), abs(b.value))
