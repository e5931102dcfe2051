"""What a run leaves behind, as ``summary.json`` holds it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cures_ray.messages import Accounting


@dataclass(slots=True, kw_only=True)
class RunSummary:
    """What a run leaves behind; ``summary.json`` holds the same fields."""

    accounting: Accounting
    evaluations: list[tuple[int, dict[str, float]]] = field(default_factory=list)
    seconds_start: float = 0.0  # Ray, placement, engines
    seconds_training: float = 0.0
    run_dir: Path = Path()
    exported: Path | None = None
    seed: int = 0
    interrupted_at: int | None = None  # the step before which SIGINT or SIGTERM ended the run
    steps: int = 0
    cpu_seconds: dict[str, float] = field(default_factory=dict)  # by role, of training
    verifier_faults: dict[str, int] = field(default_factory=dict)  # verdicts that were faults, by reason

    def as_json(self) -> dict[str, Any]:
        first, last = (self.evaluations[0][1], self.evaluations[-1][1]) if self.evaluations else ({}, {})
        if len(self.evaluations) == 1:  # not a before and an after
            first, last = (first, {}) if self.evaluations[0][0] == 0 else ({}, last)
        prefix, constant = "eval/greedy_accuracy/level_", "eval/best_constant_accuracy"
        return {
            "held_out_accuracy_before": first.get("eval/greedy_accuracy"),
            "held_out_accuracy_after": last.get("eval/greedy_accuracy"),
            "best_constant_accuracy": last.get(constant),
            "by_level": {
                k.removeprefix(prefix): {
                    "before": first.get(k),
                    "after": last[k],
                    "best_constant": last.get(f"{constant}/level_{k.removeprefix(prefix)}"),
                }
                for k in sorted(last)
                if k.startswith(prefix)
            },
            "planned": self.accounting.planned,
            "trained": self.accounting.trained,
            "discarded": {k.value: v for k, v in self.accounting.discarded.items()},
            "in_flight": self.accounting.in_flight,
            "seconds_start": round(self.seconds_start, 1),
            "seconds_training": round(self.seconds_training, 1),
            "cpu_seconds": {role: round(seconds, 1) for role, seconds in self.cpu_seconds.items()},
            "verifier_faults": self.verifier_faults,
            "seed": self.seed,
            "interrupted_at": self.interrupted_at,
            "exported_model": str(self.exported) if self.exported else None,
            "evaluations": [{"version": v, **m} for v, m in self.evaluations],
        }
