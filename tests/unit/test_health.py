"""Each rule fires on a made run that has its illness, and a healthy run gets none."""

import json

import numpy as np
import pytest

from cures_ray.run.health import diagnose, read_notes, read_records, verdict


def run(steps: int = 60, **changes) -> list[dict]:
    """A healthy run; ``changes``: metric (with "__" for "/") -> function of the step, or a value."""
    rng = np.random.default_rng(0)
    records = []
    for step in range(1, steps + 1):
        record = {
            "step": step,
            "rollout/reward": 0.3 + 0.4 * step / steps + 0.02 * rng.standard_normal(),
            "rollout/truncated": 0.02,
            "learner/entropy": 0.5,
            "learner/grad_norm": 0.2,
            "learner/computed_share": 0.5,
            "learner/logprob_diff_max": 0.2,
            "curriculum/fault_fraction": 0.0,
            "time/step_s": 10.0,
            "time/learner_idle_s": 2.0,
            "time/generator_idle_s": 2.0,
            "accounting/planned": 256.0 * step,
        }
        for name, change in changes.items():
            record[name.replace("__", "/")] = change(step) if callable(change) else change
        records.append(record)
        if step % 10 == 0:
            records.append({"step": step, "eval/greedy_accuracy": 0.3 + 0.4 * step / steps})
    return records


def test_a_healthy_run_has_no_findings():
    assert diagnose(run()) == [] and verdict([]) == "healthy"
    assert diagnose([]) == []


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rollout__reward": 0.3}, "does not rise"),
        ({"learner__entropy": lambda s: 0.5 if s < 20 else 0.01}, "entropy fell to 2%"),
        ({"curriculum__fault_fraction": 0.25}, "25.0% of the latest rollouts have no verdict"),
        ({"learner__computed_share": 0.0}, "20 of the last 20 batches held nothing to learn"),
        ({"rollout__truncated": 0.7}, "70% of the rollouts end"),
        ({"time__learner_idle_s": 8.0}, "the learner waits 80%"),
        ({"time__generator_idle_s": 8.0}, "the generators wait 80%"),
        ({"accounting__discarded_stale": lambda s: 64.0 * s}, "25% of all rollouts ended as stale"),
        ({"learner__logprob_diff_max": 6.0}, "by 6.0 nats"),
        ({"learner__grad_norm": lambda s: 0.2 if s < 60 else 9.0}, "jumped to 9"),
    ],
)
def test_an_ill_run_is_told_what_and_what_to_do(changes, words):
    findings = diagnose(run(**changes))
    assert any(words in f.what for f in findings), findings
    assert all(len(f.do) > 20 for f in findings)


def test_a_fall_of_held_out_accuracy_is_bad():
    records = run()
    records.append({"step": 61, "eval/greedy_accuracy": 0.2})
    assert verdict(diagnose(records)) == "unhealthy"


def test_accuracy_of_a_constant_answer_is_no_success():
    records = run()
    records.append({"step": 60, "eval/greedy_accuracy": 0.7, "eval/best_constant_accuracy": 0.69})
    assert any("one constant answer" in f.what for f in diagnose(records))


def test_a_torn_line_and_notes_are_read(tmp_path):
    whole = [json.dumps({"step": 1, "rollout/reward": 0.5}), json.dumps({"note": "generator-0 lost"})]
    lines = [*whole, '{"step": 2, "r']
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    assert [r["step"] for r in read_records(tmp_path)] == [1]
    assert read_notes(tmp_path) == ["generator-0 lost"]
    assert read_records(tmp_path / "none") == []
