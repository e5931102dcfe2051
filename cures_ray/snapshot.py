"""A nested dict of numbers, strings and arrays as a folder with one file, state.safetensors. No pickle.

The dict is JSON text in the tensor ``state``; an array in it is ``{"array": name of its tensor}``. The CRC-32 over all
tensors is in the file's metadata, so that a file that was cut short or changed anywhere is told from a whole one.
"""

from __future__ import annotations

import json
import os
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

NAME = "state.safetensors"


def write_state(folder: Path, state: dict[str, Any], *, sync: bool = False) -> None:
    """Write ``state`` into ``folder``, whole or not at all. ``sync``: on the disk when this returns.

    Raises:
        OSError, SafetensorError: it cannot be written (a full disk).
    """
    arrays: dict[str, np.ndarray] = {}

    def plain(value: Any, name: str) -> Any:
        if isinstance(value, dict):
            return {k: plain(v, f"{name}.{k}") for k, v in value.items()}
        if isinstance(value, np.ndarray):
            arrays[name] = value if value.flags.c_contiguous else value.copy()
            return {"array": name}
        return value

    text = json.dumps(plain(state, ""), allow_nan=False)
    arrays["state"] = np.frombuffer(text.encode(), np.uint8)
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f".{NAME}"
    save_file(arrays, temporary, {"crc32": _checksum(arrays)})
    if sync:
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
    temporary.rename(folder / NAME)


def read_state(folder: Path) -> dict[str, Any]:
    """What ``write_state`` wrote.

    Raises:
        ValueError: the file is missing, cut short or damaged, or the folder is an older version's.
    """
    path = folder / NAME
    if not path.is_file():
        older = (folder / "state.json").exists()
        raise ValueError(f"{path} is missing" + ("; the folder is of an older version of this code" if older else ""))
    try:
        with safe_open(path, framework="numpy") as file:
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
            expected = (file.metadata() or {}).get("crc32")
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if _checksum(arrays) != expected:
        raise ValueError(f"{path} is damaged: it does not match its checksum")

    def decode(value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        return arrays[value["array"]] if value.keys() == {"array"} else {k: decode(v) for k, v in value.items()}

    return decode(json.loads(arrays["state"].tobytes()))


def _checksum(arrays: dict[str, np.ndarray]) -> str:
    total = 0
    for name, array in sorted(arrays.items()):
        total = zlib.crc32(f"{name} {array.dtype.str} {array.shape}".encode(), total)
        total = zlib.crc32(array.reshape(-1).view(np.uint8).data, total)
    return f"{total:08x}"
