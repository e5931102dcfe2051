"""Tables of the documents come from the committed result files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.harness.cell import COST_AXES
from benchmarks.harness.doc_tables import ResultFile, cell, fill, main, render
from benchmarks.harness.results_file import RESULTS
from benchmarks.harness.runs import Comparison, commit_comparison, commit_runs, comparison_of, expand, runs_of
from benchmarks.research.map_picture import draw
from cures_ray.messages import ConfigError

ROOT = Path(__file__).resolve().parents[2]


COSTS = dict.fromkeys((*COST_AXES, "trained_tokens", "computed_tokens", "trained_rollouts"))


def run(arm: str, seed: int) -> dict:
    """A finished cell: greedy .2 -> .4 (seed 0) or .6 (seed 1) over 100 rollouts."""
    end = 0.4 + 0.2 * seed + (0.1 if arm != "grpo" else 0.0)
    points = [
        {key: float(cost) for key in COSTS} | {"version": v, "greedy": a, "sampled": a, "by_level": {}}
        for v, cost, a in ((0, 0, 0.2), (1, 100, end))
    ]
    return {
        "status": "done",
        "spec": {"label": arm, "seed": seed, "task": "chain"},
        "commit": "abc",
        "date": "2026-01-01",
        "config": {"learner": {"lr": 1e-3}},
        "accounting": {"planned": 100, "trained": 100, "discarded": {}, "in_flight": 0},
        "seconds_by_component": {},
        "curve": points,
        "plans": [{"tau": 0.25}],
        "steps": [],
    }


@pytest.fixture
def results(tmp_path) -> Path:
    runs = [run(arm, seed) for arm in ("grpo", "b@x=1") for seed in (0, 1)]
    lost = {"status": "failed", "spec": {"label": "lost", "seed": 0}, "why": "killed", "log": []}
    commit_runs("sweep", [*runs, lost], tmp_path)
    for name, arms in (("one", ["grpo", "b@x=1", "lost"]), ("two", ["grpo"])):
        comparison = Comparison(sweep="sweep", baseline="grpo", arms=arms, seeds=[0, 1], command="cures bench x")
        commit_comparison(name, comparison, tmp_path)
    return tmp_path


def test_a_committed_run_says_when_and_by_what_code_it_ran(results):
    line = json.loads((results / "runs" / "sweep.jsonl").read_text().splitlines()[0])
    assert (line["arm"], line["seed"], line["commit"], line["date"]) == ("grpo", 0, "abc", "2026-01-01")
    assert expand(line)["curve"] == run("grpo", 0)["curve"]


def test_a_run_that_is_committed_again_replaces_the_old_one(results):
    commit_runs("sweep", [run("grpo", 0) | {"commit": "new"}], results)
    lines = [json.loads(text) for text in (results / "runs" / "sweep.jsonl").read_text().splitlines()]
    assert [line["commit"] for line in lines] == ["new", "abc", "abc", "abc", "unknown"]


def test_a_table_is_made_from_its_comment(results):
    spec = """columns: seeds, final_sampled as final, difference/rollouts as more, mean/tau as τ, none
    GRPO = grpo
    b@x=1
    elsewhere = two:grpo
    """
    rows = render("one", spec, results).splitlines()
    assert rows[:2] == ["| arm | seeds | final | more | τ | none |", "|---|---|---|---|---|---|"]
    assert rows[2].startswith("| GRPO | 2 | 0.350 [")
    assert rows[3].startswith("| b@x=1 | 2 | 0.400 [") and "| +0.100 [+0.100, +0.100] | 0.25 | – |" in rows[3]
    assert rows[4].startswith("| elsewhere | 2 | 0.350 [")


def test_ratios_say_how_many_runs_never_got_there():
    ratios = {f"b/speedup/rollouts/{k}": [1.2, 1.5, 2.0] for k in ("50", "best")}
    figures = ratios | {"b/speedup/rollouts/best/censored": 1}
    result = ResultFile(command="", figures=figures, seeds={"b": 2}, explain={}, curves={})
    assert cell(result, "b", "speedup/rollouts/50") == "1.50 [1.20, 2.00]"
    assert cell(result, "b", "speedup/rollouts/best") == "≤ 1.50 (1/2 never)"


def test_accuracies_at_a_cost_are_means_over_seeds_with_their_range(results):
    assert "| GRPO | 0.350 (0.300 to 0.400) |" in render("one", "columns: greedy@50\ngrpo\n", results)


def test_filling_twice_changes_nothing_and_keeps_the_rest(results):
    text = "before\n<!-- table one\ncolumns: seeds\ngrpo\n-->\nold\n<!-- end table -->\nafter\n"
    text += "<!-- command one -->\nold\n<!-- end command -->\n"
    once = fill(text, results)
    assert fill(once, results) == once
    assert once.startswith("before\n") and "\nafter\n" in once and "| GRPO | 2 |" in once and "`cures bench x`" in once
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


def test_every_committed_comparison_has_its_runs():
    known = json.loads((RESULTS / "comparisons.json").read_text())
    assert len(known) > 10
    for name in known:
        comparison = comparison_of(name)
        assert len(runs_of(comparison)) >= len(comparison.arms), name


def test_the_map_is_drawn_from_results_and_says_what_is_missing(results):
    with pytest.raises(ConfigError, match="no figure c/speedup/rollouts/50"):
        draw({"a": "one:c"}, "rollouts", results / "map.png", results)
    draw({"a": "one:b@x=1"}, "rollouts", results / "map.png", results)
    assert (results / "map.png").read_bytes()[:4] == b"\x89PNG"
