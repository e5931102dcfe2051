"""What Prometheus and Ray's dashboard see: gauges of the run's metrics, and of every actor's process.

The driver's process gives each step's metrics under the names of cures_ray/run/metric_table.py. Each actor gives its
CPU seconds, memory, event-loop lag and queue, with the labels ``role`` and ``name``. Ray exports them on every node.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, suppress

import numpy as np
import psutil
from ray._private.profiling import profile  # Ray 2.60 has no public name for it; off without RAY_PROFILING
from ray.util.metrics import Gauge, Histogram

from cures_ray.run.metric_table import Metric, metric_of

EVERY_S = 2.0
QUANTILES = (0.1, 0.5, 0.9)
BOUNDARIES = {  # histogram of the driver -> upper bounds
    "staleness": [0.5, 1.5, 2.5, 4.5, 8.5],
    "n_by_lease": [1.5, 2.5, 4.5, 8.5, 16.5, 32.5],
}


def phase(name: str, **details: object) -> AbstractContextManager[None]:
    """A span in ``ray timeline``, inside the task that runs: ``with phase("write weights", version=3):``. Ray 2.60
    keeps none of an async actor's."""
    span: AbstractContextManager[None] = profile(name, {"name": name} | {k: str(v) for k, v in details.items()})
    return span


class RunGauges:
    """A sink of the driver's metrics (see cures_ray/run/sinks.py), labelled with the run's folder."""

    def __init__(self, run: str) -> None:
        self.run = run
        self._gauges: dict[str, Gauge] = {}
        self._histograms: dict[str, Histogram] = {}

    def step(self, step: int, metrics: Mapping[str, float], histograms: Mapping[str, np.ndarray]) -> None:
        for key, value in metrics.items():
            found = metric_of(key)
            if found is not None and np.isfinite(value):
                metric, label = found
                tags = {"run": self.run} | ({metric.label: label} if metric.label else {})
                self._gauge(metric).set(float(value), tags)
        for quantile in QUANTILES if len(histograms.get("belief_mean", ())) else ():
            value = float(np.quantile(histograms["belief_mean"], quantile))
            self._named("cures_belief_accuracy", "quantile", "believed accuracy of the prompts, quantiles").set(
                value, {"run": self.run, "quantile": f"{quantile:g}"}
            )
        for name, bounds in BOUNDARIES.items():
            for value in histograms.get(name, ()):
                self._histogram(name, bounds).observe(float(value) + 1e-9, {"run": self.run})

    def note(self, text: str) -> None:
        return None

    def close(self) -> None:
        return None

    def _gauge(self, metric: Metric) -> Gauge:
        return self._named(metric.prometheus, metric.label, f"{metric.meaning} ({metric.unit or 'no unit'})")

    def _named(self, name: str, label: str | None, meaning: str) -> Gauge:
        if name not in self._gauges:
            tags = ("run", label) if label else ("run",)
            self._gauges[name] = Gauge(name, description=meaning, tag_keys=tags)
        return self._gauges[name]

    def _histogram(self, name: str, bounds: list[float]) -> Histogram:
        if name not in self._histograms:
            self._histograms[name] = Histogram(f"cures_{name}", boundaries=bounds, tag_keys=("run",))
        return self._histograms[name]


class ProcessGauges:
    """One actor's process: ``asyncio.create_task(gauges.watch())`` in an async actor, ``report()`` in a plain one.

    Args:
        role: "driver", "ledger", "generator", "verifier" or "learner".
        name: unique in the run, such as "generator-0".
        numbers: called at every report; names of the "process/" metrics without the prefix -> value.
        children: with the processes that this one started: an engine, judges. The driver's may be all of Ray.
        on: False reports nothing (``logging.ray_metrics``).
    """

    def __init__(
        self,
        role: str,
        name: str,
        numbers: Callable[[], Mapping[str, float]] = dict,
        *,
        children: bool = True,
        on: bool = True,
    ) -> None:
        self._tags, self._numbers = {"role": role, "name": name}, numbers
        self._gauges: dict[str, Gauge] = {}
        self._process, self._children, self._on = psutil.Process(), children, on
        self._due = 0.0

    def report(self, lag_s: float = 0.0) -> None:
        """Set all gauges now."""
        if not self._on:
            return
        cpu_s, memory = self._used()
        values = {"cpu_seconds": cpu_s, "memory_bytes": memory, "event_loop_lag_seconds": lag_s}
        values |= self._numbers()
        for name, value in values.items():
            self._gauge(name).set(float(value), self._tags)

    def tick(self) -> None:
        """``report``, at most once in EVERY_S: for actors without an event loop, after each call."""
        if self._on and time.monotonic() >= self._due:
            self._due = time.monotonic() + EVERY_S
            self.report()

    def _used(self) -> tuple[float, float]:
        """(CPU seconds, bytes of resident memory)."""
        processes = [self._process, *(self._process.children(recursive=True) if self._children else [])]
        cpu_s = memory = 0.0
        for process in processes:
            with suppress(psutil.Error):  # it has just ended; its parent's times hold its own
                with process.oneshot():
                    spent = process.cpu_times()
                    memory += process.memory_info().rss
                cpu_s += spent.user + spent.system
                if self._children:
                    cpu_s += spent.children_user + spent.children_system
        return cpu_s, memory

    async def watch(self) -> None:
        """Report every few seconds, for the life of the actor."""
        while self._on:
            due = time.monotonic() + EVERY_S
            await asyncio.sleep(EVERY_S)
            self.report(time.monotonic() - due)

    def _gauge(self, name: str) -> Gauge:
        if name not in self._gauges:
            found = metric_of(f"process/{name}")
            if found is None:
                raise KeyError(f"process/{name} is not in cures_ray/run/metric_table.py")
            metric = found[0]
            self._gauges[name] = Gauge(metric.prometheus, description=metric.meaning, tag_keys=("role", "name"))
        return self._gauges[name]
