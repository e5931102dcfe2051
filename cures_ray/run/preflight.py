"""Everything that can be checked before an actor starts. Raises ConfigError: what, where, what to do."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cures_ray.config import Config
from cures_ray.data.table import PromptTable, check_disjoint, load_prompts, load_tokenizer
from cures_ray.messages import ConfigError
from cures_ray.run.checkpoint import CheckpointStore
from cures_ray.verify.pool import self_test


@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    """What a run needs, loaded and checked."""

    config: Config
    run_dir: Path
    tokenizer: Any
    train: PromptTable
    eval: PromptTable | None
    resume: Path | None
    notes: list[str]


def prepare_inputs(config: Config, *, claim_run_dir: bool = True, test_verifier: bool = True) -> Inputs:
    """Load and check model path, data, verifier and run folder of ``config``."""
    for key, value in (("model.path", config.model.path), ("data.train", config.data.train)):
        if not value:
            raise ConfigError(f"{key} is not set; write it in the configuration or pass {key}=...")
    notes: list[str] = []
    run_dir = Path(config.checkpoint.dir)
    resume: Path | None = None
    if claim_run_dir:
        resume, remarks = claim(run_dir, config)
        notes += remarks
    tokenizer = load_tokenizer(config.model)
    train = load_prompts(config.data, tokenizer, "train")
    notes.append(f"train: {train.report}")
    evaluation = None
    if config.data.eval:
        evaluation = load_prompts(config.data, tokenizer, "eval")
        notes.append(f"eval: {evaluation.report}")
        check_disjoint(train, evaluation)
    elif config.eval.interval:
        notes.append("data.eval is not set: no held-out evaluation")
    if config.logging.wandb and importlib.util.find_spec("wandb") is None:
        raise ConfigError("logging.wandb = true, but wandb is not installed: pip install wandb, or set it to false")
    if test_verifier:
        self_test(config, train.row(0))
    return Inputs(
        config=config, run_dir=run_dir, tokenizer=tokenizer, train=train, eval=evaluation, resume=resume, notes=notes
    )


def claim(run_dir: Path, config: Config) -> tuple[Path | None, list[str]]:
    """Make ``run_dir`` this run's own folder, or find the checkpoint to resume in it, and what is worth a remark:
    checkpoints that were passed over, settings that differ from those of the last start.

    Raises:
        ConfigError: not writable, holds another run, or holds a run that ``checkpoint.resume`` = none would
            overwrite.
    """
    identity = fingerprint(config)
    record = run_dir / "run.json"
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        if not os.access(run_dir, os.W_OK):
            raise PermissionError("not writable")
        if holds_run(run_dir):
            if not record.exists():
                raise ConfigError(f"checkpoint.dir = {run_dir} holds files of an unknown run; choose another folder")
            _check_same_run(record, identity, config)
        store = CheckpointStore(run_dir, config.checkpoint.keep)
        resume, problems = store.resolve(config.checkpoint.resume)
        remarks = [f"checkpoint passed over: {p}" for p in problems]
        if resume is not None and record.exists():
            remarks += changed_settings(json.loads(record.read_text())["config"], config.model_dump(mode="json"))
        if resume is None and (run_dir / "metrics.jsonl").exists():
            _set_aside(run_dir)
        record.write_text(json.dumps({"identity": identity, "config": config.model_dump(mode="json")}, indent=1))
    except OSError as error:
        raise ConfigError(f"checkpoint.dir = {run_dir} cannot be written: {error}; choose another folder") from None
    return resume, remarks


def changed_settings(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """One remark a key whose value a resumed run changes."""
    return [
        f"resumed with another {section}.{key}: {old.get(section, {}).get(key)} before, {value} now"
        for section, values in new.items()
        for key, value in values.items()
        if key in old.get(section, {}) and old[section][key] != value
    ]


def holds_run(run_dir: Path) -> bool:
    """Whether a step was trained here. A try that ended before that leaves the folder free: the next one may have
    other data or another model, and what was logged is set aside."""
    if any(run_dir.glob("checkpoints/step-*")):
        return True
    log = run_dir / "metrics.jsonl"
    return log.exists() and '"step": ' in log.read_text()


def fingerprint(config: Config) -> dict[str, str]:
    """What must not change between the parts of one run."""
    curriculum = hashlib.sha256(config.curriculum.model_dump_json().encode()).hexdigest()[:12]
    return {
        "model.path": config.model.path,
        "data.train": config.data.train,
        "trainer.seed": str(config.trainer.seed),
        "verifier.fn": config.verifier.fn,
        "curriculum": curriculum,
    }


def _check_same_run(record: Path, identity: dict[str, str], config: Config) -> None:
    if config.checkpoint.resume == "none":
        raise ConfigError(
            f"checkpoint.dir = {record.parent} holds a run already; choose another folder, delete it, or set "
            "checkpoint.resume=auto to continue it"
        )
    old = json.loads(record.read_text())["identity"]
    changed = [f"{k}: {old.get(k)} there, {v} here" for k, v in identity.items() if old.get(k) != v]
    if changed:
        raise ConfigError(
            f"checkpoint.dir = {record.parent} holds another run ({'; '.join(changed)}); choose another folder"
        )


def _set_aside(run_dir: Path) -> None:
    """A run that ended before its first checkpoint starts over; its logs and journal are kept under another name."""
    number = 1 + sum(1 for _ in run_dir.glob("abandoned-*"))
    target = run_dir / f"abandoned-{number}"
    target.mkdir()
    for name in ("metrics.jsonl", "samples.jsonl", "tensorboard", "ledger"):
        if (run_dir / name).exists():
            (run_dir / name).rename(target / name)
