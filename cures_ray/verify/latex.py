r"""LaTeX of final answers in one spelling, their units, and their text."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable
from fractions import Fraction
from functools import lru_cache

from cures_ray.verify.values import PLAIN

ROW = "\ue000"  # a matrix's row break while the other backslashes are read
TEXT = r"\\(?:text|textbf|textit|textrm|textsf|texttt|mbox|hbox|mathrm|rm|operatorname)"
TEXT_MACRO = rf"(?:{TEXT}|\\(?:mathbf|mathit|mathsf|mathtt|boldsymbol|bm))"
ROW_BREAK = re.compile(r"\\\\(?:\s*\[\s*-?[\d.]+\s*(?:pt|em|ex|mm|cm|in|mu)\s*\])?|\\cr(?![a-zA-Z])")
ESCAPED_TWICE = re.compile(r"\\\\(?=[a-zA-Z{}()%$])")
SIZES = re.compile(r"\\(?:left|right|middle|[bB]igg?[lrm]?)(?![a-zA-Z])(?:\s*\.(?!\d))?")
NOTHING = re.compile(
    r"\\[()\[\]]|(?<!\\)\$|\\(?:displaystyle|textstyle|limits|hline|nonumber)(?![a-zA-Z])"
    r"|\\[hv]?phantom\s*(?:\{[^{}]*\}|\S)"
)
SPACES = re.compile(r"\\[,!;:>/ ]|\\q?quad|\\(?:thinspace|enspace|hfill)(?![a-zA-Z])|\\hspace\*?\{[^{}]*\}|~|\s+")
THOUSANDS = re.compile(r"(?<=\d)(?:\{,\}|,\\!|\\[,!:;])\s*(?=\d{3}(?!\d))")
JOINED_TEXT = re.compile(rf"\s*,?\s*{TEXT}\s*\{{\s*,?\s*(?:and|or)(?![a-zA-Z])([^{{}}]*)\}}", re.IGNORECASE)
JOINED_COMMA = re.compile(rf"{TEXT}\s*\{{\s*,\s*\}}")
JOINED_WORD = re.compile(r"\s*,?\s*(?<![a-zA-Z\\])(?:and|or)(?![a-zA-Z])\s*")
ROMAN = re.compile(r"\\(?:mathrm|rm|text)\s*\{\s*([ied])\s*\}")  # imaginary unit, Euler's number, differential
BOLD = re.compile(r"\\(?:mathbf|mathit|boldsymbol|bm)\s*\{\s*(\w)\s*\}")
SHORT_FRACTION = re.compile(r"\\[dtc]?frac\s*(?:(\d)\s*(\d)|(?=\s*\{))")
ONE_SPELLING = {
    r"\\(?:leqslant|le)(?![a-zA-Z])": r"\\leq",
    r"\\(?:geqslant|ge)(?![a-zA-Z])": r"\\geq",
    r"\\(?:lt)(?![a-zA-Z])": "<",
    r"\\(?:gt)(?![a-zA-Z])": ">",
    r"\\varnothing(?![a-zA-Z])": r"\\emptyset",
    r"\\[dt]binom(?![a-zA-Z])": r"\\binom",
    r"\\(?:mid|vert)(?![a-zA-Z])|\\[lr]vert(?![a-zA-Z])": "|",
    r"\\cdotp(?![a-zA-Z])": r"\\cdot",
    r"(?<![a-zA-Z])(?:np|math)\.(?=[a-z])": r"\\",  # np.arcsin
    r"\\(?:degrees?)(?![a-zA-Z])": r"^\\circ",
}
SPELLINGS = [(re.compile(pattern), with_) for pattern, with_ in ONE_SPELLING.items()]
UNICODE = str.maketrans(
    {
        "−": "-", "–": "-", "×": r"\times ", "÷": "/", "π": r"\pi ", "∞": r"\infty ", "°": r"^\circ ", "·": r"\cdot ",
        "≤": r"\leq ", "≥": r"\geq ", "≠": r"\neq ", "∪": r"\cup ", "∩": r"\cap ", "∈": r"\in ", "∅": r"\emptyset ",
        "²": "^2", "³": "^3", "\u00a0": " ", "\ue000": " ",
    }
)  # fmt: skip

POWER = r"(?:\s*\^\s*\{?\s*-?\d+\s*\}?)?"
UNITS_AT_END = re.compile(rf"(?:{TEXT}\s*\{{[^{{}}]*\}}{POWER}(?:\s|/|\\cdot|\.)*)+$")
DEGREES = re.compile(r"\s*\^\s*\{?\s*\\circ\s*\}?$")
PERCENT = re.compile(
    rf"\s*(?:\\?%|{TEXT}\s*\{{\s*(?:\\?%|per ?cent|percentage|pct)\s*\}}|(?<![a-zA-Z\\])(?:per ?cent|percentage|pct))$",
    re.IGNORECASE,
)
NUMBER_AND_WORDS = re.compile(rf"([+-]?\s*(?:{PLAIN}))\s+([A-Za-z][A-Za-z .]*[A-Za-z.]{POWER})")
WORDS = re.compile(r"(?:[^\W\d_]|[ '\-]|\\['`^\"=.]\s*\{?\\?[A-Za-z]\}?)+")
SCALES = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}  # powers of ten
MAX_UNIT_WORDS = 5
NOT_UNITS_TEXT = """
    pi sin cos tan cot sec csc log ln exp sqrt mod plus minus times negative or and is are was were isn not no to if
    then when where for with but than at least most about approximately because so all any none either neither nor
    wrong correct incorrect right false true maybe possibly between from through more less fewer greater smaller
    wait answer equals equal dozen million billion thousand hundred trillion i we it this that which only
"""
NOT_UNITS = frozenset(NOT_UNITS_TEXT.split())


def clean(raw: str) -> str:
    """One spelling: no dollar signs, sizes or spacing macros, no full stop at the end; thousands joined, "and" a comma.

    Row breaks of matrices stay, as ``\\\\``. Digits stay apart where a space stood between them.
    """
    text = raw.translate(UNICODE)
    if "\\\\" in text and "\\begin" not in text:  # no rows here: LaTeX that was escaped twice
        text = ESCAPED_TWICE.sub(r"\\", text)
    text = text.replace("\\$", "").replace("\\%", "%")
    text = SIZES.sub("", ROW_BREAK.sub(ROW, text))
    if ("and" in text or "or" in text) and not WORDS.fullmatch(text):
        text = JOINED_WORD.sub(", ", JOINED_TEXT.sub(r", \1", text)) if not as_words(text) else text
    text = THOUSANDS.sub("", NOTHING.sub("", text)).replace("{,}", ",")
    for pattern, with_ in SPELLINGS:
        text = pattern.sub(with_, text)
    text = BOLD.sub(r"\1", text)
    text = SHORT_FRACTION.sub(lambda m: f"\\frac{{{m[1]}}}{{{m[2]}}}" if m[1] else "\\frac", ROMAN.sub(r"\1", text))
    text = JOINED_COMMA.sub(",", text)
    text = re.sub(r",\s*(?=,)", "", SPACES.sub(" ", text)).strip()
    text = re.sub(rf"\s*{ROW}\s*(?=\\end|$)", "", text).replace(ROW, "\\\\ ")
    return text.rstrip(" .,;") if not text.endswith("\\.") else text


def compact(text: str) -> str:
    """For comparing as strings: no spaces except between digits, ``x_{1}`` as ``x_1``."""
    return re.sub(r"([_^])\{(\w)\}", r"\1\2", re.sub(r"(?<!\d) | (?!\d)", "", text))


def split_unit(text: str) -> tuple[str, str, bool, Fraction]:
    """(what is left, unit or "", is a percentage, factor such as a million).

    Text after a number is a unit when all its words can be: "4 apples" and "4 square feet", not "4 or 3" or "4 is
    wrong". The base of a numeral (``204_5``) is its unit.
    """
    one = Fraction(1)
    if match := PERCENT.search(text):
        return text[: match.start()].strip(), "", True, one
    if match := DEGREES.search(text):
        return text[: match.start()].strip(), "degree", False, one
    if match := re.fullmatch(r"([0-9][0-9A-Z]*)\s*_\s*\{?\s*(\d{1,2})\s*\}?", text):
        return match[1], f"base {match[2]}", False, one
    head, unit = "", ""
    if match := UNITS_AT_END.search(text):
        head, unit = text[: match.start()].strip(), latex_to_text(match[0])
    elif match := NUMBER_AND_WORDS.fullmatch(text):
        head, unit = match[1], match[2]
    scale, unit = _scale(unit)
    if not head or not is_unit(unit):
        return text, "", False, one
    if match := DEGREES.search(head):  # 20^\\circ\\text{C}
        head, unit = head[: match.start()].strip(), f"degree {unit}"
    return head, plain_unit(unit), False, scale


def _scale(unit: str) -> tuple[Fraction, str]:
    """("million dollars") -> (10^6, "dollars")."""
    first, _, rest = unit.strip().partition(" ")
    power = SCALES.get(first.lower())
    return (Fraction(1), unit) if power is None else (Fraction(10**power), rest)


def is_unit(text: str) -> bool:
    words = re.findall(r"[^\W\d_]+", text.lower())
    if len(words) > MAX_UNIT_WORDS or any(c in text for c in "=<>+(){}?!;:"):
        return False
    return not set(words) & NOT_UNITS and not re.search(r"(?<!\^)(?<!\^-)(?<![a-z])\d", text.lower())


def plain_unit(text: str) -> str:
    """``Apples.`` and ``apple`` are one unit; so are ``degrees`` and the sign."""
    unit = re.sub(r"[\s.]+", "", text)
    return unit.lower().rstrip("s") if len(unit) > 3 else unit


def as_words(text: str) -> str | None:
    """The text of an answer that is words rather than mathematics, or ends in text that is no unit; else None."""
    if match := UNITS_AT_END.search(text):
        return latex_to_text(text) if match.start() == 0 or not is_unit(latex_to_text(match[0])) else None
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


def balanced(latex: str) -> bool:
    """Whether every brace closes; an escaped one does not count."""
    depth, escaped = 0, False
    for character in latex:
        if escaped:
            escaped = False
        elif character == "\\":
            escaped = True
        elif character in "{}":
            depth += 1 if character == "{" else -1
            if depth < 0:
                return False
    return depth == 0
