"""One DeepSpeed rank of the learner, as a Ray actor (undecorated; actors/learner.py starts it).

    train:    TrainingBatch --plan (packing, the same on all ranks)--> own rows --fetch--> micro-batches
              --(reference, prox)--> [forward, loss, statistics, backward] x micro-batches --> one update
              (x algo.updates_per_batch) --> StepReport, summed over ranks
    publish:  weights --> /dev/shm or vLLM's transfer, with log-probabilities of the canary sequences

Every rank runs every method with the same arguments, in the same order: they meet in collectives.
"""

from __future__ import annotations

import os
import socket
import time
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import ray

from cures_ray.config import Config
from cures_ray.learning.packing import MicroBatch, collate, make_row, plan_step
from cures_ray.messages import RolloutGroup, RunError, StepReport, TrainingBatch, WeightUpdate

SUMS = ("loss", "tokens", "clipped", "ratio", "kl", "logprob_diff", "entropy")  # of losses.policy_loss
MAXIMA = ("max_ratio", "max_logprob_diff")


class LearnerRank:
    def __init__(self, config: Config, rank: int, world_size: int) -> None:
        self.config, self.rank, self.world_size = config, rank, world_size
        self.updates = 0  # optimizer updates done; the learning-rate schedule counts them
        self._canary: list[np.ndarray] = []
        self._reference: Any = None
        self._held: list[Any] = []  # tensors that an ipc transfer still reads

    def address(self) -> tuple[str, int]:
        """Where rank 0 will listen: (IP address, a port that is free now)."""
        with socket.socket() as probe:
            probe.bind(("", 0))
            return ray.util.get_node_ip_address(), probe.getsockname()[1]

    def join(self, address: str, port: int) -> None:
        """Meet the other ranks at ``address:port``."""
        gpu = self.config.placement.use_gpu != "no" and bool(ray.get_gpu_ids())
        os.environ |= {
            "RANK": str(self.rank),
            "LOCAL_RANK": "0",
            "WORLD_SIZE": str(self.world_size),
            "MASTER_ADDR": address,
            "MASTER_PORT": str(port),
        }
        import torch

        gpu = gpu and torch.cuda.is_available()  # Ray's GPUs may be logical ones on a CPU host
        self.device = torch.device("cuda", 0) if gpu else torch.device("cpu")
        if not gpu:
            os.environ["DS_ACCELERATOR"] = "cpu"
            torch.set_num_threads(max(1, int(self.config.learner.cpus_per_rank)))
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

        from actors.deepspeed_engine import Policy, build_engine, load_model, load_state

        self.config, self.updates, self._reference = config, 0, None
        self._backend, self._shm, self._canary = backend, shm, [np.asarray(s, np.int32) for s in canary]
        torch.manual_seed(config.learner.seed + self.rank)
        model = load_model(config)
        self.parameters = sum(p.numel() for p in model.parameters())
        self._shape = (model.config.num_hidden_layers, model.config.hidden_size, model.config.vocab_size)
        if config.algo.kl_coef > 0:
            self._reference = Policy(load_model(config)).to(self.device).eval().requires_grad_(False)
        self.engine = build_engine(Policy(model), config, self.world_size, on_gpu=self.device.type == "cuda")
        if resume is not None:
            self.updates = load_state(self.engine, resume, self.rank, self.world_size, config.learner)
        return self.parameters

    # -- one optimizer step ------------------------------------------------------------------------------

    def train(self, batch: TrainingBatch) -> StepReport:
        """Update the policy on ``batch``; the same report on every rank but for its gradient statistics, which
        are of the leases this rank computed.

        Raises:
            RunError: a payload cannot be fetched, or the loss or gradient is not finite.
        """
        import torch

        from actors.deepspeed_engine import grad_norm, learning_rate, set_learning_rate
        from cures_ray.learning.gradient_norms import LastLayerStatistics
        from cures_ray.learning.losses import mean_metrics

        began = time.monotonic()
        algo, curriculum = self.config.algo, self.config.curriculum
        wants_statistics = curriculum.sigma == "last_layer"
        micro, leases, plus = self._micro_batches(batch, whole_leases=wants_statistics)
        chunks = self._chunks(batch)
        references = [self._score(self._reference, m, chunks) for m in micro] if self._reference else None
        if references and algo.kl_in_reward:
            micro = self._with_kl_in_reward(micro, references)
        prox = None
        if algo.loss == "decoupled" and algo.updates_per_batch > 1:  # with one update prox is theta itself
            prox = [self._score(self.engine, m, chunks) for m in micro]
        statistics = LastLayerStatistics(self.config.rollout.temperature, self.config.learner.seed)
        total = self.config.trainer.steps * algo.updates_per_batch
        reports = []
        for number in range(algo.updates_per_batch):
            rate = learning_rate(self.config.learner, self.updates, total)
            set_learning_rate(self.engine, rate)
            sums = {k: torch.zeros((), device=self.device) for k in SUMS + MAXIMA}
            for i, m in enumerate(micro):
                self.engine.set_gradient_accumulation_boundary(i == len(micro) - 1)
                into = statistics if wants_statistics and number == 0 and m.tokens else None
                policies = (prox[i] if prox else None, references[i] if references else None)
                self._accumulate(m, sums, policies, chunks, into, leases[i], plus[i])
            report = self._reduce(sums)
            norm = self._update(batch.step, report["loss"], grad_norm)
            reports.append(report | {"grad_norm": norm, "lr": rate})
            self.updates += 1
        seconds = time.monotonic() - began
        return StepReport(
            step=batch.step,
            metrics=mean_metrics(reports) | self._cost(micro, batch, seconds),
            gradient_statistics=statistics.result(),
        )

    def _accumulate(
        self,
        m: MicroBatch,
        sums: dict[str, Any],
        policies: tuple[Any, Any],
        chunks: int,
        statistics: Any,
        leases: list[int],
        plus: list[bool],
    ) -> None:
        """Forward, loss, backward of one micro-batch; its metric sums are added to ``sums``."""
        import torch

        from cures_ray.learning.losses import LossInputs, policy_loss

        row = self._tensor(m.row)
        logprobs, entropy, hidden, residual = self._forward(
            self.engine, m, chunks, statistics.residual if statistics is not None else None
        )
        inputs = LossInputs(
            logprobs=logprobs,
            behaviour=self._tensor(m.behaviour),
            prox=policies[0],
            reference=policies[1],
            advantages=self._tensor(m.advantage),
            weights=self._tensor(m.weight),
            row=row,
            rollouts=len(m.input_ids),
        )
        loss, own = policy_loss(inputs, self.config.algo)
        if statistics is not None:
            statistics.add(hidden, residual, row, leases, plus)
        if m.tokens:
            for key, value in (own | {"entropy": entropy.sum()}).items():
                sums[key] = torch.maximum(sums[key], value) if key in MAXIMA else sums[key] + value
        self.engine.backward(loss * self.world_size)  # DeepSpeed divides the sum over ranks by their number

    def _update(self, step: int, loss: float, grad_norm: Any) -> float:
        """Clip and step. The loss is checked first, so that broken weights are never written where it shows."""
        import torch

        if not np.isfinite(loss):
            raise RunError(f"optimizer step {step}: the loss is {loss}; nothing was updated")
        own = [p.grad for p in self.engine.module.parameters() if p.grad is not None]
        plain = torch.nn.utils.get_total_norm(own) if own and self.config.learner.zero_stage == 0 else torch.zeros(())
        self.engine.step()
        norm = grad_norm(self.engine)
        norm = float(plain) if norm is None else norm
        if not np.isfinite(norm):
            raise RunError(
                f"optimizer step {step}: the gradient norm is {norm} and the weights are lost; resume from the last "
                f"checkpoint with a lower learner.lr"
            )
        return norm

    # -- from the batch to micro-batches -----------------------------------------------------------------

    def _micro_batches(
        self, batch: TrainingBatch, *, whole_leases: bool
    ) -> tuple[list[MicroBatch], list[list[int]], list[list[bool]]]:
        """This rank's micro-batches, with lease and class (reward > 0.5) of each of their rollouts. Rollouts that
        cannot move the policy (advantage 0, no KL) are left out unless their statistics are wanted."""
        skip_idle = self.config.algo.kl_coef == 0 and not whole_leases
        budget = self.config.learner.max_tokens_per_rank
        plan = plan_step(batch, self.world_size, budget, skip_idle=skip_idle, whole_leases=whole_leases)
        mine = plan[self.rank]
        payloads = self._fetch(batch, sorted({g for places in mine for g, _ in places}))
        micro, leases, plus = [], [], []
        for places in mine:
            rows = [make_row(batch.groups[g], payloads[g], slot) for g, slot in places]
            micro.append(collate(rows))
            leases.append([r.lease_id for r in rows])
            plus.append([r.reward > 0.5 for r in rows])
        return micro, leases, plus

    def _fetch(self, batch: TrainingBatch, groups: list[int]) -> dict[int, RolloutGroup]:
        """Payloads of ``groups``. All ranks learn whether one of them failed, before any waits for another."""
        refs = {g: batch.groups[g].payload for g in groups if isinstance(batch.groups[g].payload, ray.ObjectRef)}
        payloads = {g: batch.groups[g].payload for g in groups if g not in refs}
        problem = ""
        try:
            payloads |= zip(refs, ray.get(list(refs.values()), timeout=120), strict=True)
        except (ray.exceptions.RayError, TimeoutError) as error:
            problem = f"{type(error).__name__}: {str(error).splitlines()[0]}"
        if self._sum([float(bool(problem))])[0]:
            where = f"learner rank {self.rank}: {problem}" if problem else "another learner rank"
            raise RunError(f"optimizer step {batch.step}: payloads of the batch are lost ({where})")
        return payloads

    def _with_kl_in_reward(self, micro: list[MicroBatch], references: list[Any]) -> list[MicroBatch]:
        """Token-level advantages of REINFORCE++: reward-to-go of A minus KL, whitened over the global batch where
        the advantage is one that whitens."""
        import torch

        from cures_ray.learning.advantages import BEFORE_WHITENING
        from cures_ray.learning.losses import token_advantages, whitened

        algo = self.config.algo
        values = [
            token_advantages(
                self._tensor(m.advantage),
                self._tensor(m.behaviour) - reference,
                self._tensor(m.row),
                self._tensor(m.position),
                algo.kl_coef,
            )
            for m, reference in zip(micro, references, strict=True)
        ]
        if algo.advantage in BEFORE_WHITENING:
            real = [v.double() for v, m in zip(values, micro, strict=True) if m.tokens]
            own = [float(sum(f(v) for v in real)) for f in (len, torch.sum, lambda v: (v**2).sum())]
            sums = torch.tensor(self._sum(own), device=self.device)
            values = [whitened(v, sums, algo.advantage_std_eps) for v in values]
        return [replace(m, advantage=v.cpu().numpy()) for m, v in zip(micro, values, strict=True)]

    # -- model calls -------------------------------------------------------------------------------------

    def _forward(self, module: Any, m: MicroBatch, chunks: int, residual: Any = None) -> Any:
        index = self._tensor(m.row * m.input_ids.shape[1] + m.position)
        temperature = self.config.rollout.temperature
        return module(self._tensor(m.input_ids), index, self._tensor(m.target), temperature, chunks, residual)

    def _score(self, module: Any, m: MicroBatch, chunks: int) -> Any:
        """Log-probabilities [N] of a micro-batch without a gradient."""
        import torch

        with torch.no_grad():
            return self._forward(module, m, chunks)[0]

    def logprobs(self, sequences: list[np.ndarray]) -> list[np.ndarray]:
        """float32 [T_k - 1]: log-probabilities of tokens 1.. of each sequence [T_k] at temperature 1."""
        import torch

        result = []
        for sequence in sequences:
            ids = self._tensor(np.asarray(sequence, np.int64))
            with torch.no_grad():
                index = torch.arange(len(ids) - 1, device=self.device)
                scores = self.engine(ids[None], index, ids[1:], 1.0, 1, None)[0]
            result.append(scores.float().cpu().numpy())
        return result

    def _tensor(self, array: np.ndarray) -> Any:
        import torch

        return torch.as_tensor(array).to(self.device)

    # -- weights, checkpoints ----------------------------------------------------------------------------

    def publish(self, version: int) -> WeightUpdate | None:
        """Make the weights available as ``version``; the update on rank 0, None on the others."""
        from actors.weights.transfer import ipc_info, nccl_info, write_shm

        stage = self.config.learner.zero_stage
        info: dict[str, Any] = {"backend": self._backend}
        if self._backend == "shm":
            tensors = self._weights()
            if self.rank == 0:
                path = write_shm(tensors.items(), self._shm, version)
                info |= {"path": str(path), "bytes": path.stat().st_size}
        elif self._backend == "nccl":
            info |= nccl_info(self.engine.module.lm, self.config, *self.address())
        else:
            own, self._held = ipc_info(self.engine.module.lm, stage)
            info |= own
        if self.rank and stage < 3:
            return None
        logprobs = self.logprobs(self._canary)
        if self.rank:
            return None
        return WeightUpdate(
            version=version,
            info=info,
            canary_token_ids=tuple(self._canary),
            canary_logprobs=tuple(logprobs),
        )

    def transmit(self, update: WeightUpdate) -> None:
        """The sender's half of an nccl transfer; nothing for shm and ipc."""
        from actors.weights.transfer import send_weights

        stage = self.config.learner.zero_stage
        send_weights(self.engine.module.lm, update.info, rank=self.rank, zero_stage=stage)

    def save(self, folder: Path) -> None:
        """This rank's share of model and optimizer into ``folder``, on a file system that all ranks share."""
        from actors.deepspeed_engine import save_state

        save_state(self.engine, folder, self.rank, self.world_size, self.config.learner, self.updates)

    def export(self, folder: Path) -> None:
        """A plain Hugging Face folder with weights, config and tokenizer."""
        from transformers import AutoTokenizer

        tensors = self._weights()
        if self.rank == 0:
            model = self.config.model
            self.engine.module.lm.save_pretrained(folder, state_dict=tensors)
            AutoTokenizer.from_pretrained(
                model.path, revision=model.revision, trust_remote_code=model.trust_remote_code
            ).save_pretrained(folder)

    def _weights(self) -> dict[str, Any]:
        """Name -> full tensor, tied ones once; on rank 0, after a collective under ZeRO 3. Empty elsewhere."""
        from actors.weights.transfer import gathered

        stage = self.config.learner.zero_stage
        if self.rank and stage < 3:
            return {}
        named = gathered(self.engine.module.lm, stage)
        if stage < 3:
            return {name: tensor.detach() for name, tensor in named}
        copies = {}
        for name, tensor in named:  # a gathered tensor lives only until the next one
            if self.rank == 0:
                copies[name] = tensor.detach().to("cpu", copy=True)
        return copies

    # -- figures -----------------------------------------------------------------------------------------

    def _reduce(self, sums: dict[str, Any]) -> dict[str, float]:
        """Sums and maxima over all ranks."""
        totals = self._sum([float(sums[k]) for k in SUMS])
        maxima = self._sum([float(sums[k]) for k in MAXIMA], largest=True)
        return dict(zip(SUMS + MAXIMA, totals + maxima, strict=True))

    def _sum(self, values: list[float], *, largest: bool = False) -> list[float]:
        import torch
        import torch.distributed as dist

        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor, dist.ReduceOp.MAX if largest else dist.ReduceOp.SUM)
        return [float(x) for x in tensor.tolist()]

    def _chunks(self, batch: TrainingBatch) -> int:
        """Pieces in which logits are computed: of the largest micro-batch that can occur, equal on all ranks."""
        from actors.deepspeed_engine import LOGITS_PER_CHUNK

        whole = sum(int(g.completion_tokens.sum()) for g in batch.groups)
        longest = max((int(g.completion_tokens.max()) + g.prompt_tokens for g in batch.groups), default=1)
        most = min(whole, max(self.config.learner.max_tokens_per_rank, longest))
        return max(1, -(-most * self._shape[2] // LOGITS_PER_CHUNK))

    def _cost(self, micro: list[MicroBatch], batch: TrainingBatch, seconds: float) -> dict[str, float]:
        """Seconds, tokens, FLOPs: 6 x parameters x tokens + 6 x layers x d x length^2 (causal), all ranks."""
        layers, hidden, _ = self._shape
        tokens = sum(m.tokens for m in micro)
        squares = sum(float((np.bincount(m.row, m.row >= 0) ** 2).sum()) for m in micro if m.tokens)
        computed, squared = self._sum([float(tokens), squares])
        updates = self.config.algo.updates_per_batch
        return {
            "seconds": seconds,
            "trained_tokens": float(sum(int(g.completion_tokens.sum()) for g in batch.groups)),
            "computed_tokens": computed,
            "flops": updates * (6.0 * self.parameters * computed + 6.0 * layers * hidden * squared),
            "tokens_per_s": updates * computed / seconds,
        }
