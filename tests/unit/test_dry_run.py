"""What `cures train --dry-run` refuses, and the figures that it prints."""

import json
import re

import pytest

from actors.commands.dry_run import rollout_table
from actors.commands.memory import Shape, activations_gib, generator_gib, learner_gib, logits_gib
from cures_ray.config import Config
from cures_ray.messages import ConfigError, PromptRow
from cures_ray.run.dry_checks import check_context, check_golds, check_reward, check_writable


def config(**sections) -> Config:
    return Config.model_validate(sections)


SMOLLM2 = Shape(parameters=134_515_008, layers=30, hidden=576, intermediate=1536, vocabulary=49_152)


@pytest.mark.parametrize(("dtype", "width", "measured"), [("float32", 4, 9.8), ("bfloat16", 2, 7.4)])
def test_the_memory_of_a_forward_and_backward_pass_is_right_within_a_third(dtype, width, measured):
    """Measured with SmolLM2 on a CPU, in GB: 64 sequences of 66 tokens, all scored; weights and gradients, no Adam."""
    tokens = 64 * 66
    gib = activations_gib(SMOLLM2, config(learner={"dtype": dtype}), tokens) + logits_gib(SMOLLM2, width, tokens)
    total = (gib + 0.6 + SMOLLM2.parameters * 2 * width / 2**30) * 2**30 / 1e9
    assert total == pytest.approx(measured, rel=0.3)


def test_the_learner_of_a_real_run_is_right_within_a_third_and_logits_are_in_it():
    """Measured in a run of 64 rollouts a step, of up to 16 tokens after prompts of about 50: 5 GB. Thinning leaves
    about half of them to compute, 2048 tokens."""
    settings = config(
        learner={"dtype": "bfloat16", "max_tokens_per_rank": 2048},
        rollout={"max_new_tokens": 16},
        curriculum={"prompts_per_step": 64, "rollouts_per_step": 64},
    )
    parts = learner_gib(SMOLLM2, settings, prompt_tokens=50)
    assert sum(parts.values()) * 2**30 / 1e9 == pytest.approx(5.0, rel=0.3)
    assert parts["logits"] > 0.3 and parts["weights, gradients, Adam"] == pytest.approx(2.25, rel=0.05)


def test_the_engines_memory_follows_its_own_type():
    """Measured: 1.6 GB in bfloat16, 2.4 GB in float32, KV cache and packed weights included."""
    own = generator_gib(SMOLLM2, config(learner={"dtype": "bfloat16"}))["weights"]
    exact = generator_gib(SMOLLM2, config(learner={"dtype": "bfloat16"}, rollout={"dtype": "float32"}))["weights"]
    assert exact == 2 * own == pytest.approx(0.5, rel=0.01)
    halves = config(rollout={"tensor_parallel_size": 2}, learner={"dtype": "bfloat16"})
    assert generator_gib(SMOLLM2, halves)["weights"] == own / 2


def test_checkpointing_and_shards_shrink_the_estimate():
    plain = learner_gib(SMOLLM2, config(), 100)
    small = learner_gib(SMOLLM2, config(learner={"gradient_checkpointing": True}), 100)
    assert small["activations"] < plain["activations"] / 8
    cut = learner_gib(SMOLLM2, config(learner={"num_ranks": 4, "zero_stage": 3}), 100)
    assert cut["weights, gradients, Adam"] == pytest.approx(plain["weights, gradients, Adam"] / 4, rel=0.35)


def test_prompts_and_completions_that_do_not_fit_the_context_are_refused_with_the_sum():
    settings = config(data={"max_prompt_tokens": 1024}, rollout={"max_new_tokens": 3073})
    with pytest.raises(ConfigError, match=r"1024 \+ 3073 = 4097 tokens .*4096 tokens"):
        check_context(settings, 4096)
    assert "of 4097" in check_context(settings, 4097) and "unlimited" in check_context(settings, None)


def test_golds_that_are_no_answers_are_refused_with_examples():
    with pytest.raises(ConfigError, match=r"2 of 3 golds cannot be read .*data\.answer_key"):
        check_golds(["7", "so it is #### 4\nor #### ", "\\frac{1}{2"])
    assert "3 of 3" in check_golds(["7", "\\frac{1}{2}", "x+1"])
    assert "others would be faults" in check_golds(["7"] * 30 + ["\\frac{1}{2"])


def row(answer: str) -> PromptRow:
    return PromptRow(prompt_id="0" * 16, text="", token_ids=[], answer=answer)


def test_a_reward_that_pays_for_no_gold_is_refused_and_one_that_wants_its_own_form_is_not(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rewards.py").write_text(
        "def nothing(prompt, completion, answer, **row): return 0.0\n"
        "def tagged(prompt, completion, answer, **row): return float(completion == f'<answer>{answer}</answer>')\n"
    )
    rows = [row("4"), row("5")]
    with pytest.raises(ConfigError, match=r"gives 0 to every one of 2 golds.*'4'"):
        check_reward(config(verifier={"fn": "rewards.py:nothing"}), rows)
    assert "2 of 2 golds" in check_reward(config(verifier={"fn": "rewards.py:tagged"}), rows)
    assert "2 of 2 golds" in check_reward(config(), rows)  # math: \boxed{...}


def test_a_folder_that_cannot_be_made_is_refused_and_nothing_is_left_behind(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"checkpoint\.dir = .*file/run cannot be written"):
        check_writable(tmp_path / "file" / "run")
    with pytest.raises(ConfigError, match="cannot be written"):
        check_writable(tmp_path.__class__("/proc/no/such"))
    check_writable(tmp_path / "new" / "run")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def number(table: list[tuple[str, str]], name: str) -> int:
    return int(re.match(r"[\d,]+", dict(table)[name]).group().replace(",", ""))


def test_pilots_and_rollouts_are_printed_as_they_will_be():
    paper = config(
        curriculum={
            "method": "cures",
            "belief": "reset",
            "subsets": 15,
            "subset_steps": 10,
            "pilot_rollouts": 4,
            "prompts_per_step": 1024,
            "rollouts_per_step": 8192,
        },
        trainer={"steps": 150},
    )
    table = rollout_table(paper, 150_000)
    assert number(table, "pilots of the run") == 15 * 10_000 * 4
    assert number(table, "rollouts that train") == 150 * 8192
    assert number(table, "rollouts of the run") == 150 * 8192 + 600_000
    assert number(rollout_table(config(), 1000), "pilots of the run") == 0
    assert json.dumps(table)  # plain text
