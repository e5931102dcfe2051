"""RUN/ledger/leases-000002.jsonl: the whole life of every lease, one line each, written when its batch is committed.

    ["lease","attempt","batch",...]       the names of the columns
    [17,1,3,0,"train",...]                a lease

A file begins with each journal and belongs to it: a ledger that comes back writes it again while it applies the
journal. Unlike journals the files are kept. They are for people: nothing is computed from them, so they may be deleted.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from cures_ray.curriculum.batches import TrackedLease
from cures_ray.curriculum.machine import Curriculum

COLUMNS = (
    *("lease", "attempt", "batch", "round", "role", "row", "n", "weight", "alpha", "beta"),  # as it was planned
    "attempts",  # [[worker, policy version when leased, "settled" or why it was given back], ...]
    *("tokens", "generate_s", "verify_s", "rewards"),  # of the attempt that settled; null: a fault
    *("trained", "discarded"),  # rollouts; {reason: rollouts}
)

ENCODER = json.JSONEncoder(separators=(",", ":"))


class LeaseLog:
    """Follows the ledger's records. ``path`` None: writes nothing."""

    def __init__(self, path: Path | None = None) -> None:
        self._file = path.open("wb", buffering=0) if path is not None else None
        self._attempts: dict[tuple[int, int], list[Any]] = {}
        self._write([COLUMNS])

    def see(self, record: list[Any], answer: Any, curriculum: Curriculum) -> None:
        """A journalled call and its answer, just applied to ``curriculum``."""
        if record[0] == "lease":
            for lease in answer:
                self._attempts[lease.lease_id, lease.attempt] = [record[1], record[3], ""]
        elif record[0] == "give_back":
            for lease_id, attempt in record[1]:
                if (lease_id, attempt) in self._attempts:
                    self._attempts[lease_id, attempt][2] = record[2]
        elif record[0] == "commit":
            self._write([self.line(tracked, record[1], *ending) for tracked, ending in curriculum.endings])
            for tracked, _ in curriculum.endings:
                for attempt in range(tracked.lease.attempt + 1):
                    self._attempts.pop((tracked.lease.lease_id, attempt), None)

    def line(self, tracked: TrackedLease, batch: int, trained: int, discarded: dict[Any, int]) -> list[Any]:
        """The values of ``COLUMNS``. Attempts of before the last snapshot are unknown: null."""
        lease = tracked.lease
        attempts = [self._attempts.get((lease.lease_id, k)) for k in range(lease.attempt + 1)]
        if attempts[-1] is not None and tracked.state == "settled":
            attempts[-1][2] = "settled"
        belief = (round(lease.weight, 8), round(lease.alpha, 4), round(lease.beta, 4))
        planned = [lease.round, tracked.role, lease.prompt_index, lease.n, *belief]
        spent = [tracked.tokens, round(tracked.generate_seconds, 4), round(tracked.verify_seconds, 4)]
        rewards = [
            round(r, 4) if ok else None for r, ok in zip(tracked.rewards.tolist(), tracked.valid.tolist(), strict=True)
        ]
        ended = {getattr(reason, "value", reason): count for reason, count in discarded.items()}
        return [lease.lease_id, lease.attempt, batch, *planned, attempts, *spent, rewards, trained, ended]

    def close(self) -> None:
        if self._file is not None:
            self._file.close()

    def _write(self, lines: list[Any]) -> None:
        if self._file is not None:
            self._file.write("".join(f"{ENCODER.encode(line)}\n" for line in lines).encode())


def log_path(folder: Path, generation: int) -> Path:
    return folder / f"leases-{generation:06d}.jsonl"


def find_lease(folder: Path, lease_id: int) -> dict[str, Any] | None:
    """The line of a committed lease by column, of the newest file that has it: a run that was resumed from a checkpoint
    may have done it again."""
    begin = b"[%d," % lease_id
    for path in sorted(folder.glob("leases-*.jsonl"), reverse=True):
        with path.open("rb") as file:
            for line in file:
                if line.startswith(begin) and line.endswith(b"]\n"):
                    return dict(zip(COLUMNS, json.loads(line), strict=True))
    return None
