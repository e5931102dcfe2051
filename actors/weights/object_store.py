"""Road ``object_store``: the learner puts the stream in Ray's object store, and each node fetches it once.

    learner --put--> chunks --Ray, once a node--> one generator of the node --> file in /dev/shm --> all its engines

There is no group to build: a generator that joins late or was replaced reads the newest version like any other. It
works on CPUs and GPUs, and any number of nodes. The learner's object store must hold two versions, and /dev/shm of
each node two more.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from actors.weights.backend import KEPT_VERSIONS, Info, Node, Settings
from actors.weights.shm import SHM_ROOT, owned_folder, receive, version_path, write_version

if TYPE_CHECKING:
    from actors.weights.stream import Source

__all__ = ["Publisher", "end", "receive", "update_info"]
AHEAD = 8  # chunks that travel while one is written


class Publisher:
    kept = True

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self._token = uuid.uuid4().hex[:12]  # versions count anew where a learner starts anew
        self._held: dict[int, list[Any]] = {}  # an object lives as long as a reference to it

    def publish(self, source: Source, version: int) -> Info:
        from actors.weights.stream import chunks, total_bytes

        if self.settings.rank:
            source.assist()
            return {}
        self._held.pop(version, None)
        self._held[version] = [ray.put(chunk.numpy()) for chunk in chunks(source, version, self.settings.chunk_bytes)]
        for old in list(self._held)[:-KEPT_VERSIONS]:
            del self._held[old]
        size = total_bytes(source, version)
        return {"backend": "object_store", "token": self._token, "chunks": self._held[version], "bytes": size}

    def close(self) -> None:
        self._held.clear()


def update_info(info: Info, version: int, node: Node) -> Info:
    """The node's file of ``version``. The first generator of the node writes it, the others wait for that.

    Raises:
        GetTimeoutError: a chunk did not arrive within ``node.timeout_s``.
        TimeoutError: another generator of the node did not finish within ``node.timeout_s``.
    """
    own = node.folder or node_folder()
    folder = own / info["token"]
    path = version_path(folder, version)
    with _one_at_a_time(own / "lock", node.timeout_s):
        if not path.exists():
            for other in own.iterdir():  # of a learner that is gone
                if other.is_dir() and other != folder:
                    shutil.rmtree(other, ignore_errors=True)
            write_version(folder, version, info["bytes"], _fetched(info["chunks"], node.timeout_s))
    return {"path": str(path)}


def _fetched(chunks: list[Any], timeout_s: float) -> Iterator[Any]:
    for i, chunk in enumerate(chunks):
        ray.wait(chunks[i : i + AHEAD], num_returns=1, timeout=0, fetch_local=True)  # begin to fetch the next ones
        yield ray.get(chunk, timeout=timeout_s)


@contextmanager
def _one_at_a_time(lock: Path, timeout_s: float) -> Iterator[None]:
    """Held by one process of the machine; the kernel frees it when that process dies."""
    deadline = time.monotonic() + timeout_s
    with lock.open("w") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise TimeoutError(f"another generator of this node held {lock} for {timeout_s:.0f} s") from None
                time.sleep(0.01)
        yield


def node_folder() -> Path:
    """This Ray job's folder for weights on this Ray node. Its owner is the node's raylet, this process' parent."""
    context = ray.get_runtime_context()
    return owned_folder(_label(context.get_job_id(), context.get_node_id()), os.getppid())


def _label(job: str, node: str) -> str:
    return f"{job}-{node[:12]}"


def end(timeout_s: float = 10.0) -> None:
    """Remove this job's folders on all living nodes."""
    job = ray.get_runtime_context().get_job_id()

    def remove(label: str) -> None:
        for folder in SHM_ROOT.glob(f"*.{label}"):
            shutil.rmtree(folder, ignore_errors=True)

    task = ray.remote(remove)
    pending = []
    for node in ray.nodes():
        if node["Alive"]:
            place = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            options = task.options(num_cpus=0, max_retries=0, scheduling_strategy=place)
            pending.append(options.remote(_label(job, node["NodeID"])))
    with suppress(Exception):  # a node may be leaving: its folder goes with it, or with the next run there
        ray.wait(pending, num_returns=len(pending), timeout=timeout_s)
