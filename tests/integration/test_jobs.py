"""Training as a Ray job, as a user does it: a real local cluster with its job server, in a home folder of its own.

A token lies in the home folder, so that `ray start` asks for one: submit, log, progress, stop, submit again. And what a
plain `ray job submit` with relative paths is told.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import yaml

from cures_ray.run.checkpoint import CheckpointStore, step_of
from cures_ray.synthetic.base_model import main as prepare

pytestmark = [pytest.mark.integration, pytest.mark.timeout(900)]
ROOT = Path(__file__).resolve().parents[2]
STEPS = 5000  # more than a test waits for: the job is stopped in the middle
RAY = str(Path(sys.executable).with_name("ray"))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Cluster:
    """`ray start --head` in a process of its own, and a shell of the same user."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        home = folder / "home"
        (home / ".ray").mkdir(parents=True)
        (home / ".ray" / "auth_token").write_text("f" * 64)
        foreign = ("RAY_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")
        self.environment = {k: v for k, v in os.environ.items() if k not in foreign}
        self.environment |= {"HOME": str(home), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        self.temp = tempfile.mkdtemp(prefix="cj", dir="/tmp")  # short: paths of sockets
        session = f"{self.temp}/ray"  # what RAY_TMPDIR makes of it
        dashboard, self.port = free_port(), free_port()
        self.address = f"http://127.0.0.1:{dashboard}"
        command = [RAY, "start", "--head", "--block", "--port", str(self.port), "--temp-dir", session]
        command += ["--dashboard-host", "127.0.0.1", "--dashboard-port", str(dashboard), "--num-cpus", "4"]
        command += ["--object-store-memory", str(200 << 20), "--dashboard-agent-listen-port", str(free_port())]
        command += ["--ray-client-server-port", str(free_port())]
        self.log = (folder / "ray.log").open("w")
        self.process = subprocess.Popen(command, env=self.environment, stdout=self.log, stderr=self.log)
        self._wait_for_jobs()

    def _wait_for_jobs(self) -> None:
        request = urllib.request.Request(f"{self.address}/api/version")
        request.add_header("Authorization", "Bearer " + "f" * 64)
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            try:
                urllib.request.urlopen(request, timeout=5)
                return
            except OSError:
                time.sleep(1.0)
        raise TimeoutError((self.folder / "ray.log").read_text()[-2000:])

    def run(self, *command: str, cwd: Path, **more: str) -> subprocess.CompletedProcess:
        """Type ``command``."""
        return subprocess.run(
            command, cwd=cwd, env=self.environment | more, capture_output=True, text=True, timeout=600, check=False
        )

    def cures(self, *arguments: str, cwd: Path) -> subprocess.CompletedProcess:
        return self.run(sys.executable, "-m", "actors.commands.cli", *arguments, cwd=cwd)

    def actors(self) -> list[str]:
        """Titles of this cluster's actor processes."""
        children = psutil.Process(self.process.pid).children(recursive=True)
        titles = []
        for child in children:
            try:
                titles.append(" ".join(child.cmdline()))
            except psutil.Error:
                continue
        return [t for t in titles if (t.startswith("ray::") and "Actor" in t) or t.startswith("ray::LearnerRank")]

    def close(self) -> None:
        processes = [self.process, *psutil.Process(self.process.pid).children(recursive=True)]
        self.process.send_signal(signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(timeout=30)
        for process in processes:
            with suppress(psutil.Error, OSError):
                process.kill()
        self.log.close()


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    cluster = Cluster(tmp_path_factory.mktemp("cluster"))
    yield cluster
    cluster.close()


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A user's folder: a model, data, and a configuration with relative paths."""
    folder = tmp_path_factory.mktemp("project")
    arguments = ["--out", str(folder / "base"), "--seed", "0", "--prompts", "128", "--eval-prompts", "16"]
    assert prepare([*arguments, "--sft-steps", "20"]) == 0
    tree = {
        "model": {"path": "base/model"},
        "data": {"train": "base/train.jsonl", "eval": "base/eval.jsonl", "max_prompt_tokens": 48},
        "curriculum": {"prompts_per_step": 8, "rollouts_per_step": 32},
        "rollout": {"max_new_tokens": 48, "timeout_s": 60.0},
        "learner": {"lr": 1e-3, "dtype": "float32", "cpus_per_rank": 0.5},
        "placement": {"generator_cpus": 0.5, "verifier_cpus": 0.5, "use_gpu": "no", "timeout_s": 120},
        "eval": {"interval": 0},
        "checkpoint": {"dir": "run", "interval": 0, "export_final": False},
        "logging": {"progress": "lines"},
        "trainer": {"steps": STEPS},
    }
    (folder / "job.yaml").write_text(yaml.safe_dump(tree))
    return folder


def steps(project: Path) -> list[int]:
    path = project / "run" / "metrics.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [r["step"] for r in records if "rollout/reward" in r]


def jobs(cluster: Cluster, *arguments: str, cwd: Path) -> subprocess.CompletedProcess:
    """`ray job ...` as `cures submit` prints it for a cluster with a token."""
    command, *rest = arguments
    return cluster.run(RAY, "job", command, "--address", cluster.address, *rest, cwd=cwd, RAY_AUTH_MODE="token")


def test_a_job_is_submitted_stopped_with_a_checkpoint_and_continued_by_submitting_it_again(cluster, project):
    arguments = ("submit", "job.yaml", "--address", cluster.address)
    sent = cluster.cures(*arguments, "--no-wait", cwd=project)
    assert sent.returncode == 0, sent.stderr
    job = sent.stdout.split()[1].rstrip(";")
    assert f"RAY_AUTH_MODE=token ray job stop --address {cluster.address} {job}" in sent.stdout
    deadline = time.monotonic() + 240
    while len(steps(project)) < 2:  # relative paths were made absolute: it trains, and logs into the user's folder
        assert time.monotonic() < deadline, jobs(cluster, "logs", job, cwd=project).stdout[-3000:]
        time.sleep(1.0)
    assert any("GeneratorActor" in title for title in cluster.actors())
    log = jobs(cluster, "logs", job, cwd=project).stdout
    assert "all actors are up" in log and "step" in log  # the progress of the run
    jobs(cluster, "stop", job, cwd=project)
    deadline = time.monotonic() + 120
    while "was stopped" not in (said := jobs(cluster, "status", job, cwd=project).stdout):
        assert time.monotonic() < deadline, said
        time.sleep(1.0)
    done = steps(project)
    assert 2 <= len(done) < STEPS  # it was stopped in the middle
    newest, problems = CheckpointStore(project / "run", 2).resolve("auto")
    assert step_of(newest) == done[-1] and problems == []
    gone = time.monotonic() + 30
    while cluster.actors() and time.monotonic() < gone:
        time.sleep(0.5)
    assert cluster.actors() == []

    again = cluster.cures(*arguments, f"trainer.steps={done[-1] + 2}", cwd=project)
    assert again.returncode == 0, again.stdout + again.stderr
    assert "resuming from" in again.stdout and "SUCCEEDED" in again.stdout
    assert steps(project) == list(range(1, done[-1] + 3))  # each step once


def test_a_plain_job_with_relative_paths_is_refused_with_the_reason(cluster, project):
    """The working directory travels without the model, as it does where git ignores it."""
    copy = project / "upload"
    copy.mkdir(exist_ok=True)
    (copy / "job.yaml").write_text((project / "job.yaml").read_text())
    train = [sys.executable, "-m", "actors.commands.cli", "train", "job.yaml"]
    lost = jobs(cluster, "submit", "--working-dir", str(copy), "--", *train, cwd=project)
    assert lost.returncode == 1
    assert "checkpoint.dir = run is relative, and a Ray job runs in a temporary folder" in lost.stdout
    missing = jobs(
        cluster, "submit", "--working-dir", str(copy), "--", *train, f"checkpoint.dir={project}/other", cwd=project
    )
    assert missing.returncode == 1
    assert (
        "data.train = base/train.jsonl does not exist" in missing.stdout
        and "git ignores is not copied" in missing.stdout
    )
    assert not (project / "other").exists()


def test_a_local_run_never_joins_a_cluster_that_happens_to_run_and_leaves_no_token(cluster, tmp_path):
    """In a home without a token: the next `ray start` must not ask for one that `ray job submit` does not send."""
    show = "print('joined', ray.get_runtime_context().gcs_address, ray.cluster_resources()['CPU'])\n"
    plain = f"import ray; ray.init(); {show}"
    ours = (
        "import ray; from actors.cluster.connect import own_ray; from cures_ray.config import Config\n"
        f"with own_ray(Config.model_validate({{'ray': {{'num_cpus': 1, 'object_store_mb': 80}}}})):\n    {show}"
    )
    near = {"RAY_TMPDIR": cluster.temp}  # where `ray start` noted that it runs, and where ray.init() looks
    stranger = cluster.run(sys.executable, "-c", plain, cwd=tmp_path, **near)
    assert f":{cluster.port} 4.0" in stranger.stdout, stranger.stderr  # a plain ray.init() does join it
    home = tmp_path / "home"
    home.mkdir()
    found = cluster.run(sys.executable, "-c", ours, cwd=tmp_path, HOME=str(home), **near)
    assert found.returncode == 0, found.stderr
    assert f":{cluster.port} " not in found.stdout and found.stdout.rstrip().endswith(" 1.0")
    assert not (home / ".ray" / "auth_token").exists()
