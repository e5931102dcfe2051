"""Scores of evaluations: known values, and what people get wrong about them."""

import numpy as np
import pytest

from cures_ray.evaluation.answers import AnswerFile, record_of
from cures_ray.evaluation.scores import (
    JudgedAnswer,
    best_constant,
    by_level,
    estimate,
    majority_at_k,
    paired_p_value,
    pass_at_k,
    score,
)
from cures_ray.messages import ConfigError, Outcome, Verdict


def right(text: str = "1") -> JudgedAnswer:
    return JudgedAnswer(reward=1.0, correct=True, text=text)


def wrong(text: str = "2") -> JudgedAnswer:
    return JudgedAnswer(reward=0.0, correct=False, text=text)


BROKEN = JudgedAnswer(reward=0.0, correct=False, fault=True, text="timeout")


def test_pass_at_k_is_the_share_of_subsets_with_a_right_answer():
    assert pass_at_k(4, 1, 1) == 0.25
    assert pass_at_k(4, 1, 2) == 0.5  # 3 of 6 pairs
    assert pass_at_k(4, 0, 4) == 0.0 and pass_at_k(4, 4, 1) == 1.0
    with pytest.raises(ValueError, match="pass@5 needs at least 5"):
        pass_at_k(4, 1, 5)


def test_pass_at_k_has_no_bias():
    rng = np.random.default_rng(0)
    draws = rng.random((20_000, 6)) < 0.3
    estimates = np.array([pass_at_k(6, int(row.sum()), 3) for row in draws])
    assert estimates.mean() == pytest.approx(1 - 0.7**3, abs=0.01)


def test_the_majority_vote_counts_right_answers_as_one_and_shares_ties():
    assert majority_at_k([right("1/2"), right("0.5"), wrong("7"), wrong("8")], 4) == 1.0
    assert majority_at_k([wrong("7"), wrong("7"), right(), wrong("8")], 4) == 0.0
    assert majority_at_k([right(), wrong("7")], 2) == 0.5
    assert majority_at_k([right(), right(), wrong("7"), wrong("7"), wrong("7")], 2) == 1.0  # the first two
    assert majority_at_k([BROKEN, BROKEN, right()], 3) == 1.0 and majority_at_k([BROKEN], 1) == 0.0


def test_a_fault_counts_as_not_solved_and_is_counted():
    scores = score([[right()], [BROKEN], [wrong()], [right()]])
    assert scores.accuracy.mean == 0.5 and scores.faults == 1 and scores.answers == 4


def test_intervals_cover_the_truth_and_stay_inside_0_and_1():
    sure = estimate(np.ones(20))
    assert sure.mean == 1.0 and sure.low < 0.9 and sure.high == pytest.approx(1.0)
    rng, hits = np.random.default_rng(0), 0
    for _ in range(400):
        found = estimate(rng.binomial(8, 0.3, 50) / 8)
        hits += found.low <= 0.3 <= found.high
    assert 0.92 <= hits / 400 <= 0.98


def test_levels_may_be_text_and_come_in_natural_order():
    levels = ["Level 10", "Level 2", "Level 2", 3.0]
    assert by_level(np.array([1.0, 0.0, 1.0, 1.0]), levels) == {"Level 2": 0.5, "3": 1.0, "Level 10": 1.0}


def test_the_best_constant_answer_is_the_most_frequent_gold():
    assert best_constant(["No", "No", "Yes", " No"]) == 0.75


def test_a_paired_test_sees_what_two_intervals_do_not():
    rng = np.random.default_rng(1)
    hard = rng.random(200)
    first, second = (rng.random(200) < hard).astype(float), None
    second = first.copy()
    second[np.flatnonzero(first == 0)[:14]] = 1.0  # better on 14 prompts, worse on none
    assert paired_p_value(second, first) < 0.001
    assert paired_p_value(first, first) == 1.0
    assert estimate(first).high > estimate(second).low


def record(prompt: str, sample: int, outcome: Outcome = Outcome.CORRECT) -> dict:
    verdict = Verdict(outcome=outcome, reward=1.0, detail="7")
    return record_of(prompt, sample, verdict, "so \\boxed{7}", 5, False, "7")


def test_a_killed_evaluation_continues_behind_its_last_whole_line(tmp_path):
    path, identity = tmp_path / "a.jsonl", {"model": "m", "temperature": 0.0}
    AnswerFile(path, identity).write([record("p0", 0), record("p0", 1, Outcome.FAULT)])
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"prompt_id": "p1", "sam')
    again = AnswerFile(path, identity)
    assert path.read_bytes() == whole
    assert again.missing([("p0", 0), ("p0", 1), ("p1", 0)]) == [("p1", 0)]
    assert again.answers["p0", 1].fault and again.answers["p0", 1].reward == 0.0


def test_answers_of_another_evaluation_are_refused(tmp_path):
    AnswerFile(tmp_path / "a.jsonl", {"model": "m"})
    with pytest.raises(ConfigError, match="another evaluation"):
        AnswerFile(tmp_path / "a.jsonl", {"model": "other"})
