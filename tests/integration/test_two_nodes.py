"""Two Ray nodes on this machine: the weights cross once a node, and a real engine on the other node proves them."""

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress

import numpy as np
import psutil
import pytest
import ray
import torch
from clusters import two_node_cluster
from tiny_model import CHARACTERS, write_tiny_model
from transformers import AutoModelForCausalLM

from actors.cluster.probe import check_shared
from actors.generator import GeneratorActor
from actors.weights import object_store
from actors.weights.backend import Node, Settings, road
from actors.weights.shm import PREFIX, SHM_ROOT
from actors.weights.stream import Source
from cures_ray.config import Config
from cures_ray.messages import ConfigError, WeightUpdate

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]
ON_FIRST, ON_SECOND = {"num_cpus": 0.1, "resources": {"first": 1}}, {"num_cpus": 0.1, "resources": {"second": 1}}


def large(value: float) -> torch.nn.Module:
    module = torch.nn.Module()
    for i in range(8):
        module.register_parameter(f"w{i}", torch.nn.Parameter(torch.full((1 << 20,), value + i)))
    return module


def sums(value: float) -> dict[str, float]:
    return {f"w{i}": (value + i) * (1 << 20) for i in range(8)}


class Learner:
    """Publishes by every road, as rank 0 does."""

    def __init__(self, path: str | None = None) -> None:
        address = ray.util.get_node_ip_address()
        self.publishers = {
            name: road(name).Publisher(Settings(backend=name, folder=None, address=address, chunk_bytes=1 << 20))
            for name in ("object_store", "gloo")
        }
        self.model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32) if path else None

    def publish(self, value: float, version: int) -> dict:
        return self.publishers["object_store"].publish(Source(large(value)), version)

    def update(self, backend: str, version: int) -> WeightUpdate:
        """Other weights than the engine started with, and the canary's log-probabilities under them."""
        torch.manual_seed(version)
        for parameter in self.model.parameters():
            parameter.data.add_(0.1 * torch.randn_like(parameter))
        info = self.publishers[backend].publish(Source(self.model), version)
        ids = np.arange(3, 40, dtype=np.int32)
        row = torch.as_tensor(ids, dtype=torch.long)[None]
        with torch.no_grad():
            scores = torch.log_softmax(self.model(row).logits[0, :-1], -1).gather(1, row[0, 1:, None])[:, 0]
        return WeightUpdate(version=version, info=info, canary_token_ids=(ids,), canary_logprobs=(scores.numpy(),))


class Receiver:
    """A generator's receiving half, without an engine."""

    def __init__(self) -> None:
        self.written: list[int] = []

    def count_writes(self) -> None:
        plain = object_store.write_version

        def counted(folder, version, size, chunks):
            self.written.append(version)
            return plain(folder, version, size, chunks)

        object_store.write_version = counted

    def die_after_two_chunks(self) -> None:
        plain = object_store._fetched

        def deadly(chunks, timeout_s):
            for i, chunk in enumerate(plain(chunks, timeout_s)):
                if i == 2:
                    os.kill(os.getpid(), signal.SIGKILL)
                yield chunk

        object_store._fetched = deadly

    def receive(self, info: dict, version: int) -> tuple[dict[str, float], str, list[int]]:
        update = object_store.update_info(info, version, Node(timeout_s=30)) | {"version": version}
        arrived = object_store.receive(update, torch.device("cpu"), 0)
        return {name: float(t.double().sum()) for name, t in arrived}, update["path"], self.written


@pytest.fixture(scope="module")
def cluster():
    with two_node_cluster() as cluster:
        yield cluster


def receivers(where: dict, count: int) -> list:
    handles = [ray.remote(Receiver).options(**where).remote() for _ in range(count)]
    ray.get([h.count_writes.remote() for h in handles])
    return handles


def folders() -> set[str]:
    job = ray.get_runtime_context().get_job_id()
    return {p.name for p in SHM_ROOT.glob(f"{PREFIX}.*.{job}-*")}


def test_each_node_lays_a_version_down_once_and_all_its_generators_load_that_file(cluster):
    learner = ray.remote(Learner).options(**ON_FIRST).remote()
    handles = receivers(ON_FIRST, 1) + receivers(ON_SECOND, 3)
    for version in (5, 6, 7):
        info = ray.get(learner.publish.remote(float(version), version))
        answers = ray.get([h.receive.remote(info, version) for h in handles])
        assert all(found == sums(float(version)) for found, _, _ in answers)
        paths = [path for _, path, _ in answers]
        assert len(set(paths)) == 2 and len(set(paths[1:])) == 1  # one file a node
    writes = [written for _, _, written in ray.get([h.receive.remote(info, 7) for h in handles])]
    assert writes[0] == [5, 6, 7] and sorted(v for own in writes[1:] for v in own) == [5, 6, 7]
    kept = sorted(os.listdir(os.path.dirname(paths[1])))
    assert kept == ["version-000000006.safetensors", "version-000000007.safetensors"]
    late = receivers(ON_SECOND, 1)[0]  # joins when the file is there
    assert ray.get(late.receive.remote(info, 7)) == (sums(7.0), paths[1], [])


def test_a_generator_that_dies_while_it_writes_leaves_the_work_to_the_next(cluster):
    learner = ray.remote(Learner).options(**ON_FIRST).remote()
    info = ray.get(learner.publish.remote(2.0, 1))
    victim, other = receivers(ON_SECOND, 2)
    ray.get(victim.die_after_two_chunks.remote())
    with pytest.raises(ray.exceptions.RayActorError):
        ray.get(victim.receive.remote(info, 1))
    found, path, written = ray.get(other.receive.remote(info, 1))
    assert found == sums(2.0) and written == [1]
    assert os.listdir(os.path.dirname(path)).count("version-000000001.safetensors") == 1


def test_a_learner_that_starts_anew_is_not_mistaken_for_the_old_one(cluster):
    reader = receivers(ON_SECOND, 1)[0]
    for value in (3.0, 4.0):
        learner = ray.remote(Learner).options(**ON_FIRST).remote()
        info = ray.get(learner.publish.remote(value, 1))
        assert ray.get(reader.receive.remote(info, 1))[0] == sums(value)


def test_the_end_of_a_run_leaves_nothing_on_any_node(cluster):
    assert len(folders()) == 2
    object_store.end()
    assert folders() == set()


def test_an_engine_on_the_other_node_proves_weights_from_the_object_store_and_by_the_collective(cluster, tmp_path):
    path = str(write_tiny_model(tmp_path / "model"))
    settings = Config.model_validate(
        {
            "data": {"max_prompt_tokens": 100},
            "rollout": {"max_new_tokens": 16, "kv_cache_mib": 64, "timeout_s": 60},
            "learner": {"dtype": "float32"},
            "placement": {"use_gpu": "no"},
        }
    )
    learner = ray.remote(Learner).options(**ON_FIRST).remote(path)
    options = ON_SECOND | {"max_concurrency": 1000}
    generator = ray.remote(GeneratorActor).options(**options).remote("generator-0", settings, path, {})
    ray.get(generator.start.remote())
    for version, backend in enumerate(("object_store", "gloo", "object_store"), start=1):
        report = ray.get(generator.update_weights.remote(ray.get(learner.update.remote(backend, version))))
        assert report.version == version and report.canary_max_error < 1e-4
    assert len(CHARACTERS) > 40 - 3  # the canary's tokens are tokens of the model
    object_store.end()


# -- files that nodes must share -------------------------------------------------------------------------------------


def may_unshare() -> bool:
    return subprocess.run(["unshare", "--mount", "true"], capture_output=True, check=False).returncode == 0


@pytest.fixture
def blind_node(cluster, tmp_path):
    """A third node that sees an empty folder where the run's folder is, as a node without the shared mount does."""
    folder = tmp_path / "shared"
    folder.mkdir()
    ray_command = f"{os.path.dirname(sys.executable)}/ray start --address {cluster.address} --num-cpus 1 --block"
    script = f"mount -t tmpfs none {folder} && exec {ray_command}"
    known = {n["NodeID"] for n in ray.nodes()}
    process = subprocess.Popen(["unshare", "--mount", "sh", "-c", script], stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not (new := [n["NodeID"] for n in ray.nodes() if n["Alive"] and n["NodeID"] not in known]):
        assert time.monotonic() < deadline, "the third node did not join"
        time.sleep(0.5)
    yield folder, new[0]
    children = psutil.Process(process.pid).children(recursive=True)
    process.terminate()
    process.wait(timeout=30)
    for child in children:
        with suppress(psutil.Error):
            child.kill()


@pytest.mark.skipif(not may_unshare(), reason="needs a mount namespace of its own (root, or a kernel that allows it)")
def test_a_node_that_does_not_share_the_runs_files_is_named_with_role_and_key(cluster, blind_node):
    folder, blind = blind_node
    (folder / "model").mkdir()
    (folder / "reward.py").write_text("")
    (folder / "run").mkdir()
    config = Config.model_validate(
        {
            "model": {"path": str(folder / "model")},
            "verifier": {"fn": f"{folder}/reward.py:score"},
            "checkpoint": {"dir": str(folder / "run")},
        }
    )
    second = next(n["NodeID"] for n in ray.nodes() if n["Alive"] and "second" in n["Resources"])
    roles = ("learner", "generator", "verifier")
    check_shared(config, folder / "run", {role: [second] for role in roles})  # it sees everything
    with pytest.raises(ConfigError) as caught:
        check_shared(config, folder / "run", {role: [second, blind] for role in roles})
    message = str(caught.value)
    assert f"checkpoint.dir = {folder}/run is not the same folder there" in message
    assert (
        f"model.path = {folder}/model does not exist there" in message and "(generator, learner, verifier)" in message
    )
    assert f"verifier.fn = {folder}/reward.py does not exist there" in message
    check_shared(config, folder / "run", {"verifier": [second]})
    assert list((folder / "run").iterdir()) == []  # no probe is left
