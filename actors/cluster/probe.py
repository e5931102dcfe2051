"""Before engines start: can every node that a role lies on read and write what the role needs?

The learner's ranks write checkpoints that the driver reads back; generators and ranks read the model; verifiers read
the user's reward file. On one machine nothing is asked. On several, each node is shown a file that was just written,
and writes one itself.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cures_ray.config import Config
from cures_ray.messages import ConfigError

PROBE_SECONDS = 60.0


def needs(config: Config) -> dict[str, list[tuple[str, Path]]]:
    """By role: (configuration key, absolute path) of the files that it reads. A Hub name is no file."""
    model = Path(config.model.path).absolute()
    reads: dict[str, list[tuple[str, Path]]] = {"learner": [], "generator": [], "verifier": []}
    if model.exists():
        reads["learner"].append(("model.path", model))
        reads["generator"].append(("model.path", model))
    reward = Path(config.verifier.fn.rpartition(":")[0]).absolute()
    if reward.suffix == ".py":
        reads["verifier"].append(("verifier.fn", reward))
    return reads


def check_shared(config: Config, run_dir: Path, nodes_of: Mapping[str, Iterable[str]]) -> None:
    """``nodes_of``: the Ray node ids that each role lies on.

    Raises:
        ConfigError: a node cannot see a path, or sees another file there; with node, role, key and remedy.
    """
    here = ray.get_runtime_context().get_node_id()
    roles: dict[str, list[str]] = {}
    for role, nodes in nodes_of.items():
        for node in set(nodes) - {here}:
            roles.setdefault(node, []).append(role)
    if not roles:
        return
    reads, run_dir = needs(config), run_dir.absolute()
    nonce = uuid.uuid4().hex
    mark = run_dir / f".probe-{nonce}"
    mark.write_text(nonce)
    try:
        problems = [p for node, own in roles.items() for p in _ask(node, own, mark, nonce, reads)]
    finally:
        for file in run_dir.glob(f".probe-{nonce}*"):
            file.unlink(missing_ok=True)
    if problems:
        raise ConfigError(
            "not every node can reach the files of this run:\n  "
            + "\n  ".join(problems)
            + "\nUse folders that all nodes share (NFS, a bucket that is mounted), the same path on each."
        )


def _ask(node: str, roles: list[str], mark: Path, nonce: str, reads: dict[str, list[tuple[str, Path]]]) -> list[str]:
    task = ray.remote(_look).options(
        num_cpus=0, max_retries=1, scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)
    )
    wanted = [(role, key, str(path)) for role in sorted(roles) for key, path in reads.get(role, [])]
    try:
        address, unseen, written = ray.get(task.remote(str(mark), nonce, node, wanted), timeout=PROBE_SECONDS)
    except Exception as error:
        return [f"node {node[:12]} did not answer: {type(error).__name__}: {str(error).splitlines()[0]}"]
    who = f"node {address} ({', '.join(sorted(roles))})"
    problems = [f"{who}: {key} = {path} does not exist there" for _, key, path in unseen]
    if "learner" in roles and not (written and mark.with_name(f"{mark.name}.{node}").exists()):
        problems.append(f"{who}: checkpoint.dir = {mark.parent} is not the same folder there")
    return problems


def _look(mark: str, nonce: str, node: str, wanted: list[tuple[str, str, str]]) -> tuple[str, list[Any], bool]:
    """On the node: (address, what of ``wanted`` is not there, whether the mark was seen and answered)."""
    unseen = [entry for entry in wanted if not os.path.exists(entry[2])]
    file, written = Path(mark), False
    try:
        if file.read_text() == nonce:
            file.with_name(f"{file.name}.{node}").write_text(nonce)
            written = True
    except OSError:
        pass
    return ray.util.get_node_ip_address(), unseen, written
