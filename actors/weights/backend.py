"""Which road the weights take, and the parts that each road has."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from cures_ray.config import Config
from cures_ray.messages import ConfigError

if TYPE_CHECKING:
    from torch import Tensor, device

    from actors.weights.stream import Source

Info = dict[str, Any]
KEPT_VERSIONS = 2  # a generator may still read the version before the newest
MODULES = {
    "shm": "actors.weights.shm",
    "object_store": "actors.weights.object_store",
    "nccl": "actors.weights.collective",
    "gloo": "actors.weights.collective",
    "ipc": "actors.weights.ipc",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What a publisher needs to know. ``folder``: this run's in /dev/shm on the driver's machine; ``address``: under
    which other nodes reach this learner rank; ``timeout_s``: of one transfer, without progress; ``chunk_bytes``: what
    travels at a time."""

    backend: str
    folder: Path
    rank: int = 0
    address: str = "127.0.0.1"
    timeout_s: float = 120.0
    chunk_bytes: int = 64 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """Where a generator runs. ``workers``: processes of its engine; ``folder``: of this run on this node, in /dev/shm,
    made where it is needed when None."""

    folder: Path | None = None
    workers: int = 1
    timeout_s: float = 120.0


class Publisher(Protocol):
    """The learner's side, one on every rank. ``kept``: it keeps the last two versions for generators that still read
    them; False: only the last."""

    kept: bool

    def publish(self, source: Source, version: int) -> Info:
        """Make the weights available; a collective over the learner's ranks. Rank 0's answer counts: the ``backend``,
        the ``bytes`` of the weights, and what `update_info` needs."""
        ...

    def close(self) -> None: ...


class Road(Protocol):
    """What every module of `MODULES` has."""

    Publisher: Any  # (Settings) -> Publisher

    def update_info(self, info: Info, version: int, node: Node) -> Info:
        """What the engine's workers are told: numbers, text and bytes. May block to fetch; the engine still runs."""
        ...

    def receive(self, update: Info, device: device, rank: int) -> Iterator[tuple[str, Tensor]]:
        """(name, tensor) of all parameters, in worker ``rank`` of a paused engine."""
        ...

    def end(self) -> None:
        """In the driver, at the end of a run: remove what generators laid down on their nodes."""
        ...


def road(backend: str) -> Road:
    module: Any = import_module(MODULES[backend])
    return module


def resolve(config: Config, *, on_gpu: Callable[[], bool], nodes: int) -> str:
    """The backend of this run. ``on_gpu``: whether the learner has CUDA devices; ``nodes``: of the cluster.

    Raises:
        ConfigError: a backend that cannot work here.
    """
    backend, colocated = config.weights.backend, config.placement.colocate
    elastic = (config.rollout.max_generators or 0) > config.rollout.num_generators
    if backend == "auto":
        return "shm" if nodes == 1 and not elastic else "object_store"
    if backend in ("nccl", "ipc") and not on_gpu():
        raise ConfigError(f"weights.backend = {backend} needs GPUs; use auto (or gloo, the same code on CPUs)")
    if backend == "ipc" and not colocated:
        raise ConfigError("weights.backend = ipc needs placement.colocate = true: both sides must hold the same GPU")
    if backend == "nccl" and colocated:
        raise ConfigError("weights.backend = nccl cannot join two processes on one GPU; use auto")
    if backend == "shm" and nodes > 1:
        raise ConfigError(
            f"weights.backend = shm serves one machine and the cluster has {nodes} nodes; use auto or object_store"
        )
    if backend == "shm" and elastic:
        raise ConfigError(
            "weights.backend = shm serves one machine, and with rollout.max_generators generators may join on others; "
            "use auto or object_store"
        )
    return backend
