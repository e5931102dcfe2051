"""Faults on the real system: a hung engine, a dead learner rank, a generator that cannot come back, signals.

Every test asserts that its fault happened.
"""

import json
import os
import signal
import subprocess
import sys
import threading
import time

import psutil
import pytest
import yaml
from test_full_run import base, records, small_run  # noqa: F401

from actors.cluster.launch import train
from cures_ray.run.checkpoint import CheckpointStore, step_of

pytestmark = [pytest.mark.integration, pytest.mark.timeout(500)]


def when_trained(run_dir, step: int, act) -> threading.Thread:
    """Run ``act()`` in a thread once ``step`` is in the log; ``thread.done`` holds its answer."""

    def work():
        deadline = time.monotonic() + 300
        while time.monotonic() < deadline:
            try:
                if any(r.get("step", 0) >= step and "rollout/reward" in r for r in records(run_dir)):
                    thread.done = act()
                    return
            except (OSError, json.JSONDecodeError):
                pass
            time.sleep(0.1)

    thread = threading.Thread(target=work, daemon=True)
    thread.done = None
    thread.start()
    return thread


def descendants(name: str) -> list[psutil.Process]:
    """Processes below this one whose command line holds ``name``."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if name in " ".join(process.cmdline()):
                found.append(process)
        except psutil.Error:
            continue
    return found


def steps_of(run_dir) -> list[int]:
    return [r["step"] for r in records(run_dir) if "rollout/reward" in r]


def notes_of(run_dir) -> list[str]:
    return [r["note"] for r in records(run_dir) if "note" in r]


def test_a_hung_engine_is_found_and_replaced_while_the_other_generator_works_on(base, tmp_path, ray_session):  # noqa: F811
    run_dir = tmp_path / "run"

    def hang():
        engine = descendants("VLLM::EngineCor")[0]
        engine.send_signal(signal.SIGSTOP)
        return engine

    fault = when_trained(run_dir, 2, hang)
    rollout = {"max_new_tokens": 48, "timeout_s": 60.0, "num_generators": 2, "health_timeout_s": 5.0}
    summary = train(small_run(base, run_dir, rollout=rollout, trainer={"steps": 12}))
    assert fault.done is not None, "no engine was stopped"
    assert steps_of(run_dir) == list(range(1, 13))
    assert [n for n in notes_of(run_dir) if "lost" in n and "starting a replacement" in n], notes_of(run_dir)
    assert summary.accounting.in_flight == 0
    summary.accounting.check()


def test_a_dead_learner_rank_starts_again_from_the_newest_checkpoint(base, tmp_path, ray_session):  # noqa: F811
    run_dir = tmp_path / "run"
    fault = when_trained(run_dir, 5, lambda: descendants("ray::LearnerRank")[0].send_signal(signal.SIGKILL) or True)
    summary = train(small_run(base, run_dir, trainer={"steps": 8}, checkpoint={"dir": str(run_dir), "interval": 2}))
    assert fault.done, "no rank was killed"
    said = [n for n in notes_of(run_dir) if "Restarted from" in n]
    assert len(said) == 1 and "steps and" in said[0] and "rollouts are made again" in said[0], notes_of(run_dir)
    assert steps_of(run_dir) == list(range(1, 9)), "every step once"
    assert summary.accounting.in_flight == 0 and step_of(CheckpointStore(run_dir).newest_intact()[0]) == 8
    summary.accounting.check()


def started(base, run_dir, tmp_path) -> subprocess.Popen:  # noqa: F811
    config = small_run(base, run_dir, trainer={"steps": 500}).model_dump(mode="json", exclude_unset=True)
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(config))
    return subprocess.Popen(
        [sys.executable, "-m", "actors.commands.cli", "train", str(path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"RAY_ADDRESS": ""},
    )


def ended(process: subprocess.Popen, seconds: float) -> tuple[int, str]:
    try:
        output, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    return process.returncode, output


def test_sigterm_in_start_up_ends_in_order(base, tmp_path):  # noqa: F811
    process = started(base, tmp_path / "run", tmp_path)
    time.sleep(12.0)
    assert process.poll() is None and not (tmp_path / "run" / "checkpoints").exists(), "it is still starting"
    process.send_signal(signal.SIGTERM)
    code, output = ended(process, 60)
    assert code == 130 and "interrupted" in output and "SIGABRT" not in output, (code, output[-2000:])


def test_one_signal_leaves_a_checkpoint_and_a_second_one_ends_at_once(base, tmp_path):  # noqa: F811
    run_dir = tmp_path / "run"
    process = started(base, run_dir, tmp_path)
    deadline = time.monotonic() + 200
    while (time.monotonic() < deadline and not (run_dir / "metrics.jsonl").exists()) or not steps_of(run_dir):
        time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    code, output = ended(process, 120)
    assert code == 130 and "stopping" in output, (code, output[-2000:])
    folder, problems = CheckpointStore(run_dir).newest_intact()
    assert folder is not None and not problems and step_of(folder) >= 1
