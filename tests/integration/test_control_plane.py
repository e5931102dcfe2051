"""The control-plane benchmark, short: real Ray, driver, ledger, generator and verifier actors."""

import json

import pytest

from benchmarks.micro.control_plane import BARS, main, old_window
from cures_ray.messages import RunError


def test_a_short_window_writes_what_each_role_spent(tmp_path, capsys):
    assert main(["--prompts", "128", "--steps", "8", "--repeats", "1", "--out", str(tmp_path)]) == 0
    result = json.loads((tmp_path / "control_plane.json").read_text())
    figures = {name: values[1] for name, values in result["figures"].items()}
    assert {f"now_{name}" for name in BARS} <= set(figures)
    assert figures["now_rollouts_per_s"] > 10
    assert 0 < figures["now_settled_p50_s"] <= figures["now_settled_p99_s"] < 60
    control = figures["now_driver_us_per_rollout"] + figures["now_ledger_us_per_rollout"]
    assert figures["now_control_us_per_rollout"] == pytest.approx(control)
    assert [row["side"] for row in result["rows"]] == ["now"]
    last = capsys.readouterr().out.splitlines()[-1]
    assert "missed" in last or "all bars met" in last


def test_the_commit_before_needs_the_history(tmp_path, monkeypatch):
    monkeypatch.setattr("benchmarks.micro.control_plane.BEFORE", "0" * 40)
    with pytest.raises(RunError, match="needs a clone with its history"):
        old_window(tmp_path)
