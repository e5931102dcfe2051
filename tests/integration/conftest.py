"""One small Ray a test module, with logical GPUs, and one base model for all."""

import os
from pathlib import Path

import pytest
import ray

from actors.cluster.connect import start_ray
from cures_ray.config import Config
from cures_ray.synthetic.base_model import main as prepare

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def ray_session():
    os.environ["PYTHONPATH"] = f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"
    assert start_ray(Config.model_validate({"ray": {"num_cpus": 4, "num_gpus": 2, "object_store_mb": 200}}))
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def base(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    arguments = ["--out", str(folder), "--seed", "0", "--prompts", "128", "--eval-prompts", "24", "--sft-steps", "60"]
    assert prepare(arguments) == 0
    return folder
