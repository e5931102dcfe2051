r"""The rules of the mathematical verifier, in this process (no hostile input here: see test_verify_pool)."""

import pytest

from cures_ray.messages import Outcome
from cures_ray.verify.mathematics import GoldError, extract_boxed, printable, read_gold, verify_math


def outcome(gold: str, answer: str) -> str:
    return verify_math("so \\boxed{" + answer + "}", gold).outcome.value


@pytest.mark.parametrize(
    ("text", "content"),
    [
        (r"\boxed{5}", "5"),
        (r"first \boxed{5}, then \boxed{6}.", "6"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{\boxed{3}}", "3"),
        (r"\boxed {7}", "7"),
        (r"\fbox{8}", "8"),
        (r"\boxed{}", ""),
        (r"\boxed{5} and then \boxed{6", None),
        (r"\boxed5", None),
        ("no box", None),
        ("", None),
    ],
)
def test_the_last_box_counts(text, content):
    assert extract_boxed(text) == content


SAME = [
    ("3", "1+2"),
    ("3", r"\frac{6}{2}"),
    ("1024", "2^{10}"),
    ("6", "3!"),
    ("3", "3.0"),
    ("07080305", "07080305"),
    ("1234", "1,234"),
    ("1234", r"1\,234"),
    ("-5", "\u22125"),
    ("1/3", "0.333333"),
    (r"\sqrt2", "1.41421"),
    (r"2\pi", "6.28319"),
    ("7/2", r"3\frac{1}{2}"),
    (r"0.\overline{3}", r"\frac13"),
    ("4.5e33", r"4.5 \times 10^{33}"),
    (r"\frac12", r"\dfrac 1 2"),
    ("x^2+2x+1", "(x+1)^2"),
    ("2i", r"2\mathrm{i}"),
    ("5", "x=5"),
    ("x=5", "5"),
    ("x>3", "3<x"),
    ("(1,2)", r"\left( 1, 2 \right)"),
    ("[0,1)", "[0, 1.0)"),
    (r"(-\infty,3]\cup[5,\infty)", r"(-\infty, 3] \cup [5, \infty)"),
    (r"\{1,2\}", r"\{2,1\}"),
    ("1,2", r"2 \text{ and } 1"),
    (r"\emptyset", r"\varnothing"),
    (r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", r"\begin{bmatrix}1&2\\3&4\end{bmatrix}"),
    ("50", r"50\%"),
    ("0.5", r"50\%"),
    (r"50\%", r"\frac{1}{2}"),
    ("1/3", r"33.3333\%"),
    ("6", r"\text{6 apples}"),
    ("6", "6 apples"),
    ("6 cm", r"6\text{ cm}"),
    (r"10\mathrm{~m} / \mathrm{s}", r"10\ \mathrm{m/s}"),
    (r"90^\circ", "90"),
    (r"90^\circ", r"90\text{ degrees}"),
    (r"\$5", r"5\text{ dollars}"),
    (r"\text{no solution}", r"\text{No solution.}"),
    (r"Poincar\'e", r"\text{Poincaré}"),
    ("A", r"\textbf{(A)}"),
    ("055", r"\textbf{(55) }"),
    ("72", "72"),
    ("the steps ... #### 72", "72"),
    (r"worked: \boxed{72}", "72"),
]


@pytest.mark.parametrize(("gold", "answer"), SAME)
def test_what_is_accepted(gold, answer):
    assert outcome(gold, answer) == "correct"


DIFFERENT = [
    ("3", "1+3"),
    ("1/3", "0.333"),
    ("1/3", "0.33333"),
    ("3.14", r"\pi"),
    ("3", "2.9999999"),
    ("1234567", "1234568.0"),
    ("0.00000001", "0.00000002"),
    ("6.6e-34", "0"),
    ("1", r"\frac{1}{0}"),
    ("x^2+2x+1", "(x+2)^2"),
    ("x=5", "y=5"),
    ("5", r"3 \text{ or } 5"),
    ("5", "5 apples or 6 pears"),
    ("5", r"\{3,5\}"),
    ("(1,2)", "(2,1)"),
    ("[0,1)", "[0,1]"),
    (r"\{1,2\}", r"\{1,3\}"),
    (r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", r"\begin{pmatrix}1&2\\3&5\end{pmatrix}"),
    (r"50\%", r"5\%"),
    (r"6\text{ cm}", r"6\text{ m}"),
    ("listen", "silent"),
    ("B", r"\textbf{(A)}"),
    ("3", ""),
    ("3", r"\frac{1}{"),
    ("3", "a longer text, not an answer " * 50),
]


@pytest.mark.parametrize(("gold", "answer"), DIFFERENT)
def test_what_is_not_accepted(gold, answer):
    assert outcome(gold, answer) == "incorrect"


def test_no_box_is_incorrect_even_with_the_right_number():
    assert verify_math("the answer is 3", "3").outcome is Outcome.INCORRECT
    assert verify_math(r"\boxed{3", "3").outcome is Outcome.INCORRECT


@pytest.mark.parametrize("gold", ["", "  ", r"\frac{1}{", r"\boxed{3", "word " * 300])
def test_an_unparsable_gold_is_a_fault_for_every_completion(gold):
    assert isinstance(read_gold(gold), GoldError)
    for completion in (r"\boxed{3}", "\\boxed{" + gold + "}", ""):
        verdict = verify_math(completion, gold)
        assert verdict.is_fault and "unparsable gold" in verdict.detail


def test_the_format_reward_goes_to_a_closed_box_with_a_wrong_answer():
    assert verify_math(r"\boxed{4}", "3", 0.1).reward == 0.1
    assert verify_math(r"\boxed{4}", "3", 0.1).outcome is Outcome.INCORRECT
    assert verify_math("4", "3", 0.1).reward == 0.0
    assert verify_math(r"\boxed{3}", "3", 0.1).reward == 1.0


def test_a_gold_is_parsed_once():
    assert read_gold(r"\frac{x}{7}") is read_gold(r"\frac{x}{7}")


def test_details_can_be_logged_anywhere():
    text = printable("a\x00\ud800\n" + "b" * 1000)
    assert len(text) == 200 and text.startswith("a\ufffd\ufffd\ufffd") and text.encode()
