"""A generator: one vLLM engine in a Ray actor.

    driver --GenerationRequest--> n engine requests, one a rollout --> (GroupSummary, RolloutGroup)
    learner --WeightUpdate--> pause, load, stamp the version, resume, canary --> SyncReport

Each rollout is an engine request of its own, with a seed derived from (request.seed, j): rollout j is the same
for every n > j, and whatever else runs. vLLM's own ``n=`` seeds its children seed + j, which would give
neighbouring seeds the same rollouts; on a 2 M model it was not faster beyond the noise of a shared machine.
"""

from __future__ import annotations

import asyncio
import os
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np

from actors.engine_settings import PAUSE_MODE, engine_arguments, has_gpu, set_environment
from actors.weights.backend import Node, road
from actors.weights.canary import Canary, canary_tolerance, compare, verdict
from cures_ray.config import Config
from cures_ray.loop.ports import CanaryFailed, WorkerLost
from cures_ray.messages import (
    GenerationRequest,
    GroupSummary,
    Rollout,
    RolloutGroup,
    SyncReport,
    WeightUpdate,
)

if TYPE_CHECKING:
    from vllm import SamplingParams
    from vllm.outputs import CompletionOutput, RequestOutput
    from vllm.v1.engine.async_llm import AsyncLLM

CANARY_PRIORITY = -1  # before the rollouts, which have 0


class GenerationTimeout(TimeoutError):
    """A lease missed its deadline, rollout.timeout_s; its requests were aborted in the engine."""


class GeneratorActor:
    """Launch with ``ray.remote(GeneratorActor).options(max_concurrency=1000, ...)``, then await ``start``.

    Once a weight update has failed the engine cannot be trusted: every later call raises WorkerLost and the
    driver replaces the actor. When the engine's process dies this process exits, so that Ray sees a dead actor.

    Args:
        name: unique among the generators of the run.
        model_path: a Hugging Face folder or Hub name; the weights that the engine starts with.
        version: the policy version of those weights.
    """

    def __init__(
        self,
        name: str,
        config: Config,
        model_path: str,
        version: int = 0,
    ) -> None:
        self.name, self.config, self.model_path, self.version = name, config, model_path, version
        self._engine: AsyncLLM
        self._tokenizer: Any = None
        self._max_model_len = 0
        self._failure = ""  # why this generator may not be used any more
        self._proven = asyncio.Event()  # cleared while weights are loaded and not yet proven
        self._proven.set()
        self._admitting = asyncio.Event()  # cleared while requests drain before a sync
        self._admitting.set()
        self._generating = 0  # calls of generate beyond admission
        self._drained = asyncio.Event()  # set while there are none
        self._drained.set()
        self._syncing = asyncio.Lock()
        self._requests: set[str] = set()  # request ids in the engine
        self._submitted = 0
        self._tokens = 0
        self._idle_seconds = 0.0
        self._last_stats = self._idle_since = time.monotonic()
        self._watch: asyncio.Task[None] | None = None

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
        self._engine = AsyncLLM.from_engine_args(AsyncEngineArgs(**arguments))
        self._tokenizer = self._engine.get_tokenizer()
        await self._engine.update_weight_version(str(self.version))
        self._watch = asyncio.create_task(self._exit_with_engine())
        self._last_stats = self._idle_since = time.monotonic()
        return time.monotonic() - began

    async def ping(self) -> dict[str, Any]:
        """Liveness: name, version, process id."""
        return {"name": self.name, "version": self.version, "pid": os.getpid(), "failure": self._failure}

    async def close(self) -> None:
        """End the engine's process."""
        if self._watch is not None:
            self._watch.cancel()
        self._failure = self._failure or "closed"
        self._engine.shutdown()

    async def stats(self) -> dict[str, float]:
        """Since the last call: tokens/s and idle seconds. Now: rollouts in the engine, running and waiting."""
        now = time.monotonic()
        idle = self._idle_seconds + (0.0 if self._requests else now - self._idle_since)
        seconds = max(now - self._last_stats, 1e-9)
        running = min(len(self._requests), self.config.rollout.max_concurrent_rollouts)
        result = {
            "tokens_per_second": self._tokens / seconds,
            "idle_seconds": idle,
            "seconds": seconds,
            "running": float(running),
            "waiting": float(len(self._requests) - running),
            "version": float(self.version),
        }
        self._tokens, self._idle_seconds, self._last_stats, self._idle_since = 0, 0.0, now, now
        return result

    async def _exit_with_engine(self) -> None:
        while True:
            await asyncio.sleep(1.0)
            if self._engine.errored:
                self._exit("the engine's process died")

    def _exit(self, why: str) -> NoReturn:
        print(f"generator {self.name}: {why}; exiting, so that Ray sees a dead actor", file=sys.stderr, flush=True)
        os._exit(1)

    # -- generation ------------------------------------------------------------------------------------

    async def generate(self, request: GenerationRequest) -> tuple[GroupSummary, RolloutGroup]:
        """Sample ``request.n`` completions of one prompt (call with ``.options(num_returns=2)``).

        Raises:
            GenerationTimeout: rollout.timeout_s passed; nothing of the request is left in the engine.
            WorkerLost: this generator's weights failed while the request was under way.
            ValueError: the prompt leaves no room for a completion.
        """
        self._check_usable()
        began = time.monotonic()
        prompt = request.prompt.token_ids.tolist()
        room = self._max_model_len - len(prompt)
        if room < 1:
            raise ValueError(
                f"prompt {request.prompt.prompt_id} has {len(prompt)} tokens, which fills the context of "
                f"{self._max_model_len}; lower data.max_prompt_tokens"
            )
        samplings = [self._sampling(request, j, room) for j in range(1 if request.greedy else request.n)]
        try:
            async with asyncio.timeout(self.config.rollout.timeout_s):
                outputs = await self._sample(prompt, samplings)
                await self._proven.wait()  # hand out nothing from weights that the canary has not passed
        except TimeoutError as error:
            raise GenerationTimeout(
                f"lease {request.lease_id} of {len(samplings)} rollouts took more than rollout.timeout_s = "
                f"{self.config.rollout.timeout_s:g} s on {self.name}"
            ) from error
        self._check_usable()
        rollouts = tuple(self._rollout(output.outputs[0]) for output in outputs)
        self._tokens += sum(len(r.token_ids) for r in rollouts)
        group = RolloutGroup(
            lease_id=request.lease_id,
            attempt=request.attempt,
            prompt_token_ids=np.asarray(prompt, np.int32),
            rollouts=rollouts,
        )
        return summarize(group, self.name, time.monotonic() - began), group

    async def _sample(self, prompt: Sequence[int], samplings: Sequence[SamplingParams]) -> list[RequestOutput]:
        await self._admitting.wait()
        self._check_usable()
        self._generating += 1
        self._drained.clear()
        tasks = [asyncio.create_task(self._run(prompt, sampling)) for sampling in samplings]
        try:
            return await asyncio.gather(*tasks)
        finally:
            self._generating -= 1
            if not self._generating:
                self._drained.set()
            for task in tasks:
                task.cancel()

    def _sampling(self, request: GenerationRequest, j: int, room: int) -> SamplingParams:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        rollout = self.config.rollout
        return SamplingParams(
            temperature=0.0 if request.greedy else rollout.temperature,
            top_p=1.0 if request.greedy else rollout.top_p,
            top_k=-1 if request.greedy else rollout.top_k,
            seed=None if request.greedy else rollout_seed(request.seed, j),
            max_tokens=min(rollout.max_new_tokens, room),
            stop=list(rollout.stop) or None,
            include_stop_str_in_output=True,  # text is the text of token_ids
            detokenize=bool(rollout.stop),  # else once, at the end
            logprobs=0,  # of the sampled token only
            flat_logprobs=True,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )

    async def _run(self, prompt: Sequence[int], sampling: SamplingParams, priority: int = 0) -> RequestOutput:
        """One engine request to its end. Cancelling this aborts the request in the engine."""
        from vllm.v1.engine.exceptions import EngineDeadError

        self._submitted += 1
        request_id = str(self._submitted)
        if not self._requests:
            self._idle_seconds += time.monotonic() - self._idle_since
        self._requests.add(request_id)
        try:
            tokens: Any = {"prompt_token_ids": list(prompt)}
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
            if not self._requests:
                self._idle_since = time.monotonic()

    def _rollout(self, output: CompletionOutput) -> Rollout:
        ids: Any = output.token_ids
        flat: Any = output.logprobs
        versions = [int(span.version) for span in output.weight_versions or ()] or [self.version]
        text = output.text if self.config.rollout.stop else self._tokenizer.decode(ids, skip_special_tokens=True)
        return Rollout(
            token_ids=np.asarray(ids, np.int32),
            logprobs=np.asarray(flat.logprobs, np.float32),
            finish_reason=str(output.finish_reason),
            min_version=min(versions),
            max_version=max(versions),
            text=text,
        )

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
                    paused, canary = await self._load_and_prove(update)
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
            return SyncReport(
                generator=self.name,
                version=update.version,
                canary_max_error=canary.largest,
                canary_mean_error=canary.mean,
                seconds_paused=paused,
                seconds=time.monotonic() - began,
            )

    async def _load_and_prove(self, update: WeightUpdate) -> tuple[float, Canary]:
        """Seconds paused and the canary's reading. A failed canary is tried once more, with a transfer of its own: what
        fails alike twice is no chance, and a replacement would fail alike too."""
        tolerance = canary_tolerance(self.config)
        paused = await self._load(update)
        canary = await self._canary(update)
        if canary.passes(tolerance):
            return paused, canary
        paused += await self._load(update)
        again = await self._canary(update)
        if again.passes(tolerance):
            return paused, again
        alike = again.repeats(canary)
        raise CanaryFailed(self.name, update.version, verdict(self.config, canary, reproducible=alike), alike)

    async def _load(self, update: WeightUpdate) -> float:
        """Pause, load, stamp, resume; seconds paused. The cache is cleared: requests in flight compute theirs
        again, or they would go on with keys and values of the old weights (off by nats)."""
        from vllm.distributed.weight_transfer.base import WeightTransferUpdateRequest

        node = Node(workers=self.config.rollout.tensor_parallel_size, timeout_s=self.config.weights.transfer_timeout_s)
        info = await asyncio.to_thread(road(update.info["backend"]).update_info, update.info, update.version, node)
        payload = {"backend": update.info["backend"], "info": info | {"version": update.version}}
        began = time.monotonic()
        if not self.config.async_rl.in_flight_updates:
            # vLLM's own mode "wait" drains what runs, but what is queued or preempted would change weights
            self._admitting.clear()
            await self._drained.wait()
        await self._engine.pause_generation(mode=PAUSE_MODE, clear_cache=True)
        self._proven.clear()
        await self._engine.start_weight_update()
        await self._engine.update_weights(WeightTransferUpdateRequest(update_info=payload))
        await self._engine.finish_weight_update(str(update.version))
        await self._engine.resume_generation()
        return time.monotonic() - began

    async def _canary(self, update: WeightUpdate) -> Canary:
        """The canary's reading. A paused engine runs nothing, so this runs after resuming, ahead of the rollouts;
        asking for prompt log-probabilities makes vLLM skip its prefix cache."""
        from vllm import SamplingParams

        ask = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0, flat_logprobs=True, detokenize=False)
        sequences = [ids[: self._max_model_len - 1].tolist() for ids in update.canary_token_ids]
        outputs: list[Any] = await asyncio.gather(*(self._run(ids, ask, CANARY_PRIORITY) for ids in sequences))
        found = [np.asarray(output.prompt_logprobs.logprobs, np.float32) for output in outputs]
        return compare(found, update.canary_logprobs)

    async def _give_up(self, why: str) -> None:
        """Never use this engine again: whoever waits for it gets WorkerLost now."""
        self._failure = why
        self._proven.set()
        self._admitting.set()
        print(f"generator {self.name}: {why}", file=sys.stderr, flush=True)
        if self._engine.errored:
            self._exit(why)
        await self._engine.abort(list(self._requests))


def summarize(group: RolloutGroup, generator: str, seconds: float) -> GroupSummary:
    rollouts = group.rollouts
    return GroupSummary(
        lease_id=group.lease_id,
        attempt=group.attempt,
        prompt_tokens=len(group.prompt_token_ids),
        completion_tokens=np.asarray([len(r.token_ids) for r in rollouts], np.int32),
        truncated=np.asarray([r.finish_reason == "length" for r in rollouts], bool),
        min_version=np.asarray([r.min_version for r in rollouts], np.int32),
        max_version=np.asarray([r.max_version for r in rollouts], np.int32),
        generator=generator,
        seconds=seconds,
    )


def rollout_seed(seed: int, j: int) -> int:
    """The engine seed of rollout ``j`` of a request: a hash of both, 62 bits, so that neither neighbouring
    leases nor neighbouring rollouts share a stream."""
    words = np.random.SeedSequence([seed % 2**64, j]).generate_state(1, np.uint64)
    return int(words[0] >> np.uint64(2))
