import io
import json

import numpy as np
from fakes import small_config
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from cures_ray.run.health import read_records
from cures_ray.run.sinks import ProgressView, RunLog

RECORD = {"rollout/reward": 0.5, "staleness/mean": 0.25, "curriculum/tau": 0.1, "accounting/in_flight": 64.0}


def test_every_step_lands_in_jsonl_and_tensorboard_with_histograms(tmp_path):
    log = RunLog(small_config(), tmp_path, io.StringIO())
    picture = {"n_by_lease": np.array([2, 9]), "p_by_lease": np.array([0.1, 0.5]), "belief_mean": np.linspace(0, 1, 9)}
    log.step(1, RECORD, {})
    log.step(2, RECORD, picture)
    log.note("a note")
    log.close()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line.get("step") for line in lines] == [1, 2, None] and lines[0]["curriculum/tau"] == 0.1
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [e.step for e in events.Scalars("rollout/reward")] == [1, 2]
    assert "belief_mean" in events.Tags()["histograms"]
    assert "curriculum/rollouts_against_accuracy" in events.Tags()["images"]


def test_the_progress_view_is_readable_when_output_is_a_file():
    out = io.StringIO()
    view = ProgressView("auto", 40, out)
    view.step(0, {"eval/greedy_accuracy": 0.31}, {})
    view.step(1, RECORD, {})
    view.note("generator-0 lost")
    text = out.getvalue()
    assert "\x1b" not in text
    heading, row = text.splitlines()[1:3]
    assert "held-out" in heading and "in flight" in heading
    assert row.split()[:3] == ["1/40", "0.310", "0.500"]
    assert "generator-0 lost" in text


def test_a_resumed_run_continues_its_log(tmp_path):
    for step in (1, 2):
        log = RunLog(small_config(), tmp_path, io.StringIO())
        log.step(step, RECORD, {})
        log.close()
    assert [r["step"] for r in read_records(tmp_path)] == [1, 2]


def test_batches_without_anything_to_learn_are_said_once(tmp_path):
    out = io.StringIO()
    log = RunLog(small_config(logging={"progress": "lines"}), tmp_path, out)
    for step, reward in enumerate([0.0] * 4 + [0.1] + [0.0] * 12 + [1.0] * 5):
        log.step(step, RECORD | {"rollout/reward": reward}, {})
    log.close()
    notes = [line for line in out.getvalue().splitlines() if "batches was" in line]
    assert len(notes) == 2
    assert notes[0].startswith("step 9: every rollout of the last 5 batches was wrong") and "samples.jsonl" in notes[0]
    assert notes[1].startswith("step 21: every rollout of the last 5 batches was right")
