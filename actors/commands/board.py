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
    ],
    "Curriculum": [
        Panel(
            title="Believed accuracy of the prompts",
            unit="percentunit",
            queries={"ray_cures_belief_accuracy": "quantile {{quantile}}"},
        ),
        Panel(
            title="Effective sample size / prompts",
            unit="percentunit",
            queries={"ray_cures_curriculum_ess_fraction": "of the sampling"},
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
                "ray_cures_time_learner_idle_s": "learner waits",
                "ray_cures_time_generator_idle_s": "generators wait",
                "ray_cures_time_weight_sync_s": "weight sync",
            },
        ),
        Panel(
            title="Staleness (versions)", queries={"ray_cures_staleness_mean": "mean", "ray_cures_staleness_max": "max"}
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
