"""The tokenizer of ``model.path``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cures_ray.config import ModelConfig
from cures_ray.messages import ConfigError


def load_tokenizer(config: ModelConfig) -> Any:
    """The tokenizer of ``model.path``, with a pad token.

    Raises:
        ConfigError: the folder does not exist, holds no tokenizer, or the tokenizer has no end token.
    """
    from transformers import AutoTokenizer

    path = Path(config.path)
    looks_local = path.is_absolute() or config.path.startswith((".", "~")) or config.path.count("/") > 1
    looks_local |= len(path.parts) > 1 and Path(path.parts[0]).is_dir()  # runs/modle is a typo, not a Hub name
    if not path.exists() and looks_local:
        raise ConfigError(
            f"model.path = {config.path} does not exist (looked in {Path.cwd()}); "
            "`cures prepare` makes the model of the demo"
        )
    if path.is_dir() and not any(
        (path / n).exists() for n in ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")
    ):
        found = ", ".join(sorted(p.name for p in path.iterdir())[:8]) or "nothing"
        raise ConfigError(f"model.path = {config.path} holds no tokenizer (tokenizer.json); found {found}")
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            config.path, revision=config.revision, trust_remote_code=config.trust_remote_code
        )
    except Exception as error:  # transformers raises many types here
        first_line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ConfigError(f"model.path = {config.path}: the tokenizer cannot be loaded: {first_line}") from None
    if tokenizer.eos_token_id is None:
        raise ConfigError(f"model.path = {config.path}: the tokenizer has no eos_token; generation would never end")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer
