"""Trackers without their packages: a fake module at the seam that each backend takes its module from."""

from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest
from fakes import small_config

from cures_ray.messages import ConfigError
from cures_ray.run.trackers import MLflow, WeightsAndBiases, check


class FakeWandb:
    """What wandb.init was asked for, and what was logged."""

    def __init__(self) -> None:
        self.asked: list[dict] = []
        self.records: list[dict] = []
        self.finished = 0

    def init(self, **asked):
        self.asked.append(asked)
        return SimpleNamespace(log=self.records.append, finish=self._finish, define_metric=lambda *a, **k: None)

    def Histogram(self, values):
        return ("histogram", len(values))

    def Table(self, columns, data):
        return columns, data

    def _finish(self) -> None:
        self.finished += 1


def test_a_resumed_run_continues_its_wandb_run_even_where_its_steps_go_back(tmp_path):
    module = FakeWandb()
    for step in (5, 3):  # the second from an older checkpoint
        sink = WeightsAndBiases(module, small_config(), tmp_path)
        sink.step(step, {"rollout/reward": np.float32(0.5)}, {"belief_mean": np.ones(4), "empty": np.zeros(0)})
        sink.close()
    first, second = module.asked
    assert first["id"] == second["id"] == (tmp_path / "wandb_run_id").read_text() and second["resume"] == "allow"
    assert first["dir"] == str(tmp_path) and first["config"]["trainer"]["seed"] == small_config().trainer.seed
    assert [r["step"] for r in module.records] == [5, 3] and module.finished == 2
    assert module.records[0]["belief_mean"] == ("histogram", 4) and "empty" not in module.records[0]


def test_trained_rollouts_are_a_table_in_wandb(tmp_path):
    module = FakeWandb()
    sink = WeightsAndBiases(module, small_config(), tmp_path)
    sink.rollouts(2, [{"prompt": "1 + 1", "reward": 1.0}, {"prompt": "2 + 2", "reward": 0.0}])
    sink.rollouts(3, [])
    assert module.records == [{"rollouts": (["prompt", "reward"], [["1 + 1", 1.0], ["2 + 2", 0.0]]), "step": 2}]


class FakeMlflowClient:
    calls: ClassVar[list[tuple]] = []

    def __init__(self, address: str) -> None:
        self.address = address

    def get_experiment_by_name(self, name):
        return None

    def create_experiment(self, name):
        return "1"

    def create_run(self, experiment, run_name):
        self.calls.append(("create", experiment, run_name))
        return SimpleNamespace(info=SimpleNamespace(run_id="abc"))

    def log_batch(self, run, metrics):
        self.calls.append(("log", run, metrics))

    def __getattr__(self, name):
        return lambda *arguments, **named: self.calls.append((name, *arguments))


def test_a_resumed_run_continues_its_mlflow_run_on_files_in_the_run_folder(tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setattr(FakeMlflowClient, "calls", [])
    module = SimpleNamespace(
        MlflowClient=FakeMlflowClient, entities=SimpleNamespace(Metric=lambda *values: values), Experiment=None
    )
    for step in (1, 2):
        sink = MLflow(module, small_config(), tmp_path)
        sink.step(step, {"rollout/reward": 0.5, "curriculum/tau": float("inf")}, {})
        sink.close()
    calls = FakeMlflowClient.calls
    assert sink._client.address == (tmp_path / "mlruns").as_uri()
    assert [c[0] for c in calls].count("create") == 1 and [c[0] for c in calls].count("set_terminated") == 2
    logged = [c for c in calls if c[0] == "log"]
    assert [(run, [(m[0], m[1], m[3]) for m in metrics]) for _, run, metrics in logged] == [
        ("abc", [("rollout/reward", 0.5, 1)]),
        ("abc", [("rollout/reward", 0.5, 2)]),
    ]


@pytest.mark.parametrize("name", ["wandb", "mlflow", "trackio"])
def test_a_tracker_that_is_missing_is_refused_with_the_way_out(name, monkeypatch):
    monkeypatch.setattr("cures_ray.run.trackers.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=f"logging.{name} = true"):
        check(small_config(logging={name: True}))
    check(small_config())
