"""Is this run healthy? Rules over ``metrics.jsonl`` that name what is wrong, why it matters, and what to do.

``cures top`` and ``cures report`` show the same findings; docs/health.md explains them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

WINDOW = 20  # steps that "lately" means
ENOUGH = 10  # steps before a trend is judged

Records = Sequence[dict[str, float]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing that a rule found."""

    level: str  # "bad" | "watch"
    what: str  # with its numbers
    do: str


Rule = Callable[[Records, Records], Finding | None]  # of steps and all records


def read_records(run_dir: Path) -> list[dict[str, float]]:
    """The lines of ``metrics.jsonl`` that belong to a step; a torn last line is left out."""
    path, records = run_dir / "metrics.jsonl", []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if "step" in record:
            records.append(record)
    return records


def read_notes(run_dir: Path) -> list[str]:
    """What the run said in words: lost workers, warnings, changed settings."""
    path = run_dir / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line)["note"] for line in lines if line.startswith("{") and '"note"' in line and line[-1] == "}"]


def diagnose(records: Records) -> list[Finding]:
    """Findings of all rules, the bad ones first; empty for a healthy run."""
    steps = [r for r in records if "rollout/reward" in r]
    found = [finding for rule in RULES if (finding := rule(steps, records)) is not None] if steps else []
    return sorted(found, key=lambda f: f.level != "bad")


def verdict(findings: Sequence[Finding]) -> str:
    """One word for the top of a page."""
    if any(f.level == "bad" for f in findings):
        return "unhealthy"
    return "look at it" if findings else "healthy"


def series(records: Records, name: str) -> np.ndarray:
    """Values of one metric in step order, float64; steps without it are left out."""
    return np.array([r[name] for r in records if name in r and np.isfinite(r[name])], np.float64)


def lately(records: Records, name: str) -> float | None:
    """Mean over the last steps; None without a value."""
    values = series(records, name)[-WINDOW:]
    return float(values.mean()) if len(values) else None


# -- rules: (steps, all records) -> a finding or None --------------------------------------------------


def _reward_flat(steps: Records, _: Records) -> Finding | None:
    reward = series(steps, "rollout/reward")
    if len(reward) < 3 * ENOUGH:
        return None
    third = len(reward) // 3
    first, last = reward[:third], reward[-third:]
    noise = float(np.sqrt(first.var(ddof=1) / third + last.var(ddof=1) / third))
    if last.mean() > first.mean() + 2 * noise or first.mean() > 0.9:
        return None
    return Finding(
        level="watch",
        what=f"the training reward does not rise: {first.mean():.3f} in the first third, {last.mean():.3f} now",
        do="compare held-out accuracy; the sampled prompts get harder as the model learns. If it is flat too: raise "
        "learner.lr, or read samples.jsonl for what goes wrong",
    )


def _entropy_collapse(steps: Records, _: Records) -> Finding | None:
    entropy = series(steps, "learner/entropy")
    if len(entropy) < 2 * ENOUGH:
        return None
    start, now = float(entropy[:5].mean()), float(entropy[-5:].mean())
    if start <= 0 or now > 0.2 * start:
        return None
    rising = _reward_flat(steps, steps) is None
    return Finding(
        level="watch" if rising else "bad",
        what=f"the policy's entropy fell to {now / start:.0%} of its start ({start:.3f} to {now:.3f} nats a token)",
        do="normal when accuracy nears 1. Else lower learner.lr, or raise algo.clip_eps_high or rollout.temperature",
    )


def _nothing_to_learn(steps: Records, _: Records) -> Finding | None:
    recent = steps[-WINDOW:]
    idle = sum(r.get("learner/skipped", 0.0) > 0 or r.get("learner/computed_share", 1.0) == 0.0 for r in recent)
    if idle <= 0.3 * len(recent):
        return None
    reward = float(series(recent, "rollout/reward").mean())
    return Finding(
        level="bad",
        what=f"{idle} of the last {len(recent)} batches held nothing to learn (mean reward {reward:.2f})",
        do="the prompts are too hard or too easy, or verifier.fn expects another form of answer: read samples.jsonl",
    )


def _waiting(steps: Records, _: Records) -> Finding | None:
    step = lately(steps, "time/step_s")
    shares = {name: (lately(steps, f"time/{name}_idle_s") or 0.0) / step for name in ("learner", "generator") if step}
    name = max(shares, key=lambda k: shares[k], default="")
    if not name or shares[name] < 0.5:
        return None
    busy, remedy = {
        "learner": ("generators", "more generators (rollout.num_generators), or async_rl.max_staleness >= 1"),
        "generator": ("learner", "more learner ranks or threads (learner.num_ranks, learner.cpus_per_rank)"),
    }[name]
    waits = "learner waits" if name == "learner" else "generators wait"
    return Finding(
        level="watch",
        what=f"the {waits} {shares[name]:.0%} of a step for the {busy}",
        do=f"{remedy}; algo.train_cost: measured spends less where it is scarce",
    )


def _wasted(steps: Records, _: Records) -> Finding | None:
    planned = max(steps[-1].get("accounting/planned", 0.0), 1.0)
    reasons = {"stale": "lower async_rl.max_staleness or add generators", "lost": "see the notes: which worker dies?"}
    for reason, remedy in reasons.items():
        share = steps[-1].get(f"accounting/discarded_{reason}", 0.0) / planned
        if share > 0.05:
            return Finding(level="watch", what=f"{share:.0%} of all rollouts ended as {reason}", do=remedy)
    return None


def _held_out_falls(_: Records, records: Records) -> Finding | None:
    held_out = series(records, "eval/greedy_accuracy")
    if len(held_out) < 4 or held_out[-1] > held_out.max() - 0.05:
        return None
    best = int(held_out.argmax())
    return Finding(
        level="bad",
        what=f"held-out accuracy fell from {held_out[best]:.3f} to {held_out[-1]:.3f}",
        do="lower learner.lr, or stop at an earlier checkpoint. If the reward still rises, it is being gamed: read "
        "samples.jsonl",
    )


def _only_a_constant(_: Records, records: Records) -> Finding | None:
    accuracy, constant = series(records, "eval/greedy_accuracy"), series(records, "eval/best_constant_accuracy")
    if len(accuracy) < 2 or not len(constant) or accuracy[-1] > constant[-1] + 0.02 or accuracy[-1] < 0.2:
        return None
    return Finding(
        level="watch",
        what=f"held-out accuracy {accuracy[-1]:.3f} is what one constant answer gets ({constant[-1]:.3f})",
        do="balance the answers of the data set, or report accuracy by task",
    )


def _gradient_spike(steps: Records, _: Records) -> Finding | None:
    norms = series(steps, "learner/grad_norm")[-3 * WINDOW :]
    if len(norms) < ENOUGH or norms[-1] < 10 * max(float(np.median(norms)), 1e-12):
        return None
    return Finding(
        level="watch",
        what=f"the gradient norm jumped to {norms[-1]:.3g} (median {np.median(norms):.3g})",
        do="one spike is clipped by learner.max_grad_norm; if they repeat, lower learner.lr",
    )


def _too_high(
    metric: str, watch: float, bad: float, what: str, do: str
) -> Callable[[Records, Records], Finding | None]:
    """The rule that the mean of ``metric`` over the last steps stays below ``watch``; above ``bad`` it is bad."""

    def rule(steps: Records, _: Records) -> Finding | None:
        value = lately(steps, metric)
        if value is None or value < watch:
            return None
        return Finding(level="bad" if value > bad else "watch", what=what.format(value), do=do)

    return rule


_faults = _too_high(
    "curriculum/fault_fraction",
    watch=0.01,
    bad=0.1,
    what="{:.1%} of the latest rollouts have no verdict (faults)",
    do="read the first exceptions in the log and summary; raise verifier.timeout_s if they are timeouts",
)
_truncated = _too_high(
    "rollout/truncated",
    watch=0.2,
    bad=0.6,
    what="{:.0%} of the rollouts end at rollout.max_new_tokens",
    do="raise rollout.max_new_tokens, or set algo.overlong_penalty_tokens",
)
_engine_mismatch = _too_high(
    "learner/max_ratio",
    watch=20.0,
    bad=float("inf"),
    what="generator and learner disagree by a factor of {:.0f} on some token",
    do="set rollout.dtype and learner.dtype to float32 to see whether it is rounding; keep algo.is_correction: tis",
)

RULES: list[Rule] = [
    _nothing_to_learn,
    _faults,
    _held_out_falls,
    _entropy_collapse,
    _truncated,
    _only_a_constant,
    _reward_flat,
    _waiting,
    _wasted,
    _engine_mismatch,
    _gradient_spike,
]
