"""Faults on the real system: a hung engine, a dead learner rank, a generator that cannot come back, signals.

Every test asserts that its fault happened.
"""

import os
import signal
import subprocess
import sys
import threading
import time

import psutil
import pytest
import yaml
from test_full_run import _safely, records, small_run

from actors.cluster.launch import train
from benchmarks.harness.faults import record_fault, seconds_lost
from cures_ray.run.checkpoint import CheckpointStore, step_of

pytestmark = [pytest.mark.integration, pytest.mark.timeout(500)]


def trained(step: int):
    """Holds once ``step`` is in the log."""
    return lambda log: any(r["step"] >= step for r in log if "rollout/reward" in r)


def noted(text: str, steps: int):
    """Holds ``steps`` optimizer steps after a note with ``text``: however fast the machine is, the run went on."""

    def holds(log):
        at = [i for i, r in enumerate(log) if text in r.get("note", "")]
        return bool(at) and sum("rollout/reward" in r for r in log[at[0] :]) >= steps

    return holds


def interrupt() -> bool:
    """End the run of this process in order, after the step in work."""
    os.kill(os.getpid(), signal.SIGINT)
    return True


def play(run_dir, *acts) -> threading.Thread:
    """In a thread: each ``(holds, act)`` in turn, ``act()`` once ``holds`` of the run's log; ``thread.done`` has the
    answers and ``thread.at`` the times. A run that is played to has more steps than it can make, and ends by the last
    act, or when an act does not come."""

    def work():
        for holds, act in acts:
            deadline = time.monotonic() + 300
            while not holds(_safely(run_dir)):
                if time.monotonic() > deadline:
                    interrupt()
                    return
                time.sleep(0.1)
            thread.at.append(time.time())
            thread.done.append(act())

    thread = threading.Thread(target=work, daemon=True)
    thread.done, thread.at = [], []
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


def trained_steps(log) -> list[dict]:
    return [r for r in log if "rollout/reward" in r]


def notes_of(run_dir) -> list[str]:
    return [r["note"] for r in records(run_dir) if "note" in r]


def test_a_hung_engine_is_found_and_replaced_while_the_other_generator_works_on(base, tmp_path, ray_session):
    run_dir = tmp_path / "run"

    def hang():
        engine = descendants("VLLM::EngineCor")[0]
        engine.send_signal(signal.SIGSTOP)
        return engine

    story = play(run_dir, (trained(2), hang), (noted("is back after", 2), interrupt))
    rollout = {"health_timeout_s": 5.0, "timeout_s": 20.0}
    summary = train(small_run(base, run_dir, rollout=rollout, trainer={"steps": 10**6}, eval={"interval": 0}))
    assert len(story.done) == 2, f"not all happened: {story.done}, {notes_of(run_dir)}"
    steps = steps_of(run_dir)
    assert steps == list(range(1, summary.interrupted_at + 1)), "every step once"
    log = records(run_dir)
    texts = [r.get("note", "") for r in log]
    lost, back = (next(i for i, t in enumerate(texts) if part in t) for part in ("starting a replacement", "is back"))
    assert "lost" in log[lost]["note"] and sum("rollout/reward" in r for r in log[lost:back]) >= 1, "nobody worked on"
    summary.accounting.check()
    what = "its actor finds it out within `rollout.health_timeout_s` (5 s here) and is replaced; the others work on"
    record_fault("an engine hangs", what, seconds_lost(trained_steps(log), story.at[0]), order=12)


def test_a_dead_learner_rank_starts_again_from_the_newest_checkpoint(base, tmp_path, ray_session):
    run_dir = tmp_path / "run"

    def kill():
        descendants("ray::LearnerRank")[0].send_signal(signal.SIGKILL)

    story = play(run_dir, (trained(5), kill), (noted("Restarted from", 3), interrupt))
    summary = train(small_run(base, run_dir, trainer={"steps": 10**6}))
    assert len(story.done) == 2, f"not all happened: {story.done}, {notes_of(run_dir)}"
    said = [n for n in notes_of(run_dir) if "Restarted from" in n]
    assert len(said) == 1 and "steps and" in said[0] and "rollouts are made again" in said[0], notes_of(run_dir)
    last = summary.interrupted_at
    assert steps_of(run_dir) == list(range(1, last + 1)), "every step once"
    assert step_of(CheckpointStore(run_dir).newest_intact()[0]) == last
    summary.accounting.check()


def started(base, run_dir, tmp_path) -> subprocess.Popen:
    config = small_run(base, run_dir, trainer={"steps": 10**6}).model_dump(mode="json", exclude_unset=True)
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


def wait_until(process: subprocess.Popen, holds, seconds: float = 200) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert process.poll() is None and time.monotonic() < deadline, "it ended, or never came so far"
        time.sleep(0.1)


def test_sigterm_in_start_up_ends_in_order(base, tmp_path):
    process = started(base, tmp_path / "run", tmp_path)
    wait_until(process, (tmp_path / "run" / "metrics.jsonl").exists)  # Ray is up, the actors start
    process.send_signal(signal.SIGTERM)
    code, output = ended(process, 60)
    assert "all actors are up" not in output, "it was not starting any more"
    assert code == 130 and "interrupted" in output and "SIGABRT" not in output, (code, output[-2000:])


def test_one_signal_leaves_a_checkpoint_and_a_second_one_ends_at_once(base, tmp_path):
    run_dir = tmp_path / "run"
    process = started(base, run_dir, tmp_path)
    wait_until(process, lambda: trained(1)(_safely(run_dir)))
    began = time.monotonic()
    process.send_signal(signal.SIGINT)
    code, output = ended(process, 120)
    seconds = time.monotonic() - began
    assert code == 130 and "stopping" in output, (code, output[-2000:])
    folder, problems = CheckpointStore(run_dir).newest_intact()
    assert folder is not None and not problems and step_of(folder) >= 1
    what = "the run ends after the step in work, with a checkpoint; the same command goes on (seconds: to its end)"
    record_fault("Ctrl-C or SIGTERM", what, seconds, order=70)
