"""Ray nodes that join a cluster on this machine by ``ray start``, as on other machines, and leave it in two ways."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress

import psutil
import ray
from ray._private.state import state


class WorkerNode:
    """Joins the cluster of ``address``; ``id`` once it is alive. ``env``: of its Ray processes."""

    def __init__(self, address: str, cpus: int, resources: dict[str, float], **env: str) -> None:
        self.name = f"node-{time.monotonic_ns()}"
        mark = {self.name: 1.0}  # a resource of its own tells its node
        command = [
            *(f"{os.path.dirname(sys.executable)}/ray", "start", "--block", "--address", address),
            *("--num-cpus", str(cpus), "--object-store-memory", str(100 << 20)),
            *("--resources", json.dumps(resources | mark)),
        ]
        self.output = tempfile.TemporaryFile("w+")  # noqa: SIM115
        told = {"stdout": self.output, "stderr": subprocess.STDOUT}
        self.process = subprocess.Popen(command, env=os.environ | env, start_new_session=True, **told)

    @property
    def alive(self) -> bool:
        return any(n["Alive"] and self.name in n["Resources"] for n in ray.nodes())

    @property
    def id(self) -> str:
        return next(n["NodeID"] for n in ray.nodes() if self.name in n["Resources"])

    def joined(self) -> "WorkerNode":
        deadline = time.monotonic() + 90
        while not self.alive:
            assert time.monotonic() < deadline and self.process.poll() is None, f"it did not join: {self.said()}"
            time.sleep(0.3)
        return self

    def said(self) -> str:
        self.output.seek(0)
        return f"exit code {self.process.poll()}, {self.output.read()[-3000:]}"

    def lose(self) -> bool:
        """Everything on it ends at once, as on a machine without power."""
        victims = [self.process.pid, *(p.pid for p in psutil.Process(self.process.pid).children(recursive=True))]
        for pid in victims:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait(timeout=30)
        return len(victims) > 2

    def preempt(self) -> bool:
        """SIGTERM to ``ray start``, as Kubernetes sends it: the node drains for RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S
        and then ends. True once Ray says that it drains."""
        self.process.terminate()
        deadline = time.monotonic() + 30
        while self.id not in state.get_draining_nodes() and time.monotonic() < deadline:
            time.sleep(0.1)
        return self.id in state.get_draining_nodes()

    def end(self) -> None:
        if self.process.poll() is None:
            self.lose()
