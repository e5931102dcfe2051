"""What is compared: every arm is a set of overrides of one common configuration, nothing else.

``NAME@key=value@key=value`` is an arm with further overrides (``wide@learner.lr=2e-3``): the name of the run says
what it is. A bare key without a dot is looked up in the curriculum section.
"""

from __future__ import annotations

from typing import Any

import yaml

from benchmarks.harness.real_task import REAL_MODEL, REAL_TASK, quartered, real_settings
from cures_ray.config import Config
from cures_ray.config_load import known_keys, merged
from cures_ray.messages import ConfigError
from cures_ray.synthetic.tasks import TASKS

Overrides = dict[str, Any]

EVALUATIONS = 20  # evaluations within a budget, about

# The same for every arm and task. 32 prompts x 8 rollouts = 256 rollouts a step.
COMMON: Overrides = {
    "data.max_prompt_tokens": 64,
    "data.max_eval_prompts": 256,
    "curriculum.prompts_per_step": 32,
    "curriculum.rollouts_per_step": 256,
    "curriculum.n_min": 2,
    "curriculum.n_max": 32,
    # what the product's defaults would otherwise add to every arm
    "curriculum.allocation": "sigma",
    "curriculum.prior_from": "constant",
    "curriculum.prior_scope": "unseen",
    "curriculum.prior_strength": 2.0,
    "curriculum.discount": 0.95,
    "algo.min_advantage": 0.0,
    "rollout.dtype": "float32",
    "rollout.max_concurrent_rollouts": 256,
    "rollout.enforce_eager": True,
    "rollout.kv_cache_mib": 64,
    "algo.loss": "clip",
    "algo.loss_length": "constant",
    "algo.overlong_penalty_tokens": 2,  # else nothing teaches to stop: policies go on after the answer
    "async_rl.max_staleness": 0,
    "learner.dtype": "float32",
    # the gradient's size fades as the policy gets certain; Adam should not take full steps along its noise then
    "learner.adam_beta2": 0.999,
    "learner.warmup_steps": 5,
    "learner.max_tokens_per_rank": 8192,
    "checkpoint.interval": 0,
    "checkpoint.export_final": False,
    "logging.progress": "off",
    "logging.tensorboard": False,
    "placement.generator_cpus": 0.5,
    "placement.verifier_cpus": 0.25,
}

_GRPO: Overrides = {"curriculum.method": "uniform", "curriculum.draw": "epoch", "algo.advantage": "grpo"}
_SINGLE: Overrides = {"curriculum.prompts_per_step": 256}
_GVM: Overrides = {  # gradient norms from the last layer, cached from training; the paper measures them on the pilots
    "curriculum.method": "gvm",
    "curriculum.draw": "epoch",
    "curriculum.pilot_rollouts": 8,
    "curriculum.sigma": "last_layer",
}
_PAPER: Overrides = {  # Algorithm 1: 7 subsets of 2048 prompts, N' = 4 (32 % of the budget), 10 steps each
    "curriculum.method": "cures",
    "curriculum.belief": "reset",
    "curriculum.subsets": 7,
    "curriculum.subset_steps": 10,
    "curriculum.pilot_rollouts": 4,
    "curriculum.tau": 0.1,
    "algo.advantage": "grpo",
}
_ONLINE: Overrides = {  # CurES without pilots or resets: beliefs move with every verified rollout
    "curriculum.method": "cures",
    "curriculum.belief": "discount",
    "curriculum.target_ess_fraction": 0.5,
    "algo.advantage": "grpo",
}
_SIGMA: Overrides = _ONLINE | {"curriculum.sampling": "uniform", "algo.advantage": "rloo"}
_WIDE: Overrides = {  # 256 prompts x 1 rollout; the belief from before the step is the baseline
    "curriculum.method": "cures",
    "curriculum.prompts_per_step": 256,
    "curriculum.n_min": 1,
    "curriculum.n_max": 4,
    "curriculum.belief": "discount",
    "curriculum.sampling": "uniform",
    "curriculum.allocation": "uniform",
    "curriculum.draw": "epoch",
    "algo.advantage": "posterior_loo",
}
_WIDE_CURES: Overrides = _WIDE | {
    "curriculum.sampling": "potential",
    "curriculum.allocation": "sigma",
    "curriculum.draw": "with_replacement",
    "curriculum.target_ess_fraction": 0.5,
}
_PREDICT: Overrides = {  # the belief's prior follows a predictor fitted online, also where there is evidence
    "curriculum.prior_from": "predictor",
    "curriculum.prior_scope": "all",
    "curriculum.prior_strength": 4.0,
    "curriculum.discount": 0.8,
}
_CURES_WIDE: Overrides = (  # rho* draws, one rollout each, predicted baseline and scale, no work on the expected
    _WIDE_CURES
    | _PREDICT
    | {"curriculum.allocation": "uniform", "algo.advantage": "posterior_std", "algo.min_advantage": 0.3}
)
_DEFAULT: Overrides = _CURES_WIDE | {"curriculum.prior_from": "mixture"}  # the product's default
# From the posterior as the baseline to the default, one thing at a time.
_LADDER: dict[str, Overrides] = {"ladder_baseline": _WIDE | {"curriculum.discount": 0.8}}
_LADDER["ladder_predictor"] = _LADDER["ladder_baseline"] | _PREDICT | {"curriculum.prior_from": "mixture"}
_LADDER["ladder_scale"] = _LADDER["ladder_predictor"] | {"algo.advantage": "posterior_std"}
_LADDER["ladder_thinning"] = _LADDER["ladder_scale"] | {"algo.min_advantage": 0.3}
_SPO: Overrides = {  # 256 prompts x 1 rollout, each prompt's own tracker as the baseline
    "curriculum.method": "spo",
    "curriculum.prompts_per_step": 256,
    "curriculum.pilot_rollouts": 8,
    "curriculum.prior_from": "constant",
    "curriculum.prior_alpha": 0.5,
    "curriculum.prior_beta": 0.5,
    "algo.advantage": "posterior_whitened",
}
_NEAR_HALF: Overrides = {  # of a large pool, the prompts whose sampled accuracy is nearest one half; groups of 8
    "curriculum.method": "mopps",
    "curriculum.mopps_pool_factor": 64,
    "curriculum.prior_from": "predictor",
    "curriculum.prior_scope": "all",
    "algo.advantage": "grpo",
}

ARMS: dict[str, Overrides] = {
    # the field
    "grpo": _GRPO,
    "rloo": _GRPO | {"algo.advantage": "rloo"},
    "dr_grpo": _GRPO | {"algo.advantage": "dr_grpo"},
    "rpp": _GRPO | {"algo.advantage": "reinforce_pp"},
    "rpp_baseline": _GRPO | {"algo.advantage": "reinforce_pp_baseline"},
    "rpp_single": _GRPO | {"algo.advantage": "reinforce_pp"} | _SINGLE,  # one response a prompt, as many prompts
    "gvm": _GVM | {"algo.advantage": "grpo"},
    "gvm_raft": _GVM | {"algo.advantage": "raft_pp"},
    "dapo": {
        "curriculum.method": "dapo",
        "curriculum.draw": "epoch",
        "curriculum.dapo_max_rounds": 10,  # as in its release
        "algo.advantage": "grpo",
        "algo.clip_eps_high": 0.28,
        "algo.loss_length": "token",
    },
    "speed": {"curriculum.method": "speed", "curriculum.draw": "epoch", "algo.advantage": "rloo"},
    "mopps": {"curriculum.method": "mopps", "curriculum.mopps_pool_factor": 16, "algo.advantage": "grpo"},
    "ada": {
        "curriculum.method": "reinforce_ada",
        "curriculum.draw": "epoch",
        "algo.advantage": "dr_grpo",
        "algo.clip_eps_high": 0.28,
    },
    "knapsack": {"curriculum.method": "knapsack", "curriculum.draw": "epoch", "algo.advantage": "grpo"},
    # one rollout a prompt with a memory, or a better baseline for a few
    "spo": _SPO,
    "spo_nopilot": _SPO | {"curriculum.pilot_rollouts": 0},
    "spo_tokens": _SPO | {"curriculum.pilot_rollouts": 0, "algo.advantage": "posterior_token_whitened"},
    "shrinkage_2": _GRPO | {"algo.advantage": "shrinkage", "curriculum.prompts_per_step": 128},
    "shrinkage_4": _GRPO | {"algo.advantage": "shrinkage", "curriculum.prompts_per_step": 64},
    # prompts chosen before any rollout
    "bots": _NEAR_HALF | {"curriculum.prior_strength": 8.0, "curriculum.discount": 0.9},
    "gps": _NEAR_HALF | {"curriculum.prior_strength": 16.0, "curriculum.discount": 0.8},
    "greso": {"curriculum.method": "greso", "curriculum.draw": "epoch", "algo.advantage": "grpo"},
    # CurES as published, and its parts
    "cures": _PAPER,
    "cures_rpp": _PAPER | {"algo.advantage": "reinforce_pp"},
    "cures_n1": _PAPER | {"curriculum.pilot_rollouts": 1},
    "cures_n8": _PAPER | {"curriculum.pilot_rollouts": 8},
    "cures_train_pilots": _PAPER | {"curriculum.train_on_pilots": True},
    "cures_discount": _PAPER | {"curriculum.belief": "discount", "curriculum.pilot_rollouts": 0},
    "cures_online": _ONLINE,
    "cures_online_sampling": _ONLINE | {"curriculum.allocation": "uniform"},
    "cures_online_allocation": _ONLINE | {"curriculum.sampling": "uniform"},
    "cures_online_rloo": _ONLINE | {"algo.advantage": "rloo"},
    "cures_online_last_layer": _ONLINE | {"curriculum.sigma": "last_layer"},
    # sigma where it matters: uniform prompts, unequal n_i, an advantage that is not divided by the prompt's spread
    "sigma_bernoulli": _SIGMA,
    "sigma_last_layer": _SIGMA | {"curriculum.sigma": "last_layer"},
    # wide batches, the posterior as the baseline
    "wide": _WIDE,
    "wide_cures": _WIDE_CURES,
    "wide_sampling": _WIDE_CURES | {"curriculum.allocation": "uniform"},
    "wide_predictor": _WIDE | _PREDICT,
    "wide_predictor_std": _WIDE | _PREDICT | {"algo.advantage": "posterior_std"},
    "wide_cures_predictor": _WIDE_CURES | _PREDICT,
    "cures_wide": _CURES_WIDE,
    "cures_wide_uniform": _CURES_WIDE | {"curriculum.sampling": "uniform", "curriculum.draw": "epoch"},  # its control
    # the product's default: priors by experts whose measured skill weights them
    **_LADDER,
    "default": _DEFAULT,
    "default_hidden": _DEFAULT | {"curriculum.predictor_features": "hidden"},
    "default_uniform": _DEFAULT | {"curriculum.sampling": "uniform", "curriculum.draw": "epoch"},
    # controls
    "uniform_curriculum": {  # GRPO through the curriculum's own code path
        "curriculum.method": "cures",
        "curriculum.sampling": "uniform",
        "curriculum.allocation": "uniform",
        "curriculum.draw": "epoch",
        "algo.advantage": "grpo",
    },
}
# Controls outside the configuration. coin: rewards are coin flips. oracle: the belief is the true accuracy, free.
# permuted: every prompt has the features and the level of another one, so that predictor and level mean know nothing.
# oracle_sigma: that, and the score moments are measured on many fresh rollouts, free.
CONTROLS: dict[str, tuple[str, str]] = {  # control arm -> (arm, control)
    "random_grpo": ("grpo", "coin"),
    "random_wide": ("wide", "coin"),
    "random_wide_cures": ("wide_cures", "coin"),
    "random_cures_wide": ("cures_wide", "coin"),
    "oracle_cures": ("cures_online", "oracle"),
    "oracle_wide_cures": ("wide_cures", "oracle"),
    "oracle_wide": ("wide", "oracle"),
    "oracle_cures_wide": ("cures_wide", "oracle"),
    "random_default": ("default", "coin"),
    "oracle_default": ("default", "oracle"),
    "default_permuted": ("default", "permuted"),
    "default_uniform_permuted": ("default_uniform", "permuted"),
    "cures_wide_permuted": ("cures_wide", "permuted"),
    "oracle_bernoulli": ("sigma_bernoulli", "oracle"),
    "oracle_sigma": ("sigma_last_layer", "oracle_sigma"),
}
HEADLINE = ("grpo", "rpp", "rpp_single", "gvm", "dapo", "mopps", "cures", "wide", "wide_cures", "cures_wide")

# Rollouts planned per rollout trained, about: such arms are evaluated more often, to have as many points per cost.
PLANNED_PER_TRAINED = {"dapo": 3.2, "speed": 3.0, "ada": 3.0, "gvm": 2.0, "gvm_raft": 2.0, "cures": 1.5, "greso": 2.0}

_PAPER_ARMS = [name for name, arm in ARMS.items() if arm.get("curriculum.pilot_rollouts") and name.startswith("cures")]

_PROGRAM_RATES = {
    "*": 1e-3,
    "wide": 2e-3,
    **dict.fromkeys(("grpo", "rloo", "dr_grpo", "rpp", "rpp_baseline", "gvm", "gvm_raft"), 5e-4),
}

# Learning rates by (task, variant): the label's own, else the arm's, else "*"; chosen in results/lr_sweep_*.json.
LEARNING_RATES: dict[tuple[str, str], dict[str, float]] = {
    ("chain", "N"): {"*": 2e-3},
    ("chain", "T"): {"*": 2e-3, **dict.fromkeys(("gvm", "gvm_raft", *_PAPER_ARMS), 1e-3)},
    ("program", "N"): _PROGRAM_RATES,
    ("program", "T"): _PROGRAM_RATES,
    ("chain_opaque", "T"): {"*": 2e-3},  # that of chain; not swept
    (REAL_TASK, REAL_MODEL): {"*": 2e-5},  # before its sweep
}

# The base model of a task: arguments of BaseModelSpec. vLLM on CPUs needs 32 dimensions a head.
BASES: dict[str, dict[str, int]] = {
    "chain": {"prompts": 2048, "eval_prompts": 400, "sft_steps": 400, "hidden": 64, "layers": 2, "heads": 2},
    # 64 dimensions start at .02 after 1200 steps, 128 at .26
    "chain_opaque": {"prompts": 2048, "eval_prompts": 400, "sft_steps": 1200, "hidden": 128, "layers": 2, "heads": 4},
    "program": {"prompts": 2048, "eval_prompts": 300, "sft_steps": 400, "hidden": 64, "layers": 2, "heads": 2},
}


def split_arm(label: str) -> tuple[str, str, Overrides]:
    """``wide@learner.lr=2e-3`` -> (arm "wide", control "", its further overrides).

    Raises:
        ConfigError: unknown arm or key.
    """
    name, *changes = label.split("@")
    arm, control = CONTROLS.get(name, (name, ""))
    if arm not in ARMS:
        raise ConfigError(f"unknown arm {name!r}; there are {', '.join([*ARMS, *CONTROLS])}")
    known, extra = set(known_keys()), {}
    for change in changes:
        key, equals, value = change.partition("=")
        key = key if "." in key else f"curriculum.{key}"
        if not equals or key not in known:
            raise ConfigError(f"arm {label!r}: {change!r} is not key=value with a key of the configuration")
        extra[key] = float(value) if _is_number(value) and not value.isdecimal() else yaml.safe_load(value)
    return arm, control, extra


def arm_config(
    label: str, *, task: str, variant: str, seed: int, budget: int, base: str, run_dir: str, extra: Overrides
) -> Config:
    """The resolved configuration of one run: common, task, arm, label, command line, in this order."""
    arm, _, changes = split_arm(label)
    rates = LEARNING_RATES[task, variant]
    own = real_settings(base, seed) if task == REAL_TASK else _synthetic_settings(task, base)
    values: Overrides = (
        COMMON
        | own
        | {
            "learner.lr": rates.get(label, rates.get(arm, rates["*"])),
            "learner.seed": seed,
            "data.seed": seed,
            "trainer.seed": seed,
            "trainer.rollout_budget": budget,
            "checkpoint.dir": run_dir,
        }
    )
    values |= ARMS[arm]
    if task == REAL_TASK:
        values, changes = quartered(values), quartered(changes)
    values |= changes | extra
    planned = values["curriculum.rollouts_per_step"] * PLANNED_PER_TRAINED.get(arm, 1.0)
    values.setdefault("trainer.steps", max(1, budget // values["curriculum.rollouts_per_step"]))
    values.setdefault("eval.interval", max(1, -(-budget // round(planned * EVALUATIONS))))
    # arms are built from each other, so a part may hold a key that the whole leaves without effect
    written = changes | extra
    parts = {key: value for key, value in values.items() if key not in written}
    return Config.model_validate(merged(nested(parts), nested(written)))


def _synthetic_settings(task: str, base: str) -> Overrides:
    return {
        "model.path": f"{base}/model",
        "data.train": f"{base}/train.jsonl",
        "data.eval": f"{base}/eval.jsonl",
        "rollout.max_new_tokens": TASKS[task].max_new_tokens,
        "verifier.fn": TASKS[task].verifier,
    }


def nested(values: Overrides) -> dict[str, dict[str, Any]]:
    """{"section.key": value} -> {"section": {"key": value}}."""
    tree: dict[str, dict[str, Any]] = {}
    for key, value in values.items():
        section, name = key.split(".")
        tree.setdefault(section, {})[name] = value
    return tree


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
