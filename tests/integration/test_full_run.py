"""The whole loop on real Ray, vLLM, math-verify and DeepSpeed: a few steps, a killed generator, a resume."""

import json
import os
import signal
import threading
import time

import numpy as np
import psutil
import pytest
import ray
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from actors.cluster.launch import train
from actors.cluster.placement import Placement
from actors.commands.cli import main as cures
from cures_ray.config import Config
from cures_ray.messages import ConfigError
from cures_ray.run.checkpoint import CheckpointStore, step_of

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]


def small_run(base, run_dir, **sections) -> Config:
    tree = {
        "model": {"path": str(base / "model")},
        "data": {"train": str(base / "train.jsonl"), "eval": str(base / "eval.jsonl"), "max_prompt_tokens": 48},
        "curriculum": {"prompts_per_step": 8, "rollouts_per_step": 32},
        "rollout": {"max_new_tokens": 48, "timeout_s": 60.0, "num_generators": 2},
        "learner": {"lr": 1e-3, "dtype": "float32", "cpus_per_rank": 0.5},
        "placement": {"generator_cpus": 0.5, "verifier_cpus": 0.5, "use_gpu": "no"},
        "eval": {"interval": 4},
        "checkpoint": {"dir": str(run_dir), "interval": 2},
        "logging": {"progress": "lines"},
        "trainer": {"steps": 4},
        "ray": {"num_cpus": 4},
    }
    for name, values in sections.items():
        tree[name] = {**tree.get(name, {}), **values}
    return Config.model_validate(tree)


def records(run_dir):
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def kill_a_generator_when(run_dir, step: int) -> threading.Thread:
    """SIGKILL one generator's process once ``step`` is in the log: it must be replaced."""

    def work():
        while not any(r.get("step", 0) >= step and "rollout/reward" in r for r in _safely(run_dir)):
            time.sleep(0.1)
        mine = psutil.Process().children(recursive=True)  # Ray was started by this process
        pids = [p.pid for p in mine if "ray::GeneratorActor" in " ".join(p.cmdline())]
        os.kill(pids[0], signal.SIGKILL)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread


def _safely(run_dir):
    try:
        return records(run_dir)
    except (OSError, json.JSONDecodeError):
        return []


def test_a_run_through_all_real_actors_conserves_survives_a_kill_and_resumes(base, tmp_path, ray_session):
    run_dir = tmp_path / "run"
    killer = kill_a_generator_when(run_dir, 2)
    summary = train(small_run(base, run_dir, trainer={"steps": 6}, algo={"train_cost": "measured"}))
    killer.join(timeout=1)
    assert not killer.is_alive(), "the generator was never killed"

    summary.accounting.check()
    assert summary.accounting.in_flight == 0
    assert summary.accounting.trained + sum(summary.accounting.discarded.values()) == summary.accounting.planned
    steps = [r for r in records(run_dir) if "rollout/reward" in r]
    assert [r["step"] for r in steps] == list(range(1, 7))
    assert all(r["staleness/max"] <= 1 for r in steps) and max(r["staleness/max"] for r in steps) == 1
    assert all(r["weights/canary_max_error"] < 1e-3 for r in steps)
    assert any("lost" in r.get("note", "") for r in records(run_dir))

    before, after = load_file(base / "model/model.safetensors"), load_file(summary.exported / "model.safetensors")
    assert any(not torch.equal(before[k], after[k]) for k in before)
    model = AutoModelForCausalLM.from_pretrained(summary.exported)
    assert len(AutoTokenizer.from_pretrained(summary.exported)) <= model.config.vocab_size
    assert list((run_dir / "tensorboard").iterdir())
    saved = json.loads((run_dir / "summary.json").read_text())
    assert saved["planned"] == summary.accounting.planned and saved["held_out_accuracy_after"] is not None

    samples = [json.loads(line) for line in (run_dir / "samples.jsonl").read_text().splitlines()]
    assert {s["version"] for s in samples} == {0, 4, 6} and all(s["prompt"] and s["answer"] for s in samples)

    folder, problems = CheckpointStore(run_dir).newest_intact()
    assert step_of(folder) == 6 and not problems
    assert cures(["export", str(run_dir), "--out", str(tmp_path / "exported")]) == 0  # without Ray
    again = load_file(tmp_path / "exported" / "model.safetensors")
    assert after and all(torch.equal(again[k], after[k]) for k in after)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "exported").config.vocab_size == model.config.vocab_size
    again = {"trainer": {"steps": 8}, "rollout": {"num_generators": 1}, "placement": {"use_gpu": "auto"}}
    resumed = train(small_run(base, run_dir, **again))  # on Ray's GPUs, which are logical ones here
    assert [r["step"] for r in records(run_dir) if "rollout/reward" in r] == list(range(1, 9))
    assert resumed.accounting.planned > summary.accounting.planned
    assert any("resumed with another trainer.steps: 6 before, 8 now" in r.get("note", "") for r in records(run_dir))
    assert resumed.accounting.in_flight == 0
    assert [version for version, _ in resumed.evaluations] == [0, 4, 6, 8]


def test_adapters_reach_the_generators_merged(base, tmp_path, ray_session):
    """vLLM holds the base model. Its canary fits the learner's only if every update carries the adapters."""
    model = {"path": str(base / "model"), "lora": {"rank": 8, "alpha": 16}}
    learner = {"lr": 2e-2, "dtype": "float32", "cpus_per_rank": 0.5}
    settings = {"rollout": {"num_generators": 1}, "eval": {"interval": 0}, "trainer": {"steps": 3}}
    summary = train(small_run(base, tmp_path / "run", model=model, learner=learner, **settings))
    steps = [r for r in records(tmp_path / "run") if "rollout/reward" in r]
    assert len(steps) == 3 and all(r["weights/canary_max_error"] < 1e-3 for r in steps)
    before, after = load_file(base / "model/model.safetensors"), load_file(summary.exported / "model.safetensors")
    moved = {k for k in before if not torch.equal(before[k], after[k])}
    assert after.keys() == before.keys() and moved == {k for k in before if k.endswith("_proj.weight")}
    assert max(float((before[k] - after[k]).abs().max()) for k in moved) > 1e-3
    assert (summary.exported / "adapter" / "adapter_config.json").exists()


def test_what_cannot_be_placed_fails_soon_with_a_table_and_starts_nothing(base, tmp_path, ray_session):
    began = time.monotonic()
    with pytest.raises(ConfigError, match="wanted in all"):
        train(small_run(base, tmp_path / "run", rollout={"num_generators": 50}))
    assert time.monotonic() - began < 30


def test_resources_that_another_job_holds_fail_within_the_deadline(base, tmp_path, ray_session):
    everything = ray.util.placement_group([{"CPU": ray.cluster_resources()["CPU"]}])
    ray.get(everything.ready(), timeout=20)
    try:
        with pytest.raises(ConfigError, match="not placed within"):
            Placement(small_run(base, tmp_path / "run", placement={"timeout_s": 2.0}))
    finally:
        ray.util.remove_placement_group(everything)
    deadline = time.monotonic() + 10
    while ray.available_resources().get("CPU", 0) < ray.cluster_resources()["CPU"] and time.monotonic() < deadline:
        time.sleep(0.1)
    assert np.isclose(ray.available_resources()["CPU"], ray.cluster_resources()["CPU"]), "groups were left behind"
