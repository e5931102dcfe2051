"""The whole system in one process: the same driver, ledger, assembly, packing and losses, a small engine behind them.

    Driver --(ports.py)--> LocalLedger   -> cures_ray.curriculum.machine.Curriculum
                           LocalGenerator-> one Hugging Face model on the CPU, all waiting requests in one batch
                           LocalVerifier -> judges.py
                           LocalLearner  -> packing, losses, gradient statistics of the library; torch AdamW

For wide sweeps over small models. The generator holds its own copy of the weights and takes new ones only when the
driver publishes them, so staleness is what the driver and the ledger make it: with max_staleness = eta the rollouts
of the next eta batches are sampled before the learner moves.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.inprocess.accuracy import ExactAccuracy, RowCache
from benchmarks.inprocess.controls import permuted
from benchmarks.inprocess.costs import Costs
from benchmarks.inprocess.fixed_fleet import FixedFleet
from benchmarks.inprocess.judges import JUDGES, LocalVerifier
from benchmarks.inprocess.local_learner import LocalLearner
from benchmarks.inprocess.oracle_sigma import MeasuredMoments, install
from benchmarks.inprocess.sampler import Request, Sampled, Sampler
from cures_ray.config import Config
from cures_ray.curriculum.machine import Curriculum
from cures_ray.data.table import curriculum_columns
from cures_ray.loop.chunks import pack, picked
from cures_ray.loop.driver import Driver, Ports
from cures_ray.loop.evaluate import Evaluator
from cures_ray.loop.ports import GeneratorPort
from cures_ray.messages import (
    Accounting,
    BatchPlan,
    ChunkSummary,
    CommitReport,
    Discard,
    Key,
    LeaseChunk,
    LedgerStatus,
    Rollout,
    RolloutChunk,
    Settlement,
    SettleReply,
    SyncReport,
    WeightUpdate,
)
from cures_ray.run.preflight import Inputs


class LocalLedger:
    """LedgerPort over the curriculum in this process; marks the costs at every commit.

    ``before_plan`` is called with the curriculum whenever a batch may be planned (the oracle control).
    """

    def __init__(self, curriculum: Curriculum, costs: Costs, before_plan: Any = None) -> None:
        self.curriculum, self.costs, self.before_plan = curriculum, costs, before_plan
        self.plans: list[dict[str, float]] = []

    async def lease(self, worker: str, max_rollouts: int, version: int) -> LeaseChunk:
        if self.before_plan is not None:
            self.before_plan(self.curriculum, version)
        with self.costs.timed("curriculum"):
            leases = self.curriculum.lease(worker, max_rollouts, version)
        return LeaseChunk.of(leases)

    async def settle(self, settlement: Settlement) -> SettleReply:
        with self.costs.timed("curriculum"):
            return self.curriculum.settle(settlement)

    async def give_back(self, keys: list[Key], reason: Discard) -> None:
        self.curriculum.give_back(keys, reason)

    async def plan(self, batch: int) -> BatchPlan | None:
        with self.costs.timed("curriculum"):
            plan = self.curriculum.plan(batch)
        if plan is not None:
            self.plans.append(_shape(plan))
        return plan

    async def commit(self, report: CommitReport) -> Accounting:
        with self.costs.timed("curriculum"):
            accounting = self.curriculum.commit(report)
        self.costs.mark(report.batch + 1, accounting)
        return accounting

    async def status(self) -> LedgerStatus:
        return self.curriculum.status()

    async def save(self, folder: Path) -> None:
        self.curriculum.save(folder)


def _shape(plan: BatchPlan) -> dict[str, float]:
    """What a batch was made of: the numbers that explain a learning curve."""
    by_prompt: dict[str, list[np.ndarray]] = {}
    for entry in plan.entries:
        by_prompt.setdefault(entry.lease.prompt_id, []).append(entry.rewards)
    rewards = [np.concatenate(parts) for parts in by_prompt.values()] or [np.zeros(1)]
    total = sum(len(r) for r in rewards)
    mixed = sum(len(r) for r in rewards if 0 < r.mean() < 1)
    return {
        "batch": float(plan.batch),
        "rollouts": float(total),
        "distinct_prompts": float(len(by_prompt)),
        "largest_n": float(max(len(r) for r in rewards)),
        "reward": float(np.concatenate(rewards).mean()),
        "mixed_share": mixed / max(total, 1),  # rollouts in groups with both outcomes
        "kept_share": sum(int(e.keep.sum()) for e in plan.entries) / max(total, 1),
        **{k: float(v) for k, v in plan.metrics.items()},
    }


class LocalGenerator:
    """GeneratorPort that samples everything that waits in one batch. ``prompts``: the tables by name."""

    def __init__(self, sampler: Sampler, costs: Costs, prompts: Mapping[str, RowCache], max_batch: int) -> None:
        self.name, self.version, self.max_batch = "inprocess", -1, max_batch
        self.sampler, self.costs, self.prompts = sampler, costs, prompts
        self._queue: list[tuple[LeaseChunk, int, asyncio.Future[list[Sampled]]]] = []  # lease i of a chunk
        self._done: list[tuple[LeaseChunk, int, list[Sampled], float]] = []  # with the seconds that it took
        self._finished = asyncio.Event()
        self._pump: asyncio.Task[None] | None = None
        self._waiting: set[asyncio.Task[None]] = set()

    async def submit(self, leases: LeaseChunk) -> None:
        began = time.monotonic()
        for i, future in enumerate(self._enqueue(leases)):
            task = asyncio.create_task(self._finish(leases, i, future, began))
            self._waiting.add(task)
            task.add_done_callback(self._waiting.discard)

    async def _finish(self, leases: LeaseChunk, i: int, future: asyncio.Future[list[Sampled]], began: float) -> None:
        self._done.append((leases, i, await future, time.monotonic() - began))
        self._finished.set()

    async def collect(self) -> tuple[ChunkSummary, RolloutChunk]:
        await self._finished.wait()
        await asyncio.sleep(0)  # what was sampled in the same batch
        done, self._done = self._done, []
        self._finished.clear()
        return self._package(picked([d[:2] for d in done]), [sampled for *_, sampled, _ in done], [d[3] for d in done])

    async def generate(self, leases: LeaseChunk) -> tuple[ChunkSummary, RolloutChunk]:
        began = time.monotonic()
        sampled = await asyncio.gather(*self._enqueue(leases))
        return self._package(leases, sampled, [time.monotonic() - began] * len(leases))

    def _enqueue(self, leases: LeaseChunk) -> list[asyncio.Future[list[Sampled]]]:
        futures: list[asyncio.Future[list[Sampled]]] = [asyncio.get_running_loop().create_future() for _ in leases.n]
        self._queue += [(leases, i, future) for i, future in enumerate(futures)]
        if self._pump is None or self._pump.done():
            self._pump = asyncio.create_task(self._run())
        return futures

    async def _run(self) -> None:
        """Let every task that is ready add its leases, then sample; repeat until nothing waits."""
        while self._queue:
            waiting = -1
            while waiting != len(self._queue):
                waiting = len(self._queue)
                await asyncio.sleep(0)
                await asyncio.sleep(0)
            source = self._queue[0][0].source  # evaluation is sampled and charged apart
            batch, n = [], 0
            for item in [item for item in self._queue if item[0].source == source]:
                if n and n + item[0].n[item[1]] > self.max_batch:
                    break
                batch.append(item)
                n += int(item[0].n[item[1]])
                self._queue.remove(item)
            self._sample(batch, training=source == "train")
            await asyncio.sleep(0)

    def _sample(self, batch: list[tuple[LeaseChunk, int, asyncio.Future[list[Sampled]]]], *, training: bool) -> None:
        requests = [
            Request(
                self.prompts[leases.source].row(int(leases.prompt_index[i])).token_ids,
                int(leases.n[i]),
                int(leases.seed[i]),
                leases.greedy,
            )
            for leases, i, _ in batch
        ]
        try:
            with self.costs.timed("generation" if training else "evaluation"):
                results = self.sampler.sample(requests)
        except Exception as error:
            for *_, future in batch:
                if not future.done():
                    future.set_exception(error)
            raise
        for request, (*_, future), rollouts in zip(requests, batch, results, strict=True):
            if training:
                length = sum(len(r[0]) for r in rollouts)
                self.costs.generated(self.sampler.parameters, len(request.prompt), length)
            if not future.done():
                future.set_result(rollouts)

    async def drain(self) -> None:
        """Return when nothing waits or is sampled: what the real system generates while the learner trains."""
        quiet = 0
        while quiet < 50:  # a lease takes a few turns of the loop to become a request
            await asyncio.sleep(0)
            busy = self._queue or self._done or (self._pump is not None and not self._pump.done())
            quiet = 0 if busy else quiet + 1

    def _package(
        self, leases: LeaseChunk, sampled: list[list[Sampled]], seconds: list[float]
    ) -> tuple[ChunkSummary, RolloutChunk]:
        rollouts = [
            [
                Rollout(
                    token_ids=ids,
                    logprobs=logprobs,
                    finish_reason="stop" if stopped else "length",
                    min_version=self.version,
                    max_version=self.version,
                    text=text,
                )
                for ids, logprobs, stopped, text in group
            ]
            for group in sampled
        ]
        prompts = [row.token_ids for row in self.prompts[leases.source].rows(leases.prompt_index)]
        return pack(leases, prompts, rollouts, self.name, seconds)

    async def update_weights(self, update: WeightUpdate) -> SyncReport:
        with self.costs.timed("weight_sync"):
            self.sampler.load(update.info["module"])
        self.version = update.version
        return SyncReport(
            generator=self.name, version=update.version, canary_max_error=0.0, seconds_paused=0.0, seconds=0.0
        )


class Recorder:
    """Observer that keeps the scalars of every step and the last histograms."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []
        self.histograms: dict[str, np.ndarray] = {}
        self.notes: list[str] = []

    def step(self, step: int, metrics: dict[str, float], histograms: dict[str, np.ndarray]) -> None:
        if "eval/version" not in metrics:
            self.steps.append({"step": float(step), **metrics})
        if histograms:
            self.histograms = histograms

    def note(self, text: str) -> None:
        self.notes.append(text)


class LocalEvaluator:
    """The library's evaluator, its seconds kept apart, and the exact accuracy if wanted."""

    def __init__(self, evaluator: Evaluator, exact: ExactAccuracy | None, costs: Costs) -> None:
        self.evaluator, self.exact, self.costs = evaluator, exact, costs

    async def __call__(
        self, version: int, generators: Callable[[], list[GeneratorPort]], progress: Callable[[str], None]
    ) -> dict[str, float]:
        metrics = await self.evaluator(version, generators, progress)
        if self.exact is not None:
            with self.costs.timed("evaluation"):
                metrics["eval/expected_accuracy"] = float(self.exact().mean())
        return metrics


@dataclass(slots=True, kw_only=True)
class LocalRun:
    """What a run in one process leaves: everything that a figure may need."""

    accounting: Accounting
    evaluations: list[tuple[int, dict[str, float]]]
    costs: Costs
    steps: list[dict[str, float]]
    plans: list[dict[str, float]]
    histograms: dict[str, np.ndarray] = field(default_factory=dict)
    learner: LocalLearner


def run_in_process(
    config: Config,
    inputs: Inputs,
    task: str,
    *,
    exact: bool = True,
    coin: float | None = None,
    oracle: Callable[[Curriculum, np.ndarray], None] | None = None,
    measure_sigma: bool = False,
    permute: bool = False,
) -> LocalRun:
    """Train ``config`` to its end.

    Args:
        task: a key of ``JUDGES``.
        exact: evaluate the exact accuracy too.
        coin: random rewards with this probability instead of verdicts (control).
        oracle: called with the curriculum and the true accuracy of every training prompt whenever the policy has
            changed, free of charge (control).
        measure_sigma: allocations get score moments of many fresh rollouts (control).
        permute: the curriculum sees every prompt with the level and the features of another one (control).
    """
    costs = Costs()
    rollout = config.rollout
    learner = LocalLearner(config, costs)
    dtype = getattr(torch, rollout.dtype)
    sampler = Sampler(learner.policy.lm, inputs.tokenizer, rollout.temperature, rollout.max_new_tokens, dtype)
    train = RowCache(inputs.train)
    tables = {"train": train} | ({"eval": RowCache(inputs.eval)} if inputs.eval is not None else {})
    generator = LocalGenerator(sampler, costs, tables, config.rollout.max_concurrent_rollouts)
    learner.before_training = generator.drain
    curriculum = make_curriculum(config, inputs, permute)
    if measure_sigma:
        install(curriculum, MeasuredMoments(learner, sampler, JUDGES[task], train.all))
    before_plan = _oracle(oracle, ExactAccuracy(sampler, train, task), costs) if oracle is not None else None
    ledger = LocalLedger(curriculum, costs, before_plan)
    verifier = LocalVerifier(JUDGES[task], tables, config.trainer.seed, coin)
    ports = Ports(ledger=ledger, fleet=FixedFleet([generator]), verifier=verifier, learner=learner)
    evaluator = None
    if inputs.eval is not None:
        held_out = tables["eval"]
        expected = ExactAccuracy(sampler, held_out, task) if exact else None
        plain = Evaluator(held_out, verifier, config.eval.samples_per_prompt, config.trainer.seed)
        evaluator = LocalEvaluator(plain, expected, costs)
    recorder = Recorder()
    driver = Driver(config, ports, recorder, evaluate=evaluator)
    accounting = asyncio.run(driver.run())
    return LocalRun(
        accounting=accounting,
        evaluations=evaluator.evaluator.history if evaluator is not None else [],
        costs=costs,
        steps=recorder.steps,
        plans=ledger.plans,
        histograms=recorder.histograms,
        learner=learner,
    )


def make_curriculum(config: Config, inputs: Inputs, permute: bool = False) -> Curriculum:
    """As ``actors.ledger`` makes it; with ``permute`` the levels and features are those of other prompts."""
    ids, levels, features = curriculum_columns(config, inputs.train)
    if permute:
        levels, features = permuted(config.trainer.seed, len(ids), levels, features)
    return Curriculum(config, ids, levels, features)


def _oracle(
    tell: Callable[[Curriculum, np.ndarray], None], accuracy: ExactAccuracy, costs: Costs
) -> Callable[[Curriculum, int], None]:
    seen = -1

    def before_plan(curriculum: Curriculum, version: int) -> None:
        nonlocal seen
        if version != seen:
            seen = version
            with costs.timed("evaluation"):
                tell(curriculum, accuracy())

    return before_plan
