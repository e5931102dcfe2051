"""What a person sees of a run: Ray's metrics in Prometheus under the board's queries, the actors' names, the report.

One real run of the tiny model; Prometheus and Chromium are Debian's (scripts/system-packages.sh).
"""

import json
import shutil
import socket
import subprocess
import tempfile
import threading
import time
import urllib.parse
import urllib.request
from pathlib import Path

import pytest
import ray
from ray.util.state import list_actors

from actors.cluster.launch import start_ray, train
from actors.commands.board import queries
from actors.commands.dashboard import DISCOVERY, prometheus_command, prometheus_settings
from cures_ray.config import Config
from cures_ray.run.metric_table import metric_of
from cures_ray.run.report import write_report
from cures_ray.synthetic.base_model import main as prepare

pytestmark = [pytest.mark.integration, pytest.mark.timeout(900)]
ROOT = Path(__file__).resolve().parents[2]
STEADY = {"run", "role", "name", "level", "reason", "quantile"}  # labels that we set
MOVE = (  # queries of the board that must change within a run
    "ray_cures_learner_entropy",
    "ray_cures_accounting_planned",
    "ray_cures_accounting_trained",
    "ray_cures_time_step_s",
    "ray_cures_process_version",
    "ray_cures_process_memory_bytes",
    "rate(ray_cures_process_cpu_seconds[1m])",
    "rate(ray_vllm_generation_tokens_total[1m])",
)
CHROMIUM = [
    "chromium", "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--enable-logging=stderr", "--log-level=0",
]  # fmt: skip


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Prometheus:
    """A real server that follows Ray's own list of nodes."""

    def __init__(self, ray_folder: Path, folder: Path) -> None:
        self.port = free_port()
        settings = prometheus_settings(ray_folder).replace("5s", "2s")
        (folder / "prometheus.yml").write_text(settings)
        program = shutil.which("prometheus")
        assert program, "run scripts/system-packages.sh"
        self.server = subprocess.Popen(prometheus_command(program, folder, self.port))

    def series(self, query: str, since: float) -> dict[str, list[float]]:
        """Labels -> values since ``since``."""
        asked = {"query": query, "start": since, "end": time.time(), "step": 2}
        address = f"http://127.0.0.1:{self.port}/api/v1/query_range?{urllib.parse.urlencode(asked)}"
        with urllib.request.urlopen(address, timeout=30) as answer:
            found = json.load(answer)["data"]["result"]
        return {json.dumps(s["metric"], sort_keys=True): [float(v) for _, v in s["values"]] for s in found}


def chromium(address: str, picture: Path, profile: Path, wait_ms: int) -> tuple[str, str]:
    """Open ``address``; (the page as rendered, what the browser's console said)."""
    common = [*CHROMIUM, f"--virtual-time-budget={wait_ms}", "--window-size=1500,900"]
    shot = [*common, f"--user-data-dir={profile}-shot", f"--screenshot={picture}", address]
    done = subprocess.run(shot, capture_output=True, text=True, timeout=180, check=True)
    dump = [*common, f"--user-data-dir={profile}-dump", "--dump-dom", address]
    page = subprocess.run(dump, capture_output=True, text=True, timeout=180, check=True)
    return page.stdout, "\n".join(line for line in (done.stderr + page.stderr).splitlines() if "CONSOLE" in line)


@pytest.fixture(scope="module")
def watched(tmp_path_factory):
    """One run with everything on, seen while it goes."""
    work = tmp_path_factory.mktemp("watched")
    arguments = ["--out", str(work), "--seed", "0", "--prompts", "128", "--eval-prompts", "24", "--sft-steps", "60"]
    assert prepare(arguments) == 0
    ray_folder = Path(tempfile.mkdtemp(prefix="w", dir="/tmp"))  # short: sockets lie in it
    config = Config.model_validate(
        {
            "model": {"path": str(work / "model")},
            "data": {"train": str(work / "train.jsonl"), "eval": str(work / "eval.jsonl"), "max_prompt_tokens": 48},
            "curriculum": {"prompts_per_step": 8, "rollouts_per_step": 32},
            "rollout": {"max_new_tokens": 48, "timeout_s": 60.0, "num_generators": 1},
            "learner": {"lr": 1e-3, "dtype": "float32", "cpus_per_rank": 0.5},
            "placement": {"generator_cpus": 0.5, "verifier_cpus": 0.5, "use_gpu": "no"},
            "eval": {"interval": 4},
            "checkpoint": {"dir": str(work / "run"), "interval": 0, "export_final": False},
            "logging": {"progress": "lines", "histogram_interval": 1, "engine_metrics": True},
            "trainer": {"steps": 24},
            "ray": {"num_cpus": 4, "num_gpus": 0, "dashboard": True, "object_store_mb": 200},
        }
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_TMPDIR", str(ray_folder))
        patch.setenv("PYTHONPATH", str(ROOT))
        assert start_ray(config)
        found = next(ray_folder.rglob(DISCOVERY))
        prometheus, began = Prometheus(found.parent, work), time.time()
        seen: dict = {"work": work, "prometheus": prometheus, "began": began, "ray": found.parent}
        looker = threading.Thread(target=look, args=(seen, work), daemon=True)
        looker.start()
        try:
            train(config)
            looker.join(timeout=240)
            time.sleep(15)  # Ray's agents report every few seconds
            seen["timeline"] = ray.timeline()
            yield seen
        finally:
            prometheus.server.terminate()
            prometheus.server.wait(timeout=30)
            ray.shutdown()
            shutil.rmtree(ray_folder, ignore_errors=True)


def look(seen: dict, work: Path) -> None:
    """Once steps are being trained: the actors as Ray's dashboard server lists them."""
    while not ((work / "run/metrics.jsonl").exists() and '"step": 2' in (work / "run/metrics.jsonl").read_text()):
        time.sleep(0.5)
    seen["actors"] = [(a.class_name, a.name, a.repr_name, a.state) for a in list_actors(detail=True)]


def test_every_query_of_the_board_returns_series_and_those_that_should_move_do(watched):
    missing, still = [], []
    for query in queries():
        series = watched["prometheus"].series(query, watched["began"])
        if not series:
            missing.append(query)
        elif query in MOVE and not any(len(set(values)) > 1 for values in series.values()):
            still.append(query)
    assert not missing and not still, (missing, still)
    assert set(MOVE) <= set(queries())


def test_every_role_reports_its_process_under_role_and_name(watched):
    series = watched["prometheus"].series("ray_cures_process_cpu_seconds", watched["began"])
    labels = [json.loads(key) for key in series]
    found = {(one["role"], one["name"]) for one in labels}
    named = {(role, f"{role}-0") for role in ("generator", "verifier", "learner")}
    assert found == named | {("driver", "driver"), ("ledger", "ledger")}
    for key, values in series.items():
        assert values[-1] > values[0] or len(set(values)) > 1, key
    gauges = watched["prometheus"].series("ray_cures_rollout_reward", watched["began"])
    assert {json.loads(key)["run"] for key in gauges} == {"run"}


def test_every_metric_of_a_run_is_explained(watched):
    lines = [json.loads(line) for line in (watched["work"] / "run/metrics.jsonl").read_text().splitlines()]
    keys = {key for line in lines for key in line if "/" in key}
    assert len(keys) > 40
    assert not sorted(key for key in keys if metric_of(key) is None)


def test_actors_have_names_and_phases_are_in_the_timeline(watched):
    ours = {cls: (name, shown, state) for cls, name, shown, state in watched["actors"]}
    for cls, shown in (("GeneratorActor", "generator-0"), ("VerifierActor", "verifier-0"), ("LedgerActor", "ledger")):
        name, repr_name, state = ours[cls]
        assert name.startswith("cures-run-") and name.endswith(shown) and repr_name == shown and state == "ALIVE"
    assert ours["LearnerRank"][1] == "learner-0"
    names = {event.get("name") for event in watched["timeline"]}
    assert {"write weights", "canary log-probabilities", "fetch payloads"} <= names


def test_the_report_opens_in_a_browser_without_errors(watched):
    report = write_report(watched["work"] / "run")
    page, console = chromium(report.as_uri(), watched["work"] / "report.png", watched["work"] / "profile-report", 5000)
    assert not console and "data:image/png" in page
    assert (watched["work"] / "report.png").stat().st_size > 10_000
