"""One small Ray per test module, with logical GPUs. Processes are made ready to find this checkout's packages."""

import os
from pathlib import Path

import pytest
import ray

from actors.cluster.connect import start_ray
from cures_ray.config import Config

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def ray_session():
    os.environ["PYTHONPATH"] = f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"
    assert start_ray(Config.model_validate({"ray": {"num_cpus": 4, "num_gpus": 2, "object_store_mb": 200}}))
    yield
    ray.shutdown()
