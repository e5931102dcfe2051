"""Weights on their way to the generators, and what an engine is started with: the parts that need no engine."""

import ast
import inspect
import os
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace
from typing import get_args

import msgspec
import pytest
import safetensors.torch
import torch
from torch.multiprocessing.reductions import rebuild_cuda_tensor

from actors.engine_settings import engine_arguments, kv_cache_mib
from actors.generator import rollout_seed
from actors.weights import ipc, shm
from actors.weights.backend import MODULES, Node, Settings, resolve, road
from actors.weights.shm import remove_stale_folders, shm_folder
from actors.weights.stream import Source, chunks, tensors, total_bytes
from cures_ray.config import Config, WeightsConfig
from cures_ray.messages import ConfigError, RunError

ROOT = Path(__file__).resolve().parents[2]


def config(**sections) -> Config:
    return Config.model_validate(sections)


@pytest.mark.parametrize(
    ("backend", "on_gpu", "colocated", "nodes", "expected"),
    [
        ("auto", False, False, 1, "shm"),
        ("auto", True, False, 1, "shm"),
        ("auto", True, True, 1, "shm"),
        ("auto", False, False, 2, "object_store"),
        ("auto", True, False, 2, "object_store"),
        ("object_store", False, False, 1, "object_store"),
        ("nccl", True, False, 2, "nccl"),
        ("gloo", False, False, 2, "gloo"),
        ("ipc", True, True, 1, "ipc"),
    ],
)
def test_the_backend_follows_the_placement(backend, on_gpu, colocated, nodes, expected):
    settings = config(weights={"backend": backend}, placement={"colocate": colocated})
    assert resolve(settings, on_gpu=lambda: on_gpu, nodes=nodes) == expected


@pytest.mark.parametrize(
    ("backend", "on_gpu", "colocated", "nodes", "message"),
    [
        ("nccl", False, False, 1, "needs GPUs"),
        ("ipc", True, False, 1, "placement.colocate = true"),
        ("nccl", True, True, 1, "two processes on one GPU"),
        ("shm", False, False, 2, "use auto or object_store"),
    ],
)
def test_a_backend_that_cannot_work_here_is_refused(backend, on_gpu, colocated, nodes, message):
    settings = config(weights={"backend": backend}, placement={"colocate": colocated})
    with pytest.raises(ConfigError, match=message):
        resolve(settings, on_gpu=lambda: on_gpu, nodes=nodes)


def test_every_backend_of_the_configuration_is_a_module_with_the_same_parts():
    choices = set(get_args(WeightsConfig.model_fields["backend"].annotation)) - {"auto"}
    assert choices == set(MODULES)
    for name in choices:
        module = road(name)
        assert callable(module.Publisher.publish) and callable(module.Publisher.close), name
        for part in ("update_info", "receive", "end"):
            assert callable(getattr(module, part)), (name, part)


def test_no_file_outside_the_room_asks_which_backend_it_is():
    """The weight backend is a module; nobody compares its name or looks into what it publishes."""
    names = set(MODULES)
    for path in sorted(p for top in ("actors", "cures_ray") for p in (ROOT / top).rglob("*.py")):
        if path.parent.name == "weights":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Compare):
                parts = [node.left, *node.comparators]
                constants = {c.value for p in parts for c in ast.walk(p) if isinstance(c, ast.Constant)}
                text = ast.unparse(node)
                asks = ("backend" in text and names & constants) or "info" in text.split()
                assert not asks or (path.name == "learner_rank.py" and "dist" in text), f"{path}: {text}"


class Weights(torch.nn.Module):
    """Parameters of several kinds: bfloat16, a view that is not contiguous, a scalar, an empty one, a tied one."""

    def __init__(self, value: float = 1.0) -> None:
        super().__init__()
        self.a = torch.nn.Parameter(torch.arange(12.0).reshape(3, 4) * value)
        self.tied = self.a
        self.low = torch.nn.Parameter(torch.full((5,), value, dtype=torch.bfloat16))
        self.turned = torch.nn.Parameter(torch.arange(6.0).reshape(2, 3).t() + value)
        self.scalar = torch.nn.Parameter(torch.tensor(value))
        self.empty = torch.nn.Parameter(torch.zeros(0, 2))


@pytest.mark.parametrize("size", [1, 7, 64, 1 << 20])
def test_the_stream_is_a_safetensors_file_whatever_its_chunks_are(size):
    source = Source(Weights(3.0))
    stream = [chunk.clone() for chunk in chunks(source, 7, size)]
    assert all(len(chunk) == size for chunk in stream[:-1])
    data = torch.cat(stream).numpy().tobytes()
    assert len(data) == total_bytes(source, 7)
    loaded = safetensors.torch.load(data)
    received = dict(tensors(iter(stream), 7, torch.device("cpu")))
    expected = dict(source)
    assert set(loaded) == set(received) == set(expected) == {"a", "low", "turned", "scalar", "empty"}
    for name, tensor in expected.items():
        assert torch.equal(loaded[name], tensor) and torch.equal(received[name], tensor), name
        assert received[name].dtype == tensor.dtype


def test_a_stream_of_another_version_or_cut_short_is_refused():
    stream = [chunk.clone() for chunk in chunks(Source(Weights()), 3, 64)]
    with pytest.raises(ValueError, match="version 3, expected 4"):
        dict(tensors(iter(stream), 4, torch.device("cpu")))
    with pytest.raises(ValueError, match=r"ended \d+ bytes early"):
        dict(tensors(iter(stream[:-1]), 3, torch.device("cpu")))


def publish(folder, version: int, value: float) -> dict:
    info = shm.Publisher(Settings(backend="shm", folder=folder)).publish(Source(Weights(value)), version)
    return shm.update_info(info, version, Node()) | {"version": version}


def receive(update: dict) -> dict[str, torch.Tensor]:
    return {name: t.clone() for name, t in shm.receive(update, torch.device("cpu"), 0)}


def test_the_last_two_versions_are_kept_and_nothing_half_written(tmp_path):
    updates = [publish(tmp_path, v, float(v)) for v in (0, 1, 2, 3, 3)]
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"version-00000000{v}.safetensors" for v in (2, 3)]
    assert receive(updates[4])["scalar"].item() == 3.0
    with pytest.raises(ValueError, match="do not exist on this machine"):
        receive(updates[0])
    assert receive(publish(tmp_path, 1, 1.0))["scalar"].item() == 1.0  # a learner that went back to a checkpoint
    updates[4] = publish(tmp_path, 3, 3.0)
    with pytest.raises(ValueError, match="holds version 3, expected 9"):
        receive(updates[4] | {"version": 9})


def test_a_full_shared_memory_says_what_is_needed_and_free(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(0, 0, 3 << 20))
    with pytest.raises(RunError, match=r"version 5 .*: 4 MiB needed, 3 MiB free.*--shm-size"):
        shm.write_version(tmp_path, 5, 4 << 20, iter([b""]))
    assert list(tmp_path.iterdir()) == []


def test_an_ipc_handle_travels_as_numbers_and_bytes():
    arguments = (torch.Tensor, torch.Size([2, 3]), (3, 1), 0, torch.UntypedStorage, torch.bfloat16, 0, b"handle", 64, 0)
    arguments += (False, b"counter", 5, b"event", True)
    handle = msgspec.msgpack.decode(msgspec.msgpack.encode(ipc.encode(arguments)))
    assert ipc.decode(handle, 3) == [*arguments[:6], 3, *arguments[7:]]
    assert len(arguments) == len(inspect.signature(rebuild_cuda_tensor).parameters)


def test_folders_of_dead_processes_are_removed_and_those_of_living_ones_kept(tmp_path):
    code = "import sys; from pathlib import Path; from actors.weights.shm import shm_folder; "
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
        engine_arguments(settings, str(tmp_path), False)
