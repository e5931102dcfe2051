"""Snapshots: what was written comes back, and no damage passes."""

import json

import numpy as np
import pytest

from cures_ray.snapshot import NAME, read_state, write_state

STATE = {
    "format": 2,
    "name": "ünï",
    "pool": {
        "alpha": np.linspace(0, 1, 7),
        "visits": np.arange(6, dtype=np.uint32).reshape(2, 3).T,
        "flags": np.array([True, False]),
        "none": np.zeros((0, 4), np.float32),
        "scalar": np.array(2.5),
        "ids": np.array([2**64 - 1], np.uint64),
    },
    "list": [1, 2.5, None, "x"],
}


def same(a, b) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and a.shape == b.shape and np.array_equal(a, b)
    return a == b


def test_what_was_written_comes_back_and_equal_states_are_equal_bytes(tmp_path):
    for name in "ab":
        write_state(tmp_path / name, STATE, sync=True)
    assert same(read_state(tmp_path / "a"), STATE)
    assert (tmp_path / "a" / NAME).read_bytes() == (tmp_path / "b" / NAME).read_bytes()
    assert [p.name for p in (tmp_path / "a").iterdir()] == [NAME]


def test_every_flipped_bit_and_every_cut_is_damage(tmp_path):
    write_state(tmp_path, STATE)
    data = (tmp_path / NAME).read_bytes()
    intact = []
    for bit in range(8 * len(data)):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        (tmp_path / NAME).write_bytes(flipped)
        try:
            intact.append(same(read_state(tmp_path), STATE))
        except ValueError:
            continue
    assert all(intact), "a flip may pass only where it changes nothing (spaces of the header)"
    for size in range(0, len(data), 7):
        (tmp_path / NAME).write_bytes(data[:size])
        with pytest.raises(ValueError, match="is damaged"):
            read_state(tmp_path)


def test_a_folder_of_an_older_version_is_named(tmp_path):
    (tmp_path / "state.json").write_text(json.dumps({"format": 2}))
    with pytest.raises(ValueError, match="older version"):
        read_state(tmp_path)
