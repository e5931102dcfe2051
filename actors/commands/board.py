"""The Grafana board of a run: rows for curriculum, pipeline, learner, processes and vLLM, built with Grafana's SDK."""

from __future__ import annotations

from dataclasses import dataclass

from grafana_foundation_sdk.builders import dashboard, prometheus, timeseries
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.dashboard import DataSourceRef

UID, TITLE = "cures", "CurES on Ray"
SOURCE = DataSourceRef(type_val="prometheus", uid="${datasource}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Panel:
    """One picture. ``queries``: PromQL -> legend, with ``{{label}}`` for labels."""

    title: str
    unit: str = "short"
    queries: dict[str, str]


ROWS: dict[str, list[Panel]] = {
    "Is it learning": [
        Panel(
            title="Accuracy and reward",
            unit="percentunit",
            queries={
                "ray_cures_eval_greedy_accuracy": "held-out, greedy {{level}}",
                "ray_cures_rollout_reward": "training reward",
            },
        ),
        Panel(title="Entropy of the policy (nats a token)", queries={"ray_cures_learner_entropy": "entropy"}),
        Panel(title="Gradient norm", queries={"ray_cures_learner_grad_norm": "before clipping"}),
        Panel(
            title="Rollouts cut off at the length limit",
            unit="percentunit",
            queries={"ray_cures_rollout_truncated": "cut off"},
        ),
        Panel(title="Rollouts without a verdict", queries={"ray_cures_verifier_faults": "faults {{reason}}"}),
        Panel(
            title="Log-probability, learner against generator (nats)",
            queries={"ray_cures_learner_logprob_diff": "mean"},
        ),
    ],
    "Curriculum": [
        Panel(
            title="Believed accuracy of the prompts",
            unit="percentunit",
            queries={"ray_cures_belief_accuracy": "quantile {{quantile}}"},
        ),
        Panel(
            title="How the sampling concentrates",
            queries={
                "ray_cures_curriculum_tau": "temperature tau, large is uniform",
                "ray_cures_curriculum_ess_fraction": "effective sample size / prompts",
            },
        ),
        Panel(
            title="What a batch tells",
            unit="percentunit",
            queries={
                "ray_cures_curriculum_useful": "outcomes that the belief held less likely",
                "ray_cures_curriculum_zero_variance": "groups rewarded alike",
            },
        ),
        Panel(
            title="Skill of the belief's experts (nats)",
            queries={'ray_cures_belief{what=~"skill_.*"}': "{{what}}"},
        ),
        Panel(
            title="Rollouts a prompt",
            queries={"rate(ray_cures_n_by_lease_sum[1m]) / rate(ray_cures_n_by_lease_count[1m])": "mean of a lease"},
        ),
        Panel(
            title="Rollouts by end",
            queries={
                "ray_cures_accounting_planned": "planned",
                "ray_cures_accounting_trained": "trained",
                "ray_cures_accounting_in_flight": "in flight",
                "ray_cures_accounting_discarded": "discarded {{reason}}",
            },
        ),
    ],
    "Pipeline": [
        Panel(
            title="Where a step's time goes",
            unit="s",
            queries={
                "ray_cures_time_step_s": "step",
                "ray_cures_time_learner_idle_s": "learner waits for rollouts",
                "ray_cures_time_evaluation_s": "and for an evaluation",
                "ray_cures_time_publish_s": "weights are written",
                "ray_cures_learner_seconds": "optimizer step",
            },
        ),
        Panel(
            title="What generators wait for",
            unit="s",
            queries={
                "ray_cures_time_generator_wait_leases_s": "a lease",
                "ray_cures_time_generator_wait_weights_s": "weights",
            },
        ),
        Panel(
            title="The learner's phases",
            unit="s",
            queries={
                "ray_cures_learner_fetch_s": "fetch",
                "ray_cures_learner_forward_backward_s": "forward and backward",
                "ray_cures_learner_optimizer_s": "optimizer",
            },
        ),
        Panel(
            title="Weights to a generator",
            unit="s",
            queries={
                "ray_cures_weights_write_s": "write",
                "ray_cures_weights_fetch_s": "fetch",
                "ray_cures_weights_load_s": "load",
                "ray_cures_weights_prove_s": "prove",
            },
        ),
        Panel(
            title="Rollouts on their way",
            queries={
                "ray_cures_queue_generating": "generating",
                "ray_cures_queue_judging": "judging",
                "ray_cures_queue_judged": "judged, not trained",
            },
        ),
        Panel(
            title="Staleness (versions)",
            queries={
                "ray_cures_staleness_mean": "mean",
                "histogram_quantile(0.9, rate(ray_cures_staleness_bucket[1m]))": "nine of ten rollouts are below",
            },
        ),
        Panel(title="Tokens a second", queries={"ray_cures_rollout_tokens_per_s": "generated"}),
        Panel(title="Policy version of each generator", queries={"ray_cures_process_version": "{{name}}"}),
    ],
    "Processes": [
        Panel(title="CPU cores at work", queries={"rate(ray_cures_process_cpu_seconds[1m])": "{{name}}"}),
        Panel(title="Memory", unit="bytes", queries={"ray_cures_process_memory_bytes": "{{name}}"}),
        Panel(title="Event-loop lag", unit="s", queries={"ray_cures_process_event_loop_lag_seconds": "{{name}}"}),
        Panel(title="At work in each actor", queries={"ray_cures_process_in_flight": "{{name}}"}),
    ],
    "vLLM": [
        Panel(title="Requests running", queries={"ray_vllm_num_requests_running": "{{engine}}"}),
        Panel(title="Tokens a second", queries={"rate(ray_vllm_generation_tokens_total[1m])": "{{engine}}"}),
    ],
}


def board() -> str:
    """The board as JSON text for Grafana."""
    built = dashboard.Dashboard(TITLE).uid(UID).refresh("10s").time("now-30m", "now")
    built = built.with_variable(dashboard.DatasourceVariable("datasource").type("prometheus"))
    for title, panels in ROWS.items():
        built = built.with_row(dashboard.Row(title))
        for panel in panels:
            picture = timeseries.Panel().title(panel.title).unit(panel.unit).datasource(SOURCE).span(12).height(8)
            for letter, (query, legend) in zip("ABCDEF", panel.queries.items(), strict=False):
                picture = picture.with_target(prometheus.Dataquery().expr(query).legend_format(legend).ref_id(letter))
            built = built.with_panel(picture)
    return JSONEncoder(sort_keys=True, indent=1).encode(built.build())


def queries() -> list[str]:
    """Every query of the board."""
    return [query for panels in ROWS.values() for panel in panels for query in panel.queries]
