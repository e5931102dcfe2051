import pytest
from pydantic import ValidationError

from cures_ray.config import METHODS, Config
from cures_ray.config_load import known_keys, load_config, section_types, without_effect
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
        ("model: {lora_rank: 8}", "model.lora.rank"),
        ("actor: {ppo_mini_batch_size: 256}", "algo.mini_batches"),
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
        ("{allocation: sigma, prompts_per_step: 64, rollouts_per_step: 100, n_min: 2}", "64 x 2 = 128"),
        ("{allocation: sigma, prompts_per_step: 4, rollouts_per_step: 256, n_max: 32}", "4 x 32 = 128"),
        ("{allocation: sigma, n_min: 9, n_max: 8}", "n_min = 9 is larger than"),
        ("{prompts_per_step: 256, rollouts_per_step: 256}\nalgo: {advantage: rloo}", "algo.advantage = rloo"),
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


def test_every_key_says_what_it_means():
    for section in Config.model_fields:
        for kind in section_types(section):
            for key, field in kind.model_fields.items():
                text = field.description or ""
                assert key == "method" or (len(text) > 15 and text.endswith(".")), f"{kind.__name__}.{key}"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (
            "curriculum: {method: uniform, tau: 0.1}",
            "curriculum.tau has no effect with method = uniform (it belongs to",
        ),
        ("curriculum: {method: mopps, draw: epoch}", "curriculum.draw has no effect with method = mopps"),
        ("curriculum: {method: dapo, speed_screen_rollouts: 2}", "it belongs to speed"),
        ("curriculum: {method: gvm, n_min: 2}", "it belongs to cures, knapsack"),
        ("curriculum: {sampling: uniform, target_ess_fraction: 0.3}", "with sampling = uniform"),
        ("curriculum: {tau: 0.1, target_ess_fraction: 0.5}", "beside tau"),
        ("curriculum: {sigma: last_layer}", "with allocation = uniform, which gives every draw 256 / 256 rollouts"),
        ("curriculum: {n_max: 8}", "n_max has no effect with allocation = uniform"),
        ("curriculum: {belief: none, discount: 0.9}", "with belief = none"),
        ("curriculum: {subsets: 3}", "with belief = discount"),
        ("curriculum: {train_on_pilots: true}", "without pilot_rollouts"),
        ("curriculum: {prior_from: constant, prior_strength: 3}", "with prior_from = constant"),
        ("algo: {clip_eps_high: 0.28}", "set mini_batches or updates_per_batch to 2 or more"),
        ("algo: {loss: reinforce, clip_eps_low: 0.1}", "which does not clip"),
        ("algo: {loss: clip, is_correction: mis}", "its ratio is the correction"),
        ("algo: {train_cost: measured, min_advantage: 0.1}", "with train_cost"),
        ("algo: {advantage_std_eps: 1e-3}", "divides by no sample deviation"),
        ("algo: {kl_in_reward: true}", "kl_in_reward = true needs kl_coef > 0"),
    ],
)
def test_a_setting_that_nothing_would_read_is_refused(tmp_path, text, reason):
    assert reason in refusal(tmp_path, text)


def test_a_method_has_no_beliefs_that_only_cures_resets(tmp_path):
    assert "curriculum.belief" in refusal(tmp_path, "curriculum: {method: uniform, belief: reset}")


def test_an_override_wins_over_keys_of_the_file_that_it_leaves_without_effect(tmp_path):
    path = write(tmp_path, "curriculum: {tau: 0.1, allocation: sigma, n_min: 2, n_max: 8, rollouts_per_step: 512}")
    assert load_config(path, ["curriculum.method=uniform"]).curriculum.rollouts_per_step == 512
    steered = load_config(path, ["curriculum.tau=null", "curriculum.target_ess_fraction=0.2"]).curriculum
    assert steered.target_ess_fraction == 0.2 and steered.tau is None
    with pytest.raises(ConfigError, match="tau has no effect"):
        load_config(path, ["curriculum.method=uniform", "curriculum.tau=0.2"])


@pytest.mark.parametrize("method", METHODS)
def test_what_is_printed_is_what_acts_and_reads_back_the_same(method):
    config = Config.model_validate({"curriculum": {"method": method}})
    tree = config.model_dump()
    assert without_effect(tree) == {} and Config.model_validate(tree) == config
    assert Config.model_validate_json(config.model_dump_json()) == config
    assert tree["algo"].keys() & {"clip_eps_low", "min_advantage"} == {"min_advantage"}


def test_an_assignment_is_checked_like_a_file():
    config = Config()
    with pytest.raises(ValueError, match=r"greater than or equal to 0\.0001"):
        config.curriculum.tau = -1
    with pytest.raises(ValueError, match="n_min has no effect"):
        config.curriculum.n_min = 2


@pytest.mark.parametrize(
    ("key", "why"),
    [
        ("rollout: {multi_turn: true}", "several turns are not supported"),
        ("critic: {lr: 1e-6}", "a critic is not supported"),
        ("algo: {gae_lambda: 1.0}", "GAE is not"),
        ("reward_model: {path: x}", "learned reward model is not supported"),
    ],
)
def test_what_is_not_supported_is_said_and_no_neighbour_suggested(tmp_path, key, why):
    message = refusal(tmp_path, key)
    assert why in message and "did you mean" not in message


def test_more_mini_batches_than_prompts_are_refused():
    with pytest.raises(ValidationError, match="mini_batches = 5 is more than prompts_per_step = 4"):
        Config.model_validate({"curriculum": {"prompts_per_step": 4}, "algo": {"mini_batches": 5}})


@pytest.mark.parametrize("cpus", [0, -1, "all"])
def test_cpus_of_a_learner_rank_are_a_number_or_auto(cpus):
    with pytest.raises(ValidationError, match="cpus_per_rank"):
        Config.model_validate({"learner": {"cpus_per_rank": cpus}})
    assert Config().learner.logical_cpus == 1.0


def test_progress_can_be_switched_off_without_quotes(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("logging: {progress: off}\n")
    assert load_config(path).logging.progress == "off"
    assert load_config(path, ["logging.progress=off"]).logging.progress == "off"
