"""Files and data sets as a stream of rows, with errors that name the file and the line.

A source is never held whole: JSONL and CSV are read line by line, Parquet and Hugging Face data sets batch by batch.
Rows come back as they were: a key that only other rows have is not in them. (Arrow gives every row of a column the
same keys and fills them with nulls, so nulls of Parquet and Hugging Face rows are left out.)
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from cures_ray.messages import ConfigError

Row = dict[str, Any]
JSON_LINES = (".jsonl", ".ndjson")
TABLES = {".csv": ",", ".tsv": "\t"}
BATCH = 256  # rows: worked solutions of 10 kB make it 2.5 MB


def read_rows(source: str, key: str) -> Iterator[list[Row]]:
    """The rows of ``source`` in batches: a .jsonl, .parquet, .csv or .tsv file, a folder, or a data set "name",
    "name:split" or "name@subset:split".

    Args:
        key: the configuration key, for messages ("data.train").

    Raises:
        ConfigError: missing, empty or malformed; also while iterating.
    """
    path = Path(source).expanduser()
    if path.is_file():
        if path.stat().st_size == 0:
            raise ConfigError(f"{key} = {source} is empty (0 bytes)")
        if path.suffix in JSON_LINES:
            return _batched(_jsonl(path, key))
        if path.suffix == ".parquet":
            return _parquet(path, key)
        if path.suffix in TABLES:
            return _batched(_csv(path, key, TABLES[path.suffix]))
        raise ConfigError(
            f"{key} = {source}: the name must end in .jsonl, .parquet, .csv or .tsv (one object a line, or a table), "
            "or be a Hugging Face dataset"
        )
    if path.suffix in (*JSON_LINES, *TABLES, ".parquet", ".json"):
        raise ConfigError(f"{key} = {source} does not exist (looked in {Path.cwd()})")
    return _dataset(source, key)


def _batched(rows: Iterator[Row]) -> Iterator[list[Row]]:
    batch: list[Row] = []
    for row in rows:
        batch.append(row)
        if len(batch) == BATCH:
            yield batch
            batch = []
    if batch:
        yield batch


def _jsonl(path: Path, key: str) -> Iterator[Row]:
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
            yield row


def _csv(path: Path, key: str, delimiter: str) -> Iterator[Row]:
    """The first line names the columns; every value is text."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, delimiter=delimiter, strict=True)
            for row in reader:
                if None in row or None in row.values():
                    wrong = "more" if None in row else "fewer"
                    raise ConfigError(f"{key}: {path}, line {reader.line_num} has {wrong} fields than the first line")
                yield row
    except (csv.Error, UnicodeDecodeError) as error:
        raise ConfigError(f"{key}: {path} cannot be read as CSV: {error}") from None


def _parquet(path: Path, key: str) -> Iterator[list[Row]]:
    try:
        with pq.ParquetFile(path, pre_buffer=False) as file:
            for batch in file.iter_batches(BATCH, use_threads=False):
                yield _rows(batch)
    except (pa.ArrowException, OSError) as error:
        raise ConfigError(f"{key} = {path} cannot be read as Parquet: {error}") from None


def _dataset(source: str, key: str) -> Iterator[list[Row]]:
    """A folder written by ``save_to_disk`` or laid out as on the Hub, or a Hub name; @subset, :split."""
    import datasets

    name, _, split = source.partition(":")
    folder = Path(name).expanduser()
    try:
        if (folder / "dataset_info.json").is_file() or (folder / "dataset_dict.json").is_file():
            loaded = datasets.load_from_disk(str(folder))
        elif folder.is_dir():
            loaded = datasets.load_dataset(str(folder))
        else:
            repository, _, subset = name.partition("@")
            loaded = datasets.load_dataset(repository, subset or None)
    except Exception as error:  # datasets raises many types: missing, gated, offline, malformed
        what = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ConfigError(
            f"{key} = {source}: neither a file (looked in {Path.cwd()}) nor a dataset that can be loaded: {what}"
        ) from None
    if isinstance(loaded, datasets.Dataset):
        if split:
            raise ConfigError(f"{key} = {source}: {name} is a single dataset without splits; remove :{split}")
        return _dataset_rows(loaded)
    splits = list(loaded)
    if not split and len(splits) > 1 and "train" not in splits:
        raise ConfigError(f"{key} = {source} has splits {', '.join(splits)}; choose one: {name}:{splits[0]}")
    chosen = split or ("train" if "train" in splits else splits[0])
    if chosen not in splits:
        raise ConfigError(f"{key} = {source} has no split {chosen!r}; found {', '.join(splits)}")
    return _dataset_rows(loaded[chosen])


def _dataset_rows(dataset: Any) -> Iterator[list[Row]]:
    for batch in dataset.with_format("arrow").iter(BATCH) if len(dataset) else ():
        yield _rows(batch)


def _rows(batch: Any) -> list[Row]:
    return [_without_nulls(row) for row in batch.to_pylist()]


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without_nulls(v) for k, v in value.items() if v is not None}
    return [_without_nulls(v) for v in value] if isinstance(value, list) else value
