"""The curriculum: the ledger's state machine, synchronous and deterministic; the only writer of beliefs.

    open batch --next_round--> leases: OPEN --lease--> LEASED --settle--> SETTLED --(all of the batch)--+
        ^                        ^                       |                                             |
        | batch <= version       '------give_back--------'         next_round, or finished --plan--> commit
        |   + max_staleness         (attempt + 1, charged again)

The same calls in the same order leave the same state, in this process or another: randomness comes from
(seed, batch, round) and (seed, lease_id), and nothing is read from a clock (apart from time spent, a metric).
The journal relies on this: it stores the calls.
"""

from __future__ import annotations

import heapq
import time
from dataclasses import replace
from pathlib import Path

import numpy as np

from cures_ray.config import Config
from cures_ray.curriculum.batches import (
    LEASED,
    OPEN,
    SETTLED,
    Batch,
    Round,
    TrackedLease,
    batch_histograms,
    batch_metrics,
    digest,
    lease_seed,
    outcomes_by_lease,
    trained_and_discarded,
)
from cures_ray.curriculum.methods import METHODS
from cures_ray.curriculum.pool import PromptPool
from cures_ray.messages import (
    Accounting,
    BatchEntry,
    BatchPlan,
    CommitReport,
    Discard,
    Lease,
    LedgerStatus,
    Settlement,
    SettleReply,
)
from cures_ray.snapshot import read_state, write_state

FORMAT = 3  # of saved curricula


class Curriculum:
    """Beliefs, leases and accounting of one run. Methods mirror ``LedgerPort``.

    Args:
        prompt_ids: uint64 [N], content hashes.
        levels: a difficulty level per prompt [N], or None.
        features: float32 [N, d] for ``prior_from: predictor``, or None (then levels serve).

    Raises:
        ValueError: no prompts, or arrays of different length.
    """

    def __init__(
        self,
        config: Config,
        prompt_ids: np.ndarray,
        levels: np.ndarray | None = None,
        features: np.ndarray | None = None,
    ) -> None:
        count = len(prompt_ids)
        if count == 0:
            raise ValueError("the curriculum needs at least one prompt")
        for name, column in (("levels", levels), ("features", features)):
            if column is not None and len(column) != count:
                raise ValueError(f"{name} has {len(column)} rows for {count} prompts")
        self.config, self.prompt_ids = config, np.asarray(prompt_ids, np.uint64)
        self.method = METHODS[config.curriculum.method]
        self.pool = PromptPool(config, count, levels, features)
        self.accounting = Accounting()
        self.version = 0  # newest policy version seen
        self.committed = 0  # batches
        self.next_batch, self.next_lease = 0, 0
        self.batches: dict[int, Batch] = {}  # opened, not committed
        self._tracked: dict[int, tuple[Batch, TrackedLease]] = {}
        self._queue: list[int] = []  # heap of OPEN lease ids
        self.metrics: dict[str, float] = {}  # of the last committed batch
        self.endings: list[tuple[TrackedLease, tuple[int, dict[Discard, int]]]] = []  # its leases: trained, discarded
        self.histograms: dict[str, np.ndarray] = {}
        self.seconds = 0.0  # in curriculum code since the last commit

    # -- leasing ---------------------------------------------------------------------------------

    def lease(self, worker: str, max_rollouts: int, version: int) -> list[Lease]:
        """Leases in order, up to ``max_rollouts``, at least one when any is open. Opens batches that the
        staleness bound admits, one at a time, only when the open ones are handed out."""
        began = time.perf_counter()
        self.version = max(self.version, version)
        taken: list[Lease] = []
        room = max_rollouts
        while room > 0:
            if not self._queue and not self._open_next():
                break
            if not self._queue:
                continue
            tracked = self._tracked[self._queue[0]][1]
            if taken and tracked.lease.n > room:
                break
            heapq.heappop(self._queue)
            tracked.state, tracked.worker = LEASED, worker
            taken.append(tracked.lease)
            room -= tracked.lease.n
        self._check(began)
        return taken

    def may_open(self) -> bool:
        """Staleness, steps and budget admit a batch, and no draw comes before its subset's pilots (Algorithm 1)."""
        trainer = self.config.trainer
        return (
            not any(batch.piloting for batch in self.batches.values())
            and self.next_batch <= self.version + self.config.async_rl.max_staleness
            and self.next_batch < trainer.steps
            and (trainer.rollout_budget is None or self.accounting.planned < trainer.rollout_budget)
        )

    def _open_next(self) -> bool:
        if not self.may_open():
            return False
        batch = Batch(number=self.next_batch)
        self.next_batch += 1
        self.batches[batch.number] = batch
        self._advance(batch)
        return True

    def _advance(self, batch: Batch) -> None:
        """Plan rounds until one has leases or the method is done."""
        while batch.missing == 0 and not batch.finished:
            planned = self.method.next_round(self.pool, batch)
            if planned is None:
                batch.finished = True
            else:
                self._add_round(batch, planned)

    def _add_round(self, batch: Batch, planned: Round) -> None:
        alpha, beta = self.pool.belief.counts(planned.index)
        reuse = {h.lease.prompt_index: h.lease for h in batch.leases if h.role != "pilot" or self._trains_pilots}
        for i in np.flatnonzero(planned.n):
            index = int(planned.index[i])
            before = reuse.get(index)  # the belief from before this step's evidence
            lease = Lease(
                lease_id=self.next_lease,
                attempt=0,
                prompt_index=index,
                prompt_id=f"{int(self.prompt_ids[index]):016x}",
                n=int(planned.n[i]),
                batch=batch.number,
                round=batch.rounds,
                weight=float(planned.weight[i]),
                alpha=before.alpha if before else float(alpha[i]),
                beta=before.beta if before else float(beta[i]),
                seed=lease_seed(self.config.trainer.seed, self.next_lease),
            )
            self.next_lease += 1
            tracked = TrackedLease.fresh(lease, planned.role, 1 if planned.draws is None else int(planned.draws[i]))
            batch.leases.append(tracked)
            batch.missing += 1
            self._tracked[lease.lease_id] = (batch, tracked)
            heapq.heappush(self._queue, lease.lease_id)
            self.accounting.planned += lease.n
            self.accounting.in_flight += lease.n
        batch.rounds += 1
        batch.metrics.update(planned.metrics)

    @property
    def _trains_pilots(self) -> bool:
        return self.config.curriculum.trains_pilots

    # -- settling --------------------------------------------------------------------------------

    def settle(self, settlement: Settlement) -> SettleReply:
        """Count the verified rollouts of each lease of the chunk, once. A repeated or lost attempt changes nothing.

        Raises:
            ValueError: the settlement does not have a lease's n rollouts; nothing was changed.
        """
        began = time.perf_counter()
        keys = zip(settlement.lease_id.tolist(), settlement.attempt.tolist(), settlement.n.tolist(), strict=True)
        found = [self._to_settle(*key) for key in keys]
        accepted, touched = np.zeros(len(found), bool), {}
        for i, (entry, outcome) in enumerate(zip(found, outcomes_by_lease(settlement, self.version), strict=True)):
            if entry is None or entry[1].state != LEASED:  # the same lease twice in one chunk: the first counts
                continue
            batch, tracked = entry
            tracked.settle(outcome)
            lease, valid = tracked.lease, outcome.valid
            key = (batch.number, lease.lease_id, lease.attempt)
            self.pool.observe(key, lease.prompt_index, outcome.rewards[valid], outcome.lag[valid])
            batch.missing -= 1
            accepted[i] = True
            touched[batch.number] = batch
        for batch in touched.values():
            self._advance(batch)
        self._check(began)
        return SettleReply(accepted=accepted, ready=tuple(k for k, b in sorted(self.batches.items()) if b.finished))

    def _to_settle(self, lease_id: int, attempt: int, n: int) -> tuple[Batch, TrackedLease] | None:
        """The lease, if this attempt of it is handed out and not settled."""
        batch, tracked = self._tracked.get(lease_id, (None, None))
        if batch is None or tracked is None or tracked.lease.attempt != attempt or tracked.state != LEASED:
            return None
        if tracked.lease.n != n:
            raise ValueError(f"lease {lease_id} has {tracked.lease.n} rollouts, its settlement {n}")
        return batch, tracked

    def give_back(self, keys: list[tuple[int, int]], reason: Discard) -> None:
        """Unsettled or uncommitted leases: their rollouts end as discarded(reason), and they are issued again under the
        next attempt. What a settled one told stays in the beliefs. Unknown keys change nothing."""
        began = time.perf_counter()
        for lease_id, attempt in keys:
            batch, tracked = self._tracked.get(lease_id, (None, None))
            if batch is None or tracked is None or tracked.lease.attempt != attempt or tracked.state == OPEN:
                continue
            if tracked.state == SETTLED:
                batch.missing += 1
                batch.finished = False
            n = tracked.lease.n
            self.accounting.planned += n
            self._discard(reason, n)
            fresh = TrackedLease.fresh(replace(tracked.lease, attempt=attempt + 1), tracked.role, tracked.draws)
            batch.leases[batch.leases.index(tracked)] = fresh
            self._tracked[lease_id] = (batch, fresh)
            heapq.heappush(self._queue, lease_id)
        self._check(began)

    def leased(self, lease_id: int, attempt: int) -> Lease | None:
        """The lease, if this attempt is handed out and not settled."""
        _, tracked = self._tracked.get(lease_id, (None, None))
        return tracked.lease if tracked and tracked.state == LEASED and tracked.lease.attempt == attempt else None

    def leased_keys(self) -> list[tuple[int, int]]:
        """Handed out and not settled, in lease order."""
        return sorted((h.lease.lease_id, h.lease.attempt) for _, h in self._tracked.values() if h.state == LEASED)

    def reissue_uncommitted(self) -> None:
        """After a resume from a checkpoint the payloads of uncommitted batches are gone: every lease that was
        handed out ends as INTERRUPTED and is issued again."""
        keys = [(h.lease.lease_id, h.lease.attempt) for _, h in self._tracked.values() if h.state != OPEN]
        self.give_back(keys, Discard.INTERRUPTED)

    # -- ending ----------------------------------------------------------------------------------

    def plan(self, batch: int) -> BatchPlan | None:
        """The finished plan of ``batch``, entries in (prompt draw order, round); None while rounds are open."""
        found = self.batches.get(batch)
        if found is None or not found.finished:
            return None
        began = time.perf_counter()
        selections = self.method.select(self.pool, found)
        first: dict[int, int] = {}
        for tracked in found.leases:
            first.setdefault(tracked.lease.prompt_index, len(first))
        entries = [
            BatchEntry(lease=tracked.lease, rewards=tracked.rewards, keep=keep & tracked.valid, drop_reason=reason)
            for tracked, (keep, reason) in zip(found.leases, selections, strict=True)
        ]
        entries.sort(key=lambda e: (first[e.lease.prompt_index], e.lease.round, e.lease.lease_id))
        metrics = found.metrics | batch_metrics(found) | self.pool.metrics()
        self.seconds += time.perf_counter() - began
        metrics["seconds"] = self.seconds
        return BatchPlan(
            batch=batch, prompts=self.config.curriculum.prompts_per_step, entries=tuple(entries), metrics=metrics
        )

    def commit(self, report: CommitReport) -> Accounting:
        """End every rollout of the batch as trained or discarded. A repeated commit changes nothing.

        Raises:
            ValueError: the batch is not finished, or the report ends more rollouts than a lease has.
        """
        began = time.perf_counter()
        batch = self.batches.get(report.batch)
        if batch is None and report.batch < self.next_batch:
            return self._copy()
        if batch is None or not batch.finished:
            raise ValueError(f"commit of batch {report.batch}, which is not finished")
        selections = self.method.select(self.pool, batch)
        endings = [trained_and_discarded(h, *s, report) for h, s in zip(batch.leases, selections, strict=True)]
        for tracked, (trained, discarded) in zip(batch.leases, endings, strict=True):
            self.accounting.trained += trained
            self.accounting.in_flight -= trained
            for reason, count in discarded.items():
                self._discard(reason, count)
                self.accounting.in_flight -= count
            del self._tracked[tracked.lease.lease_id]
        self.endings = list(zip(batch.leases, endings, strict=True))
        prompt_of = {tracked.lease.lease_id: tracked.lease.prompt_index for tracked in batch.leases}
        self.pool.note_drift({prompt_of[lease]: nats for lease, nats in report.drift.items() if lease in prompt_of})
        statistics = [g for g in report.gradient_statistics if g.lease_id in prompt_of]
        self.pool.observe_gradients([prompt_of[g.lease_id] for g in statistics], statistics)
        self._learn(batch)
        self.metrics = batch.metrics | batch_metrics(batch) | self.pool.metrics()
        self.histograms = batch_histograms(batch)
        del self.batches[report.batch]
        self.committed += 1
        self._check(began)
        self.metrics["seconds"], self.seconds = self.seconds, 0.0
        return self._copy()

    def _learn(self, batch: Batch) -> None:
        """Raw counts of the batch, in lease order, to cost and priors."""
        for tracked in batch.leases:
            spent = (tracked.tokens, tracked.generate_seconds, tracked.verify_seconds)
            self.pool.observe_cost(tracked.lease.prompt_index, tracked.lease.n, *spent)
        index = np.array([h.lease.prompt_index for h in batch.leases], np.int64)
        successes = np.array([float(h.rewards[h.valid].sum()) for h in batch.leases])
        trials = np.array([float(h.valid.sum()) for h in batch.leases])
        self.pool.learn(index, successes, trials)

    def status(self) -> LedgerStatus:
        return LedgerStatus(
            accounting=self._copy(),
            committed_batches=self.committed,
            metrics=self.metrics | self.pool.metrics(),
            histograms={"belief_mean": self.pool.sampled_accuracy(), **self.histograms},
        )

    def _discard(self, reason: Discard, count: int) -> None:
        self.accounting.discarded[reason] = self.accounting.discarded.get(reason, 0) + count

    def _copy(self) -> Accounting:
        return replace(self.accounting, discarded=dict(self.accounting.discarded))

    def _check(self, began: float) -> None:
        self.accounting.check()
        self.seconds += time.perf_counter() - began

    # -- persistence -----------------------------------------------------------------------------

    def save(self, folder: Path) -> None:
        """Write everything that ``load`` needs into ``folder`` (docs/journal.md, Snapshots)."""
        accounting = self._copy()
        write_state(
            Path(folder),
            {
                "format": FORMAT,
                "prompts": len(self.prompt_ids),
                "prompts_digest": digest(self.prompt_ids),
                "version": self.version,
                "committed": self.committed,
                "next": [self.next_batch, self.next_lease],
                "accounting": {
                    "planned": accounting.planned,
                    "trained": accounting.trained,
                    "in_flight": accounting.in_flight,
                    "discarded": {k.value: v for k, v in accounting.discarded.items()},
                },
                "batches": [batch.as_json() for _, batch in sorted(self.batches.items())],
                "pool": self.pool.state_dict(),
            },
        )

    @classmethod
    def load(
        cls,
        folder: Path,
        config: Config,
        prompt_ids: np.ndarray,
        levels: np.ndarray | None = None,
        features: np.ndarray | None = None,
    ) -> Curriculum:
        """The curriculum that ``save`` wrote.

        Raises:
            ValueError: not a snapshot of this format, or of other prompts.
        """
        state = read_state(Path(folder))
        if state.get("format") != FORMAT:
            raise ValueError(f"{folder}: curriculum format {state.get('format')}, this version reads {FORMAT}")
        if state["prompts_digest"] != digest(np.asarray(prompt_ids, np.uint64)):
            raise ValueError(
                f"{folder} is the curriculum of {state['prompts']} other prompts; data.train has {len(prompt_ids)}. "
                f"Resume with the data of the run, or start a new one"
            )
        self = cls(config, prompt_ids, levels, features)
        self.version, self.committed = state["version"], state["committed"]
        self.next_batch, self.next_lease = state["next"]
        a = state["accounting"]
        discarded = {Discard(k): v for k, v in a["discarded"].items()}
        self.accounting = Accounting(
            planned=a["planned"], trained=a["trained"], in_flight=a["in_flight"], discarded=discarded
        )
        self.batches = {r["number"]: Batch.from_json(r) for r in state["batches"]}
        self._tracked = {h.lease.lease_id: (b, h) for b in self.batches.values() for h in b.leases}
        self._queue = sorted(i for i, (_, h) in self._tracked.items() if h.state == OPEN)
        self.pool.load_state_dict(state["pool"])
        self.accounting.check()
        return self
