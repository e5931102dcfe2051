"""One version of the weights as a stream of bytes: a safetensors file, made and read in chunks.

No side ever holds a second copy of the model: the learner makes one chunk at a time, gathering ZeRO-3 shards as it
goes, and the receiver hands each tensor on when its last byte has come. Nothing is pickled.

Format: https://github.com/huggingface/safetensors (8 bytes length, a JSON header, the tensors' bytes).
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from cures_ray.learning.lora import base_parameters, full_tensors

if TYPE_CHECKING:
    from torch import Tensor, nn

NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
DTYPES = {name: dtype for dtype, name in NAMES.items()}


@dataclass(frozen=True, slots=True)
class Source:
    """The parameters of ``module`` in a fixed order, tied ones once, LoRA adapters merged. Under ZeRO-3 iterating is a
    collective: all learner ranks must do it, and a tensor lives only until the next one."""

    module: nn.Module
    zero_stage: int = 0
    rank: int = 0

    def shapes(self) -> list[tuple[str, torch.dtype, tuple[int, ...]]]:
        """(name, dtype, full shape) of what iterating gives."""
        named = base_parameters(self.module)
        return [(name, p.dtype, tuple(getattr(p, "ds_shape", p.shape))) for name, p in named]

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        if self.zero_stage < 3:
            return full_tensors(self.module)
        import deepspeed

        return full_tensors(self.module, deepspeed.zero.GatheredParameters)

    def assist(self) -> None:
        """The part of a rank that sends nothing: under ZeRO-3, to gather with the others."""
        if self.zero_stage == 3:
            for _ in self:
                pass


def chunks(source: Source, version: int, size: int) -> Iterator[Tensor]:
    """The stream of ``version`` as uint8 tensors [``size``] on the CPU, the last one shorter. Each is one buffer that
    the next overwrites."""
    buffer = torch.empty(size, dtype=torch.uint8)
    filled = 0
    for piece in _pieces(source, version):
        while len(piece):
            take = min(len(piece), size - filled)
            buffer[filled : filled + take].copy_(piece[:take])
            piece, filled = piece[take:], filled + take
            if filled == size:
                yield buffer
                filled = 0
    if filled:
        yield buffer[:filled]


def _pieces(source: Source, version: int) -> Iterator[Tensor]:
    """The header, then the bytes of each tensor, all as uint8 [bytes]."""
    shapes = source.shapes()
    yield torch.frombuffer(bytearray(header(shapes, version)), dtype=torch.uint8)
    for (name, dtype, shape), (found, tensor) in zip(shapes, source, strict=True):
        if (found, tensor.dtype, tuple(tensor.shape)) != (name, dtype, shape):
            raise ValueError(f"announced {name} {dtype} {shape}, found {found} {tensor.dtype} {tuple(tensor.shape)}")
        yield tensor.detach().contiguous().view(-1).view(torch.uint8)


def header(shapes: list[tuple[str, torch.dtype, tuple[int, ...]]], version: int) -> bytes:
    """Length and JSON of a safetensors file that holds ``shapes``, padded to 8 bytes."""
    entries: dict[str, Any] = {"__metadata__": {"version": str(version)}}
    begin = 0
    for name, dtype, shape in shapes:
        end = begin + _bytes(dtype, shape)
        entries[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def total_bytes(source: Source, version: int) -> int:
    """Length of the whole stream."""
    shapes = source.shapes()
    return len(header(shapes, version)) + sum(_bytes(dtype, shape) for _, dtype, shape in shapes)


def _bytes(dtype: torch.dtype, shape: tuple[int, ...]) -> int:
    return dtype.itemsize * int(torch.Size(shape).numel())


def tensors(stream: Iterable[Tensor], version: int, device: torch.device) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor on ``device``) from the chunks of a stream.

    Raises:
        ValueError: the stream is of another version, or ends early.
    """
    reader = _Reader(stream)
    length = struct.unpack("<Q", reader.take(8).cpu().numpy().tobytes())[0]
    entries = json.loads(reader.take(length).cpu().numpy().tobytes())
    found = entries.pop("__metadata__")["version"]
    if found != str(version):
        raise ValueError(f"the weights received are version {found}, expected {version}")
    for name, entry in sorted(entries.items(), key=lambda item: item[1]["data_offsets"]):
        begin, end = entry["data_offsets"]
        data = reader.take(end - begin).to(device)
        yield name, data.view(DTYPES[entry["dtype"]]).view(entry["shape"])


class _Reader:
    """Takes bytes off a stream of chunks."""

    def __init__(self, stream: Iterable[Tensor]) -> None:
        self._stream = iter(stream)
        self._chunk = torch.empty(0, dtype=torch.uint8)

    def take(self, count: int) -> Tensor:
        """uint8 [count], memory of its own."""
        result: Tensor | None = None
        filled = 0
        while filled < count or result is None:
            if not len(self._chunk) and filled < count:
                chunk = next(self._stream, None)
                if chunk is None:
                    raise ValueError(f"the stream of weights ended {count - filled} bytes early")
                self._chunk = chunk
            if result is None:
                result = torch.empty(count, dtype=torch.uint8, device=self._chunk.device)
            part = min(count - filled, len(self._chunk))
            result[filled : filled + part].copy_(self._chunk[:part])
            self._chunk, filled = self._chunk[part:], filled + part
        return result
