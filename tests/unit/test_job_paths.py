"""Relative paths in a Ray job, and the paths that `cures submit` makes absolute."""

from pathlib import Path

import pytest

from actors.commands.submit import submit
from cures_ray.config import Config
from cures_ray.config_load import load_config
from cures_ray.messages import ConfigError
from cures_ray.run.paths import JOB_VARIABLE, absolute_paths, check_job_paths, in_ray_job


def config(**sections) -> Config:
    tree = {"model": {"path": "Qwen/Qwen2.5-Math-7B"}, "data": {"train": "AI-MO/NuminaMath-1.5"}}
    return Config.model_validate(tree | sections)


@pytest.fixture
def in_job(monkeypatch, tmp_path):
    monkeypatch.setenv(JOB_VARIABLE, "{}")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_outside_a_job_relative_paths_are_fine(monkeypatch):
    monkeypatch.delenv(JOB_VARIABLE, raising=False)
    assert not in_ray_job()
    check_job_paths(config(checkpoint={"dir": "runs/x"}))


def test_a_job_knows_itself_by_its_folder_too(monkeypatch, tmp_path):
    monkeypatch.delenv(JOB_VARIABLE, raising=False)
    folder = tmp_path / "runtime_resources" / "working_dir_files" / "_ray_pkg_1"
    folder.mkdir(parents=True)
    monkeypatch.chdir(folder)
    assert in_ray_job()


def test_a_relative_run_folder_in_a_job_is_refused_with_reason_and_remedy(in_job):
    with pytest.raises(ConfigError, match=r"checkpoint.dir = runs/x is relative.*lost with it.*cures submit"):
        check_job_paths(config(checkpoint={"dir": "runs/x"}))
    check_job_paths(config(checkpoint={"dir": "/shared/x"}))


@pytest.mark.parametrize("key", ["model", "data"])
def test_a_file_that_was_not_uploaded_is_named_and_a_hub_name_is_not(in_job, key):
    wrong = {"model": {"path": "runs/demo/base/model"}} if key == "model" else {"data": {"train": "mine.jsonl"}}
    with pytest.raises(ConfigError, match=rf"{key}\.\w+ = .* does not exist .*git ignores"):
        check_job_paths(config(checkpoint={"dir": "/shared/x"}, **wrong))
    (in_job / "runs/demo/base/model").mkdir(parents=True)
    (in_job / "mine.jsonl").write_text("")
    check_job_paths(config(checkpoint={"dir": "/shared/x"}, **wrong))


def test_submitting_makes_paths_absolute_and_leaves_hub_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("model", "train.jsonl", "reward.py"):
        Path(name).write_text("")
    settings = config(
        model={"path": "model"},
        data={"train": "train.jsonl", "eval": "HuggingFaceH4/MATH-500:test"},
        verifier={"fn": "reward.py:score"},
    )
    assert absolute_paths(settings) == {
        "model.path": str(tmp_path / "model"),
        "data.train": str(tmp_path / "train.jsonl"),
        "verifier.fn": f"{tmp_path}/reward.py:score",
        "checkpoint.dir": str(tmp_path / "runs/default"),
    }


@pytest.mark.parametrize("method", ["cures", "uniform", "gvm", "dapo"])
def test_what_is_submitted_is_the_same_configuration_with_absolute_paths(method, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pilots = {"pilot_rollouts": 4} if method == "gvm" else {}
    sizes = {"prompts_per_step": 8, "rollouts_per_step": 64}
    own = config(curriculum={"method": method, **sizes, **pilots}, ray={"address": "auto"}, learner={"lr": 2e-6})
    sent = {}

    class Client:
        def submit_job(self, entrypoint: str, runtime_env: dict) -> str:
            sent["command"] = entrypoint
            sent["config"] = load_config(Path(runtime_env["working_dir"]) / "config.yaml", [])
            sent["stop"] = int(runtime_env["env_vars"]["RAY_JOB_STOP_WAIT_TIME_S"])
            return "job-1"

    assert submit(Client(), own, "/opt/venv/bin/python") == "job-1"
    assert sent["command"] == "exec /opt/venv/bin/python -m actors.commands.cli train config.yaml"
    assert sent["stop"] >= 60
    expected = own.model_dump(mode="json")
    expected["ray"]["address"], expected["checkpoint"]["dir"] = None, str(tmp_path / "runs/default")
    assert sent["config"].model_dump(mode="json") == expected
