"""One small Ray per test module, with logical GPUs. Processes are made ready to find this checkout's packages."""

import os
from pathlib import Path

import pytest
import ray

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def ray_session():
    ray.init(
        num_cpus=4,
        num_gpus=2,  # logical: this host may have none
        include_dashboard=False,
        object_store_memory=200 << 20,
        log_to_driver=False,
        logging_level="ERROR",
        runtime_env={
            "env_vars": {"PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}", "PYTHONWARNINGS": "ignore"}
        },
    )
    yield
    ray.shutdown()
