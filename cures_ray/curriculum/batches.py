"""What the ledger holds of a batch between its draw and its commit."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from cures_ray.messages import CommitReport, Discard, Lease, Settlement

OPEN, LEASED, SETTLED = "open", "leased", "settled"


@dataclass(frozen=True, slots=True, kw_only=True)
class Round:
    """One round of a batch as a method plans it: k leases; entries with n = 0 make none."""

    index: np.ndarray  # int64 [k] prompts
    n: np.ndarray  # int64 [k] rollouts
    weight: np.ndarray  # float64 [k] W_i c_i / m
    draws: np.ndarray | None = None  # int64 [k] multiplicity; None: 1 each
    role: str = "train"  # "train" | "pilot" | "screen"
    metrics: dict[str, float] = field(default_factory=dict)


class LeaseOutcome(NamedTuple):
    """One lease's part of a settlement. n = rollouts."""

    rewards: np.ndarray  # float32 [n], in [0, 1], 0 where not valid
    valid: np.ndarray  # bool [n]: no fault, and a number
    lag: np.ndarray  # int64 [n] policy versions behind
    spent: tuple[int, float, float]  # tokens, seconds of generation, of verification
    failed: bool


def outcomes_by_lease(s: Settlement, version: int) -> Iterator[LeaseOutcome]:
    """The k leases of ``s``, in order, seen from policy ``version``.

    Raises:
        ValueError: its columns of rollouts are not as long as its leases say.
    """
    ends = np.cumsum(s.n)
    total = int(ends[-1]) if len(ends) else 0
    if not len(s.rewards) == len(s.fault) == len(s.min_version) == len(s.completion_tokens) == total:
        raise ValueError(
            f"a settlement of {total} rollouts has {len(s.rewards)} rewards, {len(s.fault)} fault flags, "
            f"{len(s.min_version)} versions and {len(s.completion_tokens)} lengths"
        )
    rewards = np.asarray(s.rewards, np.float32)
    valid = ~np.asarray(s.fault, bool) & np.isfinite(rewards)
    rewards = np.where(valid, np.clip(rewards, 0.0, 1.0), np.float32(0.0)).astype(np.float32)
    lag = np.maximum(version - np.asarray(s.min_version, np.int64), 0)
    summed = np.concatenate([[0], np.cumsum(s.completion_tokens, dtype=np.int64)])
    starts = ends - s.n
    tokens = (summed[ends] - summed[starts]).tolist()
    spent = zip(tokens, s.generate_seconds.tolist(), s.verify_seconds.tolist(), strict=True)
    for a, b, own, failed in zip(starts.tolist(), ends.tolist(), spent, s.failed.tolist(), strict=True):
        yield LeaseOutcome(rewards[a:b], valid[a:b], lag[a:b], own, failed)


@dataclass(slots=True, kw_only=True)
class TrackedLease:
    """A lease of an uncommitted batch and what is known of it."""

    lease: Lease
    role: str
    draws: int = 1  # multiplicity of the prompt in its draw
    state: str = OPEN
    worker: str = ""
    rewards: np.ndarray  # float32 [n], 0 where not valid
    valid: np.ndarray  # bool [n]: verified and no fault
    tokens: int = 0
    generate_seconds: float = 0.0
    verify_seconds: float = 0.0
    fault_reason: Discard = Discard.VERIFIER_FAULT

    @classmethod
    def fresh(cls, lease: Lease, role: str, draws: int) -> TrackedLease:
        return cls(
            lease=lease, role=role, draws=draws, rewards=np.zeros(lease.n, np.float32), valid=np.zeros(lease.n, bool)
        )

    def settle(self, outcome: LeaseOutcome) -> None:
        self.state, self.rewards, self.valid = SETTLED, outcome.rewards, outcome.valid
        self.tokens, self.generate_seconds, self.verify_seconds = outcome.spent
        self.fault_reason = Discard.GENERATION_FAULT if outcome.failed else Discard.VERIFIER_FAULT

    def as_json(self) -> dict[str, Any]:
        lease = {name: getattr(self.lease, name) for name in Lease.__slots__}
        settled = self.state == SETTLED
        return {
            "lease": lease,
            "role": self.role,
            "draws": self.draws,
            "state": self.state,
            "worker": self.worker,
            "rewards": self.rewards.tolist() if settled else [],
            "valid": self.valid.astype(int).tolist() if settled else [],
            "spent": [self.tokens, self.generate_seconds, self.verify_seconds],
            "fault_reason": self.fault_reason.value,
        }

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> TrackedLease:
        tracked = cls.fresh(Lease(**record["lease"]), record["role"], record["draws"])
        tracked.state, tracked.worker = record["state"], record["worker"]
        if tracked.state == SETTLED:
            tracked.rewards = np.array(record["rewards"], np.float32)
            tracked.valid = np.array(record["valid"], bool)
        tracked.tokens, tracked.generate_seconds, tracked.verify_seconds = record["spent"]
        tracked.fault_reason = Discard(record["fault_reason"])
        return tracked


@dataclass(slots=True, kw_only=True)
class Batch:
    """The leases planned for one optimizer step, round after round."""

    number: int
    rounds: int = 0  # planned so far
    leases: list[TrackedLease] = field(default_factory=list)
    metrics: dict[str, float] = field(default_factory=dict)
    missing: int = 0  # leases that are not settled
    finished: bool = False  # every round planned and settled

    @property
    def piloting(self) -> bool:
        """Waits for the pilots of a whole subset (weight 0): the draws of later batches need them too."""
        return self.rounds == 1 and self.leases[0].role == "pilot" and self.leases[0].lease.weight == 0

    def as_json(self) -> dict[str, Any]:
        return {
            "number": self.number,
            "rounds": self.rounds,
            "leases": [tracked.as_json() for tracked in self.leases],
            "metrics": {k: v for k, v in self.metrics.items() if np.isfinite(v)},
            "infinite": [k for k, v in self.metrics.items() if not np.isfinite(v)],
            "finished": self.finished,
        }

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> Batch:
        leases = [TrackedLease.from_json(r) for r in record["leases"]]
        return cls(
            number=record["number"],
            rounds=record["rounds"],
            leases=leases,
            metrics=record["metrics"] | {k: float("inf") for k in record["infinite"]},
            missing=sum(tracked.state != SETTLED for tracked in leases),
            finished=record["finished"],
        )


def batch_metrics(batch: Batch) -> dict[str, float]:
    """Outcomes of a batch. ``useful``: share of judged rollouts whose outcome the belief thought less likely: more than
    0.5 from the accuracy believed when they were planned; exactly 0.5 counts half. A coin toss gives 0.5, a
    prompt that is known to be solved 0.
    """
    n = np.array([h.lease.n for h in batch.leases], np.int64)
    lease = np.repeat(np.arange(len(n)), n)
    valid = np.concatenate([h.valid for h in batch.leases] or [np.zeros(0, bool)])
    rewards = np.concatenate([h.rewards for h in batch.leases] or [np.zeros(0)])
    known = np.bincount(lease[valid], minlength=len(n))
    sums = np.bincount(lease[valid], rewards[valid], len(n))
    means = sums[known > 0] / known[known > 0]
    believed = np.array([h.lease.alpha / (h.lease.alpha + h.lease.beta) for h in batch.leases])
    unexpected = (1.0 + np.sign(np.abs(rewards - believed[lease])[valid] - 0.5)) / 2.0
    return {
        "rounds": float(batch.rounds),
        "leases": float(len(n)),
        "useful": float(unexpected.mean()) if len(unexpected) else 0.0,
        "prompt_reward": float(means.mean()) if len(means) else 0.0,
        "fault_fraction": 1.0 - float(valid.sum()) / max(float(n.sum()), 1.0),
    }


def batch_histograms(batch: Batch) -> dict[str, np.ndarray]:
    """n of every lease, and the accuracy that was believed when it was planned."""
    return {
        "n_by_lease": np.array([h.lease.n for h in batch.leases], np.float64),
        "p_by_lease": np.array([h.lease.alpha / (h.lease.alpha + h.lease.beta) for h in batch.leases]),
    }


def trained_and_discarded(
    tracked: TrackedLease, keep: np.ndarray, reason: Discard, report: CommitReport
) -> tuple[int, dict[Discard, int]]:
    """(trained, discarded by reason) of one lease's n rollouts. Those that the report does not name are, in this order:

    1. faults, as many as were verified as such,
    2. dropped by the method, with its reason,
    3. lost: kept by the method, but their payload never reached the learner.

    Raises:
        ValueError: the report ends more rollouts than the lease has.
    """
    lease_id, n = tracked.lease.lease_id, tracked.lease.n
    trained = int(report.trained.get(lease_id, 0))
    discarded = {Discard(k): int(v) for k, v in report.discarded.get(lease_id, {}).items()}
    left = n - trained - sum(discarded.values())
    if left < 0 or trained < 0 or min(discarded.values(), default=0) < 0:
        raise ValueError(f"commit of lease {lease_id}: {trained} trained and {discarded} discarded, of {n} rollouts")
    faults, dropped = int((~tracked.valid).sum()), int((tracked.valid & ~keep).sum())
    for why, count in ((tracked.fault_reason, faults), (reason, dropped), (Discard.LOST, n)):
        more = min(left, max(count - discarded.get(why, 0), 0))
        if more:
            discarded[why] = discarded.get(why, 0) + more
            left -= more
    return trained, discarded


def lease_seed(seed: int, lease_id: int) -> int:
    """62 bits from (seed, lease_id), by the SplitMix64 finaliser."""
    mask = (1 << 64) - 1
    z = (seed * 0x9E3779B97F4A7C15 + (lease_id + 1) * 0xD1342543DE82EF95) & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return (z ^ (z >> 31)) >> 2


def digest(prompt_ids: np.ndarray) -> str:
    """Identity of a prompt table: of its ids and their order."""
    return hashlib.sha256(np.ascontiguousarray(prompt_ids).data).hexdigest()[:16]
