"""The run folder: one holder at a time, and a resumed run leaves nothing of the branch that it left."""

import asyncio
import json
import os
import subprocess
import sys
import time
from io import StringIO

import pytest
from fakes import small_config

from cures_ray.messages import ConfigError
from cures_ray.run.checkpoint import CheckpointStore
from cures_ray.run.folder import claim
from cures_ray.run.health import read_records
from cures_ray.run.sinks import JsonLines, RunLog


def config(folder, **checkpoint):
    return small_config(model={"path": "m"}, data={"train": "d"}, checkpoint={"dir": str(folder), **checkpoint})


def checkpoint(folder, step: int) -> str:
    async def write(target):
        (target / "driver.json").write_text(json.dumps({"version": step}))

    return str(asyncio.run(CheckpointStore(folder).save(step, write)))


def run(folder, first: int, last: int, every: int = 2, **options) -> None:
    """A start that trains steps ``first`` + 1 to ``last``, evaluates the first version, and dies."""
    claimed = claim(folder, config(folder, **options))
    claimed.begin()
    log = RunLog(claimed.config, folder, StringIO(), start=first)
    log.step(first, {"eval/greedy_accuracy": 0.5}, {})
    for step in range(first + 1, last + 1):
        log.step(step, {"rollout/reward": 0.1}, {})
        if step % every == 0:
            checkpoint(folder, step)
    log.close()
    claimed.lock.release()


def names(folder) -> list[str]:
    return [path.name for path in CheckpointStore(folder).folders()]


HOLD = """
import sys; from pathlib import Path; from cures_ray.run.folder import Lock
lock = Lock(Path(sys.argv[1])); print("held", flush=True); sys.stdin.read()
"""


def test_a_second_start_says_who_holds_the_folder_and_since_when(tmp_path):
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / "lock")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(ConfigError, match=rf"in use by process {holder.pid} on {os.uname().nodename} since 20\d\d-"):
        claim(tmp_path, config(tmp_path))
    holder.kill()
    holder.wait()
    claim(tmp_path, config(tmp_path)).lock.release()


def test_the_folder_is_free_again_after_a_failed_claim_and_a_child_does_not_hold_it(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    for _ in range(2):
        with pytest.raises(ConfigError, match="unknown run"):
            claim(tmp_path, config(tmp_path))
    (tmp_path / "metrics.jsonl").unlink()
    claimed = claim(tmp_path, config(tmp_path))
    up, said = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(said, b"up")
        time.sleep(20)
        os._exit(0)
    os.read(up, 2)
    claimed.lock._file.close()  # as at the death of this process
    try:
        claim(tmp_path, config(tmp_path)).lock.release()
    finally:
        os.kill(child, 9)
        os.waitpid(child, 0)


def test_no_step_is_in_the_log_twice_after_a_resume(tmp_path):
    run(tmp_path, 0, 5)
    with (tmp_path / "samples.jsonl").open("w") as file:
        file.writelines(json.dumps({"version": v, "prompt_id": "a"}) + "\n" for v in (0, 4, 5))
        file.write('{"version": 6, "pro')
    run(tmp_path, 4, 7)  # the checkpoint of step 4
    records = read_records(tmp_path)
    assert [r["step"] for r in records if "rollout/reward" in r] == [1, 2, 3, 4, 5, 6, 7]
    assert [r["step"] for r in records if "eval/greedy_accuracy" in r] == [0, 4]
    assert [json.loads(line)["version"] for line in (tmp_path / "samples.jsonl").read_text().splitlines()] == [0, 4]
    aside = (tmp_path / "abandoned-1/metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in aside] == [5], "nothing is lost"


def test_a_first_version_that_is_evaluated_again_is_logged_once(tmp_path):
    run(tmp_path, 0, 4)
    for _ in range(2):
        run(tmp_path, 4, 4)
    assert [r["step"] for r in read_records(tmp_path) if "eval/greedy_accuracy" in r] == [0, 4]


def test_a_resume_from_a_path_keeps_what_it_writes_and_auto_goes_on_with_its_branch(tmp_path):
    run(tmp_path, 0, 8)
    assert names(tmp_path) == ["step-00000008", "step-00000006"]
    old = (tmp_path / "checkpoints/step-00000008/manifest.json").read_bytes()
    run(tmp_path, 6, 6, resume=str(tmp_path / "checkpoints/step-00000006"))
    assert names(tmp_path) == ["step-00000006"]
    assert claim(tmp_path, config(tmp_path)).resume.name == "step-00000006", "the branch that was left is back"
    kept = tmp_path / "abandoned-1/checkpoints/step-00000008/manifest.json"
    assert kept.read_bytes() == old


def test_a_resume_from_another_folder_leaves_this_folders_own_checkpoints(tmp_path):
    run(tmp_path / "a", 0, 4)
    run(tmp_path / "b", 0, 8)
    run(tmp_path / "b", 4, 6, resume=str(tmp_path / "a/checkpoints/step-00000004"))
    assert names(tmp_path / "b") == ["step-00000006"]
    claimed = claim(tmp_path / "b", config(tmp_path / "b"))
    assert claimed.resume.name == "step-00000006"


def test_damaged_newer_checkpoints_are_moved_aside_and_named(tmp_path):
    run(tmp_path, 0, 8)
    (tmp_path / "checkpoints/step-00000008/manifest.json").write_text("{")
    claimed = claim(tmp_path, config(tmp_path))
    claimed.begin()
    assert claimed.resume.name == "step-00000006" and names(tmp_path) == ["step-00000006"]
    assert "passed over" in claimed.notes[0] and "abandoned-1 now: " in claimed.notes[-1]
    assert "step-00000008" in claimed.notes[-1] and "metrics.jsonl" in claimed.notes[-1]


def test_a_start_that_fails_before_it_begins_changes_nothing(tmp_path):
    run(tmp_path, 0, 8)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file() and p.name != "lock"}
    claim(tmp_path, config(tmp_path, resume=str(tmp_path / "checkpoints/step-00000006"))).lock.release()
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file() and p.name != "lock"} == before


def test_a_damaged_record_of_the_run_is_explained(tmp_path):
    run(tmp_path, 0, 2)
    for text in ("", "{", "null", '{"identity": 3, "config": {}}'):
        (tmp_path / "run.json").write_text(text)
        with pytest.raises(ConfigError, match=r"run\.json is damaged"):
            claim(tmp_path, config(tmp_path))


def test_what_a_restarted_learner_makes_again_is_in_the_log_once(tmp_path):
    log = JsonLines(tmp_path / "metrics.jsonl")
    for number in (1, 2, 3, 4):
        log.step(number, {"rollout/reward": 0.1}, {})
        if number == 2:
            log.step(2, {"eval/greedy_accuracy": 0.5}, {})
    log.rewind(2)
    log.step(2, {"eval/greedy_accuracy": 0.5}, {})  # the version that it goes on from is evaluated again
    for number in (3, 4):
        log.step(number, {"rollout/reward": 0.2}, {})
    log.close()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(r["step"], r.get("rollout/reward")) for r in lines] == [(1, 0.1), (2, 0.1), (2, None), (3, 0.2), (4, 0.2)]
    lost = [json.loads(line)["step"] for line in (tmp_path / "metrics-lost.jsonl").read_text().splitlines()]
    assert lost == [3, 4]
