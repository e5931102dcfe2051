"""A short soak: every role of a real run dies by SIGKILL, and the run ends as if nothing had been."""

import json
import time

import pytest

from benchmarks.micro import soak
from benchmarks.micro.soak_report import record_recovery
from benchmarks.micro.soak_watch import logged, trained
from cures_ray.synthetic.base_model import main as prepare

pytestmark = [pytest.mark.integration, pytest.mark.chaos, pytest.mark.timeout(900)]
STEPS, MEAN_S = 600, 8.0


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("soak")
    sizes = ["--prompts", "256", "--eval-prompts", "64", "--sft-steps", "60"]
    assert prepare(["--out", str(folder / "base"), "--seed", "0", *sizes]) == 0
    assert soak.run_until(folder, "killed", STEPS, MEAN_S, time.monotonic() + 780), "the run did not end in time"
    return folder


def test_every_role_is_killed_and_every_step_is_trained_once(killed):
    kills = [json.loads(line) for line in (killed / "kills-killed.jsonl").read_text().splitlines()]
    assert {k["role"] for k in kills} == set(soak.VICTIMS), "each role was killed"
    steps, summary = trained(killed / "killed"), json.loads((killed / "killed" / "summary.json").read_text())
    assert [s["step"] for s in steps] == list(range(1, STEPS + 1))
    assert all(s["staleness/max"] <= 1 for s in steps)
    assert summary["in_flight"] == 0
    assert summary["planned"] == summary["trained"] + sum(summary["discarded"].values())
    notes = [r["note"] for r in logged(killed / "killed") if "note" in r]
    replaced = [n for n in notes if "starting a replacement" in n]
    assert len(replaced) >= 1, notes
    restarted = [n for n in notes if "Restarted from" in n]
    assert 1 <= len(restarted) <= sum(k["role"] == "learner" for k in kills), notes
    assert summary["held_out_accuracy_after"] > summary["held_out_accuracy_before"] + 0.1
    record_recovery(killed / "killed", kills)
