"""Tables of the documents come from the committed result files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.harness.doc_tables import fill, main, render
from benchmarks.research.map_picture import draw
from cures_ray.messages import ConfigError

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def results(tmp_path) -> Path:
    runs = [
        {"arm": arm, "seed": seed, "status": "done", "curve": {"rollouts": [0, 100], "greedy": [0.2, 0.4 + 0.2 * seed]}}
        for arm in ("grpo", "b@x=1")
        for seed in (0, 1)
    ]
    runs.append({"arm": "lost", "seed": 0, "status": "failed"})
    figures = {
        "grpo/final_sampled": [0.4, 0.5, 0.6],
        "b@x=1/final_sampled": [0.5, 0.6, 0.7],
        "b@x=1/speedup/rollouts/best": [1.2, 1.5, 2.0],
        "b@x=1/speedup/rollouts/best/censored": 1,
        "b@x=1/difference/rollouts": [-0.1, 0.1, 0.2],
    }
    content = {
        "command": "cures bench x",
        "figures": figures,
        "rows": [*runs, {"arm": "grpo", "explain": {"tau": 0.25}}],
    }
    (tmp_path / "one.json").write_text(json.dumps(content))
    (tmp_path / "two.json").write_text(json.dumps(content | {"figures": {}}))
    return tmp_path


def test_a_table_is_made_from_its_comment(results):
    spec = """columns: seeds, final_sampled as final, difference/rollouts, speedup/rollouts/best as best, mean/tau as τ
    GRPO = grpo
    b@x=1
    elsewhere = two:grpo
    """
    assert render("one", spec, results).splitlines() == [
        "| arm | seeds | final | difference/rollouts | best | τ |",
        "|---|---|---|---|---|---|",
        "| GRPO | 2 | 0.500 [0.400, 0.600] | – | – | 0.25 |",
        "| b@x=1 | 2 | 0.600 [0.500, 0.700] | +0.100 [-0.100, +0.200] | ≤ 1.50 [1.20, 2.00] (1/2 never) | – |",
        "| elsewhere | 2 | – | – | – | 0.25 |",
    ]


def test_accuracies_at_a_cost_are_means_over_seeds_with_their_range(results):
    assert "| grpo | 0.350 (0.300 to 0.400) |" in render("one", "columns: greedy@50\ngrpo\n", results)


def test_filling_twice_changes_nothing_and_keeps_the_rest(results):
    text = "before\n<!-- table one\ncolumns: seeds\ngrpo\n-->\nold\n<!-- end table -->\nafter\n"
    text += "<!-- command one -->\nold\n<!-- end command -->\n"
    once = fill(text, results)
    assert fill(once, results) == once
    assert once.startswith("before\n") and "\nafter\n" in once and "| grpo | 2 |" in once and "`cures bench x`" in once
    assert "old" not in once


@pytest.mark.parametrize(
    ("name", "spec", "message"),
    [
        ("none", "columns: seeds\ngrpo\n", "none"),
        ("one", "grpo\n", "first line"),
        ("one", "columns: seeds\nlost\n", "no finished run of 'lost'"),
    ],
)
def test_a_table_that_cannot_be_made_says_why(results, name, spec, message):
    with pytest.raises(ConfigError, match=message):
        render(name, spec, results)


def test_the_documents_show_what_the_results_hold(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    assert main(["--check"]) == 0, "run: cures bench tables"
    capsys.readouterr()


def test_the_map_is_drawn_from_results_and_says_what_is_missing(results):
    with pytest.raises(ConfigError, match="no figure b@x=1/speedup/rollouts/50"):
        draw({"a": "one:b@x=1"}, "rollouts", results / "map.png", results)
    content = json.loads((results / "one.json").read_text())
    content["figures"] |= {f"b@x=1/speedup/rollouts/{f}": [1.0, 1.2, 1.5] for f in ("50", "80")}
    (results / "three.json").write_text(json.dumps(content))
    draw({"a": "three:b@x=1"}, "rollouts", results / "map.png", results)
    assert (results / "map.png").read_bytes()[:4] == b"\x89PNG"
