"""Read a YAML or TOML configuration, apply dotted overrides, and explain what is wrong with it."""

from __future__ import annotations

import difflib
import tomllib
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from cures_ray.config import METHODS, Config, Section
from cures_ray.config_curriculum import methods_with
from cures_ray.messages import ConfigError

Tree = dict[str, Any]  # {section: {key: value}}

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
    "lora_rank": "model.lora.rank",
    "lora_r": "model.lora.rank",
    "lora_alpha": "model.lora.alpha",
    "target_modules": "model.lora.targets",
    "use_peft": "model.lora (model.lora.rank=16 switches it on)",
    "ppo_mini_batch_size": "algo.mini_batches (how many, not how large)",
    "mini_batch_size": "algo.mini_batches (how many, not how large)",
    "ppo_epochs": "algo.updates_per_batch",
    "num_iterations": "algo.updates_per_batch",
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

# What other trainers have and this one has not. Keys are matched when they contain the word.
NOT_SUPPORTED = {
    "multi_turn": "conversations of several turns are not supported: a rollout is one answer",
    "multiturn": "conversations of several turns are not supported: a rollout is one answer",
    "max_turns": "conversations of several turns are not supported: a rollout is one answer",
    "tool": "tool calls are not supported: a rollout is one answer",
    "critic": "a critic is not supported: the baseline is the belief, or the other rollouts of the prompt",
    "value_model": "a value model is not supported: the baseline is the belief, or the other rollouts of the prompt",
    "vf_coef": "a value model is not supported: the baseline is the belief, or the other rollouts of the prompt",
    "gae": "a critic is not supported, and so GAE is not; see algo.advantage",
    "reward_model": "a learned reward model is not supported: rewards come from verifier.fn, which may call one",
    "quantization": "quantised weights are not supported; see rollout.dtype and learner.dtype",
    "load_in_4bit": "quantised weights are not supported; see rollout.dtype and learner.dtype",
    "megatron": "Megatron is not supported: the learner is DeepSpeed (learner.zero_stage)",
    "fsdp": "FSDP is not supported: the learner is DeepSpeed (learner.zero_stage)",
    "pipeline_parallel": "pipeline parallelism is not supported; see learner.zero_stage and tensor_parallel_size",
    "sequence_parallel": "sequence parallelism is not supported; see learner.max_tokens_per_rank",
    "sglang": "SGLang is not supported: generators are vLLM engines",
    "images": "pictures are not supported: prompts are text",
    "multimodal": "pictures are not supported: prompts are text",
}


def section_types(section: str) -> list[type[Section]]:
    """The models that a section may be: one, or for the curriculum one a method."""
    annotation = Config.model_fields[section].annotation
    return list(METHODS.values()) if section == "curriculum" else [annotation]  # type: ignore[list-item]


def known_keys() -> list[str]:
    """Every dotted key, in the order of the configuration; those of the curriculum for all methods."""
    names = [
        f"{section}.{name}"
        for section in Config.model_fields
        for t in section_types(section)
        for name in t.model_fields
    ]
    return list(dict.fromkeys(names))


def load_config(path: str | Path | None, overrides: list[str] | tuple[str, ...] = ()) -> Config:
    """Read ``path`` (.yaml, .yml or .toml; None: the defaults), apply ``section.key=value`` overrides, validate.

    An override wins over the file, also where it leaves a key of the file without effect: with
    ``curriculum.method=uniform`` the file's ``curriculum.tau`` is dropped.

    Raises:
        ConfigError: missing or unreadable file, malformed override, unknown key (with the nearest known
            one), a key without effect, value out of bounds, or an unsatisfiable combination.
    """
    tree = _read_tree(Path(path)) if path is not None else {}
    where = path or "on the command line"
    written = {f"{section}.{key}": "" for section, body in tree.items() if isinstance(body, dict) for key in body}
    idle_in_file = without_effect(tree)
    for override in overrides:
        written.pop(_apply_override(tree, override), None)
    _reject_unknown(tree, str(where))
    drop_without_effect(tree, set(written) - set(idle_in_file))
    if idle := without_effect(tree):
        lines = [f"{key} has no effect {why}; remove it" for key, why in idle.items()]
        raise ConfigError(f"configuration {where}:\n  " + "\n  ".join(lines))
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        lines = [_explain(e) for e in error.errors()]
        raise ConfigError(f"configuration {where}:\n  " + "\n  ".join(lines)) from None


def without_effect(tree: Tree) -> dict[str, str]:
    """Dotted keys of ``tree`` that nothing would read beside its other settings -> why."""
    idle: dict[str, str] = {}
    for section, body in tree.items():
        if section not in Config.model_fields or not isinstance(body, dict):
            continue
        kind, known = section_types(section)[0], body
        if section == "curriculum":
            method = body.get("method", "cures")
            if method not in METHODS:
                continue
            kind, known = METHODS[method], {key: v for key, v in body.items() if key in METHODS[method].model_fields}
            others = {key: methods_with(key) for key in body if key not in known}
            idle |= {
                f"curriculum.{key}": f"with method = {method} (it belongs to {', '.join(methods)})"
                for key, methods in others.items()
                if methods
            }
        reasons = kind.model_construct(**known).without_effect()
        idle |= {f"{section}.{key}": why for key, why in reasons.items() if key in body}
    return idle


def drop_without_effect(tree: Tree, keys: set[str]) -> None:
    """Remove those of the dotted ``keys`` from ``tree`` that have no effect in it."""
    for dotted in keys & set(without_effect(tree)):
        section, _, key = dotted.partition(".")
        del tree[section][key]


def merged(base: Tree, over: Tree) -> Tree:
    """``over`` on top of ``base``, without those keys of ``base`` that it leaves without effect."""
    tree = {section: {**base.get(section, {}), **over.get(section, {})} for section in base | over}
    drop_without_effect(tree, {f"{s}.{key}" for s, body in base.items() for key in body if key not in over.get(s, {})})
    return tree


def _read_tree(path: Path) -> Tree:
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


def _apply_override(tree: Tree, override: str) -> str:
    """Write one override into ``tree``; its dotted key."""
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
    return ".".join(parts)


def _is_text(parts: list[str]) -> bool:
    """Whether the key takes any text: a folder may be called 2024, and nothing means the empty text."""
    if len(parts) != 2 or parts[0] not in Config.model_fields:
        return False
    fields = [kind.model_fields.get(parts[1]) for kind in section_types(parts[0])]
    return any(field is not None and field.annotation is str for field in fields)


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


def _reject_unknown(tree: Tree, where: str) -> None:
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
            known = {name for kind in section_types(section) for name in kind.model_fields}
            problems += [_unknown(f"{section}.{k}") for k in body if k not in known]
    if problems:
        raise ConfigError(f"configuration {where}:\n  " + "\n  ".join(problems))


def _unknown(name: str) -> str:
    last = name.split(".")[-1]
    translated = TRANSLATIONS.get(name) or TRANSLATIONS.get(last)
    if translated:
        return f"unknown key {name}: here it is {translated}"
    for word, why in NOT_SUPPORTED.items():
        if word in name.lower().replace("-", "_"):
            return f"unknown key {name}: {why}"
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
    """One line: key = value: what is wrong. Rules between keys name them in their own text."""
    parts = [str(p) for p in error["loc"]]
    if parts[:1] == ["curriculum"] and len(parts) > 1 and parts[1] in METHODS:
        del parts[1]  # the tag of the union
    where, message = ".".join(parts), error["msg"].removeprefix("Value error, ")
    if error["type"] == "union_tag_invalid":
        return f"{where}.method = {error['ctx']['tag']!r}: {' | '.join(METHODS)} is expected"
    if isinstance(error["input"], dict):
        return f"{where}: {message}" if where else message
    return f"{where} = {error['input']!r}: {message}" if where else message
