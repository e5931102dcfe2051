"""The ledger actor: the one writer of the curriculum, one call at a time.

Ray starts it again when it dies; it then comes back from its journal (cures_ray/ledger/ledger.py) and callers
repeat their calls (actors/cluster/adapters.py).
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from actors.telemetry import ProcessGauges
from cures_ray.config import Config
from cures_ray.ledger.ledger import Ledger
from cures_ray.ledger.prompts import read_prompts
from cures_ray.messages import LeaseChunk


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
        self._gauges = ProcessGauges(config, "ledger", "ledger")

    def __repr__(self) -> str:
        return "ledger"

    def process(self) -> dict[str, int]:
        """Process id, and how many journal records were applied when this process opened the ledger."""
        return {"pid": os.getpid(), "recovered": self._ledger.recovered}

    def lease(self, worker: str, max_rollouts: int, version: int, call: int = -1) -> LeaseChunk:
        return LeaseChunk.of(self.call("lease", worker, max_rollouts, version, call))

    def call(self, method: str, *arguments: Any) -> Any:
        """A method of ``Ledger``. One that could not be journalled must not be answered: end the process, and come
        back without it."""
        try:
            return getattr(self._ledger, method)(*arguments)
        except OSError as error:
            if method == "save":  # the checkpoint's file system; the journal is whole
                raise
            print(f"ledger: {error}; exiting, to come back from the journal", file=sys.stderr, flush=True)
            os._exit(1)
        finally:
            self._gauges.tick()
