from pathlib import Path

import pytest

from actors.commands.dry_run import dry_run
from cures_ray.config import Config
from cures_ray.config_load import load_config
from cures_ray.messages import ConfigError

CONFIGS = sorted((Path(__file__).resolve().parents[2] / "configs").glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_every_committed_config_parses_and_dry_runs(path):
    machine = ["ray.num_cpus=64", "ray.num_gpus=8"] if "8gpu" in path.stem else []  # the machine of its name
    config = load_config(path, machine)
    text = "\n".join(dry_run(config, with_inputs=False))
    assert str(config.curriculum.rollouts_per_step) in text


def test_the_committed_configs_are_the_four_that_the_documents_name():
    names = {p.stem for p in CONFIGS}
    assert {"demo", "qwen2.5-math-1.5b-8gpu", "qwen2.5-math-7b-8gpu", "two-node"} <= names
    assert "qwen2.5-math-1.5b-8gpu-default" in names


@pytest.mark.parametrize("size", ["1.5b", "7b"])
def test_the_paper_configs_hold_the_paper_settings(size):
    config = load_config(next(p for p in CONFIGS if p.stem == f"qwen2.5-math-{size}-8gpu"))
    c = config.curriculum
    assert (c.subsets, c.subset_steps, c.pilot_rollouts, c.belief) == (15, 10, 4, "reset")
    assert (c.prompts_per_step, c.rollouts_per_step) == (1024, 8 * 1024)
    assert (config.learner.lr, config.learner.lr_schedule, config.algo.advantage) == (1e-6, "constant", "grpo")
    gpus = config.rollout.num_generators * config.rollout.tensor_parallel_size + config.learner.num_ranks
    assert gpus == 8 and config.trainer.steps == c.subsets * c.subset_steps


@pytest.mark.parametrize("size", ["1.5b", "7b"])
def test_the_paper_configs_have_ten_thousand_prompts_a_subset(size):
    config = load_config(next(p for p in CONFIGS if p.stem == f"qwen2.5-math-{size}-8gpu"))
    assert config.data.max_train_prompts == 10_000 * config.curriculum.subsets


def test_the_config_to_start_from_is_the_default_method():
    config = load_config(next(p for p in CONFIGS if p.stem == "qwen2.5-math-1.5b-8gpu-default"))
    size = {"prompts_per_step", "rollouts_per_step"}
    assert config.curriculum.model_dump(exclude=size) == Config().curriculum.model_dump(exclude=size)
    assert config.algo == Config().algo and config.curriculum.rollouts_per_step == config.curriculum.prompts_per_step
    assert config.rollout.num_generators + config.learner.num_ranks == 8


def test_the_two_node_config_spreads_sixteen_gpus():
    config = load_config(next(p for p in CONFIGS if p.stem == "two-node"))
    assert config.placement.strategy == "SPREAD" and config.rollout.tensor_parallel_size == 2
    assert config.rollout.num_generators * config.rollout.tensor_parallel_size + config.learner.num_ranks == 16


def test_the_demo_is_asynchronous_and_uses_the_curriculum():
    config = load_config(next(p for p in CONFIGS if p.stem == "demo"))
    assert config.async_rl.max_staleness >= 1 and config.curriculum.method == "cures"
    cpus = config.placement.generator_cpus + config.placement.verifier_cpus + config.learner.logical_cpus
    assert cpus <= 2  # the machine has two cores


def test_the_demo_with_an_unsatisfiable_batch_is_refused_with_the_arithmetic():
    demo = next(p for p in CONFIGS if p.stem == "demo")
    with pytest.raises(ConfigError, match="256 x 2 = 512"):
        load_config(demo, ["curriculum.allocation=sigma", "curriculum.n_min=2"])
    with pytest.raises(ConfigError, match=r"n_min has no effect with allocation = uniform, which gives.* 256 / 256"):
        load_config(demo, ["curriculum.n_min=2"])
