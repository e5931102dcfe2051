"""Read a YAML or TOML configuration, apply dotted overrides, and explain what is wrong with it."""

from __future__ import annotations

import difflib
import tomllib
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from cures_ray.config import Config, Section
from cures_ray.messages import ConfigError

# Spellings of other trainers -> ours. Keys are matched on their last dotted part or whole.
TRANSLATIONS = {
    "rollout.n": "curriculum.rollouts_per_step (with prompts_per_step; n varies per prompt)",
    "num_generations": "curriculum.rollouts_per_step (with prompts_per_step; n varies per prompt)",
    "group_size": "curriculum.rollouts_per_step (with prompts_per_step; n varies per prompt)",
    "n_samples_per_prompt": "curriculum.rollouts_per_step (with prompts_per_step; n varies per prompt)",
    "eps_clip": "algo.clip_eps_low and algo.clip_eps_high",
    "cliprange": "algo.clip_eps_low and algo.clip_eps_high",
    "clip_ratio": "algo.clip_eps_low and algo.clip_eps_high",
    "epsilon": "algo.clip_eps_low and algo.clip_eps_high",
    "epsilon_high": "algo.clip_eps_high",
    "clip_ratio_high": "algo.clip_eps_high",
    "beta": "algo.kl_coef",
    "kl_loss_coef": "algo.kl_coef",
    "init_kl_coef": "algo.kl_coef",
    "adv_estimator": "algo.advantage",
    "advantage_estimator": "algo.advantage",
    "learning_rate": "learner.lr",
    "actor_learning_rate": "learner.lr",
    "train_batch_size": "curriculum.prompts_per_step",
    "rollout_batch_size": "curriculum.prompts_per_step",
    "max_completion_length": "rollout.max_new_tokens",
    "max_response_length": "rollout.max_new_tokens",
    "generate_max_len": "rollout.max_new_tokens",
    "max_prompt_length": "data.max_prompt_tokens",
    "prompt_max_len": "data.max_prompt_tokens",
    "micro_batch_size": "learner.max_tokens_per_rank (micro-batches are cut by tokens)",
    "micro_train_batch_size": "learner.max_tokens_per_rank (micro-batches are cut by tokens)",
    "vllm_gpu_memory_utilization": "rollout.gpu_memory_utilization",
    "vllm_num_engines": "rollout.num_generators",
    "vllm_tensor_parallel_size": "rollout.tensor_parallel_size",
    "model_name_or_path": "model.path",
    "pretrain": "model.path",
    "dataset_name": "data.train",
    "prompt_data": "data.train",
    "output_dir": "checkpoint.dir",
    "save_path": "checkpoint.dir",
    "save_steps": "checkpoint.interval",
    "save_freq": "checkpoint.interval",
    "test_freq": "eval.interval",
    "eval_steps": "eval.interval",
    "max_steps": "trainer.steps",
    "total_training_steps": "trainer.steps",
    "staleness": "async_rl.max_staleness",
    "max_head_offpolicyness": "async_rl.max_staleness",
}


def known_keys() -> list[str]:
    """Every dotted key, in the order of the configuration."""
    keys = []
    for section, field in Config.model_fields.items():
        keys += [f"{section}.{name}" for name in _section_type(field).model_fields]
    return keys


def load_config(path: str | Path | None, overrides: list[str] | tuple[str, ...] = ()) -> Config:
    """Read ``path`` (.yaml, .yml or .toml; None: the defaults), apply ``section.key=value`` overrides, validate.

    Raises:
        ConfigError: missing or unreadable file, malformed override, unknown key (with the nearest known
            one), value out of bounds, or an unsatisfiable combination. All problems are listed at once.
    """
    tree = _read_tree(Path(path)) if path is not None else {}
    where = path or "on the command line"
    for override in overrides:
        _apply_override(tree, override)
    _reject_unknown(tree, str(where))
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        lines = [_explain(e) for e in error.errors()]
        raise ConfigError(f"configuration {where}:\n  " + "\n  ".join(lines)) from None


def _read_tree(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ConfigError(f"configuration file not found: {path} (looked in {Path.cwd()})")
    try:
        if path.suffix == ".toml":
            return tomllib.loads(path.read_text())
        if path.suffix in (".yaml", ".yml"):
            tree = yaml.safe_load(path.read_text()) or {}
        else:
            raise ConfigError(f"configuration {path}: the name must end in .yaml, .yml or .toml")
    except (tomllib.TOMLDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"configuration {path} cannot be parsed: {error}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"configuration {path}: sections expected at the top level, found {type(tree).__name__}")
    return tree


def _apply_override(tree: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"override {override!r}: write section.key=value, for example learner.lr=1e-6")
    parts = key.strip().split(".")
    node = tree
    for part in parts[:-1]:
        node = node.setdefault(part, {})
        if not isinstance(node, dict):
            raise ConfigError(f"override {override!r}: {part} is a value, not a section")
    node[parts[-1]] = text if _is_text(parts) else _scalar(text)


def _is_text(parts: list[str]) -> bool:
    """Whether the key takes any text: a folder may be called 2024, and nothing means the empty text."""
    if len(parts) != 2 or parts[0] not in Config.model_fields:
        return False
    field = _section_type(Config.model_fields[parts[0]]).model_fields.get(parts[1])
    return field is not None and field.annotation is str


def _scalar(text: str) -> Any:
    """A YAML scalar; unlike YAML 1.1, 1e-6 is a number."""
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        return text
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


def _reject_unknown(tree: dict[str, Any], where: str) -> None:
    problems = []
    for section, body in tree.items():
        if section not in Config.model_fields:
            names = [f"{section}.{k}" for k in body] if isinstance(body, dict) and body else [section]
            problems += [_unknown(name) for name in names]
            continue
        if body is None:
            tree[section] = {}
        elif not isinstance(body, dict):
            problems.append(f"{section} is a section; write {section}.KEY=value")
        else:
            known = _section_type(Config.model_fields[section]).model_fields
            problems += [_unknown(f"{section}.{k}") for k in body if k not in known]
    if problems:
        raise ConfigError(f"configuration {where}:\n  " + "\n  ".join(problems))


def _unknown(name: str) -> str:
    last = name.split(".")[-1]
    translated = TRANSLATIONS.get(name) or TRANSLATIONS.get(last)
    if translated:
        return f"unknown key {name}: here it is {translated}"
    keys = known_keys()
    same_leaf = [k for k in keys if k.split(".")[-1] == last]
    near = (
        same_leaf
        or difflib.get_close_matches(name, keys, n=1, cutoff=0.6)
        or [k for k in keys if k.split(".")[-1] in difflib.get_close_matches(last, [k.split(".")[-1] for k in keys], 1)]
    )
    hint = f"did you mean {near[0]}?" if near else "see docs/configuration.md for all keys"
    return f"unknown key {name}: {hint}"


def _explain(error: Any) -> str:
    where = ".".join(str(p) for p in error["loc"])
    message = error["msg"].removeprefix("Value error, ")
    return f"{where} = {error['input']!r}: {message}" if where else message


def _section_type(field: Any) -> type[Section]:
    return field.annotation
