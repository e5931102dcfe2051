"""The ledger actor: the one writer of the curriculum, one call at a time.

Ray starts it again when it dies; it then comes back from its journal (cures_ray/ledger/ledger.py) and callers
repeat their calls (actors/cluster/adapters.py).
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cures_ray.config import Config
from cures_ray.ledger.ledger import Ledger
from cures_ray.ledger.prompts import read_prompts
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


def _or_exit(call: Callable[..., Any]) -> Callable[..., Any]:
    """A call that could not be journalled must not be answered: end the process, come back without it."""

    @functools.wraps(call)
    def guarded(*args: Any) -> Any:
        try:
            return call(*args)
        except OSError as error:
            print(f"ledger: {error}; exiting, to come back from the journal", file=sys.stderr, flush=True)
            os._exit(1)

    return guarded


class LedgerActor:
    """Launch with ``ray.remote(LedgerActor).options(max_restarts=-1, max_task_retries=0)``.

    Args:
        folder: of the ledger, on a file system that the actor's node sees; ``write_prompts`` has been there.
        session: a new name at each start of a run, so that a restarted actor continues and a resumed run begins
            from ``checkpoint``.
    """

    def __init__(
        self,
        folder: str,
        config: Config,
        session: str,
        checkpoint: str | None = None,
    ) -> None:
        self._ledger = Ledger(
            Path(folder),
            config,
            *read_prompts(Path(folder)).columns,
            session=session,
            checkpoint=Path(checkpoint) if checkpoint else None,
        )

    def ping(self) -> dict[str, int]:
        """Process id, and how many journal records were applied when this process opened the ledger."""
        return {"pid": os.getpid(), "recovered": self._ledger.recovered}

    @_or_exit
    def lease(self, worker: str, max_rollouts: int, version: int, call: int = -1) -> list[Lease]:
        return self._ledger.lease(worker, max_rollouts, version, call)

    @_or_exit
    def settle(self, settlement: Settlement) -> SettleReply:
        return self._ledger.settle(settlement)

    @_or_exit
    def give_back(self, keys: list[tuple[int, int]], reason: Discard) -> None:
        self._ledger.give_back(keys, reason)

    def plan(self, batch: int) -> BatchPlan | None:
        return self._ledger.plan(batch)

    @_or_exit
    def commit(self, report: CommitReport) -> Accounting:
        return self._ledger.commit(report)

    def status(self) -> LedgerStatus:
        return self._ledger.status()

    def save(self, folder: str) -> None:
        self._ledger.save(Path(folder))
