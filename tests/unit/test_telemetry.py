"""What Ray's metrics and the figures of a step say, and why a generator waits."""

import asyncio
import time
from typing import ClassVar

import numpy as np
import pytest

from actors import telemetry
from actors.commands.board import queries
from cures_ray.config import Config
from cures_ray.loop.slots import Slot
from cures_ray.run.metric_table import METRICS, labels


class Gauge:
    """Keeps what is set, and refuses labels that it was not made for: Prometheus would lose them."""

    made: ClassVar[dict[str, "Gauge"]] = {}

    def __init__(self, name, description="", boundaries=(), tag_keys=()):
        self.made[name], self.keys, self.told, self.seen = self, set(tag_keys), description, []

    def set(self, value, tags):
        assert set(tags) == self.keys
        self.seen.append((tags, value))

    observe = set


@pytest.fixture
def gauges(monkeypatch):
    monkeypatch.setattr(telemetry, "Gauge", Gauge)
    monkeypatch.setattr(telemetry, "Histogram", Gauge)
    Gauge.made = {}
    return Gauge.made


def test_a_steered_quantity_moves_in_prometheus_when_it_moves_in_the_run(gauges):
    run = telemetry.RunGauges("run")
    for step, value in enumerate([0.5, 0.7]):
        run.step(step, {"curriculum/ess_fraction": value}, {})
    assert [value for _, value in gauges["cures_curriculum_ess_fraction"].seen] == [0.5, 0.7]
    assert gauges["cures_curriculum_ess_fraction"].told.endswith("(share)")


def test_a_sum_and_its_parts_share_a_name_with_the_same_labels(gauges):
    run = telemetry.RunGauges("run")
    run.step(1, {"accounting/discarded": 3.0, "accounting/discarded_stale": 2.0, "verifier/faults/timeout": 1.0}, {})
    assert gauges["cures_accounting_discarded"].seen == [
        ({"run": "run", "reason": ""}, 3.0),
        ({"run": "run", "reason": "stale"}, 2.0),
    ]
    assert gauges["cures_verifier_faults"].seen == [({"run": "run", "reason": "timeout"}, 1.0)]


def test_histograms_of_the_run_are_exported(gauges):
    histograms = {"staleness": np.array([0.0, 1.0]), "n_by_lease": np.array([4.0]), "belief_mean": np.array([0.2, 0.4])}
    telemetry.RunGauges("run").step(1, {}, histograms)
    assert [round(value, 6) for _, value in gauges["cures_staleness"].seen] == [0.0, 1.0]
    assert len(gauges["cures_n_by_lease"].seen) == 1
    assert [tags["quantile"] for tags, _ in gauges["cures_belief_accuracy"].seen] == ["0.1", "0.5", "0.9"]


def test_a_process_is_labelled_with_run_role_and_name(gauges):
    config = Config.model_validate({"model": {"path": "m"}, "data": {"train": "t"}, "checkpoint": {"dir": "runs/mine"}})
    telemetry.ProcessGauges(config, "generator", "generator-1", lambda: {"version": 4}).report(0.25)
    tags = {"run": "mine", "role": "generator", "name": "generator-1"}
    assert gauges["cures_process_version"].seen == [(tags, 4.0)]
    assert gauges["cures_process_event_loop_lag_seconds"].seen == [(tags, 0.25)]
    assert gauges["cures_process_cpu_seconds"].seen[0][1] > 0


def test_metrics_that_share_a_name_in_prometheus_share_a_unit():
    units: dict[str, set[str]] = {}
    for metric in METRICS:
        units.setdefault(metric.prometheus, set()).add(metric.unit)
    assert {name: found for name, found in units.items() if len(found) > 1} == {}
    assert labels("cures_accounting_discarded") == ("reason",)


def test_the_board_shows_waits_by_cause_and_phases_of_learner_and_weights():
    asked = " ".join(queries())
    for name in ("generator_wait_leases", "generator_wait_weights", "learner_fetch", "weights_load", "queue_judging"):
        assert name in asked


def test_an_idle_generator_says_what_it_waits_for(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    slot = Slot(generator=None)
    slot.track_idle()
    now[0] += 2.0
    slot.loading = True
    slot.track_idle()
    now[0] += 3.0
    slot.loading, slot.lost = False, "died"
    slot.track_idle()
    now[0] += 5.0
    assert slot.take_idle() == {"leases": 2.0, "weights": 3.0, "replacement": 5.0}
    slot.lost, slot.in_flight = "", {(0, 0): (1, now[0])}
    slot.track_idle()
    now[0] += 7.0
    assert sum(slot.take_idle().values()) == 0.0


async def test_seconds_of_phases_add_up_until_they_are_taken():
    phases = telemetry.Phases()
    for _ in range(2):
        with phases("load"):
            await asyncio.sleep(0.01)
    taken = phases.take()
    assert 0.02 <= taken["load"] < 1.0 and phases.take() == {}
