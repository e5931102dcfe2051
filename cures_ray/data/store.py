"""The columns of a prompt table on disk: written batch by batch, read back as a memory map.

So a set may be larger than memory. The file lies in the folder for temporary files (TMPDIR) and has no name any more
once it is written: the system takes it back when the process ends.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any, overload

import pyarrow as pa

SCHEMA = pa.schema([(name, pa.string()) for name in ("text", "answer", "row", "tags")])


class Store:
    """Append batches, then ``finish``. Columns: text, answer, the row's other columns as JSON, words for features."""

    def __init__(self) -> None:
        descriptor, self._path = tempfile.mkstemp(prefix="cures-prompts-", suffix=".arrow")
        os.close(descriptor)
        self._writer = pa.ipc.new_file(self._path, SCHEMA)

    def append(self, text: list[str], answer: list[str], rows: list[dict[str, Any]], tags: list[str]) -> None:
        packed = [json.dumps(row, default=str) for row in rows]
        self._writer.write_batch(pa.record_batch([text, answer, packed, tags], schema=SCHEMA))

    def finish(self) -> pa.Table:
        """The table [N], memory-mapped."""
        try:
            self._writer.close()
            return pa.ipc.open_file(pa.memory_map(self._path)).read_all()
        finally:
            os.unlink(self._path)

    def discard(self) -> None:
        self._writer.close()
        os.unlink(self._path)


class Texts(Sequence[str]):
    """A string column as a sequence that decodes what is asked for."""

    def __init__(self, column: pa.ChunkedArray) -> None:
        self._column = column

    def __len__(self) -> int:
        return len(self._column)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        return self._column[index].to_pylist() if isinstance(index, slice) else self._column[index].as_py()

    def __iter__(self) -> Iterator[str]:
        for chunk in self._column.chunks:
            yield from chunk.to_pylist()
