"""Files and datasets -> one Arrow table, with errors that name the file and the line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from cures_ray.messages import ConfigError

JSON_LINES = (".jsonl", ".ndjson")


def read_table(source: str, key: str) -> pa.Table:
    """Read ``source``: a .jsonl or .parquet file, a folder, or a dataset "name" or "name:split".

    Args:
        key: the configuration key, for messages ("data.train").

    Raises:
        ConfigError: missing, empty or malformed.
    """
    path = Path(source).expanduser()
    if path.is_file():
        if path.stat().st_size == 0:
            raise ConfigError(f"{key} = {source} is empty (0 bytes)")
        if path.suffix in JSON_LINES:
            return _read_jsonl(path, key)
        if path.suffix == ".parquet":
            return _read_parquet(path, key)
        raise ConfigError(f"{key} = {source}: the name must end in .jsonl or .parquet, or be a Hugging Face dataset")
    if path.suffix in (*JSON_LINES, ".parquet"):
        raise ConfigError(f"{key} = {source} does not exist (looked in {Path.cwd()})")
    return _read_dataset(source, key)


def _read_jsonl(path: Path, key: str) -> pa.Table:
    rows: list[dict[str, Any]] = []
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (json.JSONDecodeError, UnicodeDecodeError) as error:
                raise ConfigError(f"{key}: {path}, line {number} is not JSON: {error}") from None
            if not isinstance(row, dict):
                raise ConfigError(f"{key}: {path}, line {number}: an object expected, found {type(row).__name__}")
            rows.append(row)
    names = dict.fromkeys(name for row in rows for name in row)
    return pa.table({name: _column([row.get(name) for row in rows]) for name in names})


def _column(values: list[Any]) -> pa.Array:
    """An Arrow column; values of mixed types are kept as JSON text (strings as they are)."""
    try:
        return pa.array(values)
    except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError):
        return pa.array([v if v is None or isinstance(v, str) else json.dumps(v) for v in values])


def _read_parquet(path: Path, key: str) -> pa.Table:
    try:
        return pq.read_table(path)
    except (pa.ArrowException, OSError) as error:
        raise ConfigError(f"{key} = {path} cannot be read as Parquet: {error}") from None


def _read_dataset(source: str, key: str) -> pa.Table:
    """A folder written by ``save_to_disk`` or laid out as on the Hub, or a Hub name; split after a colon."""
    import datasets

    name, _, split = source.partition(":")
    folder = Path(name).expanduser()
    try:
        if (folder / "dataset_info.json").is_file() or (folder / "dataset_dict.json").is_file():
            loaded = datasets.load_from_disk(str(folder))
        else:
            loaded = datasets.load_dataset(str(folder) if folder.is_dir() else name)
    except Exception as error:  # datasets raises many types: missing, gated, offline, malformed
        what = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ConfigError(
            f"{key} = {source}: neither a file (looked in {Path.cwd()}) nor a dataset that can be loaded: {what}"
        ) from None
    if isinstance(loaded, datasets.Dataset):
        if split:
            raise ConfigError(f"{key} = {source}: {name} is a single dataset without splits; remove :{split}")
        return _as_table(loaded)
    splits = list(loaded)
    if not split and len(splits) > 1 and "train" not in splits:
        raise ConfigError(f"{key} = {source} has splits {', '.join(splits)}; choose one: {name}:{splits[0]}")
    chosen = split or ("train" if "train" in splits else splits[0])
    if chosen not in splits:
        raise ConfigError(f"{key} = {source} has no split {chosen!r}; found {', '.join(splits)}")
    return _as_table(loaded[chosen])


def _as_table(dataset: Any) -> pa.Table:
    return dataset.with_format("arrow")[:] if len(dataset) else pa.table({n: [] for n in dataset.column_names})
