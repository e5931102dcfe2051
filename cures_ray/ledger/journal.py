"""An append-only journal of JSON records that survives being killed at any byte (docs/journal.md).

    cures-ray journal 2 {"session": ..., ...}\n      the header: magic, format, facts of the owner
    5f3a01bc ["settle", ...]\n                       a record: CRC-32 of the JSON text, a space, the JSON text

A record counts once its newline is written. What follows the last newline is a torn write and is cut off, as is a
last line whose checksum is wrong; a wrong line with others behind it is damage, and is refused with its offset.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

FORMAT = 2  # since a record settles a chunk of leases
MAGIC = b"cures-ray journal "


class JournalError(ValueError):
    """The journal cannot be read: another format, or damage before its end."""


class Journal:
    """The open end of one journal file. One write a record, so a killed process leaves at most one torn record.

    Args:
        sync: fsync after each record, to survive the machine and not only the process.
    """

    def __init__(self, path: Path, header: dict[str, Any] | None = None, *, sync: bool = False) -> None:
        """Continue ``path``, or begin it with ``header`` (it must not exist then).

        Raises:
            JournalError: as ``read``.
        """
        self.path, self.sync = path, sync
        if header is not None:
            self._file = path.open("xb", buffering=0)
            self._write(MAGIC + f"{FORMAT} {_dump(header)}\n".encode())
        else:
            end = intact_bytes(path)
            self._file = path.open("r+b", buffering=0)
            self._file.truncate(end)
            self._file.seek(end)

    def append(self, record: list[Any]) -> int:
        """Write one record; bytes written. Raises OSError (disk full, for example)."""
        text = _dump(record).encode()
        return self._write(b"%08x %s\n" % (zlib.crc32(text), text))

    def close(self) -> None:
        self._file.close()

    def _write(self, line: bytes) -> int:
        written = self._file.write(line)
        if written != len(line):
            raise OSError(f"{self.path}: {written} of {len(line)} bytes written; is the disk full?")
        if self.sync:
            os.fsync(self._file.fileno())
        return written


def read_header(path: Path) -> dict[str, Any]:
    """The facts of the header.

    Raises:
        JournalError: not a journal, or of another format.
    """
    with path.open("rb") as file:
        line = file.readline()
    if not line.startswith(MAGIC) or not line.endswith(b"\n"):
        raise JournalError(f"{path} is not a journal: its first line is {line[:40]!r}")
    number, _, text = line[len(MAGIC) :].decode().partition(" ")
    if number != str(FORMAT):
        raise JournalError(f"{path} has journal format {number}, this version reads {FORMAT}")
    return json.loads(text)


def read(path: Path) -> Iterator[tuple[int, list[Any]]]:
    """(offset behind it, record) of each record that is whole now, in order. The file may grow meanwhile.

    Raises:
        JournalError: not a journal of this format, or a damaged record before the last one.
    """
    read_header(path)
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        offset = len(file.readline())
        for line in file:
            record = _parse(line)
            if record is None and offset + len(line) < size:
                raise JournalError(
                    f"{path} is damaged at byte {offset}: a record does not match its checksum and others follow. "
                    f"Restore the file, or resume the run from a checkpoint (checkpoint.resume = PATH)"
                )
            if record is None or offset + len(line) > size:
                return
            offset += len(line)
            yield offset, record


def intact_bytes(path: Path) -> int:
    """Where the last intact record ends. Raises JournalError as ``read``."""
    with path.open("rb") as file:
        end = len(file.readline())
    for offset, _ in read(path):
        end = offset
    return end


def _parse(line: bytes) -> list[Any] | None:
    if not line.endswith(b"\n") or line[8:9] != b" ":
        return None
    text = line[9:-1]
    return json.loads(text) if line[:8] == b"%08x" % zlib.crc32(text) else None


def _dump(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"), allow_nan=False)
