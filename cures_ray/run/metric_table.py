"""Every metric of a run: its unit and what it says. The page docs/metrics.md and the Prometheus names come from here.

A key is what ``metrics.jsonl``, TensorBoard and the trackers show. ``{reason}`` in a key stands for a value that
becomes a label in Prometheus: ``accounting/discarded_{reason}`` is ``cures_accounting_discarded{reason="stale"}``.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache


@dataclass(frozen=True, slots=True)
class Metric:
    key: str
    unit: str
    meaning: str

    @property
    def label(self) -> str | None:
        """What the part in braces is called."""
        found = re.search(r"\{(\w+)\}", self.key)
        return found.group(1) if found else None

    @property
    def prometheus(self) -> str:
        """The name without Ray's prefix ``ray_``."""
        return "cures_" + re.sub(r"[/_]?\{\w+\}", "", self.key).replace("/", "_")


def _group(prefix: str, *rows: tuple[str, str, str]) -> list[Metric]:
    return [Metric(f"{prefix}/{name}", unit, meaning) for name, unit, meaning in rows]


METRICS: list[Metric] = [
    *_group(
        "rollout",
        ("reward", "0 to 1", "mean reward of the step's rollouts. Not the accuracy: a curriculum draws harder prompts"),
        ("completion_tokens", "tokens", "mean length of a completion"),
        ("truncated", "share", "rollouts that ended at rollout.max_new_tokens"),
        ("tokens_per_s", "tokens/s", "generated, over the last 10 s, or the last step if that took longer"),
    ),
    *_group(
        "staleness",
        ("mean", "versions", "how far the oldest token of a trained rollout is behind the learner"),
        ("max", "versions", "the same, largest; never above async_rl.max_staleness for trained rollouts"),
    ),
    *_group(
        "queue",
        ("generating", "rollouts", "at the generators now"),
        ("judging", "rollouts", "at the verifiers now"),
        ("judged", "rollouts", "settled, not yet trained"),
    ),
    *_group(
        "accounting",
        ("planned", "rollouts", "all that were ever planned. planned = trained + discarded + in flight"),
        ("trained", "rollouts", "those that entered an optimizer step"),
        ("in_flight", "rollouts", "leased, generated or verified, not yet trained"),
        ("discarded", "rollouts", "those that ended without training; all of them are cost"),
        ("discarded_{reason}", "rollouts", "the same by reason"),
    ),
    *_group(
        "time",
        ("step_s", "s", "wall time of a step, with weight sync and checkpoint"),
        ("learner_idle_s", "s", "the learner waited for rollouts"),
        ("generator_idle_s", "s", "generators had no work, mean over generators; the next three add up to it"),
        ("generator_wait_leases_s", "s", "no lease: the run is as far ahead of the learner as max_staleness allows"),
        ("generator_wait_weights_s", "s", "weights were loaded and proven"),
        ("generator_wait_replacement_s", "s", "a lost generator was replaced"),
        ("evaluation_s", "s", "the next step waited for an evaluation of this version"),
        ("checkpoint_s", "s", "a checkpoint was written"),
        ("publish_s", "s", "the learner wrote its weights down"),
        ("weight_sync_s", "s", "from the end of the optimizer step to proven weights"),
        ("{phase}_s", "s", "other phases of a step"),
    ),
    *_group(
        "weights",
        ("canary_mean_error", "nats a token", "between generator and learner after an update; decides"),
        ("canary_max_error", "nats a token", "the same, largest"),
        ("paused_s", "s", "the engine computed nothing"),
        ("write_s", "s", "the learner wrote the weights"),
        ("reference_s", "s", "the learner computed the log-probabilities that the canary is compared with"),
        ("fetch_s", "s", "a generator fetched the weights while it went on"),
        ("load_s", "s", "a generator paused, loaded and resumed"),
        ("prove_s", "s", "a generator proved them by the canary"),
    ),
    *_group(
        "verifier",
        ("faults/{reason}", "rollouts", "rollouts without a verdict, by reason, since the start"),
        ("{what}", "s or share", "seconds of a verdict (mean, 99th percentile), share of time at work"),
    ),
    *_group("cpu", ("{role}_s", "CPU s", "CPU seconds of all processes of a role since the last step")),
    *_group(
        "learner",
        ("loss", "", "of the step; its size means little, its jumps do"),
        ("grad_norm", "", "before clipping"),
        ("lr", "", "learning rate"),
        ("entropy", "nats a token", "of the policy on the trained tokens; a fall to nothing ends exploration"),
        ("kl", "nats a token", "to the reference, where algo.kl_coef > 0"),
        ("clip_fraction", "share", "tokens whose ratio was clipped"),
        ("is_ratio_max", "", "largest ratio that the loss saw; its denominator depends on algo.loss"),
        ("logprob_diff", "nats", "mean distance of the learner's to the generator's log-probability of a token"),
        ("logprob_diff_max", "nats", "the same, largest"),
        ("seconds", "s", "of the optimizer step in all"),
        ("fetch_s", "s", "of it: fetching rollouts and packing them"),
        ("score_s", "s", "of it: log-probabilities before the update (reference, prox)"),
        ("forward_backward_s", "s", "of it: loss and gradient"),
        ("optimizer_s", "s", "of it: clipping and the optimizer"),
        ("computed_share", "share", "trained rollouts that the learner computed; thinning leaves out the others"),
        ("skipped", "0 or 1", "no optimizer step: nothing to learn in the batch"),
        ("{what}", "", "other statistics of the optimizer step"),
    ),
    *_group(
        "curriculum",
        ("tau", "", "temperature of the sampling; large is uniform"),
        ("ess_fraction", "share", "effective sample size of the sampling over the number of prompts"),
        (
            "useful",
            "share",
            "rollouts whose outcome the belief held less likely; 0.5 for coin tosses, 0 if all is known",
        ),
        ("fault_fraction", "share", "rollouts without a verdict"),
        (
            "zero_variance",
            "share",
            "groups of two or more rollouts that were all rewarded alike",
        ),
        ("leases", "leases", "in the batch"),
        ("max_n", "rollouts", "most rollouts of one lease"),
        ("min_n", "rollouts", "fewest rollouts of one lease"),
        ("seconds", "s", "spent in curriculum code"),
        ("{what}", "", "other figures of the draw"),
    ),
    *_group("belief", ("{what}", "", "experts of the belief: weight, skill and log-loss in nats, calibration error")),
    *_group(
        "eval",
        ("version", "", "the policy version that answered"),
        ("greedy_accuracy", "0 to 1", "held-out accuracy without sampling"),
        ("greedy_low", "0 to 1", "lower end of its 95 % interval over prompts"),
        ("greedy_high", "0 to 1", "upper end"),
        ("greedy_faults", "answers", "without a verdict; they count as not solved"),
        ("truncated", "share", "greedy answers that ended at rollout.max_new_tokens"),
        ("completion_tokens", "tokens", "mean length of the greedy answers"),
        ("version_min", "", "oldest weights that gave a token; equal to version_max where one version answered"),
        ("version_max", "", "newest weights that gave a token"),
        ("greedy_accuracy/level_{level}", "0 to 1", "the same by level"),
        ("sampled_accuracy", "0 to 1", "held-out, mean of k samples at the training temperature"),
        ("sampled_accuracy/level_{level}", "0 to 1", "the same by level"),
        ("best_constant_accuracy", "0 to 1", "what answering every prompt alike would get"),
        ("{what}", "", "other figures of an evaluation"),
    ),
    *_group(
        "process",
        ("cpu_seconds", "CPU s", "of one actor's process, since its start"),
        ("memory_bytes", "bytes", "resident memory of one actor's process"),
        ("event_loop_lag_seconds", "s", "how late the actor's event loop runs what is due"),
        ("queue", "items", "waiting in an actor"),
        ("in_flight", "items", "at work in an actor"),
        ("version", "", "policy version that a generator holds"),
    ),
]


PROMETHEUS_ONLY = [  # made from the histograms of a run
    Metric("belief_accuracy_{quantile}", "0 to 1", "believed accuracy of the prompts, quantiles"),
    Metric(
        "staleness", "versions", "histogram: how far the oldest token of each trained rollout is behind the learner"
    ),
    Metric("n_by_lease", "rollouts", "histogram: rollouts of each lease"),
]


@cache
def metric_of(key: str) -> tuple[Metric, str] | None:
    """The metric that ``key`` belongs to, and the value of its label; None for an unknown key. Exact keys win."""
    for metric in METRICS:
        if metric.key == key:
            return metric, ""
    for metric in METRICS:
        pattern = re.sub(r"\\\{\w+\\\}", "(.+)", re.escape(metric.key))
        if metric.label and (found := re.fullmatch(pattern, key)):
            return metric, found.group(1)
    return None


def labels(prometheus: str) -> tuple[str, ...]:
    """Of all metrics that share this name in Prometheus: ``accounting/discarded`` and its parts by reason."""
    return tuple(m.label for m in [*METRICS, *PROMETHEUS_ONLY] if m.prometheus == prometheus and m.label)


def page() -> str:
    """docs/metrics.md."""
    parts = [
        "# Metrics",
        "",
        "What `metrics.jsonl`, TensorBoard and the trackers show, and the names in Prometheus (Ray adds `ray_`).",
        "Written by `python -m cures_ray.run.metric_table`. What healthy values look like:",
        "[Is my run healthy?](health.md)",
    ]
    for prefix in dict.fromkeys(m.key.partition("/")[0] for m in METRICS):
        parts += ["", f"## {prefix}", "", "| metric | Prometheus | unit | what it says |", "| --- | --- | --- | --- |"]
        for m in METRICS:
            if m.key.startswith(f"{prefix}/"):
                label = f"{{{m.label}}}" if m.label else ""
                parts.append(f"| `{m.key}` | `{m.prometheus}{label}` | {m.unit or '–'} | {m.meaning} |")
    parts += ["", "## In Prometheus alone", "", "| Prometheus | unit | what it says |", "| --- | --- | --- |"]
    for m in PROMETHEUS_ONLY:
        label = f"{{{m.label}}}" if m.label else ""
        parts.append(f"| `{m.prometheus}{label}` | {m.unit} | {m.meaning} |")
    return "\n".join(parts) + "\n"


if __name__ == "__main__":
    from pathlib import Path

    Path("docs/metrics.md").write_text(page())
