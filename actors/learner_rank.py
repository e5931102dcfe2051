"""One DeepSpeed rank of the learner, as a Ray actor (undecorated; actors/learner.py starts it).

    train:    TrainingBatch --fetch own payloads--> learning.step.LearnerStep over the DeepSpeed engine --> StepReport
    publish:  weights --> /dev/shm or vLLM's transfer, with log-probabilities of the canary sequences

Every rank runs every method with the same arguments, in the same order: they meet in collectives.
"""

from __future__ import annotations

import os
import socket
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import ray
from safetensors import SafetensorError

from actors.telemetry import ProcessGauges, phase
from actors.weights.backend import Publisher, Settings, road
from cures_ray.config import Config
from cures_ray.messages import (
    CheckpointError,
    PayloadsLost,
    RolloutChunk,
    StepReport,
    TrainingBatch,
    TrainingGroup,
    WeightUpdate,
)

PAYLOAD_SECONDS = 120.0  # deadline of fetching the payloads of one batch


class LearnerRank:
    def __init__(self, config: Config, rank: int, world_size: int) -> None:
        self.config, self.rank, self.world_size = config, rank, world_size
        self._canary: list[np.ndarray] = []
        self._publisher: Publisher | None = None
        self._gauges = ProcessGauges(config, "learner", f"learner-{rank}")

    def __repr__(self) -> str:
        return f"learner-{self.rank}"

    def address(self) -> tuple[str, int]:
        """(IP address of this node, a port that is free now)."""
        with socket.socket() as probe:
            probe.bind(("", 0))
            return ray.util.get_node_ip_address(), probe.getsockname()[1]

    def join(self, address: str, port: int, ranks_on_node: int) -> None:
        """Meet the other ranks at ``address:port`` of rank 0."""
        gpu = self.config.placement.use_gpu != "no" and bool(ray.get_gpu_ids())
        os.environ |= {
            "RANK": str(self.rank),
            "LOCAL_RANK": "0",
            "WORLD_SIZE": str(self.world_size),
            "MASTER_ADDR": address,
            "MASTER_PORT": str(port),
        }
        import torch

        self._ranks_on_node = ranks_on_node
        gpu = gpu and torch.cuda.is_available()  # Ray's GPUs may be logical ones on a CPU host
        self.device = torch.device("cuda", 0) if gpu else torch.device("cpu")
        if not gpu:
            os.environ["DS_ACCELERATOR"] = "cpu"
        import deepspeed
        from deepspeed.utils import logger

        logger.setLevel("ERROR")
        if not gpu:
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # else it compiles C++ for a minute
        deepspeed.init_distributed(
            dist_backend="nccl" if gpu else "gloo",
            timeout=timedelta(seconds=self.config.trainer.no_progress_timeout_s),
            verbose=False,
        )

    def build(self, config: Config, shm: Path, backend: str, canary: list[np.ndarray], resume: Path | None) -> int:
        """Load the model, build the engine, restore ``resume``; returns the parameter count. May be called again
        with another configuration of the same ranks."""
        import torch

        from actors.deepspeed_engine import DeepSpeedEngine, load_state
        from cures_ray.learning.policy import ModelSize, Policy, learner_threads, load_model, load_policy
        from cures_ray.learning.step import LearnerStep

        self.config = config
        self._canary = [np.asarray(s, np.int32) for s in canary]
        if self._publisher is not None:
            self._publisher.close()
        address, timeout_s = ray.util.get_node_ip_address(), config.weights.transfer_timeout_s
        settings = Settings(backend=backend, folder=shm, rank=self.rank, address=address, timeout_s=timeout_s)
        self._publisher = road(backend).Publisher(settings)
        torch.manual_seed(config.learner.seed + self.rank)
        policy, reference = load_policy(config), None
        size = ModelSize.of(policy.lm)
        if self.device.type == "cpu":
            cores = len(os.sched_getaffinity(0))
            threads = learner_threads(config.learner.cpus_per_rank, size.parameters, cores, self._ranks_on_node)
            torch.set_num_threads(threads)
        if config.algo.kl_coef > 0:
            reference = Policy(load_model(config)).to(self.device).eval().requires_grad_(False)
        self.engine = DeepSpeedEngine(policy, config, self.rank, self.world_size, self.device)
        self._step = LearnerStep(config, self.engine, size, reference, span=phase)
        if resume is not None:
            load_state(self.engine, resume)
        return size.parameters

    # -- training ----------------------------------------------------------------------------------------

    def train(self, batch: TrainingBatch) -> StepReport:
        """Update the policy on ``batch``, see learning.step.LearnerStep.

        Raises:
            PayloadsLost: on all ranks, with the leases whose payloads a rank could not fetch; nothing was updated.
            RunError: the loss or gradient is not finite.
        """
        try:
            return self._step.train(batch, lambda groups: self._fetch(batch, groups))
        finally:
            self._gauges.tick()

    def _fetch(self, batch: TrainingBatch, groups: list[TrainingGroup]) -> dict[int, RolloutChunk]:
        """Payloads of ``groups`` by lease. All ranks learn which are lost, before any waits for another."""
        handles = {g.lease_id: g.payload for g in groups}
        refs = list({h for h in handles.values() if isinstance(h, ray.ObjectRef)})  # leases of a chunk share it
        lost: dict[Any, str] = {}
        try:
            with phase("fetch payloads", step=batch.step):
                found = dict(zip(refs, ray.get(refs, timeout=PAYLOAD_SECONDS), strict=True))
        except (ray.exceptions.RayError, TimeoutError):
            found, lost = _fetch_each(refs)
        gone = {lease for lease, handle in handles.items() if isinstance(handle, ray.ObjectRef) and handle in lost}
        flags = self.engine.total([float(g.lease_id in gone) for g in batch.groups])
        leases = tuple(g.lease_id for g, flag in zip(batch.groups, flags, strict=True) if flag)
        if leases:
            reason = f" (rank {self.rank}: {next(iter(lost.values()))})" if lost else ""
            raise PayloadsLost(
                f"optimizer step {batch.step}: payloads of leases {list(leases)} are lost{reason}", leases
            )
        return {lease: found[h] if isinstance(h, ray.ObjectRef) else h for lease, h in handles.items()}

    def logprobs(self, sequences: list[np.ndarray]) -> list[np.ndarray]:
        """float32 [T_k - 1]: log-probabilities of tokens 1.. of each sequence [T_k] at temperature 1."""
        import torch

        result = []
        for sequence in sequences:
            ids = torch.as_tensor(np.asarray(sequence, np.int64)).to(self.device)
            with torch.no_grad():
                index = torch.arange(len(ids) - 1, device=self.device)
                scores = self.engine.policy(ids[None], index, ids[1:], 1.0, 1, None)[0]
            result.append(scores.float().cpu().numpy())
        return result

    # -- weights, checkpoints ----------------------------------------------------------------------------

    def publish(self, version: int) -> WeightUpdate | None:
        """Make the weights available as ``version``; the update on rank 0, None on the others."""
        assert self._publisher is not None, "build comes first"
        began = time.monotonic()
        with phase("write weights", version=version):
            info = self._publisher.publish(self._source(), version)
        written = time.monotonic()
        if self.rank and self.config.learner.zero_stage < 3:
            return None
        with phase("canary log-probabilities", version=version):
            logprobs = self.logprobs(self._canary)
        self._gauges.tick()
        if self.rank:
            return None
        return WeightUpdate(
            version=version,
            info=info,
            canary_token_ids=tuple(self._canary),
            canary_logprobs=tuple(logprobs),
            kept=self._publisher.kept,
            seconds={"write": written - began, "reference": time.monotonic() - written},
        )

    def save(self, folder: Path) -> None:
        """This rank's share of model and optimizer into ``folder``, on a file system that all ranks share; rank 0 also
        writes the model as ``export`` does, so that `cures export` needs neither the ranks nor their number.

        Raises:
            CheckpointError: the folder cannot be written.
        """
        from actors.deepspeed_engine import save_state

        model = self._model()  # a collective: before anything that can fail on one rank alone
        save_state(self.engine, folder)
        try:
            self._write(folder / "model", *model)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(
                f"learner rank {self.rank} could not write the model to {folder}: {error}; free space there, or choose "
                f"another checkpoint.dir"
            ) from error

    def export(self, folder: Path) -> None:
        """A plain Hugging Face folder with weights, config and tokenizer; with LoRA the merged weights, and the
        adapters in its sub-folder ``adapter``."""
        self._write(folder, *self._model())

    def _model(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Weights and adapters by name, whole; only rank 0's are used."""
        from actors.deepspeed_engine import gather
        from cures_ray.learning.lora import adapter_tensors

        lm = self.engine.module.lm
        adapters = adapter_tensors(lm, gather) if self.config.learner.zero_stage == 3 else adapter_tensors(lm)
        return self._weights(), adapters

    def _write(self, folder: Path, tensors: dict[str, Any], adapters: dict[str, Any]) -> None:
        from transformers import AutoTokenizer

        from cures_ray.learning.lora import save_adapter

        model, lm = self.config.model, self.engine.module.lm
        if self.rank == 0:
            lm.save_pretrained(folder, state_dict=tensors)
            AutoTokenizer.from_pretrained(
                model.path, revision=model.revision, trust_remote_code=model.trust_remote_code
            ).save_pretrained(folder)
            if adapters:
                save_adapter(lm, adapters, model.path, folder / "adapter")

    def _weights(self) -> dict[str, Any]:
        """Name -> full tensor, tied ones once; on rank 0, after a collective under ZeRO 3. Empty elsewhere."""
        if self.rank:
            self._source().assist()
            return {}
        own = self.config.learner.zero_stage == 3  # a gathered tensor lives only until the next one
        return {n: t.detach().to("cpu", copy=True) if own else t.detach() for n, t in self._source()}

    def _source(self) -> Any:
        from actors.weights.stream import Source

        return Source(self.engine.module.lm, self.config.learner.zero_stage, self.rank)


def _fetch_each(refs: list[Any]) -> tuple[dict[Any, RolloutChunk], dict[Any, str]]:
    """(payloads by handle, why by handle of those that cannot be fetched)."""
    found, lost = {}, {}
    deadline = time.monotonic() + PAYLOAD_SECONDS
    for ref in refs:
        try:
            found[ref] = ray.get(ref, timeout=max(1.0, deadline - time.monotonic()))
        except (ray.exceptions.RayError, TimeoutError) as error:
            cause = error.cause if isinstance(error, ray.exceptions.RayTaskError) else error
            lost[ref] = f"{type(cause).__name__}: {str(cause).splitlines()[0]}"
    return found, lost
