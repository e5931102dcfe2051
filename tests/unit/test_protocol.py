"""The protocol: its cells, its tuning, its statistics, its tables, and the mixture that the survey leads to."""

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks.harness import lr_sweep, protocol
from benchmarks.harness.cell import config_of
from benchmarks.harness.mixture import CANDIDATES, mixed_share, mixture, surveyed
from benchmarks.harness.paired import holm, mean_accuracy, paired
from benchmarks.harness.protocol_cells import FOUR, GRPO, SPO, SYNTHETIC, TUNED, make_specs, rated, seeds_of
from benchmarks.harness.protocol_tables import map_table, report
from benchmarks.harness.protocol_tuning import extended, inside
from benchmarks.harness.real_task import REAL_TASK
from benchmarks.harness.runs import commit_runs, committed, compact, expand
from benchmarks.harness.sweep import Sweep
from cures_ray.messages import ConfigError


def cells(*words: str) -> list:
    return make_specs(protocol.parser().parse_args([*words, "--out", "o"]))


@pytest.mark.parametrize("words", [["a"], ["a", "--arms", "6", "--seeds", "10"], ["b"], ["c", "--seeds", "2"], ["map"]])
def test_every_cell_of_the_protocol_is_a_configuration(words):
    specs = cells(*words)
    assert len({spec.name for spec in specs}) == len(specs)
    for one in {(spec.label, spec.task): spec for spec in specs}.values():
        config = config_of(one, Path("run"))
        assert config.trainer.rollout_budget == one.budget and config.async_rl.max_staleness == 0


def test_part_a_has_four_arms_here_and_six_on_a_gpu_at_a_quarter_of_the_batch():
    here = cells("a")
    assert [spec.label for spec in here[:4]] == list(FOUR) and len(here) == 6 * 4
    assert len(cells("a", "--arms", "6", "--seeds", "10")) == 60
    shapes = {
        spec.label: (c.prompts_per_step, c.rollouts_per_step)
        for spec in here
        for c in [config_of(spec, Path("run")).curriculum]
    }
    assert shapes.pop(GRPO) == (16, 64)
    assert set(shapes.values()) == {(64, 64)}
    assert {spec.task for spec in here} == {REAL_TASK} and len({spec.base for spec in here}) == 1


def test_the_seeds_of_the_parts_are_their_own():
    found = [seed for part in ("a", "b", "c", "map") for seed in seeds_of(None, part)]
    assert len(set(found)) == len(found) and not set(found) & {100, 101}
    assert seeds_of("7,9", "a") == [7, 9]


def test_tuned_rates_go_to_their_arms_and_those_that_are_not_tuned_borrow():
    rates = {"chain": {"default": 1e-3, GRPO: 5e-4, SPO: 2e-3}, "program": {"default": 4e-3}}
    assert rated("default_permuted", "chain", rates) == "default_permuted@learner.lr=0.001"
    assert rated("default", "program", rates) == "default@learner.lr=0.004"
    assert rated(GRPO, "chain", rates) == f"{GRPO}@learner.lr=0.0005"
    assert rated("dapo", "chain", rates) == "dapo@learner.lr=0.0005"
    assert rated("spo_tokens", "chain", rates) == "spo_tokens@learner.lr=0.002"
    assert rated("default@tau=0.1", "chain", rates) == "default@tau=0.1@learner.lr=0.001"
    assert rated("rpp_single", "chain", rates) == rated("rpp_single", "chain", {}) == "rpp_single"
    with pytest.raises(ConfigError, match="tune-b --tasks chain_opaque"):
        rated("default", "chain_opaque", rates)


def test_every_arm_of_part_b_has_a_tuned_rate():
    rates = {task: {arm: 1e-3 for arm in TUNED} for task in SYNTHETIC}
    for spec in cells("b"):
        assert rated(spec.label, spec.task, rates).endswith("@learner.lr=0.001")


def test_rates_are_extended_for_all_arms_until_every_best_is_inside():
    rates = [1.0, 2.0, 4.0]
    assert inside({"a": 2.0, "b": 2.0}, rates)
    assert not inside({"a": 2.0, "b": 4.0}, rates)
    assert extended({"a": 2.0, "b": 4.0}, rates) == [1.0, 2.0, 4.0, 8.0]
    assert extended({"a": 1.0, "b": 4.0}, rates) == [0.5, 1.0, 2.0, 4.0, 8.0]


def test_tuning_extends_the_sweep_and_keeps_the_rates_of_other_tasks(tmp_path, monkeypatch):
    (tmp_path / "rates.json").write_text('{"program": {"default": 0.1}}')
    swept: list[set[float]] = []

    def sweep(words: list[str]) -> int:
        swept.append({float(rate) for rate in words[words.index("--rates") + 1].split(",")})
        return 0

    def rows(records: object) -> list[dict]:
        return [{"arm": arm, "lr": best, "best": True} for arm, best in (("default", 4e-3), (GRPO, 1e-3))]

    monkeypatch.setattr(lr_sweep, "main", sweep)
    monkeypatch.setattr(lr_sweep, "finished", lambda words: lr_sweep.make_specs(lr_sweep.parser().parse_args(words)))
    monkeypatch.setattr(lr_sweep, "rate_rows", rows)
    assert protocol.main(["tune-b", "--tasks", "chain", "--out", str(tmp_path)]) == 0
    assert swept == [{5e-4, 1e-3, 2e-3, 4e-3}, {5e-4, 1e-3, 2e-3, 4e-3, 8e-3}]
    found = json.loads((tmp_path / "rates.json").read_text())
    assert found == {"program": {"default": 0.1}, "chain": {"default": 4e-3, GRPO: 1e-3}}


def test_mean_accuracy_is_the_area_over_the_budget():
    curve = [{"rollouts": x, "greedy": y} for x, y in ((0, 0.0), (100, 0.5), (200, 0.5))]
    assert mean_accuracy(curve, "greedy", 200) == pytest.approx(0.375)
    assert mean_accuracy(curve, "greedy", 100) == pytest.approx(0.25)
    assert mean_accuracy(curve, "greedy", 150) == pytest.approx((25 + 25) / 150)
    assert mean_accuracy(curve, "greedy", 400) == pytest.approx((75 + 100) / 400)  # a run that ended early


def test_paired_differences_have_students_interval_and_power():
    rng = np.random.default_rng(0)
    one, two = rng.normal(0.5, 0.2, 10), np.zeros(10)
    test = paired(one, two)
    from scipy import stats

    assert test.p == pytest.approx(stats.ttest_rel(one, two).pvalue)
    assert (test.low, test.high) == pytest.approx(stats.t.interval(0.95, 9, one.mean(), one.std(ddof=1) / np.sqrt(10)))
    found = np.mean([paired(rng.normal(test.detectable, test.sd, 10), two).p < 0.05 for _ in range(800)])
    assert 0.74 < found < 0.86
    assert paired(one, two).seeds_for(test.detectable) == 10
    with pytest.raises(ValueError, match="two seeds"):
        paired(one[:1], two[:1])


def test_holm_is_the_step_down_rule():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == pytest.approx([1.0, 1.0])


def record(arm: str, seed: int, height: float) -> dict:
    curve = [
        {"rollouts": 1024.0 * i, "tokens": 1.0 + i, "learner_flops": 1.0 + i, "seconds": 1.0 + i, "optimizer_steps": i,
         "generated_tokens": i, "greedy": 0.2 + height * i / 20, "sampled": 0.1 + height * i / 20}
        for i in range(21)
    ]  # fmt: skip
    spec = {"label": arm, "seed": seed, "task": "chain", "variant": "T", "budget": 20480, "levels": []}
    seen = {"plans": [], "steps": [], "seconds_by_component": {}, "commit": "abc", "date": "2026-11-24"}
    account = {"planned": 20480, "trained": 20480, "discarded": {}}
    config = {"learner": {"lr": 1e-3}}
    return {"status": "done", "spec": spec, "curve": curve, "config": config, "accounting": account, **seen}


def test_the_report_has_the_family_of_tests_and_names_what_is_underpowered():
    rng = np.random.default_rng(0)
    records = [
        record(arm, seed, height + rng.normal(0, spread))
        for seed in range(4)
        for arm, height, spread in ((GRPO, 0.3, 0.001), (SPO, 0.5, 0.3), ("default", 0.5, 0.001))
    ]
    text = report("b", records, "a test")
    lines = [line for line in text.splitlines() if line.startswith("| default −")]
    assert len(lines) == 4
    assert all("underpowered" in line for line in lines if "SPO without" in line)
    assert not any("underpowered" in line for line in lines if "GRPO" in line)
    assert "- SPO without pilots: Beta" in text


def test_beliefs_and_the_best_constant_answer_are_in_the_tables_also_from_committed_lines():
    weights = {"belief/weight_recent": 0.25, "belief/weight_level": 0.0, "belief/weight_predictor": 0.75}
    step = {"step": 3.0, "belief/logloss": 0.51, "belief/ece": 0.07, "belief/logloss_recent": 0.6, **weights}
    full = record("default", 0, 0.3) | {"best_constant": 0.125, "steps": [{"step": 2.0}, step]}
    for point in full["curve"]:
        point["by_level"] = {}
    for one in (full, expand(json.loads(json.dumps(compact(full))))):
        text = report("b", [one], "a test")
        assert "| default | 0.510 | 0.070 | 0.600 | – | – | 0.250 | 0.000 | 0.750 |" in text
        assert "best constant answer: 0.125" in text


def test_the_map_compares_with_tuned_grpo_by_mix_features_and_rollouts():
    records = []
    for seed in (120, 121, 122):
        for levels, gain in (([1, 1, 2], 0.0), ([], 0.2)):
            for arm, more in ((GRPO, 0.0), ("default", gain), ("default_permuted@prompts_per_step=32", -gain)):
                one = record(arm, seed, 0.3 + more + 0.001 * seed * (arm == GRPO))
                one["spec"] |= {"levels": levels}
                records.append(one | {"explain": {"mixed_share_at_start": 0.5 if levels else 0.25}})
    lines = [line for line in map_table(records, 20_480).splitlines() if line.startswith("| all") or "few" in line]
    assert len(lines) == 4
    assert "| few mixed groups | 0.50 | 1 | informative | 3 | -0.0" in lines[0]
    assert "| all levels | 0.25 | 1 | informative | 3 | +0.0" in lines[2]
    assert "| all levels | 0.25 | 8 | permuted | 3 | -0.1" in lines[3]


def test_the_estimate_counts_what_is_left_and_learns_from_what_ran(tmp_path):
    specs = cells("b", "--seeds", "2", "--tasks", "chain")
    sweep = Sweep(tmp_path, other_code=True)
    assert f"chain: {len(specs)} of {len(specs)} cells to run, 35 s each" in protocol.estimate(specs, sweep, 2)
    results = {spec: {"status": "done", "spec": {"budget": 20480}, "wall_seconds": 80.0, "base_seconds": 20.0}
               for spec in map(str, specs[:4])}  # fmt: skip
    sweep_with = type("Known", (), {"result": lambda self, spec: results.get(str(spec))})()
    text = protocol.estimate(specs, sweep_with, 2)
    left = len(specs) - 4
    assert f"chain: {left} of {len(specs)} cells to run, 100 s each (mean of 4 here)" in text
    assert f"about {left * 100 / 2 / 3600:.1f} h, 2 side by side" in text


def test_cells_limits_a_call_to_the_first_that_wait(tmp_path):
    specs = cells("b", "--seeds", "1", "--tasks", "chain")
    known = type("Known", (), {"result": lambda self, spec: {} if spec in specs[:3] else None})()
    assert protocol.first_waiting(specs, known, 2) == specs[3:5]


def family(name: str, task: str, mixed: float, constant: float = 0.1) -> dict:
    return {"family": name, "task": task, "mixed": mixed, "best_constant": constant, "accuracy": 0.2}


def test_the_mixture_leaves_out_high_constants_families_without_mixed_prompts_and_a_third_of_a_task():
    rows = [
        family("yes_or_no", "calendar", 0.9, 0.5),
        family("sum", "chain_sum", 0.5),
        family("longer", "chain_sum", 0.4),
        family("longest", "chain_sum", 0.3),
        family("products", "products", 0.25),
        family("never", "lcm", 0.05),
        {"family": "few", "task": "products", "params": {}, "refused": "no 150 distinct prompts"},
    ]
    shares = mixture(rows)
    assert list(shares) == ["sum", "longer", "products"]
    assert sum(shares.values()) == pytest.approx(1.0)
    assert shares["sum"] > shares["longer"] > shares["products"] >= 0.05
    assert mixed_share(rows, shares) >= 0.3


def test_the_least_mixed_family_leaves_a_mixture_that_has_too_little():
    rows = [family("sum", "chain_sum", 0.35), family("product", "products", 0.12)]
    assert mixture(rows) == {"sum": 1.0}
    assert mixture([family("never", "lcm", 0.0)]) == {}


def test_a_run_of_another_task_or_mix_is_another_line(tmp_path):
    records = []
    for task, levels in (("chain", []), ("chain", [5, 6]), ("chain_opaque", [])):
        one = record("default", 60, 0.3)
        one["spec"] |= {"task": task, "levels": levels, "engine": "inprocess"}
        for point in one["curve"]:
            point["by_level"] = {}
        records.append(one)
    commit_runs("protocol_b", records[:2], tmp_path)
    commit_runs("protocol_b", records, tmp_path)
    found = [(r["spec"]["task"], r["spec"].get("levels", [])) for r in committed("protocol_b", tmp_path)]
    assert found == [("chain", []), ("chain", [5, 6]), ("chain_opaque", [])]
    text = report("b", committed("protocol_b", tmp_path), "a test")
    assert "## chain T\n" in text and "## chain T, levels [5, 6]" in text and "## chain_opaque T" in text


def test_part_a_takes_its_tasks_from_the_committed_survey(tmp_path):
    assert surveyed(tmp_path / "none.json") is None
    rows = [family("sum_of_2_to_3", "chain_sum", 0.5), family("product_of_2", "products", 0.3)]
    (tmp_path / "survey.json").write_text(json.dumps({"rows": rows}))
    tasks = surveyed(tmp_path / "survey.json")
    assert [(t["label"], t["name"]) for t in tasks] == [("sum_of_2_to_3", "chain_sum"), ("product_of_2", "products")]
    assert tasks[0]["params"] == CANDIDATES["sum_of_2_to_3"][1]


@pytest.mark.parametrize("part", ["a", "tune-a"])
def test_part_a_does_not_start_without_a_survey(part, tmp_path, monkeypatch):
    monkeypatch.setattr(protocol, "surveyed", lambda: None)
    with pytest.raises(ConfigError, match="cures bench survey --name survey_smollm2"):
        protocol.main([part, "--out", str(tmp_path)])
