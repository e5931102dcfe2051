"""Paths of a configuration: made absolute for a job, and refused where a job would lose them.

`ray job submit` copies the working directory to a temporary folder of each node and runs the command there. A
relative path then means that copy: what is written there is lost with it, and what git ignores (models, data, runs)
is not in it.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from cures_ray.config import Config
from cures_ray.messages import ConfigError

READ = ("model.path", "data.train", "data.eval")
JOB_VARIABLE = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # set by Ray for the command of a job


def in_ray_job() -> bool:
    return JOB_VARIABLE in os.environ or "runtime_resources" in Path.cwd().parts


def check_job_paths(config: Config) -> None:
    """Raises ConfigError in a Ray job whose paths are relative, with the reason."""
    if not in_ray_job():
        return
    remedy = "give an absolute path on storage that all nodes share, or submit with `cures submit`, which does"
    if not Path(config.checkpoint.dir).is_absolute():
        raise ConfigError(
            f"checkpoint.dir = {config.checkpoint.dir} is relative, and a Ray job runs in a temporary folder "
            f"({Path.cwd()}): checkpoints and logs would be lost with it; {remedy}"
        )
    for key in READ:
        value = _get(config, key)
        if value and _is_local(value) and not Path(value).exists():
            raise ConfigError(
                f"{key} = {value} does not exist in {Path.cwd()}, Ray's copy of the directory that was submitted; what "
                f"git ignores is not copied; {remedy}"
            )


def absolute_paths(config: Config) -> dict[str, str]:
    """``section.key`` -> absolute path of each relative path that is a file here, and of ``checkpoint.dir``."""
    found = {"checkpoint.dir": str(Path(config.checkpoint.dir).absolute())}
    for key in READ:
        value = _get(config, key)
        if value and Path(value).exists():
            found[key] = str(Path(value).absolute())
    file, colon, function = config.verifier.fn.rpartition(":")
    if file.endswith(".py") and Path(file).exists():
        found["verifier.fn"] = f"{Path(file).absolute()}{colon}{function}"
    if config.checkpoint.resume not in ("auto", "none"):
        found["checkpoint.resume"] = str(Path(config.checkpoint.resume).absolute())
    return found


def _get(config: Config, key: str) -> Any:
    section, name = key.split(".")
    value = getattr(getattr(config, section), name)
    return value if isinstance(value, str) else None


def _is_local(value: str) -> bool:
    """Whether ``value`` is meant as a path: more than "name" or "owner/name", or with the ending of a data file."""
    path = Path(value)
    return path.is_absolute() or value.startswith(".") or value.count("/") > 1 or path.suffix in (".jsonl", ".parquet")
