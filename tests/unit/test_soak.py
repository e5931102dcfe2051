"""The soak's choices and figures, and the table of faults."""

from __future__ import annotations

import json
import signal
import subprocess
import sys

import psutil
import pytest

from benchmarks.harness.doc_tables import fill
from benchmarks.harness.faults import record_fault, seconds_lost
from benchmarks.micro import soak
from benchmarks.micro.soak_report import draw, growth, recovery
from benchmarks.micro.soak_watch import Seen


def step(at: float, number: int) -> dict:
    return {"time": at, "step": number, "rollout/reward": 0.5, "time/step_s": 1.0}


def test_seconds_are_lost_until_training_is_further_than_before():
    steps = [step(1, 1), step(2, 2), step(3, 3), step(13, 3), step(14, 4)]  # step 3 was made again
    assert seconds_lost(steps, at=3.5) == pytest.approx(14 - 3.5 - 1.0)
    assert seconds_lost(steps, at=0.5) == 0.0, "no longer than a step"
    assert seconds_lost(steps, at=20.0) is None


def test_each_role_is_killed_equally_often_within_bounds_of_the_mean(monkeypatch):
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    process = psutil.Process(child.pid)
    sent = []
    monkeypatch.setattr(psutil.Process, "send_signal", lambda self, number: sent.append((self.pid, number)))
    monkeypatch.setattr(soak, "processes", lambda root: [Seen(role, process) for role in soak.VICTIMS])
    killer = soak.Killer(10.0, seed=1)
    roles = [killer.strike(process)["role"] for _ in range(15)]
    intervals = [killer._interval() for _ in range(200)]
    process.kill()
    child.wait()
    for deck in (roles[:5], roles[5:10], roles[10:]):
        assert set(deck) == set(soak.VICTIMS)
    assert sent == [(child.pid, signal.SIGKILL)] * 15
    assert min(intervals) >= 3.0 and max(intervals) <= 30.0 and 8.0 < sum(intervals) / 200 < 12.0


def test_growth_is_the_slope_after_the_start_and_none_of_a_short_life():
    samples = [
        {"time": float(t), "piece": 0, "held": {"ledger": {"1@0": [100 + (50 if t > 60 else 0) + t / 100, 7]}}}
        for t in range(0, 600, 10)
    ]
    samples[0]["held"]["verifier"] = {"2@0": [1.0, 1]}
    found = growth(samples, pace=0.5)
    assert found["ledger"][0] == pytest.approx(1 / 100 * 0.5 * 1000) and found["ledger"][1] == pytest.approx(
        0, abs=1e-9
    )
    assert "verifier" not in found


def test_a_kill_with_another_one_before_the_run_was_further_says_nothing(tmp_path):
    lines = [step(1, 1), step(2, 2), step(30, 3), step(31, 4), step(45, 5)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in lines))
    kills = [
        {"time": 3.0, "role": "engine", "step": 2},
        {"time": 10.0, "role": "ledger", "step": 2},
        {"time": 35.0, "role": "verifier", "step": 4},
    ]
    assert recovery(tmp_path, kills) == {"ledger": [19.0], "verifier": [9.0]}
    assert recovery(tmp_path, kills, starts=[0.0, 40.0]) == {"ledger": [19.0]}, "the run was stopped meanwhile"


def test_the_table_of_faults_is_what_the_tests_recorded(tmp_path, monkeypatch):
    record_fault("not recorded", "nothing", 1.0)
    monkeypatch.setenv("FAULTS", str(tmp_path / "faults.json"))
    record_fault("the ledger is killed", "it comes back", 4.26, rollouts=64, order=40)
    record_fault("a verifier is killed", "another judges", 0.0, order=20)
    record_fault("the ledger is killed", "it comes back", 12.3, rollouts=64, order=40)
    text = fill("a\n<!-- faults -->\nold\n<!-- end faults -->\nb\n", tmp_path)
    assert text.splitlines()[2:6] == [
        "| fault | what happens | seconds lost | rollouts made again |",
        "|---|---|---|---|",
        "| a verifier is killed | another judges | 0.0 | – |",
        "| the ledger is killed | it comes back | 12 | 64 |",
    ]
    assert text.startswith("a\n") and text.endswith("b\n") and "old" not in text
    row = json.loads((tmp_path / "faults.json").read_text())["rows"]["the ledger is killed"]
    assert row["source"].endswith("recorded") and row["commit"] and row["date"]


def test_the_picture_is_drawn_from_the_rows(tmp_path):
    rows = [{"run": run, "step": s, "accuracy": s / 10} for run in ("killed", "peace") for s in (0, 5)]
    rows += [{"run": "killed", "step": s, "MiB": {"ledger": 100.0, "GCS": 50.0}} for s in (1, 2)]
    draw(rows, tmp_path / "soak.png")
    assert (tmp_path / "soak.png").read_bytes()[:4] == b"\x89PNG"
