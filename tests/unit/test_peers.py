"""The arithmetic of the comparison with other trainers."""

import re
from pathlib import Path

import pytest

from benchmarks.harness.results_file import ROOT
from benchmarks.peers.demo import figures, seconds_to
from benchmarks.peers.lm_evaluation import LAST_BOX, compare, task
from benchmarks.peers.settings import SETTINGS, messages
from benchmarks.peers.trl_grpo import judge_of
from cures_ray.config_load import load_config


def run(who: str, rate: float, seed: int = 0) -> dict:
    curve = [{"seconds": 10.0 * i, "accuracy": 0.2 + rate * i} for i in range(5)]
    return {"who": who, "seed": seed, "curve": curve, "rollouts_per_s": 100.0 * rate, "peak_gib": 1.0}


def test_the_time_to_an_accuracy_is_interpolated():
    curve = run("x", 0.1)["curve"]
    assert seconds_to(curve, 0.35) == pytest.approx(15.0)
    assert seconds_to(curve, 0.7) is None


def test_a_method_twice_as_fast_needs_half_of_the_time():
    found = figures([run("trl", 0.1), run("default", 0.2), run("grpo", 0.05)])
    assert found["default/seconds_to_trl_accuracy_ratio"][1] == pytest.approx(0.5)
    assert found["trl/seconds_to_trl_accuracy_ratio"][1] == pytest.approx(1.0)
    assert found["grpo/seconds_to_trl_accuracy_ratio"] == "not reached"


@pytest.mark.parametrize("name", list(SETTINGS))
def test_grpo_beside_trl_has_the_batch_of_trl(name):
    setting = SETTINGS[name]
    curriculum = load_config(setting.config, setting.grpo()).curriculum
    assert (curriculum.method, curriculum.prompts_per_step) == ("uniform", setting.prompts)
    assert curriculum.rollouts_per_step == setting.prompts * setting.generations
    assert load_config(setting.config).curriculum.rollouts_per_step == curriculum.rollouts_per_step


def test_trl_gets_the_prompts_of_the_run_with_its_system_prompt_and_the_same_scorer():
    small = ["data.reasoning_gym.train_size=8", "data.reasoning_gym.eval_size=4"]
    config = load_config(ROOT / "configs/smollm2-reasoning-gym.yaml", small)
    rows = messages(config, "train")
    assert len(rows) == 8 and len(messages(config, "eval")) == 4
    roles = [[m["role"] for m in row["prompt"]] for row in rows]
    assert roles == [["system", "user"]] * 8 and rows[0]["prompt"][0]["content"] == config.data.system_prompt
    judge = judge_of("reasoning_gym")
    assert judge(f"The answer is {rows[0]['answer']}.", rows[0]) == 1.0
    assert judge("The answer is -12345.", rows[0]) == 0.0


def item(right: bool, completion: str = "\\boxed{3}", gold: str = "3") -> dict:
    return {"gold": gold, "completion": completion, "right": right}


def test_two_evaluations_are_compared_item_by_item():
    ours = [item(True), item(True), item(False, "\\boxed{4}")]
    theirs = [item(True), item(False), item(False, "\\boxed{5}")]
    found, different = compare(ours, theirs)
    assert found["accuracy_cures"] == pytest.approx(2 / 3) and found["accuracy_lm_eval"] == pytest.approx(1 / 3)
    assert found["same_completion_other_verdict"] == 1 and [row["item"] for row in different] == [1, 2]
    with pytest.raises(ValueError, match="different items"):
        compare(ours, [item(True, gold="9"), *theirs[1:]])


def test_lm_evals_task_reads_the_local_file_and_takes_the_last_box():
    settings = task(Path("/data/eval.jsonl"), LAST_BOX, 12)
    assert settings["dataset_kwargs"]["data_files"]["test"] == "/data/eval.jsonl"
    assert re.findall(LAST_BOX, r"so \boxed{1} or \boxed{\frac{1}{2}}")[-1] == r"\frac{1}{2}"
