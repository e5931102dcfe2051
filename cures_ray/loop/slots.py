"""The driver's view of its generators, and the numbers it derives from one step."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field

import numpy as np

from cures_ray.loop.ports import GeneratorPort
from cures_ray.messages import (
    Accounting,
    BatchPlan,
    GroupSummary,
    Lease,
    Outcome,
    PayloadHandle,
    StepReport,
    Verdict,
)

Metrics = dict[str, float]
VerifiedGroup = tuple[GroupSummary, PayloadHandle, np.ndarray]  # fault mask, bool [n]


@dataclass(slots=True)
class Slot:
    """One generator: what it works on, whether it may take leases, how long it had nothing to do."""

    generator: GeneratorPort
    wake: asyncio.Event = field(default_factory=asyncio.Event)
    syncing: asyncio.Lock = field(default_factory=asyncio.Lock)
    version: int = -1  # the last proven version
    open: bool = False  # holds proven current weights and may take leases
    lost: str = ""  # why it must be replaced
    in_flight: dict[tuple[int, int], tuple[int, float]] = field(default_factory=dict)  # key -> (n, since)
    idle_since: float | None = None
    idle_seconds: float = 0.0

    @property
    def rollouts(self) -> int:
        return sum(n for n, _ in self.in_flight.values())

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


def failed_generation(lease: Lease, version: int) -> tuple[GroupSummary, None, list[Verdict]]:
    """A lease whose generation missed its deadline: all its rollouts are faults."""
    summary = GroupSummary(
        lease_id=lease.lease_id,
        attempt=lease.attempt,
        prompt_tokens=0,
        completion_tokens=np.zeros(lease.n, np.int32),
        truncated=np.zeros(lease.n, bool),
        min_version=np.full(lease.n, version, np.int32),
        max_version=np.full(lease.n, version, np.int32),
        generator="",
        seconds=0.0,
    )
    return summary, None, [Verdict(outcome=Outcome.FAULT, detail="generation deadline")] * lease.n


def step_metrics(
    plan: BatchPlan,
    groups: dict[int, VerifiedGroup],
    report: StepReport,
    accounting: Accounting,
    version: int,
) -> Metrics:
    """Scalars of one optimizer step, under the names of the logs. ``version``: the policy before the step."""
    summaries = [groups[e.lease.lease_id][0] for e in plan.entries if e.lease.lease_id in groups]
    valid = [e.rewards[~groups[e.lease.lease_id][2]] for e in plan.entries if e.lease.lease_id in groups]
    lag = _joined([version - s.min_version for s in summaries])
    metrics = {f"learner/{k}": v for k, v in report.metrics.items()}
    # names with a section of their own keep it: belief/...
    metrics |= {k if "/" in k else f"curriculum/{k}": v for k, v in plan.metrics.items()}
    metrics |= {
        "rollout/reward": float(_joined(valid).mean()),
        "rollout/completion_tokens": float(_joined([s.completion_tokens for s in summaries]).mean()),
        "rollout/truncated": float(_joined([s.truncated for s in summaries]).mean()),
        "staleness/mean": float(lag.mean()),
        "staleness/max": float(lag.max()),
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
