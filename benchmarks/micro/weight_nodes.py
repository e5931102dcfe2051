"""What weights cost between two nodes: ``cures bench weight-nodes [--repeats 5] [--mib 128 512]``.

Two Ray nodes on this machine. A learner on the first publishes to the object store; 1, 2 and 4 generators on the second
receive, without engines: one lays the file down, all map it and read every byte. Reported: seconds to publish; seconds
until the last generator has everything, in units of two copies of the same bytes in memory (what a put and a file must
cost); and the bytes that crossed between the nodes, in units of the weights (1: once a node, whatever the generators).
Bytes are those of the loopback device: other programs that use it count too.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from typing import Any

import numpy as np
import psutil
import ray
import torch
from ray.cluster_utils import Cluster

from actors.weights import object_store
from actors.weights.backend import Node, Settings
from actors.weights.stream import Source
from benchmarks.harness.results_file import spread, write_result

GENERATORS = (1, 2, 4)
TENSOR_BYTES = 4 << 20


class Learner:
    """Publishes ``mib`` of float32 weights."""

    def __init__(self, mib: int) -> None:
        self.publisher = object_store.Publisher(Settings(backend="object_store", folder=None))
        self.module = torch.nn.Module()
        for i in range(mib * 2**20 // TENSOR_BYTES):
            self.module.register_parameter(f"w{i}", torch.nn.Parameter(torch.rand(TENSOR_BYTES // 4)))

    def publish(self, version: int) -> tuple[dict[str, Any], float]:
        began = time.perf_counter()
        info = self.publisher.publish(Source(self.module), version)
        return info, time.perf_counter() - began


class Generator:
    """A generator's receiving half."""

    def receive(self, info: dict[str, Any], version: int) -> float:
        update = object_store.update_info(info, version, Node()) | {"version": version}
        return sum(float(t[::1024].sum()) for _, t in object_store.receive(update, torch.device("cpu"), 0))


def two_copies(mib: int) -> float:
    """Seconds to copy ``mib`` in memory twice, into memory that was never touched, as a new file's is."""
    source = np.ones(mib << 20, np.uint8)
    began = time.perf_counter()
    for _ in range(2):
        np.copyto(np.empty_like(source), source)
    return time.perf_counter() - began


def measure(mib: int, repeats: int) -> list[dict[str, Any]]:
    """One row a version; numbers of generators alternate, and the first round (warm-up) is left out."""
    learner: Any = ray.remote(Learner).options(num_cpus=0.1, resources={"first": 1}).remote(mib)
    actor: Any = ray.remote(Generator).options(num_cpus=0.1, resources={"second": 1})
    generators = [actor.remote() for _ in range(max(GENERATORS))]
    rows, version = [], 0
    for repeat in range(repeats + 1):
        for count in GENERATORS:
            version += 1
            info, publish_s = ray.get(learner.publish.remote(version))
            before, began = psutil.net_io_counters(pernic=True)["lo"].bytes_recv, time.perf_counter()
            ray.get([g.receive.remote(info, version) for g in generators[:count]])
            seconds = time.perf_counter() - began
            crossed = psutil.net_io_counters(pernic=True)["lo"].bytes_recv - before
            row = {"mib": mib, "generators": count, "publish_s": publish_s, "receive_s": seconds}
            row |= {"two_copies_s": two_copies(mib), "crossed": crossed / info["bytes"]}
            if repeat:
                rows.append(row)
    object_store.end()
    for handle in (learner, *generators):
        ray.kill(handle)
    return rows


def summarize(rows: list[dict[str, Any]]) -> dict[str, list[float]]:
    """[low, median, high] by size and number of generators."""
    figures: dict[str, list[float]] = {}
    for mib, count in sorted({(r["mib"], r["generators"]) for r in rows}):
        own = [r for r in rows if (r["mib"], r["generators"]) == (mib, count)]
        name = f"{mib}MiB_{count}_generators"
        figures[f"{name}_publish_s"] = spread([r["publish_s"] for r in own])
        figures[f"{name}_receive_s"] = spread([r["receive_s"] for r in own])
        total = [(r["publish_s"] + r["receive_s"]) / r["two_copies_s"] for r in own]
        figures[f"{name}_total_over_two_copies"] = spread(total)
        figures[f"{name}_crossed_over_weights"] = spread([r["crossed"] for r in own])
    return figures


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--mib", type=int, nargs="*", default=[128, 512])
    args = parser.parse_args(argv)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="cb", dir="/tmp") as folder:
        store = 4 * max(args.mib) << 20
        common = {"num_cpus": 4, "object_store_memory": store, "temp_dir": folder, "include_dashboard": False}
        cluster = Cluster(initialize_head=True, head_node_args={"resources": {"first": 100}, **common})
        cluster.add_node(resources={"second": 100}, **common)
        ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
        try:
            for mib in args.mib:
                rows += measure(mib, args.repeats)
        finally:
            ray.shutdown()
            cluster.shutdown()
    figures = summarize(rows)
    path = write_result("weight_nodes", figures, rows)
    for figure, (low, median, high) in figures.items():
        print(f"{figure:48} {median:.4g}  [{low:.4g}, {high:.4g}]")
    print(f"written to {path}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
