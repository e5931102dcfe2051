"""The run folder: one process at a time, one run, and nothing of a branch that was left.

claim   lock it, check whose run it is, find the checkpoint to resume   (changes nothing that is in it)
begin   move aside what a resumed run repeats, write run.json

RUN/lock            who holds the folder: flock, with process, host and time for people
RUN/run.json        what must not change between the starts of a run, and the configuration of the last start
RUN/abandoned-1/    checkpoints and log lines of steps that a resumed run does again
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import socket
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cures_ray.config import Config
from cures_ray.messages import ConfigError
from cures_ray.run.checkpoint import CheckpointStore, step_of


class Lock:
    """An exclusive flock on ``path``, until ``release`` or the end of this process.

    Raises:
        ConfigError: another process holds it; the message says which, where, and since when.
    """

    def __init__(self, path: Path) -> None:
        self.note = ""  # why nothing is locked, where the file system cannot
        self._file = path.open("a+b", buffering=0)
        os.register_at_fork(after_in_child=self._file.close)  # a child that outlives us must not hold the folder
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = _holder(self._file)
            self._file.close()
            raise ConfigError(
                f"checkpoint.dir = {path.parent} is in use by {holder}; wait for it, end it, or choose another folder"
            ) from None
        except OSError as error:
            self.note = f"{path.parent} cannot be locked ({error.strerror}): see to it that no second run uses it"
        self._file.truncate(0)
        own = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S %Z")}
        self._file.write(json.dumps(own).encode())

    def release(self) -> None:
        if not self._file.closed:
            with suppress(OSError):  # a file system without locks
                fcntl.flock(self._file, fcntl.LOCK_UN)
            self._file.close()


def _holder(file: Any) -> str:
    try:
        file.seek(0)
        own = json.loads(file.read())
        return f"process {own['pid']} on {own['host']} since {own['since']}"
    except (ValueError, KeyError, TypeError):
        return "another process"


@dataclass(slots=True, kw_only=True)
class RunFolder:
    """A claimed folder. ``notes`` are worth a remark in the log."""

    path: Path
    config: Config
    lock: Lock
    resume: Path | None  # the checkpoint to start from
    notes: list[str] = field(default_factory=list)
    _aside: Path | None = field(default=None, init=False)

    def begin(self) -> None:
        """Move aside what does not belong to this start's branch, and write run.json. After every other check: a
        start that fails leaves the folder as it was.

        Raises:
            ConfigError: not writable.
        """
        store = CheckpointStore(self.path)
        try:
            if self.resume is None:
                left = [p for name in STATE if (p := self.path / name).exists()]
                self._move([*left, *store.folders()])
            else:
                step = step_of(self.resume)
                self._move(store.abandoned_by(self.resume))
                self._cut("metrics.jsonl", "step", step)
                self._cut("samples.jsonl", "version", step)
            record = {"identity": fingerprint(self.config), "config": self.config.model_dump(mode="json")}
            _write(self.path / "run.json", json.dumps(record, indent=1))
        except OSError as error:
            raise _unwritable(self.path, error) from None
        if self._aside is not None:
            names = ", ".join(sorted(p.name for p in [*self._aside.iterdir(), *self._aside.glob("checkpoints/*")]))
            self.notes.append(f"what this start does not go on from lies in {self._aside} now: {names}")

    def _move(self, paths: list[Path]) -> None:
        for path in paths:
            target = self._other() / path.relative_to(self.path)
            target.parent.mkdir(parents=True, exist_ok=True)
            path.rename(target)

    def _cut(self, name: str, key: str, last: int) -> None:
        """Lines of steps after ``last`` are made again: they go to another file, so that no step is there twice."""
        path = self.path / name
        if not path.exists():
            return
        kept: list[str] = []
        later: list[str] = []
        for line in path.read_text(errors="replace").splitlines():
            try:
                (later if json.loads(line).get(key, 0) > last else kept).append(line)
            except (ValueError, AttributeError):  # torn by the end of a process
                later.append(line)
        if later:
            (self._other() / name).write_text("".join(f"{line}\n" for line in later))
            _write(path, "".join(f"{line}\n" for line in kept))

    def _other(self) -> Path:
        """RUN/abandoned-<n>, one for all that this start moves."""
        if self._aside is None:
            self._aside = self.path / f"abandoned-{1 + sum(1 for _ in self.path.glob('abandoned-*'))}"
            self._aside.mkdir()
        return self._aside


STATE = ("metrics.jsonl", "samples.jsonl", "tensorboard", "ledger")  # of a run without a checkpoint: it starts over


def claim(path: Path, config: Config) -> RunFolder:
    """Lock ``path`` for this run and find the checkpoint to resume.

    Raises:
        ConfigError: not writable, in use, holds another run, or holds a run that ``checkpoint.resume`` = none would
            overwrite.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        if not os.access(path, os.W_OK):
            raise PermissionError("not writable")
        lock = Lock(path / "lock")
    except OSError as error:
        raise _unwritable(path, error) from None
    try:
        record = path / "run.json"
        if holds_run(path):
            if not record.exists():
                raise ConfigError(f"checkpoint.dir = {path} holds files of an unknown run; choose another folder")
            _check_same_run(record, config)
        resume, problems = CheckpointStore(path).resolve(config.checkpoint.resume)
        notes = [lock.note] if lock.note else []
        notes += [f"checkpoint passed over: {p}" for p in problems]
        if resume is not None and record.exists():
            notes += changed_settings(_read(record)["config"], config.model_dump(mode="json"))
        return RunFolder(path=path, config=config, lock=lock, resume=resume, notes=notes)
    except BaseException:
        lock.release()
        raise


def changed_settings(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """One remark a key whose value a resumed run changes."""
    return [
        f"resumed with another {section}.{key}: {old.get(section, {}).get(key)} before, {value} now"
        for section, values in new.items()
        for key, value in values.items()
        if key in old.get(section, {}) and old[section][key] != value
    ]


def holds_run(run_dir: Path) -> bool:
    """Whether a step was trained here. A try that ended before that leaves the folder free: the next one may have
    other data or another model, and what was logged is set aside."""
    if any(run_dir.glob("checkpoints/step-*")):
        return True
    log = run_dir / "metrics.jsonl"
    return log.exists() and b'"step": ' in log.read_bytes()


def fingerprint(config: Config) -> dict[str, str]:
    """What must not change between the parts of one run."""
    curriculum = hashlib.sha256(config.curriculum.model_dump_json().encode()).hexdigest()[:12]
    return {
        "model.path": config.model.path,
        "data.train": config.data.train,
        "trainer.seed": str(config.trainer.seed),
        "verifier.fn": config.verifier.fn,
        "curriculum": curriculum,
    }


def _check_same_run(record: Path, config: Config) -> None:
    if config.checkpoint.resume == "none":
        raise ConfigError(
            f"checkpoint.dir = {record.parent} holds a run already; choose another folder, delete it, or set "
            "checkpoint.resume=auto to continue it"
        )
    old = _read(record)["identity"]
    changed = [f"{k}: {old.get(k)} there, {v} here" for k, v in fingerprint(config).items() if old.get(k) != v]
    if changed:
        raise ConfigError(
            f"checkpoint.dir = {record.parent} holds another run ({'; '.join(changed)}); choose another folder"
        )


def _read(record: Path) -> dict[str, Any]:
    try:
        facts = json.loads(record.read_text())
        return {"identity": dict(facts["identity"]), "config": dict(facts["config"])}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{record} is damaged ({error}): it cannot be told whose run this is. Restore it, or start in another "
            f"folder with checkpoint.resume = {record.parent}/checkpoints/STEP"
        ) from None


def _write(path: Path, text: str) -> None:
    """Whole or not at all."""
    temporary = path.with_suffix(".writing")
    temporary.write_text(text)
    os.replace(temporary, path)


def _unwritable(path: Path, error: OSError) -> ConfigError:
    return ConfigError(f"checkpoint.dir = {path} cannot be written: {error}; choose another folder")
