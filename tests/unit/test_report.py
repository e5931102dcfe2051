"""The report page and `cures top`, of a made run."""

import json
import re

import pytest
from test_health import run

from actors.commands.cli import main as cures
from cures_ray.run.report import write_report
from cures_ray.run.top import sparkline

HOSTILE = "<script>alert(1)</script>"


@pytest.fixture
def run_dir(tmp_path):
    records = run(rollout__truncated=0.7)
    lines = [json.dumps(r) for r in records] + [json.dumps({"note": "generator-0 lost", "time": 1.0})]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    (tmp_path / "ledger").mkdir()
    batch = {"belief_histogram": [3, 5, 2], "n": [1, 1, 2], "p": [0.1, 0.5, 0.9]}
    (tmp_path / "ledger" / "history.jsonl").write_text(json.dumps(batch) + "\n" + '{"torn')
    sample = {"version": 5, "prompt": "1+1", "completion": HOSTILE, "answer": "2", "outcome": "incorrect"}
    lines = [json.dumps(sample | {"prompt_id": str(i)}) for i in range(3)]
    (tmp_path / "samples.jsonl").write_text("\n".join(lines) + "\n")
    (tmp_path / "run.json").write_text(json.dumps({"config": {"learner": {"lr": 0.5}}}))
    return tmp_path


def test_the_report_is_one_page_with_verdict_pictures_samples_and_settings(run_dir):
    page = write_report(run_dir).read_text()
    assert "unhealthy" in page and "70% of the rollouts end at rollout.max_new_tokens" in page
    assert page.count("data:image/png;base64,") >= 4 and not re.search(r'(src|href)="http', page)
    assert "&#34;lr&#34;: 0.5" in page and "generator-0 lost" in page
    assert "Believed accuracy of the prompts over time" in page


def test_what_never_changes_is_a_line_and_no_picture(run_dir):
    lines = [{"step": s, "rollout/reward": 0.1 * s, "curriculum/ess_fraction": 0.5} for s in range(1, 9)]
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    page = " ".join(write_report(run_dir).read_text().split())
    title = "Effective sample size of the sampling / prompts"
    assert f'alt="{title}"' not in page and f"{title} (effective sample size 0.5)" in page
    assert 'alt="Accuracy"' in page


def test_what_a_model_wrote_is_shown_as_text(run_dir):
    page = write_report(run_dir).read_text()
    assert HOSTILE not in page and "&lt;script&gt;alert(1)&lt;/script&gt;" in page


def test_a_folder_without_a_run_is_refused(tmp_path, capsys):
    assert cures(["report", str(tmp_path)]) == 2
    assert "has no steps" in capsys.readouterr().err
    assert cures(["top", str(tmp_path / "none")]) == 2


def test_top_shows_numbers_course_and_findings(run_dir, capsys):
    assert cures(["top", str(run_dir), "--once"]) == 0
    text = capsys.readouterr().out
    assert "step 60" in text and "held-out accuracy" in text and "70% of the rollouts end" in text


def test_a_sparkline_rises_with_its_metric():
    line = sparkline([{"x": float(i)} for i in range(80)], "x")
    assert line == "".join(sorted(line)) and len(line) == 40
