"""The driver's view of its generators, and the numbers it derives from one step."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from cures_ray.loop.chunks import Place
from cures_ray.loop.ports import GeneratorPort
from cures_ray.messages import Accounting, BatchPlan, Key, LeaseChunk, StepReport

Metrics = dict[str, float]


@dataclass(slots=True)
class Slot:
    """One generator: what it works on, which weights it has proven, how long it had nothing to do."""

    generator: GeneratorPort
    wake: asyncio.Event = field(default_factory=asyncio.Event)
    version: int = -1  # the last proven version; leases only while it is the current one
    lost: str = ""  # why it must be replaced
    leaving: bool = False  # its node goes: no more leases
    loading: bool = False  # fetches and proves weights now
    in_flight: dict[Key, tuple[int, float]] = field(default_factory=dict)  # -> (n, since)
    rollouts: int = 0  # in flight
    idle: dict[str, float] = field(default_factory=dict)  # cause -> seconds without work, see ``track_idle``
    _cause: str | None = None
    _since: float = field(default_factory=time.monotonic)

    def begin(self, leases: LeaseChunk) -> None:
        now = time.monotonic()
        self.in_flight.update((key, (n, now)) for key, n in zip(leases.keys, leases.n.tolist(), strict=True))
        self.rollouts += int(leases.n.sum())
        self.track_idle()

    def end(self, keys: list[Key]) -> None:
        """``keys`` are not in flight any more; unknown ones change nothing."""
        for key in keys:
            n, _ = self.in_flight.pop(key, (0, 0.0))
            self.rollouts -= n
        self.track_idle()

    def track_idle(self) -> None:
        """Call when something changed: the time before goes to the cause that held then."""
        now = time.monotonic()
        if self._cause is not None:
            self.idle[self._cause] = self.idle.get(self._cause, 0.0) + now - self._since
        self._since = now
        if self.in_flight:
            self._cause = None
        else:
            self._cause = "replacement" if self.lost else "weights" if self.loading else "leases"

    def take_idle(self) -> dict[str, float]:
        """Seconds without work since the last call, by cause: no lease to be had (the run is as far ahead of the
        learner as it may be), weights on their way, or a replacement on its way."""
        self.track_idle()
        taken, self.idle = self.idle, {}
        return taken


def longest_waiting(slots: list[Slot], most: int = 5) -> str:
    """The oldest leases in flight, for the watchdog's message."""
    now = time.monotonic()
    held = sorted(
        (since, f"lease {lease_id}.{attempt} ({n} rollouts) on {slot.generator.name} for {now - since:.0f} s")
        for slot in slots
        for (lease_id, attempt), (n, since) in slot.in_flight.items()
    )
    return "; ".join(text for _, text in held[:most]) or "no lease is in flight"


def step_metrics(
    plan: BatchPlan,
    groups: dict[int, Place],
    report: StepReport,
    accounting: Accounting,
    version: int,
) -> Metrics:
    """Scalars of one optimizer step, under the names of the logs. ``version``: the policy before the step."""
    tokens, truncated, valid, alike = [], [], [], []
    for entry in plan.entries:
        if (found := groups.get(entry.lease.lease_id)) is not None:
            chunk, place = found
            rows = slice(chunk.starts[place], chunk.starts[place + 1])
            tokens.append(chunk.summary.completion_tokens[rows])
            truncated.append(chunk.summary.truncated[rows])
            valid.append(entry.rewards[~chunk.fault[rows]])
            if len(valid[-1]) > 1:
                alike.append([valid[-1].min() == valid[-1].max()])
    oldest = staleness(plan, groups, version)
    metrics = {f"learner/{k}": v for k, v in report.metrics.items()}
    # names with a section of their own keep it: belief/...
    metrics |= {k if "/" in k else f"curriculum/{k}": v for k, v in plan.metrics.items()}
    metrics |= {
        "rollout/reward": float(_joined(valid).mean()),
        "rollout/completion_tokens": float(_joined(tokens).mean()),
        "rollout/truncated": float(_joined(truncated).mean()),
        "staleness/mean": float(oldest.mean()),
        "staleness/max": float(oldest.max()),
        "accounting/planned": float(accounting.planned),
        "accounting/trained": float(accounting.trained),
        "accounting/in_flight": float(accounting.in_flight),
        "accounting/discarded": float(sum(accounting.discarded.values())),
    }
    if alike:
        metrics["curriculum/zero_variance"] = float(_joined(alike).mean())
    return metrics | {f"accounting/discarded_{k.value}": float(v) for k, v in accounting.discarded.items()}


def staleness(plan: BatchPlan, groups: dict[int, Place], version: int) -> np.ndarray:
    """Versions by which the oldest token of every rollout is behind ``version``; a single zero when there are none."""
    lag = []
    for entry in plan.entries:
        if (found := groups.get(entry.lease.lease_id)) is not None:
            chunk, place = found
            lag.append(version - chunk.summary.min_version[chunk.starts[place] : chunk.starts[place + 1]])
    return _joined(lag)


def _joined(parts: Sequence[Any]) -> np.ndarray:
    """All values in one float array; a single zero when there are none."""
    joined = np.concatenate([np.asarray(p, np.float64) for p in parts]) if parts else np.zeros(0)
    return joined if len(joined) else np.zeros(1)
