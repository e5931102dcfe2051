"""Settlements and commits as journal records, and back (docs/journal.md)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from cures_ray.messages import CommitReport, Discard, GradientStatistics, Settlement

STATISTICS = tuple(GradientStatistics.__slots__)


def rounded(s: Settlement) -> Settlement:
    """``s`` as the journal holds it: seconds to 0.1 ms; a reward that is no number is a fault."""
    known = np.isfinite(s.rewards)
    return replace(
        s,
        rewards=np.where(known, s.rewards, np.float32(0.0)).astype(np.float32),
        fault=np.asarray(s.fault, bool) | ~known,
        generate_seconds=np.round(np.asarray(s.generate_seconds, np.float64), 4),
        verify_seconds=np.round(np.asarray(s.verify_seconds, np.float64), 4),
    )


def encode_settlement(s: Settlement) -> list[Any]:
    """["settle", leases, attempts, n, failed, generate s, verify s, rewards, faults, tokens, versions] of a chunk; but
    for the leases, a column of equal numbers is one number."""
    of_leases = (s.attempt, s.n, s.failed, s.generate_seconds, s.verify_seconds)
    of_rollouts = (s.rewards, s.fault, s.completion_tokens, s.min_version)
    return ["settle", np.asarray(s.lease_id).tolist(), *map(_column, (*of_leases, *of_rollouts))]


def _column(values: np.ndarray) -> Any:
    """A list, or one number where all are equal; whole numbers without a point."""
    values = np.asarray(values)
    if values.dtype == bool or not np.any(values % 1):
        values = values.astype(np.int64)
    return values[0].item() if len(values) > 1 and np.all(values == values[0]) else values.tolist()


def decode_settlement(record: list[Any]) -> Settlement:
    _, leases, attempts, n, failed, generate_s, verify_s, rewards, fault, tokens, versions = record

    def spread(value: Any, size: int, dtype: type) -> np.ndarray:
        return np.array(value, dtype) if isinstance(value, list) else np.full(size, value, dtype)

    k = len(leases)
    counts = spread(n, k, np.int32)
    r = int(counts.sum())
    return Settlement(
        lease_id=np.array(leases, np.int64),
        attempt=spread(attempts, k, np.int32),
        n=counts,
        failed=spread(failed, k, bool),
        generate_seconds=spread(generate_s, k, np.float64),
        verify_seconds=spread(verify_s, k, np.float64),
        rewards=spread(rewards, r, np.float32),
        fault=spread(fault, r, bool),
        completion_tokens=spread(tokens, r, np.int32),
        min_version=spread(versions, r, np.int32),
    )


def encode_commit(report: CommitReport) -> list[Any]:
    """["commit", batch, [[lease, trained]...], [[lease, reason, count]...], [gradient statistics...],
    [[lease, drift]...]]."""
    return [
        "commit",
        report.batch,
        [[k, v] for k, v in report.trained.items()],
        [[k, reason.value, v] for k, by in report.discarded.items() for reason, v in by.items()],
        [[getattr(g, name) for name in STATISTICS] for g in report.gradient_statistics],
        [[k, v] for k, v in report.drift.items()],
    ]


def decode_commit(record: list[Any]) -> CommitReport:
    _, batch, trained, dropped, statistics, *later = record  # journals of before drift was measured end here
    discarded: dict[int, dict[Discard, int]] = {}
    for lease_id, reason, count in dropped:
        discarded.setdefault(lease_id, {})[Discard(reason)] = count
    return CommitReport(
        batch=batch,
        trained={k: v for k, v in trained},
        discarded=discarded,
        gradient_statistics=tuple(GradientStatistics(**dict(zip(STATISTICS, row, strict=True))) for row in statistics),
        drift={k: v for k, v in later[0]} if later else {},
    )
