"""Cells of a sweep, one after the other (or ``jobs`` at a time), each in its own process group.

    FOLDER/cells/NAME.json       a finished cell, never run again while spec, code and its arm's settings are the same
    FOLDER/cells/NAME.failed.json  the error of a cell that failed; run again only with ``retry_failed``
    FOLDER/cells/NAME.log        its output

A crash, a kill or a timeout costs one cell; a killed sweep continues where it was.
"""

from __future__ import annotations

import importlib
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.harness.cell import Spec, code_digest, config_of
from benchmarks.harness.real_task import REAL_TASK

Command = Callable[[Path, Path], list[str]]  # (spec file, result file) -> argv
POLL_S = 0.2
# PYTHONDONTWRITEBYTECODE makes each process compile transformers again, for half a minute
COMPILED_ONCE = {
    "PYTHONDONTWRITEBYTECODE": "",
    "PYTHONPYCACHEPREFIX": str(Path(tempfile.gettempdir()) / "cures-pycache"),
}
REAL = {"PYTHONHASHSEED": "0"}  # some tasks of reasoning-gym walk over sets
ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}


def cell_command(spec: Path, result: Path) -> list[str]:
    return [sys.executable, "-m", "benchmarks.harness.cell", str(spec), str(result)]


class Forked:
    """A cell in a fork of this process, which has the libraries loaded: saves their import, a fifth of a small cell.

    As ``subprocess.Popen``: a session of its own, ``pid``, ``poll``, ``wait``, ``returncode``.
    """

    def __init__(self, spec: Path, result: Path, log: Path) -> None:
        self._process = multiprocessing.get_context("fork").Process(target=_run_forked, args=(spec, result, log))
        self._process.start()
        self.pid = int(self._process.pid or 0)

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> None:
        self._process.join(timeout)


Process = Forked | subprocess.Popen[bytes]


def preload() -> None:
    """Import what a cell in process needs, with one thread, before the first fork. No tensor is computed here."""
    os.environ.update(ONE_THREAD)
    importlib.import_module("benchmarks.inprocess.engine")
    importlib.import_module("transformers.models.qwen3.modeling_qwen3")


def _run_forked(spec: Path, result: Path, log: Path) -> None:
    os.setsid()
    with log.open("wb") as file:
        for descriptor in (1, 2):
            os.dup2(file.fileno(), descriptor)
    from benchmarks.harness.cell import main

    sys.exit(main([str(spec), str(result)]))


@dataclass(slots=True)
class Sweep:
    """Runs cells into ``folder``.

    Args:
        jobs: cells at a time.
        timeout_s: a cell that takes longer is ended with everything it started.
        other_code: keep cells that ran other code (their rows say which commit).
        until: ``time.time()`` after which no further cell is started.
    """

    folder: Path
    jobs: int = 1
    timeout_s: float = 3600.0
    retry_failed: bool = False
    other_code: bool = False
    until: float | None = None
    command: Command | None = None  # None: cells in process are forks, cells of the full system run ``cell_command``
    log: Callable[[str], None] = print

    def run(self, specs: list[Spec]) -> None:
        """Every cell that is not finished yet. Failures are recorded, not raised."""
        (self.folder / "cells").mkdir(parents=True, exist_ok=True)
        waiting = [s for s in specs if not self._settled(s)]
        total, done, began = len(waiting), 0, time.monotonic()
        self.log(f"sweep: {len(specs)} cells, {len(specs) - total} finished before, {total} to run")
        running: dict[Process, tuple[Spec, float]] = {}
        try:
            while waiting or running:
                late = self.until is not None and time.time() > self.until
                if late and not running:
                    self.log(f"sweep: out of time, {len(waiting)} cells are left for the next call")
                    return
                while waiting and len(running) < self.jobs and not late:
                    spec = waiting.pop(0)
                    running[self._start(spec)] = (spec, time.monotonic())
                time.sleep(POLL_S)
                for process in [p for p in running if self._ended(p, running[p][1])]:
                    spec, since = running.pop(process)
                    done += 1
                    note = self._finish(spec, process.returncode, time.monotonic() - since)
                    left = (time.monotonic() - began) / done * (total - done)
                    self.log(f"sweep: [{done}/{total}] {spec.name}: {note}; about {_minutes(left)} left")
        finally:
            for process in running:
                _end_group(process)

    def result(self, spec: Spec) -> dict[str, Any] | None:
        """The record of a finished or failed cell, None if it has not been run."""
        for path in (self._path(spec), self._path(spec, ".failed.json")):
            if path.exists():
                record = json.loads(path.read_text())
                if Spec(**record["spec"]) == spec and not self._changed(record, spec):
                    return record
        return None

    def _changed(self, record: dict[str, Any], spec: Spec) -> bool:
        """Whether the cell would come out otherwise now: it ran other code, or a setting of its arm has changed."""
        then = record.get("config")
        if then is None:
            return False
        if record.get("code") != code_digest() and not self.other_code:
            return True
        now = config_of(spec, Path(then["checkpoint"]["dir"])).model_dump(mode="json")
        return any(now[section].get(key, value) != value for section in then for key, value in then[section].items())

    def _path(self, spec: Spec, suffix: str = ".json") -> Path:
        return self.folder / "cells" / f"{spec.name}{suffix}"

    def _settled(self, spec: Spec) -> bool:
        record = self.result(spec)
        return record is not None and (record["status"] == "done" or not self.retry_failed)

    def _start(self, spec: Spec) -> Process:
        path = self._path(spec, ".spec")
        path.write_text(json.dumps(asdict(spec)))
        self._path(spec).unlink(missing_ok=True)
        self._path(spec, ".failed.json").unlink(missing_ok=True)
        if self.command is None and spec.engine == "inprocess" and spec.task != REAL_TASK:
            preload()
            return Forked(path, self._path(spec), self._path(spec, ".log"))
        threads = ONE_THREAD if spec.engine == "inprocess" else {}
        with self._path(spec, ".log").open("wb") as log:
            return subprocess.Popen(
                (self.command or cell_command)(path, self._path(spec)),
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env=os.environ | COMPILED_ONCE | threads | (REAL if spec.task == REAL_TASK else {}),
            )

    def _ended(self, process: Process, since: float) -> bool:
        if process.poll() is not None:
            _end_group(process)  # whatever it left behind
            return True
        if time.monotonic() - since > self.timeout_s:
            _end_group(process)
            process.wait(timeout=30)
            return True
        return False

    def _finish(self, spec: Spec, code: int | None, seconds: float) -> str:
        path = self._path(spec)
        if code == 0 and path.exists():
            self._path(spec, ".spec").unlink(missing_ok=True)
            return f"{_headline(json.loads(path.read_text()))} in {seconds:.0f} s"
        tail = self._path(spec, ".log").read_text(errors="replace").strip().splitlines()[-12:]
        why = "timed out" if seconds > self.timeout_s else f"exit code {code}"
        record = {"status": "failed", "spec": asdict(spec), "why": why, "log": tail, "seconds": round(seconds, 1)}
        self._path(spec, ".failed.json").write_text(json.dumps(record, indent=1) + "\n")
        return f"FAILED ({why}): {tail[-1] if tail else 'no output'}"


def _headline(record: dict[str, Any]) -> str:
    curve = record.get("curve") or []
    return f"accuracy {curve[0]['sampled']:.3f} -> {curve[-1]['sampled']:.3f}" if curve else "done"


def _end_group(process: Process) -> None:
    """End the cell's own process group; it was started as a session of its own."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)


def _minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"
