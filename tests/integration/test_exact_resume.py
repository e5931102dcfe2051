"""Synchronous training in float32 on real Ray, vLLM and DeepSpeed: killed, resumed, the same to the bit.

What must be equal to a run without a kill: weights, optimizer, ledger with beliefs, tau, predictor and accounting, and
every random state. All of it is in the checkpoint of the last step, whose files are compared byte by byte.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml
from dying_run import PHASES
from test_full_run import records, small_run

from actors.cluster.launch import train
from benchmarks.harness.faults import record_fault
from cures_ray.config import Config
from cures_ray.run.checkpoint import CheckpointStore, step_of

pytestmark = [pytest.mark.integration, pytest.mark.timeout(900)]
STEPS = 6
STATE = ("learner/rank-0.safetensors", "learner/model/model.safetensors", "ledger/state.safetensors")


def exact_run(base, run_dir, generators: int) -> Config:
    return small_run(
        base,
        run_dir,
        rollout={"num_generators": generators},
        async_rl={"max_staleness": 0},
        curriculum={"prompts_per_step": 32, "rollouts_per_step": 48},
        eval={"interval": 2},
        checkpoint={"dir": str(run_dir), "interval": 1},
        trainer={"steps": STEPS},
    )


def launched(config: Config, phase: str, version: int) -> subprocess.Popen:
    run_dir = Path(config.checkpoint.dir)
    path = run_dir.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(config.model_dump(mode="json", exclude_unset=True)))
    script = Path(__file__).with_name("dying_run.py")
    log = run_dir.with_suffix(".log").open("a")
    environment = os.environ | {"RAY_ADDRESS": ""}
    return subprocess.Popen(
        [sys.executable, str(script), str(path), phase, str(version)], stdout=log, stderr=log, env=environment
    )


def check_death(config: Config, process: subprocess.Popen, phase: str, version: int) -> None:
    """It died by SIGKILL, with all its processes, in the middle of ``phase``."""
    run_dir = Path(config.checkpoint.dir)
    assert process.wait(300) == -9, run_dir.with_suffix(".log").read_text()[-2000:]
    witness = run_dir / "death.json"
    facts = json.loads(witness.read_text())
    witness.unlink()
    deadline = time.monotonic() + 20
    while (alive := [pid for pid in facts["pids"] if _lives(pid)]) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not alive, f"{len(alive)} processes outlived the run"
    assert facts["phase"] == phase and facts["version"] >= version - (phase in ("publishing", "checkpoint"))
    if phase == "generation":
        assert facts["rollouts"] > 0, facts
    if phase == "checkpoint":
        assert facts["writing"] and list((run_dir / "checkpoints").glob(".writing-*")), facts
    folder, problems = CheckpointStore(run_dir).newest_intact()
    assert folder is not None and not problems and step_of(folder) < STEPS


def _lives(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def check_equal(run_dir: Path, reference: Path) -> None:
    last = Path("checkpoints") / f"step-{STEPS:08d}"
    different = [
        name for name in STATE if (run_dir / last / name).read_bytes() != (reference / last / name).read_bytes()
    ]
    assert not different
    evaluations = [json.loads((folder / last / "driver.json").read_text()) for folder in (run_dir, reference)]
    assert evaluations[0] == evaluations[1]
    steps = [[r["step"] for r in records(folder) if "rollout/reward" in r] for folder in (run_dir, reference)]
    assert steps[0] == steps[1] == list(range(1, STEPS + 1))


def resume(config: Config) -> None:
    """In this process, to the end; notes what it took to train again."""
    began = time.time()
    train(config)
    steps = [r for r in records(Path(config.checkpoint.dir)) if "rollout/reward" in r]
    first = min(r["time"] for r in steps if r["time"] > began)
    what = "the same command goes on from the newest checkpoint; synchronous runs to the same bits"
    record_fault("the whole run is killed", what, first - began - steps[-1]["time/step_s"], order=60)


def test_a_run_killed_in_the_learner_step_resumes_to_the_same_bits(base, tmp_path, ray_session):
    reference, killed = exact_run(base, tmp_path / "reference", 1), exact_run(base, tmp_path / "killed", 1)
    dying = launched(killed, "learner step", 3)
    train(reference)  # beside it: what else runs on the machine must not matter
    check_death(killed, dying, "learner step", 3)
    resume(killed)
    check_equal(tmp_path / "killed", tmp_path / "reference")


@pytest.mark.chaos
def test_a_run_killed_in_each_phase_in_turn_resumes_to_the_same_bits(base, tmp_path, ray_session):
    """Six deaths of one run. Either of its two engines may get the batch."""
    reference, killed = exact_run(base, tmp_path / "reference", 2), exact_run(base, tmp_path / "killed", 2)
    train(reference)
    for phase, version in zip(PHASES, (1, 2, 2, 3, 4, 4), strict=True):
        check_death(killed, launched(killed, phase, version), phase, version)
    resume(killed)
    check_equal(tmp_path / "killed", tmp_path / "reference")
