"""A pool of verifier processes.

    verify(items) --chunks--> N threads, one each --a message of up to 64 items--> N workers (child.py)
                  <-verdicts-                     <-- a line a verdict, as it comes; late or torn: kill, fork anew --

Model outputs are hostile: an answer may ask for 9^9^9^9. An item that exceeds its time or memory, or takes its process
down, is a FAULT with the reason; the items after it meet a fresh process. Every wait has a deadline. A line without
the message's token, or bytes that nobody asked for, are a fault and the end of that process: a verdict never reaches
another item.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import queue
import secrets
import signal
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from cures_ray.config import VerifierConfig
from cures_ray.messages import ConfigError, Outcome, PromptRow, Verdict
from cures_ray.verify.mathematics import fault
from cures_ray.verify.nursery import BUILT_IN, START_SECONDS, Channel, ChildLost, Nursery

log = logging.getLogger(__name__)
MAX_ITEMS = 64  # a message


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifyItem:
    prompt: PromptRow
    completion: str


class Worker:
    """One process at a time, forked when needed. Used by one thread at a time."""

    def __init__(self, config: VerifierConfig, nursery: Nursery) -> None:
        self._fn, self._nursery = config.fn, nursery
        self._pid: int | None = None
        self._channel: Channel | None = None
        self._style = "item"

    def start(self) -> Channel:
        """The channel of a process that is ready. Raises ConfigError and ChildLost as ``Nursery.fork`` does."""
        if self._channel is not None:
            if not self._channel.unasked():
                return self._channel
            log.warning("a verifier process wrote what nobody asked for, or died; it was replaced")
        self.kill()
        self._pid, self._channel = self._nursery.fork()
        first = json.loads(self._channel.receive(time.monotonic() + START_SECONDS, "it was not ready in time"))
        if "error" in first:
            self.kill()
            raise ConfigError(first["error"])
        self._style = first["style"]
        return self._channel

    def judge(self, items: Sequence[VerifyItem], timeout_s: float) -> list[Verdict]:
        """One verdict an item; a fault for whatever goes wrong with it. Raises ConfigError as ``start`` does."""
        found: dict[int, Verdict] = {}
        while len(found) < len(items):
            left, began = [i for i in range(len(items)) if i not in found], time.monotonic()
            try:
                channel = self.start()
                began = time.monotonic()
                self._exchange(channel, items, left, found, timeout_s)
            except (ChildLost, OSError) as error:
                left = [i for i in left if i not in found]
                reason = self._death() if not str(error) or str(error) == "closed" else str(error)
                lost = left if self._style != "item" or self._channel is None else left[:1]
                self.kill()
                found |= {i: replace(fault(reason), seconds=time.monotonic() - began) for i in lost}
        return [found[i] for i in range(len(items))]

    def _exchange(
        self, channel: Channel, items: Sequence[VerifyItem], left: list[int], found: dict[int, Verdict], limit: float
    ) -> None:
        """Send ``left`` and put their verdicts in ``found``. Stops early when the process asks to be replaced."""
        token, groups, order = secrets.token_hex(6), [], []
        for rows in _runs(items, left):
            try:
                groups.append(self._group([items[i] for i in rows]))
                order += rows
            except (TypeError, ValueError, RecursionError) as error:
                found |= {i: fault(f"the data row is no JSON: {error}") for i in rows}
        if not order:
            return
        late = f"no verdict within {hard_deadline(limit):.3g} s, the verifier process was killed"
        message = f'{{"token": "{token}", "timeout_s": {limit}, "groups": [{", ".join(groups)}]}}\n'
        channel.send(message.encode(), time.monotonic() + hard_deadline(limit), late)
        waiting = set(range(len(order)))
        while waiting:
            line = channel.receive(time.monotonic() + hard_deadline(limit), late)
            place, verdict, retire = _read_verdict(line, token, waiting)
            waiting.remove(place)
            found[order[place]] = verdict
            if retire:
                self.kill()
                return
        if channel.unasked():
            found[order[place]] = fault(FOREIGN.format("after its verdict"))
            self.kill()

    def _group(self, items: Sequence[VerifyItem]) -> str:
        prompt, user = items[0].prompt, self._fn not in BUILT_IN
        group = {
            "answer": prompt.answer,
            "prompt": prompt.text if user else "",
            "row": prompt.row if user else {},
            "completions": [item.completion for item in items],
        }
        return json.dumps(group, default=_plain)

    def _death(self) -> str:
        pid, self._pid = self._pid, None
        status = self._nursery.end(pid) if pid is not None else None
        if status is None:
            return "the verifier process closed its output"
        how = f"signal {os.WTERMSIG(status)}" if os.WIFSIGNALED(status) else f"status {os.WEXITSTATUS(status)}"
        return f"the verifier process died ({how})"

    def end(self) -> None:
        """From another thread: let whoever waits for the process see its death."""
        if (pid := self._pid) is not None:
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)

    def kill(self) -> None:
        """End the process and what it started."""
        pid, channel, self._pid, self._channel = self._pid, self._channel, None, None
        if channel is not None:
            channel.socket.close()
        if pid is not None:
            self._nursery.end(pid)


FOREIGN = (
    "something wrote into the verifier's channel {}: "
    "a reward function must not write to descriptors that it did not open"
)


def _read_verdict(line: bytes, token: str, waiting: set[int]) -> tuple[int, Verdict, bool]:
    try:
        found, place, outcome, reward, detail, seconds, retire = json.loads(line)
        if found != token or place not in waiting:
            raise ValueError
        return place, Verdict(outcome=Outcome(outcome), reward=reward, detail=detail, seconds=seconds), retire
    except (ValueError, TypeError) as error:
        raise ChildLost(FOREIGN.format("instead of a verdict")) from error


def _runs(items: Sequence[VerifyItem], rows: Sequence[int]) -> Iterator[list[int]]:
    """``rows`` cut where the prompt changes."""
    run: list[int] = []
    for i in rows:
        if run and items[run[-1]].prompt is not items[i].prompt:
            yield run
            run = []
        run.append(i)
    if run:
        yield run


class VerifyPool:
    """``config.processes_per_worker`` processes. ``verify`` may be called from several threads at once."""

    def __init__(self, config: VerifierConfig) -> None:
        self.config = config
        self._nursery = Nursery(config)
        count = config.processes_per_worker
        self._workers = [Worker(config, self._nursery) for _ in range(count)]
        self._free: queue.LifoQueue[Worker] = queue.LifoQueue()
        for worker in self._workers:
            self._free.put(worker)
        self._threads = ThreadPoolExecutor(count, thread_name_prefix="verify")
        self._closed = False

    def prewarm(self) -> None:
        """Start all processes and wait for them.

        Raises:
            ConfigError: the verifier cannot be loaded, or its processes do not start.
        """
        futures = [self._threads.submit(self._start_one) for _ in self._workers]
        for future in futures:
            try:
                future.result(START_SECONDS + 10)
            except (ChildLost, TimeoutError) as error:
                raise ConfigError(f"verifier.fn = {self.config.fn!r}: {error}") from error

    def _start_one(self) -> None:
        worker = self._free.get(timeout=START_SECONDS)
        try:
            worker.start()
        finally:
            self._free.put(worker)

    def verify(self, items: Sequence[VerifyItem], timeout_s: float | None = None) -> list[Verdict]:
        """One verdict an item, in order. Takes at most len(items) hard deadlines, plus what was asked before.

        Made for long lists: a message to a process holds up to ``MAX_ITEMS`` items, those of one prompt together.

        Raises:
            ConfigError: the verifier cannot be loaded on this machine; no item's fault.
        """
        limit = timeout_s or self.config.timeout_s
        verdicts: list[Verdict] = [fault("the verifier pool was closed")] * len(items)
        work = [(rows, self._submit([items[i] for i in rows], limit)) for rows in self._chunks(items)]
        for rows, future in work:
            if future is None:
                continue
            try:
                for i, verdict in zip(rows, future.result(), strict=True):
                    verdicts[i] = verdict
            except CancelledError:
                continue
        return verdicts

    def _chunks(self, items: Sequence[VerifyItem]) -> Iterator[list[int]]:
        """Rows by prompt, cut into messages so that all processes have work."""
        groups: dict[int, list[int]] = {}
        for i, item in enumerate(items):
            groups.setdefault(id(item.prompt), []).append(i)
        rows = [i for group in groups.values() for i in group]
        size = min(MAX_ITEMS, max(1, -(-len(items) // len(self._workers))))
        yield from (rows[k : k + size] for k in range(0, len(rows), size))

    def _submit(self, items: list[VerifyItem], limit: float) -> Future[list[Verdict]] | None:
        try:
            return self._threads.submit(self._judge, items, limit)
        except RuntimeError:  # closed
            return None

    def _judge(self, items: list[VerifyItem], limit: float) -> list[Verdict]:
        if self._closed:
            return [fault("the verifier pool was closed")] * len(items)
        worker = self._free.get(timeout=START_SECONDS)  # as many threads as workers: one is free
        try:
            return worker.judge(items, limit)
        finally:
            self._free.put(worker)

    def close(self) -> None:
        """End all processes. Items in work become faults."""
        self._closed = True
        self._nursery.kill()
        self._threads.shutdown(wait=True, cancel_futures=True)  # their processes are dead: soon
        for worker in self._workers:
            worker.kill()
        self._nursery.close()

    def __enter__(self) -> VerifyPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def hard_deadline(timeout_s: float) -> float:
    """Seconds after which the parent kills; the child's own alarm, at ``timeout_s``, comes first where it can."""
    return timeout_s + min(1.0, max(0.25, timeout_s / 2))


def _plain(value: Any) -> Any:
    """A column of the data as JSON."""
    if isinstance(value, (np.ndarray, np.generic)):
        return value.tolist()
    if isinstance(value, (set, frozenset, tuple)):
        return list(value)
    return str(value)
