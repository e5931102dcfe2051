"""``cures bench journal-sqlite``: the ledger's journal against SQLite in WAL mode, for records of 1 to 256 settlements.

Both keep the same JSON text with a CRC-32, and return once the text has left the process (``off``: a killed process
loses nothing) or is on the disk (``fsync``). They alternate in windows of one run; figures are medians over windows.
"""

from __future__ import annotations

import argparse
import inspect
import json
import shutil
import sqlite3
import tempfile
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness.results_file import spread, write_result
from cures_ray.ledger import journal
from cures_ray.ledger.journal import Journal, JournalError, read

SIZES = (1, 32, 256)


class SqliteJournal:
    """As ``cures_ray.ledger.journal.Journal``: one transaction a record. A record has a checksum of its own, for SQLite
    has none on the pages of its database."""

    def __init__(self, path: Path, header: dict[str, Any] | None = None, *, sync: bool = False) -> None:
        self._db = sqlite3.connect(path, isolation_level=None)
        self._db.execute("PRAGMA journal_mode=WAL")
        self._db.execute(f"PRAGMA synchronous={'FULL' if sync else 'OFF'}")
        self._db.execute("CREATE TABLE IF NOT EXISTS records (id INTEGER PRIMARY KEY, crc INTEGER, text TEXT) STRICT")
        if header is not None:
            self.append([header])

    def append(self, record: list[Any]) -> int:
        text = json.dumps(record, separators=(",", ":"), allow_nan=False)
        self._db.execute("INSERT INTO records (crc, text) VALUES (?, ?)", (zlib.crc32(text.encode()), text))
        return len(text)

    def close(self) -> None:
        self._db.close()


def read_sqlite(path: Path) -> Iterator[list[Any]]:
    """Raises JournalError: damage, in a page or in a record."""
    try:
        for number, crc, text in sqlite3.connect(f"file:{path}?mode=ro", uri=True).execute("SELECT * FROM records"):
            if zlib.crc32(text.encode()) != crc:
                raise JournalError(f"{path} is damaged at record {number}")
            yield json.loads(text)
    except (sqlite3.DatabaseError, UnicodeDecodeError) as error:
        raise JournalError(f"{path} is damaged: {error}") from error


def record(size: int, rng: np.random.Generator) -> list[Any]:
    """A chunk of ``size`` settlements of one rollout each, as the ledger journals it."""
    seconds = [np.round(rng.uniform(0.1, 3, size), 4).tolist() for _ in range(2)]
    tokens = rng.integers(20, 900, size).tolist()
    return ["settle", list(range(size)), 0, 1, 0, *seconds, rng.integers(0, 2, size).tolist(), 0, tokens, 17]


def window(kind: Any, records: list[list[Any]]) -> tuple[float, float]:
    """(wall, CPU) microseconds a record."""
    wall, cpu = time.perf_counter(), time.process_time()
    for one in records:
        kind.append(one)
    return tuple(1e6 * (b - a) / len(records) for a, b in ((wall, time.perf_counter()), (cpu, time.process_time())))


def measure(folder: Path, size: int, sync: bool, windows: int) -> dict[str, Any]:
    rng = np.random.default_rng(size)
    records = [record(size, rng) for _ in range(20 if sync else 400)]
    kinds: dict[str, Any] = {
        "journal": Journal(folder / "journal.log", {}, sync=sync),
        "sqlite": SqliteJournal(folder / "journal.db", {}, sync=sync),
    }
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in kinds}
    for number in range(windows):
        for name in sorted(kinds, reverse=bool(number % 2)):
            times[name].append(window(kinds[name], records))
    row: dict[str, Any] = {"settlements": size, "durable": "fsync" if sync else "off"}
    for name, kind in kinds.items():
        kind.close()
        wall, cpu = np.median(times[name], axis=0)
        row |= {f"{name}_us": round(float(wall), 1), f"{name}_cpu_us": round(float(cpu), 1)}
    pairs = zip(times["sqlite"], times["journal"], strict=True)
    row["sqlite_over_journal_cpu"] = spread([a[1] / b[1] for a, b in pairs])
    count = windows * len(records)
    for name, reader in (("journal", read(folder / "journal.log")), ("sqlite", read_sqlite(folder / "journal.db"))):
        began = time.process_time()
        found = sum(1 for _ in reader)
        row[f"{name}_read_cpu_us"] = round(1e6 * (time.process_time() - began) / count, 1)
        assert found == count + (name == "sqlite"), f"{name} lost records"
    row["journal_bytes"] = (folder / "journal.log").stat().st_size // count
    row["sqlite_bytes"] = sum(p.stat().st_size for p in folder.glob("journal.db*")) // count
    return row


def main(argv: list[str]) -> int:
    p = argparse.ArgumentParser(prog="cures bench journal-sqlite", description=__doc__.splitlines()[0])
    p.add_argument("--windows", type=int, default=31)
    p.add_argument("--name", default="journal_sqlite", help="of the result file")
    args = p.parse_args(argv)
    rows = []
    for sync in (False, True):
        for size in SIZES:
            folder = Path(tempfile.mkdtemp(prefix="cures-journal-", dir=Path.cwd()))  # /tmp may be memory
            try:
                rows.append(measure(folder, size, sync, args.windows))
            finally:
                shutil.rmtree(folder)
            print(json.dumps(rows[-1]), flush=True)
    ratios = {f"sqlite_over_journal_cpu_{r['settlements']}_{r['durable']}": r["sqlite_over_journal_cpu"] for r in rows}
    lines = {name: len(inspect.getsource(part).splitlines()) for name, part in PARTS.items()}
    print(f"results: {write_result(args.name, ratios | lines, rows)}")
    return 0


PARTS = {"journal_lines": journal, "sqlite_class_lines": SqliteJournal, "sqlite_read_lines": read_sqlite}
