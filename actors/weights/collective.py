"""Roads ``nccl`` and ``gloo``: the learner's rank 0 sends the stream to one engine at a time of asking.

    engine's workers --request (id, version)--> store on rank 0 --> a thread of rank 0
    rank 0 + the engine's W workers: a group of 1 + W processes --> broadcasts of one chunk each --> the group ends

One implementation for both: only the device of the chunk differs, so that what the tests show on gloo holds for nccl.
Each transfer has a group of its own. A generator that was replaced asks again; one that dies takes nobody along; and
the learner trains on meanwhile, for rank 0 sends a copy that it took in host memory when it published.

Every wait has a deadline, ``timeout_s``: the rendezvous, and each chunk.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import uuid
from collections.abc import Iterator
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from actors.weights.backend import KEPT_VERSIONS, Info, Node, Settings
from actors.weights.stream import chunks, tensors, total_bytes

if TYPE_CHECKING:
    from torch import Tensor

    from actors.weights.stream import Source


class Publisher:
    kept = True

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self._held: dict[int, list[Tensor]] = {}  # version -> chunks in host memory
        self._closed = threading.Event()
        if settings.rank == 0:
            self._store = dist.TCPStore(settings.address, 0, is_master=True, wait_for_workers=False)
            self._where: Info = {
                "backend": settings.backend,
                "address": settings.address,
                "port": self._store.port,
                "timeout_s": settings.timeout_s,
                "chunk_bytes": settings.chunk_bytes,
            }
            threading.Thread(target=self._serve, name="weights", daemon=True).start()

    def publish(self, source: Source, version: int) -> Info:
        if self.settings.rank:
            source.assist()
            return {}
        held = self._held | {
            version: [self._copy(chunk) for chunk in chunks(source, version, self.settings.chunk_bytes)]
        }
        self._held = {v: held[v] for v in list(held)[-KEPT_VERSIONS:]}
        return self._where | {"bytes": total_bytes(source, version)}

    def _copy(self, chunk: Tensor) -> Tensor:
        return chunk.pin_memory() if self.settings.backend == "nccl" else chunk.clone()

    def close(self) -> None:
        self._closed.set()
        self._held = {}

    # -- sending, in threads -----------------------------------------------------------------------------

    def _serve(self) -> None:
        """Answer requests one after the other; each transfer runs in a thread of its own."""
        store = _client(self._where)
        number = 0
        while not self._closed.is_set():
            try:
                store.wait([f"request/{number}"], timedelta(seconds=1))
            except dist.DistStoreError:
                continue
            except dist.DistNetworkError:
                return  # the store is gone: this process ends
            request = json.loads(store.get(f"request/{number}"))
            number += 1
            held = self._held
            if request["version"] in held:
                store.set(f"answer/{request['id']}", "coming")
                arguments = (request["id"], 1 + request["workers"], held[request["version"]])
                threading.Thread(target=self._send, args=arguments, daemon=True).start()
            else:
                newest = max(held, default=None)
                store.set(f"answer/{request['id']}", f"version {request['version']} is gone, the newest is {newest}")

    def _send(self, transfer: str, size: int, stream: list[Tensor]) -> None:
        """A receiver that dies ends this transfer, within the deadline, and no other."""
        try:
            group = _group(self._where, transfer, 0, size)
            device = _device(self.settings.backend)
            for chunk in stream:
                group.broadcast(chunk.to(device), 0).wait()
        except Exception as error:
            if not self._closed.is_set():
                print(f"weights: a transfer ended: {error}"[:500], file=sys.stderr, flush=True)


def update_info(info: Info, version: int, node: Node) -> Info:
    return info | {"id": uuid.uuid4().hex, "workers": node.workers}


def receive(update: Info, device: torch.device, rank: int) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor), in each of the engine's workers.

    Raises:
        ValueError: the learner no longer holds this version.
        RuntimeError: the sender, or another worker of this engine, died or was silent for ``timeout_s``.
    """
    store = _client(update)
    if rank == 0:
        number = store.add("requests", 1) - 1
        request = {key: update[key] for key in ("id", "version", "workers")}
        store.set(f"request/{number}", json.dumps(request))
    answer = store.get(f"answer/{update['id']}").decode()
    if answer != "coming":
        raise ValueError(f"the learner cannot send these weights: {answer}")
    group = _group(update, update["id"], 1 + rank, 1 + update["workers"])
    yield from tensors(_broadcasts(group, update, device), update["version"], device)


def end() -> None:
    pass  # nothing lies anywhere


def _broadcasts(group: Any, update: Info, device: torch.device) -> Iterator[Tensor]:
    total, size = update["bytes"], update["chunk_bytes"]
    for begin in range(0, total, size):
        chunk = torch.empty(min(size, total - begin), dtype=torch.uint8, device=device)
        group.broadcast(chunk, 0).wait()
        yield chunk


def _client(where: Info) -> dist.TCPStore:
    """A connection of its own: waiting on one blocks all that use it."""
    timeout = timedelta(seconds=where["timeout_s"])
    return dist.TCPStore(where["address"], where["port"], is_master=False, timeout=timeout)


def _group(where: Info, transfer: str, rank: int, size: int) -> Any:
    """A process group of this transfer alone, beside whatever groups the process has. An nccl group raises at its
    deadline instead of ending the process."""
    timeout = timedelta(seconds=where["timeout_s"])
    store = dist.PrefixStore(transfer, _client(where))
    if where["backend"] == "gloo":
        return dist.ProcessGroupGloo(store, rank, size, timeout)
    os.environ.setdefault("TORCH_NCCL_BLOCKING_WAIT", "1")
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = timeout
    return dist.ProcessGroupNCCL(store, rank, size, options)


def _device(backend: str) -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if backend == "nccl" else torch.device("cpu")
