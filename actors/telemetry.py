"""What Prometheus and Ray's dashboard see: gauges of the run's metrics, and of every actor's process.

The driver's process gives each step's metrics under the names of cures_ray/run/metric_table.py. Each actor gives its
CPU seconds, memory, event-loop lag and queue, with the labels ``run``, ``role`` and ``name``. Ray exports them on every
node.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from functools import cached_property
from pathlib import Path

import numpy as np
import psutil
from ray import get_runtime_context
from ray._private import profiling  # Ray 2.60 has no public name for it; off without RAY_PROFILING
from ray._private.worker import get_dashboard_url
from ray.util.metrics import Gauge, Histogram

from cures_ray.config import Config
from cures_ray.run.metric_table import PROMETHEUS_ONLY, Metric, labels, metric_of

EVERY_S = 2.0
QUANTILES = (0.1, 0.5, 0.9)
BELIEF, *HISTOGRAMS = PROMETHEUS_ONLY
BOUNDARIES = {  # histogram of the driver -> upper bounds
    "staleness": [0.5, 1.5, 2.5, 4.5, 8.5],
    "n_by_lease": [1.5, 2.5, 4.5, 8.5, 16.5, 32.5],
}


def phase(name: str, **details: object) -> AbstractContextManager[None]:
    """A span in ``ray timeline``, inside the plain task that runs: ``with phase("write weights", version=3):``."""
    shown = {"name": name} | {k: str(v) for k, v in details.items()}
    span: AbstractContextManager[None] = profiling.profile(name, shown)
    return span


def explained(metric: Metric) -> str:
    """Prometheus' help text: what it says, and its unit."""
    return f"{metric.meaning} ({metric.unit or 'no unit'})"


def dashboard_place() -> str:
    """Where Ray's dashboard is, as the end of a line for people; "" without one."""
    address = get_dashboard_url()
    if not address:
        return ""
    gcs = get_runtime_context().gcs_address
    return f"\nRay's dashboard http://{address} (token: ray get-auth-token; phases: ray timeline --address={gcs})"


class ShowsWeightPhases:
    """Base of an async actor that loads weights: ``with self.phases("load"):`` is a span in ``ray timeline``.

    Ray 2.60 keeps profile events of plain tasks only, and shows calls under their method's name. So a span is a call of
    the actor to its own method of that name, which lasts as long as the phase.
    """

    @cached_property
    def phases(self) -> Phases:
        return Phases()

    async def fetch_weights(self, number: int) -> None:
        await self.phases.last(number)

    async def load_weights(self, number: int) -> None:
        await self.phases.last(number)

    async def prove_weights(self, number: int) -> None:
        await self.phases.last(number)


class Phases:
    """Seconds of the phases "fetch", "load" and "prove"."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}
        self._open: dict[int, asyncio.Event] = {}
        self._count = 0

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        began, over = time.monotonic(), asyncio.Event()
        if profiling.PROFILING_ENABLED:
            self._count += 1
            self._open[self._count] = over
            getattr(get_runtime_context().current_actor, f"{name}_weights").remote(self._count)
        try:
            yield
        finally:
            self._seconds[name] = self._seconds.get(name, 0.0) + time.monotonic() - began
            over.set()

    async def last(self, number: int) -> None:
        """Return when span ``number`` is over."""
        await self._open[number].wait()
        del self._open[number]

    def take(self) -> dict[str, float]:
        """Seconds by phase since the last call."""
        taken, self._seconds = self._seconds, {}
        return taken


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
                tags = dict.fromkeys(labels(metric.prometheus), label)  # "" for the sum of all
                self._gauge(metric).set(float(value), {"run": self.run} | tags)
        for quantile in QUANTILES if len(histograms.get("belief_mean", ())) else ():
            value = float(np.quantile(histograms["belief_mean"], quantile))
            self._gauge(BELIEF).set(value, {"run": self.run, "quantile": f"{quantile:g}"})
        for metric in HISTOGRAMS:
            for value in histograms.get(metric.key, ()):
                self._histogram(metric).observe(float(value) + 1e-9, {"run": self.run})

    def note(self, text: str) -> None:
        return None

    def close(self) -> None:
        return None

    def _gauge(self, metric: Metric) -> Gauge:
        name = metric.prometheus
        if name not in self._gauges:
            self._gauges[name] = Gauge(name, description=explained(metric), tag_keys=("run", *labels(name)))
        return self._gauges[name]

    def _histogram(self, metric: Metric) -> Histogram:
        name = metric.prometheus
        if name not in self._histograms:
            bounds = BOUNDARIES[metric.key]
            self._histograms[name] = Histogram(name, explained(metric), boundaries=bounds, tag_keys=("run",))
        return self._histograms[name]


class ProcessGauges:
    """One actor's process: ``asyncio.create_task(gauges.watch())`` in an async actor, ``report()`` in a plain one.

    Args:
        role: "driver", "ledger", "generator", "verifier" or "learner".
        name: unique in the run, such as "generator-0".
        numbers: called at every report; names of the "process/" metrics without the prefix -> value.
        children: with the processes that this one started: an engine, judges. The driver's may be all of Ray.

    Reports nothing where ``logging.ray_metrics`` is off.
    """

    def __init__(
        self,
        config: Config,
        role: str,
        name: str,
        numbers: Callable[[], Mapping[str, float]] = dict,
        *,
        children: bool = True,
    ) -> None:
        self._tags = {"run": Path(config.checkpoint.dir).name, "role": role, "name": name}
        self._numbers, self._on = numbers, config.logging.ray_metrics
        self._gauges: dict[str, Gauge] = {}
        self._process, self._children = psutil.Process(), children
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
            self._gauges[name] = Gauge(metric.prometheus, description=explained(metric), tag_keys=tuple(self._tags))
        return self._gauges[name]
