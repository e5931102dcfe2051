r"""The rules of the mathematical verifier, in this process (no hostile input here: see test_verify_pool)."""

import time

import pytest

from cures_ray.boxes import final_answer, last_box
from cures_ray.messages import Outcome
from cures_ray.verify.mathematics import GoldError, printable, read_gold, verify_math


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
        (r"\boxed5", "5"),
        (r"\boxed -12$.", "-12"),
        (r"\boxedx{5}", None),
        (r"\framebox{204} minutes", "204"),
        (r"\boxed{2}, \boxed{3} and \boxed{2}", "2, 3"),
        (r"$\boxed{(2, 2)} \quad \text{and} \quad \boxed{(6, 2)}$", "(2, 2), (6, 2)"),
        (r"\(x = \boxed{2}\) and \(y = \boxed{3}\).", "2, 3"),
        ("\\boxed{5}\n\n**\\boxed{5}**", "5"),
        (r"\boxed{2} papers, \boxed{3} bins", "3"),
        (r"\boxed{2}. \boxed{3}", "3"),
        ("no box", None),
        ("", None),
    ],
)
def test_the_last_box_counts(text, content):
    assert last_box(text) == content


def test_looking_for_a_box_takes_linear_time():
    for text in ("\\boxed{" * 50_000, "\\boxed{1} " * 50_000, "\\boxed{1}" + " " * 100_000 + "\\boxed{1}"):
        last_box(text)  # quadratic: minutes


def test_the_gold_of_a_worked_solution():
    assert final_answer("3 + 4 = 7\n#### 7 ") == "7"
    assert final_answer(r"so \boxed{7}" + "\n#### 8") == "7"
    assert final_answer("7") == "7"
    assert final_answer("#### \n") == "#### \n"


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
    # matrices: row breaks, their lengths, environments
    (r"\begin{pmatrix} 2 \\ 3 \end{pmatrix}", r"\begin{pmatrix}2\\3\end{pmatrix}"),
    (r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", r"\begin{pmatrix} 1 & 2 \\[2pt] 3 & 4 \\ \end{pmatrix}"),
    (r"\begin{pmatrix} 1 & 2 \end{pmatrix}", r"\left[\begin{array}{cc} 1 & 2 \end{array}\right]"),
    (r"\begin{pmatrix} 1/2 \\ x+1 \end{pmatrix}", r"\begin{bmatrix} \frac{2}{4} \\ 1+x \end{bmatrix}"),
    (r"\begin{pmatrix} 1 & \phantom -1 \end{pmatrix}", r"\begin{pmatrix} 1 & 1 \end{pmatrix}"),
    # thousands
    (r"3,\!250", "3250"),
    (r"3,\!250", "3,250"),
    ("33,800,000", r"33{,}800{,}000"),
    (r"\dfrac{1}{29,\!322,\!216}", r"\frac{1}{29322216}"),
    ("1000", "1 000"),
    ("2,600", "2600"),
    # lists
    ("19, 46, and 82", r"82, 19 \text{ and } 46"),
    ("5 or 9", "5or9"),
    ("(1,2), (3,4)", r"\left(3,4\right) \text{ and } (1,2)"),
    (r"x_1=2,\quad x_2=3", "2, 3"),
    (r"E_{1},E_{2}", "E_2, E_1"),
    # golds that math-verify cannot read
    (r"\{x|-2\leq x < 1\}", r"\{x \mid -2 \le x<1\}"),
    (r"\{x|x=3k,k\in \mathbb{Z}\}", r"\{x|x=3k, k\in\mathbb{Z}\}"),
    ("b > a > c", "c<a<b"),
    (r"m_{\max }=n^{2}-n-1", r"m_{\max}=n^2-n-1"),
    # sets, intervals, assignments
    (r"\{x|-2\leq x < 1\}", "[-2,1)"),
    ("-2 < x < 1", "(-2, 1)"),
    ("(p,q)=(3,2)", "(3,2)"),
    ("2x+4y-3=0", r"y=-\frac{1}{2}x+\frac{3}{4}"),
    ("5", "x = 2+3 = 5"),
    # units, multiples, bases
    (r"4\text{ million}", "4000000"),
    ("4 million dollars", r"\$4{,}000{,}000"),
    (r"15\mbox{ cm}^2", "15"),
    ("35 cm^2", "35"),
    ("20^\\circ\\text{C}", "20"),
    ("204_5", "204"),
    ("204_5", "204_{5}"),
    ("28\\%", "28 percent"),
    # decimals
    ("123456.9", "123456.90"),
    (r"\frac{2}{3}", "0.666666"),
    (r"\frac{2}{3}", "0.666667"),
    ("-1./3", r"-\frac13"),
    ("np.arcsin(10/13)", r"\arcsin\frac{10}{13}"),
    # expressions
    (r"10^{\frac{-5+\sqrt{13}}{6}}", r"10^{\frac{\sqrt{13}-5}{6}}"),
    (r"\sin^2 x", r"1-\cos^2 x"),
    (r"\\left(\\frac{1}{5},2\\right)", r"(\frac15, 2)"),
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
    (r"\begin{pmatrix} 2 \\ 3 \end{pmatrix}", r"\begin{pmatrix} 3 \\ 2 \end{pmatrix}"),
    (r"\begin{pmatrix} 2 \\ 3 \end{pmatrix}", r"\begin{pmatrix} 2 & 3 \end{pmatrix}"),
    (r"\begin{pmatrix} 2 \\ 3 \end{pmatrix}", r"\begin{pmatrix} 23 \end{pmatrix}"),
    (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", r"\begin{pmatrix} 1 \\[2pt] 3 \end{pmatrix}"),
    ("12", "1 2"),
    ("1234", "1, 234"),
    ("123", r"12\,3"),
    ("4", r"4\text{ or 3}"),
    ("4", "4 or 3"),
    ("4", "4 million"),
    ("4", r"4 \text{ million}"),
    ("3", r"3 \text{ is wrong}"),
    ("3", "3 is wrong"),
    ("3", r"3 \text{ or maybe 4}"),
    ("123456.9", "123456.5"),
    (r"\frac{1234569}{10}", "123456.5"),
    ("204_6", "204_5"),
    ("204_6", "76"),
    ("19, 46, and 82", "21, 36, and 82"),
    ("b > a > c", "b > c > a"),
    ("b > a > c", "7"),
    (r"\{x|x=3k,k\in \mathbb{Z}\}", "5"),
    (r"3\mathbf{i}", "3"),
    (r"\frac{1}{2004!}", r"\frac{1}{2006!}"),
    (r"\frac{1}{2^{99}}", r"\frac{1}{2^{98}}"),
    ("(1, 2)", "(1, 2, 2)"),
    (r"\sqrt{2}", "1.4142"),
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


@pytest.mark.parametrize("gold", sorted({gold for gold, _ in SAME + DIFFERENT}))
def test_no_gold_is_a_fault_against_itself(gold):
    assert outcome(final_answer(gold), final_answer(gold)) == "correct"


def test_parts_that_stand_in_boxes_of_their_own_are_one_answer():
    assert verify_math(r"\boxed{2} and \boxed{3}", "2, 3").outcome is Outcome.CORRECT
    assert verify_math(r"\boxed{2} and \boxed{3}", "3").outcome is Outcome.INCORRECT
    assert verify_math(r"first \boxed{2}. Later I see that it is \boxed{3}.", "3").outcome is Outcome.CORRECT


EXPENSIVE = [
    "9^{9^{9^{9}}}",
    "1000000!",
    "((((9!)!)!)!)!",
    r"\binom{10^9}{10^8}",
    "(x+1)^{100000} - x",
    r"e^{e^{e^{e^{9}}}}",
    r"\sum_{k=1}^{10^{12}} \frac{1}{k^{k}}",
    "(" * 90 + "x" + "+1)^{2}" * 90,
    r"\frac{1}{1+" * 80 + "x" + "}" * 80,
    "+".join(rf"\sin({i}x)" for i in range(60)),
    "9" * 900,
]


@pytest.mark.parametrize("answer", EXPENSIVE)
def test_answers_that_are_only_expensive_are_not_evaluated(answer):
    for gold in ("3", r"\sqrt{2}", "x+1"):
        began = time.process_time()
        assert outcome(gold, answer) == "incorrect"
        assert time.process_time() - began < 2.0  # evaluated: never, or out of memory


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
