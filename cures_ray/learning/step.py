"""One step of the learner, in plain torch: every learner runs this code, and nothing else trains.

    batch --mini-batches--> plan (packing, the same on all ranks) --> own rows --> micro-batches
          --(reference, prox scores)--> [forward, loss, statistics, backward] x micro-batches --> one update
          (x algo.mini_batches x algo.updates_per_batch) --> StepReport, summed over ranks

Who differentiates, updates and sums over ranks is behind ``Engine``: DeepSpeed in actors, torch's AdamW in process.

A mini-batch in which nothing has a gradient makes no optimizer step: Adam would move the weights by the momentum of
earlier batches. All ranks know it from the batch alone. The learning rate goes by the policy version, so such a step
still counts for the schedule, which ends with the run.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from cures_ray.config import Config
from cures_ray.learning.advantages import BEFORE_WHITENING
from cures_ray.learning.drift import LastResponses
from cures_ray.learning.gradient_norms import LastLayerStatistics
from cures_ray.learning.losses import LossInputs, mean_metrics, policy_loss, token_advantages, whitened
from cures_ray.learning.packing import MicroBatch, Row, collate, make_row, mini_batches, plan_step
from cures_ray.learning.policy import ModelSize, learning_rate
from cures_ray.learning.thinning import computed, moving, takes_statistics
from cures_ray.messages import RolloutChunk, RunError, StepReport, TrainingBatch, TrainingGroup

SUMS = ("loss", "tokens", "clipped", "ratio", "kl", "logprob_diff", "entropy")  # of losses.policy_loss
MAXIMA = ("max_ratio", "max_logprob_diff")
PHASES = ("fetch", "score", "forward_backward", "optimizer")  # of a step

Fetch = Callable[[list[TrainingGroup]], dict[int, RolloutChunk]]  # payloads by lease id


class Engine(Protocol):
    """What learners differ in. Calls are collectives: every rank makes them in the same order."""

    rank: int
    ranks: int
    device: torch.device
    policy: Callable[..., Any]  # forward pass of policy.Policy

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Add the gradient of ``loss``, a share of the sum over ranks. ``last``: of this optimizer step."""
        ...

    def update(self, rate: float) -> float:
        """Clip, step at learning rate ``rate``, zero the gradient; its norm before clipping. A norm that is not finite
        means that the weights may be lost."""
        ...

    def total(self, values: list[float], *, largest: bool = False) -> list[float]:
        """Sums (or maxima) over ranks."""
        ...


@dataclass(slots=True)
class MiniBatch:
    """What one optimizer step computes on this rank."""

    micro: list[MicroBatch]
    rows: list[Row]
    moves: bool  # some rollout on some rank has a gradient
    reference: list[Tensor] | None = None  # log-probabilities [N] of each micro-batch
    prox: list[Tensor] | None = None


class LearnerStep:
    """``train`` makes the optimizer steps of one batch.

    Args:
        size: of the model.
        reference: the frozen policy of the KL term, where there is one.
        span: entered for each phase of a step, with its name, to show it somewhere.
    """

    def __init__(
        self,
        config: Config,
        engine: Engine,
        size: ModelSize,
        reference: Any = None,
        span: Callable[[str], AbstractContextManager[None]] = lambda name: nullcontext(),
    ) -> None:
        self.config, self.engine, self.size, self.reference = config, engine, size, reference
        self.last = LastResponses(config.learner.max_tokens_per_rank) if config.curriculum.measures_drift else None
        self._span = span
        self._seconds: dict[str, float] = {}  # of this step by phase

    def train(self, batch: TrainingBatch, fetch: Fetch) -> StepReport:
        """Update the policy on ``batch``; the same report on every rank but for its gradient statistics, which are of
        the leases that this rank computed. ``fetch`` gets the payloads of groups, before anything is updated.

        Raises:
            RunError: the loss or the gradient is not finite, or ``fetch`` failed.
        """
        began = time.monotonic()
        config, algo = self.config, self.config.algo
        self._seconds = dict.fromkeys(PHASES, 0.0)
        chunks = self.size.chunks(batch, config.learner.max_tokens_per_rank)
        with self._phase("fetch"):
            parts = self._mini_batches(batch, fetch)
        with self._phase("score"):
            drift, drift_tokens = self._drift(parts, chunks)
            self._score(parts, chunks)
        statistics = LastLayerStatistics(config.rollout.temperature, config.learner.seed)
        planned = algo.updates_per_batch * algo.mini_batches
        reports, done = [], 0
        for epoch in range(algo.updates_per_batch):
            wanted = statistics if epoch == 0 and takes_statistics(config) else None
            for i, part in enumerate(parts):
                update = batch.step * planned + epoch * algo.mini_batches + i
                rate = learning_rate(config.learner, update, config.trainer.steps * planned)
                reports.append(self._update(batch.step, part, rate, chunks, wanted))
                done += part.moves
        metrics = mean_metrics(reports) | {"updates": float(done), "skipped": 1 - done / len(reports)}
        metrics |= self._cost(batch, parts, time.monotonic() - began)
        metrics |= {f"{name}_s": seconds for name, seconds in self._seconds.items()}
        if self.last is not None:
            metrics["drift_tokens"] = self.engine.total([float(drift_tokens)])[0]
            metrics["flops"] += self.size.flops(metrics["drift_tokens"], 0.0, updates=0, scores=1)
        return StepReport(step=batch.step, metrics=metrics, gradient_statistics=statistics.result(), drift=drift)

    def _drift(self, parts: list[MiniBatch], chunks: int) -> tuple[dict[int, float], int]:
        """Of the policy before this step's updates, by lease; and the tokens that were computed for it."""
        if self.last is None:
            return {}, 0
        return self.last.follow(
            [row for part in parts for row in part.rows],
            lambda micro: self._logprobs(self.engine.policy, micro, chunks),
            lambda value: self.engine.total([value], largest=True)[0],
        )

    def _update(
        self, step: int, part: MiniBatch, rate: float, chunks: int, statistics: LastLayerStatistics | None
    ) -> dict[str, float]:
        """One optimizer step, or none. The loss is checked before it, so that no checkpoint holds broken weights."""
        sums = {k: torch.zeros((), device=self.engine.device) for k in SUMS + MAXIMA}
        with self._phase("forward_backward"):
            for i, m in enumerate(part.micro if part.moves or statistics is not None else ()):
                scores = (part.prox[i] if part.prox else None, part.reference[i] if part.reference else None)
                with torch.set_grad_enabled(part.moves):
                    loss = self._loss(m, scores, chunks, sums, statistics)
                if part.moves:
                    self.engine.backward(loss, last=i == len(part.micro) - 1)
            values = torch.stack([sums[k].double() for k in SUMS + MAXIMA]).tolist()  # waits for the device
        totals = self.engine.total(values[: len(SUMS)]) + self.engine.total(values[len(SUMS) :], largest=True)
        report = dict(zip(SUMS + MAXIMA, totals, strict=True))
        if not np.isfinite(report["loss"]):
            raise RunError(f"optimizer step {step}: the loss is {report['loss']}; nothing was updated")
        with self._phase("optimizer"):
            norm = self.engine.update(rate) if part.moves else 0.0
        if not np.isfinite(norm):
            raise RunError(
                f"optimizer step {step}: the gradient norm is {norm} and the weights are lost; resume from the last "
                f"checkpoint with a lower learner.lr"
            )
        return report | {"grad_norm": norm, "lr": rate}

    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        began = time.monotonic()
        with self._span(name):
            yield
        self._seconds[name] += time.monotonic() - began

    def _loss(
        self,
        m: MicroBatch,
        scores: tuple[Tensor | None, Tensor | None],
        chunks: int,
        sums: dict[str, Tensor],
        statistics: LastLayerStatistics | None,
    ) -> Tensor:
        """Forward pass and loss of one micro-batch; its metric sums are added to ``sums``."""
        row = self._tensor(m.row)
        statistics = statistics if m.tokens else None
        logprobs, entropy, hidden, residual = self._forward(
            self.engine.policy, m, chunks, statistics.residual if statistics is not None else None
        )
        inputs = LossInputs(
            logprobs=logprobs,
            behaviour=self._tensor(m.behaviour),
            prox=scores[0],
            reference=scores[1],
            advantages=self._tensor(m.advantage),
            weights=self._tensor(m.weight),
            row=row,
            rollouts=len(m.input_ids),
        )
        loss, micro_sums = policy_loss(inputs, self.config.algo)
        if statistics is not None:
            statistics.add(hidden, residual, row, m.lease_ids, m.correct)
        if m.tokens:
            for key, value in (micro_sums | {"entropy": entropy.sum()}).items():
                sums[key] = torch.maximum(sums[key], value) if key in MAXIMA else sums[key] + value
        return loss

    # -- from the batch to micro-batches -----------------------------------------------------------------

    def _mini_batches(self, batch: TrainingBatch, fetch: Fetch) -> list[MiniBatch]:
        config = self.config
        parts = mini_batches(batch, config.algo.mini_batches, config.learner.seed)
        plans = [plan_step(part, self.engine.ranks, config)[self.engine.rank] for part in parts]
        wanted = {
            part.groups[g].lease_id: part.groups[g]
            for part, plan in zip(parts, plans, strict=True)
            for rollouts in plan
            for g, _ in rollouts
        }
        payloads = fetch(list(wanted.values()))
        result = []
        for part, plan in zip(parts, plans, strict=True):
            rows = [
                [make_row(part.groups[g], payloads[part.groups[g].lease_id], slot) for g, slot in rollouts]
                for rollouts in plan
            ]
            moves = any(bool(moving(g, config.algo).any()) for g in part.groups)
            result.append(MiniBatch([collate(r) for r in rows], [one for r in rows for one in r], moves))
        return result

    def _score(self, parts: list[MiniBatch], chunks: int) -> None:
        """Log-probabilities before the first update: of the reference, and of theta itself (prox) where later updates
        move away from it."""
        algo = self.config.algo
        if self.reference is not None:
            for part in parts:
                part.reference = [self._logprobs(self.reference, m, chunks) for m in part.micro]
            if algo.kl_in_reward:
                self._put_kl_in_reward(parts)
        if algo.loss == "decoupled":
            # theta is prox in the first update: the first part needs no scores unless it is computed again
            for part in parts if algo.updates_per_batch > 1 else parts[1:]:
                if part.moves:
                    part.prox = [self._logprobs(self.engine.policy, m, chunks) for m in part.micro]

    def _put_kl_in_reward(self, parts: list[MiniBatch]) -> None:
        """Token-level advantages of REINFORCE++: reward-to-go of A minus KL, whitened over the global batch where the
        advantage is one that whitens."""
        algo = self.config.algo
        micro = [m for part in parts for m in part.micro]
        references = [reference for part in parts for reference in part.reference or []]
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
            moments = [float(sum(f(v) for v in real)) for f in (len, torch.sum, lambda v: (v**2).sum())]
            totals = torch.tensor(self.engine.total(moments), device=self.engine.device)
            values = [whitened(v, totals, algo.advantage_std_eps) for v in values]
        advantages = iter(values)
        for part in parts:
            part.micro = [replace(m, advantage=next(advantages).cpu().numpy()) for m in part.micro]

    # -- model calls and figures -------------------------------------------------------------------------

    def _forward(self, policy: Any, m: MicroBatch, chunks: int, residual: Any = None) -> Any:
        index = self._tensor(m.row * m.input_ids.shape[1] + m.position)
        temperature = self.config.rollout.temperature
        return policy(self._tensor(m.input_ids), index, self._tensor(m.target), temperature, chunks, residual)

    def _logprobs(self, policy: Any, m: MicroBatch, chunks: int) -> Tensor:
        """Log-probabilities [N] of a micro-batch without a gradient."""
        with torch.no_grad():
            return self._forward(policy, m, chunks)[0]

    def _tensor(self, array: np.ndarray) -> Tensor:
        return torch.as_tensor(array).to(self.engine.device)

    def _cost(self, batch: TrainingBatch, parts: list[MiniBatch], seconds: float) -> dict[str, float]:
        """Seconds, tokens and FLOPs of all ranks; the share of the batch's rollouts that was computed."""
        micro = [m for part in parts for m in part.micro]
        tokens, squares = self.engine.total([float(sum(m.tokens for m in micro)), sum(m.squares for m in micro)])
        updates = self.config.algo.updates_per_batch
        scores = (self.reference is not None) + (parts[-1].prox is not None)
        rollouts = sum(int(computed(g, self.config).sum()) for g in batch.groups)
        return {
            "seconds": seconds,
            "trained_tokens": float(sum(int(g.completion_tokens.sum()) for g in batch.groups)),
            "computed_tokens": tokens,
            "computed_share": rollouts / max(batch.rollouts, 1),
            "flops": self.size.flops(tokens, squares, updates=updates, scores=scores),
            "tokens_per_s": updates * tokens / seconds,
        }
