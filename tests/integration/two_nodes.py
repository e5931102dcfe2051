"""A Ray cluster of two nodes on this machine, in a temporary folder of its own."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import ray
from ray.cluster_utils import Cluster

ROOT = Path(__file__).resolve().parents[2]


@contextmanager
def two_node_cluster(cpus: int = 4, object_store_mb: int = 300) -> Iterator[Cluster]:
    """Nodes with the custom resources "first" and "second"; this process is connected to the first."""
    os.environ["PYTHONPATH"] = f"{ROOT}:{ROOT / 'tests/integration'}:{os.environ.get('PYTHONPATH', '')}"
    folder = tempfile.mkdtemp(prefix="cr", dir="/tmp")  # short: sockets' paths are at most 107 characters long
    store = object_store_mb << 20
    cluster = Cluster(
        initialize_head=True,
        head_node_args={
            "num_cpus": cpus,
            "resources": {"first": 100},
            "object_store_memory": store,
            "temp_dir": folder,
            "include_dashboard": False,
        },
    )
    try:
        cluster.add_node(num_cpus=cpus, resources={"second": 100}, object_store_memory=store, temp_dir=folder)
        cluster.wait_for_nodes(60)
        ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
        yield cluster
    finally:
        ray.shutdown()
        cluster.shutdown()
        shutil.rmtree(folder, ignore_errors=True)
