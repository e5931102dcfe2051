"""Everything that can be checked before an actor starts. Raises ConfigError: what, where, what to do."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cures_ray.config import Config
from cures_ray.data.table import PromptTable, check_disjoint, load_prompts, load_tokenizer
from cures_ray.messages import ConfigError
from cures_ray.run import trackers
from cures_ray.run.folder import RunFolder, claim
from cures_ray.run.paths import check_job_paths
from cures_ray.verify.self_test import self_test


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
    folder: RunFolder | None = None  # claimed until ``release``

    def release(self) -> None:
        """Leave the run folder to others."""
        if self.folder is not None:
            self.folder.lock.release()


def prepare_inputs(config: Config, *, claim_run_dir: bool = True, test_verifier: bool = True) -> Inputs:
    """Load and check model path, data, verifier and run folder of ``config``. The folder is locked from here on, and
    changed only when everything else is right."""
    if not claim_run_dir:
        return _load(config, test_verifier)
    check_job_paths(config)  # before a folder is made in the wrong place
    folder = claim(Path(config.checkpoint.dir), config)
    try:
        inputs = _load(config, test_verifier)
        folder.begin()
        _list_contaminated(inputs)
    except BaseException:
        folder.lock.release()
        raise
    return replace(inputs, resume=folder.resume, folder=folder, notes=[*folder.notes, *inputs.notes])


def _list_contaminated(inputs: Inputs) -> None:
    """``RUN/decontaminated.jsonl``: every training prompt that was dropped for its overlap with an evaluation set."""
    dropped = inputs.train.report.contaminated
    if dropped:
        lines = [json.dumps({"evaluation_set": name, "prompt": text}) + "\n" for name, text in dropped]
        (inputs.run_dir / "decontaminated.jsonl").write_text("".join(lines))


def _load(config: Config, test_verifier: bool) -> Inputs:
    for key, value in (("model.path", config.model.path), ("data.train", config.data.train)):
        if not value:
            raise ConfigError(f"{key} is not set; write it in the configuration or pass {key}=...")
    notes: list[str] = []
    run_dir = Path(config.checkpoint.dir)
    check_job_paths(config)
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
    trackers.check(config)
    if config.model.lora is not None and importlib.util.find_spec("peft") is None:
        raise ConfigError("model.lora is set, but peft is not installed: pip install peft, or set it to null")
    if test_verifier:
        self_test(config, train.row(0))
    return Inputs(
        config=config, run_dir=run_dir, tokenizer=tokenizer, train=train, eval=evaluation, resume=None, notes=notes
    )
