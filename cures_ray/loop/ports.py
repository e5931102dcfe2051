"""What the driver needs of the workers around it.

`actors.cluster.launch` implements these Protocols over Ray actors; unit tests and wide benchmark sweeps implement
them in one process. Every call may raise `WorkerLost` when its worker is gone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from cures_ray.messages import (
    Accounting,
    BatchPlan,
    ChunkSummary,
    CommitReport,
    Discard,
    Key,
    LeaseChunk,
    LedgerStatus,
    PayloadHandle,
    PromptRow,
    RunError,
    Settlement,
    SettleReply,
    StepReport,
    SyncReport,
    TrainingBatch,
    VerdictChunk,
    WeightUpdate,
)


class WorkerLost(RuntimeError):
    """A worker (or a payload that lived in it) is gone; the work may be given to another."""


class PayloadLost(WorkerLost):
    """Rollouts that were generated are gone, with the node that held them: they must be generated again."""


class LearnerLost(RunError):
    """A learner rank died or hangs, and its share of the optimizer with it: start again from a checkpoint."""


class Retired(RuntimeError):
    """A generator cannot come back: its budget of restarts is used up."""


class CanaryFailed(RuntimeError):
    """After a weight sync a generator's log-probabilities are not the learner's: its weights are wrong.

    ``reading``: what was measured, what is allowed, and the remedy. ``reproducible``: a second transfer measured the
    same, so that a replacement would fail in the same way.
    """

    def __init__(self, generator: str, version: int, reading: str, reproducible: bool = False) -> None:
        super().__init__(generator, version, reading, reproducible)
        self.generator, self.version, self.reading, self.reproducible = generator, version, reading, reproducible

    def __str__(self) -> str:
        return (
            f"canary failed: after loading weights version {self.version}, generator {self.generator} differs from "
            f"the learner by {self.reading}"
        )


class LedgerPort(Protocol):
    """The curriculum's only writer. All calls are idempotent or keyed by (lease_id, attempt)."""

    async def lease(self, worker: str, max_rollouts: int, version: int) -> LeaseChunk:
        """Up to ``max_rollouts`` rollouts of leases (at least one lease when any is open and
        max_rollouts >= 1); empty when nothing may be generated now."""
        ...

    async def settle(self, settlement: Settlement) -> SettleReply:
        """Each lease of the chunk settles once; what was settled or given back before changes nothing."""
        ...

    async def give_back(self, keys: list[Key], reason: Discard) -> None:
        """Return unsettled or uncommitted (lease_id, attempt) leases: their rollouts are discarded with
        ``reason`` and the leases are issued again under the next attempt."""
        ...

    async def plan(self, batch: int) -> BatchPlan | None:
        """The finished plan of ``batch``, or None while rounds are open."""
        ...

    async def commit(self, report: CommitReport) -> Accounting: ...

    async def status(self) -> LedgerStatus: ...

    async def save(self, folder: Path) -> None:
        """Write a snapshot that ``Curriculum.load`` reads into ``folder``."""
        ...


class GeneratorPort(Protocol):
    """A generator works on what was submitted and hands out what is finished, in chunks of its own choice."""

    name: str

    async def submit(self, leases: LeaseChunk) -> None:
        """Begin to generate; what is finished comes out of ``collect``."""
        ...

    async def collect(self) -> tuple[ChunkSummary, PayloadHandle]:
        """The leases that finished since the last call, one payload for all; waits a little for the first. An empty
        summary says that the generator lives and has nothing. One call at a time."""
        ...

    async def generate(self, leases: LeaseChunk) -> tuple[ChunkSummary, PayloadHandle]:
        """All of ``leases``, in their order (evaluation)."""
        ...

    async def update_weights(self, update: WeightUpdate) -> SyncReport:
        """Load ``update`` while requests in flight continue, stamp its version, run the canary."""
        ...


class VerifierPort(Protocol):
    async def verify(self, payload: PayloadHandle, rollouts: int) -> VerdictChunk:
        """One verdict on each of the payload's ``rollouts``, in order. Raises PayloadLost when the payload is gone,
        WorkerLost when the verifier is: another may be asked."""
        ...


class LearnerPort(Protocol):
    async def train(self, batch: TrainingBatch) -> StepReport: ...

    async def publish(self, version: int) -> WeightUpdate:
        """Make the current weights available as ``version``, with canary log-probabilities."""
        ...

    async def save(self, folder: Path) -> None:
        """Write optimizer and model state into ``folder`` (exists, empty)."""
        ...

    async def export(self, folder: Path) -> None:
        """Write a plain Hugging Face folder: safetensors, tokenizer, config."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Survey:
    """What the cluster asks of the fleet. ``leaving``: seconds left to each generator whose node is drained or was
    given notice, inf without a deadline; ``room``: one more generator is wanted, and the cluster has room for it."""

    leaving: dict[str, float]
    room: bool


class FleetPort(Protocol):
    """Starts and replaces generators; elastic membership passes through here."""

    def generators(self) -> list[GeneratorPort]: ...

    async def replace(self, name: str, why: str) -> GeneratorPort:
        """End generator ``name`` if it lives and start a fresh one with the original weights. Raises Retired when it
        cannot come back; it is no member any more then."""
        ...

    async def survey(self) -> Survey: ...

    async def join(self) -> GeneratorPort | None:
        """Start one more generator, with the original weights. None when it did not start; it may be tried again."""
        ...

    async def dismiss(self, name: str, *, for_good: bool = False) -> None:
        """End generator ``name`` and leave its place; ``for_good``: none is started in its stead."""
        ...


@dataclass(slots=True, kw_only=True)
class Ports:
    ledger: LedgerPort
    fleet: FleetPort
    verifier: VerifierPort
    learner: LearnerPort
    usage: Callable[[], dict[str, float]] = dict  # cpu/ROLE_s: CPU seconds since the last call


class PromptSource(Protocol):
    """A prompt table as generators and verifiers hold it."""

    def rows(self, index: np.ndarray, *, tokenize: bool = True) -> list[PromptRow]:
        """Prompts ``index`` [k]; without ``tokenize`` their token ids are empty."""
        ...


class Observer(Protocol):
    """Receives one record per optimizer step; writes logs and the progress view."""

    def step(self, step: int, metrics: dict[str, float], histograms: dict[str, np.ndarray]) -> None: ...

    def note(self, text: str) -> None: ...
