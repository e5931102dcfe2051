"""LearnerPort in one process: the library's learner step with torch's AdamW, one rank, on the CPU or a GPU.

Weights and their updates are float32. With ``learner.dtype: bfloat16`` the products of both passes are bfloat16
(autocast), as in the DeepSpeed learner, which keeps float32 weights beside.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.inprocess.costs import Costs, device
from cures_ray.config import Config, LearnerConfig
from cures_ray.learning.policy import ModelSize, Policy, load_model, make_optimizer
from cures_ray.learning.step import LearnerStep
from cures_ray.messages import ConfigError, StepReport, TrainingBatch, WeightUpdate


class LocalEngine:
    """step.Engine: one rank, one AdamW, gradients clipped as the DeepSpeed learner does."""

    rank, ranks = 0, 1

    def __init__(self, policy: Policy, learner: LearnerConfig) -> None:
        self.module, self.max_grad_norm = policy, learner.max_grad_norm
        self.device = next(policy.parameters()).device
        self.mixed = learner.dtype == "bfloat16"
        self.optimizer = make_optimizer(policy, learner)

    def policy(self, *arguments: Any) -> Any:
        """``Policy.forward``, its products in the learner's dtype."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.mixed):
            return self.module(*arguments)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        loss.backward()  # type: ignore[no-untyped-call]

    def update(self, rate: float) -> float:
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        norm = float(torch.nn.utils.clip_grad_norm_(self.module.parameters(), self.max_grad_norm))
        if np.isfinite(norm):
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def total(self, values: list[float], *, largest: bool = False) -> list[float]:
        return values


class LocalLearner:
    def __init__(self, config: Config, costs: Costs) -> None:
        if config.model.lora is not None:
            raise ConfigError("the in-process engine copies whole weights; use model.lora with the real system")
        self.config, self.costs = config, costs
        self.policy = _load(config)
        reference = _load(config).requires_grad_(False) if config.algo.kl_coef else None
        self.engine = LocalEngine(self.policy, config.learner)
        self.step = LearnerStep(config, self.engine, ModelSize.of(self.policy.lm), reference)
        self.before_training: Callable[[], Awaitable[None]] | None = None

    async def train(self, batch: TrainingBatch) -> StepReport:
        if self.before_training is not None:
            await self.before_training()
        with self.costs.timed("learner"):
            report = self.step.train(batch, lambda groups: {g.lease_id: g.payload for g in groups})
        self.costs.trained(report.metrics)
        return report

    async def publish(self, version: int) -> WeightUpdate:
        """The weights stay where they are: nothing trains between this and the generator's copy."""
        info = {"module": self.policy.lm}
        return WeightUpdate(version=version, info=info, canary_token_ids=(), canary_logprobs=(), together=True)

    async def save(self, folder: Path) -> None:
        return None

    async def export(self, folder: Path) -> None:
        self.policy.lm.save_pretrained(folder)


def _load(config: Config) -> Policy:
    """In float32, on the device of the benchmark."""
    full = config.model_copy(update={"learner": config.learner.model_copy(update={"dtype": "float32"})})
    return Policy(load_model(full)).to(device())
