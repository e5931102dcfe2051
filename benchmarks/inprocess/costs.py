"""What a run has spent, counted per component while it runs. Evaluation is kept apart: it is no cost of training."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from cures_ray.messages import Accounting

DEVICE = "CURES_BENCH_DEVICE"  # environment variable: cpu (default), cuda, cuda:1, ...


def device() -> str:
    """Where the engine in process computes."""
    return os.environ.get(DEVICE, "cpu")


@dataclass(slots=True)
class Costs:
    """Running totals. ``mark`` keeps a copy per policy version: the price at which that version was reached.

    ``rollouts`` in a mark is everything *planned* so far: pilots, screens, discarded, stale and retried rollouts,
    and those in flight.
    """

    generated_tokens: int = 0  # completion tokens of leased rollouts, trained or not
    prompt_tokens: int = 0  # prefill, once a lease: engines share the prefix of its rollouts
    generation_flops: float = 0.0
    trained_tokens: float = 0.0  # completion tokens of the rollouts that entered an optimizer step
    computed_tokens: float = 0.0  # prompt + completion tokens that the learner really computed
    learner_flops: float = 0.0
    optimizer_steps: int = 0  # updates of the weights; batches with nothing to train are not counted
    seconds: dict[str, float] = field(
        default_factory=dict
    )  # by component; CPU seconds on a CPU (it may be shared), else wall
    marks: list[dict[str, float]] = field(default_factory=list)

    @contextmanager
    def timed(self, component: str) -> Iterator[None]:
        clock = time.process_time if device() == "cpu" else time.perf_counter
        began = clock()
        try:
            yield
        finally:
            self.seconds[component] = self.seconds.get(component, 0.0) + clock() - began

    def generated(self, parameters: int, prompt_tokens: int, completion_tokens: int) -> None:
        """Forward passes cost 2 x parameters FLOPs a token."""
        self.prompt_tokens += prompt_tokens
        self.generated_tokens += completion_tokens
        self.generation_flops += 2.0 * parameters * (prompt_tokens + completion_tokens)

    def trained(self, metrics: dict[str, float]) -> None:
        self.trained_tokens += metrics.get("trained_tokens", 0.0)
        self.computed_tokens += metrics.get("computed_tokens", 0.0)
        self.learner_flops += metrics.get("flops", 0.0)
        self.prompt_tokens += int(metrics.get("drift_tokens", 0.0))  # of SPO: a forward pass, like a prefill
        self.optimizer_steps += int(metrics.get("updates", 0.0))

    def mark(self, version: int, accounting: Accounting) -> None:
        self.marks.append(
            {
                "version": float(version),
                "rollouts": float(accounting.planned),
                "in_flight": float(accounting.in_flight),
                "trained_rollouts": float(accounting.trained),
                "generated_tokens": float(self.generated_tokens),
                "prompt_tokens": float(self.prompt_tokens),
                "tokens": float(self.prompt_tokens + self.generated_tokens),
                "generation_flops": self.generation_flops,
                "trained_tokens": self.trained_tokens,
                "computed_tokens": self.computed_tokens,
                "learner_flops": self.learner_flops,
                "optimizer_steps": float(self.optimizer_steps),
                "seconds": sum(v for k, v in self.seconds.items() if k != "evaluation"),
            }
        )
