"""The one training loop: synchronous (max_staleness = 0), asynchronous, tests and benchmarks run this code.

Dataflow (-->) and who waits for whom (<~~ "is unblocked by"):

    ledger --LeaseChunk--> pull loop (one per generator) --submit--> generator
                                                                        | what is finished: payload + ChunkSummary
       ^                        <~~ settle, commit, new weights         v
       |<------Settlement------- judge task (one per chunk) -------> verifier --VerdictChunk
       |
       |--BatchPlan--> train loop --TrainingBatch (handles, advantages, weights)--> learner
       |                  |  <~~ last settlement of the batch                          |
       |<--CommitReport---'                                                       WeightUpdate
                          '--> generators: load under running requests, canary, then leases again

The loops of the upper half are in generation.py. Backpressure: the ledger opens batch b only when
b <= version + max_staleness, so generators run at most that far ahead of the learner and no rollout can be older. A
generator asks for no more rollouts than it has free slots. Payloads stay where they were made; the driver holds
handles and small arrays only. New weights are published, and each generator fetches and proves them by itself: the
learner goes on meanwhile (but for transfers that need it, WeightUpdate.together).

Every task lives in one TaskGroup: whatever fails, fails the run. A lost generator is replaced and its leases
return to the ledger; the watchdog ends a run in which nothing moves, naming what is stuck.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import suppress
from dataclasses import replace
from typing import Any

import numpy as np

from cures_ray.config import Config
from cures_ray.learning.thinning import Bottleneck
from cures_ray.loop.assemble import assemble
from cures_ray.loop.chunks import Place
from cures_ray.loop.generation import Generation
from cures_ray.loop.membership import Membership
from cures_ray.loop.ports import GeneratorPort, LearnerLost, Observer, Ports
from cures_ray.loop.slots import Metrics, longest_waiting, staleness, step_metrics
from cures_ray.messages import (
    Accounting,
    BatchPlan,
    CheckpointError,
    CommitReport,
    PayloadsLost,
    RunError,
    StepReport,
    TrainingBatch,
)

# (version, the generators that hold it now, whom to tell of answers) -> eval/... metrics
Evaluate = Callable[[int, Callable[[], list[GeneratorPort]], Callable[[str], None]], Coroutine[Any, Any, Metrics]]
SaveCheckpoint = Callable[[int], Awaitable[None]]  # version
ShowRollouts = Callable[[TrainingBatch], Coroutine[Any, Any, None]]
EMERGENCY_S = 60.0  # for the checkpoint of a run that fails


class Driver:
    """Joins ledger, generators, verifiers and learner. ``await run()`` once.

    Raises:
        RunError: a worker failed beyond repair, weights could not be proven, or nothing moved for
            ``trainer.no_progress_timeout_s``.
    """

    def __init__(
        self,
        config: Config,
        ports: Ports,
        observer: Observer,
        *,
        version: int = 0,
        evaluate: Evaluate | None = None,
        save_checkpoint: SaveCheckpoint | None = None,
        show_rollouts: ShowRollouts | None = None,
    ) -> None:
        self.config, self.ports, self.observer = config, ports, observer
        self.version = version
        self._evaluate, self._save_checkpoint, self._show_rollouts = evaluate, save_checkpoint, show_rollouts
        self._generation: Generation
        self._ready = asyncio.Event()
        self._evaluation: asyncio.Task[Metrics] | None = None
        self._evaluated = -1  # the last version whose evaluation was started
        self._tasks: asyncio.TaskGroup
        self._moved, self._last, self._doing = time.monotonic(), "start", "starting"
        self._step_began = time.monotonic()
        self._bottleneck = Bottleneck(config.algo.train_cost)
        self._stopping = False
        self._stop_by = 0.0  # when a stopped run leaves the batch in work
        self._sound = False  # ledger and learner stand between two steps: what a checkpoint may hold
        self.interrupted_at: int | None = None  # the version at which ``stop`` ended the run before its last step

    async def run(self) -> Accounting:
        """Train to the last step or to the end of the budget; returns the final, checked accounting."""
        try:
            async with asyncio.TaskGroup() as self._tasks:
                self._generation = Generation(
                    self.config,
                    self.ports,
                    self._tasks,
                    progress=self._progress,
                    note=self.observer.note,
                    ready=self._ready.set,
                )
                watchdog = self._tasks.create_task(self._watchdog())
                await self._publish(self.version)
                membership = Membership(
                    self.config,
                    self.ports.fleet,
                    self._generation,
                    start=self._generation.start,
                    note=self.observer.note,
                    progress=self._progress,
                )
                self._generation.start(membership.watch())
                await self._evaluate_at(self.version)
                await self._train_loop()
                watchdog.cancel()
                self._generation.close()
        except BaseExceptionGroup as group:
            error = _first_error(group)
            await self._save_what_is_sound(error)
            raise error from group
        status = await self.ports.ledger.status()
        status.accounting.check()
        return status.accounting

    @property
    def fault_reasons(self) -> dict[str, int]:
        """Verdicts that were faults, by reason."""
        return dict(self._generation.faults.reasons)

    def stop(self) -> None:
        """Finish the current step, save a checkpoint and return from ``run``. Rollouts that are not there within
        ``trainer.stop_timeout_s`` are not waited for: the next start generates them again."""
        if self._stopping:
            return
        wait = self.config.trainer.stop_timeout_s
        self._stopping, self._stop_by = True, time.monotonic() + wait
        self._ready.set()
        self.observer.note(f"stopping: {self._doing}, for at most {wait:g} s, then a checkpoint. Again: end at once")

    async def _save_what_is_sound(self, error: BaseException) -> None:
        """A run that failed between two steps leaves a checkpoint of them."""
        if not self._sound or isinstance(error, asyncio.CancelledError | LearnerLost):
            return
        with suppress(Exception):
            async with asyncio.timeout(EMERGENCY_S):
                await self._checkpoint_at(self.version, force=True)
                self.observer.note(f"the run failed; version {self.version} is saved")

    # -- training --------------------------------------------------------------------------------

    async def _train_loop(self) -> None:
        self._step_began = time.monotonic()
        for step in range(self.version, self.config.trainer.steps):
            began = time.monotonic()
            plan = await self._wait_for_plan(step)
            if plan is None:  # the budget is spent, or the run is stopped
                await self._checkpoint_at(step, force=True)  # before anything that may fail
                if self._stopping:
                    self.interrupted_at = step
                else:
                    await self._evaluate_at(step, last=True)
                break
            self._sound = False
            idle = time.monotonic() - began
            plan, groups, batch, commit, report = await self._train(step, plan)
            # an evaluation measures this version: weights may not change under it
            spent = {"time/evaluation_s": await self._timed(self._finish_evaluation())}
            commit = replace(commit, gradient_statistics=report.gradient_statistics, drift=report.drift)
            accounting = await self.ports.ledger.commit(commit)
            accounting.check()
            self._progress(f"batch {step} committed")
            if self._show_rollouts is not None and step % self.config.logging.histogram_interval == 0:
                self._tasks.create_task(self._show_rollouts(batch))
            metrics = step_metrics(plan, groups, report, accounting, step) | {"time/learner_idle_s": idle}
            lag = staleness(plan, groups, step)
            last = step + 1 == self.config.trainer.steps
            # Before generators get leases again: with max_staleness = 0 nothing of the next batch has begun, so that a
            # resumed run is the same run. And before the last evaluation, which may fail.
            saving = self._checkpoint_at(step + 1, force=self._stopping or last)
            spent["time/checkpoint_s"] = await self._timed(saving)
            if not self._stopping:
                spent["time/publish_s"] = await self._timed(self._publish(step + 1))
                self._sound = True
            metrics |= spent | self._measured()
            self._bottleneck.observe(
                generate_seconds=metrics["time/step_s"] - metrics["time/generator_idle_s"],
                generated=sum(len(e.rewards) for e in plan.entries),
                train_seconds=metrics.get("learner/seconds", 0.0),
                computed=round(metrics.get("learner/computed_share", 0.0) * batch.rollouts),
            )
            if self._stopping:
                self.interrupted_at = None if last else step + 1
                await self._observe(step + 1, metrics, lag)
                break
            await self._evaluate_at(step + 1)
            await self._observe(step + 1, metrics, lag)
            if last and self._evaluation is None and self._evaluated == step + 1:
                await self._checkpoint_at(step + 1, force=True)  # again: a resumed run keeps the last evaluation
        await self._finish_evaluation()

    async def _train(
        self, step: int, plan: BatchPlan
    ) -> tuple[BatchPlan, dict[int, Place], TrainingBatch, CommitReport, StepReport]:
        """One optimizer step. Leases whose payloads are gone go back to the ledger, and the step waits for them."""
        while True:
            groups = self._generation.take(plan)
            batch, commit = assemble(plan, groups, self.config, step, self._bottleneck.train_cost)
            self._doing = f"learner: optimizer step {step}"
            try:
                report = await self.ports.learner.train(batch)
                return plan, groups, batch, commit, report
            except PayloadsLost as error:
                self.observer.note(f"{error}; they are generated again")
                await self._generation.generate_again(plan, groups, error.lease_ids)
            again = await self._wait_for_plan(step)
            assert again is not None, "its leases are open"
            plan = again

    async def _wait_for_plan(self, step: int) -> BatchPlan | None:
        """The plan of batch ``step``; None when the rollout budget is spent and everything is settled, or when the run
        is stopped and the rollouts do not come."""
        budget = self.config.trainer.rollout_budget
        while True:
            self._ready.clear()
            plan = await self.ports.ledger.plan(step)
            if plan is not None:
                return plan
            self._doing = f"batch {step}: waiting for rollouts"
            if self._stopping and time.monotonic() >= self._stop_by:
                return None
            if budget is not None:
                accounting = (await self.ports.ledger.status()).accounting
                if accounting.planned >= budget and accounting.in_flight == 0:
                    return None
            with suppress(TimeoutError):
                async with asyncio.timeout(1.0):
                    await self._ready.wait()

    async def _publish(self, version: int) -> None:
        """Learner -> generators. No lease is handed out until a generator has proven ``version``; each does so in its
        own time. Where they read the learner's memory, the learner waits until all have it."""
        self._doing = f"weights: publishing version {version}"
        await self._generation.loaded()
        update = await self.ports.learner.publish(version)
        self.version = version
        # synchronous: nothing is generated beside an evaluation, or chance would decide which requests share a step
        self._generation.leasing = self.config.async_rl.max_staleness > 0 or not self._evaluation_due(version)
        self._generation.publish(update)
        if update.together:
            await self._generation.proven(all_of_them=True)
        self._progress(f"weights version {version}")

    async def _evaluate_at(self, version: int, *, last: bool = False) -> None:
        """Start an evaluation if one is due; ``last``: a run ends here that its step count did not tell."""
        if not self._evaluation_due(version, last=last) or self._evaluate is None:
            return
        self._evaluated = version
        self._evaluation = self._tasks.create_task(self._run_evaluation(self._evaluate, version))
        if last or version == self.config.trainer.steps or not self._generation.leasing:
            await self._finish_evaluation()

    def _evaluation_due(self, version: int, *, last: bool = False) -> bool:
        every = self.config.eval.interval
        if self._evaluate is None or not every or version == self._evaluated:
            return False
        if version == 0 and not last:
            return self.config.eval.before_training
        return version % every == 0 or last or version == self.config.trainer.steps

    async def _run_evaluation(self, evaluate: Evaluate, version: int) -> Metrics:
        await self._generation.proven()
        return await evaluate(version, self._generation.open_generators, self._progress)

    async def _finish_evaluation(self) -> None:
        if self._evaluation is not None:
            self._doing = "evaluation"
            self.observer.step(self.version, await self._evaluation, {})
            self._progress("evaluation finished")
            self._evaluation = None
            self._generation.leasing = True
            self._generation.wake()

    async def _checkpoint_at(self, version: int, *, force: bool) -> None:
        every = self.config.checkpoint.interval
        if self._save_checkpoint is not None and (force or (every and version % every == 0)):
            self._doing = f"checkpoint at version {version}"
            try:
                await self._save_checkpoint(version)
            except CheckpointError as error:  # the ones before it are intact: training goes on
                self.observer.note(f"no checkpoint at version {version}: {error}")
            self._progress(f"checkpoint at version {version}")

    # -- watching --------------------------------------------------------------------------------

    def _measured(self) -> Metrics:
        """Times and rates since the last call: a whole step with its checkpoint and the publishing of its weights."""
        now = time.monotonic()
        seconds, self._step_began = max(now - self._step_began, 1e-9), now
        return {"time/step_s": seconds} | self._generation.measured(seconds) | self.ports.usage()

    async def _timed(self, work: Coroutine[Any, Any, None]) -> float:
        """Seconds of ``work``."""
        began = time.monotonic()
        await work
        return time.monotonic() - began

    async def _observe(self, version: int, metrics: Metrics, lag: np.ndarray) -> None:
        """``lag``: versions, of every rollout of the step."""
        due = version % self.config.logging.histogram_interval == 0 or version == self.config.trainer.steps
        histograms: dict[str, np.ndarray] = {}
        if due:
            status = await self.ports.ledger.status()
            histograms = status.histograms | {"staleness": lag}
            metrics |= {k if "/" in k else f"curriculum/{k}": v for k, v in status.metrics.items()}
        self.observer.step(version, metrics, histograms)

    def _progress(self, what: str) -> None:
        self._moved, self._last = time.monotonic(), what

    async def _watchdog(self) -> None:
        limit = self.config.trainer.no_progress_timeout_s
        while True:
            await asyncio.sleep(min(limit / 4, 5.0))
            silent = time.monotonic() - self._moved
            if silent > limit:
                held = longest_waiting(list(self._generation.slots.values()))
                raise RunError(f"no progress for {silent:.0f} s (last: {self._last}; now: {self._doing}). {held}")


def _first_error(group: BaseExceptionGroup) -> BaseException:
    for error in group.exceptions:
        return _first_error(error) if isinstance(error, BaseExceptionGroup) else error
    return group
