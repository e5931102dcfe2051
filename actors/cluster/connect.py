"""To a Ray cluster: the one that is named, or one that is started here."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray

from cures_ray.config import Config

QUIET = {
    "PYTHONWARNINGS": "ignore",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_PROFILING": "1",  # phases of a task in `ray timeline`
}

# Tasks that Ray's GCS remembers for `ray timeline`, 3 KB each. Every call of an actor is one, 45 a step in a small run.
# Ray's own limit is 100 000, and the GCS grows until there.
TASK_EVENTS = 10_000


def start_ray(config: Config) -> bool:
    """Connect to the cluster of ``ray.address`` or RAY_ADDRESS, or start one here. True: started here. A cluster that
    merely happens to run on this machine is never joined."""
    if ray.is_initialized():
        return False
    address = config.ray.address or os.environ.get("RAY_ADDRESS")
    common: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR", "runtime_env": {"env_vars": QUIET}}
    if address:
        ray.init(address=address, **common)
        return False
    _leave_no_token(config)
    own: dict[str, Any] = {
        "address": "local",
        "num_cpus": config.ray.num_cpus,
        "num_gpus": config.ray.num_gpus,
        "include_dashboard": config.ray.dashboard,
        "object_store_memory": config.ray.object_store_mb << 20,
        "_system_config": {"task_events_max_num_task_in_gcs": TASK_EVENTS},
    }
    try:
        ray.init(**own, **common)
    except Exception as error:  # Ray gives its node 30 s to register, which a busy machine may miss once
        if "timed out during startup" not in str(error):
            raise
        ray.shutdown()
        ray.init(**own, **common)
    return True


def _leave_no_token(config: Config) -> None:
    """A Ray that starts here protects itself by a token. Without one it would write one into the home folder; every
    later `ray start` would ask for it, while `ray job submit` would not send it (401). A token of this process' own
    does as well; only Ray's dashboard needs one that a person can look up."""
    kept = Path.home() / ".ray" / "auth_token"
    named = any(name in os.environ for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"))
    if not (named or kept.exists() or config.ray.dashboard):
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)


@contextmanager
def own_ray(config: Config) -> Iterator[None]:
    """``start_ray`` for the length of a block; ended afterwards if it was started here."""
    started_here = start_ray(config)
    try:
        yield
    finally:
        if started_here:
            ray.shutdown()
