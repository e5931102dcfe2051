"""Real tasks of the package reasoning-gym: prompts, ids, levels, and verdicts in killable processes."""

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from cures_ray.config import Config, DataConfig, VerifierConfig
from cures_ray.data import reasoning_gym as gym
from cures_ray.data.table import check_disjoint, curriculum_columns, load_prompts
from cures_ray.messages import ConfigError, Outcome
from cures_ray.synthetic.base_model import build_tokenizer
from cures_ray.verify import reasoning_gym as judge
from cures_ray.verify.pool import VerifyItem, VerifyPool
from cures_ray.verify.self_test import self_test

ROOT = Path(__file__).resolve().parents[2]
SUMS = {
    "name": "chain_sum",
    "label": "sums",
    "params": {"min_terms": 2, "max_terms": 4, "max_digits": 1, "min_digits": 1},
}
LEAP = {"name": "calendar_arithmetic", "label": "leap", "params": {"tasks": ["is_leap_year"]}, "balance_answers": True}
STRINGS = {"name": "isomorphic_strings", "params": {"max_string_length": 6}}  # its prompts come out of sets


def settings(tasks=(SUMS, LEAP, STRINGS), **keys) -> DataConfig:
    own = {"train_size": 60, "eval_size": 30, "tasks": list(tasks), **keys}
    return DataConfig.model_validate({"train": gym.SOURCE, "eval": gym.SOURCE, "reasoning_gym": own})


def refusal(tasks, **keys) -> str:
    with pytest.raises(ConfigError) as caught:
        load_prompts(settings(tasks, **keys), build_tokenizer())
    return str(caught.value)


@pytest.fixture(scope="module")
def tables():
    tokenizer = build_tokenizer()
    return {which: load_prompts(settings(), tokenizer, which) for which in ("train", "eval")}


def test_a_mixture_has_its_sizes_its_labels_as_levels_and_no_shared_text(tables):
    train, held_out = tables["train"], tables["eval"]
    assert (len(train), len(held_out)) == (60, 30)
    assert Counter(train.levels.tolist()) == {"sums": 20, "leap": 20, "isomorphic_strings": 20}
    check_disjoint(train, held_out)
    leaps = [train.row(i).answer for i in np.flatnonzero(train.levels == "leap")]
    assert Counter(leaps) == {"Yes": 10, "No": 10}
    assert held_out.best_constant()["best_constant_accuracy/level_leap"] <= 0.6


def test_the_parameters_of_a_prompt_are_features_and_never_its_answer(tables):
    train = tables["train"]
    sums = [train.row(int(i)) for i in np.flatnonzero(train.levels == "sums")]
    terms = {row.row["difficulty"]["num_terms"] for row in sums}
    assert terms == {2, 3, 4}
    for row in sums:
        assert row.text.count("+") + row.text.count(" - ") == row.row["difficulty"]["num_terms"] - 1
    texts = train.columns["tags"].to_pylist()
    assert "num_terms=2 num_digits=1" in texts
    _, _, features = curriculum_columns(Config.model_validate({"curriculum": {"prior_from": "predictor"}}), train)
    kinds = {level: features[train.levels == level].mean(0) for level in ("sums", "leap")}
    assert np.abs(kinds["sums"] - kinds["leap"]).max() > 0.1


def test_ids_and_texts_are_the_same_in_every_process_and_under_another_system_prompt(tables):
    code = """
import zlib
from test_reasoning_gym import settings
from cures_ray.data.table import load_prompts
from cures_ray.synthetic.base_model import build_tokenizer
table = load_prompts(settings(), build_tokenizer())
print(table.ids.tolist(), zlib.crc32("".join(table.columns["text"].to_pylist()).encode()))
"""
    found = set()
    for seed in ("1", "2"):
        path = os.pathsep.join([str(ROOT), str(Path(__file__).parent)])
        done = subprocess.run(
            [sys.executable, "-c", code],
            env=os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": path},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        found.add(done.stdout)
    assert len(found) == 1
    other = load_prompts(settings().model_copy(update={"system_prompt": "be brief"}), build_tokenizer())
    assert (other.ids == tables["train"].ids).all() and other.row(0).text != tables["train"].row(0).text


def test_the_held_out_set_does_not_depend_on_the_size_of_the_training_set(tables):
    wider = load_prompts(settings(train_size=90), build_tokenizer(), "eval")
    assert (wider.ids == tables["eval"].ids).all()


def test_what_cannot_be_made_is_refused_with_the_reason():
    assert "tasks is empty" in refusal([])
    assert "no task sums; it has ab, acre" in refusal([{"name": "sums"}])
    assert "refused" in refusal([{"name": "gcd", "params": {"largest": 3}}])
    assert "refused" in refusal([{"name": "gcd", "params": {"min_value": 9, "max_value": 3}}])
    tiny = {"name": "gcd", "params": {"min_value": 1, "max_value": 3}}
    assert "no 30 distinct prompts" in refusal([tiny])  # the held-out ones come first


def test_weights_give_the_shares_and_the_largest_remainders_the_rest():
    tasks = [{**SUMS, "weight": 2}, {**LEAP, "weight": 1}, {**STRINGS, "weight": 1}]
    assert gym.shares(settings(tasks).reasoning_gym, 10) == [5, 3, 2]


def test_judge_and_generator_make_entries_of_the_same_size():
    assert judge.SIZE == gym.SIZE


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        ("7", "7"),
        (" 7.\n", "7"),
        ("so 3+4 = \\boxed{ 7 }, not \\boxed{8} but \\boxed{7}", "7"),
        ("<answer>6</answer> no: <answer> 7 </answer>", "7"),
        ("The answer to the given arithmetic problem is 7.", "7"),
        ("The answer is 1.5. Then we stop", "1.5"),
        ("Answer: **7**", "7"),
        ("3 + 4 = 7", "7"),
        ("The answer is 6. No, the answer is 7.", "7"),
        ("No. 1746 is a leap year", "No"),
        ("Nothing is known", "Nothing is known"),
        ("To find the answer, we add 3", "To find the answer, we add 3"),
        ("", ""),
    ],
)
def test_the_answer_is_a_box_a_tag_a_first_word_a_statement_or_the_whole_completion(completion, answer):
    assert judge.answers_in(completion)[0] == answer


def test_verdicts_come_from_the_tasks_own_scorers_in_their_processes(tables):
    prompts = [
        tables["train"].row(int(np.flatnonzero(tables["train"].levels == level)[0])) for level in ("sums", "leap")
    ]
    sums, leap = prompts
    cases = [
        (sums, sums.answer, 1.0),
        (sums, f"\\boxed{{{sums.answer}}}", 1.0),
        (sums, f"The answer is {sums.answer}", 1.0),
        (sums, f"It must be {sums.answer}", 0.0),  # the scorer gives a part for it; without partial credit none
        (sums, f"The answer is {sums.answer}. The answer is {int(sums.answer) + 1}", 0.0),
        (sums, "", 0.0),
        (leap, leap.answer, 1.0),
        (leap, "Yes" if leap.answer == "No" else "No", 0.0),
    ]
    with VerifyPool(VerifierConfig(fn="reasoning_gym")) as pool:
        verdicts = pool.verify([VerifyItem(prompt=prompt, completion=text) for prompt, text, _ in cases])
    assert [(v.reward, v.is_fault) for v in verdicts] == [(reward, False) for _, _, reward in cases]


def test_the_self_test_of_a_run_passes(tables):
    self_test(Config.model_validate({"verifier": {"fn": "reasoning_gym"}}), tables["train"].row(0))


def item(task: str, completion: str, answer: str | None = None, **extra) -> dict:
    made = {"task": task, "params": {}, "seed": 3, "index": 5, **extra}
    entry = gym.dataset_of(task, {}, 3)[5]
    return {
        "completion": completion,
        "answer": entry["answer"] if answer is None else answer,
        "row": {"reasoning_gym": made},
    }


def test_a_scorer_that_raises_on_an_odd_answer_has_met_a_wrong_one():
    dataset = gym.dataset_of("prime_factorization", {}, 3)
    with pytest.raises(ValueError):
        dataset.score_answer("2 × x(", dataset[5])
    verdict = judge.ReasoningGymJudge()(item("prime_factorization", "2 × x("))
    assert (verdict.outcome, verdict.reward) == (Outcome.INCORRECT, 0.0)


def test_another_entry_than_the_rows_is_a_fault_and_so_is_a_row_of_other_data():
    assert judge.ReasoningGymJudge()(item("gcd", "1", answer="-1")).is_fault
    assert judge.ReasoningGymJudge()({"completion": "1", "answer": "1", "row": {}}).is_fault


def test_partial_credit_is_the_scorers_own_value():
    text = "it may be " + gym.dataset_of("chain_sum", {}, 3)[5]["answer"]
    whole, part = (
        judge.ReasoningGymJudge()(item("chain_sum", text, partial_credit=credit)) for credit in (False, True)
    )
    assert whole.reward == 0.0 and 0 < part.reward < 1
