"""The typed messages that driver, ledger, generators, verifiers and learner exchange.

What travels between processes is a *chunk*: many leases as flat arrays, k leases of r rollouts in all. What counts
is the lease: each settles once, and n differs between leases (``np.repeat(x_k, n)`` spreads a lease's value over its
rollouts). Payloads (token ids, log-probabilities) stay behind an opaque handle (`PayloadHandle`), an ``ObjectRef`` with
Ray and the object itself in unit tests; the driver only passes it on.

One rollout's life: *planned* -> *leased* -> *generated* -> *verified* -> *trained* | *discarded(reason)*. Conservation:

    planned = trained + sum(discarded.values()) + in_flight      (all counted in rollouts)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import numpy as np

from cures_ray.pickling import travels

PayloadHandle = Any  # ray.ObjectRef[RolloutChunk] in production, a RolloutChunk in unit tests
Key = tuple[int, int]  # (lease_id, attempt): what settles once


class Discard(StrEnum):
    """Why a rollout that was planned did not enter an optimizer step. Every one is charged as cost."""

    PILOT = "pilot"  # spent on estimating accuracy (CurES, GVM) and not trained on
    SCREENED = "screened"  # SPEED-RL: the screen found nothing to learn
    FILTERED = "filtered"  # DAPO: all rewards equal; Reinforce-Ada: not in the balanced subset
    SURPLUS = "surplus"  # verified, but the batch was already full
    STALE = "stale"  # oldest token more than max_staleness versions behind
    VERIFIER_FAULT = "verifier_fault"  # timeout, crash or unparsable gold: neither right nor wrong
    GENERATION_FAULT = "generation_fault"  # the engine refused or failed this request
    LOST = "lost"  # its generator, verifier or payload died; the lease was issued again
    INTERRUPTED = "interrupted"  # the run stopped or was resumed before it was trained


class Outcome(StrEnum):
    CORRECT = "correct"
    INCORRECT = "incorrect"
    FAULT = "fault"


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """One verified rollout. A fault is not a wrong answer: it touches neither belief nor advantage."""

    outcome: Outcome
    reward: float = 0.0  # in [0, 1]; meaningless for faults
    detail: str = ""  # fault reason or parsed answer, at most 200 characters
    seconds: float = 0.0  # verifier wall time

    @property
    def is_fault(self) -> bool:
        return self.outcome is Outcome.FAULT


@dataclass(frozen=True, slots=True, kw_only=True)
class Lease:
    """A promise to generate ``n`` rollouts of one prompt for one batch.

    ``(lease_id, attempt)`` is the settlement key: a lease whose generator dies is issued again under the
    next attempt, and settlements of earlier attempts change nothing.
    """

    lease_id: int
    attempt: int
    prompt_index: int  # row in the prompt table
    prompt_id: str  # content hash, 16 hexadecimal digits
    n: int  # rollouts to generate; varies per lease, never fixed
    batch: int  # the optimizer step that this lease is planned for (0-based)
    round: int  # 0, 1, ... within the batch: multi-round methods (pilots, screens, resampling)
    weight: float  # the prompt's weight in the objective: W_i * c_i / m (ALGORITHMS.md 3.1)
    alpha: float  # Beta posterior of the prompt when the batch was planned: before this step's evidence
    beta: float
    seed: int  # rollout j samples with a seed derived from (seed, j)


def _keys(lease_id: np.ndarray, attempt: np.ndarray) -> list[Key]:
    return list(zip(lease_id.tolist(), attempt.tolist(), strict=True))


@dataclass(frozen=True, slots=True, kw_only=True)
class LeaseChunk:
    """What a generator is asked for: k leases. Prompts are rows of a table that generators and verifiers hold."""

    lease_id: np.ndarray  # int64 [k], -1: evaluation, no lease
    attempt: np.ndarray  # int32 [k]
    prompt_index: np.ndarray  # int64 [k]
    n: np.ndarray  # int32 [k] rollouts to generate
    seed: np.ndarray  # int64 [k]
    source: str = "train"  # the table: "train" | "eval"
    greedy: bool = False  # for evaluation (n = 1)

    def __len__(self) -> int:
        return len(self.lease_id)

    @property
    def keys(self) -> list[Key]:
        return _keys(self.lease_id, self.attempt)

    @classmethod
    def of(cls, leases: Sequence[Lease]) -> LeaseChunk:
        """The part of ``leases`` that a generator needs."""
        return cls(
            lease_id=np.array([x.lease_id for x in leases], np.int64),
            attempt=np.array([x.attempt for x in leases], np.int32),
            prompt_index=np.array([x.prompt_index for x in leases], np.int64),
            n=np.array([x.n for x in leases], np.int32),
            seed=np.array([x.seed for x in leases], np.int64),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollout:
    """One completion. L = completion length in tokens."""

    token_ids: np.ndarray  # int32 [L], the stop token included where one was sampled
    logprobs: np.ndarray  # float32 [L], log-probability of each sampled token under the sampling policy
    finish_reason: str  # "stop" | "length"
    min_version: int  # policy version of the oldest token
    max_version: int
    text: str  # decoded without special tokens, for the verifier


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkSummary:
    """What driver and ledger need to know of finished leases without fetching their payload. k leases, r rollouts."""

    generator: str
    lease_id: np.ndarray  # int64 [k]
    attempt: np.ndarray  # int32 [k]
    n: np.ndarray  # int32 [k]
    failed: np.ndarray  # bool [k]: missed the generation deadline; its rollouts are empty
    prompt_tokens: np.ndarray  # int32 [k]
    seconds: np.ndarray  # float32 [k], wall time from submission to the last token
    completion_tokens: np.ndarray  # int32 [r]
    truncated: np.ndarray  # bool [r], finish_reason == "length"
    min_version: np.ndarray  # int32 [r]
    max_version: np.ndarray  # int32 [r]

    def __len__(self) -> int:
        return len(self.lease_id)

    @property
    def keys(self) -> list[Key]:
        return _keys(self.lease_id, self.attempt)


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutChunk:
    """The payload behind a PayloadHandle: the r rollouts of k finished leases, in lease order, flat."""

    summary: ChunkSummary
    source: str  # of the prompts, as LeaseChunk
    prompt_index: np.ndarray  # int64 [k]
    prompt_ids: np.ndarray  # int32 [sum of P]
    prompt_ends: np.ndarray  # int64 [k], where each prompt ends in prompt_ids
    token_ids: np.ndarray  # int32 [sum of L]
    logprobs: np.ndarray  # float32 [sum of L]
    ends: np.ndarray  # int64 [r], where each rollout ends in token_ids and logprobs
    texts: tuple[str, ...]  # [r]

    def __len__(self) -> int:
        return len(self.ends)

    def prompt(self, place: int) -> np.ndarray:
        """Token ids of lease ``place`` of the chunk, int32 [P]."""
        return self.prompt_ids[self.prompt_ends[place - 1] if place else 0 : self.prompt_ends[place]]

    def tokens(self, row: int) -> tuple[np.ndarray, np.ndarray]:
        """Token ids int32 [L] and log-probabilities float32 [L] of rollout ``row`` of the chunk."""
        part = slice(self.ends[row - 1] if row else 0, self.ends[row])
        return self.token_ids[part], self.logprobs[part]


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptRow:
    """One row of the prompt table."""

    prompt_id: str
    text: str  # rendered by the chat template
    token_ids: np.ndarray  # int32 [P]; empty where only the verifier reads the row
    answer: str
    row: dict[str, Any] = field(default_factory=dict)  # the remaining columns, for reward functions


@dataclass(frozen=True, slots=True, kw_only=True)
class VerdictChunk:
    """The verdicts on a RolloutChunk, in its order. r = rollouts."""

    reward: np.ndarray  # float32 [r], in [0, 1]; meaningless for faults
    correct: np.ndarray  # bool [r]
    fault: np.ndarray  # bool [r]
    seconds: np.ndarray  # float32 [r], verifier process time
    details: dict[int, str]  # of the faulty ones: why

    @classmethod
    def of(cls, verdicts: Sequence[Verdict]) -> VerdictChunk:
        return cls(
            reward=np.array([v.reward for v in verdicts], np.float32),
            correct=np.array([v.outcome is Outcome.CORRECT for v in verdicts], bool),
            fault=np.array([v.is_fault for v in verdicts], bool),
            seconds=np.array([v.seconds for v in verdicts], np.float32),
            details={i: v.detail for i, v in enumerate(verdicts) if v.is_fault},
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Settlement:
    """The verified outcome of k lease attempts, driver -> ledger; r rollouts in all, in lease order. Faulty entries of
    ``rewards`` are ignored. A lease whose generation failed as a whole has ``fault`` all true and ``failed``."""

    lease_id: np.ndarray  # int64 [k]
    attempt: np.ndarray  # int32 [k]
    n: np.ndarray  # int32 [k] rollouts generated
    failed: np.ndarray  # bool [k]: faults are GENERATION_FAULT, else VERIFIER_FAULT
    generate_seconds: np.ndarray  # float32 [k]
    verify_seconds: np.ndarray  # float32 [k]
    rewards: np.ndarray  # float32 [r]
    fault: np.ndarray  # bool [r]
    completion_tokens: np.ndarray  # int32 [r]
    min_version: np.ndarray  # int32 [r]


@dataclass(frozen=True, slots=True, kw_only=True)
class SettleReply:
    accepted: np.ndarray  # bool [k]; False: settled before, or a lost attempt; nothing changed
    ready: tuple[int, ...] = ()  # batches of which all rounds are settled


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchEntry:
    """One lease of a finished batch and which of its rollouts the method trains on. n = rollouts."""

    lease: Lease
    rewards: np.ndarray  # float32 [n]
    keep: np.ndarray  # bool [n]: in the loss. False entries are discarded with ``drop_reason``
    drop_reason: Discard = Discard.FILTERED


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchPlan:
    """A batch whose rounds are all settled, ledger -> driver. Order is (prompt draw order, round)."""

    batch: int
    prompts: int  # m, distinct draws included with multiplicity; the denominator of the objective
    entries: tuple[BatchEntry, ...]
    metrics: dict[str, float]  # tau, ess, distinct prompts, largest n, ... of the draw


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingGroup:
    """One prompt of a training batch: a payload and its per-rollout numbers. n = rollouts."""

    lease_id: int
    payload: PayloadHandle  # of the chunk that the lease came in
    place: int  # of the lease in the chunk
    rollout_index: np.ndarray  # int32 [k] rows of the chunk's rollouts that are trained, k <= n
    rewards: np.ndarray  # float32 [k]
    advantages: np.ndarray  # float32 [k], a rollout's tokens share one advantage
    weights: np.ndarray  # float32 [k], loss weight per *token* of rollout: W_i/(m * n_i * L)
    prompt_tokens: int
    completion_tokens: np.ndarray  # int32 [k]


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingBatch:
    step: int  # 0-based optimizer step; the policy version before the step
    groups: tuple[TrainingGroup, ...]

    @property
    def rollouts(self) -> int:
        return sum(len(g.rollout_index) for g in self.groups)


@dataclass(frozen=True, slots=True, kw_only=True)
class GradientStatistics:
    """Output-layer score statistics of one lease, summed so that they can be merged (ALGORITHMS.md 1.5): s_j is the
    token-summed score of rollout j; classes are reward > 0.5 (plus) and the rest (minus)."""

    lease_id: int
    n_plus: int
    n_minus: int
    sum_sq_plus: float  # sum over plus of |s|^2
    sum_sq_minus: float
    sq_sum_plus: float  # |sum over plus of s|^2
    sq_sum_minus: float
    dot: float  # (sum over plus of s) . (sum over minus of s)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepReport:
    """What the learner group tells of one optimizer step."""

    step: int
    metrics: dict[str, float]  # loss, grad_norm, lr, kl, clip_fraction, is_ratio, seconds, tokens, flops
    gradient_statistics: tuple[GradientStatistics, ...] = ()
    drift: dict[int, float] = field(default_factory=dict)  # lease_id -> nats a token, where measured (SPO)


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightUpdate:
    """A published set of weights, learner -> generators. Small: the tensors stay where ``info`` says."""

    version: int
    info: dict[str, Any]  # backend-specific: {"path": ...} for shm, rendezvous data for nccl and ipc
    canary_token_ids: tuple[np.ndarray, ...]  # int32 [T_k] fixed sequences
    canary_logprobs: tuple[np.ndarray, ...]  # float32 [T_k - 1], of tokens 1.. under the learner
    together: bool = False  # all generators load it before the learner trains on: it is the learner's own memory
    kept: bool = True  # False: the learner holds it only until it publishes the next


@dataclass(frozen=True, slots=True, kw_only=True)
class SyncReport:
    """A generator's answer to a WeightUpdate."""

    generator: str
    version: int
    canary_max_error: float  # max |log p_generator - log p_learner| in nats
    seconds_paused: float  # in which the engine computed nothing
    seconds: float
    canary_mean_error: float = 0.0  # the mean, which decides


@dataclass(frozen=True, slots=True, kw_only=True)
class CommitReport:
    """How a batch ended, driver -> ledger: the rollouts that entered optimizer step ``batch``. The others are
    discarded with the reason in ``discarded`` (lease_id -> reason -> count), or the entry's own drop_reason."""

    batch: int
    trained: dict[int, int]  # lease_id -> rollouts
    discarded: dict[int, dict[Discard, int]]
    gradient_statistics: tuple[GradientStatistics, ...] = ()
    drift: dict[int, float] = field(default_factory=dict)  # as in StepReport


@dataclass(slots=True, kw_only=True)
class Accounting:
    """Rollout counts; the conservation invariant lives here and nowhere else."""

    planned: int = 0
    trained: int = 0
    discarded: dict[Discard, int] = field(default_factory=dict)
    in_flight: int = 0

    def check(self) -> None:
        """Raise AssertionError unless planned = trained + discarded + in flight."""
        ended = self.trained + sum(self.discarded.values())
        if self.planned != ended + self.in_flight or self.in_flight < 0:
            raise AssertionError(f"rollout accounting broken: {self}")

    def line(self) -> str:
        reasons = ", ".join(f"{k.value} {v}" for k, v in sorted(self.discarded.items())) or "none"
        return (
            f"planned {self.planned} = trained {self.trained} + discarded {sum(self.discarded.values())} "
            f"({reasons}) + in flight {self.in_flight}"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class LedgerStatus:
    accounting: Accounting
    committed_batches: int
    metrics: dict[str, float]  # scalars of the curriculum: tau, ess, belief mean, collapse warning, ...
    histograms: dict[str, np.ndarray]  # "belief_mean" [<=10000 sampled prompts], "n_by_lease", "p_by_lease"


for _message in (Lease, BatchEntry, TrainingGroup, LeaseChunk, ChunkSummary, VerdictChunk, Settlement, SettleReply):
    travels(_message)
travels(BatchPlan, rows="entries")
travels(TrainingBatch, rows="groups")


class RunError(RuntimeError):
    """A failure that ends the run with a message for the user: what, where and what to do."""


class CheckpointError(RunError):
    """A checkpoint could not be written (a full disk, for example). The ones before it are intact."""


class ConfigError(RunError):
    """Bad configuration, data or environment, found before any actor starts."""


class PayloadsLost(RunError):
    """Payloads of a batch are gone with the process that held them. Nothing was updated: their leases can be given
    back and the step repeated without them."""

    def __init__(self, message: str, lease_ids: tuple[int, ...]) -> None:
        super().__init__(message, lease_ids)
        self.lease_ids = lease_ids

    def __str__(self) -> str:
        return str(self.args[0])
