"""Road ``ipc``: learner and generator share a GPU, and handles of the learner's memory travel. Not run: it needs a GPU.

Each learner rank holds a copy of the whole weights on its GPU for the engine of that GPU, until it publishes again. A
handle is numbers and bytes; nothing is unpickled.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch.multiprocessing.reductions import rebuild_cuda_tensor, reduce_tensor

from actors.weights.backend import Info, Node, Settings

if TYPE_CHECKING:
    from torch import Tensor

    from actors.weights.stream import Source

KINDS, DTYPE, DEVICE = (0, 4), 5, 6  # places among rebuild_cuda_tensor's arguments: two classes, dtype, device


class Publisher:
    kept = False

    def __init__(self, settings: Settings) -> None:
        self._held: list[Tensor] = []

    def publish(self, source: Source, version: int) -> Info:
        import torch.distributed as dist

        self._held = [tensor.detach().clone().contiguous() for _, tensor in source]
        mine = {_gpu(torch.cuda.current_device()): [encode(reduce_tensor(t)[1]) for t in self._held]}
        everyone: list[Any] = [mine]
        if dist.is_initialized() and dist.get_world_size() > 1:
            everyone = [None] * dist.get_world_size()
            dist.all_gather_object(everyone, mine)
        names = [name for name, _, _ in source.shapes()]
        handles = {gpu: own for rank in everyone for gpu, own in rank.items()}
        size = sum(t.nbytes for t in self._held)
        return {"backend": "ipc", "names": names, "handles": handles, "bytes": size}

    def close(self) -> None:
        self._held = []


def update_info(info: Info, version: int, node: Node) -> Info:
    return {"names": info["names"], "handles": info["handles"]}


def receive(update: Info, device: torch.device, rank: int) -> Iterator[tuple[str, Tensor]]:
    """Raises ValueError when no learner rank is on this GPU."""
    own = update["handles"].get(_gpu(device.index))
    if own is None:
        raise ValueError(f"no learner rank shares GPU {_gpu(device.index)}; found {sorted(update['handles'])}")
    for name, handle in zip(update["names"], own, strict=True):
        yield name, rebuild_cuda_tensor(*decode(handle, device.index))


def end() -> None:
    pass  # the memory is the learner's


def encode(arguments: tuple[Any, ...]) -> list[Any]:
    """`rebuild_cuda_tensor`'s arguments without their classes."""
    plain = [None if i in KINDS else value for i, value in enumerate(arguments)]
    plain[DTYPE] = str(arguments[DTYPE]).removeprefix("torch.")
    return [list(value) if isinstance(value, tuple) else value for value in plain]


def decode(handle: list[Any], device: int) -> list[Any]:
    """The arguments, for GPU ``device`` of this process."""
    arguments = list(handle)
    for place, kind in zip(KINDS, (torch.Tensor, torch.UntypedStorage), strict=True):
        arguments[place] = kind
    arguments[1:3] = [torch.Size(arguments[1]), tuple(arguments[2])]
    arguments[DTYPE] = getattr(torch, arguments[DTYPE])
    arguments[DEVICE] = device
    return arguments


def _gpu(index: int | None) -> str:
    return str(torch.cuda.get_device_properties(index or 0).uuid)
