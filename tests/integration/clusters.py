"""Ray clusters on this machine, each in a temporary folder of its own."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
from ray.cluster_utils import Cluster

ROOT = Path(__file__).resolve().parents[2]


@contextmanager
def head_node(
    cpus: int = 4, object_store_mb: int = 300, system_config: dict[str, Any] | None = None
) -> Iterator[Cluster]:
    """A node with the custom resource "first"; this process is connected to it."""
    os.environ["PYTHONPATH"] = f"{ROOT}:{ROOT / 'tests/integration'}:{os.environ.get('PYTHONPATH', '')}"
    undecided = "RAY_AUTH_MODE" not in os.environ  # an earlier Ray of this process has decided
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")  # else nodes that find a token at home would ask for it
    folder = tempfile.mkdtemp(prefix="cr", dir="/tmp")  # short: sockets' paths are at most 107 characters long
    cluster = Cluster(
        initialize_head=True,
        head_node_args={
            "num_cpus": cpus,
            "resources": {"first": 100},
            "object_store_memory": object_store_mb << 20,
            "temp_dir": folder,
            "include_dashboard": False,
            "_system_config": system_config,
        },
    )
    try:
        ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
        yield cluster
    finally:
        ray.shutdown()
        cluster.shutdown()
        shutil.rmtree(folder, ignore_errors=True)
        if undecided:
            os.environ.pop("RAY_AUTH_MODE")


@contextmanager
def two_node_cluster(cpus: int = 4, object_store_mb: int = 300) -> Iterator[Cluster]:
    """Nodes with the custom resources "first" and "second"; this process is connected to the first."""
    with head_node(cpus, object_store_mb) as cluster:
        temp_dir = cluster.head_node.get_temp_dir_path()
        store = object_store_mb << 20
        cluster.add_node(num_cpus=cpus, resources={"second": 100}, object_store_memory=store, temp_dir=temp_dir)
        cluster.wait_for_nodes(60)
        yield cluster
