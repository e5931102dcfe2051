"""The Grafana board, the table of metrics and the settings of `cures dashboard`."""

import json
import re
from pathlib import Path

import pytest
import yaml

from actors.commands.board import ROWS, board, queries
from actors.commands.cli import main as cures
from actors.commands.dashboard import grafana_settings
from cures_ray.run.metric_table import METRICS, PROMETHEUS_ONLY, metric_of, page

ROOT = Path(__file__).resolve().parents[2]


def test_the_page_of_metrics_is_up_to_date():
    assert (ROOT / "docs" / "metrics.md").read_text() == page(), "run: python -m cures_ray.run.metric_table"


def test_every_metric_is_explained_once_and_has_one_prometheus_name():
    keys = [m.key for m in METRICS]
    assert len(keys) == len(set(keys)) and all(len(m.meaning) > 8 for m in METRICS)
    assert metric_of("accounting/discarded_stale")[1] == "stale"
    assert metric_of("accounting/discarded")[1] == ""
    assert metric_of("eval/greedy_accuracy/level_Level 5")[1] == "Level 5"
    assert metric_of("nothing/here") is None


def test_the_board_asks_only_for_metrics_that_exist():
    known = {f"ray_{m.prometheus}" for m in METRICS}
    known |= {f"ray_{m.prometheus}{part}" for m in PROMETHEUS_ONLY for part in ("", "_sum", "_count", "_bucket")}
    asked = {name for query in queries() for name in re.findall(r"ray_cures_\w+", query)}
    assert asked <= known and len(asked) > 20


def test_the_board_is_what_grafana_reads():
    content = json.loads(board())
    panels = [p for p in content["panels"] if p["type"] == "timeseries"]
    assert content["uid"] == "cures" and len(panels) == sum(len(row) for row in ROWS.values())
    assert all(target["expr"] and target["refId"] for p in panels for target in p["targets"])


def test_dashboard_follows_rays_list_of_nodes(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cures(["dashboard", "--ray-dir", str(tmp_path / "ray"), "--write-only"]) == 2
    assert "start Ray first" in capsys.readouterr().err
    (tmp_path / "ray").mkdir()
    (tmp_path / "ray" / "prom_metrics_service_discovery.json").write_text("[]")
    assert cures(["dashboard", "--ray-dir", str(tmp_path / "ray"), "--write-only"]) == 0
    settings = yaml.safe_load((tmp_path / "runs/dashboard/prometheus.yml").read_text())
    files = settings["scrape_configs"][0]["file_sd_configs"][0]["files"]
    assert files == [str(tmp_path / "ray" / "prom_metrics_service_discovery.json")]


def test_a_missing_prometheus_is_said_before_anything_starts(tmp_path, monkeypatch, capsys):
    (tmp_path / "prom_metrics_service_discovery.json").write_text("[]")
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert cures(["dashboard", "--ray-dir", str(tmp_path), "--dir", str(tmp_path / "out")]) == 2
    assert "prometheus is not installed" in capsys.readouterr().err


def test_grafana_is_given_source_and_board(tmp_path):
    ini = grafana_settings(tmp_path, 9999, 3333)
    assert "http_port = 3333" in ini.read_text()
    source = yaml.safe_load((tmp_path / "grafana/provisioning/datasources/prometheus.yml").read_text())
    assert source["datasources"][0]["url"].endswith(":9999")


@pytest.mark.parametrize("row", list(ROWS))
def test_a_panel_has_at_most_five_curves_of_its_own(row):
    assert all(1 <= len(panel.queries) <= 5 for panel in ROWS[row])
