"""Read a run's ledger without touching it, also while the run goes on.

    RUN/run.json --> Config                   RUN/ledger/history.jsonl --> one line a committed batch
    RUN/ledger/prompts --> Prompts            RUN/ledger/snapshot + journal --apply--> Curriculum

A live run appends to its journal and removes old ones. A torn last record is left out (journal.py), and a generation
that has just gone is passed over. What is damaged is a text beside the result, so that the rest can be shown.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from cures_ray.config import Config
from cures_ray.curriculum.machine import Curriculum
from cures_ray.ledger.journal import JournalError, read, read_header
from cures_ray.ledger.lease_log import COLUMNS, LeaseLog, find_lease
from cures_ray.ledger.ledger import apply, generations, journal_path, load_generation
from cures_ray.ledger.prompts import Prompts, read_prompts
from cures_ray.messages import ConfigError

After = Callable[[list[Any], Any], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """A run folder with a ledger."""

    folder: Path
    config: Config
    history: list[dict[str, Any]]  # rising by batch
    prompts: Prompts

    @property
    def ledger(self) -> Path:
        return self.folder / "ledger"

    def load(self, generation: int) -> Curriculum:
        """The curriculum at the beginning of ``generation``.

        Raises:
            ConfigError: the snapshot is damaged, or not of this run.
        """
        try:
            return load_generation(self.ledger, generation, self.config, *self.prompts.columns)
        except ValueError as error:
            raise ConfigError(f"{error}; the history remains: {self.ledger}/history.jsonl") from None

    def play(self, generation: int, curriculum: Curriculum, after: After = lambda record, answer: None) -> str:
        """Apply the journal of ``generation``; ``after`` sees each record and its answer. Returns what ended it early,
        or "": the records before are applied then."""
        path = journal_path(self.ledger, generation)
        offset = 0
        try:
            for offset, record in read(path):  # noqa: B007 (offset is used when applying fails)
                after(record, apply(curriculum, record))
        except (JournalError, OSError) as error:
            return str(error)
        except (ValueError, AssertionError, LookupError, TypeError) as error:
            return (
                f"{path}: the record that ends at byte {offset} cannot be applied ({type(error).__name__}: {error}); "
                f"it was written under another configuration than {self.folder}/run.json holds, or by another "
                f"version of this code"
            )
        return ""


def open_run(folder: Path) -> Run:
    """Raises ConfigError: no run, a run without ledger, or files that cannot be read."""
    record, ledger = folder / "run.json", folder / "ledger"
    if not record.is_file():
        raise ConfigError(f"{folder} is not the folder of a run: it has no run.json; pass the run's checkpoint.dir")
    try:
        config = Config.model_validate(json.loads(record.read_text())["config"])
    except (ValueError, KeyError, TypeError, ValidationError) as error:
        first = str(error).splitlines()[0]
        raise ConfigError(
            f"{record} cannot be read: {first}; was it written by another version of this code?"
        ) from None
    numbers = generations(ledger)
    if not numbers:
        raise ConfigError(f"{folder} has no ledger yet ({ledger}); it begins when the run's actors stand")
    try:
        prompts = read_prompts(ledger, read_header(journal_path(ledger, numbers[-1]))["prompts_digest"])
    except ValueError as error:
        raise ConfigError(str(error)) from None
    return Run(folder=folder, config=config, history=read_history(ledger / "history.jsonl"), prompts=prompts)


def read_history(path: Path) -> list[dict[str, Any]]:
    """The committed batches, without a torn line."""
    lines: dict[int, dict[str, Any]] = {}
    for text in path.read_bytes().split(b"\n") if path.exists() else []:
        try:
            line = json.loads(text)
            lines[int(line["batch"])] = line
        except (ValueError, KeyError, TypeError):  # being written
            continue
    return [lines[batch] for batch in sorted(lines)]


def current(run: Run) -> tuple[Curriculum, str]:
    """The curriculum now, and what is wrong with it ("" if nothing).

    Raises:
        ConfigError: the newest snapshot is damaged.
    """
    newest = generations(run.ledger)[-1]
    curriculum = run.load(newest)
    problem = run.play(newest, curriculum)
    if problem:
        problem += f"; what is shown as now is the state before that record, {curriculum.committed} batches in"
    _ = curriculum.pool.belief  # count the evidence that is still waiting
    return curriculum, problem


def lease_life(run: Run, lease_id: int) -> dict[str, Any]:
    """All that is known of a lease, by the names of ``lease_log.COLUMNS``, with its ``state``.

    Raises:
        ConfigError: there is no such lease.
    """
    life = find_lease(run.ledger, lease_id)
    if life is not None:
        return life | {"state": "committed"}
    newest = generations(run.ledger)[-1]
    curriculum, log = run.load(newest), LeaseLog()
    problem = run.play(newest, curriculum, lambda record, answer: log.see(record, answer, curriculum))
    for number, batch in curriculum.batches.items():
        for tracked in batch.leases:
            if tracked.lease.lease_id == lease_id:
                return dict(zip(COLUMNS, log.line(tracked, number, 0, {}), strict=True)) | {"state": tracked.state}
    raise ConfigError(
        f"{run.folder} has no lease {lease_id}: {curriculum.next_lease} are planned so far, from 0 on"
        + (f"; {problem}" if problem else "")
    )
