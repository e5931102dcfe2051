"""A nested dict of numbers, strings and arrays as a folder: state.json and one .npy file per array. No pickle.

In state.json an array is ``{"npy": "a/b.npy", "bytes": size of the file}``. state.json is written last, so a
folder with it and files of the stated sizes is complete.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np


def write_state(folder: Path, state: dict[str, Any], *, sync: bool = False) -> None:
    """Write ``state`` into ``folder``. ``sync``: on the disk when this returns."""
    folder.mkdir(parents=True, exist_ok=True)

    def encode(value: Any, name: str) -> Any:
        if isinstance(value, dict):
            return {k: encode(v, f"{name}.{k}" if name else k) for k, v in value.items()}
        if isinstance(value, np.ndarray):
            path = folder / f"{name}.npy"
            with path.open("wb") as file:
                np.save(file, value, allow_pickle=False)
                _flush(file, sync)
            return {"npy": path.name, "bytes": path.stat().st_size}
        return value

    encoded = encode(state, "")
    with (folder / "state.json").open("w") as file:
        json.dump(encoded, file, allow_nan=False)
        _flush(file, sync)


def read_state(folder: Path) -> dict[str, Any]:
    """What ``write_state`` wrote.

    Raises:
        ValueError: a file is missing, cut short or unreadable.
    """

    def decode(value: Any) -> Any:
        if isinstance(value, dict) and "npy" in value:
            path = folder / value["npy"]
            if not path.is_file() or path.stat().st_size != value["bytes"]:
                raise ValueError(f"{path} is missing or not {value['bytes']} bytes long")
            return np.load(path, allow_pickle=False)
        if isinstance(value, dict):
            return {k: decode(v) for k, v in value.items()}
        return value

    try:
        state = json.loads((folder / "state.json").read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"{folder} is not a complete snapshot: {error}") from error
    return decode(state)


def _flush(file: Any, sync: bool) -> None:
    file.flush()
    if sync:
        os.fsync(file.fileno())
