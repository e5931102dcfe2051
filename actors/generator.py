"""A generator: one vLLM engine in a Ray actor.

    driver --submit(LeaseChunk)--> n engine requests a lease, one a rollout
           <--collect------------- (ChunkSummary, RolloutChunk) of what finished since the last call
    learner --WeightUpdate--> pause, load, stamp the version, resume, canary --> SyncReport

Each rollout is an engine request of its own, with a seed derived from (the lease's seed, j): rollout j is the same
for every n > j. vLLM's own ``n=`` seeds its children seed + j, which gives neighbouring seeds the same rollouts.
"""

from __future__ import annotations

import asyncio
import os
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext, suppress
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np

from actors.engine_settings import (
    PAUSE_MODE,
    engine_arguments,
    has_gpu,
    ray_loggers,
    rollout_seed,
    sampling_params,
    set_environment,
)
from actors.finished import Work, pack_finished
from actors.telemetry import ProcessGauges, ShowsWeightPhases
from actors.together import started_together
from actors.weights.backend import Node, road
from actors.weights.canary import Canary, canary_tolerance, compare, verdict
from cures_ray.config import Config
from cures_ray.loop.ports import CanaryFailed, PromptSource, WorkerLost
from cures_ray.messages import ChunkSummary, LeaseChunk, RolloutChunk, SyncReport, WeightUpdate

if TYPE_CHECKING:
    from vllm import SamplingParams
    from vllm.outputs import RequestOutput
    from vllm.v1.engine.async_llm import AsyncLLM

CANARY_PRIORITY = -1  # before the rollouts, which have 0
POLL_S = 2.0  # ``collect`` waits at most so long for something to hand out
LINGER_SHARE = 0.01  # of the mean seconds of a lease: how long ``collect`` waits for more to hand out together
LINGER_S = (0.002, 0.25)  # at least, at most
ENOUGH = 64  # rollouts that are handed out without waiting for more


class GeneratorActor(ShowsWeightPhases):
    """Launch with ``ray.remote(GeneratorActor).options(max_concurrency=1000, ...)``, then await ``start``.

    Once a weight update has failed every later call raises WorkerLost and the driver replaces the actor. When the
    engine's process dies this process exits, so that Ray sees a dead actor.

    Args:
        prompts: the tables by name ("train", "eval").
        name: unique among the generators of the run.
        model_path: a Hugging Face folder or Hub name; the weights that the engine starts with.
        version: the policy version of those weights.
    """

    def __init__(
        self,
        name: str,
        config: Config,
        model_path: str,
        prompts: Mapping[str, PromptSource],
        version: int = 0,
    ) -> None:
        self.name, self.config, self.model_path, self.version = name, config, model_path, version
        self._prompts = prompts
        self._engine: AsyncLLM
        self._tokenizer: Any = None
        self._max_model_len = 0
        self._may_sleep = False  # shares its GPU with a learner rank
        self._failure = ""  # why this generator may not be used any more
        self._proven = asyncio.Event()  # cleared while weights are loaded and not yet proven
        self._proven.set()
        self._admitting = asyncio.Event()  # cleared while requests drain before a sync
        self._admitting.set()
        self._generating = 0  # leases beyond admission
        self._drained = asyncio.Event()  # set while there are none
        self._drained.set()
        self._syncing = asyncio.Lock()
        self._requests: set[str] = set()  # request ids in the engine
        self._submitted = 0
        self._done: list[tuple[str, Work]] = []  # finished and not collected, with the prompts' table
        self._finished = asyncio.Event()  # something is in it, or the generator failed
        self._mean_seconds = 0.0  # of a lease
        self._leases: set[asyncio.Task[None]] = set()
        self._watch: asyncio.Task[None] | None = None
        self._gauges = ProcessGauges(config, "generator", name, self._numbers)
        self._reports: asyncio.Task[None] | None = None

    def __repr__(self) -> str:  # Ray asks once, when the actor is made
        return self.name

    def _numbers(self) -> dict[str, float]:
        return {"in_flight": len(self._requests), "queue": len(self._done), "version": self.version}

    # -- life ------------------------------------------------------------------------------------------

    async def start(self) -> float:
        """Start the engine; seconds that it took. Blocks the event loop meanwhile.

        Raises:
            ConfigError: the model's context is too short for the configured prompts.
        """
        began = time.monotonic()
        gpu = has_gpu(self.config)
        set_environment(self.config, gpu)
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        arguments = engine_arguments(self.config, self.model_path, gpu)
        self._max_model_len = arguments["max_model_len"]
        self._may_sleep = arguments.get("enable_sleep_mode", False)
        loggers = ray_loggers() if self.config.logging.engine_metrics else None
        self._engine = AsyncLLM.from_engine_args(AsyncEngineArgs(**arguments), stat_loggers=loggers)
        self._tokenizer = self._engine.get_tokenizer()
        await self._engine.update_weight_version(str(self.version))
        self._watch = asyncio.create_task(self._exit_with_engine())
        self._reports = asyncio.create_task(self._gauges.watch())
        return time.monotonic() - began

    async def sleep(self) -> None:
        """Leave the GPU's memory to a colocated learner; requests keep their place. One that shares no GPU goes on."""
        if self._may_sleep:
            async with self._syncing:
                await self._engine.sleep(level=1, mode=PAUSE_MODE)

    async def wake(self) -> None:
        """Take the memory again; requests in flight compute their cache again and go on."""
        if self._may_sleep:
            async with self._syncing:
                await self._engine.wake_up()

    async def close(self) -> None:
        """End the engine's process."""
        for task in filter(None, (self._watch, self._reports)):
            task.cancel()
        self._failure = self._failure or "closed"
        self._engine.shutdown()

    async def _exit_with_engine(self) -> None:
        """End this process when the engine's process died or answers nothing, so that Ray sees a dead actor."""
        limit = self.config.rollout.health_timeout_s
        while True:
            await asyncio.sleep(min(1.0, limit / 4))
            if self._engine.errored:
                self._exit("the engine's process died")
            try:
                async with asyncio.timeout(limit):
                    await self._engine.is_sleeping()  # through the engine's own loop and back
            except TimeoutError:
                if not self._syncing.locked():  # loading has a deadline of its own, and the engine is silent meanwhile
                    self._exit(f"the engine has not answered for {limit:g} s")

    async def reset(self) -> None:
        """Abort and forget all leases, finished ones too: their ledger is gone."""
        for lease in self._leases:
            lease.cancel()
        await asyncio.gather(*self._leases, return_exceptions=True)
        self._done.clear()
        self._finished.clear()

    def _exit(self, why: str) -> NoReturn:
        print(f"generator {self.name}: {why}; exiting, so that Ray sees a dead actor", file=sys.stderr, flush=True)
        os._exit(1)

    # -- generation ------------------------------------------------------------------------------------

    async def submit(self, leases: LeaseChunk) -> None:
        """Begin to generate ``leases``; ``collect`` hands out what is finished. In synchronous training a chunk that
        finds the engine idle starts as one, so that the same leases give the same bits.

        Raises:
            ValueError: a prompt leaves no room for a completion.
        """
        together = self.config.async_rl.max_staleness == 0 and not self._requests
        async with started_together(self._engine, self._syncing, int(leases.n.sum())) if together else nullcontext():
            for work in self._works(leases):
                task = asyncio.create_task(self._lease(leases.source, work))
                self._leases.add(task)
                task.add_done_callback(self._leases.discard)

    async def _lease(self, source: str, work: Work) -> None:
        try:
            await self._finish(work)
        except Exception as error:
            await self._give_up(f"lease {work.lease_id} could not be generated: {error!r}"[:1000])
        self._done.append((source, work))
        self._finished.set()

    async def collect(self) -> tuple[ChunkSummary, RolloutChunk]:
        """The leases that finished since the last call (call with ``.options(num_returns=2)``). Waits for the first,
        at most POLL_S, and then a little for more. A lease that missed its deadline, rollout.timeout_s, is ``failed``;
        nothing of it is left in the engine.

        Raises:
            WorkerLost: this generator's weights failed; nothing comes out of it any more.
        """
        with suppress(TimeoutError):
            async with asyncio.timeout(POLL_S):
                await self._finished.wait()
        linger = min(max(LINGER_SHARE * self._mean_seconds, LINGER_S[0]), LINGER_S[1])
        if self._done and sum(len(work.samplings) for _, work in self._done) < ENOUGH:
            await asyncio.sleep(linger)
        try:  # nothing goes out from weights that are not proven; an empty answer says: I live
            async with asyncio.timeout(POLL_S):
                await self._proven.wait()
        except TimeoutError:
            return self._pack("train", [])
        self._check_usable()
        source = self._done[0][0] if self._done else "train"
        done = [work for name, work in self._done if name == source]
        self._done = [entry for entry in self._done if entry[0] != source]
        if not self._done:
            self._finished.clear()
        return self._pack(source, done)

    async def generate(self, leases: LeaseChunk) -> tuple[ChunkSummary, RolloutChunk]:
        """All of ``leases``, in their order, when the last is finished (call with ``.options(num_returns=2)``).

        Raises:
            WorkerLost, ValueError: as ``collect`` and ``submit``.
        """
        works = self._works(leases)
        await asyncio.gather(*(self._finish(work) for work in works))
        await self._proven.wait()
        self._check_usable()
        return self._pack(leases.source, works)

    def _works(self, leases: LeaseChunk) -> list[Work]:
        self._check_usable()
        rows = self._prompts[leases.source].rows(leases.prompt_index)
        columns = (leases.lease_id, leases.attempt, leases.prompt_index, leases.n, leases.seed)
        works = []
        for row, *lease in zip(rows, *(column.tolist() for column in columns), strict=True):
            lease_id, attempt, index, n, seed = lease
            room = self._max_model_len - len(row.token_ids)
            if room < 1:
                raise ValueError(
                    f"prompt {row.prompt_id} has {len(row.token_ids)} tokens, which fills the context of "
                    f"{self._max_model_len}; lower data.max_prompt_tokens"
                )
            samplings = [sampling_params(self.config, rollout_seed(seed, j), room, leases.greedy) for j in range(n)]
            works.append(Work(lease_id, attempt, index, row.token_ids.tolist(), samplings))
        return works

    async def _finish(self, work: Work) -> None:
        """Generate one lease; its outputs stay None when it missed its deadline or the engine gave up."""
        with suppress(TimeoutError, WorkerLost):  # WorkerLost: whoever collects is told
            async with asyncio.timeout(self.config.rollout.timeout_s):
                work.outputs = await self._sample(work.prompt, work.samplings)
        work.seconds = time.monotonic() - work.began
        self._mean_seconds += 0.05 * (work.seconds - self._mean_seconds)

    def _pack(self, source: str, done: list[Work]) -> tuple[ChunkSummary, RolloutChunk]:
        decode = None if self.config.rollout.stop else self._tokenizer.batch_decode
        return pack_finished(source, done, self.name, self.version, decode)

    async def _sample(self, prompt: list[int], samplings: Sequence[SamplingParams]) -> list[RequestOutput]:
        await self._admitting.wait()
        self._check_usable()
        self._generating += 1
        self._drained.clear()
        try:
            if len(samplings) == 1:
                return [await self._run(prompt, samplings[0])]
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(self._run(prompt, sampling)) for sampling in samplings]
            return [task.result() for task in tasks]
        except BaseExceptionGroup as errors:
            raise errors.exceptions[0] from errors
        finally:
            self._generating -= 1
            if not self._generating:
                self._drained.set()

    async def _run(self, prompt: Sequence[int], sampling: SamplingParams, priority: int = 0) -> RequestOutput:
        """One engine request to its end. Cancelling this aborts the request in the engine."""
        from vllm.v1.engine.exceptions import EngineDeadError

        self._submitted += 1
        request_id = str(self._submitted)
        self._requests.add(request_id)
        try:
            # "token": rendered already; vLLM would do it in threads, which change the order
            tokens: Any = {"type": "token", "prompt_token_ids": list(prompt)}
            async for output in self._engine.generate(tokens, sampling, request_id, priority=priority):
                if output.finished:
                    if any(c.finish_reason not in ("stop", "length") for c in output.outputs):
                        raise WorkerLost(f"{self.name}: the engine ended a request ({output.outputs[0].finish_reason})")
                    return output
            raise WorkerLost(f"{self.name}: the engine dropped a request")
        except EngineDeadError:
            self._exit("the engine's process died")
        finally:
            self._requests.discard(request_id)

    def _check_usable(self) -> None:
        if self._failure:
            raise WorkerLost(f"{self.name} may not be used any more: {self._failure}")

    # -- weights ---------------------------------------------------------------------------------------

    async def update_weights(self, update: WeightUpdate) -> SyncReport:
        """Load ``update`` and prove it. Requests in flight continue under the new weights (with
        async_rl.in_flight_updates = false they finish first); none is handed out before the canary passed.

        Raises:
            CanaryFailed: the engine's log-probabilities are not the learner's.
            WorkerLost: the transfer failed or took longer than rollout.timeout_s.
        """
        async with self._syncing:
            self._check_usable()
            began = time.monotonic()
            try:
                async with asyncio.timeout(self.config.rollout.timeout_s):
                    canary = await self._load_and_prove(update)
            except CanaryFailed as failed:
                await self._give_up(str(failed))
                raise
            except BaseException as reason:
                await self._give_up(f"loading weights version {update.version} failed: {reason!r}"[:1000])
                if isinstance(reason, Exception):
                    raise WorkerLost(f"{self.name}: {self._failure}") from reason
                raise
            self.version = update.version
            self._proven.set()
            self._admitting.set()
            spent = self.phases.take()
            return SyncReport(
                generator=self.name,
                version=update.version,
                canary_max_error=canary.largest,
                canary_mean_error=canary.mean,
                seconds_paused=spent["load"],
                seconds=time.monotonic() - began,
                seconds_by_phase=spent,
            )

    async def _load_and_prove(self, update: WeightUpdate) -> Canary:
        """The canary's reading. A failed canary is tried once more, with a transfer of its own: what fails alike twice
        is no chance, and a replacement would fail alike too."""
        tolerance = canary_tolerance(self.config)
        readings: list[Canary] = []
        for _ in range(2):
            await self._load(update)
            readings.append(await self._canary(update))
            if readings[-1].passes(tolerance):
                return readings[-1]
        alike = readings[1].repeats(readings[0])
        raise CanaryFailed(self.name, update.version, verdict(self.config, readings[0], reproducible=alike), alike)

    async def _load(self, update: WeightUpdate) -> None:
        """Fetch, pause, load, stamp, resume. Requests in flight compute their cache again: it would be off by nats."""
        from vllm.distributed.weight_transfer.base import WeightTransferUpdateRequest

        node = Node(workers=self.config.rollout.tensor_parallel_size, timeout_s=self.config.weights.transfer_timeout_s)
        with self.phases("fetch"):
            info = await asyncio.to_thread(road(update.info["backend"]).update_info, update.info, update.version, node)
        payload = {"backend": update.info["backend"], "info": info | {"version": update.version}}
        with self.phases("load"):
            if not self.config.async_rl.in_flight_updates:
                self._admitting.clear()  # vLLM's own mode "wait" lets what is queued or preempted change weights
                await self._drained.wait()
            await self._engine.pause_generation(mode=PAUSE_MODE, clear_cache=True)
            self._proven.clear()
            await self._engine.start_weight_update()
            await self._engine.update_weights(WeightTransferUpdateRequest(update_info=payload))
            await self._engine.finish_weight_update(str(update.version))
            await self._engine.resume_generation()

    async def _canary(self, update: WeightUpdate) -> Canary:
        """The canary's reading. A paused engine runs nothing, so this runs after resuming, ahead of the rollouts;
        asking for prompt log-probabilities makes vLLM skip its prefix cache."""
        from vllm import SamplingParams

        ask = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0, flat_logprobs=True, detokenize=False)
        sequences = [ids[: self._max_model_len - 1].tolist() for ids in update.canary_token_ids]
        with self.phases("prove"):
            outputs: list[Any] = await asyncio.gather(*(self._run(ids, ask, CANARY_PRIORITY) for ids in sequences))
        found = [np.asarray(output.prompt_logprobs.logprobs, np.float32) for output in outputs]
        return compare(found, update.canary_logprobs)

    async def _give_up(self, why: str) -> None:
        """Never use this engine again: whoever waits for it gets WorkerLost now."""
        self._failure = why
        for event in (self._proven, self._admitting, self._finished):
            event.set()
        print(f"generator {self.name}: {why}", file=sys.stderr, flush=True)
        if self._engine.errored:
            self._exit(why)
        await self._engine.abort(list(self._requests))
