"""The curriculum made durable: every call that changed it is in a journal before its answer leaves.

    call --> Curriculum (apply) --> journal (append) --> answer

A process killed between the two has answered nobody, so its state dies with it and nothing is lost: the caller
repeats the call. Opened again, the ledger loads the newest snapshot and applies the journal behind it to the same
Curriculum code, and so has the same counts, random state and open leases. Open leases stay with their holders: a
settlement counts as if nothing had happened, ``give_back`` returns them, and a ``lease`` call that is repeated with
its number (its answer was lost) gets the same leases again.

    RUN/ledger/snapshot-000002/      everything up to journal 2 (snapshot.py); snapshot 0 is an empty curriculum
    RUN/ledger/journal-000002.log    the calls since then (journal.py)
    RUN/ledger/history.jsonl         one line a committed batch: what `cures ledger` shows
    RUN/ledger/leases-000002.jsonl   one line a lease (lease_log.py)
    RUN/ledger/session               the start of the run that may write here

After ``curriculum.snapshot_every`` commits a snapshot begins a new journal and the generation before the last one is
removed, so the folder does not grow with the run (but for the history).
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from cures_ray.config import Config
from cures_ray.curriculum.batches import digest
from cures_ray.curriculum.machine import Curriculum
from cures_ray.ledger.journal import Journal, JournalError, read, read_header
from cures_ray.ledger.lease_log import LeaseLog, log_path
from cures_ray.ledger.records import decode_commit, decode_settlement, encode_commit, encode_settlement, rounded
from cures_ray.messages import (
    Accounting,
    BatchPlan,
    CommitReport,
    Discard,
    Lease,
    LedgerStatus,
    Settlement,
    SettleReply,
)

KEPT_GENERATIONS = 2
BELIEF_BINS = 20  # of the belief histograms in the history


class Ledger:
    """A Curriculum with a journal. Methods mirror ``LedgerPort``, synchronously.

    Args:
        folder: of this ledger; made if missing.
        session: names one stretch of the run. A folder of the same session is continued (the process was killed);
            of another one it is begun anew, from ``checkpoint`` or empty.
        checkpoint: a folder that ``save`` wrote.

    Raises:
        ValueError: the folder or the checkpoint is damaged, or belongs to other prompts or a newer session.
    """

    def __init__(
        self,
        folder: Path,
        config: Config,
        prompt_ids: np.ndarray,
        levels: np.ndarray | None = None,
        features: np.ndarray | None = None,
        *,
        session: str = "",
        checkpoint: Path | None = None,
    ) -> None:
        self.folder, self.config, self.session = Path(folder), config, session
        self._table = (np.asarray(prompt_ids, np.uint64), levels, features)
        self._answers: dict[str, tuple[int, list[tuple[int, int]]]] = {}  # worker -> last lease call and its leases
        self.recovered = 0  # records applied when this ledger was opened
        self.journal_bytes = 0  # written by this process
        self.folder.mkdir(parents=True, exist_ok=True)
        self._check_session()
        generation = newest_generation(self.folder)
        if generation is not None and read_header(journal_path(self.folder, generation))["session"] == session:
            self._recover(generation)
        else:
            self._begin(checkpoint)

    def _begin(self, checkpoint: Path | None) -> None:
        self.curriculum = Curriculum(self.config, *self._table)
        if checkpoint is not None:
            self.curriculum = Curriculum.load(checkpoint, self.config, *self._table)
            self.curriculum.reissue_uncommitted()
        old = newest_generation(self.folder)
        self.generation = 0 if old is None else old + 1
        trim_history(self.folder, self.curriculum.committed)
        self._open_generation()
        self._prune(kept=1)

    def _recover(self, generation: int) -> None:
        self.generation = generation
        header = read_header(journal_path(self.folder, generation))
        if header["prompts_digest"] != digest(self._table[0]):
            raise ValueError(f"{self.folder} is the ledger of other prompts than data.train")
        self.curriculum = load_generation(self.folder, generation, self.config, *self._table)
        self._answers = {w: (n, [(k[0], k[1]) for k in keys]) for w, (n, keys) in header["answers"].items()}
        trim_history(self.folder, self.curriculum.committed)
        self._leases = LeaseLog(log_path(self.folder, generation))
        for _, record in read(journal_path(self.folder, generation)):
            committed = self.curriculum.committed
            self._remember(record, apply(self.curriculum, record))
            self.recovered += 1
            if self.curriculum.committed > committed:
                self._write_history(record[1])
        self._journal = Journal(journal_path(self.folder, generation))

    # -- calls -----------------------------------------------------------------------------------------

    def lease(self, worker: str, max_rollouts: int, version: int, call: int = -1) -> list[Lease]:
        """As ``Curriculum.lease``. ``call`` >= 0 numbers the calls of a worker: the same number again gets the same
        leases, as far as they are still out."""
        last, keys = self._answers.get(worker, (-1, []))
        if 0 <= call == last:
            return [lease for key in keys if (lease := self.curriculum.leased(*key)) is not None]
        before = (self.curriculum.next_batch, self.curriculum.version)
        leases = self.curriculum.lease(worker, max_rollouts, version)
        if leases or before != (self.curriculum.next_batch, self.curriculum.version):
            record = ["lease", worker, max_rollouts, version, call]
            self._append(record)
            self._remember(record, leases)
        return leases

    def settle(self, settlement: Settlement) -> SettleReply:
        settlement = rounded(settlement)
        reply = self.curriculum.settle(settlement)
        if reply.accepted.any():
            self._append(encode_settlement(settlement))
        return reply

    def give_back(self, keys: list[tuple[int, int]], reason: Discard) -> None:
        before = self.curriculum.accounting.planned
        self.curriculum.give_back(keys, reason)
        if self.curriculum.accounting.planned != before:
            record = ["give_back", [list(key) for key in keys], reason.value]
            self._append(record)
            self._remember(record, None)

    def plan(self, batch: int) -> BatchPlan | None:
        return self.curriculum.plan(batch)

    def commit(self, report: CommitReport) -> Accounting:
        self._check_session()
        before = self.curriculum.committed
        accounting = self.curriculum.commit(report)
        if self.curriculum.committed > before:
            record = encode_commit(report)
            self._append(record)
            self._remember(record, accounting)
            self._write_history(report.batch)
            if self.curriculum.committed % self.config.curriculum.snapshot_every == 0:
                self.compact()
        return accounting

    def status(self) -> LedgerStatus:
        return self.curriculum.status()

    def save(self, folder: Path) -> None:
        self.curriculum.save(folder)

    def compact(self) -> None:
        """Snapshot, new journal, remove the generation before the last."""
        self.close()
        self.generation += 1
        self._open_generation()
        self._prune(KEPT_GENERATIONS)

    def close(self) -> None:
        self._journal.close()
        self._leases.close()

    # -- files -----------------------------------------------------------------------------------------

    def _check_session(self) -> None:
        """A ledger that its run has outlived (a driver that was lost, and started again elsewhere) writes nothing
        more: history and snapshots are the newer one's now. Once a commit is often enough: its journal is unlinked."""
        path = self.folder / "session"
        current = path.read_text() if path.exists() else self.session
        if current != self.session:
            raise JournalError(
                f"{self.folder} belongs to a newer start of the run (session {current}); this ledger, of session "
                f"{self.session}, writes nothing more"
            )

    def _append(self, record: list[Any]) -> None:
        self.journal_bytes += self._journal.append(record)

    def _remember(self, record: list[Any], answer: Any) -> None:
        if record[0] == "lease":
            self._answers[record[1]] = (record[4], [(lease.lease_id, lease.attempt) for lease in answer])
        self._leases.see(record, answer, self.curriculum)

    def _open_generation(self) -> None:
        """Snapshot the curriculum as ``generation`` and begin its journal: complete once the journal has its header."""
        target = self.folder / f"snapshot-{self.generation:06d}"
        temporary = self.folder / f".writing-{self.generation:06d}"
        for leftover in (temporary, target):
            shutil.rmtree(leftover, ignore_errors=True)
        self.curriculum.save(temporary)
        temporary.rename(target)
        header = {
            "session": self.session,
            "prompts": len(self._table[0]),
            "prompts_digest": digest(self._table[0]),
            "answers": {w: [n, [list(k) for k in keys]] for w, (n, keys) in self._answers.items()},
        }
        path = journal_path(self.folder, self.generation)
        temporary_log = path.with_suffix(".writing")
        temporary_log.unlink(missing_ok=True)
        self._journal = Journal(temporary_log, header)
        temporary_log.rename(path)
        self._leases = LeaseLog(log_path(self.folder, self.generation))

    def _prune(self, kept: int) -> None:
        for number in generations(self.folder)[:-kept]:
            journal_path(self.folder, number).unlink()
            shutil.rmtree(self.folder / f"snapshot-{number:06d}", ignore_errors=True)

    def _write_history(self, batch: int) -> None:
        with (self.folder / "history.jsonl").open("a") as file:
            file.write(json.dumps(history_line(self.curriculum, batch)) + "\n")


def begin_session(folder: Path, session: str) -> None:
    """Give ``folder`` to ``session``: ledgers of other sessions refuse to write there from now on."""
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / "session.writing"
    temporary.write_text(session)
    os.replace(temporary, folder / "session")


def journal_path(folder: Path, generation: int) -> Path:
    return folder / f"journal-{generation:06d}.log"


def generations(folder: Path) -> list[int]:
    """Numbers of the journals in ``folder``, rising."""
    return sorted(int(p.stem.removeprefix("journal-")) for p in folder.glob("journal-*.log"))


def newest_generation(folder: Path) -> int | None:
    return max(generations(folder), default=None)


def load_generation(
    folder: Path,
    generation: int,
    config: Config,
    prompt_ids: np.ndarray,
    levels: np.ndarray | None = None,
    features: np.ndarray | None = None,
) -> Curriculum:
    """The curriculum at the beginning of journal ``generation``. Raises ValueError as ``Curriculum.load``."""
    return Curriculum.load(folder / f"snapshot-{generation:06d}", config, prompt_ids, levels, features)


# -- records -------------------------------------------------------------------------------------------


def apply(curriculum: Curriculum, record: list[Any]) -> Any:
    """Repeat a journalled call; its answer.

    Raises:
        JournalError: an unknown record.
    """
    kind, *rest = record
    if kind == "lease":
        return curriculum.lease(rest[0], rest[1], rest[2])
    if kind == "settle":
        return curriculum.settle(decode_settlement(record))
    if kind == "give_back":
        return curriculum.give_back([(k[0], k[1]) for k in rest[0]], Discard(rest[1]))
    if kind == "commit":
        return curriculum.commit(decode_commit(record))
    raise JournalError(f"journal record of unknown kind {kind!r}; was it written by a newer version?")


# -- history -------------------------------------------------------------------------------------------


def history_line(curriculum: Curriculum, batch: int, most: int = 512) -> dict[str, Any]:
    """What a committed batch was: metrics, the beliefs' histogram over (0, 1), n and believed accuracy of its leases
    (at most ``most`` of them, evenly spread)."""
    status = curriculum.status()
    counts, _ = np.histogram(status.histograms["belief_mean"], bins=BELIEF_BINS, range=(0.0, 1.0))
    n, p = (status.histograms.get(k, np.zeros(0)) for k in ("n_by_lease", "p_by_lease"))
    every = max(1, -(-len(n) // most))
    return {
        "batch": batch,
        "planned": status.accounting.planned,
        "trained": status.accounting.trained,
        "discarded": sum(status.accounting.discarded.values()),
        "metrics": {k: float(f"{v:.6g}") for k, v in status.metrics.items() if np.isfinite(v)},
        "belief_histogram": counts.tolist(),
        "n": n[::every].astype(int).tolist(),
        "p": np.round(p[::every], 4).tolist(),
    }


def trim_history(folder: Path, committed: int) -> None:
    """Drop the lines of batches that are not committed (any more), and a torn last line."""
    path = folder / "history.jsonl"
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            if json.loads(line)["batch"] < committed:
                kept.append(line)
        except (json.JSONDecodeError, KeyError):
            break
    temporary = path.with_suffix(".writing")
    temporary.write_text("".join(f"{line}\n" for line in kept))
    os.replace(temporary, path)
