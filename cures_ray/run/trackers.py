"""Experiment trackers as thin sinks: Weights & Biases and MLflow. A resumed run continues its record.

The tracker's run id is kept in the run folder: ``wandb_run_id``, ``mlflow_run_id``. Both work without a network:
``WANDB_MODE=offline`` keeps W&B's files in RUN/wandb (``wandb sync`` sends them later); MLflow writes into RUN/mlruns
unless MLFLOW_TRACKING_URI names a server.
"""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Iterator, Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from cures_ray.config import Config
from cures_ray.messages import ConfigError

PROJECT = "cures-ray"
Metrics = dict[str, float]


def check(config: Config) -> None:
    """Raises ConfigError: a tracker is asked for that is not installed, or not supported."""
    for name, package in (("wandb", "wandb"), ("mlflow", "mlflow-skinny")):
        if getattr(config.logging, name) and find_spec(name) is None:
            raise ConfigError(
                f"logging.{name} = true, but {name} is not installed: pip install {package}, or set it to false"
            )
    if config.logging.trackio:
        raise ConfigError(
            "logging.trackio = true is not supported: Trackio brings a web server and Gradio's client. Use "
            "logging.wandb with WANDB_MODE=offline, or logging.mlflow; both keep files in the run folder"
        )


def trackers(config: Config, run_dir: Path) -> Iterator[WeightsAndBiases | MLflow]:
    """Those that ``config`` asks for."""
    if config.logging.wandb:
        yield WeightsAndBiases(import_module("wandb"), config, run_dir)
    if config.logging.mlflow:
        yield MLflow(import_module("mlflow"), config, run_dir)


class WeightsAndBiases:
    """``module``: wandb. The step is a column of its own, because W&B drops records whose own step goes back, as a
    resumed run's does."""

    def __init__(self, module: Any, config: Config, run_dir: Path) -> None:
        name = _kept(run_dir / "wandb_run_id", lambda: uuid.uuid4().hex[:8])
        self._wandb = module
        self._run = module.init(
            project=PROJECT, name=run_dir.name, dir=str(run_dir), id=name, resume="allow", config=config.model_dump()
        )
        self._run.define_metric("*", step_metric="step")

    def step(self, step: int, metrics: Metrics, histograms: dict[str, np.ndarray]) -> None:
        pictures = {name: self._wandb.Histogram(values) for name, values in histograms.items() if len(values)}
        self._run.log({k: float(v) for k, v in metrics.items()} | pictures | {"step": step})

    def rollouts(self, step: int, rows: Sequence[dict[str, Any]]) -> None:
        """``rows``: rollouts that were trained, all with the same columns."""
        if rows:
            columns = list(rows[0])
            table = self._wandb.Table(columns=columns, data=[[row[name] for name in columns] for row in rows])
            self._run.log({"rollouts": table, "step": step})

    def note(self, text: str) -> None:
        return None

    def close(self) -> None:
        self._run.finish()


class MLflow:
    """``module``: mlflow, of which the skinny package is enough."""

    def __init__(self, module: Any, config: Config, run_dir: Path) -> None:
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # MLflow 3 refuses folders otherwise
        address = os.environ.get("MLFLOW_TRACKING_URI") or (run_dir / "mlruns").absolute().as_uri()
        self._client, self._metric = module.MlflowClient(address), module.entities.Metric
        self._run = _kept(run_dir / "mlflow_run_id", lambda: self._create(run_dir.name))
        self._client.update_run(self._run, status="RUNNING")
        for section, values in config.model_dump(mode="json").items():
            for key, value in values.items():
                self._client.set_tag(self._run, f"{section}.{key}", str(value)[:500])  # a parameter may not change

    def step(self, step: int, metrics: Metrics, histograms: dict[str, np.ndarray]) -> None:
        now = int(time.time() * 1000)
        finite = {k: float(v) for k, v in metrics.items() if np.isfinite(v)}
        self._client.log_batch(self._run, metrics=[self._metric(k, v, now, step) for k, v in finite.items()])

    def note(self, text: str) -> None:
        return None

    def close(self) -> None:
        self._client.set_terminated(self._run)

    def _create(self, name: str) -> str:
        found = self._client.get_experiment_by_name(PROJECT)
        experiment = found.experiment_id if found else self._client.create_experiment(PROJECT)
        return str(self._client.create_run(experiment, run_name=name).info.run_id)


def _kept(path: Path, make: Any) -> str:
    """The text in ``path``, made once."""
    if not path.exists():
        path.write_text(make())
    return path.read_text().strip()
