"""The one training loop: synchronous (max_staleness = 0), asynchronous, tests and benchmarks run this code.

Dataflow (-->) and who waits for whom (<~~ "is unblocked by"):

    ledger --Lease--> generate loop (one per generator) --request--> generator
                                                                        | payload handle + GroupSummary
       ^                        <~~ settle, commit, new weights         v
       |<------Settlement------- produce task (one per lease) ----> verifier --Verdicts
       |
       |--BatchPlan--> train loop --TrainingBatch (handles, advantages, weights)--> learner
       |                  |  <~~ last settlement of the batch                          |
       |<--CommitReport---'                                                       WeightUpdate
                          '--> generators: load under running requests, canary, then leases again

Backpressure: the ledger opens batch b only when b <= version + max_staleness, so generators run at most
that far ahead of the learner and no rollout can be older. A generator asks for no more rollouts than it has
free slots. Payloads stay where they were made; the driver holds handles and small arrays only.

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
from cures_ray.loop.ports import CanaryFailed, GeneratorPort, Observer, Ports, PromptSource, WorkerLost
from cures_ray.loop.slots import Metrics, Slot, VerifiedGroup, failed_generation, longest_waiting, step_metrics
from cures_ray.messages import (
    Accounting,
    BatchPlan,
    Discard,
    GenerationRequest,
    GroupSummary,
    Lease,
    PayloadHandle,
    RunError,
    Settlement,
    StepReport,
    Verdict,
    WeightUpdate,
)

# (version, the generators that hold it now) -> eval/... metrics
Evaluate = Callable[[int, Callable[[], list[GeneratorPort]]], Coroutine[Any, Any, Metrics]]
SaveCheckpoint = Callable[[int], Awaitable[None]]  # version


class Driver:
    """Joins ledger, generators, verifiers and learner. ``await run()`` once.

    Raises:
        RunError: a worker failed beyond repair, weights could not be proven, or nothing moved for
            ``trainer.no_progress_timeout_s``.
    """

    def __init__(
        self,
        config: Config,
        prompts: PromptSource,
        ports: Ports,
        observer: Observer,
        *,
        version: int = 0,
        evaluate: Evaluate | None = None,
        save_checkpoint: SaveCheckpoint | None = None,
    ) -> None:
        self.config, self.prompts, self.ports, self.observer = config, prompts, ports, observer
        self.version = version
        self._evaluate, self._save_checkpoint = evaluate, save_checkpoint
        self._slots: dict[str, Slot] = {}
        self._groups: dict[tuple[int, int], VerifiedGroup] = {}  # (lease_id, attempt) -> verified, not yet trained
        self._ready = asyncio.Event()
        self._update: WeightUpdate | None = None
        self._evaluation: asyncio.Task[Metrics] | None = None
        self._evaluated = -1  # the last version whose evaluation was started
        self._tasks: asyncio.TaskGroup
        self._loop_tasks: list[asyncio.Task[None]] = []
        self._moved, self._last, self._doing = time.monotonic(), "start", "starting"
        self._canary_error = self._canary_mean = 0.0
        self._tokens, self._verify_seconds, self._step_began = 0, 0.0, time.monotonic()
        self._bottleneck = Bottleneck(config.algo.train_cost)
        self._stopping = False
        self.interrupted_at: int | None = None  # the version at which ``stop`` ended the run before its last step

    async def run(self) -> Accounting:
        """Train to the last step or to the end of the budget; returns the final, checked accounting."""
        try:
            async with asyncio.TaskGroup() as self._tasks:
                watchdog = self._tasks.create_task(self._watchdog())
                await self._publish(self.version)
                await self._evaluate_at(self.version, first=self.version == 0)
                await self._train_loop()
                for task in [watchdog, *self._loop_tasks]:
                    task.cancel()
        except BaseExceptionGroup as group:
            raise _first_error(group) from group
        status = await self.ports.ledger.status()
        status.accounting.check()
        return status.accounting

    def stop(self) -> None:
        """Finish the current step, save a checkpoint and return from ``run``."""
        self._stopping = True

    # -- generation: one loop per generator, one task per lease ------------------------------------

    async def _generate_loop(self, slot: Slot) -> None:
        name, limit = slot.generator.name, self.config.rollout.max_concurrent_rollouts
        while True:
            slot.wake.clear()
            slot.track_idle()
            if slot.lost:
                await self._sync(slot)
            leases: list[Lease] = []
            if slot.open and slot.rollouts < limit:
                leases = await self.ports.ledger.lease(name, limit - slot.rollouts, self.version)
            for lease in leases:
                slot.in_flight[lease.lease_id, lease.attempt] = (lease.n, time.monotonic())
                self._tasks.create_task(self._produce(slot, lease))
            if not leases:
                with suppress(TimeoutError):
                    async with asyncio.timeout(1.0):  # not wait_for: Python 3.11's can swallow a cancellation
                        await slot.wake.wait()

    async def _produce(self, slot: Slot, lease: Lease) -> None:
        """Lease -> rollouts -> verdicts -> settlement. Ends in a settlement or in a returned lease."""
        key = (lease.lease_id, lease.attempt)
        prompt = self.prompts.row(lease.prompt_index)
        generator = slot.generator
        try:
            request = GenerationRequest(
                prompt=prompt, n=lease.n, seed=lease.seed, lease_id=lease.lease_id, attempt=lease.attempt
            )
            summary, payload = await generator.generate(request)
            self._progress(f"lease {lease.lease_id} generated by {summary.generator}")
            del slot.in_flight[key]
            slot.wake.set()
            began = time.monotonic()
            verdicts = await self.ports.verifier.verify(payload, prompt)
        except WorkerLost as error:
            await self.ports.ledger.give_back([key], Discard.LOST)
            if slot.generator is generator and key in slot.in_flight:
                slot.lost = slot.lost or str(error)
        except TimeoutError:
            await self._settle(lease, *failed_generation(lease, self.version))
        else:
            await self._settle(lease, summary, payload, verdicts, time.monotonic() - began)
        finally:
            slot.in_flight.pop(key, None)
            self._wake_all()

    async def _settle(
        self,
        lease: Lease,
        summary: GroupSummary,
        payload: PayloadHandle,
        verdicts: list[Verdict],
        verify_seconds: float = 0.0,
    ) -> None:
        fault = np.array([v.is_fault for v in verdicts], dtype=bool)
        settlement = Settlement(
            lease_id=lease.lease_id,
            attempt=lease.attempt,
            rewards=np.array([v.reward for v in verdicts], dtype=np.float32),
            fault=fault,
            completion_tokens=summary.completion_tokens,
            min_version=summary.min_version,
            generate_seconds=summary.seconds,
            verify_seconds=verify_seconds,
            fault_reason=Discard.VERIFIER_FAULT if payload is not None else Discard.GENERATION_FAULT,
        )
        self._tokens += int(summary.completion_tokens.sum())
        self._verify_seconds += verify_seconds
        self._groups[lease.lease_id, lease.attempt] = (summary, payload, fault)  # the reply may make the batch ready
        reply = await self.ports.ledger.settle(settlement)
        self._progress(f"lease {lease.lease_id} settled")
        if reply.ready_batch is not None:
            self._ready.set()

    async def _replace(self, slot: Slot, why: str) -> None:
        """Put a fresh generator, which holds the original weights, in the slot."""
        slot.open = False
        self.observer.note(f"generator {slot.generator.name} lost ({why}); starting a replacement")
        slot.generator = await self.ports.fleet.replace(slot.generator.name, why)
        slot.lost, slot.version = "", -1
        self._progress(f"generator {slot.generator.name} replaced")

    # -- training --------------------------------------------------------------------------------

    async def _train_loop(self) -> None:
        for step in range(self.version, self.config.trainer.steps):
            self._step_began = began = time.monotonic()
            plan = await self._wait_for_plan(step)
            if plan is None:  # the budget is spent
                await self._evaluate_at(step, last=True)
                break
            idle = time.monotonic() - began
            groups = self._take_groups(plan)
            batch, commit = assemble(plan, groups, self.config, step, self._bottleneck.train_cost)
            self._doing = f"learner: optimizer step {step}"
            report = await self.ports.learner.train(batch) if batch.rollouts else _skipped(step)
            self._progress(f"optimizer step {step}")
            await self._finish_evaluation()  # it measures this version: weights may not change under it
            accounting = await self.ports.ledger.commit(replace(commit, gradient_statistics=report.gradient_statistics))
            accounting.check()
            metrics = step_metrics(plan, groups, report, accounting, step)
            metrics |= self._measured(idle)
            self._bottleneck.observe(
                generate_seconds=metrics["time/step_s"] - metrics["time/generator_idle_s"],
                generated=sum(len(e.rewards) for e in plan.entries),
                train_seconds=metrics.get("learner/seconds", 0.0),
                computed=round(metrics.get("learner/computed_share", 0.0) * batch.rollouts),
            )
            last = step + 1 == self.config.trainer.steps
            if self._stopping or not last:
                # before generators get leases again: with max_staleness = 0 nothing of the next batch has begun, so
                # that a resumed run is the same run
                await self._checkpoint_at(step + 1, force=self._stopping)
            if self._stopping:
                self.interrupted_at = None if last else step + 1
                await self._observe(step + 1, metrics)
                break
            began = time.monotonic()
            await self._publish(step + 1)
            metrics["time/weight_sync_s"] = time.monotonic() - began
            self._wake_all()
            await self._evaluate_at(step + 1)
            await self._observe(step + 1, metrics)
            if last:
                await self._checkpoint_at(step + 1, force=True)
        await self._finish_evaluation()

    async def _wait_for_plan(self, step: int) -> BatchPlan | None:
        """The plan of batch ``step``; None when the rollout budget is spent and everything is settled."""
        budget = self.config.trainer.rollout_budget
        while True:
            self._ready.clear()
            plan = await self.ports.ledger.plan(step)
            if plan is not None:
                return plan
            self._doing = f"batch {step}: waiting for rollouts"
            if budget is not None:
                accounting = (await self.ports.ledger.status()).accounting
                if accounting.planned >= budget and accounting.in_flight == 0:
                    return None
            with suppress(TimeoutError):
                async with asyncio.timeout(1.0):
                    await self._ready.wait()

    def _take_groups(self, plan: BatchPlan) -> dict[int, VerifiedGroup]:
        """The plan's verified groups by lease id; also drops payloads of attempts that the ledger refused."""
        groups = {}
        for entry in plan.entries:
            key = (entry.lease.lease_id, entry.lease.attempt)
            if key in self._groups:
                groups[key[0]] = self._groups[key]
            for attempt in range(entry.lease.attempt + 1):
                self._groups.pop((key[0], attempt), None)
        return groups

    async def _publish(self, version: int) -> None:
        """Learner -> generators. No lease is handed out until a generator has proven ``version``."""
        self._doing = f"weights: publishing version {version}"
        for slot in self._slots.values():
            slot.open = False
        self._update = await self.ports.learner.publish(version)
        self.version = version
        for generator in self.ports.fleet.generators():  # elastic: new ones join here
            if generator.name not in self._slots:
                slot = self._slots[generator.name] = Slot(generator)
                self._loop_tasks.append(self._tasks.create_task(self._generate_loop(slot)))
        syncs = [self._sync(slot) for slot in self._slots.values()]
        await asyncio.gather(*syncs)
        self._progress(f"weights version {version}")

    async def _sync(self, slot: Slot) -> None:
        """Bring one generator to the current version. One that is lost, or fails its canary by chance, is replaced;
        a replacement that fails too ends the run, as does a canary that fails alike twice."""
        async with slot.syncing:
            failures = 0
            while slot.lost or slot.version != self.version:
                if slot.lost:
                    await self._replace(slot, slot.lost)
                update = self._update
                assert update is not None, "weights are published before generators start"
                try:
                    report = await slot.generator.update_weights(update)
                except (WorkerLost, CanaryFailed) as error:
                    if isinstance(error, CanaryFailed) and error.reproducible:
                        raise RunError(str(error)) from error
                    failures, slot.lost = failures + 1, str(error) or type(error).__name__
                    if failures == 2:
                        raise RunError(
                            f"generator {slot.generator.name} could not be brought to version {update.version}, "
                            f"nor could its replacement: {error}"
                        ) from error
                    continue
                slot.version = report.version
                self._canary_error, self._canary_mean = report.canary_max_error, report.canary_mean_error
            slot.open = True
            slot.wake.set()

    async def _evaluate_at(self, version: int, *, first: bool = False, last: bool = False) -> None:
        """Start an evaluation if one is due; ``last``: a run ends here that its step count did not tell."""
        every = self.config.eval.interval
        last = last or version == self.config.trainer.steps
        due = every and (version % every == 0 or last) and version != self._evaluated
        if self._evaluate is None or not (self.config.eval.before_training and every if first else due):
            return
        self._evaluated = version
        self._evaluation = self._tasks.create_task(self._evaluate(version, self._open_generators))
        if last:
            await self._finish_evaluation()

    async def _finish_evaluation(self) -> None:
        if self._evaluation is not None:
            self._doing = "evaluation"
            self.observer.step(self.version, await self._evaluation, {})
            self._progress("evaluation finished")
            self._evaluation = None

    async def _checkpoint_at(self, version: int, *, force: bool) -> None:
        every = self.config.checkpoint.interval
        if self._save_checkpoint is not None and (force or (every and version % every == 0)):
            self._doing = f"checkpoint at version {version}"
            await self._save_checkpoint(version)
            self._progress(f"checkpoint at version {version}")

    # -- watching --------------------------------------------------------------------------------

    def _measured(self, learner_idle: float) -> Metrics:
        """Times and rates since the step began; resets the counters."""
        seconds = max(time.monotonic() - self._step_began, 1e-9)
        idle = [slot.take_idle() for slot in self._slots.values()]
        tokens, self._tokens = self._tokens, 0
        verify_seconds, self._verify_seconds = self._verify_seconds, 0.0
        return {
            "rollout/tokens_per_s": tokens / seconds,
            "time/step_s": seconds,
            "time/learner_idle_s": learner_idle,
            "time/generator_idle_s": sum(idle) / max(len(idle), 1),
            "time/verify_s": verify_seconds,
            "weights/canary_max_error": self._canary_error,
            "weights/canary_mean_error": self._canary_mean,
        }

    async def _observe(self, version: int, metrics: Metrics) -> None:
        due = version % self.config.logging.histogram_interval == 0 or version == self.config.trainer.steps
        histograms: dict[str, np.ndarray] = {}
        if due:
            status = await self.ports.ledger.status()
            histograms = status.histograms
            metrics |= {k if "/" in k else f"curriculum/{k}": v for k, v in status.metrics.items()}
        self.observer.step(version, metrics, histograms)

    def _open_generators(self) -> list[GeneratorPort]:
        return [slot.generator for slot in self._slots.values() if slot.open and not slot.lost]

    def _progress(self, what: str) -> None:
        self._moved, self._last = time.monotonic(), what

    def _wake_all(self) -> None:
        for slot in self._slots.values():
            slot.wake.set()

    async def _watchdog(self) -> None:
        limit = self.config.trainer.no_progress_timeout_s
        while True:
            await asyncio.sleep(min(limit / 4, 5.0))
            silent = time.monotonic() - self._moved
            if silent > limit:
                held = longest_waiting(list(self._slots.values()))
                raise RunError(f"no progress for {silent:.0f} s (last: {self._last}; now: {self._doing}). {held}")


def _skipped(step: int) -> StepReport:
    """Nothing of this batch could be trained: the weights stay, the version advances."""
    return StepReport(step=step, metrics={"skipped": 1.0})


def _first_error(group: BaseExceptionGroup) -> BaseException:
    for error in group.exceptions:
        return _first_error(error) if isinstance(error, BaseExceptionGroup) else error
    return group
