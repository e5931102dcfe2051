"""Where workers come from: a process that has loaded the verifier forks them in milliseconds and ends them."""

from __future__ import annotations

import contextlib
import json
import os
import select
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from cures_ray.config import VerifierConfig
from cures_ray.messages import ConfigError
from cures_ray.verify.child import kill_tree

START_SECONDS = 90.0  # a nursery's imports, on a busy machine or a network file system
ANSWER_SECONDS = 20.0  # of the nursery, which only forks and kills
BUILT_IN = ("math", "code")


class ChildLost(RuntimeError):
    """The process died, missed a deadline or wrote what it should not; the message says which."""


class Channel:
    """JSON lines over a socket, each wait with a deadline."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self.socket = sock
        self._rest = bytearray()
        self._poll = select.poll()

    def send(self, data: bytes, deadline: float, late: str) -> None:
        view = memoryview(data)
        while view:
            self._wait(select.POLLOUT, deadline, late)
            with contextlib.suppress(BlockingIOError, InterruptedError):
                view = view[self.socket.send(view) :]

    def receive(self, deadline: float, late: str) -> bytes:
        """One line."""
        while (end := self._rest.find(b"\n")) < 0:
            self._wait(select.POLLIN, deadline, late)
            try:
                chunk = self.socket.recv(1 << 16)
            except (BlockingIOError, InterruptedError):
                continue
            if not chunk:
                raise ChildLost("closed")
            self._rest += chunk
        line = bytes(self._rest[:end])
        del self._rest[: end + 1]
        return line

    def unasked(self) -> bool:
        """Whether something came that nobody waits for."""
        self._poll.register(self.socket, select.POLLIN)
        return bool(self._rest) or any(event & select.POLLIN for _, event in self._poll.poll(0))

    def _wait(self, event: int, deadline: float, late: str) -> None:
        self._poll.register(self.socket, event)
        if not self._poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
            raise ChildLost(late)


class Nursery:
    """The process that forks workers. Calls from several threads take turns."""

    def __init__(self, config: VerifierConfig) -> None:
        self._config = config
        self._lock = threading.Lock()
        self._closed = False
        self._process: subprocess.Popen[bytes] | None = None
        self._channel: Channel | None = None

    def fork(self) -> tuple[int, Channel]:
        """A new worker: its process id and its data channel.

        Raises:
            ConfigError: the verifier cannot be loaded.
            ChildLost: the nursery died or did not get ready in time.
        """
        with self._lock:
            if self._closed:
                raise ChildLost("the verifier pool was closed")
            try:
                channel = self._started()
                own, given = socket.socketpair()
                with given:
                    socket.send_fds(channel.socket, [b'{"start": true}'], [given.fileno()])
                return self._answer(channel)["pid"], Channel(own)
            except (ChildLost, OSError) as error:
                self._end()
                raise ChildLost(f"no verifier process could be started: {error}") from error

    def end(self, pid: int) -> int | None:
        """Kill a worker with its descendants. Returns its wait status, None if that is not known."""
        with self._lock:
            if self._channel is None:
                kill_tree(pid)
                return None
            try:
                self._channel.send(b'{"end": %d}' % pid, time.monotonic() + ANSWER_SECONDS, "no answer")
                return self._answer(self._channel)["status"]
            except (ChildLost, OSError):
                self._end()
                return None

    def close(self) -> None:
        with self._lock:
            self._end()

    def kill(self) -> None:
        """From any thread, at once and for good: whoever waits for a worker sees its death."""
        self._closed = True
        if (process := self._process) is not None:
            kill_tree(process.pid)

    def _started(self) -> Channel:
        if self._channel is not None and self._process is not None and self._process.poll() is None:
            return self._channel
        self._end()
        own, given = socket.socketpair()
        with given:
            command = [sys.executable, "-m", "cures_ray.verify.child", json.dumps(_child_options(self._config))]
            self._process = subprocess.Popen(
                [*command, str(given.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL if self._config.fn in BUILT_IN else None,
                env=_child_environment(self._config.fn),
                pass_fds=[given.fileno()],
                start_new_session=True,
            )
        self._channel = Channel(own)
        first = json.loads(self._channel.receive(time.monotonic() + START_SECONDS, "it was not ready in time"))
        if "error" in first:
            self._end()
            raise ConfigError(first["error"])
        return self._channel

    @staticmethod
    def _answer(channel: Channel) -> dict[str, Any]:
        return json.loads(channel.receive(time.monotonic() + ANSWER_SECONDS, "the nursery does not answer"))

    def _end(self) -> None:
        process, channel, self._process, self._channel = self._process, self._channel, None, None
        if process is not None:
            kill_tree(process.pid)
        if channel is not None:
            channel.socket.close()
        if process is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):  # in uninterruptible sleep; init will have it
                process.wait(10.0)


def _child_options(config: VerifierConfig) -> dict[str, Any]:
    names = ("fn", "max_rss_mb", "format_reward", "reward_range")
    return {name: getattr(config, name) for name in names}


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
