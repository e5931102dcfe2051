"""A short soak: every role of a real run dies by SIGKILL, and the run ends as if nothing had been."""

import json
import time

import pytest

from benchmarks.harness.faults import record_fault, seconds_lost
from benchmarks.micro import soak
from benchmarks.micro.soak_watch import logged, trained
from cures_ray.synthetic.base_model import main as prepare

pytestmark = [pytest.mark.integration, pytest.mark.chaos, pytest.mark.timeout(900)]
STEPS, MEAN_S = 600, 8.0
WHAT = {  # victim -> its row in the table of faults: order, fault, what happens
    "generator": (
        10,
        "a generator is killed",
        "a replacement loads the weights; its leases are generated again",
    ),
    "engine": (11, "a generator's engine is killed", "its actor ends too and is replaced, as above"),
    "verifier": (20, "a verifier is killed", "Ray starts it again; its rollouts are verified again, elsewhere"),
    "learner": (30, "a learner rank is killed", "the group starts again from the newest checkpoint; generators stay"),
    "ledger": (40, "the ledger is killed", "it comes back from its journal with the same counts; calls are repeated"),
}


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

    again = killed / "killed" / "metrics-lost.jsonl"
    lost = [json.loads(line) for line in again.read_text().splitlines()] if again.exists() else []
    records = sorted([*steps, *(r for r in lost if "rollout/reward" in r)], key=lambda r: r["time"])
    for role, (order, fault, what) in WHAT.items():
        measured = [seconds_lost(records, k["time"]) for k in kills if k["role"] == role]
        known = sorted(s for s in measured if s is not None)
        if known:
            record_fault(fault, what, known[len(known) // 2], order=order)
