"""Read a run's ledger without touching it, also while the run goes on.

    RUN/run.json --> Config          RUN/ledger/history.jsonl --> one line a committed batch
    data.train   --> Prompts         RUN/ledger/snapshot + journal --copy--> Curriculum (apply)

A live run appends and prunes while we read. So the kept generations are copied into a temporary folder first (arrays
by hard link where possible), and a torn last line is left out. What is damaged is a text beside the result, so that
the rest can still be shown.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError

from cures_ray.config import Config
from cures_ray.curriculum.batches import digest
from cures_ray.curriculum.machine import Curriculum
from cures_ray.data.table import PromptTable, curriculum_columns, load_prompts, load_tokenizer
from cures_ray.ledger.journal import JournalError, read, read_header
from cures_ray.ledger.ledger import apply, generations, journal_path, load_generation
from cures_ray.messages import ConfigError
from cures_ray.snapshot import read_state

MARKUP = re.compile(r"<\|[^|<>]*\|>")  # of chat templates


class PlainTokenizer:
    """Renders a chat as its contents and counts no tokens. The ids of a model without a chat template come out
    right, and transformers need not be imported for them."""

    chat_template = "plain"

    def apply_chat_template(self, messages: list[dict[str, str]], **_: Any) -> str:
        return "\n\n".join(m["content"] for m in messages)

    def __call__(self, texts: Any, **_: Any) -> dict[str, list[Any]]:
        return {"input_ids": [] if isinstance(texts, str) else [[] for _ in texts]}


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompts:
    """What is known of the run's N prompts. ``note`` says why something is not, "" when all is."""

    count: int
    ids: np.ndarray | None = None  # uint64 [N]; None: unknown, prompts are named by their row
    levels: np.ndarray | None = None
    features: np.ndarray | None = None
    table: PromptTable | None = None  # None: no texts
    note: str = ""

    def name(self, row: int) -> str:
        return f"row {row}" if self.ids is None else f"{int(self.ids[row]):016x}"

    def text(self, row: int) -> str:
        """On one line, without the marks of the chat template."""
        if self.table is None:
            return ""
        return " ".join(MARKUP.sub(" ", self.table.columns["text"][row].as_py()).split())

    def level(self, row: int) -> str:
        return "" if self.levels is None else str(self.levels[row])

    def serve(self, config: Config) -> bool:
        """Whether the priors can be computed as in the run: a journal can be applied then."""
        prior = config.curriculum.prior_from
        return prior == "constant" or self.ids is not None or (prior == "level" and self.levels is not None)


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

    def load(self, copy: Path, generation: int) -> Curriculum:
        """The curriculum at the beginning of ``generation``.

        Raises:
            ConfigError: the snapshot is damaged, or not of this run.
        """
        p = self.prompts
        ids = _placeholder(p.count) if p.ids is None else p.ids
        try:
            return load_generation(copy, generation, self.config, ids, p.levels, p.features)
        except ValueError as error:
            raise ConfigError(f"{self.really(copy, error)}; the history remains: {self.ledger}/history.jsonl") from None

    def play(self, copy: Path, generation: int, curriculum: Curriculum, after: Callable[[Any], None]) -> str:
        """Apply the journal of ``generation``; ``after`` sees each applied record. Returns what ended it early, or
        "": the records before are applied then."""
        path = journal_path(copy, generation)
        offset = 0
        try:
            for offset, record in read(path):  # noqa: B007 (offset is used when applying fails)
                apply(curriculum, record)
                after(record)
        except JournalError as error:
            return self.really(copy, error)
        except (ValueError, AssertionError, LookupError, TypeError) as error:
            return (
                f"{self.ledger / path.name}: the record that ends at byte {offset} cannot be applied "
                f"({type(error).__name__}: {error}); it was written under another configuration than {self.folder}/"
                f"run.json holds, or by another version of this code"
            )
        return ""

    def really(self, copy: Path, error: object) -> str:
        """A message about the copy as one about the run."""
        return str(error).replace(str(copy), str(self.ledger))


def open_run(folder: Path, *, names: bool = True) -> Run:
    """``names`` = False: look for the prompts only where the priors need them (rendering them takes seconds).

    Raises:
        ConfigError: no run, a run without ledger, or files that cannot be read.
    """
    record = folder / "run.json"
    if not record.is_file():
        raise ConfigError(f"{folder} is not the folder of a run: it has no run.json; pass the run's checkpoint.dir")
    try:
        config = Config.model_validate(json.loads(record.read_text())["config"])
    except (json.JSONDecodeError, KeyError, TypeError, ValidationError) as error:
        first = str(error).splitlines()[0]
        raise ConfigError(
            f"{record} cannot be read: {first}; was it written by another version of this code?"
        ) from None
    ledger = folder / "ledger"
    numbers = generations(ledger) if ledger.is_dir() else []
    if not numbers:
        raise ConfigError(f"{folder} has no ledger yet ({ledger}); it begins when the run's actors stand")
    try:
        header = read_header(journal_path(ledger, numbers[-1]))
    except JournalError as error:
        raise ConfigError(str(error)) from None
    prompts = Prompts(count=int(header["prompts"]))
    if names or not prompts.serve(config):
        prompts = read_prompts(config, prompts.count, header["prompts_digest"], ledger / "prompts")
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


def read_prompts(config: Config, count: int, wanted: str, stored: Path) -> Prompts:
    """The prompts of the run, ``count`` with digest ``wanted``: ids and what the priors need from the folder
    ``stored`` (actors/ledger.py) where a run left it, texts from ``data.train`` if it is still the same."""
    if (stored / "state.json").exists():
        columns = read_state(stored)
        if digest(columns["ids"]) == wanted:
            return _with_texts(config, columns)
    try:
        plain = load_prompts(config.data, PlainTokenizer())
    except ConfigError as error:
        return Prompts(count=count, note=f"prompts are named by their row only: {error}")
    if digest(plain.ids) == wanted:
        return _known(config, plain)
    try:
        table = load_prompts(config.data, load_tokenizer(config.model))
    except ConfigError as error:
        if len(plain) != count:
            return Prompts(count=count, note=f"prompts are named by their row only: {error}")
        note = f"the ids are unknown, and the texts are matched by row: {error}"
        return Prompts(count=count, levels=plain.levels, table=plain, note=note)
    if digest(table.ids) != wanted:
        note = f"data.train = {config.data.train} has changed since the run ({len(table)} prompts, {count} in the run)"
        return Prompts(count=count, note=f"prompts are named by their row only: {note}")
    return _known(config, table)


def _with_texts(config: Config, columns: dict[str, Any]) -> Prompts:
    own = {"ids": columns["ids"], "levels": columns.get("levels"), "features": columns.get("features")}
    count, table, note = len(columns["ids"]), None, ""
    try:
        table = load_prompts(config.data, PlainTokenizer())
        if len(table) != count:
            table = load_prompts(config.data, load_tokenizer(config.model))
    except ConfigError as error:
        table, note = None, f"the texts are not shown: {error}"
    if table is not None and len(table) != count:
        note = f"the texts are not shown: data.train = {config.data.train} has {len(table)} prompts now, not {count}"
        table = None
    if table is not None and table.levels is not None:
        own["levels"] = table.levels  # the stored ones are codes
    return Prompts(count=count, table=table, note=note, **own)


def _known(config: Config, table: PromptTable) -> Prompts:
    ids, levels, features = curriculum_columns(config, table)
    return Prompts(count=len(ids), ids=ids, levels=levels, features=features, table=table)


@contextmanager
def copied(run: Run) -> Iterator[Path]:
    """A folder with the kept generations as they are now, that nobody writes to.

    Raises:
        ConfigError: there is none to copy.
    """
    with tempfile.TemporaryDirectory(prefix="cures-ledger-") as name:
        copy = Path(name)
        for number in generations(run.ledger):
            try:
                _copy_generation(run, number, copy)
            except FileNotFoundError:  # the run has pruned it meanwhile
                journal_path(copy, number).unlink(missing_ok=True)
            except ValueError as error:
                raise ConfigError(f"{run.ledger}: snapshot {number} cannot be read: {error}") from None
        if not generations(copy):
            raise ConfigError(f"{run.ledger} has no complete snapshot; if the run is going on, try again")
        yield copy


def _copy_generation(run: Run, number: int, copy: Path) -> None:
    source, target = (folder / f"snapshot-{number:06d}" for folder in (run.ledger, copy))
    target.mkdir()
    state = json.loads((source / "state.json").read_text())
    if run.prompts.ids is None:  # stand-ins, so that the rest can be read
        state["prompts_digest"] = digest(_placeholder(run.prompts.count))
    (target / "state.json").write_text(json.dumps(state))
    for array in source.glob("*.npy"):
        try:
            os.link(array, target / array.name)
        except FileNotFoundError:
            raise
        except OSError:  # another file system
            shutil.copyfile(array, target / array.name)
    shutil.copyfile(journal_path(run.ledger, number), journal_path(copy, number))


def _placeholder(count: int) -> np.ndarray:
    return np.arange(count, dtype=np.uint64)


def current(run: Run) -> tuple[Curriculum, str]:
    """The curriculum now, and what is wrong with it ("" if nothing).

    Raises:
        ConfigError: the newest snapshot is damaged.
    """
    with copied(run) as copy:
        newest = generations(copy)[-1]
        curriculum = run.load(copy, newest)
        if not run.prompts.serve(run.config):
            prior = run.config.curriculum.prior_from
            return curriculum, (
                f"the beliefs are those of the last snapshot (batch {curriculum.committed}): curriculum.prior_from = "
                f"{prior} needs data.train to apply the journal"
            )
        problem = run.play(copy, newest, curriculum, lambda record: None)
        if problem:
            problem += f"; what is shown as now is the state before that record, {curriculum.committed} batches in"
        _ = curriculum.pool.belief  # count the evidence that is still waiting
        return curriculum, problem
