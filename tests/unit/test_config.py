import pytest
from pydantic import ValidationError

from cures_ray.config import Config
from cures_ray.config_load import known_keys, load_config
from cures_ray.messages import ConfigError


def write(tmp_path, text, name="run.yaml"):
    path = tmp_path / name
    path.write_text(text)
    return path


def refusal(tmp_path, text, *overrides) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(write(tmp_path, text), overrides)
    return str(caught.value)


def test_yaml_and_toml_say_the_same(tmp_path):
    yaml = load_config(write(tmp_path, "learner:\n  lr: 1e-6\n  num_ranks: 2\n"))
    toml = load_config(write(tmp_path, "[learner]\nlr = 1e-6\nnum_ranks = 2\n", "run.toml"))
    assert yaml == toml and yaml.learner.lr == 1e-6


def test_dotted_overrides_win_over_the_file(tmp_path):
    path = write(tmp_path, "learner:\n  lr: 1e-6\n")
    config = load_config(path, ["learner.lr=3e-4", "curriculum.method=uniform", "async_rl.max_staleness=0"])
    assert (config.learner.lr, config.curriculum.method, config.async_rl.max_staleness) == (3e-4, "uniform", 0)


def test_an_unknown_key_suggests_the_nearest(tmp_path):
    assert "did you mean curriculum.target_ess_fraction?" in refusal(tmp_path, "curriculum: {target_ess_frac: 0.5}")
    assert "did you mean learner.lr?" in refusal(tmp_path, "optimizer: {lr: 1e-6}")


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("rollout: {n: 8}", "curriculum.rollouts_per_step"),
        ("algo: {eps_clip: 0.2}", "algo.clip_eps_low"),
        ("trainer: {num_generations: 8}", "curriculum.rollouts_per_step"),
        ("algo: {group_size: 8}", "curriculum.rollouts_per_step"),
        ("data: {max_response_length: 8}", "rollout.max_new_tokens"),
    ],
)
def test_spellings_of_other_trainers_are_translated(tmp_path, theirs, ours):
    assert ours in refusal(tmp_path, theirs)


def test_all_unknown_keys_are_listed_at_once(tmp_path):
    message = refusal(tmp_path, "learner: {learning: 1, zero: 2}\nnothing: {a: 1}")
    assert all(key in message for key in ("learner.learning", "learner.zero", "nothing.a"))


@pytest.mark.parametrize(
    ("batch", "arithmetic"),
    [
        ("{prompts_per_step: 64, rollouts_per_step: 100, n_min: 2}", "64 x 2 = 128"),
        ("{prompts_per_step: 4, rollouts_per_step: 256, n_max: 32}", "4 x 32 = 128"),
        ("{n_min: 9, n_max: 8}", "n_min = 9 is larger than"),
        ("{prompts_per_step: 256, rollouts_per_step: 256, n_min: 1}\nalgo: {advantage: rloo}", "algo.advantage = rloo"),
    ],
)
def test_an_unsatisfiable_batch_shows_its_arithmetic(tmp_path, batch, arithmetic):
    assert arithmetic in refusal(tmp_path, f"curriculum: {batch}")


def test_a_value_out_of_bounds_names_key_and_value(tmp_path):
    message = refusal(tmp_path, "rollout: {temperature: -1}")
    assert "rollout.temperature = -1" in message and "greater than 0" in message


@pytest.mark.parametrize("override", ["learner.lr", "=3", "learner.lr.x.y=3"])
def test_a_malformed_override_is_explained(tmp_path, override):
    assert "override" in refusal(tmp_path, "learner: {lr: 1e-6}", override)


def test_a_missing_or_unparsable_file_is_explained(tmp_path):
    with pytest.raises(ConfigError, match="not found"):
        load_config(tmp_path / "absent.yaml")
    assert "cannot be parsed" in refusal(tmp_path, "learner: {lr: ")
    assert "sections expected" in refusal(tmp_path, "- a\n- b\n")
    assert "is a section" in refusal(tmp_path, "learner: 3")


def test_every_key_has_one_section_and_a_default():
    assert len(known_keys()) == len(set(known_keys())) > 100
    assert Config().curriculum.method == "cures"


def test_more_mini_batches_than_prompts_are_refused():
    with pytest.raises(ValidationError, match="mini_batches = 5 is more than prompts_per_step = 4"):
        Config.model_validate({"curriculum": {"prompts_per_step": 4, "n_max": 64}, "algo": {"mini_batches": 5}})


@pytest.mark.parametrize("cpus", [0, -1, "all"])
def test_cpus_of_a_learner_rank_are_a_number_or_auto(cpus):
    with pytest.raises(ValidationError, match="cpus_per_rank"):
        Config.model_validate({"learner": {"cpus_per_rank": cpus}})
    assert Config().learner.logical_cpus == 1.0
