"""``cures submit CONFIG [section.key=value ...]``: train as a Ray job on a running cluster.

What `ray job submit` needs to be told is done here: paths become absolute, the command is this environment's Python, a
token is sent where the cluster asks for one, and stopping leaves time to write a checkpoint. Submit the same
configuration again to continue a stopped run.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml

from cures_ray.config import Config
from cures_ray.config_load import load_config
from cures_ray.messages import ConfigError
from cures_ray.run.paths import absolute_paths

STOP_SECONDS = 300  # Ray kills a stopped job after 3 s otherwise, before it has written its checkpoint


def main(argv: list[str]) -> int:
    """Exit codes: 0 succeeded (or submitted, with --no-wait), 1 failed or stopped, 2 bad input."""
    parser = argparse.ArgumentParser(prog="cures submit", description=__doc__.splitlines()[0])
    parser.add_argument("config", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument("--address", default="http://127.0.0.1:8265", help="of the cluster's dashboard")
    parser.add_argument("--python", default=sys.executable, help="on the cluster's head node")
    parser.add_argument("--no-wait", action="store_true", help="do not follow the job's log")
    args = parser.parse_intermixed_args(argv)
    config = load_config(args.config, args.overrides)
    client = connect(args.address)
    job = submit(client, config, args.python)
    print(f"submitted {job}; run folder {absolute_paths(config)['checkpoint.dir']}")
    token = "RAY_AUTH_MODE=token " if os.environ.get("RAY_AUTH_MODE") == "token" else ""
    print(f"stop it:  {token}ray job stop --address {args.address} {job}")
    return 0 if args.no_wait else follow(client, job)


def connect(address: str) -> Any:
    """A client of the cluster's job server.

    Raises:
        ConfigError: nobody answers there.
    """
    named = any(name in os.environ for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"))
    if "RAY_AUTH_MODE" not in os.environ and (named or (Path.home() / ".ray" / "auth_token").exists()):
        os.environ["RAY_AUTH_MODE"] = "token"  # `ray start` asks for it wherever a token lies in the home folder
    from ray.job_submission import JobSubmissionClient  # reads the mode when it is imported

    try:
        return JobSubmissionClient(address)
    except (ConnectionError, RuntimeError) as error:
        raise ConfigError(
            f"no job server answers at {address} ({str(error).splitlines()[0]}); start one with `ray start --head`, or "
            f"pass --address"
        ) from None


def submit(client: Any, config: Config, python: str = sys.executable) -> str:
    """Submit ``config`` with absolute paths; the job's id. Only the configuration is uploaded: code comes from
    ``python``'s environment, which every node must have."""
    tree = config.model_dump(mode="json")
    for key, path in absolute_paths(config).items():
        section, name = key.split(".")
        tree[section][name] = path
    tree["ray"]["address"] = None  # a job knows its cluster
    with tempfile.TemporaryDirectory(prefix="cures-submit-") as folder:
        (Path(folder) / "config.yaml").write_text(yaml.safe_dump(tree, sort_keys=False))
        command = f"exec {shlex.quote(python)} -m actors.commands.cli train config.yaml"
        environment = {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_SECONDS), "PYTHONUNBUFFERED": "1"}
        runtime = {"working_dir": folder, "env_vars": environment}
        return str(client.submit_job(entrypoint=command, runtime_env=runtime))


def follow(client: Any, job: str) -> int:
    """Print the job's log until it ends. Ctrl-C leaves the job running and says so."""
    shown = 0
    try:
        while True:
            status = client.get_job_status(job)
            log = client.get_job_logs(job)
            print(log[shown:], end="", flush=True)
            shown = len(log)
            if status.is_terminal():
                print(f"\n{job}: {status}")
                return 0 if str(status) == "SUCCEEDED" else 1
            time.sleep(1.0)
    except KeyboardInterrupt:
        print(f"\n{job} goes on; stop it with `ray job stop {job}`", file=sys.stderr)
        return 130
