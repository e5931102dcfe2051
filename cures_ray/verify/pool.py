"""A pool of verifier processes, and the self-test of a verifier.

    verify(items) --chunks--> N threads, one each --JSON lines--> N processes (verify_child.py)
                  <-verdicts-                    <-- verdict or deadline: kill, start anew --

Model outputs are hostile: an answer may ask for 9^9^9^9. An item that exceeds its time or memory, or takes its process
down, is a FAULT with the reason; the items after it meet a fresh process. Every wait has a deadline.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import select
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from cures_ray.config import Config, VerifierConfig
from cures_ray.messages import ConfigError, Outcome, PromptRow, Verdict
from cures_ray.verify.mathematics import fault, printable

START_SECONDS = 90.0  # a child's imports, on a busy machine or a network file system
BUILT_IN = ("math", "code")


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifyItem:
    prompt: PromptRow
    completion: str


class ChildLost(RuntimeError):
    """The process died or missed a deadline; the message says which."""


class Child:
    """One ``verify_child`` process, started when needed. Used by one thread at a time."""

    def __init__(self, config: VerifierConfig) -> None:
        self._config = config
        self._process: subprocess.Popen[bytes] | None = None
        self._rest = b""

    def start(self) -> None:
        """Start the process unless it runs.

        Raises:
            ConfigError: the verifier cannot be loaded in it.
            ChildLost: it died or did not get ready in time.
        """
        if self._process is not None and self._process.poll() is None:
            return
        self.kill()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "cures_ray.verify.child", json.dumps(_child_options(self._config))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL if self._config.fn in BUILT_IN else None,
            env=_child_environment(self._config.fn),
            start_new_session=True,
            bufsize=0,
        )
        assert self._process.stdin is not None and self._process.stdout is not None
        for pipe in (self._process.stdin, self._process.stdout):
            os.set_blocking(pipe.fileno(), False)
        self._rest = b""
        first = self._receive(time.monotonic() + START_SECONDS, "did not start")
        if "error" in first:
            self.kill()
            raise ConfigError(first["error"])

    def judge(self, item: VerifyItem, timeout_s: float) -> Verdict:
        """One item's verdict; a fault for whatever goes wrong with it. Raises ConfigError as ``start`` does."""
        began = time.monotonic()
        try:
            self.start()
            began = time.monotonic()
            answer = self._ask(item, timeout_s)
        except ChildLost as error:
            self.kill()
            return replace(fault(str(error)), seconds=time.monotonic() - began)
        except (TypeError, ValueError, RecursionError) as error:  # before anything was sent
            return fault(f"the data row is no JSON: {error}")
        if answer["retire"]:
            self.kill()
        return Verdict(
            outcome=Outcome(answer["outcome"]),
            reward=answer["reward"],
            detail=answer["detail"],
            seconds=time.monotonic() - began,
        )

    def _ask(self, item: VerifyItem, timeout_s: float) -> dict[str, Any]:
        request: dict[str, Any] = {"completion": item.completion, "answer": item.prompt.answer, "timeout_s": timeout_s}
        if self._config.fn not in BUILT_IN:
            request |= {"prompt": item.prompt.text, "row": item.prompt.row}
        deadline = time.monotonic() + hard_deadline(timeout_s)
        late = f"no verdict within {hard_deadline(timeout_s):.3g} s, the verifier process was killed"
        self._send(json.dumps(request, default=_plain).encode() + b"\n", deadline, late)
        return self._receive(deadline, late)

    def _send(self, data: bytes, deadline: float, late: str) -> None:
        assert self._process is not None and self._process.stdin is not None
        descriptor, view = self._process.stdin.fileno(), memoryview(data)
        while view:
            self._wait(descriptor, select.POLLOUT, deadline, late)
            try:
                view = view[os.write(descriptor, view[: 1 << 16]) :]
            except BlockingIOError:
                continue
            except OSError as error:
                raise ChildLost(self._death()) from error

    def _receive(self, deadline: float, late: str) -> dict[str, Any]:
        assert self._process is not None and self._process.stdout is not None
        descriptor, parts = self._process.stdout.fileno(), [self._rest]
        while b"\n" not in parts[-1]:
            self._wait(descriptor, select.POLLIN, deadline, late)
            try:
                chunk = os.read(descriptor, 1 << 16)
            except BlockingIOError:
                continue
            if not chunk:
                raise ChildLost(self._death())
            parts.append(chunk)
        line, _, self._rest = b"".join(parts).partition(b"\n")
        return json.loads(line)

    @staticmethod
    def _wait(descriptor: int, event: int, deadline: float, late: str) -> None:
        poll = select.poll()
        poll.register(descriptor, event)
        if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
            raise ChildLost(late)

    def _death(self) -> str:
        assert self._process is not None
        try:
            status = self._process.wait(5.0)
        except subprocess.TimeoutExpired:
            return "the verifier process closed its output"
        return f"the verifier process died ({f'signal {-status}' if status < 0 else f'status {status}'})"

    def end(self) -> None:
        """From another thread: let whoever waits for the process see its death."""
        if (process := self._process) is not None:
            with contextlib.suppress(OSError):
                os.killpg(process.pid, 9)

    def kill(self) -> None:
        """End the process and what it started; they are a process group."""
        self.end()
        process, self._process = self._process, None
        if process is None:
            return
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                pipe.close()
        try:
            process.wait(10.0)
        except subprocess.TimeoutExpired:  # in uninterruptible sleep; init will have it
            return


class VerifyPool:
    """``config.processes_per_worker`` processes. ``verify`` may be called from several threads at once."""

    def __init__(self, config: VerifierConfig) -> None:
        self.config = config
        count = config.processes_per_worker
        self._children = [Child(config) for _ in range(count)]
        self._free: queue.LifoQueue[Child] = queue.LifoQueue()
        for child in self._children:
            self._free.put(child)
        self._threads = ThreadPoolExecutor(count, thread_name_prefix="verify")
        self._closed = False

    def prewarm(self) -> None:
        """Start all processes and wait for them.

        Raises:
            ConfigError: the verifier cannot be loaded, or its processes do not start.
        """
        futures = [self._threads.submit(self._start_one) for _ in self._children]
        for future in futures:
            try:
                future.result(START_SECONDS + 10)
            except (ChildLost, TimeoutError) as error:
                raise ConfigError(f"verifier.fn = {self.config.fn!r}: {error}") from error

    def _start_one(self) -> None:
        child = self._free.get(timeout=START_SECONDS)
        try:
            child.start()
        finally:
            self._free.put(child)

    def verify(self, items: Sequence[VerifyItem], timeout_s: float | None = None) -> list[Verdict]:
        """One verdict an item, in order. Takes at most len(items) hard deadlines, plus what was asked before.

        Items of one prompt go to one process in one go as far as all processes stay busy: it parses the gold once.

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
        """Rows by prompt, cut so that no chunk is longer than an equal share of the processes."""
        groups: dict[str, list[int]] = {}
        for i, item in enumerate(items):
            groups.setdefault(item.prompt.answer, []).append(i)
        size = max(1, -(-len(items) // len(self._children)))
        for rows in groups.values():
            yield from (rows[k : k + size] for k in range(0, len(rows), size))

    def _submit(self, items: list[VerifyItem], limit: float) -> Future[list[Verdict]] | None:
        try:
            return self._threads.submit(self._judge, items, limit)
        except RuntimeError:  # closed
            return None

    def _judge(self, items: list[VerifyItem], limit: float) -> list[Verdict]:
        child = self._free.get(timeout=START_SECONDS)  # as many threads as children: one is free
        try:
            return [
                child.judge(item, limit) if not self._closed else fault("the verifier pool was closed")
                for item in items
            ]
        finally:
            self._free.put(child)

    def close(self) -> None:
        """End all processes. Items in work become faults."""
        self._closed = True
        for child in self._children:
            child.end()
        self._threads.shutdown(wait=True, cancel_futures=True)  # their processes are dead: soon
        for child in self._children:
            child.kill()

    def __enter__(self) -> VerifyPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def hard_deadline(timeout_s: float) -> float:
    """Seconds after which the parent kills; the child's own alarm, at ``timeout_s``, comes first where it can."""
    return timeout_s + min(1.0, max(0.25, timeout_s / 2))


def _child_options(config: VerifierConfig) -> dict[str, Any]:
    return {"fn": config.fn, "max_rss_mb": config.max_rss_mb, "format_reward": config.format_reward}


def _child_environment(fn: str) -> dict[str, str]:
    """User functions see the environment (keys, proxies); the built-in verifiers get next to nothing of it."""
    own = {
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).resolve().parents[2]), *filter(None, sys.path)]),
        "OPENBLAS_NUM_THREADS": "1",  # threads would reserve more address space than max_rss_mb allows
        "OMP_NUM_THREADS": "1",
        "PYTHONIOENCODING": "utf-8:backslashreplace",
        "PYTHONHASHSEED": "0",  # SymPy orders by hash: the same item takes the same path in every process
    }
    kept = {k: os.environ[k] for k in ("PATH", "TMPDIR", "LD_LIBRARY_PATH", "LANG") if k in os.environ}
    return {**(kept if fn in BUILT_IN else os.environ), **own}


def _plain(value: Any) -> Any:
    """A column of the data as JSON."""
    if isinstance(value, (np.ndarray, np.generic)):
        return value.tolist()
    if isinstance(value, (set, frozenset, tuple)):
        return list(value)
    return str(value)


CODE_GOLD = '{"entry": "f", "tests": [[[2], 4], [[5], 25]]}'
KNOWN: dict[str, list[tuple[str, str, Outcome]]] = {  # (gold, completion, outcome)
    "math": [
        ("42", r"so \boxed{42}", Outcome.CORRECT),
        (r"\frac{x+1}{2}", r"\boxed{0.5x + \frac{1}{2}}", Outcome.CORRECT),
        ("42", r"\boxed{41}", Outcome.INCORRECT),
        ("42", "42", Outcome.INCORRECT),
        (r"\sqrt{2}", r"\boxed{\sqrt{3}}", Outcome.INCORRECT),
        ("", r"\boxed{1}", Outcome.FAULT),
    ],
    "code": [
        (CODE_GOLD, r"\boxed{x * x}", Outcome.CORRECT),
        (CODE_GOLD, "```python\ndef f(x):\n    return x ** 2\n```", Outcome.CORRECT),
        (CODE_GOLD, r"\boxed{x + 2}", Outcome.INCORRECT),
        (CODE_GOLD, "```python\nimport os\nos.fork()\n```", Outcome.INCORRECT),
        ("no tests", r"\boxed{x}", Outcome.FAULT),
    ],
}
HOSTILE = {"math": ("3", r"\boxed{9^{9^{9^{9}}}}"), "code": (CODE_GOLD, "```python\nwhile True: pass\n```")}


def self_test(config: Config, row: PromptRow | None = None) -> None:
    """Prove the verifier before a run trusts it.

    Built-in ones must judge known answers rightly and cut a hostile one off; a gold of the data (``row``), boxed, must
    not be a fault. A user function must load, and return valid rewards for ``row`` with its gold and with nothing.

    Raises:
        ConfigError: it does not.
    """
    verifier = config.verifier
    with VerifyPool(verifier.model_copy(update={"processes_per_worker": 1})) as pool:
        pool.prewarm()
        if verifier.fn in BUILT_IN:
            _test_built_in(pool, verifier.fn)
        if row is not None:
            _test_row(pool, verifier.fn, row)


def _test_built_in(pool: VerifyPool, fn: str) -> None:
    items = [VerifyItem(prompt=_probe(gold), completion=completion) for gold, completion, _ in KNOWN[fn]]
    wrong = [
        f"{completion!r} against {gold!r}: {verdict.outcome.value} instead of {expected.value} ({verdict.detail})"
        for (gold, completion, expected), verdict in zip(KNOWN[fn], pool.verify(items), strict=True)
        if verdict.outcome is not expected
    ]
    gold, completion = HOSTILE[fn]
    (hostile,) = pool.verify([VerifyItem(prompt=_probe(gold), completion=completion)], timeout_s=0.5)
    if hostile.outcome is Outcome.CORRECT:
        wrong.append(f"{completion!r} against {gold!r}: correct")
    if wrong:
        raise ConfigError(f"the {fn} verifier fails its self-test; do not train on it: " + "; ".join(wrong))


def _test_row(pool: VerifyPool, fn: str, row: PromptRow) -> None:
    completions = ["\\boxed{" + row.answer + "}", ""]
    for completion, verdict in zip(
        completions, pool.verify([VerifyItem(prompt=row, completion=c) for c in completions]), strict=True
    ):
        if verdict.is_fault:
            columns = ", ".join(row.row) or "none"
            raise ConfigError(
                f"verifier.fn = {fn!r} gives no reward for the first prompt of the data: {verdict.detail}. "
                f"Its answer is {printable(row.answer, 80)!r}, its other columns: {columns}; the completion was "
                f"{printable(completion, 80)!r}. Check verifier.fn and data.answer_key"
            )


def _probe(gold: str) -> PromptRow:
    return PromptRow(prompt_id="0" * 16, text="", token_ids=np.zeros(0, np.int32), answer=gold)
