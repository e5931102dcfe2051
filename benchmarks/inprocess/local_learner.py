"""LearnerPort in one process: the library's packing, losses and statistics, torch AdamW, one rank, on the CPU."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from actors.deepspeed_engine import Policy, learning_rate, load_model
from benchmarks.inprocess.costs import Costs
from cures_ray.config import Config
from cures_ray.learning.gradient_norms import LastLayerStatistics
from cures_ray.learning.losses import LossInputs, policy_loss
from cures_ray.learning.packing import collate, make_row, plan_step
from cures_ray.messages import ConfigError, RunError, StepReport, TrainingBatch, WeightUpdate


class LocalLearner:
    """LearnerPort: one rank, one AdamW, gradients clipped as the DeepSpeed learner does."""

    def __init__(self, config: Config, costs: Costs) -> None:
        if config.algo.kl_coef or config.algo.updates_per_batch != 1:
            raise ConfigError("the in-process engine has no reference policy and makes one update a batch")
        self.config, self.costs = config, costs
        self.policy = Policy(load_model(config)).float()
        self.parameters = sum(p.numel() for p in self.policy.parameters())
        learner = config.learner
        self.optimizer = torch.optim.AdamW(
            self.policy.parameters(),
            lr=learner.lr,
            betas=(learner.adam_beta1, learner.adam_beta2),
            weight_decay=learner.weight_decay,
            fused=True,
        )
        self.updates = 0
        self.before_training: Callable[[], Awaitable[None]] | None = None

    async def train(self, batch: TrainingBatch) -> StepReport:
        if self.before_training is not None:
            await self.before_training()
        with self.costs.timed("learner"):
            report = self._train(batch)
        self.costs.trained(report.metrics, 1)
        return report

    def _train(self, batch: TrainingBatch) -> StepReport:
        config = self.config
        began = time.perf_counter()
        wants = config.curriculum.sigma == "last_layer"
        plan = plan_step(batch, 1, config.learner.max_tokens_per_rank, skip_idle=not wants, whole_leases=wants)[0]
        statistics = LastLayerStatistics(config.rollout.temperature, config.learner.seed) if wants else None
        rate = learning_rate(config.learner, self.updates, config.trainer.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        sums: dict[str, float] = {}
        computed, squares = 0, 0.0
        for places in plan:
            rows = [make_row(batch.groups[g], batch.groups[g].payload, slot) for g, slot in places]
            if not rows:
                continue
            own = self._accumulate(rows, statistics)
            computed += sum(len(r.prompt) + len(r.completion) for r in rows)
            squares += float(sum((len(r.prompt) + len(r.completion)) ** 2 for r in rows))
            for key, value in own.items():
                sums[key] = sums.get(key, 0.0) + value
        norm = float(torch.nn.utils.clip_grad_norm_(self.policy.parameters(), config.learner.max_grad_norm))
        if not np.isfinite(norm):
            raise RunError(f"optimizer step {batch.step}: the gradient norm is {norm}; lower learner.lr")
        if computed:  # as DeepSpeed: a batch without a gradient still counts as an update
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.updates += 1
        shape = self.policy.lm.config
        tokens = max(1.0, sums.get("tokens", 0.0))
        return StepReport(
            step=batch.step,
            metrics={
                "loss": sums.get("loss", 0.0),
                "grad_norm": norm,
                "lr": rate,
                "entropy": sums.get("entropy", 0.0) / tokens,
                "clip_fraction": sums.get("clipped", 0.0) / tokens,
                "logprob_diff": sums.get("logprob_diff", 0.0) / tokens,
                "seconds": time.perf_counter() - began,
                "trained_tokens": float(sum(int(g.completion_tokens.sum()) for g in batch.groups)),
                "computed_tokens": float(computed),
                "flops": 6.0 * self.parameters * computed + 6.0 * shape.num_hidden_layers * shape.hidden_size * squares,
            },
            gradient_statistics=statistics.result() if statistics is not None else (),
        )

    def _accumulate(self, rows: list[Any], statistics: LastLayerStatistics | None) -> dict[str, float]:
        m = collate(rows)
        row = torch.as_tensor(m.row)
        logprobs, entropy, hidden, residual = self.policy(
            torch.as_tensor(m.input_ids),
            torch.as_tensor(m.row * m.input_ids.shape[1] + m.position),
            torch.as_tensor(m.target),
            self.config.rollout.temperature,
            1,
            statistics.residual if statistics is not None else None,
        )
        inputs = LossInputs(
            logprobs=logprobs,
            behaviour=torch.as_tensor(m.behaviour),
            prox=None,
            reference=None,
            advantages=torch.as_tensor(m.advantage),
            weights=torch.as_tensor(m.weight),
            row=row,
            rollouts=len(m.input_ids),
        )
        loss, sums = policy_loss(inputs, self.config.algo)
        loss.backward()
        if statistics is not None:
            statistics.add(hidden, residual, row, [r.lease_id for r in rows], [r.reward > 0.5 for r in rows])
        return {k: float(v) for k, v in (sums | {"entropy": entropy.sum()}).items() if not k.startswith("max_")}

    async def publish(self, version: int) -> WeightUpdate:
        """The weights stay where they are: nothing trains between this and the generator's copy."""
        return WeightUpdate(version=version, info={"module": self.policy.lm}, canary_token_ids=(), canary_logprobs=())

    async def transmit(self, update: WeightUpdate) -> None:
        return None

    async def save(self, folder: Path) -> None:
        return None

    async def export(self, folder: Path) -> None:
        self.policy.lm.save_pretrained(folder)
