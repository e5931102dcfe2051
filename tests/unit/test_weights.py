"""Weights on their way to the generators, and what an engine is started with: the parts that need no engine."""

import os
import shutil
import subprocess
import sys
from collections import namedtuple
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from actors.engine_settings import engine_arguments, kv_cache_mib
from actors.generator import rollout_seed
from actors.weights.transfer import (
    nccl_info,
    remove_stale_folders,
    resolve_backend,
    send_weights,
    shm_folder,
    write_shm,
)
from cures_ray.config import Config
from cures_ray.messages import ConfigError, RunError


def config(**sections) -> Config:
    return Config.model_validate(sections)


@pytest.mark.parametrize(
    ("backend", "on_gpu", "colocated", "expected"),
    [
        ("auto", False, False, "shm"),
        ("auto", False, True, "shm"),
        ("auto", True, False, "nccl"),
        ("auto", True, True, "ipc"),
        ("shm", True, False, "shm"),
        ("nccl", True, False, "nccl"),
        ("ipc", True, True, "ipc"),
    ],
)
def test_the_backend_follows_the_placement(backend, on_gpu, colocated, expected):
    assert resolve_backend(config(weights={"backend": backend}), on_gpu=on_gpu, colocated=colocated) == expected


@pytest.mark.parametrize(
    ("backend", "on_gpu", "colocated", "message"),
    [
        ("nccl", False, False, "needs GPUs"),
        ("ipc", True, False, "placement.colocate = true"),
        ("nccl", True, True, "use ipc"),
    ],
)
def test_a_backend_that_cannot_work_here_is_refused(backend, on_gpu, colocated, message):
    with pytest.raises(ConfigError, match=message):
        resolve_backend(config(weights={"backend": backend}), on_gpu=on_gpu, colocated=colocated)


def test_published_weights_are_a_safetensors_file_with_its_version(tmp_path):
    shared = torch.arange(12.0).reshape(3, 4)
    named = [("a", shared), ("tied", shared), ("view", shared.t()), ("b", torch.ones(2, dtype=torch.bfloat16))]
    path = write_shm(named, tmp_path / "run", 7)
    loaded = load_file(path)
    assert sorted(loaded) == ["a", "b", "tied", "view"]
    assert all(torch.equal(loaded[name], tensor) for name, tensor in named)
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == {"version": "7"}


def test_the_last_two_versions_are_kept_and_nothing_half_written(tmp_path):
    paths = [write_shm([("w", torch.full((3,), float(v)))], tmp_path, v) for v in (0, 1, 2, 3, 3)]
    assert sorted(tmp_path.iterdir()) == [paths[2], paths[3]]
    assert load_file(paths[4])["w"].tolist() == [3.0] * 3


def test_a_full_shared_memory_says_what_is_needed_and_free(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(0, 0, 3 << 20))
    with pytest.raises(RunError, match=r"version 5 .*: 4 MiB needed, 3 MiB free.*--shm-size"):
        write_shm([("w", torch.zeros(1 << 20))], tmp_path, 5)
    assert list(tmp_path.iterdir()) == []


def test_folders_of_dead_processes_are_removed_and_those_of_living_ones_kept(tmp_path):
    code = "import sys; from pathlib import Path; from actors.weights.transfer import shm_folder; "
    code += "print(shm_folder(Path('other'), Path(sys.argv[1])))"
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    dead = tmp_path / os.path.basename(done.stdout.strip())
    assert dead.is_dir()
    foreign = tmp_path / "cures-ray.00000000.1.1.deadbeef"  # another host or container: not ours to judge
    foreign.mkdir()
    mine = shm_folder(tmp_path / "run", tmp_path)
    assert not dead.exists()
    assert shm_folder(tmp_path / "run", tmp_path) == mine
    assert remove_stale_folders(tmp_path) == []
    assert sorted(tmp_path.iterdir()) == sorted([foreign, mine])


def test_a_process_id_that_is_used_again_does_not_keep_a_folder(tmp_path):
    mine = shm_folder(tmp_path / "run", tmp_path)
    host, pid, started, run = mine.name.split(".")[1:]
    earlier = mine.with_name(f"cures-ray.{host}.{pid}.{int(started) - 1}.{run}")
    earlier.mkdir()
    assert remove_stale_folders(tmp_path) == [earlier]


def test_nccl_metadata_lists_the_parameters_in_order():
    module = torch.nn.Linear(3, 2, dtype=torch.bfloat16)
    info = nccl_info(module, config(rollout={"num_generators": 3, "tensor_parallel_size": 2}), "10.0.0.1", 4000)
    assert info["init"] == {"master_address": "10.0.0.1", "master_port": 4000, "world_size": 7, "packed": True}
    assert info["update"] == {
        "names": ["weight", "bias"],
        "dtype_names": ["bfloat16", "bfloat16"],
        "shapes": [[2, 3], [2]],
    }


def test_nothing_is_sent_for_weights_in_shared_memory():
    send_weights(torch.nn.Linear(1, 1), {"path": "/dev/shm/x"}, rank=0, zero_stage=1)


def test_rollout_seeds_differ_between_neighbours_and_fit_the_engine():
    seeds = {rollout_seed(seed, j) for seed in range(-50, 50) for j in range(50)}
    assert len(seeds) == 5000
    assert all(0 <= s < 2**62 for s in seeds)
    assert rollout_seed(5, 1) == rollout_seed(5, 1)


def test_the_cpu_cache_holds_all_rollouts_when_memory_allows():
    model = SimpleNamespace(num_attention_heads=8, num_key_value_heads=2, hidden_size=512, num_hidden_layers=4)
    settings = config(learner={"dtype": "float32"}, rollout={"max_concurrent_rollouts": 100, "num_generators": 2})
    token = 2 * 4 * 2 * 64 * 4  # bytes: keys and values, layers, heads, head size, float32
    needed = 100 * token * 1024 / 2**20
    assert needed <= kv_cache_mib(model, settings, 1024, 64_000) < 1.3 * needed
    assert kv_cache_mib(model, settings, 1024, 4_800) == 4_800 // 8 // 2
    assert kv_cache_mib(model, settings, 1024, 100) == 64


def test_a_context_too_short_for_the_prompts_is_refused_before_the_engine_starts(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "qwen2", "max_position_embeddings": 64}')
    settings = config(data={"max_prompt_tokens": 64})
    with pytest.raises(ConfigError, match=r"data.max_prompt_tokens = 64 .* context of .* is 64 tokens"):
        engine_arguments(settings, str(tmp_path), "shm", False)
