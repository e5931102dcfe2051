"""User reward functions: how they are found, called and judged."""

import sys

import numpy as np
import pytest

from cures_ray.messages import ConfigError, Outcome, Verdict
from cures_ray.verify.functions import load_reward_function, to_verdict

SOURCE = """
import asyncio
from cures_ray.messages import Outcome, Verdict

def plain(prompt, completion, answer, **row):
    return completion == answer + row.get("suffix", "")

def short(completion, answer):
    return 0.25 if completion else 0

def named(completion, answer, suffix, *, weight=1.0):
    return weight * (completion == answer + suffix)

async def slow(prompt, completion, answer, **row):
    await asyncio.sleep(0)
    return Verdict(outcome=Outcome.CORRECT, reward=0.9, detail=prompt)

def compute_score(data_source, solution_str, ground_truth, extra_info=None):
    return {"score": float(solution_str == ground_truth), "source": data_source, "extra": extra_info}

def fails(completion):
    raise KeyError("x")

def helper(completion):
    raise ValueError("deep")

def nested(completion):
    return helper(completion)

def lengths(completions, level=None, **columns):
    return [len(c) / 10 + 0 * x for c, x in zip(completions, level)]

async def slow_batch(completions):
    await asyncio.sleep(0)
    return [True] * len(completions)

def not_a_list(completions):
    return 1.0

def minus_one(completion):
    return -1.0

def wrong(p, c, a):
    return 1.0

not_a_function = 3
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "my_rewards.py"
    path.write_text(SOURCE)
    return path


def test_a_function_of_a_file_and_of_a_module(file, monkeypatch):
    call = load_reward_function(f"{file}:plain")
    assert call("p", "42!", "42", {"suffix": "!"}).outcome is Outcome.CORRECT
    assert call("p", "42", "42", {"suffix": "!"}).outcome is Outcome.INCORRECT
    monkeypatch.syspath_prepend(str(file.parent))
    assert load_reward_function("my_rewards:plain")("p", "42", "42", {}).reward == 1.0
    sys.modules.pop("my_rewards")


def test_a_function_gets_only_what_it_names(file):
    assert load_reward_function(f"{file}:short")("p", "c", "a", {"level": 3}).reward == 0.25
    assert load_reward_function(f"{file}:named")("p", "a1", "a", {"suffix": "1", "other": 2}).reward == 1.0


def test_an_asynchronous_function_may_return_a_verdict(file):
    call = load_reward_function(f"{file}:slow")
    for _ in range(2):
        assert call("p", "", "", {}) == Verdict(outcome=Outcome.CORRECT, reward=0.9, detail="p")


def test_compute_score_is_accepted_unchanged(file):
    call = load_reward_function(f"{file}:compute_score")
    verdict = call("p", "7", "7", {"data_source": "mine", "extra_info": {"k": 1}})
    assert verdict.outcome is Outcome.CORRECT and verdict.detail == "source=mine, extra={'k': 1}"
    assert call("p", "8", "7", {}).outcome is Outcome.INCORRECT


def test_an_exception_is_a_fault_not_a_zero(file):
    verdict = load_reward_function(f"{file}:fails")("p", "c", "a", {})
    assert verdict.is_fault and "fails raised KeyError" in verdict.detail
    verdict = load_reward_function(f"{file}:named")("p", "c", "a", {})
    assert verdict.is_fault and "suffix" in verdict.detail


def test_a_reward_outside_0_to_1_is_a_fault_that_says_so(file):
    verdict = load_reward_function(f"{file}:minus_one")("p", "c", "a", {})
    assert verdict.is_fault and "verifier.reward_range = [0, 1]" in verdict.detail


def test_a_reward_range_is_mapped_to_0_to_1(file):
    assert load_reward_function(f"{file}:minus_one", (-1.0, 1.0))("p", "c", "a", {}).reward == 0.0
    mapped = [to_verdict(r, (-1.0, 1.0)) for r in (-1, 0, 0.5, 1)]
    assert [v.reward for v in mapped] == [0.0, 0.5, 0.75, 1.0]
    assert [v.outcome for v in mapped] == [Outcome.INCORRECT] * 2 + [Outcome.CORRECT] * 2
    outside = to_verdict(1.5, (-1.0, 1.0))
    assert outside.is_fault and "verifier.reward_range = [-1, 1]" in outside.detail


def test_a_fault_names_the_lines_that_raised(file):
    detail = load_reward_function(f"{file}:nested")("p", "c", "a", {}).detail
    assert detail.startswith("nested raised ValueError: deep [my_rewards.py:") and "in helper" in detail


def test_batch_functions_get_lists_and_return_as_many(file):
    items = [
        {"prompt": "p", "completion": "c" * n, "answer": "a", "row": {"level": n}, "timeout_s": 1.0} for n in range(3)
    ]
    batch = load_reward_function(f"{file}:lengths")
    assert batch.style == "batch"
    assert [(place, v.reward) for place, v in batch.judge(items)] == [(0, 0.0), (1, 0.1), (2, 0.2)]
    assert all(v.reward == 1.0 for _, v in load_reward_function(f"{file}:slow_batch").judge(items))
    assert all(v.is_fault for _, v in load_reward_function(f"{file}:not_a_list").judge(items))


def test_asynchronous_functions_are_told_from_plain_ones(file):
    assert load_reward_function(f"{file}:slow").style == "async"
    assert load_reward_function(f"{file}:plain").style == "item"


@pytest.mark.parametrize(
    ("returned", "outcome", "reward"),
    [
        (True, Outcome.CORRECT, 1.0),
        (0, Outcome.INCORRECT, 0.0),
        (0.5, Outcome.INCORRECT, 0.5),
        (np.float32(0.75), Outcome.CORRECT, 0.75),
        (np.bool_(True), Outcome.CORRECT, 1.0),
        ({"score": 1, "acc": True}, Outcome.CORRECT, 1.0),
        (None, Outcome.FAULT, 0.0),
        ("1.0", Outcome.FAULT, 0.0),
        (float("nan"), Outcome.FAULT, 0.0),
        (float("inf"), Outcome.FAULT, 0.0),
        ({"accuracy": 1}, Outcome.FAULT, 0.0),
        (Verdict(outcome=Outcome.CORRECT, reward=2.0), Outcome.FAULT, 0.0),
        (Verdict(outcome=Outcome.FAULT, detail="judge is down"), Outcome.FAULT, 0.0),
    ],
)
def test_what_a_function_may_return(returned, outcome, reward):
    verdict = to_verdict(returned)
    assert (verdict.outcome, verdict.reward) == (outcome, reward)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("maths", "write math, code, module:function"),
        ("no_such_module_here:f", "cannot be imported: ModuleNotFoundError"),
        ("/no/such/file.py:f", "there is no file /no/such/file.py"),
        ("FILE:absent", "functions there: plain, short, named, slow, compute_score, fails, helper, nested, "),
        ("FILE:not_a_function", "has no function 'not_a_function'"),
        ("FILE:wrong", r"wrong signature wrong\(p, c, a\); expected verify\(prompt, completion"),
    ],
)
def test_errors_say_what_is_wrong_and_what_is_there(file, spec, message):
    with pytest.raises(ConfigError, match=message):
        load_reward_function(spec.replace("FILE", str(file)))


def test_a_file_that_fails_on_import_is_reported(tmp_path):
    (tmp_path / "broken.py").write_text("raise SystemExit(3)")
    with pytest.raises(ConfigError, match="cannot be imported: SystemExit"):
        load_reward_function(f"{tmp_path / 'broken.py'}:f")
