"""The driver's view of its generators, and the numbers it derives from one step."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field

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
    idle_since: float | None = None
    idle_seconds: float = 0.0

    def begin(self, leases: LeaseChunk) -> None:
        now = time.monotonic()
        self.in_flight.update((key, (n, now)) for key, n in zip(leases.keys, leases.n.tolist(), strict=True))
        self.rollouts += int(leases.n.sum())

    def end(self, keys: list[Key]) -> None:
        """``keys`` are not in flight any more; unknown ones change nothing."""
        for key in keys:
            n, _ = self.in_flight.pop(key, (0, 0.0))
            self.rollouts -= n

    def track_idle(self) -> None:
        now = time.monotonic()
        if self.in_flight and self.idle_since is not None:
            self.idle_seconds += now - self.idle_since
            self.idle_since = None
        elif not self.in_flight and self.idle_since is None:
            self.idle_since = now

    def take_idle(self) -> float:
        """Seconds without work since the last call."""
        now = time.monotonic()
        if self.idle_since is not None:
            self.idle_seconds += now - self.idle_since
            self.idle_since = now
        seconds, self.idle_seconds = self.idle_seconds, 0.0
        return seconds


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
    tokens, truncated, lag, valid = [], [], [], []
    for entry in plan.entries:
        if (found := groups.get(entry.lease.lease_id)) is not None:
            chunk, place = found
            rows = slice(chunk.starts[place], chunk.starts[place + 1])
            tokens.append(chunk.summary.completion_tokens[rows])
            truncated.append(chunk.summary.truncated[rows])
            lag.append(version - chunk.summary.min_version[rows])
            valid.append(entry.rewards[~chunk.fault[rows]])
    oldest = _joined(lag)
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
    return metrics | {f"accounting/discarded_{k.value}": float(v) for k, v in accounting.discarded.items()}


def _joined(parts: list[np.ndarray]) -> np.ndarray:
    """All values in one float array; a single zero when there are none."""
    joined = np.concatenate([np.asarray(p, np.float64) for p in parts]) if parts else np.zeros(0)
    return joined if len(joined) else np.zeros(1)
